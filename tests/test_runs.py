"""Plans of runs are the plans of masks, in less memory."""

from functools import partial

import pytest
import torch
from support.checks import assert_no_worse

from gen_accel import Neighborhood, Radial, VideoShape, kernels, runs
from gen_accel.attention_processors.methods.neighborhood import plan_for_device
from gen_accel.attention_processors.methods.radial import gpu_plan
from gen_accel.kernels import fa4, facts_of, flex, lists, reference, xformers
from gen_accel.kernels.self_check import check_rows
from gen_accel.kernels.triton import lists as by_triton
from gen_accel.memory import PLAN_CACHE, bytes_of, in_words

VIDEOS = (VideoShape(9, 10, 14), VideoShape(13, 11, 9, 5), VideoShape(20, 9, 11, 77))
RADIALS = (
    Radial(),
    Radial(rest="means", sink=False, anchor_every=4),
    Radial(tile_frames=3, tile_side=4, decay_factor=0.3),
    Radial("paper", block=48, anchor_every=5),
    Radial("paper", block=256, rest="means"),
    Radial("code-2025-06", sink=False),
    Radial("code-2025-11", block=48),
)
WINDOWS = (
    Neighborhood((-1, 4, 4)),
    Neighborhood((3, 5, -1), is_causal=(True, False, True)),
    Neighborhood((5, 3, 3), stride=(2, 3, 1)),
    Neighborhood((2, 2, 3), dilation=(2, 2, 1)),
    Neighborhood((3, 3, 3), rest="means"),
)


def ways():
    """Each way to make a plan: of a video, afresh."""
    for method in (*RADIALS, *WINDOWS):
        yield pytest.param(method.plan, id=str(method))
    for method in RADIALS[:3]:
        yield pytest.param(partial(gpu_plan, method), id=f"GPU, {method}")
    for method in WINDOWS:
        yield pytest.param(partial(plan_for_device, method, gpu=True), id=f"GPU, {method}")


@pytest.fixture
def both(monkeypatch):
    """The plan with a mask, and the one with runs made in slices and read in parts."""

    def make(way, video, step=3000):
        PLAN_CACHE.forget()
        dense = way(video)
        PLAN_CACHE.forget()
        for name, value in (("SLICE", step), ("LISTED", 400), ("RUNS", 100)):
            monkeypatch.setattr(runs, name, value)
        with monkeypatch.context() as patch:
            patch.setattr(runs, "DENSE", 0)
            held = way(video)
        PLAN_CACHE.forget()
        assert dense.runs is None
        assert not has_mask(held)
        return dense, held

    return make


def has_mask(plan):
    return "keep" in vars(plan)


def used(index, counts):
    """The lists, each as long as it is used."""
    return [row[:n].tolist() for row, n in zip(index[0, 0], counts.tolist(), strict=True)]


@pytest.mark.turns(3)
@pytest.mark.parametrize("way", [*ways()])
def test_a_plan_of_runs_is_the_plan_of_the_mask(both, way):
    for video, step in zip(VIDEOS, (1, 3000, 700), strict=True):
        dense, held = both(way, video, step)
        assert torch.equal(dense.slots, held.slots)
        assert (dense.density, dense.computed_density) == (held.density, held.computed_density)
        some = torch.tensor([len(dense.keep[0, 0]) - 1, 0, 0])
        assert torch.equal(held.keep_of(0, 0, some), dense.keep[0, 0, some])

        index, counts = lists.kept_blocks(dense)
        found, held_counts = lists.blocks_of_runs(held, torch.int32)
        assert torch.equal(counts, held_counts)
        assert found.dtype == torch.int32
        assert used(index, counts[0, 0, 0]) == used(found, counts[0, 0, 0])
        assert not has_mask(held)
        assert not has_mask(held.kept)

        assert torch.equal(dense.keep, held.keep)
        assert torch.equal(dense.whole, held.whole)
        if dense.partial is not None:
            rule, blocks = dense.partial, (dense.real, dense.block_q, dense.block_k)
            assert torch.equal(dense.keep[0, 0], rule.touched(*blocks))
            assert torch.equal(dense.maskless(), rule.whole(*blocks) & dense.full_keys)


@pytest.mark.parametrize("method", [*RADIALS[1:4], *WINDOWS[1:4]], ids=str)
def test_lists_of_gpus_are_those_of_the_mask(both, method, monkeypatch):
    monkeypatch.setattr(by_triton, "MOST", 0)  # as of a plan that is large
    dense, held = both(method.plan, VIDEOS[1])
    wanted, found = (by_triton.prepare(plan) for plan in (dense, held))
    assert not has_mask(held)
    for name in ("rows", "row_counts", "columns", "column_counts", "rule", "slots"):
        pair = getattr(wanted, name), getattr(found, name)
        assert all(map(torch.equal, *(x if name == "rule" else [x] for x in pair))), name


def test_bits_of_a_plan_of_runs_are_those_of_the_mask(both):
    way = partial(plan_for_device, Neighborhood((3, 5, 7)), gpu=True)
    dense, held = both(way, VIDEOS[1])
    wanted, found = (by_triton.prepare(plan).rule for plan in (dense, held))
    assert len(wanted) == len(found) == 4
    assert all(map(torch.equal, wanted, found))


