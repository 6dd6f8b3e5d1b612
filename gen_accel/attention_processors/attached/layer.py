"""One attention call of a layer that a method was attached to.

`attend` decides what runs: the model's own attention, or the method's, by `computed`.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gen_accel import kernels
from gen_accel.attention_processors import context_parallel
from gen_accel.attention_processors.attached.extension import (
    AttentionExtension,
    active,
    adjusted,
    around,
)
from gen_accel.attention_processors.attached.forward_pass import ForwardPass
from gen_accel.attention_processors.attached.memories import (
    Memories,
    Recalled,
    about_call,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.summary import Record
from gen_accel.attention_processors.attached.watch import Watch
from gen_accel.attention_processors.methods.dense import Dense, Full
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Samples, Tokens, by_text
from gen_accel.kernels.base import Facts
from gen_accel.kernels.dense import faster
from gen_accel.kernels.self_check import SelfCheck
from gen_accel.method import Step, check_method
from gen_accel.plan import Plan
from gen_accel.video import VideoShape


class Layer(NamedTuple):
    """One attention that a method was attached to.

    Args:
        name: for reports.
        number: of its block.
        branch: the method's parameters in this layer.
        changes: the method is another one at other steps.
        tokens, call: see `SelfAttention`.
        is_dense: the method stands for the model's own attention.
        text_split: whether context parallelism splits the text by itself; asked at its calls.
        heads, dim: attention heads, and the dim of one.
    """

    name: str
    number: int
    method: Any
    branch: Any
    tokens: Callable[[Tokens, Call], Tokens] | None = None
    call: int | None = None
    is_dense: bool = False
    changes: bool = False
    text_split: Callable[[], bool] = bool
    heads: int = 0
    dim: int = 0

    def passes_by(self, call: Call) -> bool:
        """Whether a call is not the one over the grid, but another that the processor makes."""
        return self.call is not None and self.call != call.number

    def refuse(self, call: Call) -> None:
        """Raise ValueError for arguments that only the model's own attention takes."""
        raise ValueError(
            f"sparse attention does not take {', '.join(call.refused)} of {self.name}; "
            "attach Dense() or detach for this model"
        )

    def tokens_of(self, tokens: Tokens | None, call: Call) -> Tokens | None:
        """Return the place of the grid in a call; None where the model's grid, `tokens`, is not
        known."""
        if tokens is None or self.tokens is None:
            return tokens
        return self.tokens(tokens, call)


class Observed(NamedTuple):
    """A call of dense attention, as an observer sees it.

    Args:
        q, k, v, dense: (B, H, N, D), and so is the dense output.
        video: grid of the N tokens.
        run: runs a plan on q, k and v.
    """

    layer: Layer
    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    video: VideoShape
    run: Callable


Observer = Callable[[Observed], None]


class Handle(Protocol):
    """The part of an attachment that the calls of its layers read and write.

    Attributes:
        dense_kernel: the kernel of dense calls; None for the model's own attention.
        observe: sees dense attention beside what the method needs, to fit its parameters.
        is_paused: nothing of ours runs.
        is_recording: what runs is counted.
        records: by layer and step.
        checked: what the self-check has seen.
        memories: what the method keeps from step to step; None where it keeps nothing.
        watch: compares some rows of each sparse call with exact ones; None where nothing does.
    """

    schedule: Schedule
    kernel: str
    dense_kernel: str | None
    timed: bool
    self_check: bool | None
    extensions: tuple[AttentionExtension, ...]
    observe: Observer | None
    is_paused: bool
    is_recording: bool
    passing: ForwardPass
    records: dict[tuple[str, int], Record]
    checked: dict[tuple[Hashable, str], str | None]
    memories: Memories | None
    watch: Watch | None


