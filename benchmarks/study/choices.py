"""Rivals of what `Piecewise` keeps and pools by default, which were measured and not built.

Each answers captured calls at the density of the default in the same call: as short as it can be
said, and not for speed. Products are counted, of a vector with a vector, as a share of those of
dense attention.

References:
    "pairs" is SubBlock's score, `subblock_sparse` of sgl-project/sglang at 09eaaf1 (Apache-2.0).
    Zhou et al., "SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation via
    Error-aware Routing", 2026, https://arxiv.org/abs/2603.08982; public code dyxg/SVG-EAR at
    0fa88b2.
    Extra tokens are `extra_tokens` of ComfyUI's sparse attention, and `token_aug` of
    Comfy-Org/comfy-kitchen.
    The order along a Hilbert curve is from "DFSAttn", 2026, https://arxiv.org/abs/2605.23445;
    public code jessica-hujie/DFSAttn at 0a6d60f. The curve is made as in Skilling, "Programming
    the Hilbert curve", 2004.
    A tree of main directions is McNames, "A fast nearest-neighbor algorithm based on a principal
    axis search tree", 2001; here each half is of whole blocks.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gen_accel import Piecewise, VideoShape, attention
from gen_accel.attention_processors.methods.blocks import Layout, layout_of
from gen_accel.attention_processors.methods.scores import Score, Scores
from gen_accel.kernels import rest as pooled_rest
from gen_accel.kernels import run, run_lse
from gen_accel.kernels.choosing import block_means
from gen_accel.kernels.reference import bend
from gen_accel.plan import (
    CURVATURE,
    MOST_GAINED,
    Plan,
    Rest,
    pack,
    plan_of_call,
    slots_of,
    unpack,
)
from study.ablation import kept_share
from study.captured import Captured
from study.errors import relative_error
from study.settings import DEFAULT, solved

STEPS = 3  # of the power method, on each level of a tree
DENSITIES = (0.05, 0.1, 0.2)
BLOCK = 64
PARTS = 4  # of a block in "pairs", on both sides as there
OURS = Rest("query", "second")
KEYS = Rest("key")
HEADS, DIM = 2, 64  # of the demo model
ROUNDS = 50  # of k-means, from no known centres
ROUNDS_COUNTED = 2  # as in a step of SVG2's public code, which keeps its centres


class Answer(NamedTuple):
    """Output (B, H, N, D), and the share of the pairs of tokens that is exact."""

    out: Tensor
    share: float


class Counts(NamedTuple):
    """Numbers of a call from which products are counted."""

    tokens: int
    blocks: int
    dim: int

    @property
    def each(self) -> float:
        """One product of every token with one vector of every block."""
        return self.blocks / (2 * self.tokens)

    @property
    def slope(self) -> float:
        """The slope of a head, and every query times it."""
        return self.dim / self.tokens


class Way(NamedTuple):
    """A way to answer a call.

    Args:
        answers: makes, of a call and its video, what answers it at a share of exact pairs.
        products: at such a share.
        as_costly: whether it keeps as many pairs more as it saves in products.
    """

    answers: Callable[[Captured, VideoShape], Callable[[float], Answer]]
    products: Callable[[float, Counts], float]
    as_costly: bool = False


def rows(
    calls: Sequence[Captured], video: VideoShape, names: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One row for each way and density: mean error and density over the calls, and products.

    Args:
        names: of the ways; None: all.
    """
    ways = WAYS if names is None else {name: WAYS[name] for name in names}
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for call in calls:
        layout = _boxes(video)
        counts = Counts(call.q.shape[2], len(layout.ranked), call.q.shape[3])
        own = {asked: _default(asked, call, video) for asked in DENSITIES}
        for name, way in ({DEFAULT: None} | ways).items():
            answers = None if way is None else way.answers(call, video)
            for asked, answer in own.items():
                cost = ours(answer.share, counts)
                if way is not None and answers is not None:
                    products = partial(_products, way, counts)
                    share = answer.share
                    if way.as_costly:
                        share = solved(products, cost, share, 1.0)
                    answer = answers(share)
                    cost = products(answer.share)
                error = relative_error(answer.out, call.dense)
                found.setdefault((name, asked), []).append((error, answer.share, cost))
    for (name, asked), seen in found.items():
        error, share, cost = map(mean, zip(*seen, strict=True))
        yield {"way": name, "asked": asked, "density": share, "products": cost, "error": error}


