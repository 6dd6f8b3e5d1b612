"""Assemble the kernel for the Hugging Face Hub from the Triton kernels of this repository.

python integrations/hub_kernel/assemble.py FOLDER

FOLDER gets the project that `kernel-builder` takes, and in `build/` what it would build, which
`kernels.get_local_kernel(FOLDER)` loads. The modules are those of gen_accel that the kernel
imports, with relative imports, and operators in a namespace of their own: the kernel and an
installed gen_accel do not meet.
"""

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "gen_accel"
NAME = "block_sparse_rest"
# What the front imports.
ROOTS = ("plan", "kernels.triton", "kernels.triton.rest")
# Modules that are exchanged, since they would bring files and tables that the kernel does not use.
STAND_INS = {
    "registry": (
        '"""What the base class of kernels asks."""\n\n\n'
        "def check_subclass(kind: type, base: type, what: str) -> None:\n"
        '    """Ask nothing: the one kernel is here."""\n'
    ),
    "kernels.triton.tuned": (
        '"""No configuration is kept on a machine: the built-in ones run."""\n\n\n'
        "def key(*facts: object, ruled: bool) -> str:\n"
        '    """Name nothing."""\n'
        '    return ""\n\n\n'
        "def read() -> dict[str, list[int]]:\n"
        '    """Read no configuration."""\n'
        "    return {}\n"
    ),
}
OPS = '''\
"""The namespace of this kernel's operators."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(name: str) -> str:
    """Write the name of an operator with its namespace."""
    return f"{id}::{{name}}"
'''
OPS_NAMES = ("add_op_namespace_prefix", "ops")
_IMPORT = re.compile(r"^(\s*)from gen_accel\.([\w.]+) import", re.MULTILINE)
_OPERATOR = re.compile(r'"gen_accel::(\w+)"')


def file_of(module: str) -> Path:
    """File of a module of gen_accel, named without the package."""
    place = PACKAGE.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def imported(module: str) -> set[str]:
    """Modules of gen_accel that one imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(text_of(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gen_accel."):
            home = (node.module or "").removeprefix("gen_accel.")
            for alias in node.names:
                inner = f"{home}.{alias.name}"
                found.add(inner if file_of(inner).is_file() else home)
    return found


def text_of(module: str) -> str:
    """Source of a module, or of what stands in for it."""
    return STAND_INS.get(module) or file_of(module).read_text(encoding="utf-8")


def closure() -> list[str]:
    """List all modules that the kernel needs."""
    todo, found = [*ROOTS], set()
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += imported(module)
    return sorted(found)


def rewritten(module: str) -> str:
    """Source of a module with relative imports and operators in the kernel's namespace."""
    depth = module.count(".") + (file_of(module).name == "__init__.py")
    text = _IMPORT.sub(rf"\1from {'.' * (depth + 1)}\2 import", text_of(module))
    text = _OPERATOR.sub(r'add_op_namespace_prefix("\1")', text)
    text = text.replace("torch.ops.gen_accel.", "ops.")
    names = [name for name in OPS_NAMES if re.search(rf"(?<![\w.]){name}[.(]", text)]
    if names:
        line = f"from {'.' * (depth + 1)}_ops import {', '.join(names)}\n"
        tree = ast.parse(text)
        after = next(x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)).lineno
        lines = text.splitlines(keepends=True)
        text = "".join([*lines[: after - 1], line, *lines[after - 1 :]])
    return text


def sources() -> dict[str, str]:
    """Files of the package by their path in it, without `_ops.py`, which the builder writes."""
    files = {}
    for module in closure():
        inside = file_of(module).relative_to(PACKAGE).as_posix()
        files[inside] = rewritten(module)
        for folder in Path(inside).parents[:-1]:
            files.setdefault(f"{folder.as_posix()}/__init__.py", '"""Part of the kernel."""\n')
    front = HERE / "torch-ext" / NAME / "__init__.py"
    files["__init__.py"] = front.read_text(encoding="utf-8")
    return files


def assemble(out: Path) -> Path:
    """Write the project and its builds into a new or empty folder, and return it.

    Raises:
        FileExistsError: a folder that holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: give a new folder")
    for name in ("build.toml", "flake.nix", "CARD.md"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / name, out / name)
    shutil.copytree(HERE / "benchmarks", out / "benchmarks")
    files = sources()
    write(out / "torch-ext" / NAME, files)
    about = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    text = json.dumps(files, sort_keys=True).encode()
    for backend in (*about["backends"], "cpu"):  # on a CPU, for Triton's interpreter
        unique = f"_{NAME}_{backend}_{hashlib.sha256(text).hexdigest()[:8]}"
        folder = out / "build" / f"torch-{backend}"
        built = files | {"_ops.py": OPS.format(id=unique)}
        # Older versions of `kernels` look for the package in a folder of its name.
        built[f"{NAME}/__init__.py"] = COMPATIBLE
        write(folder, built)
        metadata = {
            "name": about["name"],
            "id": unique,
            "version": about["version"],
            "license": about["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {
                    path: base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()
                    for path, x in sorted(built.items())
                },
            },
        }
        place = folder / "metadata.json"
        place.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return out


COMPATIBLE = '''\
"""The kernel, for versions of `kernels` that look for a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_place = Path(__file__).resolve().parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location(f"{__name__}_kernel", _place)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update({name: getattr(_module, name) for name in _module.__all__})
__all__ = list(_module.__all__)
'''


def write(folder: Path, files: dict[str, str]) -> None:
    """Write texts by their paths in a folder."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give one folder: python integrations/hub_kernel/assemble.py FOLDER")
    try:
        print(assemble(Path(sys.argv[1])))
    except FileExistsError as error:
        sys.exit(str(error))
