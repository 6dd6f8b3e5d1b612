"""Processor time of others, and results of other machines."""

import pytest

from gen_accel.measure import machine
from gen_accel.measure.machine import ExternalLoad, check_same_machine, other_machine

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


def test_the_environment_tells_processors_of_one_name_apart():
    here = machine.environment()["processor"]
    assert here.keys() == {"vendor", "family", "model", "gflops"}
    assert here["gflops"] > 0.1
    known = {"device": "AMD EPYC", "threads": 1, "processor": here}
    assert other_machine(known, known) == ""
    older = {"device": "AMD EPYC", "threads": 1}
    assert other_machine(older, known) == other_machine(known, older) == ""
    for change, said in (
        ({"device": "a Xeon"}, "device a Xeon there"),
        ({"threads": 2}, "threads 2 there, 1 here"),
        ({"processor": here | {"family": "26x"}}, "processors of family 26x there"),
        ({"processor": here | {"gflops": 2 * here["gflops"]}}, "GFLOP/s there"),
    ):
        assert said in other_machine(known | change, known)
        with pytest.raises(ValueError, match=r"rows\.json is of another machine .*name of their"):
            check_same_machine(known | change, known, "rows.json")
    near = here | {"gflops": 1.3 * here["gflops"]}  # another process was on the machine
    assert other_machine(known | {"processor": near}, known) == ""
