"""Attach a method to a live diffusers pipeline or transformer, and take it off again."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.families import SelfAttention, family_of
from gen_accel.attention_processors.seam import (
    Call,
    SparseProcessor,
    TrainableProcessor,
    is_compiled,
)
from gen_accel.kernels.self_check import check_rows
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
    self_check: bool | None = None,
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
        self_check: the first time a kernel meets a method, shape, dtype and device, hold some rows
            of its answer to the reference. Without: everywhere but on the CPU and MPS.

    A method with parameters, such as `SparseLinear()`, starts anew each time it is attached.

    Raises:
        ValueError: a class that no family serves, a compiled transformer, an unknown kernel, a
            method that is none, or a schedule that cannot be kept.
        TypeError: neither a pipeline nor a module.
    """
    schedule = schedule or Schedule()
    kernels.check_name(kernel)
    if isinstance(method, type) or not callable(method):
        raise ValueError(f"method must be an instance such as Radial(), got {method!r}")
    transformers = served_transformers(pipe_or_transformer)
    scheduler = None
    if not isinstance(pipe_or_transformer, nn.Module):
        scheduler = _SchedulerOf(pipe_or_transformer)
    elif schedule.needs_total:
        raise ValueError(
            "dense_start and dense_end are shares of the steps, which only a pipeline knows: "
            "attach to the pipeline, or use dense_steps"
        )
    for name, module in transformers.items():
        if is_compiled(module):
            raise ValueError(
                f"{name} is compiled already; load it again, attach, and compile then"
            )
    families = {name: family_of(module) for name, module in transformers.items()}
    options = Options(method, schedule, kernel, timed, self_check)
    handle = Attachment(transformers, families, Clock(scheduler), options)
    if handle.branches and all(branch.silent() for branch in handle.branches.values()):
        warnings.warn(
            f"the linear branch of {type(method).__name__} is still silent, so that this is "
            "sparse attention alone: fit it with gen_accel.calibrate, train it, or load it with "
            "gen_accel.load_processors",
            SilentBranch,
            stacklevel=2,
        )
    return handle


class SilentBranch(UserWarning):
    """A method with parameters was attached, and they are at their start."""


def served_transformers(pipe_or_transformer: Any) -> dict[str, nn.Module]:
    """By the names that a pipeline has for them; TypeError for what has none."""
    if isinstance(pipe_or_transformer, nn.Module):
        return {TRANSFORMERS[0]: pipe_or_transformer}
    found = {name: getattr(pipe_or_transformer, name, None) for name in TRANSFORMERS}
    transformers = {name: module for name, module in found.items() if module is not None}
    if not transformers:
        kind = type(pipe_or_transformer).__name__
        raise TypeError(f"{kind} is neither a pipeline with a transformer nor a module")
    return transformers


def on_device(branch: nn.Module, device: torch.device) -> nn.Module:
    """Offloading moves the parameters that it found on a model: those of a branch that came later
    are moved here. Those that it holds elsewhere it brings itself."""
    return branch if is_offloaded(branch) else branch.to(device)


def is_offloaded(branch: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in branch.parameters())


def layer_method(method: Any, layer: int) -> Any:
    """What runs in a layer, for methods that change from one to the next."""
    return method.for_layer(layer) if hasattr(method, "for_layer") else method


class Options(NamedTuple):
    """What `attach` was asked for."""

    method: Any
    schedule: Schedule
    kernel: str = "auto"
    timed: bool = False
    self_check: bool | None = None


