"""What `generate` is asked for, resolved without a model."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gen_accel import Dense, Radial, demo
from gen_accel.pipelines.generation.job import Job, Video
from gen_accel.pipelines.generation.loading import Loading
from gen_accel.pipelines.generation.prompt_list import Share
from gen_accel.pipelines.generation.sampling import Clip

LORA = Path(demo.__file__).parent / "long_lora"

pytestmark = pytest.mark.usefixtures("no_loading")


def job(**fields) -> Job:
    return Job(demo.path(), **({"method": Radial()} | fields))


def test_a_job_is_resolved_into_another(tmp_path):
    asked = job(clip=Clip(seed=7))
    one = asked.resolve(["a"], out=tmp_path / "a.mp4")
    assert (asked.videos, asked.request, asked.several) == ((), {}, False)
    assert one.videos == (Video("a", 7, tmp_path / "a.mp4"),)
    assert not one.several
    with pytest.raises(FrozenInstanceError):
        one.kernel = "flex"


def test_several_prompts_are_numbered_with_seeds_of_their_own(tmp_path):
    several = job(clip=Clip(seed=3)).resolve(
        ["a", "b"], out=tmp_path / "clip.gif", latents=tmp_path / "x.safetensors"
    )
    assert several.several
    assert several.videos == (
        Video("a", 3, tmp_path / "clip-000.gif", tmp_path / "x-000.safetensors"),
        Video("b", 4, tmp_path / "clip-001.gif", tmp_path / "x-001.safetensors"),
    )
    assert [several.clip_of(video).seed for video in several.videos] == [3, 4]
    assert job().resolve(["a"], out=tmp_path / "a.gif", numbered=True).several


def test_the_request_is_what_a_video_depends_on(tmp_path):
    def request(**fields):
        return job(**fields).resolve(["a"], out=tmp_path / "a.gif").request

    plain = request()
    assert json.loads(json.dumps(plain)) == plain
    assert request(kernel="reference", timed=True, loading=Loading(device="cpu")) == plain
    assert request(dense_kernel="reference") == plain
    for fields in ({"method": Radial(decay_factor=0.5)}, {"loading": Loading(dtype="float16")}):
        assert request(**fields) != plain
    assert request(compare=True) != request(compare=True, timed=True)
    assert request(compare=True) != request(compare=True, dense_kernel="reference")
    assert request(compare=True) != request(compare=True, metrics=())


def test_a_lora_brings_its_method_weights_guidance_and_techniques(tmp_path):
    def resolved(techniques=None, **fields):
        given = job(method=None, from_lora=LORA, **fields)
        return given.resolve(["a"], out=tmp_path / "a.gif", techniques=techniques)

    found = resolved()
    assert isinstance(found.method, Radial)
    assert found.loading.loras == (str(LORA),)
    assert found.clip.guidance_scale == 1.0
    assert (found.techniques, found.trained_frames, found.only_longer) == (
        ("fresh_noise",),
        33,
        True,
    )
    assert resolved(clip=Clip(guidance_scale=4.0)).clip.guidance_scale == 4.0
    own = resolved(techniques=())
    assert (own.techniques, own.trained_frames, own.only_longer) == ((), None, False)


@pytest.mark.parametrize("frames", [33, 65])
def test_techniques_of_a_lora_hold_for_longer_video_alone(tmp_path, monkeypatch, frames):
    from gen_accel.pipelines.generation import job as module

    monkeypatch.setattr(module, "filled", lambda pipe, clip, *inputs: replace(clip, frames=frames))
    monkeypatch.setattr(module, "check_clip", lambda *given: None)
    found = job(method=None, from_lora=LORA).resolve(["a"], out=tmp_path / "a.gif").fitted(None)
    assert found.clip.frames == frames
    wanted = (("fresh_noise",), 33) if frames > 33 else ((), None)
    assert (found.techniques, found.trained_frames) == wanted


@pytest.mark.parametrize(
    ("fields", "given", "words"),
    [
        ({"method": None}, {}, "give a method, or from_lora"),
        ({"from_lora": LORA}, {}, r"brings its own method, got Radial\("),
        (
            {"from_lora": LORA, "method": None, "compare": True},
            {},
            "compare does not go with from_lora .*: give the LoRA by lora, with a method",
        ),
        (
            {"from_lora": LORA, "method": None, "preset": "fast", "compare": True},
            {},
            "compare does not go with from_lora",
        ),
        ({"method": Dense(), "compare": True}, {}, r"got Dense\(\)"),
        ({"compare": True}, {"techniques": ["riflex"]}, "compare goes with neither"),
        ({"metrics": ("vmaf",)}, {}, "metrics go with compare, got vmaf without"),
        ({"metrics": ("vmav",), "compare": True}, {}, "did you mean 'vmaf'"),
        ({"compare": True}, {"latents": "x.safetensors"}, "compare goes with neither"),
        ({}, {"techniques": ["riflexx"]}, "technique must be one of"),
        ({"trained_frames": 81}, {}, "trained_frames is for a technique"),
        ({"kernel": "flexx"}, {}, "flexx"),
        ({"dense_kernel": "flexx"}, {}, "dense_kernel must be .*flexx"),
        ({"clip": Clip(seed=2**63 - 1)}, {"prompts": ["a", "b"]}, "seed must be from 0"),
        ({}, {"prompts": []}, "no prompts"),
        ({}, {"out": "a.avi"}, "avi"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, fields, given, words):
    monkeypatch.chdir(tmp_path)
    options = {"prompts": ["a"], "out": "a.gif"} | given
    with pytest.raises(ValueError, match=words):
        job(**fields).resolve(**options)
    assert not [*tmp_path.iterdir()]


def test_a_process_alone_keeps_its_device_and_makes_all():
    alone = Share([0, 1])
    assert (alone.rank, alone.is_main_process) == ("", True)
    assert alone.loading(Loading(device="auto")) == Loading(device="auto")
    assert alone.gathered({0: "a", 1: "b"}) == ["a", "b"]


def test_each_of_several_processes_has_a_device_of_its_own():
    state = SimpleNamespace(num_processes=2, process_index=1, device="cuda:1")
    share = Share([1], state)
    assert share.rank == "1: "
    assert share.loading(Loading(device="auto")).device == "cuda:1"
    assert share.loading(Loading(device="cuda")).device == "cuda:1"
    assert share.loading(Loading(device="cpu")).device == "cpu"
