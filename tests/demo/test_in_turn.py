"""Jobs that take turns."""

import os
import signal
import threading
import time

import pytest

from gen_accel.demo.race import in_turn


def test_turns_alternate_and_only_the_own_ones_are_timed():
    seen, at_once = [], threading.Lock()

    def job(name, turns, length):
        def run(turn):
            for i in range(turns):
                assert at_once.acquire(blocking=False)
                seen.append(name)
                time.sleep(length)
                at_once.release()
                if i < turns - 1:
                    turn.end()
            return name, turn

        return run

    (first, fast), (second, slow) = in_turn([job("a", 3, 0.0), job("b", 5, 0.02)])
    assert (first, second) == ("a", "b")
    assert seen == [*"abababbb"]
    assert (len(fast.seconds), len(slow.seconds)) == (3, 5)
    assert sum(slow.seconds) >= 0.1
    assert sum(fast.seconds) < sum(slow.seconds) / 2


def test_an_error_ends_them_all():
    ended = []

    def endless(turn):
        try:
            while True:
                turn.end()
        finally:
            ended.append(True)

    def fails(turn):
        turn.end()
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        in_turn([endless, fails, endless])
    assert ended == [True, True]


def test_an_interrupt_waits_for_the_turn_that_runs():
    """Wait for the jobs, which use what the caller will take away."""
    ended = []

    def endless(turn):
        try:
            while True:
                time.sleep(0.05)
                turn.end()
        finally:
            ended.append(True)

    def interrupted(turn):
        turn.end()
        os.kill(os.getpid(), signal.SIGINT)
        endless(turn)

    with pytest.raises(KeyboardInterrupt):
        in_turn([endless, interrupted])
    assert ended == [True, True]


def test_none_and_one():
    assert in_turn([]) == []
    assert in_turn([lambda turn: turn.end() or 3]) == [3]
