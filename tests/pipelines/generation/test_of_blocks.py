"""`gen-accel generate` on pipelines of blocks: Wan's, and MiniMax-H3's with sound."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline, WanBlocks
from PIL import Image

from gen_accel import demo
from gen_accel.hub import check_pipeline
from gen_accel.measure import read_video
from gen_accel.measure.clip_settings import read_settings
from gen_accel.measure.video_io import Sound, opened_film, write_video
from gen_accel.pipelines.generation.config import ConditioningFiles
from gen_accel.pipelines.generation.inputs import fit, open_files
from gen_accel.pipelines.generation.loading import Loading, load, needed_parts
from gen_accel.pipelines.generation.model_index import (
    index_of,
    pipeline_class,
    skeleton,
    usual_run,
    whole_run,
)
from gen_accel.pipelines.generation.of_blocks import CalledBlocks, is_of_blocks
from gen_accel.pipelines.generation.sampling import Clip, default_of, filled, parameters
from gen_accel.ui.worker import WorkerProcess, arguments

pytest.importorskip("diffusers.modular_pipelines.minimax_h3")

from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3VideoReference
from support.tiny import minimax_h3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROMPT = "a red square moves right"
FRAMES, SIDE, STEPS = 124, 64, 3  # five seconds, the least that MiniMax-H3 makes
CPU = Loading(device="cpu", dtype="float32")


def save(pipe: Any, folder: Any) -> Any:
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Folder of the embedded model, saved as a pipeline of blocks."""
    parts = load(demo.path(), CPU).components
    pipe = WanBlocks().init_pipeline()
    pipe.update_components(**parts)
    return save(pipe, tmp_path_factory.mktemp("blocks") / "wan")


@pytest.fixture(scope="module")
def h3(tmp_path_factory):
    return save(minimax_h3.whole_pipeline(), tmp_path_factory.mktemp("blocks") / "h3")


def asked(folder, out, *more):
    size = ("--frames", FRAMES, "--height", SIDE, "--width", SIDE, "--steps", STEPS)
    return ("generate", "--model", folder, "--prompt", PROMPT, *size, "--out", out, *more)


def own(folder, **given):
    """What diffusers' own call makes."""
    pipe = ModularPipeline.from_pretrained(str(folder))
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
    return pipe(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **(size | given),
    )


def as_bytes(state):
    return (np.asarray(state.get("videos")[0]) * 255).round().astype(np.uint8)


def test_wan_of_blocks_makes_the_video_of_the_model_itself(run, wan, tmp_path):
    """Decoded frame by frame, with guidance, steps that are reported and latents that are kept."""
    size = ("--frames", "9", "--height", "64", "--width", "64", "--steps", "3", "--seed", "3")
    dense = ("--method", "radial", "--prompt", PROMPT, *size, "--guidance-scale", "3")
    made = {}
    for name, model in (("blocks", wan), ("demo", "demo")):
        kept = tmp_path / f"{name}.safetensors"
        out = ("--out", tmp_path / name, "--save-latents", kept)
        result = run("generate", "--model", model, *dense, *out)
        assert "denoising 0/3" in result.stderr
        made[name] = read_video(tmp_path / name)
    np.testing.assert_array_equal(made["blocks"], made["demo"])
    again = ("--from-latents", tmp_path / "blocks.safetensors", "--out", tmp_path / "again")
    run("generate", "--model", wan, *again)
    np.testing.assert_array_equal(read_video(tmp_path / "again"), made["demo"])


def test_a_pipeline_of_blocks_is_called_as_others(wan):
    pipe = load(wan, CPU)
    assert is_of_blocks(pipe)
    assert isinstance(pipe, ModularPipeline)
    assert type(pipe).__name__ == "WanModularPipeline"
    assert {"prompt", "num_frames", "guidance_scale"} <= parameters(pipe).keys()
    clip = filled(pipe, Clip())
    assert (clip.steps, clip.guidance_scale, clip.fps) == (50, pipe.guider.guidance_scale, 16)
    assert (clip.frames, clip.height, clip.width) == (81, 480, 832)
    seen = []

    def step(of, number, time, tensors):
        seen.append((number, tuple(tensors["latents"].shape)))

    size = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
    before = pipe.guider
    made = pipe(
        prompt=PROMPT, callback_on_step_end=step, output_type="latent", guidance_scale=2.0, **size
    )
    assert [number for number, _ in seen] == [0, 1]
    assert made.frames.shape == seen[0][1]
    assert pipe.guider is before
    assert "step" not in vars(pipe.scheduler)


def sound_in(path):
    with opened_film(path, path) as film:
        return film.sound(0.0, FRAMES / 24, 32_000)


def test_minimax_h3_makes_video_with_sound(run, h3, tmp_path):
    out = tmp_path / "clip.mp4"
    run(*asked(h3, out, "--method", "dense", "--seed", "3"))
    state = own(h3)
    stock, heard = as_bytes(state), state.get("audio")[0].numpy()
    run(*asked(h3, tmp_path / "frames", "--method", "dense", "--seed", "3"))
    np.testing.assert_array_equal(read_video(tmp_path / "frames"), stock)
    assert read_video(out).shape == stock.shape == (FRAMES, SIDE, SIDE, 3)
    written = sound_in(out)
    assert written.shape[1] <= heard.shape[1] + 1
    length = min(written.shape[1], heard.shape[1])
    loud = np.abs(heard).mean()
    assert loud > 0
    assert np.abs(written[:, :length] - heard[:, :length].clip(-1, 1)).mean() < 0.5 * loud
    assert read_settings(out).fields["prompt"] == [PROMPT]


