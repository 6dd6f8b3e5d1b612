"""One attention call of a layer that a method was attached to.

`Layer.attend` decides what runs: the model's own attention, or the method's, by `compute`.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakTensorKeyDictionary

from gen_accel import kernels
from gen_accel.attention_processors import context_parallel
from gen_accel.attention_processors.attached.clock import ForwardPass
from gen_accel.attention_processors.attached.records import Record, Watch
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.step_state import StateHandle, StepStates
from gen_accel.attention_processors.methods.dense import Dense, Full
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Samples, Tokens, by_text, together
from gen_accel.kernels.self_check import SelfCheck
from gen_accel.method import Method, Step, check_method, is_silent
from gen_accel.plan import Plan
from gen_accel.video import VideoShape


@dataclass(frozen=True, eq=False)
class AttentionExtension:
    """A technique laid over every attached method. Calls that a schedule keeps dense run as full
    attention through a plan, so that the technique holds there too.

    Args:
        trained: frames after patchify; nothing is changed on a grid that is not longer.
        adjust: returns the plan to use instead, of a plan, its grid, the denoising step from 0,
            and how many there are if that is known. Called in graphs of torch.compile too.
        around: computes an attention, (B, H, N, D), of `attend(q, k, v, video)`, q, k, v and
            video, by calling `attend` on grids of its own choice.
        needs_step: `adjust` differs from step to step, so that it cannot run in a graph.
        whole: `around` takes all samples of the batch at once, with the padding of their texts;
            see `MethodRun.texts`.
    """

    name: str
    trained: int
    adjust: Callable[[Plan, VideoShape, int, int | None], Plan] | None = None
    around: Callable[..., Tensor] | None = None
    needs_step: bool = False
    whole: bool = False


def active(
    extensions: Sequence[AttentionExtension], video: VideoShape
) -> list[AttentionExtension]:
    """List the extensions that change something on a grid."""
    return [one for one in extensions if video.frames > one.trained]


def adjusted(
    plan: Plan,
    extensions: Sequence[AttentionExtension],
    video: VideoShape,
    step: int,
    steps: int | None,
) -> Plan:
    """Adjust a plan by all active extensions, one after the other."""
    for extension in active(extensions, video):
        if extension.adjust is not None:
            plan = extension.adjust(plan, video, step, steps)
    return plan


def no_graph(extension: AttentionExtension) -> str:
    """Say why an extension with `needs_step` does not work with torch.compile."""
    return f"{extension.name} differs from step to step, which a graph of torch.compile cannot"


@dataclass(eq=False)
class Shared:
    """State that the calls of all layers of an attachment read and write. The fields from
    `schedule` to `watch` are options of `gen_accel.attach`.

    Args:
        observe: sees dense attention beside what the method needs, to fit its parameters.
        extensions: techniques for longer video, laid over the attention of all layers.
        is_paused: nothing of ours runs.
        records: by layer and step.
        checked: what the self-check has seen.
    """

    method: Method
    passing: ForwardPass
    schedule: Schedule
    kernel: str = "auto"
    dense_kernel: str | None = None
    timed: bool = False
    self_check: bool | None = None
    record: bool = True
    watch: bool = False
    observe: "Observer | None" = None
    extensions: tuple[AttentionExtension, ...] = ()
    is_paused: bool = False
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    checked: dict[tuple[Hashable, str], str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watcher = Watch() if self.watch else None
        self.states = StepStates() if self.method.defines("step_state") else None


@dataclass(eq=False)
class Layer:
    """One attention that a method was attached to.

    Args:
        name: for reports.
        number: of its block.
        heads, dim: attention heads, and the dim of one.
        branch: the method's parameters in this layer: its branch, or its gate.
        tokens, call: see `SelfAttention`.
        text_split: whether context parallelism splits the text by itself; asked at its calls.
    """

    handle: Shared
    name: str
    number: int
    method: Method
    heads: int
    dim: int
    branch: nn.Module | None = None
    tokens: Callable[[Tokens, Call], Tokens] | None = None
    call: int | None = None
    text_split: Callable[[], bool] = bool

    def __post_init__(self) -> None:
        self._heard: tuple[object, bool] = None, False
        self.take(self.method)

    def take(self, method: Method) -> None:
        """Run `method` from now on."""
        self.method = method
        self.is_dense, self.changes = method.is_dense, bool(method.changes_by)
        self.is_gated = method.defines("gate")

    def attend(self, call: Call) -> Tensor:
        """(B, N, H, D) of one call, by the model's own attention or by the method."""
        handle, passing = self.handle, self.handle.passing
        if handle.is_paused or (self.call is not None and self.call != call.number):
            return call.stock()
        why = self.why_dense()
        if passing.refusal is not None and (why is None or handle.extensions):
            raise passing.refusal
        tokens = self.tokens_of(call)
        if tokens is not None and why is None and call.hidden_states is not None:
            assert self.branch is not None
            gate = on_device(self.branch, call.q.device)
            call = call._replace(hidden_states=None) if self.is_silent(gate) else gated(call, gate)
        if tokens is not None and call.parallel is not None:
            plain = why is not None and self.runs_stock(call, tokens)
            right = plain and context_parallel.stock_is_right(call, tokens)
            if not right or self.learns:
                return self.over_processes(call, tokens, self.attend)
        state = None if handle.states is None else self.state_of(call, tokens, why)
        if why is None and state is not None:
            why = state.why
        with self.recording(call.q, state, handle.record) as record:
            if tokens is None or (why is not None and self.runs_stock(call, tokens)):
                # A dense call need not know the grid.
                out = self.by_model(call)
                if record is not None:
                    known = tokens is not None or handle.passing.own is not None
                    at = why if known else f"{why}, at a grid that is not known"
                    keys = call.k.shape[1] if tokens is not None and tokens.past else None
                    record.add(context_parallel.counted_shape(call), why=at, keys=keys)
                if tokens is not None and state is not None and state.learns:
                    self.learn(call, tokens, out, state)
                return out
            if handle.observe is None:
                return self.compute(call, tokens, why, state, record)
            if record is not None:
                record.add(call.q.shape, why="observed")
            return self.observed(call, tokens, handle.observe)

    @contextmanager
    def recording(
        self, q: Tensor, state: StateHandle | None, counted: bool
    ) -> Iterator[Record | None]:
        """Time a call on q, (B, N, H, D), and keep the record and what the method learned, unless
        the call fails."""
        handle, key = self.handle, (self.name, self.handle.passing.clock.step)
        record = (handle.records.get(key) or Record()) if counted else None
        start = now(q) if handle.timed else 0.0
        yield record
        if state is not None and handle.states is not None:
            handle.states.keep(self.name, state)
        if record is not None:
            if handle.timed:
                record.seconds = (record.seconds or 0.0) + now(q) - start
            record.learned += state is not None and state.learns
            handle.records[key] = record

    def compute(
        self,
        call: Call,
        tokens: Tokens,
        why: str | None,
        state: StateHandle | None,
        record: Record | None,
    ) -> Tensor:
        """(B, N, H, D) of the method, by a kernel, without the padding of texts: nothing sees the
        padding, and its own output is zero.

        Args:
            why: the reason why the call is dense, as full attention through a plan.
            state: of the method; without, it has none in this call.
        """
        self.check(call, tokens)
        extensions, watch = self.handle.extensions, self.handle.watcher
        if tokens.causal:
            for one in active(extensions, tokens.video):
                raise ValueError(
                    f"{one.name} goes over all frames, and {self.name} hides those after causal "
                    f"blocks of {tokens.causal}: leave {one.name} out, or the blocks"
                )
            parts = in_blocks(call, tokens)
            return torch.cat([self.compute(*part, why, state, record) for part in parts], 1)
        run = MethodRun(self, call, tokens, why, state)
        q = call.q if call.q.shape[1] == call.k.shape[1] else tokens.complete(call.q)
        gate = None if call.gate is None or why is not None else _completed(call, tokens)
        seen, outs = self.handle.passing.seen(self.name, call, tokens), []
        if any(one.whole for one in extensions):
            run.texts, seen = seen, None
        groups = by_text(tokens, len(call.q), seen, call.q.device)
        for some in groups:
            part = some.of(q), some.of(call.k), some.of(call.v)
            run.plans.clear()
            changing = active(extensions, some.video) if extensions else ()
            attend: Callable[..., Tensor] = run
            for extension in changing:
                if extension.around is not None:
                    attend = partial(extension.around, attend)
            if attend is run:
                own = None if gate is None else some.of(gate)
                out = run(*part, some.video, own)
            elif gate is None:
                out = attend(*part, some.video)
            else:
                names = ", ".join(one.name for one in changing if one.around is not None)
                raise ValueError(
                    f"{type(self.method).__name__} has a gate for each token of the clip, and "
                    f"{names} attends to parts of it: take a method without a gate, or leave "
                    f"{names} out"
                )
            if watch is not None and why is None and not changing:
                step = self.handle.passing.clock.step
                watch.look(self.name, self.number, step, *part, out, scale=call.scale)
            if record is not None:
                choice = run.choices[-1] if run.choices else None  # none without a kernel
                B, H, N, D = part[0].shape
                keys, asked = run.keys, 1.0
                if tokens.past:
                    N, keys = tokens.before + tokens.video.video_tokens - tokens.first, N
                    asked = min((_rows(plan, tokens)[1] for plan, _ in run.plans), default=1.0)
                record.add(
                    (B, N, H, D), why=why, choice=choice, plans=run.plans, keys=keys, asked=asked
                )
            outs.append(some.back(out, call.k.shape[1]))
        out = together(groups, outs)
        if call.q.shape[1] < out.shape[1]:
            out = out[:, tokens.first : tokens.first + call.q.shape[1]]
        return out

    def is_silent(self, gate: nn.Module) -> bool:
        """Whether a gate adds nothing and is not about to learn. Waits for the device once after
        each change of its parameters."""
        held = [*gate.parameters()]
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in held)
        if learns or any(x.is_meta or x.is_inference() for x in held):
            return False
        state = [(x.data_ptr(), x._version) for x in held]
        if self._heard[0] != state:
            self._heard = state, is_silent(gate)
        return self._heard[1]

    # What runs

    def why_dense(self) -> str | None:
        """Reason why the layer is dense at the step under way; None if its method runs."""
        if self.is_dense:
            return "method is dense"
        handle = self.handle
        why = handle.schedule.why_layer(self.number) or handle.passing.dense_step
        why = why or handle.passing.own
        if why is None and self.changes and self.method_now().is_dense:
            return "dense by its rules"
        return why

    def method_now(self) -> Method:
        """Return the method at the step under way."""
        if not self.changes:
            return self.method
        passing = self.handle.passing
        clock = passing.clock
        method = self.method.at(Step(clock.step, clock.steps, passing.progress))
        check_method(method)
        return method

    def tokens_of(self, call: Call) -> Tokens | None:
        """Return the place of the grid in a call; None if the model's grid is not known."""
        tokens = self.handle.passing.clock.tokens
        return tokens if tokens is None or self.tokens is None else self.tokens(tokens, call)

    def runs_stock(self, call: Call, tokens: Tokens) -> bool:
        """Whether the model's own attention runs a dense call over a grid."""
        return not active(self.handle.extensions, tokens.video) and self.dense_by(call) is None

    def dense_by(self, call: Call) -> str | None:
        """Kernel that a dense call runs by; None for the model's own attention."""
        handle = self.handle
        named = None if handle.observe is not None else handle.dense_kernel
        if named != "auto":
            return named
        return None if call.refused else _faster(call.q.device, call.q.dtype, call.q.shape[3])

    def by_model(self, call: Call) -> Tensor:
        """The model's own attention. In a pass that no method may run in, a `BlockMask` beside a
        method is run by a kernel: uncompiled FlexAttention makes the matrix of all scores."""
        mask: object = call.mask
        spared = self.handle.passing.own is not None and not self.is_dense
        if not (spared and isinstance(mask, BlockMask) and call.parallel is None):
            return call.stock()
        from gen_accel.block_mask import flex_attention  # few models have such a mask

        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        return flex_attention(q, k, v, mask, scale=call.scale).transpose(1, 2)

    def check(self, call: Call, tokens: Tokens) -> None:
        """Raise ValueError for a call that a method cannot replace."""
        q, k, video = call.q.shape[1], call.k.shape[1], tokens.video
        asking = k - tokens.first, video.video_tokens + tokens.before - tokens.first
        if k != video.tokens or (q != k and q not in asking):
            raise ValueError(
                f"attention of {self.name} runs over {k} tokens, the latents make {video}: a size "
                "that the model's patches do not divide, or a model that this family does not "
                "describe"
            )
        if call.refused:
            self.refuse(call)
        known = k, *asking, tokens.before + video.video_tokens
        if call.gate is not None and call.gate.shape[1] not in known:
            raise ValueError(
                f"attention of {self.name} has {q} queries and hidden states of "
                f"{call.gate.shape[1]} tokens, so that its gate fits neither: use a method "
                "without a gate for this model"
            )

    def refuse(self, call: Call) -> None:
        """Raise ValueError for arguments that only the model's own attention takes."""
        raise ValueError(
            f"sparse attention does not take {', '.join(call.refused)} of {self.name}; "
            "attach Dense() or detach for this model"
        )

    def by_text(self, call: Call, tokens: Tokens) -> Sequence[Samples]:
        seen = self.handle.passing.seen(self.name, call, tokens)
        return by_text(tokens, len(call.q), seen, call.q.device)

    def over_processes(
        self, call: Call, tokens: Tokens, attend: Callable[[Call], Tensor]
    ) -> Tensor:
        """Run `attend` on all tokens and this process's heads, in context parallelism."""
        if self.handle.observe is not None:
            raise ValueError(
                "each process of context parallelism sees some heads alone, which nothing can be "
                "fitted to; calibrate before enable_parallelism"
            )
        method = self.method if self.why_dense() is None or self.learns else None
        return context_parallel.exchanged(
            call, tokens, attend, method=method, text_split=self.text_split()
        )

    # State from step to step, and observers

    @property
    def learns(self) -> bool:
        """Whether the layer learns at the dense step of the schedule that is under way."""
        handle = self.handle
        if handle.states is None or not handle.states.learns or self.is_dense:
            return False
        return handle.schedule.why_layer(self.number) is None

    def state_of(self, call: Call, tokens: Tokens | None, why: str | None) -> StateHandle | None:
        """Return the method's state for a call; None if nothing is kept, or nothing is asked.
        ValueError if a gradient is asked for, which the method cannot give with a state."""
        handle = self.handle
        if handle.states is None or tokens is None or handle.observe is not None or call.refused:
            return None
        if why is not None and not handle.states.learns:
            return None  # before a mask is read, which may be one that no method takes
        empty = None if self.is_dense else self.method.step_state()
        if empty is None or handle.schedule.why_layer(self.number) is not None:
            return None
        if call.trains or (torch.is_grad_enabled() and call.q.requires_grad):
            if empty.refuses_training and why is None:
                raise ValueError(f"{type(self.method).__name__}: {empty.refuses_training}")
            return None
        q, heads = call.q, None if call.heads is None else (call.heads.start, call.heads.stop)
        texts = tuple((tuple(some.rows), some.video) for some in self.by_text(call, tokens))
        autocast = torch.is_autocast_enabled(q.device.type)
        about = tokens, q.shape, call.k.shape, q.dtype, autocast, q.device, heads, texts
        return handle.states.of(self.name, empty.every, about, dense=why is not None)

    def learn(self, call: Call, tokens: Tokens, out: Tensor, state: StateHandle) -> None:
        """Learn from the output of the model's own attention, (B, N, H, D)."""
        run = MethodRun(self, call, tokens, None, None)
        for video, part in self._dense_parts(call, tokens, out):
            method = run.method_on(video)
            kernel = PlanRunner(run, method, video, counted=False)
            state.learn(method, *part, video=video, kernel=kernel)

    def observed(self, call: Call, tokens: Tokens, observe: "Observer") -> Tensor:
        """Run the model's own attention, and show it to `observe`."""
        out, kernel = call.stock(), self.handle.kernel
        plain = partial(kernels.run, scale=call.scale, kernel=kernel)
        for video, part in self._dense_parts(call, tokens, out):
            observe(Observed(self, *part, video, kernels.Runner(plain, kernel, call.scale)))
        return out

    def _dense_parts(
        self, call: Call, tokens: Tokens, out: Tensor
    ) -> Iterator[tuple[VideoShape, tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Yield q, k, v and the dense output, (B, H, N, D), of samples with equally long texts."""
        self.check(call, tokens)
        q, dense = tokens.complete(call.q), tokens.complete(out)
        for some in self.by_text(call, tokens):
            yield some.video, (some.of(q), some.of(call.k), some.of(call.v), some.of(dense))


class MethodRun:
    """One call of a layer's method, or of full attention in its place, with what ran: the
    kernels, and the plans with the number of heads of each.

    Called with q, k, v, (B, H, N, D), their grid, and the gate of a method that has one, of that
    shape too, it returns (B, H, N, D).

    Attributes:
        keys: number that each query could see, where a technique adds some; None: the call's.
        texts: for a technique that takes all samples at once, which tokens beside the grid each
            one sees, counted from 0; None: all.
    """

    def __init__(
        self,
        layer: Layer,
        call: Call,
        tokens: Tokens,
        why: str | None,
        state: StateHandle | None,
    ) -> None:
        handle = layer.handle
        self.layer, self.call, self.handle = layer, call, handle
        self.state = state if why is None or (state is not None and state.learns) else None
        self.dense_by, branch = handle.kernel, None if layer.is_gated else layer.branch
        self.full: Method | None = None  # in the place of the layer's method
        if why is not None:
            self.dense_by = layer.dense_by(call) or handle.kernel
            if self.state is None:
                self.full = Full() if active(handle.extensions, tokens.video) else Dense()
                branch = None
        self.branch: Callable | None = None
        if branch is not None:
            branch = on_device(branch, call.q.device)
            self.branch = context_parallel.of_heads(branch, call.heads)
        self.keys: int | None = None
        self.tokens = tokens
        self.texts: Sequence[Sequence[int]] | None = None
        self.choices: list[kernels.Choice] = []
        self.plans: list[tuple[Plan, int]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, video: VideoShape, gate: Tensor | None = None
    ) -> Tensor:
        method = self.method_on(video)
        if self.state is not None:
            runner = partial(PlanRunner, self)
            return self.state.attend(method, q, k, v, video=video, runner=runner)
        kernel = PlanRunner(self, self.layer.method if self.full is None else self.full, video)
        given: dict[str, object] = {} if self.branch is None else {"branch": self.branch}
        if gate is not None:
            given["gate"] = gate
        return method(q, k, v, video=video, kernel=kernel, **given)

    def method_on(self, video: VideoShape) -> Method:
        """Return the method at the step under way, fitted to the smaller grids on the levels of a
        UNet and to the heads of this process."""
        method = self.layer.method_now() if self.full is None else self.full
        tokens = self.handle.passing.clock.tokens
        if tokens is not None and not tokens.causal and tokens.video != video:
            method = method.within(video, tokens.video)
        return method if self.call.heads is None else method.for_heads(self.call.heads)


class PlanRunner(kernels.Runner):
    """Runs the plans of a method in a call, as techniques for longer video change them, over a
    grid that may be part of the call's own."""

    def __init__(
        self, run: MethodRun, method: Method, video: VideoShape, counted: bool = True
    ) -> None:
        self.name = run.dense_by if method.is_dense else run.handle.kernel
        self.scale = run.call.scale
        self._run, self._method, self._video, self._counted = run, method, video, counted
        free = not run.handle.extensions and not run.handle.self_check and not run.call.trains
        self.takes_answers = free and not run.tokens.past

    def answered(self, out: Tensor, plan: Plan, kernel: str) -> Tensor:
        if self._counted:
            self._run.choices.append(kernels.Choice(kernel))
            self._run.plans.append((plan, out.shape[1]))
        return out

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        run, handle = self._run, self._run.handle
        clock = handle.passing.clock
        plan = adjusted(plan, handle.extensions, self._video, clock.step, clock.steps)
        if run.tokens.past and self._video.frames == run.tokens.video.frames:
            plan = asked(plan, run.tokens)
        # Not on the CPU, where the tests ran, nor on MPS, which has no fp64 to check with.
        check, kind = None, q.device.type
        if kind not in ("cpu", "mps") if handle.self_check is None else handle.self_check:
            about = (self._method, q.shape, q.dtype, q.device, plan.gain is None)
            check = SelfCheck(handle.checked, about, self.name == "auto" and kind != "cpu")
        out = kernels.run(
            q,
            k,
            v,
            plan,
            scale=self.scale,
            kernel=self.name,
            report=run.choices.append if self._counted else None,
            grad=True if run.call.trains else None,
            self_check=check,
        )
        if self._counted:
            run.plans.append((plan, q.shape[1]))
        return out


def in_blocks(call: Call, tokens: Tokens) -> Iterator[tuple[Call, Tokens]]:
    """Yield a call for each block of frames of a causal grid, whose keys are its own and those
    before it. The mask that says so is left out."""
    frames, height, width = tokens.video.grid
    frame = height * width
    for past in range(0, frames, tokens.causal):
        end = min(past + tokens.causal, frames)
        own = slice(past * frame, end * frame)
        q, gate = call.q[:, own], None if call.gate is None else call.gate[:, own]
        k, v = call.k[:, : own.stop], call.v[:, : own.stop]
        part = call._replace(q=q, k=k, v=v, mask=None, gate=gate)
        yield part, Tokens(VideoShape(end, height, width), past=past)


def asked(plan: Plan, tokens: Tokens) -> Plan:
    """Leave out the rows of a plan that hold no queries. A static plan is changed once."""

    def made() -> Plan:
        return plan.changed(keep=plan.keep & _rows(plan, tokens)[0][:, None])

    return made() if plan.dynamic else plan.prepared(tokens, made)


# By the slots of plans, and then by their blocks and the tokens of a call.
_known_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _rows(plan: Plan, tokens: Tokens) -> tuple[Tensor, float]:
    """Blocks that hold queries, (Kq,) bool, and the share of queries among their tokens."""
    known = _known_rows.get(plan.slots)
    if known is None:
        known = _known_rows[plan.slots] = {}
    if (plan.block_q, tokens) not in known:  # waits for the device
        with torch.inference_mode(False):
            slots = plan.slots
            real = (slots >= 0).view(-1, plan.block_q)
            held = real & tokens.asked(slots.device)[slots.clamp_min(0)].view_as(real)
            rows = held.any(1)
            known[plan.block_q, tokens] = rows, int(held.sum()) / int(real[rows].sum())
    return known[plan.block_q, tokens]


class PaddingOnce:
    """Attention of the processors beside a method's: the model's, with padding of texts once.

    Args:
        is_on: whether it may serve; otherwise the model's own attention runs, bit for bit.

    Attributes:
        seen: number of calls in which it served, by the keys of a call and the keys left of them.
    """

    def __init__(self, is_on: Callable[[], bool]) -> None:
        self._is_on = is_on
        self.seen: dict[tuple[int, int], int] = {}

    def __call__(self, call: Call) -> Tensor:
        from gen_accel.attention_processors.padding import attend_once  # the first time

        found = attend_once(call) if self._is_on() else None
        if found is None:
            return call.stock()
        out, left = found
        key = call.k.shape[1], left
        self.seen[key] = self.seen.get(key, 0) + 1
        return out

    def told(self) -> str:
        """Say where it served; "" for nowhere."""
        served = [
            f"{keys} as {left} in {calls} call{'s' if calls > 1 else ''}"
            for (keys, left), calls in sorted(self.seen.items())
        ]
        return f"keys of padded text, equal ones once: {', '.join(served)}" if served else ""


class Observed(NamedTuple):
    """A call of dense attention, as an observer sees it: q, k, v and dense are (B, H, N, D)."""

    layer: Layer
    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    video: VideoShape
    run: kernels.Runner


Observer = Callable[[Observed], None]


@torch.compiler.assume_constant_result
def _faster(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    from gen_accel.kernels.dispatch import faster_than_dense  # for dense_kernel="auto" alone

    shape = (1, 1, 128, dim)
    facts = kernels.Facts((shape,) * 3, (dtype,) * 3, (device,) * 3, block_q=128, block_k=128)
    return faster_than_dense(facts)


def now(x: Tensor) -> float:
    """Seconds, after the device of `x` is done."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter()


def gated(call: Call, gate: nn.Module) -> Call:
    """Compute the gate of a call from the hidden states that it carries."""
    values = gate(call.hidden_states).unflatten(-1, call.q.shape[2:])
    return call._replace(gate=values, hidden_states=None)


def _completed(call: Call, tokens: Tokens) -> Tensor:
    """Pad the gate of a call, of the grid and maybe its neighbours, to all tokens by zeros."""
    gate, k = call.gate, call.k.shape[1]
    assert gate is not None
    own, seen = gate.shape[1], tokens.before + tokens.video.video_tokens
    first = tokens.first if own in (seen - tokens.first, k - tokens.first) else 0
    return gate if own == k else F.pad(gate, (0, 0, 0, 0, first, k - first - own))


def on_device(branch: nn.Module, device: torch.device) -> nn.Module:
    """Move the parameters of a layer to `device`. Offloading moves only what it found on a model;
    a branch that came later is moved here."""
    return branch if is_offloaded(branch) else branch.to(device)


def is_offloaded(branch: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in branch.parameters())
