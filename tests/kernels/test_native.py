"""The CPU kernel in C++: what test_kernels.py does not ask of every kernel."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import wan
from support.checks import assert_no_worse
from support.problems import all_picked, assert_gradients_no_worse, random_plan
from support.products import in_turns, slow_after

import gen_accel
from gen_accel import BlockMixture, Neighborhood, Radial, SparseLinear, VideoShape, kernels
from gen_accel.functional import attention
from gen_accel.kernels import Facts, KernelFailed, facts_of, lists, native, reference
from gen_accel.kernels.native import build, int8, selection
from gen_accel.plan import Plan, Route

pytestmark = pytest.mark.usefixtures("poison", "native_kernel")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def threads():
    """Sets their number, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def by(plan, kernel, scale=0.3):
    return lambda q, k, v: kernel.kernel.forward(q, k, v, plan, scale=scale)


SIZES = [  # queries and keys in a block, and the head dim
    (300, 90, 33),
    *((300, 90, dim) for dim in (8, 64, 256)),
    *((7, 5, dim) for dim in (33, 64)),
    *((30, 600, dim) for dim in (8, 33, 256)),
    (300, 75, 33),
]
# And whether products are of bf16, which is for bf16 alone.
NUMBERS = [(BF16, True), (FP32, False), (BF16, False), (FP16, False)]


@pytest.mark.turns(3)
@pytest.mark.parametrize(("size", "numbers"), slow_after(2, in_turns(SIZES, NUMBERS)), ids=str)
def test_any_size_matches_reference(size, numbers, monkeypatch, qkv):
    """Blocks that divide nothing, longer than a piece of queries or a tile of keys."""
    (block_q, block_k, dim), (dtype, halves) = size, numbers
    if halves and not native.multiplies_bf16():
        pytest.skip("this processor has no products of bf16")
    monkeypatch.setattr(native, "multiplies_bf16", lambda: halves)
    slots = 2100 if block_q == 7 else 1800
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 1, slots // block_q, slots // block_k, generator=g) < 0.4
    order = torch.full((slots,), -1)
    held = torch.randperm(slots, generator=g)[: slots - 11]
    order[held] = torch.randperm(slots - 11, generator=g)
    plan = Plan(order, keep, block_q, block_k)
    q, k, v = qkv(slots - 11, dtype, batch=1, heads=1, dim=dim)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.3)
    low = reference.kernel.forward(q, k, v, plan, scale=0.3)
    assert_no_worse(native.kernel.forward(q, k, v, plan, scale=0.3), low, exact)
    if dim in (33, 64) and dtype != FP16:
        inputs = [x.to(BF16).float() for x in (q, k, v)]
        assert_gradients_no_worse(by(plan, native), by(plan, reference), inputs, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "block"), in_turns([FP32, BF16], [50, 75]), ids=str)
def test_more_queries_of_a_group_than_a_product_takes(block, dtype, qkv):
    """And more than are looked through at once; a group that none sees, one that all see."""
    slots = 2100
    g = torch.Generator().manual_seed(0)
    group = torch.arange(slots // block) * 5 // (slots // block)
    picks = torch.rand(1, 1, slots, 5, generator=g) < 0.6
    picks[..., 1], picks[..., 3] = False, True
    touched = picks.unflatten(2, (-1, block)).any(3)
    order = torch.randperm(slots, generator=g)
    order[torch.randperm(slots, generator=g)[:9]] = -1
    order[order >= 0] = order[order >= 0].argsort().argsort()
    plan = Plan(order, touched[..., group], block, block, Route(picks, group, block))
    q, k, v = qkv(plan.tokens, dtype, batch=1, heads=1, dim=33)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.3)
    low = reference.kernel.forward(q, k, v, plan, scale=0.3)
    assert_no_worse(native.kernel.forward(q, k, v, plan, scale=0.3), low, exact)
    inputs = [x.to(BF16).float() for x in (q, k, v)]
    assert_gradients_no_worse(by(plan, native), by(plan, reference), inputs, dtype)


@pytest.mark.parametrize("windows", [False, True])
def test_lists_are_those_of_torch(windows):
    plan = random_plan(torch.device("cpu"), windows=windows)
    index, counts = lists.kept_blocks(plan)
    found, held = selection.kept_blocks(plan.keep, plan.whole)
    assert torch.equal(held, counts)
    assert found.shape == index.shape
    used = torch.arange(index.shape[-1]) < counts[0][..., None]
    assert torch.equal(found[used], index[used])
    none = torch.zeros_like(plan.keep)
    found, held = selection.kept_blocks(none, none)
    assert found.shape[-1] == 1
    assert not held.any()


