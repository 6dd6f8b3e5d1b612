"""MiniMax-H3 through the blocks of its own pipeline: layout, noise, steps and what they make."""

from types import SimpleNamespace

import pytest
import torch
from support.methods import RADIAL

from gen_accel import Dense, Neighborhood, attach

pytest.importorskip("diffusers.modular_pipelines.minimax_h3")

from diffusers import MiniMaxH3ModularPipeline, MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks
from support.tiny.minimax_h3 import TEXT, TEXT_WIDTH, transformer

CHANNELS, SOUND_CHANNELS = 24, 32  # as the autoencoders have them
FRAMES, LATENTS, SOUND = 124, 37, 207  # five seconds: in latents, and of sound in each channel
SIDE = 96  # pixels: three tokens
PICTURE = torch.ones(1, CHANNELS, 1, SIDE // 16, SIDE // 16)
WORKFLOWS = {
    "t2va": (blocks.MiniMaxH3CoreDenoiseStep, {}),
    "fl2va": (
        blocks.MiniMaxH3FL2VACoreDenoiseStep,
        {"keyframe_anchors": ("first", "last"), "condition_latents": [PICTURE, -PICTURE]},
    ),
    "ref2va": (
        blocks.MiniMaxH3Ref2VACoreDenoiseStep,
        {
            "normalized_references": [
                SimpleNamespace(kind="image", has_audio=False),
                SimpleNamespace(kind="audio", has_audio=True),
            ],
            "condition_latents": [PICTURE],
            "audio_condition_latents": [torch.ones(6, SOUND_CHANNELS)],
        },
    ),
}
# Tokens before the video: of text, pictures and sound.
BESIDE = {
    "t2va": TEXT + 2 * SOUND,
    "fl2va": TEXT + 2 * 9 + 2 * SOUND,
    "ref2va": TEXT + 9 + 6 + 2 * SOUND,
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_video_and_sound_are_made_by_its_own_blocks(workflow):
    kind, given = WORKFLOWS[workflow]
    pipe = MiniMaxH3ModularPipeline(kind())
    part = "transformer_ref" if workflow == "ref2va" else "transformer"
    model = transformer(in_channels=CHANNELS, audio_in_channels=SOUND_CHANNELS)
    schedulers = {name: MiniMaxH3Scheduler(shift=3.0) for name in ("scheduler", "audio_scheduler")}
    pipe.update_components(**{part: model}, **schedulers)
    pipe.set_progress_bar_config(disable=True)

    def made():
        state = pipe(
            prompt_embeds=torch.ones(1, TEXT, TEXT_WIDTH),
            text_token_tags=torch.ones(TEXT, dtype=torch.long),
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(5),
            **given,
        )
        return state.get("latents"), state.get("audio_latents")

    stock = made()
    assert stock[0].shape == (1, CHANNELS, LATENTS, SIDE // 16, SIDE // 16)
    assert stock[1].shape == (2, SOUND_CHANNELS, SOUND)
    with attach(pipe, Dense()):
        assert all(map(torch.equal, made(), stock))
    with attach(pipe, Neighborhood((-1, -1, -1))):
        for one, other in zip(made(), stock, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with attach(pipe, RADIAL) as handle:
        sparse = made()
        summary = handle.summary()
    assert all(not torch.equal(one, other) for one, other in zip(sparse, stock, strict=True))
    tokens = LATENTS * 9 + BESIDE[workflow]
    assert {record.tokens for record in summary.records.values()} == {tokens}
    assert {name.partition(".")[0] for name, _ in summary.records} == {part}
    assert all(map(torch.equal, made(), stock))
