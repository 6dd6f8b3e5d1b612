"""Reuse of the last dense step: its heaviest blocks and its residual serve the steps that follow.

References:
    The pattern of a dense step: Wang et al., "SparseD: Sparse Attention for Diffusion Language
    Models", 2025, https://arxiv.org/abs/2509.24014; public code INV-WZQ/SparseD at 52155b4, whose
    patterns the golden cases hold. Kin: TidalDecode, https://arxiv.org/abs/2410.05076.
    The residual: Yuan et al., "DiTFastAttn: Attention Compression for Diffusion Transformer
    Models", 2024, https://arxiv.org/abs/2406.08552; public code thu-nics/DiTFastAttn at 91bfbae
    (MIT), whose outputs the golden cases hold.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.kernels.mass import block_mass, heaviest
from gen_accel.kernels.runner import name_of, scale_of, scale_or_default
from gen_accel.method import (
    Method,
    check_method,
    layer_method,
    method_at,
    of_heads,
    on_device,
    parts_of,
    tiled,
    within,
)
from gen_accel.plan import Plan, Route
from gen_accel.video import VideoShape

Guidance = Literal["own", "shared"]
Residual = bool | Literal["cpu"]

WRAPPED = Piecewise()


@dataclass(frozen=True)
class Reuse:
    """Attention over the heaviest blocks of the last dense step, plus the residual of that step.

        keep = in each row as many blocks as `method` chooses, with the greatest mass of
               softmax(q k^T) in the dense step; text is kept, and so is the rest of `method`,
               whose band and sink count like all other blocks
        O    = O_s + (O_dense - O_s of the dense step), with a residual

    It learns in the last dense step at the start of the schedule, or in the first step where there
    is none. After each `every` steps, another step is dense and it learns again. In all other
    steps the plan is static. A method whose plan does not depend on q and k keeps its own plan,
    and uses the residual alone. From `SparseLinear` it takes the choice of blocks, without the
    linear branch.

    The steps that it learns in run the model's own attention; in graphs of torch.compile, a kernel
    with all blocks.

    Without a memory, as in `gen_accel.attention` and in training, the heaviest blocks of the call
    itself are used, and there is no residual.

    Unlike SparseD: the scale is the model's, not 1 / sqrt(heads); rows of scores are made in
    parts; each run, layer and guidance branch has its own pattern. Unlike DiTFastAttn: each
    guidance branch has its own residual, and steps are given, not searched for.

    Args:
        method: the method to reuse. Any but a dense one, one that keeps a memory itself, or one
            that looks at values to choose (`Piecewise` with score="norm").
        every: steps after which a dense step refreshes the memory; 0: never.
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
    every: int = 0
    residual: Residual = True
    guidance: Guidance = "own"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_method(self.method)
        inner = parts_of(self.method)
        if inner.is_dense or inner.memory is not None:
            raise ValueError(f"method must be sparse and without a memory, got {self.method!r}")
        if isinstance(self.method, Piecewise) and self.method.score == "norm":
            raise ValueError(
                "method must choose by q and k alone, got score='norm', which ranks by values: "
                "use score='spread', as blocks are ranked by their mass in any case"
            )
        if not isinstance(self.every, int) or self.every < 0:
            raise ValueError(f"every must be a number of steps from 0 on, got {self.every!r}")
        if not isinstance(self.residual, bool) and self.residual != "cpu":
            raise ValueError(f"residual must be True, False or 'cpu', got {self.residual!r}")
        if self.guidance not in get_args(Guidance):
            raise ValueError(f"guidance must be 'own' or 'shared', got {self.guidance!r}")
        if isinstance(self.layers, list | range):
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers is not None and not (
            isinstance(self.layers, tuple)
            and all(isinstance(layer, int) and layer >= 0 for layer in self.layers)
        ):
            raise ValueError(f"layers must be numbers of blocks from 0 on, got {self.layers!r}")
        if inner.plan_for is None and not self.residual:
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
        kernel: Callable,
        memory: "Learned | None" = None,
    ) -> Tensor:
        if memory is None:
            plan = self.pattern(q, k, video, scale_of(kernel, q), name_of(kernel), lasts=False)
            return self.sparse(q, k, v, plan, video, kernel)
        out = self.sparse(q, k, v, memory.plan, video, kernel)
        if memory.residual is None:
            return out
        return out + memory.residual.to(out.device, out.dtype, non_blocking=True)

    def memory(self) -> "Learned":
        """An empty memory."""
        return Learned(self)

    def sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan | None,
        video: VideoShape,
        kernel: Callable,
    ) -> Tensor:
        """Compute (B, H, N, D) by the pattern, or by the method where there is none."""
        if plan is None:
            return self.method(q, k, v, video=video, kernel=kernel)
        return kernel(q, k, v, plan)

    @torch.no_grad()
    def pattern(
        self,
        q: Tensor,
        k: Tensor,
        video: VideoShape,
        scale: float,
        kernel: str,
        *,
        lasts: bool = True,
    ) -> Plan | None:
        """Plan of the heaviest blocks of q and k; None where the method's plan never changes.

        Args:
            kernel: the name of the kernel, on which the method's choice may depend.
            lasts: whether the plan serves later steps, and not this call alone.
        """
        chooses = parts_of(self.method).plan_for
        if chooses is None:
            return None
        chosen = chooses(q, k, video=video, scale=scale, kernel=kernel)
        mass = block_mass(q, k, chosen, scale=scale)
        text = chosen.slots >= video.video_tokens
        text_q, text_k = (text.view(-1, b).any(-1) for b in (chosen.block_q, chosen.block_k))
        occupied = chosen.real.view(-1, chosen.block_k).any(-1)
        always = (text_k | text_q[:, None]) & occupied
        mass = mass.masked_fill_(~occupied, -1.0)
        keep = heaviest(mass, _counts(chosen, occupied), always)
        return chosen.keeping(keep, dynamic=not lasts)

    # Attributes that follow the wrapped method.

    @property
    def plan_for(self) -> Callable[..., Plan] | None:
        """Function (q, k, *, video, scale, kernel) -> plan of the heaviest blocks of q and k."""
        return None if parts_of(self.method).plan_for is None else self._plan_for

    def _plan_for(
        self,
        q: Tensor,
        k: Tensor,
        *,
        video: VideoShape,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Plan:
        plan = self.pattern(q, k, video, scale_or_default(scale, q), kernel, lasts=False)
        assert plan is not None
        return plan

    @property
    def plan(self) -> Any:
        """Plan of the wrapped method, which keeps as many pairs."""
        return parts_of(self.method).plan

    @property
    def density(self) -> Any:
        return parts_of(self.method).density

    @property
    def block_mask(self) -> Any:
        return parts_of(self.method).block_mask

    @property
    def thins_by_time(self) -> bool:
        return parts_of(self.method).thins_by_time

    @property
    def needs_all_heads(self) -> str:
        return parts_of(self.method).needs_all_heads

    @property
    def least_grid(self) -> tuple[int, int, int]:
        return parts_of(self.method).least_grid

    @property
    def named_layers(self) -> tuple[int, ...]:
        return (*(self.layers or ()), *parts_of(self.method).named_layers)

    @property
    def unfit(self) -> Any:
        return parts_of(self.method).unfit

    @property
    def for_heads(self) -> Callable[[slice], "Reuse"] | None:
        """Function from some heads to this method around the inner one for them; None where the
        inner method has the same for all."""
        return None if parts_of(self.method).for_heads is None else self._for_heads

    def _for_heads(self, heads: slice) -> "Reuse":
        return replace(self, method=of_heads(self.method, heads))

    @property
    def tile_tokens(self) -> int:
        return parts_of(self.method).tile_tokens

    @property
    def tiled(self) -> Callable[[Any], "Reuse"] | None:
        """Function from a tile to this method around the inner one with blocks of that box; None
        where the inner method has no tile."""
        return None if parts_of(self.method).tiled is None else self._tiled

    def _tiled(self, tile: Any) -> "Reuse":
        return replace(self, method=tiled(self.method, tile))

    @property
    def at(self) -> Callable[[float], "Reuse"] | None:
        """Function from progress to this method around the inner one at that step; None where the
        inner method never changes."""
        return None if parts_of(self.method).at is None else self._at

    def _at(self, progress: float) -> "Reuse":
        return replace(self, method=method_at(self.method, progress))

    def for_layer(self, layer: int) -> Any:
        own = replace(self, method=layer_method(self.method, layer), layers=None)
        if self.layers is None or layer in self.layers:
            return own
        if parts_of(own.method).plan_for is None:
            return own.method
        return replace(own, residual=False)

    def for_device(self, device: torch.device) -> "Reuse":
        return replace(self, method=on_device(self.method, device))

    def within(self, video: VideoShape, whole: VideoShape) -> "Reuse":
        inner = within(self.method, video, whole)
        return self if inner == self.method else replace(self, method=inner)


class Learned:
    """Memory of one call of a layer, learned in a dense step; see `gen_accel.method.Memory`.

    Attributes:
        plan: the pattern; None where the method's never changes.
        residual: (B, H, N, D), dense less sparse output; None where none is kept.
    """

    def __init__(self, reuse: Reuse) -> None:
        self.reuse, self.every = reuse, reuse.every
        self.plan: Plan | None = None
        self.residual: Tensor | None = None

    @property
    def for_less(self) -> str:
        elsewhere = "residual='cpu', " if self.reuse.residual is True else ""
        return f"use {elsewhere}residual in some layers= alone, or residual=False"

    @property
    def refuses_training(self) -> str:
        if not self.reuse.residual:
            return ""
        return "a residual of an earlier step has no gradient: use residual=False"

    @torch.no_grad()
    def learn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        *,
        video: VideoShape,
        kernel: Callable,
        first: "Learned | None",
    ) -> None:
        reuse = self.reuse
        if reuse.guidance == "shared" and first is not None:
            self.plan = first.plan
        else:
            self.plan = reuse.pattern(q, k, video, scale_of(kernel, q), name_of(kernel))
        if not reuse.residual:
            return
        # By the kernel and in the dtype of later steps, so that its rounding cancels too.
        lacking = dense - reuse.sparse(q, k, v, self.plan, video, kernel)
        self.residual = lacking.cpu() if reuse.residual == "cpu" else lacking

    def size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        return prod(shape) * itemsize if self.reuse.residual is True else 0

    def host_size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        return prod(shape) * itemsize if self.reuse.residual == "cpu" else 0


def _counts(chosen: Plan, occupied: Tensor) -> Tensor:
    """Number of key blocks that each query block keeps, (B or 1, H or 1, Kq) int64; with a route,
    the mean of its queries, rounded."""
    if not isinstance(chosen.partial, Route):
        return (chosen.keep & occupied).sum(-1)
    picks, groups = chosen.partial.picks, chosen.partial.group
    sizes = torch.zeros(picks.shape[-1], device=picks.device)
    sizes.index_add_(0, groups, occupied.to(sizes))
    real = chosen.real.view(-1, chosen.block_q).to(sizes)
    seen = (picks.to(sizes) @ sizes).unflatten(2, (-1, chosen.block_q))
    mean = (seen * real).sum(-1) / real.sum(-1).clamp_min(1)
    return mean.round().long()
