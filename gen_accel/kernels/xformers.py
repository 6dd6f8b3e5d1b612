"""xformers' block-diagonal attention over runs of tokens: CUDA only, an optional dependency.

Query blocks that see the same key blocks make a run: its queries attend densely to its keys, so
a plan of whole blocks is the block-diagonal mask of its runs. Padding enters no run.
Where no two runs share a key, as in dense attention and in windows as large as their stride,
tokens are only reordered. Otherwise a key is copied for each run that sees it, and
training keeps the copies until the backward pass.

References:
    Lefaudeux et al., "xFormers", 2022, https://github.com/facebookresearch/xformers
    (`ops.fmha.attn_bias.BlockDiagonalMask`, the same from 0.0.30 to 0.0.35). Its masks for padded
    keys are left aside: its FlashAttention has no backward for them. The log-sum-exp comes from
    `memory_efficient_attention_forward_requires_grad`, natural and without a gradient, packed or
    run by run as the operator says by `VARLEN_LSE_PACKED`.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.base import AutoPlace, Facts, Kernel
from gen_accel.memory import in_words
from gen_accel.plan import Plan
from gen_accel.registry import install

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Modules of xformers.ops.fmha in the order in which xformers' dispatch tries them. Named here, so
# that forward and backward are known to fit together before anything runs.
OPERATORS = ("flash3", "flash", "cutlass", "ck")
KEYS = 1 << 18  # keys copied for one call: 0.8 GB each of K and V for 12 heads of 128 in bf16


class Xformers(Kernel):
    """xformers' attention over lists of blocks."""

    def unsupported(self, facts: Facts) -> list[str]:
        """List the reasons why it cannot run. Synchronises the device the first time for a plan
        with a rule on token pairs."""
        reasons = []
        if find_spec("xformers") is None:
            reasons.append(f"xformers is not installed: {install('xformers')}")
        if facts.device.type != "cuda":
            reasons.append(f"xformers runs on CUDA only, got {facts.device.type}")
        if facts.dtype not in DTYPES:
            reasons.append(f"xformers takes float16, bfloat16 and float32, got {facts.dtype}")
        if facts.gain:
            reasons.append("it takes no gain on scores")
        if facts.dim % 8:
            reasons.append(f"head dim must be a multiple of 8, got {facts.dim}")
        if facts.dynamic:
            reasons.append(
                "it reads the plan back to list lengths, and this one is for a single call"
            )
        elif facts.plan is not None and facts.plan.runs is not None:
            reasons.append(
                "it compares the rows of the whole mask of blocks, which a plan of so many tokens "
                f"does without: {in_words(math.prod(facts.plan.blocks.shape))}"
            )
        elif facts.plan is not None and (cut := _cut_blocks(facts.plan)):
            reasons.append(
                f"it takes whole blocks, and a rule on token pairs cuts {cut} of those kept"
            )
        if facts.grad and (facts.lse or facts.rest):
            reasons.append("its log-sum-exp has no gradient")
        return reasons or _operators(*_kind(facts.dim, facts.dtype, facts.device, facts.grad))[1]

    def place(self, facts: Facts) -> AutoPlace:
        if facts.device.type == "cpu":
            return AutoPlace(60, "it needs CUDA")
        return AutoPlace(30, "it copies keys that several runs of queries see")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        operators, _ = _operators(*_kind(q.shape[3], q.dtype, q.device, _training(q, k, v)))
        attend = partial(_fmha().memory_efficient_attention, scale=scale, op=operators)
        return over_runs(q, k, v, plan, lambda *given, **mask: (attend(*given, **mask), None))[0]

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute output and log-sum-exp, without a gradient. The wide output is rounded too: the
        library writes q's dtype."""
        (operator, _), _ = _operators(*_kind(q.shape[3], q.dtype, q.device, False))
        attend = _fmha().memory_efficient_attention_forward_requires_grad

        def both(*given: Tensor, attn_bias: Any) -> tuple[Tensor, Tensor]:
            out, lse = attend(*given, attn_bias=attn_bias, scale=scale, op=operator)
            starts = attn_bias.q_seqinfo.seqstart_py
            if operator.VARLEN_LSE_PACKED:  # (1, H, T or more)
                return out, lse[0, :, : starts[-1]].T
            # (runs, H, the longest run or more)
            lengths = [stop - start for start, stop in pairwise(starts)]
            rows = (one[:, :length].T for one, length in zip(lse, lengths, strict=True))
            return out, torch.cat([*rows])

        with torch.no_grad():
            out, total = over_runs(q, k, v, plan, both, lse=True)
        assert total is not None
        return out, total


kernel = Xformers()


