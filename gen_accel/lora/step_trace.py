"""Memory and work of a training step, counted on fake tensors, where nothing is computed.

The step is the trainer's own: the objective with its LoRA and the attached method, under autocast
and checkpointing as the config says, forward and backward. Fake tensors have shapes and no values.
Each storage is followed from the operator that makes it to its end, also storages that autograd
saves. Blocks of one kind cost the same: one of each kind is traced, beside the first, whose input
needs no gradient, and the others are put in between.

In the place of a sparse kernel runs an operator that makes and saves what the kernels do: q, k, v,
the output and three numbers a query; in its backward pass a gradient of each. Not counted: scratch
memory within an operator, plans, and what an allocator rounds up to.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gen_accel import kernels
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import Family, family_for
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.lora.adapters import active
from gen_accel.lora.artefact import add_lora, teacher_attention
from gen_accel.lora.batches import Adapter, Batch
from gen_accel.lora.caching.inputs import FIRST_FRAME, LAST_FRAME
from gen_accel.lora.config import CAUSAL, FREE_TO_CHANGE, TrainConfig
from gen_accel.lora.memory import checkpoint_activations
from gen_accel.lora.objective import Objective
from gen_accel.lora.student_steps import StudentSteps
from gen_accel.measure.cost.estimate import densities_of
from gen_accel.measure.cost.model import Subject
from gen_accel.measure.cost.work import Segment, Timeline, Work, are_alike
from gen_accel.method import Method
from gen_accel.pipelines.attach import attach
from gen_accel.video import VideoShape

FORWARD, BACK, CALL = "forward", "backward", "call"
STATS = 3  # numbers in fp32 that a sparse kernel keeps of a query
# Fields of a config that change neither memory nor work of a step, but for `recomputed`.
UNTRACED = (*FREE_TO_CHANGE, "model", "stages", "base", "optimizer", "ema_decay")
MOST_TRACED = 64  # traces that a process remembers

_TRACED: "dict[Hashable, StepTrace]" = {}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device at the moment of a step that needs most, as `forecast.ROWS` names them.

    Args:
        host: bytes in the host's memory at most: swapped blocks, offloaded inputs of blocks. On
            unified memory at the same moment.
    """

    weights: int
    adapter: int
    kept: int
    block: int
    outside: int
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.kept + self.block + self.outside

    @property
    def in_one(self) -> int:
        """Total bytes on unified memory."""
        return self.total + self.host


class TraceSegment(NamedTuple):
    """A part of a step.

    Args:
        kind: forward or backward of a block; call: of a block without gradients; head: after all
            blocks, backward; outside: everything else outside of the blocks, forward.
        grads: bytes of gradients that it leaves on the parameters.
    """

    segment: Segment
    kind: str
    grads: int = 0


@dataclass(frozen=True)
class StepTrace:
    """A training step, part by part.

    Args:
        parts: of the whole model, in order; equal blocks are the same object.
        batch: bytes of latents, noise and conditions.
        density: share of the token pairs that a sparse layer computes.
        shorter: the step of a student before this one, where the mean work lies between both.
    """

    parts: tuple[TraceSegment, ...]
    batch: int
    density: float
    shorter: "StepTrace | None" = None

    @property
    def work(self) -> Work:
        """Work of all parts, of the mean step."""
        steps = [one for one in (self, self.shorter) if one is not None]
        works = [part.segment.work for one in steps for part in one.parts]
        return Work(
            products=sum(work.products for work in works) / len(steps),
            attention=sum(work.attention for work in works) / len(steps),
            moved=sum(work.moved for work in works) / len(steps),
            peak=max(work.peak for work in works),
            sparse=sum(work.sparse for work in works) / len(steps),
        )

    @property
    def forward_peak(self) -> int:
        """Bytes of a forward pass that keeps nothing for a backward pass."""
        kept, most = 0, 0
        for part in self.parts:
            if part.kind == FORWARD:
                most = max(most, part.segment.work.peak - kept)
                kept += part.segment.after - part.segment.before
        return most + self.batch

    def moments(self, *, offload: bool) -> Iterator[StageMemory]:
        """Yield the memory at the worst moment of each part: gradients, and no weights.

        Args:
            offload: the inputs of blocks wait in the host's memory, all but the last one's.
        """
        kept = grads = 0
        outside = self.batch
        stack: list[int] = []
        for segment, kind, left in self.parts:
            rise, net = segment.work.peak - segment.before, segment.after - segment.before
            is_block = kind in (FORWARD, BACK, CALL)
            there = min(kept, max(stack, default=0)) if offload else kept
            beside = outside if is_block else outside + rise
            waiting = (kept - there) * offload
            yield StageMemory(0, grads, there, rise * is_block, beside, waiting)
            if kind == BACK:
                kept += net - left
                grads += left
            elif kind == FORWARD or (stack and not rise):
                kept += net
                stack.append(net)
            else:
                outside += net

    def towards(self, other: "StepTrace", share: float) -> "StepTrace":
        """The step on the line through this and a longer or shorter one, at a share of the way."""

        def between(a: float, b: float) -> int:
            return round(a + share * (b - a))

        parts = []
        for part, (second, _, _) in zip(self.parts, other.parts, strict=True):
            first = part.segment
            segment = replace(
                first,
                before=between(first.before, second.before),
                after=between(first.after, second.after),
                work=replace(first.work, peak=between(first.work.peak, second.work.peak)),
            )
            parts.append(part._replace(segment=segment))
        return replace(self, parts=tuple(parts), batch=between(self.batch, other.batch))


