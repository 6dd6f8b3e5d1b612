"""JSON files, read with the file's name in each error and a type check of each field.

A file from another program, a hand or a crash may hold anything. Callers read fields by `typed`,
so that a wrong one is refused by name and never met further on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_accel.parsing import shown
from gen_accel.text_files import read_text

REQUIRED: Any = object()
KINDS = {
    dict: "names with values",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_json(path: str | Path) -> Any:
    """Parse the file at `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, origin: Any) -> Any:
    """Parse `text`, which came from the file `origin`.

    Raises ValueError, which names `origin`, for text that is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{origin} is no JSON of ours: it is nested too deep") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{origin} is no JSON from {where} on") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{origin} is no JSON: {error}") from error


def read_fields(path: str | Path) -> dict[str, Any]:
    """Parse a file that must hold a JSON object."""
    return fields_of(read_json(path), path)


def fields_of(data: Any, origin: Any) -> dict[str, Any]:
    """Return `data` if it is a dict; raise ValueError, which names `origin`, otherwise."""
    if not isinstance(data, dict):
        raise ValueError(f"{origin} must hold {KINDS[dict]}, got {shown(data)}")
    return data


def typed(
    data: Mapping[str, Any], name: str, *kinds: type, origin: Any, default: Any = REQUIRED
) -> Any:
    """Return `data[name]`, checked to be of one of `kinds`; a bool is no int, an int is a float.

    Args:
        origin: file that `data` came from.
        default: value of a missing field; without it, a missing field is an error.

    Raises ValueError, which names `origin`, the field and what came.
    """
    if name not in data:
        if default is REQUIRED:
            raise ValueError(f"{origin} has no {name}")
        return default
    value = data[name]
    if not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"{name} in {origin} must be {wanted}, got {shown(value)}")
    return value


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
