"""The grid and the denoising step that a transformer call belongs to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.attention_processors.tokens import Tokens


class Moment(NamedTuple):
    """The clock as one forward pass reads it."""

    tokens: Tokens | None
    texts: tuple[int, ...] | None
    step: int
    steps: int | None


class Clock:
    """The grid and the step of the forward pass under way.

    Args:
        scheduler: returns the pipeline's scheduler as it is now. Without one, a step lasts until
            the timestep changes. Classifier-free guidance calls the transformer twice at one
            timestep; that is one step either way.
    """

    def __init__(self, scheduler: Callable[[], Any] | None) -> None:
        self.scheduler = scheduler
        self.tokens: Tokens | None = None
        self.texts: tuple[int, ...] | None = None  # text tokens of each sample, for graphs
        self.step = 0
        self.steps: int | None = None
        self.runs = 0  # that have begun
        self.lost = False  # whether another scheduler than this steps
        self._count = 0
        self._timestep: float | None = None
        self._timesteps: Tensor | None = None
        self._begin = 0
        self._levels: tuple[int, tuple[float, ...]] | None = None  # the run they are of

    def advance(self, timestep: Tensor, *, rising: bool = False) -> bool:
        """Read the step before a forward pass, and return whether a new run begins with it.

        Args:
            rising: from step to step; see TIMESTEPS_RISE of a family.

        The timestep itself, which waits for a GPU, is read at the first call of a run, and at
        each one without a scheduler or with one that counts no steps.
        """
        if self.scheduler is None:
            now = timestep.max().item()  # where each token has its own: of those still noisy
            now = -now if rising else now
            before, self._timestep = self._timestep, now
            new = before is None or now > before
            self._count = 0 if new else self._count + (now != before)
            self.step = self._count
            self.runs += new
            return new
        scheduler = self.scheduler()
        new = scheduler.timesteps is not self._timesteps  # set anew for each run
        if new:
            self._timesteps, self._begin = scheduler.timesteps, _begin(scheduler, timestep)
            self._timestep = None
        self.step = _taken(scheduler, timestep, self._begin)
        self.steps = len(scheduler.timesteps) - self._begin
        self.lost = self._stands_still(scheduler, timestep)
        self.runs += new
        return new

    def _stands_still(self, scheduler: Any, timestep: Tensor) -> bool:
        """Whether another scheduler steps: the timestep moves and is not in this scheduler's list,
        and this one has begun no step or taken all."""
        index = getattr(scheduler, "step_index", None)
        if index is not None and index < len(scheduler.timesteps):
            self._timestep = None
            return False
        before, self._timestep = self._timestep, timestep.max().item()
        known = bool((scheduler.timesteps == self._timestep).any())
        return before not in (None, self._timestep) and not known

    def levels(self) -> tuple[float, ...] | None:
        """Noise at the beginning of each step of the run, and at the end; None without a
        pipeline. Reads the scheduler's list once a run."""
        if self.scheduler is None or self.steps is None:
            return None
        if self._levels is None or self._levels[0] != self.runs:
            self._levels = self.runs, noise_levels(self.scheduler(), self.steps)
        return self._levels[1]

    def now(self) -> Moment:
        return Moment(self.tokens, self.texts, self.step, self.steps)

    def return_to(self, moment: Moment) -> None:
        """Set the clock to `moment`. Counters that later passes continue from stay as they are."""
        self.tokens, self.texts, self.step, self.steps = moment


def noise_levels(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Noise at the beginning of the last `steps` steps that a scheduler is set to, and at the end:
    1 for pure noise, 0 for none.

    Levels of flow matching are as they are. Those that exceed 1, as of noise that is added to the
    video and not mixed with it, are level / (1 + level). A scheduler without levels gives its
    timesteps, as a share of those that it trained on.
    """
    found = getattr(scheduler, "sigmas", None)
    if found is None or len(found) < steps:
        most = scheduler.config.get("num_train_timesteps", 1000)
        levels = [float(t) / most for t in torch.as_tensor(scheduler.timesteps).tolist()]
    else:
        levels = torch.as_tensor(found, dtype=torch.float64).tolist()
    if max(levels) > 1.0 + 1e-6:
        levels = [level / (1 + level) for level in levels]
    levels = levels[-(steps + 1) :] if len(levels) > steps else [*levels, 0.0]
    return tuple(levels)


def _begin(scheduler: Any, timestep: Tensor) -> int:
    """Index in the scheduler's timesteps at which a run begins. Wan's video-to-video pipeline does
    not give it."""
    begin = getattr(scheduler, "begin_index", None)
    return _place(scheduler, timestep) if begin is None else begin


def _taken(scheduler: Any, timestep: Tensor, begin: int) -> int:
    """Number of steps of a run so far."""
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        if index is None:  # before the first step, or where copies of the scheduler are stepped
            return max(0, _mean_place(scheduler, timestep) - begin)
        return index - begin
    if hasattr(scheduler, "counter"):  # PNDM's, whose timesteps repeat
        return scheduler.counter
    return _place(scheduler, timestep) - begin  # DDIM, DDPM and CogVideoX's two


def _mean_place(scheduler: Any, timestep: Tensor) -> int:
    """Index of `timestep` among the scheduler's. Where each frame has a timestep of its own, the
    mean over the first sample's frames that are still noisy."""
    timesteps = scheduler.timesteps
    if timestep.ndim < 2 or timesteps.ndim > 1:
        return _place(scheduler, timestep)
    frames = timestep[0].flatten().to(timesteps.device)[:, None]
    equal = (timesteps == frames).float()
    noisy = equal.amax(1)
    return int((equal.argmax(1) * noisy).sum() / noisy.sum().clamp_min(1))


def _place(scheduler: Any, timestep: Tensor) -> int:
    timesteps = scheduler.timesteps
    found = (timesteps == timestep.max().to(timesteps.device)).nonzero()
    return int(found[0]) if len(found) else 0
