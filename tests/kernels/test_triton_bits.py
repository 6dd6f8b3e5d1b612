"""Rules of static plans as bits, in our Triton kernels: interpreted on the CPU."""

from functools import partial
from itertools import product

import pytest
import torch
from support.problems import random_plan
from support.products import NIGHTLY, in_turns
from support.triton_plans import assert_matches_reference, differentiated, inputs

from gen_accel.attention_processors import Neighborhood, Radial
from gen_accel.attention_processors.methods import neighborhood, radial
from gen_accel.kernels import triton as package
from gen_accel.kernels.triton import block_sparse, configs, lists, tiles
from gen_accel.plan import Plan, Windows
from gen_accel.video import VideoShape

pytestmark = pytest.mark.usefixtures("poison", "untuned")

BITS, WINDOWS, NONE = tiles.BITS.value, tiles.WINDOWS.value, tiles.NONE.value


@pytest.fixture
def wide(monkeypatch):
    """Tiles as on GPUs."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.LaunchConfig(128, 64, 4, 1))


def rule_of(plan):
    return block_sparse.mode_of(lists.prepare(plan).rule)


def as_plan(plan):
    """The same plan again, of which nothing is known yet."""
    return Plan(plan.slots, plan.keep, plan.block_q, plan.block_k, plan.partial)


def unpacked(words):
    """(pairs, own, listed) bool."""
    shift = torch.arange(lists.WORD, device=words.device)
    apart = (words[:, :, :, None].long() >> shift) & 1  # (pairs, words, own, bit)
    return apart.bool().transpose(1, 2).flatten(2)


@pytest.mark.parametrize("blocks", [(32, 32), (64, 32), (32, 64)], ids=str)
def test_each_bit_is_a_pair_of_a_block_that_needs_a_mask(blocks, device, monkeypatch):
    plan = random_plan(device, 2, 2, *blocks, windows=True)
    monkeypatch.setattr(lists, "PAIRS", 3 * blocks[0] * blocks[1])  # three blocks at a time
    rows, first, columns, first_column = lists.prepare(plan).rule
    slot = torch.arange(len(plan.slots), device=device)
    assert plan.partial is not None
    seen = plan.partial.allows(slot[:, None], slot)
    masked = plan.keep & ~plan.whole
    assert masked.any()
    for words, at, given, wanted, real in (
        (rows, first, masked, seen, plan.real),
        (columns, first_column, masked.mT, seen.mT, plan.real),
    ):
        numbers = given.nonzero().tolist()
        own, listed = (len(slot) // n for n in given.shape[2:])
        found = unpacked(words)
        assert found.shape == (len(numbers), own, listed)
        for i, (*pattern, row, column) in enumerate(numbers):
            inside = slice(column * listed, (column + 1) * listed)
            of_block = wanted[row * own : (row + 1) * own, inside] & real[inside]
            assert torch.equal(found[i], of_block)
            before = sum([*pattern, row] > number[:3] for number in numbers)
            assert at[pattern[0], pattern[1], row] == before


# Tiles as long as a word, as several, as half of one, longer than a block, and not a part of it.
TILES = [(64, 64), (64, 128), (128, 64), (32, 32), (16, 16)]
BLOCKS = [(64, 64), (32, 64), (64, 32)]


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile", "blocks"),
    [*product(TILES, BLOCKS)] if NIGHTLY else in_turns(TILES[:4], BLOCKS),
    ids=str,
)
def test_bits_answer_as_comparisons_do(tile, blocks, device, monkeypatch):
    config = configs.INTERPRETED._replace(tile_m=tile[0], tile_n=tile[1])
    monkeypatch.setattr(configs, "INTERPRETED", config)
    plan = random_plan(device, 1, 1, *blocks, windows=True)
    assert rule_of(plan) == BITS
    tensors = inputs(plan, torch.float32)
    results = []
    for most in (lists.MOST, 0):
        monkeypatch.setattr(lists, "MOST", most)
        one = as_plan(plan)
        assert rule_of(one) == (BITS if most else WINDOWS)
        run = partial(package.kernel.forward_lse, plan=one, scale=0.3)
        results.append(differentiated(run, tensors, None))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "dtype"), [((64, 64), torch.bfloat16), ((32, 64), torch.float32)], ids=str
)
def test_bits_match_reference(blocks, dtype, device):
    plan = random_plan(device, 1, 2, *blocks, windows=True)
    assert rule_of(plan) == BITS
    assert_matches_reference(plan, inputs(plan, dtype), lse_weight=0.1)


@pytest.mark.slow
def test_blocks_of_three_words_and_tiles_of_two_match_reference(device, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", configs.LaunchConfig(64, 64, 4, 1))
    small = random_plan(device, windows=True)
    slots = torch.nn.functional.pad(small.slots, (0, 64), value=-1)
    names = "first", "last", "place", "free", "seen"
    parts = (torch.nn.functional.pad(getattr(small.partial, name), (0, 64)) for name in names)
    rule = Windows(*parts)
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
    plan = Plan(slots, keep, 96, 96, rule)
    assert rule_of(plan) == BITS
    assert_matches_reference(plan, inputs(plan, torch.float32))


WINDOWED = [Neighborhood((-1, 4, 3), dilation=(1, 1, 2)), Neighborhood((3, 3, 4))]


@pytest.mark.slow
@pytest.mark.parametrize("method", WINDOWED if NIGHTLY else WINDOWED[:1], ids=str)
def test_neighborhood_as_on_a_gpu_matches_reference(method, wide, device):
    video = VideoShape(3, 7, 9, text=5)
    plan = neighborhood.plan_for_device(method, video, gpu=True).to(device)
    assert rule_of(plan) == BITS
    assert_matches_reference(plan, inputs(plan, torch.float32))


@pytest.mark.slow
def test_radial_as_on_a_gpu_matches_reference(wide, device):
    plan = radial.gpu_plan(Radial(decay_factor=0.3), VideoShape(4, 7, 13, text=5)).to(device)
    assert_matches_reference(plan, inputs(plan, torch.float32))


@pytest.mark.slow
def test_bits_and_a_gain_match_reference(wide, device):
    plan = random_plan(device, 1, 1, 64, 32, windows=True)
    gain = torch.rand(plan.keep.shape, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.1
    dampened = plan.changed(gain=gain.to(device))
    assert rule_of(dampened) == BITS
    assert_matches_reference(dampened, inputs(dampened, torch.float32))


@pytest.mark.slow
def test_a_plan_without_blocks_to_mask_has_no_rule(wide, device):
    method = Neighborhood((2, 8, 8), stride=(2, 8, 8))
    plan = neighborhood.plan_for_device(method, VideoShape(4, 8, 8), gpu=True).to(device)
    assert torch.equal(plan.keep, plan.whole)
    assert not plan.keep.all()
    assert rule_of(plan) == NONE
    assert_matches_reference(plan, inputs(plan, torch.float32, heads=1))


def test_all_plans_together_hold_so_many_bits(device, monkeypatch):
    first, second = (random_plan(device, block_q=32, block_k=32, windows=True) for _ in range(2))
    size = lists.bytes_of_bits(first, first.keep & ~first.whole)
    rule = lists.prepare(first).rule
    assert size == sum(x.nbytes for x in (rule[0], rule[2])) > 0
    monkeypatch.setattr(lists, "MOST", sum(lists._sizes.values()))
    assert rule_of(second) == WINDOWS
    del rule, first
    assert rule_of(as_plan(second)) == BITS, "the first one's are free again"


def test_blocks_that_a_word_would_cut_compare(device):
    assert rule_of(random_plan(device, block_q=16, block_k=32, windows=True)) == WINDOWS
    assert rule_of(random_plan(device, block_q=32, block_k=16, windows=True)) == WINDOWS
