"""Piecewise attention: its choice and its rest held to slow loops, its rules, its refusals."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from support.qkv import PLAIN, RAGGED, random_qkv
from torch._subclasses.fake_tensor import FakeTensorMode

from gen_accel import Piecewise, Reuse, VideoShape, attention, kernels
from gen_accel.attention_processors.methods import blocks as pooled
from gen_accel.attention_processors.methods import piecewise
from gen_accel.kernels.choosing import block_spread
from gen_accel.kernels.rest_cost import Orders, Problem, even_density
from gen_accel.kernels.triton import configs
from gen_accel.method import Step
from gen_accel.plan import CURVATURE, MOST_GAINED, Plan

SMALL = {"block_q": 16, "block_k": 16}
OPTIONS = [
    Piecewise(critical=0.3, **SMALL),
    Piecewise(critical=0.3, score="spread", order="zeroth", **SMALL),
    Piecewise(critical=0.3, block_q=16, block_k=8, score="mean", centre="key", order="first"),
    Piecewise(critical=0.3, score="norm", centre="key", tile=(2, 3, 2)),
    Piecewise(select="threshold", tau=0.3, band=0, sink=(7, 9), tile="raster", **SMALL),
    Piecewise(select="threshold", tau=0.3, threshold="exact", sink=1, sink_queries=True, **SMALL),
]


def attended(method, q, k, v, video):
    return attention(q, k, v, video=video, method=method, kernel="reference")


# The definition, in loops


def blocks_of(plan):
    """The tokens of each query and of each key block."""
    both = []
    for block in (plan.block_q, plan.block_k):
        both.append([[t for t in held if t >= 0] for held in plan.slots.view(-1, block).tolist()])
    return both


def score_by_loops(method, query, keys, values):
    """Of one key block, for a mean query."""
    scale = len(query) ** -0.5
    if method.score in ("auto", "spread", "loss"):
        spread = math.log(sum(map(math.exp, (scale * keys @ query).tolist())))
        return spread if method.score == "spread" else spread + loss_by_loops(values)
    score = scale * (query @ keys.mean(0)).item()
    if method.score == "norm":
        slope = (keys - keys.mean(0)).T @ values
        score += math.log(slope.square().sum().sqrt().item() + 1e-5)
    return score


def loss_by_loops(values):
    return math.log((values - values.mean(0)).square().sum(1).mean().item()) / 2


def pooled_by_loops(method, q, k, v, rows, columns, bend):
    """Scores of key blocks for one query block, from the rest of all."""
    held = {j: some for j, some in enumerate(columns) if some}
    weights = [rest_by_loops(method, q, rows, k[some], v[some], bend)[0] for some in held.values()]
    shares = torch.stack(weights).softmax(0).mean(1).log().tolist()
    both = zip(held, shares, strict=True)
    return {j: share + loss_by_loops(v[held[j]]) for j, share in both}


def chosen_by_loops(method, q, k, v, video, rows, columns):
    """Of one head, (N, D) each: the key blocks that each query block keeps."""
    text = [any(t >= video.video_tokens for t in held) for held in columns]
    full = {j for j, held in enumerate(columns) if held}
    ranked = [j for j in sorted(full) if not text[j]]
    sink = range(*sink_of(method, video))
    pools = method.score == "auto" and method.select == "topk" and method.centre == "query"
    bend = bend_by_loops(method, q, k, video, rows, columns)
    found = []
    for i, tokens in enumerate(rows):
        kept = {j for j in full if text[j] or any(t in sink for t in columns[j])}
        if method.band is not None:
            kept |= {j for j in full if abs(i - j) <= method.band}
        if tokens:
            query = q[tokens].mean(0)
            if pools:
                every = pooled_by_loops(method, q, k, v, tokens, columns, bend)
                scores = {j: every[j] for j in ranked}
            else:
                scores = {
                    j: score_by_loops(method, query, k[columns[j]], v[columns[j]]) for j in ranked
                }
            kept |= best_by_loops(method, query, scores, [k[columns[j]].mean(0) for j in ranked])
        sees_all = method.sink_queries and any(t in sink for t in tokens)
        if sees_all or any(t >= video.video_tokens for t in tokens):
            kept = full
        found.append(kept)
    return found


def sink_of(method, video):
    if isinstance(method.sink, tuple):
        return method.sink[0], sum(method.sink)
    return 0, method.sink * video.height * video.width


def best_by_loops(method, query, scores, means):
    if method.select == "topk":
        count = max(1, int(method.critical * len(scores)))
        return set(sorted(scores, key=lambda j: -scores[j])[:count])
    mean = sum(scores.values()) / len(scores)
    if method.threshold == "exact":
        variance = sum((score - mean) ** 2 for score in scores.values()) / len(scores)
    else:
        spread = torch.stack(means).var(0, correction=0)
        variance = (query.square() @ spread).item() / len(query)
    cut = mean + method.tau * math.sqrt(variance + 1e-6 * math.log(2) ** 2)
    return {j for j, score in scores.items() if score > cut}


def rest_by_loops(method, q, rows, keys, values, bend):
    """ln of the weight of one block for each of some queries, and its value.

    Args:
        bend: w and u of `Rest`, where it has a second order.
    """
    scale, n = q.shape[1] ** -0.5, len(keys)
    if method.centre == "key":
        return scale * (q[rows] @ keys.mean(0)) + math.log(n), values.mean(0)
    query = q[rows].mean(0)
    p = (scale * (keys @ query)).softmax(0)
    total = (scale * (keys @ query)).logsumexp(0)
    weight = total + scale * ((q[rows] - query) @ (p @ keys))
    if bend is not None:
        (w, u), variance = bend, p @ (keys - p @ keys).square()
        rise = scale**2 * ((q[rows] - query).square() @ u) / (w @ u)
        weight = weight + (CURVATURE * rise * (w @ variance)).clamp_max(MOST_GAINED)
    return weight, p @ values


def mean_squares_by_loops(x, blocks, video):
    """w or u of `Rest`, over the blocks without text."""
    of_video = [held for held in blocks if held and max(held) < video.video_tokens]
    return torch.cat([x[held] - x[held].mean(0) for held in of_video]).square().mean(0)


def order_of(method):
    if method.order != "auto":
        return method.order
    around = "first" if method.tile == "raster" else "second"
    return around if method.centre == "query" else "zeroth"


def bend_by_loops(method, q, k, video, rows, columns):
    """w and u of `Rest`; None without a second order."""
    if order_of(method) != "second":
        return None
    return [mean_squares_by_loops(*x, video) for x in ((q, rows), (k, columns))]


def head_by_loops(method, q, k, v, video, rows, columns, kept):
    """(N, D) of one head."""
    out, scale = torch.zeros_like(v), q.shape[1] ** -0.5
    means = torch.zeros_like(k)
    for held in columns:
        means[held] = k[held].mean(0)
    slope = (k - means).T @ v
    order, bend = order_of(method), bend_by_loops(method, q, k, video, rows, columns)
    for tokens, blocks in zip(rows, kept, strict=True):
        if not tokens:
            continue
        exact = [t for j in blocks for t in columns[j]]
        left = [held for j, held in enumerate(columns) if held and j not in blocks]
        rest = [rest_by_loops(method, q, tokens, k[held], v[held], bend) for held in left]
        scores = torch.cat(
            [scale * q[tokens] @ k[exact].T, *(weight[:, None] for weight, _ in rest)], 1
        )
        weights = scores.softmax(1)
        out[tokens] = weights @ torch.cat([v[exact], *(value[None] for _, value in rest)])
        if order != "zeroth":
            share = weights[:, len(exact) :].sum(1, keepdim=True)
            off = q[tokens] - (q[tokens].mean(0) if method.centre == "query" else 0.0)
            out[tokens] += share * (off @ slope) * scale / len(k)
    return out


@pytest.mark.parametrize("method", OPTIONS, ids=str)
def test_choice_and_output_are_those_of_loops(method):
    q, k, v = random_qkv(RAGGED, dtype=torch.float64)
    plan = method.plan_for(q, k, v, video=RAGGED)
    rows, columns = blocks_of(plan)
    want = torch.zeros_like(v)
    for b, h in product(*map(range, q.shape[:2])):
        one = [x[b, h] for x in (q, k, v)]
        kept = chosen_by_loops(method, *one, RAGGED, rows, columns)
        assert [set(row.nonzero()[:, 0].tolist()) for row in plan.keep[b, h]] == kept
        want[b, h] = head_by_loops(method, *one, RAGGED, rows, columns, kept)
    torch.testing.assert_close(attended(method, q, k, v, RAGGED), want, rtol=1e-10, atol=1e-10)


def test_the_spread_is_that_of_loops_in_groups_and_empty_blocks_have_none(monkeypatch):
    monkeypatch.setattr("gen_accel.kernels.choosing.NUMBERS", 1000)
    video = VideoShape(3, 2, 4, text=5)
    q, k, _ = random_qkv(video)
    slots = Piecewise(block_q=16, block_k=4, tile=(1, 2, 2)).layout(video, q.device).slots
    query = torch.randn(2, 2, 5, 8)
    found = block_spread(query, k, slots, scale=0.4)
    for j, held in enumerate(slots.slots.view(-1, slots.block_k).tolist()):
        tokens = [t for t in held if t >= 0]
        want = (0.4 * query @ k[:, :, tokens].mT).logsumexp(-1)
        torch.testing.assert_close(found[..., j], want)
    assert found.isneginf().any()


class TestChoice:
    @pytest.mark.parametrize("score", ["spread", "mean"])
    def test_density_falls_as_tau_grows(self, score):
        q, k, _ = random_qkv(PLAIN)
        options = {"select": "threshold", "score": score, **SMALL}
        methods = [Piecewise(tau=tau, **options) for tau in (-1e6, -1, 0, 0.5, 1, 2, 1e6)]
        found = [method.plan_for(q, k, video=PLAIN).density for method in methods]
        assert found == sorted(found, reverse=True)
        assert (found[0], found[-1]) == (1.0, 0.0)
        assert len(set(found)) > 4

    @pytest.mark.parametrize("centre", ["query", "key"])
    def test_a_threshold_below_all_is_dense_bit_for_bit(self, centre):
        q, k, v = random_qkv(RAGGED)
        method = Piecewise(select="threshold", tau=-1e6, centre=centre, **SMALL)
        plan = method.plan_for(q, k, video=RAGGED)
        held = plan.real.view(-1, plan.block_k).any(-1)
        dense = Plan(plan.slots, held.expand(plan.keep.shape), plan.block_q, plan.block_k)
        want = kernels.run(q, k, v, dense, scale=8**-0.5, kernel="reference")
        assert torch.equal(attended(method, q, k, v, RAGGED), want)

    def test_thresholds_are_what_kept_scores_exceed(self):
        q, k, _ = random_qkv(PLAIN)
        method = Piecewise(select="threshold", tau=0.4, score="mean", tile="raster", **SMALL)
        query, key = (x.unflatten(2, (-1, 16)).mean(3) for x in (q, k))
        above = 8**-0.5 * query @ key.mT > method.thresholds(q, k, video=PLAIN)[..., None]
        assert torch.equal(above, method.plan_for(q, k, video=PLAIN).keep)

    def test_scores_are_at_the_scale_of_the_call(self):
        """At a small one all keys of a block weigh the same, and both scores rank alike."""
        q, k, v = random_qkv(PLAIN)
        seen = []

        def run(q, k, v, plan):
            seen.append(plan.keep)
            return v

        by = [Piecewise(critical=0.3, score=score, **SMALL) for score in ("spread", "mean")]
        for method, scale in product(by, (1e-3, 8.0)):
            method(q, k, v, video=PLAIN, kernel=kernels.Runner(run, scale=scale))
        assert torch.equal(seen[0], seen[2])
        assert not torch.equal(seen[1], seen[3])

    @pytest.mark.parametrize("budget", ["row", "head"])
    def test_no_pattern_keeps_more_than_its_lists_hold(self, budget):
        options = {"critical": 0.2, "band": 1, "sink": 1, "budget": budget, **SMALL}
        q, k, _ = random_qkv(RAGGED)
        plan = Piecewise(**options, tile=(2, 2, 4), sink_queries=True).plan_for(q, k, video=RAGGED)
        kept = plan.keep.sum((-1, -2))
        assert (kept <= plan.entries).all()
        assert plan.entries < 2 * kept.max()

    def test_autocast_changes_no_choice(self):
        q, k, _ = random_qkv(PLAIN)
        want = OPTIONS[0].plan_for(q, k, video=PLAIN).keep
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(OPTIONS[0].plan_for(q, k, video=PLAIN).keep, want)

    def test_a_norm_needs_values(self):
        q, k, _ = random_qkv(PLAIN)
        with pytest.raises(ValueError, match="'norm' looks at the values too"):
            Piecewise(score="norm").plan_for(q, k, video=PLAIN)


@pytest.mark.parametrize("method", OPTIONS, ids=str)
def test_a_batch_is_its_samples(method):
    q, k, v = random_qkv(RAGGED)
    both = attended(method, q, k, v, RAGGED)
    for b in range(2):
        one = attended(method, *(x[b : b + 1] for x in (q, k, v)), RAGGED)
        torch.testing.assert_close(both[b : b + 1], one)


@pytest.mark.parametrize(
    "method",
    [
        Piecewise(critical=0.3, block_q=4, block_k=4),
        Piecewise(critical=0.3, block_q=8, block_k=4, centre="key", order="first"),
        Piecewise(select="threshold", tau=0.5, tile="raster", block_q=4, block_k=5),
    ],
    ids=str,
)
def test_gradients_with_the_choice_fixed(method):
    video = VideoShape(2, 3, 4, text=3)
    q, k, v = random_qkv(video, batch=1, dim=4, dtype=torch.float64)
    plan = method.plan_for(q, k, video=video)
    assert 0 < plan.density < 0.8

    def run(q, k, v):
        return kernels.run(q, k, v, plan, scale=0.5, kernel="reference")

    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_equal_values_come_out_as_they_are():
    q, k, v = random_qkv(RAGGED)
    v = v[:, :, :1].expand_as(v)
    out = attended(Piecewise(critical=0.2, **SMALL), q, k, v, RAGGED)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("same", ["queries", "keys"])
def test_the_rest_is_exact_where_queries_or_keys_of_a_block_are_equal(same):
    q, k, v = random_qkv(PLAIN, dtype=torch.float64)
    x = q if same == "queries" else k
    x.copy_(x.unflatten(2, (-1, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1).flatten(2, 3))
    method = Piecewise(critical=0.2, tile="raster", **SMALL)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attended(method, q, k, v, PLAIN), want)
    if same == "queries":
        around_keys = Piecewise(critical=0.2, tile="raster", centre="key", **SMALL)
        assert (attended(around_keys, q, k, v, PLAIN) - want).abs().max() > 1e-3


class TestSteps:
    def test_tau_goes_to_its_end_in_equal_steps(self):
        method = Piecewise(select="threshold", tau=1.3, tau_end=0.8)
        steps = [method.at(Step(progress=step / 4)) for step in range(5)]
        assert [one.tau for one in steps] == pytest.approx([1.3, 1.175, 1.05, 0.925, 0.8])
        assert all(one.tau_end is None for one in steps)

    def test_each_step_has_its_share(self):
        method = Piecewise((0.5, 0.3, 0.2), **SMALL)
        for number, share in enumerate((0.5, 0.3, 0.2, 0.2, 0.2)):
            assert method.at(Step(number)) == Piecewise(share, **SMALL)
        q, k, v = random_qkv(PLAIN)
        alone = attended(Piecewise(0.2, **SMALL), q, k, v, PLAIN)
        assert torch.equal(attended(method, q, k, v, PLAIN), alone)  # where no step is known
        assert method.changes_by == "number"
        assert Piecewise((0.2,)).at(Step(3)) == Piecewise(0.2)

    def test_without_an_end_nothing_changes(self):
        assert OPTIONS[0].changes_by == ""
        assert Reuse(OPTIONS[0]).changes_by == ""


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"critical": 0.0}, r"critical must be in \(0, 1\], got 0.0"),
            ({"critical": 1.5}, r"critical must be in \(0, 1\], got 1.5"),
            ({"critical": math.nan}, r"critical must be in \(0, 1\], got nan"),
            ({"critical": (0.5, 0.0)}, r"critical must be in \(0, 1\], got \(0.5, 0.0\)"),
            ({"critical": ()}, "critical must be a share, or one or more"),
            ({"select": "threshold", "tau": math.inf}, "tau must be finite, got inf"),
            ({"select": "threshold", "tau_end": math.nan}, "tau_end must be finite, got nan"),
            ({"select": "best"}, "select must be one of"),
            ({"score": "max"}, "score must be one of"),
            ({"centre": "value"}, "centre must be one of"),
            ({"tau": 2.0}, "tau is for select='threshold', got tau=2.0"),
            ({"tau_end": 0.8}, "tau_end is for select='threshold'"),
            ({"threshold": "exact"}, "threshold is for select='threshold'"),
            ({"select": "threshold", "critical": 0.1}, "critical is for select='topk'"),
            (
                {"centre": "auto", "order": "second"},
                "order='second' is for centre='query', got centre='auto'",
            ),
            (
                {"centre": "key", "order": "second"},
                "order='second' is for centre='query', got centre='key'",
            ),
            ({"rest": None, "centre": "key"}, "centre and order are for rest='means'"),
            ({"rest": "all"}, "rest of Piecewise must be one of means or none, got 'all'"),
            ({"band": -1}, "band must be None or key blocks from 0 on, got -1"),
            ({"band": 1.5}, "band of Piecewise must be int or none, got 1.5"),
            ({"sink": (0.5, 2)}, "sink of Piecewise must be int or int,int, got"),
            ({"sink": -1}, "sink must count frames from 0 on, got -1"),
            ({"sink": (4, 0)}, "sink must be frames, or"),
            ({"sink_queries": True}, "sink_queries is for a sink"),
            ({"tile": (0, 4, 4)}, "tile must be 'auto', 'raster', positive"),
            ({"tile": ((4, 4, 4), (4, 4))}, "tile of Piecewise must be one of auto, raster or"),
            ({"tile": ()}, "tile must be 'auto', 'raster', positive"),
            ({"tile": "even"}, "tile of Piecewise must be one of auto, raster or"),
            ({"block_k": 0}, "block_k must be a whole number from 1 to 1048576, got 0"),
            ({"block_q": 64.0}, "block_q of Piecewise must be int, got 64.0"),
            ({"block_q": 48}, "one of block_q and block_k must be a multiple of the other"),
        ],
        ids=str,
    )
    def test_options(self, options, why):
        with pytest.raises(ValueError, match=why):
            Piecewise(**options)

    def test_a_tile_larger_than_the_grid_names_both(self):
        with pytest.raises(ValueError, match=r"tile \(1, 8, 16\) is larger than the grid \(4, 4"):
            Piecewise(tile=(1, 8, 16)).plan(PLAIN)

    def test_a_sink_beyond_the_last_token(self):
        with pytest.raises(ValueError, match="sink must lie within the 128 tokens"):
            Piecewise(sink=(100, 29)).plan(PLAIN)


class TestCentres:
    """What "auto" stands for."""

    VIDEO = VideoShape(16, 32, 64)  # 256 query blocks of 128, 512 key blocks
    EVEN = even_density(Problem(12, 32_768, 128), "sm_90")

    def centre(self, method, density, device="cuda:0"):
        """What a call on a device takes. Its tensors hold no numbers that could be waited for."""
        slots = method.layout(self.VIDEO, torch.device("cpu")).slots
        with FakeTensorMode():
            q = torch.empty(1, 12, self.VIDEO.tokens, 128, device=device)
            entries = None if density is None else round(density * 256 * 512)
            orders = pooled.orders_around(method.order, flat=False)
            return pooled.centre_of_call(method.centre, orders, q, slots, entries)

    @pytest.mark.parametrize(("share", "centre"), [(0.98, "key"), (1.02, "query")])
    def test_gpus_go_by_the_model_of_what_they_take(self, share, centre, monkeypatch):
        monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
        method = Piecewise(centre="auto", block_q=128)
        assert self.centre(method, share * self.EVEN) == centre

    @pytest.mark.parametrize(("share", "centre"), [(0.98, "key"), (1.02, "query")])
    def test_an_order_that_is_named_costs_around_keys_too(self, share, centre, monkeypatch):
        monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
        even = even_density(Problem(12, 32_768, 128), "sm_90", Orders("first", "first"))
        method = Piecewise(centre="auto", order="first", block_q=128)
        assert self.centre(method, share * even) == centre

    @pytest.mark.parametrize(("device", "density"), [("cpu", 0.01), ("cuda:0", None)])
    def test_it_is_the_mean_query_elsewhere_and_where_scores_say_how_much(self, device, density):
        assert self.centre(Piecewise(centre="auto", block_q=128), density, device) == "query"

    @pytest.mark.parametrize(("centre", "share"), [("query", 0.5), ("key", 2)])
    def test_one_that_is_named_stays(self, centre, share):
        assert self.centre(Piecewise(centre=centre, block_q=128), share * self.EVEN) == centre

    @pytest.mark.parametrize("budget", ["row", "head"])
    def test_a_call_says_how_much_it_keeps(self, budget, monkeypatch):
        said = []
        monkeypatch.setattr(
            piecewise, "centre_of_call", lambda *given: said.append(given) or "key"
        )
        method = Piecewise(0.3, centre="auto", budget=budget, **SMALL)
        q, k, _ = random_qkv(RAGGED)
        plan = method.plan_for(q, k, video=RAGGED)
        *_, slots, entries = said[0]
        most = plan.keep.sum((2, 3)).max()
        assert plan.rest is not None
        assert plan.rest.centre == "key"
        assert len(slots.slots) == len(plan.slots)
        assert most <= entries <= plan.keep[0, 0].numel()

    def test_without_a_rest_there_is_none(self):
        q, k, _ = random_qkv(PLAIN)
        assert (
            Piecewise(rest=None, centre="auto", **SMALL).plan_for(q, k, video=PLAIN).rest is None
        )

    def test_a_device_fills_in_what_all_calls_take(self):
        method = Piecewise(centre="auto")
        assert method.for_device(torch.device("cpu")) == Piecewise(score="pooled")
        assert method.for_device(torch.device("cuda")) == replace(method, score="loss")
        one = Piecewise(score="mean", centre="key")
        assert one.for_device(torch.device("cpu")) == one


@pytest.mark.parametrize("tile", [(1, 4, 6), (2, 2, 2)], ids=str)
def test_blocks_hold_the_tokens_of_the_tile(tile):
    video = VideoShape(4, 8, 12)
    plan = Piecewise(critical=0.2, block_q=128, block_k=64, tile=tile).plan(video)
    assert (plan.block_q, plan.block_k) == (2 * math.prod(tile), math.prod(tile))
    assert not plan.is_padded
    for tokens in blocks_of(plan)[1]:
        places = torch.stack(torch.unravel_index(torch.tensor(tokens), video.grid))
        assert tuple((places.amax(1) - places.amin(1) + 1).tolist()) == tile
