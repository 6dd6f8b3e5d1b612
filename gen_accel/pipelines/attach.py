"""Attach a method to a live diffusers pipeline or transformer, and take it off again."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.seam import Call, SparseProcessor, is_compiled
from gen_accel.pipelines.clock import Clock
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.summary import Record, Summary
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

TRANSFORMERS = ("transformer", "transformer_2")


def attach(
    pipe_or_transformer: Any,
    method: Any,
    *,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    timed: bool = False,
) -> "Attachment":
    """Make the self-attention of a pipeline's transformers use `method`.

        handle = gen_accel.attach(pipe, Radial(), schedule=Schedule(dense_start=0.2))
        video = pipe(prompt, ...).frames
        print(handle.summary())
        handle.detach()

    The handle is a context manager too, which detaches at its end. Attaching again replaces.
    Frames, height, width and batch are read from each call and may change from one to the next.

    Args:
        pipe_or_transformer: a diffusers pipeline, both transformers of which are served where it
            has two, or a transformer. Attach before `torch.compile`.
        method: e.g. `Radial()`. `Dense()` runs the model's own attention.
        schedule: layers and steps that stay dense. Without a pipeline, steps are told apart by
            changes of the timestep, and shares of them cannot be given.
        kernel: "auto" or a name from `gen_accel.kernels.KERNELS`, which then never falls back.
        timed: also measure the seconds spent in attention; on a GPU this waits for each call.

    Raises:
        ValueError: a class that no family serves, a compiled transformer, an unknown kernel, a
            method that is none, or a schedule that cannot be kept.
        TypeError: neither a pipeline nor a module.
    """
    schedule = schedule or Schedule()
    kernels.check_name(kernel)
    if isinstance(method, type) or not callable(method):
        raise ValueError(f"method must be an instance such as Radial(), got {method!r}")
    if isinstance(pipe_or_transformer, nn.Module):
        scheduler, transformers = None, {"transformer": pipe_or_transformer}
        if schedule.needs_total:
            raise ValueError(
                "dense_start and dense_end are shares of the steps, which only a pipeline knows: "
                "attach to the pipeline, or use dense_steps"
            )
    else:
        found = {name: getattr(pipe_or_transformer, name, None) for name in TRANSFORMERS}
        transformers = {name: module for name, module in found.items() if module is not None}
        if not transformers:
            kind = type(pipe_or_transformer).__name__
            raise TypeError(f"{kind} is neither a pipeline with a transformer nor a module")
        scheduler = _scheduler(pipe_or_transformer)
    for name, module in transformers.items():
        if is_compiled(module):
            raise ValueError(
                f"{name} is compiled already; load it again, attach, and compile then"
            )
    families = {name: family_of(module) for name, module in transformers.items()}
    return Attachment(transformers, families, Clock(scheduler), method, schedule, kernel, timed)


class Attachment:
    """What `attach` returns. It owns the processors and hooks, and all that they remember."""

    def __init__(
        self,
        transformers: dict[str, nn.Module],
        families: dict[str, Any],
        clock: Clock,
        method: Any,
        schedule: Schedule,
        kernel: str,
        timed: bool,
    ) -> None:
        self.method, self.schedule, self.kernel, self.timed = method, schedule, kernel, timed
        self.clock = clock
        self.records: dict[tuple[str, int], Record] = {}
        self._dense_step: str | None = None
        self._prepared = _prepared_for(method, kernel)
        self._sites: list[tuple[Any, SparseProcessor]] = []
        replaced: list[tuple[Attachment, Any]] = []
        for name, transformer in transformers.items():
            family = families[name]
            for site in family.self_attentions(transformer):
                stock = site.module.processor
                if isinstance(stock, SparseProcessor):
                    replaced.append((stock.owner, site.module))
                    stock = stock.stock
                attend = partial(self._attend, f"{name}.{site.name}", site.layer)
                processor = SparseProcessor(stock, family.ATTENTION_CALL, attend, self)
                self._sites.append((site.module, processor))
        # Nothing is changed before here, so that a refusal leaves the model as it was.
        for handle, module in replaced:
            handle._give_up(module)
        for module, processor in self._sites:
            module.set_processor(processor)
        self._hooks = [
            transformer.register_forward_pre_hook(
                partial(self._observe, families[name].video_shape, families[name].timestep),
                with_kwargs=True,
            )
            for name, transformer in transformers.items()
        ]

    def detach(self) -> None:
        """Put the stock processors back. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        for module, processor in self._sites:
            if module.processor is processor:
                module.set_processor(processor.stock)
        self._hooks, self._sites = [], []

    def _give_up(self, replaced: Any) -> None:
        """Another attachment takes this attention over; others of this one may stay."""
        self._sites = [(module, ours) for module, ours in self._sites if module is not replaced]
        if not self._sites:
            self.detach()

    def summary(self) -> Summary:
        """What ran in the last generation, layer by layer and step by step."""
        return Summary(self.method, self.schedule, dict(self.records))

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _observe(
        self,
        video_shape: Callable,
        timestep: Callable,
        transformer: nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> None:
        self.clock.video = video_shape(transformer, *args, **kwargs)
        # Without a schedule of steps they are counted for the records, which a graph has not.
        recorded = self.clock.scheduler is not None and not torch.compiler.is_compiling()
        if recorded or self.schedule.needs_step:
            self._advance(timestep(*args, **kwargs))

    @torch.compiler.disable(
        reason="a schedule of steps needs fullgraph=False or compile_repeated_blocks()"
    )
    def _advance(self, timestep: Tensor) -> None:
        """Outside of a graph, which else would be compiled again for each step."""
        if self.clock.advance(timestep):
            self.records.clear()
        self._dense_step = self.schedule.why_step(self.clock.step, self.clock.steps)

    def _attend(self, name: str, layer: int, call: Call) -> Tensor:
        why = self.schedule.why_layer(layer) or self._dense_step
        if isinstance(self.method, Dense):
            why = "method is dense"
        if why is None and call.refused:
            raise ValueError(
                f"sparse attention does not take {', '.join(call.refused)} of {name}; attach "
                "Dense() or detach for this model"
            )
        if torch.compiler.is_compiling():
            return call.stock() if why else self._compiled(call)
        key = (name, self.clock.step)
        record = self.records.get(key) or Record()
        start = self._now(call.q) if self.timed else None
        if why:
            out = call.stock()
            record.add(call.q.shape, why=why)
        else:
            out = self._sparse(call, record)
        if start is not None:
            record.seconds = (record.seconds or 0.0) + self._now(call.q) - start
        self.records[key] = record  # not before the call has succeeded
        return out

    def _sparse(self, call: Call, record: Record) -> Tensor:
        video = self._video(call.q)

        def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
            def report(choice: kernels.Choice) -> None:
                record.add(call.q.shape, choice=choice, plan=plan)

            return kernels.run(q, k, v, plan, scale=call.scale, kernel=self.kernel, report=report)

        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        return self.method(q, k, v, video=video, kernel=run).transpose(1, 2)

    def _compiled(self, call: Call) -> Tensor:
        """The same in a graph: the plan is made while tracing and is a constant of the graph."""
        video = self._video(call.q)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        prepared = self._prepared(*video.grid, video.text, str(q.device))
        return kernels.compute(q, k, v, prepared, scale=call.scale).transpose(1, 2)

    def _video(self, q: Tensor) -> VideoShape:
        video = self.clock.video
        if video is None or q.shape[1] != video.tokens:
            raise ValueError(
                f"attention runs over {q.shape[1]} tokens, the latents make {video}: a size that "
                "the model's patches do not divide, or a model that this family does not describe"
            )
        return video

    def _now(self, x: Tensor) -> float:
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return time.perf_counter()


def _prepared_for(method: Any, kernel: str) -> Callable:
    """Makes the plan while a graph is traced, outside of it: there it is a constant."""

    @torch.compiler.assume_constant_result
    def prepared(frames: int, height: int, width: int, text: int, device: str) -> tuple:
        where = torch.device(device)
        plan = method.plan(VideoShape(frames, height, width, text), where)
        return kernels.prepare(plan, where, kernel)

    return prepared


def _scheduler(pipe: Any) -> Callable[[], Any]:
    """Looked up at each call, as users exchange it; weakly, as the pipeline owns the model."""
    weak = ref(pipe)

    def scheduler() -> Any:
        alive = weak()
        if alive is None:
            raise RuntimeError("the pipeline attached to is gone; attach to the one now in use")
        return alive.scheduler

    return scheduler
