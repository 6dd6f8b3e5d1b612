"""Messages of other packages that `import gen_accel` hides: each is of a part that does not load
on this machine and that nothing here runs. Import gen_accel before diffusers, which says them."""

import logging
from collections.abc import Callable, Collection

# Package, the logger that speaks of it, and how its message begins or goes on.
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
