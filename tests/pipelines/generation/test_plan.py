"""What `generate` is asked for, resolved without a model."""

import inspect
import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest

from gen_accel import Dense, Radial, demo
from gen_accel.pipelines.generation import plan as plan_module
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.plan import Video, plan_of
from gen_accel.pipelines.generation.prompt_list import Share

LORA = Path(demo.__file__).parent / "long_lora"

pytestmark = pytest.mark.usefixtures("no_loading")


def planned(tmp_path, *, prompts=("a",), **fields):
    options = {"method": Radial(), "out": tmp_path / "a.gif"} | fields
    given = {name: value for name, value in options.items() if value is not None}
    config = GenerateConfig(model="demo", prompt=prompts, **given)
    config.check()
    return plan_of(config)


def test_a_plan_has_the_videos(tmp_path):
    one = planned(tmp_path, seed=7)
    assert one.videos == (Video("a", 7, tmp_path / "a.gif"),)
    assert not one.config.is_list
    with pytest.raises(FrozenInstanceError):
        one.method = Dense()


def test_several_prompts_are_numbered_with_seeds_of_their_own(tmp_path):
    kept = tmp_path / "x.safetensors"
    several = planned(tmp_path, prompts=("a", "b"), seed=3, save_latents=kept)
    assert several.config.is_list
    assert several.videos == (
        Video("a", 3, tmp_path / "a-000.gif", tmp_path / "x-000.safetensors"),
        Video("b", 4, tmp_path / "a-001.gif", tmp_path / "x-001.safetensors"),
    )
    assert [several.clip_of(video).seed for video in several.videos] == [3, 4]


def test_the_request_is_what_a_video_depends_on(tmp_path):
    def request(**fields):
        return planned(tmp_path, **fields).request

    plain = request()
    assert json.loads(json.dumps(plain)) == plain
    assert request(kernel="reference", timed=True, device="cpu") == plain
    assert request(dense_kernel="reference") == plain
    for fields in ({"method": Radial(decay_factor=0.5)}, {"dtype": "float16"}):
        assert request(**fields) != plain
    assert request(compare=True) != request(compare=True, timed=True)
    assert request(compare=True) != request(compare=True, dense_kernel="reference")
    assert request(compare=True) != request(compare=True, metrics=())


def test_a_lora_brings_its_method_weights_guidance_and_techniques(tmp_path):
    def resolved(**fields):
        return planned(tmp_path, method=None, from_lora=LORA, **fields)

    found = resolved()
    assert isinstance(found.method, Radial)
    assert found.config.loras == (str(LORA),)
    assert found.config.guidance_scale == 1.0
    assert (found.techniques, found.config.trained_frames) == (("fresh_noise",), 33)
    assert resolved(guidance_scale=4.0).config.guidance_scale == 4.0
    own = resolved(extend=())
    assert (own.techniques, own.config.trained_frames) == ((), None)


def test_a_lora_of_few_levels_is_sampled_at_them(tmp_path, monkeypatch):
    levels = (1.0, 0.9, 0.75, 0.5)
    recipe = plan_module.read_recipe(LORA)
    few = plan_module.replace(recipe, levels=levels, techniques=())
    monkeypatch.setattr(plan_module, "read_recipe", lambda source: few)

    def resolved(**fields):
        return planned(tmp_path, method=None, from_lora=LORA, **fields).config

    found = resolved()
    assert (found.sampler, found.levels, found.steps) == ("euler", levels, 4)
    assert resolved(steps=8).sampling is None
    assert resolved(sampler="lcm", shift=3.0).levels == ()


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({"seconds": 2}, 33),  # 16 frames a second, 4 more each time
        ({"seconds": 4.1, "fps": 10}, 41),
        ({"seconds": 0.1}, 5),
        ({"seconds": 5, "method": None, "from_lora": LORA}, 81),
    ],
    ids=str,
)
def test_seconds_become_frames_that_the_model_makes(tmp_path, fields, frames):
    found = planned(tmp_path, **fields)
    assert (found.config.frames, found.config.seconds) == (frames, None)
    assert found.request["frames"] == frames
    made = plan_module.replace(found, config=found.config.model_copy(update={"fps": 16.0}))
    assert made.told == (f"{fields['seconds']:g} s at 16 frames a second: {frames} frames",)


@pytest.mark.parametrize("frames", [33, 65])
def test_techniques_of_a_lora_hold_for_longer_video_alone(tmp_path, monkeypatch, frames):
    monkeypatch.setattr(
        plan_module, "filled", lambda pipe, clip, *inputs: clip.replaced(frames=frames)
    )
    monkeypatch.setattr(plan_module, "check_clip", lambda *given: None)
    found = planned(tmp_path, method=None, from_lora=LORA).fitted(None)
    assert found.config.frames == frames
    wanted = (("fresh_noise",), 33) if frames > 33 else ((), None)
    assert (found.techniques, found.config.trained_frames) == wanted


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"from_lora": LORA}, r"brings its own method, got Radial\("),
        (
            {"from_lora": LORA, "method": None, "compare": True},
            "compare does not go with from_lora .*: give the LoRA by lora, with a method",
        ),
        (
            {"from_lora": LORA, "method": None, "preset": "fast", "compare": True},
            "compare does not go with from_lora",
        ),
        ({"preset": "fast"}, "takes the place of --method"),
        ({"method": Dense(), "compare": True}, r"got Dense\(\)"),
        ({"compare": True, "extend": ["riflex"]}, "compare goes with neither"),
        ({"metrics": ("vmaf",)}, "metrics go with compare, got vmaf without"),
        ({"metrics": ("vmav",), "compare": True}, "did you mean 'vmaf'"),
        ({"compare": True, "save_latents": "x.safetensors"}, "compare goes with neither"),
        ({"extend": ["riflexx"]}, "technique must be one of"),
        ({"seconds": 5, "frames": 33}, "seconds 5 take the place of frames 33: leave one"),
        ({"seconds": 0}, "seconds must be above 0 and at most 3600, got 0"),
        ({"trained_frames": 81}, "trained_frames is for a technique"),
        ({"kernel": "flexx"}, "flexx"),
        ({"dense_kernel": "flexx"}, "dense_kernel must be .*flexx"),
        ({"seed": 2**63 - 1, "prompts": ["a", "b"]}, "seed must be from 0"),
        ({"prompts": []}, "no prompts"),
        ({"out": "a.avi"}, "avi"),
        ({"hieght": 3}, "no field 'hieght'; did you mean 'height'"),
    ],
    ids=str,
)
def test_what_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, fields, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        planned(Path(), **({"out": "a.gif"} | fields))
    assert not [*tmp_path.iterdir()]


def test_the_keywords_of_generate_are_those_of_its_config():
    keywords = inspect.signature(generate).parameters
    assert [*keywords][:2] == ["model", "prompts"]
    assert {*keywords} == GenerateConfig.model_fields.keys() - {"prompt"}


def test_a_process_alone_keeps_its_device_and_makes_all():
    alone = Share([0, 1])
    assert (alone.rank, alone.is_main_process) == ("", True)
    assert alone.device("auto") == "auto"
    assert alone.gathered({0: "a", 1: "b"}) == ["a", "b"]


def test_each_of_several_processes_has_a_device_of_its_own():
    state = SimpleNamespace(num_processes=2, process_index=1, device="cuda:1")
    share = Share([1], state)
    assert share.rank == "1: "
    assert share.device("auto") == "cuda:1"
    assert share.device("cuda") == "cuda:1"
    assert share.device("cpu") == "cpu"
