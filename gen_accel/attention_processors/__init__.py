"""Attention methods, which say what is computed, and model families, which say where.

A method is an instance with `method(q, k, v, *, video, kernel)`; `gen_accel.method` names all that
it may have beside. Those of the package are frozen dataclasses in `methods`: the fields are the
options, the repr is the log line, and the hash is the cache key of the plan. `METHODS` lists them;
`register_method` adds one of a user's own, and "module:Class" names one without.

`families` says in which layers of a diffusers model a method runs, one model family a file.
`attached` holds what `attach` puts on a model.
"""

from difflib import get_close_matches

from gen_accel.attention_processors.methods.block_mixture import BlockMixture
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.attention_processors.methods.named import class_at, place_of
from gen_accel.attention_processors.methods.neighborhood import Neighborhood
from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.attention_processors.methods.profiled import Profiled
from gen_accel.attention_processors.methods.radial import Radial
from gen_accel.attention_processors.methods.reuse import Reuse
from gen_accel.attention_processors.methods.sparse_linear import SparseLinear
from gen_accel.method import Method, check_class

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

# Read by the tests, the command line and the benchmarks. `Mixed` has no name, as its options are
# rules, which a preset holds.
METHODS: dict[str, type] = {
    "dense": Dense,
    "radial": Radial,
    "neighborhood": Neighborhood,
    "block_mixture": BlockMixture,
    "sparse_linear": SparseLinear,
    "piecewise": Piecewise,
    "reuse": Reuse,
    "profiled": Profiled,
}

_registered: dict[str, type] = {}


def register_method(name: str, kind: type) -> None:
    """Give a class of methods a name, by which it is chosen, saved and loaded.

        gen_accel.register_method("mine", Mine)

    A class may be defined and registered again under its name, as when a notebook cell runs twice.

    Raises:
        ValueError: a name that is taken or is no word of letters, digits and _, or no class of
            methods.
    """
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
        raise ValueError(f"a method's name is a word of letters, digits and _, got {name!r}")
    check_class(kind, name)
    known = METHODS | _registered
    taken = known.get(name)
    if taken is not None and _place(taken) != _place(kind):
        raise ValueError(f"the name {name!r} is taken, by {taken.__module__}.{taken.__qualname__}")
    for other, one in known.items():
        if one is kind and other != name:
            raise ValueError(f"{kind.__qualname__} has the name {other!r}, got {name!r}")
    if name not in METHODS:
        _registered[name] = kind


def method_class(name: str, *, from_file: bool = False) -> type:
    """Return the class of the method called `name`, or the class at "module:Class".

    Args:
        from_file: whether a file says the name, which may come from anyone: nothing is imported
            then, so that the module of a "module:Class" must be imported already.

    Raises:
        ValueError: there is none; the error lists the methods, and the nearest.
    """
    known = METHODS | _registered
    if name in known:
        return known[name]
    if isinstance(name, str) and ":" in name:
        return class_at(name, imports=not from_file)
    near = get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if from_file:
        hint += f"; register one of your own first: gen_accel.register_method({name!r}, Class)"
    raise ValueError(f"method must be one of {tuple(known)}, got {name!r}{hint}")


def method_name(method: Method) -> str:
    """Return what `method_class` finds the class of `method` by: a name, or "module:Class".

    Raises ValueError for a class that cannot be found so.
    """
    names = {kind: name for name, kind in (METHODS | _registered).items()}
    return names.get(type(method)) or place_of(method)


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
