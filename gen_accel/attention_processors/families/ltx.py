"""LTX-Video, and LTX-2, video with sound.

Tokens are the video's, in raster order; text is seen by cross-attention. They come as a row, with
the sizes of their grid, or with the time and place of each. Rotary positions are in seconds and
pixels. Their frequencies lie densely over the width of the model, so that each head has others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    FEED_FORWARD,
    SEPARATE,
    Arguments,
    Attention,
    Config,
    Family,
    Generation,
    Given,
    ImagePrompts,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
)
from gen_accel.attention_processors.families.latents import (
    FIRST_FRAME,
    LAST_FRAME,
    LAST_IS_GIVEN,
    decoded,
    in_place,
    pixels_of,
    unguided,
    unscaled,
)
from gen_accel.attention_processors.families.layers import CROSS, Layers
from gen_accel.attention_processors.families.rotary import (
    Table,
    precise,
    stock_rotary,
    turned_pairs,
)
from gen_accel.attention_processors.families.sites import Model, outside_graphs
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

_SMALL = 16  # channels of the tiny model
# Samples of a spectrum, and the least volume of a band, of the published sound: `AudioProcessor`
# of ltx_core/model/audio_vae/ops.py (https://github.com/Lightricks/LTX-2).
_SPECTRUM, _SILENCE = 1024, 1e-5
_HEARD = "audio_encoder_hidden_states"  # argument for the text of the sound


class LTXBlocks(Family):
    """Blocks with attention to the grid, and then to the text; latents are a row of tokens."""

    sizes = Sizes(temporal=8, spatial=32)
    attention = Attention(name="attn1", heads_alike=False)

    def context_parallel(self, transformer: Model) -> None:
        raise ValueError(
            "the mask of its text is made for all heads, while a process attends for some"
        )

    def decode_video(self, pipe: "DiffusionPipeline", latents: Tensor) -> Tensor:
        """Pixels of latents. An autoencoder that also removes noise is told that there is none, as
        the pipelines tell it by default."""
        vae, time = pipe.vae, None
        if vae.config.timestep_conditioning:
            time = torch.zeros(len(latents), device=latents.device)
        return decoded(pipe, unscaled(vae, latents), time)

    def _sizes(self, transformer: Model, given: Given) -> tuple[int, int, int] | None:
        """Sizes of the grid that the pipeline passes; None if it passes coordinates.

        Raises:
            ValueError: it passes neither.
        """
        frames, height, width = (given.get(name) for name in ("num_frames", "height", "width"))
        if frames is not None and height is not None and width is not None:
            return frames, height, width
        if given.get("video_coords") is None:
            raise ValueError(
                f"num_frames, height and width, or video_coords, must be given to "
                f"{type(transformer).__name__}, got {(frames, height, width)}: without them the "
                "grid of its tokens is unknown"
            )
        return None

    def turned(
        self, transformer: Model, keys: Tensor, frames: int, fps: Tensor | None = None
    ) -> Tensor:
        rope, (_, heads, _, dim) = stock_rotary(transformer), keys.shape
        pairs = torch.arange(rope.dim // 6) * 3 + rope.dim % 6 // 2  # after what is left over
        first, apart = 2 * pairs, 1
        if getattr(rope, "rope_type", "") == "split":  # a head's first numbers, then its second
            first, apart = pairs // (dim // 2) * dim + pairs % (dim // 2), dim // 2
        angles = frames * self.temporal_frequencies(transformer)
        if fps is not None:
            angles = angles * (self.sizes.fps / fps.double().view(-1, 1, 1))
        flat = turned_pairs(keys.transpose(1, 2).flatten(2), first, first + apart, angles)
        return flat.unflatten(2, (heads, dim)).transpose(1, 2)


def _frequencies(rope: Model) -> Tensor:
    """(pairs,) float64: rad per half of the range that positions are divided by."""
    spread = torch.linspace(0, 1, rope.dim // 6, dtype=torch.float64)
    return rope.theta**spread * math.pi / 2


class LTX(LTXBlocks):
    """Conditioning frames may stand before or after the video, if the places of tokens are given:
    whole frames at times of the grid, but no part of it."""

    models = "LTX-Video"
    order = "video, with other frames before or after it where they condition it"
    # As many frames as its model card advises at most; the rate of its pipelines.
    sizes = Sizes(temporal=8, spatial=32, frames=257, fps=25, text=128)
    image_prompts = ImagePrompts("batched", "transformer_blocks.attn2", "ltx")
    generation = Generation(axes="tokens last")
    training = Training(
        causal_vae=True,
        takes_fps=True,
        takes_mask=True,
        first_frame=True,
        last_frame=True,
        tiny={
            "in_channels": _SMALL,
            "out_channels": _SMALL,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 8,
        },
        text_width="caption_channels",
    )
    presets = {"LTX-Video": PublishedModel(1.92)}
    pipelines = {
        "LTXPipeline": PipelineInputs("ltx", model="Lightricks/LTX-Video"),
        "LTXImageToVideoPipeline": PipelineInputs(
            "ltx", text=False, image="image", multiple=32, model="Lightricks/LTX-Video"
        ),
        "LTXConditionPipeline": PipelineInputs(
            "ltx",
            image="conditions",
            last_image="conditions",
            video="conditions",
            strength="denoise_strength",
            alone=True,
            role="continued",
            by="ltx",
            multiple=32,
            model="Lightricks/LTX-Video-0.9.5",
        ),
        "LTXI2VLongMultiPromptPipeline": "its windows have prompts of their own",
    }
    parts = {"text_encoder": "t5-v1.1-xxl", "vae": "AutoencoderKLLTXVideo"}
    comfyui = {"transformer_blocks": ("transformer_blocks", None)}

    def layers(self, transformer: Model) -> Layers:
        return CROSS._replace(uncounted="frames that condition the video")

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        channels, like = transformer.config.in_channels, self._like(transformer)
        return super().inputs(transformer, video, text, batch) | {
            "hidden_states": torch.zeros(batch, video.video_tokens, channels, **like),
            "num_frames": video.frames,
            "height": video.height,
            "width": video.width,
        }

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """Grid from the coordinates that the pipeline passes, else from its sizes. Reading
        coordinates waits for the device.

        Raises:
            ValueError: it passes neither, or coordinates that form no grid.
        """
        coords = given.get("video_coords")
        if coords is not None:
            return _in_coordinates(coords)
        sizes = self._sizes(transformer, given)
        assert sizes is not None
        return Tokens(VideoShape(*sizes))

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        """Unknown frames: cross-attention has the queries of further frames too."""
        if self.tokens(transformer, given).video.text:
            return "LTX-Video is given further frames beside those of the video"
        return None

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict the velocity of frames whose rotary positions in time are made of `fps` (B,).

        A last frame stands before the video, with the place of its last frame, as in
        `LTXConditionPipeline`. If some samples have none, each is predicted by itself.
        """
        from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

        time, told, patch = sigma * 1000, dict(conditions), transformer.config.patch_size
        if (is_ended := told.pop(LAST_IS_GIVEN, None)) is not None:
            each = [{name: x[i : i + 1] for name, x in told.items()} for i in range(len(noisy))]
            for one, ended in zip(each, is_ended.tolist(), strict=True):
                one |= {} if ended else {LAST_FRAME: one[LAST_FRAME][:, :, :0]}
            samples = zip(noisy.split(1), sigma.split(1), each, strict=True)
            return torch.cat([self.predict(transformer, *sample) for sample in samples])
        patches = {"patch_size": patch, "patch_size_t": transformer.config.patch_size_t}
        frames, height, width = noisy.shape[2:]
        grid = {
            "num_frames": frames // patches["patch_size_t"],
            "height": height // patch,
            "width": width // patch,
        }
        if FIRST_FRAME in told:
            noisy, times, told = in_place(noisy, time, told)
            time = times.repeat_interleave(grid["height"] * grid["width"], 1)
        fps = told.pop("fps", torch.full_like(sigma, self.sizes.fps)).float()
        places: Arguments = {
            **grid,
            "rope_interpolation_scale": (8 / fps.view(-1, 1, 1, 1, 1), 32, 32),
        }
        tokens = own = LTXPipeline._pack_latents(noisy, **patches)
        if (last := told.pop(LAST_FRAME, None)) is not None:
            if last.shape[2]:
                end = LTXPipeline._pack_latents(last.to(noisy.dtype), **patches)
                tokens = torch.cat([end, own], 1)
                time = torch.cat([time.new_zeros(end.shape[:2]), time], 1)
            places = {"video_coords": _coordinates(last.shape[2], noisy, patches, fps)}
        said = transformer(tokens, timestep=time, **told, **places, return_dict=False)[0]
        return LTXPipeline._unpack_latents(said[:, -own.shape[1] :], **grid, **patches)

    @torch.no_grad()
    def last_frame(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        first: "Image",
        last: "Image",
        frames: int,
    ) -> dict[str, Tensor]:
        """Latents of the last frame alone, (C, 1, h, w): the mode, while the pipeline draws."""
        return {LAST_FRAME: self.encode_video(pipe, pixels_of(pipe, last))[0]}

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        """Frequencies over all heads, per latent frame at the rate of the pipelines. At another
        rate they change as the model's own do."""
        rope = stock_rotary(transformer)
        a_second = 2 * _frequencies(rope) / rope.base_num_frames  # the grid goes from -1
        return a_second * 8 * transformer.config.patch_size_t / self.sizes.fps

    def _rotary_numbers(self, transformer: Model, freqs: Tensor) -> Sequence:
        """Pairs that are not the model's own, and in rad per half of the range its frequencies and
        theirs."""
        own = self.temporal_frequencies(transformer)
        ratios = freqs / own
        changed = (ratios != 1).nonzero().flatten()
        stock = _frequencies(stock_rotary(transformer))[changed]
        return changed.tolist(), stock.tolist(), (stock * ratios[changed]).tolist()

    def _rotary_table(
        self,
        stock: Model,
        numbers: Sequence,
        hidden_states: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: object = None,
        video_coords: Tensor | None = None,
    ) -> Table:
        sizes = num_frames, height, width, rope_interpolation_scale
        cos, sin = stock(hidden_states, *sizes, video_coords)
        if video_coords is None:
            batch, device = hidden_states.shape[0], hidden_states.device
            time = stock._prepare_video_coords(batch, *sizes, device)[..., 0]
        else:
            time = video_coords[:, 0] / stock.base_num_frames
        pairs, real = numbers[0], precise(cos)
        own, made = (torch.tensor(x, **real) for x in numbers[1:])
        angles = (2 * time[..., None].to(**real) * made - own).repeat_interleave(2, -1)
        # Pairs come axis by axis, after columns that are left over.
        first = stock.dim % 6 + 6 * torch.tensor(pairs, device=cos.device)
        columns = torch.stack([first, first + 1], 1).flatten()
        return (
            cos.index_copy(-1, columns, angles.cos().to(cos.dtype)),
            sin.index_copy(-1, columns, angles.sin().to(sin.dtype)),
        )