class Attachment:
    """What `attach` returns. It owns the processors and hooks, and all that they remember."""

    def __init__(
        self,
        transformers: dict[str, nn.Module],
        families: dict[str, Any],
        clock: Clock,
        options: Options,
    ) -> None:
        self.method, self.schedule, self.kernel, self.timed, self.self_check = options
        self.clock = clock
        self.records: dict[tuple[str, int], Record] = {}
        self.branches: dict[str, Any] = {}
        self.observe: Observer | None = None
        self._dense_step: str | None = None
        self._checked: set[tuple] = set()
        self._sites: list[tuple[Any, SparseProcessor]] = []
        replaced: list[tuple[Attachment, Any]] = []
        for name, transformer in transformers.items():
            family = families[name]
            for site in family.self_attentions(transformer):
                stock = site.module.processor
                if isinstance(stock, SparseProcessor):
                    replaced.append((stock.owner, site.module))
                    stock = stock.stock
                processor = self._processor(name, transformer, family, site, stock)
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

    def _processor(
        self, name: str, transformer: Any, family: Any, site: SelfAttention, stock: Any
    ) -> SparseProcessor:
        method = layer_method(self.method, site.layer)
        full, branch = f"{name}.{site.name}", None
        if hasattr(method, "branch") and self.schedule.why_layer(site.layer) is None:
            place = next(site.module.parameters()).device
            if place.type == "meta":  # weights that are offloaded; the call brings the device
                place = torch.device("cpu")
            with torch.inference_mode(False):
                branch = method.branch(site.heads, site.dim).to(place, transformer.dtype)
            self.branches[full] = branch
        layer = Layer(full, site.layer, method, _constant_for(method, self.kernel), branch)
        attend = partial(self._attend, layer)
        if branch is None:
            return SparseProcessor(stock, family.ATTENTION_CALL, attend, self)
        return TrainableProcessor(stock, family.ATTENTION_CALL, attend, self, branch)

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

    def _attend(self, layer: "Layer", call: Call) -> Tensor:
        why = self.schedule.why_layer(layer.number) or self._dense_step
        if isinstance(layer.method, Dense):
            why = "method is dense"
        if why is None and call.refused:
            raise ValueError(
                f"sparse attention does not take {', '.join(call.refused)} of {layer.name}; "
                "attach Dense() or detach for this model"
            )
        if torch.compiler.is_compiling():
            return call.stock() if why else self._compiled(layer, call)
        key = (layer.name, self.clock.step)
        record = self.records.get(key) or Record()
        start = self._now(call.q) if self.timed else None
        if why:
            out = call.stock()
            record.add(call.q.shape, why=why)
        elif self.observe is not None:
            out = call.stock()
            record.add(call.q.shape, why="observed")
            q, k, v, dense = (x.transpose(1, 2) for x in (call.q, call.k, call.v, out))
            run = partial(kernels.run, scale=call.scale, kernel=self.kernel)
            self.observe(layer, q, k, v, dense, self._video(call.q), run)
        else:
            out = self._sparse(layer, call, record)
        if start is not None:
            record.seconds = (record.seconds or 0.0) + self._now(call.q) - start
        self.records[key] = record  # not before the call has succeeded
        return out

    def _sparse(self, layer: "Layer", call: Call, record: Record) -> Tensor:
        def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
            chosen: list[kernels.Choice] = []
            options: dict[str, Any] = {"scale": call.scale, "kernel": self.kernel}
            out = kernels.run(q, k, v, plan, **options, report=chosen.append)
            record.add(call.q.shape, choice=chosen[0], plan=plan)
            self._check(layer.method, chosen[0].kernel, q, k, v, plan, out, call.scale)
            return out

        return self._run(layer, call, run)

    def _compiled(self, layer: "Layer", call: Call) -> Tensor:
        """The same in a graph, in which all that depends on the grid alone is a constant: the
        plan, or where q and k make the plan, its layout."""

        def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
            prepared = kernels.prepare(plan, q.device, self.kernel)
            return kernels.compute(q, k, v, prepared, scale=call.scale)

        video = self._video(call.q)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        constant = layer.constant(*video.grid, video.text, str(q.device))
        if not hasattr(layer.method, "layout"):
            return kernels.compute(q, k, v, constant, scale=call.scale).transpose(1, 2)
        trained = {} if layer.branch is None else {"branch": layer.branch}
        out = layer.method.laid_out(q, k, v, layout=constant, kernel=run, **trained)
        return out.transpose(1, 2)

    def _run(self, layer: "Layer", call: Call, kernel: Callable) -> Tensor:
        video = self._video(call.q)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        trained = {} if layer.branch is None else {"branch": on_device(layer.branch, q.device)}
        return layer.method(q, k, v, video=video, kernel=kernel, **trained).transpose(1, 2)

    def _check(
        self,
        method: Any,
        kernel: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        out: Tensor,
        scale: float,
    ) -> None:
        # Not on the CPU, where the tests ran, nor on MPS, which has no fp64 to check with.
        by_default = q.device.type not in ("cpu", "mps")
        wanted = by_default if self.self_check is None else self.self_check
        key = (method, kernel, q.shape, q.dtype, q.device)
        if wanted and kernel != "reference" and key not in self._checked:
            check_rows(q, k, v, plan, out, scale=scale, kernel=kernel)
            self._checked.add(key)

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


class Layer(NamedTuple):
    """One attention that a method was attached to.

    Args:
        name: for reports.
        number: of its block.
        constant: what of a grid is a constant of a graph.
        branch: the method's parameters in this layer.
    """

    name: str
    number: int
    method: Any
    constant: Callable
    branch: Any


# layer, q, k, v and the dense output (B, H, N, D), the grid, and what runs a plan on q, k, v
Observer = Callable[[Layer, Tensor, Tensor, Tensor, Tensor, VideoShape, Callable], None]


def _constant_for(method: Any, kernel: str) -> Callable:
    """Runs while a graph is traced, outside of it."""

    @torch.compiler.assume_constant_result
    def constant(frames: int, height: int, width: int, text: int, device: str) -> tuple:
        where, video = torch.device(device), VideoShape(frames, height, width, text)
        if hasattr(method, "layout"):
            return method.layout(video, where)
        return kernels.prepare(method.plan(video, where), where, kernel)

    return constant


class _SchedulerOf:
    """A pipeline's scheduler, looked up at each call, as users exchange it; weakly, as the
    pipeline owns the model."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = ref(pipe)

    def __call__(self) -> Any:
        alive = self._pipe()
        if alive is None:
            raise RuntimeError("the pipeline attached to is gone; attach to the one now in use")
        return alive.scheduler

    def __deepcopy__(self, memo: dict) -> "_SchedulerOf":
        """With a copy of the whole pipeline, that of the copy."""
        pipe = self._pipe()
        return _SchedulerOf(memo.get(id(pipe), pipe))
