"""Users' own methods, named by the place of their class, "module:Class"."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from gen_accel.method import Method, check_class


def class_at(place: str, *, imports: bool) -> type:
    """Return the class of methods at `place`, "module:Class".

    Args:
        imports: whether the module is imported, also from the current folder. Without, it must be
            imported already, and none of its code runs.

    Raises:
        ValueError: no such module or class, a module that cannot be imported, or no method.
    """
    home, _, name = place.partition(":")
    parts = [*home.split("."), *name.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"a method of one's own is written module:Class, got {place!r}")
    module = _imported(home) if imports else sys.modules.get(home)
    if module is None:
        raise ValueError(
            f"method {place!r} is named by a file, and modules that a file names are not "
            f"imported: import {home} first, if you trust it, or register its class with "
            f"gen_accel.register_method; on a command line, --method {place}"
        )
    found: Any = module
    for part in name.split("."):
        # Not by getattr, which may run code of the module that imports others.
        if part not in vars(found):
            near = get_close_matches(part, vars(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"method {place!r}: there is no {part!r} in {home}{hint}")
        found = vars(found)[part]
        if not isinstance(found, type):
            break
    check_class(found, place)
    return found


def place_of(method: Method) -> str:
    """Return the place at which `class_at` finds the class of `method`; ValueError where it
    cannot."""
    kind = type(method)
    place = f"{kind.__module__}:{kind.__qualname__}"
    why = None
    if kind.__module__ == "__main__":
        why = "a class of the program itself, __main__, is not found from another"
    elif "<locals>" in kind.__qualname__:
        why = "a class that a function makes is not found by its name"
    elif kind.__module__ == "builtins":
        why = "a function has no options, and no class of its own"
    else:
        try:
            found = class_at(place, imports=False)
        except ValueError as error:
            found, why = None, str(error)
        if found is not None and found is not kind:
            why = f"another class is there by now, at {place}"
    if why is not None:
        raise ValueError(
            f"{method!r} is none of the package's methods and cannot be named: {why}; register it "
            'with gen_accel.register_method("name", Class)'
        )
    return place


def _imported(home: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{home}.".startswith(f"{error.name}."):
            raise ValueError(f"{home} cannot be imported: {error}") from error
        raise ValueError(
            f"there is no module {error.name!r}, neither installed nor in {here}"
        ) from None
    except Exception as error:
        raise ValueError(f"{home} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
