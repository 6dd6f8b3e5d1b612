"""The attention of a layer in a graph of torch.compile: one operator, for any size.

A graph holds q, k, v and the place of the layer. The grid, the plan, the kernel and the record are
looked up when it runs, by the same code as without a graph. One graph therefore serves every size
and every length of text, and layers that are alike share it.

The backward pass computes the attention again, as gradient checkpointing does, because tensors
that kernels save for it cannot leave the operator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_accel import kernels
from gen_accel.attention_processors import context_parallel
from gen_accel.attention_processors.attached.layer import Layer, Shared, active, gated, no_graph
from gen_accel.attention_processors.seam import (
    Call,
    SparseProcessor,
    TrainableProcessor,
    processor_at,
)
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape


def attend_in_graph(layer: Layer, processor: SparseProcessor, call: Call) -> Tensor:
    """(B, N, H, D) of one call, as it is traced: the model's own attention or the operator.

    Args:
        layer: the first of the layers that share the graph, which are all dense or none, have
            parameters or none, and attend over the grid in the same call.
        processor: the one that runs.
    """
    handle = layer.handle
    other = layer.call is not None and layer.call != call.number
    if handle.is_paused or processor.has_ended or other:
        return call.stock()
    always = layer.is_dense or handle.schedule.why_layer(layer.number) is not None
    dense, plain = always or handle.passing.is_dense, call.parallel is None
    by_kernel = layer.dense_by(call) is not None
    # By `layer`, a graph would find the parameters of the first layer in all others.
    branch = processor.branch if isinstance(processor, TrainableProcessor) else None
    if branch is not None and call.hidden_states is not None and not dense:
        call = gated(call, branch)
    if dense and plain and not handle.extensions:
        if not (by_kernel and handle.passing.knows_grid):
            return call.stock()
    elif dense or not plain:  # the grid decides, and is a constant of the graph
        tokens = processor.layer.tokens_of(call)
        if tokens is None:
            return call.stock()
        own = dense and not active(handle.extensions, tokens.video) and not by_kernel
        if own and context_parallel.stock_is_right(call, tokens):
            return call.stock()
        if not plain:
            inside = partial(attend_in_graph, layer, processor)
            return layer.over_processes(call, tokens, inside)
    if call.refused:
        layer.refuse(call)
    parameters = [] if call.gate is None else [call.gate]
    if branch is not None and not layer.is_gated:
        parameters = list(branch.parameters())
    heads = [] if call.heads is None else [call.heads.start, call.heads.stop]
    at = [call.number, call.tokens, *heads]
    q, k, v = kernels.as_autocast(call.q, call.k, call.v)
    device = q.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *parameters))
    where = processor.place, parameters, call.scale, at, _grid(handle)
    return _attend(q, k, v, call.mask, *where, autocast, trains)


def _grid(handle: Shared) -> list[int]:
    """Grid that is traced with a model that is one graph: frames, height, width, text, tokens
    before the grid, frames without queries, frames of a causal block, and the text tokens of each
    sample. Empty otherwise: the pass was read before the graph began."""
    passing = handle.passing
    if not passing.is_one_graph or passing.clock.tokens is None:
        return []
    video, *places = passing.clock.tokens
    assert not video.parts, "which are read outside of graphs"
    return [*video.grid, video.text, *places, *(passing.clock.texts or ())]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    place: Tensor,
    parameters: list[Tensor],
    scale: float,
    at: list[int],
    grid: list[int],
    autocast: torch.dtype | None,
    trains: bool,
) -> Tensor:
    """Compute (B, N, H, D) from q, k, v of that shape. Other arguments are as in `Call`.

    Args:
        parameters: of the layer, so that they get gradients; of a layer with a gate what it
            gives, (B, N, H, D), if it is used.
        at: `number` and `tokens` of the call, and the first and the end of some heads.
        grid: see `_grid`.
        autocast: its dtype while the graph was traced; None if it was off. Operators run
            without it.
    """
    layer = processor_at(place).layer
    gate = parameters[0] if layer.is_gated and parameters else None
    call = _call(q, k, v, mask, scale, at)._replace(trains=trains, gate=gate)
    with _as_traced(q, autocast):
        out = _run(layer, call, grid, recorded=True).contiguous()
    given = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in given else out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    place: Tensor,
    parameters: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    """Compute the gradients of q, k, v and the parameters; arguments as in `_forward`."""
    scale, at, grid, autocast, _ = rest
    with _autograd(), _as_traced(q, autocast):
        q, k, v = inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        layer = processor_at(place).layer
        call, trained = _call(q, k, v, mask, scale, at), []
        if layer.is_gated:
            trained = [x.detach().requires_grad_() for x in parameters]
            call = call._replace(gate=trained[0] if trained else None)
        elif layer.branch is not None:
            trained = [*layer.branch.parameters()]
        out = _run(layer, call, grid, recorded=False)
        wanted = [x for x in (*inputs, *trained) if x.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    grads = [next(found) if x.requires_grad else None for x in (*inputs, *trained)]
    return [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if one is None
        else one.contiguous()
        for x, one in zip((q, k, v, *parameters), grads, strict=True)
    ]


def _operator(name: str, function: Callable, schema: str) -> torch.library.CustomOpDef:
    # CUDA graphs leave it out: they would replay the plan of another grid.
    tags = (torch.Tag.cudagraph_unsafe,)
    return torch.library.custom_op(name, function, mutates_args=(), schema=schema, tags=tags)


SCHEMA = torch.library.infer_schema(_forward, mutates_args=())
_attend = _operator("gen_accel::attend", _forward, SCHEMA)
_attend_backward = _operator(
    "gen_accel::attend_backward",
    _backward,
    SCHEMA.replace("(", "(Tensor grad, ", 1).replace("-> Tensor", "-> Tensor[]"),
)
_attend.register_fake(lambda q, *rest: q.new_empty(q.shape))
_attend_backward.register_fake(
    lambda grad, q, k, v, mask, place, parameters, *rest: [
        x.new_empty(x.shape) for x in (q, k, v, *parameters)
    ]
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, k, v, mask, place, parameters, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, mask, place, *parameters)


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    q, k, v, mask, place, *parameters = ctx.saved_tensors
    grads = _attend_backward(grad, q, k, v, mask, place, parameters, *ctx.rest)
    none = ([] if isinstance(x, list) and not x else None for x in ctx.rest)  # as torch has it
    return (*grads[:3], None, None, grads[3:], *none)


_attend.register_autograd(_differentiate, setup_context=_save)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, at: list[int]
) -> Call:
    """Return the call as the processor made it."""

    def stock() -> Tensor:
        raise AssertionError("in a graph the model's own attention is none of the operator's")

    number, tokens, *heads = at
    some = slice(*heads) if heads else None
    return Call(q, k, v, scale, stock, [], mask, tokens, number, heads=some)


def _run(layer: Layer, call: Call, grid: list[int], *, recorded: bool) -> Tensor:
    """Run `Layer.compute`, with the refusals that a graph would swallow."""
    handle, passing = layer.handle, layer.handle.passing
    if grid:  # of the graph under way; what the pass holds are symbols
        frames, rows, columns, text, before, past, causal, *texts = grid
        video = VideoShape(frames, rows, columns, text)
        passing.clock.tokens = Tokens(video, before, past, causal)
        passing.clock.texts = tuple(texts) or None
    if passing.refusal is not None:
        raise passing.refusal
    if not layer.method.defines("plan"):
        raise ValueError(
            f"{type(layer.method).__name__} has no plan(video, device), without which no graph "
            "can run it; use the model uncompiled"
        )
    for extension in handle.extensions:
        if extension.needs_step:
            raise ValueError(no_graph(extension) + "; use the model uncompiled")
    tokens = layer.tokens_of(call)
    assert tokens is not None
    why = layer.why_dense()
    state = layer.state_of(call, tokens, why)
    if why is None and state is not None:
        why = state.why
    # One graph tells no step from another.
    with layer.recording(call.q, state, recorded and handle.record and not grid) as record:
        return layer.compute(call, tokens, why, state, record)


def _as_traced(q: Tensor, autocast: torch.dtype | None) -> torch.autocast:
    """Restore autocast as it was when the graph was traced."""
    return torch.autocast(q.device.type, dtype=autocast, enabled=autocast is not None)


@contextmanager
def _autograd() -> Iterator[None]:
    """Switch autograd on inside of an operator, whose body runs below it."""
    keys: Any = torch._C
    left_out = keys._dispatch_tls_local_exclude_set()
    for backend in ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1", "Other"):
        left_out = left_out.remove(getattr(keys.DispatchKey, f"Autograd{backend}"))
    left_out = left_out.remove(keys.DispatchKey.ADInplaceOrView)
    taken_in = keys._dispatch_tls_local_include_set()
    with keys._ForceDispatchKeyGuard(taken_in, left_out), torch.enable_grad():
        yield
