"""Options that save memory: which of them go together, and the packages that they need.

Imports nothing heavy, so that the command line refuses before torch is loaded.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

# Package that a way to hold the base, or an optimizer, needs.
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "adamw8bit": "bitsandbytes"}
OPTIMIZERS = ("adamw", "adamw8bit")
EIGHT_BIT = ("adamw8bit", "bitsandbytes.")  # beginnings of the names of bitsandbytes' optimizers
BASES = ("bf16", "fp8", "int8", "nf4")
CHECKPOINTING = ("off", "on", "offload")

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def packages_of(given: Mapping[str, Any]) -> set[str]:
    """Packages that hold the base or step the optimizer.

    Args:
        given: fields of a config, by name.
    """
    words = (given.get(name) or "" for name in ("base", "optimizer"))
    return {PACKAGES.get(word, word.partition(".")[0]) for word in words if word}


def check_installed(given: Mapping[str, Any]) -> None:
    """Refuse, by a ValueError, an option whose package is missing, or an optimizer that cannot be
    a class.

    Args:
        given: fields of a config, by name.
    """
    for name in ("base", "optimizer"):
        package = PACKAGES.get(given.get(name) or "")
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f'{name} {given[name]} needs {package}: pip install "gen_accel[quantized]"'
            )
    optimizer = given.get("optimizer", "adamw")
    if optimizer in OPTIMIZERS:
        return
    if not isinstance(optimizer, str) or not _CLASS.fullmatch(optimizer):
        raise ValueError(
            f"optimizer must be adamw, adamw8bit or module.Class, such as prodigyopt.Prodigy, got "
            f"{optimizer!r}"
        )
    package = optimizer.partition(".")[0]
    if find_spec(package) is None:
        raise ValueError(f"optimizer {optimizer} needs {package}: pip install {package}")


def check_memory(config: Any) -> None:
    """Refuse, by a ValueError, options of a `TrainConfig` that exclude each other."""
    known = {"base": (None, *BASES), "gradient_checkpointing": CHECKPOINTING}
    for name, words in known.items():
        if getattr(config, name) not in words:
            said = ", ".join(word or "none" for word in words)
            raise ValueError(f"{name} must be one of {said}, got {getattr(config, name)!r}")
    if quantised(config) and config.adapter == "image_prompt":
        raise ValueError(
            f"base {config.base} does not go with adapter image_prompt, whose layers start as "
            "copies of the model's own: take fp8"
        )
    if config.checkpoints_activations:
        return
    if config.checkpoint_parts:
        raise ValueError(
            "checkpoint_parts needs gradient_checkpointing on or offload, of whose blocks the "
            "parts are"
        )
    for name in ("blocks_to_swap", "base"):
        value = getattr(config, name)
        if name == "base" and not held_by_casting(config):
            continue
        if value:
            raise ValueError(
                f"{name} {value} needs gradient_checkpointing on or offload, which brings a "
                "block's weights back for its backward pass"
            )


def held_by_casting(config: Any) -> bool:
    """Whether the base is held in another floating-point dtype than it computes in."""
    return config.base == "fp8" or (config.base == "bf16" and config.mixed_precision != "bf16")


def check_processes(config: Any, kind: str) -> None:
    """Refuse, by a ValueError, options that do not go with a way of running several processes.

    Args:
        kind: Accelerate's name of it, such as FSDP.
    """
    if kind not in ("FSDP", "DEEPSPEED"):
        return
    own = "which places the model's weights itself"
    refused = {}
    if config.blocks_to_swap:
        refused["blocks_to_swap"] = own
    if held_by_casting(config):
        refused["base"] = own
    if config.base == "int8":
        refused["base"] = "which cannot take torchao's tensors apart, or move them"
    if kind == "FSDP" and config.optimizer.startswith(EIGHT_BIT):
        refused["optimizer"] = "of whose parts of parameters bitsandbytes knows nothing"
    for name, why in refused.items():
        raise ValueError(
            f"{name} {getattr(config, name)} does not go with {kind}, {why}: leave one of them "
            "out, or launch with configs/accelerate/ddp.yaml"
        )


def quantised(config: Any) -> bool:
    """Whether a library holds the base's weights in a form of its own."""
    return config.base in ("int8", "nf4")
