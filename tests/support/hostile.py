"""Cases of hostile input, how each is run, and what may come of it.

A case prints as the line that goes into `tests/fuzz/corpus.txt`.
"""

import contextlib
import gc
import itertools
import json
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support import damaged, fault_jobs, wan
from support.cell import Cell, Limits, Outcome, command_line
from support.operations import Fault, Operations

import gen_accel
from gen_accel import METHODS, Radial, Schedule, VideoShape
from gen_accel.io import file_sha256

LIMITS = Limits(cpu=10, memory=1 << 30, wall=90.0)
TINY = ("--frames", "5", "--height", "32", "--width", "32", "--steps", "1")
RADIAL = Radial()
DEPTH = 3000  # of lists in lists, beyond what Python's stack holds
REMOVED, DEEP = "<removed>", "<deep>"  # in the place of a value of JSON


@dataclass(frozen=True)
class Command:
    """A command line; {home} is the folder with models and clips.

    Args:
        own: whether the folder holds files of each kind, which may come to harm, see `furnish`.
    """

    args: tuple[str, ...]
    own: bool = False


@dataclass(frozen=True)
class Config:
    """A config of `train` with these fields besides what is small.

    Args:
        text: the file itself instead.
        verb: what reads it: "print", "dry" or "cache".
    """

    fields: Mapping[str, Any]
    verb: str = "print"
    text: str | None = None


