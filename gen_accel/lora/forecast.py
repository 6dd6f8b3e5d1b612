"""Memory and seconds of a training, before it: from the config of the model alone.

    memory of a stage = weights + LoRA, its average, gradients and optimizer
                        + kept tensors of the blocks that wait for their backward pass
                        + one block, forward, again and backward
                        + everything outside of the blocks

All but weights and optimizer is measured in one training step, run on fake tensors
(`gen_accel.lora.step_trace`). Videos that are sampled and their decoding are other moments, and so
is the caching of clips, which comes before all of them.

Not counted: adapters other than a LoRA, a teacher's LoRA, scratch memory of operators, the time of
loading, caching, sampling and of copies between host and device.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import nn

from gen_accel.attention_processors.families.weights import BYTES, block_names, linear_names
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.demo import NAME
from gen_accel.demo import model_named as source_named
from gen_accel.lora.caching.inputs import check_sound
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.memory import (
    RESIDENT,
    check_adapter,
    kinds_without_parts,
    parts_of,
    spread,
)
from gen_accel.lora.optimizers import bytes_of_state
from gen_accel.lora.step_trace import StageMemory, StepTrace, StepTracer, recomputed
from gen_accel.measure.cost.estimate import densities_of
from gen_accel.measure.cost.figures import (
    WIDTH,
    Range,
    card_named,
    duration,
    gigabytes,
    share_of_peak,
    wrapped,
)
from gen_accel.measure.cost.forecast import STEP, calls_of
from gen_accel.measure.cost.model import components_of, subject_of
from gen_accel.measure.cost.rates import SHEET, Rates, known_efficiency, rates_here, rates_of_card
from gen_accel.measure.cost.work import FEW, MORE, decoding, encoding
from gen_accel.parsing import shown
from gen_accel.video import VideoShape

CARDS = ("4090", "5090", "h100")  # beside this machine, if none is named
MOMENTS = 4  # bytes of each of AdamW's two moments of a parameter
OWN_OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes a parameter: two moments
ROWS = {  # of a stage's bytes, in words
    "weights": "weights",
    "adapter": "LoRA, optimizer, gradients",
    "kept": "kept of other blocks",
    "block": "one block at work",
    "outside": "batch, embeddings, loss",
}
LABEL, CELL = 26, 17  # characters of a table's columns


class Size(NamedTuple):
    """Size of a clip, in frames and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class PlannedStage:
    """Cost of one stage of the curriculum.

    Args:
        tokens: of a clip.
        density: share of the token pairs that the method computes in a sparse layer.
        memory: of a step; on a device with memory of its own, if one was asked for.
        seconds: of a step, by the device's name.
    """

    size: Size
    steps: int
    tokens: int
    density: float
    memory: StageMemory
    seconds: Mapping[str, Range]

    @property
    def frames(self) -> int:
        return self.size.frames


@dataclass(frozen=True)
class Change:
    """An option to turn on, in words, and the bytes that it saves beside the earlier ones."""

    option: str
    saves: int


@dataclass(frozen=True)
class Advice:
    """Options that make a training fit a device.

    Args:
        changes: in the order of their cost.
        fits: whether they suffice.
        frames: longest clip that fits with all of them, in frames; 0 if no clip fits. The clips of
            the config if the options suffice.
    """

    changes: tuple[Change, ...]
    fits: bool
    frames: int


