"""Memory and seconds of a training, before it: from the config of the model alone.

    memory of a stage = weights + LoRA, its average, gradients and optimizer
                        + what is kept of the blocks that wait for their backward pass
                        + one block, forward, again and backward
                        + what is outside of the blocks

All but weights and optimizer is measured in one training step, run on fake tensors
(`gen_accel.lora.step_trace`). Videos that are sampled and their decoding are other moments, and so
is the caching of clips, which comes before all of them.

Not counted: adapters other than a LoRA, a teacher's LoRA, scratch memory of operators, the time of
loading, caching, sampling and of copies between host and device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from gen_accel.attention_processors.methods.options import method_from
from gen_accel.demo import NAME, model_named
from gen_accel.lora.advice import Adviser
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import BOTH
from gen_accel.lora.optimizers import bytes_of_state
from gen_accel.lora.parts import kinds_without_parts
from gen_accel.lora.size import check_adapter
from gen_accel.lora.step_trace import BACK, DTYPES, FORWARD, Casting, StepTrace, StepTracer
from gen_accel.lora.training_plan import (
    Setting,
    Size,
    Stage,
    StageMemory,
    TrainingPlan,
    Verdict,
)
from gen_accel.lora.weight_sizes import Weights, size_of
from gen_accel.measure.cards import Range, card_named, share_of_peak
from gen_accel.measure.efficiency import known_efficiency
from gen_accel.measure.estimate import densities_of
from gen_accel.measure.forecast import FEW, MORE, calls_of, decoding, encoding
from gen_accel.measure.parts import parts_of_pipeline
from gen_accel.measure.rates import Rates, rates_here, rates_of_card
from gen_accel.measure.subject import Subject, subject_of
from gen_accel.method import parts_of
from gen_accel.video import VideoShape

CARDS = ("4090", "5090", "h100")  # beside this machine, where none is named
MOMENTS = 4  # bytes of each of AdamW's two moments of a parameter
OWN_OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes a parameter: two moments


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
        gpus: cards of `gen_accel.measure.cards`; None: `CARDS`.
        here: whether this machine is a device too. Its rates are measured in seconds, the first
            time.
        rates: of this machine; None: the kept ones, or measured now.
        tell: is told what the next seconds are spent on.

    Raises:
        ValueError: a card that is not in the table, an adapter that is no LoRA, a model that does
            not train, or sizes that it cannot take.
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
        shares_host: its memory is the host's.
    """

    name: str
    memory: int | None
    rates: Rates
    efficiency: Range
    shares_host: bool

    @classmethod
    def of_card(cls, card: Any) -> "_Device":
        rates = rates_of_card(card)
        return cls(card.name, card.memory, rates, share_of_peak("efficiency"), False)

    @classmethod
    def here(cls, subject: Subject, dtype: torch.dtype, rates: Rates | None) -> "_Device":
        if rates is None:
            rates = rates_here(subject.device, dtype, subject.head_dim)
        reached, source = known_efficiency(subject.device, dtype, subject.head_dim, False, False)
        efficiency = Range(reached, reached, source)
        return cls(rates.device, rates.memory, rates, efficiency, rates.on_cpu)

    def seconds(self, trace: StepTrace) -> Range:
        """Seconds of a micro-step, at the best and the worst of the rates."""

        def at(side: str, efficiency: float) -> float:
            attention = trace.work("attention") + trace.work("sparse") / efficiency
            return (
                trace.work("products") / getattr(self.rates.products, side)
                + attention / getattr(self.rates.attention, side)
                + trace.work("moved") / getattr(self.rates.moved, side)
            )

        low, high = at("high", self.efficiency.high), at("low", self.efficiency.low)
        return Range(low, high, self.rates.origin)


