"""FlexAttention over the plan's blocks, compiled once for each plan and shape, and kept.

`torch.compile(flex_attention, dynamic=True)` emits C++ that does not compile on the CPU (torch
2.13) as soon as a mask indexes a tensor or a second shape comes along, so every shape is compiled
by itself. Compiled FlexAttention trusts the lists of whole and partial blocks; eager FlexAttention
reads `mask_mod` alone, and is never run here.

On Hopper and Blackwell its blocks go to FlashAttention-4, if it is installed and takes them.
"""

import time
import types
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from gen_accel.kernels import flash4
from gen_accel.kernels.base import (
    AutoPlace,
    Facts,
    Kernel,
    KernelFailed,
    cpp_compiler,
    facts_of,
)
from gen_accel.kernels.lists import left_packed, split_of_runs, why_too_long
from gen_accel.plan import Plan, Route, pack, unpack

FLASH_SINCE = "2.13"  # torch release in which BACKEND="FLASH" was read
compile_seconds: list[float] = []  # one entry for each compilation of this process

_serial = count()


class Flex(Kernel):
    """FlexAttention, compiled for each plan."""

    def unsupported(self, facts: Facts) -> list[str]:
        reasons = []
        where = facts.device.type
        if where == "cpu" and facts.grad:
            reasons.append("FlexAttention has no backward on the CPU")
        if where == "cpu" and (facts.lse or facts.rest):
            reasons.append("FlexAttention gives no log-sum-exp on the CPU")
        if where == "cpu" and facts.dtype == torch.float64:
            reasons.append("FlexAttention takes no float64 on the CPU")
        if where == "cuda":
            reasons += [
                f"{name} must be a multiple of 16 on CUDA, got {size}"
                for name, size in (("block_q", facts.block_q), ("block_k", facts.block_k))
                if size % 16
            ]
        if where not in ("cpu", "cuda", "xpu"):
            reasons.append(f"FlexAttention has no compiled form on {where}")
        if facts.dynamic:
            reasons.append("it is compiled for a plan, and this one was made for a single call")
        if facts.gain:
            reasons.append("it takes no gain on scores")
        plan = None if facts.plan is None else facts.plan.kept
        if reasons := reasons or why_too_long(plan):
            return reasons
        known = None if plan is None else _compiled(plan).get(_key(facts))
        if known is None and where == "cpu" and cpp_compiler() is None:
            return ["no C++ compiler; see gen-accel doctor"]
        return [known] if isinstance(known, str) else []

    def place(self, facts: Facts) -> AutoPlace:
        if facts.device.type == "cpu":
            return AutoPlace(40, "it has to compile first")
        against = "it compiles for each plan, and takes none of a single call"
        if flash4.serves(facts.device) and (reasons := flash_reasons(facts)):
            against += f"; not by FlashAttention-4: {', '.join(reasons)}"
        return AutoPlace(20, against)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        return unpack(_attend(q, k, v, plan, scale, lse=False), plan)

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute output and log-sum-exp. The wide output is rounded too: FlexAttention writes q's
        dtype."""
        out, aux = _attend(q, k, v, plan, scale, lse=True)
        return unpack(out, plan), unpack(aux.lse[..., None], plan)[..., 0]


kernel = Flex()


def flash_reasons(facts: Facts) -> list[str]:
    """List the reasons why FlexAttention does not use FlashAttention-4; empty where it does."""
    reasons = flash4.reasons(facts)
    if facts.grad and (facts.lse or facts.rest):
        reasons.append("it has no gradient of the log-sum-exp")
    if torch.__version__ < FLASH_SINCE:
        reasons.append(f"torch {FLASH_SINCE} has it, this is {torch.__version__}")
    return reasons


def _compiled(plan: Plan) -> dict[tuple, Callable | str]:
    """Compiled calls of a plan by `_key`, or why one could not be compiled."""
    return plan.prepared(_compiled, dict)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, *, lse: bool) -> Any:
    """Run FlexAttention on slots and return its results."""
    packed = pack(q, plan), pack(k, plan), pack(v, plan)
    if not torch.is_grad_enabled():  # on the CPU FlexAttention looks at `requires_grad` alone
        packed = packed[0].detach(), packed[1].detach(), packed[2].detach()
    mask = _block_mask(plan)
    known, facts = _compiled(plan), facts_of(q, k, v, plan, lse=lse)
    key = _key(facts)
    if callable(kept := known.get(key)):
        return kept(*packed, mask, scale)
    failure: Exception | None = None
    for options in _ways(facts, plan):
        run, start = _fresh(options, lse=lse), time.perf_counter()
        try:
            out = run(*packed, mask, scale)
        except Exception as error:  # a compiler may raise anything
            last = str(error).strip().splitlines() or [type(error).__name__]
            known[key], failure = f"compilation failed: {type(error).__name__}: {last[0]}", error
            continue
        compile_seconds.append(time.perf_counter() - start)
        known[key] = run
        return out
    raise KernelFailed(known[key]) from failure


def _ways(facts: Facts, plan: Plan) -> list[Mapping[str, object]]:
    """List the kernel options to try, one after the other."""
    own = _kernel_options(plan, facts.device)
    return [own] if flash_reasons(facts) else [{"BACKEND": "FLASH"}, own]


def _key(facts: Facts) -> tuple:
    return (*facts.shapes[0], facts.dtype, facts.device, facts.grad, facts.lse or facts.rest)


def _fresh(options: Mapping[str, object], *, lse: bool) -> Callable:
    """Make a compiled call with its own code: Dynamo counts recompilations by code object."""
    run = _call(options, lse=lse)
    code = run.__code__.replace(co_name=f"flex_{next(_serial)}")
    fresh = types.FunctionType(code, run.__globals__, closure=run.__closure__)
    return torch.compile(fresh, dynamic=False, fullgraph=True)


def _call(options: Mapping[str, object], *, lse: bool) -> types.FunctionType:
    aux = AuxRequest(lse=True) if lse else None

    def run(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> object:
        more: Any = {"kernel_options": options, "return_aux": aux}
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, **more)

    return run


def _kernel_options(plan: Plan, device: torch.device) -> Mapping[str, object]:
    """Choose tiles on GPUs, which must divide the plan's blocks, forward and backward."""
    if device.type == "cpu":
        return {}
    query, key = (block & -block for block in (plan.block_q, plan.block_k))  # powers of two
    both = min(query, key, 64)
    backward = dict.fromkeys(("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), both)
    forward = {"BLOCK_M": min(query, 128), "BLOCK_N": min(key, 64)}
    return {f"fwd_{k}": v for k, v in forward.items()} | {
        f"bwd_{k}": v for k, v in backward.items()
    }


def _block_mask(plan: Plan) -> BlockMask:
    return plan.prepared(BlockMask, lambda: _made_mask(plan))


def _made_mask(plan: Plan) -> BlockMask:
    S, blocks, rule = plan.slots.numel(), (plan.block_q, plan.block_k), _mask_mod(plan)
    if plan.runs is not None:
        return BlockMask((S, S), *_lists_of_runs(plan), BLOCK_SIZE=blocks, mask_mod=rule)
    return BlockMask.from_kv_blocks(
        *left_packed(plan.keep & ~plan.whole),
        *left_packed(plan.whole),
        BLOCK_SIZE=blocks,
        mask_mod=rule,
        seq_lengths=(S, S),
    )


def _lists_of_runs(plan: Plan) -> list[Tensor]:
    """Make the eight lists of a `BlockMask`; `from_kv_blocks` would make half of them by a
    mask."""
    rows, columns = split_of_runs(plan)
    if plan.slots.device.type == "cpu":  # where lists must claim to be as wide as the plan
        K = plan.blocks.shape[3]
        masked, whole = (_widened(x, K) for x in (rows.mask_block_idx, rows.full_block_idx))
        rows = rows._replace(mask_block_idx=masked, full_block_idx=whole)
    return [*rows, *columns]


def _widened(index: Tensor, columns: int) -> Tensor:
    """Widen (1, 1, K, most) lists to (1, 1, K, columns): past its end a row runs into the next."""
    K, most = index.shape[2:]
    held = pad(index.flatten(), (0, columns - most))
    return held.as_strided((1, 1, K, columns), (len(held), len(held), most, 1))


def _mask_mod(plan: Plan) -> Callable:
    """Rule inside partial blocks; `real` and the windows are captured as data."""
    real, rule = plan.real, plan.partial
    if rule is None:
        return lambda b, h, i, j: real[j]
    if isinstance(rule, Route):
        picks, group, block = rule.picks, rule.group, rule.block
        each, all_heads = len(picks) > 1, picks.shape[1] == 1

        def by_route(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            sample, head = (b if each else 0), (0 if all_heads else h)
            return real[j] & picks[sample, head, i, group[j // block]]

        return by_route
    axes = list(zip(rule.first, rule.last, rule.place, strict=True))
    free = rule.free

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = real[j]
        for first, last, place in axes:
            inside = inside & (first[i] <= place[j]) & (place[j] <= last[i])
        return inside | (real[j] & (free[i] | free[j]))

    return mask_mod
