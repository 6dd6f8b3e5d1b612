"""The choice of blocks and the linear branch in C++, held to torch."""

from functools import partial
from itertools import product

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support import wan
from support.checks import assert_no_worse
from support.problems import assert_gradients_no_worse
from torch import nn

from gen_accel import BlockMixture, SparseLinear, VideoShape, attach
from gen_accel.attention_processors.context_parallel import of_heads
from gen_accel.functional import attention
from gen_accel.kernels import Runner, choosing
from gen_accel.kernels.dispatch import native_serves
from gen_accel.kernels.native import build, linear, selection
from gen_accel.plan import slots_of, tile_slots

pytestmark = pytest.mark.usefixtures("built")

VIDEOS = [
    pytest.param(VideoShape(5, 9, 10), marks=pytest.mark.slow),
    VideoShape(4, 7, 8, text=13),
]
SELECTIONS = [
    (select, scope)
    for select, scope in product(
        ("threshold", "topk"), ("query_head", "head_global", "overall", "block")
    )
    if (select, scope) != ("topk", "block")
]


def nothing(name="auto"):
    """A kernel of that name that runs none."""
    return Runner(lambda q, k, v, plan: q, name)


def both(function):
    """What a function of the kernel's name gives in torch, and in C++."""
    return function("reference"), function("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_sums_of_blocks(video, dtype, qkv):
    slots = slots_of(tile_slots(video, (2, 4, 4)), 32, 16)
    x = qkv(video.tokens, dtype, dim=33)[0].transpose(1, 2).contiguous().transpose(1, 2)
    for block in (16, 32):
        plain, found = both(lambda name, block=block: choosing.block_means(x, slots, block, name))
        exact = choosing.block_means(x.double(), slots, block)
        assert_no_worse(found, plain, exact)


@pytest.mark.parametrize("routing", ["token", "block"])
@pytest.mark.parametrize(("select", "scope"), SELECTIONS)
@pytest.mark.parametrize("partition", ["1d", "2d", "3d"])
@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_queries_pick_the_same(video, partition, select, scope, routing, qkv):
    q, k, _ = qkv(video.tokens, dim=33)
    for threshold in (0.1, 0.25, 0.9):
        method = BlockMixture(
            partition=partition,
            select=select,
            scope=scope,
            routing=routing,
            threshold=threshold,
            topk=(2, 5, 7),
            chunks=(4, 9, 12),
        )
        plain, found = both(
            lambda name, method=method: method.plan_for(q, k, video=video, kernel=name)
        )
        assert torch.equal(plain.keep, found.keep)
        assert plain.density == found.density
        if routing == "token":
            real = plain.real
            assert torch.equal(plain.partial.picks[:, :, real], found.partial.picks[:, :, real])
            assert not found.partial.picks[:, :, ~real].any()


@pytest.mark.parametrize(("select", "scope"), SELECTIONS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_scores_that_are_equal_go_together(value, select, scope):
    video = VideoShape(4, 8, 8, text=5)
    x = torch.full((2, 2, video.tokens, 16), value)
    method = BlockMixture(partition="3d", select=select, scope=scope, topk=(2, 2, 2))
    plain, found = both(lambda name: method.plan_for(x, x, video=video, kernel=name))
    assert torch.equal(plain.keep, found.keep)


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_many_scores(scope):
    """So many that torch counts them in bins, and more threads than scopes."""
    video = VideoShape(10, 16, 16)
    q, k = torch.randn(2, 1, 1, video.tokens, 16, generator=torch.Generator().manual_seed(0))
    method = BlockMixture(partition="3d", scope=scope, chunks=(4, 9, 40))
    plain, found = both(lambda name: method.plan_for(q, k, video=video, kernel=name))
    real = plain.real
    assert torch.equal(plain.partial.picks[:, :, real], found.partial.picks[:, :, real])


@pytest.mark.parametrize(
    ("block_q", "block_k", "tile"),
    [
        (48, 36, "raster"),
        pytest.param(64, 32, "auto", marks=pytest.mark.slow),
        pytest.param(16, 64, "auto", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("feature_map", linear.MAPS)
@pytest.mark.parametrize("linear_over", ["all", "rest", "marginal"])
@pytest.mark.parametrize("video", VIDEOS, ids=str)
class TestLinearBranch:
    def run(self, video, linear_over, feature_map, block_q, block_k, tile):
        method = SparseLinear(
            critical=0.2,
            linear_over=linear_over,
            feature_map=feature_map,
            block_q=block_q,
            block_k=block_k,
            tile=tile,
        )
        return lambda name, *qkv: method.parts(*qkv, video=video, kernel=nothing(name))[1]

    def test_forward(self, video, linear_over, feature_map, block_q, block_k, tile, qkv):
        function = self.run(video, linear_over, feature_map, block_q, block_k, tile)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = qkv(video.tokens, dtype, dim=33)
            plain, found = both(lambda name, inputs=inputs: function(name, *inputs))
            exact = function("reference", *(x.double() for x in inputs))
            assert_no_worse(found, plain, exact)

    def test_gradients(self, video, linear_over, feature_map, block_q, block_k, tile, qkv):
        function = self.run(video, linear_over, feature_map, block_q, block_k, tile)
        inputs = qkv(video.tokens, dim=33)
        found, plain = partial(function, "native"), partial(function, "reference")
        assert_gradients_no_worse(found, plain, inputs)


def test_a_query_block_without_linear_keys_does_not_disturb_the_gradients(qkv):
    """Over its denominator, epsilon alone, gradients would be 100,000 times as large."""
    sets = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    sets[0, 0, 1] = False
    sets[0, 0, 2, 3] = False
    inputs = [x.requires_grad_() for x in qkv(64, batch=1, heads=1)]

    def run(which, q, k, v):
        order = torch.arange(64)
        return linear.linear(q, k, v, order, which, 16, 16, 0, 1e-5)

    grads = torch.autograd.grad(run(sets, *inputs)[:, :, 32:].sum(), inputs)
    whole = torch.autograd.grad(run(sets, *inputs).sum(), inputs)
    first = torch.autograd.grad(run(sets, *inputs)[:, :, :16].sum(), inputs)
    for part, rest, both in zip(grads, first, whole, strict=True):
        torch.testing.assert_close(part + rest, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_map", linear.MAPS)
def test_what_is_left_of_much_is_exact(feature_map):
    """The blocks that are left out hold nearly all of what a query sees."""
    g = torch.Generator().manual_seed(0)
    video, centres = VideoShape(8, 8, 8), torch.randn(1, 1, 8, 1, 64, generator=g)
    q, k, v = (torch.randn(1, 2, 512, 64, generator=g) for _ in range(3))
    q, k = (4 * (x.unflatten(2, (8, 64)) * 0.3 + centres).flatten(2, 3) for x in (q, k))
    method = SparseLinear(critical=0.3, feature_map=feature_map, tile="raster")

    def branch(name, *inputs):
        return method.parts(*inputs, video=video, kernel=nothing(name))[1]

    plain, found = both(lambda name: branch(name, q, k, v))
    assert_no_worse(found, plain, branch("reference", q.double(), k.double(), v.double()))


def test_equal_scores_are_critical_or_skipped_not_both():
    video = VideoShape(8, 16, 16)
    x = torch.ones(1, 1, video.tokens, 16)
    method = SparseLinear(critical=0.25, skipped=0.25, linear_over="marginal")
    for _, sets in both(lambda name: method._chosen(x, x, video, name, 1.0)):
        assert (sets.sum(-1) == 16).all()


@pytest.mark.parametrize("method", [SparseLinear(critical=0.3), BlockMixture(partition="3d")])
def test_what_does_not_fit_is_refused(method, qkv):
    video = VideoShape(4, 8, 8)
    q, k, v = qkv(video.tokens)
    for short in ((q[:, :, 1:], k), (q, k[:, :, 1:])):
        with pytest.raises(ValueError, match=r"from -1 to 254, got 255|each of 255 tokens once"):
            method.plan_for(*short, video=video)
    if method.defines("branch"):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"branch must be as SparseLinear\.branch"),
        ):
            attention(q, k, v, video=video, method=method, branch=method.branch(2, 8))
        with pytest.raises(ValueError, match="must be alike"):
            method.parts(q, k, v[..., 1:], video=video, kernel=nothing())


class TestInOnePass:
    video = VideoShape(4, 8, 8)
    method = SparseLinear(critical=0.3)

    def branch(self):
        branch = self.method.branch(3, 16)
        with torch.no_grad():
            branch.proj.weight.normal_()
            branch.proj.bias.normal_()
        return branch

    def called(self, monkeypatch):
        """How often the pass runs, as a list."""
        calls, before = [], linear.add_projected_linear

        def counted(*args):
            calls.append(args)
            return before(*args)

        monkeypatch.setattr(linear, "add_projected_linear", counted)
        return calls

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_it_is_the_sum_of_both(self, dtype, monkeypatch, qkv):
        calls, branch = self.called(monkeypatch), self.branch()
        q, k, v = qkv(self.video.tokens, dtype, heads=3)
        case = {"video": self.video, "method": self.method}
        low = attention(q, k, v, kernel="reference", branch=branch.to(dtype), **case)
        assert not calls  # there is a gradient to be kept for
        exact = [x.double() for x in (q, k, v)]
        exact = attention(*exact, kernel="reference", branch=branch.double(), **case).detach()
        with torch.no_grad():
            found = attention(q, k, v, kernel="native", branch=branch.to(dtype), **case)
        assert calls
        assert_no_worse(found, low.detach(), exact)

    @pytest.mark.parametrize("what", ["hook", "adapter", "forward", "alpha", "some heads"])
    def test_not_where_more_than_numbers_is_asked_of_the_layer(self, what, monkeypatch, qkv):
        calls, branch = self.called(monkeypatch), self.branch()
        seen = []
        if what == "hook":
            branch.proj.register_forward_hook(lambda *args: seen.append(args))
        elif what == "adapter":
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), branch)
        elif what == "forward":
            branch.proj.forward = lambda x: nn.functional.linear(x, branch.proj.weight)
        elif what == "alpha":
            branch = SparseLinear(critical=0.3, combine="alpha").branch(3, 16)
        else:
            branch = SparseLinear(critical=0.3, combine="alpha").branch(6, 16)
            branch = of_heads(branch, slice(3, 6))
        with torch.no_grad():
            case = {"video": self.video, "method": self.method, "branch": branch}
            attention(*qkv(self.video.tokens, heads=3), **case)
        assert not calls
        assert len(seen) == (what == "hook")


@pytest.mark.parametrize(
    "method", [BlockMixture(partition="3d", chunks=(2, 4, 8)), SparseLinear(critical=0.2)], ids=str
)
def test_any_number_of_threads(method, qkv):
    video = VideoShape(5, 9, 10)
    inputs = qkv(video.tokens, batch=1, heads=3)
    before = torch.get_num_threads()
    plans = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            plans.append(method.plan_for(*inputs[:2], video=video))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(plans[0].keep, plan.keep) for plan in plans[1:])


def test_derivatives_that_it_does_not_know(qkv):
    """Under torch.func and forward-mode differentiation torch runs, as without it."""
    video, method = VideoShape(4, 8, 8), SparseLinear(linear_over="all")
    q, k, v = qkv(video.tokens)

    def branch(q):
        return method.parts(q, k, v, video=video, kernel=nothing())[1]

    way = v  # not alike in all numbers of a query, which a softmax does not see
    _, found = torch.func.jvp(branch, (q,), (way,))
    near = [branch(q.double() + sign * 1e-3 * way).float() for sign in (1, -1)]
    close = (near[0] - near[1]) / 2e-3
    torch.testing.assert_close(found, close, rtol=1e-2, atol=1e-3)
    assert found.abs().max() > 1e-2
    with torch.autograd.forward_ad.dual_level():
        assert not native_serves("auto", q)


def test_what_it_serves():
    x = torch.ones(1)
    for kernel in ("auto", "native", "int8"):
        assert native_serves(kernel, x, x)
        assert not native_serves(kernel, x, x.bfloat16())
        assert not native_serves(kernel, x.double())
        assert not native_serves(kernel, x.to("meta"))
    for kernel in ("reference", "gather", "fa4", "flex", "natten", "routed", "triton", "xformers"):
        assert not native_serves(kernel, x, x)


LIBRARY = [
    (linear, "linear"),
    (linear, "add_projected_linear"),
    (selection, "block_sums"),
    (selection, "picks"),
    (selection, "kept_blocks"),
    (build, "run"),
]


@pytest.fixture
def cpp(monkeypatch):
    """The names of the functions of C++ that were called, as a list."""
    called = []

    def spied(module, name):
        before = getattr(module, name)

        def call(*args, **kwargs):
            called.append(name)
            return before(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in LIBRARY:
        spied(module, name)
    return called


@pytest.mark.parametrize("kernel", ["reference", "gather"])
@pytest.mark.parametrize(
    "method",
    [
        BlockMixture(partition="3d", chunks=(2, 4, 8)),
        BlockMixture(partition="3d", chunks=(2, 4, 8), routing="block"),
        SparseLinear(critical=0.3),
        SparseLinear(critical=0.3, linear_over="all", combine="alpha"),
    ],
    ids=str,
)
def test_the_name_of_a_kernel_decides_for_all_that_runs(method, kernel, cpp, qkv):
    """The choice of blocks and the linear branch too: with this name nothing of C++ runs."""
    video = VideoShape(4, 8, 8)
    q, k, v = qkv(video.tokens)
    branch = {}
    if isinstance(method, SparseLinear):
        branch["branch"] = method.branch(2, 16)
    case = {"video": video, "method": method, **branch}
    attention(q, k, v, kernel=kernel, **case)
    with torch.no_grad():
        attention(q, k, v, kernel=kernel, **case)
    assert cpp == []
    attention(q, k, v, kernel="native", **case)
    assert "run" in cpp


@pytest.mark.parametrize("kernel", ["reference", "native", "auto"])
def test_the_name_given_to_attach_decides_too(kernel, cpp):
    model = wan.transformer()
    with attach(model, BlockMixture(chunks=(2, 4, 8)), kernel=kernel), torch.no_grad():
        wan.forward(model)
    assert bool(cpp) == (kernel != "reference")


def test_a_kernel_without_a_name_is_auto(cpp, qkv):
    """As a method of the user's own, or a test, may hand one on."""
    video = VideoShape(4, 8, 8)
    method = BlockMixture(partition="3d", chunks=(2, 4, 8))
    method(*qkv(video.tokens), video=video, kernel=lambda q, k, v, plan: q)
    assert "picks" in cpp
