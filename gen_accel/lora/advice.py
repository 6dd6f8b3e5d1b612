"""Advice on a training that does not fit: which options to turn on, in the order of their cost."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple, Protocol

from gen_accel.attention_processors.lengths import PIXELS
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import BOTH
from gen_accel.lora.swapping import RESIDENT
from gen_accel.lora.training_plan import Advice, Setting, Size
from gen_accel.measure.subject import Subject

QUANTISED = ("int8", "nf4")  # by a library


class Peak(Protocol):
    """Bytes on a device at most, with other options and with smaller clips."""

    def __call__(self, setting: Setting, limit: Callable[[Size], Size] = ..., /) -> int: ...


class Option(NamedTuple):
    """An option that saves memory.

    Args:
        field: of `Setting`.
        value: that it takes.
        before: values that it may be turned on from.
        moves: to the host's memory.
    """

    field: str
    value: Any
    before: tuple[Any, ...]
    moves: bool = False

    def __call__(self, setting: Setting) -> Setting | None:
        """Turn it on; None where something as strong is on."""
        if getattr(setting, self.field) not in self.before:
            return None
        return setting._replace(**{self.field: self.value})


# In the order of what they cost, in time and exactness.
COSTS = (
    Option("checkpointing", "on", ("off",)),
    Option("checkpointing", "offload", ("off", "on"), moves=True),
    Option("optimizer", "adamw8bit", ("adamw",)),
    Option("base", "fp8", (None, "bf16")),
    Option("swap", 1, (0,), moves=True),  # as many blocks as are needed
    Option("parts", True, (False,)),
    Option("base", "nf4", (None, "bf16", "fp8", "int8")),
)
ORDER = ("checkpointing", "optimizer", "base", "swap", "parts")


class Adviser:
    """Search for options that make a training fit a device.

    Args:
        setting: the options that the config has.
        peak: bytes on the device at most.
        least: a lower bound of them, which costs less.
        longest: the largest clip.
        most_swapped: number of blocks.
        memory: bytes of the device.
        shared: the device's memory is the host's.
    """

    def __init__(
        self,
        config: TrainConfig,
        subject: Subject,
        peak: Peak,
        *,
        least: Callable[[Setting], int],
        setting: Setting,
        longest: Size,
        most_swapped: int,
        memory: int,
        shared: bool,
    ) -> None:
        self.config, self.subject, self.setting = config, subject, setting
        self.peak, self.least = peak, least
        self.longest, self.most_swapped = longest, most_swapped
        self.longest_grid = subject.grid(longest.height, longest.width, longest.frames)
        self.memory, self.shared = memory, shared

    def __call__(self) -> Advice:
        """Return the cheapest options that make it fit; else all of them, and the frames and the
        sides that fit."""
        saving = [one for one in COSTS if not (self.shared and one.moves)]
        options = [one for one in saving if one(self.setting) is not None and self._goes(one)]
        for count in range(1, len(options) + 1):
            for chosen in combinations(options, count):
                if len({one.field for one in chosen}) < count:
                    continue
                found = self._with(chosen)
                if found is not None:
                    return self._told(found, fits=True)
        every = {one.field: one for one in options}  # the strongest of each
        setting = self._with(tuple(every.values()), force=True)
        assert setting is not None
        without = setting._replace(parts=self.setting.parts)
        if self.peak(without) <= self.peak(setting):  # as where blocks have no parts
            setting = without
        return self._told(setting, fits=False)

    def _goes(self, option: Option) -> bool:
        """Whether a training of this config takes an option; see `experts.check_both`."""
        if self.config.part != BOTH:
            return True
        return option.field != "swap" and option.value not in QUANTISED

    def _with(self, chosen: Sequence[Option], *, force: bool = False) -> Setting | None:
        """Setting with these options, as few blocks swapped as suffice; None where they do not.

        Args:
            force: return it even so.
        """
        setting = self.setting
        for one in chosen:
            changed = one(setting)
            if changed is None:
                return None
            setting = changed
        if not setting.goes_together:
            return None
        if setting.swap != self.setting.swap:
            low, high = RESIDENT, self.most_swapped
            while low < high:
                middle = (low + high) // 2
                fits = self._fits(setting._replace(swap=middle))
                low, high = (low, middle) if fits else (middle + 1, high)
            setting = setting._replace(swap=high)
        return setting if force or self._fits(setting) else None

    def _fits(self, setting: Setting) -> bool:
        """Whether a setting fits; only those that are near to it are traced."""
        return self.least(setting) <= self.memory and self.peak(setting) <= self.memory

    def _told(self, setting: Setting, *, fits: bool) -> Advice:
        """Advice with the figure after each option, in the order of their cost."""
        now, totals, changes = self.setting, [], []
        for field in ORDER:
            if getattr(now, field) != getattr(setting, field):
                before, now = now, now._replace(**{field: getattr(setting, field)})
                totals.append(self.peak(now))
                changes += now.changes(before)
        frames = sides = None
        if not fits:
            frames, sides = self._frames(setting), self._sides(setting)
        return Advice(tuple(changes), tuple(totals), fits, frames, sides)

    def _frames(self, setting: Setting) -> int | None:
        """Most frames that fit; None where not even one does."""

        def needed(count: int) -> int:
            most = self.subject.frames(count)
            return self.peak(setting, lambda size: size._replace(frames=min(size.frames, most)))

        counts = range(1, self.longest_grid.frames + 1)
        fitting = bisect_right(counts, self.memory, key=needed)
        return self.subject.frames(fitting) if fitting else None

    def _sides(self, setting: Setting) -> tuple[int, int] | None:
        """Largest height and width of the same aspect, nearly, that fit at the full length; None
        where none do."""
        step = math.lcm(PIXELS, self.subject.spatial * self.subject.patch[1])

        def scaled(size: Size, times: int) -> Size:
            sides = (max(1, round(side * times / counts[-1] / step)) * step for side in size[1:])
            return Size(size.frames, *sides)

        def needed(times: int) -> int:
            return self.peak(setting, lambda size: scaled(size, times))

        counts = range(1, self.longest.height // step + 1)
        fitting = bisect_right(counts, self.memory, key=needed)
        return scaled(self.longest, fitting)[1:] if fitting else None
