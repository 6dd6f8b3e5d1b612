"""Our Triton kernels over packed operands, chosen wherever they serve; else as test_triton.py."""

import autotune
import pytest
import torch
from support.checks import assert_no_worse
from support.problems import blind, random_plan
from support.products import NIGHTLY, in_turns
from support.triton_plans import (
    PLANS,
    assert_matches_reference,
    differentiated,
    inputs,
    routed_plan,
)

from gen_accel import kernels
from gen_accel.kernels import reference
from gen_accel.kernels import triton as package
from gen_accel.kernels.triton import block_sparse, configs, packing
from gen_accel.plan import Plan, Rest

forward_lse = package.kernel.forward_lse

pytestmark = pytest.mark.usefixtures("poison", "untuned")

EVERY = {"packed forward", "packed dq", "packed dkdv"}
# Those whose blocks have whole loads of half a tile, on both sides; the others are gathered.
SERVED = {
    "route, two loads": lambda device: routed_plan(device, 1, 1, 32, 16),
    **{
        name: PLANS[name]
        for name in (
            *("one pattern", "batch and heads", "windows", "windows, blocks of two tiles"),
            *("route", "route, key blocks of two tiles"),
        )
    },
}
QUICK = ["windows, blocks of two tiles", "route, two loads"]


@pytest.fixture
def launched(monkeypatch):
    """Kinds that run, in order, packing always paying."""
    kinds = []
    own = block_sparse.launch_over

    def watched(kind, *rest, **options):
        kinds.append(kind)
        return own(kind, *rest, **options)

    monkeypatch.setattr(packing, "pays", lambda *facts: True)
    monkeypatch.setattr(block_sparse, "launch_over", watched)
    return kinds


@pytest.fixture
def copied(monkeypatch):
    """Names of the packing kernels that run, and whether they copy."""
    names = []
    own = packing.launch

    def watched(kernel, *rest, **sizes):
        names.append((kernel.__name__, sizes.get("COPY", True)))
        return own(kernel, *rest, **sizes)

    monkeypatch.setattr(packing, "launch", watched)
    return names


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    in_turns(list(SERVED) if NIGHTLY else QUICK, (torch.bfloat16, torch.float16)),
    ids=str,
)
def test_outputs_and_gradients_match_reference(name, dtype, device, launched):
    plan = SERVED[name](device)
    assert_matches_reference(plan, inputs(plan, dtype, dim=24), lse_weight=0.1)
    assert set(launched) == EVERY


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SERVED) if NIGHTLY else ["windows, blocks of two tiles"])
def test_what_is_packed_gives_what_is_gathered(name, device, launched, monkeypatch):
    """In fp32, which the interpreter alone packs, and in which no error hides."""
    plan = SERVED[name](device)
    tensors = inputs(plan, torch.float32)

    def forward(*leaves):
        return forward_lse(*leaves, plan, scale=0.3)

    packed = differentiated(forward, tensors, None, lse_weight=0.1)
    assert set(launched) == EVERY
    monkeypatch.setattr(packing, "pays", lambda *facts: False)
    torch.testing.assert_close(packed, differentiated(forward, tensors, None, lse_weight=0.1))


@pytest.mark.slow
def test_blocks_without_whole_loads_are_gathered(device, launched):
    """Those of queries in the backward pass alone."""
    plan = random_plan(device, block_q=8, block_k=32)
    assert_matches_reference(plan, inputs(plan, torch.bfloat16))
    assert set(launched) == {"packed forward", "dq", "dkdv"}
    launched.clear()
    plan = random_plan(device, block_q=32, block_k=8)
    package.kernel.forward(*inputs(plan, torch.float32), plan, scale=0.3)
    assert launched == ["forward"]


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "kinds"),
    [(3.0, EVERY), (0.0, EVERY), (-0.3, {"forward", "dq", "dkdv"})],
    ids=("positive", "zero", "negative"),
)
def test_any_scale(scale, kinds, device, launched):
    """The largest makes maxima grow by more than the slack in some turns and by less in others."""
    plan = random_plan(device, block_q=32, block_k=16)
    assert_matches_reference(plan, inputs(plan, torch.bfloat16), scale=scale)
    assert set(launched) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["triton", "triton_int8"])
def test_kept_keys_go_on_with_a_rest(kernel, device, launched):
    """Packed, and in 8 bits, where no gradient is needed."""
    plan = random_plan(device, 1, 2, 32, 16, rest=Rest("query", "second"))
    tensors = [x.to(device) for x in inputs(plan, torch.bfloat16)]
    out, lse = kernels.run_lse(*tensors, plan, scale=0.3, kernel=kernel)
    assert launched == ["packed forward" if kernel == "triton" else "int8 forward"]
    exact = reference.kernel.forward_lse(*(x.double() for x in tensors), plan, scale=0.3)
    low = reference.kernel.forward_lse(*tensors, plan, scale=0.3)
    more = kernels.allowance(kernel, *tensors, plan, scale=0.3)
    assert_no_worse(out, low[0], exact[0], more=more)
    assert torch.equal(lse.isneginf(), exact[1].isneginf())


