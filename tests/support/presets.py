"""A preset with a profile of random errors, as `gen-accel tune` writes them."""

from pathlib import Path
from typing import Any

import torch
from support.wan import GRID, HEADS, LAYERS, transformer

from gen_accel import Dense, Mixed, Radial, Rule
from gen_accel.attention_processors.attached.recipe import sizes
from gen_accel.pipelines.tuning.preset import MadeFor, Preset, Profile, write_preset

STEPS = 3
CANDIDATES = (Radial(decay_factor=0.2, block=4), Radial(decay_factor=0.5, block=4), Dense())


def write(path: Path) -> Preset:
    """Write a preset for the tiny Wan model."""
    errors = torch.rand(
        1, STEPS, LAYERS, HEADS, len(CANDIDATES), generator=torch.Generator().manual_seed(0)
    )
    errors *= torch.tensor([1.0, 0.3, 0.0])
    profile = Profile(
        layers=torch.arange(LAYERS),
        sigmas=torch.linspace(1, 0, STEPS + 1),
        errors=errors,
        squares=torch.ones(1, STEPS, LAYERS, HEADS),
        densities=torch.tensor([0.2, 0.5, 1.0]).expand(LAYERS, 3).contiguous(),
        seconds=torch.tensor([0.3, 0.6, 1.0]),
        dense_seconds=torch.tensor(0.01),
        levels=torch.arange(STEPS),
        weights=torch.full((1, STEPS), 0.01),
    )
    scheduler: dict[str, Any] = {"class": "FlowMatchEulerDiscreteScheduler", "config": {}}
    made_for = MadeFor(
        sizes(transformer()), GRID, {}, scheduler, tuple(profile.sigmas.tolist()), "float32"
    )
    rules = Mixed((Rule(CANDIDATES[0], (0,), (1,), (1, 3)), Rule(CANDIDATES[1], (1,))), STEPS)
    runs = [{"predicted": 0.01, "cost": 0.5, "density": 0.5, "mean": 30.0, "worst": 29.0}]
    tuning = [{"prompt": "a", "seed": 0, "score": 30.0, "latent_error": 0.01}]
    measured = {"tuning": tuning, "held_out": tuning, "runs": runs}
    bound = {"mean": 28.0, "objective": "psnr"}
    preset = Preset(
        rules,
        made_for,
        bound,
        cost=0.5,
        density=0.5,
        predicted=0.01,
        measured=measured,
        made_by={"options": {"cost": "density", "scale": "mean", "by": ["steps", "layers"]}},
    )
    return write_preset(path, preset, profile, CANDIDATES)
