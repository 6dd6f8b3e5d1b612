"""Block mixture on a GPU, as far as a CPU can tell: launches, order of sums, pairs computed."""

import pytest
import torch
from support.launches import Launches, record

from gen_accel import BlockMixture, VideoShape, kernels
from gen_accel.attention_processors.attached.records import Record
from gen_accel.attention_processors.methods import block_mixture as picking
from gen_accel.attention_processors.methods.blocks import smooth_qk
from gen_accel.kernels import Runner, choosing
from gen_accel.kernels.triton import gathered

SELECTIONS = [
    {},
    {"scope": "query_head"},
    {"scope": "overall"},
    {"scope": "block"},
    {"select": "topk", "scope": "query_head"},
    {"select": "topk", "scope": "overall"},
]


@pytest.fixture
def in_bins(monkeypatch):
    """As scopes of whole videos are searched."""
    monkeypatch.setattr(picking, "SORTED", 64)


def asked(method, q, k, v, video, counted):
    """Count what one call through `triton` with its record launches."""
    plans = []

    def run(q, k, v, plan):
        plans.append(plan)
        return kernels.run(q, k, v, plan, scale=0.3, kernel="triton")

    method.layout(video, q.device)  # once for all calls
    kept = Record()
    with torch.no_grad(), counted:
        method(q, k, v, video=video, kernel=Runner(run, "triton"))
        kept.add((len(q), video.tokens, *q.shape[1::2]), plans=[(p, q.shape[1]) for p in plans])


