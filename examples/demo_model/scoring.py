"""Score of a clip of the demo model against its scene, by its pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_accel.demo import DIRECTIONS, SPEEDS
from gen_accel.demo.detector import STRIDE, Detection, tracked, velocity
from gen_accel.demo.world import Scene

COLOR_SHARE = 0.9
PACE_RATIO = (0.6, 1.5)
QUARTERS = 4


@dataclass(frozen=True)
class Score:
    """Parts of a scene that its clip gets right."""

    color: bool
    shape: bool
    direction: bool
    speed: bool

    @property
    def right(self) -> bool:
        return self.color and self.shape and self.direction and self.speed


def score(detection: Detection, scene: Scene) -> Score:
    """Score a clip strictly: the colour must last and the pace must be measured, so that a frozen
    clip is wrong at either speed."""
    return Score(
        color=detection.color == scene.color and detection.color_share > COLOR_SHARE,
        shape=detection.shape == scene.shape,
        direction=detection.direction == scene.direction,
        speed=keeps_pace([detection.pace / SPEEDS[scene.speed]]),
    )


def quarter_paces(video: np.ndarray | Tensor, scene: Scene) -> list[float]:
    """Median velocity along the scene's direction in each quarter, as a share of the scene's pace;
    0 where no two frames show the object.

    Args:
        video: as `detect` takes it, of at least four frames.
    """
    heading = torch.tensor(DIRECTIONS[scene.direction], dtype=torch.float32)
    paces = []
    for part in torch.as_tensor(video).cpu().tensor_split(QUARTERS):
        along = velocity(*tracked(part)) @ heading
        paces.append(along.median().item() / SPEEDS[scene.speed] if len(along) else 0.0)
    return paces


def keeps_pace(paces: Sequence[float]) -> bool:
    """Whether a clip is at its pace in each part, which one that stops or turns on its way is
    not.

    Args:
        paces: of `quarter_paces`.
    """
    slowest, fastest = PACE_RATIO
    return all(slowest <= pace <= fastest for pace in paces)


def strays(video: np.ndarray | Tensor, scene: Scene) -> float:
    """Share of the pairs of frames between which the object is off the scene's path: its velocity
    differs from the scene's by the pace or more. A jump counts for each pair that spans it, and so
    does a pair without the object. `detect` forgives both.

    Args:
        video: as `detect` takes it.
    """
    found = velocity(*tracked(torch.as_tensor(video).cpu()))
    pace = SPEEDS[scene.speed]
    wanted = pace * torch.tensor(DIRECTIONS[scene.direction], dtype=found.dtype)
    on_path = (found - wanted).norm(dim=1) < pace
    pairs = max(1, len(video) - max(1, min(STRIDE, len(video) - 1)))
    return (pairs - on_path.sum().item()) / pairs
