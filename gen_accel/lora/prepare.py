"""Preparation of a training: load the model, check the config against it, cache the clips."""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gen_accel import demo
from gen_accel.attention_processors.lengths import latent_frames, temporal_patch
from gen_accel.attention_processors.methods.options import method_from
from gen_accel.extras import needed_for
from gen_accel.lora.adapters import read_start
from gen_accel.lora.artefact import (
    check_guidance,
    check_start,
    check_teacher,
    target_modules,
)
from gen_accel.lora.attention_loss import text_attentions
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.encode import cache
from gen_accel.lora.encoders import factors_of
from gen_accel.lora.experts import BOTH, PARTS, check_parts, config_of
from gen_accel.lora.images import ImageCoder, describe_images
from gen_accel.lora.latents import LatentCache
from gen_accel.lora.model import Model
from gen_accel.lora.noising import shift_of
from gen_accel.lora.processes import by_main
from gen_accel.lora.size import check_adapter, check_batch
from gen_accel.owners import check_free
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.progress import waiting
from gen_accel.pipelines.generation.sampling import Clip, check_fits, filled, token_grid
from gen_accel.pipelines.long_video import check_rule, known_trained_frames
from gen_accel.video import VideoShape

with needed_for("training", extra="train"):
    from accelerate import Accelerator

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def prepare(config: TrainConfig, accelerator: Accelerator) -> tuple[Model, LatentCache]:
    """Load the pipeline, check the config against it, and cache the missing clips."""
    folder, main = cache_folder(config), accelerator.is_main_process
    if config.data is None and not folder.exists():
        raise ValueError(
            f"data is not given and {folder} holds no cache: give the videos, or a cache made "
            "with `gen-accel cache`"
        )
    if config.data is not None and not expanded(config.data).exists():
        raise FileNotFoundError(f"data: there is nothing at {config.data}")
    check_parts(vars(config), fetch=True)
    if config.data is not None:
        by_main(accelerator, partial(check_free, folder))
    with waiting(f"loading the model {config.model}") if main else nullcontext():
        pipe = load_pipe(config)
    model = model_of(config, pipe)
    if config.data is not None:
        by_main(accelerator, lambda: print(cache_clips(config, pipe), file=sys.stderr))
    latents = LatentCache(folder)
    check_cache(config, pipe, latents)
    if not config.validate_every:
        for part in ("vae", "text_encoder", "text_encoder_2", "image_encoder"):
            if getattr(pipe, part, None) is not None:
                setattr(pipe, part, None)
    else:
        with waiting(f"moving the model to {accelerator.device}") if main else nullcontext():
            place(pipe, config, accelerator.device)
    return model, latents


def place(pipe: Any, config: TrainConfig, device: torch.device) -> None:
    """Move a pipeline's models to a device; two experts that train are left to the training."""
    if config.part != BOTH:
        pipe.to(device)
        return
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and name not in PARTS:
            model.to(device)


def check_cache(config: TrainConfig, pipe: Any, latents: LatentCache) -> None:
    """Refuse, by a ValueError, a cache that does not fit the config.

    Its clips may have another size or frame rate, or lack the images or captions that are needed.
    """
    _, factor = factors_of(pipe)
    wanted = config.height // factor, config.width // factor
    others = {(entry.height, entry.width) for entry in latents.entries} - {wanted}
    if others:
        height, width = min(others)
        raise ValueError(
            f"{latents.folder} holds clips of {height * factor} x {width * factor} pixels, asked "
            f"for are {config.height} x {config.width}"
        )
    if latents.fps != config.fps:
        raise ValueError(
            f"{latents.folder} holds clips at {latents.fps} frames a second, asked for are "
            f"{config.fps}"
        )
    if config.reads_teacher_captions:
        untaught = [entry.name for entry in latents.entries if entry.teacher_key is None]
        if untaught:
            raise ValueError(
                f"{latents.folder} holds no caption for the teacher of {untaught[0]}, which "
                f"objective {config.objective} of an image prompt needs: give data, or cache "
                "again with this config"
            )
    if config.adapter == "image_prompt":
        coder, found = ImageCoder.of(config), latents.images
        if found is None:
            raise ValueError(
                f"{latents.folder} holds no images, which adapter image_prompt needs: give data, "
                "or cache again with this config"
            )
        if {name: found.get(name) for name in coder.about} != coder.about:
            raise ValueError(
                f"{latents.folder} holds images for {describe_images(found)}, asked for is "
                f"{describe_images(coder.about)}: cache again with this config"
            )


