"""State that methods keep from step to step: one for each run, transformer, call of a step, layer.

A branch of classifier-free guidance is identified by its place among the forward passes of a step.
If one pass holds both branches as halves of a batch, they are samples of one state. A step cache
may skip passes: age counts steps, not passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import STEPS, Clock
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.memory import free_bytes, in_words
from gen_accel.method import Method, RunPlan, StepState
from gen_accel.video import VideoShape

HOST = torch.device("cpu")
# Facts of a call that must be equal for a state to fit it.
CallFacts = tuple[object, ...]
MOST_PASSES = 4  # of a transformer in a step that are remembered


class CallSlice(NamedTuple):
    """One of the attentions that a call is made up of, for texts of one length or a window, with
    queries of shape (B, H, N, D)."""

    video: VideoShape
    shape: tuple[int, ...]
    state: StepState


class CachedState(NamedTuple):
    """State that a layer learned in one pass, at a step, from a call of these facts."""

    about: CallFacts
    step: int
    parts: list[CallSlice]


@dataclass(eq=False)
class StateHandle:
    """State of one call of a layer, while the call runs.

    Args:
        kept: what the layer knows; None if it learns.
        learns: dense attention runs in it, from which it learns.
        why: the reason why it is dense against the schedule; None if it need not be.
        first: parts that the first pass of the step learned.
        parts: those of this call so far.
    """

    kept: CachedState | None
    about: CallFacts
    learns: bool
    why: str | None
    first: list[CallSlice] = field(default_factory=list)
    parts: list[CallSlice] = field(default_factory=list)

    def attend(
        self,
        method: Method,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        video: VideoShape,
        runner: Callable[..., RunPlan],
    ) -> Tensor:
        """Compute (B, H, N, D) of one part of the call: from the state, or densely to fill it."""
        state = self._of(self.kept.parts if self.kept else [], q, video)
        if state is not None:
            self.parts.append(CallSlice(video, tuple(q.shape), state))
            return method(q, k, v, video=video, kernel=runner(method, video), state=state)  # pyright: ignore[reportCallIssue]
        full = Full()
        dense = full(q, k, v, video=video, kernel=runner(full, video))
        kernel = runner(method, video, counted=False)
        self.learn(method, q, k, v, dense, video=video, kernel=kernel)
        return dense

    def learn(
        self,
        method: Method,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        *,
        video: VideoShape,
        kernel: RunPlan,
    ) -> None:
        """Learn from one part, (B, H, N, D), after the parts before it."""
        state = method.step_state()
        assert state is not None
        first = self._of(self.first, q, video)
        state.learn(q, k, v, dense, video=video, kernel=kernel, first=first)
        self.parts.append(CallSlice(video, tuple(q.shape), state))

    def _of(self, parts: list[CallSlice], q: Tensor, video: VideoShape) -> StepState | None:
        """State of the part that comes next, if it was of the same grid and sizes."""
        for part in parts[len(self.parts) :][:1]:
            if (part.video, part.shape) == (video, tuple(q.shape)):
                return part.state
        return None


class StepStates:
    """States of all layers of an attachment. A copy is empty, as it belongs to another model."""

    def __init__(self) -> None:
        self.learns = self._is_last = False
        self.forget()

    def __deepcopy__(self, memo: dict) -> "StepStates":
        return StepStates()

    def forget(self) -> None:
        """Drop everything that was learned."""
        self._kept: dict[tuple[int, int], dict[str, CachedState]] = {}  # by transformer and pass
        self._run: int | None = None
        self._model, self._step, self._pass = 0, -1, -1
        self._passes: dict[int, int] = {}  # in the step under way
        self._steps: dict[int, int] = {}  # the last of each transformer
        self._seen: set[tuple[int, int]] = set()
        self._is_under_way = False

    def begin(self, transformer: nn.Module, clock: Clock, *, learns: bool) -> bool:
        """Begin a forward pass; whether it is the first of its transformer at its place in a step
        of the run. Everything is forgotten at a new run and after an interrupted pass, and what a
        transformer learned once it took no part in the step before."""
        if clock.runs != self._run or self._is_under_way:
            self.forget()
        model, step = id(transformer), clock.step
        if step != self._step:
            self._passes = {}
        gone = {other for other, last in self._steps.items() if other != model and last < step - 1}
        for other in gone:
            del self._steps[other]
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] not in gone}
        self._run, self._model, self._step, self.learns = clock.runs, model, step, learns
        self._steps[model] = step
        self._pass = self._passes.get(model, 0)
        self._passes[model] = self._pass + 1
        self._is_under_way = True
        self._is_last = clock.steps is not None and step + 1 >= clock.steps
        fresh = (model, self._pass) not in self._seen and self._pass < MOST_PASSES
        self._seen.add((model, self._pass))
        return fresh

    @property
    def passes(self) -> tuple[int, int]:
        """Numbers of passes in this step of the transformer under way: all, and the ones that have
        learned."""
        own = [key for key in self._kept if key[0] == self._model]
        return min(self._passes[self._model], MOST_PASSES), len(own)

    @torch.compiler.disable(reason=STEPS)
    def end(self) -> None:
        """End a forward pass. States that the last step has used are dropped, to free them for
        the autoencoder."""
        self._is_under_way = False
        if self._is_last:
            self._kept.pop((self._model, self._pass), None)

    def of(self, layer: str, every: int, about: CallFacts, *, dense: bool) -> StateHandle | None:
        """Return the state of a layer's call; None for a dense call beyond the most that may
        learn.

        Args:
            every: see `StepState`.
            dense: the schedule keeps it so, in a pass that learns.
        """
        if self._pass >= MOST_PASSES:
            why = f"more than {MOST_PASSES} passes in a step"
            return None if dense else StateHandle(None, about, False, why)
        kept = self._kept.get((self._model, self._pass), {}).get(layer)
        why = None
        if not dense:
            if kept is None:
                why = "nothing remembered"
            elif kept.about != about:
                why = "another size than what is remembered"
            elif every and self._step - kept.step >= every:
                why = "refreshed"
        learns = dense or (why is not None and not self._is_last)
        first = self._kept.get((self._model, 0), {}).get(layer) if learns and self._pass else None
        parts = first.parts if first is not None and first.step == self._step else []
        return StateHandle(None if learns else kept, about, learns, why, parts)

    def keep(self, layer: str, call: StateHandle) -> None:
        """Keep what a call used and learned, once it has succeeded."""
        old = call.kept
        if call.parts and (old is None or call.parts != old.parts):
            of_pass = self._kept.setdefault((self._model, self._pass), {})
            step = self._step if old is None else old.step
            of_pass[layer] = CachedState(call.about, step, call.parts)


class StateBytes(NamedTuple):
    """Bytes kept from one pass of a step: on the model's device, and on the host if that is
    another one."""

    device: int
    host: int


def state_bytes(
    sites: Sequence[tuple[Method, int, int]], batch: int, tokens: int, itemsize: int
) -> StateBytes:
    """Bytes that all layers keep of one pass, `itemsize` for each number of their outputs. A site
    is the method of a layer, its heads and the dim of one."""
    device = host = 0
    for method, heads, dim in sites:
        state, shape = method.step_state(), (batch, heads, tokens, dim)
        if state is not None:
            device += state.size(shape, itemsize)
            host += state.host_size(shape, itemsize)
    return StateBytes(device, host)


def check_state_room(
    one: StateBytes, where: torch.device, *, method: Method, passes: int, learned: int
) -> None:
    """Raise ValueError, in one line, if what one pass keeps, times the passes of a step that
    have not learned yet, is more than is free."""
    wanted = {where: one.device}
    wanted[HOST] = wanted.get(HOST, 0) + one.host
    for device, size in wanted.items():
        free = free_bytes(device) if size else None
        if free is not None and (passes - learned) * size > free:
            state = method.step_state()
            assert state is not None
            each = f"{passes} x {in_words(size)}, for each call of a step"
            raise ValueError(
                f"{type(method).__name__} has to remember {each}, and only {in_words(free)} are "
                f"free on {device}: {state.for_less}"
            )
