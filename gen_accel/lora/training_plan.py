"""Result of `forecast_training`: what a training costs, and what makes it fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gen_accel.lora.config import TrainConfig
from gen_accel.measure.cards import Range


class Size(NamedTuple):
    """Size of a clip, in frames and pixels."""

    frames: int
    height: int
    width: int


# Fields of a config, in the order of those of `Setting`.
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
        """Whether a config takes these options, see `memory.check_memory`."""
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
        host: bytes in the host's memory at most: swapped blocks, offloaded inputs of blocks. Where
            it is the device's own memory, at the same moment.
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
        """Bytes where the device's memory is the host's."""
        return self.total + self.host

    def to_dict(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Stage:
    """Cost of one stage of the curriculum.

    Args:
        frames, height, width: of its clips, in pixels.
        steps: of the optimizer.
        tokens: of a clip.
        density: share of the token pairs that the method computes in a sparse layer.
        memory: of a step, with the config's options; on a device with memory of its own where
            one was asked for.
        seconds: of a step, by the device's name.
    """

    frames: int
    height: int
    width: int
    steps: int
    tokens: int
    density: float
    memory: StageMemory
    seconds: Mapping[str, Range]


@dataclass(frozen=True)
class Advice:
    """Options that make a training fit a device.

    Args:
        changes: options to turn on, in words, in the order of their cost.
        totals: bytes on the device after each of them.
        fits: whether they suffice.
        frames: most frames of a clip that fit with all of them; None where they suffice, or where
            not even one frame fits.
        sides: largest height and width that fit so, of nearly the same aspect; None likewise.
    """

    changes: tuple[str, ...]
    totals: tuple[int, ...]
    fits: bool
    frames: int | None = None
    sides: tuple[int, int] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a training fits a device.

    Args:
        device: in words.
        memory: bytes that a program may use there; None where unknown.
        peak: bytes at most, over all stages and moments.
        moment: of the peak, in words.
        advice: None where it fits, or where that is unknown.
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
    """Memory and seconds of a training. `to_dict()` for a report; `lines()` for a terminal.

    Args:
        model: its name.
        setting: the options that the config has.
        stages: those of the curriculum, once for each size.
        sampling, decoding: bytes on the device while a validation video is sampled, and decoded;
            None where there are none, or where it is not known.
        caching: bytes on the device while clips and captions are encoded, beforehand, the larger
            of both; None where it is not known.
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
        def span(one: Range) -> list[float]:
            return [one.low, one.high]

        return {
            "model": self.model,
            "options": self.setting._asdict(),
            "trainable_parameters": self.trainable,
            "stages": [
                {
                    **{name: getattr(stage, name) for name in _NUMBERS},
                    "bytes": stage.memory.to_dict(),
                    "seconds_a_step": {name: span(one) for name, one in stage.seconds.items()},
                }
                for stage in self.stages
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
                    "advice": None if one.advice is None else vars(one.advice),
                    "hours": span(one.hours),
                    "rates_from": one.rates_from,
                }
                for one in self.verdicts
            ],
            "not_counted": list(self.notes),
            "blocks_without_parts": list(self.without_parts),
        }


_NUMBERS = ("frames", "height", "width", "steps", "tokens", "density")