@pytest.mark.usefixtures("in_bins")
@pytest.mark.parametrize("routing", ["token", "block"])
@pytest.mark.parametrize(
    ("heads", "video"),
    [
        (4, VideoShape(4, 9, 16, text=9)),  # with more blocks in some chunks than in others
        (12, VideoShape(6, 10, 16)),
        pytest.param(40, VideoShape(6, 10, 16, text=9), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_call_is_few_launches_at_any_number_of_heads(heads, video, routing, monkeypatch):
    counted = Launches()
    record(monkeypatch, counted)
    for options in SELECTIONS:
        method = BlockMixture(
            "3d", chunk_3d=(3, 5, 16), block=16, routing=routing, topk=(1, 2, 2), **options
        )
        given = torch.randn(3, 1, heads, video.tokens, 16).bfloat16()
        counted.done.clear()
        asked(method, *given, video, counted)
        assert counted.count <= 60, counted.done
        assert any(name.endswith("forward_kernel") for name in counted.done)
    assert counted.waits == []
    assert counted.random == []


@pytest.fixture
def on_gpu(monkeypatch, in_bins):
    """The kernel that counts in bins serves as it does on a GPU."""
    monkeypatch.setattr(choosing, "triton_serves", lambda kernel, x: kernel == "triton")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_a_gpu_counts_in_place_and_picks_the_same(options):
    video = VideoShape(4, 6, 6, text=3)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, video.tokens, 16, generator=g)
    method = BlockMixture("3d", chunk_3d=(2, 3, 3), routing="token", topk=(2, 3, 3), **options)
    method.layout(video, q.device)
    with Launches() as counted:
        plan = method.plan_for(q, k, video=video, kernel="triton")
    assert ("triton_least_taken" in counted.operators) == (method.scope != "query_head")
    wanted = method.plan_for(q, k, video=video, kernel="reference")
    assert torch.equal(plan.partial.picks, wanted.partial.picks)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("size", "heads"), [((21, 30, 52), 40), ((21, 45, 80), 40)], ids=str)
def test_on_a_gpu_heads_of_whole_videos_pick_together(size, heads, monkeypatch):
    """All of Wan 14B at 480p and at 720p, on meta tensors: 1 GB of scores."""
    R, C = size[0] * size[1] * size[2], 72
    rows, means = (torch.empty(1, heads, n, 64, device="meta") for n in (R, C))
    out = torch.empty(1, heads, R, C, dtype=torch.bool, device="meta")
    at_home = torch.empty(R, C, dtype=torch.bool, device="meta")
    rule = picking.PickRule("head_global", 0, 0.25)
    counted = Launches()
    record(monkeypatch, counted)
    with counted:
        picking.pick(rows, means, at_home, rule, out, "triton")
    assert counted.operators["triton_least_taken"] == 1
    assert 4 * heads * R * C < 1.1e9


@pytest.mark.parametrize(("size", "heads"), [((21, 30, 52), 12), ((30, 48, 80), 24)], ids=str)
def test_heads_pick_in_groups_that_fit_the_budget(size, heads, monkeypatch):
    """Not one by one: on meta tensors, as many products as the budget asks for."""
    groups = []
    by = picking._by
    monkeypatch.setattr(picking, "_by", lambda x, *rest: groups.append(x.shape) or by(x, *rest))
    R, C = size[0] * size[1] * size[2], 72
    rows, means = (torch.empty(1, heads, n, 64, device="meta") for n in (R, C))
    out = torch.empty(1, heads, R, C, dtype=torch.bool, device="meta")
    at_home = torch.empty(R, C, dtype=torch.bool, device="meta")
    picking.pick(rows, means, at_home, picking.PickRule("head_global", 0, 0.25), out)
    assert sum(shape[1] for shape in groups) == heads
    assert all(shape.numel() <= max(picking.AT_ONCE, R * C) for shape in groups)
    assert len(groups) <= -(-heads * R * C // picking.AT_ONCE) + 1


class TestOrder:
    @pytest.mark.usefixtures("in_bins")
    @pytest.mark.parametrize("options", SELECTIONS, ids=str)
    def test_picks_of_heads_and_samples_are_those_of_each_alone(self, options):
        """Also the same twice, and under torch.use_deterministic_algorithms."""
        video = VideoShape(5, 6, 7, text=3)
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 2, 3, video.tokens, 16, generator=g)
        method = BlockMixture("3d", chunk_3d=(2, 4, 3), routing="token", topk=(2, 3, 5), **options)
        given = {"video": video, "kernel": "reference"}
        picks = method.plan_for(q, k, **given).partial.picks
        torch.use_deterministic_algorithms(True)
        try:
            again = method.plan_for(q, k, **given).partial.picks
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(again, picks)
        if method.scope not in picking.SCOPES_OVER_HEADS:
            alone = method.plan_for(q[1:, 2:], k[1:, 2:], **given).partial.picks
            assert torch.equal(alone, picks[1:, 2:])

    def test_masses_in_another_order_make_the_same_cut(self):
        g = torch.Generator().manual_seed(0)
        keys = torch.randint(0, 1 << 30, (2, 100_000), generator=g).int()
        mass = torch.randint(0, picking.UNITS, keys.shape, generator=g)
        slack = mass.sum(-1) // 3
        order = torch.randperm(keys.shape[1], generator=g)
        cut = picking.least_taken(keys, mass, slack)
        assert torch.equal(picking.least_taken(keys[:, order], mass[:, order], slack), cut)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["1d", "2d", "3d"])
def test_few_pairs_are_computed_that_no_query_picked(partition):
    """Of token routing at 33k tokens, in the layout of GPUs, where block unions compute 3 to 4
    times what is kept."""
    video = VideoShape(21, 30, 52)
    method = BlockMixture(partition, routing="token", block=128)
    g = torch.Generator().manual_seed(1)
    q, k = smooth_qk(video)
    noise = torch.randn(1, 1, video.tokens, q.shape[3], generator=g)
    q = torch.cat([q, q + noise], 1)  # two heads
    plan = method.plan_for(q, k.expand(q.shape), video=video)
    assert gathered.serves(plan)
    route, owned, tile = plan.partial, gathered.OWNED, gathered.TILE
    picks = torch.nn.functional.pad(route.picks, (0, 0, 0, -len(plan.slots) % owned))
    queries = picks.unflatten(2, (-1, owned)).sum(3)
    blocks = torch.zeros(picks.shape[3], dtype=torch.int64)
    blocks.index_add_(0, route.group, torch.ones_like(route.group))
    keys = -(-blocks * plan.block_k // tile) * tile
    computed = (-(-queries // tile) * tile * keys).sum() / picks.shape[1]
    kept = plan.density * video.tokens**2
    assert 0.1 < plan.density < 0.3
    assert computed / kept <= 1.3
    assert plan.computed_density > 3 * plan.density