def attend(handle: Handle, layer: Layer, call: Call) -> Tensor:
    """(B, N, H, D) of one call, by the model's own attention or by the method."""
    if handle.is_paused or layer.passes_by(call):
        return call.stock()
    why, passing = why_dense(handle, layer), handle.passing
    if passing.refusal is not None and (why is None or handle.extensions):
        raise passing.refusal
    tokens = layer.tokens_of(passing.clock.tokens, call)
    if tokens is not None and call.parallel is not None:
        plain = why is not None and runs_stock(handle, call, tokens)
        right = plain and context_parallel.stock_is_right(call, tokens)
        if not right or learns_at(handle, layer):
            return over_processes(handle, layer, call, tokens, partial(attend, handle, layer))
    recalled = recall(handle, layer, call, tokens, why)
    why = why or (None if recalled is None else recalled.why)
    # A dense call need not know the grid.
    own = tokens is None or (why is not None and runs_stock(handle, call, tokens))
    record = handle.records.get((layer.name, passing.clock.step)) or Record()
    with timed(handle, record, call.q):
        if tokens is None or own:
            out = call.stock()
            at = why if tokens is not None else f"{why}, at a grid that is not known"
            record.add(context_parallel.counted_shape(call), why=at)
            if tokens is not None and recalled is not None and recalled.learns:
                learn(handle, layer, call, tokens, out, recalled)
        elif handle.observe is not None:
            out = _observed(handle, handle.observe, layer, call, tokens)
            record.add(call.q.shape, why="observed")
        else:
            counted = record if handle.is_recording else None
            out = computed(handle, layer, call, tokens, why=why, recalled=recalled, record=counted)
    keep(handle, layer, record, recalled)  # not before the call has succeeded
    return out


def keep(handle: Handle, layer: Layer, record: Record | None, recalled: Recalled | None) -> None:
    """Keep a layer's counts at the step under way, and what the layer learned."""
    if recalled is not None and handle.memories is not None:
        handle.memories.keep(layer.name, recalled)
    if record is not None and handle.is_recording:
        record.learned += recalled is not None and recalled.learns
        handle.records[layer.name, handle.passing.clock.step] = record


@contextmanager
def timed(handle: Handle, record: Record, like: Tensor) -> Iterator[None]:
    """Add the seconds spent inside, on the device of `like`, to a record where the handle is
    timed."""
    if not handle.timed:
        yield
        return
    start = _now(like)
    yield
    record.seconds = (record.seconds or 0.0) + _now(like) - start


def why_dense(handle: Handle, layer: Layer) -> str | None:
    """Say why a layer is dense at the step under way; None where its method runs."""
    if layer.is_dense:
        return "method is dense"
    why = handle.schedule.why_layer(layer.number) or handle.passing.dense_step
    if why is None and layer.changes and method_now(handle, layer).is_dense:
        return "dense by its rules"
    return why


def method_now(handle: Handle, layer: Layer) -> Any:
    """Return a layer's method at the step under way."""
    if not layer.changes:
        return layer.method
    passing = handle.passing
    step = passing.clock.step
    method = layer.method.at(Step(step, passing.clock.steps, passing.progress))
    check_method(method)
    if handle.watch is None:
        return method
    return handle.watch.method(layer.name, layer.number, step, method, layer.heads)


def runs_stock(handle: Handle, call: Call, tokens: Tokens) -> bool:
    """Whether the model's own attention runs a dense call over a grid."""
    return not active(handle.extensions, tokens.video) and dense_kernel_of(handle, call) is None


def dense_kernel_of(handle: Handle, call: Call) -> str | None:
    """The kernel that a dense call runs by; None for the model's own attention."""
    named = None if handle.observe is not None else handle.dense_kernel
    if named != "auto":
        return named
    return None if call.refused else _faster(call.q.device, call.q.dtype, call.q.shape[3])