def load_pipe(config: TrainConfig) -> Any:
    """Load the pipeline on the CPU; its models are moved to a device when they are needed."""
    source = demo.model_named(config.model)
    folder = expanded(source)
    source = folder if folder.exists() else source
    pipe = load(source, Loading(dtype=PRECISIONS[config.mixed_precision], device="cpu"))
    if getattr(pipe, "vae", None) is not None and pipe.vae.dtype != torch.float32:
        # Load it again: casting back does not undo the rounding.
        pipe.vae = type(pipe.vae).from_pretrained(
            source, subfolder="vae", torch_dtype=torch.float32
        )
    return pipe


def model_of(config: TrainConfig, pipe: Any) -> Model:
    """Check the config against the pipeline, and return the model to train.

    Raises ValueError for a field that does not fit the pipeline.
    """
    if config.part == BOTH:
        first, second = (model_of(config_of(config, part), pipe) for part in PARTS)
        if first.boundary is None:
            raise ValueError(f"part both needs a boundary_ratio of {config.model}, which has none")
        return first._replace(transformer_2=second.transformer)
    transformer = getattr(pipe, config.part, None)
    if transformer is None:
        raise ValueError(f"{type(pipe).__name__} of {config.model} has no {config.part}")
    if config.adapter == "image_prompt":
        _check_image_prompt(config, transformer)
    elif config.rank:
        target_modules(transformer, config.targets)
    if config.init_lora is not None:
        check_start(config.init_lora, config, transformer)
    check_guidance(config, transformer, pipe.config.get("boundary_ratio"))
    method = method_from(config.method, config.settings)
    lengths = {stage.frames for stage in config.curriculum}
    if config.validate_every and config.validation_frames is not None:
        lengths.add(config.validation_frames)
    check_adapter(config, transformer)
    for stage in config.curriculum:
        check_rule(transformer, stage.rope)
    for frames in sorted(lengths):
        video = grid(config, pipe, frames)
        check_batch(config, transformer, video.tokens)
        check_fits(method, video)
    trained = config.trained_frames
    if trained is None:
        try:
            trained = known_trained_frames(transformer)
        except ValueError:
            if any(stage.rope != "none" for stage in config.curriculum):
                raise
    if config.teacher_lora is not None:
        check_teacher(config, transformer, trained)
    factor, _ = factors_of(pipe)
    if trained is not None:
        latent_frames("trained_frames", trained, factor, temporal_patch(transformer))
    shift = config.shift
    if shift is None:
        longest = grid(config, pipe, config.longest)
        shift = shift_of(pipe.scheduler.config, longest.video_tokens)
    return Model(
        transformer=transformer,
        pipe=pipe if config.validate_every else None,
        frames=lambda n: (n - 1) // factor + 1,
        trained_frames=trained,
        shift=float(shift),
        boundary=pipe.config.get("boundary_ratio"),
        schedule=pipe.scheduler.config,
    )


def _check_image_prompt(config: TrainConfig, transformer: Any) -> None:
    from gen_accel.attention_processors.families import image_family_of

    image_family_of(transformer)
    if config.objective == "distill_attention":
        text_attentions(transformer)
    if config.init_adapter is not None:
        read_start(config, transformer)
    for file in config.validation_images:
        if not expanded(file).is_file():
            raise FileNotFoundError(f"validation_images: there is no file at {file}")


def grid(config: TrainConfig, pipe: Any, frames: int) -> VideoShape:
    """Return the grid of a clip's tokens.

    Raises ValueError for a size that the autoencoder or the patches would round.
    """
    clip = Clip(frames=frames, height=config.height, width=config.width)
    factor, patch = factors_of(pipe)[0], temporal_patch(getattr(pipe, config.part))
    if patch > 1:  # the pipelines fill up what patches leave
        latent_frames("frames", frames, factor, patch)
    return token_grid(pipe, filled(pipe, clip))


def cache_folder(config: TrainConfig) -> Path:
    return Path(config.cache) if config.cache is not None else Path(config.out) / "cache"


def cache_clips(config: TrainConfig, pipe: Any = None) -> Any:
    """Encode the missing clips, and return the report of `cache`."""
    assert config.data is not None
    if pipe is None:
        check_free(cache_folder(config))
    return cache(
        pipe if pipe is not None else load_pipe(config),
        config.data,
        cache_folder(config),
        frames=sorted({stage.frames for stage in config.curriculum}),
        sizes=[(config.height, config.width)],
        fps=config.fps,
        max_tokens=config.max_tokens,
        on_broken=config.on_broken,
        device=config.device,
        images=ImageCoder.of(config) if config.adapter == "image_prompt" else None,
        teacher=config.reads_teacher_captions,
    )
