"""What faults are injected into: commands that write, on tiny models, and how their output is
looked at.

Paths are relative to the folder that a job works in, so that two runs write the same bytes.
"""

import functools
import hashlib
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import finetuning as ft
from support import presets, wan
from support.cell import command_line
from support.operations import ENDED, Fault, Operations

from gen_accel import Dense, SparseLinear, attach, load_processors, save_processors
from gen_accel.attention_processors.image_prompt import new_adapter
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import print_config
from gen_accel.measure.video_io import write_video
from gen_accel.pipelines.image_prompt.formats import base_of, write_adapter
from gen_accel.pipelines.image_prompt.projectors import Pixels

# Rows of a training's page.
OF_MACHINE = re.compile(rb".*>(seconds a step|most memory of the first process)<.*\n")
Command = tuple[str, ...]
Tree = dict[str, str]  # path to a hash of the file
HEIGHT, WIDTH, FRAMES = 32, 64, 9


@dataclass(frozen=True)
class Job:
    """A command that is disturbed.

    Args:
        command: of `gen-accel`, or "save" with the name of a function here and its argument.
        earlier: commands whose good output is there before.
        again: what a user gives after the fault; the second where the first has nothing to go on
            from.
        keeps: paths of the earlier output that are there whatever happens.
    """

    command: Command
    earlier: tuple[Command, ...] = ()
    again: tuple[Command, ...] = ()
    keeps: tuple[str, ...] = ()

    @property
    def reruns(self) -> tuple[Command, ...]:
        return self.again or (self.command,)


def _clips(out: str, seed: int, *more: str) -> Command:
    sizes = ("--frames", "5", "--height", "32", "--width", "32", "--steps", "1")
    made = ("--prompts", "{home}/prompts.txt", "--out", out, "--seed", str(seed))
    return ("generate", "--model", "{home}/model", *sizes, "--method", "dense", *made, *more)


def _clip(out: str, seed: int, *more: str) -> Command:
    made = _clips(out, seed, *more)
    at = made.index("--prompts")
    return (*made[:at], "--prompt", "a red square", *made[at + 2 :])


def _several(suffix: str, *files: str) -> Job:
    out = f"clips/c{suffix}"
    command = _clips(out, 7, "--overwrite")
    return Job(command, (_clips(out, 0),), keeps=tuple(files))


MODEL = ("generate", "--model", "{home}/model")
TRAIN = ("train", "{home}/train.yaml")
FULL = ("train", "{home}/full.yaml")  # with all that a continuation has to bring back
SHOW = ("show", "radial", "--frames", "2", "--height", "3", "--width", "3", "--out", "mask.png")
TUNE = ("tune", "--preset", "{home}/presets/p.json")
GRID = ("--frames", "4", "--height", "4", "--width", "4")

JOBS = {
    "train": Job(TRAIN, again=((*TRAIN, "--resume"), TRAIN)),
    "resume": Job(
        (*TRAIN, "--resume"),
        ((*TRAIN, "--checkpoint-every", "1"),),
        ((*TRAIN, "--resume"), TRAIN),
    ),
    "cache": Job(
        ("cache", "{home}/train.yaml", "--data", "{home}/both"),
        (("cache", "{home}/train.yaml", "--data", "{home}/one"),),
        keeps=("run/cache/cache.db",),
    ),
    "gif": _several(".gif", "clips/c-000.gif", "clips/c-001.gif"),
    "frames": _several("", "clips/c-000/0004.png", "clips/c-001/0004.png"),
    "mp4": Job(
        _clip("clip.mp4", 7, "--save-latents", "clip.safetensors", "--overwrite"),
        (_clip("clip.mp4", 0, "--save-latents", "clip.safetensors"),),
        keeps=("clip.mp4", "clip.safetensors"),
    ),
    "compare": Job(
        _clip("clip.gif", 7, "--compare", "--overwrite"),
        (_clip("clip.gif", 0),),
        keeps=("clip.gif",),
    ),
    "decode": Job(
        (*MODEL, "--from-latents", "{home}/l.safetensors", "--out", "clip.mp4", "--overwrite"),
        (_clip("clip.mp4", 0),),
        keeps=("clip.mp4",),
    ),
    "processors": Job(
        ("save", "processors", "1"),
        (("save", "processors", "0"),),
        keeps=("saved/processors.safetensors",),
    ),
    "adapter": Job(("save", "adapter", "1"), (("save", "adapter", "0"),), keeps=("saved",)),
    "show": Job((*SHOW, "--overwrite"), (SHOW,), keeps=("mask.png",)),
    "tune": Job(
        (*TUNE, "--quality", "25", "--out", "p.json", "--overwrite"),
        ((*TUNE, "--quality", "35", "--out", "p.json"),),
        keeps=("p.json", "p.safetensors"),
    ),
    "metrics": Job(("metrics", "{home}/one/a.mp4", "--json", "new/figures.json", "--overwrite")),
}


