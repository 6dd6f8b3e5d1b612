"""What is computed: attention methods. A method is one file with one frozen dataclass:

method(q, k, v, *, video, kernel) -> Tensor     where `kernel(q, k, v, plan)` runs a Plan
method.plan(video, device) -> Plan
method.block_mask(video), method.density(video)

Where the pattern depends on q and k, `plan` is that of smooth random ones, and there are also

method.plan_for(q, k, *, video) -> Plan         the pattern of q and k
method.layout(video, device)                    what depends on the grid alone, and
method.laid_out(q, k, v, *, layout, kernel)     the call with that given, which a graph can trace

A method that differs from layer to layer has `for_layer(layer)`, and one with parameters
`branch(heads, dim)`, the module of one layer, which its calls take.

Its fields are its options, its repr is its log line, and its hash is the cache key of its plan.
Where it is computed, one diffusers model family a file, is in `families`.
"""

from difflib import get_close_matches

from gen_accel.attention_processors.methods.block_mixture import BlockMixture
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.neighborhood import Neighborhood
from gen_accel.attention_processors.methods.radial import Radial
from gen_accel.attention_processors.methods.sparse_linear import SparseLinear

__all__ = [
    "METHODS",
    "BlockMixture",
    "Dense",
    "Neighborhood",
    "Radial",
    "SparseLinear",
    "method_class",
]

# Read by the tests, the command line and the benchmarks.
METHODS = {
    "dense": Dense,
    "radial": Radial,
    "neighborhood": Neighborhood,
    "block_mixture": BlockMixture,
    "sparse_linear": SparseLinear,
}


def method_class(name: str) -> type:
    """The method called `name`; ValueError with those that exist and the nearest."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {name!r}{hint}")
    return METHODS[name]
