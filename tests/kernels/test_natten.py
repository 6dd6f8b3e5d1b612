"""The kernel of NATTEN. Without a GPU, a stand-in of its documented windows takes its place."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support import natten as stand_in
from support.checks import assert_no_worse
from support.problems import assert_gradients_no_worse, random_plan

from gen_accel import kernels
from gen_accel.attention_processors import Neighborhood, Radial
from gen_accel.functional import attention
from gen_accel.kernels import Facts, facts_of, natten
from gen_accel.pipelines.attach import attach
from gen_accel.video import VideoShape

pytestmark = pytest.mark.usefixtures("poison")

CASES = [
    pytest.param(Neighborhood((3, 3, 3)), VideoShape(4, 5, 6), id="odd windows"),
    pytest.param(Neighborhood((2, 4, 4)), VideoShape(4, 5, 6), id="even windows"),
    pytest.param(
        Neighborhood((2, 4, 5), stride=(2, 3, 4)), VideoShape(5, 6, 7), id="strides, ragged"
    ),
    pytest.param(
        Neighborhood((2, 4, 4), stride=(2, 4, 4)), VideoShape(4, 8, 8), id="a window a group"
    ),
    pytest.param(
        Neighborhood((2, 2, 3), dilation=(2, 3, 1)), VideoShape(5, 7, 4), id="dilated, ragged"
    ),
    pytest.param(
        Neighborhood(
            (2, 3, 2), stride=(2, 2, 1), dilation=(2, 1, 2), is_causal=(True, False, True)
        ),
        VideoShape(5, 5, 5, text=4),
        id="causal, strided, dilated, text",
    ),
    pytest.param(Neighborhood((-1, 3, 3)), VideoShape(3, 5, 5, text=6), id="all frames, text"),
    pytest.param(Neighborhood((-1, 3, 4)), VideoShape(1, 6, 7, text=3), id="a single frame, text"),
    pytest.param(Neighborhood((-1, -1, 4)), VideoShape(1, 1, 9), id="one axis"),
    pytest.param(Neighborhood((-1, -1, -1)), VideoShape(2, 4, 4, text=3), id="whole axes"),
]


@pytest.fixture
def calls(monkeypatch):
    """The axes of each call of the stand-in."""
    given = []
    monkeypatch.setattr(natten, "_library", stand_in.library(given))
    monkeypatch.setattr(natten, "_dense", lambda: stand_in.dense)
    monkeypatch.setattr(
        natten.kernel, "unsupported", lambda facts: natten._plan_reasons(facts.plan)
    )
    return given


def by(name, method, video):
    case = {"video": video, "method": method, "kernel": name, "scale": 0.3}
    return lambda q, k, v: attention(q, k, v, **case)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "video"), CASES)
def test_it_matches_the_reference(method, video, qkv, calls):
    ours, its = (by(name, method, video) for name in ("natten", "reference"))
    inputs = qkv(video.tokens)
    for given in (inputs, [x.bfloat16() for x in inputs]):
        assert_no_worse(ours(*given), its(*given), its(*(x.double() for x in given)))
    assert_gradients_no_worse(ours, its, inputs)
    assert set(calls) == {sum(size > 1 for size in video.grid)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "video"), CASES[-5:])
def test_the_log_sum_exp_is_that_of_the_reference(method, video, dtype, qkv, calls):
    """Of the grid, with its additional keys, and of the text."""
    plan, inputs = method.plan(video), [x.cpu() for x in qkv(video.tokens, dtype)]

    def both(name, *x):
        run = kernels.kernel_of(name).forward_lse
        return run(*x, plan, scale=0.3)

    exact = both("reference", *(x.double() for x in inputs))
    for three in zip(both("natten", *inputs), both("reference", *inputs), exact, strict=True):
        assert_no_worse(*three)
    assert calls


@pytest.mark.turns(3)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [7, 8])
def test_windows_lie_where_ours_lie(size, is_causal):
    """Every window, stride and dilation of an axis: pair by pair."""
    for window in range(2, size + 1):
        for dilation in range(1, size // window + 1):
            for stride in range(1, window + 1):
                options = (1, 1, window), (1, 1, stride), (1, 1, dilation)
                method = Neighborhood(*options, is_causal=(False, False, is_causal))
                plan, s = method.plan(VideoShape(1, 1, size)), torch.arange(size)
                at = plan.places[s]
                ours = plan.partial.allows(at[:, None], at)
                its = stand_in.axis(size, window, stride, dilation, is_causal)
                assert torch.equal(ours, its), method


class TestRefusals:
    def test_a_window_of_one_token(self, calls, qkv):
        video = VideoShape(3, 4, 4)
        with pytest.raises(
            ValueError, match="natten: a window must have at least 2 rows, got 1 of 4"
        ):
            by("natten", Neighborhood((2, 1, 2)), video)(*qkv(video.tokens))
        assert not calls

    def test_what_leaves_pairs_of_the_windows_out(self):
        plan = Neighborhood((2, 2, 2)).plan(VideoShape(4, 4, 4))
        assert natten._plan_reasons(plan) == []
        cut = plan.changed(keep=plan.keep.tril())
        assert natten._plan_reasons(cut) == ["this plan leaves out pairs of its windows"]
        (reason,) = natten._plan_reasons(random_plan("cpu", windows=True))
        assert "no boxes of one size" in reason

    def test_the_cpu(self, qkv):
        video = VideoShape(3, 4, 4)
        with pytest.raises(ValueError, match="run on CUDA only, got cpu"):
            by("natten", Neighborhood((2, 2, 2)), video)(*qkv(video.tokens))

    def test_a_gradient_of_the_log_sum_exp(self, qkv):
        video = VideoShape(3, 4, 4)
        plan = Neighborhood((2, 2, 2)).plan(video)
        for grad, lse in ((True, True), (True, False), (False, True)):
            facts = facts_of(*qkv(video.tokens), plan, grad=grad, lse=lse)
            said = "its log-sum-exp has no gradient" in natten.kernel.unsupported(facts)
            assert said == (grad and lse)

    def test_a_version_that_gives_no_log_sum_exp(self, monkeypatch):
        library = SimpleNamespace(HAS_LIBNATTEN=True, na3d=lambda query, *, scale: query)
        monkeypatch.setitem(sys.modules, "natten", library)
        natten._library_reasons.cache_clear()
        assert natten._library_reasons() == []
        assert natten._library_reasons(lse=True) == [
            "this natten gives no log-sum-exp, as 0.21.5 and later do"
        ]
        natten._library_reasons.cache_clear()

    def test_other_patterns(self, qkv):
        video = VideoShape(3, 4, 4)
        plan = Radial(block=16).plan(video)
        reasons = natten.kernel.unsupported(facts_of(*qkv(video.tokens), plan))
        assert "it takes windows over a grid alone, as Neighborhood makes them" in reasons

    def test_a_scale_that_it_would_not_see(self, calls, qkv):
        video, method = VideoShape(3, 4, 4), Neighborhood((2, 2, 2))
        case = {"video": video, "method": method, "kernel": "natten", "scale": 0.0}
        with pytest.raises(ValueError, match="takes a scale of 0 for its default"):
            attention(*qkv(video.tokens), **case)
        assert not calls

    def test_what_is_not_there_is_named(self, monkeypatch):
        natten._library_reasons.cache_clear()
        monkeypatch.setitem(sys.modules, "natten", None)
        assert natten._library_reasons()[0].startswith("natten cannot be imported: ")
        natten._library_reasons.cache_clear()
        monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(HAS_LIBNATTEN=False))
        (reason,) = natten._library_reasons()
        assert reason == f"this natten was built without its CUDA kernels: {natten.INSTALL}"
        natten._library_reasons.cache_clear()
        monkeypatch.setattr(natten, "installed", lambda: False)
        found = natten.kernel.unsupported(facts())
        assert found == [
            f"natten is not installed: {natten.INSTALL}; wheels: https://natten.org/install"
        ]


def facts(pattern="windows"):
    given = ((1, 2, 256, 64),) * 3, (torch.bfloat16,) * 3, (torch.device("cuda"),) * 3
    return Facts(*given, pattern)


def test_auto_tries_it_for_windows_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, first in ((9, "natten"), (10, "natten"), (8, "triton"), (12, "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, m=major: (m, 0))
        assert next(iter(kernels.preference(facts()))) == first
        assert next(iter(kernels.preference(facts("blocks")))) != "natten"


@pytest.mark.slow
def test_the_summary_says_that_it_ran(calls):
    from support import wan

    model = wan.transformer().cpu()
    with attach(model, Neighborhood((2, 2, 2)), kernel="natten") as handle, torch.no_grad():
        wan.forward(model)
        assert "natten" in str(handle.summary())
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("text", [0, 13])
def test_the_real_one_matches_the_reference(text):
    video = VideoShape(6, 12, 20, text=text)
    method = Neighborhood((3, 4, 8), stride=(1, 2, 4))
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, video.tokens, 64, generator=g).to("cuda") for _ in range(3)]
    low = [x.bfloat16() for x in inputs]
    plan = method.plan(video, "cuda")
    if reasons := natten.kernel.unsupported(facts_of(*low, plan, grad=True)):
        pytest.skip("; ".join(reasons))
    ours, its = (by(name, method, video) for name in ("natten", "reference"))
    assert_no_worse(ours(*low), its(*low), its(*(x.double() for x in low)))
    assert_gradients_no_worse(ours, its, inputs, torch.bfloat16)
