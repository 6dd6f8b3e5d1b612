"""Memory of a training: options that go together, their packages, and refusals of sizes that
cannot fit, with the figure, before anything is allocated. Each of these figures is a lower bound,
so that nothing is refused that would fit.

Imports nothing heavy, so that the command line refuses before torch is loaded.
"""

import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from gen_accel.room import check_room

# Package that a way to hold the base, or an optimizer, needs.
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "adamw8bit": "bitsandbytes"}
OPTIMIZERS = ("adamw", "adamw8bit")
EIGHT_BIT = ("adamw8bit", "bitsandbytes.")  # beginnings of the names of bitsandbytes' optimizers
BASES = ("bf16", "fp8", "int8", "nf4")
CHECKPOINTING = ("off", "on", "offload")

NUMBER = 8  # bytes of a number in a list
ACTIVATIONS = 5  # activations that a block holds at once: its input, q, k, v and the output

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


def check_allocations(config: Any) -> None:
    """Raise ValueError for sizes in the config that cannot fit with any model."""
    steps = config.total_steps
    clips = steps * config.batch_size * config.gradient_accumulation
    check_room(
        f"a list of the {clips} clips of {steps} steps",
        NUMBER * clips,
        "lower the steps of stages, batch_size or gradient_accumulation",
    )
    height, width = max(config.clip_sizes, key=lambda size: size[0] * size[1])
    pixels = 3 * config.longest * height * width
    size = f"{config.longest} frames of {height} x {width}"
    check_room(f"a clip of {size}", pixels, "lower stages, height or width")
    if config.max_tokens is not None:  # text encoders mask each pair of tokens
        check_room(f"max_tokens {config.max_tokens}", config.max_tokens**2, "lower it")
    if config.adapter == "image_prompt":
        side, tokens = config.image_size, config.image_tokens
        check_room(f"image_size {side}", 12 * side**2, "lower it")
        check_room(f"image_tokens {tokens}", 4 * NUMBER * tokens, "lower it")


def check_adapter(config: Any, transformer: Any) -> None:
    """Raise ValueError for a LoRA whose parameters cannot fit, in float32."""
    if config.adapter != "lora" or not config.rank:
        return
    from gen_accel.attention_processors.families import family_of

    sites = family_of(transformer).self_attentions(transformer)
    size = sum(2 * site.heads * site.dim * config.rank * 4 for site in sites)
    check_room(f"a LoRA of rank {config.rank} on {len(sites)} attentions", size, "lower rank")


def check_batch(config: Any, transformer: Any, tokens: int) -> None:
    """Raise ValueError for a batch that not even one block of the model can hold, or of several
    clips for a model whose texts must be of one length.

    Args:
        tokens: number of tokens of a clip.
    """
    from gen_accel.attention_processors.families import family_of

    family = family_of(transformer)
    if config.batch_size > 1 and family.training.one_text_length:
        raise ValueError(
            f"batch_size must be 1 for {family.models}, which has no mask for captions of several "
            f"lengths, got {config.batch_size}: raise gradient_accumulation instead"
        )
    sites = family.self_attentions(transformer)
    width = max(site.heads * site.dim for site in sites)
    itemsize = 4 if config.mixed_precision == "no" else 2
    check_room(
        f"batch_size {config.batch_size} of {tokens} tokens each",
        ACTIVATIONS * config.batch_size * tokens * width * itemsize,
        "lower batch_size, or the frames of stages, height or width",
        transformer.device,
    )


def peak_gb(device: Any) -> float | None:
    """Return the most memory held so far, in GB (10^9 bytes): of an accelerator what torch has
    allocated there, of a CPU the resident memory of the process. None if that is unknown."""
    import torch

    if device.type != "cpu":
        try:
            return torch.accelerator.max_memory_allocated(device) / 1e9
        except (RuntimeError, AttributeError):
            return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9
