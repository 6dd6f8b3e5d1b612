"""Attention methods, which say what is computed, and model families, which say where.

A method is an instance of a subclass of `gen_accel.Method`. Those of the package are frozen
dataclasses in `methods`: the fields are the options, the repr is the log line, and the hash is the
cache key of the plan. `METHODS` lists them; `register_method` adds one of a user's own, and
"module:Class" names one without.

`families` says in which layers of a diffusers model a method runs, one model family a file.
`attached` holds what `attach` puts on a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gen_accel import registry
from gen_accel.attention_processors.methods.registry import (
    METHODS,
    method_class,
    method_name,
    register_method,
)

if TYPE_CHECKING:
    from gen_accel.attention_processors.methods.block_mixture import BlockMixture
    from gen_accel.attention_processors.methods.dense import Dense
    from gen_accel.attention_processors.methods.mixed import Mixed, Rule
    from gen_accel.attention_processors.methods.neighborhood import Neighborhood
    from gen_accel.attention_processors.methods.piecewise import Piecewise
    from gen_accel.attention_processors.methods.profiled import Profiled
    from gen_accel.attention_processors.methods.radial import Radial
    from gen_accel.attention_processors.methods.reuse import Reuse
    from gen_accel.attention_processors.methods.sparse_linear import SparseLinear

__all__ = [
    "METHODS",
    "BlockMixture",
    "Dense",
    "Mixed",
    "Neighborhood",
    "Piecewise",
    "Profiled",
    "Radial",
    "Reuse",
    "Rule",
    "SparseLinear",
    "method_class",
    "method_name",
    "register_method",
]

# Classes are imported on first access: a model needs the files of its own method alone.
_HOMES = {kind: home for home, _, kind in (x.partition(":") for x in registry.METHODS.values())}
_HOMES |= {"Mixed": "mixed", "Rule": "mixed"}

if not TYPE_CHECKING:  # a checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.methods.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
