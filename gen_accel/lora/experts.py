"""The two experts of a pipeline such as Wan 2.2's, `part: both`: their steps, and their folders.

`transformer` is for high noise and `transformer_2` for low. They share no parameter, and each has
an optimizer, a learning-rate schedule and clips of its own: each trains to the bit as it would
alone with its number of steps. So it is the number of steps that decides how much an expert
learns, and half of them each is the default. Noise levels drawn over the whole range would give
`transformer` fewer, about a fifth of them at shift 3 and boundary 0.875.

Imports nothing heavy: the command line refuses before torch is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel import names
from gen_accel.demo import NAME
from gen_accel.hub import fetched
from gen_accel.json_files import read_fields
from gen_accel.paths import expanded

BOTH = "both"
HIGH, LOW = PARTS = names.EXPERTS
SECOND = LOW  # subfolder of a LoRA's folder with the LoRA of the low-noise expert
OWN_FIELDS = ("switch_every", "high_noise_steps")  # of `part: both` alone


class Resident(NamedTuple):
    """Where the experts that train lie during a training.

    Args:
        on_device: experts on the device at a time, with their LoRA, optimizer and average.
        waiting: experts that lie in the CPU's memory meanwhile, with the same.
    """

    on_device: int
    waiting: int


def resident(config: Any) -> Resident:
    """Count the experts on the device and in the CPU's memory. Before the first step, and where a
    pipeline of two experts trains one of them, the CPU's memory holds both while they load."""
    return Resident(1, len(parts_of(config)) - 1)


def parts_of(config: Any) -> tuple[str, ...]:
    """Return the names of the transformers that train."""
    return PARTS if config.part == BOTH else (config.part,)


class Turns:
    """Which expert takes each step: runs of `switch_every` steps, shared out evenly.

    A turn depends on its number alone, so that more steps begin with the turns of fewer.
    """

    def __init__(self, config: Any) -> None:
        self.every, self.share = config.switch_every, config.high_noise_steps

    def at(self, step: int) -> tuple[str, int]:
        """Return the expert that takes a step, and how many steps it took before."""
        turn = step // self.every
        part = HIGH if self._high(turn + 1) > self._high(turn) else LOW
        return part, self.done(part, step)

    def done(self, part: str, steps: int) -> int:
        """Return how many of the first `steps` steps an expert takes."""
        turn, inside = divmod(steps, self.every)
        high = self._high(turn) * self.every
        if self._high(turn + 1) > self._high(turn):
            high += inside
        return high if part == HIGH else steps - high

    def step_of(self, part: str, own: int) -> int:
        """Return the step that is an expert's step `own`."""
        low, high = own, own + 1
        while self.done(part, high) <= own:
            high *= 2
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.done(part, middle) <= own else (low, middle)
        return low

    def _high(self, turns: int) -> int:
        """Return how many of the first `turns` turns the high-noise expert takes."""
        return math.floor(turns * self.share + 0.5)


def config_of(config: Any, part: str) -> Any:
    """Return the `TrainConfig` by which one expert of `part: both` trains: its steps of each
    stage, and its LoRAs to start from and to learn from."""
    turns, done, stages = Turns(config), 0, []
    for stage in config.curriculum:
        own = turns.done(part, done + stage.steps) - turns.done(part, done)
        stages.append(str(replace(stage, steps=own)))
        done += stage.steps
    plain = {name: type(config).__dataclass_fields__[name].default for name in OWN_FIELDS}
    return replace(
        config,
        part=part,
        stages=tuple(stages),
        init_lora=folder_of(config.init_lora, part),
        teacher_lora=folder_of(config.teacher_lora, part),
        **plain,
    )


def halves(config: Any, steps: int) -> list[tuple[Any, int]]:
    """Return the config of each transformer that trains, and how many of the first `steps` steps
    it takes."""
    if config.part != BOTH:
        return [(config, steps)]
    turns = Turns(config)
    return [(config_of(config, part), turns.done(part, steps)) for part in PARTS]


def folder_of(lora: str | None, part: str) -> str | None:
    """Return the folder of an expert's LoRA in the folder of both."""
    return lora if lora is None or part == HIGH else str(Path(lora) / SECOND)


