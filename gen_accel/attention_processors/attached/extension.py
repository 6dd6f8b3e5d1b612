"""What a technique for longer video changes in attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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


def active(
    extensions: Sequence[AttentionExtension], video: VideoShape
) -> list[AttentionExtension]:
    """The extensions that change something on a grid."""
    return [one for one in extensions if video.frames > one.trained]


def adjusted(
    plan: Plan,
    extensions: Sequence[AttentionExtension],
    video: VideoShape,
    step: int,
    steps: int | None,
) -> Plan:
    """A plan as all active extensions leave it, one after the other."""
    for extension in active(extensions, video):
        if extension.adjust is not None:
            plan = extension.adjust(plan, video, step, steps)
    return plan


def around(
    attend: Callable[..., Tensor], extensions: Sequence[AttentionExtension], video: VideoShape
) -> Callable[..., Tensor]:
    """`attend(q, k, v, video)` with all active extensions around it, the last one outermost."""
    for extension in active(extensions, video):
        if extension.around is not None:
            attend = partial(extension.around, attend)
    return attend


def no_graph(extension: AttentionExtension) -> str:
    """Why an extension with `needs_step` does not go with torch.compile."""
    return f"{extension.name} differs from step to step, which a graph of torch.compile cannot"
