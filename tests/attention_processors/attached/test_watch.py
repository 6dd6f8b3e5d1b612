"""The watch: rows of what runs are computed exactly, and their error is reported."""

import pytest
import torch
from support.methods import RADIAL
from support.wan import LAYERS, generate, pipeline

from gen_accel import Schedule, attach, extend

pytestmark = [pytest.mark.usefixtures("one_thread")]


def errors_beside(pipe, method, steps):
    """Errors of each call, by an attachment that sees all rows."""
    found = {}

    def look(call):
        layer, q, k, v, dense, video, run = call
        key = layer.name, handle.clock.step
        if key not in found:
            out = method(q[-1:], k[-1:], v[-1:], video=video, kernel=run)
            found[key] = ((out - dense[-1:]).norm() / dense[-1:].norm()).item()

    with attach(pipe, method, kernel="gather") as handle:
        handle.observe = look
        generate(pipe, steps)
    return found


def test_it_reports_the_error_of_what_runs_and_changes_nothing():
    pipe = pipeline()
    with attach(pipe, RADIAL, kernel="gather"):
        plain = generate(pipe, 2)
    with attach(pipe, RADIAL, kernel="gather", watch=True) as handle:
        watched = generate(pipe, 2)
        summary = handle.summary()
        generate(pipe, 1)
        assert len(handle.summary().watching.calls) == LAYERS
    assert torch.equal(plain, watched)
    assert len(summary.watching.calls) == 2 * LAYERS
    beside = errors_beside(pipe, RADIAL, 2)
    for key, error in summary.watching.calls.items():
        if key[1] == 0:  # later ones are of another video than the dense one
            assert error == pytest.approx(beside[key], rel=0.35)
    assert "watch: attention error" in str(summary)
    told = summary.to_dict()["watch"]
    assert told["largest_error"] == max(summary.watching.calls.values()) >= told["mean_error"]


def test_dense_steps_and_layers_are_not_looked_at():
    pipe = pipeline()
    schedule = Schedule(dense_layers=1, dense_steps=1)
    with attach(pipe, RADIAL, schedule=schedule, kernel="gather", watch=True) as handle:
        generate(pipe, 3)
        seen = handle.summary().watching.calls
    assert {step for _, step in seen} == {1, 2}
    assert len({name for name, _ in seen}) == LAYERS - 1


def test_techniques_for_longer_video_are_not_judged():
    pipe = pipeline()
    with (
        attach(pipe, RADIAL, kernel="gather", watch=True) as handle,
        extend(pipe, "ultravico", num_frames=9, trained_frames=5) as longer,
    ):
        generate(longer, 1)
        assert handle.summary().watching.calls == {}
        assert "no sparse call" in str(handle.summary())
