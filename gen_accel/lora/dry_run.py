"""A config tried out without its model: a tiny random one of the same class, and two steps."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from gen_accel.attention_processors.families import family_of, served_classes
from gen_accel.attention_processors.methods.options import method_from
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.images import features_shape
from gen_accel.lora.model import Model
from gen_accel.lora.trainer import Trained, accelerator_for, run
from gen_accel.pipelines.generation.sampling import check_fits
from gen_accel.video import VideoShape

# Repositories whose class is known without asking the hub.
CLASSES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "WanTransformer3DModel",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "WanTransformer3DModel",
    "hunyuanvideo-community/HunyuanVideo": "HunyuanVideoTransformer3DModel",
}
CHANNELS, TEXT, WIDTH, POOLED, PATCHES = 16, 6, 8, 8, 5
SMALL = (3, 3, 5)  # tokens; larger where the window of a method is
SPATIAL = 8  # of the autoencoders of all families served

# How little a model of each family can be; `layers` is put in.
TINY: Mapping[str, Mapping[str, Any]] = {
    "wan": {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "rope_max_seq_len": 64,
    },
    "hunyuan_video": {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "rope_axes_dim": (4, 6, 6),
    },
}


def dry_run(config: TrainConfig) -> Trained:
    """Check a config as far as that goes without the model and the clips, and take two steps.

    Method, layers, LoRA targets, objective, optimizer, curriculum and checkpoints are those of the
    config; the rank is at most 4, the kernel one that runs on a CPU, clips are as small as the
    method allows, and an image encoder is not loaded.

    Raises ValueError for whatever does not fit, as a real run would.
    """
    kind = transformer_class(config.model)
    family = served_classes()[kind]
    torch.manual_seed(config.seed)
    tiny = dict(TINY[family]) | {"num_layers": config.dense_layers + 2}
    transformer = getattr(diffusers, kind)(**tiny)
    module: Any = family_of(transformer)
    _check_lengths(config, module)

    method = method_from(config.method, config.settings)
    lengths = sorted({stage.frames for stage in config.curriculum})
    least = [max(pair) for pair in zip(SMALL, getattr(method, "window", SMALL), strict=True)]
    short = {frames: 4 * (i + least[0]) - 3 for i, frames in enumerate(lengths)}
    stages = tuple(
        str(replace(stage, frames=short[stage.frames], steps=1)) for stage in config.curriculum
    )
    if len(stages) == 1:
        stages = (stages[0].replace(":1", ":2", 1),)
    with tempfile.TemporaryDirectory() as folder:
        least_of = {"rank": min(config.rank, 4), "init_lora": None, "teacher_lora": None}
        if config.adapter == "image_prompt":
            least_of = {"init_adapter": None}
        small = replace(
            config,
            **least_of,
            out=folder,
            stages=stages,
            validate_every=0,
            validation_images=(),
            log_with="none",
            warmup_steps=1,
            device="cpu",
            mixed_precision="no",
            kernel="auto",
        )
        model = Model(transformer, None, lambda n: (n - 1) // 4 + 1, 5, config.shift or 1.0)
        features = features_shape(config, patches=PATCHES, embedding=WIDTH)
        clips: Any = _Noise(family, [*short.values()], (2 * least[1], 2 * least[2]), features)
        return run(small, accelerator_for(small), model, clips)


def transformer_class(model: str) -> str:
    """Of the pipeline's transformer; asks the hub for one small file where it has to."""
    from gen_accel import demo

    if model in CLASSES:
        return CLASSES[model]
    source = demo.path() if model == "demo" else Path(model).expanduser()
    config: Any = diffusers.DiffusionPipeline.load_config(source if source.exists() else model)
    kind = (config.get("transformer") or [None, None])[1]
    if kind not in served_classes() or served_classes()[kind] not in TINY:
        raise ValueError(f"no dry run for {kind} of {model}")
    return kind


def _check_lengths(config: TrainConfig, family: Any) -> None:
    """That the method can be planned at the config's own sizes."""
    factor, patch = family.TEMPORAL_FACTOR, 2 * SPATIAL
    method = method_from(config.method, config.settings)
    for name in ("height", "width"):
        if getattr(config, name) % patch:
            raise ValueError(f"{name} must be a multiple of {patch}, got {getattr(config, name)}")
    for stage in config.curriculum:
        if (stage.frames - 1) % factor:
            raise ValueError(
                f"frames must be 1 more than a multiple of {factor}, got {stage.frames}"
            )
        frames = (stage.frames - 1) // factor + 1
        check_fits(method, VideoShape(frames, config.height // patch, config.width // patch))


class _Noise:
    """In the place of a cache: one random clip of each length.

    Args:
        frames: of each, as of a video.
        size: height and width in latents.
        features: shape of those of an image.
    """

    digest = "dry run"

    def __init__(
        self, family: str, frames: list[int], size: tuple[int, int], features: tuple[int, ...]
    ) -> None:
        self.family, self.size, self.features = family, size, features
        self.entries = [SimpleNamespace(pixel_frames=n) for n in frames]

    def __len__(self) -> int:
        return len(self.entries)

    def buckets(self, frames: int) -> dict[tuple[int, int], list[int]]:
        return {self.size: [0, 1]}

    def latents(self, index: int, frames: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(CHANNELS, frames, *self.size, generator=generator)

    def image(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 + index)
        return torch.randn(self.features, generator=generator)

    @property
    def no_image(self) -> Tensor:
        return torch.zeros(self.features)

    def conditions(self, index: int) -> dict[str, Tensor]:
        return self.empty

    def teacher(self, index: int) -> dict[str, Tensor]:
        return self.empty

    @property
    def empty(self) -> dict[str, Tensor]:
        text = {"encoder_hidden_states": torch.zeros(TEXT, WIDTH)}
        if self.family == "hunyuan_video":
            text["encoder_attention_mask"] = torch.ones(TEXT, dtype=torch.int64)
            text["pooled_projections"] = torch.zeros(POOLED)
        return text
