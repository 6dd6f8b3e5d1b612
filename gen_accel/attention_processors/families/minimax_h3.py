"""MiniMax-H3, whose text, sound and video are one packed sequence.

Its pipeline is made of blocks. Their own code lays out the sequence and the levels of its tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress, product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    Attention,
    Config,
    Family,
    Generation,
    Given,
    OriginalLayer,
    PipelineInputs,
    PublishedModel,
    Sizes,
    Training,
)
from gen_accel.attention_processors.families.latents import (
    FIRST_FRAME,
    IS_GIVEN,
    LAST_FRAME,
    LAST_IS_GIVEN,
    decoded,
    encoded,
    scaled,
    text_device,
    unscaled,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.sites import Model, outside_graphs
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import Coding, VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

_TEXT = "text_tokens"  # number of rows of a text that are no filling
# What the text encoder makes of the key frames before a text: rows (N, D) and their kinds (N,) for
# one choice of the frames after the other, and the number of rows of each choice.
_SEEN, _KINDS, _COUNTS = "picture_states", "picture_kinds", "picture_tokens"
_MOST_TEXT = 512  # tokens of a caption, of which the pipeline takes any number
_LABEL = 8  # tokens of "<Picture 1>: " and of the two marks around a picture
_KEYS = ("first", FIRST_FRAME, IS_GIVEN), ("last", LAST_FRAME, LAST_IS_GIVEN)
_BLOCK = {
    **OriginalLayer.fused("attn.qkv_proj", ("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.to_out.0": OriginalLayer("attn.out_proj"),
    "attn.norm_q": OriginalLayer("attn.q_norm"),
    "attn.norm_k": OriginalLayer("attn.k_norm"),
    # diffusers gates by the second half, the original by the first.
    "ff.net.0.proj": OriginalLayer("mlp.fc1", is_swapped=True),
    "ff.net.2": OriginalLayer("mlp.fc2"),
    "norm1": OriginalLayer("norm1"),
    "norm2": OriginalLayer("norm2"),
    "adaln_proj.linear": OriginalLayer("adaln_proj.linear"),
}
_OUTSIDE = {
    "proj_in": OriginalLayer("video_patch_proj"),
    "audio_proj_in": OriginalLayer("audio_patch_proj"),
    "context_embedder": OriginalLayer("condition_proj"),
    "time_embedder.linear_1": OriginalLayer("time_embedder.proj_in"),
    "time_embedder.linear_2": OriginalLayer("time_embedder.proj_out"),
    "norm_out.norm": OriginalLayer("final_layer.norm"),
    "norm_out.linear": OriginalLayer("final_layer.adaln_proj.linear"),
    "proj_out": OriginalLayer("final_layer.video_out"),
    "audio_proj_out": OriginalLayer("final_layer.audio_out"),
    **{
        f"token_refiner.refiner_blocks.{i}.{ours}": replace(
            one, name=f"token_refiner.blocks.{i}.{one.name}"
        )
        for i in range(2)  # as many as are published
        for ours, one in _BLOCK.items()
    },
}


def _canvas(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of MiniMax-H3's videos from a picture of this shape."""
    from diffusers.modular_pipelines.minimax_h3.modular_pipeline import resolve_canvas_size

    most = pipe.config.canvas_short_edge, pipe.config.canvas_max_pixels
    return resolve_canvas_size(width, height, pipe.canvas_multiple, *most)


