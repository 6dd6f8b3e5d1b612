"""Latte and Allegro, text to video by cross-attention, with the blocks of PixArt."""

from gen_accel.attention_processors.families.base import (
    Attention,
    Family,
    Generation,
    ImagePrompts,
    PipelineInputs,
    PublishedModel,
    Sizes,
)
from gen_accel.attention_processors.families.layers import CROSS, Layers
from gen_accel.attention_processors.families.sites import Model, SelfAttention
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

_CALL = "F.scaled_dot_product_attention"


class Latte(Family):
    """Blocks over space and over time take turns. In those over space each frame is a sample of
    its own that attends to itself, in raster order. Blocks over time are left alone: they attend
    over the frames of one place, only 16 in the published model."""

    models = "Latte"
    order = "video, each frame by itself"
    kind = "frames"
    sizes = Sizes(temporal=1, spatial=8, fps=8, text=120)
    attention = Attention(call=_CALL, name="attn1")
    image_prompts = ImagePrompts("batched", "transformer_blocks.attn2", "latte", names_calls=False)
    generation = Generation(frames_argument="video_length")
    pipelines = {"LattePipeline": PipelineInputs("latte", model="maxin-cn/Latte-1")}

    def layers(self, transformer: Model) -> Layers:
        return CROSS.with_first(
            {r"attn2\.to_[kv]$": "frames * text"},
            {r"^temporal_.*attn1\.to_q$": ("video", "frames")},
        )

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        sites = super().self_attentions(transformer)
        return [site._replace(tokens=_one_frame) for site in sites]


def _one_frame(tokens: Tokens, call: Call) -> Tokens:
    _, height, width = tokens.video.grid
    return Tokens(VideoShape(1, height, width))


class Allegro(Family):
    """Tokens are the video's alone, in raster order."""

    models = "Allegro"
    order = "video"
    # Its pipelines make even numbers of frames, of which the first latent has as many as others.
    sizes = Sizes(spatial=8, fps=15, text=512, first_alone=False)
    attention = Attention(call=_CALL, name="attn1")
    image_prompts = ImagePrompts(
        "batched",
        "transformer_blocks.attn2",
        "allegro",
        names_calls=False,
        guided="do_classifier_free_guidance",
    )
    generation = Generation(tiled=True)
    presets = {"Allegro": PublishedModel(2.77, temporal=4)}
    pipelines = {"AllegroPipeline": PipelineInputs("allegro", model="rhymes-ai/Allegro")}

    def layers(self, transformer: Model) -> Layers:
        return CROSS
