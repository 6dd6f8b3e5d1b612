"""Context parallelism: each process holds some of the tokens, and attends for some of the heads.

diffusers shards the sequence over processes. A method needs the whole sequence, but no head needs
another, so an all-to-all before sparse attention trades shards of the sequence for shards of the
heads, and one after it trades back. Both are diffusers' own. Where video and text are sharded
apart, tokens arrive process by process and are put in the model's order here. Text that every
process holds is counted once.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.families.sites import Model, SplitPlan
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.method import Method


class Stream(NamedTuple):
    """Tokens that follow each other in the model's order.

    Args:
        split: whether they are sharded over the processes; else each process holds all.
    """

    tokens: int
    split: bool

    def part(self, degree: int, rank: int) -> range:
        """Range of the tokens of process `rank` of `degree`. The first processes take one more
        where the split is uneven."""
        if not self.split:
            return range(self.tokens)
        size, rest = divmod(self.tokens, degree)
        start = rank * size + min(rank, rest)
        return range(start, start + size + (rank < rest))


def exchanged(
    call: Call,
    tokens: Tokens,
    attend: Callable[[Call], Tensor],
    *,
    method: Method | None,
    text_split: bool,
) -> Tensor:
    """Run `attend` on all tokens and this process's share of the heads, between two all-to-alls.
    Returns (B, n, H, D).

    Args:
        call: the call over the n tokens that this process holds.
        tokens: of all processes.
        attend: gets the call over all tokens, in the model's order, with no parallel config.
        method: the method that runs; None for the model's own attention.
        text_split: see `splits_text`.

    Raises:
        ValueError: a way of splitting that the method does not support, or tokens that are not
            such a split.
    """
    parallel = call.parallel
    assert parallel is not None
    config = parallel.config
    n, heads = call.q.shape[1:3]
    _check(call, config, method)
    streams = _streams(call, config, tokens, text_split)
    order, held = _orders(streams, config.ulysses_degree, str(call.q.device))
    whole = partial(_to_heads, config=config, order=order)
    q, k, v = (whole(x) for x in (call.q, call.k, call.v))
    mask = call.mask
    if mask is not None and mask.shape[-1] == n and mask.numel() == len(mask) * n:
        mask = _whole_mask(mask, call.q.dtype, config.ulysses_degree, whole)
    grid = 1 if tokens.before and len(streams) > 1 else 0
    gate = None if call.gate is None else _completed(call.gate, streams, config, grid)
    latents = streams[grid].tokens
    share = -(-heads // config.ulysses_degree)
    first = share * config._ulysses_local_rank
    whole_call = call._replace(
        q=q,
        k=k,
        v=v,
        mask=mask,
        stock=lambda: parallel.alone(q, k, v, mask),
        tokens=tokens.video.tokens if call.tokens == n else latents,
        parallel=None,
        hidden_states=None,
        heads=slice(first, min(first + share, heads)),
        gate=None if gate is None else whole(gate),
    )
    out = attend(whole_call)
    if held is not None:
        out = out.index_select(1, held)
    return _to_tokens(out, config, n, heads)


def _completed(gate: Tensor, streams: Sequence[Stream], config: Any, grid: int) -> Tensor:
    """Pad the gate of a process, of the grid's stream or its neighbours too, to its tokens."""
    degree, rank = config.ulysses_degree, config._ulysses_local_rank
    held = [len(stream.part(degree, rank)) for stream in streams]
    for first in range(grid, -1, -1):
        for last in range(grid + 1, len(held) + 1):
            if sum(held[first:last]) == gate.shape[1]:
                return F.pad(gate, (0, 0, 0, 0, sum(held[:first]), sum(held[last:])))
    raise ValueError(
        f"context parallelism gives a process {sum(held)} tokens, and hidden states of "
        f"{gate.shape[1]} for the gate: use a method without one for this model"
    )


