"""Kandinsky 5, video from text or an image, and images, and Kandinsky 6, video with sound.

Tokens of the self-attention are the video's, in raster order; text is seen by cross-attention. The
attention over the text alone is left as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    Attention,
    Config,
    Entries,
    Family,
    Generation,
    Given,
    ImagePrompts,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
)
from gen_accel.attention_processors.families.latents import FIRST_FRAME, in_place, text_device
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import check_shape, rewrite
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    Model,
    image_sites,
    in_patches,
    outside_graphs,
)
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SMALL = 16  # channels of the tiny model
_PIPELINES = "Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"
_TEXT = "text_tokens"  # of `encode_prompt`: how long each text is without its padding
_PICTURES = "it makes pictures"
_PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")


class KandinskyBlocks(Family):
    """Blocks with attention to the grid, and then to the text."""

    sizes = Sizes(temporal=4, spatial=8)
    attention = Attention(stacks=("visual_transformer_blocks",), name="self_attention")
    generation = Generation(axes="fhwc")

    def _heads(self, config: Config) -> tuple[int, int]:
        dim = sum(config.axes_dims)
        return config.model_dim // dim, dim

    def image_attentions(self, transformer: Model) -> list[ImageAttention]:
        place = self.attention.name.replace("self", "cross")
        names = [f"{site.name}.{place}" for site in self.self_attentions(transformer)]
        return image_sites(
            transformer, names, heads="num_heads", to_k="to_key", to_v="to_value", norm="key_norm"
        )

    def longest(self, transformer: Model) -> int:
        return transformer.visual_rope_embeddings.max_pos[0]


class Kandinsky5(KandinskyBlocks):
    """Some of the published models have a sparse attention of their own (NABLA), for which the
    tokens are in tiles: it must be off with a method attached, and for image prompts with masks or
    scales by frame."""

    models = "Kandinsky 5"
    order = "video"
    lora_targets = {
        "attention": tuple(
            f"{attention}.{name}"
            for attention in ("self_attention", "cross_attention")
            for name in _PROJECTIONS
        ),
        "feed_forward": ("feed_forward.in_layer", "feed_forward.out_layer"),
    }
    # Frames of the 5 s models, and of the pipelines; the 10 s models were trained on 241.
    sizes = Sizes(temporal=4, spatial=8, frames=121, fps=24, text=512)
    image_prompts = ImagePrompts("sequential", adapters="kandinsky5")
    training = Training(
        causal_vae=False,  # the autoencoder of HunyuanVideo
        one_text_length=True,
        first_frame=True,
        tiny={
            "in_visual_dim": _SMALL,
            "out_visual_dim": _SMALL,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "axes_dims": (4, 6, 6),
        },
        from_frame={"visual_cond": None},
        depth="num_visual_blocks",
        text_width="in_text_dim",
    )
    presets = {
        "Kandinsky-5.0-T2V-Lite": PublishedModel(
            2.0,
            {"model_dim": 1792, "ff_dim": 7168, "num_visual_blocks": 32},
        ),
    }
    pipelines = {
        "Kandinsky5T2VPipeline": PipelineInputs(
            "kandinsky5 t2v", model="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
        ),
        "Kandinsky5I2VPipeline": PipelineInputs(
            "kandinsky5 i2v",
            text=False,
            image="image",
            model="kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
        ),
        "Kandinsky5T2IPipeline": _PICTURES,
        "Kandinsky5I2IPipeline": _PICTURES,
    }
    comfyui = {"visual_transformer_blocks": ("visual_transformer_blocks", None)}

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"modulation|time|pooled": "one",
                r"^text_|cross_attention\.to_(key|value)": "text",
            },
            {
                r"^text_.*to_query$": ("text", "text"),
                r"cross_attention\.to_query$": ("video", "text"),
            },
        )

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid; ValueError with the model's own sparse attention."""
        if given.get("sparse_params") is not None:
            raise ValueError(
                f"sparse_params must be None for {type(transformer).__name__} where the places of "
                "its tokens count, got those of the model's own sparse attention; before the "
                'pipeline, call pipe.transformer.register_to_config(attention_type="regular")'
            )
        return super().tokens(transformer, given)

    def latent_channels(self, config: Config) -> int:
        return config.in_visual_dim

    def no_training(self, pipeline: str | None, config: Entries) -> str | None:
        if pipeline not in (None, *_PIPELINES):
            return f"{pipeline} makes no videos"
        kind = config.get("attention_type", "regular")
        if kind == "regular":
            return None
        return (
            f"its own sparse attention, attention_type {kind!r}, does not go with a method: set "
            'attention_type to "regular" in the config.json of its transformer'
        )

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts into what `predict` makes the transformer's arguments of, a row each.

        Each prompt is encoded by itself: its length is its own in the pipeline, and neither the
        text encoder nor the transformer has a mask that would hide padding. The template does not
        count.

        Returns:
            encoder_hidden_states (B, max_tokens, D), filled with zeros, and pooled_projections (B,
            P), in the dtypes of their text encoders, and text_tokens (B,) int64, the number of
            rows that are no filling.
        """
        tokens, device = self._text(max_tokens), text_device(pipe)
        states, pooled, lengths = [], [], []
        for prompt in prompts:
            text, clip, _ = pipe.encode_prompt([prompt], max_sequence_length=tokens, device=device)
            lengths.append(text.shape[1])
            states.append(F.pad(text, (0, 0, 0, tokens - text.shape[1])))
            pooled.append(clip)
        return {
            "encoder_hidden_states": torch.cat(states),
            "pooled_projections": torch.cat(pooled),
            _TEXT: torch.tensor(lengths, device=device),
        }

    def tiny_conditions(self, config: Config, tokens: int) -> dict[str, Tensor]:
        return super().tiny_conditions(config, tokens) | {
            "pooled_projections": torch.zeros(config.in_text_dim2),
            _TEXT: torch.tensor(tokens),
        }

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict the velocity. Models with `visual_cond` take further channels, which are zero,
        and a mask, 1 for frames that are given. A first frame takes the place of the first latent,
        whose velocity has no meaning then. The timestep is of the others. Waits for the device.

        Raises:
            ValueError: texts of several lengths.
        """
        config = transformer.config
        lengths = sorted(set(conditions[_TEXT].tolist()))
        if len(lengths) > 1:
            raise ValueError(f"text_tokens must be one number in a batch, got {lengths}")
        is_given = torch.zeros_like(noisy[:, :1])
        if FIRST_FRAME in conditions:
            noisy, times, _ = in_place(noisy, sigma, conditions)
            is_given[:, :, 0] = (times[:, 0] == 0).view(-1, 1, 1, 1)
        latents = noisy
        if config.visual_cond:
            latents = torch.cat([noisy, torch.zeros_like(noisy), is_given], 1)
        grid = in_patches(noisy.shape[2:], config.patch_size)
        velocity = transformer(
            hidden_states=latents.movedim(1, -1),
            encoder_hidden_states=conditions["encoder_hidden_states"][:, : lengths[0]],
            timestep=sigma * 1000,
            pooled_projections=conditions["pooled_projections"],
            visual_rope_pos=[torch.arange(n, device=noisy.device) for n in grid],
            text_rope_pos=torch.arange(lengths[0], device=noisy.device),
            scale_factor=positions_by_size(*(n * 8 for n in noisy.shape[3:])),
        ).sample
        return velocity.movedim(-1, 1)

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        rope = transformer.visual_rope_embeddings
        pairs = rope.axes_dims[0] // 2
        return rope.max_period ** -(torch.arange(pairs, dtype=torch.float64) / pairs)

    def set_temporal_frequencies(self, transformer: Model, freqs: Tensor | None) -> None:
        """Rewrite the rotary table of this model's time axis in place."""
        rope = transformer.visual_rope_embeddings
        table = rope.args_0
        if freqs is None:
            rewrite(rope, (table,), None)
            return
        check_shape(freqs, table.shape[1:])
        positions = torch.arange(len(table), dtype=torch.float64)
        rewrite(rope, (table,), (torch.outer(positions, freqs.double().cpu()),))


