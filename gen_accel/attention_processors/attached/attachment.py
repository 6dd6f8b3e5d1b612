"""The handle of `attach`: the processors and hooks that it put on, and how they come off."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypedDict
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gen_accel import kernels
from gen_accel.attention_processors import context_parallel
from gen_accel.attention_processors.attached.clock import (
    KEPT,
    STEPS,
    TRANSFORMERS,
    Clock,
    ForwardPass,
    SchedulerOf,
    class_of,
    served_transformers,
)
from gen_accel.attention_processors.attached.graph import attend_in_graph
from gen_accel.attention_processors.attached.layer import (
    AttentionExtension,
    Layer,
    PaddingOnce,
    Shared,
    no_graph,
)
from gen_accel.attention_processors.attached.records import Summary, Watch
from gen_accel.attention_processors.attached.schedule import Schedule, as_schedule
from gen_accel.attention_processors.attached.step_state import (
    StepStates,
    check_state_room,
    state_bytes,
)
from gen_accel.attention_processors.families import (
    Family,
    SelfAttention,
    argument_names,
    by_name,
    family_of,
)
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.attention_processors.seam import (
    BoundProcessor,
    SparseProcessor,
    TappedProcessor,
    TrainableProcessor,
    calls,
    is_compiled,
    put_processor,
    released,
)
from gen_accel.memory import PLAN_CACHE
from gen_accel.method import Method, check_grid, check_method, check_named
from gen_accel.parsing import wrong_type
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from typing_extensions import Unpack

    from gen_accel.attention_processors.families.sites import Removable


class Displaced(UserWarning):
    """Processors that `attach` put on a model have been exchanged for others."""


class NothingSaved(UserWarning):
    """A method was attached to a model in which it leaves nothing out."""


class SilentBranch(UserWarning):
    """A method with parameters was attached, and they are at their start."""


class AttachOptions(TypedDict, total=False):
    """Options of `gen_accel.attach` beside the method, which has their meanings and defaults."""

    schedule: Schedule | None
    kernel: str
    dense_kernel: str | None
    timed: bool
    self_check: bool | None
    record: bool
    watch: bool
    padding_once: bool | None


def attach_method(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    method: Method,
    **options: "Unpack[AttachOptions]",
) -> "Attachment":
    """Attach `method`, as `gen_accel.attach` does, which has the arguments and errors.
    TypeError for an unknown option."""
    if unknown := options.keys() - AttachOptions.__optional_keys__:
        known, got = (", ".join(sorted(x)) for x in (AttachOptions.__optional_keys__, unknown))
        raise TypeError(f"options of attach are {known}, got {got}")
    for name in ("timed", "self_check", "record", "watch", "padding_once"):
        if not isinstance(value := options.get(name), bool | None):
            raise wrong_type(name, bool | None, value, f"{name}=True")
    if options.get("timed") and not options.get("record", True):
        raise ValueError(
            "timed=True writes seconds into the records, which record=False leaves out"
        )
    schedule = as_schedule(options.get("schedule"))
    kernels.check_name(options.get("kernel", "auto"))
    if (dense_kernel := options.get("dense_kernel")) is not None:
        kernels.check_name(dense_kernel, "dense_kernel")
    check_method(method)
    transformers = served_transformers(pipe_or_transformer)
    scheduler = None
    if not isinstance(pipe_or_transformer, nn.Module):
        scheduler = SchedulerOf(pipe_or_transformer)
    elif schedule.needs_total:
        raise ValueError(
            "dense_start, dense_end, dense_noise and steps counted from the end need all steps, "
            "which only a pipeline knows: attach to the pipeline, or use dense_steps"
        )
    for name, module in transformers.items():
        if not isinstance(method, Full) and getattr(module, KEPT, None) is not None:
            from gen_accel.attention_processors.attached.trained import check_used

            check_used(name, module, method)
        if is_compiled(module):
            raise ValueError(
                f"{name} is compiled already; load it again, attach, and compile then"
            )
    handle = Attachment(transformers, method, Clock(scheduler), **options)
    for module in transformers.values():
        if getattr(module, "peft_config", None):  # else no LoRA is on
            from gen_accel.attention_processors.attached.recipe import warn_of_other_attention

            warn_of_other_attention(module, method, stacklevel=4)
    kinds = {family_of(module).kind for module in transformers.values()}
    if method.thins_by_time and "video" not in kinds:
        models = ", ".join(type(module).__name__ for module in transformers.values())
        warnings.warn(
            f"{type(method).__name__} thins out by the distance in time and keeps all of a single "
            f"frame, so that it saves nothing in {models}; use Neighborhood, BlockMixture, "
            "SparseLinear or Piecewise",
            NothingSaved,
            stacklevel=3,
        )
    return handle


# Attachments that are on; when the last goes, cached plans are dropped.
_attached: "WeakSet[Attachment]" = WeakSet()


class Attachment(Shared):
    """The handle of `attach`. It owns the processors and hooks, and all that they remember.

    Attributes:
        branches: the parameters of the method in each layer, by the layer's name.
        companions: called when this is detached.
        stands_in: full attention, in the place of the model's own, for an extension.
    """

    def __init__(
        self,
        transformers: "Mapping[str, ModelMixin]",
        method: Method,
        clock: Clock,
        **options: "Unpack[AttachOptions]",
    ) -> None:
        families = {name: family_of(module) for name, module in transformers.items()}
        alike = all(family.attention.masks == "alike" for family in families.values())
        super().__init__(
            method,
            ForwardPass(clock, alike),
            as_schedule(options.get("schedule")),
            kernel=options.get("kernel", "auto"),
            dense_kernel=options.get("dense_kernel"),
            timed=options.get("timed", False),
            self_check=options.get("self_check"),
            record=options.get("record", True),
            watch=options.get("watch", False),
        )
        self.branches: dict[str, nn.Module] = {}
        self.companions: list[Callable[[], None]] = []
        self.stands_in = isinstance(method, Full)
        self._transformers = transformers
        self._gathering = False
        self._fitting: VideoShape | None = None  # the grid that the method was last held to
        self._displaced = False  # that it was warned of
        self._layers: dict[str, Layer] = {}
        self._text_split: dict[str, bool] = {}
        self._hooks: dict[str, list[Removable]] = {}
        self._sites: list[tuple[nn.Module, SparseProcessor]] = []
        # The other attentions, by the name of the transformer.
        self._beside: dict[str, list[tuple[nn.Module, TappedProcessor]]] = {}
        replaced: list[tuple[Attachment, nn.Module]] = []
        for name, transformer in transformers.items():
            call = families[name].attention.call
            for site in families[name].self_attentions(transformer):
                found = site.module.processor
                if isinstance(found, SparseProcessor):
                    replaced.append((found.owner, site.module))
                self._sites.append((site.module, self._processor(name, transformer, site, call)))
        self._note_changes()
        numbers = {layer.number for layer in self._layers.values()}
        self.schedule.check_layers(numbers)
        check_named(f"layers of {type(method).__name__}", method.named_layers, numbers)
        # Nothing is changed before here, so that a refusal leaves the model as it was.
        _attached.add(self)
        for handle, module in replaced:
            self.extensions = tuple(dict.fromkeys((*self.extensions, *handle.extensions)))
            handle._give_up(module)
        for module, processor in self._sites:
            put_processor(module, processor)
        once, own = options.get("padding_once"), self.dense_kernel is None
        self.padding, self._keeps_dense = None, own and not once
        if once or (once is None and not (own and method.is_dense)):
            self.padding = PaddingOnce(self._counts_padding_once)
            for name, transformer in transformers.items():
                self._beside[name] = self._count_padding_once(
                    transformer, families[name].attention.call, self.padding
                )
        for name, transformer in transformers.items():
            family, names = families[name], argument_names(type(transformer))
            begin = partial(self._begin, family, names, family.serves("lengths of texts"))
            self._hooks[name] = [
                transformer.register_forward_pre_hook(begin, with_kwargs=True),
                transformer.register_forward_hook(self._end),
            ]
            if not method.is_dense:
                self._hooks[name] += family.lighten(transformer, lambda: not self.is_paused)

    @property
    def clock(self) -> Clock:
        """The grid and the step of the forward pass under way."""
        return self.passing.clock

    def _processor(
        self, name: str, transformer: "ModelMixin", site: SelfAttention, call: str
    ) -> SparseProcessor:
        if why := self.method.unfit(class_of(transformer), site.layer, site.heads):
            raise ValueError(why)
        method = self.method.for_layer(site.layer)
        full, branch = f"{name}.{site.name}", None
        why = self.schedule.why_layer(site.layer)
        if why is None and method.has_parameters:
            place = next(site.module.parameters()).device
            if place.type == "meta":  # weights that are offloaded; the call brings the device
                place = torch.device("cpu")
            with torch.inference_mode(False):
                made = method.parameters_of(site.heads, site.dim, site.width)
                if made is not None:
                    branch = self.branches[full] = made.to(place, transformer.dtype)
                    if (held := getattr(transformer, KEPT, None)) is not None:
                        branch.load_state_dict(held.layers.get(site.name, {}), strict=False)
        layer = self._layers[full] = Layer(
            self,
            full,
            site.layer,
            method,
            site.heads,
            site.dim,
            branch=branch,
            tokens=site.tokens,
            call=site.call,
            text_split=partial(self._splits_text, name),
        )
        alike, traced = (layer.is_dense, why, site.call), partial(attend_in_graph, layer)
        kind = SparseProcessor if branch is None else TrainableProcessor
        return kind(site.module.processor, call, self, layer, alike, traced)

    def _count_padding_once(
        self, transformer: "ModelMixin", call: str, attend: PaddingOnce
    ) -> list[tuple[nn.Module, TappedProcessor]]:
        """Bind the attentions beside the method's own, which are to text for the most part."""
        made = []
        if next(transformer.parameters()).device.type not in ("cpu", "meta"):
            return made  # where each comparison would be waited for
        for module in transformer.modules():
            found = getattr(module, "processor", None)
            if isinstance(found, BoundProcessor):
                serves = found.name == call and not isinstance(found, SparseProcessor)
            else:
                serves = calls(found, call)
            if not serves:
                continue
            processor = TappedProcessor(found, call, transformer, attend)
            put_processor(module, processor)
            made.append((module, processor))
        return made

    def _counts_padding_once(self) -> bool:
        """Whether padding is counted once in the pass under way."""
        dense = self.passing.dense_step is not None or self.observe is not None
        own = self._keeps_dense and dense
        return self.is_attached and not self.is_paused and not own

    def detach(self) -> None:
        """Put the stock processors back. Does nothing the second time.

        Full attention goes on under a technique for longer video that is still on.
        """
        self._unhook(*list(self._hooks))
        if self.states is not None:
            self.states.forget()
        ours = {id(module) for module, processor in self._sites if module.processor is processor}
        models = {id(part): t for t in self._transformers.values() for part in t.modules()}
        for module, processor in self._sites:
            processor.end()  # others that took its place may put it back
            if id(module) in ours:
                put_processor(module, released(processor, models[id(module)]))
        self._sites = []
        while self.companions:
            self.companions.pop()()
        if self.extensions and ours:
            # For the extensions that are still on, full attention takes the place.
            left = {
                name: transformer
                for name, transformer in self._transformers.items()
                if ours & {id(part) for part in transformer.modules()}
            }
            options: AttachOptions = {"kernel": self.kernel, "dense_kernel": self.dense_kernel}
            full = Attachment(left, Full(), Clock(self.clock.scheduler), **options)
            full.extensions = self.extensions
        self.extensions = ()
        _attached.discard(self)
        if not _attached:
            PLAN_CACHE.forget()

    def exchange(self, method: Method) -> None:
        """Run `method` from now on. It may differ only in options that no parameter depends on."""
        self.method = method
        self._fitting = None
        if self.states is not None:
            self.states.forget()
        for layer in self._layers.values():
            layer.take(method.for_layer(layer.number))
        self._note_changes()

    def _note_changes(self) -> None:
        """Note whether any layer's method changes from step to step."""
        layers = self._layers.values()
        self._changes = any(layer.changes for layer in layers)
        self._counts = any(layer.method.changes_by == "number" for layer in layers)

    @property
    def is_attached(self) -> bool:
        return bool(self._sites)

    def _give_up(self, replaced: nn.Module) -> None:
        """Another attachment takes this attention over; others of this one may stay."""
        for module, processor in self._sites:
            if module is replaced:
                processor.end()
                self._layers.pop(processor.layer.name, None)
        self._sites = [(module, ours) for module, ours in self._sites if module is not replaced]
        left = {name.partition(".")[0] for name in self._layers}
        self._unhook(*(name for name in list(self._hooks) if name not in left))
        if not self._sites:
            self.detach()

    def _unhook(self, *transformers: str) -> None:
        for name in transformers:
            for hook in self._hooks.pop(name, ()):
                hook.remove()
            for module, processor in self._beside.pop(name, ()):
                if module.processor is processor:
                    put_processor(module, released(processor, self._transformers[name]))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model's own attention in every layer inside, bit for bit as if detached, neither
        counted nor recorded. Taps, such as image prompts, stay on.

        Gradient checkpointing runs a forward pass again in the backward pass, which then belongs
        inside too.
        """
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        """Use another schedule inside; only the layers that it names are dense."""
        before, self.schedule = self.schedule, schedule
        self.passing.set_dense(None)
        try:
            yield
        finally:
            self.schedule = before
            self.passing.set_dense(None)

    @contextmanager
    def running(self, method: Method, schedule: Schedule) -> Iterator[None]:
        """Run another method and schedule inside, see `exchange`; its steps are counted apart."""
        own, passing = self.method, self.passing
        self.exchange(method)
        self.passing = ForwardPass(Clock(self.clock.scheduler), passing.masks_alike)
        try:
            with self.scheduled(schedule):
                yield
        finally:
            self.passing = passing
            self.exchange(own)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Count all that runs inside as one generation in `summary()`, however often the scheduler
        restarts."""
        before, self._gathering = self._gathering, True
        if not before:
            self._forget_records()
            self.passing.forget()
        try:
            yield
        finally:
            self._gathering = before

    def _forget_records(self) -> None:
        self.records.clear()
        if self.padding is not None:
            self.padding.seen.clear()

    def summary(self) -> Summary:
        """Summarise the last generation, layer by layer and step by step.

        A generation begins where the scheduler does; see `gathering` for pipelines that restart it
        for each part of a video. Without a pipeline and a schedule of steps, it is all since
        `attach`.
        """
        passing = self.passing
        layers = {
            name: self.schedule.why_layer(layer.number) for name, layer in self._layers.items()
        }
        devices = [record.device for record in self.records.values() if record.device]
        return Summary(
            self.method.for_device(devices[0]) if devices else self.method,
            self.schedule,
            self.records,
            layers=layers,
            steps=dict(passing.steps),
            passes=dict(passing.passes),
            watching=None if self.watcher is None else Watch(self.watcher.seen),
            displaced=self._displaced_layers(),
            seen_passes=passing.seen_passes,
            paused=passing.paused,
            one_graph=passing.is_one_graph,
            in_graphs=any(map(is_compiled, self._transformers.values())),
            recording=self.record,
            padding="" if self.padding is None else self.padding.told(),
        )

    def explain(self, step: int | None = None, layer: str | int | None = None) -> str:
        """Explain in words why the calls of the last generation ran dense or sparse, by which
        kernel and at which density. See `Summary.explain`."""
        return self.summary().explain(step, layer)

    def __repr__(self) -> str:
        state = "" if self.is_attached else ", detached"
        names = ", ".join(type(module).__name__ for module in self._transformers.values())
        dense = "" if self.dense_kernel is None else f", dense by {self.dense_kernel!r}"
        return (
            f"<Attachment of {self.method} to {len(self._layers)} attentions of {names}, kernel "
            f"{self.kernel!r}{dense}{state}>"
        )

    def _displaced_layers(self) -> dict[str, str]:
        """Map each layer whose processor was exchanged to the class of the new one."""
        return {
            ours.layer.name: type(module.processor).__name__
            for module, ours in self._sites
            if module.processor is not ours
        }

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _begin(
        self,
        family: Family,
        names: tuple[str, ...],
        reads_texts: bool,
        transformer: "ModelMixin",
        args: tuple,
        kwargs: dict,
    ) -> None:
        """Prepare a forward pass of a transformer; a hook before each."""
        traced = torch.compiler.is_compiling()
        if self.is_paused:
            self.passing.paused += not traced
            return
        if not traced:
            self._warn_of_others()
        given = by_name(names, args, kwargs)
        self.passing.begin(family, transformer, given, reads_texts=reads_texts)
        if not traced:
            self._check_grid()
        # Without a schedule of steps they are counted for the records, which a graph has not.
        recorded = (self.clock.scheduler is not None or self.watch) and not traced
        needed = (
            self.schedule.needs_step
            or any(extension.needs_step for extension in self.extensions)
            or self.states is not None
            or self._counts
            or (self._changes and self.clock.scheduler is not None)
        )
        if (recorded or needed) and self.passing.advance(
            family.timestep(given),
            rising=family.attention.rising,
            schedule=self.schedule,
            needed=needed,
            fresh=not self._gathering,
            learning=self.states is not None,
        ):
            self._forget_records()
            if self.watcher is not None:
                self.watcher.seen.clear()
        if self.states is not None:
            self._begin_states(self.states, transformer, args, kwargs)

    def _check_grid(self) -> None:
        """Raise ValueError for a method that does not fit, even if it is to run much later."""
        video = None if self.clock.tokens is None else self.clock.tokens.video
        if video is None or video == self._fitting:
            return
        for method in dict.fromkeys(layer.method for layer in self._sparse_layers()):
            check_grid(method, video)
        self._fitting = video

    def _sparse_layers(self) -> list[Layer]:
        """Layers that are not always dense, over the model's own grid."""
        return [
            layer
            for layer in self._layers.values()
            if layer.tokens is None and self.schedule.why_layer(layer.number) is None
        ]

    @torch.compiler.disable(reason=STEPS)
    def _begin_states(
        self, states: StepStates, transformer: "ModelMixin", args: tuple, kwargs: dict
    ) -> None:
        """Tell the states that a pass begins; ValueError if they would not fit in memory."""
        fresh = states.begin(transformer, self.clock, learns=self.passing.learns)
        # The first tensor is the latents. They have a row for each sample, and lie on the device
        # that computes even if weights are still offloaded.
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim)
        latents, tokens = next(tensors, None), self.clock.tokens
        if not fresh or latents is None or tokens is None or torch.is_grad_enabled():
            return
        name = next(name for name, one in self._transformers.items() if one is transformer)
        share = context_parallel.degree_of(transformer)
        sites = [
            (layer.method, -(-layer.heads // share), layer.dim)
            for layer in self._sparse_layers()
            if layer.name.startswith(f"{name}.")
        ]
        passes, learned = states.passes
        one = state_bytes(sites, len(latents), tokens.video.tokens, transformer.dtype.itemsize)
        check_state_room(one, latents.device, method=self.method, passes=passes, learned=learned)

    def _end(self, transformer: nn.Module, args: tuple, output: object) -> None:
        """Finish a forward pass of a transformer; a hook after each."""
        if self.states is not None and not self.is_paused:
            self.states.end()
        if self.is_paused or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.passing.remember(output)

    def _warn_of_others(self) -> None:
        if not self._displaced and (others := self._displaced_layers()):
            self._displaced = True
            warnings.warn(
                f"{len(others)} of {len(self._sites)} attentions have other processors than those "
                f"of attach, such as {next(iter(others.values()))}, and run dense: "
                "detach(), call fuse_qkv_projections() or set_attn_processor(), and attach then",
                Displaced,
                stacklevel=2,
            )

    @torch.compiler.assume_constant_result
    def _splits_text(self, transformer: str) -> bool:
        """Whether context parallelism splits the text of a transformer. It is searched once."""
        if transformer not in self._text_split:
            found = context_parallel.splits_text(self._transformers[transformer])
            self._text_split[transformer] = found
        return self._text_split[transformer]


def _owners(pipe_or_transformer: object) -> Iterator[Attachment]:
    """Owners of the processors in a pipeline's transformers, or in any module."""
    parts = (getattr(pipe_or_transformer, name, None) for name in TRANSFORMERS)
    for module in (pipe_or_transformer, *parts):
        for part in module.modules() if isinstance(module, nn.Module) else ():
            processor = getattr(part, "processor", None)
            if isinstance(processor, SparseProcessor):
                yield processor.owner


def attachment_of(pipe_or_transformer: "DiffusionPipeline | nn.Module") -> Attachment:
    """Return the handle of the attachment; ValueError if nothing is attached."""
    for owner in _owners(pipe_or_transformer):
        if not owner.stands_in:
            return owner
    raise ValueError("nothing is attached: call gen_accel.attach first")


def attachments_of(pipe_or_transformer: object) -> list[Attachment]:
    """List the attachments on the transformers of a pipeline, each once."""
    return [owner for owner in dict.fromkeys(_owners(pipe_or_transformer)) if owner.is_attached]


def extend_attention(
    pipe_or_transformer: "DiffusionPipeline | nn.Module", extension: AttentionExtension
) -> Callable[[], None]:
    """Lay `extension` over all attached methods, now or later, until the returned function is
    called.

    If nothing is attached, full attention replaces the model's own until the extension is removed.
    A method that is attached meanwhile takes the extension over; when it is detached, the
    extension stays. ValueError for an extension of a name that is on, and for a compiled
    transformer with nothing attached or an extension that differs from step to step.
    """
    transformers = served_transformers(pipe_or_transformer)
    for name, module in transformers.items():
        if extension.needs_step and is_compiled(module):
            raise ValueError(no_graph(extension) + f", and {name} is compiled already")
    for owner in attachments_of(pipe_or_transformer):
        if extension.name in {other.name for other in owner.extensions}:
            raise ValueError(f"{extension.name} is on already: remove it first")
    free = [module for module in transformers.values() if not attachments_of(module)]
    whole = len(free) == len(transformers)
    for module in [pipe_or_transformer] if whole else free:
        attach_method(module, Full())
    for owner in attachments_of(pipe_or_transformer):
        owner.extensions = (*owner.extensions, extension)

    def remove() -> None:
        found = [owner for module in transformers.values() for owner in attachments_of(module)]
        for owner in dict.fromkeys(found):
            owner.extensions = tuple(e for e in owner.extensions if e is not extension)
            if owner.stands_in and not owner.extensions:
                owner.detach()

    return remove


@contextmanager
def one_generation(pipe: object) -> Iterator[None]:
    """Enter `Attachment.gathering` of all attachments of a pipeline."""
    with ExitStack() as stack:
        for owner in attachments_of(pipe):
            stack.enter_context(owner.gathering())
        yield
