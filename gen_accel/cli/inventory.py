"""Inventory of the package, and the parts of it that run on this machine."""

import inspect
import re
from dataclasses import dataclass, field
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import diffusers
import torch

from gen_accel.attention_processors import METHODS, method_name
from gen_accel.attention_processors.families import (
    FAMILIES,
    REFUSED,
    classes_for,
    families,
)
from gen_accel.attention_processors.families.base import PipelineInputs
from gen_accel.attention_processors.families.pipelines import pipelines
from gen_accel.attention_processors.methods.registry import options_of
from gen_accel.kernels import KERNELS, kernel_of, refusals
from gen_accel.method import Method
from gen_accel.parsing import as_text, members, shown, written_type
from gen_accel.pipelines.generation.single_file import has_converter
from gen_accel.registry import KINDS
from gen_accel.served import nearest_model, row_of

DEVICES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class FieldInfo:
    """An option of a method.

    Args:
        default: as after `--set field=`.
        type: in words.
        meaning: one sentence of the class's docstring.
        words: closed set of values; empty if others are taken too.
        limits: of a number, such as "in (0, 1]".
    """

    default: str
    type: str
    meaning: str = ""
    words: tuple[str, ...] = ()
    limits: str = ""


@dataclass(frozen=True)
class MethodInfo:
    """A method, with its options by name."""

    name: str
    description: str
    fields: dict[str, FieldInfo]


@dataclass(frozen=True)
class ModelInfo:
    """One transformer or UNet class of diffusers.

    Args:
        kind: what its attention sees: "video", "frames" or "image".
        models: its published models, in words.
        published: published models that `estimate` knows by name.
        methods: the methods that leave something out there.
        order: of the tokens in its self-attention.
        lora_targets: names of groups of layers to the ends of the layers' names.
        training, longer, image_prompts: whether it trains, takes techniques for longer video, and
            loads image prompts.
        single_file: whether `assemble` takes its weights in the names of the original model.
        here: whether the installed diffusers has the class.
        refused: why it cannot be served; the other fields are then empty.
    """

    name: str
    family: str = ""
    kind: str = ""
    models: str = ""
    published: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    order: str = ""
    lora_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    training: bool = False
    longer: bool = False
    image_prompts: bool = False
    single_file: bool = False
    here: bool = True
    refused: str = ""


@dataclass(frozen=True)
class KernelInfo:
    """A kernel. `refused`: "cpu, generating" and so on to the reasons, empty if it runs; only
    of devices that are there."""

    name: str
    description: str
    refused: dict[str, list[str]]


def methods() -> list[MethodInfo]:
    found = []
    for name, kind in METHODS.items():
        hints, said = get_type_hints(kind, include_extras=True), _meanings(kind)
        options = dict[str, FieldInfo]()
        for one in options_of(kind):
            hint, default = hints[one.name], one.default
            options[one.name] = FieldInfo(
                method_name(default) if isinstance(default, Method) else as_text(default),
                "the name of a method" if hint is Method else written_type(hint),
                said.get(one.name, ""),
                _closed(hint),
                _limits(hint),
            )
        found.append(MethodInfo(name, _first_line(kind.__doc__), options))
    return found


def kernels() -> list[KernelInfo]:
    """List the kernels with their refusals for each kind of device, with and without gradients."""
    found = []
    for name in KERNELS:
        where = {}
        for device, dtype in DEVICES.items():
            if device == "cuda" and not torch.cuda.is_available():
                continue
            for grad in (False, True):
                words = f"{device}, {'training' if grad else 'generating'}"
                where[words] = refusals(name, torch.device(device), dtype, grad=grad)
        found.append(KernelInfo(name, _first_line(kernel_of(name).__doc__), where))
    return found


def models() -> list[ModelInfo]:
    """List all classes that are served, family by family, and then the refused classes."""
    with_images, here = classes_for("image prompts"), {*dir(diffusers), *dir(diffusers.models)}
    found = []
    for family in families():
        # A method that thins out with distance in time keeps all of a single frame.
        methods = tuple(
            name
            for name, kind in METHODS.items()
            if family.kind == "video" or not kind().thins_by_time
        )
        found += [
            ModelInfo(
                name,
                family.name,
                family.kind,
                family.models,
                tuple(
                    key
                    for key, one in FAMILIES[family.name].published.items()
                    if (one.kind or family.classes[0]) == name
                ),
                methods,
                family.order,
                dict(family.lora_targets),
                family.serves("training"),
                family.kind == "video" and family.serves("longer video"),
                name in with_images,
                name in here and has_converter(name),
                name in here,
            )
            for name in family.classes
        ]
    return found + [ModelInfo(name, refused=why) for name, why in sorted(REFUSED.items())]


def matching(name: str) -> list[ModelInfo]:
    """The models of a family, or the one of another name, refused ones too; ValueError with the
    nearest name for one that is not known."""
    row = row_of(name)
    if row is None:
        raise ValueError(
            f"no family, class or published model is called {shown(name)}"
            f"{nearest_model(name, all=True)}; `gen-accel models` lists them"
        )
    if name.lower() in FAMILIES:
        return [one for one in models() if one.family == row.family]
    return [one for one in models() if one.name == row.kind]


def inputs_of(model: ModelInfo) -> tuple[str, ...]:
    """Kinds of input that `generate` makes videos of a class from, by any of its pipelines."""
    held: set[str] = set()
    for name, row in pipelines().items():
        pipeline = getattr(diffusers, name, None)
        if not isinstance(row, PipelineInputs) or pipeline is None:
            continue
        parts = inspect.signature(pipeline.__init__).parameters.values()
        if any(re.search(rf"\b{model.name}\b", str(part.annotation)) for part in parts):
            held |= {*row.kinds}
    return tuple(kind for kind in KINDS if kind in held)


def methods_of(model: ModelInfo) -> str:
    """Name the methods of a model in words."""
    missing = [name for name in METHODS if name not in model.methods]
    return f"all but {', '.join(missing)}" if missing else "all"


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _meanings(kind: type) -> dict[str, str]:
    """First sentence about each option in the "Args:" of a class's docstring."""
    found = dict[str, str]()
    args = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2]
    for names, text in re.findall(r"^    (\w+(?:, \w+)*): (.+(?:\n {5,}.+)*)", args, re.M):
        sentence = " ".join(text.split()).split(". ")[0].split("; ")[0].rstrip(".")
        if not sentence.startswith("see "):
            said = re.sub(r"[:,] see `[^`]*`", "", sentence)
            found |= dict.fromkeys(names.split(", "), f"{said[:1].upper()}{said[1:]}.")
    return found


def _closed(hint: object) -> tuple[str, ...]:
    """Words of a hint that takes nothing else."""
    found = list[str]()
    for part in members(hint):
        if get_origin(part) is Literal:
            found += map(str, get_args(part))
        elif part is bool:
            found += ("true", "false")
        elif part is NoneType:
            found.append("none")
        else:
            return ()
    return tuple(found)


def _limits(hint: object) -> str:
    """Limits of the first number that a type admits; "" without any."""
    parts = [hint] if get_origin(hint) is Annotated else [*members(hint)]
    return next((str(get_args(one)[1]) for one in parts if get_origin(one) is Annotated), "")