def test_bools_that_are_not_0_or_1(qkv):
    """As a view of bytes may hold them."""
    plan = all_picked(random_plan(torch.device("cpu"), route=True))
    keep, picks = ((x.byte() * 255).view(torch.bool) for x in (plan.keep, plan.partial.picks))
    route = Route(picks, plan.partial.group, plan.partial.block)
    q, k, v = qkv(plan.tokens)
    for partial, like in ((route, plan.partial), (None, None)):
        odd = Plan(plan.slots, keep, plan.block_q, plan.block_k, partial)
        even = Plan(plan.slots, plan.keep, plan.block_q, plan.block_k, like)
        found, expected = (native.kernel.forward(q, k, v, x, scale=0.3) for x in (odd, even))
        assert torch.equal(found, expected)


def test_what_a_transform_left_in_a_plan(qkv):
    """Of torch.func, within which the plan found out what it holds."""
    plan = random_plan(torch.device("cpu"))
    q, k, v = qkv(plan.tokens)
    fresh = Plan(plan.slots, plan.keep, plan.block_q, plan.block_k, plan.partial)
    expected = native.kernel.forward(q, k, v, plan, scale=0.3)
    torch.func.grad(lambda x: fresh.whole.sum() * x.sum())(q)
    with pytest.raises(RuntimeError, match="data pointer"):
        fresh.whole.data_ptr()
    assert torch.equal(native.kernel.forward(q, k, v, fresh, scale=0.3), expected)


def test_another_default_device(qkv):
    plan = random_plan(torch.device("cpu"))
    q, k, v = (x.requires_grad_() for x in qkv(plan.tokens))
    expected = native.kernel.forward(q, k, v, plan, scale=0.3)
    with torch.device("meta"):
        found = native.kernel.forward(q, k, v, plan, scale=0.3)
        grads = torch.autograd.grad(found.sum(), (q, k, v))
    assert torch.equal(found, expected)
    for one, other in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_lies_elsewhere(qkv):
    plan = random_plan(torch.device("cpu"), batch=2, heads=2)
    inputs = qkv(plan.tokens, grad=True)
    above = torch.randn(2, plan.tokens, 2, 16).transpose(1, 2)
    plain = torch.autograd.grad(by(plan, native)(*inputs), inputs, above.contiguous())
    for found, expected in zip(
        torch.autograd.grad(by(plan, native)(*inputs), inputs, above), plain, strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_scale(dtype, scale, qkv):
    plan = random_plan(torch.device("cpu"), heads=2)
    inputs = [x.to(BF16).float() for x in qkv(plan.tokens)]
    q, k, v = (x.to(dtype) for x in inputs)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=scale)
    low = reference.kernel.forward(q, k, v, plan, scale=scale)
    assert_no_worse(native.kernel.forward(q, k, v, plan, scale=scale), low, exact)
    assert_gradients_no_worse(by(plan, native, scale), by(plan, reference, scale), inputs, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_scores_far_apart_and_far_from_zero(dtype, qkv):
    plan = random_plan(torch.device("cpu"), heads=2)
    q, k, v = qkv(plan.tokens)
    q, k = q * 40, k * 40 + 5
    q, k, v = (x.to(dtype) for x in (q, k, v))
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=1.0)
    low = reference.kernel.forward(q, k, v, plan, scale=1.0)
    assert_no_worse(native.kernel.forward(q, k, v, plan, scale=1.0), low, exact)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_of_a_token_comes_out_where_it_is_seen(which, dtype, qkv):
    keep = torch.eye(4, dtype=torch.bool)[None, None]
    plan = Plan(torch.arange(160), keep, 40, 40)
    inputs = qkv(160, dtype, batch=1, heads=1)
    inputs[which][0, 0, 50] = torch.nan
    out = native.kernel.forward(*inputs, plan, scale=0.3)[0, 0]
    hurt = out.isnan().any(-1)
    assert hurt[50]
    assert not hurt[:40].any()
    assert not hurt[80:].any()


