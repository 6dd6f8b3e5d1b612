"""Random problems: `gather` held to `reference`, the reference to finite differences, and kernels
that are made to err held to the self-check."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checks import assert_no_worse
from support.methods import TESTED, sides
from support.wan import forward, transformer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gen_accel import BlockMixture, Neighborhood, Radial, SparseLinear, VideoShape, attach
from gen_accel.attention_processors import METHODS
from gen_accel.attention_processors.methods import block_mixture as picking
from gen_accel.functional import attention
from gen_accel.kernels import gather, triton
from gen_accel.kernels.self_check import SelfCheckFailed, check_rows

# The same problems at every run. The fixture that poisons memory may stay on from one to the next.
RANDOM = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Twice the reference's error suits one problem; among a thousand tensors of few numbers there are
# some on which the reference's own rounding happens to be small.
LUCK = 4.0


@st.composite
def videos(draw):
    return VideoShape(*draw(sides(4, 5, 6)), text=draw(st.sampled_from([0, 0, 1, 5, 9])))


@st.composite
def problems(draw):
    video = draw(videos())
    method = draw(TESTED[draw(st.sampled_from(sorted(TESTED)))].random(video))
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        video.tokens,
        draw(st.sampled_from([4, 8, 16])),
    )
    trained = method.defines("branch") and draw(st.booleans())
    return video, method, shape, trained, draw(st.integers(0, 99))


def hold_to_reference(problem):
    """Output and gradients of `gather`, within the error budget."""
    video, method, shape, trained, seed = problem
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=g) for _ in range(3)]
    weight = torch.randn(shape, generator=g)
    branch = method.branch(shape[1], shape[3]) if trained else None
    for parameter in branch.parameters() if trained else ():
        torch.nn.init.uniform_(parameter, 0.2, 0.8, generator=g)

    def results(kernel, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        if branch is not None:
            branch.to(dtype)
        out = attention(*leaves, video=video, method=method, kernel=kernel, branch=branch)
        wanted = [*leaves, *(branch.parameters() if trained else ())]
        return [out.detach(), *torch.autograd.grad(out, wanted, weight.to(dtype))]

    exact, low = results("reference", torch.float64), results("reference", torch.float32)
    for actual, *rest in zip(results("gather", torch.float32), low, exact, strict=True):
        assert_no_worse(actual, *rest, factor=LUCK)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@RANDOM
@given(problems())
def test_gather_is_the_reference(problem):
    hold_to_reference(problem)


@pytest.mark.nightly
@pytest.mark.usefixtures("poison")
@settings(RANDOM, max_examples=1000)
@given(problems())
def test_gather_is_the_reference_on_a_thousand_problems(problem):
    hold_to_reference(problem)


@pytest.mark.nightly
def test_the_random_problems_cover_the_methods():
    seen: dict[str, int] = {}

    @settings(RANDOM, max_examples=400)
    @given(problems())
    def count(problem):
        video, method, shape, trained, _ = problem
        plan = method.plan(video)
        facts = {
            type(method).__name__: True,
            "text": video.text > 0,
            "batch": shape[0] > 1,
            "heads": shape[1] > 1,
            "padding": not plan.real.all(),
            "sparse": plan.density < 1,
            "rule": plan.partial is not None,
            "branch": trained,
        }
        for name, holds in facts.items():
            seen[name] = seen.get(name, 0) + bool(holds)

    count()
    assert {method.__name__ for method in METHODS.values()} <= seen.keys()
    assert min(seen.values()) >= 5, seen


TINY = VideoShape(2, 3, 4, text=3)
DIFFERENTIATED = [method for row in TESTED.values() for method in row.differentiated]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", ["reference", pytest.param("gather", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    "method",
    [
        *(pytest.param(method, marks=pytest.mark.slow) for method in DIFFERENTIATED[:-2]),
        *DIFFERENTIATED[-2:],
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(method, kernel):
    """Through the parameters too, if there are some."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, TINY.tokens, 2, generator=g, dtype=torch.double).requires_grad_()
        for _ in range(3)
    )
    case = {"video": TINY, "method": method, "kernel": kernel}
    if not method.defines("branch"):
        assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, **case), (q, k, v))
        return
    branch = method.branch(2, 2).double()
    names, parameters = zip(*branch.named_parameters(), strict=True)
    for parameter in parameters:
        torch.nn.init.uniform_(parameter, 0.2, 0.8, generator=g)

    def run(q, k, v, *values):
        def trained(o_s, o_l):
            given = dict(zip(names, values, strict=True))
            return torch.func.functional_call(branch, given, (o_s, o_l))

        return attention(q, k, v, **case, branch=trained)

    assert torch.autograd.gradcheck(run, (q, k, v, *parameters))


