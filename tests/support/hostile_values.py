"""Strategies of hostile input, taken from what there is: every option of every verb, every field
of the config of a training, every place in the files that we write, every argument."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from hypothesis import strategies as st
from support.hostile import (
    ARTEFACTS,
    CALLS,
    DEEP,
    METHODS,
    REMOVED,
    TINY,
    Artefact,
    Call,
    Command,
    Config,
    Odd,
)
from support.products import NIGHTLY

import gen_accel
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.registry import options_of
from gen_accel.cli import app
from gen_accel.kernels import KERNELS
from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.generation.loading import Loading
from gen_accel.pipelines.generation.sampling import Clip
from gen_accel.video import VideoShape

NAN, INF = float("nan"), float("inf")
NUMBERS = """0 -1 1 2 3 1.5 nan inf -inf 1e400 1e-300 1e300 1000001 2147483648 1000000000000
    999999999999999999999999999999 -9223372036854775809 0x10 1_0"""
LISTS = "1,1,1 1,2 1,1,1,1 0,0,0 -1,-1,-1 , : = a=b 1:2:3 ::"
PATHS = """~nosuchuser/x ~/x /dev/null . 13:30/clip.mp4 pipe:1/c.mp4 v1.5.png file:x.gif a/b/c.gif
    c.mp4 c.gif c.avi x.safetensors {home}/train.yaml {home}/model {home}/one {home}/one/a.mp4
    {home}/prompts.txt {home}/l.safetensors {home}/trained/run/lora"""
NAMES = """none true demo Wan2.1-T2V-14B nobody/none os:path json:loads riflex riflex,riflex cpu
    cuda cuda:99 float16"""
ODD = ["", " ", "x", "٣", "a b", "new\nline", "\udcff", "\U0001f600", "%s{}", "x" * 300]
TEXTS = [*NUMBERS.split(), *LISTS.split(), *PATHS.split(), *NAMES.split(), *ODD]
TEXTS += [f"{'n' * 244}.mp4", "9" * 400, *METHODS, *KERNELS]
PLAIN = [None, True, False, 0, -1, 1, 2, 3, 1.5, NAN, INF, -INF, 1e308, 10**12, 10**30, -(2**63)]
PLAIN += [10**400, "", "x", "nan", "1e9", "ÿ", "none", [], [1], [[1]], {}, {"a": 1}, ["x"]]
PLAIN += ["radial", "9:2", ["9:2", "x"], "9:1000000000000", [0.5, NAN], "~nosuchuser/x"]
JSON = [*PLAIN, REMOVED, REMOVED, DEEP, "x" * 1000, [None] * 3, {"x": {"y": []}}]
JSON += [10**400, [10**30] * 3, ["diffusers"], [["diffusers"], "x"], [{"a": 1}, "x"], "abcd"]
PYTHON = [*PLAIN, (), (1, 2), (1, 1, 1), (3.5, 3, 3), (-1, -1, -1), b"x", 1j, {1}, 2.0, 4, 16]
PYTHON += [Odd("numpy"), Odd("tensor"), Odd("object"), Odd("class"), Odd("no/path")]

WITHOUT = {
    "build": "compiles for many seconds",
    "demo": "generates for many seconds",
    "ui": "serves until it is ended",
    "serve": "serves until it is ended",
}
GRID = ("--frames", "2", "--height", "3", "--width", "4")
SIZES = ("--frames", "5", "--height", "32", "--width", "32")
# What a verb is given where the case does not say otherwise: small, and all that it needs.
GIVEN: dict[str, tuple[str, ...]] = {
    "show": ("radial", *GRID),
    "tune": ("--preset", "{home}/presets/p.json", "--quality", "25", "--out", "a.json"),
    "estimate": ("--model", "Wan2.1-T2V-1.3B", *SIZES, "--efficiency", "0.5"),
    "metrics": ("{home}/one/a.mp4",),
    "generate": ("--model", "{home}/model", *TINY, "--prompt", "a", "--out", "a.gif"),
    "train": ("{home}/train.yaml", "--print-config"),
    "cache": ("{home}/train.yaml", "--data", "{home}/one"),
    "export": ("{home}/trained/run/lora", "--out", "a.safetensors"),
    "assemble": ("{home}/one/a.mp4", "--base", "{home}/model", "--out", "a"),
    "push": ("{home}/trained/run/lora", "me/mine", "--dry-run"),
    "list": (),
    "models": (),
    "doctor": (),
}
OFTEN = ["generate", "tune", "show", "estimate", "metrics", "train", "cache"]


def parameters() -> dict[str, list[Any]]:
    """Of each verb, its options and arguments."""
    group: Any = typer.main.get_command(app)
    return {name: list(verb.params) for name, verb in group.commands.items()}


# What a furnished folder holds, by several names.
OWN = """a.mp4 ./a.mp4 lora/../a.mp4 A.MP4 link.mp4 hard.mp4 here/a.mp4 l.safetensors p.txt
    t.yaml c.yaml p.json p.safetensors r.png s.json stray.json lora lora/ lora:0.5 LORA
    lora/pytorch_lora_weights.safetensors adapter adapter/image_prompt.safetensors alias.yaml
    list.yaml digits.yaml deep.yaml digits.json pipe loop zero here . .. new.json new.gif new.mp4
    new new/../p.txt new.safetensors /proc/self/mem /dev/stdin /proc /dev/full"""
# What an option takes of it: what is refused for its kind is never written over.
FIT = {"config": "c.yaml", "prompts": "p.txt", "held_out": "p.txt", "preset": "p.json"}
FIT |= {"lora": "lora:0.5", "from_lora": "lora", "from_latents": "l.safetensors"}
FIT |= {"image_prompt": "r.png", "image_adapter": "adapter", "from_settings": "s.json"}
FIT |= {"reference": "a.mp4", "videos": "link.mp4", "folder": "lora", "image": "r.png"}
FIT |= {"model": "{home}/model"}
FILES = re.compile("FILE|DIR|PATH")
NAMING = ("image_prompt", "image_adapter", "from_settings", "init_lora", "data", "videos")


@st.composite
def on_files(draw: st.DrawFn) -> Command:
    """A verb with some of its options that name files, each with one of `OWN`."""
    known = {name: given for name, given in parameters().items() if name not in WITHOUT}
    files = {
        verb: [one for one in given if one.name in NAMING or FILES.search(one.metavar or "")]
        for verb, given in known.items()
    }
    verb = draw(st.sampled_from([name for name, several in files.items() if several]))
    given = list(GIVEN.get(verb, ()))
    for one in draw(st.lists(st.sampled_from(files[verb]), min_size=1, max_size=4, unique=True)):
        value = draw(st.sampled_from(OWN.split()))
        if one.name in FIT and draw(st.integers(0, 3)):
            value = FIT[one.name]
        if one.param_type_name == "argument":
            place = 0 if given and not given[0].startswith("--") else len(given)
            given[place : place + 1] = [value]
            continue
        _give(given, one.opts[0], value)
    if draw(st.booleans()):
        given.append("--overwrite")
    return Command((verb, *given), own=True)


@st.composite
def commands(draw: st.DrawFn) -> Command:
    """A verb with one to three of its options, each with a value that it may not expect; by night
    one of three with files of its own."""
    if NIGHTLY and draw(st.integers(0, 2)) == 0:
        return draw(on_files())
    known = {name: given for name, given in parameters().items() if name not in WITHOUT}
    rare = [name for name in known if name not in OFTEN]
    verb = draw(st.sampled_from([*OFTEN * 2, *rare]))
    given = list(GIVEN.get(verb, ()))
    options = [one for one in known[verb] if one.name not in ("help", "resume")]
    for one in draw(st.lists(st.sampled_from(options), max_size=3)) if options else ():
        if one.param_type_name == "argument":
            place = 0 if given and not given[0].startswith("--") else len(given)
            given[place : place + 1] = [draw(st.sampled_from(TEXTS))]
            continue
        name = draw(st.sampled_from([*one.opts, *one.secondary_opts]))
        _give(given, name, None if one.is_flag else draw(_text(one.name, verb)))
    return Command((verb, *given))


def _text(name: str, verb: str) -> st.SearchStrategy[str]:
    if name not in ("settings", "set") or verb in ("train", "cache"):
        return st.sampled_from(TEXTS)
    known = {one.name for kind in METHODS.values() for one in options_of(kind)}
    setting = st.builds("{}={}".format, st.sampled_from(sorted(known)), st.sampled_from(TEXTS))
    return setting | st.sampled_from(TEXTS)


def _give(given: list[str], name: str, value: str | None) -> None:
    """In the place of what stands there for that option."""
    if name in given:
        at = given.index(name)
        del given[at : at + (1 if value is None else 2)]
    given += [name] if value is None else [name, value]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    names = [*TrainConfig.options()]
    found = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(PLAIN), max_size=3))
    verbs = ["print"] * 8 + ["dry", "cache"]
    return Config({k: v for k, v in found.items() if k != "out"}, draw(st.sampled_from(verbs)))


# Reading these takes no model, and a fault in reading is as likely.
CHEAP = ["recipe", "options", "cache", "index", "transformer", "processors", "adapter"]
CHEAP += ["latents", "preset"]


@st.composite
def artefacts(draw: st.DrawFn, home: Path) -> Artefact:
    """One or two values of a file of ours removed, of another type, nested or huge."""
    of = draw(st.sampled_from([*CHEAP * 3, *ARTEFACTS]))
    good = ARTEFACTS[of].good(home)
    path = draw(st.sampled_from(_paths(good)))
    value = draw(st.sampled_from(JSON))
    if not path and value == REMOVED:
        return Artefact(of, text=draw(st.sampled_from(["", "{", "[]", "null", "\udcff", "NaN"])))
    return Artefact(of, ((path, value),))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of all that lies in it, the lists to their second place."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:2]):
            found += _paths(inner, (*path, i))
    return found


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """One or two arguments of another type, or out of range."""
    name = draw(st.sampled_from([*CALLS]))
    given = draw(
        st.dictionaries(
            st.sampled_from(arguments(name)), st.sampled_from(PYTHON), min_size=1, max_size=2
        )
        if arguments(name)
        else st.just({})
    )
    return Call(name, {k: v for k, v in given.items() if (name, k) != ("TrainConfig", "out")})


HELD = {"Schedule": Schedule, "VideoShape": VideoShape, "Clip": Clip, "Loading": Loading}
HELD |= {"TrainConfig": TrainConfig}


def arguments(name: str) -> Sequence[str]:
    """Of what a `Call` calls."""
    if name in METHODS:
        return [one.name for one in options_of(METHODS[name])]
    if name in HELD:
        kind: Any = HELD[name]
        known = getattr(kind, "model_fields", None)
        return [one.name for one in fields(kind)] if known is None else [*known]
    found = inspect.signature(getattr(gen_accel, name)).parameters.values()
    if name in ("attach", "extend"):  # the model is given
        found = [*found][1:]
    return [one.name for one in found if one.kind != one.VAR_KEYWORD]