@pytest.mark.parametrize("route", [False, True], ids=["windows", "route"])
def test_another_default_of_torch(route, qkv):
    plan = random_plan(torch.device("cpu"), windows=not route)
    if route:
        plan = all_picked(random_plan(torch.device("cpu"), route=True))
    inputs = qkv(plan.tokens)
    expected = native.kernel.forward(*inputs, plan, scale=0.3)
    fresh = Plan(plan.slots, plan.keep, plan.block_q, plan.block_k, plan.partial)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(native.kernel.forward(*inputs, fresh, scale=0.3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_fails_inside_is_told(monkeypatch, qkv):
    plan = random_plan(torch.device("cpu"))

    class Failing:
        def __getitem__(self, name):
            return lambda *args: 1

        gen_accel_error = staticmethod(lambda: b"std::bad_alloc")

    monkeypatch.setattr(native.build, "library", Failing)
    with pytest.raises(KernelFailed, match="'native' failed: std::bad_alloc"):
        native.kernel.forward(*qkv(plan.tokens), plan, scale=0.3)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["dtype", "heads", "tokens", "dim"])
def test_what_is_not_alike_is_refused(how, which, qkv):
    plan = random_plan(torch.device("cpu"))
    inputs = qkv(plan.tokens)
    x = inputs[which]
    changed = {"dtype": x.bfloat16(), "heads": x[:, :1], "tokens": x[:, :, 1:], "dim": x[..., 1:]}
    inputs[which] = changed[how]
    assert "must be alike" in kernels.unsupported("native", facts_of(*inputs, plan))[0]
    with pytest.raises(ValueError, match="q, k and v must be alike, got"):
        native.kernel.forward(*inputs, plan, scale=0.3)


def test_bf16_where_onednn_is_off(built, qkv):
    plan = random_plan(torch.device("cpu"))
    q, k, v = qkv(plan.tokens, BF16)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.3)
    low = reference.kernel.forward(q, k, v, plan, scale=0.3)
    told = []
    with torch.backends.mkldnn.flags(enabled=False):
        out = kernels.run(q, k, v, plan, scale=0.3, report=told.append)
    assert_no_worse(out, low, exact)
    assert told[0].kernel == "native" or "'native' failed: " in str(told[0])


@pytest.mark.parametrize("scale", [1e-33, 1e-10])
def test_scales_near_to_zero(scale, qkv):
    plan = random_plan(torch.device("cpu"))
    inputs = [x.requires_grad_() for x in qkv(plan.tokens)]
    out = native.kernel.forward(*inputs, plan, scale=scale)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(x.isfinite().all() for x in (out, *grads))
    exact = reference.kernel.forward(*(x.detach().double() for x in inputs), plan, scale=scale)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def vast_plan(kind):
    plan = random_plan(torch.device("cpu"), heads=2, windows=kind == "windows")
    if kind == "route":
        return all_picked(random_plan(torch.device("cpu"), heads=2, route=True))
    if kind == "gain":
        return plan.changed(gain=torch.linspace(0.1, 1, plan.keep.numel()).view(plan.keep.shape))
    return plan


