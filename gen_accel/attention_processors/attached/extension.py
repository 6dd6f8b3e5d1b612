"""What a technique for longer video changes in attention."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gen_accel.plan import Plan
from gen_accel.video import VideoShape

# plan, its grid, the denoising step from 0, and how many there are where that is known
Adjust = Callable[[Plan, VideoShape, int, int | None], Plan]
# attend(q, k, v, video), then q, k, v, video: (B, H, N, D) in and out
Around = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class AttentionExtension:
    """Laid over every method that is attached, and over the calls that a schedule keeps dense:
    those run as full attention through a plan, so that it holds there too.

    Args:
        name: of the technique, for messages.
        trained: frames after patchify; nothing is changed on a grid that is not longer.
        adjust: what becomes of a plan. Called for every plan, in graphs of torch.compile too.
        around: what becomes of an attention; it calls `attend` on grids of its own choice.
        needs_step: `adjust` differs from step to step, so that it cannot run in a graph.
    """

    name: str
    trained: int
    adjust: Adjust | None = None
    around: Around | None = None
    needs_step: bool = False
