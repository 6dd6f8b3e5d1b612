"""A pipeline's own arguments, and those that a length asks for."""

import re

import numpy as np
import pytest
import torch
from diffusers import (
    AnyFlowFARPipeline,
    HeliosPipeline,
    HunyuanVideoFramepackPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    WanPipeline,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import (
    FramepackSamplingType,
)
from support import wan
from support.tiny import anyflow_far, framepack, helios, skyreels

from gen_accel import Dense
from gen_accel.measure import read_video
from gen_accel.measure.clip_settings import read_settings
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.inputs import in_length, own_arguments

PROMPT = "a red square moves right"
FORCING = SkyReelsV2DiffusionForcingPipeline


@pytest.mark.parametrize(
    ("kind", "words", "found"),
    [
        (
            FORCING,
            ["ar_step=5", "addnoise_condition=20"],
            {"ar_step": 5, "addnoise_condition": 20},
        ),
        (AnyFlowFARPipeline, ["chunk_partition=[1,3]"], {"chunk_partition": [1, 3]}),
        (AnyFlowFARPipeline, ["use_mean_velocity=false"], {"use_mean_velocity": False}),
        (
            HunyuanVideoFramepackPipeline,
            ["sampling_type=vanilla"],
            {"sampling_type": FramepackSamplingType.VANILLA},
        ),
    ],
)
def test_arguments_are_read_by_the_signature(kind, words, found):
    assert own_arguments(kind, words) == found


@pytest.mark.parametrize(
    ("kind", "word", "said"),
    [
        (FORCING, "ar_stp=5", "got 'ar_stp=5'; did you mean 'ar_step'?"),
        (FORCING, "ar_step=", "must be int, got ''"),
        (FORCING, "ar_step=x", "ar_step of SkyReelsV2DiffusionForcingPipeline must be int, got"),
        (FORCING, "num_frames=9", "that other options set: overlap_history, addnoise_condition,"),
        (HeliosPipeline, "history_sizes=5", "history_sizes of HeliosPipeline must be list, got"),
        (
            AnyFlowFARPipeline,
            f"chunk_partition={'[' * 9999}",
            "must be a list of int or none, got",
        ),
        (WanPipeline, "guidance_scale_2=NaN", "guidance_scale_2 of WanPipeline must be"),
        (AnyFlowFARPipeline, "chunk_partition=[1.5]", "must be a list of int or none, got"),
        (HunyuanVideoFramepackPipeline, "sampling_type=x", "must be vanilla or inverted_anti_"),
        (WanPipeline, "latents=3", "got 'latents=3'"),
    ],
)
def test_what_is_no_argument_is_refused(kind, word, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        own_arguments(kind, [word])


def forcing():
    return wan.pipeline(FORCING, transformer=skyreels.transformer())


def length(pipe, frames, **own):
    found = in_length(pipe, frames, None, own)
    return ({}, ()) if found is None else (found.values, found.told)


def test_lengths_that_are_not_made_are_said_and_long_ones_have_what_they_need():
    far = anyflow_far.pipeline()
    assert length(far, 29) == ({}, ())
    assert length(far, 21) == ({"chunk_partition": [1, 2, 2, 1]}, ())
    assert length(far, 21, chunk_partition=[2, 4]) == ({"chunk_partition": [2, 4]}, ())
    begun = {"video": torch.zeros(1, 9, 3, 8, 8)}
    assert length(far, 29, **begun)[0]["chunk_partition"] == [1, 2, 2, 2, 1]
    begun = {"video": torch.zeros(1, 13, 3, 8, 8)}
    assert "chunk_partition" not in length(far, 29, **begun)[0]
    with pytest.raises(ValueError, match="makes 5 frames at least, got 1"):
        length(far, 1)
    assert length(forcing(), 97) == ({}, ())
    assert length(forcing(), 101) == ({"overlap_history": 17}, ())
    assert length(forcing(), 101, overlap_history=37) == ({"overlap_history": 37}, ())
    assert length(forcing(), 121, base_num_frames=121) == ({"base_num_frames": 121}, ())
    in_three = {"num_latent_frames_per_chunk": 3}
    assert length(helios.pipeline(), 129) == ({}, ())
    with pytest.raises(ValueError, match="num_latent_frames_per_chunk must be at least 1, got 0"):
        length(helios.pipeline(), 129, num_latent_frames_per_chunk=0)
    assert length(helios.pipeline(), 18, **in_three)[1] == (
        "HeliosPipeline makes 17 frames where 18 are asked",
    )
    said = "HunyuanVideoFramepackPipeline makes 145 frames where 129 are asked"
    assert length(framepack.pipeline(), 129)[1] == (said,)


@pytest.mark.slow
def test_a_long_video_of_diffusion_forcing_is_the_pipelines(tmp_path):
    """Two windows of which the second goes on from the end of the first, a little noisy."""
    pipe, size = forcing(), {"height": 48, "width": 64}
    own = {"base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
    pipe.save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    right = pipe(
        PROMPT,
        num_frames=17,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **size,
        **own,
    ).frames[0]
    call = tuple(f"{name}={value}" for name, value in own.items())
    options = {"frames": 17, "steps": 2, "seed": 3, "method": Dense(), **size}
    out = tmp_path / "clip.mp4"
    [made] = generate(tmp_path / "model", [PROMPT], out=out, call=call, **options)
    assert read_settings(out).fields["call"] == [*call]
    [frames] = generate(tmp_path / "model", [PROMPT], out=tmp_path / "png", call=call, **options)
    video = read_video(frames.files["video"])
    np.testing.assert_array_equal(video, (right * 255).round().astype(np.uint8))
    assert len(read_video(made.files["video"])) == 17
