"""Tiny models of every class that takes image prompts, and what their forward passes are given."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    UNet2DConditionModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from support.hunyuan import inputs as hunyuan_inputs
from support.hunyuan import transformer as hunyuan_transformer
from support.tiny import is_here
from support.wan import HEAD_DIM, HEADS, IMAGE_WIDTH, TEXT_WIDTH, inputs
from support.wan import transformer as wan_transformer

from gen_accel.attention_processors.families import family_named


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wan_with_image(text: int = 512) -> dict[str, Any]:
    """The processor takes all beyond 512 tokens for the image."""
    given = inputs(2, 6, 8)
    given["encoder_hidden_states"] = noise(2, text, TEXT_WIDTH)
    return given | {"encoder_hidden_states_image": noise(2, 3, IMAGE_WIDTH)}


def vace_inputs() -> dict[str, Any]:
    given = inputs(2, 6, 8)
    return given | {"control_hidden_states": noise(2, 8, 2, 6, 8)}


def skyreels() -> Any:
    return wan_transformer(kind=SkyReelsV2Transformer3DModel)


def cogvideox(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 8,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 6,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": 5,
    }
    return CogVideoXTransformer3DModel(**(tiny | config)).eval()


def cogvideox_inputs(frames: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, frames, 4, 6, 8),
        "timestep": torch.full((2,), 700),
        "encoder_hidden_states": noise(2, 5, 8, seed=2),
    }


def rotated(frames: int = 3) -> dict[str, Any]:
    grid = {"grid_size": (3, 4), "temporal_size": frames, "crops_coords": ((0, 0), (3, 4))}
    return {"image_rotary_emb": get_3d_rotary_pos_embed(16, **grid)}


def mochi() -> Any:
    torch.manual_seed(0)
    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=7,
    ).eval()


def mochi_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700),
        "encoder_hidden_states": noise(2, 7, 16, seed=2),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[6], [2]]),
    }


def ltx() -> Any:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    ).eval()


def ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 36, 8),
        "encoder_hidden_states": noise(2, 5, 16, seed=2),
        "timestep": torch.full((2,), 700.0),
        "encoder_attention_mask": torch.arange(5) < torch.tensor([[5], [2]]),
        **{"num_frames": 3, "height": 3, "width": 4},
    }


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_inputs() -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(12, 3)
    return {
        "hidden_states": noise(2, 12, 4),
        "encoder_hidden_states": noise(2, 5, 24, seed=2),
        "pooled_projections": noise(2, 12, seed=3),
        "timestep": torch.full((2,), 0.7),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(5, 3),
    }


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": noise(2, 4, 6, 8),
        "timestep": 700,
        "encoder_hidden_states": noise(2, 5, 8, seed=2),
    }


def output(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """What it predicts."""
    made = model(**given, return_dict=False)
    return made if isinstance(made, torch.Tensor) else made[0]  # Kandinsky 5 gives it bare


class Case(NamedTuple):
    """A tiny model, what its forward pass is given, and the token grid that this makes.

    Args:
        tokens: of an attention's queries, where those are not of the grid, or of the first in a
            UNet.
    """

    family: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    grid: tuple[int, int, int]
    text: int = 0
    tokens: int | None = None


def of(family: str, place: int = 0, grid: tuple = (3, 3, 4), **more: Any) -> Case:
    """A case of `tests/support/tiny`, whose modules import this one."""

    def case() -> Any:
        return import_module(f"support.tiny.{family}").CASES[place]

    return Case(family, lambda: case().build(), lambda: case().inputs(*grid), grid, **more)


WAN_IMAGE = {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": HEADS * HEAD_DIM}
WAN_VACE = {"kind": WanVACETransformer3DModel, "vace_layers": [0, 1], "vace_in_channels": 8}
_ALL = {
    "wan": Case("wan", wan_transformer, lambda: inputs(2, 6, 8), (2, 3, 4)),
    "wan image": Case("wan", partial(wan_transformer, **WAN_IMAGE), wan_with_image, (2, 3, 4)),
    "vace": Case("wan", partial(wan_transformer, **WAN_VACE), vace_inputs, (2, 3, 4)),
    "skyreels": Case("skyreels", skyreels, lambda: inputs(2, 6, 8), (2, 3, 4)),
    "hunyuan": Case(
        "hunyuan_video", hunyuan_transformer, lambda: hunyuan_inputs(2, 6, 8), (2, 3, 4), 9
    ),
    "cogvideox": Case("cogvideox", cogvideox, cogvideox_inputs, (3, 3, 4), 5),
    "cogvideox rotary": Case(
        "cogvideox",
        partial(cogvideox, use_rotary_positional_embeddings=True),
        lambda: cogvideox_inputs() | rotated(),
        (3, 3, 4),
        5,
    ),
    "cogvideox 1.5": Case(
        "cogvideox",
        partial(cogvideox, use_rotary_positional_embeddings=True, patch_size_t=2),
        lambda: cogvideox_inputs(4) | rotated(2),
        (2, 3, 4),
        5,
    ),
    "mochi": Case("mochi", mochi, mochi_inputs, (3, 3, 4), 7),
    "ltx": Case("ltx", ltx, ltx_inputs, (3, 3, 4)),
    "flux": Case("flux", flux, flux_inputs, (1, 3, 4), 5),
    "unet": Case("stable_diffusion", unet, unet_inputs, (1, 6, 8), tokens=12),
    "wan animate": of("wan_animate"),
    "chronoedit": of("chronoedit"),
    "anyflow": of("anyflow"),
    "anyflow far": of("anyflow_far", text=118, tokens=12),
    "helios": of("helios", text=30),
    "helios telling": of("helios", 3, text=30, tokens=66),
    "helios without history": of("helios", 2),
    "kandinsky5": of("kandinsky5"),
    "kandinsky6": of("kandinsky6"),
    "kandinsky6 image": of("kandinsky6", 1, text=12, tokens=48),
    "ltx2": of("ltx2"),
    "ltx2 followed": of("ltx2", 2, text=24, tokens=60),
    "motif": of("motif", text=9),
    "allegro": of("allegro"),
    "latte": of("latte"),
    "cosmos": of("cosmos"),
    "cosmos image": of("cosmos", 2),
    "animatediff": of("animatediff", grid=(3, 4, 6)),
    "pixart": of("pixart", grid=(1, 3, 4)),
}
CASES = {
    name: case
    for name, case in _ALL.items()
    if any(map(is_here, family_named(case.family).classes))
}
JOINT = ["hunyuan", "cogvideox", "cogvideox rotary", "cogvideox 1.5", "mochi", "flux"]