class MiniMaxH3(Family):
    """One attention runs over one packed sequence: text, key frames or references, sound, and last
    the video in raster order, all else before it. The refiner of the text, which attends over the
    text alone, is left as it is. Video comes with sound, and is trained with it."""

    models = "MiniMax-H3"
    order = "text, key frames or references, sound, video"
    # 17 frames are 5 latents, and the last 3 of a clip are left out: 124 frames are 37.
    sizes = Sizes(spatial=16, frames=124, fps=24, chunks=Coding(17, 5, first=5, base=2))
    attention = Attention(text="before", rising=True)
    generation = Generation(least_steps=2, distilled=True, sound=True)
    training = Training(
        causal_vae=True,  # a chunk that is cut short is filled up with its last frame
        first_frame=True,
        last_frame=True,
        frame_noise=0.001,
        sound=True,
        needs_sound=True,
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 32,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 8,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        text_width="text_dim",
    )
    presets = {"MiniMax-H3": PublishedModel(33.1)}
    pipelines = {
        "MiniMaxH3ModularPipeline": PipelineInputs(
            "minimax_h3",
            image="image",
            last_image="last_image",
            video="references",
            alone=True,
            role="reference",
            by="minimax_h3",
            size=_canvas,
            multiple=32,
            model="MiniMaxAI/MiniMax-H3",
        )
    }
    parts = {
        "text_encoder": "qwen3-vl-32b",
        "vae": "minimax-h3-video",  # many calls of a transformer, which take long to trace
        "audio_vae": "minimax-h3-sound",
    }

    comfyui = {"transformer_blocks": ("blocks", _BLOCK), "": ("", _OUTSIDE)}

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"time|adaln|norm": "one",
                r"context_embedder|refiner": "text",
                r"audio_proj_in": "sound",
                r"^proj_in": "video",
            },
            {
                r"refiner_blocks.*attn\.to_q$": ("text", "text"),
            },
            beside="text + sound",
            default="video + text + sound",
            uncounted="the sound, and key frames or references",
        )

    @outside_graphs
    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the video, which comes after the sound, read from the positions of its
        tokens, and the runs of words, pictures and sound before it. Waits for the device."""
        start = int(given["audio_indices"].max()) + 1
        times, rows, _ = given["position_ids"][start:].unbind(1)
        in_frame = times == times[0]
        in_row = in_frame & (rows == rows[0])
        frame, width = int(in_frame.sum()), int(in_row.sum())
        grid = len(times) // frame, frame // width, width
        kinds = torch.zeros(len(given["position_ids"]), dtype=torch.int, device=times.device)
        kinds[given["video_indices"]], kinds[given["audio_indices"]] = 1, 2
        runs = kinds[:start].unique_consecutive(return_counts=True)[1]
        return Tokens(VideoShape(*grid, start, tuple(runs.tolist())), start)

    def timestep(self, given: Given) -> Tensor:
        """(1,), read at the last token, which is the video's. It rises from 0 to 1, for a clean
        video."""
        return given["timestep"][given["timestep_indices"][-1:]]

    @torch.no_grad()
    def encode_video(
        self, pipe: "DiffusionPipeline", video: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents of a video whose colours are brought to the mean and deviation of ImageNet's, as
        the pipeline brings those of its references."""
        mean, deviation = _colours(pipe, video)
        pixels = (video * 0.5 + 0.5 - mean) / deviation
        return scaled(pipe.vae, encoded(pipe, pixels, generator, self.sizes.chunks))

    def decode_video(self, pipe: "DiffusionPipeline", latents: Tensor) -> Tensor:
        pixels = decoded(pipe, unscaled(pipe.vae, latents)).float()
        mean, deviation = _colours(pipe, pixels)
        return (pixels * deviation + mean) * 2 - 1

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts, each by itself and as it is written, as the pipeline's blocks do. The
        empty one, which they refuse, is a text of no tokens.

        Returns:
            encoder_hidden_states (B, max_tokens, D), filled with zeros, in the text encoder's
            dtype, and text_tokens (B,) int64, the number of rows that are no filling.
        """
        from diffusers.modular_pipelines.minimax_h3.encoders import get_qwen3vl_prompt_embeds

        tokens, device, model = self._text(max_tokens), text_device(pipe), pipe.text_encoder
        states, lengths = [], []
        for prompt in prompts:
            ids = pipe.tokenizer(prompt, add_special_tokens=False)["input_ids"][:tokens]
            found = torch.zeros(
                1, 0, model.config.text_config.hidden_size, device=device, dtype=model.dtype
            )
            if ids:
                found = get_qwen3vl_prompt_embeds(
                    model,
                    pipe.processor,
                    ids,
                    text_encoder_layer=pipe.text_encoder_layer,
                    device=device,
                    dtype=model.dtype,
                )
            lengths.append(len(ids))
            states.append(F.pad(found, (0, 0, 0, tokens - len(ids))))
        return {
            "encoder_hidden_states": torch.cat(states),
            _TEXT: torch.tensor(lengths, device=device),
        }

    @torch.no_grad()
    def encode_heard_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        return self.encode_prompt(pipe, prompts, max_tokens)

    def _text(self, max_tokens: int | None) -> int:
        return _MOST_TEXT if max_tokens is None else max_tokens

    @torch.no_grad()
    def encode_prompt_with(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        images: Sequence["Image"],
        prompt: str,
        max_tokens: int | None = None,
    ) -> dict[str, Tensor]:
        """Encode a prompt behind the key frames, for each choice of them that a sample may be
        shown: with two frames both, the first, the last, none.

        Returns:
            As `encode_prompt`, with encoder_hidden_states (1, choices, max_tokens, D), and beside
            them the pictures' rows, see `_SEEN`.
        """
        plain = self.encode_prompt(pipe, [prompt], max_tokens)
        if not images:
            return plain
        texts, seen, kinds, counts = [], [], [], []
        words = len(pipe.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        kept, most = int(plain[_TEXT]), self._text(max_tokens)
        for shown in _choices(len(images))[:-1]:
            states, tags = _presented(pipe, [*compress(images, shown)], prompt)
            pictures = len(tags) - words
            seen.append(states[:pictures])
            kinds.append(tags[:pictures])
            counts.append(pictures)
            text = states[pictures : pictures + kept]
            texts.append(F.pad(text, (0, 0, 0, most - kept)))
        return {
            "encoder_hidden_states": torch.stack([*texts, *plain["encoder_hidden_states"]])[None],
            _TEXT: plain[_TEXT],
            _SEEN: torch.cat(seen)[None],
            _KINDS: torch.cat(kinds)[None],
            _COUNTS: torch.tensor([[*counts, 0]]),
        }

    @torch.no_grad()
    def first_frame(
        self, pipe: "DiffusionPipeline", transformer: Model, image: "Image", frames: int
    ) -> dict[str, Tensor]:
        """Latents of the frame by itself, drawn by the seed of the pipeline."""
        return {FIRST_FRAME: _key_frame(pipe, image)}

    @torch.no_grad()
    def last_frame(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        first: "Image",
        last: "Image",
        frames: int,
    ) -> dict[str, Tensor]:
        """Latents of the last frame, as of the first one."""
        return {LAST_FRAME: _key_frame(pipe, last)}

    def given_latents(self, transformer: Model) -> int:
        """None: key frames have tokens of their own, before the sound."""
        return 0

    def tiny_conditions(self, config: Config, tokens: int) -> dict[str, Tensor]:
        return super().tiny_conditions(config, tokens) | {_TEXT: torch.tensor(tokens)}

    def tiny_first_frame(
        self, transformer: Model, frames: int, height: int, width: int
    ) -> dict[str, Tensor]:
        found = super().tiny_first_frame(transformer, frames, height, width)
        return found | self._tiny_pictures(transformer, height, width, (1, 0))

    def tiny_last_frame(self, transformer: Model, height: int, width: int) -> dict[str, Tensor]:
        found = super().tiny_last_frame(transformer, height, width)
        return found | self._tiny_pictures(transformer, height, width, (2, 1, 1, 0))

    def _tiny_pictures(
        self, transformer: Model, height: int, width: int, shown: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return zeros like the pictures' rows, see `_SEEN`.

        Args:
            shown: number of pictures of each choice.
        """
        config = transformer.config
        _, rows, columns = config.patch_size  # the text encoder has a token for as many pixels
        each = _LABEL + height // rows * (width // columns)
        total = each * sum(shown)
        return {
            _SEEN: torch.zeros(total, config.text_dim),
            _KINDS: torch.zeros(total, dtype=torch.long),
            _COUNTS: each * torch.tensor(shown),
        }

    def sound_tokens(self, config: Config, frames: int, fps: float) -> int:
        """Number of the times of sound of the pipeline for a clip of this length, 40 a second,
        each of two channels."""
        from diffusers.modular_pipelines.minimax_h3.modular_pipeline import audio_latent_num_frames

        return audio_latent_num_frames(frames, fps)

    def sound_rate(self, pipe: "DiffusionPipeline") -> int:
        return pipe.audio_vae.config.sampling_rate

    @torch.no_grad()
    def encode_sound(self, pipe: "DiffusionPipeline", sound: Tensor) -> Tensor:
        """Latents of both channels side by side: the mode, as the pipeline takes it of its
        references."""
        vae = pipe.audio_vae
        weight = next(vae.parameters())
        found = vae.encode(sound[:, None].to(weight.device, weight.dtype)).latent_dist.mode()
        mean, deviation = (
            torch.tensor(x, device=found.device)
            for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        return ((found.float().transpose(1, 2) - mean) / deviation).transpose(0, 1).flatten(1)

    def tiny_sound(
        self, config: Config, frames: int, fps: float, tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros(
            self.sound_tokens(config, frames, fps), 2 * config.audio_in_channels
        ), {}

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        raise ValueError(f"{self.models} has video and sound in one sequence: give sound too")

    def predict_heard(
        self,
        transformer: Model,
        noisy: Tensor,
        sound: Tensor,
        sigma: Tensor,
        of_sound: Tensor,
        conditions: Given,
    ) -> tuple[Tensor, Tensor]:
        """Predict the velocities of video and sound in the packed sequence that the pipeline's
        blocks lay out, of each sample by itself, as levels and texts of a call are of all its
        samples. The model's own velocities lead from noise to video. Waits for the device."""
        samples = zip(noisy, sound, sigma, of_sound, strict=True)
        each = [
            self._sample(transformer, *sample, {name: x[i] for name, x in conditions.items()})
            for i, sample in enumerate(samples)
        ]
        videos, sounds = zip(*each, strict=True)
        return torch.stack(videos), torch.stack(sounds)

    def _sample(
        self,
        transformer: Model,
        noisy: Tensor,
        sound: Tensor,
        sigma: Tensor,
        of_sound: Tensor,
        conditions: Given,
    ) -> tuple[Tensor, Tensor]:
        """Predict one sample.

        Args:
            noisy: (C, f, h, w).
            sound: (times, 2 D), both channels side by side.
            sigma, of_sound: ().
        """
        from diffusers.modular_pipelines.minimax_h3 import before_denoise as blocks
        from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as tags
        from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device

        device, patch = noisy.device, tuple(transformer.config.patch_size)
        channels, *sides = noisy.shape
        keys = [one for one in _KEYS if one[1] in conditions]
        shown = tuple(bool(conditions.get(is_given, True)) for *_, is_given in keys)
        place = _choices(len(keys)).index(shown)
        kept = [*compress(keys, shown)]
        words, text = int(conditions[_TEXT]), conditions["encoder_hidden_states"]
        text = (text if text.ndim == 2 else text[place])[:words]
        text_kinds = torch.full((words,), tags.MINIMAX_H3_TEXT_TAG)
        if kept:
            counts = conditions[_COUNTS].tolist()
            seen, kinds = (conditions[x].split(counts)[place] for x in (_SEEN, _KINDS))
            text, text_kinds = torch.cat([seen, text]), torch.cat([kinds.cpu(), text_kinds])
        layout = blocks.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            text_token_tags=text_kinds,
            num_latent_frames=sides[0],
            latent_height=sides[1],
            latent_width=sides[2],
            num_audio_latents=len(sound),
            patch_size=patch,
            audio_channels=tags.MINIMAX_H3_AUDIO_CHANNELS,
            audio_tag=tags.MINIMAX_H3_AUDIO_TAG,
            video_tag=tags.MINIMAX_H3_VIDEO_TAG,
            keyframe_anchors=tuple(end for end, *_ in kept),
        )
        positions, kinds, of_video, of_audio, of_text, given, _ = layout
        times = 1 - float(sigma), 1 - float(of_sound)
        of_given = max(times[0], 1 - self.training.frame_noise), 1.0  # key frames, no references
        levels = blocks.MiniMaxH3SetTimestepsStep.build_row_timesteps(
            of_video, of_audio, given, 0, len(text), *times, *of_given
        )
        timestep, places = (x.to(device) for x in levels)
        positions = positions.to(device, maybe_adjust_dtype_for_device(positions.dtype, device))
        latents = *(conditions[name].to(noisy.dtype) for _, name, _ in kept), noisy
        rows = torch.cat([blocks.patchify_video_latents(x[None], patch) for x in latents])
        # Channel by channel, as the blocks have it.
        heard = sound.unflatten(1, (tags.MINIMAX_H3_AUDIO_CHANNELS, -1)).transpose(0, 1)
        video, audio = transformer(
            hidden_states=rows[None],
            audio_hidden_states=heard.flatten(0, 1)[None],
            encoder_hidden_states=text[None],
            timestep=timestep,
            timestep_indices=places,
            token_tags=kinds.to(device),
            position_ids=positions,
            video_indices=of_video.to(device),
            audio_indices=of_audio.to(device),
            text_indices=of_text.to(device),
            return_dict=False,
        )
        grid = [n // p for n, p in zip(sides, patch, strict=True)]
        video = video[0, given:].view(*grid, channels, *patch).permute(3, 0, 4, 1, 5, 2, 6)
        audio = audio[0].view(*heard.shape).transpose(0, 1).flatten(1)
        return -video.reshape(noisy.shape), -audio


def _colours(pipe: "DiffusionPipeline", like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of red, green and blue, from 0 to 1, of MiniMax-H3's autoencoder."""
    blocks: Any = pipe
    values = blocks.pixel_mean, blocks.pixel_std
    mean, deviation = (torch.tensor(x, device=like.device).view(1, 3, 1, 1, 1) for x in values)
    return mean, deviation


def _choices(frames: int) -> list[tuple[bool, ...]]:
    """List the choices among so many key frames, whether each is shown: all first, none last."""
    return [*product((True, False), repeat=frames)]


def _presented(
    pipe: "DiffusionPipeline", images: Sequence["Image"], prompt: str
) -> tuple[Tensor, Tensor]:
    """States (N, D) and kinds (N,) of the tokens of a prompt behind its key frames, by the block
    of the pipeline, run where the text encoder is."""
    from diffusers.modular_pipelines import PipelineState
    from diffusers.modular_pipelines.minimax_h3.encoders import MiniMaxH3FL2VATextEncoderStep

    names = "text_encoder", "tokenizer", "processor", "text_tag", "video_tag", "text_encoder_layer"
    parts: Any = SimpleNamespace(
        _execution_device=text_device(pipe), **{name: getattr(pipe, name) for name in names}
    )
    state = PipelineState()
    state.set("prompt", prompt)
    state.set("keyframes", [*images])
    MiniMaxH3FL2VATextEncoderStep()(parts, state)
    return state.values["prompt_embeds"][0], state.values["text_token_tags"]


def _key_frame(pipe: "DiffusionPipeline", image: "Image") -> Tensor:
    """Latents (C, 1, h, w) of a picture, float32 on the CPU."""
    from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition

    blocks: Any = pipe
    device = next(blocks.vae.parameters()).device
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None].to(device)
    how = blocks.pixel_mean, blocks.pixel_std, blocks.keyframe_encode_seed
    return encode_vae_condition(blocks.vae, pixels, *how)[0]