@dataclass(frozen=True)
class Artefact:
    """A file of ours that was changed.

    Args:
        of: a key of `ARTEFACTS`.
        changes: path in the JSON, and the value there, or `REMOVED` or `DEEP`.
        text: the file itself instead.
    """

    of: str
    changes: tuple[tuple[tuple[str | int, ...], Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Call:
    """A call from Python: a key of `CALLS`, and arguments other than those that are good."""

    name: str
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Odd:
    """An argument that no text can write."""

    name: str

    @property
    def value(self) -> Any:
        match self.name:
            case "numpy":
                return np.arange(3)
            case "tensor":
                return torch.arange(3)
            case "object":
                return object()
            case "class":
                return Radial
        return Path(self.name)


Case = Command | Config | Artefact | Call


def read_corpus(path: Path) -> list[Case]:
    """Its lines that are no headings."""
    known = {kind.__name__: kind for kind in (Command, Config, Artefact, Call, Odd)}
    names = known | {"nan": float("nan"), "inf": float("inf")}
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [eval(line, {}, names) for line in lines if line and not line.startswith("#")]


def prepare(home: Path) -> None:
    """In the server, after `fault_jobs.prepare`."""
    global HOME
    HOME = home
    os.environ["HOME"] = str(home)
    _measured()


HOME = Path()


def _measured() -> None:
    """The efficiency of a kernel, once for all that estimate."""
    gen_accel.estimate("Wan2.1-T2V-1.3B", RADIAL, height=32, width=32, num_frames=5, steps=2)


def made(cell: Cell, home: Path) -> None:
    """What `ARTEFACTS` change: a training, a cache, a list of prompts, what was saved."""
    commands = {
        "trained": fault_jobs.TRAIN,
        "cached": ("cache", "{home}/train.yaml", "--data", "{home}/one"),
        "listed": fault_jobs.JOBS["gif"].earlier[0],
        "processors": ("save", "processors", "0"),
        "adapter": ("save", "adapter", "0"),
    }
    for name, command in commands.items():
        (home / name).mkdir()
        outcome = cell(fault_jobs.act, command, folder=home / name)
        assert outcome.code == 0, outcome.err
    (home / "latents").mkdir()
    shutil.copy(home / "l.safetensors", home / "latents")
    damaged.write(home / "damaged", home)


def furnish(folder: Path, home: Path) -> None:
    """Fill a folder with what commands read and must not harm, by several names, and with what no
    command can read."""
    copies = {"a.mp4": "one/a.mp4", "a.txt": "one/a.txt", "l.safetensors": "l.safetensors"}
    copies |= {"p.txt": "prompts.txt", "t.yaml": "train.yaml"}
    for name in ("p.json", "p.safetensors"):
        copies[name] = f"presets/{name}"
    for name, source in copies.items():
        shutil.copy(home / source, folder / name)
    for name, source in {"lora": "trained/run/lora", "adapter": "adapter/saved"}.items():
        shutil.copytree(home / source, folder / name)
    Image.new("RGB", (16, 16)).save(folder / "r.png")
    fields = {"model": str(home / "model"), "prompt": ["a"], "steps": 1, "frames": 5}
    fields |= {"height": 32, "width": 32}
    known = {"gen_accel": "settings", "version": 1, "made_by": {}, "files": {}, "wordless": {}}
    (folder / "s.json").write_text(json.dumps({**known, "fields": fields}))
    stray = {"/proc/kmsg": "x", "/usr": "x", "pipe": "x"}
    (folder / "stray.json").write_text(
        json.dumps({**known, "fields": fields, "files": {"model": stray}})
    )
    texts = {
        "c.yaml": "prompt: a\n",
        "alias.yaml": f"prompt:\n{_laughs(9)}",
        "list.yaml": _laughs(9),
        "digits.yaml": f"steps: {'9' * 400}\nprompt: {'9' * 5000}\n",
        "deep.yaml": f"prompt: {'[' * 500}{']' * 500}\n",
        "digits.json": json.dumps({"cost": 10**400}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "link.mp4").symlink_to("a.mp4")
    (folder / "loop").symlink_to("loop")
    (folder / "here").symlink_to(".")
    (folder / "zero").symlink_to("/dev/zero")
    os.link(folder / "a.mp4", folder / "hard.mp4")
    os.mkfifo(folder / "pipe")


def _laughs(levels: int) -> str:
    """Lists in YAML of which each holds nine times the one before."""
    rows = ["- &i0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    rows += [f"- &i{i} [{', '.join([f'*i{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join([*rows, ""])


def held(folder: Path) -> dict[str, str]:
    """A hash of each file in a folder, under its own name alone."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def harm(case: Case, before: Mapping[str, str], outcome: Outcome, folder: Path) -> str | None:
    """What a case did to files that it was not asked to write, or to one by another; None:
    nothing."""
    after, asked = held(folder), _asked(case, folder)
    if isinstance(case, Command) and outcome.code == 0:
        given = [x.lower() for name, x in _pairs(case.args) if name in OUTPUTS]
        outputs = [os.path.normpath(x) for x in given if x != "none"]  # which stands for no file
        if len(set(outputs)) < len(outputs):
            return "two outputs are one file"
    for place, digest in before.items():
        if after.get(place) != digest and not any(place.startswith(one) for one in asked):
            return f"{place} is {'changed' if place in after else 'gone'}"
    return None


OUTPUTS = ("--out", "--json", "--save-latents")


def _asked(case: Case, folder: Path) -> list[str]:
    """Beginnings of the places that a command may write over."""
    if not isinstance(case, Command) or "--overwrite" not in case.args:
        return []
    after = [(name, Path(os.path.realpath(folder / value))) for name, value in _pairs(case.args)]
    read = [place for name, place in after if name not in OUTPUTS]
    asked = [place for name, place in after if name in OUTPUTS]
    free = [p for p in asked if not {p, *p.parents} & {*read} and folder.resolve() in p.parents]
    # Beside p.json lies p.safetensors, beside a.gif its record, and of several a-000.gif.
    return [str(place.with_suffix("").relative_to(folder.resolve())) for place in free]


def _pairs(args: Sequence[str]) -> list[tuple[str, str]]:
    """Each argument that is no flag, without the weight of a LoRA, after the one before."""
    pairs = itertools.pairwise(args)
    return [(name, value.removesuffix(":0.5")) for name, value in pairs if value[:2] != "--"]


def run_apart(case: Case) -> None:
    """`run` in a process that cannot write where others read."""
    Operations(HOME, Fault("EROFS", 0, goes_on=True)).watch()
    run(case)


def _raises(*args: Any, **options: Any) -> None:
    raise KeyError("planted")


def _sleeps(*args: Any, **options: Any) -> None:
    time.sleep(600)


def _changes(*args: Any, **options: Any) -> None:
    Path("a.mp4").write_text("{}")
    sys.exit(0)


def _removes(*args: Any, **options: Any) -> None:
    Path("a.mp4").unlink()
    sys.exit(0)


PLANTS = {"fault": _raises, "hang": _sleeps, "change": _changes, "loss": _removes}


def run_planted(case: Case, kind: str, place: str) -> None:
    """`run_apart` with one of `PLANTS` in the place of a method, "module:class.method"."""
    module, _, name = place.partition(":")
    owner, _, method = name.partition(".")
    setattr(getattr(import_module(module), owner), method, PLANTS[kind])
    run_apart(case)


def run(case: Case) -> None:
    """In a folder that is empty, or furnished."""
    match case:
        case Command(args):
            command_line([arg.replace("{home}", str(HOME)) for arg in args])
        case Config():
            _run_config(case)
        case Artefact():
            ARTEFACTS[case.of].run(case)
        case Call(name, given):
            plain = {k: v.value if isinstance(v, Odd) else v for k, v in given.items()}
            _said_in_one_line(lambda: CALLS[name](**plain))


def grown(cases: Sequence[Case], rounds: int) -> tuple[int, int]:
    """Bytes and descriptors that a process has more after some rounds of these cases than after
    two, in which it imports and keeps what it will need again."""
    held = []
    for _ in range(rounds + 2):
        for case in cases:
            with contextlib.suppress(SystemExit):
                run(case)
        gc.collect()
        held.append(_held())
    return held[-1][0] - held[1][0], held[-1][1] - held[1][1]


def _held() -> tuple[int, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def _run_config(case: Config) -> None:
    import yaml

    small = {"out": "run", "stages": ["9:2"], "height": 32, "width": 64, "rank": 2}
    small |= {"warmup_steps": 0, "mixed_precision": "no", "log_with": "none", "device": "cpu"}
    small |= {"model": str(HOME / "model"), "max_tokens": 8, "data": str(HOME / "one")}
    text = yaml.safe_dump({**small, **case.fields}) if case.text is None else case.text
    Path("c.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    verbs = {"print": ["train", "c.yaml", "--print-config"], "cache": ["cache", "c.yaml"]}
    verbs["dry"] = ["train", "c.yaml", "--dry-run"]
    command_line(verbs[case.verb])


def _said_in_one_line(call: Callable[[], Any]) -> None:
    """What the library tells a caller of Python, as the command line says it."""
    try:
        call()
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print("error:", message or type(error).__name__, file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        source: the folder of a good one, under HOME.
        file: what is changed in it: JSON, the metadata of a safetensors file, or the manifest of
            a cache's database.
        use: reads it from the folder "it".
        key: of the metadata.
    """

    source: str
    file: str
    use: Callable[[], Any]
    key: str | None = None

    def good(self, home: Path) -> Any:
        path = home / self.source / self.file
        if path.suffix == ".db":
            with contextlib.closing(sqlite3.connect(path)) as db:
                return json.loads(*db.execute("SELECT fields FROM manifest").fetchone())
        if self.key is None:
            return json.loads(path.read_text(encoding="utf-8"))
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()[self.key])

    def run(self, case: Artefact) -> None:
        shutil.copytree(HOME / self.source, "it")
        text = case.text if case.text is not None else changed(self.good(HOME), case.changes)
        path = Path("it") / self.file
        if path.suffix == ".db" and case.text is None:
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                db.execute("UPDATE manifest SET fields = ?", (text,))
        elif self.key is None:
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
        else:
            from safetensors import safe_open
            from safetensors.torch import load_file, save_file

            with safe_open(path, "pt") as file:
                about = dict(file.metadata())
            text = text.encode(errors="replace").decode()  # as the format wants it
            save_file(load_file(path), path, metadata=about | {self.key: text})
        self.use()


def changed(good: Any, changes: tuple[tuple[tuple[str | int, ...], Any], ...]) -> str:
    """As JSON."""
    for path, value in changes:
        if not path:
            good = value
            continue
        place = good
        for key in path[:-1]:
            place = place[key]
        if value == REMOVED:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    return json.dumps(good).replace(f'"{DEEP}"', "[" * DEPTH + "]" * DEPTH)


def _generate(*more: str) -> None:
    model = ("generate", "--model", str(HOME / "model"))
    command_line([*model, *TINY, *more])


def _read_cache() -> None:
    from gen_accel.lora.caching.latents import LatentCache

    def read() -> None:
        cache = LatentCache("it/run/cache")
        cache.verify()
        for i in range(len(cache)):
            cache.latents(i)
            cache.conditions(i)

    _said_in_one_line(read)


def _resume() -> None:
    os.rename("it/run", "run")
    command_line(["train", str(HOME / "train.yaml"), "--resume"])


def _load_processors() -> None:
    _said_in_one_line(lambda: gen_accel.load_processors(wan.transformer(), "it/saved"))


def _load_adapter() -> None:
    _said_in_one_line(lambda: gen_accel.load_image_prompt(wan.pipeline(), "it/saved"))


def _estimate() -> None:
    sizes = ("--frames", "5", "--height", "32", "--width", "32")
    command_line(["estimate", "--model", "it", *sizes])


def _list_again() -> None:
    os.rename("it/clips", "clips")
    made = ("--prompts", str(HOME / "prompts.txt"), "--out", "clips/c.gif", "--seed", "0")
    _generate("--method", "dense", *made)


def _decode() -> None:
    model = ("generate", "--model", str(HOME / "model"))
    command_line([*model, "--from-latents", "it/l.safetensors", "--out", "a.gif"])


def _estimate_and_generate() -> None:
    _goes_on(_estimate)
    command_line(["generate", "--model", "it", *TINY, "--prompt", "a", "--out", "a.gif"])


def _goes_on(call: Callable[[], None]) -> None:
    """Run a command line, of which only a failure ends the process."""
    try:
        call()
    except SystemExit as ended:
        if ended.code:
            raise


def _solve_and_show() -> None:
    _goes_on(lambda: command_line(["show", "--preset", "it/p.json"]))
    command_line(["tune", "--preset", "it/p.json", "--quality", "25", "--out", "a.json"])


def _load_lora() -> None:
    model = HOME / "one" / ".." / "model"  # by another name than the pipeline that is in memory
    prompt = ("--prompt", "a", "--lora", "it", "--out", "a.gif")
    command_line(["generate", "--model", str(model), *TINY, *prompt])


LORA = "pytorch_lora_weights.safetensors"
ARTEFACTS = {
    "recipe": Kind(
        "trained/run/lora",
        LORA,
        lambda: _generate("--prompt", "a", "--from-lora", "it", "--out", "a.gif"),
        "gen_accel",
    ),
    "options": Kind("trained/run/lora", LORA, _load_lora, "lora_adapter_metadata"),
    "cache": Kind("cached", "run/cache/cache.db", _read_cache),
    "state": Kind("trained", "run/checkpoints/step-000003/state.json", _resume),
    "processors": Kind(
        "processors", "saved/processors.safetensors", _load_processors, "processors"
    ),
    "adapter": Kind("adapter", "saved/image_prompt.safetensors", _load_adapter, "gen_accel"),
    "index": Kind("model", "model_index.json", _estimate_and_generate),
    "transformer": Kind("model", "transformer/config.json", _estimate),
    "done": Kind("listed", "clips/c-000.gif.done.json", _list_again),
    "latents": Kind("latents", "l.safetensors", _decode, "gen_accel"),
    "preset": Kind("presets", "p.json", _solve_and_show),
}


def _attention(**given: Any) -> None:
    video = VideoShape(2, 3, 4)
    x = torch.ones(1, 1, video.tokens, 8)
    good: dict[str, Any] = {"q": x, "k": x, "v": x, "video": video, "method": Radial(block=4)}
    gen_accel.attention(**(good | given))


def _attach(**given: Any) -> None:
    model = wan.transformer()
    good: dict[str, Any] = {"method": Radial(block=4)}
    gen_accel.attach(model, **(good | given))
    wan.forward(model, 3, 4, 6)


def _estimated(**given: Any) -> None:
    good: dict[str, Any] = {"pipe_or_config": "Wan2.1-T2V-1.3B", "method": RADIAL, "steps": 2}
    good |= {"height": 32, "width": 32, "num_frames": 5, "efficiency": 0.5}
    str(gen_accel.estimate(**(good | given)))


def _extended(**given: Any) -> None:
    pipe = wan.pipeline()
    good: dict[str, Any] = {"techniques": "riflex", "num_frames": 17, "trained_frames": 9}
    gen_accel.extend(pipe, **(good | given))


def _scheduled(**given: Any) -> None:
    schedule = Schedule(**given)
    schedule.why_layer(1)
    if schedule.dense_steps < 100:
        schedule.why_step(0, 5)


def _shaped(**given: Any) -> None:
    good: dict[str, Any] = {"frames": 2, "height": 3, "width": 4}
    video = VideoShape(**(good | given))
    if video.tokens < 10**4:
        Radial(block=4).plan(video)


def _clipped(**given: Any) -> None:
    from gen_accel.pipelines.generation.sampling import Clip

    Clip(**given)


def _loading(**given: Any) -> None:
    from gen_accel.pipelines.generation.loading import Loading

    Loading(**given)


def _configured(**given: Any) -> None:
    from gen_accel.lora.config import TrainConfig

    TrainConfig(**given)


def _method(name: str) -> Callable[..., None]:
    """Made, planned and used."""

    def use(**given: Any) -> None:
        video = VideoShape(2, 3, 4)
        q, k, v = torch.randn(
            (3, 1, 2, video.tokens, 8), generator=torch.Generator().manual_seed(0)
        )
        method = METHODS[name](**given)
        hash(method)
        gen_accel.attention(q, k, v, video=video, method=method, kernel="reference")

    return use


CALLS: dict[str, Callable[..., None]] = {
    "attention": _attention,
    "attach": _attach,
    "estimate": _estimated,
    "extend": _extended,
    "Schedule": _scheduled,
    "VideoShape": _shaped,
    "Clip": _clipped,
    "Loading": _loading,
    "TrainConfig": _configured,
    **{name: _method(name) for name in METHODS},
}


# What Python and other libraries say in the place of name, rule and value.
FOREIGN = re.compile(
    r"object (is not|has no|does not)|not supported between|unsupported operand|Expecting "
    r"|unexpected keyword|positional argument|to unpack|must be real number|indices must be"
    r"|maximum recursion|DefaultCPUAllocator|ffmpeg version|codec can't|not subscriptable"
    r"|Exceeds the limit|should be empty at this point"
)
# Of a bar of progress, a line in its place, what takes long, and warnings.
TIME = r"\d:\d\d:\d\d"
BAR = re.compile(
    rf"━|{TIME} left|[\d.e+]+/[\d.e+?]+( \S+)?, {TIME}|^warning: |, \d+ %, {TIME}"
    "|^loading |^looking at |^hashing |^connecting |^denoising "
)


def verdict(case: Case, outcome: Outcome, folder: Path) -> str | None:
    """What is wrong with how a case ended; None: nothing."""
    lines = [line for line in outcome.err.splitlines() if line.strip() and not BAR.search(line)]
    last = (lines or [""])[-1].strip()
    if left := [*folder.rglob(".partial-*")]:
        return f"left {left[0].name}"
    # Fonts are mapped into memory by matplotlib, once a process.
    if opened := [where for where in outcome.opened if "mpl-data" not in where]:
        return f"left open: {opened}"
    if any("Traceback" in line or "a fault of gen-accel" in line for line in lines):
        return f"code {outcome.code}: {last[:160]}"
    if outcome.code == 0:
        return None
    if outcome.code < 0:
        return f"ended by signal {-outcome.code} after {outcome.seconds:.0f} s of CPU"
    if outcome.code != 2:
        return f"code {outcome.code}: {last[:160]}"
    said = [line for line in lines if line.startswith("error: ")]
    if len(said) != 1:
        return f"{len(lines)} lines: {last[:160]}"
    if len(lines) != 1:
        return f"{len(lines)} lines: {lines[0][:160]}"
    if not isinstance(case, Call) and FOREIGN.search(said[0]):
        return f"another's words: {said[0][:160]}"
    if ".partial-" in said[0]:
        return f"names a file that nobody gave: {said[0][:160]}"
    if "out of memory" in said[0] and getattr(case, "own", False):  # all is small there
        return said[0][:160]
    if len(said[0]) > 1000:
        return f"{len(said[0])} characters: {said[0][:160]}"
    return None
