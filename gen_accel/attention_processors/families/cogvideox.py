"""CogVideoX 1.0 and 1.5, text, image and video to video and with a control video, and the models
that are built like it: ConsisID and EasyAnimate.

Text and video attend jointly, text first, with the same projections. The padding of the text is
not masked. Images and control videos are further channels of the latents. CogVideoX is trained by
v-prediction (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512) at 1000 noise levels, the
last of which is noise alone. Its pipelines pass the rotary table to the transformer.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    FEED_FORWARD,
    JOINT,
    Arguments,
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
    takes_frames,
)
from gen_accel.attention_processors.families.latents import (
    FIRST_FRAME,
    decoded,
    encoded,
    pixels_of,
    unscaled,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import Table, by_frames
from gen_accel.attention_processors.families.sites import Model
from gen_accel.video import VideoShape, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

_TIMES = 1000  # noise levels
# Entries of a scheduler's config that its noise levels depend on, and those of the published
# schedulers that differ from their class; the SNR shift of 2B is 3.
_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    *("rescale_betas_zero_snr", "snr_shift_scale"),
)
_PUBLISHED = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
}
_ROTARY_BASE = 10_000.0  # of all published models; no configuration holds it
_OFS = 2.0  # as the pipelines give it
_SMALL = 16  # channels of the tiny model
_OF_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_CONTROLLED = (
    "it is controlled by a video of poses, edges or depth, which is made from another one"
)


def _text(config: Given, index: Given, asked: Collection[str]) -> str:
    return "its weights need a first frame" if takes_frames(config) else ""


def _image(config: Given, index: Given, asked: Collection[str]) -> str:
    return "" if takes_frames(config) or not config else "its weights take no first frame"


class CogVideoBlocks(Family):
    """Joint attention with the text first."""

    order = "text, video"
    sizes = Sizes(temporal=4, spatial=8, text=226)
    attention = Attention(call="F.scaled_dot_product_attention", name="attn1", text="before")
    generation = Generation(axes="fchw")

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"time|ofs|norm": "one",
                r"text_proj": "text",
                r"^patch_embed|^proj_out": "video",
            },
            {},
            beside="text",
            default="video + text",
        )


class CogVideoX(CogVideoBlocks):
    models = "CogVideoX 1.0 and 1.5"
    sizes = Sizes(temporal=4, spatial=8, frames=49, fps=8, text=226)
    image_prompts = ImagePrompts(
        "batched",
        "transformer_blocks.attn1",
        "cogvideox",
        guided="do_classifier_free_guidance",
    )
    # The autoencoder's convolutions look back only, but its group norms average over several
    # frames.
    training = Training(
        causal_vae=False,
        predicts="v",
        first_frame=True,
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": _SMALL,
            "out_channels": _SMALL,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "use_rotary_positional_embeddings": True,
        },
        from_frame={"in_channels": 2 * _SMALL, "ofs_embed_dim": 8},
    )
    presets = {
        "CogVideoX-2b": PublishedModel(1.7),
        "CogVideoX-5b": PublishedModel(5.57, _OF_5B),
        "CogVideoX1.5-5b": PublishedModel(
            5.57, {**_OF_5B, "patch_size_t": 2, "patch_bias": False}
        ),
    }
    pipelines = {
        "CogVideoXPipeline": PipelineInputs("cogvideox", fits=_text, model="zai-org/CogVideoX-5b"),
        "CogVideoXImageToVideoPipeline": PipelineInputs(
            "cogvideox", text=False, image="image", fits=_image, model="zai-org/CogVideoX-5b-I2V"
        ),
        "CogVideoXVideoToVideoPipeline": PipelineInputs(
            "cogvideox",
            text=False,
            video="video",
            strength="strength",
            role="remade",
            fits=_text,
        ),
        "CogVideoXFunControlPipeline": _CONTROLLED,
    }
    parts = {"text_encoder": "t5-v1.1-xxl", "vae": "AutoencoderKLCogVideoX"}

    def sizes_of(self, config: Config) -> Sizes:
        """Version 1.5 is recognised by its patches of two latent frames. It was trained on 161
        frames, which its pipelines fill up to the patches that 165 have."""
        return (
            self.sizes if config.patch_size_t is None else replace(self.sizes, frames=165, fps=16)
        )

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        config, like = transformer.config, self._like(transformer)
        given = super().inputs(transformer, video, text, batch)
        given["hidden_states"] = given["hidden_states"].transpose(1, 2).contiguous()
        if config.use_rotary_positional_embeddings:
            size = video.video_tokens, config.attention_head_dim
            table = torch.zeros(*size, device=transformer.device)
            given["image_rotary_emb"] = (table, table)
        if config.ofs_embed_dim is not None:
            given["ofs"] = torch.zeros(batch, **like)
        return given

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        if transformer.config.patch_size_t is None:
            return None
        return "CogVideoX 1.5 may fill up its latents at the beginning, and does not tell"

    def decode_video(self, pipe: "DiffusionPipeline", latents: Tensor) -> Tensor:
        """Decode, without the three frames too many that the autoencoder puts before the first if
        the number of latents is even."""
        pixels = decoded(pipe, unscaled(pipe.vae, latents))
        step = vae_factor(pipe, "temporal") or 1
        return pixels[:, :, -(step * (latents.shape[2] - 1) + 1) :]

    @torch.no_grad()
    def first_frame(
        self, pipe: "DiffusionPipeline", transformer: Model, image: "Image", frames: int
    ) -> dict[str, Tensor]:
        """Latents of the first frame alone, (C, 1, h, w): the mode, while the pipeline draws. Some
        models were trained with a scale that divides."""
        latents, config = encoded(pipe, pixels_of(pipe, image), None), pipe.vae.config
        scale = config.scaling_factor
        return {FIRST_FRAME: (latents * (1 / scale if config.invert_scale_latents else scale))[0]}

    def scales(self, schedule: Entries, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The scheduler's square roots of alpha and 1 - alpha at the nearest of its 1000
        timesteps, to which noise levels are proportional."""
        known = {name: schedule[name] for name in _SCHEDULE if name in schedule} or _PUBLISHED
        predicted = known.get("prediction_type", "epsilon")
        if predicted != "v_prediction" or known.get("num_train_timesteps", _TIMES) != _TIMES:
            raise ValueError(
                f"CogVideoX trains by v_prediction at {_TIMES} timesteps, and the scheduler has "
                f"prediction_type {predicted!r} at {known.get('num_train_timesteps', _TIMES)}: "
                "load the scheduler that was published with the model"
            )
        alphas = _alphas(tuple(sorted(known.items()))).to(sigma.device)[_times(sigma)]
        return alphas.sqrt().to(sigma.dtype), (1 - alphas).sqrt().to(sigma.dtype)

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict v of (B, C, f, h, w) latents of whole patches; ValueError for a text of another
        length than the model has positions for."""
        config, told = transformer.config, dict(conditions)
        tokens = told["encoder_hidden_states"].shape[1]
        if config.use_rotary_positional_embeddings:
            told["image_rotary_emb"] = _rotary(transformer, noisy)
        elif tokens != config.max_text_seq_length:
            raise ValueError(
                f"max_tokens must be {config.max_text_seq_length}, for as many this model has "
                f"positions, got {tokens}: leave it out"
            )
        if config.ofs_embed_dim is not None:
            told["ofs"] = noisy.new_full((1,), _OFS)
        if FIRST_FRAME in told:
            frame = told.pop(FIRST_FRAME).to(noisy.dtype)
            beside = noisy.new_zeros(len(noisy), frame.shape[1], *noisy.shape[2:])
            beside[:, :, :1] = frame
            noisy = torch.cat([noisy, beside], 1)
        said = transformer(
            noisy.transpose(1, 2), timestep=_times(sigma), **told, return_dict=False
        )
        return said[0].transpose(1, 2)

    def longest(self, transformer: Model) -> int | None:
        """The latent frames after patchify that it has learned positions for. Other models compute
        theirs for any length."""
        config = transformer.config
        if not config.use_learned_positional_embeddings:
            return None
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return frames // (config.patch_size_t or 1)

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        config = transformer.config
        if not config.use_rotary_positional_embeddings:
            raise ValueError(
                "this CogVideoX adds a table of sines to its tokens, and has no rotary "
                "frequencies to change: take window_noise or continuation, or a 5B model"
            )
        dim = config.attention_head_dim // 4
        return _ROTARY_BASE ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def with_temporal_frequencies(
        self, transformer: Model, freqs: Tensor, given: Given
    ) -> Arguments:
        cos, sin = given["image_rotary_emb"]
        frames = given["hidden_states"].shape[1] // (transformer.config.patch_size_t or 1)
        return {**given, "image_rotary_emb": by_frames(cos, sin, frames, freqs)}


@lru_cache
def _alphas(known: tuple[tuple[str, Any], ...]) -> Tensor:
    """(1000,) float64 of a scheduler's config."""
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(**dict(known)).alphas_cumprod.double()