@pytest.mark.parametrize("way", [*ways()])
def test_lists_by_kind_are_those_of_the_mask(both, way):
    """Of query blocks and of key blocks, as FlexAttention and FlashAttention-4 read them."""
    dense, held = both(way, VIDEOS[1], 700)
    found = lists.split_of_runs(held)
    assert not has_mask(held)
    whole, masked = dense.whole, dense.keep & ~dense.whole
    for side, (a, b) in zip(found, ((masked, whole), (masked.mT, whole.mT)), strict=True):
        wanted = (*lists.left_packed(a), *lists.left_packed(b))
        for counts, index, *pair in (side[:2] + wanted[:2], side[2:] + wanted[2:]):
            assert torch.equal(counts, pair[0])
            assert (counts.dtype, index.dtype) == (torch.int32, torch.int32)
            assert used(index, counts[0, 0]) == used(pair[1], counts[0, 0])
            assert index.shape[3] == max(1, counts.max())


def test_a_block_mask_of_runs_says_what_that_of_the_mask_says(both):
    for method in (RADIALS[1], WINDOWS[1]):
        dense, held = both(method.plan, VIDEOS[1])
        wanted, found = map(flex._block_mask, (dense, held))
        assert not has_mask(held)
        assert (found.shape, found.BLOCK_SIZE) == (wanted.shape, wanted.BLOCK_SIZE)
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, index = (getattr(found, f"{name}_{x}") for x in ("num_blocks", "indices"))
            assert torch.equal(counts, getattr(wanted, f"{name}_num_blocks"))
            pair = (
                used(index, counts[0, 0]),
                used(getattr(wanted, f"{name}_indices"), counts[0, 0]),
            )
            assert pair[0] == pair[1]
        # The code for CPUs asks for lists as wide as the plan.
        assert found.kv_indices.shape[3] == held.blocks.shape[3]


@pytest.mark.nightly
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("method", [RADIALS[1], WINDOWS[1]], ids=str)
def test_compiled_flex_matches_the_reference(both, method):
    dense, held = both(method.plan, VIDEOS[1])
    inputs = torch.randn(3, 1, 2, VIDEOS[1].tokens, 16)
    exact, low = (
        reference.kernel.forward(*x, dense, scale=0.3) for x in (inputs.double(), inputs)
    )
    assert_no_worse(kernels.run(*inputs, held, scale=0.3, kernel="flex"), low, exact)
    assert not has_mask(held)


class TestRefusals:
    """Of kernels that would need as much memory as a mask, or more."""

    @pytest.fixture
    def facts(self, both, monkeypatch):
        for name in ("reasons", "serves"):
            monkeypatch.setattr(fa4.flash4, name, lambda facts: [])
        monkeypatch.setattr(fa4, "_library_reasons", lambda: [])
        q, k, v = torch.zeros(3, 1, 2, VIDEOS[1].tokens, 16)
        return facts_of(q, k, v, both(RADIALS[2].plan, VIDEOS[1])[1])

    @pytest.mark.parametrize("kernel", [flex, fa4])
    def test_lists_that_are_too_long(self, kernel, facts, monkeypatch):
        assert kernel.kernel.unsupported(facts) == []
        numbers = sum(
            x.numel()
            for side in lists.split_of_runs(facts.plan)
            for x in (side.mask_block_idx, side.full_block_idx)
        )
        monkeypatch.setattr(lists, "MOST", 4 * numbers)
        assert kernel.kernel.unsupported(facts) == []
        monkeypatch.setattr(lists, "MOST", 4 * numbers - 1)
        (reason,) = kernel.kernel.unsupported(facts)
        size = in_words(4 * numbers)
        assert reason.startswith(
            f"its lists of blocks, all as long as the longest, would take {size}"
        )
        assert not has_mask(facts.plan)

    def test_tiles_of_several_blocks(self, facts, monkeypatch):
        monkeypatch.setattr(fa4.flash4, "blocks", lambda facts: (256, 128))
        (reason,) = fa4.kernel.unsupported(facts)
        assert "256 x 128 hold several blocks of the plan, whose whole mask they would" in reason

    def test_rows_that_are_compared(self, facts):
        reasons = xformers.kernel.unsupported(facts)
        assert any("compares the rows of the whole mask of blocks" in why for why in reasons)
        assert not has_mask(facts.plan)


def test_a_call_makes_no_mask(both):
    dense, held = both(Radial().plan, VIDEOS[1])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, VIDEOS[1].tokens, 8, generator=generator)
    wanted = kernels.run(q, k, v, dense, scale=0.3, kernel="gather")
    found = kernels.run(q, k, v, held, scale=0.3, kernel="gather")
    assert torch.equal(wanted, found)
    check_rows(q, k, v, held, found, scale=0.3, name="gather")
    assert not has_mask(held)


def test_what_is_changed_or_moved_keeps_its_runs(both):
    _, held = both(Radial().plan, VIDEOS[0])
    gain = torch.full(held.runs.shape, 0.5)
    assert held.changed(gain=gain).runs is held.runs
    moved = held.to(torch.device("meta"))
    assert moved.runs.shape == held.runs.shape
    assert not has_mask(held)
    assert held.keeping(held.keep, dynamic=False).runs is None


def test_nothing_kept_is_no_run():
    made = runs.runs_of([torch.zeros(2, 5, dtype=torch.bool)], 5)
    assert made.shape == (1, 1, 2, 5)
    assert made.counts.tolist() == [0, 0]
    assert not made.mask().any()


@pytest.mark.slow
def test_a_plan_of_878_thousand_tokens_holds_no_mask():
    """Of 110 million pairs of blocks."""
    plan = Radial().plan(VideoShape(61, 90, 160))
    assert 0.15 < plan.density < plan.computed_density < 0.25
    assert not has_mask(plan)
    assert bytes_of(plan) < 70e6
    PLAN_CACHE.forget()


def test_a_missing_attribute_is_named():
    with pytest.raises(AttributeError, match="'Plan' object has no attribute 'kep'"):
        getattr(Radial().plan(VIDEOS[0]), "kep")  # noqa: B009