def splits_text(transformer: nn.Module) -> bool:
    """Whether text is sharded apart from the video, as the second stream of a model, by the hooks
    that `enable_parallelism` left, since it keeps no plan."""
    return any(
        "encoder_hidden_states" in getattr(hook, "metadata", ())
        for module in transformer.modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks.values()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    )


def context_parallel_plan(transformer: Model) -> SplitPlan:
    """Return the model's own plan of context parallelism, or ours where diffusers has none:

        plan = context_parallel_plan(pipe.transformer)
        pipe.transformer.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=2), cp_plan=plan
        )

    HunyuanVideo's needs a method attached, be it `Dense()`: the model's own attention raises.

    Raises:
        ValueError: a model that cannot be split so, with the reason.
    """
    family = family_of(transformer)
    name = type(transformer).__name__
    processors = [site.module.processor for site in family.self_attentions(transformer)]
    if not all(hasattr(processor, "_parallel_config") for processor in processors):
        reason = "its attention in diffusers sees the tokens of one process only"
        raise ValueError(f"no plan of context parallelism for {name}: {reason}")
    try:
        plan = family.context_parallel(transformer) or transformer._cp_plan
    except ValueError as error:
        raise ValueError(f"no plan of context parallelism for {name}: {error}") from None
    if plan is None:
        raise ValueError(
            f"no plan of context parallelism for {name}: diffusers has none, and nor do we"
        )
    # diffusers' own for Helios names 40 blocks, however many there are.
    modules = dict(transformer.named_modules())
    return {path: part for path, part in plan.items() if "*" in path or path in modules}


def degree_of(transformer: object) -> int:
    """Number of processes that the heads of a model are spread over."""
    config = getattr(transformer, "_parallel_config", None)  # put there by enable_parallelism
    split = None if config is None else config.context_parallel_config
    return 1 if split is None else split.ulysses_degree


def stock_is_right(call: Call, tokens: Tokens) -> bool:
    """Whether diffusers' own all-to-all is right for the model's own attention. It does not
    reorder tokens: text that each process holds would count once for each, and a mask of all
    tokens would hide the wrong ones."""
    if call.parallel is None or not tokens.video.text:
        return True
    n, config = call.k.shape[1], call.parallel.config
    if call.mask is not None and call.mask.shape[-1] != n:
        return False
    return n != _held(_text_everywhere(tokens), config)


