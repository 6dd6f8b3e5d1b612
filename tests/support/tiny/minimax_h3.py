"""MiniMax-H3: one packed sequence, at its end the video."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3Ref2VAPrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
    patchify_video_latents,
)
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from support.tiny import Case, Training
from support.tiny.wan import noise
from torch import Tensor
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from gen_accel.pipelines.generation.of_blocks import called
from gen_accel.pipelines.sampler import Sampler

CHANNELS, SOUND_CHANNELS = 4, 3
TEXT, TEXT_WIDTH, SOUND = 9, 8, 5
VIDEO_TAG, TEXT_TAG, SOUND_TAG = 0, 1, 2
PATCH = (1, 2, 2)
MARKS = ("image_pad", "video_pad", "vision_start", "vision_end")  # in texts of Qwen3-VL


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": CHANNELS,
        "audio_in_channels": SOUND_CHANNELS,
        "patch_size": PATCH,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "time_embed_hidden_dim": 16,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }
    return MiniMaxH3Transformer3DModel(**(tiny | config)).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
    anchors: tuple[str, ...] = (),
) -> dict[str, Any]:
    """In the layout of diffusers' own blocks.

    Args:
        anchors: "first" and "last" for key frames there.
    """
    size = common(frames, height, width)
    build = MiniMaxH3PrepareLayoutStep.build_packed_sequence
    return packed(build(**size, keyframe_anchors=anchors), batch, time)


def reference_inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    """With a picture, a sound, and a video with sound for references, in this order."""
    kinds = {"image": False, "audio": True, "video": True}
    seen = [torch.zeros(1, CHANNELS, 1, 4, 6), torch.zeros(1, CHANNELS, 2, 6, 4)]
    layout = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        references=[SimpleNamespace(kind=kind, has_audio=has) for kind, has in kinds.items()],
        condition_latents=seen,
        audio_condition_latents=[torch.zeros(6, SOUND_CHANNELS), torch.zeros(8, SOUND_CHANNELS)],
        **common(frames, height, width),
    )
    return packed(layout, batch, time)


def common(frames: int, height: int, width: int) -> dict[str, Any]:
    """What both layouts are made of."""
    return {
        "text_token_tags": torch.full((TEXT,), TEXT_TAG),
        "num_latent_frames": frames,
        "latent_height": 2 * height,
        "latent_width": 2 * width,
        "num_audio_latents": SOUND,
        "patch_size": PATCH,
        "audio_channels": 2,
        "audio_tag": SOUND_TAG,
        "video_tag": VIDEO_TAG,
    }


def packed(layout: tuple, batch: int, time: float) -> dict[str, Any]:
    """Arguments of a forward pass for a layout of diffusers' blocks."""
    positions, tags, video, sound, text, key_frames, references = layout
    now = 1 - time / 1000
    times, places = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        video, sound, key_frames, references, TEXT, now, now / 2, 0.95, 1.0
    )
    return {
        "hidden_states": noise(batch, len(video), 4 * CHANNELS),
        "audio_hidden_states": noise(batch, len(sound), SOUND_CHANNELS, seed=3),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=4),
        "timestep": times,
        "timestep_indices": places,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
    }


