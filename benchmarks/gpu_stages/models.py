"""Whole steps of a model of Wan 1.3B's shapes with random weights: denoising and training."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import pipeline
import torch
import training
from ledger import Failed, Kind, Line, Skipped
from parity import brief

from gen_accel.attention_processors import METHODS

from .correct import trained
from .machine import cleared
from .setting import FEW, Setting, kind, problem_case

SHORT = 21  # frames in tokens, of 81 in pixels


def step_lines(at: Setting) -> Iterator[Line]:
    """A denoising step, dense and sparse taking turns."""
    for problem, names in at.steps():
        for name in names:
            words = f"{problem.name}, {name}"
            cap = 45.0 if problem.grid[0] <= SHORT else 100.0
            run = partial(_step, at, problem, name)
            yield Line(words, cap, run, partial(_needs, at, problem, name))


def _needs(at: Setting, problem: pipeline.Problem, name: str) -> list[Kind]:
    case = problem_case(problem, None)
    depth = problem.config["num_layers"]
    method = pipeline.published(case.video, depth)[name]
    found = [method.for_layer(layer) for layer in range(min(depth, 3))]
    how = at.how("forward")
    return [kind(problem_case(problem, one), how) for one in dict.fromkeys(found)]


def _step(at: Setting, problem: pipeline.Problem, name: str) -> dict[str, Any]:
    given = {"device": at.device, "methods": [name], "dtype": "bf16", "seed": 0}
    args = Namespace(**given, rounds=1 if at.dry else 3, compile=False)
    cleared(at.device)
    (row,) = pipeline.measure(problem, args)
    if "refused" in row:
        raise Failed(row["refused"])
    said = (
        f"{row['dense_s']:.3f} s dense, {row['s']:.3f} s by {row['kernel']}, "
        f"{row['speedup']:.2f}x; attention {row['attention_speedup']:.2f}x at density "
        f"{row['density']:.3f}"
    )
    return {**row, "says": said}


def training_lines(at: Setting) -> Iterator[Line]:
    """A training step at the trained length, with the most memory that it takes."""
    method = METHODS["radial"](**(FEW["radial"] if at.dry else {}))
    yield Line(
        f"training step, {brief(method)}",
        120.0,
        partial(_train, at, method),
        partial(_training_needs, at, method),
    )


def _training_needs(at: Setting, method: Any) -> list[Kind]:
    problem, _ = at.steps()[0]
    return [kind(problem_case(problem, method), at.how("both"))]


def _train(at: Setting, method: Any) -> dict[str, Any]:
    if find_spec("peft") is None:
        raise Skipped('needs peft: pip install "gen_accel[train]"')
    cleared(at.device)
    args, few = trained(at), trained(at, layers=2)
    error = training.parity(training.build(few, torch.bfloat16), method, few, torch.bfloat16)
    if not error <= training.TOLERANCE[torch.bfloat16]:
        raise Failed(f"not timed: the worst gradient is off by {error:.1e} of the largest")
    transformer = training.build(args, torch.bfloat16)
    transformer.enable_gradient_checkpointing()
    frames = 5 if at.dry else training.SIZES[args.model]["trained"]
    row = training.measure(transformer, method, {}, frames, args, torch.bfloat16)
    said = (
        f"{row['dense_ms']:.0f} ms dense, {row['sparse_ms']:.0f} ms, {row['speedup']:.2f}x; "
        f"attention {row['attention_speedup']:.2f}x at density {row['density']:.3f}"
    )
    if row["sparse_peak_mb"] is not None:
        said += f"; {row['dense_peak_mb']:.0f} MB dense, {row['sparse_peak_mb']:.0f} MB"
    return {"worst_gradient_error": error, "gradient_checkpointing": True, **row, "says": said}
