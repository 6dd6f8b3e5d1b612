"""Result of `forecast_training`: the cost of a training, what makes it fit, and its lines."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gen_accel.lora.config import TrainConfig
from gen_accel.measure.cost.figures import Range, duration, gigabytes
from gen_accel.measure.cost.words import WIDTH, wrapped

NAME, CELL = 26, 17  # characters of a table's columns
PARTS = {
    "weights": "weights",
    "adapter": "LoRA, optimizer, gradients",
    "kept": "kept of other blocks",
    "block": "one block at work",
    "outside": "batch, embeddings, loss",
}


class Size(NamedTuple):
    """Size of a clip, in frames and pixels."""

    frames: int
    height: int
    width: int


# Fields of a config, in the order of the fields of `Setting`.
_OPTIONS = (
    "gradient_checkpointing",
    "base",
    "blocks_to_swap",
    "optimizer",
    "checkpoint_parts",
)


class Setting(NamedTuple):
    """Options that cost or save memory. Words are those of `TrainConfig`.

    Args:
        base: None is mixed_precision.
        swap: blocks_to_swap.
        parts: checkpoint_parts.
    """

    checkpointing: str
    base: str | None
    swap: int
    optimizer: str
    parts: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> "Setting":
        return cls(*(getattr(config, name) for name in _OPTIONS))

    @property
    def goes_together(self) -> bool:
        """Whether a config takes these options, see `TrainConfig`."""
        needing = self.parts or self.swap > 0 or self.base == "fp8"
        return self.checkpointing != "off" or not needing

    def changes(self, since: "Setting") -> list[str]:
        """Options, in words, that differ from an earlier setting."""
        return [
            f"{name} {'true' if now is True else now}"
            for name, now, before in zip(_OPTIONS, self, since, strict=True)
            if now != before
        ]


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device at the moment of a step that needs most.

    Args:
        weights: of the model, as they are held.
        adapter: LoRA, its average, gradients that are there, optimizer.
        kept: of the other blocks, for their backward pass.
        block: of the block under way.
        outside: batch, embeddings, head and loss.
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

    def to_dict(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Stage:
    """Cost of one stage of the curriculum.

    Args:
        size: of its clips.
        steps: of the optimizer.
        tokens: of a clip.
        density: share of the token pairs that the method computes in a sparse layer.
        memory: of a step, with the config's options; on a device with memory of its own, if one
            was asked for.
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


class Change(NamedTuple):
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

    def to_dict(self) -> dict[str, Any]:
        return {
            "changes": [change._asdict() for change in self.changes],
            "fits": self.fits,
            "frames": self.frames,
        }