@pytest.mark.parametrize("kind", ["blocks", "windows", "route", "gain"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("scale", [1e8, 1e9, 1e12])
def test_vast_scores_are_told_apart(scale, dtype, kind, qkv):
    """The softmax takes one key, forward and backward, as the reference does."""
    plan = vast_plan(kind)
    inputs = qkv(plan.tokens, dtype)
    made = {}
    for name, kernel, kind in (
        ("found", native, dtype),
        ("low", reference, dtype),
        ("exact", reference, torch.float64),
    ):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        out = kernel.kernel.forward(*leaves, plan, scale=scale)
        above = torch.linspace(-1, 1, out.numel(), dtype=kind).view(out.shape)
        made[name] = out.detach(), *torch.autograd.grad(out, leaves, above)
    for found, low, exact in zip(made["found"], made["low"], made["exact"], strict=True):
        assert_no_worse(found, low, exact)


@pytest.mark.parametrize("scale", [1e8, 1e9, 1e12])
def test_no_row_of_vast_scores_is_lost_in_8_bits(scale, int8_kernel, qkv):
    """Each is the value of some key that it sees, up to the 8 bits of values."""
    q, k, v = qkv(128, batch=1, heads=2, dim=32)
    plan = Plan(torch.arange(128), torch.ones(1, 1, 4, 4, dtype=torch.bool), 32, 32)
    out = int8.kernel.forward(q, k, v, plan, scale=scale)
    nearest = (out[:, :, :, None] - v[:, :, None]).abs().amax(-1).amin(-1)
    assert nearest.max() < 0.05


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(
    "method", [Radial(block=32), BlockMixture(partition="3d", chunks=(2, 4, 8))]
)
def test_any_number_of_threads(method, count, threads, qkv):
    """Heads are shared out in parts where they are fewer than threads."""
    video = VideoShape(5, 9, 10)
    inputs = [x.bfloat16().float() for x in qkv(video.tokens, batch=1, heads=3)]

    def run(kernel):
        return lambda q, k, v: attention(q, k, v, video=video, method=method, kernel=kernel)

    threads(count)
    assert_gradients_no_worse(run("native"), run("reference"), inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = [torch.autograd.grad(run("native")(*leaves).sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [Neighborhood((2, 3, 2)), BlockMixture(partition="2d"), SparseLinear(critical=0.3)],
    ids=str,
)
def test_inside_a_graph(method, built, qkv):
    video = VideoShape(4, 8, 8)
    inputs = qkv(video.tokens)
    expected = attention(*inputs, video=video, method=method, kernel="native")

    @torch.compile(backend="aot_eager")
    def inside(q, k, v):
        return attention(q, k, v, video=video, method=method)

    assert_no_worse(inside(*inputs), expected, expected.double())


class TestChoice:
    plan = Plan(torch.arange(64), torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)

    def test_auto_takes_it_where_it_is_built(self, built, qkv):
        told = []
        kernels.run(*qkv(64), self.plan, scale=0.3, report=told.append)
        assert (told[0].kernel, told[0].refused) == ("native", {})

    def test_auto_passes_over_it_in_fp64(self, built, qkv):
        told = []
        kernels.run(*qkv(64, torch.float64), self.plan, scale=0.3, report=told.append)
        assert told[0].kernel == "gather"
        assert "takes float32, bfloat16, float16, got torch.float64" in str(told[0])
        with pytest.raises(ValueError, match=r"native: it takes .*, got torch.float64"):
            kernels.run(*qkv(64, torch.float64), self.plan, scale=0.3, kernel="native")

    def test_where_queries_pick_it_takes_neither_gains_nor_left_out_blocks(self, built, qkv):
        plan = random_plan(torch.device("cpu"), route=True)
        damped = plan.changed(gain=torch.full(plan.keep.shape, 0.5))
        q, k, v = qkv(plan.tokens)
        assert any(
            "no gain" in why for why in native.kernel.unsupported(facts_of(q, k, v, damped))
        )
        told = []
        kernels.run(q, k, v, damped, scale=0.3, report=told.append)
        assert told[0].kernel == "gather"
        with pytest.raises(ValueError, match="native: it takes no gain on scores where each"):
            kernels.run(q, k, v, damped, scale=0.3, kernel="native")
        with pytest.raises(ValueError, match="native: the plan leaves out blocks that its"):
            kernels.run(q, k, v, plan, scale=0.3, kernel="native")

    def test_it_is_for_the_cpu(self):
        where = torch.device("cuda")
        facts = Facts(((1, 1, 64, 16),) * 3, (torch.float32,) * 3, (where,) * 3)
        assert native.kernel.unsupported(facts) == ["it is for the CPU, got cuda"]
        assert "native" not in kernels.preference(facts)

    def test_without_a_library_it_says_how_to_get_one(self, monkeypatch, tmp_path, qkv):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        build._found.cache_clear()
        try:
            reasons = native.kernel.unsupported(facts_of(*qkv(64), self.plan))
            assert reasons == ["it is not built for this machine: gen-accel build"]
            with pytest.raises(KernelFailed, match="not built for this machine: gen-accel build"):
                native.kernel.forward(*qkv(64), self.plan, scale=0.3)
        finally:
            build._found.cache_clear()


class TestBuild:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        build._found.cache_clear()
        yield
        build._found.cache_clear()

    @pytest.mark.nightly
    def test_command(self, run):
        shown = run("build").stdout.strip()
        assert shown == str(build.path())
        assert build.library() is not None
        assert [file.name for file in build.path().parent.iterdir()] == [build.path().name]

    def test_no_compiler(self, refused, monkeypatch):
        monkeypatch.setattr(build, "cpp_compiler", lambda: None)
        assert refused("build") == "error: no C++ compiler: apt install g++, or name one in CXX"

    @pytest.mark.parametrize("system", [("Darwin", "arm64"), ("Linux", "aarch64")])
    def test_another_system(self, system, refused, monkeypatch):
        monkeypatch.setattr(build.platform, "system", lambda: system[0])
        monkeypatch.setattr(build.platform, "machine", lambda: system[1])
        assert f"this is {system[0]} on {system[1]}" in refused("build")

    def test_what_the_compiler_says_is_told_and_nothing_is_left(self, monkeypatch):
        def fail(command, **options):
            return subprocess.CompletedProcess(command, 1, "", "attention.cpp:1: no such header")

        monkeypatch.setattr(build.subprocess, "run", fail)
        with pytest.raises(RuntimeError, match=r"-march=native(.|\n)*no such header"):
            build.build()
        assert list(build.path().parent.iterdir()) == []

    def test_a_library_that_does_not_load_counts_as_none(self):
        build.path().parent.mkdir(parents=True)
        build.path().write_bytes(b"half a library")
        assert build.library() is None

    @pytest.fixture
    def planted(self, native_kernel, monkeypatch, tmp_path):
        """The library as it lies in the cache, in a folder of its own."""
        with monkeypatch.context() as patch:
            patch.delenv("XDG_CACHE_HOME")
            source = build.path()
        target = build.path()
        target.parent.mkdir(parents=True, mode=0o755)
        shutil.copyfile(source, target)
        target.chmod(0o755)
        return target

    def test_one_that_this_user_wrote_is_loaded(self, planted):
        assert build.library() is not None
        assert build.why_not() == ""

    @pytest.mark.parametrize("what", ["file", "folder"])
    @pytest.mark.parametrize("how", ["group", "all", "owner"])
    def test_one_that_others_may_have_written_is_not_loaded(self, how, what, planted, run, qkv):
        it = planted if what == "file" else planted.parent
        if how == "owner":
            if os.geteuid():
                pytest.skip("needs root to give files away")
            os.chown(it, 65534, 65534)
            words = f"{it} belongs to user 65534"
        else:
            it.chmod(0o775 if how == "group" else 0o777)
            words = f"{it} may be written by "
        with pytest.warns(UserWarning, match=f"the CPU kernel is not loaded: {words}"):
            assert build.library() is None
        assert build.library() is None  # and says no more
        assert native.kernel.unsupported(facts_of(*qkv(64), TestChoice.plan))[0].startswith(
            f"it is not loaded: {words}"
        )
        shown = " ".join(run("doctor").stdout.split())
        assert words in shown
        assert "not built" not in shown

    def test_one_in_the_working_folder_is_not_loaded(self, planted, monkeypatch, tmp_path):
        """By a relative XDG_CACHE_HOME."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        assert build.library() is None
        assert build.why_not() == build.NOT_BUILT

    def test_what_is_loaded_is_what_was_looked_at(self, planted, monkeypatch):
        """Another file that takes its place meanwhile is not."""
        look = build.distrust

        def swap(about, what):
            if what == planted:
                planted.unlink()
                planted.write_bytes(b"another library")
            return look(about, what)

        monkeypatch.setattr(build, "distrust", swap)
        assert build.library() is not None

    def test_nothing_is_built_where_others_may_write(self, refused, tmp_path):
        build.path().parent.mkdir(parents=True)
        build.path().parent.chmod(0o777)
        assert "may be written by every user: chmod go-w" in refused("build")

    @pytest.mark.parametrize("umask", [0, 0o077])
    def test_others_may_read_it_as_the_umask_allows(self, umask, tmp_path):
        (tmp_path / "linked").write_bytes(b"made")
        before = os.umask(umask)
        try:
            build._publish(tmp_path / "linked", tmp_path / "target")
        finally:
            os.umask(before)
        assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755 & ~umask

    def test_no_home_counts_as_none(self, monkeypatch):
        def homeless(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", homeless)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home
        assert build.library() is None

    def test_another_source_lies_elsewhere(self, monkeypatch, tmp_path):
        before = build.path()
        other = tmp_path / "common.h"
        other.write_text(build.READ[-1].read_text() + "\n")
        monkeypatch.setattr(build, "READ", (*build.READ[:-1], other))
        assert build.path() != before


def test_a_model_runs_through_it_and_trains(built):
    model = wan.transformer()
    given = wan.inputs()

    def gradients(kernel):
        with gen_accel.attach(model, Radial(block=16), kernel=kernel) as handle:
            out = model(**given, return_dict=False)[0]
            found = torch.autograd.grad(
                out.square().mean(), [*model.parameters()], allow_unused=True
            )
            kernels_used = handle.summary().to_dict()["kernels"]
        return kernels_used, [x for x in (out.detach(), *found) if x is not None]

    (used, mine), (_, exact) = gradients("auto"), gradients("reference")
    assert len(used) == 1
    assert used[0].startswith("native (not gather: ")
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
