"""Cosmos 3: a sample to each call, in which the video sees the text, and the text itself alone."""

from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
    get_3d_mrope_ids_text_tokens,
    get_3d_mrope_ids_vae_tokens,
)
from support import wan
from support.image_models import noise
from support.tiny import Case, Grid
from torch import Tensor, nn

CHANNELS, WORDS, VOCABULARY = 4, 6, 24
GRIDS: tuple[Grid, ...] = ((3, 7, 9), (3, 5, 7))


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 24,
        "latent_channel": CHANNELS,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_latent_dim": 4 * CHANNELS,
        "rope_axes_dim": (4, 2, 2),
        "vocab_size": VOCABULARY,
    }
    return Cosmos3OmniTransformer(**(tiny | config)).eval()


def nemotron() -> Any:
    """With another backbone, whose text has keys of its own for the video."""
    return transformer(hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True)


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    """Of a video whose first frame is given. The latents of all samples stand in one tensor."""
    tokens = frames * height * width
    text, offset = get_3d_mrope_ids_text_tokens(
        num_tokens=WORDS, temporal_offset=0, use_float_positions=True
    )
    video, _ = get_3d_mrope_ids_vae_tokens(
        grid_t=frames,
        grid_h=height,
        grid_w=width,
        temporal_offset=offset + 15000,
        reset_spatial_indices=True,
        fps=24.0,
        base_fps=24.0,
        temporal_compression_factor=4,
    )
    noisy = tokens - height * width
    return {
        "input_ids": torch.arange(WORDS) + 3,
        "text_indexes": torch.arange(WORDS),
        "position_ids": torch.cat([text, video], 1),
        "und_len": WORDS,
        "sequence_length": WORDS + tokens,
        "vision_tokens": noise(batch, CHANNELS, frames, 2 * height, 2 * width),
        "vision_token_shapes": [(frames, height, width)],
        "vision_sequence_indexes": torch.arange(WORDS, WORDS + tokens),
        "vision_mse_loss_indexes": torch.arange(WORDS + height * width, WORDS + tokens),
        "vision_timesteps": torch.full((noisy,), time),
        "vision_noisy_frame_indexes": [torch.arange(1, frames)],
    }


def call(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Sample by sample."""
    alone = [given | {"vision_tokens": [latents[None]]} for latents in given["vision_tokens"]]
    return torch.cat([model(**one, return_dict=False)[0][0] for one in alone])


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    return given | {"vision_tokens": given["vision_tokens"][number : number + 1]}


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["vision_tokens"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def pipeline() -> Cosmos3OmniPipeline:
    tokenizer = new_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model = transformer(
        vocab_size=len(tokenizer), latent_channel=wan.CHANNELS, patch_latent_dim=4 * wan.CHANNELS
    )
    pipe = Cosmos3OmniPipeline(
        model, tokenizer, wan.autoencoder(), wan.unipc(), enable_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Cosmos3OmniPipeline) -> Tensor:
    made: Any = pipe(
        prompt="a red square moves right",
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=wan.FRAMES,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        use_system_prompt=False,
        output_type="latent",
    )
    return made.video


CASES = [
    Case(
        "cosmos3",
        transformer,
        inputs,
        poke,
        grids=GRIDS,
        call=call,
        row=row,
        pipeline=pipeline,
        generate=generate,
    ),
    Case("cosmos3_nemotron", nemotron, inputs, poke, grids=GRIDS, call=call, row=row),
]
