"""Threads that work ahead, in order."""

import threading
import time
from contextlib import closing

import pytest

from gen_accel.lora.data.survey import ahead

WORKERS = [0, 1, 2, 7]


def several(i):
    """As many results as the last digit of the item says, the first ones late."""
    time.sleep(0.002 * (3 - i % 4))
    for part in range(i % 3):
        yield i, part


@pytest.mark.parametrize("workers", WORKERS)
def test_results_come_in_order(workers):
    expected = [(i, part) for i in range(30) for part in range(i % 3)]
    assert list(ahead(several, range(30), workers)) == expected
    assert list(ahead(several, [], workers)) == []


def test_threads_work_while_the_reader_does():
    begun = threading.Event()

    def work(i):
        if i == 1:
            begun.set()
        yield i

    found = ahead(work, range(5), 1)
    assert next(found) == 0
    assert begun.wait(10)
    assert list(found) == [1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_are_worked_ahead_than_are_needed(workers):
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    with closing(ahead(lambda i: [i], items(), workers)) as found:
        next(found)
        time.sleep(0.05)
        assert len(taken) <= workers + 1


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_at_its_place(workers):
    def work(i):
        yield i
        if i == 3:
            raise LookupError("clip 3")

    seen = []
    with pytest.raises(LookupError, match="clip 3"):
        seen += ahead(work, range(100), workers)
    found = ahead(work, range(100), workers)
    assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(LookupError):
        next(found)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_end_when_the_reader_stops(workers):
    ended = []

    def work(i):
        try:
            for part in range(10**6):
                yield i, part
        finally:
            ended.append(i)

    def interrupted():
        with closing(ahead(work, range(100), workers)) as found:
            next(found)
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() == before
    assert len(ended) <= workers