def positions_by_size(height: int, width: int) -> tuple[float, float, float]:
    """Divisors of the positions in time, rows and columns, as the pipelines have them.

    Args:
        height, width: in pixels.
    """
    side = 2 if all(480 <= n <= 854 for n in (height, width)) else 3.16
    return 1, side, side


class Kandinsky6(KandinskyBlocks):
    """Behind the video's tokens come the tokens of a start image. That image has the first frame's
    time, so that it does not continue the grid and is seen by all. Self-attention of sound and
    text, and cross-attention between video, sound and text, are left as they are. Image prompts
    are added to the cross-attention of the video, and of its image, to the text."""

    models = "Kandinsky 6"
    order = "video, image"
    lora_targets = {  # the video's alone
        "attention": tuple(
            f"video_dec_block.{attention}.{name}"
            for attention in ("self_attention", "cross_attention")
            for name in _PROJECTIONS
        ),
        "feed_forward": (
            "video_dec_block.feed_forward.net.0.proj",
            "video_dec_block.feed_forward.net.2",
        ),
    }
    sizes = Sizes(temporal=4, spatial=8, text=1024)
    attention = replace(KandinskyBlocks.attention, name="video_dec_block.self_attention")
    generation = replace(KandinskyBlocks.generation, sound=True)
    image_prompts = ImagePrompts("sequential", adapters="kandinsky6")
    pipelines = {"Kandinsky6TI2VAPipeline": PipelineInputs("kandinsky6", image="image")}

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"va_|av_": "none",
                r"modulation|time|pooled": "one",
                r"^(video|audio)_text|video_dec_block\.cross_attention\.to_(key|value)": "text",
                r"audio": "none",
            },
            {
                r"^(video|audio)_text.*to_query$": ("text", "text"),
                r"video_dec_block\.cross_attention\.to_query$": ("video + image", "text"),
            },
            beside="image",
            default="video + image",
            uncounted="the sound, and an image to start from",
        )

    @outside_graphs
    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid, and the tokens of the image after it, for which this waits for the device."""
        grid = self._grid(transformer, given["hidden_states"])
        if given.get("visual_rope_pos") is None:
            return Tokens(VideoShape(*grid))
        whole, height, width = grid
        times = given["visual_rope_pos"][0]
        onwards = times[0] + torch.arange(whole, device=times.device)
        frames = int((times == onwards).cumprod(0).sum())
        return Tokens(VideoShape(frames, height, width, text=(whole - frames) * height * width))

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        """Unknown frames: cross-attention has the queries of a start image too."""
        if self.tokens(transformer, given).video.text:
            return "Kandinsky 6 is given an image as one more frame"
        return None
