"""Mochi 1 and Motif-Video, whose video and text attend jointly."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.families import layers
from gen_accel.attention_processors.families.base import (
    BOTH_FEED_FORWARDS,
    JOINT,
    STREAMS,
    Attention,
    Colors,
    Family,
    Generation,
    Given,
    ImagePrompts,
    OriginalLayer,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import Table
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    Model,
    SelfAttention,
    image_sites,
    prefix_lengths,
    text_of_call,
)
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LAYERS = {
    **OriginalLayer.fused("attn.qkv_x", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    **OriginalLayer.fused(
        "attn.qkv_y", ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")
    ),
    "attn1.to_out.0": OriginalLayer("attn.proj_x"),
    "attn1.to_add_out": OriginalLayer("attn.proj_y"),
    # diffusers gates by the second half, the original by the first.
    "ff.net.0.proj": OriginalLayer("mlp_x.w1", is_swapped=True),
    "ff.net.2": OriginalLayer("mlp_x.w2"),
    "ff_context.net.0.proj": OriginalLayer("mlp_y.w1", is_swapped=True),
    "ff_context.net.2": OriginalLayer("mlp_y.w2"),
}


class Mochi(Family):
    """Video comes first, in a call of its own for each sample, without the padding of its text.
    Time runs from noise to video, and so does the velocity. Rotary frequencies are learned, others
    for each head."""

    models = "Mochi 1"
    order = "video, text"
    # The last block has no text output, and no to_add_out.
    lora_targets = {"attention": JOINT, "feed_forward": BOTH_FEED_FORWARDS}
    sizes = Sizes(temporal=6, spatial=8, frames=163, fps=30, text=256)
    attention = Attention(
        call="F.scaled_dot_product_attention",
        name="attn1",
        text="after",
        rising=True,
        heads_alike=False,
    )
    image_prompts = ImagePrompts("batched", "transformer_blocks.attn1", "mochi", by_sample=True)
    generation = Generation(least_steps=2)  # the schedule divides by the steps less 1
    training = Training(
        causal_vae=True,
        takes_mask=True,
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "pooled_projection_dim": 16,
            "in_channels": 16,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
        },
    )
    presets = {"mochi-1-preview": PublishedModel(10.0)}
    pipelines = {"MochiPipeline": PipelineInputs("mochi", model="genmo/mochi-1-preview")}
    parts = {"text_encoder": "t5-v1.1-xxl", "vae": "AutoencoderKLMochi"}
    colors = (
        Colors(
            "AutoencoderKLMochi",
            "decoder_block_out_channels",
            (128, 256, 512, 768),
            """
            -0.0069 0.0154 0.0333 -0.139 -0.0725 0.0074 -0.0176 0.5294 -0.0326 -0.0659 0.0185
            -0.0396
            -0.0045 -0.0692 0.0019 0.0628 0.0134 -0.027 -0.0277 0.5204 -0.0446 0.0153 -0.0217
            -0.0495
            0.0018 -0.0274 0.0206 0.1678 -0.1898 -0.0209 -0.0221 0.3852 -0.0143 -0.0153 0.0014
            -0.0281
            """,
            bias=(-0.094, -0.1418, -0.1453),
        ),
    )
    comfyui = {"transformer_blocks": ("blocks", _LAYERS)}

    def layers(self, transformer: Model) -> Layers:
        return layers.JOINT.with_first(
            {r"pooler\.to_kv$": "text + one", r"caption_proj": "text"},
            {r"pooler\.to_q$": ("one", "text + one")},
        )

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        sites = super().self_attentions(transformer)
        return [site._replace(tokens=text_of_call) for site in sites]

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts, one at a time: an empty prompt at the end makes the pipeline zero all
        of a call.

        Returns:
            encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype, and
            encoder_attention_mask (B, max_tokens) bool, False for padding, and everywhere for the
            empty prompt if the pipeline zeroes it.
        """
        each = [super(Mochi, self).encode_prompt(pipe, [one], max_tokens) for one in prompts]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        return -super().predict(transformer, noisy, 1 - sigma, conditions)

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        return transformer.pos_frequencies[0].detach().double().cpu()

    def _rotary_table(
        self,
        stock: Model,
        numbers: Sequence,
        pos_frequencies: Tensor,
        *sizes: object,
        **like: object,
    ) -> Table:
        freqs = pos_frequencies.float()  # as the table is made
        made = torch.tensor([numbers], dtype=freqs.dtype, device=freqs.device)
        return stock(torch.cat([made, freqs[1:]]), *sizes, **like)