@pytest.mark.parametrize(
    "sharpness",
    [
        1.0,
        3.0,
        10.0,
    ],
)
def test_gather_in_bf16_passes_the_self_check(sharpness):
    """Scores of this standard deviation."""
    video, method = VideoShape(8, 16, 16), Neighborhood((-1, 4, 4))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, video.tokens, 64, generator=g).bfloat16() for _ in range(3))
    plan, scale = method.plan(video), sharpness / 8
    out = gather.kernel.forward(q, k, v, plan, scale=scale)
    check_rows(q, k, v, plan, out, scale=scale, name="gather")


CHECKED = [
    Radial(decay_factor=0.2),
    Neighborhood((-1, 3, 4)),
    BlockMixture(chunk_1d=2, chunk_2d=(4, 3), chunk_3d=(2, 4, 3), block=16),
    SparseLinear(critical=0.3, block_q=16, block_k=16),
]


@pytest.fixture(scope="module")
def model():
    """Shared: a test leaves it as it found it."""
    return transformer()


@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")
@pytest.mark.parametrize("method", CHECKED, ids=str)
class TestSelfCheck:
    @pytest.fixture
    def erring(self, monkeypatch):
        """Make `gather` answer something else."""
        right = gather.kernel.forward

        def err(change):
            monkeypatch.setattr(
                gather.kernel, "forward", lambda *args, **options: change(right(*args, **options))
            )

        return err

    @pytest.mark.parametrize("kernel", ["auto", "gather"])
    def test_a_right_kernel_passes_and_the_answer_is_the_same(self, model, method, kernel):
        with attach(model, method, kernel=kernel, self_check=False):
            expected = forward(model)
        with attach(model, method, kernel=kernel, self_check=True):
            assert torch.equal(forward(model), expected)
            forward(model, 3, 10, 14)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda out: out * 1.001, id="scaled"),
            pytest.param(lambda out: out.roll(1, 2), id="a token late"),
            pytest.param(lambda out: torch.full_like(out, torch.nan), id="nan"),
            pytest.param(lambda out: torch.cat([out[:, :1], 0 * out[:, 1:]], 1), id="last head"),
        ],
    )
    def test_one_that_errs_is_refused_with_figures(self, model, method, change, erring):
        erring(change)
        figures = (
            r"kernel 'gather' errs by (\d\.\d\de[+-]\d\d|nan) on q \(2, 2, 495, 16\) "
            r"torch.float32 on cpu, allowed are \d\.\d\de-\d\d"
        )
        with (
            attach(model, method, kernel="gather", self_check=True),
            pytest.raises(SelfCheckFailed, match=figures),
        ):
            forward(model)

    def test_a_shape_is_checked_once(self, model, method, erring):
        with attach(model, method, kernel="gather", self_check=True):
            forward(model)
            erring(lambda out: out * 1.5)
            forward(model)
            with pytest.raises(SelfCheckFailed):
                forward(model, 3, 10, 14)

    def test_without_being_asked_a_cpu_is_not_checked(self, model, method, erring):
        erring(lambda out: out * 1.5)
        with attach(model, method, kernel="gather"):
            assert torch.isfinite(forward(model)).all()


@pytest.mark.parametrize(
    "method",
    [
        BlockMixture(partition="3d", chunks=(2, 4, 8)),
        BlockMixture(partition="2d", chunks=(2, 4, 8), select="topk", scope="overall"),
        BlockMixture(partition="1d", scope="query_head", routing="block"),
        SparseLinear(critical=0.3, linear_over="marginal", block_q=16, block_k=16),
    ],
    ids=str,
)
def test_choosing_never_waits_for_the_device(method, monkeypatch):
    """Tensors without values stand in for those of a device: to ask for a value is an error."""
    monkeypatch.setattr(picking, "SORTED", 0)
    video = VideoShape(5, 9, 10, text=7)
    method.plan_for(*(torch.randn(2, 2, video.tokens, 16) for _ in "qk"), video=video)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (torch.randn(2, 2, video.tokens, 16) for _ in "qk")
        plan = method.plan_for(q, k, video=video)
        assert plan.densities()[0].shape == ()
        lists = triton.lists.prepare(plan)
        assert lists.row_counts.shape == (2, 2, plan.keep.shape[2], 4)
        with pytest.raises(DataDependentOutputException):
            plan.keep.sum().item()
