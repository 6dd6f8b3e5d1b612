"""The watch: rows of what runs are computed exactly, and heads that err too much run denser."""

from typing import Any

import pytest
import torch
from support.methods import RADIAL
from support.wan import HEADS, LAYERS, generate, pipeline

from gen_accel import Dense, Mixed, Piecewise, Rule, Schedule, attach, extend
from gen_accel.attention_processors.attached.attachment import put_on
from gen_accel.attention_processors.attached.watch import LIMIT

pytestmark = [pytest.mark.usefixtures("one_thread")]
THIN, THICK = (Piecewise(share, block_q=16, block_k=16, rest=None) for share in (0.1, 0.5))


class Expecting:
    """A ladder of two rungs and dense, with one expectation for all."""

    def __init__(self, error: float) -> None:
        self.error = error

    def expected(self, step: int, layer: int, head: int, method: Any) -> float:
        return self.error

    def denser(self, step: int, layer: int, head: int, method: Any) -> Any:
        return THICK if method == THIN else Dense()


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
    assert torch.equal(plain, watched)
    assert len(summary.watching.calls) == 2 * LAYERS
    beside = errors_beside(pipe, RADIAL, 2)
    for key, one in summary.watching.calls.items():
        if key[1] == 0:  # later ones are of another video than the dense one
            assert one.error == pytest.approx(beside[key], rel=0.35)
        assert one.expected is None
    assert "watch: attention error" in str(summary)
    assert summary.to_dict()["watch"]["exceeded"] == 0


def test_dense_steps_and_layers_are_not_looked_at():
    pipe = pipeline()
    schedule = Schedule(dense_layers=1, dense_steps=1)
    with attach(pipe, RADIAL, schedule=schedule, kernel="gather", watch=True) as handle:
        generate(pipe, 3)
        seen = handle.summary().watching.calls
    assert {step for _, step in seen} == {1, 2}
    assert len({name for name, _ in seen}) == LAYERS - 1


@pytest.mark.parametrize(("expected", "runs"), [(1e-6, ["thin", "thick", "dense"]), (10.0, None)])
def test_a_head_that_errs_too_much_runs_denser_from_the_next_step_on(expected, runs):
    pipe = pipeline()
    method = Mixed((Rule(THIN, heads=tuple(range(HEADS))),), 4)
    options = {"kernel": "gather", "watch": True, "ladder": Expecting(expected)}
    with put_on(pipe, method, **options) as handle:
        generate(pipe, 4)
        summary = handle.summary()
    found = []
    for step in range(3):
        records = [r for (_, at), r in handle.records.items() if at == step]
        kinds = {
            "dense" if r.why_dense else "thick" if r.density > 0.45 else "thin" for r in records
        }
        assert len(kinds) == 1
        found.append(kinds.pop())
    assert found == (runs or ["thin"] * 3)
    if runs:
        assert summary.watching.exceeded == 2 * LAYERS * HEADS
        assert "heads ran denser after" in str(summary)
    else:
        assert summary.watching.over_expected < 1 / LIMIT


def test_a_new_generation_begins_with_the_rules():
    pipe = pipeline()
    options = {"kernel": "gather", "watch": True, "ladder": Expecting(1e-6)}
    with put_on(pipe, Mixed((Rule(THIN),), 2), **options) as handle:
        first = generate(pipe, 2)
        again = generate(pipe, 2)
        assert len(handle.summary().watching.calls) == 2 * LAYERS
    assert torch.equal(first, again)


def test_techniques_for_longer_video_are_not_judged():
    pipe = pipeline()
    with (
        attach(pipe, RADIAL, kernel="gather", watch=True) as handle,
        extend(pipe, "ultravico", num_frames=9, trained_frames=5) as longer,
    ):
        generate(longer, 1)
        assert handle.summary().watching.calls == {}
        assert "no sparse call" in str(handle.summary())
