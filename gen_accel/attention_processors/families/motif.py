"""Motif-Video, text to video and image to video.

Video and text attend jointly, video first in raster order; features of a given image come before
the text. Texts are padded to one length; a mask hides the padding from all. Blocks of two streams
come first, then those of one, and layers are counted through both. The last of them decode: there
the output of the earlier blocks for the video replaces the text, as many tokens again, without
positions, seen by all. Sparse attention leaves the cross-attention to the text as it is, which
some blocks have besides; image prompts are added there.
"""

import re

from gen_accel.attention_processors.families.base import (
    BOTH_FEED_FORWARDS,
    JOINT,
    Attention,
    Family,
    Given,
    ImagePrompts,
    PipelineInputs,
    Sizes,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    Model,
    SelfAttention,
    image_sites,
    prefix_lengths,
)
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape


class Motif(Family):
    models = "Motif-Video"
    order = "video, image features, text"
    lora_targets = {
        "attention": JOINT,
        "feed_forward": (*BOTH_FEED_FORWARDS, "proj_mlp", "proj_out"),
    }
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
