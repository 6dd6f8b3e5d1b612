"""Plans are remembered as far as memory allows."""

import gc
import weakref

import torch
from support import wan

from gen_accel import Radial, VideoShape, attach
from gen_accel.attention_processors.attached import attachment
from gen_accel.kernels import lists
from gen_accel.recall import LEAST, RECALL, Recall, bytes_of, recalled

KB = 1024


def made(kilobytes):
    return [torch.zeros(kilobytes * KB, dtype=torch.uint8)]


class TestABoundOfBytes:
    def test_the_least_recently_used_goes_first(self):
        recall = Recall(3 * (LEAST + 10 * KB))
        for key in "abc":
            recall.get((key,), lambda: made(10))
        first = recall.get(("a",), lambda: made(10))
        recall.get(("d",), lambda: made(10))
        assert recall.get(("a",), lambda: made(10)) is first
        assert len(recall) == 3
        calls = []
        recall.get(("b",), lambda: calls.append(0) or made(10))
        assert calls == [0]

    def test_one_that_is_larger_is_held_alone(self):
        recall = Recall(100 * KB)
        recall.get(("small",), lambda: made(1))
        large = recall.get(("large",), lambda: made(200))
        assert recall.get(("large",), lambda: made(200)) is large
        assert len(recall) == 1
        small = recall.get(("small",), lambda: made(1))
        assert recall.get(("small",), lambda: made(1)) is small
        assert len(recall) == 1

    def test_what_grows_is_weighed_anew(self):
        recall = Recall(200 * KB)
        grows = recall.get(("grows",), lambda: made(1))
        grows += made(190)
        recall.get(("other",), lambda: made(1))
        assert len(recall) == 1

    def test_a_plan_weighs_what_kernels_prepared_of_it(self):
        plan = Radial(rest="means").plan(VideoShape(9, 10, 11))
        before = bytes_of(plan)
        index = lists.prepare(plan.kept).index
        assert bytes_of(plan) >= before + index.nbytes
        assert bytes_of([plan.keep, plan.keep[0]]) == bytes_of(plan.keep)


def test_all_functions_share_one_memory():
    RECALL.forget()
    functions = [recalled(lambda size: made(size)) for _ in range(2)]
    results = [function(3) for function in functions for _ in range(2)]
    assert results[0] is results[1] is not results[2]
    assert len(RECALL) == 2
    RECALL.forget()
    assert functions[0](3) is not results[0]


def test_plans_are_forgotten_with_the_last_attachment(monkeypatch):
    monkeypatch.setattr(attachment, "_attached", weakref.WeakSet())  # without other tests'
    first, second = wan.transformer(), wan.transformer()
    handles = [attach(model, Radial()) for model in (first, second)]
    RECALL.forget()
    held = weakref.ref(Radial().plan(VideoShape(5, 6, 7)))
    handles[0].detach()
    assert held() is not None
    handles[1].detach()
    gc.collect()
    assert held() is None
    assert len(RECALL) == 0
