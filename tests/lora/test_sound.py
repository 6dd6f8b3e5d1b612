"""Sound of clips: read, encoded as that of LTX-2, and trained beside the video."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import finetuning as ft
from support.clips import footage, sounding, tone
from support.runs import WEIGHTS
from support.tiny import ltx2
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from gen_accel.attention_processors.families import family_for, family_named
from gen_accel.lora.batches import plan_clips
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.objective import Objective
from gen_accel.lora.prepare import model_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = HEIGHT, WIDTH = 64, 96
FRAMES, FPS, RATE = 17, 24, 16_000


def film(path: Path, seed: int, sound: np.ndarray | None = None, rate: int = RATE) -> Path:
    return sounding(path, footage(FRAMES, *SIZE, seed=seed), sound, rate, FPS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips with sound, and a silent one."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate("abc"):
        sound = None if name == "c" else tone(FRAMES / FPS, RATE, 440.0 * (i + 1))
        film(folder / f"{name}.mkv", i, sound).with_suffix(".txt").write_text("a red square")
    return folder


def encoded(clips, out, **options):
    pipe = ltx2.texts()
    asked = {"frames": (FRAMES,), "sizes": [SIZE], "fps": float(FPS), "max_tokens": 16}
    cache(
        pipe,
        clips,
        out,
        **(asked | {"sound": True, "store": "float32", "device": "cpu"}),
        **options,
    )
    return pipe, LatentCache(out)


def test_sound_is_read_at_its_time_and_rate(tmp_path):
    wave = tone(0.5, 48_000)
    path = film(tmp_path / "a.mkv", 0, wave, 48_000)
    clip = CaptionedVideo("a", "", path)
    whole = clip.sound(0, 0.5, 48_000)
    assert np.abs(whole - wave).max() < 1e-4
    part = clip.sound(0.25, 0.5, 48_000)
    assert np.abs(part[:, :12_000] - wave[:, 12_000:]).max() < 1e-4
    assert not part[:, 12_000:].any()
    slower = clip.sound(0, 0.5, RATE)
    assert slower.shape == (2, 8000)
    assert np.abs(slower - tone(0.5, RATE))[:, 100:-100].max() < 1e-2
    assert CaptionedVideo("b", "", film(tmp_path / "b.mkv", 0)).sound(0, 1, RATE) is None


def test_the_spectrogram_is_the_published_one():
    """Beside the one of transformers, with the arguments of Lightricks' `AudioProcessor`."""
    from gen_accel.attention_processors.families.ltx import _log_mel

    config = ltx2.parts()["audio_vae"].config
    sound = torch.from_numpy(tone(0.3, RATE) + np.random.default_rng(0).normal(0, 0.1, (2, 4800)))
    made = _log_mel(sound.float(), config)
    bands = mel_filter_bank(513, config.mel_bins, 0, 8000, RATE, "slaney", "slaney")
    how = {"frame_length": 1024, "hop_length": 160, "power": 1.0, "center": True}
    for channel, mel in zip(sound.numpy(), made, strict=True):
        window = window_function(1024, "hann")
        told = spectrogram(
            channel, window, **how, mel_filters=bands, mel_floor=1e-5, log_mel="log"
        )
        torch.testing.assert_close(mel.T, torch.from_numpy(told).float(), atol=1e-3, rtol=1e-3)


def test_what_is_kept_of_each_clip(clips, tmp_path):
    pipe, found = encoded(clips, tmp_path)
    family = family_for(pipe.transformer, "training")
    assert [entry.sound_key is not None for entry in found.entries] == [True, True, False]
    tokens = family.sound_tokens(pipe.transformer.config, FRAMES, FPS)
    assert tokens == round(FRAMES / FPS * 25) == 18
    kept = found.sound(1, tokens)
    read = CaptionedVideo("b", "", clips / "b.mkv").sound(0, FRAMES / FPS, RATE)
    own = family.encode_sound(pipe, torch.from_numpy(read))
    assert torch.equal(kept, own[:tokens])
    assert not torch.equal(kept, found.sound(0, tokens))
    assert found.sound(2, tokens) is None


