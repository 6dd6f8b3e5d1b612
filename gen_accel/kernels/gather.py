"""Batched matrix products over gathered key blocks. Autograd on any device, no compiler.

Query blocks are sorted by how many key blocks they see and processed in groups: one gather, two
products and one softmax for a group. The backward pass gathers again and recomputes the softmax,
so that nothing of the size of the scores is kept between the passes. For bf16 and fp16 inputs the
scores and their gradients are fp32, since rounding errs in proportion to a score. On a GPU
a plan made for one call waits for the lengths of its lists.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.kernels.base import AutoPlace, Context, Facts, Kernel, Values, alike
from gen_accel.kernels.lists import has_tiles, prepare
from gen_accel.plan import Plan, pack, unpack

# Bytes that one thread works on at a time: keys, values and scores that stay in its cache from
# one product to the next, yet enough to keep the products busy. A GPU takes as much as LANES
# threads, to launch fewer kernels.
GROUP = 2 << 20
LANES = 32
KEPT = 32 << 20  # bytes of a buffer that a CPU keeps from call to call

# Queries in a block from which on one operator for products and softmax is faster in fp32, on the
# processors where it is faster in bf16.
LARGE = 192

# Dtypes in which the backward pass multiplies rounded weights and score gradients, twice as fast.
LOW = (torch.bfloat16,)


class Gather(Kernel):
    """Keys that are copied for each query block."""

    def place(self, facts: Facts) -> AutoPlace:
        """Place on the CPU before `flex`: `gather` compiles nothing, and was faster on radial
        plans (see benchmarks/results/)."""
        if facts.device.type != "cpu":
            return AutoPlace(40, "it runs many small operations")
        if facts.pattern == "route":
            return AutoPlace(20, "it computes what any query of a block picked")
        return AutoPlace(20, "it copies keys for each query block")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        return _of_tokens(q, k, v, plan, scale)[0]

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp. For bf16, the operator that does products and softmax in
        one rounds the wide output."""
        return _of_tokens(q, k, v, plan, scale, lse=True, wide=wide)


kernel = Gather()


def _of_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    *,
    lse: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    _, *lists = prepare(plan)
    q, k, v = (pack(x, plan) for x in (q, k, v))
    out, total = _attention(q, k, v, *lists, scale, lse, wide)
    return unpack(out, plan), unpack(total, plan) if lse else total


