"""Validation prompts, encoded once into the cache, so that no text encoder waits for them."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gen_accel.attention_processors.families import family_of
from gen_accel.io import replacing, save_tensors
from gen_accel.lora.caching.encoders import Encoders, hash_of
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.evaluate import guidance_of
from gen_accel.lora.processes import by_main
from gen_accel.pipelines.generation.sampling import arguments, parameters
from gen_accel.registry import needed_for

with needed_for("training", extra="train"):
    from accelerate import Accelerator

VERSION = 1  # of how prompts are encoded; another one makes all keys new

Arguments = dict[str, Tensor]


def encoded_prompts(
    config: TrainConfig, encoders: Encoders, folder: Path, accelerator: Accelerator
) -> tuple[Arguments, ...] | None:
    """Encode the validation prompts that the cache lacks, and read all of them.

    They are encoded on the device and in the precision in which the pipeline would do it in a
    validation, and kept in the dtype that comes out: videos are the same bit for bit.

    Returns:
        for each prompt, what the pipeline takes in its place; None if the family's pipelines take
        text alone.
    """
    family = family_of(encoders.transformer)
    if not family.serves("encoded prompts"):
        return None
    place = folder if os.access(folder, os.W_OK) else Path(config.out) / "prompts"
    options = _options(config, encoders.pipe)
    common = [VERSION, encoders.states(*family.training.text_parts, "tokenizer"), options]
    common += [type(encoders.pipe).__name__, config.mixed_precision, accelerator.device.type]
    files = {
        prompt: place / f"prompt-{hash_of([*common, prompt])}.safetensors"
        for prompt in config.validation_prompts
    }

    @torch.no_grad()
    def encode() -> None:
        missing = {prompt: file for prompt, file in files.items() if not _is_whole(file)}
        if not missing:
            return
        place.mkdir(parents=True, exist_ok=True)
        with encoders.at_work(*family.training.text_parts), accelerator.autocast():
            for prompt, file in missing.items():
                found = family.prompt_arguments(encoders.pipe, prompt, **options)
                with replacing(file) as partial:
                    save_tensors({n: x.cpu() for n, x in found.items()}, partial)

    by_main(accelerator, encode)
    return tuple(load_file(files[prompt]) for prompt in config.validation_prompts)


def _options(config: TrainConfig, pipe: Any) -> dict[str, Any]:
    """Options of encoding: the same that the pipeline's call would have."""
    known, named = parameters(pipe), arguments(pipe)
    defaults = {
        name: known[named[name]].default if named[name] in known else None
        for name in ("max_tokens", "negative_prompt")
    }
    return {
        "is_guided": guidance_of(config) > 1,
        "negative": defaults["negative_prompt"],
        "max_tokens": config.max_tokens or defaults["max_tokens"],
    }


def _is_whole(file: Path) -> bool:
    try:
        load_file(file)
    except (OSError, SafetensorError):
        return False
    return True