@pytest.mark.nightly
def test_the_worker_of_the_page_makes_it_with_sound(h3, tmp_path):
    """In a process of its own, as a job of the page."""
    worker = WorkerProcess(tmp_path / "worker.log", (sys.executable, "-m", "gen_accel.ui.worker"))
    out = tmp_path / "clip.mp4"
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "steps": STEPS}
    options = {"model": str(h3), "prompt": [PROMPT], "method": "dense", "out": str(out), **size}
    heard: list[Any] = []
    ended = worker.run(arguments("generate", options), heard.append)
    worker.close()
    assert (ended.code, ended.error) == (0, None)
    assert any("step 2 of" in str(one) for one in heard)
    assert np.abs(sound_in(out)).max() > 0


def test_sparse_attention_is_that_of_attach_and_a_list_goes_on(run, h3, tmp_path):
    sparse = ("--method", "radial", "--set", "block=16", "--dense-start", "0", "--seed", "3")
    result = run(*asked(h3, tmp_path / "clip", *sparse))
    assert "holds no sound: --out NAME.mp4 keeps it" in result.stderr
    assert (read_video(tmp_path / "clip") != as_bytes(own(h3))).any()


@pytest.mark.parametrize("places", [("image",), ("last_image",), ("image", "last_image")])
@pytest.mark.turns(3)
def test_key_frames_go_to_the_blocks(run, h3, tmp_path, places):
    colors, given = {"image": "red", "last_image": "blue"}, {}
    options: list[Any] = []
    for place in places:
        file = tmp_path / f"{place}.png"
        given[place] = Image.new("RGB", (SIDE, SIDE), colors[place])
        given[place].save(file)
        options += [f"--{place.replace('_', '-')}", file]
    run(*asked(h3, tmp_path / "clip", "--method", "dense", "--seed", "3", *options))
    np.testing.assert_array_equal(read_video(tmp_path / "clip"), as_bytes(own(h3, **given)))


def test_a_video_and_its_sound_are_a_reference_for_the_second_transformer(run, h3, tmp_path):
    film = tmp_path / "film.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (14, SIDE, SIDE, 3), np.uint8)
    lasts = round(14 / 24 * 32_000)
    times = np.arange(lasts) / 32_000
    sound = np.sin(2 * np.pi * 220 * np.stack([times, 2 * times])).astype(np.float32)
    write_video(frames, film, fps=24, sound=Sound(sound, 32_000))
    reference = MiniMaxH3VideoReference.from_file(str(film))
    reference.audio = reference.audio[:, :lasts]  # the encoder's last frame is longer
    run(*asked(h3, tmp_path / "clip", "--method", "dense", "--seed", "3", "--video", film))
    made = as_bytes(own(h3, references=[reference]))
    np.testing.assert_array_equal(read_video(tmp_path / "clip"), made)
    assert (made != as_bytes(own(h3))).any()


def test_a_picture_decides_the_size_by_the_models_own_rule(h3):
    files = open_files(ConditioningFiles(image=np.zeros((90, 60, 3), np.uint8)))
    clip, given = fit(load(h3, CPU, ConditioningFiles()), Clip(), files)
    assert (clip.height, clip.width) == (96, 64)
    assert given.values["image"].size == (64, 96)


def test_a_run_loads_the_parts_that_it_needs():
    kind = "MiniMaxH3ModularPipeline"
    text, key, seen = (needed_parts(kind, one) for one in ((), ("first frame",), ("video",)))
    assert {*text} == {*key}
    assert "transformer" in text
    assert "transformer_ref" not in text
    assert "transformer_ref" in seen
    assert "transformer" not in seen


def test_sizes_are_the_models_own(h3):
    pipe = load(h3, CPU, ConditioningFiles())
    assert default_of(pipe, "frames") == FRAMES
    made = usual_run(h3)  # what the blocks make without a picture, at their own canvas
    assert (made["frames"], made["height"], made["width"]) == (FRAMES, 64, 96)
    assert whole_run(h3, Clip(), (90, 60))[:3] == (FRAMES, 96, 64)
    assert filled(pipe, Clip()).fps == 24
    with pytest.raises(
        ValueError, match="makes 24 frames a second, with sound that lasts as long"
    ):
        filled(pipe, Clip(fps=12))
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        filled(pipe, Clip(guidance_scale=5.0))
    assert skeleton(h3).transformer.device.type == "meta"


def test_what_the_blocks_do_not_take_is_refused_before_loading(refused, h3, tmp_path, monkeypatch):
    monkeypatch.setattr(CalledBlocks, "of_parts", lambda *_: pytest.fail("loaded a pipeline"))
    film = tmp_path / "film.gif"
    Image.new("RGB", (SIDE, SIDE)).save(film)
    line = refused(*asked(h3, tmp_path / "a.mp4", "--video", film, "--strength", "0.5"))
    assert "takes no strength: leave --strength out" in line
    line = refused(*asked(h3, tmp_path / "a.mp4", "--save-latents", tmp_path / "a.safetensors"))
    assert "decode theirs in ways of their own" in line


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("vae", ["os", "system", {}], "vae must be a class of diffusers or transformers"),
        ("_class_name", "Popen", "_class_name must be a pipeline of diffusers, got 'Popen'"),
        ("scheduler", ["diffusers", "x", {}], "scheduler must be a model, a scheduler"),
    ],
)
def test_an_index_that_names_other_code_is_refused(h3, tmp_path, entry, value, said):
    index = json.loads((h3 / "modular_model_index.json").read_text())
    index[entry] = value
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said):
        index_of(tmp_path)


def test_only_pipelines_of_diffusers_are_made_callable():
    assert pipeline_class("WanModularPipeline") is pipeline_class("WanModularPipeline")
    with pytest.raises(ValueError, match="must be a pipeline of diffusers"):
        pipeline_class("WanBlocks")
    check_pipeline("minimax h3")
