"""Configurations that were timed on this machine, kept in a JSON file in the user's cache.

Timing is asked for by `tune` and never happens by itself.
"""

import json
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from gen_accel.io import (
    cache_folder,
    fields_of,
    make_cache_folder,
    parse_json,
    replacing,
    trusted_text,
    typed,
)


def key(arch: str, kind: str, q: Tensor, block_q: int, block_k: int, ruled: bool) -> str:
    """Name a kernel on an architecture, apart with a rule or a gain and without: what is fastest
    for whole blocks may not be so for windows."""
    name = f"{arch}/{kind}/D{q.shape[3]}/{q.dtype}/{block_q}x{block_k}"
    return f"{name}/ruled" if ruled else name


def path() -> Path:
    return cache_folder() / "triton.json"


@lru_cache(maxsize=1)
def read() -> dict[str, list[int]]:
    """Read the saved configurations by `key`; empty where nothing was tuned yet."""
    try:
        found = fields_of(parse_json(trusted_text(path()) or "{}", path()), path())
        return {name: typed(found, name, list, origin=path()) for name in found}
    except ValueError:
        return {}


def write(found: dict[str, list[int]]) -> None:
    """Add to the kept configurations; a reader sees the old file or the new one."""
    read.cache_clear()
    make_cache_folder()
    with replacing(path()) as partial:
        partial.write_text(json.dumps({**read(), **found}, indent=1, sort_keys=True))
    read.cache_clear()
