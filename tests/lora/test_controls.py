"""Control films beside clips: found, held to their clips, kept, trained and generated with."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.clips import footage
from support.runs import WEIGHTS

from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.families import family_for
from gen_accel.attention_processors.families.latents import CONTROL
from gen_accel.lora import dry_run, trainer
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.finding import find_videos
from gen_accel.lora.step_trace import StepTracer
from gen_accel.measure.cost.model import subject_of
from gen_accel.measure.video_io import write_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.sampling import Clip

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZE = HEIGHT, WIDTH = 32, 48


def film(path, seed, frames=9, size=SIZE, caption=None):
    write_video(footage(frames, *size, seed=seed), path, fps=16)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips, each with the film that controls it."""
    folder = tmp_path_factory.mktemp("controlled") / "clips"
    folder.mkdir()
    for i, name in enumerate("ab"):
        film(folder / f"{name}.mp4", i, caption="a red square")
        film(folder / f"{name}.control.mp4", 10 + i)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    wan.PIPELINES["control"]().save_pretrained(folder)
    return folder


@pytest.fixture
def config(clips, model, tmp_path):
    def make(**fields):
        given: dict[str, Any] = {"model": str(model), "data": str(clips), "condition": "control"}
        given |= {"method": "radial", "settings": ("block=4",), "stages": ("5:1", "9:1")}
        given |= {"height": HEIGHT, "width": WIDTH, "max_tokens": 512}
        return ft.config(fields.pop("out", tmp_path / "run"), **(given | fields))

    return make


def test_they_are_found_beside_their_clips_and_in_manifests(clips, tmp_path):
    found = find_videos(clips, controls=True)
    assert [(v.name, v.control.name) for v in found] == [
        ("a.mp4", "a.control.mp4"),
        ("b.mp4", "b.control.mp4"),
    ]
    assert [(v.name, v.control) for v in find_videos(clips)] == [("a.mp4", None), ("b.mp4", None)]
    manifest = clips / "list.csv"
    manifest.write_text("video,caption,control\na.mp4,red,b.control.mp4\n")
    (only,) = find_videos(manifest, controls=True)
    assert only.control.name == "b.control.mp4"
    manifest.unlink()
    film(tmp_path / "alone.mp4", 0, caption="red")
    with pytest.raises(ValueError, match=r"1 of 1 videos .* no control film.*: alone\.mp4; put"):
        find_videos(tmp_path, controls=True)


def test_a_control_of_another_length_or_shape_is_named(tmp_path):
    for name, change in {"long": {"frames": 12}, "wide": {"size": (32, 64)}}.items():
        film(tmp_path / f"{name}.mp4", 0, caption="red")
        film(tmp_path / f"{name}.control.mp4", 1, **change)
    film(tmp_path / "good.mp4", 2, caption="red")
    film(tmp_path / "good.control.mp4", 3)
    asked = {"frames": (9,), "sizes": [SIZE], "max_tokens": 16, "condition": "control"}
    report = cache(wan.PIPELINES["control"](), tmp_path, tmp_path / "cache", **asked)
    assert report.broken == {
        "long.mp4": "its control has 12 frames, the clip 9: make them equal",
        "wide.mp4": "its control is 32 x 64 pixels, the clip 32 x 48: a control has its clip's "
        "shape",
    }
    assert report.encoded == 1