def of_heads(branch: Any, heads: slice | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Restrict the branch of a method with parameters to some heads of a layer; None for all."""
    if heads is None or branch.alpha is None:
        return branch
    return lambda *outs: functional_call(branch, {"alpha": branch.alpha[heads]}, outs)


def counted_shape(call: Call) -> tuple[int, int, int, int]:
    """Shape (B, N, H, D) that this process computes in a call: all tokens, some heads."""
    B, n, H, D = call.q.shape
    if call.parallel is None:
        return B, n, H, D
    config = call.parallel.config
    degree = config.ulysses_degree * config.ring_degree
    return B, n * degree, -(-H // degree), D


def _check(call: Call, config: Any, method: Method | None) -> None:
    degree, heads = config.ulysses_degree, call.q.shape[2]
    reasons = []
    if config.ring_degree > 1:
        reasons.append(
            f"ring_degree={config.ring_degree}, with which no process sees all keys at once: use "
            "ulysses_degree"
        )
    if heads % degree and not config.ulysses_anything:
        reasons.append(
            f"ulysses_degree={degree}, which does not divide {heads} heads: use one that does, "
            "or ulysses_anything=True"
        )
    if config.ulysses_anything and torch.is_grad_enabled() and call.q.requires_grad:
        reasons.append(
            "ulysses_anything=True in training, as its exchange has no gradient: use sizes that "
            "ulysses_degree divides"
        )
    if method is not None and method.needs_all_heads:
        reasons.append(method.needs_all_heads)
    if reasons:
        raise ValueError(f"context parallelism does not take {'; nor '.join(reasons)}")


def _streams(call: Call, config: Any, tokens: Tokens, text_split: bool) -> tuple[Stream, ...]:
    """Return how the tokens of a call are sharded over the processes."""
    N, before = tokens.video.tokens, tokens.before
    streams = (Stream(N, True),)
    if text_split and tokens.video.text:
        first = before or tokens.video.video_tokens
        streams = Stream(first, True), Stream(N - first, True)
    n = call.k.shape[1]
    for option in (streams, _text_everywhere(tokens)):
        if call.q.shape[1] == n == _held(option, config):
            return option
    raise ValueError(
        f"context parallelism gives a process {call.q.shape[1]} queries and {n} keys of the "
        f"{N} tokens of {tokens.video}, by a split that is not known here; use the cp_plan "
        "of gen_accel.attention_processors.context_parallel.context_parallel_plan"
    )


def _text_everywhere(tokens: Tokens) -> tuple[Stream, ...]:
    """Return streams with the grid sharded, and all other tokens in each process."""
    video, before = tokens.video, tokens.before
    parts = (before, False), (video.video_tokens, True), (video.text - before, False)
    return tuple(Stream(tokens, split) for tokens, split in parts if tokens)


def _held(streams: Sequence[Stream], config: Any) -> int:
    """Number of tokens that this process holds."""
    degree, rank = config.ulysses_degree, config._ulysses_local_rank
    return sum(len(stream.part(degree, rank)) for stream in streams)


@lru_cache(maxsize=32)
@torch.compiler.assume_constant_result
@torch.inference_mode(False)  # made while sampling, it must serve training too
def _orders(
    streams: tuple[Stream, ...], degree: int, device: str
) -> tuple[Tensor | None, Tensor | None]:
    """Orders between the model's tokens and the tokens as they arrive from the all-to-all: for
    each token the first place where it arrives, and for each place its token. None if both are
    the same."""
    *starts, total = accumulate((stream.tokens for stream in streams), initial=0)
    parts = [
        (start, stream.part(degree, rank))
        for rank in range(degree)
        for start, stream in zip(starts, streams, strict=True)
    ]
    held = torch.cat([start + torch.arange(part.start, part.stop) for start, part in parts])
    if torch.equal(held, torch.arange(total)):
        return None, None
    order = held.argsort(stable=True)
    is_first = held[order].diff(prepend=held.new_tensor([-1])) > 0
    return order[is_first].to(device), held.to(device)


def _whole_mask(mask: Tensor, dtype: torch.dtype, degree: int, whole: Callable) -> Tensor:
    """Gather the mask of all keys, (..., N), from (..., n), on the way that the keys take."""
    # As many heads as there are processes.
    rows = mask.reshape(len(mask), -1, 1, 1).expand(-1, -1, degree, -1)
    rows = whole(rows.to(dtype))[:, :, 0, 0]
    rows = rows.view(*mask.shape[:-1], -1)
    return rows != 0 if mask.dtype == torch.bool else rows


def _to_heads(x: Tensor, config: Any, order: Tensor | None) -> Tensor:
    """Trade shards of the sequence for heads, (B, n, H, D) to (B, all tokens, heads, D)."""
    from diffusers.models import attention_dispatch

    group = config._ulysses_mesh.get_group()
    if config.ulysses_anything:
        x = attention_dispatch.all_to_all_single_any_qkv_async(x, group)()
    else:
        x = attention_dispatch.SeqAllToAllDim.apply(group, x, 2, 1)
    return x if order is None else x.index_select(1, order)


def _to_tokens(x: Tensor, config: Any, n: int, heads: int) -> Tensor:
    """Trade heads for shards of the sequence, back to (B, n, H, D)."""
    from diffusers.models import attention_dispatch

    group = config._ulysses_mesh.get_group()
    if config.ulysses_anything:
        sizes = {"NUM_QO_HEAD": heads, "Q_S_LOCAL": n}
        return attention_dispatch.all_to_all_single_any_o_async(x, group, **sizes)()
    return attention_dispatch.SeqAllToAllDim.apply(group, x, 1, 2)