def _times(sigma: Tensor) -> Tensor:
    """Timesteps (B,) int64 of noise levels."""
    return (sigma * _TIMES).round().long().clamp(max=_TIMES - 1)


def _rotary(transformer: Model, latents: Tensor) -> Table:
    """The table that the pipelines pass for latents (B, C, f, h, w)."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    pipe: Any = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=1)
    frames, height, width = latents.shape[2:]
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipe, height, width, frames, latents.device
    )


class ConsisID(CogVideoBlocks):
    """Tokens are those of CogVideoX 1.0. The face is seen by cross-attention beside the blocks,
    which has no processor and is left as it is."""

    models = "ConsisID"
    pipelines = {
        "ConsisIDPipeline": (
            "it keeps a face, whose features another program takes from a picture"
        ),
    }

    def layers(self, transformer: Model) -> Layers:
        """Layers without the cross-attention to the face, whose cost depends on the face."""
        stock = super().layers(transformer)
        rows = {"local_facial_extractor|perceiver": "none", **stock.rows}
        return stock._replace(rows=rows, uncounted="the face")


class EasyAnimate(CogVideoBlocks):
    """Text and video have projections of their own in the first blocks and the same ones in
    others, if there are some."""

    models = "EasyAnimate 5.1"
    lora_targets = {
        "attention": JOINT,
        "feed_forward": (*FEED_FORWARD, "txt_ff.net.0.proj", "txt_ff.net.2"),
    }
    sizes = Sizes(temporal=4, spatial=8, fps=8, text=256)
    generation = Generation()
    presets = {
        "EasyAnimateV5.1-12b": PublishedModel(
            11.8,
            {"in_channels": 16, "out_channels": 16, "patch_size": 2},
        ),
    }
    pipelines = {
        "EasyAnimatePipeline": PipelineInputs(
            "easyanimate t2v", model="alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers"
        ),
        "EasyAnimateInpaintPipeline": PipelineInputs(
            "easyanimate inpaint",
            text=False,
            image="video",
            last_image="video",
            video="video",
            strength="strength",
            alone=True,
            role="remade",
            by="inpainted",
            model="alibaba-pai/EasyAnimateV5.1-12b-zh-InP-diffusers",
        ),
        "EasyAnimateControlPipeline": _CONTROLLED,
    }

    def layers(self, transformer: Model) -> Layers:
        """Layers; blocks after the first ones have the same projections for text and video."""
        config = transformer.config
        shared = range(config.mmdit_layers, config.num_layers)
        blocks = "|".join(map(str, shared)) or "(?!)"
        return Layers(
            {
                r"time|norm": "one",
                r"text_proj|add_[qkv]_proj|to_add_out|txt_ff": "text",
                rf"^transformer_blocks\.({blocks})\.(attn1\.to_[qkv]$|ff\.)": "video + text",
            },
            {},
            beside="text",
        )

    def _beside(self, transformer: Model, given: Given) -> int:
        """Number of text tokens, from both encoders if there are two."""
        texts = given.get("encoder_hidden_states"), given.get("encoder_hidden_states_t5")
        return sum(text.shape[1] for text in texts if text is not None)
