"""Names that users choose by, known before what they name is imported, which takes seconds."""

from collections.abc import Sequence
from difflib import get_close_matches

METHODS = (
    *("dense", "radial", "neighborhood", "block_mixture", "sparse_linear", "piecewise", "reuse"),
)
KERNELS = (
    *("triton", "fa4", "natten", "native", "flex", "xformers", "routed", "gather", "int8"),
    "reference",
)
TECHNIQUES = (
    *("riflex", "position_interpolation", "ultravico", "rotating_anchors", "window_noise"),
    *("continuation", "fresh_noise"),
)
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group", "sequential")
DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mlu", "musa", "mtia")


def check_kernel(kernel: str, what: str = "kernel", known: Sequence[str] = KERNELS) -> None:
    """Raise ValueError for a name that is neither "auto" nor in `known`, with the nearest.

    Args:
        what: the argument that holds it.
    """
    if kernel != "auto" and kernel not in known:
        hint = nearest_to(kernel, known)
        raise ValueError(f"{what} must be 'auto' or one of {known}, got {kernel!r}{hint}")


def check_techniques(names: Sequence[str], what: str = "technique") -> None:
    """Raise ValueError for a name that is not in `TECHNIQUES`."""
    for name in names:
        if name not in TECHNIQUES:
            raise ValueError(f"{what} must be one of {', '.join(TECHNIQUES)}, got {name!r}")


def check_loading(dtype: str, offload: str) -> None:
    """Raise ValueError for other words than a pipeline is loaded by."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {OFFLOADS}, got {offload!r}")


def nearest_to(name: object, known: Sequence[str]) -> str:
    """For the end of a message: which of `known` may be meant."""
    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
