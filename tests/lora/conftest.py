"""Trainings that several files of tests look at."""

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from support import finetuning as ft
from support import wan
from support.runs import (
    FULL_STEPS,
    losses,
)

import gen_accel
from gen_accel import Radial
from gen_accel.lora import checkpoint, trainer
from gen_accel.measure.video_io import write_video


@contextmanager
def one_thread():
    """As all tests here: the last bit of a sum depends on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
@one_thread()
def whole(tmp_path_factory):
    """A training with all that there is to bring back, which nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = ft.train(ft.config(out, **ft.FULL))
    assert done.steps == FULL_STEPS
    assert done.losses == losses(out)
    return out


@pytest.fixture
def copied(whole, tmp_path):
    """The same as it was after the step given, to go on from."""

    def make(step=4):
        out = shutil.copytree(whole, tmp_path / f"copy{step}")
        shutil.rmtree(out / "lora")
        folder = out / trainer.CHECKPOINTS
        for path in checkpoint.found(folder):
            if path.name > f"step-{step:06d}":
                shutil.rmtree(path)
        return out

    return make


@pytest.fixture(scope="session")
@one_thread()
def trained(tmp_path_factory):
    """A LoRA of some weight on a deterministic method with nothing to train, and its model."""
    out = tmp_path_factory.mktemp("trained") / "run"
    made = ft.model()
    given = ft.config(
        out,
        method="radial",
        settings=(),
        targets=("attention", "feed_forward"),
        alpha=5.0,
        stages=("9:6",),
    )
    done = ft.train(given, model=made)
    gen_accel.attach(made.transformer, Radial()).detach()
    return done.folder, made.transformer.eval()


@pytest.fixture(scope="session")
@one_thread()
def sparse(tmp_path_factory):
    """The same with parameters of the method and a rule for the rotary frequencies."""
    out = tmp_path_factory.mktemp("sparse") / "run"
    made = ft.model()
    given = ft.FULL | {"dense_layers": 1, "dense_steps": 0, "ema_decay": 0.0}
    done = ft.train(ft.config(out, **given), model=made)
    return done.folder, made.transformer.eval()


@pytest.fixture
def style(tmp_path):
    """Some other LoRA, as diffusers saves them."""
    from peft import LoraConfig

    other = wan.transformer()
    other.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    wan.WanPipeline.save_lora_weights(
        tmp_path / "style", transformer_lora_layers=get_peft_model_state_dict(other)
    )
    return tmp_path / "style"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A tiny pipeline on disk, and captioned clips of 9 and 17 frames."""
    made = tmp_path_factory.mktemp("home")
    wan.pipeline().save_pretrained(made / "model")
    noise = np.random.default_rng(0)
    for i, frames in enumerate((17, 9, 17)):
        video = noise.integers(0, 256, (frames, 32, 64, 3)).astype(np.uint8)
        path = write_video(video, made / "clips" / f"{i}.mp4", fps=16)
        path.with_suffix(".txt").write_text("a red square moves left")
    return made


@pytest.fixture
def on_disk(home, tmp_path):
    """A config of what lies there."""

    def make(**fields):
        given = {"model": str(home / "model"), "data": str(home / "clips"), "max_tokens": 8}
        given["stages"] = ("9:2", "17:2")
        return ft.config(fields.pop("out", tmp_path / "run"), **(given | fields))

    return make
