"""Every token sees every token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.method import Method, plan_once
from gen_accel.plan import Plan, raster_slots
from gen_accel.video import VideoShape

LARGEST = 128  # slots in a block
GRAIN = 16  # its blocks are multiples of this, as matrix products need


@dataclass(frozen=True)
class Dense(Method):
    """Full attention. Where it is attached, the model's own attention call runs unchanged."""

    @property
    def is_dense(self) -> bool:
        return True

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan in which every block is kept."""
        return _whole(raster_slots(video, LARGEST), LARGEST).to(device)

    def density(self, video: VideoShape) -> float:
        return 1.0


@dataclass(frozen=True)
class Full(Method):
    """Full attention in which no block holds tokens of two frames, so that rules can act frame by
    frame.

    Unlike `Dense`, which leaves the model's own attention call in place, it obeys techniques for
    longer video: `extend` puts it into dense layers and steps. Users do not choose it.
    """

    @property
    def is_dense(self) -> bool:
        return True

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        frame = video.height * video.width
        runs = -(-frame // LARGEST)
        block = -(-frame // (runs * GRAIN)) * GRAIN
        padded = torch.full((video.frames, -(-frame // block) * block), -1)
        padded[:, :frame] = torch.arange(video.video_tokens).view(video.frames, frame)
        text = torch.full((-(-video.text // block) * block,), -1)
        text[: video.text] = torch.arange(video.video_tokens, video.tokens)
        return _whole(torch.cat([padded.flatten(), text]), block).to(device)


def _whole(slots: Tensor, block: int) -> Plan:
    """Plan that keeps all blocks of a layout."""
    blocks = len(slots) // block
    keep = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    return Plan(slots, keep, block, block)
