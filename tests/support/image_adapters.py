"""Tiny image-prompt adapters with random weights under the official names, and tiny pipelines of
diffusers' own classes that load them."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

EMBEDDING, HIDDEN, SIDE, PATCH = 8, 16, 16, 8  # of the image encoder; 5 hidden states an image
STATES = 1 + (SIDE // PATCH) ** 2
FACE = 512
CROSS = 32  # width of text and image tokens in the UNets
JOINT = 32  # and in Flux
RANK = 4


class Random:
    """Tensors by their shapes, the same in each run."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator)
        return x / shape[-1] ** 0.5 if len(shape) > 1 else x * 0.1

    def linear(self, name: str, out: int, inner: int, bias: bool = True) -> dict[str, Tensor]:
        made = {f"{name}.weight": self(out, inner)}
        return made | ({f"{name}.bias": self(out)} if bias else {})

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + self(width), f"{name}.bias": self(width)}

    def perceiver(self, embedding: int, dim: int, width: int, depth: int = 4) -> dict[str, Tensor]:
        made = self.linear("proj_in", dim, embedding)
        for i in range(depth):
            made |= self.norm(f"layers.{i}.0.norm1", dim) | self.norm(f"layers.{i}.0.norm2", dim)
            made |= self.linear(f"layers.{i}.0.to_q", 128, dim, bias=False)
            made |= self.linear(f"layers.{i}.0.to_kv", 256, dim, bias=False)
            made |= self.linear(f"layers.{i}.0.to_out", dim, 128, bias=False)
            made |= self.norm(f"layers.{i}.1.0", dim)
            made |= self.linear(f"layers.{i}.1.1", 4 * dim, dim, bias=False)
            made |= self.linear(f"layers.{i}.1.3", dim, 4 * dim, bias=False)
        return made | self.linear("proj_out", width, dim) | self.norm("norm_out", width)


def projector_state(variant: str, width: int = CROSS, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a projector, by their official names."""
    some = Random(seed)
    face = some.linear("proj.0", 2 * FACE, FACE)
    match variant:
        case "base" | "flux":
            return some.linear("proj", 4 * width, EMBEDDING) | some.norm("norm", width)
        case "plus":
            made = {"latents": some(1, 16, 24)}
            return made | some.perceiver(HIDDEN, 24, width)
        case "full":
            made = some.linear("proj.0", HIDDEN, HIDDEN) | some.linear("proj.2", width, HIDDEN)
            return made | some.norm("proj.3", width)
        case "faceid":
            return face | some.linear("proj.2", 4 * width, 2 * FACE) | some.norm("norm", width)
        case "portrait":
            return face | some.linear("proj.2", 16 * width, 2 * FACE) | some.norm("norm", width)
        case "faceid_plus" | "faceid_plus_v2":
            made = face | some.linear("proj.2", 4 * width, 2 * FACE) | some.norm("norm", width)
            inner = some.perceiver(HIDDEN, width, width)
            return made | {f"perceiver_resampler.{k}": x for k, x in inner.items()}
        case "lynx" | "lynx_light":
            return {"latents": some(1, 16, 24)} | some.perceiver(FACE, 24, width)
    raise ValueError(variant)


def unet_layers(unet: Any, seed: int = 0, *, lora: bool = False) -> dict[str, Tensor]:
    """By the official numbers: the position of the attention's processor among all, without those
    of AnimateDiff over time."""
    some, made = Random(100 + seed), {}
    spatial = [name for name in unet.attn_processors if "motion_modules" not in name]
    for n, name in enumerate(spatial):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        inner = attention.to_q.out_features
        if not name.endswith("attn1.processor"):
            made |= some.linear(f"{n}.to_k_ip", inner, CROSS, bias=False)
            made |= some.linear(f"{n}.to_v_ip", inner, CROSS, bias=False)
        if lora:
            for part in ("q", "k", "v", "out"):
                layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
                down = some.linear(f"{n}.to_{part}_lora.down", RANK, layer.in_features, bias=False)
                up = some.linear(f"{n}.to_{part}_lora.up", layer.out_features, RANK, bias=False)
                made |= down | up
    return made


def flux_layers(transformer: Any, seed: int = 0) -> dict[str, Tensor]:
    some, made = Random(100 + seed), {}
    inner, width = transformer.inner_dim, transformer.config.joint_attention_dim
    for n in range(transformer.config.num_layers):
        made |= some.linear(f"{n}.to_k_ip", inner, width) | some.linear(
            f"{n}.to_v_ip", inner, width
        )
    return made


def nested(variant: str, model: Any, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A whole adapter for `model`, as the .bin files have it."""
    if isinstance(model, FluxTransformer2DModel):
        width = model.config.joint_attention_dim
        return {
            "image_proj": projector_state(variant, width, seed),
            "ip_adapter": flux_layers(model, seed),
        }
    lora = variant.startswith("faceid")
    return {
        "image_proj": projector_state(variant, CROSS, seed),
        "ip_adapter": unet_layers(model, seed, lora=lora),
    }


def flat(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}.{key}": x for group, held in groups.items() for key, x in held.items()}


def write(path: Path, groups: dict[str, dict[str, Tensor]]) -> Path:
    if path.suffix == ".bin":
        torch.save(groups, path)
    else:
        save_file(flat(groups), path)
    return path


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def vision(seed: int = 5) -> Any:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=16,
        projection_dim=EMBEDDING,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return CLIPVisionModelWithProjection(config).eval()


def extractor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)


