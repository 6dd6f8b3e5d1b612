"""The two experts of a pipeline such as Wan 2.2's: their runs, and their folders.

`transformer` is for high noise and `transformer_2` for low. They share no parameter, and `part:
both` trains one after the other, each to the bit as it trains alone. The curriculum holds for
each: noise levels drawn over the whole range would give `transformer` few of the steps, about a
fifth of them at shift 3 and boundary 0.875.

    OUT/high_noise, OUT/low_noise   the two runs, with their checkpoints
    OUT/lora                        the LoRA of `transformer`
    OUT/lora/transformer_2          the LoRA of `transformer_2`

Imports nothing heavy: the command line refuses before torch is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

from gen_accel import registry
from gen_accel.demo import NAME
from gen_accel.hub import index_file
from gen_accel.io import read_index
from gen_accel.paths import expanded, model_named

BOTH = "both"
HIGH, LOW = PARTS = registry.EXPERTS
NOISE = {HIGH: "high_noise", LOW: "low_noise"}  # folders of the runs, and ends of exported files
SECOND = LOW  # subfolder of a LoRA's folder with the LoRA of the low-noise expert


def folder_of(lora: str | None, part: str) -> str | None:
    """Return the folder of an expert's LoRA in the folder of both."""
    return lora if lora is None or part == HIGH else str(Path(lora) / SECOND)


def check_parts(part: str, model: str, loras: Mapping[str, str | None], *, fetch: bool) -> None:
    """Refuse a model that lacks an expert which is to train, or LoRAs of one expert for both.

    Reads `model_index.json` alone.

    Args:
        loras: folders of LoRAs to start or learn from, by their options.
        fetch: also read the index of a model on the hub.

    Raises:
        ValueError: an expert is not in the index, or its folder is missing, or the pipeline
            does not say at which noise level it switches.
        FileNotFoundError: no LoRA of the second expert in a folder to start or learn from.
    """
    if part == HIGH:
        return
    if model == NAME:
        raise ValueError(f"part {part} needs a pipeline of two experts, and {NAME} has one")
    source = model_named(model)
    folder = expanded(source)
    local = folder.exists()
    if local or fetch:
        index = read_index(index_file(source))
        for name in PARTS if part == BOTH else (part,):
            if not is_there(index, name) or (local and not (folder / name).is_dir()):
                raise ValueError(
                    f"part {part} needs {name}, which {model} lacks: give a pipeline of two "
                    "experts, as Wan 2.2 A14B, or leave part out"
                )
        if part == BOTH and index.get("boundary_ratio") is None:
            raise ValueError(
                f"part both needs a boundary_ratio, the noise level between the experts, in "
                f"{model}'s model_index.json, which has none"
            )
    for name, given in loras.items() if part == BOTH else ():
        second = folder_of(given, LOW)
        if second is not None and not expanded(second).is_dir():
            raise FileNotFoundError(
                f"{name} {given} has no folder {SECOND}, the LoRA of the second expert: "
                "give what a training of part both wrote"
            )


def is_there(index: Mapping[str, object], part: str) -> bool:
    """Whether a `model_index.json` names a class for a component."""
    kind = index.get(part)
    return isinstance(kind, list | tuple) and bool(kind) and kind[0] is not None
