"""Sparse attention that makes video diffusion models faster, on any shape, measured."""

from gen_accel import demo
from gen_accel.attention_processors import METHODS, Dense, Neighborhood, Radial
from gen_accel.functional import attention
from gen_accel.measure.estimate import estimate
from gen_accel.pipelines import Schedule, attach
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Dense",
    "Neighborhood",
    "Plan",
    "Radial",
    "Schedule",
    "VideoShape",
    "attach",
    "attention",
    "demo",
    "estimate",
]