@pytest.mark.parametrize("frames", [5, 9])
def test_what_is_kept_is_what_the_pipeline_shows(clips, tmp_path, frames):
    """To the last bit, also for a clip that is shorter than what is cached of it."""
    pipe = wan.PIPELINES["control"]()
    asked = {"frames": (9,), "sizes": [SIZE], "max_tokens": 16, "store": "float32"}
    cache(pipe, clips, tmp_path, **asked, condition="control")
    found = LatentCache(tmp_path)
    assert (found.condition, found.causal) == ("control", True)
    kept = found.first_frame(1, (frames - 1) // 4 + 1)
    read = find_videos(clips, controls=True)[1].control
    shown = find_videos([film_as_clip(read)])[0].read(frames=frames, size=SIZE, fps=None)
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    sizes = {"height": HEIGHT, "width": WIDTH, "num_frames": frames, "num_inference_steps": 1}
    video = [*map(Image.fromarray, shown)]
    text = {"prompt": "a red square", "max_sequence_length": 512, "guidance_scale": 1.0}
    pipe(**text, video=video, **sizes, output_type="latent")
    hook.remove()
    [(given, out)] = calls
    control = given["control_hidden_states"]
    assert torch.equal(kept[CONTROL][None], control[:, :32])
    family, conditions = family_for(pipe.transformer, "training"), {CONTROL: kept[CONTROL][None]}
    conditions["encoder_hidden_states"] = given["encoder_hidden_states"]
    level = given["timestep"] / 1000
    with torch.no_grad():
        velocity = family.predict(pipe.transformer, given["hidden_states"], level, conditions)
    torch.testing.assert_close(velocity, out)
    other = conditions | {CONTROL: conditions[CONTROL].flip(-1)}
    with torch.no_grad():
        changed = family.predict(pipe.transformer, given["hidden_states"], level, other)
    assert not torch.equal(changed, velocity)


def film_as_clip(path):
    from gen_accel.lora.data.clips import CaptionedVideo

    return CaptionedVideo("control", "one", path)


@pytest.mark.slow
def test_two_steps_a_resume_and_a_generation(config, clips, tmp_path):
    control = clips / "b.control.mp4"
    sampled = {"validate_every": 2, "validation_prompts": ("a",), "validation_steps": 1}
    given = config(checkpoint_every=1, **sampled, validation_controls=(str(control),))
    done = trainer.train(given)
    assert all(np.isfinite(done.losses))
    recipe = read_recipe(done.folder)
    assert recipe.condition == "control"
    assert any("vace_blocks" in name for name in load_file(done.folder / WEIGHTS))
    assert (tmp_path / "run" / "validation" / "step-000002" / "00.mp4").is_file()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000002")
    trainer.train(given.replaced(out=str(tmp_path / "again"), validate_every=0), resume=True)
    whole, again = (load_file(tmp_path / x / "lora" / WEIGHTS) for x in ("run", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    clip = Clip(frames=9, height=HEIGHT, width=WIDTH, steps=1, max_tokens=512).given()
    with pytest.raises(ValueError, match=r"a control film: give one, --video CONTROL\.mp4"):
        generate(given.model, ["a"], out=tmp_path / "a.mp4", from_lora=done.folder, **clip)
    (made,) = generate(
        given.model, ["a"], out=tmp_path / "b.mp4", from_lora=done.folder, video=control, **clip
    )
    assert made.files["video"].is_file()
    with pytest.raises(ValueError, match="is trained with control films: give condition control"):
        trainer.train(config(condition=None, out=tmp_path / "text"))


def test_a_dry_run_and_a_plan_of_its_memory(config):
    assert all(np.isfinite(dry_run(config()).losses))
    subject = subject_of(wan.PIPELINES["control"]())
    trace = StepTracer(subject, TrainConfig(rank=4, dense_layers=1, mixed_precision="bf16")).trace(
        subject.grid(HEIGHT, WIDTH, 9), 0.3
    )
    latent = 4 * 3 * 4 * 6  # bytes of a channel
    assert trace.batch > (2 * 16 + 32) * latent  # clip, noise and control


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_controls": ("a.mp4",)}, "are for condition control, got None: leave"),
        (
            {"condition": "control", "validate_every": 1, "validation_prompts": ("a",)},
            "validation_controls must be as many as validation_prompts, 1, got 0",
        ),
        (
            {"condition": "control", "last_frame_dropout": 0.1},
            "last_frame_dropout 0.1 is for condition last_frame, got condition control",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(fields)
