"""FlashAttention-4 over blocks, on Hopper and Blackwell: an optional dependency.

q, k and v are put in slot order, so that blocks are contiguous. Each query block has two lists of
key blocks: blocks in which a mask decides pair by pair, and blocks that are seen whole. The
backward pass takes the lists of each key block, and adds up the gradient of q in no fixed order.
Where the library's tiles are larger than the plan's blocks, a block of the lists covers several
of the plan's, and the mask also says which of them are kept.

References:
    Dao-AILab, flash-attention, `flash_attn/cute`, read in flash-attn-4 4.0.0b36:
    `interface.flash_attn_func`, `block_sparsity.BlockSparseTensorsTorch` (lists may be shorter
    than there are blocks), `mask.call_mask_mod`.
"""

import hashlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gen_accel.kernels import flash4
from gen_accel.kernels.base import AutoPlace, Context, Facts, Kernel, KernelFailed, facts_of
from gen_accel.kernels.lists import Split, left_packed, split_of_runs, why_too_long
from gen_accel.memory import in_words
from gen_accel.plan import Plan, Route, Windows

# Arguments that we pass to `flash_attn_func`; older releases lack some.
ARGUMENTS = ("mask_mod", "aux_tensors", "block_sparse_tensors", "block_sparse_tensors_bwd")

_failed: dict[tuple, str] = {}


