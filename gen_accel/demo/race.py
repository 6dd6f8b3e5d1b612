"""Two denoisings of one clip on one clock: step by step in turn, and an animation of both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.mixed import Mixed
from gen_accel.demo.in_turn import Turn, in_turn
from gen_accel.measure.pictures import side_by_side
from gen_accel.pipelines.generation.decode import decode_stream
from gen_accel.pipelines.generation.progress import Progress, ticker
from gen_accel.pipelines.generation.sampling import Clip, denoise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.attention_processors.attached.attachment import Attachment

LASTS = 10.0  # seconds of the animation until the slower one is done
STAYS = 3.0  # seconds that both are shown after that


@dataclass(frozen=True)
class Entrant:
    """A pipeline as it is to denoise.

    Args:
        handle: what is attached to it.
        run: function to call instead of the pipeline; see `long_video.extend`.
    """

    name: str
    pipe: "DiffusionPipeline"
    handle: "Attachment"
    run: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Denoising:
    """Denoising of an entrant, step by step.

    Args:
        latents: (1, C, f, h, w), of the clip.
        stills: (1, C, 1, h, w) each: the first latent frame after each step.
        seconds: length of each step; the first has the text encoder's too.
    """

    latents: Tensor
    stills: list[Tensor]
    seconds: list[float]

    @property
    def total(self) -> float:
        return sum(self.seconds)


def race(entrants: Sequence[Entrant], prompt: str, clip: Clip) -> list[Denoising]:
    """Denoise the same clip by each entrant, a step of one and then a step of the next.

    Each has done one step before, with its method in all layers, which does not count.
    """
    for entrant in entrants:
        pipe: Any = entrant.pipe

        def stop(latents: Tensor, pipe: Any = pipe) -> None:
            pipe._interrupt = True

        with entrant.handle.scheduled(Schedule()):
            if isinstance(entrant.handle.method, Mixed):  # rules are for the number of steps
                denoise(pipe, prompt, clip, watch=stop, run=entrant.run)
            else:
                denoise(pipe, prompt, clip.replaced(steps=1), run=entrant.run)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress())
        for entrant in entrants:
            stack.enter_context(entrant.handle.gathering())

        def job(entrant: Entrant) -> Callable[[Turn], Denoising]:
            report = ticker(bar, entrant.name)

            def run(turn: Turn) -> Denoising:
                stills: list[Tensor] = []

                def tick(step: int, total: int) -> None:
                    report(step, total)
                    if step < total:
                        turn.end()

                def watch(latents: Tensor) -> None:
                    stills.append(latents[:, :, :1].detach().cpu().clone())

                made = denoise(entrant.pipe, prompt, clip, tick=tick, watch=watch, run=entrant.run)
                return Denoising(made.latents, stills, turn.seconds)

            return run

        return in_turn([job(entrant) for entrant in entrants])


def animation(
    entrants: Sequence[Entrant],
    made: Sequence[Denoising],
    videos: Sequence[np.ndarray],
    *,
    fps: float,
    scale: int = 3,
) -> np.ndarray:
    """Show both denoisings as they went, the slower one in `LASTS` seconds.

    A panel shows the first frame after the step that was done last, and plays the clip once its
    denoising has ended.

    Args:
        videos: (F, H, W, 3) uint8, the decoded clip of each.

    Returns:
        (N, H', W', 3) uint8, at `fps` frames a second.
    """
    slowest = max(one.total for one in made)
    count = round(LASTS * fps)
    moments = [slowest * i / count for i in range(1, count + round(STAYS * fps) + 1)]

    def panel(
        entrant: Entrant, one: Denoising, video: np.ndarray
    ) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the picture and the label of one entrant at each moment."""
        ends, played = [*accumulate(one.seconds)], 0
        stills = [next(iter(decode_stream(entrant.pipe, still)))[0] for still in one.stills]
        for now in moments:
            done = sum(end <= now + 1e-9 * slowest for end in ends)
            if done < len(ends):
                picture = stills[done - 1] if done else np.zeros_like(video[0])
            else:
                picture, played = video[played % len(video)], played + 1
            label = f"{entrant.name} {min(now, ends[-1]):5.1f} s, step {done:2} of {len(ends)}"
            yield picture, label

    frames = []
    for shown in zip(*map(panel, entrants, made, videos), strict=True):
        pictures, labels = zip(*shown, strict=True)
        frames.append(side_by_side([one[None] for one in pictures], labels, scale=scale))
    return np.concatenate(frames)