class _Forecaster:
    """Everything about one config that its stages, options and devices share."""

    def __init__(
        self, config: TrainConfig, tell: Callable[[str], None] = lambda words: None
    ) -> None:
        self.tell = tell
        self.config, self.setting = config, Setting.of(config)
        source = model_named(config.model)
        self.subject = subject_of(source, config.max_tokens)
        self.dtype = DTYPES[config.mixed_precision]
        self.parts, self.unknown = parts_of_pipeline(source, self.subject, self.dtype)
        check_adapter(config, self.subject.model)
        self.method = method_from(config.method, config.settings)
        self._tracers: dict[_Way, StepTracer] = {}
        self._traces: dict[tuple[_Way, VideoShape], tuple[StepTrace, float]] = {}
        self._coded: dict[str, list[int | None]] = {}
        self.weights = Weights(self.subject.model, self.dtype)
        self.without_parts = kinds_without_parts(self.subject.model)
        tracer = self._tracer(self._way(self.setting))
        self.trainable = tracer.all_trainable
        self.moments: float | None = OWN_OPTIMIZERS.get(config.optimizer)
        if self.moments is None:
            self.moments = self._counted(tracer.trained_shapes)

    def _counted(self, shapes: dict[tuple[int, ...], int]) -> float | None:
        """Bytes a parameter that another optimizer keeps; None where it makes no step here."""
        self.tell(f"what {self.config.optimizer} keeps")
        parameters = sum(math.prod(shape) * times for shape, times in shapes.items())
        try:
            return bytes_of_state(self.config, shapes) / parameters
        except RuntimeError:
            return None

    def plan(self, devices: Sequence[_Device]) -> TrainingPlan:
        stages = [self._stage(*one, devices) for one in self._clips()]
        validates = bool(self.config.validate_every)
        sampling = self._sampling(self.setting, self._validated) if validates else None
        decoding = self._decoding(self.setting, self._validated) if validates else None
        return TrainingPlan(
            model=NAME if self.config.model == NAME else self.subject.name,
            setting=self.setting,
            stages=tuple(stages),
            sampling=sampling,
            decoding=decoding,
            caching=self._caching(self._longest),
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
        if parts_of(self.method).branch is not None:
            yield f"the parameters of {self.config.method} and what they compute"

    @property
    def _validated(self) -> Size:
        """Return the size of the videos that are sampled."""
        config = self.config
        return Size(config.validation_frames or config.longest, config.height, config.width)

    def _clips(self) -> Iterator[tuple[Size, int]]:
        """Size and steps of each stage, once for each size that clips have."""
        for stage in self.config.curriculum:
            for height, width in self.config.clip_sizes:
                yield Size(stage.frames, height, width), stage.steps

    @property
    def _longest(self) -> Size:
        return max((size for size, _ in self._clips()), key=math.prod)

    def _way(self, setting: Setting) -> "_Way":
        casting = self.weights.casting(setting.base)
        return _Way(setting.checkpointing != "off", setting.parts, casting)

    def _tracer(self, way: "_Way") -> StepTracer:
        if way not in self._tracers:
            options: dict[str, Any] = way._asdict()
            self._tracers[way] = StepTracer(self.subject, self.config, **options)
        return self._tracers[way]

    def _trace(self, way: "_Way", grid: VideoShape) -> tuple[StepTrace, float]:
        """A step at a grid, and the share of the pairs that a sparse layer computes."""
        key = way, grid
        if key not in self._traces:
            _, computed, _ = densities_of(self.method, self.subject.seen(grid))
            self._traces[key] = self._tracer(way).trace(grid, computed), computed
        return self._traces[key]

    def _grid(self, size: Size) -> VideoShape:
        return self.subject.grid(size.height, size.width, size.frames)

    def _memory_trace(self, way: "_Way", grid: VideoShape) -> StepTrace:
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
        times = self.config.gradient_accumulation
        seconds = {}
        for device in devices:
            one = device.seconds(trace)
            seconds[device.name] = Range(times * one.low, times * one.high, one.source)
        shared = bool(devices) and all(device.shares_host for device in devices)
        memory = self.memory(self.setting, grid, shared=shared)
        return Stage(*size, steps, grid.video_tokens, density, memory, seconds)

    def memory(
        self,
        setting: Setting,
        grid: VideoShape,
        *,
        shared: bool = False,
        way: "_Way | None" = None,
    ) -> StageMemory:
        """Bytes of a step with other options, at its worst moment.

        Args:
            shared: the device's memory is the host's.
            way: how the step is traced; None for the way of the options.
        """
        trace = self._memory_trace(way or self._way(setting), grid)
        weights, adapter = self.weights(setting, shared=shared), self._adapter(setting)
        moments = list(_moments(trace, offload=setting.checkpointing == "offload"))
        accumulates = self.config.gradient_accumulation > 1
        found = []
        for moment in moments:
            grads = self.trainable if accumulates else moment.grads
            made = StageMemory(
                weights=weights,
                adapter=adapter + grads,
                kept=moment.kept,
                block=moment.block,
                outside=moment.outside + trace.batch,
                host=self.weights.waiting(setting) + moment.host + self._other_expert(setting),
            )
            found.append(made)
        if shared:
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

    def _other_expert(self, setting: Setting) -> int:
        """Bytes of the expert that waits in the host's memory while the other one trains."""
        if self.config.part != BOTH:
            return 0
        return self.weights(setting) + self._adapter(setting)

    def _beside(self, setting: Setting) -> int:
        """Bytes of the models beside a video that is sampled: this one, the LoRA and what keeps
        it, and another transformer of the pipeline, unless the two come by turns."""
        others = [part.size for part in self.parts if part.name.startswith("transformer_")]
        if self.config.part == BOTH:
            others = []
        return self.weights(setting) + self._adapter(setting, sampling=True) + sum(others)

    def _sampling(self, setting: Setting, size: Size) -> int:
        """Bytes while a validation video is sampled: forward passes without gradients."""
        way = self._way(setting)._replace(checkpointing=True)
        trace = self._memory_trace(way, self._grid(size))
        _, samples = calls_of(self.subject, None)
        kept, most = 0, 0
        for part in trace.parts:
            if part.kind == FORWARD:
                most = max(most, part.segment.peak - kept)
                kept += part.segment.after - part.segment.before
        latents = samples * (most + trace.batch) // self.config.batch_size
        return self._beside(setting) + latents

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
        """Bytes of the autoencoder in float32, and of what it makes of a clip.

        Args:
            way: "encode" or "decode".
        """
        vae = next((part for part in self.parts if part.name == "vae"), None)
        if vae is None or vae.model is None:
            return None
        whole = self._grid(self._longest)
        if way not in self._coded:
            self.tell(f"the autoencoder, {way[:-1]}ing")
            trace = encoding if way == "encode" else decoding
            works = [
                trace(vae, self.subject, replace(whole, frames=length), torch.float32)
                for length in CODED
            ]
            self._coded[way] = [None if work is None else work.peak for work in works]
        short, longer = self._coded[way]
        if short is None or longer is None:
            return None
        grid = self._grid(size)
        times = (grid.frames - CODED[0]) / (CODED[1] - CODED[0])
        picture = math.prod(grid.grid[1:]) / math.prod(whole.grid[1:])
        return size_of(vae.model) + round(picture * max(short, short + times * (longer - short)))

    def _peak(
        self, shared: bool, setting: Setting, limit: Callable[[Size], Size] = lambda size: size
    ) -> tuple[int, str]:
        """Bytes on a device at most, and the moment.

        Args:
            shared: the device's memory is the host's.
            limit: makes the sizes of clips smaller.
        """
        found: list[tuple[int, str]] = []
        for size, _ in self._clips():
            memory = self.memory(setting, self._grid(limit(size)), shared=shared)
            needed = memory.in_one if shared else memory.total
            found.append((needed, f"a step at {size.frames} frames"))
        if self.config.validate_every:
            extra = shared * self.weights.waiting(setting)
            size = limit(self._validated)
            found.append((self._sampling(setting, size) + extra, "sampling"))
            if (decoded := self._decoding(setting, size)) is not None:
                found.append((decoded + extra, "decoding"))
        if (cached := self._caching(limit(self._longest))) is not None:
            found.append((cached, "caching the clips"))
        return max(found)

    def _least(self, shared: bool, setting: Setting) -> int:
        """Bytes in a step that other options need at least: without casts of their weights, which
        add to them, so that no further trace is needed."""
        way = self._way(setting)._replace(casting="none")
        found = [
            self.memory(setting, self._grid(size), shared=shared, way=way)
            for size, _ in self._clips()
        ]
        return max(memory.in_one if shared else memory.total for memory in found)

    def _verdict(self, device: _Device, stages: Sequence[Stage]) -> Verdict:
        peak, moment = self._peak(device.shares_host, self.setting)
        share = 1 / len(self.config.clip_sizes)  # the clips of a step have one size
        low = share * sum(stage.steps * stage.seconds[device.name].low for stage in stages)
        high = share * sum(stage.steps * stage.seconds[device.name].high for stage in stages)
        advice = None
        if device.memory is not None and peak > device.memory:
            self.tell(f"what would make it fit {device.name}")
            advice = Adviser(
                self.config,
                self.subject,
                lambda *options: self._peak(device.shares_host, *options)[0],
                least=partial(self._least, device.shares_host),
                setting=self.setting,
                longest=self._longest,
                most_swapped=self.weights.most_swapped,
                memory=device.memory,
                shared=device.shares_host,
            )()
        return Verdict(
            device=device.name,
            memory=device.memory,
            peak=peak,
            moment=moment,
            advice=advice,
            rates_from=device.rates.origin,
            hours=Range(low / 3600, high / 3600, device.rates.origin),
        )


CODED = (FEW, MORE)  # frames of tokens that the autoencoder is traced at


class _Way(NamedTuple):
    """Options of a trace beside the config, see `StepTracer`."""

    checkpointing: bool
    parts: bool
    casting: Casting


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
        offload: what blocks leave behind waits in the host's memory, all but the last one's.
    """
    kept = outside = grads = 0
    stack: list[int] = []
    for part in trace.parts:
        segment = part.segment
        rise, net = segment.peak - segment.before, segment.after - segment.before
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
