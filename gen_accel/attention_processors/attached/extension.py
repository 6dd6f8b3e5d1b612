"""The changes that a technique for longer video makes to attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from gen_accel.plan import Plan
from gen_accel.video import VideoShape

# plan, its grid, the denoising step from 0, and how many there are if that is known
Adjust = Callable[[Plan, VideoShape, int, int | None], Plan]
# attend(q, k, v, video), then q, k, v, video: (B, H, N, D) in and out
Around = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class AttentionExtension:
    """A technique laid over every attached method, and over the calls that a schedule keeps dense.
    Dense calls run as full attention through a plan, so that the technique holds there too.

    Args:
        name: of the technique, for messages.
        trained: frames after patchify; nothing is changed on a grid that is not longer.
        adjust: returns the plan to use instead. Called for every plan, in graphs of torch.compile
            too.
        around: computes an attention by calling `attend` on grids of its own choice.
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
    """List the extensions that change something on a grid."""
    return [one for one in extensions if video.frames > one.trained]


def adjusted(
    plan: Plan,
    extensions: Sequence[AttentionExtension],
    video: VideoShape,
    step: int,
    steps: int | None,
) -> Plan:
    """Adjust a plan by all active extensions, one after the other."""
    for extension in active(extensions, video):
        if extension.adjust is not None:
            plan = extension.adjust(plan, video, step, steps)
    return plan


def around(
    attend: Callable[..., Tensor], extensions: Sequence[AttentionExtension], video: VideoShape
) -> Callable[..., Tensor]:
    """Wrap `attend(q, k, v, video)` in all active extensions, the last one outermost."""
    for extension in active(extensions, video):
        if extension.around is not None:
            attend = partial(extension.around, attend)
    return attend


def no_graph(extension: AttentionExtension) -> str:
    """Say why an extension with `needs_step` does not work with torch.compile."""
    return f"{extension.name} differs from step to step, which a graph of torch.compile cannot"
