"""Tensors in safetensors files: read whole; written finite, and with room on the disk."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gen_accel.files import FULL, NoRoom

SYSTEM_ERROR = re.compile(r"os error (\d+)")  # as safetensors, written in Rust, words it


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors on the CPU or elsewhere, contiguous or not.

    Raises:
        NoRoom: the disk is full, with the bytes that the file needs.
        OSError: the file cannot be written.
    """
    held = {name: x.detach().contiguous() for name, x in tensors.items()}
    try:
        save_file(held, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        found = SYSTEM_ERROR.search(str(error))
        number = int(found[1]) if found else None
        if number in FULL:
            needs = sum(x.nbytes for x in held.values())
            raise NoRoom(path, needs, number) from error
        raise OSError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file, on the CPU, and its metadata.

    Raises ValueError, which names the file, where it is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [n for n, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError for tensors that hold NaN or infinity, which must not be written.

    Args:
        what: name of the tensors for the message, such as "the LoRA".
    """
    if wrong := not_finite(tensors):
        raise ValueError(
            f"{what} is not finite and is not written: {named(wrong)}; lower learning_rate, or "
            "use mixed_precision bf16 or no"
        )


def named(names: Iterable[str], few: int = 3) -> str:
    """Join the first few names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return ", ".join(names[:few]) + more
