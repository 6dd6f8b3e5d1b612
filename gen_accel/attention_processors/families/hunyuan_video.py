"""HunyuanVideo and HunyuanVideo 1.5, text to video and image to video, and FramePack.

Video and text attend jointly, video first in raster order, text after. Texts are padded to one
length; a mask hides the padding from all. Blocks of two streams come first, then those of one, and
layers are counted through both. The token refiner, which attends over the text alone, is left as
it is.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.families import layers
from gen_accel.attention_processors.families.base import (
    BOTH_FEED_FORWARDS,
    JOINT,
    STREAMS,
    Arguments,
    Attention,
    Colors,
    Config,
    Entries,
    Family,
    Generation,
    Given,
    ImagePrompts,
    OriginalLayer,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
    behind_history,
    in_sections,
)
from gen_accel.attention_processors.families.latents import FIRST_FRAME, in_place, text_device
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import Table, by_frames, turned_neighbours
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    Model,
    SplitPlan,
    image_sites,
    split_tokens,
)
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

_SMALL = 16  # channels of the tiny model
# Scale that guidance-distilled models are trained further at: 1 asks for the data as it is.
_DISTILLED_GUIDANCE = 1.0
# How a first frame is given, and every how many of its tokens the text has, as in the pipeline.
_CONCAT, _REPLACE = "latent_concat", "token_replace"
_INTERLEAVE = {_CONCAT: 2, _REPLACE: 4}
_BLACK = 64  # pixels a side of a black picture, which the text encoder's processor scales
_DOUBLE = {
    **OriginalLayer.fused("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    **OriginalLayer.fused(
        "txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    ),
    "attn.to_out.0": OriginalLayer("img_attn.proj"),
    "attn.to_add_out": OriginalLayer("txt_attn.proj"),
    "ff.net.0.proj": OriginalLayer("img_mlp.0"),
    "ff.net.2": OriginalLayer("img_mlp.2"),
    "ff_context.net.0.proj": OriginalLayer("txt_mlp.0"),
    "ff_context.net.2": OriginalLayer("txt_mlp.2"),
    "norm1.linear": OriginalLayer("img_mod.lin"),
    "norm1_context.linear": OriginalLayer("txt_mod.lin"),
}
_SINGLE = {
    # The feed-forward layer is four times as wide in all models that ComfyUI knows.
    **OriginalLayer.fused(
        "linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)
    ),
    "proj_out": OriginalLayer("linear2"),
    "norm.linear": OriginalLayer("modulation.lin"),
}


class HunyuanBlocks(Family):
    """Joint attention in blocks of two streams and of one, with positions in a rotary table."""

    order = "video, text"
    lora_targets = STREAMS
    sizes = Sizes(temporal=4, spatial=8, text=256)
    attention = Attention(stacks=("transformer_blocks", "single_transformer_blocks"), text="after")


class HunyuanRotary(HunyuanBlocks):
    """Models whose rotary table can have other frequencies on the time axis."""

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        config = transformer.config
        dim = config.rope_axes_dim[0]
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        return config.rope_theta**-exponent

    def turned(
        self, transformer: Model, keys: Tensor, frames: int, fps: Tensor | None = None
    ) -> Tensor:
        return turned_neighbours(keys, frames * self.temporal_frequencies(transformer))

    def _rotary_table(self, stock: Model, numbers: Sequence, hidden_states: Tensor) -> Table:
        cos, sin = stock(hidden_states)
        return by_frames(cos, sin, hidden_states.shape[2] // stock.patch_size_t, numbers)


class HunyuanVideo(HunyuanRotary):
    models = "HunyuanVideo"
    sizes = Sizes(temporal=4, spatial=8, frames=129, fps=24, text=256)
    image_prompts = ImagePrompts("sequential", adapters="hunyuan_video")
    generation = Generation(
        autoencoder="AutoencoderKLHunyuanVideo",
        prompt=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    )
    # Its autoencoder's convolutions look back only, but its group norms average over all frames.
    training = Training(
        causal_vae=False,
        takes_mask=True,
        first_frame=True,
        tiny={
            "in_channels": _SMALL,
            "out_channels": _SMALL,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 8,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        from_frame={"in_channels": 2 * _SMALL + 1, "image_condition_type": None},
    )
    presets = {"HunyuanVideo": PublishedModel(12.8)}
    pipelines = {
        "HunyuanVideoPipeline": PipelineInputs(
            "hunyuan t2v", model="hunyuanvideo-community/HunyuanVideo"
        ),
        "HunyuanVideoImageToVideoPipeline": PipelineInputs(
            "hunyuan i2v",
            text=False,
            image="image",
            joins=True,
            model="hunyuanvideo-community/HunyuanVideo-I2V",
        ),
        "HunyuanSkyreelsImageToVideoPipeline": PipelineInputs(
            "hunyuan skyreels", text=False, image="image"
        ),
    }
    parts = {
        "text_encoder": "llama-3-8b",
        "text_encoder_2": "clip-vit-l",
        "vae": "AutoencoderKLHunyuanVideo",
    }
    colors = (
        Colors(
            "AutoencoderKLHunyuanVideo",
            "block_out_channels",
            (128, 256, 512, 512),
            """
            -0.0395 0.0696 0.0135 0.0108 -0.0209 -0.0804 -0.0991 -0.0646 -0.0696 -0.0799 0.1166
            0.1165 -0.2315 -0.027 -0.0616 0.0249
            -0.0331 0.0795 -0.0945 -0.025 0.0032 -0.0254 0.0271 -0.0422 -0.0595 -0.0208 0.1627
            0.0432 -0.192 0.0401 -0.0997 -0.0469
            0.0445 0.0518 -0.0282 -0.0765 0.0224 -0.0639 -0.0669 -0.04 -0.0894 -0.0375 0.0962
            0.0407 -0.1355 -0.0821 -0.0727 -0.1703
            """,
            bias=(0.0259, -0.0192, -0.0761),
        ),
    )
    comfyui = {
        "transformer_blocks": ("double_blocks", _DOUBLE),
        "single_transformer_blocks": ("single_blocks", _SINGLE),
    }

    def layers(self, transformer: Model) -> Layers:
        return layers.JOINT

    def image_attentions(self, transformer: Model) -> list[ImageAttention]:
        """All joint attentions, numbered through both stacks."""
        names = [f"{site.name}.attn" for site in self.self_attentions(transformer)]
        return image_sites(transformer, names)

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...]:
        """Text tokens of each sample, the padding left out, as the model counts them. Waits for
        the device."""
        return tuple(given["encoder_attention_mask"].sum(1, dtype=torch.int).tolist())

    def context_parallel(self, transformer: Model) -> SplitPlan:
        """Plan in which each process holds the whole text, as the mask of its padding covers all
        tokens."""
        if transformer.config.image_condition_type == _REPLACE:
            raise ValueError("image_condition_type='token_replace' treats the first tokens apart")
        split = split_tokens()
        return {
            "transformer_blocks.0": {"hidden_states": split["tokens"]},
            "transformer_blocks.*": {"freqs_cis": split["rotary"]},
            "single_transformer_blocks.*": {"image_rotary_emb": split["rotary"]},
            "proj_out": split["gathered"],
        }

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts, whose template does not count, by both text encoders.

        Returns:
            encoder_hidden_states (B, max_tokens, D) and pooled_projections (B, P), in the dtypes
            of their text encoders, and encoder_attention_mask (B, max_tokens) int64, 0 for
            padding.
        """
        states, pooled, mask = pipe.encode_prompt(
            list(prompts), max_sequence_length=self._text(max_tokens), device=text_device(pipe)
        )
        return _conditions(states, pooled, mask)

    @torch.no_grad()
    def encode_prompt_with(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        images: Sequence["Image"],
        prompt: str,
        max_tokens: int | None = None,
    ) -> dict[str, Tensor]:
        """Encode a prompt that the text encoder, a model of text and pictures, reads with the
        first frame, whose tokens come in front.

        Args:
            images: () for a black one, as the pipeline has it for its negative prompts.
        """
        from PIL import Image

        states, pooled, mask = pipe.encode_prompt(
            image=images[0] if images else Image.new("RGB", (_BLACK, _BLACK)),
            prompt=[prompt],
            max_sequence_length=self._text(max_tokens),
            device=text_device(pipe),
            image_embed_interleave=_INTERLEAVE[transformer.config.image_condition_type],
        )
        return _conditions(states, pooled, mask)

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        given = super().inputs(transformer, video, text, batch)
        if transformer.config.guidance_embeds:
            given["guidance"] = torch.zeros(batch, **self._like(transformer))
        return given

    def tiny_conditions(self, config: Config, tokens: int) -> dict[str, Tensor]:
        pooled = torch.zeros(config.pooled_projection_dim)
        return super().tiny_conditions(config, tokens) | {"pooled_projections": pooled}

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict the velocity. Guidance-distilled models take `guidance` (B,), 1000 times the
        scale, instead of `_DISTILLED_GUIDANCE`."""
        if FIRST_FRAME in conditions:
            noisy, conditions = _with_first_frame(transformer, noisy, conditions)
        if transformer.config.guidance_embeds and "guidance" not in conditions:
            guidance = torch.full_like(sigma, 1000 * _DISTILLED_GUIDANCE)
            conditions = {**conditions, "guidance": guidance}
        return transformer(noisy, timestep=sigma * 1000, **conditions, return_dict=False)[0]


def _conditions(states: Tensor, pooled: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "pooled_projections": pooled,
    }


def _with_first_frame(
    transformer: Model, noisy: Tensor, conditions: Given
) -> tuple[Tensor, Given]:
    """Put the first frame in the place of the first latent, whose timestep the model sets to 0, or
    beside the noisy latents, with a mask that is 1 for it."""
    if transformer.config.image_condition_type == _REPLACE:
        noisy, _, rest = in_place(noisy, noisy.new_zeros(len(noisy)), conditions)
        return noisy, rest
    rest = dict(conditions)
    frame = rest.pop(FIRST_FRAME).to(noisy.dtype)
    beside = noisy.new_zeros(len(noisy), frame.shape[1] + 1, *noisy.shape[2:])
    beside[:, :-1, :1], beside[:, -1:, :1] = frame, 1
    return torch.cat([noisy, beside], 1), rest


_GLYPHS, _IMAGE = 256, 729  # tokens of HunyuanVideo 1.5 beside the prompt, as pipelines pad them


class HunyuanVideo15(HunyuanRotary):
    """Text is of three kinds, each padded to a length of its own: features of an image, glyphs,
    and the prompt. The model moves all real tokens to the front of each sample, in this order, and
    a mask hides the rest, rows and columns. Image features that are all zero, as in text to video,
    are padding too. Beside the noisy latents the transformer takes clean latents of given frames
    and their mask, all zero in text to video."""

    models = "HunyuanVideo 1.5"
    lora_targets = {"attention": JOINT, "feed_forward": BOTH_FEED_FORWARDS}
    sizes = Sizes(temporal=4, spatial=16, frames=121, fps=24, text=1000)
    attention = Attention(text="after", masks="pairs")
    training = Training(
        causal_vae=True,
        tiny={
            "in_channels": 2 * 8 + 1,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 8,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6),
            "task_type": "t2v",
        },
    )
    presets = {
        "HunyuanVideo-1.5": PublishedModel(8.3),
    }
    pipelines = {
        "HunyuanVideo15Pipeline": PipelineInputs(
            "hunyuan15 t2v", model="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
        ),
        "HunyuanVideo15ImageToVideoPipeline": PipelineInputs(
            "hunyuan15 i2v",
            text=False,
            image="image",
            model="hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        ),
    }
    comfyui = {"transformer_blocks": ("double_blocks", _DOUBLE)}

    def layers(self, transformer: Model) -> Layers:
        beside = "text + glyphs + image"
        both = layers.JOINT.with_first(
            {
                r"context_embedder_2": "glyphs",
                r"image_embedder": "image",
                r"add_[qkv]_proj|to_add_out|ff_context": beside,
            }
        )
        return both._replace(beside=beside, lengths={"glyphs": _GLYPHS, "image": _IMAGE})

    def _beside(self, transformer: Model, given: Given) -> int:
        kinds = "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
        return sum(given[kind].shape[1] for kind in kinds)

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...]:
        """Text tokens of each sample, the padding left out, as the model counts them. Waits for
        the device."""
        masks = given["encoder_attention_mask"], given["encoder_attention_mask_2"]
        prompt, glyphs = (mask.bool().sum(1, dtype=torch.int) for mask in masks)
        images = given["image_embeds"]
        return tuple((prompt + glyphs + images.shape[1] * images.any()).tolist())

    def no_training(self, pipeline: str | None, config: Entries) -> str | None:
        kind = config.get("task_type", "t2v")
        if kind == "t2v":
            return None
        return f"its task_type {kind!r} makes video of an image: take a model from text to video"

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts, whose template does not count.

        Returns:
            encoder_hidden_states (B, max_tokens, D) and encoder_attention_mask (B, max_tokens) of
            the prompt, and the same with _2 of its glyphs, which are quoted in it, (B, 256, E),
            all in the text encoder's dtype. Masks are 0 for padding.
        """
        device = text_device(pipe)
        states, mask = pipe._get_mllm_prompt_embeds(
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            prompt=list(prompts),
            device=device,
            tokenizer_max_length=self._text(max_tokens),
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

    def tiny_conditions(self, config: Config, tokens: int) -> dict[str, Tensor]:
        return super().tiny_conditions(config, tokens) | {
            "encoder_attention_mask": torch.ones(tokens),
            "encoder_hidden_states_2": torch.zeros(tokens, config.text_embed_2_dim),
            "encoder_attention_mask_2": torch.zeros(tokens),
        }

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        config, batch = transformer.config, len(noisy)
        given = noisy.new_zeros(batch, config.in_channels - noisy.shape[1], *noisy.shape[2:])
        text = conditions["encoder_hidden_states"]
        return transformer(
            torch.cat([noisy, given], 1),
            timestep=(sigma * 1000).to(noisy.dtype),
            **conditions,
            image_embeds=text.new_zeros(batch, _IMAGE, config.image_embed_dim, dtype=noisy.dtype),
            return_dict=False,
        )[0]


class FramePack(HunyuanBlocks):
    """Video is made section after section. Tokens are the history, the section in raster order,
    features of the given image, and the text, all in one attention. The history has distant frames
    first, in patches of four times the size, then nearer ones in patches of twice the size. Last
    come the given image and the nearest frame, which need not be neighbours in time. None of these
    continue the section's grid, so that the history is seen by all. The text of a sample that is
    alone in its batch comes without its padding; in larger batches a mask hides it."""

    models = "FramePack"
    order = "history, video, image features, text"
    presets = {"FramePackI2V_HY": PublishedModel(12.8)}
    pipelines = {
        "HunyuanVideoFramepackPipeline": PipelineInputs(
            "hunyuan framepack",
            text=False,
            image="image",
            last_image="last_image",
            model="lllyasviel/FramePackI2V_HY",
            length=in_sections("latent_window_size", more=1),
            passes=behind_history(9, image=_IMAGE),
        ),
    }

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"time|norm|guidance": "one",
                r"context_embedder": "text",
                r"image_projection": "image",
                r"clean_x_embedder": "none",
                r"add_[qkv]_proj|to_add_out|ff_context": "text + image",
                r"^single_": "video + text + image + history",
                r"^transformer_blocks": "video + history",
            },
            {
                r"refiner_blocks.*attn\.to_q$": ("text", "text"),
            },
            beside="text + image + history",
        )

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the section. For a sample alone in its batch this waits for the device."""
        grid, history = self._grid(transformer, given["hidden_states"]), _history(given)
        text = given["encoder_hidden_states"].shape[1]
        if len(given["hidden_states"]) == 1:
            text = int(given["encoder_attention_mask"].sum(dtype=torch.int))
        beside = history + given["image_embeds"].shape[1] + text
        return Tokens(VideoShape(*grid, text=beside), history)

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...]:
        """Number of tokens beside the grid in each sample, without padding, as the model counts
        them. Waits for the device."""
        lengths = given["encoder_attention_mask"].sum(1, dtype=torch.int)
        return tuple((_history(given) + given["image_embeds"].shape[1] + lengths).tolist())


def _history(given: Given) -> int:
    """Number of tokens of the history, whose coarser patches are padded if they leave a rest."""
    parts = (
        (given["latents_clean"], (1, 2, 2)),
        (given["latents_history_2x"], (2, 4, 4)),
        (given["latents_history_4x"], (4, 8, 8)),
    )
    return sum(
        prod(-(-size // side) for size, side in zip(x.shape[2:], patch, strict=True))
        for x, patch in parts
    )
