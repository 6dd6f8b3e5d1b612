"""Steps of a student that makes a video in few, each taught as its teacher's way through it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gen_accel.attention_processors.families import Family
from gen_accel.lora.batches import levels_of
from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.sampler import shifted, unshifted

Velocity = Callable[[Tensor, Tensor], Tensor]  # of noisy latents, at noise levels (B,)
SUBSTEPS = 3  # of the teacher for each step of the student, unless told


@dataclass(frozen=True)
class StudentSteps:
    """Noise levels of a student's steps, and how its teacher takes each.

        1 = s_0 > s_1 > ... > s_K = 0
        x_(k+1):  the teacher's way from x_k at s_k to s_(k+1), in several steps
        target_k = (x_k - x_(k+1)) / (s_k - s_(k+1)),    the mean velocity along it
        weight_k = (s_k - s_(k+1))^2 / mean_j (s_j - s_(j+1))^2

    The weight makes the loss the error of x_(k+1). PeRFlow (Yan et al., 2024,
    https://arxiv.org/abs/2405.07510) has such windows, of noised clips; here x_k may also be where
    the steps before have led, of the teacher or of the student itself.

    With fresh noise a step is x_(k+1) = (1 - s_(k+1)) (x_k - s_k v) + s_(k+1) noise, whose error
    is that of v times (1 - s_(k+1)) s_k; its square takes the place of (s_k - s_(k+1))^2.

    Args:
        levels: s_0 to s_K, falling to 0.
        substeps: steps of the teacher for each, of equal length before the shift.
        shift: of the noise levels.
        starts: "own", "teacher" or "data": whose steps lead to x_k, or a clip with noise.
        sampler: of the steps: "euler", or "lcm" with fresh noise in each.
    """

    levels: tuple[float, ...]
    substeps: int
    shift: float
    starts: Literal["own", "teacher", "data"]
    sampler: Literal["euler", "lcm"] = "euler"

    @classmethod
    def of(cls, config: TrainConfig, shift: float) -> "StudentSteps | None":
        """Take them from a config; None where its student has none.

        Args:
            shift: of the noise levels that are trained.
        """
        count = config.student_steps
        if count is None:
            return None
        substeps = (config.teacher_steps or SUBSTEPS * count) // count
        levels = (*levels_of(config, shift), 0.0)
        return cls(levels, substeps, shift, config.starts, config.student_sampler)

    def __len__(self) -> int:
        return len(self.levels) - 1

    def weight(self, step: int) -> float:
        squares = [self._gain(i) ** 2 for i in range(len(self))]
        return squares[step] * len(self) / sum(squares)

    def _gain(self, step: int) -> float:
        """Error that a step ends with, over the error of its velocity."""
        high, low = self.levels[step : step + 2]
        return (1 - low) * high if self.sampler == "lcm" else high - low

    def nearest(self, sigma: float) -> int:
        """Return the number of the step that begins nearest to a noise level."""
        return min(range(len(self)), key=lambda step: abs(self.levels[step] - sigma))

    def within(self, step: int) -> tuple[float, ...]:
        """Return the levels of the teacher's steps through one of the student's, both ends
        among them."""
        high, low = (unshifted(level, self.shift) for level in self.levels[step : step + 2])
        each = ((high - low) * i / self.substeps for i in range(1, self.substeps))
        inner = (shifted(high - part, self.shift) for part in each)
        return (self.levels[step], *inner, self.levels[step + 1])

    @torch.no_grad()
    def start(
        self,
        step: int,
        noise: Tensor,
        student: Velocity,
        teacher: Velocity,
        fresh: Callable[[], Tensor],
    ) -> Tensor:
        """Go from noise to where a step begins, by the steps of the student or the teacher.

        Args:
            noise: (B, ...).
            fresh: draws more of it, for a step with fresh noise.
        """
        x = noise.float()
        for i, (high, low) in enumerate(itertools.pairwise(self.levels[: step + 1])):
            if self.starts == "own":
                v = student(x, x.new_full((len(x),), high)).float()
            else:
                v = self.target(i, x, teacher)
            if self.sampler == "lcm":
                x = (1 - low) * (x - high * v) + low * fresh().float()
            else:
                x = x + (low - high) * v
        return x

    @torch.no_grad()
    def target(self, step: int, x: Tensor, teacher: Velocity) -> Tensor:
        """Return the teacher's mean velocity through a step that begins with x, (B, ...)."""
        high, low = self.levels[step : step + 2]
        return (x - walk(teacher, x, self.within(step))) / (high - low)


def check_student_steps(config: TrainConfig, family: Family, boundary: float | None) -> None:
    """Refuse, by a ValueError, steps of a student that a model cannot be taught.

    Args:
        boundary: noise level at which a pipeline switches between two transformers.
    """
    if config.student_steps is None:
        return
    given = f"student_steps is {config.student_steps}, and"
    if boundary is not None:
        raise ValueError(
            f"{given} the steps of {config.model} go through two transformers, of which a "
            "training holds one: take a model of one"
        )
    if family.training.needs_sound:
        raise ValueError(
            f"{given} {family.models} steps its sound beside the video, at noise levels of its "
            "own, which such steps leave out: leave it out; LoRAs that others trained for few "
            "steps load by --lora"
        )
    if family.training.predicts != "flow":
        raise ValueError(
            f"{given} its steps are those of flow matching, while {family.models} predicts "
            f"{family.training.predicts!r}: leave it out"
        )


def walk(velocity: Velocity, x: Tensor, levels: Sequence[float]) -> Tensor:
    """Follow a velocity through falling noise levels, by the method of Adams and Bashforth of
    second order for steps of any lengths h; Euler's for the first.

        x_(n+1) = x_n + h_n (v_n + h_n / (2 h_(n-1)) (v_n - v_(n-1)))

    Args:
        x: (B, ...) float32, at the first level.
    """
    before: tuple[Tensor, float] | None = None
    for high, low in itertools.pairwise(levels):
        v, length = velocity(x, x.new_full((len(x),), high)).float(), low - high
        slope = v
        if before is not None:
            slope = v + (v - before[0]) * (length / before[1] / 2)
        x, before = x + length * slope, (v, length)
    return x