def of_single_tokens(video: VideoShape, rounds: int) -> Iterator[dict[str, float]]:
    """Milliseconds of processor time that products do not tell, of "half in extra tokens" on
    random numbers: of the default's call, of torch's sort of the keys for each query block, and of
    copies of the keys and values found. The least of some rounds, in turns."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, video.tokens, DIM, generator=generator).unbind()
    rows = len(_boxes(video).ranked)
    scores = torch.randn(HEADS, rows, video.tokens, generator=generator)
    for asked in DENSITIES:
        count = round(asked * video.tokens / 2)
        best = scores.topk(count).indices.flatten(1)
        calls: dict[str, Callable[[], object]] = {
            "call_ms": partial(attention, q, k, v, video=video, method=Piecewise(asked)),
            "sort_ms": partial(scores.topk, count, sorted=False),
            "copy_ms": partial(_copies, (k, v), best),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                call()
                taken[name].append(1e3 * (time.process_time() - start))
        yield {"asked": asked} | {name: min(found) for name, found in taken.items()}


def _copies(tensors: Sequence[Tensor], places: Tensor) -> list[Tensor]:
    """Rows of each tensor (1, H, N, D) at the places of each head, (H, n)."""
    return [x[0, head].index_select(0, one) for x in tensors for head, one in enumerate(places)]


def _products(way: Way, counts: Counts, share: float) -> float:
    return way.products(share, counts)


def _default(density: float, call: Captured, video: VideoShape) -> Answer:
    """`Piecewise` as it is on a CPU."""
    plan = Piecewise(density).plan_for(call.q, call.k, call.v, video=video)
    return _answer(call, plan.keep, _boxes(video), OURS)


def _boxes(video: VideoShape) -> Layout:
    return layout_of(video, torch.device("cpu"), BLOCK, BLOCK)


def _answer(call: Captured, keep: Tensor, layout: Layout, rest: Rest | None) -> Answer:
    plan = plan_of_call(layout.slots, keep, rest=rest)
    out = run(call.q, call.k, call.v, plan, scale=_scale(call))
    return Answer(out, kept_share(keep, layout))


def _scale(call: Captured) -> float:
    return call.q.shape[3] ** -0.5


def within(scores: Tensor, rows: Tensor, columns: Tensor, share: float | Tensor) -> Tensor:
    """Keep the best key blocks of each query block, as many as its share of the pairs of tokens
    allows; what one leaves goes to the next. Bool like `scores`.

    Args:
        scores: (B, H, Kq, Kk).
        rows, columns: tokens in query and key blocks, (Kq,) and (Kk,), or (B, H, Kq) and
            (B, H, Kk).
        share: of the keys, or (B, H, Kq), one for each query block.
    """
    rows, columns = rows.expand(scores.shape[:3]), columns.expand(*scores.shape[:2], -1)
    best = scores.argsort(-1, descending=True)
    tokens = columns[:, :, None].expand_as(scores).gather(-1, best)
    pairs = tokens.cumsum(-1) * rows[..., None]
    budget = share * columns.sum(-1, keepdim=True) * rows
    left, taken = torch.zeros_like(budget[..., 0]), []
    for row, own in zip(pairs.unbind(2), budget.unbind(2), strict=True):
        left = left + own
        fits = row <= left[..., None]
        left = left - (row * fits).amax(-1)
        taken.append(fits)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, torch.stack(taken, 2))


def by_scores(
    scores: Callable[[Captured, Layout], Tensor],
    rest: Rest | None,
    layout: Callable[[VideoShape], Layout] = _boxes,
) -> Callable[[Captured, VideoShape], Callable[[float], Answer]]:
    """Blocks of a layout, kept by scores."""

    def answers(call: Captured, video: VideoShape) -> Callable[[float], Answer]:
        laid = layout(video)
        known = scores(call, laid)
        return lambda share: _answer(call, _kept(known, laid, share), laid, rest)

    return answers


def _kept(scores: Tensor, layout: Layout, share: float) -> Tensor:
    rows, columns = (held[:, 0] for held in layout.slots.held)
    return within(scores, rows, columns, share)


def of_package(call: Captured, layout: Layout, kind: Score) -> Tensor:
    """A score that the package has."""
    known: Any = {"v": call.v, "kind": kind, "scale": _scale(call), "rest": OURS}
    return Scores(call.q, call.k, layout, **known).of(slice(None))


pooled: Any = partial(of_package, kind="pooled")
loss: Any = partial(of_package, kind="loss")


def pairs(call: Captured, layout: Layout) -> Tensor:
    """ln sum exp(s m_a . k_b) over the means of the parts a of a query block and b of a key block;
    parts without tokens are left out."""
    slots, part = layout.slots, BLOCK // PARTS
    query, key = (block_means(x, slots, part) for x in (call.q, call.k))
    held = slots.real.view(-1, part).any(-1)
    scores = (query @ key.mT * _scale(call)).masked_fill(~(held[:, None] & held), -torch.inf)
    return scores.unflatten(3, (-1, PARTS)).unflatten(2, (-1, PARTS)).logsumexp((3, 5))


def pairs_and_values(call: Captured, layout: Layout) -> Tensor:
    """`pairs`, and half the logarithm of the values' variance as in "loss"."""
    spread = of_package(call, layout, "spread")
    return pairs(call, layout) + loss(call, layout) - spread


