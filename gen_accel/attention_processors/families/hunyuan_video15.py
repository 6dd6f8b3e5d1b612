"""HunyuanVideo 1.5, text to video and image to video.

Video and text attend jointly, video first in raster order. What counts as text is of three kinds,
each padded to a length of its own: features of an image, glyphs, and the prompt. The model moves
all real tokens to the front of each sample, in this order, and a mask hides the rest, rows and
columns. Image features that are all zero, as in text to video, are padding too. The token refiner,
which attends over the prompt alone, is left as it is.

Beside the noisy latents the transformer takes clean latents of given frames and their mask, all
zero in text to video.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    Preset,
    SelfAttention,
    hunyuan_video,
    in_patches,
    in_stacks,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "HunyuanVideo 1.5"
CLASSES = ("HunyuanVideo15Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, text"
KIND = "video"
FPS = 24
MASK_OF_PAIRS = True
TRAINED_FRAMES = 121  # as the pipelines call it
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 16
PRESETS = {
    "HunyuanVideo-1.5": Preset("hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", 8.3),
}
TEXT_TOKENS = 1000
_GLYPHS, _IMAGE = 256, 729  # tokens of the other kinds, as the pipelines pad them
CAUSAL_VAE = True  # the first latents of a long clip are the latents of its beginning
_SMALL = 8  # channels of the tiny model's latents
TINY = {
    "in_channels": 2 * _SMALL + 1,
    "out_channels": _SMALL,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 8,
    "text_embed_2_dim": 8,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
    "task_type": "t2v",
}

# Layers by the end of their names, inside the blocks: the token refiner has some of them too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|norm": "one",
            r"context_embedder_2": "glyphs",
            r"image_embedder": "image",
            r"context_embedder": "text",
            r"add_[qkv]_proj|to_add_out|ff_context": "text + glyphs + image",
        },
        {
            r"refiner_blocks.*attn\.to_q$": ("text", "text"),
        },
        beside="text + glyphs + image",
        lengths={"glyphs": _GLYPHS, "image": _IMAGE},
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Any = None,
    encoder_attention_mask_2: Any = None,
    image_embeds: Any = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the text of all kinds with its
    padding; ValueError where patches leave a rest."""
    config = transformer.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    grid = in_patches(hidden_states.shape[2:], patch)
    kinds = encoder_hidden_states, encoder_hidden_states_2, image_embeds
    return VideoShape(*grid, text=sum(x.shape[1] for x in kinds))


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timestep


def text_lengths(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Any = None,
    encoder_attention_mask_2: Any = None,
    image_embeds: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...]:
    """Text tokens of each sample, the padding left out, as the model counts them. Waits for the
    device."""
    masks = encoder_attention_mask, encoder_attention_mask_2
    prompt, glyphs = (mask.bool().sum(1, dtype=torch.int) for mask in masks)
    image = image_embeds.shape[1] * image_embeds.any()
    return tuple((prompt + glyphs + image).tolist())


def no_training(pipeline: str | None, config: Mapping[str, Any]) -> str | None:
    """Reason why a model from image to video is not trained, whose given frames training lacks."""
    kind = config.get("task_type", "t2v")
    if kind == "t2v":
        return None
    return f"its task_type {kind!r} makes video of an image: take a model from text to video"


def latent_channels(config: Any) -> int:
    """Channels of the clips' latents; the transformer takes a condition and a mask beside them."""
    return config.out_channels


encode_video, decode_video = hunyuan_video.encode_video, hunyuan_video.decode_video


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each.

    Args:
        max_tokens: tokens of the prompt, the pipelines' template not counted; longer prompts are
            cut, shorter ones padded.

    Returns:
        encoder_hidden_states (B, max_tokens, D) and encoder_attention_mask (B, max_tokens) of the
        prompt, and the same with _2 of its glyphs, which are quoted in it, (B, 256, E), all in
        the text encoder's dtype. Masks are 0 for padding.
    """
    device = next(pipe.text_encoder.parameters()).device
    states, mask = pipe._get_mllm_prompt_embeds(
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        prompt=list(prompts),
        device=device,
        tokenizer_max_length=TEXT_TOKENS if max_tokens is None else max_tokens,
        system_message=pipe.system_message,
        crop_start=pipe.prompt_template_encode_start_idx,
    )
    names = "encoder_hidden_states", "encoder_attention_mask"
    found = pipe.encode_prompt(
        list(prompts),
        device=device,
        batch_size=len(prompts),
        prompt_embeds=states,
        prompt_embeds_mask=mask,
    )
    return dict(zip((*names, *(f"{name}_2" for name in names)), found, strict=True))


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(tokens),
        "encoder_hidden_states_2": torch.zeros(tokens, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.zeros(tokens),
    }


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt`.
    """
    config, batch = transformer.config, len(noisy)
    given = noisy.new_zeros(batch, config.in_channels - noisy.shape[1], *noisy.shape[2:])
    return transformer(
        torch.cat([noisy, given], 1),
        timestep=(sigma * 1000).to(noisy.dtype),
        **conditions,
        image_embeds=noisy.new_zeros(batch, _IMAGE, config.image_embed_dim),
        return_dict=False,
    )[0]


temporal_frequencies = hunyuan_video.temporal_frequencies
set_temporal_frequencies = hunyuan_video.set_temporal_frequencies
