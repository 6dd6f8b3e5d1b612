"""Wan 2.1 and 2.2 with VACE and Animate, and the models that are built like it: SkyReels-V2, text
to video and image to video, ChronoEdit and Helios.

Tokens are the video's alone, in raster order; text and image are seen by cross-attention. VACE's
control blocks run over the same grid, of which its reference images are the first frames.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    SEPARATE,
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
    Pass,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
    behind_history,
    in_sections,
    takes_frames,
)
from gen_accel.attention_processors.families.latents import (
    CONTROL,
    FIRST_FRAME,
    LAST_FRAME,
    LAST_IS_GIVEN,
    encoded,
    in_place,
    pixels_of,
)
from gen_accel.attention_processors.families.layers import CROSS, Layers
from gen_accel.attention_processors.families.rotary import (
    check_shape,
    rewrite,
    turned_neighbours,
)
from gen_accel.attention_processors.families.sites import (
    Model,
    SelfAttention,
    SplitPlan,
    in_patches,
    split_tokens,
)
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.registry import LAST
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.models._modeling_parallel import ContextParallelInput
    from PIL.Image import Image

_SLOW = 16  # frames a second that `fps_embedding` tells from all others, which count as 24
_IMAGES = "encoder_hidden_states_image"  # argument for CLIP's features
_FORCING = "Skywork/SkyReels-V2-DF-14B-540P-Diffusers"
OVERLAP = 17  # frames that SkyReels-V2 goes on from, as its authors advise
_WINDOW = 97  # frames that its pipelines make at once
_ROTARY_BASE = 10_000.0  # of all published models; no configuration holds it
_SMALL = 16  # channels of the tiny model
# The 5B model of Wan 2.2, known by the channels of its latents: `frame_num` in
# wan/configs/wan_ti2v_5B.py of github.com/Wan-Video/Wan2.2. Its autoencoder halves
# sides once more.
_TI2V_CHANNELS = 48
_TI2V = {"frames": 121, "fps": 24, "spatial": 16}
PARTS = {"text_encoder": "umt5-xxl", "vae": "AutoencoderKLWan"}
_LAYERS = {
    **{
        f"attn1.{ours}": OriginalLayer(f"self_attn.{x}")
        for ours, x in zip(SEPARATE, "qkvo", strict=True)
    },
    **{
        f"attn2.{ours}": OriginalLayer(f"cross_attn.{x}")
        for ours, x in zip(SEPARATE, "qkvo", strict=True)
    },
    "attn2.add_k_proj": OriginalLayer("cross_attn.k_img"),
    "attn2.add_v_proj": OriginalLayer("cross_attn.v_img"),
    "ffn.net.0.proj": OriginalLayer("ffn.0"),
    "ffn.net.2": OriginalLayer("ffn.2"),
    **{
        f"{ours}.norm_{x}": OriginalLayer(f"{theirs}.norm_{x}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for x in "qk"
    },
    "norm2": OriginalLayer("norm3"),
}
_OUTSIDE = {
    **{
        f"condition_embedder.{x}_embedder.linear_{i + 1}": OriginalLayer(f"{x}_embedding.{2 * i}")
        for x in ("time", "text")
        for i in range(2)
    },
    "condition_embedder.time_proj": OriginalLayer("time_projection.1"),
    "condition_embedder.image_embedder.ff.net.0.proj": OriginalLayer("img_emb.proj.1"),
    "condition_embedder.image_embedder.ff.net.2": OriginalLayer("img_emb.proj.3"),
    "proj_out": OriginalLayer("head.head"),
}

_SEEING = CROSS.with_first(
    {r"image_embedder|attn2\.add_[kv]_proj$": "image"},
    {r"blocks.*attn2\.to_q$": ("video", "text + image")},
)


def _text(config: Given, index: Given, asked: Collection[str]) -> str:
    return "its weights need a first frame" if takes_frames(config) else ""


def _video(config: Given, index: Given, asked: Collection[str]) -> str:
    if takes_frames(config):
        return "its weights need a first frame"
    if index.get("boundary_ratio") is not None:
        return "diffusers remakes a video with one transformer, and it has two"
    if index.get("expand_timesteps"):
        return "diffusers does not remake a video with Wan 2.2 TI2V"
    return ""


def _image(config: Given, index: Given, asked: Collection[str]) -> str:
    if not config:
        return ""
    if index.get("expand_timesteps"):
        return "Wan 2.2 TI2V takes a first frame alone" if LAST in asked else ""
    if not takes_frames(config):
        return "its weights take no first frame"
    return one_or_two(config, index, asked)


def one_or_two(config: Given, index: Given, asked: Collection[str]) -> str:
    """An image encoder's features are of one picture, or of two, as the weights were trained."""
    two = config.get("pos_embed_seq_len") is not None
    if LAST in asked and config.get("image_dim") is not None and not two:
        return "its weights take a first frame alone"
    if LAST not in asked and two:
        return "its weights need a last frame too"
    return ""


