"""LTX-2: video beside its sound, alone in self-attention or before what it is to follow."""

from functools import cache, partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2Vocoder
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from support import hunyuan, wan
from support.tiny import Case, Training
from support.tiny.ltx import poke, starts_of
from support.tiny.wan import noise
from torch import Tensor, nn

CHANNELS, SOUND_CHANNELS = 8, 4
TEXT, TEXT_WIDTH, SOUND = 9, 8, 6
RATE = 24.0


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": SOUND_CHANNELS,
        "audio_out_channels": SOUND_CHANNELS,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": TEXT_WIDTH,
    }
    return LTX2VideoTransformer3DModel(**(tiny | config)).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, frames * height * width, CHANNELS),
        "audio_hidden_states": noise(batch, SOUND, SOUND_CHANNELS, seed=3),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=4),
        "audio_encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=5),
        "timestep": torch.full((batch,), time),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [3]])[:batch],
        **{"num_frames": frames, "height": height, "width": width},
        "audio_num_frames": SOUND,
    }


def perturbed_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """With the attention of one block skipped for the second sample."""
    given = inputs(frames, height, width, **options)
    perturbed = torch.tensor([1.0, 0.0])[: len(given["hidden_states"]), None, None]
    return given | {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": perturbed}


def followed_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """With the last frame of the video as a key frame, and a video of half the size, after it.
    Coordinates tell where they are."""
    given = inputs(frames, height, width, **options)
    batch, tokens, _ = given["hidden_states"].shape
    last = 8.0 * (frames - 1)
    half = (height + 1) // 2, (width + 1) // 2
    parts = [
        coordinates(starts_of(frames), starts_of(frames + 1)[1:], height, width, 32),
        coordinates(torch.tensor([last]), torch.tensor([last + 1]), height, width, 32),
        coordinates(starts_of(frames), starts_of(frames + 1)[1:], *half, 64),
    ]
    places = torch.cat(parts, 1)
    others = places.shape[1] - tokens
    times = given["timestep"][:, None].repeat(1, tokens + others)
    times[:, tokens:] = 0
    del given["num_frames"], given["height"], given["width"]
    return given | {
        "hidden_states": torch.cat([given["hidden_states"], noise(batch, others, CHANNELS)], 1),
        "video_coords": places.repeat(batch, 1, 1, 1),
        "timestep": times,
        "audio_timestep": given["timestep"],
    }


def coordinates(starts: Tensor, ends: Tensor, height: int, width: int, side: int) -> Tensor:
    """(3, N, 2) of whole frames, in seconds and pixels.

    Args:
        starts, ends: of each latent, in frames.
        side: of a token, in pixels.
    """
    rows, columns = (float(side) * torch.arange(size) for size in (height, width))
    begin = torch.meshgrid(starts / RATE, rows, columns, indexing="ij")
    end = torch.meshgrid(ends / RATE, rows + side, columns + side, indexing="ij")
    return torch.stack([torch.stack(begin), torch.stack(end)], -1).flatten(1, 3)


@cache
def parts() -> dict[str, nn.Module]:
    """Of a pipeline, without what makes text and sound of tokens."""
    torch.manual_seed(2)
    autoencoder = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    sound = AutoencoderKLLTX2Audio(
        base_channels=SOUND_CHANNELS,
        latent_channels=SOUND_CHANNELS // 2,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        mel_bins=8,
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=TEXT_WIDTH // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=TEXT_WIDTH // 2,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )
    return {
        "vae": autoencoder.eval(),
        "audio_vae": sound.eval(),
        "connectors": connectors.eval(),
    }


def pipeline(model: Any, kind: type = LTX2Pipeline) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    others = {"text_encoder": None, "tokenizer": None, "vocoder": None}
    pipe: Any = kind(scheduler=scheduler, transformer=model, **parts(), **others)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> Tensor:
    if isinstance(pipe, LTX2ConditionPipeline):
        options["conditions"] = [
            LTX2VideoCondition(wan.picture(0), index=0, crf=0),
            LTX2VideoCondition(wan.picture(1), index=2, crf=0),
        ]
    made = pipe(
        prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=6),
        prompt_attention_mask=torch.ones(1, TEXT),
        negative_prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=7),
        negative_prompt_attention_mask=torch.ones(1, TEXT),
        height=160,
        width=224,
        num_frames=17,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **options,
    )
    return made.frames


# Where the attention of a block can be left out, as guidance has it in one more call a step.
PERTURBED = {"perturbed_attn": True, "gated_attn": True, "rope_type": "split"}

CASES = [
    Case(
        "ltx2",
        transformer,
        inputs,
        poke,
        pipeline=lambda: pipeline(transformer()),
        generate=generate,
    ),
    Case(
        "ltx2_perturbed",
        partial(transformer, **PERTURBED),
        perturbed_inputs,
        poke,
        pipeline=lambda: pipeline(transformer(**PERTURBED)),
        generate=partial(generate, stg_scale=1.0, spatio_temporal_guidance_blocks=[1]),
    ),
    Case(
        "ltx2_followed",
        transformer,
        followed_inputs,
        poke,
        pipeline=lambda: pipeline(transformer(), LTX2ConditionPipeline),
        generate=generate,
    ),
]


def texts(**config: Any) -> Any:
    """A pipeline with a text encoder, all of whose layers its connectors take."""
    llama, _ = hunyuan.text_encoders()
    made = parts()
    about = dict(made["connectors"].config)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(4)
    connectors = LTX2TextConnectors.from_config(
        about | {"text_proj_in_factor": llama.config.num_hidden_layers + 1}
    )
    pipe = pipeline(transformer(**config))
    pipe.register_modules(text_encoder=llama, tokenizer=new_tokenizer(), connectors=connectors)
    return pipe


def with_vocoder(pipe: Any) -> Any:
    """Give a pipeline a vocoder, 96 times as long as its spectrogram."""
    pipe.register_modules(
        vocoder=LTX2Vocoder(
            in_channels=2 * pipe.audio_vae.config.mel_bins,
            hidden_channels=8,
            upsample_kernel_sizes=[16, 12],
            upsample_factors=[8, 12],
        )
    )
    return pipe


def packed(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


TRAINING = [
    Training(
        "ltx2",
        texts,
        (17, 64, 96),
        {
            "guidance_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            "modality_scale": 3.0,  # calls once more without sound
            "max_sequence_length": 16,
        },
        lay=packed,
        ends=lambda latents: latents,
        rules=("position_interpolation",),
        compared=lambda given: given["isolate_modalities"],
        apart=(
            "audio_hidden_states",
            "audio_encoder_hidden_states",
            "audio_encoder_attention_mask",
            "audio_num_frames",
            "audio_coords",
            "video_coords",  # made of the sizes and the rate
            "use_cross_timestep",
        ),
        rate="frame_rate",
        is_even=False,
    )
]
