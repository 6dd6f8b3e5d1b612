"""Loading of other libraries: a bar meanwhile, packages that are left out."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from gen_accel.paths import expanded
from gen_accel.pipelines.generation.progress import waiting
from gen_accel.registry import hide_load_failures
from gen_accel.served import row_of

# Packages that transformers, diffusers and PEFT load wherever they are installed.
QUANTISERS = ("torchao", "bitsandbytes")
FOR_WEIGHTS = (*QUANTISERS, "peft", "scipy")
FOR_PIPELINES = (*FOR_WEIGHTS, "transformers")  # without which diffusers has none


@contextmanager
def loading(what: str | None = "diffusers", *, asked: Collection[str] = ()) -> Iterator[None]:
    """Import torch and let the imports inside follow, and say on stderr what is waited for.

    Args:
        what: packages and files that are loaded inside; None for torch alone.
        asked: packages that are to run, whose messages are shown.
    """
    hide_load_failures(asked)
    is_first = "torch" not in sys.modules
    with waiting("loading torch") if is_first else nullcontext():
        import_module("torch")
    with waiting(f"loading {what}") if is_first and what else nullcontext():
        yield
    # The progress bars of loading a model; bars of downloads stay.
    for library in ("diffusers", "transformers"):
        if sys.modules.get(library):
            import_module(f"{library}.utils.logging").disable_progress_bar()


def unneeded(model: str | None) -> tuple[str, ...]:
    """Name what a process can do without that loads no weights, and no pipeline of a model whose
    sizes are known by its name."""
    row = None if model is None or expanded(model).exists() else row_of(model)
    return FOR_PIPELINES if row is not None and row.published else FOR_WEIGHTS


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Let the libraries that are imported inside find none of these packages, which take seconds
    to import. They never look again. Does nothing once one of the libraries is imported."""
    libraries = ("diffusers", "transformers", "peft", *QUANTISERS)
    is_late = any(name in sys.modules for name in libraries)
    hidden = [] if is_late else [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