@dataclass(frozen=True)
class Verdict:
    """Whether a training fits a device.

    Args:
        device: in words.
        memory: bytes that a program may use there; None if unknown.
        peak: bytes at most, over all stages and moments.
        moment: of the peak, in words.
        advice: None if it fits, or if that is unknown.
        rates_from: origin of the seconds, in words.
        hours: of all stages.
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


@dataclass(frozen=True)
class TrainingPlan:
    """Memory and seconds of a training. `to_dict()` for a report, `training_lines` for people.

    Args:
        model: its name.
        setting: the options of the config.
        stages: of the curriculum, once for each size.
        sampling, decoding: bytes on the device while a validation video is sampled, and decoded;
            None without validation, or if it is unknown.
        caching: bytes on the device while clips and captions are encoded, beforehand, the larger
            of both; None if it is unknown.
        loading: bytes in the host's memory when the pipeline is loaded.
        trainable: number of parameters that train.
        verdicts: one for each device.
        notes: in words, what is not counted.
        without_parts: classes of the blocks that checkpoint_parts leaves as they are.
    """

    model: str
    setting: Setting
    stages: tuple[Stage, ...]
    sampling: int | None
    decoding: int | None
    caching: int | None
    loading: int
    trainable: int
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    without_parts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "options": self.setting._asdict(),
            "trainable_parameters": self.trainable,
            "stages": [
                {
                    **one.size._asdict(),
                    "steps": one.steps,
                    "tokens": one.tokens,
                    "density": one.density,
                    "bytes": one.memory.to_dict(),
                    "seconds_a_step": {name: span.pair() for name, span in one.seconds.items()},
                }
                for one in self.stages
            ],
            "validation_bytes": {"sampling": self.sampling, "decoding": self.decoding},
            "caching_bytes": self.caching,
            "loading_host_bytes": self.loading,
            "devices": [
                {
                    "device": one.device,
                    "device_bytes": one.memory,
                    "peak_bytes": one.peak,
                    "at": one.moment,
                    "fits": one.fits,
                    "advice": None if one.advice is None else one.advice.to_dict(),
                    "hours": one.hours.pair(),
                    "rates_from": one.rates_from,
                }
                for one in self.verdicts
            ],
            "not_counted": list(self.notes),
            "blocks_without_parts": list(self.without_parts),
        }


def training_lines(plan: TrainingPlan, width: int = WIDTH) -> list[str]:
    """Lines of the needs of a training and whether it fits, of at most `width` characters."""
    texts = (*_head(plan), "", *_stages(plan, width), *_others(plan), "", *_verdicts(plan))
    return wrapped(texts, width)


def _head(plan: TrainingPlan) -> Iterator[str]:
    setting = plan.setting
    options = [f"gradient_checkpointing {setting.checkpointing}"]
    options += [f"base {setting.base}"] if setting.base else []
    options += [f"blocks_to_swap {setting.swap}"] if setting.swap else []
    options += ["checkpoint_parts"] if setting.parts else []
    yield f"{plan.model}: {plan.trainable / 1e6:,.1f} million parameters train"
    yield ", ".join([*options, f"optimizer {setting.optimizer}"])


def _stages(plan: TrainingPlan, width: int) -> Iterator[str]:
    """A table of the stages, as many beside each other as fit."""
    room = max(1, (width - NAME - 2) // CELL)
    for first in range(0, len(plan.stages), room):
        stages = plan.stages[first : first + room]
        yield _row("GB a stage", [f"{one.frames} frames" for one in stages])
        if len({one.size[1:] for one in plan.stages}) > 1:
            yield _row("", [f"{one.size.height} x {one.size.width}" for one in stages])
        yield _row("tokens of a clip", [f"{one.tokens:,}" for one in stages])
        for name, words in PARTS.items():
            yield _row(words, [_gb(getattr(one.memory, name)) for one in stages])
        yield _row("on the device at most", [_gb(one.memory.total) for one in stages])
        if any(one.memory.host for one in stages):
            yield _row("waiting in CPU memory", [_gb(one.memory.host) for one in stages])
        for device in stages[0].seconds:
            yield f"  a step, {device}:"
            yield _row("", [duration(one.seconds[device]) for one in stages])
        yield ""


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:<{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _others(plan: TrainingPlan) -> Iterator[str]:
    def size(known: int | None) -> str:
        return "not known" if known is None else gigabytes(known)

    if plan.sampling is not None:
        yield f"validation: sampling {gigabytes(plan.sampling)}, decoding {size(plan.decoding)}"
    yield f"caching, before the training: {size(plan.caching)}"
    yield f"CPU memory while the pipeline is loaded: {gigabytes(plan.loading)}"


def _verdicts(plan: TrainingPlan) -> Iterator[str]:
    yield from map(verdict, plan.verdicts)
    if plan.verdicts:
        yield ""
    yield "Seconds: " + "; ".join(dict.fromkeys(one.rates_from for one in plan.verdicts)) + "."
    for kind in plan.without_parts:
        yield (
            f"checkpoint_parts: {kind} is computed again as a whole, as it has linear layers "
            "beside its attention and feed-forward"
        )
    yield from (f"not counted: {note}" for note in plan.notes)


def verdict(one: Verdict) -> str:
    """Say whether a training fits a device, and what to turn on if it does not."""
    hours = f"{duration(one.hours.times(3600))} in all"
    if one.memory is None:
        return f"{one.device}: at most {gigabytes(one.peak)} ({one.moment}); {hours}"
    place = gigabytes(one.memory).replace(".0 ", " ")
    if one.fits:
        return f"{one.device}: fits in {place}: yes, {gigabytes(one.peak)}; {hours}"
    said = f"{one.device}: fits in {place}: no, {gigabytes(one.peak)} ({one.moment})"
    advice = one.advice
    if advice is None:
        return said
    options = [f"{change.option} saves {gigabytes(change.saves)}" for change in advice.changes]
    if advice.fits:
        left = one.peak - sum(change.saves for change in advice.changes)
        return (
            f"{said}. Turn on: {', then '.join(options)}; it fits with {gigabytes(left)}; {hours}"
        )
    if not advice.frames:
        smaller = "at any length: lower height and width"
    else:
        smaller = f"it fits with stages of at most {advice.frames} frames"
    return f"{said}. {'; '.join([*options, 'then ' * bool(options) + smaller])}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"
