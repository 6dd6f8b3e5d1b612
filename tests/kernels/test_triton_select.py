"""The choice of blocks in Triton, and its lists, held to torch; interpreted on the CPU."""

from dataclasses import replace

import pytest
import torch
from support.qkv import RAGGED, random_qkv

from gen_accel import Piecewise, SparseLinear, VideoShape
from gen_accel.attention_processors.methods import scores as by_scores
from gen_accel.kernels import dispatch, rest, run
from gen_accel.kernels.triton import lists, selection
from gen_accel.plan import joined

pytestmark = pytest.mark.usefixtures("poison", "untuned")

ALWAYS, RANKED, WHOLE = (1 << bit for bit in range(3))


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.build, "is_built", lambda: False)


def given(rows, blocks, device, heads=3):
    """Scores in halves, many of them equal, some -inf, NaN or a zero of either sign; what is added
    to them; and kinds."""
    g = torch.Generator().manual_seed(blocks)
    x = torch.randn(2, heads, rows, blocks, generator=g).mul(2).round() / 2
    rare = torch.rand(x.shape, generator=g)
    x[rare < 0.1], x[rare > 0.95], x[:, :, 0] = -torch.inf, torch.nan, -torch.inf
    x[:, :, -1] = torch.tensor([-0.0, 0.0]).repeat(blocks)[:blocks]
    added = torch.randint(0, 3, (2, heads, blocks), generator=g).float()
    always, ranked = (
        torch.rand(rows, blocks, generator=g) < 0.1,
        torch.rand(blocks, generator=g) < 0.8,
    )
    ranked[-1] = True
    whole = torch.rand(blocks, generator=g) < 0.7
    kinds = always * ALWAYS + ranked * RANKED + whole * WHOLE
    return [one.to(device) for one in (x, added, kinds.byte())]


def selected(scores, added, kinds, counts, groups):
    """What the operator writes, for some heads at a time."""
    always = (kinds & ALWAYS > 0).sum(1)
    chooses = torch.ones_like(always)
    before = torch.stack([always.cumsum(0) - always, chooses.cumsum(0) - chooses], 1).int()
    entries, wanted = int(always.sum()) + max(counts) * len(kinds), None
    if len(counts) > 1:
        wanted = torch.tensor(counts, device=scores.device)
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    sizes = (entries,), (len(kinds), 4)
    index, numbers = (keep.new_empty(*keep.shape[:2], *size, dtype=torch.int32) for size in sizes)
    for some in groups:
        selection.select(
            scores[:, some],
            added,
            kinds,
            before,
            wanted,
            keep,
            index,
            numbers,
            some.start,
            max(counts),
        )
    return keep, index, numbers


def by_torch(scores, added, kinds, counts):
    """The best of each row by a stable sort, and what is always kept."""
    total = scores if added is None else scores + added[:, :, None]
    ranked = (kinds[0] & RANKED > 0).nonzero()[:, 0]
    order = total[..., ranked].sort(dim=-1, descending=True, stable=True).indices
    counts = torch.tensor(counts, device=scores.device).expand(scores.shape[1])
    taken = torch.arange(len(ranked), device=scores.device) < counts[:, None, None]
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep.scatter_(-1, ranked[order], taken.expand(order.shape))
    return keep | (kinds & ALWAYS > 0)


def assert_lists(keep, whole, index, numbers):
    """Each row has what it keeps from its start on, masked blocks first, in order, and no row what
    is another's."""
    for kept, entries, rows in zip(
        *(x.flatten(0, 1) for x in (keep, index, numbers)), strict=True
    ):
        assert sorted(rows[:, 3].tolist()) == list(range(len(rows)))
        ends = 0
        for seen, (masked, total, start, _) in zip(kept, rows.tolist(), strict=True):
            some, full = ((seen & one).nonzero()[:, 0].tolist() for one in (~whole, whole))
            assert start >= ends
            ends = start + total
            assert entries[start:ends].tolist() == some + full
            assert (masked, total) == (len(some), len(some) + len(full))
        assert ends <= len(entries)


@pytest.mark.parametrize("blocks", [1, 2, 17, 64, 129, 300])
def test_it_chooses_and_lists_what_torch_does(blocks, device, monkeypatch):
    rows = 4 if blocks == 17 else 37
    if rows == 4:
        monkeypatch.setattr(selection, "ROWS", 1)  # as on a GPU
    scores, added, kinds = given(rows, blocks, device)
    ranked = int((kinds[0] & RANKED > 0).sum())
    counts = [max(1, int(share * ranked)) for share in (0.2, 1.0, 0.5)]
    groups = [slice(0, 2), slice(2, 4)] if blocks == 64 else [slice(0, 3)]
    for more, wanted in ((added, counts), (None, counts[:1])):
        keep, *listed = selected(scores, more, kinds, wanted, groups)
        assert torch.equal(keep, by_torch(scores, more, kinds, wanted))
        assert_lists(keep, kinds[0] & WHOLE > 0, *listed)


