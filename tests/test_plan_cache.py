"""Plans are remembered as far as memory allows."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from support import wan
from torch._dynamo.testing import CompileCounter

from gen_accel import Dense, Method, Neighborhood, Radial, VideoShape, attach, attention
from gen_accel.attention_processors.attached import attachment
from gen_accel.kernels import lists
from gen_accel.memory import LEAST, PLAN_CACHE, PlanCache, bytes_of, plan_cached

KB = 1024


def made(kilobytes):
    return [torch.zeros(kilobytes * KB, dtype=torch.uint8)]


class TestABoundOfBytes:
    def test_the_least_recently_used_goes_first(self):
        recall = PlanCache(3 * (LEAST + 10 * KB))
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
        recall = PlanCache(100 * KB)
        recall.get(("small",), lambda: made(1))
        large = recall.get(("large",), lambda: made(200))
        assert recall.get(("large",), lambda: made(200)) is large
        assert len(recall) == 1
        small = recall.get(("small",), lambda: made(1))
        assert recall.get(("small",), lambda: made(1)) is small
        assert len(recall) == 1

    def test_what_grows_is_weighed_anew(self):
        recall = PlanCache(200 * KB)
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
    PLAN_CACHE.forget()
    functions = [plan_cached(lambda size: made(size)) for _ in range(2)]
    results = [function(3) for function in functions for _ in range(2)]
    assert results[0] is results[1] is not results[2]
    assert len(PLAN_CACHE) == 2
    PLAN_CACHE.forget()
    assert functions[0](3) is not results[0]


def test_plans_are_forgotten_with_the_last_attachment(monkeypatch):
    monkeypatch.setattr(attachment, "_attached", weakref.WeakSet())  # without other tests'
    first, second = wan.transformer(), wan.transformer()
    handles = [attach(model, Radial()) for model in (first, second)]
    PLAN_CACHE.forget()
    held = weakref.ref(Radial().plan(VideoShape(5, 6, 7)))
    handles[0].detach()
    assert held() is not None
    handles[1].detach()
    gc.collect()
    assert held() is None
    assert len(PLAN_CACHE) == 0


@dataclass(frozen=True)
class Whole(Method):
    """Full attention whose planner notes whether it is traced."""

    def plan(self, video, device):
        return noted_plan(video, device)


traced = []


@plan_cached
def noted_plan(video, device):
    traced.append(torch.compiler.is_compiling())
    return Dense().plan(video, device)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Whole(), Radial(), Neighborhood((-1, 3, 4))], ids=str)
def test_a_graph_takes_a_plan_that_is_made_outside_of_it(method):
    """The planner runs once and is not traced: no operator of its own is in any graph."""
    PLAN_CACHE.forget()
    traced.clear()
    torch.compiler.reset()
    video, graphs = VideoShape(3, 5, 7, text=4), CompileCounter()
    q, k, v = torch.randn(3, 1, 2, video.tokens, 16)

    @torch.compile(backend=graphs)
    def compiled(q, k, v):
        return attention(q, k, v, video=video, method=method, kernel="reference")

    found = [compiled(q, k, v) for _ in range(2)]
    assert graphs.op_count == 0
    assert traced == [False] * isinstance(method, Whole)
    exact = attention(q, k, v, video=video, method=method, kernel="reference")
    assert all(torch.equal(out, exact) for out in found)
