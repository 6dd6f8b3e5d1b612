"""What the package offers, and what of it runs on this machine."""

from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import get_type_hints

import torch

from gen_accel.attention_processors import METHODS, Radial
from gen_accel.attention_processors.families import served_classes
from gen_accel.attention_processors.options import written_type
from gen_accel.kernels import KERNELS
from gen_accel.measure.environment import cpp_compiler
from gen_accel.video import VideoShape

SMALL = VideoShape(4, 8, 8)  # in tokens, to ask the kernels with
DEVICES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class MethodInfo:
    """fields: name to (default, type in words)."""

    name: str
    description: str
    fields: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class KernelInfo:
    """refused: "cpu, generating" and so on to the reasons why not, empty where it runs."""

    name: str
    description: str
    refused: dict[str, list[str]]


def methods() -> list[MethodInfo]:
    found = []
    for name, kind in METHODS.items():
        hints = get_type_hints(kind)
        options = {f.name: (_plain(f.default), written_type(hints[f.name])) for f in fields(kind)}
        found.append(MethodInfo(name, _first_line(kind.__doc__), options))
    return found


def kernels() -> list[KernelInfo]:
    """Each kernel asked with a small tensor on each kind of device, with and without gradients."""
    found = []
    for name in KERNELS:
        backend = import_module(f"gen_accel.kernels.{name}")
        refused = {}
        for device, dtype in DEVICES.items():
            if device == "cuda" and not torch.cuda.is_available():
                refused[device] = ["no CUDA device"]
                continue
            for grad in (False, True):
                reasons = _reasons(backend, device, dtype, grad)
                if name == "flex" and device == "cpu" and not reasons and cpp_compiler() is None:
                    reasons = ["no C++ compiler; see gen-accel doctor"]
                refused[f"{device}, {'training' if grad else 'generating'}"] = reasons
        found.append(KernelInfo(name, _first_line(backend.__doc__), refused))
    return found


def families() -> dict[str, list[str]]:
    """Family to the transformer classes that it serves."""
    found: dict[str, list[str]] = {}
    for kind, family in served_classes().items():
        found.setdefault(family, []).append(kind)
    return found


def _reasons(backend: ModuleType, device: str, dtype: torch.dtype, grad: bool) -> list[str]:
    shape = (1, 2, SMALL.tokens, 64)
    q, k, v = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad) for _ in "qkv")
    return backend.unsupported(q, k, v, Radial().plan(SMALL, q.device))


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _plain(default: object) -> str:
    """As it is written after `--set field=`."""
    if isinstance(default, tuple):
        return ",".join(_plain(item) for item in default)
    return str(default).lower() if isinstance(default, bool) else str(default)
