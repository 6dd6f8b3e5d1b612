"""Attention over the queries that picked each group of keys: interpreted, and by counts."""

import pytest
import torch
from support.launches import Launches, record
from support.problems import assert_gradients_no_worse
from support.triton_plans import assert_matches_reference, differentiated, inputs

from gen_accel import BlockMixture, VideoShape, attention
from gen_accel.attention_processors.methods import block_mixture as picking
from gen_accel.kernels import triton as package
from gen_accel.kernels.triton import gathered, listing
from gen_accel.plan import Plan, Route

pytestmark = pytest.mark.usefixtures("poison", "untuned")


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
    "groups of two blocks": lambda device: plan_of(device, 32, [0, 0, 1, 1], heads=2),
    "blocks apart, of no power of two": lambda device: plan_of(device, 20, [1, 0, 0, 1, 0]),
    "samples, one pattern for all heads": lambda device: plan_of(
        device, 16, [0] * 3 + [1] * 3, batch=2
    ),
    "a group without keys": lambda device: plan_of(device, 32, [0, 2, 2]),
}


@pytest.fixture(autouse=True)
def short_groups(monkeypatch):
    monkeypatch.setattr(gathered, "LEAST", 16)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in PLANS), ("groups of two blocks", torch.bfloat16)],
    ids=str,
)
def test_outputs_and_gradients_match_reference(name, dtype, device):
    plan = PLANS[name](device)
    assert gathered.serves(plan)
    heads = 2 if name.startswith("samples") else None
    weight = 0.1 if dtype == torch.float32 else 0.0
    assert_matches_reference(plan, inputs(plan, dtype, heads=heads), lse_weight=weight)


@pytest.mark.slow
def test_heads_at_a_time_give_the_same_bits(device, monkeypatch):
    plan = plan_of(device, 16, [0, 0, 1, 1], batch=2, heads=2)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(plan, torch.float32)]

    def ours(*x):
        return package.kernel.forward_lse(*x, plan, scale=0.3)

    wanted = differentiated(ours, tensors, None)
    monkeypatch.setattr(gathered, "HELD", 1)
    found = differentiated(ours, tensors, None)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_lists_of_owners_hold_what_their_slots_picked(device):
    plan = plan_of(device, 32, [0, 0, 1, 1, 2, 2], batch=2, heads=2)
    picks = plan.partial.picks & plan.real[:, None]
    picked, ranges = listing.owners_of(plan.partial.picks, plan.slots.int(), 80)
    for b, h, owner, c in torch.cartesian_prod(*map(torch.arange, ranges.shape[:4])).tolist():
        start, count = ranges[b, h, owner, c].tolist()
        found = picked[b, h, owner, start : start + count].tolist()
        first = owner * 80
        assert found == picks[b, h, first : first + 80, c].nonzero()[:, 0].tolist()
    assert ranges[..., 1].sum() == picks.sum()


class TestRule:
    def test_what_blocks_compute_better_goes_by_blocks(self, device, monkeypatch):
        plan = plan_of(device, 32, [0, 0, 1, 1])
        assert gathered.serves(plan)
        assert not gathered.serves(plan.changed(gain=torch.ones(1, 1, 4, 4, device=device)))
        assert not gathered.serves(plan.changed(keep=plan.keep))
        assert not gathered.serves(Plan(plan.slots, plan.keep, 32, 32))
        some = Plan(plan.slots, plan.keep & False, 32, 32, plan.partial)
        assert not gathered.serves(some), "leaves out what was picked"
        monkeypatch.setattr(gathered, "LEAST", 65)
        assert not gathered.serves(plan), "short groups"

    def test_which_kernel_runs(self, device, monkeypatch):
        counted = Launches()
        record(monkeypatch, counted)
        plan = plan_of(device, 16, [0, 0, 1, 1])
        assert not plan.leaves_out_picks  # asked once of a plan made by hand
        names = []
        for one in (plan, plan.changed(keep=plan.keep)):
            counted.done.clear()
            with torch.no_grad(), counted:
                package.kernel.forward(*inputs(plan, torch.float32), one, scale=0.3)
            names.append([name for name in counted.done if name.endswith("forward_kernel")])
        assert names == [["gathered_forward_kernel"], ["forward_kernel"]]

    def test_nothing_waits_for_plans_of_methods(self, device):
        method = BlockMixture("1d", chunk_1d=1, routing="token", threshold=0.3)
        video = VideoShape(3, 6, 6)
        q, k = torch.randn(2, 1, 1, video.tokens, 16, device=device)
        plan = method.plan_for(q, k, video=video, kernel="triton")
        with Launches() as counted:
            assert gathered.serves(plan)
        assert counted.waits == []


@pytest.mark.slow
def test_block_mixture_matches_reference(device):
    video = VideoShape(3, 6, 6, text=5)
    method = BlockMixture("1d", chunk_1d=1, routing="token", threshold=0.3)
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 1, video.tokens, 16, generator=g).to(device) for _ in "qkv"]

    def by(name):
        return lambda q, k, v: attention(q, k, v, video=video, method=method, kernel=name)

    assert_gradients_no_worse(by("triton"), by("reference"), given)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_least_key_taken_is_that_of_torch(weighted, device):
    """The way that scopes of whole videos are searched on a GPU."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(-(1 << 31), 1 << 31, (2, 3, 1500), generator=g).int()
    if weighted:
        keys = (torch.rand(keys.shape, generator=g) * picking.UNITS).view(torch.int32)
    keys = torch.cat([keys, keys[..., :600]], -1).to(device)  # ties
    mass = keys.view(torch.float32).long() if weighted else torch.ones_like(keys).long()
    shares = torch.tensor([[0.0, 0.3, 0.9], [0.999, 1.0, 0.5]], device=device)
    slack = (mass.sum(-1) * shares.double()).long()
    wanted = picking.least_taken(keys, mass, slack)
    found = listing.least_taken(keys, slack, weighted)
    some = shares < 1
    assert torch.equal(found[some], wanted[some])
    for cut in (found, wanted):
        assert not (keys >= cut[..., None])[~some].any(), "none where all are within the slack"
