"""Dry run of a config: two training steps of a tiny random model of the same class."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from gen_accel import demo
from gen_accel.attention_processors.families import Family, family_of
from gen_accel.attention_processors.families.base import takes_frames
from gen_accel.attention_processors.families.pipelines import pipeline_of
from gen_accel.attention_processors.families.weights import block_names
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.lora.caching.encoders import check_trained
from gen_accel.lora.caching.inputs import (
    CONTROL,
    LAST_FRAME,
    TEXT,
    ImageCoder,
    check_family,
    check_sound,
    condition_for,
    condition_in,
)
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.memory import check_batch
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.prepare import check_components, source_of
from gen_accel.lora.processes import accelerator_for
from gen_accel.lora.trainer import Trained, run
from gen_accel.measure.cost.model import Subject, subject_of
from gen_accel.pipelines.generation.quantising import load_quantised
from gen_accel.pipelines.generation.sampling import check_fits
from gen_accel.pipelines.long_video import check_rule
from gen_accel.served import row_of
from gen_accel.video import patch_of

TOKENS, PATCHES, EMBEDDING = 6, 5, 8  # of a text, an image, a patch
SMALL = (3, 3, 5)  # least grid of tokens; larger for a method with a larger window


def dry_run(config: TrainConfig) -> Trained:
    """Check a config as far as that goes without the model and the clips, and take two steps.

    Method, layers, LoRA targets, objective, optimizer, curriculum and checkpoints come from the
    config. The rank is at most 4, the kernel runs on a CPU, clips are as small as the method
    allows, and no image encoder is loaded.

    Raises ValueError for a config that does not fit, as a real run would.
    """
    check_components(config)
    made = [_dry_run(one) for one in config.runs()]
    losses = [loss for one in made for loss in one.losses]
    return replace(made[-1], steps=len(losses), losses=losses)


def _dry_run(config: TrainConfig) -> Trained:
    subject = dry_subject(config.model)
    family, condition = subject.family, _condition(config, subject)
    torch.manual_seed(config.seed)
    check_sound(family, subject.model, config.fps if config.sound else None)
    tiny = dict(family.training.tiny) | {family.training.depth: config.dense_layers + 2}
    if condition != TEXT:
        tiny |= _from_frame(family, subject.config)
    transformer: ModelMixin = getattr(diffusers, type(subject.model).__name__)(**tiny)
    coding, patch = family.sizes.coding(), patch_of(transformer.config)
    for stage in config.curriculum:
        check_rule(transformer, stage.rope)
    method = method_from(config.method, config.settings)
    for frames, size in product(config.clip_lengths, config.clip_sizes):
        check_fits(method, subject.grid(*size, frames))

    lengths = sorted({stage.frames for stage in config.curriculum})
    least = [max(pair) for pair in zip(SMALL, method.least_grid, strict=True)]
    short = {
        frames: coding.frames_of(i * coding.latents + least[0]) for i, frames in enumerate(lengths)
    }
    stages = tuple(
        str(replace(stage, frames=short[stage.frames], steps=1, epochs=0))
        for stage in config.curriculum
    )
    if len(stages) == 1:
        stages = (stages[0].replace(":1", ":2", 1),)
    with tempfile.TemporaryDirectory() as folder:
        least_of = {"rank": min(config.rank, 4), "init_lora": None, "teacher_lora": None}
        if config.adapter == "image_prompt":
            least_of = {"init_adapter": None}
        small = config.replaced(
            **least_of,
            out=folder,
            stages=stages,
            held_out=0.0,
            loss_every=0,
            images=0.0,
            masks=False,
            mask_floor=0.0,
            validate_every=0,
            validation_images=(),
            validation_last_images=(),
            log_with="none",
            warmup_steps=1,
            device="cpu",
            mixed_precision="no",
            kernel="auto",
            context_parallel=1,
            base=config.base if config.is_quantised or config.base == "fp8" else None,
            blocks_to_swap=min(config.blocks_to_swap, len(block_names(transformer))),
        )
        if config.is_quantised:
            transformer.save_pretrained(Path(folder) / config.part)
            transformer = load_quantised(
                type(transformer),
                folder,
                config.part,
                str(config.base),
                torch.float32,
                torch.device("cpu"),
            )
        model = ModelToTrain(
            transformer=transformer,
            pipe=None,
            frames=coding.latents_of,
            trained_frames=5,
            shift=config.shift or 1.0,
            condition=condition,
        )
        features = ImageCoder.of(config).shape(patches=PATCHES, embedding=EMBEDDING)
        size = patch[1] * least[1], patch[2] * least[2]
        check_batch(small, transformer, math.prod(least))
        sound = float(config.fps or 1) if config.sound else None
        clips: Any = RandomClips(
            transformer, [*short.values()], size, features, condition, sound=sound
        )
        return run(small, accelerator_for(small), model, clips)


def _from_frame(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `training.from_frame` without the entries that the model's config lacks."""
    return {
        name: config[name] if value is None else value
        for name, value in family.training.from_frame.items()
        if (takes_frames(config) if name == "in_channels" else config.get(name) is not None)
    }


