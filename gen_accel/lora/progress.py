"""One bar for all that a training does: steps, losses at fixed noise, validation."""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.generation.progress import Progress

STEADY = 0.95  # decay of the running mean of the loss
RECENT = 0.9  # decay of the running mean of a step's seconds
FORWARD = 1 / 3  # share of a step that a forward pass takes, until both are measured
Show = Callable[[str, float], None]  # takes words, and the share that is done


def running_mean(values: Sequence[float], decay: float) -> list[float]:
    """Average with exponential decay, begun with the first value."""
    means: list[float] = []
    for value in values:
        before = means[-1] if means else value
        means.append(decay * before + (1 - decay) * value if math.isfinite(value) else before)
    return means


class RemainingTime:
    """Seconds that the rest of a training takes, with the work beside its steps.

    The seconds of a step are a running mean for each stage. A stage that has not begun is taken to
    cost in proportion to its frames.

    Args:
        every: kind of work beside the steps, to the steps between two times; 0 for never.
        calls: kind, to its forward passes of one clip, for a guess before the first time.
        epochs: steps of an epoch of each stage, which `every` counts where the config says so.
            None: not known, and it does not.

    Attributes:
        due: kind of work beside the steps, to the numbers of steps after which it is done.
    """

    def __init__(
        self,
        config: TrainConfig,
        every: Mapping[str, int],
        calls: Mapping[str, int],
        epochs: Sequence[int] | None = None,
    ) -> None:
        self.config, self.stages, self._calls, self._epochs = (
            config,
            config.curriculum,
            calls,
            epochs,
        )
        units, done = [], 0  # steps after which one ends
        for stage, length in zip(self.stages, epochs or [1] * len(self.stages), strict=True):
            length = length if config.every == "epochs" else 1
            units += range(done + length, done + stage.steps + 1, length)
            done += stage.steps
        self.due = {
            kind: sorted({0, *units[count - 1 :: count], done})
            for kind, count in every.items()
            if count
        }
        self._steps: dict[int, float] = {}  # seconds of a step, by the number of the stage
        self._beside: dict[str, float] = {}

    def note_step(self, step: int, seconds: float) -> None:
        number, _, _ = self.config.stage_at(step)
        before = self._steps.get(number, seconds)
        self._steps[number] = RECENT * before + (1 - RECENT) * seconds

    def note_beside(self, kind: str, seconds: float) -> None:
        self._beside[kind] = seconds

    def is_due(self, kind: str, done: int) -> bool:
        """Whether work of `kind` follows after `done` steps."""
        marks = self.due.get(kind, ())
        place = bisect_left(marks, done)
        return place < len(marks) and marks[place] == done

    def epoch(self, done: int) -> str:
        """Say which epoch of their stage some steps have come to, as "epoch 2 of 3"; "" if that is
        not known."""
        for stage, length in zip(self.stages, self._epochs or (), strict=False):
            if done <= stage.steps or stage is self.stages[-1]:
                of = math.ceil(stage.steps / length)
                return f"epoch {min(max(math.ceil(done / length), 1), of)} of {of}"
            done -= stage.steps
        return ""

    def left(self, done: int, *, over: Mapping[str, int]) -> float | None:
        """Seconds from `done` steps to the end; None before the first step was timed.

        Args:
            over: kind of work, to the number of steps after which it last took place.
        """
        if not self._steps:
            return None
        seconds, rest = 0.0, done
        for number, stage in enumerate(self.stages):
            past = min(rest, stage.steps)
            seconds += (stage.steps - past) * self._step(number)
            rest -= past
        for kind in self._calls:
            marks, first = self.due.get(kind, []), max(done, over.get(kind, -1) + 1)
            seconds += (len(marks) - bisect_left(marks, first)) * self.seconds(kind)
        return seconds

    def seconds(self, kind: str) -> float:
        """Seconds of one time of `kind`; until the first, by its forward passes."""
        if kind in self._beside or not self._steps:
            return self._beside.get(kind, 0.0)
        longest = max(range(len(self.stages)), key=lambda i: self.stages[i].frames)
        clips = self.config.batch_size * self.config.gradient_accumulation
        return self._calls[kind] * FORWARD * self._step(longest) / clips

    def _step(self, number: int) -> float:
        near = number if number in self._steps else max(self._steps)
        return self._steps[near] * self.stages[number].frames / self.stages[near].frames


class Bar:
    """The bar on stderr, of one process; the bars of others show nothing.

    Args:
        start: steps that an earlier run made.
        shown: whether this process shows it.
    """

    def __init__(self, clock: RemainingTime, start: int, *, shown: bool) -> None:
        self.clock, self._shown, self._done = clock, shown, start
        self._over: dict[str, int] = {} if start == 0 else {"validation": start}
        self._losses: list[float] = []
        self._fixed, self._told = "", "starting"

    @contextmanager
    def open(self) -> Iterator[None]:
        if not self._shown:
            yield
            return
        total = self.clock.config.total_steps
        with Progress() as self._bar:
            self._task = self._bar.add_task(
                self._told, total=total, completed=self._done, unit="steps"
            )
            yield
            self._show(at_once=True)

    def step(self, step: int, loss: float, seconds: float) -> None:
        """Show that a step was made."""
        self.clock.note_step(step, seconds)
        self._losses = running_mean([*self._losses, loss], STEADY)[-1:]
        _, stage, _ = self.clock.config.stage_at(step)
        self._done = step + 1
        words = [f"{stage.frames} frames", self.clock.epoch(step + 1)]
        self._told = ", ".join([*filter(None, words), f"loss {self._losses[0]:.4f}"])
        self._show()

    def fixed(self, words: str) -> None:
        """Show a loss at fixed noise from now on."""
        self._fixed = words

    @contextmanager
    def beside(self, kind: str) -> Iterator[Show]:
        """Show what is done beside the steps, by calls with words and the share that is done."""
        began, before = time.monotonic(), self.clock.seconds(kind)

        def part(words: str, share: float) -> None:
            whole = before
            if share > 0:
                whole = (time.monotonic() - began) / share
                self.clock.note_beside(kind, whole)
            self._show(words, gone=share * whole, at_once=share == 0)

        yield part
        self.clock.note_beside(kind, time.monotonic() - began)
        self._over[kind] = self._done
        self._show()

    def _show(self, words: str = "", *, gone: float = 0.0, at_once: bool = False) -> None:
        if not self._shown:
            return
        left = self.clock.left(self._done, over=self._over)
        self._bar.update(
            self._task,
            completed=self._done,
            description=words or ", ".join(filter(None, (self._told, self._fixed))),
            left=None if left is None else max(left - gone, 0.0),
            at_once=at_once,
        )