class WanBlocks(Family):
    """Blocks of Wan, with attention to the grid, and then to text and image."""

    order = "video"
    lora_targets = {"attention": SEPARATE, "feed_forward": ("ffn.net.0.proj", "ffn.net.2")}
    sizes = Sizes(temporal=4, spatial=8, text=512)
    training = Training(text_width="text_dim")
    image_prompts = ImagePrompts("sequential", "blocks.attn2", "wan")

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        config = transformer.config
        heads, dim = config.num_attention_heads, config.attention_head_dim
        return [
            SelfAttention(f"{stack}.{layer}", block.attn1, layer, heads, dim)
            for stack in ("blocks", "vace_blocks")
            for layer, block in enumerate(getattr(transformer, stack, ()))
        ]


class WanCalls(WanBlocks):
    """Models that are called as Wan is."""

    def layers(self, transformer: Model) -> Layers:
        images = _image_tokens(transformer.config)
        of_tokens = "the timestep of each token" if _is_ti2v(transformer.config) else ""
        return _SEEING._replace(lengths={"image": images}, uncounted=of_tokens)

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        given, like = super().inputs(transformer, video, text, batch), self._like(transformer)
        config = transformer.config
        if _is_ti2v(config):
            given["timestep"] = torch.zeros(batch, video.video_tokens, **like)
        if images := _image_tokens(config):
            count = _pictures(config)
            size = batch * count, images // count, config.image_dim
            given[_IMAGES] = torch.zeros(size, **like)
        if config.get("vace_layers") is not None:
            size = batch, config.vace_in_channels, *given["hidden_states"].shape[2:]
            given["control_hidden_states"] = torch.zeros(size, **like)
        return given


