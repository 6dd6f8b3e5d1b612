"""Clips that are made again from the settings inside them, on the demo model."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from support.methods import CASES

from gen_accel import Mixed, Radial, Rule, demo
from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.cli import generate as verb
from gen_accel.cli.generate import OtherThanMade
from gen_accel.measure import clip_settings, read_video, write_json
from gen_accel.measure.clip_settings import KEY, read_settings
from gen_accel.measure.video_io import read_about, write_video
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.plan import written_options
from gen_accel.pipelines.tuning.preset import BUNDLED_PRESETS, read_preset

PROMPT = "a red square moves right"
SMALL = ("--frames", "9", "--height", "48", "--width", "48", "--steps", "2")
GIVEN = ("generate", "--model", "demo", "--prompt", PROMPT, *SMALL)
# Options that a clip does not depend on: where it goes, and how it is made and shown.
OTHERS = {
    *("out", "prompts", "compare", "timed", "offload", "save_latents", "from_latents"),
    *("overwrite", "preview", "settings", "metrics", "seconds", "resume"),
    *("ray", "ray_workers"),
}


def test_each_option_is_a_setting_of_a_clip_or_none():
    options = GenerateConfig.options().values()
    assert {one.name for one in options if not one.kept} == OTHERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@pytest.fixture
def made(folder, run):
    """A clip by a method with options, and its latents; made once."""
    clip = folder / "cat.mp4"
    if not clip.exists():
        options = ("--method", "neighborhood", "--set", "window=-1,3,3", "--seed", "7")
        kept = ("--dense-steps", "1", "--dense-layers", "0,2", "--save-latents")
        run(*GIVEN, *options, *kept, folder / "cat.safetensors", "--out", clip)
    return clip


def written(made, path: Path, **changed) -> Path:
    """A picture that carries the settings of a clip, changed."""
    data = json.loads(read_about(made)[KEY]) | changed
    write_video(np.zeros((1, 2, 2, 3), np.uint8), path, fps=8, about={KEY: json.dumps(data)})
    return path


@pytest.mark.slow
def test_the_same_pixels_and_latents_come_again(run, made, tmp_path):
    """Before they are coded: H.264 loses a little, and not always the same."""
    again = ("--out", tmp_path / "b", "--save-latents", tmp_path / "b.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherThanMade)
        said = run("generate", "--from-settings", made, *again)
    assert "loading the model demo" in said.stderr
    assert read_settings(tmp_path / "b") == read_settings(made)
    first, second = (
        load_file(path)["latents"]
        for path in (made.with_suffix(".safetensors"), tmp_path / "b.safetensors")
    )
    assert torch.equal(first, second)
    first = ("--from-latents", made.with_suffix(".safetensors"), "--out", tmp_path / "a")
    run("generate", "--model", "demo", *first)
    assert np.array_equal(read_video(tmp_path / "a"), read_video(tmp_path / "b"))


def test_what_a_clip_says_is_a_config(run, made, tmp_path):
    text = run("generate", "--from-settings", made, "--print-config").stdout
    found = yaml.safe_load(text)
    assert found["prompt"] == [PROMPT]
    assert (found["method"], found["set"], found["seed"]) == (
        "neighborhood",
        ["window=-1,3,3"],
        7,
    )
    assert (found["dense_steps"], found["dense_layers"]) == (1, [0, 2])
    assert (found["guidance_scale"], found["dtype"], found["model"]) == (5.0, "float32", "demo")
    (tmp_path / "a.yaml").write_text(text)
    assert run("generate", "--config", tmp_path / "a.yaml", "--print-config").stdout == text


def test_what_is_typed_wins(run, made):
    typed = ("--seed", "8", "--method", "radial", "--prompt", "a blue circle moves up")
    text = run("generate", "--from-settings", made, *typed, "--print-config").stdout
    found = yaml.safe_load(text)
    assert (found["seed"], found["method"], found["steps"]) == (8, "radial", 2)
    assert found["prompt"] == ["a blue circle moves up"]


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first"),
    [("a.png", "a/0000.png"), ("a", "a/0000.png"), ("a.gif", "a.gif"), ("a-1.mp4", "a-1.mp4")],
)
def test_each_format_carries_them(run, tmp_path, name, first):
    run(*GIVEN, "--out", tmp_path / name)
    again = ("--from-settings", tmp_path / first, "--out", tmp_path / "again" / name)
    run("generate", *again)
    target = tmp_path / name.removesuffix(".png")
    again = tmp_path / "again" / name.removesuffix(".png")
    assert read_settings(target) == read_settings(again)
    if not name.endswith(".mp4"):
        assert np.array_equal(read_video(target), read_video(again))


@pytest.mark.slow
def test_one_picture_carries_them(run, tmp_path):
    size = ("--frames", "1", "--height", "48", "--width", "48", "--steps", "2")
    run(*GIVEN[:5], *size, "--out", tmp_path / "a.png")
    assert KEY in Image.open(tmp_path / "a.png").text
    run("generate", "--from-settings", tmp_path / "a.png", "--out", tmp_path / "b.png")
    assert np.array_equal(read_video(tmp_path / "a.png"), read_video(tmp_path / "b.png"))


@pytest.mark.slow
def test_a_video_from_a_video_is_made_again(run, made, tmp_path):
    source = tmp_path / "source.mp4"
    source.write_bytes(made.read_bytes())
    remade = ("--video", source, "--strength", "0.7")
    run(*GIVEN, *remade, "--out", tmp_path / "a.mp4")
    again = ("generate", "--from-settings", tmp_path / "a.mp4", "--out", tmp_path / "b.mp4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherThanMade)
        run(*again)
    assert np.array_equal(read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4"))
    found = read_settings(tmp_path / "b.mp4").fields
    assert (found["video"], found["strength"]) == (str(source), 0.7)
    write_video(read_video(source)[::-1], source, fps=8)
    with pytest.warns(OtherThanMade, match="video .*source.mp4 is not what a.mp4 was made with"):
        run(*again, "--overwrite")
    assert not np.array_equal(read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4"))


@pytest.mark.slow
def test_both_clips_of_a_comparison_carry_their_own(run, tmp_path):
    run(*GIVEN, "--compare", "--method", "radial", "--out", tmp_path / "a.gif")
    for clip in ("a.gif", "a.dense.gif", "a.json"):
        out = tmp_path / f"again-{clip}.gif"
        run("generate", "--from-settings", tmp_path / clip, "--out", out)
        like = "a.dense.gif" if "dense" in clip else "a.gif"
        again = read_video(out)
        assert np.array_equal(read_video(tmp_path / like), again), clip
    assert read_settings(tmp_path / "a.dense.gif").fields["method"] == "dense"
    assert read_about(tmp_path / "a.side_by_side.gif") == {}


def preset_at(path: Path) -> Path:
    """A preset of the demo model for two steps of a small clip."""
    tuned = read_preset(BUNDLED_PRESETS / "demo-balanced.json")
    rules = (Rule(Radial(decay_factor=0.2, block=4), layers=(0, 1)),)
    made_for = replace(tuned.made_for, sigmas=(1.0, 0.5, 0.0))
    write_json(path, replace(tuned, method=Mixed(rules, 2), made_for=made_for).to_dict())
    return path


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.tuning.preset.OtherThanTuned")
@pytest.mark.parametrize("option", ["preset", "from-lora", "image-prompt"])
def test_what_files_give_comes_again(run, refused, tmp_path, option):
    """The same while the file is the same; else it is warned of, and named where it is gone."""
    file = tmp_path / "its file"
    if option == "preset":
        preset_at(file)
    elif option == "from-lora":
        shutil.copytree(Path(demo.__file__).parent / "long_lora", file)
    else:
        Image.new("RGB", (32, 32), "red").save(file, "png")
    more = ("--image-adapter", "demo") if option == "image-prompt" else ()
    clip, again = tmp_path / "a.gif", tmp_path / "b.gif"
    run(*GIVEN, f"--{option}", file, *more, "--out", clip)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherThanMade)
        run("generate", "--from-settings", clip, "--out", again)
    assert np.array_equal(read_video(clip), read_video(again))
    if option == "image-prompt":
        Image.new("RGB", (32, 32), "blue").save(file, "png")
    elif option == "preset":
        file.write_text(file.read_text() + " ")
    else:
        (file / "notes.txt").write_text("more")
    with pytest.warns(OtherThanMade, match=rf"{file} is not what a\.gif was made with"):
        run("generate", "--from-settings", clip, "--out", again, "--overwrite")
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert str(file) in refused("generate", "--from-settings", clip)


@pytest.mark.slow
def test_without_settings_a_file_says_nothing(run, refused, tmp_path):
    run(*GIVEN, "--no-settings", "--out", tmp_path / "a.mp4")
    assert PROMPT.encode() not in (tmp_path / "a.mp4").read_bytes()
    line = refused("generate", "--from-settings", tmp_path / "a.mp4")
    assert f"{tmp_path / 'a.mp4'} carries no settings" in line


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "carries settings of version 2, and gen_accel"),
        ({"version": "1"}, "version in"),
        ({"fields": {"hieght": 3}}, "sets 'hieght', which is no setting of a clip"),
        ({"fields": {"out": "/etc/passwd"}}, "sets 'out', which is no setting of a clip"),
        ({"fields": {"height": "tall"}}, "a.png: height must be int or none, got 'tall'"),
        ({"fields": []}, "fields in"),
        ({"fields": {"method": "os:path"}}, "names code of its maker, 'os:path', which is"),
        ({"wordless": {"method": "Mine()"}}, "was made with Mine(), which no word gives: add"),
        ({"gen_accel": "recipe"}, "carries no settings"),
    ],
    ids=str,
)
def test_what_a_stranger_wrote_is_refused(refused, made, tmp_path, changed, message):
    path = written(made, tmp_path / "a.png", **changed)
    assert message in refused("generate", "--from-settings", path)


def test_missing_files_are_named(refused, made, tmp_path):
    assert "no video at" in refused("generate", "--from-settings", tmp_path / "no.mp4")
    assert "no settings at" in refused("generate", "--from-settings", tmp_path / "no.json")
    fields = read_settings(made).fields | {"model": str(tmp_path / "gone")}
    path = written(made, tmp_path / "a.png", fields=fields)
    assert f"no folder at {tmp_path / 'gone'}" in refused("generate", "--from-settings", path)


def test_two_files_of_settings_are_refused(refused, made, tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\n")
    line = refused("generate", "--from-settings", made, "--config", tmp_path / "a.yaml")
    assert "settings come from one file, got cat.mp4 and a.yaml" in line


def test_other_versions_and_files_are_warned_of(made, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(verb, "_warn", told.append)

    def checked(**changed):
        told.clear()
        path = written(made, tmp_path / "a.png", **changed)
        verb.tell_differences(path, GenerateConfig.read(verb.read_clip(path, {})))
        return [*told]

    assert checked() == []
    versions = clip_settings.versions()
    made_by = versions | {"torch": "1.0"}
    assert checked(made_by=made_by) == [
        f"a.png was made by torch 1.0, here {versions['torch']}: pixels may differ"
    ]
    assert checked(files={"model": {"demo": "0" * 64}}) == [
        "model demo is not what a.png was made with: pixels may differ"
    ]


@pytest.mark.parametrize("suffix", [".json", ".png", ".gif", ".mp4"])
def test_only_files_that_an_option_names_are_looked_at(made, tmp_path, monkeypatch, suffix):
    """Nor is more read than a bounded part of a folder."""
    (many := tmp_path / "many").mkdir()
    for name in "abcd":
        (many / name).write_bytes(b"x")
    named = {"/proc/kmsg": "x", "/usr/share": "x", str(many): "x"}
    fields = read_settings(made).fields | {"image_adapter": str(many)}
    held = dict.fromkeys(("model", "lora", "from_lora", "image_adapter"), named)
    monkeypatch.setattr(clip_settings, "MOST_FILES", 3)
    monkeypatch.setattr(verb, "_warn", pytest.fail)
    found = replace(read_settings(made), fields=fields, files=held).to_dict()
    path = tmp_path / f"s{'' if suffix == '.png' else suffix}"
    if suffix == ".json":
        write_json(path, found)
    else:
        about = {KEY: json.dumps(found)}
        write_video(np.zeros((2, 2, 2, 3), np.uint8), path, fps=8, about=about)
    verb.tell_differences(path, GenerateConfig.read(verb.read_clip(path, {})))


@pytest.mark.slow
def test_an_interrupted_list_keeps_its_clips_and_previews(run, monkeypatch, tmp_path):
    """The preview of the clip that was being made stays, as it is all there is of it."""
    forward, calls = WanTransformer3DModel.forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 7:  # two calls a step: the first of the last step of the second clip
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", interrupted)
    more = ("--prompt", "a blue circle moves up", "--preview", "1", "--out", tmp_path / "a.gif")
    run(*GIVEN, *more, code=130)
    found = sorted(path.name for path in tmp_path.iterdir())
    whole = ["a-000.gif", "a-000.gif.done.json", "a-000.preview.png"]
    assert found == [*whole, "a-001.gif.done.json", "a-001.preview.png"]
    for name in ("a-000.preview.png", "a-001.preview.png"):
        Image.open(tmp_path / name).load()


@pytest.mark.slow
def test_each_video_is_a_line_of_json(run, tmp_path):
    options = ("--frames", "5", "--height", "48", "--width", "48", "--steps", "1", "--seed", "3")
    given = ("generate", "--model", "demo", "--prompt", PROMPT, "--method", "radial", *options)
    more = ("--prompt", "a blue circle moves up", "--out", tmp_path / "a.gif")
    done = run(*given, *more, "--json", "-")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["prompt"], one["seed"]) for one in lines] == [
        (PROMPT, 3),
        ("a blue circle moves up", 4),
    ]
    assert lines[1]["files"] == {"video": str(tmp_path / "a-001.gif")}
    assert all(one["seconds"] > 0 and 0 < one["density"] <= 1 for one in lines)
    assert f"{PROMPT}  (seed 3" in done.stderr
    path = tmp_path / "made.jsonl"
    done = run(*given, "--out", tmp_path / "b.gif", "--json", path)
    assert PROMPT in done.stdout
    assert json.loads(path.read_text())["files"] == {"video": str(tmp_path / "b.gif")}


@pytest.mark.parametrize("method", CASES, ids=repr)
def test_a_method_in_python_comes_again_by_its_words(method):
    found = method_from(method_name(method), written_options(method))
    assert found == method
