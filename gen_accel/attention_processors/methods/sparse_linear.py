"""Sparse-linear attention: exact where it matters most, linear attention for the rest.

References:
    Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear
    Attention", 2025, https://arxiv.org/abs/2509.24006, and "SLA2", 2026,
    https://arxiv.org/abs/2602.12675; public code thu-ml/SLA (Apache-2.0), main at d973e55, whose
    outputs and gradients the golden cases hold, and branch SLA-1 at 325cc75.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.methods.blocks import Box, Pool, rest_of
from gen_accel.attention_processors.methods.scores import BlockSelection, By, Scores, chosen
from gen_accel.kernels import linear as linear_kernel
from gen_accel.kernels.base import name_of, scale_of, scale_or_default
from gen_accel.method import RunPlan
from gen_accel.parsing import Share, check_options, shown
from gen_accel.plan import Centre, Plan, plan_of_call
from gen_accel.video import VideoShape

LinearOver = Literal["all", "rest", "marginal"]
FeatureMap = Literal["softmax", "elu", "relu"]
Combine = Literal["project", "alpha"]

EPSILON = 1e-5  # added to the linear branch's denominator, as in the public code


@dataclass(frozen=True)
class SparseLinear(BlockSelection):
    """Exact attention to the blocks that score best, and linear attention beside it.

        O_s = attention over the critical key blocks of each query block
        O_l = f(q) (f(K)^T V) / (f(q) . sum f(K)), over the key blocks of the linear branch
        O   = O_s + proj(O_l), or alpha O_s + (1 - alpha) O_l

    A key block's score is the product of its mean key and the query block's mean query. Text
    blocks are critical, and text queries see all.

    The keys of the linear branch have names, because the paper and its two public codes differ:
        "all": every key, critical ones too (main, which its authors call the more stable).
        "rest": all keys but the critical ones (branch SLA-1, SLA2). "marginal": all keys but the
        critical ones and the `skipped` worst (the paper).

    Until `proj` or `alpha` has been fitted or trained the linear branch is silent and this is
    sparse attention: see `gen_accel.calibrate`.

    Unlike the public code: at least one block is critical, where it divides by zero; a query for
    which the linear branch has no block gets zero from it; means are fp32. Unlike SLA2: one alpha
    for each head, at any number of tokens. It is stored without a sigmoid, so that training starts
    at sparse attention and a closed-form fit exists; no trained router.

    Args:
        critical: share of the key blocks that are exact, in (0, 1].
        skipped: share that "marginal" leaves out of both, in [0, 1).
        linear_over: key blocks that the linear branch sees; see above.
        feature_map: f, over the head dim: "softmax", "elu" (plus 1) or "relu".
        combine: "project", a linear layer shared by the heads of a layer, or "alpha".
        block_q, block_k: tokens in a query and in a key block.
        tile: the box of the smaller block, see `Piecewise`. "raster" makes blocks runs of tokens,
            as in the public code; boxes in space and time are purer.
        budget, mass, alike: how many blocks are critical, see `Piecewise`.
        rest, centre: "means" adds the other blocks to the softmax, pooled around the mean "query"
            of each query block or the mean "key" of each key block: see `gen_accel.plan.Rest`. The
            linear branch, if fitted, then corrects what is left.
    """

    critical: Share = 0.05
    skipped: float = 0.1
    linear_over: LinearOver = "rest"
    feature_map: FeatureMap = "softmax"
    combine: Combine = "project"
    block_q: int = 128
    block_k: int = 64
    tile: Literal["auto", "raster"] | Box | tuple[Box, ...] = "auto"
    budget: By = "row"
    mass: Share | None = None
    alike: float | None = None
    rest: Pool | None = None
    centre: Centre = "query"

    def __post_init__(self) -> None:
        check_options(self)
        rest_of(self.rest, self.centre)
        if not 0 <= self.skipped < 1:
            raise ValueError(f"skipped must be in [0, 1), got {self.skipped}")
        if self.linear_over == "marginal" and self.critical + self.skipped > 1:
            raise ValueError(
                f"critical and skipped must not exceed 1 together, got {self.critical} and "
                f"{self.skipped}"
            )
        if self.linear_over == "marginal" and self.budget != "row":
            raise ValueError(
                "linear_over='marginal' skips the worst blocks of each row, for budget='row', got "
                f"{shown(self.budget)}"
            )
        self.check_selection()

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: object = None, profile: str = ""
    ) -> Sequence["SparseLinear"]:
        """Settings without the linear branch, which has to be fitted."""
        return [cls(share) for share in (0.05, 0.1, 0.2, 0.4)]

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "SparseLinear":
        return cls(share)

    def branch(self, heads: int, dim: int) -> "LinearBranch":
        """The trainable part of one layer, at its start."""
        return LinearBranch(heads, dim, self.combine)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        video: VideoShape,
        kernel: RunPlan,
        branch: "LinearBranch | None" = None,
    ) -> Tensor:
        """Compute O; without a branch, or with one at its start, this is O_s. The tensor that
        `kernel` returns may be overwritten."""
        name = name_of(kernel)
        plan, sets = self._chosen(q, k, video, name, scale_of(kernel, q), sets=branch is not None)
        o_s = kernel(q, k, v, plan)
        if branch is None:
            return o_s
        proj = _numbers(branch, o_s, q, k, v)
        if proj is not None:
            out = linear_kernel.added(
                q, k, v, plan, sets, self.feature_map, EPSILON, *proj, o_s, kernel=name
            )
            if out is not None:
                return out
        return branch(o_s, self._linear(q, k, v, plan, sets, name))

    def parts(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> tuple[Tensor, Tensor]:
        """Compute O_s and O_l, (B, H, N, D) each."""
        name = name_of(kernel)
        plan, sets = self._chosen(q, k, video, name, scale_of(kernel, q))
        return kernel(q, k, v, plan), self._linear(q, k, v, plan, sets, name)

    def plan_for(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        video: VideoShape,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Plan:
        return self._chosen(q, k, video, kernel, scale_or_default(scale, q), sets=False)[0]

    @torch.no_grad()
    def _chosen(
        self,
        q: Tensor,
        k: Tensor,
        video: VideoShape,
        kernel: str,
        scale: float,
        *,
        sets: bool = True,
    ) -> tuple[Plan, Tensor | None]:
        """Plan of the critical blocks, and those of the linear branch, (B, H, Kq, Kk) or None."""
        layout, worst = self.layout(video, q.device), 0
        if self.linear_over == "marginal":
            blocks = len(layout.ranked)
            worst = min(int(self.skipped * blocks), blocks - layout.count(self.critical))
        with torch.autocast(q.device.type, enabled=False):  # scores are fp32, whatever q and k are
            by = Scores(q, k, layout, scale=scale, kernel=kernel)
            keep, skipped, entries, listed = chosen(by, q, self, worst)
        flat = self.tile == "raster"
        rest = rest_of(self.rest, self.centre, flat=flat, tokens=video.video_tokens)
        plan = plan_of_call(layout.slots, keep, entries=entries, rest=rest, listed=listed)
        if not sets or self.linear_over == "all":
            return plan, None
        left = ~plan.keep if skipped is None else ~(plan.keep | skipped)
        return plan, left & layout.occupied if layout.has_empty else left

    def _linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        sets: Tensor | None,
        kernel: str,
    ) -> Tensor:
        feature_map = self.feature_map
        with torch.autocast(q.device.type, enabled=False):  # sums over many keys need fp32
            out = linear_kernel.in_one(q, k, v, plan, sets, feature_map, EPSILON, kernel=kernel)
            if out is not None:
                return out
            feature = {
                "softmax": lambda x: x.softmax(-1),
                "elu": lambda x: F.elu(x) + 1,
                "relu": F.relu,
            }[feature_map]
            fq, fk = feature(q), feature(k)
            return linear_kernel.linear_attention(
                fq, fk, v, plan, sets, eps=EPSILON, kernel=kernel
            )


class LinearBranch(nn.Module):
    """Combination of the two outputs of one layer, by `proj`, a linear layer shared by the heads,
    zero at the start, or `alpha`, (heads,), 1 at the start."""

    def __init__(self, heads: int, dim: int, combine: Combine) -> None:
        super().__init__()
        self.proj: nn.Linear | None = None
        self.alpha: nn.Parameter | None = None
        if combine == "alpha":
            self.alpha = nn.Parameter(torch.ones(heads))
        else:
            proj = nn.utils.skip_init(nn.Linear, dim, dim)  # draws no random numbers
            assert isinstance(proj, nn.Linear)
            nn.init.zeros_(proj.weight)
            nn.init.zeros_(proj.bias)
            self.proj = proj

    def forward(self, o_s: Tensor, o_l: Tensor) -> Tensor:
        """Combine the outputs, (B, H, N, D) each, into one of that shape in the dtype of `o_s`."""
        if self.alpha is not None:
            alpha = self.alpha[:, None, None].to(o_s.dtype)
            return torch.lerp(o_l.to(o_s.dtype), o_s, alpha)
        assert self.proj is not None
        weight = self.proj.weight
        if weight.dtype.itemsize > 1:  # fp8 is a format for storage, not for computing
            o_l = o_l.to(weight.dtype)
        return o_s + self.proj(o_l).to(o_s.dtype)

    @torch.no_grad()
    def silent(self) -> bool:
        """Whether the linear branch adds nothing. Synchronises the device."""
        if self.alpha is not None:
            return bool((self.alpha == 1).all())
        assert self.proj is not None
        return not (self.proj.weight.any() or self.proj.bias.any())


def _numbers(branch: object, *inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of `branch.proj` if it is only a matrix: no gradient, other kind or hook."""
    if type(branch) is not LinearBranch or type(branch.proj) is not nn.Linear:
        return None
    for module in (branch, branch.proj):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
    proj = weight, bias = branch.proj.weight, branch.proj.bias
    kinds = {torch.Tensor, nn.Parameter}
    if bias is None or not {type(weight), type(bias)} <= kinds:
        return None
    if not weight.device == bias.device == inputs[0].device:
        return None
    asked = any(x.requires_grad for x in (*inputs, *proj))
    return None if asked and torch.is_grad_enabled() else proj