@dataclass(frozen=True)
class Verdict:
    """Whether a training fits a device.

    Args:
        memory: bytes that a program may use there; None if unknown.
        peak: bytes at most, over all stages and moments.
        advice: None if it fits, or if the memory is unknown.
        rates_from: origin of the seconds, in words.
    """

    device: str
    memory: int | None
    peak: int
    moment: str
    advice: Advice | None
    rates_from: str
    hours: Range

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory

    def __str__(self) -> str:
        hours = f"{duration(self.hours.times(3600))} in all"
        if self.memory is None:
            return f"{self.device}: at most {gigabytes(self.peak)} ({self.moment}); {hours}"
        place = gigabytes(self.memory).replace(".0 ", " ")
        if self.fits:
            return f"{self.device}: fits in {place}: yes, {gigabytes(self.peak)}; {hours}"
        said = f"{self.device}: fits in {place}: no, {gigabytes(self.peak)} ({self.moment})"
        advice = self.advice
        if advice is None:
            return said
        options = [f"{one.option} saves {gigabytes(one.saves)}" for one in advice.changes]
        if advice.fits:
            left = gigabytes(self.peak - sum(change.saves for change in advice.changes))
            return f"{said}. Turn on: {', then '.join(options)}; it fits with {left}; {hours}"
        smaller = "at any length: lower height and width"
        if advice.frames:
            smaller = f"it fits with stages of at most {advice.frames} frames"
        return f"{said}. {'; '.join([*options, 'then ' * bool(options) + smaller])}"


