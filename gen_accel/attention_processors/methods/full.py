"""Full attention as a plan, on which other rules can act frame by frame."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.plan import Plan
from gen_accel.recall import recalled
from gen_accel.video import VideoShape

LARGEST = 128  # slots in a block
GRAIN = 16  # blocks are multiples of it, as matrix products need


@dataclass(frozen=True)
class Full:
    """Full attention in which no block holds tokens of two frames.

    Unlike `Dense`, which leaves the model's own attention call in place, it obeys techniques for
    longer video: `extend` puts it into dense layers and steps. Users do not choose it.
    """

    is_dense = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: Callable
    ) -> Tensor:
        return kernel(q, k, v, self.plan(video, q.device))

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return _plan(video, torch.device(device))


@recalled
@torch.inference_mode(False)  # a plan built while sampling must serve training too
def _plan(video: VideoShape, device: torch.device) -> Plan:
    frame = video.height * video.width
    runs = -(-frame // LARGEST)
    block = -(-frame // (runs * GRAIN)) * GRAIN
    padded = torch.full((video.frames, -(-frame // block) * block), -1)
    padded[:, :frame] = torch.arange(video.video_tokens).view(video.frames, frame)
    text = torch.full((-(-video.text // block) * block,), -1)
    text[: video.text] = torch.arange(video.video_tokens, video.tokens)
    slots = torch.cat([padded.flatten(), text])
    blocks = len(slots) // block
    keep = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    return Plan(slots, keep, block, block).to(device)
