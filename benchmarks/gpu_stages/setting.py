"""Where a run takes place, and its sizes: published ones, or tiny ones on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_speed import LONG_CASES, Case, How, drawn, goals
from ledger import Kind
from parity import planned, shrink
from pipeline import CUDA_PROBLEMS, Problem, small

from gen_accel import VideoShape
from gen_accel.attention_processors import METHODS
from gen_accel.kernels import KERNELS, facts_of, preference, refusals, unsupported

# Torch alone: held to the reference, but nothing that a GPU is bought for.
TORCH_ALONE = ("gather", "routed")
COMPILES = ("flex",)  # for each plan, seconds at a time

FEW_TOKENS = VideoShape(4, 3, 4)  # of a dry run
# Options with which a method leaves something out of them.
FEW: dict[str, dict[str, Any]] = {
    "neighborhood": {"window": (2, 2, 3), "stride": (1, 2, 2)},
    "radial": {"decay_factor": 0.2, "block": 16},
    "sparse_linear": {"critical": 0.3, "block_q": 16, "block_k": 16},
    "block_mixture": {"partition": "3d", "chunk_3d": (2, 2, 3), "block": 16},
}


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        dry: whether it walks through all stages at tiny sizes.
        grid: of the plans that parity is held on, in tokens.
        texts: after them, one plan each.
        dims: of a head; the goals have the first.
        blocks: slots of a query and of a key block.
        held: the kernels that parity is held of.
        timed: those whose time counts.
        rounds: see `clock.turns`.
        heads: of calls that are held and not timed.
    """

    device: torch.device
    dry: bool
    grid: tuple[int, int, int]
    texts: tuple[int, ...]
    dims: tuple[int, ...]
    blocks: tuple[int, ...]
    held: tuple[str, ...]
    timed: tuple[str, ...]
    rounds: int
    heads: int

    def how(self, direction: str, kernel: str | None = None) -> How:
        kernels = None if kernel is None else (kernel,)
        return How(self.device, "bf16", self.dims[0], direction, self.rounds, kernels)

    def goals(self) -> list[Case]:
        """In order of value."""
        return _few(goals()) if self.dry else goals()

    def long_cases(self) -> list[Case]:
        return _few(LONG_CASES[:1]) if self.dry else [*LONG_CASES]

    def steps(self) -> list[tuple[Problem, Sequence[str]]]:
        """Models whose denoising step is timed, each with the names of methods in `published`, in
        order of value."""
        both = [p for p in CUDA_PROBLEMS if p.name.startswith("Wan 2.1 1.3B")]
        first, last = (next(p for p in both if p.grid[0] == frames) for frames in (21, 81))
        if self.dry:
            return [(small(first), ("SparseLinear",))]
        return [
            (first, ("Piecewise", "Radial")),
            (last, ("Piecewise",)),
            (first, ("SparseLinear", "Neighborhood")),
            (last, ("Radial",)),
        ]


def setting(device: torch.device, *, dry: bool) -> Setting:
    """Of this machine: the kernels that run there."""
    if dry:
        sizes = (2, 3, 4), (5,), (16,), (16, 32, 14)
        return Setting(device, dry, *sizes, ("triton", "gather"), ("triton",), 1, 1)
    held = tuple(
        name
        for name in KERNELS
        if name != "reference" and not refusals(name, device, torch.bfloat16)
    )
    timed = tuple(name for name in held if name not in TORCH_ALONE)
    return Setting(device, dry, (8, 14, 18), (0, 30), (128, 64), (128, 64, 56), held, timed, 10, 2)


def kind(case: Case, how: How) -> Kind:
    """What has to be right for a case to be timed, by the kernel of `how` or by the
    one that "auto" takes."""
    few = Case(shrink(case.video, case.method), 2, case.method)
    inputs = drawn(few, how)
    plan, backward = planned(few.video, few.method, inputs), how.direction == "both"
    facts = facts_of(*inputs, plan, grad=backward)
    rule = "none" if facts.pattern == "blocks" else facts.pattern
    rule = "gain" if facts.gain else rule
    names = how.kernels or [name for name in preference(facts) if not unsupported(name, facts)]
    return Kind(names[0], how.dtype, how.dim, rule, backward)


def problem_case(problem: Problem, method: Any) -> Case:
    return Case(VideoShape(*problem.grid), 2, method)


def _few(cases: Sequence[Case]) -> list[Case]:
    """The same methods on a handful of tokens, each once."""
    names = {kind: name for name, kind in METHODS.items()}
    made = []
    for case in cases:
        name = names[type(case.method)]
        options = FEW.get(name, {})
        if name == "block_mixture":
            options = options | {"routing": case.method.routing}
        made.append(Case(FEW_TOKENS, 1, METHODS[name](**options)))
    return list(dict.fromkeys(made))
