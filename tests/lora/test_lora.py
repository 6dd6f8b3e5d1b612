"""Training a LoRA: what is drawn, what is kept, what is refused, and what it leaves."""

import errno
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar
from weakref import ref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import checks, wan
from support import finetuning as ft
from support.paths import ROOT, environment
from support.runs import (
    WEIGHTS,
    assert_same_lora,
    assert_same_run,
    files,
    losses,
    metadata,
    metrics,
    state,
)
from torch.nn.modules.module import register_module_forward_pre_hook

import gen_accel
from gen_accel import Radial, SparseLinear, demo
from gen_accel.attention_processors.attached.attachment import SilentBranch
from gen_accel.attention_processors.attached.recipe import (
    GuidedTwice,
    OtherAttention,
    Recipe,
    read_recipe,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import wan as family
from gen_accel.attention_processors.methods.options import method_from
from gen_accel.demo.longer import lora_path
from gen_accel.files import file_sha256
from gen_accel.lora import TrainConfig, checkpoint, dry_run, print_config, read_config, trainer
from gen_accel.lora.adapters import active
from gen_accel.lora.artefact import add_lora, target_modules
from gen_accel.lora.config import Stage
from gen_accel.lora.objective import Objective, draw, order, shifted
from gen_accel.lora.prepare import cache_clips, model_of, prepare
from gen_accel.lora.validate import _guidance
from gen_accel.measure.video_io import read_video, write_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip
from gen_accel.pipelines.long_video import apply_rule

SHIPPED = ROOT / "configs"
CONFIGS = sorted((SHIPPED / "lora").glob("*.yaml"))
LAUNCHES = sorted((SHIPPED / "accelerate").glob("*.yaml"))
FULL_STEPS = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
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


class TestResume:
    def test_everything_takes_part(self, whole):
        tensors = state(whole).tensors
        kinds = {name.split("/")[0] for name in tensors}
        assert kinds == {"model", "ema", "optimizer"}
        assert any("lora_A" in name for name in tensors)
        assert any("processor" in name for name in tensors)
        averages = {n: x for n, x in tensors.items() if n.startswith("ema/")}
        assert any(not torch.equal(x, tensors["model/" + n[4:]]) for n, x in averages.items())
        rates = [line["learning_rate"] for line in metrics(whole)]
        assert rates[0] == 0 < rates[1] < rates[2] > rates[3] > rates[-1]
        assert [line["frames"] for line in metrics(whole)] == [9] * 4 + [17] * 4
        assert [p.name for p in checkpoint.found(whole / trainer.CHECKPOINTS)] == [
            "step-000006",
            "step-000008",
        ]

    def test_in_two_parts(self, whole, tmp_path):
        first = stopping(tmp_path / "run", after=3)
        assert first.folder is None
        assert first.steps == 3
        assert not (tmp_path / "run" / "lora").exists()
        rest = ft.train(ft.config(tmp_path / "run", **ft.FULL), resume=True)
        assert len(rest.losses) == FULL_STEPS - 3
        assert_same_run(tmp_path / "run", whole)

    @pytest.mark.slow
    def test_killed_in_a_step_and_while_writing(self, tmp_path):
        """kill -9, twice: while step 4's checkpoint is half written, then in step 5 or later.

        All runs are processes of their own: in this one other tests have run and compiled before,
        by which the last bit of a sum may differ.
        """
        out, alone = tmp_path / "run", tmp_path / "whole"
        finished(alone)
        folder = out / trainer.CHECKPOINTS
        killed(out, resume=False, stall="writing:2")
        assert list(folder.glob(".partial-*"))
        assert [path.name for path in checkpoint.found(folder)] == ["step-000002"]
        assert len(losses(out)) == 4

        # Two losses a step: from step 2 on, the sixth is in the middle of step 4.
        killed(out, resume=True, stall="step:6")
        assert not list(folder.glob(".partial-*"))
        assert [path.name for path in checkpoint.found(folder)] == ["step-000002", "step-000004"]
        with (out / trainer.METRICS).open("a") as file:
            file.write('{"step": 4, "lo')
        finished(out, resume=True)
        assert len(losses(out)) == FULL_STEPS
        assert_same_run(out, alone)

    def test_a_second_signal_ends_at_once(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            stopping(tmp_path / "run", after=3, signals=2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_nothing_is_left_to_do(self, whole, tmp_path):
        out = shutil.copytree(whole, tmp_path / "run")
        shutil.rmtree(out / "lora")
        assert ft.train(ft.config(out, **ft.FULL), resume=True).losses == []
        assert_same_run(out, whole)

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["truncated", "flipped", "no state", "half a state"])
    def test_a_broken_checkpoint_is_left_out(self, whole, tmp_path, how):
        out = shutil.copytree(whole, tmp_path / "run")
        newest = out / trainer.CHECKPOINTS / "step-000008"
        tensors, about = newest / checkpoint.TENSORS, newest / checkpoint.STATE
        data = bytearray(tensors.read_bytes())
        if how == "truncated":
            tensors.write_bytes(data[: len(data) // 2])
        elif how == "flipped":
            data[-100] ^= 1
            tensors.write_bytes(data)
        elif how == "no state":
            about.unlink()
        else:
            about.write_text(about.read_text()[:100])
        with pytest.warns(UserWarning, match="step-000008 is broken and left out"):
            done = ft.train(ft.config(out, **ft.FULL), resume=True)
        assert len(done.losses) == 2
        assert_same_run(out, whole)

    def test_a_broken_checkpoint_does_not_crowd_out_whole_ones(self, whole, tmp_path):
        out = shutil.copytree(whole, tmp_path / "run")
        (out / trainer.CHECKPOINTS / "step-000008" / checkpoint.STATE).unlink()
        given = replace(ft.config(out, **ft.FULL), checkpoint_every=7, keep_checkpoints=1)
        with pytest.warns(UserWarning, match="step-000008 is broken"):
            stopping(out, after=7, config=given, resume=True)
        assert state(out).state["step"] == 7
        assert [p.name for p in checkpoint.found(out / trainer.CHECKPOINTS)] == ["step-000007"]

    def test_none_is_whole(self, copied):
        out = copied(6)
        for path in checkpoint.found(out / trainer.CHECKPOINTS):
            (path / checkpoint.STATE).unlink()
        with (
            pytest.warns(UserWarning, match="step-000006 is broken"),
            pytest.raises(ValueError, match=r"no checkpoint in .* is whole"),
        ):
            ft.train(ft.config(out, **ft.FULL), resume=True)

    def test_a_full_disk(self, whole, copied, monkeypatch):
        out = copied(6)

        def full(tensors, path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", full)
            with pytest.raises(OSError, match="No space left"):
                ft.train(ft.config(out, **ft.FULL), resume=True)
        folder = out / trainer.CHECKPOINTS
        assert sorted(path.name for path in folder.iterdir()) == ["step-000006"]
        assert state(out).state["step"] == 6
        ft.train(ft.config(out, **ft.FULL), resume=True)
        assert_same_run(out, whole)

    def test_left_overs_are_cleared(self, copied):
        out = copied(6)
        for folder in (out, out / trainer.CHECKPOINTS):
            (folder / ".partial-0").mkdir()
            (folder / ".partial-0" / "half").touch()
            (folder / ".partial-1.json").touch()
        ft.train(ft.config(out, **ft.FULL), resume=True)
        assert not list(out.rglob(".partial-*"))

    def test_numbers_of_steps_sort_as_numbers(self, tmp_path):
        for name in ("step-1000000", "step-999999", "step-000007", "step-x"):
            (tmp_path / name).mkdir()
        found = [path.name for path in checkpoint.found(tmp_path)]
        assert found == ["step-000007", "step-999999", "step-1000000"]

    def test_another_config_is_refused_field_by_field(self, copied):
        out = copied(6)
        other = ft.config(
            out, **(ft.FULL | {"rank": 3, "learning_rate": 0.5, "betas": (0.8, 0.9)})
        )
        with pytest.raises(ValueError, match="is of another run, which differs in") as caught:
            ft.train(other, resume=True)
        for part in (
            "rank: 2, now 3",
            "learning_rate: 0.01, now 0.5",
            "betas: (0.9, 0.99), now (0.8, 0.9)",
        ):
            assert part in str(caught.value)
        assert "warmup_steps" not in str(caught.value)

    def test_other_clips_are_refused(self, copied):
        out = copied(6)
        with pytest.raises(ValueError, match=r"differs in data \(clips and captions\)"):
            ft.train(ft.config(out, **ft.FULL), ft.Clips((ft.LATENTS,) * 4), resume=True)

    def test_what_may_change(self, whole, copied):
        out = copied(6)
        given = ft.config(out, **ft.FULL)
        free = replace(given, keep_checkpoints=1, checkpoint_every=1, gradient_checkpointing=True)
        ft.train(free, resume=True)
        assert losses(out) == losses(whole)

    def test_out_is_not_used_twice(self, whole, tmp_path):
        given = ft.config(whole, **ft.FULL)
        with pytest.raises(ValueError, match=r"holds a run of step-000008: go on with --resume"):
            trainer.check_out(given, resume=False)
        with pytest.raises(ValueError, match="nothing to resume"):
            trainer.check_out(replace(given, out=str(tmp_path)), resume=True)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="out must be a folder"):
            trainer.check_out(replace(given, out=str(tmp_path / "file")), resume=False)


def stopping(out, after, *, config=None, resume=False, signals=1):
    """Train until a signal comes in the step that makes the steps `after`."""

    class Signalling(ft.Clips):
        def latents(self, index, frames):
            if signalling and len(losses_so_far()) == after - 1:
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                signalling.clear()
            return super().latents(index, frames)

    def losses_so_far():
        return losses(out) if (out / trainer.METRICS).exists() else []

    signalling = [True]
    given = config or ft.config(out, **ft.FULL)
    return ft.train(given, Signalling(), resume=resume)


def started(out, **job):
    """A process that trains."""
    out.mkdir(exist_ok=True)
    job |= {"out": str(out), "fields": ft.FULL, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "support.finetuning", json.dumps(job)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def finished(out, **job):
    """One that trains to the end."""
    child = started(out, **job)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors


def killed(out, **job):
    """One that trains until it stalls, and is killed then."""
    child = started(out, **job)
    marker, until = out / "stalled", time.monotonic() + 120
    while not marker.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    reached = marker.exists()
    child.kill()
    _, errors = child.communicate()
    assert reached, errors
    assert child.returncode == -signal.SIGKILL
    marker.unlink()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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
    from peft.utils import get_peft_model_state_dict

    other = wan.transformer()
    other.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    wan.WanPipeline.save_lora_weights(
        tmp_path / "style", transformer_lora_layers=get_peft_model_state_dict(other)
    )
    return tmp_path / "style"


class TestArtefact:
    def test_diffusers_loads_it_with_its_alpha(self, trained):
        folder, transformer = trained
        pipe = wan.pipeline()
        before = wan.forward(pipe.transformer)
        pipe.load_lora_weights(folder, adapter_name="long")
        loaded = pipe.transformer.peft_config["long"]
        assert (loaded.r, loaded.lora_alpha) == (2, 5.0)
        with torch.no_grad():
            after = wan.forward(pipe.transformer)
            assert torch.equal(after, wan.forward(transformer))
        assert_apart(after, before)
        pipe.unload_lora_weights()
        assert torch.equal(wan.forward(pipe.transformer), before)

    def test_beside_another_lora(self, trained, style):
        folder, _ = trained
        pipe = wan.pipeline()
        pipe.load_lora_weights(folder, adapter_name="long")
        with torch.no_grad():
            alone = wan.forward(pipe.transformer)
            pipe.load_lora_weights(style, adapter_name="style")
            pipe.set_adapters(["long", "style"], [1.0, 0.0])
            assert torch.equal(wan.forward(pipe.transformer), alone)
            pipe.set_adapters(["long", "style"], [1.0, 0.5])
            both = wan.forward(pipe.transformer)
            pipe.set_adapters("style")
            assert_apart(both, wan.forward(pipe.transformer))
        assert_apart(both, alone)

    @pytest.mark.slow
    def test_fused(self, trained):
        folder, _ = trained
        pipe = wan.pipeline()
        pipe.load_lora_weights(folder)
        with torch.no_grad():
            plain = wan.forward(pipe.transformer)
            exact = exact_forward(pipe.transformer)
            pipe.fuse_lora()
            checks.assert_no_worse(wan.forward(pipe.transformer), plain, exact)
            pipe.unfuse_lora()
            checks.assert_no_worse(wan.forward(pipe.transformer), plain, exact)

    def test_dropout_ends_with_the_training(self, whole):
        """What diffusers adds to a model is in training mode."""
        pipe = wan.pipeline()
        pipe.load_lora_weights(whole / "lora")
        with torch.no_grad():
            first = wan.forward(pipe.transformer)
            assert torch.equal(wan.forward(pipe.transformer), first)

    def test_the_recipe_lies_in_the_file_and_beside_it(self, whole):
        folder = whole / "lora"
        about = metadata(folder / WEIGHTS)
        beside = json.loads((folder / "gen_accel.json").read_text())
        assert json.loads(about["gen_accel"]) == beside
        recipe = read_recipe(folder)
        assert json.loads(json.dumps(recipe.to_dict())) == beside
        assert recipe.build_method() == SparseLinear(critical=0.2, block_q=4, block_k=4)
        assert (recipe.rope, recipe.frames) == ("position_interpolation", 17)
        assert recipe.trained_frames == ft.TRAINED
        assert (recipe.height, recipe.width, recipe.steps) == (32, 64, FULL_STEPS)
        assert recipe.stages == ("9:4", "17:4:position_interpolation")
        assert recipe.data == ft.Clips().digest

    def test_it_holds_the_average(self, whole):
        tensors = state(whole).tensors
        saved = load_file(whole / "lora" / WEIGHTS)
        saved |= {
            f"{'.'.join(name.split('.')[:3])}.attn1.processor.branch.{name.split('.', 3)[3]}": x
            for name, x in load_file(whole / "lora" / "processors.safetensors").items()
        }
        averages = {
            name.removeprefix("ema/").replace(".default", ""): x
            for name, x in tensors.items()
            if name.startswith("ema/")
        }
        assert saved.keys() == averages.keys()
        assert all(torch.equal(x, averages[name]) for name, x in saved.items())

    def test_every_checkpoint_holds_one(self, whole):
        newest = state(whole).path
        assert_same_lora(newest / "lora", whole / "lora")

    def test_to_go_on_from(self, whole, tmp_path):
        """The first loss is that of the LoRA trained before, and not that of the model."""
        given = ft.config(tmp_path / "a", stages=("9:1",), settings=ft.SPARSE)
        fresh = ft.train(given)
        again = ft.train(replace(given, out=str(tmp_path / "b"), init_lora=str(whole / "lora")))
        assert again.losses[0] < fresh.losses[0]
        began = replace(given, out=str(tmp_path / "c"), init_lora=str(whole / "lora"))
        other = ft.train(replace(began, learning_rate=1e-30))
        assert_close_lora(other.folder, whole / "lora")

    def test_a_smaller_one_grows(self, whole, tmp_path):
        """It says at first what it said; what is new gets gradients."""
        before = load_file(whole / "lora" / WEIGHTS)
        larger = {"rank": 3, "alpha": 3.0, "targets": ("attention", "feed_forward")}
        given = ft.config(tmp_path / "a", stages=("9:2",), init_lora=str(whole / "lora"), **larger)
        still = ft.train(replace(given, out=str(tmp_path / "b"), learning_rate=1e-30))
        after = load_file(still.folder / WEIGHTS)
        assert before.keys() < after.keys()
        for name, x in before.items():
            part = after[name][tuple(map(slice, x.shape))]
            torch.testing.assert_close(part, x, rtol=0, atol=1e-20)
            after[name][tuple(map(slice, x.shape))] = 0
        assert all(x.abs().max() < 1e-20 for name, x in after.items() if "lora_B" in name)
        trained = load_file(ft.train(given).folder / WEIGHTS)
        new = [name for name in trained if "ffn" in name and "lora_B" in name]
        assert new
        assert all(trained[name].any() for name in new)

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"rank": 1}, r"has rank 2 on attention, asked for are 1 on attention; there is no"),
            ({"targets": ("feed_forward",)}, r"asked for are 2 on feed_forward; there is no room"),
            ({"rank": 4, "alpha": 2.0}, r"alpha 2 at rank 2, asked for is 2 at 4: .* is alpha 4"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, fields, match, whole, tmp_path):
        given = ft.config(tmp_path / "a", init_lora=str(whole / "lora"), **fields)
        with pytest.raises(ValueError, match=match):
            ft.train(given)


def assert_close_lora(folder, other):
    """All but what one step of next to no length changes."""
    for name in ("pytorch_lora_weights.safetensors", "processors.safetensors"):
        a, b = load_file(folder / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key, x in a.items():
            torch.testing.assert_close(x, b[key], rtol=0, atol=1e-20)


def assert_apart(a, b):
    assert (a - b).abs().max() > 1e-3


def exact_forward(transformer):
    """In fp64, with the embedding of the timestep too."""
    made = {name: x.double() for name, x in wan.inputs().items()}
    return deepcopy(transformer).double()(**made, return_dict=False)[0]


def with_recipe(folder, to, **fields):
    """A copy of a LoRA with other fields in its recipe."""
    shutil.copytree(folder, to)
    with safe_open(to / WEIGHTS, "pt") as file:
        metadata = dict(file.metadata())
    for key in ("gen_accel", "lora_adapter_metadata"):
        told = json.loads(metadata[key])
        recipe = told if key == "gen_accel" else told["transformer.auto_mapping"]["gen_accel"]
        recipe |= fields
        metadata[key] = json.dumps(told)
    save_file(load_file(to / WEIGHTS), to / WEIGHTS, metadata=metadata)
    return to


class TestFromLora:
    """gen_accel.attach(pipe, from_lora=folder)."""

    def loaded(self, folder):
        pipe = wan.pipeline()
        pipe.load_lora_weights(folder)
        return pipe

    @pytest.mark.parametrize(("guided", "config"), [(True, "demo"), (False, "demo_guided")])
    def test_those_of_the_demo_model_are_what_their_configs_make(self, guided, config):
        folder = lora_path(guided=guided)
        recipe, made = read_recipe(folder), read_config(SHIPPED / "lora" / f"{config}.yaml")
        assert recipe.build_method() == method_from(made.method, made.settings)
        assert (recipe.stages, recipe.rank) == (tuple(made.stages), made.rank)
        assert recipe.techniques == tuple(made.sample_with)
        assert recipe.holds_guidance is not guided
        pipe = load(demo.path(), Loading("float32", "cpu"))
        pipe.load_lora_weights(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuidedTwice)
            assert gen_accel.attach(pipe, from_lora=folder).method == recipe.build_method()

    def test_method_schedule_and_parameters(self, sparse):
        folder, _ = sparse
        pipe = self.loaded(folder)
        handle = gen_accel.attach(pipe, from_lora=folder)
        assert handle.method == SparseLinear(critical=0.2, block_q=4, block_k=4)
        assert handle.schedule == Schedule(dense_layers=1)
        saved = load_file(folder / "processors.safetensors")
        assert list(handle.branches) == ["transformer.blocks.1"]
        for name, x in handle.branches["transformer.blocks.1"].state_dict().items():
            assert torch.equal(x, saved[f"transformer.blocks.1.{name}"])
            assert x.abs().max() > 0
        handle.detach()

    def test_it_is_the_model_that_was_trained(self, sparse):
        folder, transformer = sparse
        size = (5, *ft.LATENTS)
        pipe = self.loaded(folder)
        with torch.no_grad():
            without_rule = wan.forward(transformer, *size)
            rule = apply_rule(transformer, "position_interpolation", frames=5, trained=2)
            trained = wan.forward(transformer, *size)
            rule.remove()
            plain = wan.forward(pipe.transformer, *size)
            handle = gen_accel.attach(pipe, from_lora=folder)
            assert torch.equal(wan.forward(pipe.transformer, *size), trained)
            assert_apart(trained, without_rule)
            assert_apart(trained, plain)
            handle.detach()
            assert torch.equal(wan.forward(pipe.transformer, *size), plain)

    def test_the_dense_steps_are_those_of_the_training(self, whole):
        pipe = self.loaded(whole / "lora")
        handle = gen_accel.attach(pipe, from_lora=whole / "lora")
        assert handle.schedule == Schedule(dense_steps=2)

    def test_another_method_is_warned_of(self, sparse):
        folder, _ = sparse
        pipe = self.loaded(folder)
        with pytest.warns(OtherAttention, match=r"trained with SparseLinear.*runs with Radial"):
            gen_accel.attach(pipe, Radial())

    def test_its_own_method_is_not_warned_of(self, trained, recwarn):
        folder, _ = trained
        pipe = self.loaded(folder)
        gen_accel.attach(pipe, Radial())
        gen_accel.attach(pipe, from_lora=folder)
        assert not [w for w in recwarn if issubclass(w.category, OtherAttention)]

    def test_guidance_that_it_holds_is_not_given_again(self, trained, tmp_path, recwarn):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        pipe = self.loaded(folder)
        with gen_accel.attach(pipe, from_lora=folder):
            wan.generate(pipe, guidance_scale=1.0)
            wan.forward(pipe.transformer)
            assert not [w for w in recwarn if issubclass(w.category, GuidedTwice)]
            with pytest.warns(GuidedTwice, match="holds a guidance of 3 and .* guidance_scale=1"):
                wan.generate(pipe, guidance_scale=4.0)
            recwarn.clear()
            wan.generate(pipe, guidance_scale=4.0)
        with gen_accel.attach(pipe, from_lora=folder):
            pass
        wan.generate(pipe, guidance_scale=4.0)
        with gen_accel.attach(pipe, from_lora=trained[0]):
            wan.generate(pipe, guidance_scale=4.0)
        assert not [w for w in recwarn if issubclass(w.category, GuidedTwice)]

    @pytest.mark.slow
    def test_what_it_holds_breaks_no_graph(self, trained, tmp_path):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        pipe = self.loaded(folder)
        gen_accel.attach(pipe, from_lora=folder, schedule=Schedule())
        with torch.no_grad():
            plain = wan.forward(pipe.transformer)
            pipe.transformer.compile(backend="eager", fullgraph=True)
            assert torch.equal(wan.forward(pipe.transformer), plain)

    @pytest.mark.slow
    def test_the_watch_goes_with_the_pipeline(self, trained, tmp_path, recwarn):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        pipe = self.loaded(folder)
        gen_accel.attach(pipe, from_lora=folder)
        twin = deepcopy(pipe)
        with pytest.warns(GuidedTwice):
            wan.generate(pipe, guidance_scale=4.0)
        recwarn.clear()
        wan.generate(twin, guidance_scale=1.0)
        assert not [w for w in recwarn if issubclass(w.category, GuidedTwice)]
        with pytest.warns(GuidedTwice):
            wan.generate(twin, guidance_scale=4.0)
        transformer, gone = pipe.transformer, ref(pipe)
        del pipe
        gc.collect()
        assert gone() is None
        assert transformer is not None

    def test_a_negative_prompt_needs_guidance(self, trained, tmp_path):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        clip = Clip(5, wan.HEIGHT, wan.WIDTH, negative_prompt="blur")
        with pytest.raises(ValueError, match="negative_prompt 'blur' needs guidance"):
            generate("nowhere", ["a cat"], out=tmp_path / "a.mp4", from_lora=folder, clip=clip)

    @pytest.mark.slow
    @pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
    def test_generate_goes_by_what_it_holds(self, trained, tmp_path, held, recwarn):
        folder = trained[0]
        if held:
            folder = with_recipe(folder, tmp_path / "held", teacher_guidance=3.0)
        wan.pipeline().save_pretrained(tmp_path / "model")
        clip = Clip(5, wan.HEIGHT, wan.WIDTH, steps=1, max_tokens=16)
        batches = []

        def made(scale):
            batches.clear()
            recwarn.clear()
            generate(
                tmp_path / "model",
                ["a red square moves right"],
                out=tmp_path / "a.mp4",
                from_lora=folder,
                clip=replace(clip, guidance_scale=scale),
                loading=Loading("float32", "cpu"),
            )
            guided = any(issubclass(w.category, GuidedTwice) for w in recwarn)
            return len(batches), guided

        watch = register_module_forward_pre_hook(
            lambda module, args: (
                batches.append(1) if isinstance(module, wan.WanTransformer3DModel) else None
            )
        )
        with watch:
            assert made(None) == ((1, False) if held else (2, False))
            assert made(1.0) == (1, False)
            assert made(3.0) == (2, held)

    @pytest.mark.slow
    def test_generate_goes_by_its_techniques_where_the_video_is_longer(
        self, trained, tmp_path, monkeypatch
    ):
        from gen_accel.pipelines.generation import generate as generate_module

        filled = generate_module.filled

        def whole(clip):
            return clip if clip.frames is not None else replace(clip, frames=9)

        known = {"techniques": ["fresh_noise"], "trained_frames": 5}
        folder = with_recipe(trained[0], tmp_path / "named", **known)
        wan.pipeline().save_pretrained(tmp_path / "model")

        def used(frames, **options):
            made = generate(
                tmp_path / "model",
                ["a red square moves right"],
                out=tmp_path / "a.mp4",
                from_lora=folder,
                clip=Clip(frames, wan.HEIGHT, wan.WIDTH, steps=1, max_tokens=16),
                loading=Loading("float32", "cpu"),
                **options,
            )
            return made[0].extension

        assert "fresh_noise" in used(9)
        assert used(5) == ""
        assert used(9, techniques=()) == ""
        assert used(9, trained_frames=9) == ""
        monkeypatch.setattr(generate_module, "filled", lambda pipe, c: filled(pipe, whole(c)))
        assert "fresh_noise" in used(None)
        assert "fresh_noise" not in used(9, techniques=["riflex"], trained_frames=5)

    @pytest.mark.parametrize("given", ["fresh", "none"])
    def test_a_technique_that_there_is_not(self, given, tmp_path):
        with pytest.raises(ValueError, match="does not go with"):
            ft.config(tmp_path / "run", sample_with=("fresh_noise", "continuation"))
        with pytest.raises(ValueError, match=f"sample_with must be one of riflex, .*'{given}'"):
            ft.config(tmp_path / "run", sample_with=(given,))

    @pytest.mark.slow
    def test_validation_is_sampled_with_what_is_kept(self, tmp_path, monkeypatch):
        from gen_accel.lora import validate

        calls = []

        def watched(pipe, techniques, **lengths):
            calls.append((techniques, lengths))
            return extend(pipe, techniques, **lengths)

        extend = validate.extend
        monkeypatch.setattr(validate, "extend", watched)
        longer = {"stages": ("9:1",), "trained_frames": 5, "sample_with": ("fresh_noise",)}
        sampled = {"validate_every": 1, "validation_prompts": ("a cat",), "validation_steps": 1}
        given = ft.config(tmp_path / "run", **longer, **sampled)
        done = ft.train(given, model=ft.model(wan.pipeline()))
        assert calls == [(("fresh_noise",), {"num_frames": 9, "trained_frames": 5})] * 2
        assert read_recipe(done.folder).techniques == ("fresh_noise",)
        calls.clear()
        short = ft.config(tmp_path / "short", **longer | {"stages": ("5:1",)}, **sampled)
        ft.train(short, model=ft.model(wan.pipeline()))
        assert calls == []

    def test_a_lora_of_another_model_is_refused(self, sparse):
        folder, _ = sparse
        pipe = wan.pipeline(transformer=wan.transformer(num_layers=3))
        with pytest.raises(ValueError, match=r"trained on another model.*num_layers 2"):
            gen_accel.attach(pipe, from_lora=folder)

    def test_a_lora_from_elsewhere_is_refused(self, style):
        with pytest.raises(ValueError, match="does not say what attention it was trained with"):
            gen_accel.attach(wan.pipeline(), from_lora=style)

    def test_processors_alone(self, tmp_path):
        made = ft.model()
        given = ft.config(tmp_path / "run", rank=0, dense_steps=0)
        done = ft.train(given, model=made)
        names = {name.split("/")[1] for name in state(tmp_path / "run").tensors}
        assert names == {
            f"transformer.blocks.{i}.attn1.processor.branch.proj.{part}"
            for i in range(wan.LAYERS)
            for part in ("weight", "bias")
        }
        stock = wan.transformer().state_dict()
        now = made.transformer.state_dict()
        assert all(torch.equal(x, now[name]) for name, x in stock.items())
        pipe = wan.pipeline()
        gen_accel.attach(pipe, from_lora=done.folder)
        made.transformer.eval()
        with torch.no_grad():
            assert torch.equal(
                wan.forward(pipe.transformer, 3, 4, 8), wan.forward(made.transformer, 3, 4, 8)
            )


def built(kind, method="sparse_linear", settings=ft.SPARSE, seed=0, guidance=1.0, **fields):
    """The objective with a LoRA that says something, and the model as it came."""
    given = ft.config("unused", method=method, settings=settings, **fields)
    transformer = wan.transformer(seed)
    stock = deepcopy(transformer)
    transformer.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SilentBranch)
        handle = gen_accel.attach(transformer, method_from(method, settings))
    add_lora(transformer, given, some_recipe(given))
    for branch in handle.branches.values():
        branch.requires_grad_(True)

    @contextmanager
    def teaching():
        with handle.paused(), active(transformer, None):
            yield

    alone = SimpleNamespace(modules={}, showing=nullcontext, teaching=teaching)
    return Objective(transformer, family, kind, alone, guidance=guidance), stock


def some_recipe(given):
    empty = {"base_model": "x", "transformer": {}, "part": "transformer", "method": "dense"}
    empty |= {"options": {}, "schedule": {}, "rope": "none", "trained_frames": None, "frames": 9}
    empty |= {"height": 8, "width": 8, "stages": (), "steps": 1, "rank": given.rank, "alpha": 1.0}
    return Recipe(**empty, targets=given.targets, objective="distill", data="")


def say_something(objective):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))


def batch(count=2, frames=3):
    clips = ft.Clips()
    clean = torch.stack([clips.latents(i, frames) for i in range(count)])
    g = torch.Generator().manual_seed(3)
    noise, sigma = torch.randn(clean.shape, generator=g), torch.rand(count, generator=g)
    text = torch.stack([clips.conditions(i)["encoder_hidden_states"] for i in range(count)])
    return clean, noise, sigma, {"encoder_hidden_states": text}


class TestDistill:
    def test_the_teacher_is_the_model_as_it_came(self):
        objective, stock = built("distill")
        say_something(objective)
        clean, noise, sigma, conditions = batch()
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        with torch.no_grad():
            student = family.predict(objective.transformer, noisy, sigma, conditions)
            teacher = family.predict(stock, noisy, sigma, conditions)
            assert torch.equal(
                objective(clean, noise, sigma, conditions), F.mse_loss(student, teacher)
            )
            assert_apart(student, teacher)
            again = family.predict(objective.transformer, noisy, sigma, conditions)
        assert torch.equal(again, student)

    def test_nothing_to_learn_through_the_models_own_attention(self):
        objective, _ = built("distill", "dense", ())
        assert objective(*batch()).item() == 0
        objective, _ = built("distill")
        assert objective(*batch()).item() > 0

    @pytest.mark.parametrize("kind", ["flow", "distill"])
    @pytest.mark.parametrize("combine", ["project", "alpha"])
    def test_gradients_reach_all_that_trains(self, kind, combine):
        objective, _ = built(kind, settings=(*ft.SPARSE, f"combine={combine}"))
        say_something(objective)
        objective(*batch()).backward()
        names = {n for n, p in objective.named_parameters() if p.requires_grad}
        assert {n for n, p in objective.named_parameters() if p.grad is not None} == names
        assert all("lora_" in name or "processor.branch" in name for name in names)
        for name, parameter in objective.named_parameters():
            if name in names:
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0, name

    def test_it_comes_closer_to_the_dense_model(self, tmp_path):
        done = ft.train(ft.config(tmp_path, objective="distill", stages=("17:24",)))
        assert sum(done.losses[-8:]) < sum(done.losses[:8])
        assert read_recipe(done.folder).objective == "distill"


class TestGuidedTeacher:
    """A LoRA that holds the guidance of its teacher."""

    FIELDS: ClassVar = {"method": "radial", "settings": ("block=4",), "stages": ("9:6",)}

    @pytest.fixture
    def teacher(self, tmp_path):
        return ft.train(ft.config(tmp_path / "teacher", **self.FIELDS, seed=4)).folder

    def test_the_target(self):
        objective, stock = built("distill", guidance=3.0)
        say_something(objective)
        clean, noise, sigma, conditions = batch()
        nothing = {name: torch.zeros_like(x) for name, x in conditions.items()}
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        with torch.no_grad():
            student = family.predict(objective.transformer, noisy, sigma, conditions)
            told, untold = (family.predict(stock, noisy, sigma, c) for c in (conditions, nothing))
            loss = objective(clean, noise, sigma, conditions, None, nothing)
        assert_apart(told, untold)
        torch.testing.assert_close(loss, F.mse_loss(student, 3 * told - 2 * untold))

    @pytest.mark.slow
    def test_it_is_taught_by_the_lora_through_its_attention(self, teacher, tmp_path):
        alike = {"objective": "distill", "teacher_lora": str(teacher), "caption_dropout": 0.0}
        same = ft.config(tmp_path / "a", **self.FIELDS, **alike, init_lora=str(teacher))
        assert ft.train(same).losses[0] == 0  # it says what it starts from
        guided = replace(same, out=str(tmp_path / "b"), teacher_guidance=3.0, stages=("9:24",))
        done = ft.train(guided)
        assert done.losses[0] > 0
        assert sum(done.losses[-6:]) < sum(done.losses[:6])
        recipe = read_recipe(done.folder)
        assert (recipe.teacher_guidance, recipe.holds_guidance) == (3.0, True)
        assert not read_recipe(teacher).holds_guidance

    def test_the_teacher_stays_and_is_not_kept(self, teacher, tmp_path):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields)
        run = trainer._Run(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        saved = load_file(teacher / WEIGHTS)
        assert not any(".teacher." in name for name in run.names)
        run.go(False)
        transformer = run.model.transformer
        for name, x in get_peft_model_state_dict(transformer, adapter_name="teacher").items():
            assert torch.equal(x, saved[f"transformer.{name}"]), name
        kept = load_file(tmp_path / "a" / "lora" / WEIGHTS)
        assert kept.keys() == saved.keys()
        assert not any(torch.equal(kept[name], saved[name]) for name in kept if "lora_B" in name)

    @pytest.mark.slow
    def test_resume_is_the_same_to_the_bit(self, teacher, tmp_path):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields, checkpoint_every=3)
        ft.train(given)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000006")
        ft.train(replace(given, out=str(tmp_path / "b")), resume=True)
        a, b = (load_file(tmp_path / x / "lora" / WEIGHTS) for x in "ab")
        assert all(torch.equal(a[name], b[name]) for name in a)

    @pytest.mark.slow
    def test_a_dense_teacher(self, tmp_path):
        """Its own attention is full where the student's is sparse."""
        plain = self.FIELDS | {"method": "dense", "settings": ()}
        teacher = ft.train(ft.config(tmp_path / "teacher", **plain, seed=4)).folder
        alike = {"objective": "distill", "teacher_lora": str(teacher), "init_lora": str(teacher)}
        done = ft.train(ft.config(tmp_path / "a", **plain, **alike))
        assert done.losses[0] == 0
        whole = self.FIELDS | {"settings": ("block=1024",)}
        done = ft.train(ft.config(tmp_path / "b", **whole, **alike))
        assert done.losses[0] < 1e-10
        sparse = self.FIELDS | {"settings": ("block=4", "decay_factor=0.1")}
        done = ft.train(ft.config(tmp_path / "c", **sparse, **alike))
        assert done.losses[0] > 1e-6
        branches = {"method": "sparse_linear", "settings": ft.SPARSE, "stages": ("9:6",)}
        given = ft.config(tmp_path / "d", **branches, **alike)
        run = trainer._Run(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        assert any("branch" in name for name in run.names)
        assert run.go(False).losses[0] > 0

    @pytest.mark.parametrize("fails", [False, True], ids=["taught", "failed"])
    def test_teaching_leaves_no_trace(self, teacher, tmp_path, fails):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields)
        run = trainer._Run(given, trainer.accelerator_for(given), ft.model(), ft.Clips())

        def flags():
            return {n: p.requires_grad for n, p in run.objective.named_parameters()}

        before, said = flags(), partial(wan.forward, run.model.transformer)
        say_something(run.objective)
        with torch.no_grad():
            student = said()
            with suppress(KeyError), run.adapter.teaching():
                assert_apart(said(), student)
                assert flags() == before
                if fails:
                    raise KeyError
            assert torch.equal(said(), student)
        assert flags() == before
        assert {n for n, trains in before.items() if trains} == {
            n for n in before if ".default." in n
        }

    @pytest.mark.slow
    def test_the_same_with_checkpointing_and_dropout(self, teacher, tmp_path):
        fields = self.FIELDS | {
            "objective": "distill",
            "teacher_lora": str(teacher),
            "teacher_guidance": 2.0,
            "lora_dropout": 0.3,
        }
        plain = ft.train(ft.config(tmp_path / "a", **fields)).losses
        again = ft.config(tmp_path / "b", **fields, gradient_checkpointing=True)
        assert ft.train(again).losses == plain

    @pytest.mark.slow
    def test_another_teacher_is_another_run(self, teacher, tmp_path):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields, checkpoint_every=3)
        folder = ft.train(given).folder
        assert read_recipe(folder).teacher == file_sha256(teacher / WEIGHTS)
        shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-000006")
        moved = replace(given, teacher_lora=str(shutil.copytree(teacher, tmp_path / "moved")))
        ft.train(moved, resume=True)
        other = ft.train(ft.config(tmp_path / "other", **self.FIELDS, seed=5)).folder
        with pytest.raises(ValueError, match=r"differs in teacher_lora \(its weights\): "):
            ft.train(replace(given, teacher_lora=str(other)), resume=True)
        with pytest.raises(ValueError, match="differs in teacher_lora"):
            ft.train(replace(given, teacher_lora=None), resume=True)

    def test_guidance_is_passed_on_and_not_doubled(self, teacher, tmp_path):
        held = str(with_recipe(teacher, tmp_path / "held", teacher_guidance=3.0))
        given = ft.config(tmp_path / "a", **self.FIELDS, objective="distill", teacher_lora=held)
        assert read_recipe(ft.train(given).folder).teacher_guidance == 3.0
        again = replace(given, out=str(tmp_path / "b"), init_lora=held)
        assert ft.train(again).losses[0] == 0
        with pytest.raises(ValueError, match="holds a guidance of 3 already, teacher_guidance is"):
            ft.train(replace(given, out=str(tmp_path / "c"), teacher_guidance=2.0))
        flow = ft.config(tmp_path / "d", **self.FIELDS, init_lora=held)
        with pytest.raises(ValueError, match=r"holds a guidance of 3, this .* is of 1: start"):
            ft.train(flow)

    @pytest.mark.slow
    def test_a_teacher_with_other_layers_and_by_its_file(self, tmp_path):
        fields = self.FIELDS | {"rank": 3, "targets": ("attention", "feed_forward")}
        teacher = ft.train(ft.config(tmp_path / "teacher", **fields)).folder
        (teacher / WEIGHTS).rename(teacher / "other.safetensors")
        file = str(teacher / "other.safetensors")
        given = ft.config(tmp_path / "a", **self.FIELDS, objective="distill", teacher_lora=file)
        run = trainer._Run(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        saved = load_file(file)
        own = get_peft_model_state_dict(run.model.transformer, adapter_name="teacher")
        assert {f"transformer.{name}" for name in own} == saved.keys()
        assert all(torch.equal(x, saved[f"transformer.{name}"]) for name, x in own.items())
        assert all("ff.net" not in name for name in run.names)

    def test_without_captions_it_says_what_the_model_says_without(self, tmp_path):
        fields = {"method": "dense", "settings": (), "objective": "distill", "stages": ("9:2",)}
        given = ft.config(tmp_path, **fields, teacher_guidance=5.0, caption_dropout=1.0)
        assert ft.train(given).losses[0] == 0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"settings": ("block=8",)}, "block=4.* with 0 dense layers, asked for .*block=8"),
            ({"dense_layers": 1}, "with 0 dense layers, asked for .* with 1: take"),
            ({"method": "dense", "settings": ()}, "asked for is Dense"),
            ({"stages": ("9:6:position_interpolation",)}, "rule 'none', stages .* write its rule"),
            ({"method": "sparse_linear", "settings": ft.SPARSE}, "take a teacher of method dense"),
            ({"part": "transformer_2"}, "is of transformer, asked for is part transformer_2"),
        ],
        ids=["method", "layers", "dense", "rule", "parameters", "part"],
    )
    def test_a_teacher_that_does_not_fit(self, teacher, tmp_path, fields, message):
        given = ft.config(
            tmp_path / "a",
            **(self.FIELDS | fields),
            objective="distill",
            teacher_lora=str(teacher),
        )
        with pytest.raises(ValueError, match=message):
            ft.train(given)

    @pytest.mark.slow
    def test_its_rule_counts_where_there_is_one(self, tmp_path):
        fields = self.FIELDS | {"stages": ("5:1", "9:2:position_interpolation")}
        teacher = str(ft.train(ft.config(tmp_path / "teacher", **fields)).folder)
        given = ft.config(tmp_path / "a", **fields, objective="distill", teacher_lora=teacher)
        ft.train(given)
        with pytest.raises(ValueError, match="is for a model of 5 frames, trained_frames is 9"):
            ft.train(replace(given, out=str(tmp_path / "b")), trained_frames=9)

    def test_a_teacher_of_another_model(self, teacher, tmp_path):
        given = ft.config(
            tmp_path / "a", **self.FIELDS, objective="distill", teacher_lora=str(teacher)
        )
        with pytest.raises(ValueError, match="trained on another model"):
            ft.train(given, transformer=wan.transformer(num_layers=3))

    def test_models_that_are_not_guided_so(self, tmp_path):
        fields = {"objective": "distill", "teacher_guidance": 3.0}
        given = ft.config(tmp_path, **self.FIELDS, **fields)
        with pytest.raises(ValueError, match="a pipeline of two transformers guides both or none"):
            ft.train(given, boundary=0.9)
        hunyuan = replace(given, model="hunyuanvideo-community/HunyuanVideo")
        with pytest.raises(ValueError, match="holds a guidance of its own"):
            dry_run(hunyuan)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"teacher_guidance": 0.5}, "teacher_guidance must be finite and at least 1, got 0.5"),
            ({"teacher_guidance": math.inf}, "must be finite and at least 1, got inf"),
            ({"teacher_guidance": 3.0}, "teacher_guidance is for objective distill"),
            ({"teacher_lora": "x"}, "teacher_lora is for objective distill"),
            (
                {"teacher_lora": "x", "objective": "distill", "adapter": "image_prompt"},
                "got 'x' with distill of image_prompt: leave it out",
            ),
            (
                {
                    "teacher_lora": "x",
                    "objective": "distill",
                    "rank": 0,
                    "method": "sparse_linear",
                },
                "teacher_lora x teaches a LoRA, and rank is 0: give",
            ),
        ],
        ids=["scale", "infinite", "flow", "flow with lora", "image prompt", "no rank"],
    )
    def test_what_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**fields)

    def test_validation_goes_without_guidance(self, teacher, tmp_path):
        held = str(with_recipe(teacher, tmp_path / "held", teacher_guidance=3.0))
        distilled = TrainConfig(objective="distill", teacher_guidance=3.0)
        assert _guidance(TrainConfig()) == 5.0
        assert _guidance(distilled) == 1.0
        assert _guidance(replace(distilled, guidance_scale=2.0)) == 2.0
        assert _guidance(TrainConfig(objective="distill", teacher_lora=held)) == 1.0
        assert _guidance(TrainConfig(objective="distill", teacher_lora=str(teacher))) == 5.0


