"""Which grid, and which denoising step, a transformer call belongs to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gen_accel.video import VideoShape


class Clock:
    """The grid and the step of the forward pass under way.

    Args:
        scheduler: gives the pipeline's scheduler as it is now. Without one, a step is what lies
            between two changes of the timestep. Guidance calls the transformer twice at one
            timestep, which is one step either way.
    """

    def __init__(self, scheduler: Callable[[], Any] | None) -> None:
        self.scheduler = scheduler
        self.video: VideoShape | None = None
        self.step = 0
        self.steps: int | None = None
        self._timestep: float | None = None

    def advance(self, timestep: Tensor) -> bool:
        """Read the step before a forward pass; whether a new run begins with it.

        The timestep itself, which waits for a GPU, is read only without a scheduler.
        """
        before = self.step
        if self.scheduler is None:
            now = timestep.max().item()  # where each token has its own: of those still noisy
            if self._timestep is None or now > self._timestep:
                self.step = 0
            elif now < self._timestep:
                self.step += 1
            self._timestep = now
        else:
            scheduler = self.scheduler()
            begin, index = scheduler.begin_index or 0, scheduler.step_index
            self.step = 0 if index is None else index - begin
            self.steps = len(scheduler.timesteps) - begin
        return self.step < before