class StepTracer:
    """Traces steps of one model at several sizes.

    Args:
        subject: the model, on the meta device in the dtype that it trains in. It stays as it is.
        config: of the training; the sizes of its stages are not read.

    Attributes:
        known: traces by their grids.
    """

    def __init__(self, subject: Subject, config: TrainConfig) -> None:
        self.config, self.subject = config, subject
        self.known: dict[VideoShape, StepTrace] = {}
        self.family = family_for(subject.model, "training")
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._timeline = Timeline()
        self.share = 1.0  # of the token pairs that a sparse layer computes in the pass under way
        self._backward = False
        method = method_from(config.method, config.settings)
        sparse = not method.is_dense
        dense = config.dense_layers if sparse else len(subject.blocks)
        cut, self._times, dense = _cut(subject, dense)
        cut.requires_grad_(False)
        if config.rank:
            with torch.device("meta"):
                add_lora(cut, config)
            for value in cut.parameters():
                if value.requires_grad:
                    value.data = value.data.float()
        self.transformer = _fake(cut, self._mode)
        stand = _Stand(self) if sparse else method
        schedule = Schedule(dense_layers=dense if sparse else 0)
        self.handle = attach(self.transformer, stand, schedule=schedule, record=False)
        if config.checkpoints_activations:
            checkpoint_activations(self.transformer, "on", parts=config.checkpoint_parts)
        of_teacher = None if config.teacher_lora is None else read_recipe(config.teacher_lora)
        self._teacher, _ = teacher_attention(config, of_teacher)
        lora = _TracedLora(self, self._teacher.is_dense)
        self._objective = Objective.of(config, self.transformer, lora)
        self.transformer.train()
        for name in self._times:
            block = self.transformer.get_submodule(name)
            block.register_forward_pre_hook(partial(self._enter, name), prepend=True)
            block.register_forward_hook(partial(self._leave, name))

    def trainable(self, name: str = "") -> int:
        """Bytes of the parameters that train, of the cut model or of one of its blocks."""
        module = self.transformer.get_submodule(name)
        return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)

    @property
    def trained_shapes(self) -> Counter[tuple[int, ...]]:
        """Number of parameters of each shape that train, of the whole model."""
        found: Counter[tuple[int, ...]] = Counter()
        for name, times in {"": 1, **{name: n - 1 for name, n in self._times.items()}}.items():
            for parameter in self.transformer.get_submodule(name).parameters():
                if parameter.requires_grad and times:
                    found[tuple(parameter.shape)] += times
        return found

    def trace(self, grid: VideoShape, computed: float) -> StepTrace:
        """Trace a step on clips of some tokens; ValueError for a size that the model refuses.

        Args:
            computed: share of the token pairs that a sparse layer computes.
        """
        model, config = self.subject.model, repr(self.subject.config)
        about = type(model), config, next(model.parameters()).dtype, self.subject.text
        fields = [(n, x) for n, x in vars(self.config).items() if n not in UNTRACED]
        key = (*about, repr(fields), recomputed(self.config), grid, computed)
        if key not in _TRACED:
            try:
                made = self._traced(grid, computed)
            except RuntimeError as error:
                why = str(error).partition("\n")[0]
                raise ValueError(f"{self.subject.name} does not train at {grid}: {why}") from error
            while len(_TRACED) >= MOST_TRACED:
                _TRACED.pop(next(iter(_TRACED)))
            _TRACED[key] = made
        return self.known.setdefault(grid, _TRACED[key])

    def _traced(self, grid: VideoShape, computed: float) -> StepTrace:
        """Trace a step at a middle noise level, or the one or two middle steps of a student: the
        steps before them, which differ, are as many as in the mean."""
        _, self.taught, _ = densities_of(self._teacher, self.subject.seen(grid))
        steps = StudentSteps.of(self.config, 1.0)
        if steps is None:
            return self._traced_at(0.5, grid, computed)
        low, high = (len(steps) - 1) // 2, len(steps) // 2
        made = self._traced_at(steps.levels[high], grid, computed)
        if low == high:
            return made
        return replace(made, shorter=self._traced_at(steps.levels[low], grid, computed))

    def _traced_at(self, sigma: float, grid: VideoShape, computed: float) -> StepTrace:
        config = self.config
        self.share, self._backward, self._timeline = computed, False, Timeline()
        self._returned: set[str] = set()
        given = self._batch(grid, sigma)
        size = sum(x.numel() * x.itemsize for x in _tensors(given))
        is_mixed = config.mixed_precision != "no"
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=is_mixed)
        with self._timeline, _Chosen(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of how a CPU would run it
            self._timeline.begin("outside")
            with mixed:
                loss = self._objective(*given).float()
            del given
            self._timeline.begin("head")
            self._backward = True
            loss.backward()
            self._timeline.begin("")
            del loss
            for parameter in self.transformer.parameters():
                parameter.grad = None
        return StepTrace(tuple(self._whole()), size, computed)

    def _batch(self, grid: VideoShape, level: float) -> Batch:
        """A batch at a noise level: latents and noise without values, the rest with."""
        model = self.subject.config
        size = self.config.batch_size
        sides = [n * p for n, p in zip(grid.grid, self.subject.patch, strict=True)]
        chunk = self.config.chunk_frames * self.subject.patch[0]
        if self.config.objective == CAUSAL:  # sizes between those that train are whole chunks too
            sides[0] = max(2 * chunk, sides[0] // chunk * chunk)
        channels = self.family.latent_channels(model)
        with self._mode:
            clean, noise = (torch.empty(size, channels, *sides) for _ in range(2))
        each = self.family.tiny_conditions(model, self.subject.text or 0)
        condition = self.config.condition
        if self.family.needs_control(model):
            each |= self.family.tiny_control(self.transformer, *sides)
        elif condition in (FIRST_FRAME, LAST_FRAME) or takes_first_frame(
            self.family, model, channels
        ):
            each |= self.family.tiny_first_frame(self.transformer, *sides)
        if condition == LAST_FRAME:
            each |= self.family.tiny_last_frame(self.transformer, *sides[1:])
        sound = None
        if self.config.sound:
            fps = float(self.config.fps or 24)
            length = self.family.sizes.coding().frames_of(sides[0])
            heard, text = self.family.tiny_sound(model, length, fps, self.subject.text or 0)
            sound, each = torch.stack([heard] * size), each | text
        conditions = {name: torch.stack([x] * size) for name, x in each.items()}
        if self.family.training.takes_fps:
            conditions["fps"] = torch.full((size,), float(self.config.fps or 24))
        if self.config.objective == CAUSAL:  # of each chunk, as captions change
            count = sides[0] // chunk
            conditions = {
                name: x[:, None].expand(-1, count, *x.shape[1:]) for name, x in conditions.items()
            }
        uncond = conditions if self.config.teacher_guidance > 1 else None
        sigma = torch.full((size,), level)
        return Batch(clean, noise, sigma, conditions, None, uncond, sound=sound, sound_noise=sound)

    def _enter(self, name: str, module: nn.Module, args: object) -> None:
        if not self._backward:
            kind = FORWARD if torch.is_grad_enabled() else CALL
            self._timeline.begin(f"{kind} {name}")

    def _leave(self, name: str, module: nn.Module, args: object, out: object) -> None:
        if self._backward:
            return
        self._timeline.begin("outside")
        for one in _tensors(out):
            if one.requires_grad:
                one.register_hook(lambda _: self._return(name))

    def _return(self, name: str) -> None:
        """Begin the backward pass of a block, at the first gradient of its outputs."""
        if name not in self._returned:
            self._returned.add(name)
            self._timeline.begin(f"{BACK} {name}")

    def _whole(self) -> Iterator[TraceSegment]:
        """Parts of the whole model: those of a block as often as there are such blocks."""
        segments = iter(self._timeline.segments)
        for segment in segments:
            what, _, name = segment.name.partition(" ")
            parts = [TraceSegment(segment, what, self.trainable(name) if what == BACK else 0)]
            if what in (FORWARD, CALL):
                parts.append(TraceSegment(next(segments), "outside"))
            yield from parts * self._times.get(name, 1)


class _Chosen(TorchFunctionMode):
    """Selects by the places that a mask keeps, as a tensor without values takes no mask."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is Tensor.__getitem__:
            x, mask = args
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and type(mask) is Tensor:
                args = x, mask.nonzero().unbind(1)
        return func(*args, **(kwargs or {}))


class _TracedLora(Adapter):
    def __init__(self, tracer: StepTracer, is_dense: bool) -> None:
        super().__init__()
        self._tracer, self._is_dense = tracer, is_dense

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Be the model as it came, without the LoRA, through the teacher's attention."""
        tracer, handle = self._tracer, self._tracer.handle
        with active(tracer.transformer, None):
            if self._is_dense:
                with handle.paused():
                    yield
                return
            share, tracer.share = tracer.share, tracer.taught
            try:
                with handle.running(_Stand(tracer), handle.schedule):
                    yield
            finally:
                tracer.share = share


class _Stand(Method):
    """Stands for a sparse method: makes and keeps what the kernels do, and computes nothing."""

    def __init__(self, tracer: StepTracer) -> None:
        self._tracer = tracer

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: object
    ) -> Tensor:
        tracer = self._tracer
        return _Sparse.apply(*kernels.as_autocast(q, k, v), tracer._timeline, tracer.share)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, timeline: Timeline, share: float
    ) -> Tensor:
        out = torch.empty_like(q)
        stats = q.new_empty((STATS, *q.shape[:3]), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.timeline, ctx.share = timeline, share
        timeline.attend(q, k, v, share, back=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_ = ctx.saved_tensors
        grad = grad.to(q.dtype)
        ctx.timeline.attend(q, k, v, ctx.share, back=True)
        return (*(torch.empty_like(x) for x in (q, k, v)), None, None)


def recomputed(config: TrainConfig) -> tuple[bool, bool]:
    """Whether blocks are computed again in the backward pass, and their parts once more."""
    return config.checkpoints_activations, config.checkpoint_parts


def _cut(subject: Subject, dense: int) -> tuple[ModelMixin, dict[str, int], int]:
    """Copy a model with one block of each kind, beside the first.

    Returns the copy; by name, for how many blocks each of its blocks stands; how many of its
    first layers are dense, of the `dense` of the model.
    """
    model = subject.model
    assert isinstance(model, ModelMixin)
    own: dict[str, bool] = {}  # blocks by name, whether they are dense
    for site in subject.sites:
        own[".".join(site.name.split(".")[:2])] = site.layer < dense
    times: dict[str, int] = {}
    lists: dict[str, nn.ModuleList] = {}
    first, few = next(iter(own)), 0
    for stack, blocks in model.named_children():
        if not isinstance(blocks, nn.ModuleList) or f"{stack}.0" not in own:
            continue
        names = [f"{stack}.{i}" for i in range(len(blocks))]
        kinds: list[list[int]] = [[], [], []]  # the first, dense, sparse
        for i, name in enumerate(names):
            kinds[0 if name == first else 1 if own[name] else 2].append(i)
        # Blocks that take what others make by their numbers are all kept.
        is_cut = are_alike(blocks) and not subject.family.needs_control(subject.config)
        groups = kinds if is_cut else [[i] for i in range(len(blocks))]
        kept = [group for group in groups if group]
        if len(kept[-1]) > 1:  # the last block's successor differs
            kept = [*kept[:-1], kept[-1][:-1], kept[-1][-1:]]
        lists[stack] = blocks
        for place, group in enumerate(kept):
            times[f"{stack}.{place}"] = len(group)
            few += own[names[group[0]]]
        setattr(model, stack, nn.ModuleList(blocks[group[0]] for group in kept))
    try:
        return deepcopy(model), times, few
    finally:
        for stack, blocks in lists.items():
            setattr(model, stack, blocks)


def _fake(model: ModelMixin, mode: FakeTensorMode) -> ModelMixin:
    """Give a model on the meta device parameters and buffers that seem to be on the CPU."""
    with mode:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    module._parameters[name] = nn.Parameter(empty, value.requires_grad)
            for held in (module._buffers, vars(module)):  # some keep tables beside their buffers
                for name, value in held.items():
                    if isinstance(value, Tensor):
                        held[name] = torch.empty(value.shape, dtype=value.dtype)
    return model


def takes_first_frame(family: Family, config: Mapping[str, object], channels: int) -> bool:
    """Whether a model takes more channels than a clip's latents have: those of a first frame."""
    if not family.training.first_frame:
        return False
    return config.get("in_channels", channels) != channels


def _tensors(given: object) -> Iterator[Tensor]:
    """Tensors among arguments of the objective, each once."""
    found = {id(x): x for x in tree_leaves(given) if isinstance(x, Tensor)}
    yield from found.values()