@torch.library.custom_op("gen_accel::gather_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    lse: bool,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention in slot order, (B, H, S, D), in fp32 at least where `wide`, and its
    log-sum-exp, (B, H, S), empty where not requested. One opaque operator: a compiler sees
    no loop."""
    fused = gain is None and _fuses(q, block_q)
    most = torch.promote_types(q.dtype, torch.float32)
    compute = q.dtype if fused else most
    with _scratch(q.device) as memory:
        tensors = q.to(compute), k.to(compute), v.to(compute) if wide else v
        options = index, counts, rule, gain, block_q, block_k, scale, memory
        work = _Work(*tensors, *options, fused=fused, lse=lse)
        out = work.unset(work.q.shape, most if wide else q.dtype)
        total = work.unset(work.q.shape[:2], most, -torch.inf) if lse else q.new_empty(0)
        for rows, length in work.parts():
            if fused:
                found, sums = work.fused(rows, length)
            else:
                group = work.group(rows, length)
                found, sums = work.product("out", group.weights, group.v), group.lse
            out.index_copy_(0, work.order[rows], found.to(out.dtype))
            if sums is not None:
                total.index_copy_(0, work.order[rows], sums.to(most))
        return out.view(q.shape), total.view(q.shape[:3]) if lse else total


def _fuses(q: Tensor, block_q: int) -> bool:
    """Whether one operator for products and softmax is faster."""
    large = q.dtype == torch.float32 and block_q >= LARGE
    return (q.dtype in LOW or large) and has_tiles(q.device)


@_attention.register_fake
def _(q: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    *_, lse, wide = given
    most = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape, dtype=most if wide else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=most) if lse else q.new_empty(0)


@torch.library.custom_op("gen_accel::gather_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    low = dtype if dtype in LOW else wide
    low_q, low_k, low_out = q.to(low), k.to(low).reshape(-1, block_k, k.shape[3]), grad.to(low)
    grad, q, k, v = (x.to(wide) for x in (grad, q, k, v))
    with _scratch(q.device) as memory:
        work = _Work(q, k, v, index, counts, rule, gain, block_q, block_k, scale, memory)
        grad, low_q, low_out = (x.reshape(work.q.shape) for x in (grad, low_q, low_out))
        of_lse = None if grad_lse is None else grad_lse.to(wide).reshape(work.q.shape[:2])
        dq = work.unset(work.q.shape, low)
        dk, dv = (torch.zeros_like(x) for x in (work.k, work.v))
        for rows, total in work.parts():
            group, places = work.group(rows, total), work.order[rows]
            p, queries = group.weights, group.q
            above = outs = work.fetched("grad", grad, places, len(p))
            ds = work.product("ds", above, group.v.transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            if of_lse is not None:
                ds.addcmul_(p, of_lse[places][..., None])
            ds.mul_(scale)
            if group.slope is not None:
                ds.mul_(group.slope)
            keys = group.k
            if low is not wide:
                p, ds = work.rounded("low_p", p, low), work.rounded("low_ds", ds, low)
                keys = work.fetched("low_k", low_k, group.blocks, len(p))
                queries = work.fetched("low_q", low_q, places, len(p))
                outs = work.fetched("low_out", low_out, places, len(p))
            dq.index_copy_(0, places, work.product("dq", ds, keys))
            for target, left, right in ((dk, ds, queries), (dv, p, outs)):
                part = work.product("part", left.transpose(1, 2), right)
                target.index_add_(0, group.blocks, part.view(-1, *target.shape[1:]).to(wide))
    return dq.view(q.shape).to(dtype), dk.view(k.shape).to(dtype), dv.view(v.shape).to(dtype)


_backward.register_fake(alike(2))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    q, k, v, index, counts, rule, gain, *ctx.sizes, ctx.lse, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], index, counts, gain, *rule)


def _differentiate(ctx: Context, grad: Tensor, grad_lse: Tensor) -> Values:
    q, k, v, lse, index, counts, gain, *rule = ctx.saved_tensors
    # Where two parts are merged, the gradient at -inf is NaN.
    above = grad, grad_lse.masked_fill(lse.isneginf(), 0.0) if ctx.lse else None
    with torch.autocast(q.device.type, enabled=False):  # `backward` may be called inside of it
        grads = _backward(*above, q, k, v, index, counts, rule, gain, *ctx.sizes)
    return *grads, None, None, [None] * len(rule), *[None] * 6


_attention.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True, eq=False)
class _Group:
    """Group of G query blocks that see the same number n of key blocks."""

    blocks: Tensor  # (G * n,) of all B x H x Kk key blocks
    q: Tensor  # (G, block_q, D)
    k: Tensor  # (G, n * block_k, D)
    v: Tensor
    weights: Tensor  # (G, block_q, n * block_k), the softmax
    slope: Tensor | None  # like the weights, the factor by which a gain scaled each score
    lse: Tensor | None  # (G, block_q)


_kept = threading.local()
Memory = dict[tuple[str, torch.dtype], Tensor]


@contextmanager
def _scratch(device: torch.device) -> Iterator[Memory]:
    """Yield memory for the groups of a call. A CPU keeps it for the thread's next call, since
    mapping new memory would cost as much as the products. A GPU's allocator keeps its own."""
    if device.type != "cpu":
        yield {}
        return
    memory: Memory = vars(_kept).setdefault("memory", {})
    yield memory
    for key in [key for key, x in memory.items() if x.nbytes > KEPT]:
        del memory[key]


class _Work:
    """Groups of one call, one after the other in the same memory.

    New memory for each group would have to be mapped page by page and would miss the cache.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        counts: Tensor,
        rule: Sequence[Tensor],
        gain: Tensor | None,
        block_q: int,
        block_k: int,
        scale: float,
        memory: Memory,
        *,
        fused: bool = False,
        lse: bool = False,
    ) -> None:
        B, H, S, D = q.shape
        self.dtype = v.dtype
        self.k, self.v = (x.reshape(-1, block_k, D) for x in (k, v))
        self.scale, self.lse = scale, lse
        self.slack, *self.windows = rule
        self.route = None
        if len(rule) == 3:
            hidden, self.key_groups = rule[1:]
            self.route = hidden.expand(B, H, -1, -1).reshape(-1, block_q, hidden.shape[3])
        self.Kq, self.Kk, self.block_q, self.block_k = S // block_q, S // block_k, block_q, block_k
        # One row for every query block of every head, sorted so that a group has lists of one
        # length.
        totals, masked = counts.expand(2, B, H, self.Kq).flatten(1)
        order = torch.argsort(totals * (self.Kk + 1) + masked)
        self.totals, self.masked = totals[order].tolist(), masked[order].tolist()
        self.order = order.to(q.device)
        self.q = q.reshape(-1, block_q, D)
        first = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * self.Kk
        self.index = (index + first).flatten(0, 2).index_select(0, self.order)
        self.gain = None
        if gain is not None:
            self.gain = gain.to(self.q.dtype).reshape(-1, self.Kk)
            of_row = torch.arange(len(self.gain), device=q.device).view(*gain.shape[:3])
            self.pattern = of_row.expand(B, H, -1).flatten()[self.order]
        # Bytes that a group holds for each key of each row; a fused group holds no scores.
        scores = 0 if fused else block_q * self.q.element_size()
        self.bytes = scores + D * (self.k.element_size() + self.v.element_size())
        self.lanes = torch.get_num_threads() if q.device.type == "cpu" else LANES
        self.memory = memory
        self.views: dict[tuple, Tensor] = {}

    def unset(self, shape: Sequence[int], dtype: torch.dtype, blind: float = 0.0) -> Tensor:
        """Allocate a result of each query block, already filled with `blind` where one sees
        nothing."""
        out = torch.empty(shape, dtype=dtype, device=self.q.device)
        return out.index_fill_(0, self.order[: self.totals.count(0)], blind)

    def parts(self) -> Iterator[tuple[slice, int]]:
        """Yield the rows of each group, of all B x H x Kq query blocks in `order`, and the number
        of key blocks that each sees."""
        row, end = self.totals.count(0), len(self.totals)
        while row < end:
            total = self.totals[row]
            room = self.lanes * max(1, GROUP // (total * self.block_k * self.bytes))
            stop = row + 1
            while stop < min(end, row + room) and self.totals[stop] == total:
                stop += 1
            yield slice(row, stop), total
            row = stop

    def space(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory, which the next call with this name reuses."""
        if (name, shape) not in self.views:
            size = math.prod(shape)
            key = name, dtype or self.q.dtype
            if key not in self.memory or self.memory[key].numel() < size:
                with torch.inference_mode(False):  # it serves training too
                    self.memory[key] = torch.empty(size, dtype=key[1], device=self.q.device)
            self.views[name, shape] = self.memory[key][:size].view(shape)
        return self.views[name, shape]

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        space = self.space(name, len(left), left.shape[1], right.shape[2], dtype=left.dtype)
        return torch.bmm(left, right, out=space)

    def rounded(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.space(name, *x.shape, dtype=dtype).copy_(x)

    def fetched(self, name: str, source: Tensor, blocks: Tensor, rows: int) -> Tensor:
        """Gather blocks into (rows, n * block_k, D)."""
        space = self.space(name, len(blocks), *source.shape[1:], dtype=source.dtype)
        return torch.index_select(source, 0, blocks, out=space).view(rows, -1, source.shape[2])

    def group(self, rows: slice, total: int) -> _Group:
        lists = self.index[rows]
        q = self.fetched("q", self.q, self.order[rows], len(lists))
        blocks = lists[:, :total].flatten()
        k = self.fetched("k", self.k, blocks, len(q))
        v = self.fetched("v", self.v, blocks, len(q))
        scores = self.space("scores", len(q), self.block_q, k.shape[1])
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=scores)
        slope = None if self.gain is None else self._dampened(scores, rows, lists[:, :total])
        masked = self.masked[rows.stop - 1]
        if not masked:
            weights, lse = self._weights(scores)
            return _Group(blocks, q, k, v, weights, slope, lse)
        excess = self._excess(self.order[rows], lists[:, :masked])
        hide = self.space("hide", *excess.shape, dtype=torch.float32)
        torch.clamp_min(excess, 0, out=hide)
        lowest = torch.finfo(scores.dtype).min
        scores[..., : masked * self.block_k].add_(hide.to(scores.dtype), alpha=lowest)
        weights, lse = self._weights(scores)
        if masked == total:  # a query that sees nothing gets zeros
            blind = (excess > 0).all(-1, keepdim=True)
            weights.masked_fill_(blind, 0.0)
            lse = None if lse is None else lse.masked_fill_(blind[..., 0], -torch.inf)
        return _Group(blocks, q, k, v, weights, slope, lse)

    def fused(self, rows: slice, total: int) -> tuple[Tensor, Tensor | None]:
        """Run products and softmax in one operator, which holds scores in fp32 and rounds weights;
        with the log-sum-exp of each row where requested."""
        blocks = self.index[rows, :total].flatten()
        q = self.fetched("q", self.q, self.order[rows], rows.stop - rows.start)[:, None]
        k = self.fetched("k", self.k, blocks, len(q))[:, None]
        v = self.fetched("v", self.v, blocks, len(q))[:, None]
        masked, mask, blind = self.masked[rows.stop - 1], None, None
        if masked:
            excess = self._excess(self.order[rows], self.index[rows, :masked])
            mask = self.space("mask", len(q), self.block_q, k.shape[2], dtype=self.dtype)
            mask[..., masked * self.block_k :] = 0
            hide = self.space("hide", *excess.shape, dtype=torch.float32)
            torch.clamp(excess, 0, 1, out=hide).mul_(torch.finfo(self.dtype).min)
            mask[..., : masked * self.block_k] = hide
            if masked == total:
                blind = (excess > 0).all(-1, keepdim=True)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = None if mask is None else mask[:, None]
        found, lse = attend(q, k, v, 0.0, False, attn_mask=bias, scale=self.scale)
        found, lse = found[:, 0], lse[:, 0]
        if blind is not None:
            found = found.masked_fill(blind, 0.0)
            lse = lse.masked_fill(blind[..., 0], -torch.inf)
        return found, lse if self.lse else None

    def _dampened(self, scores: Tensor, rows: slice, blocks: Tensor) -> Tensor:
        """Multiply the positive scores by their gains in place; return the slope, same shape."""
        assert self.gain is not None
        gain = self.gain[self.pattern[rows]].gather(1, blocks % self.Kk)  # (G, n)
        positive = self.space("positive", *scores.shape, dtype=torch.bool)
        slope = self.space("slope", *scores.shape)
        torch.gt(scores, 0, out=positive)
        shape = *scores.shape[:2], -1, self.block_k
        each, one = gain[:, None, :, None], gain.new_ones(())
        torch.where(positive.view(shape), each, one, out=slope.view(shape))
        scores.mul_(slope)
        return slope

    def _weights(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the softmax in the dtype of v, in the memory of the scores where they have that
        dtype, and the log-sum-exp where requested."""
        highest = scores.amax(-1) if self.lse else None
        torch.softmax(scores, -1, out=scores)
        # The largest weight is exp(highest - lse).
        lse = None if highest is None else highest.sub_(scores.amax(-1).log_())
        if scores.dtype == self.dtype:
            return scores, lse
        return self.rounded("weights", scores, self.dtype), lse

    def _excess(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Compute excess over the slack, (G, block_q or 1, masked * block_k) fp32, above 0 where
        a query does not see a key."""
        key, query = blocks % self.Kk, rows % self.Kq
        slack = self.slack.view(self.Kk, self.block_k)[key].flatten(1)[:, None]
        if not self.windows:
            return -slack
        shape = len(rows), self.block_q, slack.shape[2]
        excess = self.space("excess", *shape, dtype=torch.float32)
        if self.route is not None:
            groups = self.key_groups[key][:, None].expand(-1, self.block_q, -1)
            hidden = self.route[rows].gather(2, groups)
            each = excess.view(*hidden.shape, self.block_k)
            torch.sub(hidden[..., None], slack.view(len(rows), 1, -1, self.block_k), out=each)
            return excess
        along = self.space("along", *shape, dtype=torch.float32)
        for axis, (center, half, place) in enumerate(zip(*self.windows, strict=True)):
            center = center.view(self.Kq, self.block_q)[query][..., None]
            half = half.view(self.Kq, self.block_q)[query][..., None]
            place = place.view(self.Kk, self.block_k)[key].flatten(1)[:, None]
            torch.sub(place, center, out=along if axis else excess).abs_().sub_(half)
            if axis:
                torch.maximum(excess, along, out=excess)
        return excess.sub_(slack)