METHODS = {
    "text": (Piecewise(0.3, score="mean", block_q=16, block_k=16), RAGGED),
    "values": (Piecewise(0.3, score="loss", block_q=32, block_k=16), RAGGED),
    "norms, a sink": (
        Piecewise(0.2, score="norm", sink=1, sink_queries=True, block_q=8, block_k=16),
        RAGGED,
    ),
    "a band, empty blocks": (
        Piecewise(0.2, score="mean", band=1, tile=(2, 2, 4), block_q=32, block_k=16),
        RAGGED,
    ),
    "runs of tokens": (Piecewise(0.4, score="mean", tile="raster", block_q=7, block_k=7), RAGGED),
    "text alone": (
        Piecewise(score="mean", tile="raster", block_q=16, block_k=16),
        VideoShape(1, 2, 2, text=40),
    ),
    "no rest": (SparseLinear(critical=0.3, block_q=16, block_k=16), RAGGED),
    "heads": (
        Piecewise(0.2, score="mean", block_q=16, block_k=16).together(
            [Piecewise(share, score="mean", block_q=16, block_k=16) for share in (0.2, 0.6)]
        ),
        RAGGED,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_choose_as_in_torch(name, device, monkeypatch):
    method, video = METHODS[name]
    q, k, v = (x.to(device) for x in random_qkv(video))
    want = method.plan_for(q, k, v, video=video, kernel="gather")
    monkeypatch.setattr(by_scores, "AT_ONCE", 1)
    plan = method.plan_for(q, k, v, video=video, kernel="triton")
    assert want.listed is None
    assert torch.equal(plan.keep, want.keep)
    assert plan.entries == want.entries
    if name == "text alone":
        assert plan.listed is None
        return
    made = lists.prepare(plan)
    assert made.rows.data_ptr() == plan.listed[0].data_ptr()
    assert_lists(plan.keep, plan.full_keys, made.rows, made.row_counts)


def test_rows_that_are_too_long_are_chosen_by_torch(device, monkeypatch):
    method, video = METHODS["text"]
    q, k, v = (x.to(device) for x in random_qkv(video))
    want = method.plan_for(q, k, v, video=video, kernel="triton")
    monkeypatch.setattr(selection, "MOST_BLOCKS", 3)
    plan = method.plan_for(q, k, v, video=video, kernel="triton")
    assert plan.listed is None
    assert torch.equal(plan.keep, want.keep)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grad"), [("text", False), ("no rest", True)])
def test_attention_reads_the_lists_of_a_choice(name, grad, device, monkeypatch):
    """Bit for bit as by lists that are counted, also for some heads at a time."""
    method, video = METHODS[name][0], VideoShape(2, 4, 6, text=3)
    q, k, v = (x.to(device) for x in random_qkv(video))
    plan = method.plan_for(q, k, v, video=video, kernel="triton")
    assert not plan.keep.all()
    monkeypatch.setattr(rest, "WIDE", 1)
    results = []
    for one in (plan, replace(plan, listed=None)):
        leaves = first, second, third = [x.clone().requires_grad_(grad) for x in (q, k, v)]
        with torch.set_grad_enabled(grad):
            out = run(first, second, third, one, scale=0.3, kernel="triton")
        grads = torch.autograd.grad(out.square().sum(), leaves) if grad else ()
        results.append((out.detach(), *grads))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_plan_of_other_blocks_holds_no_lists_of_a_choice(device):
    method, video = METHODS["text"]
    q, k, v = (x.to(device) for x in random_qkv(video))
    plan = method.plan_for(q, k, v, video=video, kernel="triton")
    assert plan.kept.listed is plan.listed
    assert replace(plan, rest=None).changed(gain=plan.keep.float()).listed is plan.listed
    assert plan.changed(keep=plan.keep[:1]).listed is None
    assert plan.keeping(plan.keep, dynamic=True).listed is None
    one = plan.of_heads(slice(1, 2))
    assert torch.equal(one.listed[0], plan.listed[0][:, 1:])
    both = joined([((0,), one), ((1,), plan.of_heads(slice(0, 1)))], 2)
    assert both.listed is None
    assert torch.equal(both.keep, plan.keep.flip(1))