@torch.compiler.assume_constant_result
def _faster(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    shape = 1, 1, 128, dim
    return faster(Facts((shape,) * 3, (dtype,) * 3, (device,) * 3, block_q=128, block_k=128))


def learns_at(handle: Handle, layer: Layer) -> bool:
    """Whether a layer learns at a dense step of the schedule that is under way."""
    always = layer.is_dense or handle.schedule.why_layer(layer.number) is not None
    return not always and handle.memories is not None and handle.memories.learns


def recall(
    handle: Handle, layer: Layer, call: Call, tokens: Tokens | None, why: str | None
) -> Recalled | None:
    """Return the memory of a call; None where nothing is remembered, or nothing is asked.

    Args:
        why: the schedule keeps the call dense.

    Raises:
        ValueError: a gradient is asked for, and the method cannot do without its memory.
    """
    if handle.memories is None or tokens is None or handle.observe is not None:
        return None
    if why is not None and not handle.memories.learns:
        return None  # before a mask is read, which may be one that no method takes
    empty = None if layer.is_dense else layer.method.step_state()
    if empty is None or handle.schedule.why_layer(layer.number) is not None:
        return None
    if call.trains or (torch.is_grad_enabled() and call.q.requires_grad):
        if empty.refuses_training and why is None:
            raise ValueError(f"{type(layer.method).__name__}: {empty.refuses_training}")
        return None
    about = about_call(call, tokens, _by_text(handle, layer, call, tokens))
    return handle.memories.recall(layer.name, empty.every, about, why is not None)


def learn(
    handle: Handle, layer: Layer, call: Call, tokens: Tokens, out: Tensor, recalled: Recalled
) -> None:
    """Learn from the output of the model's own attention, (B, N, H, D)."""
    check(layer, call, tokens)
    whole = tokens.complete(call.q), call.k, call.v, tokens.complete(out)
    for some in _by_text(handle, layer, call, tokens):
        q, k, v, dense = (some.of(x) for x in whole)
        method = _within(handle, layer, some.video)
        kernel = runner(handle, method, call, some.video, handle.kernel)
        recalled.learn(method, q, k, v, dense, video=some.video, kernel=kernel)


def over_processes(
    handle: Handle,
    layer: Layer,
    call: Call,
    tokens: Tokens,
    attend: Callable[[Call], Tensor],
) -> Tensor:
    """Run `attend` on all tokens and this process's heads, in context parallelism."""
    if handle.observe is not None:
        raise ValueError(
            "each process of context parallelism sees some heads alone, which nothing can be "
            "fitted to; calibrate before enable_parallelism"
        )
    sparse = why_dense(handle, layer) is None or learns_at(handle, layer)
    method = layer.method if sparse else None
    options = {"method": method, "text_split": layer.text_split()}
    return context_parallel.exchanged(call, tokens, attend, **options)


def computed(
    handle: Handle,
    layer: Layer,
    call: Call,
    tokens: Tokens,
    *,
    why: str | None = None,
    recalled: Recalled | None = None,
    record: Record | None = None,
) -> Tensor:
    """(B, N, H, D) of the method, by a kernel.

    Args:
        why: the reason why the call is dense. It runs as full attention through a plan, so that
            techniques for longer video hold, or by the kernel for dense calls.
        recalled: the memory of the method; without, the method has none in this call.
        record: counts what ran.
    """
    check(layer, call, tokens)
    remembers = recalled is not None and (why is None or recalled.learns)
    name = handle.kernel if why is None else dense_kernel_of(handle, call) or handle.kernel
    if why is not None and not remembers:
        method = Full() if active(handle.extensions, tokens.video) else Dense()
        layer = layer._replace(method=method, branch=None, changes=False)
    trained = {}
    if layer.branch is not None:
        branch = on_device(layer.branch, call.q.device)
        trained["branch"] = context_parallel.of_heads(branch, call.heads)
    chosen: list[kernels.Choice] = []
    plans: list[tuple[Plan, int]] = []

    def planned(plan: Plan, heads: int) -> None:
        plans.append((plan, heads))

    def by_method(q: Tensor, k: Tensor, v: Tensor, video: VideoShape) -> Tensor:
        def runner_of(method: Any, *, counted: bool = True) -> kernels.Runner:
            by = name if method.is_dense else handle.kernel
            if not counted:
                return runner(handle, method, call, video, by)
            return runner(handle, method, call, video, by, chosen.append, planned)

        method = _within(handle, layer, video)
        if call.heads is not None:
            method = method.for_heads(call.heads)
        if recalled is not None and remembers:
            return recalled.attend(method, q, k, v, video=video, runner=runner_of)
        return method(q, k, v, video=video, kernel=runner_of(layer.method), **trained)

    def whole(q: Tensor, k: Tensor, v: Tensor, video: VideoShape) -> Tensor:
        plans.clear()
        out = around(by_method, handle.extensions, video)(q, k, v, video)
        if why is None and handle.watch is not None:
            watched(handle, handle.watch, layer, call, q, k, v, out, video)
        if record is not None:
            choice = chosen[-1] if chosen else None  # a method may do without a kernel
            B, H, N, D = q.shape
            record.add((B, N, H, D), why=why, choice=choice, plans=plans)
        return out

    return _joined(handle, layer, call, tokens, whole)


def watched(
    handle: Handle,
    watch: Watch,
    layer: Layer,
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    video: VideoShape,
) -> None:
    """Let the watch look at a call of the method, unless a technique for longer video changed
    what is exact."""
    step = handle.passing.clock.step
    if active(handle.extensions, video) or not watch.looks(layer.name, step):
        return
    first = 0 if call.heads is None else call.heads.start
    about = layer.name, layer.number, step, method_now(handle, layer)
    watch.look(*about, q, k, v, out, scale=call.scale, first=first)


def runner(
    handle: Handle,
    method: Any,
    call: Call,
    video: VideoShape,
    kernel: str,
    chosen: Callable[[kernels.Choice], None] | None = None,
    planned: Callable[[Plan, int], None] | None = None,
) -> kernels.Runner:
    """Runner of a method's plans in a call, over a grid that may be a part of its own.

    Args:
        kernel: the name of the one that runs, or "auto".
        chosen: is told the kernel of each run.
        planned: is told the plan of each run, and how many heads it was for.
    """
    clock, extensions = handle.passing.clock, handle.extensions

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        plan = adjusted(plan, extensions, video, clock.step, clock.steps)
        options: dict[str, Any] = {"scale": call.scale, "kernel": kernel}
        options["grad"] = True if call.trains else None
        options["self_check"] = _self_check(handle, kernel, method, q, plan)
        out = kernels.run(q, k, v, plan, **options, report=chosen)
        if planned is not None:
            planned(plan, q.shape[1])
        return out

    return kernels.Runner(run, kernel, call.scale)


def _within(handle: Handle, layer: Layer, video: VideoShape) -> Any:
    """Return a layer's method at the step under way, fitted to the smaller grids on the levels of
    a UNet."""
    method, tokens = method_now(handle, layer), handle.passing.clock.tokens
    return method if tokens is None else method.within(video, tokens.video)


def check(layer: Layer, call: Call, tokens: Tokens) -> None:
    """Raise ValueError for a call that a method cannot replace."""
    q, k, video = call.q.shape[1], call.k.shape[1], tokens.video
    if k != video.tokens or q not in (k, k - tokens.before, video.video_tokens):
        raise ValueError(
            f"attention of {layer.name} runs over {k} tokens, the latents make {video}: a size "
            "that the model's patches do not divide, or a model that this family does not describe"
        )
    if call.refused:
        layer.refuse(call)


def _observed(
    handle: Handle, observe: Observer, layer: Layer, call: Call, tokens: Tokens
) -> Tensor:
    check(layer, call, tokens)
    out = call.stock()
    plain = partial(kernels.run, scale=call.scale, kernel=handle.kernel)
    run = kernels.Runner(plain, handle.kernel, call.scale)
    for some in _by_text(handle, layer, call, tokens):
        whole = tokens.complete(call.q), call.k, call.v, tokens.complete(out)
        q, k, v, dense = (some.of(x) for x in whole)
        observe(Observed(layer, q, k, v, dense, some.video, run))
    return out


def _joined(handle: Handle, layer: Layer, call: Call, tokens: Tokens, attend: Callable) -> Tensor:
    """Compute (B, N, H, D) by `attend(q, k, v, video)` without the padding of texts. Nothing sees
    the padding, and its own output is zero."""
    whole = tokens.complete(call.q), call.k, call.v
    groups = _by_text(handle, layer, call, tokens)
    outs = [
        some.back(attend(*(some.of(x) for x in whole), some.video), call.k.shape[1])
        for some in groups
    ]
    out = outs[0]
    if len(groups) > 1:
        order = [row for some in groups for row in some.rows]
        out = torch.cat(outs)[[order.index(row) for row in range(len(order))]]
    if call.q.shape[1] < out.shape[1]:
        out = out[:, tokens.before : tokens.before + call.q.shape[1]]
    return out


def _by_text(handle: Handle, layer: Layer, call: Call, tokens: Tokens) -> Sequence[Samples]:
    seen = None
    if call.mask is not None:
        seen = handle.passing.seen(layer.name, call.mask, call.q, tokens)
    return by_text(tokens, len(call.q), seen, call.q.device)


def _self_check(
    handle: Handle, kernel: str, method: Any, q: Tensor, plan: Plan
) -> SelfCheck | None:
    """Self-check of a method's call on q, (B, H, N, D); None where no check is wanted."""
    # Not on the CPU, where the tests ran, nor on MPS, which has no fp64 to check with.
    by_default = q.device.type not in ("cpu", "mps")
    if not (by_default if handle.self_check is None else handle.self_check):
        return None
    about = (method, q.shape, q.dtype, q.device, plan.gain is None)
    return SelfCheck(handle.checked, about, kernel == "auto" and q.device.type != "cpu")


def _now(x: Tensor) -> float:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter()


def on_device(branch: nn.Module, device: torch.device) -> nn.Module:
    """Move the parameters of a layer to `device`. Offloading moves only what it found on a model;
    a branch that came later is moved here."""
    return branch if is_offloaded(branch) else branch.to(device)


def is_offloaded(branch: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in branch.parameters())