def test_video_and_sound_are_predicted_as_the_pipeline_does(clips, tmp_path):
    pipe, found = encoded(clips, tmp_path)
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs, out)), with_kwargs=True
    )
    guided = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0}
    guided |= {"audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "frame_rate": float(FPS)}
    pipe(
        "a red square",
        **guided,
        **size,
        num_inference_steps=1,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    given, (video, sound) = calls[0]
    family, model = family_for(pipe.transformer, "training"), pipe.transformer
    shown = {name: x[None] for name, x in found.conditions(0).items()}
    shown["fps"] = torch.tensor([float(FPS)])
    noisy = given["hidden_states"].transpose(1, 2).unflatten(2, (3, 2, 3))
    level = given["timestep"] / 1000
    with torch.no_grad():
        sound_in = given["audio_hidden_states"]
        own = family.predict_heard(model, noisy, sound_in, level, level, shown)
        alone = family.predict(model, noisy, level, shown)
    assert given["audio_hidden_states"].shape[1] == 18
    torch.testing.assert_close(own[0].flatten(2).transpose(1, 2), video)
    torch.testing.assert_close(own[1], sound)
    assert not torch.equal(alone, own[0])


# MiniMax-H3, whose sound is in one sequence with its video


class H3:
    """A tiny pipeline, and what the tests of it share."""

    def __init__(self):
        minimax_h3 = pytest.importorskip("support.tiny.minimax_h3")
        self.heard, self.pipe = minimax_h3.heard, minimax_h3.training()
        self.model, self.family = self.pipe.transformer, family_named("minimax_h3")
        self.schedulers = self.pipe.scheduler, self.pipe.audio_scheduler

    def calls(self, steps):
        """Arguments of the transformer in a run, copied, with what it gave."""
        found = []

        def keep(module, args, given, out):
            found.append(
                (
                    {
                        name: torch.clone(x)
                        for name, x in given.items()
                        if x is not None and torch.is_tensor(x)
                    },
                    out,
                )
            )

        hook = self.model.register_forward_hook(keep, with_kwargs=True)
        self.pipe(
            prompt="a red square",
            height=64,
            width=64,
            num_frames=124,
            output_type="latent",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
        hook.remove()
        return found


@pytest.fixture(scope="module")
def h3():
    return H3()


def test_clips_of_minimax_h3_are_encoded_as_its_references(h3):
    """Its blocks draw the latents of a video, by a seed, and round them to float16."""
    from diffusers.modular_pipelines import PipelineState
    from diffusers.modular_pipelines.minimax_h3.encoders import (
        MiniMaxH3Ref2VAReferenceEncoderStep,
    )

    frames, sound = footage(39, 64, 96, seed=3), torch.from_numpy(tone(39 / 24, 32_000))
    video = SimpleNamespace(kind="video", frames=frames, has_audio=True, audio=sound)
    state = PipelineState()
    state.set("normalized_references", [video])
    _, state = MiniMaxH3Ref2VAReferenceEncoderStep()(h3.pipe, state)
    [theirs], [rows] = state.get("condition_latents"), state.get("audio_condition_latents")
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    seeded = torch.Generator().manual_seed(h3.pipe.keyframe_encode_seed)
    ours = h3.family.encode_video(h3.pipe, pixels, seeded)
    assert ours.shape == theirs.shape == (1, 24, 12, 4, 6)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    kept = h3.family.encode_sound(h3.pipe, sound)
    assert kept.shape == (h3.family.sound_tokens(h3.model.config, 39, 24.0), 2 * 32) == (65, 64)
    assert torch.equal(torch.cat(kept.chunk(2, 1)), rows)


def test_minimax_h3_predicts_sound_as_its_pipeline_and_at_its_levels(h3):
    calls = h3.calls(4)
    shifts = [scheduler.shift for scheduler in h3.schedulers]
    assert shifts == [12.0, 3.0]
    conditions = h3.family.encode_prompt(h3.pipe, ["a red square"], 16)
    seen = []

    class Watched:
        training = h3.family.training
        scales = staticmethod(h3.family.scales)

        @staticmethod
        def predict_heard(model, noisy, sound, sigma, of_sound, given):
            seen.append((sigma, of_sound, sound))
            return noisy, sound

    objective = Objective(
        h3.model, Watched, "flow", SimpleNamespace(modules={}), shifts=tuple(shifts)
    )
    clean, noise = torch.randn(2, 1, 24, 37, 4, 4)
    for given, (_, audio) in calls:
        sound, level = h3.heard(given)
        sigma = 1 - given["timestep"][:1]
        latents = torch.zeros(1, 24, 37, 4, 4)
        rows = given["hidden_states"].view(37, 2, 2, 24, 1, 2, 2).permute(3, 0, 4, 1, 5, 2, 6)
        latents[0] = rows.reshape(24, 37, 4, 4)
        with torch.no_grad():
            predicted = h3.family.predict_heard(
                h3.model, latents, sound, sigma.double(), level, conditions
            )
        assert torch.equal(torch.cat(predicted[1].chunk(2, -1), 1), -audio)
        still = torch.ones_like(sound)
        objective(clean, noise, sigma, conditions, None, None, None, (), still, 0 * still)
        torch.testing.assert_close(seen[-1][1].double(), level, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(seen[-1][2], (1 - seen[-1][1]) * still)
    assert seen[1][1] < seen[1][0] - 0.05


H3_FIELDS = {"sound": True, "fps": 24.0, "caption_dropout": 0.0, "stages": ("124:2",)}
H3_FIELDS |= {"height": 64, "width": 64, "max_tokens": 16, "method": "dense", "settings": ()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sound": False}, "video and sound in one sequence, and trains with both: give sound tr"),
        ({"fps": 12.0}, "fps must be 24 for MiniMax-H3, the only pace of its videos and their so"),
        ({"caption_dropout": 0.1}, "caption_dropout is 0.1: give 0, as MiniMaxH3Transformer3DMod"),
        ({"noise_levels": (1.0, 0.5)}, "noise_levels are of the video, and .* steps its sound at"),
        ({"sound": False, "objective": "distill", "student_steps": 4}, "its sound beside the vid"),
        ({"stages": ("120:2",)}, "frames must be 5 more than a multiple of 17, got 120; nearest"),
        ({"condition": "control"}, "must be text or first_frame or last_frame for MiniMaxH3Mod"),
    ],
)
def test_what_minimax_h3_does_not_train(h3, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        model_of(ft.config(tmp_path, **(H3_FIELDS | fields)), h3.pipe)


def test_clips_of_minimax_h3_without_sound_are_named(h3, clips, tmp_path):
    given = ft.config(tmp_path, **H3_FIELDS)
    model = model_of(given, h3.pipe)
    assert (model.shift, model.sound_shift, model.trained_frames) == (12.0, 3.0, 124)
    about = {"starts": None}
    entries = [SimpleNamespace(sound_key=key, name=str(key), **about) for key in ("a", None)]
    silent: Any = SimpleNamespace(entries=entries)
    with pytest.raises(ValueError, match="1 of 2 clips have no sound, without which MiniMax-H3"):
        plan_clips(given, model, silent, 1)


@pytest.mark.slow
def test_a_teacher_tells_video_and_sound(clips, tmp_path):
    """Of a LoRA that says nothing yet, through dense attention, nothing is to be learnt."""
    pipe, latents = encoded(clips, tmp_path / "cache")
    small = {"stages": (f"{FRAMES}:1",), "height": HEIGHT, "width": WIDTH, "max_tokens": 16}
    small |= {"fps": float(FPS), "sound": True, "objective": "distill", "checkpoint_every": 1}
    small |= {"trained_frames": FRAMES}
    losses = {}
    for method in ("dense", "radial"):
        settings = ("block=4",) if method == "radial" else ()
        fields = small | {"method": method, "settings": settings}
        given = ft.config(tmp_path / method, **fields)
        [losses[method]] = ft.train(given, latents, model=model_of(given, pipe)).losses
        pipe = ltx2.texts()
    assert losses["dense"] == 0
    assert losses["radial"] > 0


@pytest.mark.slow
def test_two_steps_a_resume_and_the_layers_of_sound(clips, tmp_path):
    """The clips of a step all have sound, or none has."""
    pipe, latents = encoded(clips, tmp_path / "cache")
    small = {"method": "radial", "settings": ("block=4",), "stages": (f"{FRAMES}:2",)}
    small |= {"height": HEIGHT, "width": WIDTH, "max_tokens": 16, "fps": float(FPS)}
    small |= {"sound": True, "targets": ("attention", "sound"), "checkpoint_every": 1}
    small |= {"trained_frames": FRAMES}
    given = ft.config(tmp_path / "a", **small)
    model = model_of(given, pipe)
    with pytest.raises(ValueError, match="1 of 3 clips have no sound, which several processes"):
        plan_clips(given, model, latents, 2)
    many = given.replaced(stages=(f"{FRAMES}:60",), batch_size=2)
    plan = {frozenset(clips) for clips in plan_clips(many, model, latents, 1)[0]}
    assert plan == {frozenset({0, 1}), frozenset({2})}
    done = ft.train(given, latents, model=model)
    assert all(0 < loss < 100 for loss in done.losses)
    weights = load_file(done.folder / WEIGHTS)
    heard = {name: x for name, x in weights.items() if "audio" in name and "lora_B" in name}
    assert any(x.abs().max() > 0 for x in heard.values())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000002")
    given = ft.config(tmp_path / "b", **small)
    again = ft.train(given, latents, model=model_of(given, ltx2.texts()), resume=True)
    assert again.losses == done.losses[1:]
    other = load_file(again.folder / WEIGHTS)
    assert all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fps": None}, "sound needs fps"),
        ({"adapter": "image_prompt"}, "sound is for adapter lora, got image_prompt"),
        ({"images": 0.5}, "images 0.5 does not go with sound, of films"),
        ({"objective": "distill", "student_steps": 4}, "student_steps 4 does not go with sound"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.read({"sound": True, **fields})
