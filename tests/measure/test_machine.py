"""Processor time of others."""

import pytest

from gen_accel.measure import machine
from gen_accel.measure.machine import ExternalLoad

START = 100.0, 5.0, 50.0, 70.0


@pytest.mark.parametrize(
    ("since", "said"),
    [
        ((10.0, 19.0, 19.5, 0.5), None),  # both cores are ours
        ((10.0, 10.0, 20.0, 0.0), "other processes used 1.0 of 2 cores"),
        ((10.0, 10.0, 15.0, 5.0), None),  # half a core was idle: there was room
        ((0.0, 0.0, 0.0, 0.0), None),
    ],
)
def test_others_are_busy_where_they_take_cores_that_we_would_have(monkeypatch, since, said):
    times = iter([START, tuple(a + b for a, b in zip(START, since, strict=True))])
    monkeypatch.setattr(machine, "_times", lambda: next(times))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    found = ExternalLoad().busy()
    assert found is None if said is None else said in found


def test_times_go_forward():
    first, second = machine._times(), machine._times()
    assert all(b >= a for a, b in zip(first, second, strict=True))
