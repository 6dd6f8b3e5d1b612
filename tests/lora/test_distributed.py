"""Training in two processes on the CPU: the same losses, and checkpoints that go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import finetuning as ft
from support.families_to_train import trained
from support.products import NIGHTLY, asked
from support.runs import change_state, launch

from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.lora import checkpoint, trainer
from gen_accel.process import locked

pytestmark = pytest.mark.slow

STEPS = 8
# Without a GPU, "auto" has to find the processes of its own.
DEVICE = "cpu" if torch.accelerator.is_available() else "auto"
TEACHER = {"stages": ["9:8"], "objective": "distill", "device": DEVICE}
LONG = {
    "stages": ["9:4", "17:4:position_interpolation"],
    "checkpoint_every": 4,
    "gradient_accumulation": 2,
    "ema_decay": 0.9,
    "schedule": "cosine",
    "warmup_steps": 2,
}
VIDEOS = {
    "validate_every": 4,
    "validation_prompts": ["a red square moves right"],
    "validation_frames": 5,
    "validation_steps": 1,
    "guidance_scale": 1.0,
    "max_tokens": 16,
}


def losses(out):
    lines = (Path(out) / trainer.METRICS).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def newest(out):
    return checkpoint.load_newest(Path(out) / trainer.CHECKPOINTS)


def assert_same(out, other):
    """Compare to the bit."""
    assert losses(out) == losses(other)
    a, b = newest(out), newest(other)
    assert a.state["step"] == b.state["step"] == STEPS
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())


def half(out, to, last=STEPS):
    """Copy the run as it was before its last checkpoint, that of step `last`."""
    shutil.copytree(out, to)
    shutil.rmtree(to / trainer.CHECKPOINTS / f"step-{last:06d}")
    return to


RADIAL = {"method": "radial", "settings": ["block=4"], "stages": ["9:4"]}
IMAGES = {k: list(v) if isinstance(v, tuple) else v for k, v in ft.IMAGES_FULL.items()}
IMAGES |= {"batch_size": 1}
ROUNDED = RADIAL | {"base": "fp8", "gradient_checkpointing": "on"}
LOW = ROUNDED | {
    **{"gradient_checkpointing": "offload", "checkpoint_parts": True},
    "blocks_to_swap": 1,
}


# In parts on two processes, each with what saves memory and goes with that.
IN_PARTS = {
    "dora": {"dora": True, "gradient_checkpointing": "on", "checkpoint_parts": True},
    "nf4": {"base": "nf4", "gradient_checkpointing": "offload", "checkpoint_parts": True},
    "prodigy": {"optimizer": "prodigyopt.Prodigy"},
    "schedule-free": {"optimizer": "schedulefree.AdamWScheduleFree"},
}
FEW = {"stages": ["9:2"], "learning_rate": 1e-3}


def guided(teacher):
    taught = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 3.0}
    return RADIAL | taught


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """What two processes trained, and two others then resumed half way: the model whole in both
    (ddp), or cut into two parts (fsdp), with videos sampled meanwhile."""
    folder = tmp_path_factory.mktemp("distributed")
    teacher = ft.train(ft.config(folder / "teacher", **RADIAL, seed=4)).folder
    jobs = [
        ("ddp/long", LONG, {}),
        ("ddp/teacher", TEACHER, {}),
        ("ddp/guided", guided(teacher), {}),
        ("ddp/images", IMAGES, {}),
        *([("ddp/rounded", ROUNDED, {}), ("ddp/low", LOW, {})] if NIGHTLY else []),
        ("fsdp/long", LONG | VIDEOS, {"sharded": True}),
        ("fsdp/guided", guided(teacher), {"sharded": True}),
    ]
    jobs += [
        (f"fsdp/{name}", RADIAL | FEW | more, {"sharded": True, "family": "wan"})
        for name, more in IN_PARTS.items()
        if name in asked(request)
    ]
    given = ({"out": str(folder / name), "fields": f} | more for name, f, more in jobs)
    launch(*given, launcher=NIGHTLY)
    for name, last in (("ddp/long", STEPS), ("fsdp/long", STEPS), ("ddp/images", 4)):
        half(folder / name, folder / f"{name}-resumed", last)
    again = [
        {"out": str(folder / f"{name}-resumed"), "fields": f, "resume": True} | more
        for name, f, more in jobs
        if (folder / f"{name}-resumed").exists()
    ]
    refused = {"fields": RADIAL | {"checkpoint_every": 1}, "refused": True}
    poisoned = {"out": str(folder / "poisoned"), "poison": [2, 1]} | refused
    with locked(folder / "busy"):
        out, _ = launch({"out": str(folder / "busy")} | refused, poisoned, *again, launcher=False)
    (folder / "said").write_text(out)
    return folder


@pytest.mark.nightly
def test_low_memory_changes_no_bit_of_two_processes(made):
    a, b = newest(made / "ddp" / "rounded"), newest(made / "ddp" / "low")
    assert a.state["processes"] == b.state["processes"] == 2
    assert all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())


@pytest.mark.turns(3)
@pytest.mark.parametrize("name", IN_PARTS)
def test_low_memory_in_parts(made, tmp_path, name):
    out, fields = made / "fsdp" / name, IN_PARTS[name]
    assert newest(out).state["optimizer"] == "FSDP"
    trained(tmp_path, **(RADIAL | FEW | fields | {"batch_size": 2}))
    assert losses(out) == pytest.approx(losses(tmp_path), rel=1e-5)
    a, b = newest(out).tensors, newest(tmp_path).tensors
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert torch.allclose(x, b[key], rtol=1e-3, atol=1e-5), key


@pytest.fixture(scope="module")
def replicated(made):
    return made / "ddp"


@pytest.fixture(scope="module")
def sharded(made):
    return made / "fsdp" / "long"


def test_all_processes_end_where_one_does(made):
    """None waits for one that is gone: a gradient that is broken in the second process alone, and
    a folder that the first one could not lock."""
    said = (made / "said").read_text().splitlines()
    for rank in "01":
        told = [line for line in said if line.startswith(f"{rank}: ")]
        assert "is in use by process" in told[0]
        assert "the gradient of step 2 is not finite" in told[1]
        assert len(told) == 2
    assert not (made / "busy").exists()
    assert newest(made / "poisoned").state["step"] == 2


@pytest.mark.parametrize("name", ["long", "teacher"])
def test_two_processes_are_one_with_a_batch_of_two(replicated, tmp_path, name):
    state = newest(replicated / name).state
    assert (state["processes"], state["optimizer"]) == (2, "MULTI_CPU")
    fields = {"long": LONG, "teacher": TEACHER}[name]
    ft.train(ft.config(tmp_path, **(fields | {"batch_size": 2})))
    assert losses(tmp_path) == pytest.approx(losses(replicated / name), abs=1e-5)


def test_an_image_prompt(replicated, tmp_path):
    ft.train(ft.config(tmp_path, **(IMAGES | {"batch_size": 2})))
    assert losses(tmp_path) == pytest.approx(losses(replicated / "images"), abs=1e-5)
    assert losses(replicated / "images-resumed") == losses(replicated / "images")


def test_a_teacher_with_a_lora(made, tmp_path):
    """Whole in both processes, in parts, and in one process of two clips."""
    fields = guided(made / "teacher" / "lora")
    ft.train(ft.config(tmp_path / "one", **fields, batch_size=2))
    for name in ("ddp", "fsdp"):
        out = made / name / "guided"
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5), name
        assert read_recipe(out / "lora").teacher_guidance == 3.0


def test_two_processes_resume(replicated):
    assert_same(replicated / "long-resumed", replicated / "long")


def test_another_number_of_processes_is_refused(replicated, tmp_path):
    out = half(replicated / "long", tmp_path / "run")
    with pytest.raises(ValueError, match="differs in processes: 2, now 1"):
        ft.train(ft.config(out, **LONG), resume=True)


def test_sharded_losses_are_those_of_the_whole(sharded, replicated):
    assert newest(sharded).state["optimizer"] == "FSDP"
    assert losses(sharded) == pytest.approx(losses(replicated / "long"), abs=1e-5)
    a, b = newest(sharded).tensors, newest(replicated / "long").tensors
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.shape == b[name].shape
        assert torch.allclose(x, b[name], atol=1e-4), name


def test_sharded_videos(sharded):
    names = sorted(path.name for path in (sharded / "validation").rglob("*.mp4"))
    assert names == ["00.beside_start.mp4"] * 2 + ["00.mp4"] * 3


def test_a_sharded_run_resumes(sharded, made):
    assert_same(made / "fsdp" / "long-resumed", sharded)


def test_a_sharded_checkpoint_goes_on_in_one_process(sharded, tmp_path):
    """The one stands in for both processes, with a batch of two."""
    out = half(sharded, tmp_path / "run")
    given = ft.config(out, **(LONG | {"batch_size": 2, "max_tokens": 16}))
    path = out / trainer.CHECKPOINTS / "step-000004"
    held = json.loads((path / checkpoint.STATE).read_text())["config"]
    change_state(path, config=held | {"batch_size": 2}, processes=1)
    ft.train(given, resume=True)
    assert losses(out) == pytest.approx(losses(sharded), abs=1e-5)
    assert list((out / "lora").glob("*.safetensors"))