def prepare(home: Path) -> None:
    """In the server: models in memory in place of those that are loaded, and what jobs read."""
    from gen_accel.lora import prepare as preparing
    from gen_accel.pipelines.generation import decode, generate

    pipe = wan.pipeline()
    pipe.save_pretrained(home / "model")
    latents = wan.generate(pipe, 1, height=32, width=32, num_frames=5)
    decode.save_latents(home / "l.safetensors", latents, {"fps": 8.0})
    presets.write(home / "presets" / "p.json")
    (home / "prompts.txt").write_text("a red square\na blue square\n")
    noise = np.random.default_rng(0)
    for i, name in enumerate("ab"):
        pixels = noise.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3)).astype(np.uint8)
        for folder in ("one", "both")[i:]:
            path = write_video(pixels, home / folder / f"{name}.mp4", fps=16)
            path.with_suffix(".txt").write_text(f"a red square {i}")
    fields: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 1, "max_tokens": 8}
    given = ft.config("run", **(fields | {"stages": ("9:3",), "model": str(home / "model")}))
    (home / "train.yaml").write_text(print_config(given))
    sampled = {"validate_every": 2, "validation_prompts": ("a",), "validation_steps": 1}
    stages = "9:2", "17:2:position_interpolation"
    fields |= ft.FULL | sampled | {"loss_every": 3, "model": str(home / "model")}
    fields |= {"stages": stages, "warmup_steps": 1, "checkpoint_every": 1}
    (home / "full.yaml").write_text(print_config(ft.config("run", **fields)))
    global HOME
    HOME = home

    def prepared(config: Any, accelerator: Any) -> Any:
        return ft.model(pipe if config.validate_every else None), ft.Clips()

    preparing.prepare = prepared
    loaded = functools.partial(_loaded, home / "model", pipe)
    preparing.load_pipe = lambda config: pipe
    generate.load = functools.partial(loaded, generate.load)
    generate.load_decoder = functools.partial(loaded, generate.load_decoder)


HOME = Path()


def _loaded(
    known: Path, pipe: Any, load: Callable[..., Any], model: Any, *rest: Any, **options: Any
) -> Any:
    """The pipeline in memory in place of its folder."""
    return pipe if Path(model) == known else load(model, *rest, **options)


def act(command: Command) -> None:
    """In a process of its own."""
    verb, *rest = (word.format(home=HOME) for word in command)
    if verb != "save":
        command_line([verb, *rest])
        return
    kind, number = rest
    try:
        SAVED[kind](int(number))
    except (OSError, ValueError) as error:  # which callers are told to expect
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def disturbed(command: Command, fault: Fault | None) -> None:
    """`act` with a fault. Leaves the operations that there were beside what it wrote."""
    operations = Operations(Path.cwd(), fault)
    operations.watch()
    try:
        act(command)
    finally:
        listed = [[one.kind, one.place] for one in operations.listed]
        Path(ENDED).write_text(json.dumps(listed))


def killed(command: Command, seconds: float) -> None:
    """`act`, ended after that much CPU by a signal that nobody answers, as by kill -9."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    act(command)


def _processors(number: int) -> None:
    transformer = wan.transformer()
    handle = attach(transformer, SparseLinear(critical=0.2, block_q=4, block_k=4))
    with torch.no_grad():
        for branch in handle.branches.values():
            for parameter in branch.parameters():
                parameter.fill_(number + 1.0)
    save_processors(handle, "saved")


def _adapter(number: int) -> None:
    transformer = wan.transformer()
    attach(transformer, Dense())
    projector = Pixels(width=wan.HEADS * wan.HEAD_DIM, tokens=4, channels=(8, 8))
    made = new_adapter(transformer, projector, variant="pixels")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(number + 1.0)
    write_adapter(Path("saved"), made, {**base_of(transformer), "image_size": 16})


SAVED: dict[str, Callable[[int], None]] = {"processors": _processors, "adapter": _adapter}


def tree(folder: Path) -> Tree:
    """All files but those of a run under way. Of `metrics.jsonl` and a training's page what is
    neither time nor memory, which are of the machine."""
    found = {}
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        if path.is_dir() or ".partial-" in place or path.name in (ENDED, ".lock"):
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            data = _without_times(data)
        if path.name == "report.html":
            data = OF_MACHINE.sub(b"", data)
        found[place] = hashlib.sha256(data).hexdigest()
    return found


def end(folder: Path) -> dict[str, Any]:
    """What a rerun must come to. Of a cache the tensors: how they lie in shards is free."""
    cache = folder / "run" / "cache"
    if not (cache / "cache.db").is_file():
        return dict(tree(folder))
    latents = LatentCache(cache)
    latents.verify()
    sums = [float(latents.latents(i).double().sum()) for i in range(len(latents))]
    return {"digest": latents.digest, "latents": sums, "entries": latents.entries[:]}


def _without_times(data: bytes) -> bytes:
    kept = []
    for line in data.decode().splitlines():
        try:
            told = json.loads(line)
        except ValueError:  # half a line
            continue
        of_machine = ("seconds", "memory_gb")
        kept.append(json.dumps({k: v for k, v in told.items() if k not in of_machine}))
    return "\n".join(kept).encode()


def partials(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".partial-*")]


def read_saved() -> list[float]:
    """In a process of its own: what `load_processors` finds in its parameters."""
    handle = load_processors(wan.transformer(), "saved")
    held = [p for branch in handle.branches.values() for p in branch.parameters()]
    return sorted({float(x) for p in held for x in p.detach().flatten()})


def unusable_cache(folder: Path) -> str | None:
    """Why a cache, as a fault left it, cannot be taken as it is."""
    try:
        LatentCache(folder / "run" / "cache").verify()
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None
