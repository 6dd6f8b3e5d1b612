"""Memory and seconds of a training, before it: from the config of the model alone.

    memory of a stage = weights + LoRA, its average, gradients and optimizer
                        + what is kept of the blocks that wait for their backward pass
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import nn

from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.demo import NAME, model_named
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.memory import RESIDENT, check_adapter, kinds_without_parts
from gen_accel.lora.model import block_names, linear_names
from gen_accel.lora.optimizers import bytes_of_state
from gen_accel.lora.step_trace import BACK, DTYPES, FORWARD, Casting, StepTrace, StepTracer
from gen_accel.lora.training_plan import (
    Advice,
    Change,
    Setting,
    Size,
    Stage,
    StageMemory,
    TrainingPlan,
    Verdict,
)
from gen_accel.measure.cost.cards import Card, card_named, share_of_peak
from gen_accel.measure.cost.estimate import densities_of
from gen_accel.measure.cost.figures import Range
from gen_accel.measure.cost.forecast import calls_of
from gen_accel.measure.cost.model import Subject, components_of, subject_of
from gen_accel.measure.cost.rates import Rates, known_efficiency, rates_here, rates_of_card
from gen_accel.measure.cost.work import FEW, MORE, decoding, encoding
from gen_accel.video import VideoShape

CARDS = ("4090", "5090", "h100")  # beside this machine, if none is named
MOMENTS = 4  # bytes of each of AdamW's two moments of a parameter
OWN_OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes a parameter: two moments
# Bytes of a weight, with its share of the scales: in nf4 a byte for 64 weights.
BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}
# torch keeps the cast weights of a layer until its gradient is there; bitsandbytes casts again.
CASTING: dict[str, Casting] = {"bf16": "kept", "fp8": "kept", "int8": "kept", "nf4": "again"}


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
        raise ValueError(f"--plan knows adapter lora, got {config.adapter!r}")
    if config.context_parallel > 1:
        raise ValueError(
            "--plan counts one process with whole clips, got context_parallel "
            f"{config.context_parallel}: leave it out"
        )
    tell(f"{config.model}: its layers, without weights")
    forecaster = _Forecaster(config, tell)
    devices = [_Device.of_card(card) for card in cards]
    if here:
        tell("how fast this machine is")
        devices.insert(0, _Device.here(forecaster.subject, forecaster.dtype, rates))
    return forecaster.plan(devices)


@dataclass(frozen=True)
class _Device:
    """A device that a training may run on.

    Args:
        efficiency: share of the ideal speed-up that a sparse kernel reaches.
    """

    rates: Rates
    efficiency: Range

    @classmethod
    def of_card(cls, card: Card) -> "_Device":
        return cls(rates_of_card(card), share_of_peak("efficiency"))

    @classmethod
    def here(cls, subject: Subject, dtype: torch.dtype, rates: Rates | None) -> "_Device":
        if rates is None:
            rates = rates_here(subject.device, dtype, subject.head_dim)
        reached, source = known_efficiency(subject.device, dtype, subject.head_dim, False)
        return cls(rates, Range(reached, reached, source))

    @property
    def name(self) -> str:
        return self.rates.device

    @property
    def unified(self) -> bool:
        """Whether its memory is the host's."""
        return self.rates.on_cpu


