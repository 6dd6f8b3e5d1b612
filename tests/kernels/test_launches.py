"""What a call of a method gives a GPU to do: never a wait, nothing random, few launches."""

import math
import os
import subprocess
import sys

import pytest
import torch
from support import wan
from support.launches import Launches, Peak, record
from support.methods import CASES
from torch._subclasses.fake_tensor import FakeTensorMode

from gen_accel import Piecewise, SparseLinear, VideoShape, attach
from gen_accel.functional import attention
from gen_accel.kernels import dispatch
from gen_accel.kernels.triton import configs, launch, linear, listing, lists

pytestmark = pytest.mark.slow

VIDEO = VideoShape(5, 9, 10, text=7)


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    """No kernel in C++, which no GPU has."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.build, "is_built", lambda: False)


def call(method, heads=2, dim=16, grad=False, **options):
    """Attention by Triton, a second time, under the counter."""
    shape = 1, heads, VIDEO.tokens, dim
    tensors = [torch.randn(shape, requires_grad=grad) for _ in "qkv"]

    def run():
        out = attention(*tensors, video=VIDEO, method=method, kernel="triton", **options)
        return torch.autograd.grad(out.sum(), tensors) if grad else out

    return run


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("method", CASES, ids=str)
def test_nothing_waits_and_nothing_is_random(method, grad, monkeypatch):
    """So that CUDA graphs can hold it, and two runs are one."""
    counted = Launches()
    record(monkeypatch, counted)
    run = call(method, grad=grad)
    run()  # the layout of the grid and the lists of static plans are made once, and may wait
    counted.done.clear()
    with counted:
        run()
    assert any(name.endswith("forward_kernel") for name in counted.done)
    assert counted.waits == []
    assert counted.random == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", CASES, ids=str)
def test_a_cuda_graph_holds_a_call(method):
    """Captured once, and replayed on other inputs."""
    shape = 1, 2, VIDEO.tokens, 64
    given, other = torch.randn(2, 3, *shape, device="cuda", dtype=torch.bfloat16)

    def run(q, k, v):
        return attention(q, k, v, video=VIDEO, method=method, kernel="triton")

    static, aside = given.clone(), torch.cuda.Stream()
    with torch.no_grad():
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run(*static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(*static)
        static.copy_(other)
        graph.replay()
        assert torch.equal(out, run(*other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_with_less_overhead_gives_the_same():
    """torch.compile leaves our operator out of its CUDA graphs, and holds the rest in them."""
    model, given = wan.transformer().to("cuda"), {"return_dict": False}
    for name, x in wan.inputs().items():
        given[name] = x.to("cuda") if isinstance(x, torch.Tensor) else x
    method = SparseLinear(critical=0.3, block_q=16, block_k=16)
    with attach(model, method, kernel="triton"), torch.no_grad():
        want = model(**given)
        model.compile(mode="reduce-overhead")
        for _ in range(3):
            torch.testing.assert_close(model(**given), want, rtol=1e-3, atol=1e-3)


def test_the_counter_sees_into_operators(monkeypatch):
    """Each kind of wait that it looks for, within a body, is found."""
    counted = Launches()
    record(monkeypatch, counted)
    own = listing.block_lists._init_fn

    def waiting(keep, whole, entries):
        keep.sum().item()
        keep.nonzero()
        keep[keep]
        keep.cpu()
        keep.to("cpu")
        keep.tolist()
        torch.tensor([1, 2])
        keep.float().cumsum(-1)
        return own(keep, whole, entries)

    monkeypatch.setattr(listing.block_lists, "_init_fn", waiting)
    run = call(SparseLinear(critical=0.3, budget="head", block_q=16, block_k=16))
    with torch.no_grad(), counted:
        run()
    item, *others = counted.waits[-7:]
    assert item in ("aten::_local_scalar_dense", "aten::item")
    assert others == ["aten::nonzero", "aten::index", "cpu", "to", "tolist", "tensor"]
    assert counted.random == ["aten::cumsum"]


@pytest.mark.parametrize("combine", ["project", "alpha"])
@pytest.mark.parametrize("heads", [2, 12, 40])
def test_sparse_linear_launches_little_at_any_number_of_heads(heads, combine, monkeypatch):
    counted = Launches()
    record(monkeypatch, counted)
    method = SparseLinear(critical=0.3, block_q=32, block_k=16, combine=combine)
    branch = method.branch(heads, 16).requires_grad_(False)
    run = call(method, heads, branch=branch)
    with torch.no_grad():
        run()
        counted.done.clear()
        with counted:
            run()
    assert counted.done["apply_kernel"] == 1
    assert counted.count <= 15, counted.done  # with the record of attach, two more


# What a plan may take at its largest moment, in bytes, by the numbers that its tensors would hold
# on a GPU: HunyuanVideo's clip of 129 frames at 720p, and Wan 14B's of four times the length.
LARGE = [
    ("HunyuanVideo", VideoShape(33, 45, 80, text=256), 24, 0.2e9),
    ("Wan 14B, four times as long", VideoShape(81, 45, 80, text=0), 40, 1e9),
]


@pytest.mark.parametrize(("video", "heads", "most"), [row[1:] for row in LARGE], ids=lambda x: "")
def test_choosing_and_listing_fit_beside_a_large_model(video, heads, most, monkeypatch):
    """Counted from shapes: no tensor of these sizes is made."""
    method = SparseLinear(critical=0.05, block_q=128)
    method.layout(video, torch.device("cpu"))
    counted = Launches()
    record(monkeypatch, counted)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        q, k = (torch.empty(1, heads, video.tokens, 128, dtype=torch.bfloat16) for _ in "qk")
        with Peak() as peak:
            plan = method.plan_for(q, k, video=video, kernel="triton")
            with torch.enable_grad():
                made = lists.prepare(plan)
    saved = sum(x.untyped_storage().nbytes() for x in made[1:5])
    print(f"{peak.bytes:,} bytes at most, {saved:,} saved")
    assert peak.bytes <= most
    assert saved <= 0.25 * most


# The most kernels of Triton that one call of Piecewise(0.2) launches, those with what torch
# launches beside them, and bytes beyond its inputs and its output.
CLIPS = [("Wan 1.3B, 480p", VideoShape(21, 30, 52), 12, 128, 9, 10, 0.25e9)]
CLIPS += [("Wan 1.3B, 480p", VideoShape(21, 30, 52), 12, 64, 9, 10, 0.25e9)]
CLIPS += [("Wan 14B, 720p", VideoShape(21, 45, 80), 40, 128, 24, 33, 0.8e9)]


@pytest.mark.parametrize(
    ("video", "heads", "block_q", "most", "all_", "held"),
    [row[1:] for row in CLIPS],
    ids=lambda x: "",
)
def test_a_rest_fills_an_h100(video, heads, block_q, most, all_, held, monkeypatch):
    """The rest is one launch, with a program for each place on the card; launches are few, and so
    are bytes. No output in fp32 lies between the rest and the kept keys."""
    size = configs.CardSize(132, 50 << 20)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(configs, "card_size", lambda device: size)
    method = Piecewise(0.2, block_q=block_q, score="loss")  # as on a GPU
    method.layout(video, torch.device("cpu"))
    counted, programs = Launches(), []
    record(monkeypatch, counted)
    note = launch.launch

    def watched(kernel, grid, x, *arguments, **options):
        places = size.processors * max(1, configs.WARPS // options["num_warps"])
        if kernel.__name__ == "rest_turns_kernel":
            rows = [x for x, *_ in filter(lambda x: isinstance(x, tuple), arguments)]
            assert {x.dtype for x in rows} == {torch.bfloat16}
            assert options["SLOPED"]
            programs.append(math.prod(grid) / places)
        note(kernel, grid, x, *arguments, **options)

    monkeypatch.setattr(launch, "launch", watched)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Peak() as peak, counted:
        inputs = [torch.empty(1, heads, video.tokens, 128, dtype=torch.bfloat16) for _ in "qkv"]
        out = attention(*inputs, video=video, method=method, kernel="triton")
    kernels = {name: times for name, times in counted.done.items() if name.endswith("_kernel")}
    beyond = peak.bytes - 4 * out.nbytes
    print(f"{sum(kernels.values())} kernels of {counted.count} launches, {beyond:,} bytes")
    assert sum(kernels.values()) <= most, kernels
    assert counted.count <= all_, counted.done
    assert len(programs) == kernels["forward_kernel"]
    assert min(programs) >= 1
    assert beyond <= held


@pytest.mark.parametrize(
    ("size", "warps", "pairs"),
    [((128, 72 << 20), 4, 128), ((170, 96 << 20), 4, 1440), ((9999, 6 << 20), 8, 15008)],
    ids=["of the cache", "a card that is larger than its cache", "a large card"],
)
def test_a_chunk_is_what_the_cache_holds_or_fills_the_card(size, warps, pairs):
    """Pairs of 546 keys and values, two tiles to a query block."""
    columns, pair = configs.LaunchConfig(64, 32, warps, 1), 2 * 546 * 128 * 2
    groups = configs.groups_at_once(configs.CardSize(*size), columns, 128, pair, 32)
    assert groups * 32 == pairs


class Operator:
    """Says by which way it ran."""

    def __call__(self, *given, **options):
        return "operator"

    def _init_fn(self, *given, **options):
        return "body"


def test_the_body_of_an_operator_runs_where_nothing_is_to_see_it():
    run, x = launch.operate, torch.ones(2)
    assert run(Operator(), x, wide=True) == "body"
    weight = torch.nn.Parameter(x)
    with torch.no_grad():
        assert run(Operator(), weight) == "body"
    assert run(Operator(), x, weight) == "operator"
    with Launches():
        assert run(Operator(), x) == "operator"
    with torch.autograd.forward_ad.dual_level():
        assert run(Operator(), x) == "operator"
    ways = []
    torch.func.vmap(lambda one: (ways.append(run(Operator(), one)), one)[1])(torch.ones(2, 2))

    class Own(torch.Tensor):
        """A tensor of ways of its own."""

    ways.append(run(Operator(), x.as_subclass(Own)))

    @torch.compile(backend="eager")
    def compiled(one):
        return one + (run(Operator(), one) == "operator")

    assert ways == ["operator"] * 2
    assert torch.equal(compiled(x), x + 1)


def test_a_repeated_launch_passes_what_the_first_one_did_but_new_numbers():
    """By the compiled kernel, which takes the constants in the order of the kernel."""
    done = []

    class Compiled:
        def __getitem__(self, programs):
            return lambda *arguments: done.append((programs, arguments))

    class Kernel:
        __name__, arg_names = "any_kernel", ["x", "first", "last", "SIZE", "FLAG"]

        def __getitem__(self, programs):
            def run(*arguments, **options):
                done.append((programs, arguments, options))
                return Compiled()

            return run

    x, rows = torch.ones(1), (torch.ones(2), 3)
    repeated = launch.Repeated(Kernel(), x, rows, 0, 7, FLAG=True, SIZE=5, num_warps=4)
    repeated((3, 2), first=1)
    repeated((3, 1), first=4, last=6)
    given = {"FLAG": True, "SIZE": 5, "num_warps": 4, "enable_fp_fusion": True}
    assert done == [((3, 2), (rows, 1, 7), given), ((3, 1, 1), (rows, 4, 6, 5, True))]


def test_a_kernel_is_not_compiled_anew_for_another_clip():
    """Only strides, whose alignment matters, and pointers are looked at."""
    code = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
from gen_accel.kernels import triton as package
found = []
for one in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    for name, kernel in vars(importlib.import_module(one.name)).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            found.append(name)
            for one in kernel.params:
                sized = one.name in SIZES or one.name.endswith(("_b", "_h"))
                sized = sized and not one.name.startswith("stride")
                if sized and not one.is_constexpr and not one.do_not_specialize:
                    print(kernel.module, name, one.name)
assert len(set(found)) > 15, found
"""
    sizes = ("entries", "H", "N", "S", "C", "K", "R")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code.replace("SIZES", repr(sizes))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