def key_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Between two key frames."""
    return inputs(frames, height, width, anchors=("first", "last"), **options)


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """The layout is that of all samples."""
    own = slice(number, number + 1)
    return {name: x[own] if "hidden_states" in name else x for name, x in given.items()}


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    """What comes before the sound is no part of the grid."""
    first = int(given["audio_indices"][-1]) + 1
    times, rows, _ = given["position_ids"][first:].unbind(1)
    in_frame = times == times[0]
    side = int((in_frame & (rows == rows[0])).sum())
    token = frame * int(in_frame.sum()) + row * side + column
    given["hidden_states"][0, token - len(times)] += 1


def pipeline() -> Any:
    """Its blocks that denoise."""
    blocks = {"timesteps": MiniMaxH3SetTimestepsStep(), "denoise": MiniMaxH3DenoiseStep()}
    pipe: Any = MiniMaxH3ModularPipeline(SequentialPipelineBlocks.from_blocks_dict(blocks))
    pipe.update_components(
        transformer=transformer(),
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, make: Callable[..., dict[str, Any]]) -> Tensor:
    given = make(3, 5, 7, batch=1)
    names = "token_tags", "position_ids", "video_indices", "audio_indices", "text_indices"
    layout = {name: given[name] for name in names}
    return pipe(
        latents=given["hidden_states"][0].clone(),
        audio_latents=given["audio_hidden_states"][0].clone(),
        prompt_embeds=given["encoder_hidden_states"],
        denoiser_input_fields=layout,
        **{name: x for name, x in layout.items() if name.endswith("indices")},
        num_condition_video_rows=len(given["video_indices"]) - 3 * 5 * 7,
        num_condition_audio_rows=0,
        num_inference_steps=3,  # its last sigma, which is 0, counted
        output="latents",
    )


def text_encoder() -> Any:
    """With one layer more than the 50 whose output conditions."""
    torch.manual_seed(1)
    language = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 51,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 200,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    ids = words().convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=language,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def words() -> Any:
    found: Any = new_tokenizer()
    found.add_special_tokens({"additional_special_tokens": [f"<|{one}|>" for one in MARKS]})
    return found


def whole_parts() -> dict[str, Any]:
    """Parts of the pipeline, of their own classes."""
    torch.manual_seed(2)
    vae = AutoencoderKLMiniMaxH3(
        block_out_channels=(4, 4, 4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
    )
    audio_vae = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2,
        latent_dim=32,
        num_attention_heads=2,
        decoder_dim=128,
        latents_mean=[0.0] * 32,
        latents_std=[1.0] * 32,
    )
    tokenizer = words()
    pictures = Qwen2VLImageProcessor(patch_size=16, merge_size=2, min_pixels=1024, max_pixels=4096)
    return {
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer,
        "processor": Qwen3VLProcessor(pictures, tokenizer, Qwen3VLVideoProcessor()),
        "vae": vae.eval(),
        "audio_vae": audio_vae.eval(),
        "scheduler": MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": MiniMaxH3Scheduler(shift=3.0),
        "transformer": transformer(in_channels=24, audio_in_channels=32),
    }


CANVAS = {
    "canvas_short_edge": 64,
    "canvas_max_pixels": 64 * 96,
    "reference_image_short_edge": 64,
}


def whole_pipeline() -> Any:
    """All blocks of MiniMax-H3, for small canvases."""
    pipe: Any = MiniMaxH3ModularPipeline()
    other = transformer(in_channels=24, audio_in_channels=32, num_refiner_layers=2)
    pipe.update_components(**whole_parts(), transformer_ref=other, **CANVAS)
    return pipe


def training() -> Any:
    """As `load` makes it, with as many steps as are asked for."""
    pipe: Any = called(MiniMaxH3ModularPipeline).of_parts(CANVAS, whole_parts())
    for name in ("scheduler", "audio_scheduler"):
        setattr(pipe, name, Sampler().scheduler(getattr(pipe, name)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows(latents: Tensor) -> Tensor:
    return patchify_video_latents(latents, PATCH)


def coloured(pixels: Tensor) -> Tensor:
    """By mean and deviation of ImageNet's pictures."""
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, deviation = (torch.tensor(x).view(3, 1, 1, 1) for x in (mean, deviation))
    return (pixels * 0.5 + 0.5 - mean) / deviation


def heard(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sound with both channels side by side, and its noise level."""
    left, right = given["audio_hidden_states"].chunk(2, dim=1)
    level = 1 - given["timestep"][given["timestep_indices"][given["audio_indices"][:1]]].double()
    return torch.cat([left, right], -1), level


TRAINING = [
    Training(
        "minimax_h3",
        training,
        (124, 64, 64),
        level=lambda timestep: 1 - timestep[:1].double(),  # the sound's is nearer to the end
        lay=rows,
        starts=lambda latents: latents,
        ends=lambda latents: latents,
        fed=lambda latents: rows(latents)[None],
        said=lambda predicted: -rows(predicted)[None],
        rules=(),
        is_even=False,
        coloured=coloured,
        heard=heard,
    )
]


CASES = [
    Case(
        name,
        transformer,
        make,
        poke,
        row=row,
        pipeline=pipeline,
        generate=partial(generate, make=make),
    )
    for name, make in (("minimax_h3", inputs), ("minimax_h3_key_frames", key_inputs))
]
CASES.append(Case("minimax_h3_references", transformer, reference_inputs, poke, row=row))