def _coordinates(ended: int, noisy: Tensor, patches: Mapping[str, int], fps: Tensor) -> Tensor:
    """Seconds, rows and columns (B, 3, N) of the tokens of a last frame, if there is one, and then
    of the video, as `LTXConditionPipeline` has them.

    Args:
        ended: latents of the last frame, 1 or 0.
        noisy: (B, C, f, h, w).
        fps: (B,).
    """
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline as Pipeline

    found, (batch, _, frames, *sides) = [], noisy.shape
    parts = [(frames, 0)]
    if ended:
        parts.insert(0, (ended, 8 * (frames - 1)))
    for count, begin in parts:
        ids = Pipeline._prepare_video_ids(batch, count, *sides, **patches, device=noisy.device)
        found.append(Pipeline._scale_video_ids(ids, frame_index=begin))
    coords = torch.cat(found, 2).float()
    coords[:, 0] *= 1 / fps[:, None]
    return coords


@outside_graphs
def _in_coordinates(video_coords: Tensor) -> Tokens:
    """Find the video among whole frames of one size. The video begins at time 0, and lasts as long
    as the time rises from frame to frame. Waits for the device.

    Args:
        video_coords: (B, 3, N), time, row and column of each token in any units.
    """
    times, rows, columns = video_coords[0]
    height, width = len(rows.unique()), len(columns.unique())
    starts = times[:: height * width].tolist()
    if len(times) % (height * width) or 0 not in starts:
        raise ValueError(
            "video_coords must be those of whole frames, the first of the video at time 0, got "
            f"{len(times)} tokens of {height} rows and {width} columns from times {starts}"
        )
    first = starts.index(0)
    last = first + 1
    while last < len(starts) and starts[last] > starts[last - 1]:
        last += 1
    others = (len(starts) - (last - first)) * height * width
    return Tokens(VideoShape(last - first, height, width, others), first * height * width)