def test_the_loss_is_that_of_the_velocity():
    objective, stock = built("flow", "dense", ())
    clean, noise, sigma, conditions = batch()
    mix = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - mix) * clean + mix * noise
    with torch.no_grad():
        said = stock(noisy, timestep=1000 * sigma, **conditions, return_dict=False)[0]
        expected = ((said - (noise - clean)) ** 2).mean()
        assert torch.allclose(objective(clean, noise, sigma, conditions), expected, rtol=1e-6)


def sigmas(count=3000, shift=1.0, bounds=(1e-3, 1 - 1e-3), **fields):
    given = ft.config("unused", **fields)
    found = [
        draw(given, step, 0, (1, 1, 1, 1), shift=shift, sigmas=bounds).sigma
        for step in range(count)
    ]
    return torch.tensor(found, dtype=torch.float64).sort().values


def assert_distributed(found, cumulative, bounds=(1e-3, 1 - 1e-3)):
    """Kolmogorov-Smirnov at 1 %, of a distribution cut to the bounds."""
    low, high = (cumulative(torch.tensor(x, dtype=torch.float64)) for x in bounds)
    expected = (cumulative(found) - low) / (high - low)
    count = len(found)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((expected - steps[:-1]).max(), (steps[1:] - expected).max())
    assert distance < 1.63 / math.sqrt(count)
    assert bounds[0] <= found[0] <= found[-1] <= bounds[1]


