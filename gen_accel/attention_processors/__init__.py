"""Attention methods, which say what is computed, and model families, which say where.

A method is an instance of a subclass of `gen_accel.Method`. Those of the package are frozen
dataclasses in `methods`: the fields are the options, the repr is the log line, and the hash is the
cache key of the plan. `METHODS` lists them; `register_method` adds one of a user's own, and
"module:Class" names one without.

`families` says in which layers of a diffusers model a method runs, one model family a file.
`attached` holds what `attach` puts on a model.
"""

from typing import TYPE_CHECKING

from gen_accel.lazy import exported
from gen_accel.registry import METHODS as HOMES

if TYPE_CHECKING:
    from gen_accel.attention_processors.methods.block_mixture import BlockMixture as BlockMixture
    from gen_accel.attention_processors.methods.dense import Dense as Dense
    from gen_accel.attention_processors.methods.mixed import Mixed as Mixed
    from gen_accel.attention_processors.methods.mixed import Rule as Rule
    from gen_accel.attention_processors.methods.neighborhood import Neighborhood as Neighborhood
    from gen_accel.attention_processors.methods.piecewise import Piecewise as Piecewise
    from gen_accel.attention_processors.methods.profiled import Profiled as Profiled
    from gen_accel.attention_processors.methods.radial import Radial as Radial
    from gen_accel.attention_processors.methods.registry import METHODS as METHODS
    from gen_accel.attention_processors.methods.registry import method_class as method_class
    from gen_accel.attention_processors.methods.registry import method_name as method_name
    from gen_accel.attention_processors.methods.registry import register_method as register_method
    from gen_accel.attention_processors.methods.reuse import Reuse as Reuse
    from gen_accel.attention_processors.methods.sparse_linear import SparseLinear as SparseLinear
    from gen_accel.attention_processors.methods.vsa import VSA as VSA
else:
    _own = (home.split(":") for home in HOMES.values())
    __all__, __getattr__, __dir__ = exported(
        __name__,
        {f".methods.{home}": kind for home, kind in _own}
        | {
            ".methods.mixed": "Mixed Rule",
            ".methods.registry": "METHODS method_class method_name register_method",
        },
    )