@dataclass(frozen=True)
class TrainingPlan:
    """Memory and seconds of a training. `to_dict()` for a report, `lines()` for people.

    Args:
        options: the config's options of memory, by name.
        stages: of the curriculum, once for each size.
        sampling, decoding: bytes on the device while a validation video is sampled, and decoded;
            None without validation, or if it is unknown.
        caching: bytes on the device while clips and captions are encoded, beforehand, the larger
            of both; None if it is unknown.
        loading: bytes in the host's memory when the pipeline is loaded.
        trainable: number of parameters that train.
        notes: costs that are not counted, in words.
        without_parts: classes of the blocks that checkpoint_parts leaves as they are.
    """

    model: str
    options: Mapping[str, str | int | None]
    stages: tuple[PlannedStage, ...]
    sampling: int | None
    decoding: int | None
    caching: int | None
    loading: int
    trainable: int
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    without_parts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = asdict(self)
        for stage, held in zip(self.stages, found["stages"], strict=True):
            held["size"] = stage.size._asdict()
            held["memory"]["total"] = stage.memory.total
        for verdict, held in zip(self.verdicts, found["verdicts"], strict=True):
            held["fits"] = verdict.fits
        return found | {"rows": ROWS}

    def lines(self, width: int = WIDTH) -> list[str]:
        """Lines of the needs of a training and whether it fits, of at most `width` characters."""
        return wrapped(self._paragraphs(width), width)

    def _paragraphs(self, width: int) -> Iterator[str]:
        yield f"{self.model}: {self.trainable / 1e6:,.1f} million parameters train"
        yield ", ".join(
            _words(name, x) for name, x in self.options.items() if x or name == FIELDS[0]
        )
        yield ""
        room = max(1, (width - LABEL - 2) // CELL)
        for first in range(0, len(self.stages), room):
            yield from self._table(self.stages[first : first + room])
            yield ""
        if self.sampling is not None:
            decoded = _size(self.decoding)
            yield f"validation: sampling {gigabytes(self.sampling)}, decoding {decoded}"
        yield f"caching, before the training: {_size(self.caching)}"
        yield f"CPU memory while the pipeline is loaded: {gigabytes(self.loading)}"
        yield ""
        yield from map(str, self.verdicts)
        if self.verdicts:
            yield ""
        origins = "; ".join(dict.fromkeys(one.rates_from for one in self.verdicts))
        yield f"Seconds: {origins.replace(f'; {SHEET}', '; ')}."  # once for all cards
        for kind in self.without_parts:
            yield (
                f"checkpoint_parts: {kind} is computed again as a whole, as it has linear layers "
                "beside its attention and feed-forward"
            )
        yield from (f"not counted: {note}" for note in self.notes)

    def _table(self, stages: Sequence[PlannedStage]) -> Iterator[str]:
        def row(label: str, cells: list[str]) -> str:
            return f"  {label:<{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells)

        def sizes(name: str) -> list[str]:
            found: list[int] = [getattr(stage.memory, name) for stage in stages]
            return [f"{x / 1e9:.1f}" if x >= 1e8 else f"{x / 1e9:.3f}" for x in found]

        yield row("GB a stage", [f"{stage.frames} frames" for stage in stages])
        if len({stage.size[1:] for stage in self.stages}) > 1:
            yield row("", [f"{stage.size.height} x {stage.size.width}" for stage in stages])
        yield row("tokens of a clip", [f"{stage.tokens:,}" for stage in stages])
        for name, words in ROWS.items():
            yield row(words, sizes(name))
        yield row("on the device at most", sizes("total"))
        if any(stage.memory.host for stage in stages):
            yield row("waiting in CPU memory", sizes("host"))
        for device in stages[0].seconds:
            yield f"  a step, {device}:"
            yield row("", [duration(stage.seconds[device], STEP) for stage in stages])


def _size(known: int | None) -> str:
    return "not known" if known is None else gigabytes(known)


def forecast_training(
    config: TrainConfig,
    *,
    gpus: Sequence[str] | None = None,
    here: bool = True,
    rates: Rates | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> TrainingPlan:
    """Forecast the memory of each stage of a training and its seconds, without loading the model.

        plan = forecast_training(TrainConfig(model="Wan2.1-T2V-14B"), gpus=["4090"])
        print(plan.verdicts[-1].fits, plan.verdicts[-1].advice)

    Args:
        config: its model may also be the name of a published one, which needs no file.
        gpus: names of cards, as `gen-accel estimate --gpu` takes them; None: `CARDS`.
        here: whether this machine is a device too. Its rates are measured in seconds, the first
            time.
        rates: of this machine; None: the kept ones, or measured now.
        tell: is told the work of the next seconds.

    Raises:
        ValueError: an unknown card, an adapter that is no LoRA, a model that does not train, or
            sizes that it cannot take.
    """
    cards = [card_named(name) for name in (CARDS if gpus is None else gpus)]
    if config.adapter != "lora":
        raise ValueError(f"--plan knows adapter lora, got {shown(config.adapter)}")
    if config.context_parallel > 1:
        raise ValueError(
            "--plan counts one process with whole clips, got context_parallel "
            f"{config.context_parallel}: leave it out"
        )
    if any(stage.epochs for stage in config.curriculum):
        clips = sum(video.repeats for video in config.clips() if not video.is_picture)
        if not clips:
            raise ValueError(
                f"stages {' '.join(config.stages)} count epochs, which need clips: give data, or "
                "steps"
            )
        batch = config.batch_size * config.gradient_accumulation
        config = config.in_steps([math.ceil(clips / batch)] * len(config.stages))
    tell(f"{config.model}: its layers, without weights")
    costs = _Costs(config, tell)
    devices = [(rates_of_card(card), share_of_peak("efficiency")) for card in cards]
    if here:
        tell("how fast this machine is")
        about = costs.subject.device, costs.dtype, costs.subject.head_dim
        own = rates_here(*about) if rates is None else rates
        reached, source = known_efficiency(*about, False)
        devices.insert(0, (own, Range(reached, reached, source)))
    return costs.plan(devices)


class _Weights:
    """Bytes of a model's frozen weights, by the options that hold them.

    Args:
        model: on the meta device, in the dtype that it computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.itemsize, self.whole = dtype.itemsize, size_of(model)
        held = {n: model.get_parameter(f"{n}.weight").numel() for n in linear_names(model)}
        self.layers = [*held.values()]  # weights that `base` applies to
        # Of each block: these, and bytes of the rest; and the most of one of its parts.
        self.blocks: list[tuple[int, int]] = []
        self.of_parts: list[int] = []
        for name in block_names(model):
            block = model.get_submodule(name)

            def weights_in(place: str) -> int:
                return sum(x for n, x in held.items() if n.startswith(f"{place}."))

            weights, parts = weights_in(name), set(parts_of(block))
            self.blocks.append((weights, size_of(block) - weights * self.itemsize))
            sums = [weights_in(f"{name}.{n}") for n, x in block.named_children() if x in parts]
            self.of_parts.append(max(sums, default=weights))

    def each(self, config: TrainConfig) -> list[int]:
        """Bytes of each block."""
        size = BYTES.get(config.base or "", self.itemsize)
        return [round(weights * size) + rest for weights, rest in self.blocks]

    def waiting(self, config: TrainConfig) -> list[int]:
        """Bytes of the blocks that wait in the host's memory."""
        return spread(self.each(config), config.blocks_to_swap)

    def on_device(self, config: TrainConfig, unified: bool) -> int:
        """Bytes on the device; on unified memory, nothing is fetched ahead."""
        loaded = sum(weights * self.itemsize + rest for weights, rest in self.blocks)
        waiting = self.waiting(config)
        resident = min(len(waiting), 1 if unified else RESIDENT) * max(waiting, default=0)
        return self.whole - loaded + sum(self.each(config)) - sum(waiting) + resident

    def cast(self, config: TrainConfig) -> int:
        """Bytes of the copies that a block computes with, if its weights are held otherwise.

        torch keeps each copy until the gradient of its layer is there, within the part that is
        computed again; bitsandbytes copies a layer at a time.
        """
        if BYTES.get(config.base or "", self.itemsize) == self.itemsize:
            return 0
        if config.base == "nf4":
            found = self.layers
        elif not config.checkpoints_activations:
            found = [sum(weights for weights, _ in self.blocks)]
        else:
            found = self.of_parts if config.checkpoint_parts else [n for n, _ in self.blocks]
        return self.itemsize * max(found, default=0)


def size_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(x.numel() * x.itemsize for x in (*model.parameters(), *model.buffers()))


class _Costs:
    """Costs of one config on any device, also with other options of memory.

    Methods take a config with such options, which is this one but for `FIELDS`.
    """

    def __init__(self, config: TrainConfig, tell: Callable[[str], None]) -> None:
        self.config, self.tell = config, tell
        source = source_named(config.model)
        self.subject = subject_of(source, config.max_tokens)
        self.dtype: torch.dtype = getattr(torch, config.precision)
        self.parts, self.unknown = components_of(source, self.subject, self.dtype)
        check_adapter(config, self.subject.model)
        fps = config.fps if config.sound else None
        check_sound(self.subject.family, self.subject.model, fps)
        self.method = method_from(config.method, config.settings)
        self.clips = [  # size and steps of each stage, once for each size of clips
            (Size(stage.frames, height, width), stage.steps)
            for stage in config.curriculum
            for height, width in config.clip_sizes
        ]
        self.longest = max((size for size, _ in self.clips), key=math.prod)
        self._tracers: dict[tuple[bool, bool], StepTracer] = {}
        self._coded: dict[str, list[int | None]] = {}
        self.weights = _Weights(self.subject.model, self.dtype)
        shapes = self._tracer(config).trained_shapes
        self.parameters = sum(math.prod(shape) * times for shape, times in shapes.items())
        self.trainable = self.parameters * torch.float32.itemsize  # bytes
        self.moments = OWN_OPTIMIZERS.get(config.optimizer)
        if self.moments is None:
            tell(f"what {config.optimizer} keeps")
            with suppress(RuntimeError):  # it makes no step here
                self.moments = bytes_of_state(config, shapes) / self.parameters

    def plan(self, devices: Sequence[tuple[Rates, Range]]) -> TrainingPlan:
        """Plan the training for devices: rates, and the share of the ideal speed-up that a sparse
        kernel reaches there."""
        config, (sampling, decoded) = self.config, (None, None)
        stages = tuple(self._stage(size, steps, devices) for size, steps in self.clips)
        if config.validate_every:
            sampling, decoded = self._validation(config, self._validated)
        # Steps are traced with all that they are given; sampled videos are not.
        of_step = self.subject.family.layers(self.subject.model).uncounted
        notes = [note for note in self.subject.uncounted if note != of_step or sampling]
        notes += self.unknown
        if self.moments is None:
            notes.append(f"what {config.optimizer} keeps, which is taken to be as AdamW's")
        if config.teacher_lora is not None:
            notes.append("the teacher's LoRA")
        if self.method.has_parameters:
            notes.append(f"the parameters of {config.method} and what they compute")
        whole = kinds_without_parts(self.subject.model) if config.checkpoint_parts else ()
        return TrainingPlan(
            model=NAME if config.model == NAME else self.subject.name,
            options={name: getattr(config, name) for name in FIELDS},
            stages=stages,
            sampling=sampling,
            decoding=decoded,
            caching=self._caching(self.longest),
            loading=sum(part.size for part in self.parts),
            trainable=self.parameters,
            verdicts=tuple(self._verdict(rates, stages) for rates, _ in devices),
            notes=tuple(notes),
            without_parts=whole,
        )

    @property
    def _validated(self) -> Size:
        """Size of the videos that are sampled."""
        config = self.config
        return Size(config.validation_frames or config.longest, config.height, config.width)

    def _tracer(self, config: TrainConfig) -> StepTracer:
        way = recomputed(config)
        if way not in self._tracers:
            self._tracers[way] = StepTracer(self.subject, config)
        return self._tracers[way]

    def _trace(self, config: TrainConfig, grid: VideoShape) -> StepTrace:
        tracer = self._tracer(config)
        if grid not in tracer.known:
            _, computed, _ = densities_of(self.method, self.subject.seen(grid))
            tracer.trace(grid, computed)
        return tracer.known[grid]

    def _grid(self, size: Size) -> VideoShape:
        return self.subject.grid(size.height, size.width, size.frames)

    def _memory_trace(self, config: TrainConfig, grid: VideoShape) -> StepTrace:
        """Return a step, for its memory alone: at other sizes than the stages' it lies on
        the line through two of them, as all memory grows with the tokens."""
        known = {one.video_tokens: one for one in self._tracer(config).known}
        known = known or {grid.video_tokens: grid}
        if grid.video_tokens not in known and len(known) == 1:
            [only] = known.values()
            other = replace(only, frames=max(1, only.frames // 2) if only.frames > 1 else 2)
            known[other.video_tokens] = other
        if grid.video_tokens in known:
            return self._trace(config, grid)
        low, high = known[min(known)], known[max(known)]
        first, second = (self._trace(config, one) for one in (low, high))
        along = grid.video_tokens - low.video_tokens
        return first.towards(second, along / (high.video_tokens - low.video_tokens))

    def _stage(
        self, size: Size, steps: int, devices: Sequence[tuple[Rates, Range]]
    ) -> PlannedStage:
        grid = self._grid(size)
        self.tell(f"a step at {size.frames} frames of {size.height} x {size.width}")
        trace = self._trace(self.config, grid)
        times, work = self.config.gradient_accumulation, trace.work
        seconds = {
            rates.device: rates.seconds(work, efficiency).times(times)
            for rates, efficiency in devices
        }
        unified = bool(devices) and all(rates.on_cpu for rates, _ in devices)
        memory = self.memory(self.config, grid, unified=unified)
        return PlannedStage(size, steps, grid.video_tokens, trace.density, memory, seconds)

    def memory(self, config: TrainConfig, grid: VideoShape, *, unified: bool) -> StageMemory:
        """Bytes of a step at its worst moment; `unified` is memory that is the host's too."""
        trace = self._memory_trace(config, grid)
        weights, adapter = self.weights.on_device(config, unified), self._adapter(config)
        cast = self.weights.cast(config)
        waiting = sum(self.weights.waiting(config))
        accumulates = config.gradient_accumulation > 1
        found = [
            replace(
                moment,
                weights=weights,
                adapter=adapter + (self.trainable if accumulates else moment.adapter),
                block=moment.block + cast * bool(moment.block),
                host=waiting + moment.host,
            )
            for moment in trace.moments(offload=config.gradient_checkpointing == "offload")
        ]
        if unified:
            return max(found, key=lambda one: one.in_one)
        most = max(found, key=lambda one: one.total)
        return replace(most, host=max(one.host for one in found))

    def _adapter(self, config: TrainConfig, *, sampling: bool = False) -> int:
        """Bytes of the LoRA, its averages and the optimizer, without gradients."""
        copies = 1 + (1 + sampling) * bool(config.ema_decay)
        moments = OWN_OPTIMIZERS.get(config.optimizer, self.moments or OWN_OPTIMIZERS["adamw"])
        return round(self.trainable * (copies + moments / MOMENTS))

    def _validation(self, config: TrainConfig, size: Size) -> tuple[int, int | None]:
        """Bytes while a validation video is sampled, and decoded, beside the LoRA with its
        optimizer and all transformers of the pipeline; None if the autoencoder is unknown."""
        beside = self.weights.on_device(config, False) + self._adapter(config, sampling=True)
        beside += sum(part.size for part in self.parts if part.name.startswith("transformer_"))
        once = config.model_copy(update={"gradient_checkpointing": "on"})
        peak = self._memory_trace(once, self._grid(size)).forward_peak  # without gradients
        _, samples = calls_of(self.subject, None)
        decoded = self._autoencoder(size, "decode")
        return (
            beside + samples * peak // config.batch_size,
            None if decoded is None else beside + decoded,
        )

    def _caching(self, size: Size) -> int | None:
        """Bytes while captions or clips are encoded, before the transformer comes."""
        made = self._autoencoder(size, "encode") if self.config.needs_clips else 0
        texts = sum(part.size for part in self.parts if part.is_encoder)
        return None if made is None else max(made, texts)

    def _autoencoder(self, size: Size, way: str) -> int | None:
        """Bytes of the autoencoder in float32, and of its work on a clip, to "encode" or "decode";
        None if unknown."""
        vae = next((part for part in self.parts if part.name == "vae"), None)
        if vae is None or vae.model is None:
            return None
        whole = self._grid(self.longest)
        if way not in self._coded:
            self.tell(f"the autoencoder, {way[:-1]}ing")
            trace = encoding if way == "encode" else decoding
            works = [
                trace(vae, self.subject, replace(whole, frames=frames), torch.float32)
                for frames in (FEW, MORE)
            ]
            self._coded[way] = [None if work is None else work.peak for work in works]
        short, longer = self._coded[way]
        if short is None or longer is None:
            return None
        grid = self._grid(size)
        times = (grid.frames - FEW) / (MORE - FEW)
        picture = math.prod(grid.grid[1:]) / math.prod(whole.grid[1:])
        return size_of(vae.model) + round(picture * max(short, short + times * (longer - short)))

    def peak(
        self, config: TrainConfig, *, unified: bool, frames: int | None = None
    ) -> tuple[int, str]:
        """Bytes at most on a device, whose memory is the host's if `unified`, and the moment; with
        clips of at most some frames."""

        def limited(size: Size) -> Size:
            return size if frames is None else size._replace(frames=min(size.frames, frames))

        found: list[tuple[int, str]] = []
        for size, _ in self.clips:
            memory = self.memory(config, self._grid(limited(size)), unified=unified)
            needed = memory.in_one if unified else memory.total
            found.append((needed, f"a step at {size.frames} frames"))
        if config.validate_every:
            extra = sum(self.weights.waiting(config)) if unified else 0
            sampled, decoded = self._validation(config, limited(self._validated))
            found.append((sampled + extra, "sampling"))
            if decoded is not None:
                found.append((decoded + extra, "decoding"))
        if (cached := self._caching(limited(self.longest))) is not None:
            found.append((cached, "caching the clips"))
        return max(found)

    def _verdict(self, rates: Rates, stages: Sequence[PlannedStage]) -> Verdict:
        memory, (peak, moment) = rates.memory, self.peak(self.config, unified=rates.on_cpu)
        share = 1 / len(self.config.clip_sizes)  # the clips of a step have one size
        seconds = [stage.seconds[rates.device].times(stage.steps) for stage in stages]
        low, high = sum(one.low for one in seconds), sum(one.high for one in seconds)
        high = max(high, STEP * sum(stage.steps for stage in stages))
        advice = None
        if memory is not None and peak > memory:
            self.tell(f"what would make it fit {rates.device}")
            advice = _advice(self, memory, unified=rates.on_cpu)
        hours = Range(share * low / 3600, share * high / 3600, rates.origin)
        return Verdict(rates.device, memory, peak, moment, advice, rates.origin, hours)


class _Option(NamedTuple):
    """An option that saves memory: a field of a config, its value, the values that it may be
    turned on from, and whether it moves something to the host's memory."""

    field: str
    value: str | int
    before: tuple[str | int | None, ...]
    moves: bool = False


# In the order of their cost, in time and exactness.
_COSTS = (
    _Option("gradient_checkpointing", "on", ("off",)),
    _Option("gradient_checkpointing", "offload", ("off", "on"), moves=True),
    _Option("optimizer", "adamw8bit", ("adamw",)),
    _Option("base", "fp8", (None, "bf16")),
    _Option("blocks_to_swap", 1, (0,), moves=True),  # as many blocks as are needed
    _Option("checkpoint_parts", True, (False,)),
    _Option("base", "nf4", (None, "bf16", "fp8", "int8")),
)
FIELDS = tuple(dict.fromkeys(option.field for option in _COSTS))


def _words(name: str, value: str | int | None) -> str:
    return f"{name} {'true' if value is True else value}"


def _advice(costs: _Costs, memory: int, *, unified: bool) -> Advice:
    """The fewest and cheapest options that make a training fit the bytes of a device; all of them
    if none do, with the frames that fit."""
    given = costs.config

    def peak(config: TrainConfig, frames: int | None = None) -> int:
        return costs.peak(config, unified=unified, frames=frames)[0]

    def fits(config: TrainConfig) -> bool:
        return peak(config) <= memory

    def turned_on(chosen: Sequence[_Option]) -> TrainConfig | None:
        """Config with these options, and as few blocks swapped as suffice; None if it is none."""
        try:
            config = given.replaced(**{one.field: one.value for one in chosen})
        except ValueError:
            return None
        if config.blocks_to_swap == given.blocks_to_swap:
            return config

        def swapping(count: int) -> TrainConfig:
            return config.model_copy(update={"blocks_to_swap": count})

        counts = range(RESIDENT, len(costs.weights.blocks))
        fewest = bisect_right(counts, False, key=lambda count: fits(swapping(count)))
        return swapping(min(RESIDENT + fewest, len(costs.weights.blocks)))

    options = [
        one
        for one in _COSTS
        if getattr(given, one.field) in one.before and not (unified and one.moves)
    ]
    tried = (
        turned_on(some)
        for count in range(1, len(options) + 1)
        for some in combinations(options, count)
        if len({one.field for one in some}) == count
    )
    chosen = next((config for config in tried if config is not None and fits(config)), None)
    enough = chosen is not None
    if chosen is None:
        chosen = turned_on([*{one.field: one for one in options}.values()])  # the strongest
        assert chosen is not None
        without = chosen.model_copy(update={"checkpoint_parts": given.checkpoint_parts})
        if peak(without) <= peak(chosen):  # as if blocks have no parts
            chosen = without

    now, changes = given, []
    for field in FIELDS:
        value = getattr(chosen, field)
        if getattr(now, field) != value:
            before, now = now, now.model_copy(update={field: value})
            changes.append(Change(_words(field, value), peak(before) - peak(now)))
    frames = costs.longest.frames
    if not enough:
        subject, size = costs.subject, costs.longest
        most = subject.grid(size.height, size.width, size.frames).frames
        fitting = bisect_right(
            range(1, most + 1), memory, key=lambda n: peak(chosen, subject.frames(n))
        )
        frames = subject.frames(fitting) if fitting else 0
    return Advice(tuple(changes), enough, frames)