def dry_subject(model: str) -> Subject:
    """Read the configs of a model, which may be fetched from the hub.

    Raises ValueError for a family that has no tiny model.
    """
    subject = subject_of(demo.model_named(model))
    if not subject.family.training.tiny:
        raise ValueError(f"no dry run for {type(subject.model).__name__} of {model}")
    return subject


def _condition(config: TrainConfig, subject: Subject) -> str:
    family, own = subject.family, pipeline_of(str(source_of(config)))
    is_plain = config.condition is None and not (
        config.first_frame_dropout or config.last_frame_dropout
    )
    row = None if Path(source_of(config)).exists() else row_of(config.model)
    preset = None if row is None else family.presets.get(row.published)
    if preset is not None:
        check_trained(family, None, preset.config)  # the model's own has defaults of its class too
        if own is None and is_plain:
            return TEXT
    if preset is not None and own is not None:
        found = condition_for({"_class_name": own}, subject.config, config)
    else:
        found = condition_in(source_of(config), config)
        check_trained(family, found.pipeline if found.is_own else None, found.transformer)
    if found.condition != TEXT:
        check_family(family, subject.model, found.condition)
    return found.condition


class RandomClips:
    """Stand-in for a `LatentCache`: one random clip of each length, and at least two.

    Args:
        transformer: the model that takes the clips.
        frames: pixel frames of each clip.
        size: height and width in latents.
        features: shape of an image's features.
        condition: of the training.
        sound: frames a second of clips with sound; None: they have none.
    """

    digest = "dry run"

    def __init__(
        self,
        transformer: ModelMixin,
        frames: list[int],
        size: tuple[int, int],
        features: tuple[int, ...],
        condition: str,
        *,
        sound: float | None = None,
    ) -> None:
        self.transformer, self.size, self.condition = transformer, size, condition
        self.family = family_of(transformer)
        self.no_image = torch.zeros(features)
        plain: dict[str, Any] = dict.fromkeys(("text_keys", "starts", "repeats", "is_picture"))
        plain |= {"sound_key": sound, "height": size[0], "width": size[1]}
        self._fps = sound
        self.entries = [
            SimpleNamespace(pixel_frames=n, **plain) for n in (2 * frames)[: max(2, len(frames))]
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def digest_at(self, frames: int) -> str:
        return self.digest

    def buckets(self, frames: int) -> dict[tuple[int, int], list[int]]:
        return {self.size: [0, 1]}

    def latents(self, index: int, frames: int) -> Tensor:
        channels = self.family.latent_channels(self.transformer.config)
        return _noise(index, (channels, frames, *self.size))

    def first_frame(self, index: int, frames: int) -> dict[str, Tensor]:
        if self.condition == CONTROL:
            return self.family.tiny_control(self.transformer, frames, *self.size)
        found = self.family.tiny_first_frame(self.transformer, frames, *self.size)
        if self.condition == LAST_FRAME:
            found |= self.family.tiny_last_frame(self.transformer, *self.size)
        return found

    def sound(self, index: int, tokens: int) -> Tensor:
        return self._heard[0].new_ones(tokens, self._heard[0].shape[1])

    @property
    def _heard(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._fps is not None
        return self.family.tiny_sound(self.transformer.config, 1, self._fps, TOKENS)

    def image(self, index: int) -> Tensor:
        return _noise(10 + index, self.no_image.shape)

    def conditions(self, index: int, text: int = 0) -> dict[str, Tensor]:
        return self.empty

    def teacher(self, index: int) -> dict[str, Tensor]:
        return self.empty

    @property
    def empty(self) -> dict[str, Tensor]:
        found = self.family.tiny_conditions(self.transformer.config, TOKENS)
        return found if self._fps is None else found | self._heard[1]


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
