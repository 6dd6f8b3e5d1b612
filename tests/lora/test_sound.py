"""Sound of clips: read, encoded as that of LTX-2, and trained beside the video."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import finetuning as ft
from support.clips import footage
from support.runs import WEIGHTS
from support.tiny import ltx2
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from gen_accel.attention_processors.families import family_for
from gen_accel.lora.batches import plan_clips
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.prepare import model_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = HEIGHT, WIDTH = 64, 96
FRAMES, FPS, RATE = 17, 24, 16_000


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    """(2, N) float32, the right channel at half the volume."""
    wave = np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate) * 0.5
    return np.stack([wave, wave / 2]).astype(np.float32)


def film(path: Path, seed: int, sound: np.ndarray | None = None, rate: int = RATE) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        heard = None
        if sound is not None:
            heard = container.add_stream("pcm_s16le", rate=rate, layout="stereo")
        for picture in footage(FRAMES, *SIZE, seed=seed):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if heard is not None:
            samples = np.round(sound.T * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            frame.rate, frame.pts = rate, 0
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return path


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
        own = family.predict_heard(model, noisy, given["audio_hidden_states"], level, shown)
        alone = family.predict(model, noisy, level, shown)
    assert given["audio_hidden_states"].shape[1] == 18
    torch.testing.assert_close(own[0].flatten(2).transpose(1, 2), video)
    torch.testing.assert_close(own[1], sound)
    assert not torch.equal(alone, own[0])


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
        ({"images": 0.5}, "sound is of films, got images 0.5"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.read({"sound": True, **fields})
