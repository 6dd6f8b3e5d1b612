"""Memories of methods while a model runs: one for each run, transformer, call of a step, and
layer.

A branch of classifier-free guidance is identified by its place among the forward passes of a step.
Where one pass holds both branches as halves of a batch, they are samples of one memory. Passes
that a cache skips change no memory, since age is counted in steps of the clock.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import Clock
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Samples, Tokens
from gen_accel.method import StepState
from gen_accel.video import VideoShape

MOST_PASSES = 4  # of a transformer in a step that are remembered


class Part(NamedTuple):
    """One of the attentions that a call is made up of: for texts of one length, or a window.

    Args:
        shape: (B, H, N, D) of its queries.
    """

    video: VideoShape
    shape: tuple[int, ...]
    memory: StepState


class Lesson(NamedTuple):
    """A lesson: what a layer learned in one pass.

    Args:
        about: the sizes, dtype and device of the call.
        step: when.
    """

    about: tuple[Any, ...]
    step: int
    parts: list[Part]


class Recalled:
    """The memory of one call of a layer, while the call runs.

    Attributes:
        learns: dense attention runs in it, from which it learns.
        why: the reason why it is dense against the schedule; None where it need not be.
    """

    def __init__(
        self, kept: Lesson | None, about: tuple[Any, ...], learns: bool, why: str | None
    ) -> None:
        self.learns, self.why, self.about = learns, why, about
        self.old = [] if kept is None or learns else kept.parts
        self.step = None if kept is None or learns else kept.step
        self.first: list[Part] = []  # of the first pass of the step
        self.parts: list[Part] = []

    def attend(
        self,
        method: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        video: VideoShape,
        runner: Callable[..., Callable],
    ) -> Tensor:
        """Compute (B, H, N, D) of one part of the call: from the memory, or densely to fill it.

        Args:
            runner: (method, counted=True) -> what runs the plans of a method.
        """
        number = len(self.parts)
        old = self.old[number] if number < len(self.old) else None
        if old is not None and (old.video, old.shape) == (video, tuple(q.shape)):
            self.parts.append(old)
            return method(q, k, v, video=video, kernel=runner(method), state=old.memory)
        full = Full()
        dense = full(q, k, v, video=video, kernel=runner(full))
        kernel = runner(method, counted=False)
        self.learn(method, q, k, v, dense, video=video, kernel=kernel)
        return dense

    def learn(
        self,
        method: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        *,
        video: VideoShape,
        kernel: Callable,
    ) -> None:
        """Learn from one part, (B, H, N, D), after the parts before it."""
        memory, number = method.step_state(), len(self.parts)
        assert memory is not None
        like = self.first[number] if number < len(self.first) else None
        alike = like is not None and (like.video, like.shape) == (video, tuple(q.shape))
        first = like.memory if like is not None and alike else None
        memory.learn(q, k, v, dense, video=video, kernel=kernel, first=first)
        self.parts.append(Part(video, tuple(q.shape), memory))


class Memories:
    """Memories of all layers of an attachment. A copy is empty, as it belongs to another model.

    Attributes:
        learns: the pass under way is the last that the schedule keeps dense.
    """

    def __init__(self) -> None:
        self.learns = False
        self._kept: dict[tuple[int, int], dict[str, Lesson]] = {}  # by transformer and pass
        self._run: int | None = None
        self._model = 0
        self._step = self._pass = -1
        self._passes: dict[int, int] = {}  # in the step under way
        self._steps: dict[int, int] = {}  # the last of each transformer
        self._seen: set[tuple[int, int]] = set()
        self._is_under_way = self._is_last = False

    def __deepcopy__(self, memo: dict) -> "Memories":
        return Memories()

    def begin(self, transformer: nn.Module, clock: Clock, *, learns: bool) -> bool:
        """Begin a forward pass; whether it is the first of its transformer at its place in a step
        of the run.

        Everything is forgotten at a new run and after an interrupted pass. The lessons of a
        transformer are forgotten once it took no part in the step before.
        """
        if clock.runs != self._run or self._is_under_way:
            self.forget()
        model, step = id(transformer), clock.step
        if step != self._step:
            self._passes = {}
        for other, last in list(self._steps.items()):
            if other != model and last < step - 1:
                self._drop(other)
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

    def end(self) -> None:
        """End a forward pass. Memories that the last step has used are dropped, to free them for
        the autoencoder."""
        self._is_under_way = False
        if self._is_last:
            self._kept.pop((self._model, self._pass), None)

    def forget(self) -> None:
        """Drop everything that was learned."""
        self._kept, self._passes, self._steps, self._seen = {}, {}, {}, set()
        self._run, self._step, self._is_under_way = None, -1, False

    def _drop(self, model: int) -> None:
        self._steps.pop(model)
        for key in [key for key in self._kept if key[0] == model]:
            del self._kept[key]

    def recall(
        self, layer: str, every: int, about: tuple[Any, ...], dense: bool
    ) -> Recalled | None:
        """Return the memory of a layer's call; None for a dense call beyond the most that may
        learn.

        Args:
            every: see `StepState`.
            about: see `Lesson`.
            dense: the schedule keeps it so, in a pass that `learns`.
        """
        if self._pass >= MOST_PASSES:
            why = f"more than {MOST_PASSES} passes in a step"
            return None if dense else Recalled(None, about, False, why)
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
        found = Recalled(kept, about, learns, why)
        if found.learns and self._pass:
            first = self._kept.get((self._model, 0), {}).get(layer)
            found.first = first.parts if first is not None and first.step == self._step else []
        return found

    def keep(self, layer: str, recalled: Recalled) -> None:
        """Keep what a call used and learned, once it has succeeded."""
        if recalled.parts and recalled.parts != recalled.old:
            of_pass = self._kept.setdefault((self._model, self._pass), {})
            step = self._step if recalled.step is None else recalled.step
            of_pass[layer] = Lesson(recalled.about, step, recalled.parts)


def about_call(call: Call, tokens: Tokens, groups: Sequence[Samples]) -> tuple[Any, ...]:
    """Return the facts that must be equal for a memory to fit a call."""
    device = call.q.device
    heads = None if call.heads is None else (call.heads.start, call.heads.stop)
    texts = tuple((tuple(some.rows), some.video) for some in groups)
    autocast = torch.is_autocast_enabled(device.type)
    return tokens, call.q.shape, call.k.shape, call.q.dtype, autocast, device, heads, texts