class TestDraws:
    @pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4)])
    def test_logit_normal(self, shift, mean, std):
        def cumulative(sigma):
            level = sigma / (shift - (shift - 1) * sigma)
            return torch.special.ndtr((level.logit() - mean) / std)

        assert_distributed(sigmas(shift=shift, logit_mean=mean, logit_std=std), cumulative)

    @pytest.mark.parametrize("shift", [1.0, 5.0])
    def test_uniform(self, shift):
        found = sigmas(shift=shift, timestep_sampling="uniform")
        assert_distributed(found, lambda sigma: sigma / (shift - (shift - 1) * sigma))

    def test_levels_that_never_come(self):
        with pytest.raises(ValueError, match="change logit_mean 50, logit_std 1 or shift 1"):
            draw(TrainConfig(logit_mean=50.0), 0, 0, (1, 1, 1, 1), shift=1.0)

    @pytest.mark.parametrize("bounds", [(0.875, 0.999), (0.001, 0.875)])
    def test_of_one_of_two_experts(self, bounds):
        found = sigmas(1000, shift=3.0, bounds=bounds)
        assert_distributed(found, lambda s: torch.special.ndtr((s / (3 - 2 * s)).logit()), bounds)

    def test_the_shift_is_that_of_the_scheduler(self):
        scheduler = wan.euler()
        levels = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
        ours = torch.tensor([shifted(level.item(), 3.0) for level in levels])
        assert torch.allclose(scheduler.sigmas.double(), ours.double(), atol=1e-6)

    def test_a_draw_depends_on_seed_step_and_place_alone(self):
        given = ft.config("unused", caption_dropout=0.5)
        shape = (2, 3, 4, 5)
        torch.manual_seed(1)
        first = draw(given, 3, 1, shape, shift=3.0)
        torch.manual_seed(2)
        draw(given, 7, 0, shape, shift=3.0)
        again = draw(given, 3, 1, shape, shift=3.0)
        assert torch.equal(first.noise, again.noise)
        assert first[1:] == again[1:]
        for other in (
            draw(given, 4, 1, shape, shift=3.0),
            draw(given, 3, 2, shape, shift=3.0),
            draw(replace(given, seed=1), 3, 1, shape, shift=3.0),
        ):
            assert not torch.equal(first.noise, other.noise)
            assert first.sigma != other.sigma
        assert draw(given, 3, 1, (9,), shift=3.0)[1:] == first[1:]

    def test_the_noise_is_normal(self):
        noise = draw(ft.config("unused"), 0, 0, (16, 8, 32, 32), shift=1.0).noise
        ordered = noise.flatten().double().sort().values
        expected = torch.special.ndtr(ordered)
        steps = torch.arange(1, len(ordered) + 1) / len(ordered)
        assert (expected - steps).abs().max() < 1.63 / math.sqrt(len(ordered))

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_captions_are_dropped_at_their_share(self, share):
        given = ft.config("unused", caption_dropout=share)
        shown = [draw(given, i, 0, (1,), shift=1.0).captioned for i in range(2000)]
        assert abs(np.mean(shown) - (1 - share)) <= 3 * math.sqrt(share * (1 - share) / 2000)

    def test_what_a_dropped_caption_is(self, tmp_path):
        """A clip without its caption is shown with the cache's empty one."""
        asked = []

        class Watched(ft.Clips):
            def conditions(self, index):
                asked.append(index)
                return super().conditions(index)

        ft.train(ft.config(tmp_path / "a", caption_dropout=1.0), Watched())
        assert not asked
        ft.train(ft.config(tmp_path / "b", caption_dropout=0.0), Watched())
        assert len(asked) == 4


