"""A node for each method of the library, with the fields of its class and their help."""

import inspect
import re
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gen_accel import METHODS
from gen_accel.attention_processors.methods.registry import options_of
from gen_accel.method import Method, check_method
from gen_accel.parsing import as_text, convert, written_type, wrong_type

METHOD = "GEN_ACCEL_METHOD"  # the type of the link
CATEGORY = "gen_accel/methods"
MOST = 1 << 20
FILLED_IN = ("sha256",)  # from other fields


def field_help(kind: type) -> dict[str, str]:
    """Help on the fields of a class, as it stands under "Args:", by field, each in one line."""
    text = inspect.getdoc(kind) or ""
    lines = text.partition("\nArgs:\n")[2].splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        head = re.fullmatch(r"    ([a-z_][\w, ]*?): (.*)", line)
        if head:
            # A line may describe several, as in "least, most: ...; block: ...".
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif line.startswith("        ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def inputs_of(kind: type) -> dict[str, dict[str, Any]]:
    """ComfyUI's declaration of a class's fields: required ones, and links to other methods."""
    hints, told = get_type_hints(kind), field_help(kind)
    found: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for one in options_of(kind):
        name, hint = one.name, hints[one.name]
        if name in FILLED_IN:
            continue
        about = {"tooltip": re.sub(r"(?i)^see above", "See the node's help", told.get(name, ""))}
        if hint is Method:
            found["optional"][name] = (METHOD, about)
            continue
        default = None if one.default is MISSING else one.default
        if get_origin(hint) is Literal:
            choices = [str(option) for option in get_args(hint)]
            found["required"][name] = (choices, about | {"default": str(default)})
        elif hint is bool:
            found["required"][name] = ("BOOLEAN", about | {"default": default})
        elif hint is int:
            found["required"][name] = ("INT", about | {"default": default, "min": 0, "max": MOST})
        elif hint is float:
            limits = {"min": -1000.0, "max": 1000.0, "step": 0.01, "round": False}
            found["required"][name] = ("FLOAT", about | limits | {"default": default})
        else:
            about["tooltip"] = f"{about['tooltip']} Written: {written_type(hint)}.".strip()
            found["required"][name] = ("STRING", about | {"default": as_text(default).lower()})
    return found


def made(kind: type, name: str, given: dict[str, Any]) -> Any:
    """A method of the values that a node was given.

    Raises ValueError for a value that the field does not take, with one that it does.
    """
    hints = get_type_hints(kind)
    values = {}
    for key, value in given.items():
        if value is None:
            continue
        values[key] = value
        if not isinstance(value, str) or hints[key] is str:
            continue
        try:
            values[key] = convert(value.strip(), hints[key], is_text=True)
        except (TypeError, ValueError, OverflowError):
            default = next(one.default for one in options_of(kind) if one.name == key)
            right = f"{key}={as_text(default)}"
            raise wrong_type(f"{key} of {name}", hints[key], value, right) from None
    method = kind(**values)
    check_method(method)
    return method


def node_of(name: str, kind: type) -> type:
    """The node of one method."""

    class MethodNode:
        DESCRIPTION = (inspect.getdoc(kind) or "").partition("\n")[0]
        CATEGORY = CATEGORY
        FUNCTION = "make"
        RETURN_TYPES = (METHOD,)
        RETURN_NAMES = ("method",)
        OUTPUT_TOOLTIPS = ("For the input custom_method of Sparse Attention (gen_accel).",)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return inputs_of(kind)

        def make(self, **given: Any) -> tuple[Any]:
            return (made(kind, name, given),)

    MethodNode.__name__ = MethodNode.__qualname__ = f"{kind.__name__}Node"
    MethodNode.__doc__ = kind.__doc__
    return MethodNode


NODES = {
    f"GenAccel{kind.__name__}": (name, kind) for name, kind in METHODS.items() if name != "dense"
}
NODE_CLASS_MAPPINGS = {key: node_of(name, kind) for key, (name, kind) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {
    key: f"{name.replace('_', ' ').capitalize()} method (gen_accel)"
    for key, (name, _) in NODES.items()
}
