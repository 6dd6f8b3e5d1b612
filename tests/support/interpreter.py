"""Triton's interpreter, a quarter faster."""

import functools
import inspect
from typing import Any


def remember_builtins(patch: Any) -> None:
    """Have the interpreter look once for the builtins of a module, not at each call of a kernel.

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

    known = getattr(interpreter, "_patch_builtin", None)
    if known and [*inspect.signature(known).parameters] == ["pkg", "builder", "scope"]:
        patch.setattr(interpreter, "_patch_builtin", patched)
