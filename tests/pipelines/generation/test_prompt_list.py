"""Many prompts: made once, and shared out among processes."""

import json
import os
import shutil
import time

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from support import wan
from support.forked import Forked
from support.paths import ROOT, environment
from support.products import NIGHTLY
from support.runs import two_processes
from typer.testing import CliRunner

from gen_accel import Radial
from gen_accel.attention_processors.image_prompt import new_adapter
from gen_accel.cli import app
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.image_prompt.formats import base_of, write_adapter
from gen_accel.pipelines.image_prompt.projectors import Pixels

pytestmark = pytest.mark.slow

SMALL = ("--frames", "5", "--height", "16", "--width", "16", "--steps", "1")
TEXTS = ["a red square moves right", "a blue circle", "a green triangle moves up"]
# Without a GPU, "auto" has to find the processes of its own.
DEVICE = "cpu" if torch.accelerator.is_available() else "auto"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "model"
    wan.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of two prompts that are done, and the arguments that made them."""
    folder = tmp_path_factory.mktemp("finished")
    args = arguments(model, folder, TEXTS[:2])
    assert CliRunner().invoke(app, args).exit_code == 0
    return folder, args


@pytest.fixture
def loads(monkeypatch):
    """Whether a command line has something to make, maybe in place of what is there already; it is
    not made."""

    class Loaded(BaseException):
        pass

    def fail(*args, **kwargs):
        raise Loaded

    def ask(args):
        with monkeypatch.context() as patched:
            patched.setattr(DiffusionPipeline, "from_pretrained", fail)
            for more in ((), ("--overwrite",)):
                try:
                    result = CliRunner().invoke(app, [*map(str, args), *more])
                except Loaded:
                    return True
                if result.exit_code == 0:
                    return False
                assert "is there already, and not of this prompt" in result.output
        raise AssertionError("refused with --overwrite")

    return ask


def arguments(model, folder, texts=TEXTS, out="clip.gif"):
    """Of `gen-accel`, for a list of prompts; by the same kernels in every process."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(texts))
    names = ("--model", model, "--prompts", prompts, "--out", folder / out, "--device", DEVICE)
    kernels = ("--kernel", "gather", "--linear-kernel", "torch")
    return [str(arg) for arg in ("generate", *names, *kernels, *SMALL)]


def paths(folder):
    """Of all that is made of the prompts, and of what says so."""
    return sorted(path for path in folder.glob("clip*/**/*") if path.is_file()) + sorted(
        path for path in folder.glob("clip*") if path.is_file()
    )


