"""Counts and refusals of a plan."""

import pytest
import torch

from gen_accel import plan
from gen_accel.kernels import reference
from gen_accel.plan import Plan, Rest, Route

S, BLOCK_Q, BLOCK_K = 96, 16, 8


@pytest.fixture
def keep():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, S // BLOCK_Q, S // BLOCK_K, generator=generator) < 0.3


@pytest.mark.parametrize(("centre", "products"), [("key", 0), ("query", 3)])
def test_the_rest_costs_pooled_keys_and_their_pooling(keep, centre, products):
    plan = Plan(torch.arange(S), keep, BLOCK_Q, BLOCK_K, rest=Rest(centre))
    left_out = int((~keep).sum())
    # Two products of D a pair: each query with a pooled key and value, and what pools a block.
    numbers = left_out * (2 * BLOCK_Q + products * BLOCK_K)
    dense = 2 * S * S * 6
    wanted = plan.kept.computed_density + numbers / dense
    assert plan.computed_density == pytest.approx(wanted)
    assert plan.density == pytest.approx(plan.kept.density)


def test_kept_blocks_alone_are_the_plan_without_its_rest(keep):
    plan = Plan(torch.arange(S), keep, BLOCK_Q, BLOCK_K, rest=Rest(), dynamic=True, entries=9)
    assert plan.kept.rest is None
    assert plan.kept is plan.kept
    assert (plan.kept.dynamic, plan.kept.entries) == (True, 9)
    q, k, v = torch.randn(3, 2, 3, S, 4)
    bare = Plan(torch.arange(S), keep, BLOCK_Q, BLOCK_K)
    answers = (reference.kernel.forward(q, k, v, one, scale=0.5) for one in (plan.kept, bare))
    assert torch.equal(*answers)


def test_a_rest_outlives_a_change_of_what_is_kept(keep):
    plan = Plan(torch.arange(S), keep, BLOCK_Q, BLOCK_K, rest=Rest("key"))
    assert plan.changed(keep=~keep).rest == Rest("key")
    assert plan.to(torch.device("meta")).rest == Rest("key")


def test_what_keeps_blocks_in_part_has_no_rest(keep):
    picks = torch.ones(1, 1, S, S // BLOCK_K, dtype=torch.bool)
    route = Route(picks, torch.arange(S // BLOCK_K), BLOCK_K)
    with pytest.raises(ValueError, match=r"a rest is for plans of whole blocks: .* got Route"):
        Plan(torch.arange(S), keep, BLOCK_Q, BLOCK_K, route, rest=Rest())


def test_a_gain_and_a_rest_exclude_each_other(keep):
    plan = Plan(torch.arange(S), keep, BLOCK_Q, BLOCK_K, rest=Rest())
    with pytest.raises(ValueError, match="a plan with a rest takes no gain on scores"):
        plan.changed(gain=torch.full_like(keep, 0.5, dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"centre": "keys"}, r"centre must be one of \('query', 'key'\), got 'keys'"),
        ({"order": "third"}, r"order must be one of \('zeroth', 'first', 'second'\), got 'third'"),
        ({"centre": "key", "order": "second"}, r"order='second' is for centre='query', got "),
    ],
)
def test_bad_rests_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Rest(**options)


SOUND = {"slots": torch.arange(8), "keep": torch.ones(1, 1, 2, 4, dtype=torch.bool)}
SOUND |= {"block_q": 4, "block_k": 2}


@pytest.mark.parametrize(
    "slots",
    [
        [0, 1, 2, 3, 4, 5, 6, -5],
        [0, 1, 2, 3, 4, 5, 6, 6],
        [0, 1, 2, 3, 4, 5, 6, 8],
        [0, 1, 2, 3, 4, 5, 6, 1 << 60],
        [-1] * 8,
        [1, 2, 3, 4, 5, 6, 7, -1],
    ],
    ids=["below -1", "twice", "not there", "far off", "none", "without 0"],
)
def test_slots_that_do_not_hold_each_token_once_are_refused(slots):
    with pytest.raises(ValueError, match="slots must hold each token once, from 0 on"):
        Plan(**SOUND | {"slots": torch.tensor(slots)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"slots": torch.arange(8).int()}, r"slots must be \(S,\) int64"),
        ({"slots": torch.arange(8)[None]}, r"slots must be \(S,\) int64"),
        ({"slots": torch.zeros(0, dtype=torch.int64)}, r"slots must be \(S,\) int64, got \(0,\)"),
        ({"block_q": 0}, "block_q and block_k must be at least 1, got 0 and 2"),
        ({"block_k": 3}, "keep must be .* block_k=3"),
        ({"keep": SOUND["keep"][0]}, "keep must be"),
        ({"keep": SOUND["keep"].float()}, "keep must be bool"),
        (
            {"partial": Route(torch.ones(1, 1, 8, 3, dtype=torch.bool), torch.zeros(3), 2)},
            r"group of a route must be \(4,\), got \(3,\)",
        ),
        (
            {"partial": Route(torch.ones(1, 1, 7, 3, dtype=torch.bool), torch.zeros(4), 2)},
            r"picks of a route must be \(1, 1, 8, 3\), got \(1, 1, 7, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        Plan(**SOUND | changed)


def test_slots_that_many_plans_share_are_looked_at_once(monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "count_tokens", lambda slots: seen.append(slots) or 8)
    slots = torch.arange(8)
    assert [Plan(**SOUND | {"slots": slots}).tokens for _ in range(3)] == [8] * 3
    assert len(seen) == 1