def check_both(config: Any) -> None:
    """Refuse, by a ValueError, fields that do not go with `part`."""
    if config.part != BOTH:
        given = [name for name in OWN_FIELDS if config.is_given(name)]
        if given:
            name = given[0]
            raise ValueError(
                f"{name} is for part both, got {getattr(config, name)!r} with part "
                f"{config.part}: leave it out"
            )
        return
    if config.adapter != "lora":
        raise ValueError(
            f"part both trains a LoRA for each expert, got adapter {config.adapter}: give part "
            "transformer or transformer_2"
        )
    if config.teacher_guidance > 1:
        raise ValueError(
            f"teacher_guidance is {config.teacher_guidance:g}: leave it out, as a pipeline of two "
            "transformers guides both or none"
        )
    if config.base in ("int8", "nf4"):
        raise ValueError(
            f"part both moves the experts to the device in turn, which base {config.base} does "
            "not go with: take fp8, or train one part at a time"
        )
    for name in ("blocks_to_swap", "context_parallel"):
        if config.is_given(name):
            raise ValueError(
                f"{name} {getattr(config, name)} does not go with part both, of which one expert "
                "waits in CPU memory: leave it out, or train one part at a time"
            )
    turns, done = Turns(config), 0
    for stage in config.curriculum:
        for part in PARTS:
            if turns.done(part, done + stage.steps) == turns.done(part, done):
                raise ValueError(_no_step(config, stage, part))
        done += stage.steps


def check_launch(config: Any, kind: str) -> None:
    """Refuse, by a ValueError, both experts under a way of running several processes that places
    the models itself.

    Args:
        kind: Accelerate's name of it, such as FSDP.
    """
    if config.part == BOTH and kind in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            f"part both moves the experts to the device in turn, and {kind} places a model "
            "itself: train one part at a time, or launch with configs/accelerate/ddp.yaml"
        )


def check_parts(given: Mapping[str, Any], *, fetch: bool = False) -> None:
    """Refuse a model that lacks an expert which is to train, or LoRAs of one expert for both.

    Reads `model_index.json` alone.

    Args:
        given: fields of a config, by name.
        fetch: also read the index of a model on the hub.

    Raises:
        ValueError: an expert is not in the index, or its folder is missing, or the pipeline
            does not say at which noise level it switches.
        FileNotFoundError: no LoRA of the second expert in a folder to start or learn from.
    """
    part, model = given.get("part", HIGH), str(given.get("model", NAME))
    if part == HIGH:
        return
    wanted = PARTS if part == BOTH else (part,)
    folder = expanded(model)
    local = folder.exists()
    if model == NAME:
        raise ValueError(f"part {part} needs a pipeline of two experts, and {NAME} has one")
    if local or fetch:
        path = folder / "model_index.json" if local else fetched(model, "model_index.json")
        index = read_fields(path)
        for name in wanted:
            is_named = isinstance(index.get(name), list) and index[name][:1] not in ([], [None])
            if not is_named or (local and not (folder / name).is_dir()):
                raise ValueError(
                    f"part {part} needs {name}, which {model} lacks: give a pipeline of two "
                    "experts, as Wan 2.2 A14B, or leave part out"
                )
        if part == BOTH and index.get("boundary_ratio") is None:
            raise ValueError(
                f"part both needs a boundary_ratio, the noise level between the experts, in "
                f"{model}'s model_index.json, which has none"
            )
    for name in ("init_lora", "teacher_lora") if part == BOTH else ():
        second = folder_of(given.get(name), LOW)
        if second is not None and not expanded(second).is_dir():
            raise FileNotFoundError(
                f"{name} {given[name]} has no folder {SECOND}, the LoRA of the second expert: "
                "give what a training of part both wrote"
            )


def _no_step(config: Any, stage: Any, part: str) -> str:
    return (
        f"stage {stage} leaves {part} no step, as the experts take turns of {config.switch_every} "
        f"steps and transformer {config.high_noise_steps:g} of all: lower switch_every, or give "
        "the stage more steps"
    )
