"""Video sparse attention: the tiles that score best, and gated attention among the means of all.

References:
    Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", 2025,
    https://arxiv.org/abs/2505.13389; public code hao-ai-lab/FastVideo at 47c1d6a (Apache-2.0),
    `fastvideo_kernel/ops.py` and `vsa_utils.py`, and its backend for MiniMax-H3 at 2f3d407.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.methods.blocks import (
    NOTHING,
    Box,
    Layout,
    layout_of,
    smooth_qk,
)
from gen_accel.attention_processors.methods.scores import Scores
from gen_accel.kernels.base import Context, name_of, scale_of, scale_or_default
from gen_accel.kernels.choosing import block_means
from gen_accel.kernels.rest import Packed
from gen_accel.method import Method, RunPlan, plan_once
from gen_accel.parsing import Share, check_options, shown
from gen_accel.plan import Plan, Slots, plan_of_call
from gen_accel.video import VideoShape

SLACK = 1e-6  # of a count of tiles: what rounding may add to a share of them


@dataclass(frozen=True)
class VSA(Method):
    """Exact attention to the tiles that score best, and attention among tile means beside it.

        fine   = attention of each query to the key tiles that its tile keeps
        coarse = softmax(s m_q m_k^T) m_v, over the means m of all tiles; one row for a tile
        out    = fine + gate(x) * coarse

    A query tile keeps the key tiles with the largest s m_q . m_k. The gate is a linear layer from
    the hidden states x, which q, k and v are projected from, to a factor for each channel of each
    head; it is not squashed. It is zero until it is trained or loaded: this is `fine` alone then.

    Text lies in tiles of its own, each of its parts by itself, which all queries keep and whose
    queries keep all, as in the public code for MiniMax-H3: words, key frames and sound are exact
    there. Their means take part in `coarse`, which their own tokens get by the gate too. Unlike
    the public code: any tile, grid, head dim and device, and means in fp32.

    Args:
        critical: share of the video's key tiles that are kept, in (0, 1]: 1 - FastVideo's
            sparsity. As there, the number of tiles is rounded up.
        tile: (frames, rows, columns) in tokens. Tiles lie in raster order from the first token,
            so that those at the far borders are smaller.
        coarse: "gated", or "once": added as it is, without a gate.
    """

    critical: Share = 0.1
    tile: Box = (4, 4, 4)
    coarse: Literal["gated", "once"] = "gated"

    def __post_init__(self) -> None:
        check_options(self)
        if min(self.tile) < 1:
            raise ValueError(
                f"tile must be positive (frames, rows, columns), got {shown(self.tile)}"
            )

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "VSA":
        return cls(share)

    def gate(self, heads: int, dim: int, width: int) -> "Gate | None":
        """Make the gate of one layer at its start, zero."""
        return Gate(heads, dim, width) if self.coarse == "gated" else None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        video: VideoShape,
        kernel: RunPlan,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Compute (B, H, N, D). Without a gate, of that shape, `coarse="gated"` is `fine`."""
        name, scale = name_of(kernel), scale_of(kernel, q)
        fine = kernel(q, k, v, self.plan_for(q, k, video=video, scale=scale, kernel=name))
        if gate is None and self.coarse == "gated":
            return fine
        layout = self.layout(video, q.device)
        with torch.autocast(q.device.type, enabled=False):
            means = (_means(x, layout.slots, name) for x in (q, k, v))
            seen = layout.occupied if layout.has_empty else None
            rows = F.scaled_dot_product_attention(*means, attn_mask=seen, scale=scale)
            coarse = _OfTiles.apply(rows, layout.slots).to(fine.dtype)
        return fine + coarse if gate is None else torch.addcmul(fine, gate.to(fine.dtype), coarse)

    def layout(self, video: VideoShape, device: torch.device) -> Layout:
        tokens = math.prod(self.tile)
        return layout_of(video, device, tokens, tokens, self.tile, NOTHING, True, True)

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
        """Make the plan of `fine`."""
        layout, scale = self.layout(video, q.device), scale_or_default(scale, q)
        tiles = len(layout.ranked)
        count = max(1, min(math.ceil(self.critical * tiles - SLACK), tiles))
        keep = layout.always.expand(*q.shape[:2], -1, -1).clone()
        with torch.autocast(q.device.type, enabled=False):
            by = Scores(q, k, layout, scale=scale, kernel=kernel)
            for some in by.groups():
                best = by.of(some).topk(count, sorted=False).indices
                keep[:, some].scatter_(-1, layout.numbers(best), True)
        return plan_of_call(layout.slots, keep, entries=layout.entries + count * layout.video_rows)

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the tiles that smooth random q and k keep, for pictures and estimates."""
        return self.plan_for(*smooth_qk(video), video=video).to(device)


class Gate(nn.Module):
    """Linear layer from hidden states to a factor for each channel of each head, zero at first."""

    def __init__(self, heads: int, dim: int, width: int) -> None:
        super().__init__()
        made = nn.utils.skip_init(nn.Linear, width, heads * dim)  # draws no random numbers
        assert isinstance(made, nn.Linear)
        nn.init.zeros_(made.weight)
        nn.init.zeros_(made.bias)
        self.to_gate_compress = made  # FastVideo's name

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, width) to (B, N, heads * dim)."""
        dtype = self.to_gate_compress.weight.dtype
        if dtype.itemsize > 1:  # fp8 is a format for storage, not for computing
            hidden_states = hidden_states.to(dtype)
        return self.to_gate_compress(hidden_states)

    @torch.no_grad()
    def silent(self) -> bool:
        """Whether the gate is zero for all hidden states. Synchronises the device."""
        return not (self.to_gate_compress.weight.any() or self.to_gate_compress.bias.any())


class _OfTiles(torch.autograd.Function):
    """The row of its tile for each token, (B, H, K, D) to (B, H, N, D). The gradient is summed
    tile by tile, so that it is the same from run to run on a GPU."""

    @staticmethod
    def forward(ctx: Context, rows: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return rows.index_select(2, slots.places // slots.block_q)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sums(grad, ctx.slots), None


def _sums(x: Tensor, slots: Slots) -> Tensor:
    """Add up x (B, H, N, D) over tiles, (B, H, K, D), in fp32 or wider."""
    real = slots.real.view(-1, slots.block_k, 1).to(x.dtype)
    packed = Packed.apply(x, slots).unflatten(2, (-1, slots.block_k))
    return (packed * real).sum(3, dtype=torch.promote_types(x.dtype, torch.float32))


def _means(x: Tensor, slots: Slots, kernel: str) -> Tensor:
    """Average x (B, H, N, D) over tiles, (B, H, K, D), with a gradient, in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if wide == torch.float32 and not (x.requires_grad and torch.is_grad_enabled()):
        return block_means(x, slots, slots.block_k, kernel)
    count = slots.real.view(-1, slots.block_k, 1).sum(1).to(wide)
    return _sums(x, slots) / count.clamp_min(1)