def sd_unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CROSS,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def sdxl_unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=CROSS,
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + CROSS,
        norm_num_groups=4,
    ).eval()


def flux_transformer(seed: int = 0, *, joint: int = JOINT) -> Any:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def _text(kind: type, seed: int) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=CROSS,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=CROSS,
    )
    return kind(config).eval()


def _vae(seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


def pipeline(kind: str, seed: int = 0, **options: Any) -> Any:
    """ "sd", "sdxl" or "flux", with an image encoder. The same for the same arguments."""
    encoder = {"image_encoder": vision(), "feature_extractor": extractor()}
    if kind == "flux":
        pipe = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(),
            None,
            None,
            None,
            None,
            None,
            flux_transformer(seed, **options),
            **encoder,
        )
    elif kind == "sdxl":
        pipe = StableDiffusionXLPipeline(
            _vae(seed),
            _text(CLIPTextModel, seed),
            _text(CLIPTextModelWithProjection, seed),
            None,
            None,
            sdxl_unet(seed),
            DDIMScheduler(clip_sample=False, steps_offset=1),
            add_watermarker=False,
            **encoder,
        )
    else:
        pipe = StableDiffusionPipeline(
            _vae(seed),
            _text(CLIPTextModel, seed),
            None,
            sd_unet(seed),
            DDIMScheduler(clip_sample=False, steps_offset=1),
            None,
            requires_safety_checker=False,
            **encoder,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    kind: str,
    *,
    prompts: int = 1,
    guided: bool = True,
    joint: int = JOINT,
    size: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Of a call of two steps, with prompts as embeddings and the noise, which are the same numbers
    in every precision. Sizes are in pixels, 2 for a latent; Flux has one size."""
    some = Random(77)
    if kind == "flux":
        size, width, pooled, noise = (64, 96), joint, 8, (prompts, 24, 16)
    else:
        width, pooled, noise = CROSS, CROSS, (prompts, 4, size[0] // 2, size[1] // 2)
    made: dict[str, Tensor] = {"prompt_embeds": some(prompts, 6, width)}
    made["latents"] = some(*noise) * noise[-1] ** 0.5
    if kind != "sd":
        made["pooled_prompt_embeds"] = some(prompts, pooled)
    if guided:
        made["negative_prompt_embeds"] = some(prompts, 6, width)
        if kind != "sd":
            made["negative_pooled_prompt_embeds"] = some(prompts, pooled)
    guidance = "true_cfg_scale" if kind == "flux" else "guidance_scale"
    return {
        **{name: x.to(dtype) for name, x in made.items()},
        guidance: 3.0 if guided else 1.0,
        "num_inference_steps": 2,
        "output_type": "latent",
        "height": size[0],
        "width": size[1],
    }


_SHAPE = ("prompts", "guided", "joint", "size")


def generate(pipe: Any, kind: str, **options: Any) -> Tensor:
    shape = {k: options.pop(k) for k in _SHAPE if k in options}
    given = arguments(kind, dtype=model_of(pipe).dtype, **shape)
    with torch.no_grad():
        return pipe(**given, **options).images


def model_of(pipe: Any) -> Any:
    return pipe.transformer if isinstance(pipe, diffusers.FluxPipeline) else pipe.unet
