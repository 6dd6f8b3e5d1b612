"""Attention over the queries that picked each group of keys: interpreted, and by counts."""

import pytest
import torch
from support.triton_plans import assert_matches_reference, inputs

from gen_accel.kernels.triton import gathered, tuned
from gen_accel.plan import Plan, Route

pytestmark = pytest.mark.usefixtures("poison", "untuned")


@pytest.fixture
def untuned(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.read.cache_clear()
    yield
    tuned.read.cache_clear()


def plan_of(device, block, group, *, batch=1, heads=1, share=0.4, padding=5, seed=0):
    """In which every query sees what it picked: `group` says which group each block is of, the
    last slot of each third block is padding."""
    g = torch.Generator().manual_seed(seed)
    group = torch.tensor(group)
    slots = torch.full((len(group) * block,), -1)
    held = torch.arange(len(slots))
    held = held[(held % (3 * block) < 3 * block - padding)]
    slots[held] = torch.randperm(len(held), generator=g)
    picks = torch.rand(batch, heads, len(slots), int(group.max()) + 1, generator=g) < share
    picks[:, :, : 3 * block, 0] = True
    picks[:, :, block : 2 * block, :] = False  # which see nothing
    route = Route(picks, group, block)
    keep = route.touched(slots >= 0, block, block)
    return Plan(slots, keep, block, block, route, dynamic=True).to(device)


PLANS = {
    "groups of two blocks": lambda device: plan_of(device, 32, [0, 0, 1, 1, 2, 2], heads=2),
    "blocks apart, of no power of two": lambda device: plan_of(
        device, 36, [1, 0, 0, 1, 0], batch=2
    ),
    "one pattern of many heads": lambda device: plan_of(device, 24, [0] * 3 + [1] * 4),
    "a group without keys": lambda device: plan_of(device, 32, [0, 0, 0, 2, 2, 2, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_match_reference(name, dtype, device):
    plan = PLANS[name](device)
    assert gathered.serves(plan)
    heads = {"batch": 2, "heads": 2} if name.startswith("one pattern") else {}
    weight = 0.1 if dtype == torch.float32 else 0.0
    assert_matches_reference(plan, inputs(plan, dtype, **heads), lse_weight=weight)