class TestOrder:
    def test_every_clip_before_any_comes_twice(self):
        plan = order([range(7)], steps=14, batch=2, seed=0)
        shown = [clip for clips in plan for clip in clips]
        assert len(shown) == 28
        rounds = [shown[i : i + 7] for i in range(0, 28, 7)]
        assert all(sorted(one) == list(range(7)) for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1

    def test_two_stages_alike_show_other_clips(self, tmp_path):
        given = ft.config(tmp_path, stages=("9:4", "9:4:riflex"))
        made = trainer._Run(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        assert made.plans[0] != made.plans[1]

    def test_one_size_a_step_in_proportion(self):
        buckets = [[0, 1, 2, 3, 4, 5], [6, 7]]
        plan = order(buckets, steps=400, batch=3, seed=1)
        assert all(
            set(clips) <= set(buckets[0]) or set(clips) <= set(buckets[1]) for clips in plan
        )
        share = np.mean([clips[0] >= 6 for clips in plan])
        assert abs(share - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 400)
        for bucket in buckets:
            shown = [clip for clips in plan if clips[0] in bucket for clip in clips]
            whole = len(shown) // len(bucket) * len(bucket)
            for i in range(0, whole, len(bucket)):
                assert sorted(shown[i : i + len(bucket)]) == bucket

    def test_it_depends_on_the_seed_alone(self):
        torch.manual_seed(0)
        first = order([range(9)], 5, 2, seed=3)
        torch.manual_seed(1)
        assert order([range(9)], 5, 2, seed=3) == first
        assert order([range(9)], 5, 2, seed=4) != first

    def test_a_batch_larger_than_a_bucket(self):
        assert all(len(clips) == 5 for clips in order([[0], [1, 2]], 10, 5, seed=0))

    def test_clips_of_several_sizes_train(self, tmp_path):
        clips = ft.Clips(((4, 8), (6, 4), (4, 8), (6, 4)))
        done = ft.train(ft.config(tmp_path, stages=("9:8",), batch_size=2), clips)
        assert all(math.isfinite(loss) for loss in done.losses)


class TestPrecision:
    def grads(self, checkpointing, dtype=torch.float32, dropout=0.3):
        objective, _ = built("flow", lora_dropout=dropout)
        say_something(objective)
        if checkpointing:
            objective.transformer.enable_gradient_checkpointing()
        objective.to(dtype).train()
        clean, noise, sigma, conditions = batch()
        torch.manual_seed(5)
        text = {name: x.to(dtype) for name, x in conditions.items()}
        objective(clean.to(dtype), noise.to(dtype), sigma.to(dtype), text).backward()
        return {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}

    @pytest.mark.slow
    def test_gradient_checkpointing_changes_no_gradient(self):
        """With dropout: what is computed again has to draw the same."""
        plain, saved = self.grads(False), self.grads(True)
        assert plain.keys() == saved.keys()
        exact = self.grads(False, torch.float64, dropout=0.0)
        undropped, saved_undropped = self.grads(False, dropout=0.0), self.grads(True, dropout=0.0)
        for name, grad in plain.items():
            assert torch.equal(saved[name], grad), name
            checks.assert_no_worse(saved_undropped[name], undropped[name], exact[name])

    def test_bfloat16(self, tmp_path):
        """The model in half precision, what trains in float32, and to be resumed to the bit."""
        made = ft.model(transformer=wan.transformer().to(torch.bfloat16))
        given = ft.config(tmp_path / "a", mixed_precision="bf16", checkpoint_every=2)
        done = ft.train(given, model=made)
        assert all(math.isfinite(loss) for loss in done.losses)
        stock = wan.transformer().to(torch.bfloat16).state_dict()
        for name, parameter in made.transformer.named_parameters():
            trains = "lora_" in name or ".branch." in name
            assert parameter.requires_grad == trains, name
            before = stock.get(name.replace(".base_layer", ""))
            assert parameter.dtype == (torch.float32 if trains else before.dtype), name
        assert {x.dtype for x in load_file(done.folder / WEIGHTS).values()} == {torch.float32}
        out = tmp_path / "b"
        shutil.copytree(tmp_path / "a", out)
        shutil.rmtree(out / trainer.CHECKPOINTS / "step-000004")
        ft.train(
            replace(given, out=str(out)),
            model=ft.model(transformer=wan.transformer().to(torch.bfloat16)),
            resume=True,
        )
        assert_same_run(out, tmp_path / "a")

    def test_float16_needs_a_gpu(self, tmp_path):
        with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU: take bf16 or no"):
            trainer.accelerator_for(ft.config(tmp_path, mixed_precision="fp16"))

    def test_bitsandbytes_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            trainer.accelerator_for(ft.config(tmp_path, optimizer="adamw8bit"))

    def test_a_loss_that_is_not_finite_ends_the_run(self, tmp_path):
        class Broken(ft.Clips):
            def latents(self, index, frames):
                found = super().latents(index, frames)
                started = (tmp_path / trainer.METRICS).exists()
                return found * math.inf if started and len(losses(tmp_path)) == 3 else found

        given = ft.config(tmp_path, checkpoint_every=1, keep_checkpoints=1)
        with pytest.raises(ValueError, match=r"the loss of step 3 is nan: lower learning_rate"):
            ft.train(given, Broken())
        assert state(tmp_path).state["step"] == 3
        assert all(x.isfinite().all() for x in state(tmp_path).tensors.values())
        assert len(ft.train(given, resume=True).losses) == 1

    def test_the_length_of_the_gradient_is_limited(self, tmp_path):
        """With SGD's step the parameters would move by at most that; AdamW hides it, the log
        shows the length before."""
        free = ft.train(ft.config(tmp_path / "a", max_grad_norm=0, stages=("9:2",)))
        assert metrics(tmp_path / "a")[0]["grad_norm"] > 0
        assert math.isfinite(metrics(tmp_path / "a")[0]["grad_norm"])
        assert (
            free.losses[0]
            == ft.train(ft.config(tmp_path / "b", max_grad_norm=1e-9, stages=("9:2",))).losses[0]
        )
        a, b = state(tmp_path / "a").tensors, state(tmp_path / "b").tensors
        name = next(name for name in a if name.endswith("lora_B.default.weight/exp_avg"))
        assert b[name].norm() < 1e-8 < a[name].norm()


class TestValidation:
    PROMPT = "a red square moves right"

    def given(self, out, **fields):
        return ft.config(out, stages=("9:3",), max_tokens=16, **fields)

    @pytest.mark.slow
    def test_videos_beside_the_start_and_the_same_losses(self, tmp_path):
        given = self.given(
            tmp_path / "with",
            validate_every=2,
            validation_prompts=(self.PROMPT,),
            validation_frames=5,
            validation_steps=1,
            guidance_scale=1.0,
            ema_decay=0.5,
            lora_dropout=0.2,
        )
        made = ft.model(pipe=wan.pipeline())
        done = ft.train(given, model=made)
        videos = tmp_path / "with" / "validation"
        assert files(videos) == [
            "step-000000/00.mp4",
            "step-000002/00.beside_start.mp4",
            "step-000002/00.mp4",
            "step-000003/00.beside_start.mp4",
            "step-000003/00.mp4",
        ]
        start = read_video(videos / "step-000000" / "00.mp4")
        beside = read_video(videos / "step-000003" / "00.beside_start.mp4")
        assert start.shape == (5, 32, 64, 3)
        assert beside.shape[0] == 5
        assert beside.shape[2] >= 128
        without = self.given(tmp_path / "without", ema_decay=0.5, lora_dropout=0.2)
        assert ft.train(without).losses == done.losses
        a, b = state(tmp_path / "with"), state(tmp_path / "without")
        assert all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())

    def test_it_samples_as_the_lora_is_used(self, tmp_path, monkeypatch):
        """Dense steps, and the rule of the last stage at the longest length, whatever is shown."""
        seen = []

        def sampled(validation, done):
            handle = validation.pipe.transformer.blocks[0].attn1.processor.owner
            seen.append((handle.schedule, handle))

        rules = []
        monkeypatch.setattr(trainer.Validation, "__call__", sampled)
        apply = trainer.apply_rule
        monkeypatch.setattr(
            trainer,
            "apply_rule",
            lambda *args, **lengths: rules.append((args[1], lengths)) or apply(*args, **lengths),
        )
        given = ft.config(
            tmp_path,
            stages=("17:1", "17:1:riflex"),
            dense_steps=2,
            validate_every=1,
            validation_prompts=(self.PROMPT,),
            validation_frames=9,
        )
        ft.train(given, model=ft.model(pipe=wan.pipeline()))
        assert [schedule for schedule, _ in seen] == [Schedule(dense_steps=2)] * 3
        assert seen[0][1].schedule == Schedule()
        assert rules == [("riflex", {"frames": 5, "trained": 2})] * 4

    def test_it_needs_prompts(self, tmp_path):
        with pytest.raises(ValueError, match="validate_every needs validation_prompts"):
            self.given(tmp_path, validate_every=1)


@pytest.fixture(scope="module")
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


class TestTrain:
    """From the pipeline and the clips on disk."""

    def test_caches_trains_and_resumes(self, on_disk, tmp_path):
        given = on_disk(checkpoint_every=2)
        done = gen_accel.lora.train(given)
        assert done.folder == tmp_path / "run" / "lora"
        assert done.steps == len(done.losses) == 4
        assert (tmp_path / "run" / "cache" / "manifest.json").exists()
        recipe = read_recipe(done.folder)
        assert recipe.base_model == given.model
        cached = gen_accel.lora.LatentCache(tmp_path / "run" / "cache")
        assert recipe.data == cached.digest
        shutil.rmtree(done.folder)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
        moved = replace(given, data=None, cache=str(tmp_path / "run" / "cache"))
        again = gen_accel.lora.train(moved, resume=True)
        assert again.losses == done.losses[2:]
        assert losses(tmp_path / "run") == done.losses
        pipe = wan.WanPipeline.from_pretrained(given.model)
        pipe.load_lora_weights(again.folder)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"height": 48}, "holds clips of 32 x 64 pixels, asked for are 48 x 64"),
            ({"fps": 8.0}, "holds clips at 16.0 frames a second, asked for are 8.0"),
        ],
        ids=str,
    )
    def test_a_cache_of_other_clips_is_refused(self, on_disk, tmp_path, fields, message):
        cache_clips(on_disk(cache=str(tmp_path / "cache")))
        other = on_disk(data=None, cache=str(tmp_path / "cache"), **fields)
        with pytest.raises(ValueError, match=message):
            gen_accel.lora.train(other)

    def test_trained_frames_that_are_no_latents(self, on_disk):
        given = on_disk(trained_frames=80, stages=("17:1:riflex",))
        with pytest.raises(ValueError, match=r"trained_frames must be .* got 80"):
            gen_accel.lora.train(given)

    def test_a_dry_run_before_does_no_harm(self, on_disk):
        """What Accelerate remembers of it is another precision."""
        given = on_disk(mixed_precision="bf16", stages=("9:1",))
        assert dry_run(given).steps == 2
        assert math.isfinite(gen_accel.lora.train(given).losses[0])

    def test_tensorboard(self, on_disk, tmp_path):
        pytest.importorskip("tensorboard")
        gen_accel.lora.train(on_disk(log_with="tensorboard", stages=("9:1",)))
        assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))

    def test_the_last_expert_sees_low_noise(self, tmp_path):
        """Of two, each is trained at the noise levels that it serves."""
        seen = []

        class Watched(Objective):
            def forward(self, clean, noise, sigma, *more):
                seen.extend(sigma.tolist())
                return super().forward(clean, noise, sigma, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "Objective", Watched)
            for part in ("transformer", "transformer_2"):
                given = ft.config(tmp_path / part, part=part, stages=("9:6",))
                done = ft.train(given, boundary=0.6)
                assert read_recipe(done.folder).part == part
        assert min(seen[:6]) >= 0.6 >= max(seen[6:])


