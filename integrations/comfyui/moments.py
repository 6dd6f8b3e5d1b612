"""The layer and the step of an attention call, and a method computed there."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import gen_accel
from gen_accel import VideoShape, kernels
from gen_accel.attention_processors.attached.layer import adjusted
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.method import Step, StepState
from gen_accel.plan import Plan

NEVER = Schedule()


@dataclass(frozen=True)
class Moment:
    """Layer, step and noise of one attention call.

    Args:
        step, steps: of the sampling, counted from 0; None where the sampler does not say.
        levels: noise at the beginning of each step and at the end, the largest 1.
        layer: number of the block in the whole model; None where it is not known.
        guidance: which prompts the rows of the batch are for, as ComfyUI numbers them.
        windowed: whether the pass is of one of several windows of the video.
    """

    step: int | None = None
    steps: int | None = None
    levels: tuple[float, ...] = ()
    layer: int | None = None
    guidance: tuple[int, ...] = ()
    windowed: bool = False

    def at(self, layer: int | None) -> "Moment":
        return replace(self, layer=layer)

    def why_dense(self, schedule: Schedule) -> str:
        """Tell why a schedule keeps the call dense; "" where it does not."""
        if schedule == NEVER:
            return ""
        if self.layer is None and schedule.dense_layers:
            return "the number of the block is not known, which the schedule needs"
        if self.step is None and schedule.needs_step:
            return "the step is not known, which the schedule needs"
        why = None if self.layer is None else schedule.why_layer(self.layer)
        if why is None and self.step is not None:
            why = schedule.why_step(self.step, self.steps, self.levels)
        return why or ""

    def method(self, method: Any) -> Any:
        """The method of this layer and step."""
        if self.layer is not None:
            method = method.for_layer(self.layer)
        if self.step is None or self.steps is None:
            return method
        progress = min(1.0, self.step / max(self.steps - 1, 1))
        return method.at(Step(self.step, self.steps, progress))


def moment_of(options: Mapping[str, Any]) -> Moment:
    """Find the moment of a forward pass, by its `transformer_options`. To read the noise levels
    waits for the device.

    A sampler may ask the model between two levels: such a call belongs to the step above it.
    """
    about = {
        "guidance": tuple(options.get("cond_or_uncond", ())),
        "windowed": options.get("context_window") is not None,
    }
    levels, now = options.get("sample_sigmas"), options.get("sigmas")
    if levels is None or now is None or len(levels) < 2:
        return Moment(**about)
    known, level = [float(one) for one in levels], float(now[0])
    step = sum(one >= level * (1 - 1e-4) for one in known[:-1]) - 1
    if max(known) > 1:  # of noise that is added to the video and not mixed with it
        known = [one / (1 + one) for one in known]
    return Moment(max(step, 0), len(known) - 1, tuple(known), **about)


def why_not(method: Any, moment: Moment) -> str:
    """Tell why a method cannot run in this call, or is dense there; "" where it runs."""
    if method is None:
        return ""
    name = type(method).__name__
    if moment.layer is None and method.for_layer(0) != method:
        return f"the number of the block is not known, which {name} needs"
    now = moment.method(method)
    if moment.step is None and now.changes_by == "number":
        return f"the step is not known, which {name} needs"
    if moment.windowed and now.defines("step_state"):
        return f"{name} remembers one video, and this is a window of it"
    if now.is_dense:
        return "dense by its rules"
    return ""


@dataclass
class Memories:
    """Memories of methods from step to step, for each layer, prompt and row of a run."""

    held: dict[tuple[Any, ...], tuple[int, StepState]] = field(default_factory=dict)

    def clear(self) -> None:
        self.held.clear()

    def recall(self, key: tuple[Any, ...], step: int, every: int) -> StepState | None:
        """The memory of an earlier step of this run that is not too old; None: learn again."""
        learned, memory = self.held.get(key, (step, None))
        if memory is None or step < learned or (every and step - learned > every):
            self.held.pop(key, None)
            return None
        return memory


def computed(
    method: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    video: VideoShape,
    scale: float | None,
    moment: Moment,
    branch: nn.Module | None,
    extensions: tuple[Any, ...],
    memories: Memories,
    row: int,
    gate: Tensor | None = None,
) -> Tensor:
    """Compute a method, (B, H, N, D); techniques for longer video change each of its plans.

    Args:
        gate: what a gate of the method gives, of that shape.
    """
    empty = method.step_state()
    if branch is not None:
        branch = branch.to(q.device)
    if empty is None and not extensions:
        options = {"video": video, "method": method, "scale": scale, "branch": branch}
        options["gate"] = gate
        return gen_accel.attention(q, k, v, **options)
    step, steps = moment.step or 0, moment.steps
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        plan = adjusted(plan, extensions, video, step, steps)
        return kernels.run(q, k, v, plan, scale=factor, kernel="auto")

    runner = kernels.Runner(run, "auto", factor)
    if empty is None:
        trained = {} if branch is None else {"branch": branch}
        trained |= {} if gate is None else {"gate": gate}
        return method(q, k, v, video=video, kernel=runner, **trained)
    key = (moment.layer, moment.guidance, row, video, q.shape, q.dtype, q.device, method)
    memory = memories.recall(key, step, empty.every)
    if memory is not None:
        return method(q, k, v, video=video, kernel=runner, state=memory)
    # As the library does where no dense step comes before: the step is dense, and is learnt from.
    with torch.no_grad():
        dense = Full()(q, k, v, video=video, kernel=runner)
        empty.learn(q, k, v, dense, video=video, kernel=runner, first=None)
    memories.held[key] = step, empty
    return dense
