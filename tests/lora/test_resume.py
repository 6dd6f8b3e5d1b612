"""Training that is stopped, killed or broken off, and goes on."""

import errno
import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import finetuning as ft
from support.forked import Forked
from support.paths import environment
from support.runs import (
    FULL_STEPS,
    assert_same_run,
    change_state,
    files,
    losses,
    metrics,
    state,
)

from gen_accel import process
from gen_accel.io import NoRoom, file_sha256, replacing
from gen_accel.lora import checkpoint, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


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

    @pytest.mark.slow
    def test_in_two_parts(self, whole, tmp_path):
        first = stopping(tmp_path / "run", after=3, kind=signal.SIGHUP)
        assert first.folder is None
        assert first.steps == 3
        assert not (tmp_path / "run" / "lora").exists()
        rest = ft.train(ft.config(tmp_path / "run", **ft.FULL), resume=True)
        assert len(rest.losses) == FULL_STEPS - 3
        assert_same_run(tmp_path / "run", whole)

    def test_epochs_are_steps(self, tmp_path):
        """Five clips in batches of two: an epoch has three steps."""
        given = {"batch_size": 2, "every": "epochs", "checkpoint_every": 1, "keep_checkpoints": 9}
        first = ft.config(tmp_path / "run", stages=("9:1e",), **given)
        assert ft.train(first).steps == 3
        longer = ft.config(tmp_path / "run", stages=("9:2e", "17:1e"), **given)
        assert ft.train(longer, resume=True).steps == 9
        saved = checkpoint.found(tmp_path / "run" / trainer.CHECKPOINTS)
        assert [checkpoint.step_of(path) for path in saved] == [3, 6, 9]
        assert checkpoint.is_end(saved[-1], longer)
        assert not checkpoint.is_end(saved[0], longer)
        told = (tmp_path / "run" / "report.html").read_text()
        assert "9 of 9, 9:6 17:3, epoch 1 of 1" in told
        counted = ft.config(tmp_path / "steps", stages=("9:6", "17:3"), batch_size=2)
        assert ft.train(counted).steps == 9
        assert losses(tmp_path / "run") == losses(tmp_path / "steps")

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

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "how",
        [
            *("truncated", "flipped", "no state", "half a state", "not finite"),
            *("an earlier step", "a later step", "another rate"),
        ],
    )
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
        elif how == "half a state":
            about.write_text(about.read_text()[:100])
        elif how == "not finite":
            poison(newest)
        else:
            change(about, how)
        with pytest.warns(UserWarning, match="step-000008 is broken and left out"):
            done = ft.train(ft.config(out, **ft.FULL), resume=True)
        assert len(done.losses) == 2
        assert_same_run(out, whole)

    def test_a_broken_checkpoint_does_not_crowd_out_whole_ones(self, whole, tmp_path):
        out = shutil.copytree(whole, tmp_path / "run")
        (out / trainer.CHECKPOINTS / "step-000008" / checkpoint.STATE).unlink()
        given = ft.config(out, **ft.FULL).replaced(checkpoint_every=7, keep_checkpoints=1)
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

    @pytest.mark.slow
    def test_a_full_disk(self, whole, copied, monkeypatch):
        out = copied(6)

        def full(tensors, path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_tensors", full)
            with pytest.raises(OSError, match=r"no room for .*step-000008.*: no space left"):
                ft.train(ft.config(out, **ft.FULL), resume=True)
        folder = out / trainer.CHECKPOINTS
        assert sorted(path.name for path in folder.iterdir()) == ["step-000006"]
        assert state(out).state["step"] == 6
        ft.train(ft.config(out, **ft.FULL), resume=True)
        assert_same_run(out, whole)

    def test_a_disk_without_room_for_a_line(self, tmp_path, monkeypatch):
        def full(path, steps):
            path.symlink_to("/dev/full")

        monkeypatch.setattr(trainer, "cut_metrics", full)
        file = tmp_path / trainer.METRICS
        with pytest.raises(NoRoom, match=f"no room for {file}: no space left on device"):
            ft.train(ft.config(tmp_path))

    def test_left_overs_are_cleared(self, copied):
        """What no process is writing."""
        out = copied(6)
        for folder in (out, out / trainer.CHECKPOINTS):
            (folder / ".partial-0").mkdir()
            (folder / ".partial-0" / "half").touch()
            (folder / ".partial-0.json").touch()
        with replacing(out / "other.mp4") as live:
            live.touch()
            ft.train(ft.config(out, **ft.FULL), resume=True)
            assert [p for p in out.rglob(".partial-*") if p.suffix != ".lock"] == [live]
        process.check_free(out)

    def test_a_second_run_in_one_folder_is_refused(self, copied, tmp_path):
        """Whether it is another one or goes on, and before it is looked at further."""
        for out, resume in ((copied(6), True), (tmp_path / "new", False)):
            with process.locked(out):
                before = files(out)
                with pytest.raises(BlockingIOError, match=f"{out} is in use by process"):
                    ft.train(ft.config(out, **ft.FULL), resume=resume)
                with pytest.raises(BlockingIOError, match=f"{out} is in use by process"):
                    trainer.train(ft.config(out, **ft.FULL, model="nowhere"), resume=resume)
                assert files(out) == before

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

    @pytest.mark.slow
    def test_what_may_change(self, whole, copied):
        out = copied(6)
        given = ft.config(out, **ft.FULL)
        free = given.replaced(keep_checkpoints=1, checkpoint_every=1, gradient_checkpointing=True)
        ft.train(free, resume=True)
        assert losses(out) == losses(whole)

    def test_out_is_not_used_twice(self, whole, tmp_path):
        given = ft.config(whole, **ft.FULL)
        with pytest.raises(ValueError, match=r"holds a run of step-000008: go on with --resume"):
            trainer.check_out(given, resume=False)
        with pytest.raises(ValueError, match="nothing to resume"):
            trainer.check_out(given.replaced(out=str(tmp_path)), resume=True)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="out must be a folder"):
            trainer.check_out(given.replaced(out=str(tmp_path / "file")), resume=False)


def poison(folder):
    """NaN in a checkpoint whose hashes are right."""
    tensors = load_file(folder / checkpoint.TENSORS)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, folder / checkpoint.TENSORS)
    change_state(folder, sha256=file_sha256(folder / checkpoint.TENSORS))


def change(about, how):
    """Other values in a state."""
    told = json.loads(about.read_text())
    if how == "another rate":
        told["schedule"]["last_epoch"] = 3
    else:
        told["step"] = {"an earlier step": 2, "a later step": 10**9}[how]
    about.write_text(json.dumps(told))


def stopping(out, after, *, config=None, resume=False, kind=signal.SIGTERM, signals=1):
    """Train until a signal comes in the step that makes the steps `after`."""

    class Signalling(ft.Clips):
        def latents(self, index, frames):
            if signalling and len(losses_so_far()) == after - 1:
                for _ in range(signals):
                    os.kill(os.getpid(), kind)
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
    return Forked("support.finetuning", [json.dumps([job])], environment())


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