class TestRefusals:
    """All of it before the first step, and most before the weights are read."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rank": 0, "method": "radial", "settings": ()}, "leaves nothing to train"),
            ({"rank": 0, "train_processors": False}, "leaves nothing to train"),
            ({"targets": ()}, "targets is empty"),
            ({"stages": ()}, "stages is empty"),
            ({"stages": ("9",)}, "a stage is written frames:steps"),
            ({"stages": ("9:0",)}, "at least one frame and one step"),
            ({"stages": ("9:1:ntk",)}, "the rule of a stage must be one of"),
            ({"method": "raidal"}, "raidal"),
            ({"settings": ("critcal=1",)}, "did you mean 'critical'"),
            ({"kernel": "fast"}, "kernel"),
            ({"rank": -1}, "rank must not be negative, got -1"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
            ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
            ({"alpha": -1.0}, "alpha must be positive"),
            ({"fps": math.inf}, "fps must be positive"),
            ({"lora_dropout": 1.0}, "lora_dropout must be a share"),
            ({"caption_dropout": 1.1}, "caption_dropout must be a share"),
            ({"ema_decay": 1.0}, "ema_decay must be a share"),
            ({"betas": (0.9, 1.0)}, "betas must be two shares"),
            ({"weight_decay": -0.1}, "weight_decay must not be negative"),
            ({"max_grad_norm": math.nan}, "max_grad_norm must not be negative, got nan"),
            ({"seed": -1}, "seed must be from 0"),
            ({"trained_frames": 0}, "trained_frames must be at least 1"),
        ],
        ids=str,
    )
    def test_a_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ft.config("unused", **fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"targets": ("attention", "to_x")}, "'to_x' is no linear layer in the blocks of Wan"),
            ({"part": "transformer_2"}, "has no transformer_2"),
            ({"stages": ("10:1",)}, "10"),
            ({"height": 40}, "40"),
            ({"init_lora": "nowhere"}, "no LoRA at nowhere"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_the_model(self, on_disk, fields, message):
        given = on_disk(**fields)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            model_of(given, wan.pipeline())

    def test_every_target_matches(self):
        model = wan.transformer()
        attention = target_modules(model, ("attention",))
        assert len(attention) == 8 * wan.LAYERS
        both = target_modules(model, ("attention", "feed_forward"))
        assert len(both) == 10 * wan.LAYERS
        assert target_modules(model, ("attn1.to_q",)) == [
            f"blocks.{i}.attn1.to_q" for i in range(wan.LAYERS)
        ]
        for target in ("to_out", "proj_out", "norm2", "q", ""):
            with pytest.raises(ValueError, match="no linear layer in the blocks"):
                target_modules(model, ("attention", target))

    def test_a_lora_of_another_model(self, on_disk, whole):
        pipe = wan.pipeline(transformer=wan.transformer(num_layers=3))
        with pytest.raises(ValueError, match="trained on another model"):
            model_of(on_disk(init_lora=str(whole / "lora")), pipe)

    def test_neither_data_nor_cache(self, on_disk):
        given = on_disk(data=None)
        with pytest.raises(ValueError, match=r"data is not given and .*cache holds no cache"):
            prepare(given, trainer.accelerator_for(given))
        given = on_disk(data="nowhere")
        with pytest.raises(FileNotFoundError, match="data: there is nothing at nowhere"):
            prepare(given, trainer.accelerator_for(given))

    def test_clips_that_are_too_short(self, on_disk, tmp_path):
        with pytest.raises(ValueError, match=r"no clip has 33 frames.*longest of .* has 17"):
            gen_accel.lora.train(on_disk(stages=("33:1",)))
        assert not (tmp_path / "run" / "lora").exists()
        with pytest.raises(
            ValueError, match=r"no clip is long enough for stage 33:1: 33 frames .* of 5 has 17"
        ):
            ft.train(ft.config(tmp_path / "b", stages=("9:1", "33:1")))

    def test_a_run_is_there_already(self, on_disk, whole):
        with pytest.raises(ValueError, match="holds a run of step-000008"):
            gen_accel.lora.train(on_disk(out=whole, model="nowhere"))


def written(tmp_path, text):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    return path


class TestConfig:
    def test_numbers_as_yaml_reads_them(self, tmp_path):
        path = written(
            tmp_path,
            "learning_rate: 1e-4\nrank: 16.0\nalpha: none\nfps: 24\nmixed_precision: no\n"
            "betas: [0, 1e-1]\nstages: 9:100\nmax_tokens:\nseed: '7'\n",
        )
        given = read_config(path)
        assert given.learning_rate == 1e-4
        assert (given.rank, given.alpha, given.fps) == (16, None, 24.0)
        assert type(given.rank) is int
        assert type(given.fps) is float
        assert given.mixed_precision == "no"
        assert given.betas == (0.0, 0.1)
        assert given.stages == ("9:100",)
        assert (given.max_tokens, given.seed) == (None, 7)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rat: 1", "no field 'learning_rat'; did you mean 'learning_rate'?"),
            ("zzz: 1", "there is no field 'zzz'$"),
            ("3: 1", "there is no field 3$"),
            ("rank: many", "rank must be int, got 'many'"),
            ("rank: 1.5", "rank must be int, got 1.5"),
            ("rank: true", "rank must be int, got True"),
            ("rank: .inf", "rank must be int, got inf"),
            ("rank: [1]", "rank must be int, got"),
            ("learning_rate: true", "learning_rate must be float, got True"),
            ("gradient_checkpointing: 1", "gradient_checkpointing must be true/false, got 1"),
            ("betas: [0.9]", "betas must be float,float, got"),
            (
                "objective: flows",
                "objective must be one of flow, distill, distill_attention, got 'flows'",
            ),
            ("mixed_precision: yes", "mixed_precision must be one of no, bf16, fp16, got True"),
            ("data: {a: b}", "data must be str or none, got"),
            ("stages: [81:20]", "in quotes in YAML"),
            ("- rank", "must hold fields as `name: value`, got"),
            ("rank", "must hold fields as `name: value`, got 'rank'"),
            ("", "must hold fields as `name: value`, got None"),
            ("rank: [", "is not YAML"),
            ("rank: 0", "leaves nothing to train"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_config(written(tmp_path, text))

    def test_not_text_and_not_there(self, tmp_path):
        (tmp_path / "lora.yaml").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(ValueError, match="is not YAML"):
            read_config(tmp_path / "lora.yaml")
        with pytest.raises(FileNotFoundError):
            read_config(tmp_path / "other.yaml")

    def test_flags_take_the_place_of_the_file(self, tmp_path):
        given = read_config(written(tmp_path, "rank: 8\nseed: 3"), {"rank": "4"})
        assert (given.rank, given.seed) == (4, 3)

    @pytest.mark.parametrize(
        "given",
        [
            TrainConfig(),
            TrainConfig(
                data='a "b": #c',
                out="x " * 150,
                fps=None,
                stages=("81:20", "161:5:position_interpolation"),
                method="sparse_linear",
                settings=("critical=0.1",),
                rank=0,
                alpha=1e-7,
                mixed_precision="no",
                validate_every=3,
                validation_prompts=("a: cat, - 'surfs'", "word " * 90, "größer"),
                validation_frames=9,
            ),
        ],
        ids=["default", "awkward"],
    )
    def test_what_is_printed_is_read_again(self, tmp_path, given):
        text = print_config(given)
        assert read_config(written(tmp_path, text)) == given
        assert list(yaml.safe_load(text)) == [one.name for one in fields(TrainConfig)]
        assert all(one.metadata["help"] in text for one in fields(TrainConfig))

    def test_lists_are_tuples(self):
        assert TrainConfig(stages=["9:1"]) == TrainConfig(stages=("9:1",))

    def test_stages(self):
        given = TrainConfig(stages=("81:20", "161:600:riflex"))
        assert given.curriculum == (Stage(81, 20), Stage(161, 600, "riflex"))
        assert [str(stage) for stage in given.curriculum] == list(given.stages)
        assert (given.total_steps, given.longest) == (620, 161)


class TestCommands:
    @pytest.mark.parametrize("verb", ["train", "cache"])
    def test_every_field_is_a_flag(self, run, verb):
        text = run(verb, "--help").stdout
        for one in fields(TrainConfig):
            assert re.search(rf"--{one.name.replace('_', '-')}\b", text), one.name

    def test_print_config(self, run, tmp_path):
        text = run("train", "--print-config", "--rank", "3", "--stages", "9:1,17:2").stdout
        path = written(tmp_path, text)
        assert read_config(path) == TrainConfig(rank=3, stages=("9:1", "17:2"))
        flags = ("--betas", "0.5,0.6", "--no-train-processors", "--alpha", "none")
        text = run("train", path, "--print-config", *flags).stdout
        assert read_config(written(tmp_path, text)) == TrainConfig(
            rank=3, stages=("9:1", "17:2"), betas=(0.5, 0.6), train_processors=False
        )

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--rank", "x"), "rank must be int"),
            (("--betas", "0.9,x"), "betas must be float,float"),
            (("nowhere.yaml",), "nowhere.yaml"),
            (("--dry-run", "--resume"), "leave --resume out"),
            (("--data", "nowhere"), "data: there is nothing at nowhere"),
        ],
        ids=str,
    )
    def test_one_line_for_what_is_wrong(self, run, tmp_path, args, message):
        result = run("train", "--out", tmp_path / "run", *args, code=2)
        assert re.fullmatch(r"error: .*\n?", result.stderr)
        assert message in result.stderr

    def test_cache_train_and_resume(self, run, on_disk, tmp_path):
        path = written(tmp_path, print_config(on_disk(stages=("9:1",))))
        assert "3 clips encoded" in run("cache", path).stdout
        assert "3 kept" in run("cache", path).stdout
        said = run("train", path).stdout
        assert re.match(rf"1 steps, \d+ s: {re.escape(str(tmp_path))}/run/lora", said)
        assert "holds a run" in run("train", path, code=2).stderr
        shutil.rmtree(tmp_path / "run" / "lora")
        run("train", path, "--resume")
        assert (tmp_path / "run" / "lora" / WEIGHTS).exists()

    def test_cache_needs_data(self, run, tmp_path):
        assert "data is not given" in run("cache", "--out", tmp_path, code=2).stderr

    def test_dry_run(self, run, on_disk, tmp_path):
        path = written(tmp_path, print_config(on_disk(data="nowhere")))
        said = run("train", path, "--dry-run").stdout
        assert re.match(
            r"the config will do: 2 steps on a tiny model, losses [\d.]+, [\d.]+", said
        )
        assert not (tmp_path / "run").exists()

    def test_an_interruption(self, run, tmp_path, monkeypatch):
        stopped = trainer.Trained(None, 3, [], 1.0)
        monkeypatch.setattr(trainer, "train", lambda *args, **kwargs: stopped)
        result = run("train", "--out", tmp_path, code=130)
        assert "stopped after step 3; --resume goes on" in result.stderr


class TestDryRun:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_config_that_is_shipped(self, path):
        given = read_config(path)
        done = dry_run(given)
        assert done.steps == len(done.losses) == max(2, len(given.stages))
        assert all(math.isfinite(loss) for loss in done.losses)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"height": 100}, "height must be a multiple of 16, got 100"),
            ({"stages": ("82:5",)}, "frames must be 1 more than a multiple of 4, got 82"),
            ({"targets": ("attn1.to_w",)}, "'attn1.to_w' is no linear layer"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            dry_run(TrainConfig(**fields))

    def test_windows_and_kernels_that_a_tiny_clip_has_not(self):
        """The window is larger than the smallest clips; the kernel needs a GPU."""
        window = {"method": "neighborhood", "settings": ("window=5,8,8",)}
        given = TrainConfig(kernel="triton", dense_layers=0, **window)
        assert all(math.isfinite(loss) for loss in dry_run(given).losses)

    def test_it_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        dry_run(TrainConfig(ema_decay=0.9, gradient_accumulation=2, objective="distill"))
        assert files(tmp_path) == []


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_knows_every_field(path):
    """It raises ValueError for what it does not."""
    config = load_config_from_file(str(path))
    kinds = {"fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type.value == kinds.get(path.stem, "MULTI_GPU")
