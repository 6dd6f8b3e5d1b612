"""Reuse of the last dense step: its heaviest blocks and its residual serve the steps that follow.

References:
    The pattern of a dense step: Wang et al., "SparseD: Sparse Attention for Diffusion Language
    Models", 2025, https://arxiv.org/abs/2509.24014; public code INV-WZQ/SparseD at 52155b4, whose
    patterns the golden cases hold. Kin: TidalDecode, https://arxiv.org/abs/2410.05076.
    The residual: Yuan et al., "DiTFastAttn: Attention Compression for Diffusion Transformer
    Models", 2024, https://arxiv.org/abs/2406.08552; public code thu-nics/DiTFastAttn at 91bfbae
    (MIT), whose outputs the golden cases hold.
"""

from dataclasses import dataclass, replace
from math import prod
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.attention_processors.methods.sparse_linear import SparseLinear
from gen_accel.kernels.base import name_of, scale_of, scale_or_default
from gen_accel.kernels.choosing import block_mass, heaviest
from gen_accel.method import Box, Method, RunPlan, Step, StepState, check_method
from gen_accel.parsing import Natural, check_options, shown
from gen_accel.plan import Plan, Route
from gen_accel.video import VideoShape

WRAPPED = Piecewise()


@dataclass(frozen=True)
class Reuse(Method):
    """Attention over the heaviest blocks of the last dense step, plus the residual of that step.

        keep = in each row as many blocks as `method` chooses, with the greatest mass of
               softmax(q k^T) in the dense step; text is kept, and so is the rest of `method`,
               whose band and sink count like all other blocks
        O    = O_s + (O_dense - O_s of the dense step), with a residual

    It learns in the last dense step at the start of the schedule, else in the first step. After
    each `every` steps, another step is dense and it learns again. In all other steps the plan is
    static. A method whose plan does not depend on q and k keeps its own plan, and uses the
    residual alone. From `SparseLinear` it takes the choice of blocks, without the linear branch.

    The steps that it learns in run the model's own attention; in graphs of torch.compile, a kernel
    with all blocks.

    Without a state, as in `gen_accel.attention` and in training, the heaviest blocks of the call
    itself are used, and there is no residual.

    Unlike SparseD: the scale is the model's, not 1 / sqrt(heads); rows of scores are made in
    parts; each run, layer and guidance branch has its own pattern. Unlike DiTFastAttn: each
    guidance branch has its own residual, and steps are given, not searched for.

    Args:
        method: the method to reuse. Any but a dense one, one that keeps a state itself, or one
            that looks at values to choose (`Piecewise` with score="norm").
        every: steps after which a dense step refreshes the state; 0: never.
        residual: whether the difference between the dense and the sparse output is kept and added,
            in the model's dtype. "cpu" keeps it in host memory, from which each sparse call
            fetches it. Residuals age: in a run of few steps, neighbours differ too much to hold
            one for long.
        guidance: whether each call of a step learns its own pattern, or takes the first one's
            ("shared"): branches of guidance are calls one after the other. Residuals, and the
            samples of a batch, are always separate.
        layers: blocks that have a residual, by number; None: all. The others keep the pattern.
    """

    method: Method = WRAPPED
    every: Natural = 0
    residual: bool | Literal["cpu"] = True
    guidance: Literal["own", "shared"] = "own"
    layers: tuple[Natural, ...] | None = None

    def __post_init__(self) -> None:
        check_method(self.method)
        check_options(self)
        if self.method.is_dense or self.method.defines("step_state"):
            raise ValueError(
                f"method must be sparse and without a memory, got {shown(self.method)}"
            )
        if isinstance(self.method, Piecewise) and self.method.score == "norm":
            raise ValueError(
                "method must choose by q and k alone, got score='norm', which ranks by values: "
                "use score='spread', as blocks are ranked by their mass in any case"
            )
        if not self.method.is_dynamic and not self.residual:
            raise ValueError(
                f"the plan of {self.method!r} never changes, so that without a residual there is "
                "nothing to reuse: attach the method itself, or use residual=True"
            )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        video: VideoShape,
        kernel: RunPlan,
        state: "ReuseState | None" = None,
    ) -> Tensor:
        plan = self.pattern(q, k, video, kernel) if state is None else state.plan
        if plan is None:
            out = self.method(q, k, v, video=video, kernel=kernel)
        else:
            out = kernel(q, k, v, plan)
        if state is None or state.residual is None:
            return out
        return out + state.residual.to(out.device, out.dtype, non_blocking=True)

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "Reuse":
        return cls(SparseLinear(share))

    def step_state(self) -> "ReuseState":
        return ReuseState(self)

    def pattern(self, q: Tensor, k: Tensor, video: VideoShape, kernel: RunPlan) -> Plan | None:
        """Plan of the heaviest blocks of q and k; None if the method's plan never changes."""
        if not self.method.is_dynamic:
            return None
        return self.plan_for(q, k, video=video, scale=scale_of(kernel, q), kernel=name_of(kernel))

    @torch.no_grad()
    def plan_for(
        self,
        q: Tensor,
        k: Tensor,
        *,
        video: VideoShape,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Plan:
        """Plan of the heaviest blocks of q and k, (B, H, N, D)."""
        scale = scale_or_default(scale, q)
        chosen = self.method.plan_for(q, k, video=video, scale=scale, kernel=kernel)
        if not self.method.is_dynamic:
            return chosen
        mass = block_mass(q, k, chosen, scale=scale)
        text = chosen.slots >= video.video_tokens
        text_q, text_k = (text.view(-1, b).any(-1) for b in (chosen.block_q, chosen.block_k))
        occupied = chosen.real.view(-1, chosen.block_k).any(-1)
        always = (text_k | text_q[:, None]) & occupied
        mass = mass.masked_fill_(~occupied, -1.0)
        keep = heaviest(mass, _counts(chosen, occupied), always)
        return chosen.keeping(keep, dynamic=True)

    @property
    def named_layers(self) -> tuple[int, ...]:
        return (*(self.layers or ()), *self.method.named_layers)

    def defines(self, part: str) -> bool:
        own = self.method if part in ("plan", "for_heads") else super()
        return own.defines(part)

    def for_layer(self, layer: int) -> Method:
        own = replace(self, method=self.method.for_layer(layer), layers=None)
        if self.layers is None or layer in self.layers:
            return own
        return replace(own, residual=False) if own.method.is_dynamic else own.method

    def for_heads(self, heads: slice) -> "Reuse":
        return self._around(self.method.for_heads(heads))

    def for_device(self, device: torch.device) -> "Reuse":
        return self._around(self.method.for_device(device))

    def within(self, video: VideoShape, whole: VideoShape) -> "Reuse":
        return self._around(self.method.within(video, whole))

    def tiled(self, tile: Box | tuple[Box, ...]) -> "Reuse":
        return self._around(self.method.tiled(tile))

    def at(self, step: Step) -> "Reuse":
        return self._around(self.method.at(step))

    def _around(self, method: Method) -> "Reuse":
        return self if method == self.method else replace(self, method=method)


# As the wrapped method has them.
for _part in (
    *("plan", "density", "unfit", "is_dynamic", "thins_by_time", "needs_all_heads"),
    *("least_grid", "changes_by", "tile_tokens"),
):
    setattr(Reuse, _part, property(attrgetter(f"method.{_part}")))


class ReuseState(StepState):
    """State that one call of a layer learned in a dense step.

    Attributes:
        plan: the pattern; None if the method's never changes.
        residual: (B, H, N, D), dense less sparse output; None if none is kept.
    """

    def __init__(self, reuse: Reuse) -> None:
        self.reuse, self.every = reuse, reuse.every
        self.plan: Plan | None = None
        self.residual: Tensor | None = None
        elsewhere = "residual='cpu', " if reuse.residual is True else ""
        self.for_less = f"use {elsewhere}residual in some layers= alone, or residual=False"
        if reuse.residual:
            self.refuses_training = (
                "a residual of an earlier step has no gradient: use residual=False"
            )

    @torch.no_grad()
    def learn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        *,
        video: VideoShape,
        kernel: RunPlan,
        first: StepState | None,
    ) -> None:
        reuse = self.reuse
        if reuse.guidance == "shared" and isinstance(first, ReuseState):
            self.plan = first.plan
        elif (plan := reuse.pattern(q, k, video, kernel)) is not None:
            self.plan = plan.keeping(plan.keep, dynamic=False)  # it lasts
        self.residual = None
        if not reuse.residual:
            return
        # By the kernel and in the dtype of later steps, so that its rounding cancels too.
        lacking = dense - reuse(q, k, v, video=video, kernel=kernel, state=self)
        self.residual = lacking.cpu() if reuse.residual == "cpu" else lacking

    def size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        return (self.reuse.residual is True) * prod(shape) * itemsize

    def host_size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        return (self.reuse.residual == "cpu") * prod(shape) * itemsize


def _counts(chosen: Plan, occupied: Tensor) -> Tensor:
    """Key blocks that each query block, or the mean of its queries, keeps: (B, H, Kq) int64."""
    if not isinstance(chosen.partial, Route):
        return (chosen.keep & occupied).sum(-1)
    picks, groups = chosen.partial.picks, chosen.partial.group
    sizes = torch.zeros(picks.shape[-1], device=picks.device)
    sizes.index_add_(0, groups, occupied.to(sizes))
    real = chosen.real.view(-1, chosen.block_q).to(sizes)
    seen = (picks.to(sizes) @ sizes).unflatten(2, (-1, chosen.block_q))
    mean = (seen * real).sum(-1) / real.sum(-1).clamp_min(1)
    return mean.round().long()
