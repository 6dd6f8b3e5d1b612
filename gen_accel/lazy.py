"""Public names of a package that are imported when first asked for."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def exported(
    package: str, homes: Mapping[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """Make `__all__`, `__getattr__` and `__dir__` of a package.

    Args:
        homes: modules, with a dot before the name of one inside the package, to the public names
            that they hold, separated by spaces. Modules inside are found by their own name too.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}
    modules = {home.split(".")[1] for home in homes if home.startswith(".")}

    def found(name: str) -> object:
        if name in home_of:
            return getattr(import_module(home_of[name], package), name)
        if name in modules:
            return import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def known() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of, *modules})

    return sorted(home_of), found, known
