"""What `attach` returns: the processors and hooks that it put on, and how they come off."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from gen_accel import kernels
from gen_accel.attention_processors import Dense, Radial, context_parallel
from gen_accel.attention_processors.attached.clock import Clock, Pass, Readers, tensors_of
from gen_accel.attention_processors.attached.extension import AttentionExtension
from gen_accel.attention_processors.attached.layer import (
    Layer,
    Observer,
    check_tokens,
    on_device,
    refuse_graph,
    refuse_mask,
)
from gen_accel.attention_processors.attached.recipe import warn_of_other_attention
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.summary import Record, Summary
from gen_accel.attention_processors.attached.transformers import (
    TRANSFORMERS,
    SchedulerOf,
    served_transformers,
)
from gen_accel.attention_processors.families import SelfAttention, family_of
from gen_accel.attention_processors.methods.full import Full
from gen_accel.attention_processors.seam import (
    BoundProcessor,
    Call,
    SparseProcessor,
    TrainableProcessor,
    is_compiled,
    put_processor,
    released,
)
from gen_accel.attention_processors.tokens import Samples, Tokens, by_text, seen_text
from gen_accel.kernels.self_check import check_rows
from gen_accel.method import check_method
from gen_accel.plan import Plan
from gen_accel.video import VideoShape


def put_on(
    pipe_or_transformer: Any,
    method: Any,
    *,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    timed: bool = False,
    self_check: bool | None = None,
) -> "Attachment":
    """Attach `method`, as `gen_accel.attach` does, which has the arguments and errors."""
    schedule = schedule or Schedule()
    kernels.check_name(kernel)
    check_method(method)
    transformers = served_transformers(pipe_or_transformer)
    scheduler = None
    if not isinstance(pipe_or_transformer, nn.Module):
        scheduler = SchedulerOf(pipe_or_transformer)
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
    for module in transformers.values():
        warn_of_other_attention(module, method, stacklevel=4)
    if isinstance(method, Radial) and all(family.KIND != "video" for family in families.values()):
        warnings.warn(
            "Radial thins out by the distance in time and keeps all of a single frame, so that it "
            f"saves nothing in {', '.join(type(t).__name__ for t in transformers.values())}; use "
            "Neighborhood, BlockMixture or SparseLinear",
            NothingSaved,
            stacklevel=3,
        )
    return handle


class Displaced(UserWarning):
    """Processors that `attach` put on a model have been exchanged for others."""


class NothingSaved(UserWarning):
    """A method was attached to a model in which it leaves nothing out."""


class SilentBranch(UserWarning):
    """A method with parameters was attached, and they are at their start."""


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
        self.branch: Any = None  # of the layer under way
        self.observe: Observer | None = None
        self.extensions: tuple[AttentionExtension, ...] = ()
        self.companions: list[Callable[[], None]] = []  # called when this is detached
        self.stands_in = isinstance(self.method, Full)  # for the model's own attention
        self._transformers = transformers
        self._dense_step: str | None = None
        self._paused = False
        self._gathering = False
        self._displaced = False  # that it was warned of
        self._refusal: ValueError | None = None  # of the grid of the pass under way
        self._checked: set[tuple] = set()
        self._layers: dict[str, Layer] = {}
        self._text_split: dict[str, bool] = {}
        self._read: tuple[ref, tuple, tuple[tuple[int, ...], ...] | None] | None = None
        self._masks_alike = all(getattr(f, "MASKS_ALIKE", False) for f in families.values())
        self._sites: list[tuple[Any, SparseProcessor]] = []
        replaced: list[tuple[Attachment, Any]] = []
        for name, transformer in transformers.items():
            family = families[name]
            for site in family.self_attentions(transformer):
                found = site.module.processor
                bound = isinstance(found, BoundProcessor)
                if isinstance(found, SparseProcessor):
                    replaced.append((found.owner, site.module))
                stock = found.stock if bound else found
                processor = self._processor(name, transformer, family, site, stock)
                if bound:
                    processor.taps, processor.finishes = found.taps, found.finishes
                self._sites.append((site.module, processor))
        blocks = {layer.number for layer in self._layers.values()}
        unknown = set(self.schedule.named_layers) - blocks
        if unknown:
            raise ValueError(
                f"dense_layers must name blocks that attend over the grid, {min(blocks)} to "
                f"{max(blocks)} here, got {', '.join(map(str, sorted(unknown)))}"
            )
        # Nothing is changed before here, so that a refusal leaves the model as it was.
        for handle, module in replaced:
            self.extensions = tuple(dict.fromkeys((*self.extensions, *handle.extensions)))
            handle._give_up(module)
        for module, processor in self._sites:
            put_processor(module, processor)
        self._hooks = []
        for name, transformer in transformers.items():
            observe = partial(self._observe, Readers.of(families[name]))
            self._hooks += [
                transformer.register_forward_pre_hook(observe, with_kwargs=True),
                transformer.register_forward_hook(self._remember),
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
        layer = Layer(full, site.layer, method, branch, site.tokens)
        self._layers[full] = layer
        attend = partial(self._attend, layer)
        alike = method, self.schedule.why_layer(site.layer), site.tokens
        if branch is None:
            return SparseProcessor(stock, family.ATTENTION_CALL, attend, self, alike)
        return TrainableProcessor(stock, family.ATTENTION_CALL, attend, self, branch, alike)

    def detach(self) -> None:
        """Put the stock processors back. Does nothing the second time.

        With a technique for longer video that is still on, full attention goes on under it.
        """
        for hook in self._hooks:
            hook.remove()
        ours = {id(module) for module, processor in self._sites if module.processor is processor}
        models = {id(part): t for t in self._transformers.values() for part in t.modules()}
        for module, processor in self._sites:
            processor.end()  # others that took its place may put it back
            if id(module) in ours:
                put_processor(module, released(processor, models[id(module)]))
        self._hooks, self._sites = [], []
        while self.companions:
            self.companions.pop()()
        if self.extensions and ours:
            left = {
                name: transformer
                for name, transformer in self._transformers.items()
                if ours & {id(part) for part in transformer.modules()}
            }
            families = {name: family_of(module) for name, module in left.items()}
            scheduler, schedule = self.clock.scheduler, Schedule()
            stand_in = Attachment(
                left, families, Clock(scheduler), Options(Full(), schedule, self.kernel)
            )
            stand_in.extensions = self.extensions
        self.extensions = ()

    @property
    def is_attached(self) -> bool:
        return bool(self._sites)

    def _give_up(self, replaced: Any) -> None:
        """Another attachment takes this attention over; others of this one may stay."""
        for module, processor in self._sites:
            if module is replaced:
                processor.end()
        self._sites = [(module, ours) for module, ours in self._sites if module is not replaced]
        if not self._sites:
            self.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, every layer runs the model's own attention, bit for bit as if detached: with
        what is added to it.

        What runs inside is neither counted as a step nor recorded. Gradient checkpointing runs a
        forward pass again in the backward pass, which then belongs inside too.
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        """Inside, another schedule, with no other layers dense."""
        before, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule, self._dense_step = before, None

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, all that runs is one generation to `summary()`, however often the scheduler
        begins anew."""
        before, self._gathering = self._gathering, True
        if not before:
            self.records.clear()
        try:
            yield
        finally:
            self._gathering = before

    def summary(self) -> Summary:
        """What ran in the last generation, layer by layer and step by step.

        A generation begins where the scheduler does. Pipelines that make a long video part by
        part, such as Helios', begin it anew for each part: see `gathering`. Without a pipeline
        and a schedule of steps it is all since `attach`.
        """
        return Summary(self.method, self.schedule, dict(self.records))

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _observe(self, read: "Readers", transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._paused:
            return
        if not torch.compiler.is_compiling():
            self._warn_of_others()
        self._read, self._refusal = None, None
        try:
            video = read.video_shape(transformer, *args, **kwargs)
            before = 0 if read.before is None else read.before(transformer, *args, **kwargs)
            self.clock.tokens = Tokens(video, before)
        except ValueError as error:  # raised where a method is to run; what is dense needs no grid
            self.clock.tokens, self._refusal = None, error
        self.clock.texts = None
        if read.text_lengths is not None and self._refusal is None:
            in_graph = torch.compiler.is_compiling() or is_compiled(transformer)
            if in_graph or read.mask_of_pairs:
                self._read_texts(read.text_lengths, transformer, args, kwargs)
        # Without a schedule of steps they are counted for the records, which a graph has not.
        recorded = self.clock.scheduler is not None and not torch.compiler.is_compiling()
        needs_step = self.schedule.needs_step or any(e.needs_step for e in self.extensions)
        if recorded or needs_step:
            self._advance(read.timestep(*args, **kwargs), read.rising, needs_step)

    def _warn_of_others(self) -> None:
        if self._displaced:
            return
        others = [module for module, ours in self._sites if module.processor is not ours]
        if others:
            self._displaced = True
            warnings.warn(
                f"{len(others)} of {len(self._sites)} attentions have other processors than those "
                f"of attach, such as {type(others[0].processor).__name__}, and run dense: "
                "detach(), call fuse_qkv_projections() or set_attn_processor(), and attach then",
                Displaced,
                stacklevel=2,
            )

    def _remember(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when other forward passes
        may have gone by. What blocks read of their own pass is back as its backward begins."""
        if self._paused or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        now = Pass(self.clock.now(), self._dense_step, self._refusal)
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._return_to, now))

    def _return_to(self, one: "Pass", grad: Tensor) -> None:
        self.clock.return_to(one.moment)
        self._dense_step, self._refusal, self._read = one.dense_step, one.refusal, None

    @torch.compiler.disable(
        reason="a schedule of steps needs fullgraph=False or compile_repeated_blocks()"
    )
    def _advance(self, timestep: Tensor, rising: bool, needed: bool) -> None:
        """Outside of a graph, which else would be compiled again for each step."""
        if self.clock.advance(timestep, rising=rising) and not self._gathering:
            self.records.clear()
        if needed and self.clock.lost:
            raise ValueError(
                "the timestep changes while the scheduler of the pipeline that was attached to "
                "stands still, so that its steps cannot be told: attach to the pipeline that runs"
            )
        self._dense_step = self.schedule.why_step(self.clock.step, self.clock.steps)

    @torch.compiler.disable(
        reason="the lengths of texts need fullgraph=False or compile_repeated_blocks()"
    )
    def _read_texts(self, lengths: Callable, transformer: Any, args: tuple, kwargs: dict) -> None:
        """Graphs are made for the lengths of the texts, which are read outside of them."""
        self.clock.texts = lengths(transformer, *args, **kwargs)

    def _attend(self, layer: "Layer", call: Call) -> Tensor:
        if self._paused:
            return call.stock()
        why = self.schedule.why_layer(layer.number) or self._dense_step
        if isinstance(layer.method, (Dense, Full)):
            why = "method is dense"
        if self._refusal is not None and (why is None or self.extensions):
            raise self._refusal
        tokens = self._tokens(layer, call)
        if tokens is None:  # a call that is none over the grid, or dense without a grid
            return call.stock()
        extended = bool(self._active(tokens.video)) if self.extensions else False
        own = call.stock if why and not extended else None
        by_stock = own is not None and context_parallel.stock_is_right(call, tokens)
        if call.parallel is not None and not by_stock:
            return self._exchanged(layer, call, tokens, None if why else layer.method)
        if own is None:
            check_tokens(layer, call, tokens)
        if why and extended:
            layer = layer._replace(method=Full(), branch=None)
        if own is None and call.refused:
            raise ValueError(
                f"sparse attention does not take {', '.join(call.refused)} of {layer.name}; "
                "attach Dense() or detach for this model"
            )
        if torch.compiler.is_compiling():
            return self._compiled(layer, call, tokens) if own is None else own()
        key = (layer.name, self.clock.step)
        record = self.records.get(key) or Record()
        start = self._now(call.q) if self.timed else None
        if own is not None:
            out = own()
            record.add(context_parallel.counted_shape(call), why=why)
        elif self.observe is not None:
            out = call.stock()
            record.add(call.q.shape, why="observed")
            attend = partial(kernels.run, scale=call.scale, kernel=self.kernel)
            run = kernels.Runner(attend, self.kernel)
            for some in self._by_text(layer, call, tokens):
                whole = tokens.complete(call.q), call.k, call.v, tokens.complete(out)
                q, k, v, dense = (some.of(x) for x in whole)
                self.observe(layer, q, k, v, dense, some.video, run)
        else:
            out = self._sparse(layer, call, tokens, record, why)
        if start is not None:
            record.seconds = (record.seconds or 0.0) + self._now(call.q) - start
        self.records[key] = record  # not before the call has succeeded
        return out

    def _exchanged(self, layer: "Layer", call: Call, tokens: Tokens, method: Any) -> Tensor:
        if self.observe is not None:
            raise ValueError(
                "each process of context parallelism sees some heads alone, which nothing can be "
                "fitted to; calibrate before enable_parallelism"
            )
        options = {"method": method, "text_split": self._splits_text(layer.name)}
        return context_parallel.exchanged(call, tokens, partial(self._attend, layer), **options)

    @torch.compiler.assume_constant_result
    def _splits_text(self, name: str) -> bool:
        """Of the transformer with this layer. Its modules are gone through once."""
        transformer = name.split(".")[0]
        if transformer not in self._text_split:
            found = context_parallel.splits_text(self._transformers[transformer])
            self._text_split[transformer] = found
        return self._text_split[transformer]

    def _sparse(
        self, layer: "Layer", call: Call, tokens: Tokens, record: Record, why: str | None
    ) -> Tensor:
        trained = {}
        if layer.branch is not None:
            branch = on_device(layer.branch, call.q.device)
            trained["branch"] = context_parallel.of_heads(branch, call.heads)
        chosen: list[kernels.Choice] = []
        plans: list[Plan] = []

        def run(video: VideoShape, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
            plan = self._adjusted(plan, video)
            options: dict[str, Any] = {"scale": call.scale, "kernel": self.kernel}
            out = kernels.run(q, k, v, plan, **options, report=chosen.append)
            plans.append(plan)
            self._check(layer.method, chosen[-1].kernel, q, k, v, plan, out, call.scale)
            return out

        def by_method(q: Tensor, k: Tensor, v: Tensor, video: VideoShape) -> Tensor:
            method = self._within(layer.method, video)
            kernel = kernels.Runner(partial(run, video), self.kernel)
            return method(q, k, v, video=video, kernel=kernel, **trained)

        def attend(q: Tensor, k: Tensor, v: Tensor, video: VideoShape) -> Tensor:
            plans.clear()
            out = self._around(by_method, video)(q, k, v, video)
            record.add(q.transpose(1, 2).shape, why=why, choice=chosen[-1], plans=plans)
            return out

        return self._joined(layer, call, tokens, attend)

    def _compiled(self, layer: "Layer", call: Call, tokens: Tokens) -> Tensor:
        """The same in a graph, in which all that depends on the grid alone is a constant: the
        plan, or where q and k make the plan, its layout."""
        # Not the layer's: a graph is made for one layer, and run by all that are like it.
        trained = {}
        if layer.branch is not None:
            trained["branch"] = context_parallel.of_heads(self.branch, call.heads)
        full = isinstance(layer.method, Full)

        def run(video: VideoShape, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
            prepared = kernels.prepare(self._adjusted(plan, video), q.device, self.kernel)
            return kernels.compute(q, k, v, prepared, scale=call.scale)

        def by_method(q: Tensor, k: Tensor, v: Tensor, video: VideoShape) -> Tensor:
            where = (*video.grid, video.text, str(q.device))
            constant = self._constant(layer.name, full, *where)
            if not hasattr(layer.method, "layout"):
                return kernels.compute(q, k, v, constant, scale=call.scale)
            run_here = kernels.Runner(partial(run, video), self.kernel)
            return layer.method.laid_out(q, k, v, layout=constant, kernel=run_here, **trained)

        def attend(q: Tensor, k: Tensor, v: Tensor, video: VideoShape) -> Tensor:
            for extension in self._active(video):
                if extension.needs_step:
                    refuse_graph(extension)
            return self._around(by_method, video)(q, k, v, video)

        return self._joined(layer, call, tokens, attend)

    @torch.compiler.assume_constant_result
    def _constant(
        self, name: str, full: bool, frames: int, height: int, width: int, text: int, device: str
    ) -> tuple:
        """Runs while a graph is traced, outside of it."""
        where, video = torch.device(device), VideoShape(frames, height, width, text)
        method = self._within(Full() if full else self._layers[name].method, video)
        if hasattr(method, "layout"):
            return method.layout(video, where)
        plan = self._adjusted(method.plan(video, where), video)
        return kernels.prepare(plan, where, self.kernel)

    def _within(self, method: Any, video: VideoShape) -> Any:
        """Where attention has a smaller grid than the model, as on the levels of a UNet, a window
        larger than such an axis is all of it; larger than the model's it is an error."""
        tokens = self.clock.tokens
        if tokens is None or not hasattr(method, "within"):
            return method
        return method.within(video, tokens.video)

    def _active(self, video: VideoShape) -> list[AttentionExtension]:
        return [e for e in self.extensions if video.frames > e.trained]

    def _adjusted(self, plan: Plan, video: VideoShape) -> Plan:
        for extension in self._active(video):
            if extension.adjust is not None:
                plan = extension.adjust(plan, video, self.clock.step, self.clock.steps)
        return plan

    def _around(self, attend: Callable, video: VideoShape) -> Callable:
        for extension in self._active(video):
            if extension.around is not None:
                attend = partial(extension.around, attend)
        return attend

    def _joined(self, layer: "Layer", call: Call, tokens: Tokens, attend: Callable) -> Tensor:
        """(B, N, H, D) of `attend(q, k, v, video)`, which never sees the padding of a text: nor
        does anything else, so that its own output is zero."""
        whole = tokens.complete(call.q), call.k, call.v
        groups = self._by_text(layer, call, tokens)
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

    def _by_text(self, layer: "Layer", call: Call, tokens: Tokens) -> list[Samples]:
        seen = None if call.mask is None else self._seen(layer, call.mask, call.q, tokens)
        return by_text(tokens, len(call.q), seen, call.q.device)

    def _seen(
        self, layer: "Layer", mask: Tensor, q: Tensor, tokens: Tokens
    ) -> tuple[tuple[int, ...], ...]:
        texts = self.clock.texts
        if torch.compiler.is_compiling() and texts is None:
            refuse_mask(layer.name)
        if texts is not None:
            seen = tuple(tuple(range(n)) for n in texts)
        else:
            # Most models give all layers of a pass one mask, or one after the other the same;
            # reading it waits for the device.
            key = tokens, mask.shape, mask.dtype
            if self._read is None or self._read[1] != key or not self._is_read(mask):
                self._read = ref(mask), key, seen_text(mask, tokens.complete(q), tokens)
            seen = self._read[2]
        if seen is None:
            raise ValueError(
                f"sparse attention does not take attn_mask of {layer.name}, a mask that hides "
                f"more than padding of the text, got {tuple(mask.shape)} {mask.dtype}; "
                "attach Dense() or detach for this model"
            )
        return seen

    def _is_read(self, mask: Tensor) -> bool:
        """Whether it is the mask that was read last, or as good as that."""
        assert self._read is not None
        return self._masks_alike or self._read[0]() is mask

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
        key = (method, kernel, q.shape, q.dtype, q.device, plan.gain is None)
        if wanted and kernel != "reference" and key not in self._checked:
            check_rows(q, k, v, plan, out, scale=scale, kernel=kernel)
            self._checked.add(key)

    def _tokens(self, layer: "Layer", call: Call) -> Tokens | None:
        """Where the grid lies in an attention call; None where it is none over the grid, and where
        the grid is not known."""
        tokens = self.clock.tokens
        if tokens is None or layer.tokens is None:
            return tokens
        return layer.tokens(tokens, call)

    def _now(self, x: Tensor) -> float:
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return time.perf_counter()


def attachment_of(pipe_or_transformer: Any) -> Attachment:
    """The handle of what is attached; ValueError where nothing is."""
    found = [getattr(pipe_or_transformer, name, None) for name in TRANSFORMERS]
    for module in [pipe_or_transformer, *found]:
        if isinstance(module, nn.Module):
            for part in module.modules():
                processor = getattr(part, "processor", None)
                if isinstance(processor, SparseProcessor) and not processor.owner.stands_in:
                    return processor.owner
    raise ValueError("nothing is attached: call gen_accel.attach first")
