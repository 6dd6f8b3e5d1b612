"""Which grid, and which denoising step, a transformer call belongs to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.tokens import Tokens


class Clock:
    """The grid and the step of the forward pass under way.

    Args:
        scheduler: gives the pipeline's scheduler as it is now. Without one, a step is what lies
            between two changes of the timestep. Guidance calls the transformer twice at one
            timestep, which is one step either way.
    """

    def __init__(self, scheduler: Callable[[], Any] | None) -> None:
        self.scheduler = scheduler
        self.tokens: Tokens | None = None
        self.texts: tuple[int, ...] | None = None  # text tokens of each sample, for graphs
        self.step = 0
        self.steps: int | None = None
        self._timestep: float | None = None
        self._timesteps: Tensor | None = None
        self._begin = 0

    def advance(self, timestep: Tensor, *, rising: bool = False) -> bool:
        """Read the step before a forward pass; whether a new run begins with it.

        Args:
            rising: from step to step; see TIMESTEPS_RISE of a family.

        The timestep itself, which waits for a GPU, is read at the first call of a run, and at
        each one without a scheduler or with one that counts no steps.
        """
        if self.scheduler is None:
            now = timestep.max().item()  # where each token has its own: of those still noisy
            now = -now if rising else now
            before, self._timestep = self._timestep, now
            if before is None or now > before:
                self.step = 0
                return True
            if now < before:
                self.step += 1
            return False
        scheduler = self.scheduler()
        new = scheduler.timesteps is not self._timesteps  # set anew for each run
        if new:
            self._timesteps, self._begin = scheduler.timesteps, _begin(scheduler, timestep)
        self.step = _taken(scheduler, timestep, self._begin)
        self.steps = len(scheduler.timesteps) - self._begin
        return new


def _begin(scheduler: Any, timestep: Tensor) -> int:
    """Where in the scheduler's timesteps a run begins. Wan's video to video does not tell it."""
    begin = getattr(scheduler, "begin_index", None)
    return _place(scheduler, timestep) if begin is None else begin


def _taken(scheduler: Any, timestep: Tensor, begin: int) -> int:
    """Steps of a run so far."""
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        if index is None:  # before the first step, or where copies of the scheduler are stepped
            return max(0, _mean_place(scheduler, timestep) - begin)
        return index - begin
    if hasattr(scheduler, "counter"):  # PNDM's, whose timesteps repeat
        return scheduler.counter
    return _place(scheduler, timestep) - begin  # DDIM, DDPM and CogVideoX's two


def _mean_place(scheduler: Any, timestep: Tensor) -> int:
    """Where each frame has a timestep of its own, the mean over those of the first sample that are
    still noisy."""
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
