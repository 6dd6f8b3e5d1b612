"""Loading of other libraries: a bar meanwhile, packages that are left out."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from gen_accel.pipelines.generation.progress import waiting
from gen_accel.registry import hide_load_failures

# Optional packages that transformers, diffusers and PEFT load wherever they are installed.
QUANTISERS = ("torchao", "bitsandbytes")


@contextmanager
def loading(what: str = "torch and diffusers", *, asked: Collection[str] = ()) -> Iterator[None]:
    """Say on stderr what the imports inside are waited for.

    Args:
        asked: packages that are to run, whose messages are shown.
    """
    hide_load_failures(asked)
    with waiting(f"loading {what}") if "torch" not in sys.modules else nullcontext():
        yield
    # The progress bars of loading a model; bars of downloads stay.
    for library in ("diffusers", "transformers"):
        if library in sys.modules:
            import_module(f"{library}.utils.logging").disable_progress_bar()


@contextmanager
def without_quantisers() -> Iterator[None]:
    """Let the libraries that are imported inside find no quantisers, which takes seconds and is
    for life: for a process that loads no weights. Does nothing once any of them is imported."""
    heavy = ("diffusers", "transformers", "peft", *QUANTISERS)
    hidden = [] if any(name in sys.modules for name in heavy) else QUANTISERS
    for name in hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