def outputs(folder):
    """Bytes by name."""
    made = [path for path in paths(folder) if not path.name.endswith(".done.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in made}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in paths(folder)}


def finished_in(folder):
    """Names of the videos with a whole record."""
    records = folder.glob("clip*.done.json")
    return [
        p.name.removesuffix(".done.json") for p in records if json.loads(p.read_text())["sha256"]
    ]


# Without a cache processes find no kernel that was built here, as conftest.py has it.
ALONE = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": "/nowhere"}


def launch(args):
    """What two processes print: by night those that the launcher starts."""
    return two_processes("gen_accel", args, environment(**ALONE), launcher=NIGHTLY)


def test_what_is_done_is_not_made_again(run, model, tmp_path, monkeypatch):
    args = arguments(model, tmp_path)
    first = run(*args)
    assert [*outputs(tmp_path)] == ["clip-000.gif", "clip-001.gif", "clip-002.gif"]
    assert all(f"{text}  (seed {i}, " in first.stdout for i, text in enumerate(TEXTS))
    before = times(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    again = run(*args)
    assert again.stdout == ""
    assert again.stderr == "3 of 3 are done already: clip-000.gif to clip-002.gif\n"
    assert times(tmp_path) == before


def test_only_the_prompt_that_changed_is_made_again(run, refused, model, tmp_path):
    run(*arguments(model, tmp_path))
    before = times(tmp_path)
    args = arguments(model, tmp_path, [TEXTS[0], "a yellow circle", TEXTS[2]])
    assert "clip-001.gif is there already, and not of this prompt" in refused(*args)
    assert times(tmp_path) == before
    again = run(*args, "--overwrite")
    assert again.stderr.startswith("2 of 3 are done already: clip-000.gif, clip-002.gif\n")
    assert "a yellow circle  (seed 1, " in again.stdout
    assert TEXTS[0] not in again.stdout
    after = times(tmp_path)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"clip-001.gif", "clip-001.gif.done.json"}


def test_prompts_added_to_a_list_are_all_that_is_made(run, model, tmp_path):
    run(*arguments(model, tmp_path, TEXTS[:2]))
    before = times(tmp_path)
    run(*arguments(model, tmp_path))
    after = times(tmp_path)
    assert after.keys() - before.keys() == {"clip-002.gif", "clip-002.gif.done.json"}
    assert before.items() <= after.items()


CHANGES = {
    "seed": ("--seed", "1"),
    "steps": ("--steps", "2"),
    "frames": ("--frames", "9"),
    "guidance": ("--guidance-scale", "1"),
    "negative prompt": ("--negative-prompt", "red"),
    "speed": ("--fps", "8"),
    "method": ("--method", "dense"),
    "field": ("--method", "radial", "--set", "decay_factor=0.5"),
    "schedule": ("--dense-steps", "1"),
    "precision": ("--dtype", "bfloat16"),
    "comparison": ("--compare",),
    "technique": ("--extend", "riflex", "--trained-frames", "1"),
    "trained frames": ("--extend", "riflex", "--trained-frames", "5"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_video_makes_it_again(loads, finished, change):
    assert loads([*finished[1], *change])


SAME = [
    ("--kernel", "reference"),
    ("--timed",),
    ("--device", "cpu"),
    ("--fps", "16"),  # the rate of the model
    ("--guidance-scale", "5"),  # the default of the pipeline
]


@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_video_makes_nothing(loads, finished, change):
    assert not loads([*finished[1], *change])


def test_latents_asked_for_later_need_the_video_again(loads, finished, tmp_path):
    assert loads([*finished[1], "--save-latents", str(tmp_path / "latents.safetensors")])


def test_latents_are_found_however_their_path_is_written(run, loads, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [*arguments(model, tmp_path, TEXTS[:2]), "--save-latents"]
    run(*args, "kept/clip.safetensors")
    assert not loads([*args, "kept/clip.safetensors"])
    assert not loads([*args, str(tmp_path / "kept" / "clip.safetensors")])
    assert not loads(args[:-1])
    assert loads([*args, "elsewhere/clip.safetensors"])


def test_all_may_be_moved_together(run, loads, model, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    args = [*arguments(model, here, TEXTS[:2]), "--save-latents", f"{here}/clip.safetensors"]
    run(*args)
    here.rename(there)
    assert not loads([arg.replace(str(here), str(there)) for arg in args])


UNFIT = ["", "[]", "null", '"asked"', "{}", '{"asked": [], "clip": {}, "sha256": {}}']


@pytest.mark.parametrize("text", [*UNFIT, "without files", "without a hash"])
def test_what_is_no_record_says_nothing_is_done(loads, finished, text):
    folder, args = finished
    record = folder / "clip-000.gif.done.json"
    before = record.read_text()
    hashes = {"without files": {}, "without a hash": {"nothing": None}}
    unfit = json.dumps(json.loads(before) | {"sha256": hashes[text]}) if text in hashes else text
    try:
        record.write_text(unfit)
        assert loads(args)
    finally:
        record.write_text(before)
    assert not loads(args)


def test_a_record_knows_the_frames_a_second(finished):
    record = json.loads((finished[0] / "clip-000.gif.done.json").read_text())
    assert (record["asked"]["fps"], record["clip"]["fps"]) == (None, 16)


def test_weights_that_changed_make_all_again(loads, finished, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")  # with the times of the files
    args = [str(copy) if arg == str(model) else arg for arg in finished[1]]
    assert not loads(args)
    os.utime(next((copy / "transformer").glob("*.safetensors")))
    assert loads(args)


def test_a_lora_counts_with_its_weight_and_its_file(run, loads, model, tmp_path):
    pipe = wan.pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    args = arguments(model, tmp_path, TEXTS[:2])
    run(*args, "--lora", f"{tmp_path / 'lora'}:0.5")
    assert loads(args)
    assert loads([*args, "--lora", f"{tmp_path / 'lora'}:0.6"])
    assert not loads([*args, "--lora", f"{tmp_path / 'lora'}:0.5"])
    os.utime(next((tmp_path / "lora").iterdir()))
    assert loads([*args, "--lora", f"{tmp_path / 'lora'}:0.5"])


def test_an_image_counts_by_its_pixels(run, loads, model, tmp_path):
    transformer = wan.transformer()
    projector = Pixels(width=wan.HEADS * wan.HEAD_DIM, tokens=4, channels=(8, 8))
    made = new_adapter(transformer, projector, variant="pixels")
    write_adapter(tmp_path / "adapter", made, base_of(transformer) | {"image_size": 16})
    for name, color in (("red", "red"), ("copy", "red"), ("blue", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    without = arguments(model, tmp_path, TEXTS[:2])
    args = [*without, "--image-adapter", str(tmp_path / "adapter"), "--image-prompt"]
    red, copy, blue = (str(tmp_path / f"{name}.png") for name in ("red", "copy", "blue"))
    run(*args, red)
    assert not loads([*args, copy])
    assert loads(without)
    assert loads([*args, blue])
    assert loads([*args, red, "--image-prompt", red])
    assert loads([*args, red, "--image-scale", "0.5"])
    assert loads([*args, red, "--image-negative", red])
    assert loads([*args, red, "--image-mask", red])


@pytest.mark.turns(5)
@pytest.mark.parametrize(
    ("out", "options", "files"),
    [
        pytest.param("clip.mp4", ("--compare",), 4, marks=pytest.mark.slow),
        ("clip.gif", ("--save-latents", "clip.safetensors"), 2),
        ("clip.png", (), 5),
    ],
    ids=["comparison", "latents", "frames"],
)
def test_all_files_of_a_prompt_have_to_be_there_whole(
    run, loads, model, tmp_path, monkeypatch, out, options, files
):
    monkeypatch.chdir(tmp_path)
    args = [*arguments(model, tmp_path, TEXTS[:2], out), *options]
    run(*args)
    made = outputs(tmp_path)
    assert len(made) == 2 * files
    for name, data in made.items():
        (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert loads(args), name
        (tmp_path / name).unlink()
        assert loads(args), name
        (tmp_path / name).write_bytes(data)
        assert not loads(args), name


def test_what_is_refused_forgets_nothing(refused, loads, finished):
    args = finished[1]
    assert "multiple of 4" in refused(*args, "--frames", "10", "--overwrite")
    assert not loads(args)


def test_overwrite_keeps_what_is_done(loads, finished):
    assert not loads([*finished[1], "--overwrite"])


def test_a_file_of_somebody_else_stays(run, refused, model, tmp_path):
    args = arguments(model, tmp_path, TEXTS[:2])
    (tmp_path / "clip-001.gif").write_bytes(b"mine")
    assert "clip-001.gif is there already" in refused(*args)
    assert [path.name for path in paths(tmp_path)] == ["clip-001.gif"]
    (tmp_path / "clip-001.gif").unlink()
    run(*args)
    (tmp_path / "clip-001.gif").write_bytes(b"mine")  # since
    assert "clip-001.gif is there already" in refused(*args)
    assert (tmp_path / "clip-001.gif").read_bytes() == b"mine"


def test_what_was_cut_off_before_its_record_is_made_again(run, model, tmp_path):
    args = arguments(model, tmp_path, TEXTS[:2])
    run(*args)
    made, record = outputs(tmp_path), tmp_path / "clip-000.gif.done.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": {}, "clip": {}}))
    assert run(*args).stderr.startswith("1 of 2 are done already: clip-001.gif\n")
    assert outputs(tmp_path) == made


def test_a_single_prompt_is_no_part_of_a_list(run, refused, loads, model, tmp_path):
    args = arguments(model, tmp_path, TEXTS[:2])
    run(*args)
    single = ["generate", *SMALL, "--model", str(model), "--prompt", "a blue circle"]
    single += ["--device", DEVICE, "--out", str(tmp_path / "clip-000.gif")]
    assert "clip-000.gif is there already: --overwrite replaces it" in refused(*single)
    run(*single, "--overwrite")
    again = run(*args, "--overwrite")
    assert again.stderr.startswith("1 of 2 are done already: clip-001.gif\n")


def test_a_file_of_one_prompt_is_a_list_that_grows(run, loads, model, tmp_path):
    args = arguments(model, tmp_path, TEXTS[:1])
    run(*args)
    before = times(tmp_path)
    assert before.keys() == {"clip-000.gif", "clip-000.gif.done.json"}
    assert not loads(args)
    again = run(*arguments(model, tmp_path, TEXTS[:2]))
    assert again.stderr.startswith("1 of 2 are done already: clip-000.gif\n")
    assert before.items() <= times(tmp_path).items()


def test_in_python_what_is_done_is_made_again_if_asked(model, tmp_path):
    def made(**options):
        given = {"method": Radial(), "frames": 5, "height": 16, "width": 16, "steps": 1}
        given |= {"device": DEVICE, "out": tmp_path / "clip.gif", **options}
        return [one.prompt for one in generate(model, TEXTS, **given)]

    assert made() == TEXTS
    (tmp_path / "clip-001.gif").unlink()
    assert made() == [TEXTS[1]]
    assert made() == made(overwrite=True) == []
    with pytest.raises(FileExistsError, match="not of this prompt"):
        made(seed=7)
    assert made(seed=7, overwrite=True) == TEXTS


@pytest.mark.slow
def test_a_killed_run_goes_on(run, model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    texts = [*TEXTS, *TEXTS]
    run(*arguments(model, whole, texts))
    running = Forked("gen_accel", arguments(model, killed, texts), environment(**ALONE), ROOT)
    while not (done := finished_in(killed)):
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    running.kill()
    running.communicate()
    done = finished_in(killed)
    assert 0 < len(done) < len(texts)
    for path in killed.glob("*.gif"):  # whole, or under another name
        assert path.name.startswith(".partial") or path.read_bytes() == outputs(whole)[path.name]
    before = times(killed)
    again = run(*arguments(model, killed, texts))
    assert again.stderr.startswith(f"{len(done)} of 6 are done already: ")
    assert outputs(killed) == outputs(whole)
    after = times(killed)
    assert all(after[name] == before[name] for name in done)
    assert set(after) == set(times(whole))


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(run, model, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    options = ("--save-latents", "{}/clip.safetensors")
    expected = run(*arguments(model, alone, out="clip.mp4"), *(o.format(alone) for o in options))
    args = [*arguments(model, together, out="clip.mp4"), *(o.format(together) for o in options)]
    out, err = launch(args)
    assert outputs(together) == outputs(alone)
    told = [line for line in out.splitlines() if "(seed " in line]
    assert [line.partition("  (seed")[0] for line in told] == TEXTS  # once each, and in order
    assert out.count("kernel") == expected.stdout.count("kernel")
    steps = {line.split(".mp4")[0].strip() for line in err.splitlines() if ", step 1 of " in line}
    assert steps == {"0: clip-000", "0: clip-002", "1: clip-001"}

    (together / "clip-001.mp4").unlink()
    before = times(together)
    _, err = launch(args)
    assert "2 of 3 are done already: clip-000.mp4, clip-002.mp4\n" in err
    assert err.count("done already") == 1
    assert outputs(together) == outputs(alone)
    kept = [name for name in before if "-001" not in name]
    assert all(times(together)[name] == before[name] for name in kept)