@pytest.mark.slow
def test_gains_dampen_scores(device, launched):
    plan = random_plan(device, 1, 2, 32, 16)
    g = torch.Generator().manual_seed(3)
    plan = plan.changed(gain=torch.rand(plan.keep.shape, generator=g).to(device) / 2 + 0.5)
    assert_matches_reference(plan, inputs(plan, torch.float16))
    assert set(launched) == EVERY


def raster_plan(device):
    g = torch.Generator().manual_seed(4)
    keep = torch.rand(1, 1, 2, 4, generator=g) < 0.7
    return Plan(torch.arange(64), keep, 32, 16).to(device)


@pytest.mark.slow
def test_tokens_in_order_are_read_where_they_lie(device, launched, copied):
    """As are views of models; what starts or steps off 16 bytes is copied."""
    plan = raster_plan(device)
    tensors = inputs(plan, torch.float32, heads=2)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    shifted = [torch.cat([x[..., :1], x], -1)[..., 1:] for x in tensors]
    results = []
    for given, copies in ((tensors, False), (swapped, False), (shifted, True)):
        copied.clear()

        def forward(*leaves):
            return forward_lse(*leaves, plan, scale=0.3)

        results.append(differentiated(forward, given, None))
        queries = ("pack_queries_kernel", copies)
        keys = [("pack_kernel", True)] if copies else []
        assert copied == [*keys, queries, *keys]
    assert set(launched) == EVERY
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_a_row_that_sees_nothing_is_zero_and_so_is_its_gradient(device, launched):
    plan = random_plan(device, 1, 2, 32, 16, windows=True)
    dark = blind(plan)[:1]
    assert dark.any()
    q, k, v = (x.requires_grad_() for x in inputs(plan, torch.float32))
    out, lse = forward_lse(q, k, v, plan, scale=0.3)
    assert (out[dark] == 0).all()
    assert torch.equal(lse == -torch.inf, dark)
    given = torch.ones_like(lse).masked_fill(dark, torch.nan)
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), given))
    assert (grads[0][dark] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert set(launched) == EVERY


def test_nan_in_blocks_that_are_not_seen_goes_nowhere(device, launched):
    slots = torch.cat([torch.arange(60), torch.full((4,), -1)])
    plan = Plan(slots, torch.eye(4, dtype=torch.bool)[None, None], 16, 16).to(device)
    tensors = inputs(plan, torch.float32)
    for x in tensors:
        x[:, :, :16] = torch.nan
    results = differentiated(lambda *x: forward_lse(*x, plan, scale=0.3), tensors, None)
    assert all(torch.isfinite(result[:, :, 16:]).all() for result in results)
    assert set(launched) == EVERY


@pytest.mark.slow
def test_tuning_times_the_kernels_that_run(device, launched):
    plan = Plan(torch.arange(32), torch.ones(1, 1, 1, 1, dtype=torch.bool), 32, 32).to(device)
    q, k, v = inputs(plan, torch.float16, batch=1, heads=1)
    found = autotune.tune(q, k, v, plan, scale=0.3)
    assert {name.split("/")[1] for name in found} == EVERY
    assert set(launched) == EVERY
    assert_matches_reference(plan, [q, k, v])


class TestChoice:
    def served(self, arch="sm_90", D=128, dtype=torch.bfloat16, blocks=(128, 128), kind="forward"):
        return configs.packs(arch, f"packed {kind}", D, dtype, *blocks, False)

    @pytest.mark.parametrize("blocks", [(128, 128), (64, 64), (128, 64), (64, 192), (57, 64)])
    def test_whole_loads_are_served(self, blocks):
        assert self.served(blocks=blocks)
        assert self.served(D=80, dtype=torch.float16, blocks=blocks)
        assert self.served("sm_100", blocks=blocks) == (blocks[0] == 128)

    @pytest.mark.parametrize(
        "facts",
        [
            {"arch": "sm_80"},
            {"arch": "sm_120"},
            {"arch": "gfx942"},
            {"dtype": torch.float32},
            {"D": 20},
            {"D": 256},
            {"blocks": (128, 57)},
            {"blocks": (128, 32)},
            {"blocks": (32, 128)},
            {"kind": "dkdv", "blocks": (57, 128)},
        ],
        ids=str,
    )
    def test_all_else_is_gathered(self, facts):
        assert not self.served(**facts)

    def pays(self, direction="forward", arch="sm_90", density=1.0, S=32768, ready=False):
        return packing.pays(direction, arch, 24, S, 128, 2, int(density * S * S), ready)

    def test_it_pays_from_the_density_on_at_which_keys_are_read_often_enough(self):
        for S in (32768, 131072):
            even = packing.even_queries("forward", "sm_90", 128, 2) / S
            assert not self.pays(density=0.95 * even, S=S)
            assert self.pays(density=1.1 * even, S=S)
        assert self.pays("backward", density=0.6 * even, S=S)

    def test_what_is_in_order_needs_no_copy(self):
        assert self.pays(density=0.001, ready=True)
        assert not self.pays(density=1.0, arch="interpreted", ready=True)

    def test_small_problems_are_over_before_a_kernel_starts(self):
        assert not self.pays(S=256)
