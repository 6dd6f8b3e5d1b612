"""Rivals of Piecewise's choice and rest are what they say, where the answer is known."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as dense

from gen_accel import VideoShape

VIDEO = VideoShape(9, 8, 8)  # boxes of 4 x 4 x 4, the last ones with a frame each
TOKENS = 9 * 8 * 8


@pytest.fixture
def choices(from_benchmarks):
    return from_benchmarks("study.choices")


@pytest.fixture
def call(from_benchmarks, qkv):
    q, k, v = qkv(TOKENS, batch=1)
    return from_benchmarks("study.captured").Captured(0, 5, 0, 2 * q, k, v, dense(2 * q, k, v))


def test_a_hilbert_curve_steps_to_a_neighbour(choices):
    axes = [x.flatten() for x in torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")]
    place = choices.along_hilbert(axes, 3)
    assert place.sort().values.equal(torch.arange(512))
    points = torch.stack(axes, 1)[place.argsort()]
    assert (points.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_blocks_are_kept_up_to_a_share_of_the_pairs(choices, share):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 12, 12, generator=generator)
    rows, columns = torch.randint(1, 65, (2, 12), generator=generator)
    keep = choices.within(scores, rows, columns, share)
    pairs = (keep * rows[:, None] * columns).sum((2, 3)) / (rows.sum() * columns.sum())
    largest = rows.max() * columns.max() / (rows.sum() * columns.sum())
    assert (pairs <= share + 1e-6).all()
    assert (pairs > share - largest).all()
    worst_kept = scores.masked_fill(~keep, torch.inf).amin(-1)
    assert (scores.masked_fill(keep, -torch.inf).amax(-1) <= worst_kept).all()


def test_all_blocks_are_dense_attention(choices, call):
    for name, way in choices.WAYS.items():
        if "extra" not in name and name != "SVG-EAR in clusters":
            found = way.answers(call, VIDEO)(1.0)
            assert found.share == pytest.approx(1), name
            torch.testing.assert_close(found.out, call.dense, msg=name)


def test_clusters_of_equal_tokens_are_exact(choices, call):
    kind = torch.arange(TOKENS) % 7
    one = call._replace(k=call.k[:, :, kind], v=call.v[:, :, kind])
    found = choices.svg_ear(one, VIDEO)(0.2)
    assert 0.15 < found.share <= 0.2
    torch.testing.assert_close(found.out, dense(one.q, one.k, one.v))


def test_a_tree_makes_full_groups_of_neighbours(choices):
    """Groups of numbers on a line are intervals."""
    line = torch.randperm(300, generator=torch.Generator().manual_seed(0)).float()
    groups = choices.tree(line[None, None, :, None].expand(-1, -1, -1, 4), 5)[0, 0]
    assert sorted(groups.bincount().tolist()) == [44, 64, 64, 64, 64]
    changes = groups[line.argsort()].diff() != 0
    assert changes.sum() == 4


def test_without_single_tokens_the_rest_is_the_package_s(choices, call):
    layout = choices._boxes(VIDEO)
    keep = choices._kept(choices.pooled(call, layout), layout, 0.3)
    own = choices._answer(call, keep, layout, choices.OURS)
    found = choices.extra_tokens(call, VIDEO, part=0.0)(0.3)
    assert found.share == pytest.approx(own.share)
    torch.testing.assert_close(found.out, own.out)


def test_single_tokens_are_exact(choices, call):
    """Where all that matters lies in a few keys of different blocks, blocks miss most of them."""
    scale = 3.0 * torch.ones(call.k.shape[2])[:, None]
    scale[::96] = 40.0
    one = call._replace(q=call.q * 0 + 1, k=call.k.abs() * 0.01 * scale)
    one = one._replace(dense=dense(one.q, one.k, one.v))
    found = choices.extra_tokens(one, VIDEO, part=1.0)(0.1)
    torch.testing.assert_close(found.out, one.dense, rtol=1e-3, atol=1e-4)


def test_a_block_of_equal_tokens_has_no_error_of_compensation(choices, call):
    layout = choices._boxes(VIDEO)
    block = layout.slots.places // choices.BLOCK
    k, v = call.k.clone(), call.v.clone()
    k[:, :, block == 1], v[:, :, block == 1] = k[:, :, :1], v[:, :, :1]
    errors = choices.compensation(call._replace(k=k, v=v), layout)
    assert (errors[..., 1] < errors[..., [0, 2, 3]].amin(-1) - 20).all()


def test_products_of_the_default_are_told_by_hand(choices):
    """10 blocks of 64 tokens: 3 vectors a block and token for the choice, 2 more where it is left
    out, of 2 N for each token of dense attention; and a slope of 64 channels."""
    counts = choices.Counts(tokens=640, blocks=10, dim=64)
    assert choices.ours(0.2, counts) == pytest.approx(0.2 + (3 + 1.6) * 10 / 1280 + 0.1)


def test_parts_of_equal_tokens_are_the_whole_block(choices, call):
    """With equal queries, and equal keys in each part, the score is the true mass, less ln of the
    tokens in a part."""
    layout = choices._boxes(VIDEO)
    part = layout.slots.places // (choices.BLOCK // choices.PARTS)
    count = len(layout.slots.slots) // (choices.BLOCK // choices.PARTS)
    k, _ = choices.means(call.k, part.expand(call.k.shape[:3]), count)
    one = call._replace(q=call.q * 0 + 1, k=k[:, :, part])
    found = choices.pairs(one, layout)
    spread = choices.of_package(one, layout, "spread")
    full = layout.slots.held[1][:, 0] == choices.BLOCK
    gap = (found - spread)[..., full][:, :, full]
    torch.testing.assert_close(gap, torch.full_like(gap, gap[0, 0, 0, 0].item()))
