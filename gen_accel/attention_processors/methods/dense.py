"""Every token sees every token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.plan import Plan, raster_slots
from gen_accel.recall import recalled
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class Dense:
    """Full attention. Where it is attached, the model's own attention call runs unchanged."""

    is_dense = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: Callable
    ) -> Tensor:
        return kernel(q, k, v, self.plan(video, q.device))

    def plan(
        self, video: VideoShape, device: torch.device | str = "cpu", block: int = 128
    ) -> Plan:
        """Plan in which every block is kept."""
        return _plan(video, torch.device(device), block)

    def block_mask(self, video: VideoShape) -> Tensor:
        return self.plan(video).keep[0, 0]

    def density(self, video: VideoShape) -> float:
        return 1.0


@recalled
@torch.inference_mode(False)  # a plan built while sampling must serve training too
def _plan(video: VideoShape, device: torch.device, block: int) -> Plan:
    slots = raster_slots(video, block)
    blocks = slots.numel() // block
    keep = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    return Plan(slots, keep, block, block).to(device)
