"""Nothing is timed that is not right: parity, a second device, autocast, CUDA graphs."""

import itertools
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import training
from kernel_speed import Case, How, drawn
from ledger import Failed, Kind, Line, Skipped
from parity import DTYPES, ParityFailed, brief, call, hold
from torch import Tensor

from gen_accel.attention_processors import METHODS
from gen_accel.kernels import facts_of, run, unsupported
from gen_accel.plan import Plan

from .plans import OF_METHOD, RULES, plan_of_rule
from .setting import COMPILES, FEW, Setting, kind


def first_parity(at: Setting) -> Iterator[Line]:
    """In bf16 at the head dim of the goals."""
    for block, rule, kernel in _plans(at):
        if not _waits(at, block, rule, kernel):
            yield parity_line(at, kernel, "bf16", at.dims[0], block, rule)


def other_parity(at: Setting) -> Iterator[Line]:
    """All the rest; of a dry run a sample."""
    rest = [
        (kernel, dtype, dim, block, rule)
        for dtype, dim in itertools.product(("bf16", "fp16"), at.dims)
        for block, rule, kernel in _plans(at)
        if (dtype, dim) != ("bf16", at.dims[0]) or _waits(at, block, rule, kernel)
    ]
    for one in rest[:: 7 if at.dry else 1]:
        yield parity_line(at, *one)


def _plans(at: Setting) -> list[tuple[int, str, str]]:
    """Blocks, rule and kernel."""
    every = [*itertools.product(at.blocks, RULES), (OF_METHOD, "windows")]
    return [(*one, kernel) for one in every for kernel in at.held]


def _waits(at: Setting, block: int, rule: str, kernel: str) -> bool:
    """Compiling for seconds each, it has two cases among the first."""
    return kernel in COMPILES and (block != at.blocks[0] or rule not in RULES[:2])


def parity_line(at: Setting, kernel: str, dtype: str, dim: int, block: int, rule: str) -> Line:
    blocks = "Neighborhood's" if block == OF_METHOD else f"blocks of {block}"
    name = f"{kernel} {dtype} D{dim} {blocks} {rule}"
    holds = Kind(kernel, dtype, dim, rule, True)
    cap = 40.0 if kernel in COMPILES else 20.0
    return Line(name, cap, partial(parity, at, holds, block), holds=holds)


def parity(at: Setting, holds: Kind, block: int, device: torch.device | None = None) -> dict:
    """Hold a kernel to the reference on plans without and with text, forward and, where it has
    a backward pass, the gradients. Fresh memory is NaN, so that nothing unwritten passes."""
    device = device or at.device
    shares: dict[str, float] = {}
    backward = False
    for text in at.texts:
        plan = plan_of_rule(at.grid, text, block, holds.rule, at.heads).to(device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, at.heads, plan.tokens, holds.dim)
        inputs = [
            torch.randn(shape, generator=generator, device=device).to(DTYPES[holds.dtype])
            for _ in range(3)
        ]
        reasons = unsupported(holds.kernel, facts_of(*inputs, plan, grad=False))
        if reasons:
            raise Skipped("; ".join(reasons))
        backward = not unsupported(holds.kernel, facts_of(*inputs, plan, grad=True))
        with poisoned():
            for name, share in _held(holds, plan, inputs, backward).items():
                shares[name] = max(share, shares.get(name, 0.0))
    worst = max(shares.values())
    said = f"at most {worst:.2f} of the error that is allowed"
    return {"shares": shares, "backward": backward, "says": said}


def _held(holds: Kind, plan: Plan, inputs: list[Tensor], backward: bool) -> dict[str, float]:
    def by(kernel: str) -> Callable[..., Tensor]:
        return lambda q, k, v: run(q, k, v, plan, scale=holds.dim**-0.5, kernel=kernel)

    try:
        return hold(holds.kernel, by(holds.kernel), by("reference"), inputs, backward)
    except ParityFailed as error:
        raise Failed(str(error), fails=error.what) from error


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each operation without a deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def another_device(at: Setting) -> Line:
    """On cuda:1, while cuda:0 is the current device."""

    def measured() -> dict[str, Any]:
        if torch.cuda.device_count() < 2:
            raise Skipped("there is one GPU, or none")
        holds = Kind("triton", "bf16", at.dims[0], "none", True)
        return parity(at, holds, at.blocks[0], torch.device("cuda:1"))

    return Line("tensors on cuda:1", 20.0, measured)


def autocast_step(at: Setting) -> Line:
    """The trainer's own step of a LoRA, its gradients held to those by the reference."""

    def measured() -> dict[str, Any]:
        if find_spec("peft") is None:
            raise Skipped('needs peft: pip install "gen_accel[train]"')
        args, dtype = trained(at, layers=2), torch.bfloat16
        method = METHODS["radial"](**(FEW["radial"] if at.dry else {"decay_factor": 0.2}))
        error = training.parity(training.build(args, dtype), method, args, dtype)
        said = f"the worst gradient is off by {error:.1e} of the largest"
        if not error <= training.TOLERANCE[dtype]:
            raise Failed(f"{said}, allowed are {training.TOLERANCE[dtype]:.0e}")
        return {"worst_gradient_error": error, "says": said}

    return Line("training step under autocast", 45.0, measured)


def trained(at: Setting, layers: int | None = None) -> Namespace:
    """Options of `training`: Wan 1.3B, or the demo's model on a few tokens."""
    if at.dry:
        return Namespace(model="demo", device=at.device, layers=None, picture=(4, 4), rounds=1)
    return Namespace(model="1.3b", device=at.device, layers=layers, picture=None, rounds=2)


def graphs(at: Setting) -> Iterator[Line]:
    """A call of each method, captured once and replayed on other inputs."""
    how = at.how("forward")
    for case in at.goals():
        few = case._replace(heads=min(case.heads, at.heads))
        name = f"graph of {brief(case.method)} on {case.video}"
        yield Line(name, 25.0, partial(_graph, few, how), partial(_needs, few, how))


def _needs(case: Case, how: How) -> list[Kind]:
    return [kind(case, how)]


@torch.no_grad()
def _graph(case: Case, how: How) -> dict[str, Any]:
    first, other = drawn(case, how), drawn(case, how._replace(seed=1))
    attend = call(case.video, case.method, "auto", first[0])
    replay = captured(attend, first) if how.device.type == "cuda" else attend
    error, largest = 0.0, 0.0
    for given in (other, first):
        wanted = attend(*given)
        error = max(error, (replay(*given) - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    if not error <= torch.finfo(first[0].dtype).eps * largest:
        raise Failed(f"replayed on other inputs it is off by {error:.1e} of {largest:.1e}")
    return {"error": error, "says": "replayed on other inputs it is the same"}


def captured(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[..., Tensor]:
    """A CUDA graph of the call, to be run on inputs of the same shapes."""
    static = [x.clone() for x in inputs]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            attend(*static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*static)

    def replay(*given: Tensor) -> Tensor:
        for place, x in zip(static, given, strict=True):
            place.copy_(x)
        graph.replay()
        return out.clone()

    return replay
