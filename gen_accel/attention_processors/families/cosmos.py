"""Cosmos 1, Predict2, Predict2.5 and Transfer2.5, and Cosmos 3.

Tokens are the video's alone, in raster order; text is seen by cross-attention, and so is the image
of models with a second processor for it. The controlnet of Transfer2.5 is a model of its own, and
keeps the attention that it has.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    JOINT,
    Arguments,
    Attention,
    Colors,
    Config,
    Entries,
    Family,
    Given,
    ImagePrompts,
    OriginalLayer,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
    takes_frames,
)
from gen_accel.attention_processors.families.latents import FIRST_FRAME, in_place
from gen_accel.attention_processors.families.layers import CROSS, Layers
from gen_accel.attention_processors.families.rotary import (
    Table,
    precise,
    stock_rotary,
    turned_pairs,
)
from gen_accel.attention_processors.families.sites import Model, SelfAttention
from gen_accel.attention_processors.families.wan import temporal_dim
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

_ROTARY_BASE = 10_000.0  # of all models; no configuration holds it
_LEARNT = "learnable"  # extra_pos_embed_type of Cosmos 1, and by default
_GIVEN_LEVEL = 1e-4  # that the pipelines tell of frames that are given
_SMALL = 16  # channels of the tiny model
_PICTURES = "it makes pictures"
_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "output_proj"}
_LAYERS = {
    f"{ours}.{layer}": OriginalLayer(f"{theirs}.{name}")
    for ours, theirs in {"attn1": "self_attn", "attn2": "cross_attn"}.items()
    for layer, name in _PROJECTIONS.items()
} | {"ff.net.0.proj": OriginalLayer("mlp.layer1"), "ff.net.2": OriginalLayer("mlp.layer2")}


class Cosmos(Family):
    models = "Cosmos 1, Predict2, Predict2.5 and Transfer2.5"
    order = "video"
    sizes = Sizes(temporal=4, spatial=8, frames=93, fps=16, text=512)  # of Predict2 and 2.5
    attention = Attention(name="attn1")
    image_prompts = ImagePrompts("sequential", "transformer_blocks.attn2", "cosmos")
    training = Training(
        causal_vae=True,
        takes_fps=True,
        first_frame=True,
        tiny={
            "in_channels": _SMALL,
            "out_channels": _SMALL,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "mlp_ratio": 2.0,
            "text_embed_dim": 8,
            "adaln_lora_dim": 8,
            "max_size": (64, 32, 32),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        from_frame={"in_channels": _SMALL + 1},
    )
    presets = {
        "Cosmos-Predict2-2B-Video2World": PublishedModel(
            1.96,
            {
                "in_channels": 17,
                "num_attention_heads": 16,
                "rope_scale": (1.0, 3.0, 3.0),
                "extra_pos_embed_type": None,
            },
        ),
        "Cosmos-1.0-Diffusion-7B": PublishedModel(7.24),
    }
    pipelines = {
        "CosmosTextToWorldPipeline": PipelineInputs(
            "cosmos1 t2w", model="nvidia/Cosmos-1.0-Diffusion-7B-Text2World"
        ),
        "CosmosVideoToWorldPipeline": PipelineInputs(
            "cosmos1 v2w",
            text=False,
            image="image",
            video="video",
            role="continued",
            model="nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
        ),
        "Cosmos2TextToImagePipeline": _PICTURES,
        "Cosmos2VideoToWorldPipeline": PipelineInputs(
            "cosmos2 v2w",
            text=False,
            image="image",
            video="video",
            role="continued",
            model="nvidia/Cosmos-Predict2-2B-Video2World",
        ),
        "Cosmos2_5_PredictBasePipeline": PipelineInputs(
            "cosmos25",
            image="image",
            video="video",
            role="continued",
            model="nvidia/Cosmos-Predict2.5-2B",
        ),
        "Cosmos2_5_TransferPipeline": (
            "it is controlled by a video of poses, edges or depth, which is made from another one"
        ),
    }
    colors = (
        Colors(
            "AutoencoderKLCosmos",
            "decode_block_out_channels",
            (256, 512, 512, 512),
            """
            0.1817 -0.0586 -0.4703 0.0803 -0.082 0.2511 -0.183 -0.0621 0.3619 0.3164 0.1152 -0.1434
            0.0635 -0.3635 -0.1865 0.0447
            0.2284 -0.0862 -0.4255 0.1963 -0.105 0.3098 -0.2117 -0.2187 0.1082 0.3922 0.0231
            -0.3609 0.1471 -0.1963 0.0365 0.0994
            0.2423 -0.3108 -0.3995 0.1001 0.04 0.2787 -0.004 -0.0939 0.1455 0.2575 -0.0462 -0.3665
            0.168 -0.3248 0.2346 0.0881
            """,
            bias=(-0.1223, -0.1889, -0.1976),
        ),
    )
    comfyui = {"transformer_blocks": ("blocks", _LAYERS)}

    def layers(self, transformer: Model) -> Layers:
        seen = CROSS.with_first(
            {r"norm": "one", r"[kv]_img|img_context": "image", r"crossattn_proj": "text"},
            {r"attn2\.q_img$": ("video", "image")},
        )
        return seen._replace(uncounted="the image, controls, and timesteps of single frames")

    def sizes_of(self, config: Config) -> Sizes:
        is_first = _is_first(config)
        return replace(self.sizes, temporal=8, frames=121, fps=30) if is_first else self.sizes

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        if given.get("block_controlnet_hidden_states") is None:
            return None
        return "Cosmos Transfer2.5 makes a video chunk after chunk"

    def no_training(self, pipeline: str | None, config: Entries) -> str | None:
        if config.get("extra_pos_embed_type", _LEARNT) == _LEARNT:
            return "Cosmos 1 is preconditioned by the scales of EDM: take Predict2 or Predict2.5"
        if config.get("controlnet_block_every_n") is not None:
            return "Transfer2.5 is controlled by a second model: take Predict2 or Predict2.5"
        if config.get("concat_padding_mask", True) and find_spec("torchvision") is None:
            return "diffusers scales its padding mask by torchvision: pip install torchvision"
        return None

    def tiny_conditions(self, config: Config, tokens: int) -> dict[str, Tensor]:
        width = config.text_embed_dim
        if config.use_crossattn_projection:
            width = config.crossattn_proj_in_channels
        return {"encoder_hidden_states": torch.zeros(tokens, width)}

    def given_latents(self, transformer: Model) -> int:
        return 1  # beside which there is a channel for the mask alone

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict the velocity, noise - clean.

        Predict2.5 takes these latents and levels as they are. The pipelines of Predict2 step
        through x = clean + s noise by the scales of EDM, which come to the same. With t = s / (1 +
        s) they call the network on

            c_in x = (1 - t) x = (1 - t) clean + t noise

        at time t, and take c_skip x + c_out F = (1 - t) x - t F of its output F for the clean
        latents. So F = ((1 - t) clean + t noise - clean) / t = noise - clean, at sigma = t. A
        level s drawn log-normal, as these models were trained, is a level t drawn logit-normal:
        logit t = ln s.

        Predict2 places the frames by `fps` (B,) of the clips, all alike; the others do not. A
        first frame takes the place of the first latent, whose velocity has no meaning then.
        """
        config, rest = transformer.config, dict(conditions)
        more: Arguments = {}
        clips = rest.pop("fps", None)
        if (rate := self._given_fps(config)) is not None:
            more["fps"] = rate if clips is None else clips[0]
        times = sigma
        if takes_frames(config):
            times = sigma[:, None].repeat(1, noisy.shape[2])
            if FIRST_FRAME in rest:
                noisy, times, rest = in_place(noisy, sigma, rest)
            is_given = (times == 0)[:, None, :, None, None]
            times = torch.where(is_given, _given_time(config), times[:, None, :, None, None])
            more["condition_mask"] = is_given.to(noisy.dtype).expand(-1, -1, -1, *noisy.shape[3:])
        if config.concat_padding_mask:
            side = (n * 8 for n in noisy.shape[3:])
            more["padding_mask"] = noisy.new_zeros(1, 1, *side)
        return transformer(noisy, timestep=times, **rest, **more, return_dict=False)[0]

    def _given_fps(self, config: Config) -> float | None:
        """The frame rate that the pipelines pass unless told otherwise; None to Predict2.5, and to
        Predict2 for single images."""
        if _is_first(config):
            return self.sizes_of(config).fps
        if config.use_crossattn_projection or not takes_frames(config):
            return None
        return self.sizes.fps

    def longest(self, transformer: Model) -> int:
        """Rotary positions are as many as the longest of all axes has, and learnt ones, in Cosmos
        1, as the time axis has."""
        config = transformer.config
        sizes = [n // side for n, side in zip(config.max_size, config.patch_size, strict=True)]
        return sizes[0] if _is_first(config) else max(sizes)

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        """Frequencies at the frame rate that the pipelines pass; ValueError for Cosmos 1, which
        also has learnt positions."""
        config = transformer.config
        if _is_first(config):
            raise ValueError(
                "Cosmos 1 has learnt positions beside its rotary ones: a rule on rotary "
                "frequencies would leave them behind"
            )
        dim = temporal_dim(config)
        base = _ROTARY_BASE * config.rope_scale[0] ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        return self._a_frame(transformer) * base**-exponent

    def turned(
        self, transformer: Model, keys: Tensor, frames: int, fps: Tensor | None = None
    ) -> Tensor:
        angles = frames * self.temporal_frequencies(transformer)
        rate = self._given_fps(transformer.config)
        if rate is not None and fps is not None:
            angles = angles * (rate / fps[0])  # as `predict` tells it
        first = torch.arange(len(angles))
        return turned_pairs(keys, first, first + keys.shape[-1] // 2, angles)

    def _a_frame(self, transformer: Model) -> float:
        """Positions from a latent frame to the next, at the frame rate that the pipelines pass."""
        rate = self._given_fps(transformer.config)
        return 1.0 if rate is None else stock_rotary(transformer).base_fps / rate

    def _rotary_numbers(self, transformer: Model, freqs: Tensor) -> Sequence:
        """Frequencies in rad a position."""
        return (freqs / self._a_frame(transformer)).tolist()

    def _rotary_table(
        self, stock: Model, numbers: Sequence, hidden_states: Tensor, fps: float | None = None
    ) -> Table:
        """(tokens, head dim) each of cosines and sines, the pairs in halves."""
        cos, sin = stock(hidden_states, fps=fps)
        frames, pairs, real = (
            hidden_states.shape[2] // stock.patch_size[0],
            len(numbers),
            precise(cos),
        )
        place = torch.arange(frames, **real) * (1.0 if fps is None else stock.base_fps / fps)
        place = place.repeat_interleave(len(cos) // frames)
        angles = torch.outer(place, torch.tensor(numbers, **real))
        for first in (0, cos.shape[1] // 2):
            cos[:, first : first + pairs] = angles.cos()
            sin[:, first : first + pairs] = angles.sin()
        return cos, sin


def _is_first(config: Config) -> bool:
    """Whether this is Cosmos 1, which alone learnt positions beside its rotary ones."""
    return config.extra_pos_embed_type == _LEARNT


def _given_time(config: Config) -> float:
    """Time of given frames: in Predict2.5 their level, in Predict2 t of it as `s`."""
    level = torch.tensor(_GIVEN_LEVEL)
    return (level if config.use_crossattn_projection else level / (level + 1)).item()


class Cosmos3(Family):
    """One sequence of a sample: text, then video in raster order, then sound and actions if there
    are some. The processor calls the attention twice. In the first, text sees the text before it:
    it is left alone. In the second, all that is generated sees everything, so that there are more
    keys than queries."""

    models = "Cosmos 3"
    order = "text, video, sound, actions"
    lora_targets = {
        "attention": ("to_q", "to_k", "to_v", "to_out", *JOINT[4:]),
        # Some feed-forwards have a `gate_proj` too.
        "feed_forward": (
            *("mlp.up_proj", "mlp.down_proj"),
            *("mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj"),
        ),
    }
    sizes = Sizes(temporal=4, spatial=16)
    attention = Attention(
        stacks=("layers",),
        name="self_attn",
        timestep="vision_timesteps",  # (noisy tokens,)
    )
    pipelines = {
        "Cosmos3OmniPipeline": PipelineInputs(
            "cosmos3", image="image", video="video", role="continued", size=(720, 1280)
        ),
    }

    def layers(self, transformer: Model) -> Layers:
        """Layers, in which text attends to itself in a call of its own, and the video to both."""
        names = [f"layers.{i}" for i in range(transformer.config.num_hidden_layers)]
        return Layers(
            {
                r"lm_head|audio|sound|action": "none",
                r"^time|^proj_out": "noisy",
                r"add_[qkv]_proj|to_add_out|mlp_moe_gen|^proj_in": "video",
                r"^layers": "text",
            },
            {r"self_attn\.to_q$": ("text", "text")},
            pairs=dict.fromkeys(names, ("video", "video + text")),
            beside="text",
            uncounted="sound, actions and videos that control the one that is made",
        )

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        return [site._replace(call=1) for site in super().self_attentions(transformer)]

    def _heads(self, config: Config) -> tuple[int, int]:
        return config.num_attention_heads, config.head_dim

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the generated video: the last one, behind the text and control videos."""
        *controls, own = given["vision_token_shapes"]
        video = VideoShape(*own)
        others = given["sequence_length"] - video.tokens
        before = given["und_len"] + sum(math.prod(shape) for shape in controls)
        return Tokens(VideoShape(*video.grid, text=others), before)