_BETWEEN = "audio_to_video_attn", "video_to_audio_attn"


class LTX2(LTXBlocks):
    """Behind the video's tokens come the tokens of key frames and reference videos, of any size.
    Self-attention of the sound, and cross-attention between video, sound and text, are left as
    they are. Image prompts are added to the cross-attention of the video and its references to the
    text. A mask between the video and its references, which LTX-2's pipeline has for strengths
    below 1, is refused."""

    models = "LTX-2"
    order = "video, with key frames and other videos after it where they condition it"
    lora_targets = {  # the video's alone
        "attention": tuple(f"{a}.{name}" for a in ("attn1", "attn2") for name in SEPARATE),
        "feed_forward": FEED_FORWARD,
        "sound": (
            *(
                f"{a}.{name}"
                for a in ("audio_attn1", "audio_attn2", *_BETWEEN)
                for name in SEPARATE
            ),
            *(f"audio_{name}" for name in FEED_FORWARD),
        ),
    }
    # 20 s, in which its positions are counted, and the longest that its pipelines choose
    # themselves; the rate of the pipelines.
    sizes = Sizes(temporal=8, spatial=32, frames=481, fps=24, text=1024)
    image_prompts = replace(LTX.image_prompts, adapters="ltx2")
    generation = Generation(
        axes="tokens first",
        sound=True,
        unguided={
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
        },
    )
    training = Training(
        causal_vae=True,
        takes_fps=True,
        takes_mask=True,
        text_parts=("text_encoder", "connectors"),
        sound=True,
        tiny={
            "in_channels": _SMALL,
            "out_channels": _SMALL,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "caption_channels": 8,
        },
        text_width="caption_channels",
    )
    presets = {"LTX-2": PublishedModel(18.9)}
    pipelines = {
        "LTX2Pipeline": PipelineInputs("ltx2", model="Lightricks/LTX-2"),
        "LTX2ImageToVideoPipeline": PipelineInputs(
            "ltx2", text=False, image="image", multiple=32, model="Lightricks/LTX-2"
        ),
        "LTX2ConditionPipeline": PipelineInputs(
            "ltx2",
            image="conditions",
            last_image="conditions",
            video="conditions",
            alone=True,
            role="continued",
            by="ltx2",
            multiple=32,
            model="Lightricks/LTX-2",
        ),
        "LTX2DFRPipeline": PipelineInputs("ltx2 dfr"),
        "LTX2DFRTemporalRefinePipeline": "it goes on from latents of another pipeline",
        "LTX2HDRPipeline": (
            "it makes a video of another one for high dynamic range, in linear light"
        ),
        "LTX2InContextPipeline": PipelineInputs("ltx2 in context"),
    }
    comfyui = LTX.comfyui

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"time_embed|^av_cross_attn|^prompt_adaln": "one",
                r"caption_projection|attn2\.to_[kv]$": "text",
                r"video_to_audio_attn\.to_[kv]$": "video",
                r"audio_to_video_attn\.to_[kv]$": "sound",
                r"audio_to_video_attn": "video",
                r"audio": "sound",
            },
            {
                r"\.attn2\.to_q$": ("video", "text"),
                r"audio_attn2\.to_q$": ("sound", "text"),
                r"audio_attn1\.to_q$": ("sound", "sound"),
                r"audio_to_video_attn\.to_q$": ("video", "sound"),
                r"video_to_audio_attn\.to_q$": ("sound", "video"),
            },
            uncounted="the sound, and what conditions the video",
        )

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """Grid from the sizes that the pipeline passes, else from its coordinates, for which this
        waits for the device.

        Raises:
            ValueError: it passes neither.
        """
        grid = self._sizes(transformer, given) or _grid_in(given["video_coords"])
        frames, rows, columns = grid
        others = given["hidden_states"].shape[1] - frames * rows * columns
        return Tokens(VideoShape(*grid, text=others))

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        """Unknown frames: cross-attention has the queries of further frames too."""
        if given.get("video_keyframes_mask") is not None:
            return "LTX-2's pipelines of distilled models run tile after tile"
        if self.tokens(transformer, given).video.text:
            return "LTX-2 is given key frames or videos beside the one that it makes"
        return None

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts: what the pipelines' connectors make for the video of the text
        encoder's layers.

        Args:
            max_tokens: a multiple of the connectors' registers.

        Returns:
            encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype, and
            encoder_attention_mask (B, max_tokens) int64, 0 for padding.
        """
        found = self.encode_heard_prompt(pipe, prompts, max_tokens)
        return {name: x for name, x in found.items() if name != _HEARD}

    @torch.no_grad()
    def encode_heard_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts as `encode_prompt`, with audio_encoder_hidden_states too, (B,
        max_tokens, D), what the connectors make for the sound."""
        states, seen, _, _ = unguided(pipe, prompts, self._text(max_tokens))
        side = pipe.tokenizer.padding_side
        of_video, of_sound, mask = pipe.connectors(states, seen, padding_side=side)
        return {
            "encoder_hidden_states": of_video,
            "encoder_attention_mask": mask,
            _HEARD: of_sound,
        }

    def sound_tokens(self, config: Config, frames: int, fps: float) -> int:
        """Number of sound tokens of the pipelines for a clip of this length, 25 a second."""
        samples = config.audio_hop_length * float(config.audio_scale_factor)
        return round(frames / fps * (config.audio_sampling_rate / samples))

    def sound_rate(self, pipe: "DiffusionPipeline") -> int:
        return pipe.audio_vae.config.sample_rate

    @torch.no_grad()
    def encode_sound(self, pipe: "DiffusionPipeline", sound: Tensor) -> Tensor:
        """Latents of the sound's log-mel spectrogram, a token for each of their times: the mode.
        The spectrogram is that of Lightricks' `AudioProcessor`; diffusers has none."""
        vae = pipe.audio_vae
        weight = next(vae.parameters())
        mel = _log_mel(sound, vae.config).to(weight.device, weight.dtype)
        latents = pipe._pack_audio_latents(vae.encode(mel[None]).latent_dist.mode().float())
        return pipe._normalize_audio_latents(latents, vae.latents_mean, vae.latents_std)[0]

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict the velocity of the video without its sound.

        With `isolate_modalities`, no layer reads sound into the video, as in the pipelines' own
        call for the guidance of one by the other. Clips thus need no sound, and the attention
        between the two stays as it is. Sound is one token of silence, which the video does not
        depend on. The rotary positions in time are made of `fps` (B,).
        """
        config, batch = transformer.config, len(noisy)
        silence = noisy.new_zeros(batch, 1, config.audio_in_channels)
        told = {**conditions, _HEARD: noisy.new_zeros(batch, 1, _width_of_text(config))}
        return self._both(transformer, noisy, silence, sigma, told, isolate_modalities=True)[0]

    def predict_heard(
        self,
        transformer: Model,
        noisy: Tensor,
        sound: Tensor,
        sigma: Tensor,
        of_sound: Tensor,
        conditions: Given,
    ) -> tuple[Tensor, Tensor]:
        """Predict the velocities of video and sound at one noise level, as the pipelines do: that
        of the sound is `sigma` too."""
        mask = conditions["encoder_attention_mask"]
        told = {**conditions, "audio_encoder_attention_mask": mask}
        return self._both(transformer, noisy, sound.to(noisy.dtype), sigma, told)

    def _both(
        self,
        transformer: Model,
        noisy: Tensor,
        sound: Tensor,
        sigma: Tensor,
        told: Given,
        *,
        isolate_modalities: bool = False,
    ) -> tuple[Tensor, Tensor]:
        given, (frames, height, width) = dict(told), noisy.shape[2:]
        fps = given.pop("fps", torch.full_like(sigma, self.sizes.fps))
        velocity, heard = transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            audio_hidden_states=sound,
            timestep=sigma * 1000,
            sigma=sigma * 1000,
            num_frames=frames,
            height=height,
            width=width,
            fps=fps.view(-1, 1, 1),
            audio_num_frames=sound.shape[1],
            isolate_modalities=isolate_modalities,
            **given,
            return_dict=False,
        )
        return velocity.transpose(1, 2).unflatten(2, noisy.shape[2:]), heard

    def tiny_sound(
        self, config: Config, frames: int, fps: float, tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count = self.sound_tokens(config, frames, fps)
        text = torch.zeros(tokens, _width_of_text(config))
        return torch.zeros(count, config.audio_in_channels), {_HEARD: text}

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        """Frequencies over all heads, per latent frame at the rate of the pipelines. At another
        rate they change as the model's own do. The positions by which video and sound find each
        other stay in seconds."""
        return self._a_frame(transformer) * _frequencies(stock_rotary(transformer))

    def _a_frame(self, transformer: Model) -> float:
        """Distance of two latent frames, in halves of the range of positions."""
        rope = stock_rotary(transformer)
        seconds = rope.scale_factors[0] * rope.patch_size_t / self.sizes.fps
        return 2 * seconds / rope.base_num_frames

    def _rotary_numbers(self, transformer: Model, freqs: Tensor) -> Sequence:
        """Its own frequencies and the others, in rad per half of the range of positions."""
        own = _frequencies(stock_rotary(transformer))
        return own.tolist(), (freqs / self._a_frame(transformer)).tolist()

    def _rotary_table(
        self, stock: Model, numbers: Sequence, coords: Tensor, device: torch.device | None = None
    ) -> Table:
        """
        Args:
            coords: (B, 3, N, 2), where each token begins and ends in seconds, rows and columns; or
                (B, 3, N), its middle.
        """
        cos, sin = stock(coords, device=device)
        real = precise(cos)
        own, freqs = (torch.tensor(x, **real) for x in numbers)
        seconds = coords[:, 0].mean(-1) if coords.ndim == 4 else coords[:, 0]
        place = 2 * seconds.to(**real) / stock.base_num_frames
        angles = place[..., None] * freqs - own  # as the model's positions, which begin at -1
        return (
            _with_time(stock, cos, angles.cos().to(cos.dtype)),
            _with_time(stock, sin, angles.sin().to(sin.dtype)),
        )


def _width_of_text(config: Config) -> int:
    """Width of the text of the sound."""
    if config.use_prompt_embeddings:
        return config.caption_channels
    return config.audio_num_attention_heads * config.audio_attention_head_dim


def _log_mel(sound: Tensor, config: Config) -> Tensor:
    """Logarithms of the volume in each band, (channels, times, bands), of sound (channels, N)."""
    from transformers.audio_utils import mel_filter_bank

    rate, window = config.sample_rate, torch.hann_window(_SPECTRUM, device=sound.device)
    how = {"window": window, "center": True, "pad_mode": "reflect", "return_complex": True}
    spectrum = torch.stft(sound, _SPECTRUM, config.mel_hop_length, **how).abs()
    bands = mel_filter_bank(
        _SPECTRUM // 2 + 1, config.mel_bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    loud = spectrum.transpose(1, 2) @ torch.from_numpy(bands).to(spectrum)
    return loud.clamp(min=_SILENCE).log()


@outside_graphs
def _grid_in(video_coords: Tensor) -> tuple[int, int, int]:
    """Grid of the video, whose tokens come first. It lasts as long as each frame begins where the
    one before ends. Waits for the device.

    Args:
        video_coords: (B, 3, N, 2), where each token begins and ends in time, rows and columns.
    """
    (times, rows, _), (ends, _, _) = video_coords[0].unbind(-1)
    same_time = times == times[0]
    same_row = same_time & (rows == rows[0])
    onwards = F.pad(rows.diff() >= 0, (1, 0), value=True)
    width = int(same_row.cumprod(0).sum())
    tokens = int((same_time & onwards).cumprod(0).sum())
    starts, ends = times[::tokens].tolist(), ends[::tokens].tolist()
    frames = 1
    while frames < len(times) // tokens and starts[frames] == ends[frames - 1]:
        frames += 1
    return frames, tokens // width, width


def _with_time(stock: Model, table: Tensor, values: Tensor) -> Tensor:
    """Write the values of the time axis into a table of cosines or sines.

    Args:
        table: (B, N, dim) for an interleaved `rope_type`, the two numbers of a pair side by side;
            (B, heads, N, head dim / 2) for a split one. Of each three pairs the first is of time,
            after padding in front.
        values: (B, N, pairs).
    """
    split = stock.rope_type == "split"
    flat = (table.transpose(1, 2).flatten(2) if split else table).clone()
    numbers = 1 if split else 2  # of a pair
    padding = flat.shape[-1] - 3 * numbers * values.shape[-1]
    for place in range(numbers):
        flat[..., padding + place :: 3 * numbers] = values
    return flat.unflatten(2, (stock.num_attention_heads, -1)).transpose(1, 2) if split else flat
