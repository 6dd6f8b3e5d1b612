"""Two denoisings of one clip on one clock: step by step in turn, and an animation of both."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import Tensor

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.mixed import Mixed
from gen_accel.measure.pictures import side_by_side
from gen_accel.pipelines.generation.decode import decode_stream
from gen_accel.pipelines.generation.progress import Progress, ticker
from gen_accel.pipelines.generation.sampling import Clip, denoise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.attention_processors.attached.attachment import Attachment

STAYS = 3.0  # seconds of the animation that begin it with both clips
LASTS = 10.0  # seconds that follow, until the slower one is done

Made = TypeVar("Made")


class JobCancelled(BaseException):
    """A job is to end, since another one failed. No job catches it: it is no `Exception`."""


class Turn:
    """The turns of one job.

    Args:
        line: the jobs in the order of their turns; a job that is not in it is to end.
        moved: lock of the line.

    Attributes:
        seconds: length of each turn that has ended. Waiting for others does not count.
    """

    def __init__(self, line: "deque[Turn]", moved: threading.Condition) -> None:
        self.seconds: list[float] = []
        self._line, self._moved, self._since = line, moved, 0.0
        line.append(self)

    def end(self) -> None:
        """End this turn, and return when all other jobs have had theirs."""
        self._leave(again=True)
        self._begin()

    def _begin(self) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self not in self._line or self._line[0] is self)
            if self not in self._line:
                raise JobCancelled
        self._since = time.perf_counter()

    def _leave(self, *, again: bool = False) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        with self._moved:
            if self in self._line:
                self._line.remove(self)
                self._line.extend([self] * again)
            self._moved.notify_all()


def in_turn(jobs: Sequence[Callable[[Turn], Made]]) -> list[Made]:
    """Run jobs in threads of their own, one turn of each after the other, so that whatever else
    runs on the machine slows them alike.

    A job calls `Turn.end` as often as it likes, and its last turn ends when it returns.

    Returns:
        What the jobs returned, in their order.

    Raises:
        The first error of a job; the other jobs end at the end of their turn.
    """
    line, moved, failures = deque[Turn](), threading.Condition(), list[BaseException]()
    turns = [Turn(line, moved) for _ in jobs]

    def cancel(error: BaseException) -> None:
        with moved:
            failures.append(error)
            line.clear()
            moved.notify_all()

    def run(job: Callable[[Turn], Made], turn: Turn) -> Made:
        try:
            turn._begin()
            made = job(turn)
            turn._leave()
        except BaseException as error:
            cancel(error)
            raise
        return made

    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        futures = [pool.submit(run, *each) for each in zip(jobs, turns, strict=True)]
        try:
            while wait(futures, 0.5).not_done:  # a wait without an end may hold signals back
                pass
        except BaseException as error:  # Ctrl-C reaches this thread only
            cancel(error)
            raise  # when the jobs have ended, which use what the caller will take away
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


@dataclass(frozen=True)
class Entrant:
    """A pipeline as it is to denoise.

    Args:
        handle: what is attached to it.
        run: function to call instead of the pipeline; see `long_video.extend`.
        steps: after which it stops, if that is before the end; a last turn without a step follows.
    """

    name: str
    pipe: "DiffusionPipeline"
    handle: "Attachment"
    run: Callable[..., object] | None = None
    steps: int | None = None


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

        def stop(latents: Tensor, pipe: "DiffusionPipeline" = entrant.pipe) -> None:
            pipe._interrupt = True

        with entrant.handle.scheduled(Schedule()):
            if isinstance(entrant.handle.method, Mixed):  # rules are for the number of steps
                denoise(entrant.pipe, prompt, clip, watch=stop, run=entrant.run)
            else:
                denoise(entrant.pipe, prompt, clip.replaced(steps=1), run=entrant.run)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress())
        for entrant in entrants:
            stack.enter_context(entrant.handle.gathering())

        def job(entrant: Entrant) -> Callable[[Turn], Denoising]:
            report = ticker(bar, entrant.name)

            def run(turn: Turn) -> Denoising:
                stills: list[Tensor] = []

                def tick(step: int, total: int) -> None:
                    report(step, entrant.steps or total)
                    if step < total:
                        turn.end()

                def watch(latents: Tensor) -> None:
                    stills.append(latents[:, :, :1].detach().cpu().clone())
                    if len(stills) == entrant.steps:
                        entrant.pipe._interrupt = True

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
    """Show both clips for `STAYS` seconds, then their denoisings as they went, the slower one in
    `LASTS` seconds. A picture of the film's beginning is one of the clips, and it can be looped.

    A panel shows the first frame after the step that was done last, and plays the clip once its
    denoising has ended.

    Args:
        videos: (F, H, W, 3) uint8, the decoded clip of each.

    Returns:
        (N, H', W', 3) uint8, at `fps` frames a second.
    """
    slowest = max(one.total for one in made)
    count = round(LASTS * fps)
    both = [slowest] * round(STAYS * fps)
    moments = [*both, *(slowest * i / count for i in range(1, count + 1))]

    def panel(
        entrant: Entrant, one: Denoising, video: np.ndarray
    ) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the picture and the label of one entrant at each moment."""
        ends, played = [*accumulate(one.seconds)], 0
        stills = [next(iter(decode_stream(entrant.pipe, still)))[0] for still in one.stills]
        for now in moments:
            done = sum(end <= now + 1e-9 * slowest for end in ends)
            if done < len(ends):
                picture, played = stills[done - 1] if done else np.zeros_like(video[0]), 0
            else:
                picture, played = video[played % len(video)], played + 1
            label = f"{entrant.name} {min(now, ends[-1]):5.1f} s, step {done:2} of {len(ends)}"
            yield picture, label

    frames = []
    for shown in zip(*map(panel, entrants, made, videos), strict=True):
        pictures, labels = zip(*shown, strict=True)
        frames.append(side_by_side([one[None] for one in pictures], labels, scale=scale))
    return np.concatenate(frames)