def over_runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    *,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by `attend`, run by run: (B, H, N, D), and if `lse` the log-sum-exp,
    (B, H, N).

    Args:
        attend: takes q (1, T, H, D), k and v (1, U, H, D) and `attn_bias`, the mask that lets
            each run of T see its own run of U. Returns (1, T, H, D), and if `lse` the log-sum-exp
            (T, H).
    """
    B, H, N, D = q.shape
    own_patterns = plan.patterns[1] > 1  # then each head counts as a sample of one head
    most = torch.promote_types(q.dtype, torch.float32)
    wide = most if _training(q, k, v) else q.dtype
    if not own_patterns:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k, v = (x.reshape(-1, 1 if own_patterns else H, D) for x in (q, k, v))
    samples = B * H if own_patterns else B
    runs = plan.prepared((CallParts, samples), lambda: _runs(plan, samples))
    outs = [q[:0] + k[:0] + v[:0]]  # so that the output depends on all, even without a run
    sums = [q.new_empty(0, q.shape[1], dtype=most)]
    k, v = k.to(wide), v.to(wide)  # many runs add into the gradient of one key
    for query, key, mask in runs.parts:
        keys, values = (x.index_select(0, key)[None].to(q.dtype) for x in (k, v))
        part, total = attend(q.index_select(0, query)[None], keys, values, attn_bias=mask)
        outs.append(part[0])
        sums += [] if total is None else [total]
    results = [q.new_zeros(q.shape).index_copy(0, runs.seeing, torch.cat(outs))]
    if lse:
        total = torch.full(q.shape[:2], -torch.inf, dtype=most, device=q.device)
        results.append(total.index_copy_(0, runs.seeing, torch.cat(sums).to(most)))
    if own_patterns:
        results = [x.view(B, H, N, *x.shape[2:]) for x in results]
    else:
        results = [x.view(B, N, H, *x.shape[2:]).transpose(1, 2) for x in results]
    return results[0], results[1] if lse else None


class Run(NamedTuple):
    """Runs of one call.

    Args:
        query, key: (T,) and (U,) int64, run after run, rows among the tokens of all samples.
        mask: the BlockDiagonalMask of their lengths.
    """

    query: Tensor
    key: Tensor
    mask: object


class CallParts(NamedTuple):
    """Parts of one call. seeing: (T,) int64, the rows of all parts; other rows see nothing."""

    parts: list[Run]
    seeing: Tensor


def _runs(plan: Plan, samples: int) -> CallParts:
    patterns = _patterns(plan)
    groups: list[list[tuple[Tensor, Tensor]]] = []
    room = 0
    for sample in range(samples):
        first = sample * plan.tokens
        for query, key in patterns[sample % len(patterns)]:
            if not groups or len(key) > room:
                groups.append([])
                room = KEYS
            groups[-1].append((first + query, first + key))
            room -= len(key)
    device, mask = plan.slots.device, _fmha().attn_bias.BlockDiagonalMask
    parts = []
    for queries, keys in (zip(*group, strict=True) for group in groups):
        lengths = [[len(run) for run in side] for side in (queries, keys)]
        rows = torch.cat(queries).to(device), torch.cat(keys).to(device)
        parts.append(Run(*rows, mask.from_seqlens(*lengths, device=device)))
    none = torch.empty(0, dtype=torch.int64, device=device)
    return CallParts(parts, torch.cat([none, *(part.query for part in parts)]))


def _patterns(plan: Plan) -> list[list[tuple[Tensor, Tensor]]]:
    """List (query tokens, key tokens) of each run, for each of the B' x H' patterns of `keep`."""
    slots, real = plan.slots.cpu(), plan.real.cpu()
    held = real.view(-1, plan.block_k).any(-1)
    found = []
    for keep in plan.keep.flatten(0, 1).cpu():
        rows, row_of = (keep & held).unique(dim=0, return_inverse=True)
        runs = []
        for i, row in enumerate(rows):
            query = slots[real & (row_of == i).repeat_interleave(plan.block_q)]
            key = slots[real & row.repeat_interleave(plan.block_k)]
            if len(query) and len(key):
                runs.append((query, key))
        found.append(runs)
    return found


def _cut_blocks(plan: Plan) -> int:
    """Count the kept blocks that `partial` keeps only in part. Synchronises the device once a
    plan."""
    rule = plan.partial
    if rule is None:
        return 0
    blocks = plan.real, plan.block_q, plan.block_k
    return plan.prepared(_cut_blocks, lambda: int((plan.keep & ~rule.whole(*blocks)).sum()))


def _fmha() -> ModuleType:
    return import_module("xformers.ops.fmha")


def _training(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))


def _kind(dim: int, dtype: torch.dtype, device: torch.device, training: bool) -> tuple:
    """Facts that decide which operators run."""
    return dim, dtype, device, training, torch.are_deterministic_algorithms_enabled()


@lru_cache(maxsize=32)
def _operators(
    dim: int, dtype: torch.dtype, device: torch.device, training: bool, deterministic: bool
) -> tuple[Any, list[str]]:
    """Find xformers' first pair of forward and backward that fits, or why none does."""
    try:
        fmha = _fmha()
    except ImportError as error:
        return None, [f"xformers cannot be imported: {error}"]
    x = torch.empty(1, 1, 1, dim, dtype=dtype, device=device)
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens([1], device=device)
    inputs = fmha.Inputs(x, x, x, mask, scale=1.0)
    refused = []
    for name in OPERATORS:
        pair = getattr(fmha, name).FwOp, getattr(fmha, name).BwOp
        reasons = [why for op in pair[: 1 + training] for why in op.not_supported_reasons(inputs)]
        if not reasons:
            return pair, []
        refused.append(f"{pair[0].NAME}: {', '.join(reasons)}")
    return None, refused
