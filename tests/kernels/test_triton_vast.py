"""Our Triton kernels at scores of which a log-sum-exp in fp32 tells no weight."""

import pytest
import torch
from support.problems import random_plan
from support.triton_plans import assert_matches_reference, inputs, routed_plan

from gen_accel.kernels.triton import block_sparse, packing

pytestmark = pytest.mark.usefixtures("poison", "untuned")


def gained(device):
    plan = random_plan(device, block_q=32)
    return plan.changed(gain=torch.linspace(0.1, 1, plan.keep.numel()).view(plan.keep.shape))


PLANS = {
    "blocks": lambda device: random_plan(device, 1, 2, 32, 16),
    "windows": lambda device: random_plan(device, block_q=32, windows=True),
    "route": lambda device: routed_plan(device, 1, 1, 32, 16),
    "gain": gained,
}


@pytest.fixture(params=[False, True], ids=["gathered", "packed"])
def packed(request, monkeypatch):
    """Kinds of kernels that run."""
    kinds, own = [], block_sparse._launch
    monkeypatch.setattr(packing, "pays", lambda *facts: request.param)
    monkeypatch.setattr(
        block_sparse, "_launch", lambda kind, *rest: kinds.append(kind) or own(kind, *rest)
    )
    yield
    assert {kind.startswith("packed ") for kind in kinds} == {request.param}


@pytest.mark.slow
@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    ("name", "scale", "dtype"),
    [
        ("blocks", 1e8, torch.float32),
        ("windows", 1e12, torch.bfloat16),
        ("route", 1e9, torch.float32),
        ("gain", 1e30, torch.bfloat16),
    ],
    ids=str,
)
def test_vast_scores_are_told_apart(name, scale, dtype, device):
    """The softmax takes one key, forward and backward, as the reference does."""
    plan = PLANS[name](device)
    assert_matches_reference(plan, inputs(plan, dtype), scale=scale)
