"""What a training has left in its folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import forked
from support.paths import ROOT, environment

from gen_accel.lora import checkpoint, trainer
from gen_accel.lora.caching.encoders import hash_of

WEIGHTS = "pytorch_lora_weights.safetensors"


def state(out):
    """Of the newest checkpoint."""
    return checkpoint.load_newest(Path(out) / trainer.CHECKPOINTS)


def change_state(folder, **changed):
    """Change fields of a checkpoint's state, None for none, with a hash that is right."""
    path = Path(folder) / checkpoint.STATE
    told = json.loads(path.read_text()) | changed
    del told[checkpoint.OWN]
    told = {name: value for name, value in told.items() if value is not None}
    path.write_text(json.dumps(told | {checkpoint.OWN: hash_of(told)}))


def metrics(out):
    lines = (Path(out) / trainer.METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(out):
    return [line["loss"] for line in metrics(out)]


def assert_same_run(out, other):
    """Weights, average, optimizer, schedule, losses and the LoRA, to the bit."""
    a, b = state(out), state(other)
    assert a.tensors.keys() == b.tensors.keys()
    for name, x in a.tensors.items():
        assert torch.equal(x, b.tensors[name]), name
    for key in ("step", "schedule", "ema_steps", "sha256"):
        assert a.state[key] == b.state[key], key
    assert losses(out) == losses(other)
    assert [line["step"] for line in metrics(out)] == list(range(a.state["step"]))
    assert_same_lora(out / "lora", other / "lora")


def assert_same_lora(folder, other):
    assert files(folder) == files(other)
    for name in files(folder):
        if name.endswith((".json", ".md")):
            assert (folder / name).read_text() == (other / name).read_text()
            continue
        a, b = load_file(folder / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(x, b[key]) for key, x in a.items())
        assert metadata(folder / name) == metadata(other / name)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


CONFIG = ROOT / "configs" / "accelerate" / "cpu.yaml"


def two_processes(module, arguments, env, launcher=True, count=2):
    """Output and errors of a module that two processes run, each with the same arguments.

    Args:
        launcher: `accelerate launch` starts them; without, they are forked, which takes less.
        count: how many, if they are forked.
    """
    if not launcher:
        ranks = forked.ranks(count, module, arguments, env)
        said = [one.communicate(timeout=120) for one in ranks]
        for one, (_, errors) in zip(ranks, said, strict=True):
            assert one.returncode == 0, errors
        return "".join(out for out, _ in said), "".join(errors for _, errors in said)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--main_process_port", "0", "--module", module, *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def launch(*jobs, launcher=True, count=2, **variables):
    """Trainings in the same two processes, one after the other: what they print.

    Args:
        variables: of their environment.
    """
    places = environment(OMP_NUM_THREADS="1", **variables)
    return two_processes("support.finetuning", [json.dumps(jobs)], places, launcher, count)


FULL_STEPS = 8


def assert_close_lora(folder, other):
    """All but what one step of next to no length changes."""
    for name in ("pytorch_lora_weights.safetensors", "processors.safetensors"):
        a, b = load_file(folder / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key, x in a.items():
            torch.testing.assert_close(x, b[key], rtol=0, atol=1e-20)


def assert_apart(a, b):
    assert (a - b).abs().max() > 1e-3


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