class Motif(Family):
    """Video comes first, in raster order; features of a given image come before the text. Texts
    are padded to one length; a mask hides the padding from all. Blocks of two streams come first,
    then those of one, and layers are counted through both. The last of them decode: there the
    output of the earlier blocks for the video replaces the text, as many tokens again, without
    positions, seen by all. Sparse attention leaves the cross-attention to the text as it is, which
    some blocks have besides; image prompts are added there."""

    models = "Motif-Video"
    order = "video, image features, text"
    lora_targets = STREAMS
    sizes = Sizes(temporal=4, spatial=8, fps=24, text=512)
    attention = Attention(stacks=("transformer_blocks", "single_transformer_blocks"), text="after")
    image_prompts = ImagePrompts("sequential", adapters="motif")
    pipelines = {
        "MotifVideoPipeline": PipelineInputs("motif", model="Motif-Technologies/Motif-Video-2B"),
        "MotifVideoImage2VideoPipeline": PipelineInputs(
            "motif", text=False, image="image", model="Motif-Technologies/Motif-Video-2B"
        ),
    }

    def layers(self, transformer: Model) -> Layers:
        """Layers; in the last blocks, which decode, the video replaces the text."""
        config = transformer.config
        first = config.num_single_layers - config.num_decoder_layers
        last = [f"single_transformer_blocks.{i}" for i in range(first, config.num_single_layers)]
        decoding = "|".join(rf"^{re.escape(name)}\." for name in last) or "(?!)"
        return Layers(
            {
                r"time|norm": "one",
                r"^context_embedder|cross_attn\.to_[kv]$": "text",
                r"image_embedder": "image",
                r"add_[qkv]_proj|to_add_out|ff_context": "text + image",
                r"cross_attn": "video",
                decoding: "video + video",
                r"^single_": "video + text + image",
            },
            {r"cross_attn\.to_q$": ("video", "text")},
            beside="text + image",
            pairs=dict.fromkeys(last, ("video + video", "video + video")),
        )

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        sites = super().self_attentions(transformer)
        first = len(sites) - transformer.config.num_decoder_layers
        return [*sites[:first], *(site._replace(tokens=_decoded) for site in sites[first:])]

    def image_attentions(self, transformer: Model) -> list[ImageAttention]:
        """Cross-attentions; ValueError for a model whose blocks have none."""
        sites = self.self_attentions(transformer)
        blocks = {site.name: transformer.get_submodule(site.name) for site in sites}
        names = [
            f"{name}.cross_attn" for name, block in blocks.items() if block.cross_attn is not None
        ]
        if not names:
            raise ValueError(
                f"this {type(transformer).__name__} has no cross-attention to its text, to which "
                "an image prompt could be added"
            )
        return image_sites(transformer, names)

    def _beside(self, transformer: Model, given: Given) -> int:
        return _features(given) + given["encoder_hidden_states"].shape[1]

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...] | None:
        """Number of text and image tokens in each sample, without padding; None if padding comes
        before the text. Waits for the device."""
        mask = given.get("encoder_attention_mask")
        return None if mask is None else prefix_lengths(mask, _features(given))


def _features(given: Given) -> int:
    """Number of tokens of a given image."""
    images = given.get("image_embeds")
    return 0 if images is None else images.shape[1]


def _decoded(tokens: Tokens, call: Call) -> Tokens:
    """Tokens of the last blocks, which decode."""
    video = tokens.video
    return Tokens(VideoShape(*video.grid, text=video.video_tokens))