class WanTrained(WanCalls):
    """Models whose rotary table of Wan can have other frequencies on the time axis, and which
    train from text."""

    training = Training(
        causal_vae=True,
        tiny={
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": _SMALL,
            "out_channels": _SMALL,
            "text_dim": 8,
            "freq_dim": 16,
            "ffn_dim": 32,
            "rope_max_seq_len": 64,
        },
        text_width="text_dim",
    )
    generation = Generation(autoencoder="AutoencoderKLWan")
    parts = PARTS

    def longest(self, transformer: Model) -> int:
        return transformer.config.rope_max_seq_len

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        dim = temporal_dim(transformer.config)
        return 1 / _ROTARY_BASE ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def set_temporal_frequencies(self, transformer: Model, freqs: Tensor | None) -> None:
        """Rewrite the rotary table of this model's time axis in place."""
        rope, dim = transformer.rope, temporal_dim(transformer.config)
        tables = rope.freqs_cos[:, :dim], rope.freqs_sin[:, :dim]
        if freqs is None:
            rewrite(rope, tables, None)
            return
        check_shape(freqs, (dim // 2,))
        positions = torch.arange(len(rope.freqs_cos), dtype=torch.float64)
        angles = torch.outer(positions, freqs.double().cpu()).repeat_interleave(2, dim=1)
        rewrite(rope, tables, (angles.cos().float(), angles.sin().float()))

    def turned(
        self, transformer: Model, keys: Tensor, frames: int, fps: Tensor | None = None
    ) -> Tensor:
        return turned_neighbours(keys, frames * self.temporal_frequencies(transformer))


class Wan(WanTrained):
    models = "Wan 2.1 and 2.2, VACE"
    sizes = Sizes(temporal=4, spatial=8, frames=81, fps=16, text=512)
    training = replace(
        WanTrained.training,
        first_frame=True,
        last_frame=True,
        control=True,
        from_frame={
            "in_channels": 2 * _SMALL + 4,
            "image_dim": 8,
            "added_kv_proj_dim": 32,
            "pos_embed_seq_len": None,
            "vace_layers": (0, 1),
        },
    )
    generation = replace(WanTrained.generation, prompt=("prompt_embeds", "negative_prompt_embeds"))
    # Defaults of the class are for 14B.
    presets = {
        "Wan2.1-T2V-1.3B": PublishedModel(
            1.42,
            {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        ),
        "Wan2.1-T2V-14B": PublishedModel(14.3),
        "Wan2.1-I2V-14B": PublishedModel(
            16.4,
            {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        ),
        "Wan2.1-VACE-14B": PublishedModel(17.3),
        "Wan2.2-T2V-A14B": PublishedModel(14.3, transformers=2),
        "Wan2.2-I2V-A14B": PublishedModel(14.3, {"in_channels": 36}, transformers=2),
        "Wan2.2-TI2V-5B": PublishedModel(
            5.0,
            {
                "num_attention_heads": 24,
                "num_layers": 30,
                "ffn_dim": 14336,
                "in_channels": 48,
                "out_channels": 48,
            },
            vae={
                "base_dim": 160,
                "decoder_base_dim": 256,
                "z_dim": 48,
                "dim_mult": [1, 2, 4, 4],
                "is_residual": True,
                "patch_size": 2,
                "in_channels": 12,
                "out_channels": 12,
                "scale_factor_spatial": 16,
            },
        ),
    }
    pipelines = {
        "WanPipeline": PipelineInputs("wan", fits=_text, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        "WanImageToVideoPipeline": PipelineInputs(
            "wan",
            text=False,
            image="image",
            last_image="last_image",
            fits=_image,
            model="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            both="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        ),
        "WanVideoToVideoPipeline": PipelineInputs(
            "wan", text=False, video="video", strength="strength", role="remade", fits=_video
        ),
        "WanVACEPipeline": PipelineInputs(
            "wan vace",
            image="video",
            last_image="video",
            video="video",
            alone=True,
            together=True,
            role="control",
            by="vace",
            model="Wan-AI/Wan2.1-VACE-14B-diffusers",
        ),
        "LucyEditPipeline": PipelineInputs(
            "wan edit", text=False, video="video", role="remade", model="decart-ai/Lucy-Edit-Dev"
        ),
    }
    colors = (
        Colors(
            "AutoencoderKLWan",
            "base_dim",
            96,
            """
            -0.1299 0.0671 0.3568 0.0372 0.0313 0.0296 -0.3477 0.0166 -0.0412 -0.1293 0.068 0.0032
            -0.1251 0.006 0.3477 0.1984
            -0.1692 0.0406 0.2548 0.2344 0.0189 -0.0956 -0.4059 0.1902 0.0267 0.074 0.3019 0.0581
            0.0927 -0.0633 0.2275 0.0913
            0.2932 0.0442 0.1747 0.142 -0.0328 -0.0665 -0.2925 0.1975 -0.1364 0.1636 0.1128 0.0639
            0.1699 0.0005 0.295 0.1861
            """,
            bias=(-0.1835, -0.0868, -0.336),
        ),
        Colors(
            "AutoencoderKLWan",
            "base_dim",
            160,
            """
            0.0119 -0.1062 0.014 -0.0813 0.0656 0.0264 0.0295 -0.0244 0.0443 -0.0465 0.0359 -0.0776
            0.0564 0.0006 -0.0319 -0.0268 0.0539 -0.0359 -0.0285 0.1041 -0.0086 0.039 0.0069 0.0006
            0.0313 -0.1454 0.0714 -0.0304 0.0401 -0.0758 0.0568 -0.0055 0.0239 -0.0663 -0.0416
            0.0166 -0.0211 0.1833 -0.0368 -0.3441 -0.0479 -0.066 -0.0101 -0.069 -0.0145 0.0421
            0.0504 -0.0837
            0.0103 -0.0504 0.0409 -0.0677 0.0851 0.0463 0.0326 -0.027 -0.0102 -0.009 0.0236 0.0854
            0.0264 0.0594 -0.0542 0.0024 0.0265 -0.0312 -0.1032 0.0537 -0.0374 0.067 0.0144 -0.0167
            -0.0574 -0.0902 0.0827 -0.0574 0.0384 -0.0297 0.1307 -0.031 -0.0305 -0.0673 -0.0047
            0.0112 0.0011 0.1466 0.037 -0.3543 -0.0489 -0.0153 0.0068 -0.0452 0.0041 0.0451 -0.0483
            0.0168
            0.0046 0.0165 0.0491 0.0607 0.0808 0.0912 0.059 0.0025 0.0288 -0.0205 0.0082 0.1048
            0.0561 0.0418 -0.0637 0.026 0.0358 -0.0287 -0.1237 0.0622 -0.0051 0.2863 0.0082 0.0079
            -0.0232 -0.0481 0.0447 -0.0196 0.0204 -0.0014 0.1372 -0.038 0.0325 -0.014 -0.0023
            -0.0093 0.0331 0.225 0.0295 -0.2008 -0.042 0.08 0.0156 -0.0927 0.0015 0.0373 -0.0356
            0.0055
            """,
            bias=(0.0317, -0.0878, -0.1388),
        ),
    )
    comfyui = {
        "blocks": ("blocks", _LAYERS),
        "vace_blocks": ("vace_blocks", _LAYERS),
        "": ("", _OUTSIDE),
    }

    def sizes_of(self, config: Config) -> Sizes:
        return replace(self.sizes, **_TI2V) if _is_ti2v(config) else self.sizes

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        """Unknown frames with VACE's reference images. They come before the video
        in unknown number. They are recognised by zeros in the control latents and mask, which no
        encoded video has. Waits for the device."""
        control = given.get("control_hidden_states")
        if control is None or control[:, transformer.config.in_channels :, 0].any():
            return None
        return "VACE puts its reference images before the frames of the video"

    def context_parallel(self, transformer: Model) -> SplitPlan | None:
        """Plan for VACE; for Wan itself diffusers has one."""
        if not hasattr(transformer, "vace_blocks"):
            return None
        split = split_tokens()
        both = {"hidden_states": split["tokens"], "control_hidden_states": split["tokens"]}
        return {
            "rope": split_rotary(),
            "vace_blocks.0": both,
            "blocks.0": {"hidden_states": split["tokens"]},
            "proj_out": split["gathered"],
        }

    @torch.no_grad()
    def first_frame(
        self, pipe: "DiffusionPipeline", transformer: Model, image: "Image", frames: int
    ) -> dict[str, Tensor]:
        """Latents of the first frame, and CLIP's features of it if the model takes them.

        Models with channels for the frames to keep take the latents of a clip that is grey after
        its first frame. The autoencoder is causal, so that they are cut to the latents of a
        shorter clip. Wan 2.2 TI2V-5B takes the latents of the frame alone, in the place of the
        first noisy ones.
        """
        config, video = transformer.config, pixels_of(pipe, image)
        if takes_frames(config):
            rest = video.new_zeros(*video.shape[:2], frames - 1, *video.shape[3:])
            video = torch.cat([video, rest], 2)
        found = {FIRST_FRAME: _latents(pipe, video)}
        if config.image_dim is not None:
            found[_IMAGES] = _features(pipe, [image])[0]
        return found

    @torch.no_grad()
    def last_frame(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        first: "Image",
        last: "Image",
        frames: int,
    ) -> dict[str, Tensor]:
        """The last of the latents of a clip that is grey between both frames, and CLIP's features
        of both, (2, tokens, D), if the model takes them. The latents before are those of the first
        frame, as the autoencoder is causal."""
        begin, end = pixels_of(pipe, first), pixels_of(pipe, last)
        grey = begin.new_zeros(*begin.shape[:2], frames - 2, *begin.shape[3:])
        found = {LAST_FRAME: _latents(pipe, torch.cat([begin, grey, end], 2))[:, -1:]}
        if transformer.config.image_dim is not None:
            found[_IMAGES] = _features(pipe, [first, last])
        return found

    def needs_control(self, config: Entries) -> bool:
        return config.get("vace_layers") is not None

    @torch.no_grad()
    def control(self, pipe: "DiffusionPipeline", frames: Sequence["Image"]) -> dict[str, Tensor]:
        """Latents of a clip that is grey throughout, of which nothing is kept, and of the control
        video, one after the other in the channels."""
        height, width = frames[0].height, frames[0].width
        video = pipe.video_processor.preprocess_video([*frames], height=height, width=width)
        parts = [_latents(pipe, x) for x in (torch.zeros_like(video), video)]
        return {CONTROL: torch.cat(parts)}

    def tiny_control(
        self, transformer: Model, frames: int, height: int, width: int
    ) -> dict[str, Tensor]:
        channels = 2 * self.latent_channels(transformer.config)
        return {CONTROL: torch.zeros(channels, frames, height, width)}

    def tiny_first_frame(
        self, transformer: Model, frames: int, height: int, width: int
    ) -> dict[str, Tensor]:
        config = transformer.config
        own = frames if takes_frames(config) else 1
        found = {FIRST_FRAME: torch.zeros(self.latent_channels(config), own, height, width)}
        if config.image_dim is not None:
            images, count = _image_tokens(config), _pictures(config)
            size = (images,) if count == 1 else (count, images // count)
            found[_IMAGES] = torch.zeros(*size, config.image_dim)
        return found

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        time = sigma * 1000
        if FIRST_FRAME in conditions:
            give = _with_frames if takes_frames(transformer.config) else _in_tokens
            noisy, time, conditions = give(transformer, noisy, time, conditions)
        told = dict(conditions)
        if (control := told.pop(CONTROL, None)) is not None:
            # All is made by what the control shows: the mask is white.
            masks = transformer.config.vace_in_channels - control.shape[1]
            mask = control.new_ones(len(control), masks, *control.shape[2:])
            told["control_hidden_states"] = torch.cat([control, mask], 1).to(noisy.dtype)
        return transformer(noisy, timestep=time, **told, return_dict=False)[0]


def temporal_dim(config: Config) -> int:
    """Columns of the rotary table that are the time axis."""
    dim = config.attention_head_dim
    return dim - 4 * (dim // 6)


def _is_ti2v(config: Config) -> bool:
    return config.in_channels == _TI2V_CHANNELS


def _image_tokens(config: Config) -> int:
    """Number of CLIP's image tokens that cross-attention sees beside the text."""
    if config.image_dim is None or config.added_kv_proj_dim is None:
        return 0
    return config.pos_embed_seq_len or 257


def _pictures(config: Config) -> int:
    """Number of pictures that CLIP's features are of."""
    return 1 if config.pos_embed_seq_len is None else 2


def _latents(pipe: "DiffusionPipeline", video: Tensor) -> Tensor:
    """Latents (C, f, h, w) of a video (1, 3, F, H, W), rounded as the pipeline does."""
    latents, scale = encoded(pipe, video, None), pipe.vae.config
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (scale.latents_mean, scale.latents_std)
    )
    return ((latents - mean) * (1.0 / std))[0]


def _features(pipe: "DiffusionPipeline", images: Sequence["Image"]) -> Tensor:
    """CLIP's features of some pictures, (pictures, tokens, D)."""
    return pipe.encode_image([*images], next(pipe.image_encoder.parameters()).device)


def split_rotary() -> dict[int, "ContextParallelInput"]:
    """Split cosines and sines (1, N, 1, dim) as they leave their module."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    return {i: ContextParallelInput(1, expected_dims=4, split_output=True) for i in range(2)}


def _with_frames(
    transformer: Model, noisy: Tensor, timestep: Tensor, conditions: Given
) -> tuple[Tensor, Tensor, Given]:
    """Add the channels of the frames to keep: a mask, 1 for the frames that are there, and their
    latents. The last frame is the last of its latent, of which the mask has a channel each."""
    rest = dict(conditions)
    latents = rest.pop(FIRST_FRAME).to(noisy.dtype)
    masks = transformer.config.in_channels - noisy.shape[1] - latents.shape[1]
    mask = noisy.new_zeros(len(noisy), masks, *noisy.shape[2:])
    mask[:, :, 0] = 1
    if LAST_FRAME in rest:
        last, plain = rest.pop(LAST_FRAME).to(noisy.dtype), latents[:, :, -1:]
        is_given = rest.pop(LAST_IS_GIVEN, noisy.new_ones(len(noisy))).bool().view(-1, 1, 1, 1, 1)
        mask[:, -1:, -1:] = is_given
        latents = torch.cat([latents[:, :, :-1], torch.where(is_given, last, plain)], 2)
    if _pictures(transformer.config) > 1:
        rest[_IMAGES] = rest[_IMAGES].flatten(0, 1)  # one after the other, as in the pipeline
    return torch.cat([noisy, mask, latents], 1), timestep, rest


def _in_tokens(
    transformer: Model, noisy: Tensor, timestep: Tensor, conditions: Given
) -> tuple[Tensor, Tensor, Given]:
    """Put the first frame in place, with a timestep for each token (B, tokens)."""
    noisy, times, rest = in_place(noisy, timestep, conditions)
    _, rows, columns = in_patches(noisy.shape[2:], transformer.config.patch_size)
    return noisy, times.repeat_interleave(rows * columns, 1), rest


def _overlapping(pipe: Model, frames: int, given: Given) -> tuple[Given, int]:
    """A video that is longer than a window goes on from the end of the one before."""
    window = given.get("base_num_frames", _WINDOW)
    is_long = frames > window and given.get("overlap_history") is None
    return {"overlap_history": OVERLAP} if is_long else {}, frames


def _windows(config: Config, clip: VideoShape, steps: int) -> list[Pass]:
    """Windows of diffusion forcing, each from the end of the one before; the last may be short."""
    window, overlap = (_WINDOW + 3) // 4, (OVERLAP + 3) // 4
    starts = range(0, max(1, clip.frames - overlap), window - overlap)
    lengths = [min(window, clip.frames - start) for start in starts]
    return [Pass(steps, VideoShape(n, clip.height, clip.width)) for n in lengths]


class SkyReels(WanTrained):
    """Tokens are those of Wan. Diffusion forcing gives each frame a timestep of its own, (B,
    frames). In causal blocks (`num_frame_per_block` above 1) a mask hides later ones. Methods run
    block after block there, each with what comes before it as keys alone."""

    models = "SkyReels-V2"
    # Frames of the 540P models, and of the pipelines. The 720P models, whose configs are the same,
    # were trained on 121.
    sizes = Sizes(temporal=4, spatial=8, frames=97, fps=24, text=512)
    training = replace(WanTrained.training, takes_fps=True)
    presets = {
        "SkyReels-V2-T2V-14B": PublishedModel(
            14.3,
            {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        ),
        "SkyReels-V2-DF-1.3B": PublishedModel(
            1.44,
            {
                "num_attention_heads": 12,
                "num_layers": 30,
                "ffn_dim": 8960,
                "inject_sample_info": True,
            },
            pipeline="SkyReelsV2DiffusionForcingPipeline",
        ),
    }
    pipelines = {
        "SkyReelsV2Pipeline": PipelineInputs(
            "skyreels t2v", model="Skywork/SkyReels-V2-T2V-14B-720P-Diffusers"
        ),
        "SkyReelsV2ImageToVideoPipeline": PipelineInputs(
            "skyreels i2v",
            text=False,
            image="image",
            last_image="last_image",
            fits=one_or_two,
            model="Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        ),
        "SkyReelsV2DiffusionForcingPipeline": PipelineInputs(
            "skyreels df", model=_FORCING, length=_overlapping, passes=_windows
        ),
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": PipelineInputs(
            "skyreels df",
            text=False,
            image="image",
            last_image="last_image",
            joins=True,
            model=_FORCING,
            length=_overlapping,
            passes=_windows,
        ),
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": PipelineInputs(
            "skyreels df",
            text=False,
            video="video",
            role="prolonged",
            by="overlapping",
            joins=True,
            model=_FORCING,
        ),
    }
    comfyui = {name: Wan.comfyui[name] for name in ("blocks", "")}

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        tokens, block = super().tokens(transformer, given), transformer.config.num_frame_per_block
        return tokens._replace(causal=block if 1 < block < tokens.video.frames else 0)

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        given = super().inputs(transformer, video, text, batch)
        return given | {"fps": [1] * batch} if transformer.config.inject_sample_info else given

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict with one noise level for all frames.

        For models of diffusion forcing this is their synchronous mode (`ar_step=0`), in which the
        pipelines run unless told otherwise; the forward pass with the level written out for each
        frame gives the same up to rounding. Models with `inject_sample_info` are told whether
        `fps` (B,) is 16.
        """
        told = dict(conditions)
        fps = told.pop("fps", torch.full_like(sigma, self.sizes.fps))
        if transformer.config.inject_sample_info:
            told["fps"] = (fps != _SLOW).long().tolist()
        return super().predict(transformer, noisy, sigma, told)

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        if not given.get("enable_diffusion_forcing", False):
            return None
        return "SkyReels-V2 makes a long video in parts where it runs with diffusion forcing"

    def context_parallel(self, transformer: Model) -> SplitPlan:
        """Plan for diffusion forcing, in which each token has a timestep of its own, (B, 6, N,
        width) in the blocks. The code after `norm_out` is not in a module, so that no input can be
        split there."""
        from diffusers.models._modeling_parallel import ContextParallelInput

        split = split_tokens()
        return {
            "rope": split_rotary(),
            "blocks.0": {"hidden_states": split["tokens"]},
            "blocks.*": {"temb": ContextParallelInput(split_dim=2, expected_dims=4)},
            "norm_out": split["gathered"],
        }


class WanAnimate(WanBlocks):
    """Wan with the image of the character as the first frame of the grid. The face adapters, in
    which a frame sees the face at its time, are left as they are."""

    models = "Wan 2.2 Animate"
    presets = {"Wan2.2-Animate-14B": PublishedModel(15.2)}
    pipelines = {
        "WanAnimatePipeline": (
            "it animates a picture by two videos, of poses and of faces, which a program of its "
            "own makes"
        )
    }

    def layers(self, transformer: Model) -> Layers:
        images = _image_tokens(transformer.config)
        seen = _SEEING.with_first({r"face|pose": "none"})
        return seen._replace(lengths={"image": images}, uncounted="the pose and the face")

    def context_parallel(self, transformer: Model) -> None:
        raise ValueError("its face adapters need all tokens of a frame")

    def no_frames(self, transformer: Model, given: Given) -> str:
        return "Wan 2.2 Animate makes a video in segments, each behind the image of the character"


class ChronoEdit(WanCalls):
    """An image is edited by a video that leads to the new one. After the first steps, or from the
    start, the grid is of two frames, the first and the last."""

    models = "ChronoEdit"
    presets = {
        "ChronoEdit-14B": PublishedModel(
            16.4,
            {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120},
        ),
    }
    pipelines = {
        "ChronoEditPipeline": PipelineInputs(
            "chronoedit",
            text=False,
            image="image",
            frames=5,
            model="nvidia/ChronoEdit-14B-Diffusers",
        ),
    }

    def no_frames(self, transformer: Model, given: Given) -> str:
        return "ChronoEdit leaves out all frames but the first and the last on the way"


_CHUNKS = in_sections("num_latent_frames_per_chunk")


class Helios(WanBlocks):
    """Video is made chunk after chunk. Tokens are the history, the oldest first, and then the
    chunk, all in one attention. Old frames have coarser patches, and recent ones stand beside the
    very first frame. None of these continue the chunk's grid, so that the history is seen by all.
    """

    models = "Helios"
    order = "history, video"
    sizes = Sizes(temporal=4, spatial=8, fps=24, text=512)
    attention = Attention(text="before")
    presets = {"Helios-Base": PublishedModel(14.3)}
    pipelines = {
        "HeliosPipeline": PipelineInputs(
            "helios",
            image="image",
            video="video",
            role="prolonged",
            length=_CHUNKS,
            passes=behind_history(9),
        ),
        "HeliosPyramidPipeline": PipelineInputs(
            "helios pyramid",
            image="image",
            video="video",
            role="prolonged",
            length=_CHUNKS,
            passes=behind_history(9, scales=(4, 2, 1)),
        ),
    }

    def layers(self, transformer: Model) -> Layers:
        both = "video + history"
        told = "video" if transformer.config.guidance_cross_attn else both  # of the text
        rows = {
            r"patch_(short|mid|long)": "none",
            r"attn1\.|ffn\.": both,
            r"attn2\.to_(q|out)": told,
        }
        seen = CROSS.with_first(rows, {r"blocks.*attn2\.to_q$": (told, "text")})
        return seen._replace(beside="history")

    def _beside(self, transformer: Model, given: Given) -> int:
        """Number of tokens of the history, whose coarser patches are padded to whole ones."""
        patch, tokens = transformer.config.patch_size, 0
        for coarse, part in ((1, "short"), (2, "mid"), (4, "long")):
            x = given.get(f"latents_history_{part}")
            if x is not None and given.get(f"indices_latents_history_{part}") is not None:
                sides = zip(x.shape[2:], patch, strict=True)
                tokens += prod(-(-size // (coarse * side)) for size, side in sides)
        return tokens

    def context_parallel(self, transformer: Model) -> None:
        if transformer.config.is_amplify_history:
            raise ValueError("is_amplify_history=True scales keys by their place among all tokens")

    def no_frames(self, transformer: Model, given: Given) -> str:
        return "Helios makes a video chunk after chunk"
