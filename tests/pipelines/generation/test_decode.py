"""Latents to a file of video in parts: the pixels of `vae.decode`, in memory that stays flat."""

import itertools
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
)
from diffusers.video_processor import VideoProcessor
from safetensors.torch import save_file
from support import wan
from support.products import in_turns, slow_after

from gen_accel import Dense, demo
from gen_accel.attention_processors.families.decoders import SEEN, endless_parts_of
from gen_accel.measure import read_stream, read_video, write_stream, write_video
from gen_accel.measure.video_io import video_fps
from gen_accel.pipelines.generation import generate, loading, progress, sampling
from gen_accel.pipelines.generation.decode import (
    DecodedWhole,
    decode_stream,
    load_latents,
    save_latents,
)


def wan_vae(**config):
    torch.manual_seed(2)
    tiny = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return AutoencoderKLWan(**(tiny | config)).eval()


def wan_vae_of_patches():
    """As Wan 2.2 5B has it: 12 channels that are 2 x 2 pixels, and residual up-sampling."""
    return wan_vae(
        patch_size=2,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        base_dim=4,
        decoder_base_dim=4,
        scale_factor_spatial=16,
    )


def hunyuan_vae(**config):
    torch.manual_seed(3)
    tiny = {
        "latent_channels": 4,
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
    }
    return AutoencoderKLHunyuanVideo(**(tiny | config)).eval()


def tiled(vae, size=32, stride=24):
    vae.enable_tiling(
        size, size, tile_sample_stride_height=stride, tile_sample_stride_width=stride
    )
    return vae


def whole_windows(vae):
    vae.use_framewise_decoding = False
    return vae


def pipe_of(vae):
    """What decoding needs of a pipeline."""
    return SimpleNamespace(
        vae=vae,
        video_processor=VideoProcessor(vae_scale_factor=8),
        _execution_device=torch.device("cpu"),
        maybe_free_model_hooks=lambda: None,
    )


def noise(vae, frames, height=5, width=7):
    channels = vae.config.get("z_dim", vae.config.get("latent_channels"))
    generator = torch.Generator().manual_seed(frames)
    return torch.randn((1, channels, frames, height, width), generator=generator)


@torch.no_grad()
def at_once(vae, latents):
    """As the pipelines of Wan and HunyuanVideo end."""
    latents = latents.to(vae.dtype)
    if "latents_mean" in vae.config:
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
        std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents)
        latents = latents / std + mean
    else:
        latents = latents / vae.config.scaling_factor
    video = vae.decode(latents, return_dict=False)[0]
    [frames] = VideoProcessor().postprocess_video(video, output_type="np")
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


STREAMED = {
    "Wan 2.1": wan_vae,
    "Wan 2.2": wan_vae_of_patches,
    "Wan 2.1, tiles": lambda: tiled(wan_vae()),
    "Wan 2.1, uneven tiles": lambda: tiled(wan_vae(), 40, 16),
    "Wan 2.2, tiles": lambda: tiled(wan_vae_of_patches(), 64, 32),
    "HunyuanVideo": hunyuan_vae,
    "HunyuanVideo, tiles": lambda: tiled(hunyuan_vae()),
}


def hunyuan_15_vae():
    torch.manual_seed(4)
    widths = (8,) * 5
    return AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=widths, layers_per_block=1
    ).eval()


def ltx_vae(**config):
    torch.manual_seed(5)
    widths, layers = (8,) * 4, (1,) * 5
    tiny = {
        "latent_channels": 8,
        "block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "layers_per_block": layers,
        "decoder_layers_per_block": layers,
    }
    vae = AutoencoderKLLTXVideo(**(tiny | config)).eval()
    for name, x in vae.named_parameters():
        if "per_channel_scale" in name:
            x.data.normal_()
    return vae


def ltx_91_vae():
    """Autoencoder as of 0.9.1: told how noisy the latents are, with noise of its own."""
    return ltx_vae(
        decoder_block_out_channels=(8, 16, 32),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(True, True, True, False),
        upsample_residual=(True,) * 3,
        upsample_factor=(2,) * 3,
        timestep_conditioning=True,
    )


def ltx_2_vae(**config):
    torch.manual_seed(6)
    return AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        **config,
    ).eval()


def tiled_15(vae):
    vae.enable_tiling(64, 64, 4, 4, 0.25)
    return vae