class FlashAttention4(Kernel):
    """FlashAttention-4's block-sparse attention."""

    def unsupported(self, facts: Facts) -> list[str]:
        block_q, block_k = flash4.blocks(facts)
        reasons = flash4.reasons(replace(facts, block_q=block_q, block_k=block_k))
        if facts.gain:
            reasons.append("it takes no gain on scores")
        reasons = reasons or [*_library_reasons(), *filter(None, [_failed.get(_key(facts))])]
        return reasons or _of_runs(facts, (block_q, block_k))

    def place(self, facts: Facts) -> AutoPlace:
        if not flash4.serves(facts.device):
            needs = "it needs a Hopper or a Blackwell GPU of a data centre"
            return AutoPlace(55 if facts.device.type == "cpu" else 35, needs)
        if facts.dynamic:
            return AutoPlace(11, "lists of a single call would be as wide as the plan")
        merges = flash4.blocks(facts) != (facts.block_q, facts.block_k)
        # By estimate, our own kernel reaches a third of its speed on Blackwell and most on Hopper.
        if merges and flash4.is_hopper(facts.device):
            return AutoPlace(11, "it would merge blocks of the plan")
        return AutoPlace(5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        lists = prepare(plan, flash4.blocks(facts_of(q, k, v, plan)))
        return _attend(q, k, v, plan, lists, scale, return_lse=False)[0]

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        lists = prepare(plan, flash4.blocks(facts_of(q, k, v, plan)))
        out, lse = _attend(q, k, v, plan, lists, scale, return_lse=True)
        return out, lse if lists.order is None else _InTokens.apply(lse, 2, lists.back)


kernel = FlashAttention4()


def _of_runs(facts: Facts, blocks: tuple[int, int]) -> list[str]:
    """List the reasons against a plan that holds runs instead of a mask."""
    if facts.plan is None or facts.plan.runs is None:
        return []
    if blocks != (facts.block_q, facts.block_k):
        return [
            f"its tiles of {blocks[0]} x {blocks[1]} hold several blocks of the plan, whose whole "
            f"mask they would read: {in_words(math.prod(facts.plan.blocks.shape))}"
        ]
    return why_too_long(facts.plan.kept)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    lists: "FlashLists",
    scale: float,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the output, (B, H, N, D), and the log-sum-exp of the slots, (B, H, S), which may be
    missing without `return_lse`."""
    library, blocks = _library(), lists.blocks
    packed = [x.transpose(1, 2) for x in (q, k, v)]
    if lists.order is not None:
        packed = [_InSlots.apply(x, lists.order, lists.back) for x in packed]
    aux = [x.expand(len(q), q.shape[1], -1, -1) if x.ndim == 4 else x for x in lists.aux]
    key = _key(facts_of(q, k, v, plan))
    try:
        with torch.cuda.device_of(q):  # it launches on the current device
            out, lse = library.attend(
                *packed,
                softmax_scale=scale,
                mask_mod=None if lists.mask is None else library.mask(lists.mask),
                aux_tensors=aux or None,
                block_sparse_tensors=library.lists(**lists.rows._asdict(), block_size=blocks),
                block_sparse_tensors_bwd=None
                if lists.columns is None
                else library.lists(**lists.columns._asdict(), block_size=blocks),
                return_lse=return_lse,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its compiler may raise anything
        last = str(error).strip().splitlines() or [""]
        _failed[key] = f"FlashAttention-4 failed: {type(error).__name__}: {last[0]}"
        raise KernelFailed(_failed[key]) from error
    if lists.order is not None:
        out = _InTokens.apply(out, 1, lists.back)
    return out.transpose(1, 2), lse


def _key(facts: Facts) -> tuple:
    """Facts that decide which code is compiled."""
    blocks = facts.block_q, facts.block_k
    return facts.dim, facts.dtype, facts.device, facts.pattern, blocks, facts.grad


class _InSlots(torch.autograd.Function):
    """Token order to slot order. The gradient of padding is ignored."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """Copy (B, N, H, D) to (B, S, H, D), contiguous."""
        ctx.save_for_backward(back)
        return x.index_select(1, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back,) = ctx.saved_tensors
        return grad.index_select(1, back), None, None


class _InTokens(torch.autograd.Function):
    """Slot order back to token order along an axis. Padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, axis: int, back: Tensor) -> Tensor:
        ctx.shape, ctx.axis = x.shape, axis
        ctx.save_for_backward(back)
        return x.index_select(axis, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(ctx.axis, back, grad), None, None


class FlashLists(NamedTuple):
    """Data of a plan that a call reads.

    Args:
        order, back: (S,) and (N,) int64, the token of each slot, 0 for padding, and the slot of
            each token. None where every slot holds the token of its own number.
        rows: lists of the query blocks.
        columns: lists of the key blocks; None where no gradient can be needed.
        mask: None where all pairs of kept blocks are seen.
        aux: tensors that the mask reads.
        blocks: slots in a query and in a key block.
    """

    order: Tensor | None
    back: Tensor | None
    rows: Split
    columns: Split | None
    mask: "Mask | None"
    aux: list[Tensor]
    blocks: tuple[int, int]


def prepare(plan: Plan, blocks: tuple[int, int]) -> FlashLists:
    """Make the lists: each time for a dynamic plan, without waiting for the device; else once.

    Args:
        blocks: slots in a query and in a key block, multiples of the plan's.
    """
    if plan.dynamic:
        return _lists(plan, blocks, backward=torch.is_grad_enabled(), cut=False)
    return plan.prepared(
        (FlashLists, blocks), lambda: _lists(plan, blocks, backward=True, cut=True)
    )


def _lists(plan: Plan, blocks: tuple[int, int], *, backward: bool, cut: bool) -> FlashLists:
    if plan.runs is not None and blocks == (plan.block_q, plan.block_k):
        rows, columns = split_of_runs(plan)
        mask, aux = _mask_of(plan) if rows.mask_block_cnt.any() else (None, [])
        return FlashLists(*_moved(plan), rows, columns, mask, aux, blocks)
    merges = blocks[0] // plan.block_q, blocks[1] // plan.block_k
    is_merged = merges != (1, 1)
    if is_merged:
        plan = _padded(plan, math.lcm(*blocks))
    keep, whole = _merged(plan.keep, plan.whole, *merges)
    masked = keep & ~whole
    is_cut = is_merged or plan.partial is not None or plan.tokens < len(plan.slots)
    if is_cut and cut:
        is_cut = bool(masked.any())
    mask, aux = _mask_of(plan, is_merged) if is_cut else (None, [])
    if not is_cut:
        masked = masked.new_zeros(1, 1, *masked.shape[2:])

    def lists(masked: Tensor, whole: Tensor) -> Split:
        if is_cut:
            return Split(*left_packed(masked, cut=cut), *left_packed(whole, cut=cut))
        none = masked.new_zeros(masked.shape[:3], dtype=torch.int32)
        return Split(none, none[..., None].clone(), *left_packed(whole, cut=cut))

    rows, columns = lists(masked, whole), None
    if backward:
        columns = lists(masked.mT, whole.mT)
    return FlashLists(*_moved(plan), rows, columns, mask, aux, blocks)


def _moved(plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Return `order` and `back` of `FlashLists`."""
    return (None, None) if plan.is_raster else (plan.slots.clamp_min(0), plan.places)


def _padded(plan: Plan, multiple: int) -> Plan:
    """Copy the plan with padding at its end, up to a multiple of `multiple` slots."""
    more = -len(plan.slots) % multiple
    if not more:
        return plan
    rule = plan.partial
    more_q, more_k = more // plan.block_q, more // plan.block_k
    if isinstance(rule, Route):
        picks = F.pad(rule.picks, (0, 0, 0, more))
        rule = Route(picks, F.pad(rule.group, (0, more_k)), rule.block)
    elif rule is not None:
        given = rule.first, rule.last, rule.place, rule.free, rule.seen
        first, last, place, free, seen = (F.pad(x, (0, more)) for x in given)
        rule = Windows(first, last, place, free, seen)
    slots = F.pad(plan.slots, (0, more), value=-1)
    keep = F.pad(plan.keep, (0, more_k, 0, more_q))
    made = Plan(slots, keep, plan.block_q, plan.block_k, rule, plan.dynamic)
    made.tokens, made.places, made.is_raster = plan.tokens, plan.places, False
    return made


def _merged(keep: Tensor, whole: Tensor, query: int, key: int) -> tuple[Tensor, Tensor]:
    """Merge blocks into (B, H, Kq, Kk) bool, `query` by `key` blocks each: kept where any of them
    is, whole where all are."""
    if (query, key) == (1, 1):
        return keep, whole
    parts = [x.unflatten(3, (-1, key)).unflatten(2, (-1, query)) for x in (keep, whole)]
    return parts[0].any(5).any(3), parts[1].all(5).all(3)


# Integers of a mask: tensors of torch, which broadcast, or scalars of CuTe; or a list of tensors.
Ints = Any


class Mask(NamedTuple):
    """Mask over pairs of slots.

    Args:
        rule: name of its rule in `RULES`.
        blocks: slots in the plan's own blocks, where a block of the lists covers several; the
            mask then also reads which of them are kept.
    """

    rule: str
    blocks: tuple[int, int] | None = None

    def bits(self) -> "MaskRule":
        """Return the function that computes the mask."""
        bits, seen = RULES[self.rule]
        if self.blocks is None:
            return MaskRule(bits, seen)
        block_q, block_k = self.blocks

        def kept_too(aux: Ints, b: Ints, h: Ints, query: Ints, key: Ints) -> Ints:
            """aux: (B, H, Kq, Kk) int8, -1 for blocks that are kept, then the tensors of
            `bits`."""
            kept = aux[0][b, h, query // block_q, key // block_k]
            return bits(aux[1:], b, h, query, key) & kept

        return MaskRule(kept_too, seen)


class MaskRule(NamedTuple):
    """Mask in bits: slot `query` sees slot `key` where `bits(aux, b, h, query, key) == seen`.

    `bits` uses operators and subscripts alone, so that one function serves all kinds of `Ints`.
    """

    bits: Callable[[Ints, Ints, Ints, Ints, Ints], Ints]
    seen: int


# Windows of three axes in one int32: fields of nine bits, each below a guard bit. The guard
# survives the subtraction of a field that is no larger, so that two of them compare three axes.
FIELD = 10
FARTHEST = 2 ** (FIELD - 1) - 1
SHORT = sum(1 << (FIELD * (axis + 1) - 1) for axis in range(3))
# One axis in one int32, where places do not fit.
LONG = 1 << 30


def _padding(aux: Ints, b: Ints, h: Ints, query: Ints, key: Ints) -> Ints:
    """aux: (S,) int32, 1 where a slot holds a token."""
    return aux[0][key]


def _route(aux: Ints, b: Ints, h: Ints, query: Ints, key: Ints) -> Ints:
    """aux: (S,) int32, twice the group of a key and 1 where its slot holds a token; (B, H, S, C)
    uint8, the groups that a query picked."""
    word = aux[0][key]
    return aux[1][b, h, query, word >> 1] & word & 1


def _in_windows(aux: Ints, query: Ints, key: Ints) -> Ints:
    """Guards of all axes that hold in every word. aux: four times (S,) int32 for each word, as
    in `_words`."""
    bits = -1
    for i in range(0, len(aux), 4):
        first, last, low, high = aux[i], aux[i + 1], aux[i + 2], aux[i + 3]
        bits = (high[key] - first[query]) & (last[query] - low[key]) & bits
    return bits


def _short_windows(aux: Ints, b: Ints, h: Ints, query: Ints, key: Ints) -> Ints:
    return _in_windows(aux, query, key) & SHORT


def _long_windows(aux: Ints, b: Ints, h: Ints, query: Ints, key: Ints) -> Ints:
    return _in_windows(aux, query, key) & LONG


RULES = {
    "padding": MaskRule(_padding, 1),
    "route": MaskRule(_route, 1),
    "short windows": MaskRule(_short_windows, SHORT),
    "long windows": MaskRule(_long_windows, LONG),
}


def _mask_of(plan: Plan, is_merged: bool = False) -> tuple[Mask, list[Tensor]]:
    """Return the mask and the tensors that it reads.

    Args:
        is_merged: whether a block of the lists covers several blocks of the plan.
    """
    name, aux = _rule_of(plan)
    if not is_merged:
        return Mask(name), aux
    kept = _with_leading_axis(plan.keep.to(torch.int8).neg())
    return Mask(name, (plan.block_q, plan.block_k)), [kept, *aux]


def _rule_of(plan: Plan) -> tuple[str, list[Tensor]]:
    rule, real = plan.partial, plan.real
    if rule is None:
        return "padding", [real.int()]
    if isinstance(rule, Route):
        word = 2 * rule.group.repeat_interleave(rule.block) + real
        picks = rule.picks.contiguous().view(torch.uint8)
        return "route", [word.int(), _with_leading_axis(picks)]
    place = rule.place - rule.place.amin(1, keepdim=True)
    if not plan.dynamic and int(place.max()) < FARTHEST:
        return "short windows", _words(rule, real, axes=3, farthest=FARTHEST)
    return "long windows", _words(rule, real, axes=1, farthest=LONG - 1)


def _with_leading_axis(x: Tensor) -> Tensor:
    """Make x contiguous, with two columns at least: CuTe wants one axis alone of stride 1."""
    return F.pad(x, (0, 1)) if x.shape[-1] == 1 else x.contiguous()


def _words(rule: Windows, real: Tensor, *, axes: int, farthest: int) -> list[Tensor]:
    """first, last, low and high of each word, all (S,) int32.

    A query sees a key if first <= high and low <= last in every field. low and high of a key are
    both its place; a free key has a low and a high that meet any window, and the low of a padded
    key lies past all windows. Guard bits stand in last and high.

    Args:
        axes: number of axes in a word.
        farthest: the largest number of a field; places are below it.
    """
    least = rule.place.amin(1, keepdim=True)
    place, first, last = rule.place - least, rule.first - least, rule.last - least
    never = last < 0
    first = first.clamp(0, farthest).masked_fill(never, farthest).masked_fill(rule.free, 0)
    last = last.clamp(0, farthest - 1).masked_fill(rule.free, farthest - 1)
    low = place.masked_fill(rule.free, 0).masked_fill(~real, farthest)
    high = place.masked_fill(rule.free, farthest)
    width, words = farthest.bit_length() + 1, []
    for start in range(0, len(place), axes):
        fields = range(start, min(start + axes, len(place)))
        shifts = [(axis, width * (axis - start)) for axis in fields]
        guard = SHORT if axes == 3 else LONG
        # Axes that are not there: 0 <= 0 in every field.
        for numbers, bits in ((first, 0), (last, guard), (low, 0), (high, guard)):
            word = torch.full_like(numbers[0], bits)
            for axis, shift in shifts:
                word = word + (numbers[axis] << shift)
            words.append(word.int())
    return words


class Library(NamedTuple):
    """Names of FlashAttention-4 that we use.

    Args:
        attend: `flash_attn_func`; q, k and v are (B, S, H, D).
        lists: `BlockSparseTensorsTorch`, the four lists and `block_size`.
        mask: makes a `mask_mod` of a `Mask`.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    lists: Callable[..., object]
    mask: Callable[[Mask], object]


@cache
def _library() -> Library:
    """Import the library. Raises ImportError where a part is missing."""
    attend = import_module("flash_attn.cute").flash_attn_func
    lists = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    return Library(attend, lists, _mask_mod)


@cache
def _library_reasons() -> list[str]:
    try:
        known = inspect.signature(_library().attend).parameters
    except ImportError as error:
        return [f"flash-attn-4 cannot be imported: {error}"]
    if missing := [name for name in ARGUMENTS if name not in known]:
        return [f"this flash-attn-4 has no {', '.join(missing)}: {flash4.INSTALL}"]
    return []


@cache
def _mask_mod(mask: Mask) -> Callable:
    """Make a mask as FlashAttention-4 calls it: for one pair, by vectors of one int32."""
    cutlass, cute = import_module("cutlass"), import_module("cutlass.cute")
    vector = import_module("flash_attn.cute.utils").scalar_to_ssa
    bits, seen = mask.bits()

    @cute.jit
    def mask_mod(  # noqa: ANN202
        batch: Ints, head: Ints, query: Ints, key: Ints, seqlen_info: object, aux_tensors: Ints
    ):
        found = bits(aux_tensors, batch[0], head[0], query[0], key[0])
        return vector(found, cutlass.Int32) == vector(seen, cutlass.Int32)

    # FlashAttention-4 caches compiled kernels by this; its own hash would go by a mask's address.
    source = inspect.getsource(sys.modules[__name__])
    mask_mod.__cute_hash__ = f"{__name__} {mask} {hashlib.sha256(source.encode()).hexdigest()}"
    return mask_mod