def compensation(call: Captured, layout: Layout) -> Tensor:
    """SVG-EAR's score with boxes for clusters."""
    labels = (layout.slots.places // BLOCK).expand(call.q.shape[:3])
    return compensation_error(call, labels, labels, len(layout.ranked))


def compensation_error(call: Captured, of_query: Tensor, of_key: Tensor, count: int) -> Tensor:
    """ln of sum_t |exp(s m . k_t) v_t - exp(s m . k) v|^2 over the tokens of a cluster, with k and
    v their means and m the mean query of a cluster, less ln of its size: (B, H, count, count).

    Args:
        of_query, of_key: (B, H, N), the cluster of each token.
    """
    query, _ = means(call.q.double(), of_query, count)
    key, size = means(call.k.double(), of_key, count)
    value, _ = means(call.v.double(), of_key, count)
    exact = query @ call.k.double().mT * _scale(call)
    of_pair = of_key[:, :, None].expand_as(exact)
    near = (query @ key.mT * _scale(call)).gather(3, of_pair)
    most = torch.maximum(exact, near).amax(3, keepdim=True)
    exact, near = (exact - most).exp(), (near - most).exp()
    own = value.gather(2, of_key[..., None].expand_as(call.v))
    v = call.v.double()
    square, both, mean_square = (x.sum(-1)[:, :, None] for x in (v * v, v * own, own * own))
    off = exact**2 * square - 2 * exact * near * both + near**2 * mean_square
    errors = off.new_zeros(*off.shape[:3], count).scatter_add_(3, of_pair, off)
    tiny = torch.finfo(errors.dtype).tiny
    return 2 * most + errors.clamp_min(tiny).log() - size[:, :, None].clamp_min(1).log()


def means(x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of x (B, H, N, D) over each cluster, (B, H, count, D), and how many tokens it has."""
    sums = x.new_zeros(*x.shape[:2], count, x.shape[3])
    sums.scatter_add_(2, labels[..., None].expand_as(x), x)
    size = x.new_zeros(*x.shape[:2], count).scatter_add_(2, labels, torch.ones_like(x[..., 0]))
    return sums / size.clamp_min(1)[..., None], size


def clusters(x: Tensor, count: int, rounds: int = ROUNDS) -> Tensor:
    """Clusters of x (B, H, N, D) by k-means from evenly spaced tokens, (B, H, N)."""
    centre = x[:, :, torch.linspace(0, x.shape[2] - 1, count).long()]
    labels = torch.cdist(x, centre).argmin(-1)
    for _ in range(rounds):
        made, size = means(x, labels, count)
        centre = torch.where(size[..., None] > 0, made, centre)
        labels = torch.cdist(x, centre).argmin(-1)
    return labels


def svg_ear(call: Captured, video: VideoShape) -> Callable[[float], Answer]:
    """SVG-EAR: as many clusters of queries, and of keys, as the default has blocks.

    A query cluster may keep the tokens of the key clusters that hold a share p of the attention of
    its mean to all means; p is what comes to the asked pairs. It keeps those of the largest error
    for their size, and the means of all others take part. No least number of clusters is kept.
    """
    count = len(_boxes(video).ranked)
    of_query, of_key = clusters(call.q, count), clusters(call.k, count)
    scores = compensation_error(call, of_query, of_key, count)
    query, rows = means(call.q, of_query, count)
    key, columns = means(call.k, of_key, count)
    value, _ = means(call.v, of_key, count)
    weights = (query @ key.mT * _scale(call) + columns.log()[:, :, None]).softmax(-1)
    held, best = weights.sort(-1, descending=True)
    before = held.cumsum(-1) - held
    tokens = columns[:, :, None].expand_as(weights).gather(-1, best) / call.k.shape[2]

    def budgets(p: float) -> Tensor:
        return (tokens * (before < p)).sum(-1)

    def answer(share: float) -> Answer:
        def kept(p: float) -> float:
            return ((budgets(p) * rows).sum(-1) / call.q.shape[2]).mean().item()

        wanted = budgets(solved(kept, share, 0.0, 1.0))
        keep = within(scores, rows, columns, wanted * share / max(_mean_share(wanted, rows), 1e-9))
        exact = (keep * rows[..., None] * columns[:, :, None]).sum((2, 3)).mean().item()
        sees = keep.gather(2, of_query[..., None].expand(-1, -1, -1, count))  # (B, H, N, count)
        by_token = sees.gather(3, of_key[:, :, None].expand(-1, -1, sees.shape[2], -1))
        hidden = torch.zeros(by_token.shape).masked_fill(~by_token, -torch.inf)
        weighed = columns.log()[:, :, None].expand_as(sees).masked_fill(sees, -torch.inf)
        both = torch.cat([call.k, key], 2), torch.cat([call.v, value], 2)
        out = scaled_dot_product_attention(call.q, *both, torch.cat([hidden, weighed], 3))
        return Answer(out, exact / call.q.shape[2] ** 2)

    return answer


def tree(x: Tensor, count: int) -> Tensor:
    """Groups of x (B, H, N, D) of a block's size, (B, H, N): halved again and again at the middle
    of their main direction, which three steps of the power method find."""
    groups = x.new_zeros(x.shape[:3], dtype=torch.long)
    for head, of_token in zip(x.flatten(0, 1), groups.flatten(0, 1), strict=True):
        waiting, made = [torch.arange(x.shape[2])], 0
        while waiting:
            some = waiting.pop()
            if len(some) <= BLOCK:
                of_token[some] = made
                made += 1
                continue
            off = head[some] - head[some].mean(0)
            along = off[off.square().sum(1).argmax()]
            for _ in range(STEPS):
                along = off.mT @ (off @ along)
                along = along / along.norm().clamp_min(1e-30)
            in_order = some[(off @ along).argsort()]
            half = BLOCK * (math.ceil(len(some) / BLOCK) // 2)
            waiting += [in_order[half:], in_order[:half]]
    return groups


class Grouped(NamedTuple):
    """Groups of the queries and of the keys of a head, without empty ones, and its rest.

    Args:
        queries, keys: the tokens of each group.
        scores: by which key groups are chosen, (Kq, Kk).
        pooled: for each group of n queries, scores of all pooled keys, (n, Kk).
        values: (Kq, Kk, D).
        slope: what the output gains where all is pooled, (N, D).
    """

    queries: list[Tensor]
    keys: list[Tensor]
    scores: Tensor
    pooled: list[Tensor]
    values: Tensor
    slope: Tensor


def grouped(
    q: Tensor, k: Tensor, v: Tensor, of_query: Tensor, of_key: Tensor, scale: float
) -> Grouped:
    """The default's choice, for the size of a group, and its rest.

    Args:
        q, k, v: (N, D) of a head.
        of_query, of_key: (N,), the group of each token.
    """
    queries, keys = ([(x == i).nonzero()[:, 0] for i in x.unique()] for x in (of_query, of_key))
    off, k_off, v_off = (torch.empty_like(x) for x in (q, k, v))
    for x, apart, groups in ((q, off, queries), (k, k_off, keys), (v, v_off, keys)):
        for some in groups:
            apart[some] = x[some] - x[some].mean(0)
    query = torch.stack([q[some].mean(0) for some in queries])
    w, u = off.square().mean(0), k_off.square().mean(0)
    rise = CURVATURE * scale**2 * (off.square() @ u) / (w @ u)
    mass, key, value, curve = [], [], [], []
    for some in keys:
        score = query @ k[some].mT * scale
        weight = score.softmax(-1)
        shift = weight @ k_off[some]
        mass.append(score.logsumexp(-1))
        key.append(shift + k[some].mean(0))
        value.append(weight @ v[some])
        curve.append(weight @ (k_off[some].square() @ w) - shift.square() @ w)
    masses, keys_of, curves = (torch.stack(x, 1) for x in (mass, key, curve))
    pooled = [
        off[some] @ keys_of[i].mT * scale
        + masses[i]
        + (rise[some, None] * curves[i]).clamp_max(MOST_GAINED)
        for i, some in enumerate(queries)
    ]
    shares = torch.stack([x.softmax(-1).mean(0) for x in pooled])
    spread = torch.stack([v_off[some].square().sum(1).mean() for some in keys])
    size = torch.tensor([float(len(some)) for some in keys])
    tiny = torch.finfo(shares.dtype).tiny
    scores = shares.clamp_min(tiny).log() + spread.clamp_min(tiny).log() / 2 - size.log()
    slope = off @ (k_off.mT @ v) * scale / len(q)
    return Grouped(queries, keys, scores, pooled, torch.stack(value, 1), slope)


def in_groups(
    call: Captured, video: VideoShape, *, groups: Callable[[Tensor, int], Tensor]
) -> Callable[[float], Answer]:
    """The default in groups of alike queries and of alike keys, of each head its own."""
    count, scale = len(_boxes(video).ranked), _scale(call)
    both = groups(call.q, count), groups(call.k, count)
    heads = [x.flatten(0, 1) for x in (call.q, call.k, call.v, *both)]
    known = [
        grouped(q, k, v, of_query, of_key, scale)
        for q, k, v, of_query, of_key in zip(*heads, strict=True)
    ]

    def answer(share: float) -> Answer:
        outs, exact = [], 0
        for q, k, v, head in zip(*heads[:3], known, strict=True):
            rows, columns = (
                torch.tensor([len(some) for some in x]) for x in (head.queries, head.keys)
            )
            keep = within(head.scores[None, None], rows, columns, share)[0, 0]
            exact += (keep * rows[:, None] * columns).sum().item() / len(q) ** 2
            out = torch.empty_like(q)
            for some, kept, pooled, value in zip(
                head.queries, keep, head.pooled, head.values, strict=True
            ):
                seen = torch.cat([torch.arange(0), *(head.keys[j] for j in kept.nonzero()[:, 0])])
                logits = torch.cat([q[some] @ k[seen].mT * scale, pooled[:, ~kept]], 1)
                weights = logits.softmax(-1)
                rest = weights[:, len(seen) :]
                out[some] = weights[:, : len(seen)] @ v[seen] + rest @ value[~kept]
                out[some] += rest.sum(1, keepdim=True) * head.slope[some]
            outs.append(out)
        return Answer(torch.stack(outs).view_as(call.q), exact / len(known))

    return answer


def _mean_share(shares: Tensor, rows: Tensor) -> float:
    return ((shares * rows).sum(-1) / rows.sum(-1)).mean().item()


def hilbert(video: VideoShape) -> Layout:
    """Runs of tokens along a Hilbert curve through the cube of a power of two that holds the
    grid."""
    laid = layout_of(video, torch.device("cpu"), BLOCK, BLOCK, "raster")
    bits = max(1, math.ceil(math.log2(max(video.grid))))
    frame, row, column = (
        x.flatten() for x in torch.meshgrid(*map(torch.arange, video.grid), indexing="ij")
    )
    slots = laid.slots.slots.clone()
    slots[: video.tokens] = along_hilbert([column, row, frame], bits).argsort()
    return laid._replace(slots=slots_of(slots, BLOCK, BLOCK))


def along_hilbert(axes: Sequence[Tensor], bits: int) -> Tensor:
    """Place of points along a Hilbert curve, of integer coordinates of so many bits."""
    x = list(axes)
    for shift in range(bits - 1, 0, -1):
        low = (1 << shift) - 1
        for i in range(len(x)):
            is_set = (x[i] >> shift) & 1 > 0
            swapped = torch.where(is_set, 0, (x[0] ^ x[i]) & low)
            x[i] = x[i] ^ swapped
            x[0] = x[0] ^ torch.where(is_set, low, swapped)
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for shift in range(bits - 1, 0, -1):
        turn = turn ^ torch.where((x[-1] >> shift) & 1 > 0, (1 << shift) - 1, 0)
    x = [axis ^ turn for axis in x]
    place = torch.zeros_like(x[0])
    for shift in range(bits - 1, -1, -1):
        for axis in x:
            place = (place << 1) | ((axis >> shift) & 1)
    return place


class Pooled(NamedTuple):
    """Blocks pooled around the mean queries: scores (B, H, Kq, block_q, Kk), -inf where nothing is
    pooled, values (B, H, Kq, Kk, D), and queries off their means, (B, H, Kq, block_q, D)."""

    scores: Tensor
    values: Tensor
    off: Tensor


def around_queries(call: Captured, layout: Layout, hidden: Tensor) -> Pooled:
    """Pool keys and values in the second order of `Rest`.

    Args:
        hidden: (B, H, Kq, S) bool, the keys that are not pooled.
    """
    slots, plan = layout.slots, plan_of_call(layout.slots, layout.always[None, None], rest=OURS)
    scale, rows = _scale(call), pack(call.q, plan).unflatten(2, (-1, BLOCK))
    keys, values = (pack(x, plan).unflatten(2, (-1, BLOCK)) for x in (call.k, call.v))
    query = block_means(call.q, slots, BLOCK)
    hidden = hidden.unflatten(3, (-1, BLOCK))
    scores = torch.einsum("bhid,bhjtd->bhijt", query, keys) * scale
    scores = scores.masked_fill(hidden, -torch.inf)
    weight = scores.softmax(-1).masked_fill(hidden, 0.0)
    key, value = (torch.einsum("bhijt,bhjtd->bhijd", weight, x) for x in (keys, values))
    off = rows - query[:, :, :, None]
    rise, channel = bend(rows, keys, plan, scale)
    middle = block_means(call.k, slots, BLOCK)[:, :, :, None]
    square = ((keys - middle).square() * channel[:, :, None, None]).sum(-1)
    apart = torch.einsum("bhijt,bhjt->bhij", weight, square)
    apart = apart - (
        (key - middle[..., 0, :][:, :, None]).square() * channel[:, :, None, None]
    ).sum(-1)
    gained = (CURVATURE * rise[..., None] * apart[:, :, :, None]).clamp_max(MOST_GAINED)
    weighed = off @ key.mT * scale + scores.logsumexp(-1)[:, :, :, None] + gained
    return Pooled(weighed, value, off)


def _with_pooled(
    call: Captured, plan: Plan, out: Tensor, lse: Tensor, pooled: Pooled, left_out: Tensor
) -> Tensor:
    """Add blocks pooled around queries to an answer of query blocks, and the slope of a head."""
    made, total = pooled_rest.merged(out, lse, pooled.scores, pooled.values, left_out)
    key, _ = pooled_rest.means(pack(call.k, plan), pack(call.v, plan), plan)
    keys = pack(call.k, plan).unflatten(2, (-1, BLOCK)) - key[:, :, :, None]
    keys = (keys * plan.real.view(-1, BLOCK, 1)).flatten(2, 3)
    slope = keys.mT @ pack(call.v, plan)
    share = -(lse - total).expm1()
    more = share[..., None] * (pooled.off @ slope[:, :, None]) * _scale(call) / plan.tokens
    return unpack((made + more).flatten(2, 3), plan)


def _of_kept(call: Captured, plan: Plan) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the kept blocks alone, in query blocks."""
    out, lse = run_lse(call.q, call.k, call.v, plan.kept, scale=_scale(call))
    out, lse = (pack(x, plan).unflatten(2, (-1, BLOCK)) for x in (out, lse[..., None]))
    return out, lse[..., 0]


def extra_tokens(
    call: Captured, video: VideoShape, *, part: float, kind: Score = "pooled"
) -> Callable[[float], Answer]:
    """Blocks by a score, and beside them, in the place of some, the keys of all other blocks that
    the mean query scores best. What is left of those blocks is pooled.

    Args:
        part: of the exact keys that are such keys.
    """
    layout, scale = _boxes(video), _scale(call)
    scores, slots = of_package(call, layout, kind), layout.slots

    def answer(share: float) -> Answer:
        extra = round(part * share * video.tokens)
        keep = _kept(scores, layout, share - extra / video.tokens)
        plan = plan_of_call(slots, keep, rest=OURS)
        hidden = keep.repeat_interleave(BLOCK, -1) | ~slots.real
        score = block_means(call.q, slots, BLOCK) @ pack(call.k, slots).mT * scale
        best = score.masked_fill(hidden, -torch.inf).topk(extra, -1).indices
        hidden.scatter_(-1, best, True)
        key, value = (
            pack(x, slots)[:, :, None]
            .expand(-1, -1, best.shape[2], -1, -1)
            .gather(3, best[..., None].expand(*best.shape, x.shape[3]))
            for x in (call.k, call.v)
        )
        rows = pack(call.q, slots).unflatten(2, (-1, BLOCK))
        all_of_them = torch.ones(*best.shape[:3], 1, extra, dtype=torch.bool)
        out, lse = pooled_rest.merged(
            *_of_kept(call, plan), rows @ key.mT * scale, value, all_of_them
        )
        left_out = ~hidden.unflatten(3, (-1, BLOCK)).all(-1)
        found = around_queries(call, layout, hidden)
        made = _with_pooled(call, plan, out, lse, found, left_out[:, :, :, None])
        return Answer(made, kept_share(keep, layout) + extra / video.tokens)

    return answer


def by_mean_keys(call: Captured, layout: Layout) -> Tensor:
    """The score "pooled" with the rest around keys."""
    slots, scale = layout.slots, _scale(call)
    rows, held = pack(call.q, slots).unflatten(2, (-1, BLOCK)), slots.real.view(-1, BLOCK, 1)
    key = block_means(call.k, slots, BLOCK)
    scores = rows @ key.mT[:, :, None] * scale + slots.held[1][:, 0].log()
    shares = (scores.softmax(-1) * held).sum(3) / held.sum(1).clamp_min(1)
    values = loss(call, layout) - of_package(call, layout, "spread")
    return shares.log() + values


def mixed_centre(
    call: Captured, video: VideoShape, *, scores: Callable[[Captured, Layout], Tensor]
) -> Callable[[float], Answer]:
    """Blocks by a score: the next-best third of the left-out ones pooled around queries, and the
    others around keys."""
    layout, scale = _boxes(video), _scale(call)
    slots, known = layout.slots, scores(call, layout)
    rank = known.argsort(-1, descending=True).argsort(-1)
    found = around_queries(call, layout, ~slots.real.expand(*known.shape[:3], -1))

    def answer(share: float) -> Answer:
        keep = _kept(known, layout, share)
        plan = plan_of_call(slots, keep, rest=OURS)
        count = keep.sum(-1, keepdim=True)
        near = ~keep & (rank < count + (rank.shape[3] - count) / 3)
        key, value = pooled_rest.means(pack(call.k, slots), pack(call.v, slots), plan)
        rows = pack(call.q, slots).unflatten(2, (-1, BLOCK))
        weighed = rows @ key.mT[:, :, None] * scale + slots.held[1][:, 0].log()
        far = (~keep & ~near)[:, :, :, None]
        out, lse = pooled_rest.merged(*_of_kept(call, plan), weighed, value[:, :, None], far)
        made = _with_pooled(call, plan, out, lse, found, near[:, :, :, None])
        return Answer(made, kept_share(keep, layout))

    return answer


def ours(d: float, c: Counts) -> float:
    """All blocks are pooled for the choice; values of the left-out ones, and their weights."""
    return d + (3 + 2 * (1 - d)) * c.each + c.slope


def by_loss(d: float, c: Counts) -> float:
    """Scores of the mean queries for all keys; the rest of what `ours` does for the left-out."""
    return d + (1 + 4 * (1 - d)) * c.each + c.slope


def by_pairs(d: float, c: Counts) -> float:
    return d + _of_parts(c) + 5 * (1 - d) * c.each + c.slope


def _of_parts(c: Counts) -> float:
    return (PARTS * c.blocks / c.tokens) ** 2 / 2


def by_keys(d: float, c: Counts) -> float:
    return d + (1 + 2 * (1 - d)) * c.each


def with_tokens(
    d: float, c: Counts, part: float, without: Callable[[float, Counts], float]
) -> float:
    """Keys and values of single tokens are taken out of their blocks."""
    return without(d, c) + 2 * part * d * c.each


def mixed(d: float, c: Counts) -> float:
    """A third of the left-out blocks as in `by_loss`, the others as in `by_keys`."""
    return d + (1 + (1 - d) * (4 + 2 * 2) / 3) * c.each + c.slope


def mixed_by_keys(d: float, c: Counts) -> float:
    """Scores of all queries for mean keys, which are those of the blocks around keys too."""
    return d + (1 + (1 - d) * (5 + 2 * 1) / 3) * c.each + c.slope


def in_clusters(d: float, c: Counts) -> float:
    return by_keys(d, c) + 2 * ROUNDS_COUNTED * c.each


def ours_in_clusters(d: float, c: Counts) -> float:
    return ours(d, c) + 2 * ROUNDS_COUNTED * c.each


def ours_from_no_centres(d: float, c: Counts) -> float:
    """Tokens are given to the first centres before the first round."""
    return ours_in_clusters(d, c) + 2 * c.each


def ours_in_a_tree(d: float, c: Counts) -> float:
    """On each level, for queries and for keys, two products a token for each step and one to
    sort by."""
    levels = math.ceil(math.log2(c.tokens / BLOCK))
    return along_curve(d, c) + levels * (2 * STEPS + 1) / c.tokens


def along_curve(d: float, c: Counts) -> float:
    return ours(d, c._replace(blocks=math.ceil(c.tokens / BLOCK)))


def _extra(part: float, kind: Score = "pooled") -> Way:
    without = ours if kind == "pooled" else by_loss
    products = partial(with_tokens, part=part, without=without)
    return Way(partial(extra_tokens, part=part, kind=kind), products)


WAYS: dict[str, Way] = {
    "default, blocks counted by tokens": Way(by_scores(pooled, OURS), ours),
    "score loss": Way(by_scores(loss, OURS), by_loss),
    "pairs of parts": Way(by_scores(pairs, OURS), by_pairs),
    "pairs of parts, and values": Way(by_scores(pairs_and_values, OURS), by_pairs),
    "pairs of parts, rest dropped: SubBlock": Way(
        by_scores(pairs, None), lambda d, c: d + _of_parts(c)
    ),
    "SVG-EAR's error, our rest": Way(by_scores(compensation, OURS), by_loss),
    "SVG-EAR in boxes": Way(by_scores(compensation, KEYS), by_keys),
    "SVG-EAR in clusters": Way(svg_ear, in_clusters),
    "default, in clusters": Way(partial(in_groups, groups=clusters), ours_in_clusters),
    "default, in clusters of two rounds": Way(
        partial(in_groups, groups=partial(clusters, rounds=ROUNDS_COUNTED)), ours_from_no_centres
    ),
    "default, in groups of a tree": Way(partial(in_groups, groups=tree), ours_in_a_tree),
    "a quarter in extra tokens": _extra(0.25),
    "half in extra tokens": _extra(0.5),
    "three quarters in extra tokens": _extra(0.75),
    "half in extra tokens, score loss": _extra(0.5, "loss"),
    "runs along a Hilbert curve": Way(by_scores(pooled, OURS, hilbert), along_curve),
    "around keys, score loss": Way(by_scores(loss, KEYS), by_keys),
    "around keys, as costly as the default": Way(by_scores(loss, KEYS), by_keys, as_costly=True),
    "mixed centre, score loss": Way(partial(mixed_centre, scores=loss), mixed),
    "mixed centre, as costly as the default": Way(
        partial(mixed_centre, scores=loss), mixed, as_costly=True
    ),
    "mixed centre, score by mean keys, as costly": Way(
        partial(mixed_centre, scores=by_mean_keys), mixed_by_keys, as_costly=True
    ),
}
# Those that err less than the default somewhere, and one score of another kind.
CLOSEST = (
    "score loss",
    "default, in clusters",
    "default, in clusters of two rounds",
    "default, in groups of a tree",
    "half in extra tokens",
    "mixed centre, score by mean keys, as costly",
)