# Autoencoders that streams are decoded by, and latent frames that they look ahead.
ENDLESS = {
    "HunyuanVideo 1.5": (hunyuan_15_vae, 0),
    "HunyuanVideo 1.5, tiles": (lambda: tiled_15(hunyuan_15_vae()), 0),
    "LTX": (ltx_vae, 9),
    "LTX, tiles": (lambda: tiled(ltx_vae(), 64, 32), 9),
    "LTX, causal": (lambda: ltx_vae(decoder_causal=True), 0),
    "LTX 0.9.1": (ltx_91_vae, 7),
    "LTX-2": (ltx_2_vae, 0),
    "LTX-2, not causal": (lambda: ltx_2_vae(decoder_causal=False), 7),
}


@pytest.mark.slow
@pytest.mark.turns(4)
@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("frames", [1, 2, 12])
def test_an_endless_decoder_gives_the_pixels_of_decoding_at_once(name, frames):
    made, ahead = ENDLESS[name]
    vae = made()
    latents, told = noise(vae, frames, 3, 5), vae.config.get("timestep_conditioning")
    time = () if "decoder_causal" not in vae.config else (torch.zeros(1) if told else None,)
    torch.manual_seed(7)
    with torch.no_grad():
        wanted = vae.decode(latents, *time, return_dict=False)[0]
    torch.manual_seed(7)
    taken, behind, found = 0, [], []

    def parts():
        nonlocal taken
        for z in latents.split(3, 2):
            for frame in z.split(1, 2):
                taken += 1
                yield frame

    step = vae.temporal_compression_ratio
    for pixels in endless_parts_of(vae)(vae, parts()):
        found.append(pixels)
        behind.append(taken - 1 - (sum(x.shape[2] for x in found) - 1) / step)
    torch.testing.assert_close(torch.cat(found, 2), wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.1
    if frames > ahead:
        assert ahead - 1 < behind[0] <= ahead
    assert not any("forward" in vars(module) for module in vae.modules())


@torch.no_grad()
@pytest.mark.slow
def test_hunyuan_15_decodes_by_as_many_latents_as_the_published_videos_have():
    vae = hunyuan_15_vae()
    latents = noise(vae, SEEN + 6, 2, 2)
    wanted = vae.decode(latents, return_dict=False)[0]
    found = torch.cat([*endless_parts_of(vae)(vae, latents.split(1, 2))], 2)
    apart, same = (found - wanted).abs().amax((0, 1, 3, 4)), 1 + 4 * (SEEN - 1)
    assert same == 121
    assert apart[:same].max() < 1e-5
    assert 1e-4 < apart[same:].max() < 0.1


# Latent frames and dtype: one frame always, the others in turns.
DECODED = [(1, torch.float32), (5, torch.float32), (6, torch.bfloat16), (8, torch.float32)]


@pytest.mark.turns(5)
@pytest.mark.parametrize(
    ("name", "clip"),
    slow_after(
        len(STREAMED), [*((n, DECODED[0]) for n in STREAMED), *in_turns(STREAMED, DECODED[1:])]
    ),
    ids=str,
)
def test_the_pixels_are_those_of_decoding_at_once(name, clip):
    frames, dtype = clip
    vae = STREAMED[name]().to(dtype)
    latents = noise(vae, frames)
    chunks = [*decode_stream(pipe_of(vae), latents)]
    expected = at_once(vae, latents)
    assert expected.std() > 1
    assert sum(map(len, chunks)) == len(expected) == 4 * (frames - 1) + 1
    np.testing.assert_array_equal(np.concatenate(chunks), expected)


def test_tiles_change_the_pixels_that_the_test_above_compares():
    latents = noise(wan_vae(), 2)
    assert (at_once(wan_vae(), latents) != at_once(tiled(wan_vae()), latents)).any()


@pytest.mark.parametrize("frames", [1, 6])
def test_what_cannot_be_parted_is_decoded_whole_and_says_so(frames):
    vae = whole_windows(hunyuan_vae())
    latents = noise(vae, frames)
    with pytest.warns(DecodedWhole, match="AutoencoderKLHunyuanVideo is decoded whole"):
        chunks = decode_stream(pipe_of(vae), latents)
    np.testing.assert_array_equal(np.concatenate([*chunks]), at_once(vae, latents))


def test_a_stream_keeps_no_state_in_the_model():
    vae = wan_vae()
    first, second = noise(vae, 4), noise(vae, 5)[:, :, :4]
    streams = [decode_stream(pipe_of(vae), latents) for latents in (first, second)]
    in_turn = [*zip(*streams, strict=True)]
    for i, latents in enumerate((first, second)):
        video = np.concatenate([pair[i] for pair in in_turn])
        np.testing.assert_array_equal(video, at_once(vae, latents))


def test_what_was_decoded_is_let_go():
    """However long the clip, two results of the decoder live at a time at most."""
    vae, made, most = wan_vae(), [], []
    vae.decoder.register_forward_hook(lambda module, args, out: made.append(weakref.ref(out)))
    for _ in decode_stream(pipe_of(vae), noise(vae, 9)):
        most.append(sum(ref() is not None for ref in made))
    assert len(made) == 9
    assert max(most) <= 2


def test_gradients_stay_on_around_a_stream():
    vae = wan_vae()
    for _ in decode_stream(pipe_of(vae), noise(vae, 2)):
        assert torch.is_grad_enabled()


def test_an_offloaded_model_is_fetched_and_sent_away():
    vae, calls = wan_vae(), []
    vae._hf_hook = SimpleNamespace(pre_forward=lambda module: calls.append(module))
    pipe = pipe_of(vae)
    pipe.maybe_free_model_hooks = lambda: calls.append("freed")
    chunks = decode_stream(pipe, noise(vae, 3))
    assert calls == []
    next(chunks)
    assert calls == [vae]
    chunks.close()
    assert calls == [vae, "freed"]


@pytest.mark.parametrize("offload", [cpu_offload, cpu_offload_with_hook])
def test_hooks_of_accelerate_change_no_pixel(offload):
    vae = wan_vae()
    latents = noise(vae, 3)
    expected = at_once(vae, latents)
    offload(vae, torch.device("cpu"))
    np.testing.assert_array_equal(
        np.concatenate([*decode_stream(pipe_of(vae), latents)]), expected
    )


def test_decoding_refuses():
    vae = wan_vae()
    pipe, latents = pipe_of(vae), noise(vae, 2)
    with pytest.raises(ValueError, match=r"\(1, C, f, h, w\), got \(2, 16, 2, 5, 7\)"):
        decode_stream(pipe, latents.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="16 channels of AutoencoderKLWan, got 4"):
        decode_stream(pipe, latents[:, :4])
    with pytest.raises(ValueError, match=r"not finite, in torch\.float32"):
        [*decode_stream(pipe, latents * torch.nan)]
    pipe.vae = SimpleNamespace(config={"latent_channels": 16})
    with pytest.raises(ValueError, match="does not say how its latents are scaled"):
        decode_stream(pipe, latents)


def clip(frames=7, height=32, width=48):
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


def parts(video, *lengths):
    """Chunks of these lengths, and one of the rest."""
    return np.split(video, np.cumsum(lengths))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png", "clip"])
def test_chunks_make_the_file_of_the_whole_video(tmp_path, name):
    whole = write_video(clip(), tmp_path / "whole" / name, fps=8)
    path = write_stream(iter(parts(clip(), 1, 0, 4)), tmp_path / "parts" / name, fps=8)
    assert path.relative_to(tmp_path / "parts") == whole.relative_to(tmp_path / "whole")
    files = [[p] if p.is_file() else sorted(p.iterdir()) for p in (path, whole)]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_one_frame_is_one_picture(tmp_path):
    path = write_stream(parts(clip(1)), tmp_path / "still.png", fps=8)
    assert path == tmp_path / "still.png"
    np.testing.assert_array_equal(read_video(path), clip(1))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_stream_that_breaks_leaves_what_was_there(tmp_path, name, earlier):
    def broken():
        yield clip(3)
        raise KeyboardInterrupt

    if earlier:
        write_video(clip(2), tmp_path / name, fps=8)
        before = read_video(tmp_path / name)
    with pytest.raises(KeyboardInterrupt):
        write_stream(broken(), tmp_path / name, fps=8)
    assert [p.name for p in tmp_path.iterdir()] == [name] * earlier
    if earlier:
        np.testing.assert_array_equal(read_video(tmp_path / name), before)


def test_written_chunks_are_let_go(tmp_path):
    alive, most = weakref.WeakSet(), []

    class Chunk(np.ndarray):
        __hash__ = object.__hash__

    def made():
        for _ in range(12):
            chunk = clip(4).view(Chunk)
            alive.add(chunk)
            yield chunk
            del chunk
            most.append(len(alive))

    write_stream(made(), tmp_path / "clip.mp4", fps=8)
    assert len(most) == 12
    assert max(most) <= 3


def test_write_stream_refuses_before_it_asks_for_frames(tmp_path):
    def never():
        raise AssertionError("asked for a frame")
        yield

    with pytest.raises(ValueError, match="fps must be from"):
        write_stream(never(), tmp_path / "clip.mp4", fps=0)
    with pytest.raises(ValueError, match=r"'\.avi'"):
        write_stream(never(), tmp_path / "clip.avi", fps=8)
    with pytest.raises(ValueError, match="must hold a frame"):
        write_stream([], tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match=r"one size, got \(32, 48\) and \(32, 40\)"):
        write_stream([clip(), clip(width=40)], tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match="float64"):
        write_stream([clip() / 255], tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match=r"\(32, 48, 3\)"):
        write_stream(clip(), tmp_path / "clip.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_reading_in_chunks(tmp_path, name):
    path = write_video(clip(height=40, width=48)[:, 1:], tmp_path / name, fps=12.5)
    chunks = [*read_stream(path, frames=3)]
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), read_video(path))
    assert read_video(path).shape == (7, 39, 48, 3)
    assert video_fps(path) == (None if name == "clip" else 12.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        read_stream(path, frames=0)
    with pytest.raises(FileNotFoundError, match="nothing"):
        video_fps(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_come_back_as_they_were(tmp_path, dtype):
    latents = noise(wan_vae(), 3).to(dtype).transpose(-1, -2)
    about = {"prompt": "ein Würfel", "seed": 3, "fps": 12.5, "guidance_scale": None}
    path = save_latents(tmp_path / "new" / "clip.safetensors", latents, about)
    back, known = load_latents(path)
    assert back.dtype == dtype
    assert torch.equal(back, latents)
    assert known == about
    assert [p.name for p in path.parent.iterdir()] == ["clip.safetensors"]


def test_files_that_hold_no_latents(tmp_path):
    with pytest.raises(ValueError, match=r"clip\.pt must end in \.safetensors"):
        save_latents(tmp_path / "clip.pt", torch.ones(1, 1, 1, 1, 1), {})
    with pytest.raises(FileNotFoundError, match="no file of latents"):
        load_latents(tmp_path / "clip.safetensors")
    (tmp_path / "text.safetensors").write_text("not a header")
    save_file({"weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    save_file({"latents": torch.ones(2)}, tmp_path / "flat.safetensors")
    for name, words in {"text": "", "lora": "latents", "flat": r"got \(2,\)"}.items():
        with pytest.raises(ValueError, match=f"{name}.safetensors is no file of latents.*{words}"):
            load_latents(tmp_path / f"{name}.safetensors")


def test_frames_are_counted_as_they_pass():
    told = []
    chunks = progress.counted(parts(clip(), 1, 4), lambda *args: told.append(args), 7)
    assert sum(map(len, chunks)) == 7
    assert told == [(1, 7), (5, 7), (7, 7)]


@pytest.mark.slow
def test_sampling_decodes_what_the_pipeline_would():
    pipe = wan.pipeline()
    made = sampling.filled(
        pipe,
        sampling.Clip(
            frames=wan.FRAMES,
            height=wan.HEIGHT,
            width=wan.WIDTH,
            steps=2,
            guidance_scale=4.0,
            seed=5,
        ),
    )
    steps = []
    taken = sampling.sample(pipe, "a cat", made, tick=lambda *args: steps.append(args))
    output = pipe(
        prompt="a cat",
        negative_prompt=made.negative_prompt,
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=wan.FRAMES,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    )
    expected = (np.asarray(output.frames[0]) * 255).round().clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(taken.video, expected)
    assert steps == [(1, 2), (2, 2)]
    assert taken.denoise_seconds > 0 < taken.decode_seconds


PROMPT = "a red circle moves right slowly"
SMALL = ("--height", "48", "--width", "48", "--steps", "1", "--method", "dense", "--seed", "4")


def on_demo(*args):
    return ("generate", "--model", demo.path(), *args)


@pytest.mark.slow
def test_generated_pixels_are_kept_as_latents_and_decoded_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    kept, out = tmp_path / "kept" / "clip.safetensors", tmp_path / "clip"
    options = ("--prompt", PROMPT, "--frames", "9", "--fps", "12", *SMALL)
    result = run(*on_demo(*options, "--save-latents", kept, "--out", out))
    assert str(kept) in result.stdout
    pipe = loading.load(demo.path(), loading.Loading(dtype="float32", device="cpu"))
    output = pipe(
        prompt=PROMPT,
        height=48,
        width=48,
        num_frames=9,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    )
    expected = (np.asarray(output.frames[0]) * 255).round().clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(read_video(out), expected)

    latents, about = load_latents(kept)
    assert latents.shape == (1, pipe.vae.config.z_dim, 3, 6, 6)
    assert {"prompt": PROMPT, "seed": 4, "frames": 9, "fps": 12.0}.items() <= about.items()
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)  # all weights
    run(*on_demo("--from-latents", kept, "--out", tmp_path / "again"))
    np.testing.assert_array_equal(read_video(tmp_path / "again"), expected)
    run(*on_demo("--from-latents", kept, "--out", tmp_path / "again.mp4"))
    assert video_fps(tmp_path / "again.mp4") == 12
    run(*on_demo("--from-latents", kept, "--fps", "8", "--out", tmp_path / "other.mp4"))
    assert video_fps(tmp_path / "other.mp4") == 8


@pytest.mark.slow
def test_each_prompt_keeps_its_own_latents(tmp_path):
    made = generate.generate(
        demo.path(),
        [PROMPT, PROMPT],
        out=tmp_path / "clip.gif",
        method=Dense(),
        frames=5,
        height=48,
        width=48,
        steps=1,
        save_latents=tmp_path / "clip.safetensors",
    )
    names = [[path.name for path in one.files.values()] for one in made]
    assert names == [[f"clip-00{i}.safetensors", f"clip-00{i}.gif"] for i in range(2)]
    first, second = (load_latents(one.files["latents"]) for one in made)
    assert (first[0] != second[0]).any()
    assert (first[1]["seed"], second[1]["seed"]) == (0, 1)
    assert json.dumps(first[1])


@pytest.mark.slow
def test_a_longer_video_with_a_technique(run, tmp_path):
    clips, longer = [], ("--extend", "position_interpolation")
    for extend in ((), longer, (*longer, "--trained-frames", "37")):
        out = tmp_path / f"clip{len(clips)}"
        options = ("--prompt", PROMPT, "--frames", "37", *SMALL, *extend, "--out", out)
        result = run(*on_demo(*options))
        assert ("position_interpolation: " in result.stdout) == bool(extend)
        clips.append(read_video(out))
    assert clips[0].shape == (37, 48, 48, 3)
    assert (clips[0] != clips[1]).any()
    assert (clips[0] == clips[2]).all()  # no longer than trained


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--from-latents", "a.safetensors", "--prompt", "b", "--seed", "1"), "--prompt, --seed"),
        (("--from-latents", "nothing.safetensors"), "nothing.safetensors"),
        (("--prompt", "b", "--save-latents", "a.pt"), ".safetensors"),
        (("--prompt", "b", "--extend", "riflexx"), "'riflexx'"),
        (("--prompt", "b", "--extend", "riflex", "--compare"), "compare"),
        (("--prompt", "b", "--trained-frames", "33"), "trained_frames is for a technique"),
    ],
)
def test_what_does_not_go_together_is_refused(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    result = run(*on_demo(*args), code=2)
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_an_interrupt_while_decoding_leaves_the_latents_only(run, tmp_path, monkeypatch):
    calls, load = itertools.count(), loading.load
    kept = tmp_path / "clip.safetensors"

    def broken(module, args, output):
        if next(calls) == 1:
            raise KeyboardInterrupt

    def loaded(*args, **options):
        pipe = load(*args, **options)
        pipe.vae.decoder.register_forward_hook(broken)
        return pipe

    monkeypatch.setattr(generate, "load", loaded)
    options = ("--prompt", PROMPT, "--frames", "9", *SMALL, "--save-latents", kept)
    run(*on_demo(*options, "--out", tmp_path / "clip.mp4"), code=130)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.safetensors"]
    assert load_latents(kept)[0].shape[2] == 3