class Weights:
    """Bytes of a model's frozen weights, by the options that hold them.

    Args:
        model: on the meta device, in the dtype that it computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.itemsize = dtype.itemsize
        self.whole = size_of(model)
        held = linear_names(model)
        self.blocks = [_block_of(model, name, held) for name in block_names(model)]

    def __call__(self, setting: Setting, *, unified: bool = False) -> int:
        """Bytes on the device.

        Args:
            unified: the device's memory is the host's, so that nothing is fetched ahead.
        """
        loaded = sum(linear * self.itemsize + rest for linear, rest in self.blocks)
        waiting = self._waiting(setting)
        resident = min(setting.swap, 1 if unified else RESIDENT)
        held = sum(self._held(setting.base))
        return self.whole - loaded + held - sum(waiting) + resident * max(waiting, default=0)

    def waiting(self, setting: Setting) -> int:
        """Bytes that wait in the host's memory."""
        return sum(self._waiting(setting))

    def casting(self, base: str | None) -> Casting:
        """How weights are cast to compute with."""
        return "none" if self._bytes(base) == self.itemsize else CASTING[base or ""]

    def _held(self, base: str | None) -> list[int]:
        return [round(linear * self._bytes(base)) + rest for linear, rest in self.blocks]

    def _waiting(self, setting: Setting) -> list[int]:
        sizes, count = self._held(setting.base), setting.swap
        return [sizes[(i + 1) * len(sizes) // count - 1] for i in range(count)]

    def _bytes(self, base: str | None) -> float:
        """Bytes of a weight that `base` applies to."""
        return BYTES.get(base or "", float(self.itemsize))


def size_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    values = [*model.parameters(), *model.buffers()]
    return sum(value.numel() * value.itemsize for value in values)


def _block_of(model: nn.Module, name: str, held: Sequence[str]) -> tuple[int, int]:
    """Elements of a block's linear layers that `base` applies to, and bytes of the rest."""
    block = model.get_submodule(name)
    weights = [model.get_parameter(f"{one}.weight") for one in held if one.startswith(f"{name}.")]
    linear = sum(weight.numel() for weight in weights)
    return linear, size_of(block) - sum(weight.numel() * weight.itemsize for weight in weights)


class _Way(NamedTuple):
    """Options of a trace beside the config, see `StepTracer`."""

    checkpointing: bool
    parts: bool
    casting: Casting


class _Forecaster:
    """Everything about one config that its stages, options and devices share."""

    def __init__(self, config: TrainConfig, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.config, self.setting = config, Setting.of(config)
        source = model_named(config.model)
        self.subject = subject_of(source, config.max_tokens)
        self.dtype = DTYPES[config.mixed_precision]
        self.parts, self.unknown = components_of(source, self.subject, self.dtype)
        check_adapter(config, self.subject.model)
        self.method = method_from(config.method, config.settings)
        self.clips = [  # size and steps of each stage, once for each size of clips
            (Size(stage.frames, height, width), stage.steps)
            for stage in config.curriculum
            for height, width in config.clip_sizes
        ]
        self.longest = max((size for size, _ in self.clips), key=math.prod)
        self._tracers: dict[_Way, StepTracer] = {}
        self._traces: dict[tuple[_Way, VideoShape], tuple[StepTrace, float]] = {}
        self._coded: dict[str, list[int | None]] = {}
        self.weights = Weights(self.subject.model, self.dtype)
        self.without_parts = kinds_without_parts(self.subject.model)
        tracer = self._tracer(self._way(self.setting))
        self.trainable = tracer.all_trainable
        self.moments = OWN_OPTIMIZERS.get(config.optimizer)
        if self.moments is None:
            tell(f"what {config.optimizer} keeps")
            shapes = tracer.trained_shapes
            parameters = sum(math.prod(shape) * times for shape, times in shapes.items())
            with suppress(RuntimeError):  # it makes no step here
                self.moments = bytes_of_state(config, shapes) / parameters

    def plan(self, devices: Sequence[_Device]) -> TrainingPlan:
        stages = [self._stage(*one, devices) for one in self.clips]
        sampling = decoded = None
        if self.config.validate_every:
            sampling = self._sampling(self.setting, self._validated)
            decoded = self._decoding(self.setting, self._validated)
        return TrainingPlan(
            model=NAME if self.config.model == NAME else self.subject.name,
            setting=self.setting,
            stages=tuple(stages),
            sampling=sampling,
            decoding=decoded,
            caching=self._caching(self.longest),
            loading=sum(part.size for part in self.parts),
            trainable=self.trainable // MOMENTS,
            verdicts=tuple(self._verdict(device, stages) for device in devices),
            notes=(*self.subject.uncounted, *self.unknown, *self._notes()),
            without_parts=self.without_parts if self.setting.parts else (),
        )

    def _notes(self) -> Iterator[str]:
        if self.moments is None:
            yield f"what {self.config.optimizer} keeps, which is taken to be as AdamW's"
        if self.config.teacher_lora is not None:
            yield "the teacher's LoRA"
        if self.method.has_branch:
            yield f"the parameters of {self.config.method} and what they compute"

    @property
    def _validated(self) -> Size:
        """Size of the videos that are sampled."""
        config = self.config
        return Size(config.validation_frames or config.longest, config.height, config.width)

    def _way(self, setting: Setting) -> _Way:
        casting = self.weights.casting(setting.base)
        return _Way(setting.checkpointing != "off", setting.parts, casting)

    def _tracer(self, way: _Way) -> StepTracer:
        if way not in self._tracers:
            self._tracers[way] = StepTracer(
                self.subject,
                self.config,
                checkpointing=way.checkpointing,
                parts=way.parts,
                casting=way.casting,
            )
        return self._tracers[way]

    def _trace(self, way: _Way, grid: VideoShape) -> tuple[StepTrace, float]:
        """A step at a grid, and the share of the pairs that a sparse layer computes."""
        key = way, grid
        if key not in self._traces:
            _, computed, _ = densities_of(self.method, self.subject.seen(grid))
            self._traces[key] = self._tracer(way).trace(grid, computed), computed
        return self._traces[key]

    def _grid(self, size: Size) -> VideoShape:
        return self.subject.grid(size.height, size.width, size.frames)

    def _memory_trace(self, way: _Way, grid: VideoShape) -> StepTrace:
        """A step at a grid, for its memory alone: at other sizes than the stages' it lies on the
        line through two of them, as all memory grows with the tokens."""
        known = {one.video_tokens: one for other, one in self._traces if other == way}
        if grid.video_tokens in known or not known:
            return self._trace(way, grid)[0]
        if len(known) == 1:
            [only] = known.values()
            other = replace(only, frames=max(1, only.frames // 2) if only.frames > 1 else 2)
            known[other.video_tokens] = other
        low, high = known[min(known)], known[max(known)]
        first, second = (self._trace(way, one)[0] for one in (low, high))
        along = grid.video_tokens - low.video_tokens
        return first.towards(second, along / (high.video_tokens - low.video_tokens))

    def _stage(self, size: Size, steps: int, devices: Sequence[_Device]) -> Stage:
        grid = self._grid(size)
        self.tell(f"a step at {size.frames} frames of {size.height} x {size.width}")
        trace, density = self._trace(self._way(self.setting), grid)
        times, work = self.config.gradient_accumulation, trace.work
        seconds = {
            device.name: device.rates.seconds(work, device.efficiency).times(times)
            for device in devices
        }
        unified = bool(devices) and all(device.unified for device in devices)
        memory = self.memory(self.setting, grid, unified=unified)
        return Stage(size, steps, grid.video_tokens, density, memory, seconds)

    def memory(
        self,
        setting: Setting,
        grid: VideoShape,
        *,
        unified: bool = False,
        way: _Way | None = None,
    ) -> StageMemory:
        """Bytes of a step with other options, at its worst moment.

        Args:
            unified: the device's memory is the host's.
            way: how the step is traced; None: by the options.
        """
        trace = self._memory_trace(way or self._way(setting), grid)
        weights, adapter = self.weights(setting, unified=unified), self._adapter(setting)
        waiting = self.weights.waiting(setting)
        accumulates = self.config.gradient_accumulation > 1
        found = [
            StageMemory(
                weights=weights,
                adapter=adapter + (self.trainable if accumulates else moment.grads),
                kept=moment.kept,
                block=moment.block,
                outside=moment.outside + trace.batch,
                host=waiting + moment.host,
            )
            for moment in _moments(trace, offload=setting.checkpointing == "offload")
        ]
        if unified:
            return max(found, key=lambda one: one.in_one)
        most = max(found, key=lambda one: one.total)
        return replace(most, host=max(one.host for one in found))

    def _adapter(self, setting: Setting, *, sampling: bool = False) -> int:
        """Bytes of the LoRA, its averages and the optimizer, without gradients."""
        copies = 1 + (1 + sampling) * bool(self.config.ema_decay)
        given = setting.optimizer == self.config.optimizer
        moments = self.moments if given else OWN_OPTIMIZERS[setting.optimizer]
        if moments is None:
            moments = OWN_OPTIMIZERS["adamw"]
        return round(self.trainable * (copies + moments / MOMENTS))

    def _beside(self, setting: Setting) -> int:
        """Bytes of the models beside a sampled video: this one, the LoRA with its optimizer, and
        another transformer of the pipeline."""
        others = [part.size for part in self.parts if part.name.startswith("transformer_")]
        return self.weights(setting) + self._adapter(setting, sampling=True) + sum(others)

    def _sampling(self, setting: Setting, size: Size) -> int:
        """Bytes while a validation video is sampled: forward passes without gradients."""
        way = self._way(setting)._replace(checkpointing=True)
        trace = self._memory_trace(way, self._grid(size))
        _, samples = calls_of(self.subject, None)
        kept, most = 0, 0
        for part in trace.parts:
            if part.kind == FORWARD:
                most = max(most, part.segment.work.peak - kept)
                kept += part.segment.after - part.segment.before
        return self._beside(setting) + samples * (most + trace.batch) // self.config.batch_size

    def _decoding(self, setting: Setting, size: Size) -> int | None:
        """Bytes while a video is decoded beside the model."""
        made = self._autoencoder(size, "decode")
        return None if made is None else self._beside(setting) + made

    def _caching(self, size: Size) -> int | None:
        """Bytes while captions or clips are encoded, before the transformer comes."""
        made = self._autoencoder(size, "encode")
        texts = sum(part.size for part in self.parts if part.is_encoder)
        return None if made is None else max(made, texts)

    def _autoencoder(self, size: Size, way: str) -> int | None:
        """Bytes of the autoencoder in float32, and of its work on a clip; None if unknown.

        Args:
            way: "encode" or "decode".
        """
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
        self, setting: Setting, *, unified: bool, frames: int | None = None
    ) -> tuple[int, str]:
        """Bytes on a device at most, and the moment.

        Args:
            unified: the device's memory is the host's.
            frames: most frames of a clip; None: as in the config.
        """

        def limited(size: Size) -> Size:
            return size if frames is None else size._replace(frames=min(size.frames, frames))

        found: list[tuple[int, str]] = []
        for size, _ in self.clips:
            memory = self.memory(setting, self._grid(limited(size)), unified=unified)
            needed = memory.in_one if unified else memory.total
            found.append((needed, f"a step at {size.frames} frames"))
        if self.config.validate_every:
            extra = unified * self.weights.waiting(setting)
            size = limited(self._validated)
            found.append((self._sampling(setting, size) + extra, "sampling"))
            if (decoded := self._decoding(setting, size)) is not None:
                found.append((decoded + extra, "decoding"))
        if (cached := self._caching(limited(self.longest))) is not None:
            found.append((cached, "caching the clips"))
        return max(found)

    def least(self, setting: Setting, *, unified: bool) -> int:
        """Lower bound of the bytes in a step with other options: without casts of their weights,
        so that no further trace is needed."""
        way = self._way(setting)._replace(casting="none")
        found = [
            self.memory(setting, self._grid(size), unified=unified, way=way)
            for size, _ in self.clips
        ]
        return max(memory.in_one if unified else memory.total for memory in found)

    def _verdict(self, device: _Device, stages: Sequence[Stage]) -> Verdict:
        peak, moment = self.peak(self.setting, unified=device.unified)
        share = 1 / len(self.config.clip_sizes)  # the clips of a step have one size
        seconds = [stage.seconds[device.name].times(stage.steps) for stage in stages]
        low, high = sum(one.low for one in seconds), sum(one.high for one in seconds)
        memory = device.rates.memory
        advice = None
        if memory is not None and peak > memory:
            self.tell(f"what would make it fit {device.name}")
            advice = _advice(self, memory, unified=device.unified)
        return Verdict(
            device=device.name,
            memory=memory,
            peak=peak,
            moment=moment,
            advice=advice,
            rates_from=device.rates.origin,
            hours=Range(share * low / 3600, share * high / 3600, device.rates.origin),
        )


class _Option(NamedTuple):
    """An option that saves memory.

    Args:
        field: of `Setting`.
        value: that it takes.
        before: values that it may be turned on from.
        moves: to the host's memory.
    """

    field: str
    value: Any
    before: tuple[Any, ...]
    moves: bool = False


# In the order of their cost, in time and exactness.
_COSTS = (
    _Option("checkpointing", "on", ("off",)),
    _Option("checkpointing", "offload", ("off", "on"), moves=True),
    _Option("optimizer", "adamw8bit", ("adamw",)),
    _Option("base", "fp8", (None, "bf16")),
    _Option("swap", 1, (0,), moves=True),  # as many blocks as are needed
    _Option("parts", True, (False,)),
    _Option("base", "nf4", (None, "bf16", "fp8", "int8")),
)
_ORDER = ("checkpointing", "optimizer", "base", "swap", "parts")


def _advice(forecaster: _Forecaster, memory: int, *, unified: bool) -> Advice:
    """The fewest and cheapest options that make a training fit a device; all of them if none
    do, with the frames that fit.

    Args:
        memory: bytes of the device.
        unified: the device's memory is the host's.
    """
    given = forecaster.setting

    def peak(setting: Setting, frames: int | None = None) -> int:
        return forecaster.peak(setting, unified=unified, frames=frames)[0]

    def fits(setting: Setting) -> bool:  # only settings near to it are traced
        return forecaster.least(setting, unified=unified) <= memory and peak(setting) <= memory

    def turned_on(chosen: Sequence[_Option]) -> Setting | None:
        """Setting with these options, as few blocks swapped as suffice; None if a config does not
        take them."""
        setting = given
        for one in chosen:
            if getattr(setting, one.field) not in one.before:
                return None
            setting = setting._replace(**{one.field: one.value})
        if not setting.goes_together:
            return None
        if setting.swap != given.swap:
            low, high = RESIDENT, len(forecaster.weights.blocks)
            while low < high:
                middle = (low + high) // 2
                enough = fits(setting._replace(swap=middle))
                low, high = (low, middle) if enough else (middle + 1, high)
            setting = setting._replace(swap=high)
        return setting

    options = [
        one
        for one in _COSTS
        if getattr(given, one.field) in one.before and not (unified and one.moves)
    ]
    chosen, enough = None, True
    for count in range(1, len(options) + 1):
        for some in combinations(options, count):
            if len({one.field for one in some}) == count:
                setting = turned_on(some)
                if setting is not None and fits(setting):
                    chosen = chosen or setting
                    break
        if chosen is not None:
            break
    if chosen is None:
        enough = False
        chosen = turned_on([*{one.field: one for one in options}.values()])  # the strongest
        assert chosen is not None
        without = chosen._replace(parts=given.parts)
        if peak(without) <= peak(chosen):  # as if blocks have no parts
            chosen = without

    now, changes = given, []
    for field in _ORDER:
        if getattr(now, field) != getattr(chosen, field):
            before, now = now, now._replace(**{field: getattr(chosen, field)})
            [words] = now.changes(before)
            changes.append(Change(words, peak(before) - peak(now)))
    frames = forecaster.longest.frames
    if not enough:
        subject, size = forecaster.subject, forecaster.longest
        most = subject.grid(size.height, size.width, size.frames).frames
        fitting = bisect_right(
            range(1, most + 1), memory, key=lambda n: peak(chosen, subject.frames(n))
        )
        frames = subject.frames(fitting) if fitting else 0
    return Advice(tuple(changes), enough, frames)


class _Moment(NamedTuple):
    """Bytes at the worst moment of a part of a step, beside the weights."""

    kept: int
    block: int
    outside: int
    grads: int
    host: int


def _moments(trace: StepTrace, *, offload: bool) -> Iterator[_Moment]:
    """Go through a step.

    Args:
        offload: the inputs of blocks wait in the host's memory, all but the last one's.
    """
    kept = outside = grads = 0
    stack: list[int] = []
    for part in trace.parts:
        segment = part.segment
        rise, net = segment.work.peak - segment.before, segment.after - segment.before
        is_block = part.kind in (FORWARD, BACK)
        there = min(kept, max(stack, default=0)) if offload else kept
        beside = outside if is_block else outside + rise
        yield _Moment(there, rise * is_block, beside, grads, (kept - there) * offload)
        if part.kind == BACK:
            kept += net - part.grads
            grads += part.grads
        elif part.kind == FORWARD or (stack and not rise):
            kept += net
            stack.append(net)
        else:
            outside += net
