"""Tokens in the orders of models and in that of methods."""

import pytest
import torch
from torch import Tensor

from gen_accel.attention_processors.tokens import Tokens, by_text, seen_text
from gen_accel.video import VideoShape

GRID = (2, 3, 4)
CPU = torch.device("cpu")


def numbered(batch: int, tokens: int) -> Tensor:
    """(B, N, 1, 1), each token its own number."""
    return torch.arange(float(batch * tokens)).view(batch, tokens, 1, 1)


@pytest.mark.parametrize("before", [0, 2, 5])
@pytest.mark.parametrize(
    "seen",
    [
        None,
        [(0, 1, 2, 3, 4)] * 2,
        [(0, 1), (0, 1)],
        [(0, 1, 2), (0,)],
        [(1, 4), (0, 2)],
        [(), (3,)],
    ],
    ids=str,
)
def test_the_grid_comes_first_and_all_goes_back(before, seen):
    tokens = Tokens(VideoShape(*GRID, 5), before)
    x = numbered(2, 24 + 5)
    groups = by_text(tokens, 2, seen, CPU)
    assert sorted(row for some in groups for row in some.rows) == [0, 1]
    for some in groups:
        own = some.of(x)[:, 0, :, 0]
        for i, row in enumerate(some.rows):
            places = range(5) if seen is None else seen[row]
            others = [place if place < before else place + 24 for place in places]
            expected = [*range(before, before + 24), *others]
            assert own[i].tolist() == x[row, expected, 0, 0].tolist()
        back = some.back(some.of(x), 29)[:, :, 0, 0]
        for i, row in enumerate(some.rows):
            places = range(5) if seen is None else seen[row]
            kept = torch.zeros(29, dtype=torch.bool)
            kept[before : before + 24] = True
            kept[[place if place < before else place + 24 for place in places]] = True
            assert torch.equal(back[i], x[row, :, 0, 0].where(kept, torch.tensor(0.0)))


def test_gradients_of_both_ways():
    tokens = Tokens(VideoShape(*GRID, 5), 3)
    (some,) = by_text(tokens, 2, [(1, 4), (0, 2)], CPU)
    x = torch.randn(2, 29, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: some.back(some.of(x).sin(), 29), x)


def test_queries_of_the_grid_alone():
    tokens = Tokens(VideoShape(*GRID, 5), 3)
    q = tokens.complete(numbered(1, 24))
    assert q.shape == (1, 29, 1, 1)
    assert torch.equal(q[:, 3:27], numbered(1, 24))
    assert tokens.complete(numbered(1, 29)).shape == (1, 29, 1, 1)


MASKED = {
    "keys": lambda seen: seen[:, None, None],
    "short": lambda seen: seen,
    "a head": lambda seen: seen[:, None, None].expand(2, 3, 1, 29),
    "floats": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -10000.0)[:, None, None],
    "infinite": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None],
    "pairs": lambda seen: seen[:, None, :, None] & seen[:, None, None],
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("before", [0, 3])
def test_masks_of_text(kind, before):
    tokens = Tokens(VideoShape(*GRID, 5), before)
    seen = torch.ones(2, 29, dtype=torch.bool)
    hidden = [place if place < before else place + 24 for place in (1, 4)]
    seen[0, hidden] = False
    found = seen_text(MASKED[kind](seen), torch.zeros(2, 29, 3, 8), tokens)
    assert found == ((0, 2, 3), (0, 1, 2, 3, 4))


def test_a_mask_that_all_share():
    tokens = Tokens(VideoShape(*GRID, 5))
    mask = (torch.arange(29) < 26)[None, None, None]
    assert seen_text(mask, torch.zeros(3, 29, 2, 8), tokens) == ((0, 1),) * 3


@pytest.mark.parametrize("kind", MASKED)
def test_masks_of_the_grid_are_no_masks_of_text(kind):
    seen = torch.ones(2, 29, dtype=torch.bool)
    seen[1, 10] = False
    tokens = Tokens(VideoShape(*GRID, 5), 2)
    assert seen_text(MASKED[kind](seen), torch.zeros(2, 29, 3, 8), tokens) is None


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 29, 29).tril().bool(),
        torch.full((2, 1, 1, 29), -0.5),
        torch.ones(2, 1, 1, 28, dtype=torch.bool),
        torch.ones(29, 29, dtype=torch.bool),
        torch.ones(2, 1, 7, 29, dtype=torch.bool),
    ],
    ids=["causal", "bias", "other keys", "no batch", "other queries"],
)
def test_other_masks(mask):
    tokens = Tokens(VideoShape(*GRID, 5))
    assert seen_text(mask, torch.zeros(2, 29, 3, 8), tokens) is None


def test_heads_that_see_differently():
    tokens = Tokens(VideoShape(*GRID, 5))
    mask = torch.ones(2, 3, 1, 29, dtype=torch.bool)
    mask[:, 1, :, -1] = False
    assert seen_text(mask, torch.zeros(2, 29, 3, 8), tokens) is None
