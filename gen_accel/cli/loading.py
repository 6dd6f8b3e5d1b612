"""Loading of other libraries: messages that are hidden, packages that are left out."""

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from gen_accel.pipelines.generation.progress import waiting

# Optional packages that transformers, diffusers and PEFT load wherever they are installed.
QUANTISERS = ("torchao", "bitsandbytes")
# Package, the logger that speaks of it, and how its message begins or goes on: of parts for other
# machines, which nothing here runs.
MESSAGES = (
    ("torchao", "torchao", "Failed to load "),
    ("torchao", "torch.utils._pytree", "is an Enum subclass and is now natively supported"),
    (
        *("torchao", "diffusers.quantizers.torchao.torchao_quantizer"),
        "Unable to import `torchao` Tensor objects",
    ),
    ("bitsandbytes", "bitsandbytes.cextension", "was compiled without GPU support"),
    ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit"),
)


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()


_FILTERS = [(package, logger, _without(words)) for package, logger, words in MESSAGES]


def hide_load_failures(asked: Collection[str] = ()) -> None:
    """Hide what optional packages say of parts that do not load on this machine.

    Args:
        asked: packages that are to run, whose messages are shown.
    """
    for package, logger, one in _FILTERS:
        if package in asked:
            logging.getLogger(logger).removeFilter(one)
        else:
            logging.getLogger(logger).addFilter(one)


@contextmanager
def loading(what: str = "torch and diffusers", *, asked: Collection[str] = ()) -> Iterator[None]:
    """Say on stderr what the imports inside are waited for, and hide what libraries say of parts
    that do not load here.

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