# Of an H100: bytes a second of its memory, and multiply-adds a second that loops over lists of
# blocks reach by estimate, docs/gpu.md. A kernel takes the longer of the two.
BYTES, MULTIPLY_ADDS = 3.35e12, 2e14


@pytest.mark.parametrize(
    ("video", "heads"),
    [(VideoShape(21, 30, 52), 12), (LARGE[0][1], 24), (VideoShape(21, 45, 80), 40)],
    ids=["Wan 1.3B", "HunyuanVideo", "Wan 14B"],
)
def test_the_linear_branch_costs_at_most_half_of_the_sparse_part(video, heads, monkeypatch):
    """At a sparsity of 0.95, while generating, by a model from what kernels are launched with."""
    seconds = {}

    def note(kernel, programs, x, *arguments, **sizes):
        given = [one[0] if isinstance(one, tuple) else one for one in arguments]  # rows of x
        tensors = {id(one): one for one in given if isinstance(one, torch.Tensor)}
        moved = sum(one.nbytes for one in tensors.values())
        multiply_adds = 0
        if kernel.__name__ == "sums_kernel":
            sets, state = arguments[0], arguments[1]
            multiply_adds = sets.shape[2] * state.numel()
        seconds[kernel.__name__] = max(moved / BYTES, multiply_adds / MULTIPLY_ADDS)

    for module in (linear, launch):
        monkeypatch.setattr(module, "launch", note)
    method = SparseLinear(critical=0.05)
    slots = method.layout(video, torch.device("cpu")).slots
    blocks = [len(slots.slots) // block for block in (slots.block_q, slots.block_k)]
    shape = 1, heads, video.tokens, 128
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16) for _ in "qkv")
        sets = torch.empty(1, heads, *blocks, dtype=torch.bool)
        sizes = slots.block_q, slots.block_k, 1e-5, linear.FEATURES.index("softmax")
        linear._linear_sets._init_fn(q, k, v, slots.slots_int32, sets, *sizes)
    assert set(seconds) == {"states_kernel", "sums_kernel", "apply_kernel"}
    sparse = 2 * 0.05 * video.tokens**2 * heads * 128 / MULTIPLY_ADDS
    print(f"{sum(seconds.values()) / sparse:.2f} of the sparse part")
    assert sum(seconds.values()) <= 0.5 * sparse
