"""Triton's interpreter, a quarter faster, and processes without it."""

import functools
import inspect
import os
import subprocess
import sys
from typing import Any


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def remember_builtins(patch: Any) -> None:
    """Have the interpreter look once for the builtins of a module and for numpy's types, not at
    each call of a kernel.

    Args:
        patch: pytest's monkeypatch.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patched(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    plain, dtypes = getattr(interpreter, "_get_np_dtype", None), {}

    def dtype_of(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = plain(kind)
        return dtypes[name]

    if plain:
        patch.setattr(interpreter, "_get_np_dtype", dtype_of)
    known = getattr(interpreter, "_patch_builtin", None)
    if known and [*inspect.signature(known).parameters] == ["pkg", "builder", "scope"]:
        patch.setattr(interpreter, "_patch_builtin", patched)
