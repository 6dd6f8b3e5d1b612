"""Tile sizes, warps and pipeline stages of the kernels, for each architecture."""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.triton import tuned


class LaunchConfig(NamedTuple):
    """Tiles of queries and of keys, in slots, powers of two from 16; warps; pipeline stages."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int

    @property
    def stages(self) -> dict[str, int]:
        """Options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class LinearConfig(NamedTuple):
    """Rows and columns that a program of the linear branch holds at a time; warps."""

    tile: int
    chunk: int
    num_warps: int


class SumsConfig(NamedTuple):
    """Tiles of the product of sets and states: sets, numbers of a state, blocks; warps; stages."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int


class CardSize(NamedTuple):
    """Numbers of a device by which work is cut: multiprocessors; bytes of the last cache."""

    processors: int
    cache: int


# Head dims up to 64, 128 and 256.
BUCKETS = (64, 128, 256)

KINDS = ("forward", "dq", "dkdv", "dkdv rule")
# Prefixes of the kinds of kernels over packed operands, and with products of 8 bits.
PACKING, ROUNDING = "packed ", "int8 "
SOME = 64  # keys whose mean is the common key of a head, see `rest_columns`

DELTA_TILE = 16  # rows of one program that only reads two tensors; not timed

_C = LaunchConfig

# Each row holds the configurations of KINDS. A rule on token pairs takes registers, and the
# kernel for keys and values has the fewest to spare. Chosen by the report of compile_matrix: the
# largest tiles that spill nothing and compute no product twice; not timed.
TABLE = {
    "sm_80": {
        64: (_C(128, 64, 8, 3), _C(128, 32, 8, 3), _C(32, 128, 8, 2), _C(32, 128, 8, 2)),
        128: (_C(128, 32, 8, 3), _C(64, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 64, 8, 2)),
        256: (_C(64, 32, 8, 2), _C(32, 32, 8, 2), _C(16, 32, 8, 1), _C(16, 32, 8, 1)),
    },
    "sm_90": {
        64: (_C(128, 64, 8, 3), _C(128, 64, 8, 3), _C(64, 128, 8, 3), _C(32, 128, 8, 2)),
        128: (_C(128, 64, 8, 3), _C(128, 64, 8, 2), _C(32, 128, 8, 2), _C(32, 64, 4, 2)),
        256: (_C(64, 64, 8, 2), _C(64, 32, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 2)),
    },
    "sm_100": {
        64: (_C(128, 64, 8, 3), _C(128, 64, 8, 3), _C(64, 128, 8, 2), _C(64, 128, 8, 2)),
        128: (_C(128, 64, 8, 3), _C(128, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 64, 8, 2)),
        256: (_C(64, 64, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 2)),
    },
    "sm_120": {
        64: (_C(64, 64, 4, 3), _C(64, 32, 4, 2), _C(32, 64, 4, 2), _C(32, 64, 4, 2)),
        128: (_C(128, 32, 8, 2), _C(64, 64, 8, 2), _C(32, 64, 4, 1), _C(32, 64, 4, 1)),
        256: (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 32, 8, 1)),
    },
    "gfx942": {
        64: (_C(128, 64, 4, 2), _C(64, 64, 4, 1), _C(64, 64, 4, 1), _C(64, 64, 4, 1)),
        128: (_C(64, 64, 4, 1), _C(64, 32, 4, 1), _C(32, 64, 4, 1), _C(32, 64, 4, 1)),
        256: (_C(32, 32, 4, 1), _C(32, 32, 4, 1), _C(16, 32, 4, 1), _C(16, 32, 4, 1)),
    },
}

# Instead of TABLE where blocks are shorter than the tiles that process them: as many warps as the
# tile has rows for, since more of them compute the same products twice.
SHORT = {
    ("sm_80", 64): (_C(64, 64, 4, 2), _C(64, 32, 4, 2), _C(32, 64, 4, 2), _C(32, 64, 4, 2)),
    ("sm_80", 128): (_C(64, 32, 4, 3), _C(64, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 64, 8, 2)),
    ("sm_90", 64): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 64, 4, 2), _C(64, 64, 4, 2)),
    ("sm_90", 128): (_C(64, 64, 4, 3), _C(64, 32, 4, 3), _C(32, 64, 4, 2), _C(32, 64, 4, 2)),
    ("sm_100", 64): (_C(64, 64, 8, 3), _C(64, 64, 8, 3), _C(64, 64, 8, 2), _C(64, 64, 4, 2)),
    ("sm_120", 128): (_C(64, 32, 4, 2), _C(64, 64, 8, 2), _C(32, 64, 4, 1), _C(32, 64, 4, 1)),
}

# Architectures on which each warp multiplies for itself; and the interpreter, for tests.
HALVED = ("sm_80", "sm_86", "sm_89", "sm_120", "interpreted")

# Instead of TABLE, SHORT and PACKED where a plan has a gain and they would spill; True for short
# blocks.
WITH_GAIN = {
    ("sm_80", 128, "forward", True): _C(64, 32, 4, 2),
    ("sm_90", 64, "dkdv rule", False): _C(32, 128, 8, 2),
    ("sm_90", 64, "dkdv rule", True): _C(32, 64, 4, 2),
    ("sm_90", 128, "dkdv rule", False): _C(16, 64, 4, 2),
    ("sm_90", 128, "dkdv rule", True): _C(16, 64, 4, 2),
    ("sm_100", 128, "dq", False): _C(64, 64, 8, 2),
    ("sm_100", 128, "dkdv rule", False): _C(32, 64, 4, 2),
    ("sm_120", 64, "dkdv rule", False): _C(32, 64, 4, 1),
    ("sm_120", 128, "dkdv rule", False): _C(64, 32, 4, 1),
    ("sm_120", 128, "forward", True): _C(64, 32, 4, 1),
    ("sm_86", 64, "forward", False): _C(64, 32, 4, 3),
    ("sm_89", 64, "forward", False): _C(64, 32, 4, 3),
    ("sm_86", 128, "forward", True): _C(64, 32, 4, 2),
    ("sm_89", 128, "forward", True): _C(64, 32, 4, 2),
    ("sm_120", 128, "int8 forward", False): _C(64, 32, 4, 1),
    ("sm_86", 128, "int8 forward", False): _C(64, 32, 4, 2),
    ("sm_89", 128, "int8 forward", False): _C(64, 32, 4, 2),
    ("sm_90", 64, "packed dq", False): _C(128, 64, 8, 2),
    ("sm_90", 128, "packed dq", False): _C(128, 64, 8, 2),
    ("sm_100", 128, "packed dq", False): _C(64, 64, 4, 2),
    ("sm_100", 128, "packed dkdv rule", False): _C(32, 128, 8, 2),
}

# Kernels over packed operands: the tile that a loop runs over is cut into loads, one or two of
# them in a turn. Chosen like TABLE and SHORT.
PACKED = {
    "sm_90": {
        64: (_C(128, 128, 8, 2), _C(128, 128, 8, 2), _C(64, 128, 8, 2), _C(64, 128, 8, 2)),
        128: (_C(128, 128, 8, 2), _C(128, 128, 8, 2), _C(64, 128, 8, 2), _C(32, 128, 8, 2)),
    },
    "sm_100": {
        64: (_C(128, 128, 8, 2), _C(128, 128, 8, 2), _C(64, 128, 8, 2), _C(64, 128, 8, 2)),
        128: (_C(128, 128, 8, 2), _C(128, 64, 8, 2), _C(64, 128, 8, 2), _C(64, 128, 8, 2)),
    },
}
SHORT_PACKED = {
    ("sm_90", 64): (_C(64, 128, 4, 2), _C(64, 64, 4, 2), _C(64, 64, 4, 2), _C(64, 64, 4, 2)),
    ("sm_90", 128): (_C(64, 128, 4, 2), _C(64, 64, 4, 2), _C(32, 64, 4, 2), _C(32, 64, 4, 2)),
}
# Minimum rows of a tile; fewer spare nothing by compile_matrix.
PACKED_ROWS = {"interpreted": 16, "sm_90": 64, "sm_100": 128}

# The forward pass with products of 8 bits, for any dtype, in the form of TABLE.
ROUNDED = {
    "sm_120": {
        64: (_C(64, 32, 4, 2),),
        128: (_C(64, 32, 4, 2),),
        256: (_C(32, 32, 8, 1),),
    },
}
for _arch in ("sm_86", "sm_89"):
    ROUNDED[_arch] = {**ROUNDED["sm_120"], 128: (_C(64, 32, 4, 3),)}

MOST_SUMMED = max(row[0].tile_n for row in ROUNDED["sm_120"].values())  # keys, in fp16

# Exact fp32 products, without tensor cores: small tiles fit every architecture of a maker, and
# spill 8 bytes a thread at most by compile_matrix; not timed.
FP32 = {
    "cuda": {
        64: (_C(32, 16, 8, 1), _C(32, 16, 8, 1), _C(32, 32, 8, 1), _C(32, 32, 8, 1)),
        128: (_C(32, 16, 8, 1), _C(32, 16, 8, 1), _C(16, 32, 8, 1), _C(16, 32, 8, 1)),
        256: (_C(16, 16, 8, 1), _C(16, 16, 8, 1), _C(16, 16, 8, 1), _C(16, 16, 8, 1)),
    },
    "hip": {
        64: (_C(32, 32, 4, 1), _C(32, 32, 4, 1), _C(32, 32, 4, 1), _C(32, 32, 4, 1)),
        128: (_C(32, 32, 4, 1), _C(32, 16, 4, 1), _C(16, 32, 4, 1), _C(16, 32, 4, 1)),
        256: (_C(16, 16, 4, 1), _C(16, 16, 4, 1), _C(16, 16, 4, 1), _C(16, 16, 4, 1)),
    },
}

# Small enough that small problems have several tiles, and several chunks.
INTERPRETED = _C(32, 32, 4, 1)
INTERPRETED_CARD = CardSize(1, 1 << 13)

# Kernels over the columns of a rest, where the tiles of blocks would spill: "forward" and "dkdv"
# (for mean keys), "dq" and "dpooled" (the same for keys pooled around mean queries).
COLUMNS = {
    ("sm_80", 128, "dkdv"): _C(64, 64, 8, 1),
    ("sm_80", 128, "dpooled"): _C(64, 64, 8, 2),
    ("sm_90", 64, "dkdv"): _C(64, 64, 4, 1),
    ("sm_90", 128, "dpooled"): _C(16, 128, 8, 2),
    ("sm_100", 128, "forward"): _C(128, 64, 8, 2),
    ("sm_120", 64, "forward"): _C(64, 64, 4, 2),
    ("sm_120", 128, "dpooled"): _C(64, 64, 8, 1),
    ("sm_86", 128, "dpooled"): _C(64, 64, 8, 2),
    ("sm_89", 128, "dpooled"): _C(64, 64, 8, 2),
}

# Kernels that pool around mean queries: rows of mean queries, keys of a load; warps; stages. In
# order for "pool", "pool backward" and "spread". Chosen like TABLE.
POOL = {
    "sm_80": {
        64: (_C(64, 32, 4, 1), _C(32, 32, 4, 1), _C(64, 64, 4, 2)),
        128: (_C(64, 64, 8, 1), _C(64, 32, 8, 1), _C(64, 64, 4, 2)),
        256: (_C(32, 32, 8, 1), _C(16, 16, 4, 1), _C(32, 32, 4, 1)),
    },
    "sm_90": {
        64: (_C(64, 64, 4, 2), _C(32, 64, 4, 1), _C(64, 64, 4, 2)),
        128: (_C(64, 32, 4, 1), _C(64, 32, 8, 1), _C(64, 64, 4, 2)),
        256: (_C(64, 32, 8, 1), _C(32, 32, 8, 1), _C(64, 32, 4, 1)),
    },
    "sm_100": {
        64: (_C(64, 64, 4, 2), _C(64, 32, 8, 1), _C(64, 64, 4, 2)),
        128: (_C(64, 64, 8, 2), _C(64, 64, 8, 1), _C(64, 64, 4, 2)),
        256: (_C(64, 32, 8, 1), _C(32, 32, 8, 1), _C(64, 32, 4, 1)),
    },
    "sm_120": {
        64: (_C(64, 32, 4, 1), _C(32, 32, 4, 1), _C(64, 64, 4, 2)),
        128: (_C(64, 64, 8, 1), _C(64, 32, 8, 1), _C(64, 64, 4, 2)),
        256: (_C(32, 32, 8, 1), _C(16, 16, 4, 1), _C(32, 32, 4, 1)),
    },
    "gfx942": {
        64: (_C(64, 64, 4, 1), _C(32, 64, 4, 1), _C(64, 64, 4, 1)),
        128: (_C(64, 64, 4, 1), _C(32, 32, 4, 1), _C(64, 64, 4, 1)),
        256: (_C(32, 32, 4, 1), _C(16, 32, 4, 1), _C(32, 32, 4, 1)),
    },
}
POOL_FP32 = {
    64: (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(32, 32, 8, 1)),
    128: (_C(32, 16, 8, 1), _C(16, 16, 8, 1), _C(32, 16, 8, 1)),
    256: (_C(16, 16, 8, 1), _C(16, 16, 8, 1), _C(16, 16, 8, 1)),
}
POOLS = ("pool", "pool backward", "spread")

# Instead of COLUMNS and POOL where a curve, which takes registers, would spill.
WITH_CURVE = {
    ("sm_80", 128, "dpooled"): _C(64, 64, 8, 1),
    ("sm_80", 128, "pool"): _C(32, 64, 8, 1),
    ("sm_80", 128, "pool backward"): _C(64, 16, 8, 1),
    ("sm_90", 64, "dpooled"): _C(32, 128, 8, 2),
    ("sm_90", 64, "pool"): _C(64, 64, 4, 1),
    ("sm_90", 64, "pool backward"): _C(32, 32, 4, 1),
    ("sm_90", 128, "dpooled"): _C(64, 32, 4, 1),
    ("sm_100", 64, "pool"): _C(64, 64, 4, 1),
    ("sm_100", 128, "pool backward"): _C(32, 64, 8, 1),
    ("sm_86", 64, "pool"): _C(32, 32, 4, 1),
    ("sm_89", 64, "pool"): _C(32, 32, 4, 1),
    ("sm_86", 128, "dpooled"): _C(32, 32, 4, 1),
    ("sm_89", 128, "dpooled"): _C(32, 32, 4, 1),
    ("sm_120", 64, "dpooled"): _C(64, 32, 4, 1),
    ("sm_120", 64, "pool"): _C(32, 64, 4, 1),
    ("sm_120", 128, "dpooled"): _C(64, 32, 4, 1),
    ("sm_120", 128, "pool"): _C(32, 64, 8, 1),
    ("sm_120", 128, "pool backward"): _C(64, 16, 8, 1),
}

# Both halves of `rest_turns`, with as many warps: rows of mean queries and keys of a load; tiles
# of queries and of columns. Chosen like TABLE, with a curve.
TURNS = {
    "sm_80": {
        64: (_C(64, 32, 4, 1), _C(64, 32, 4, 2)),
        128: (_C(32, 64, 4, 1), _C(64, 32, 4, 2)),
        256: (_C(32, 64, 8, 1), _C(64, 32, 8, 2)),
    },
    "sm_90": {
        64: (_C(64, 64, 4, 1), _C(64, 64, 4, 3)),
        128: (_C(64, 32, 4, 1), _C(64, 64, 4, 3)),
        256: (_C(32, 64, 8, 1), _C(64, 32, 8, 1)),
    },
    "sm_100": {
        64: (_C(64, 64, 4, 1), _C(64, 64, 4, 3)),
        128: (_C(64, 32, 4, 1), _C(64, 64, 4, 2)),
        256: (_C(32, 64, 8, 1), _C(64, 32, 8, 2)),
    },
    "sm_120": {
        64: (_C(32, 64, 4, 1), _C(64, 64, 4, 3)),
        128: (_C(32, 64, 4, 1), _C(64, 32, 4, 2)),
        256: (_C(32, 32, 8, 1), _C(32, 32, 8, 1)),
    },
    "gfx942": {
        64: (_C(64, 64, 4, 1), _C(64, 64, 4, 1)),
        128: (_C(32, 64, 4, 1), _C(64, 32, 4, 1)),
        256: (_C(32, 32, 4, 1), _C(32, 32, 4, 1)),
    },
}
for _arch in ("sm_86", "sm_89"):
    TURNS[_arch] = {
        64: (_C(64, 32, 4, 1), _C(64, 32, 4, 2)),
        128: (_C(32, 32, 4, 1), _C(64, 32, 4, 2)),
        256: TURNS["sm_120"][256],
    }
TURNS_FP32 = {
    64: (_C(32, 32, 8, 1), _C(16, 16, 8, 1)),
    128: (_C(32, 16, 8, 1), _C(16, 16, 8, 1)),
    256: (_C(16, 16, 8, 1), _C(16, 16, 8, 1)),
}
POOL_BLOCKS = 4  # key blocks that a program pools one after the other; not timed

TURN_KINDS = ("rest pool", "rest attend")
ROOMS = 3  # chunks of `rest_turns` that have memory at a time; not timed

# Warps that a multiprocessor has registers for, if each of their threads takes all 255.
WARPS = 8
# Times that a chunk of a rest which no cache holds fills the card, so that launches are few and
# the last programs leave little idle; not timed.
FULL = 3
LARGE = 3 << 27  # bytes that a larger one may have

# By head dim: spills nothing by compile_matrix; not timed.
LINEAR = {
    64: LinearConfig(64, 64, 4),
    128: LinearConfig(32, 128, 8),
    256: LinearConfig(32, 32, 8),
}
# Instead of LINEAR where it would spill.
LINEAR_INSTEAD = {
    ("sm_100", 128): LinearConfig(32, 64, 8),
    ("gfx942", 128): LinearConfig(64, 64, 8),
}
LINEAR_FP32 = {
    64: LinearConfig(32, 32, 8),
    128: LinearConfig(32, 32, 8),
    256: LinearConfig(16, 16, 8),
}

# Rows that a part of a rest's slope sums up, for each number of a head: a part has an eighth of
# the bytes of its tokens; not timed.
PART_ROWS = 8
# Rows of a part that a program holds at a time, so that nothing spills by compile_matrix.
PART_TILE = {"sm_80": 32, "sm_90": 32, "sm_100": 64, "sm_120": 16, "gfx942": 32}
# Of parts that come with facts of blocks, in 16 bits. A tile of a whole block is loaded once, and
# in stages ahead; not timed.
FACTS = {
    64: LinearConfig(64, 64, 4),
    128: LinearConfig(64, 128, 8),
    256: LinearConfig(32, 32, 8),
}
# Instead of FACTS where it would spill.
FACTS_INSTEAD = {
    ("sm_100", 64): LinearConfig(64, 64, 8),
    ("sm_100", 256): LinearConfig(16, 32, 8),
    ("sm_120", 256): LinearConfig(16, 32, 8),
}
FACTS_STAGES = {"sm_80": 2, "sm_90": 3, "sm_100": 3, "sm_120": 1, "gfx942": 1}
# Instead of LINEAR for the kernels that apply the slope and its gradients, where it would spill.
SLOPE_INSTEAD = {("sm_100", 64): LinearConfig(32, 64, 4)}
# Instead of LINEAR for the same kernels in fp16, whose sums are fp32.
SLOPE_FP16 = {("sm_100", 128): LinearConfig(32, 64, 4)}

# For every architecture: spills nothing by compile_matrix; not timed.
SUMS = {
    torch.bfloat16: SumsConfig(128, 128, 32, 8, 3),
    torch.float16: SumsConfig(128, 128, 32, 8, 2),
    torch.float32: SumsConfig(32, 32, 32, 8, 1),
}


# Architectures that share the tables of another one, but for the rows above that name them. Their
# multiprocessors have as little shared memory, and their compiler spills elsewhere.
LIKE = {"sm_86": "sm_120", "sm_89": "sm_120"}


def _shared(tables: Iterable[dict], keyed: Iterable[dict]) -> None:
    """Fill the rows that architectures of LIKE share, of `keyed` by tuples that begin with one."""
    for arch, like in LIKE.items():
        for table in tables:
            table.setdefault(arch, table[like])
        for table in keyed:
            for key in [key for key in table if key[0] == like]:
                table.setdefault((arch, *key[1:]), table[key])


_shared(
    (TABLE, ROUNDED, POOL, TURNS, FACTS_STAGES),
    (SHORT, WITH_GAIN, COLUMNS, WITH_CURVE, FACTS_INSTEAD),
)


def choose(
    kind: str, q: Tensor, block_q: int, block_k: int, ruled: bool, gain: bool = False
) -> LaunchConfig:
    """Choose the configuration of a kernel, with the tile that processes one block cut to the
    block.

    Args:
        kind: "forward", "dq" or "dkdv", with "packed " before it for a kernel that `packs`.
        q: (B, H, N, D), for its head dim, dtype and device.
        ruled: whether the plan has a rule on token pairs.
        gain: whether the plan has a gain.
    """
    ruled = ruled or gain
    kind = row(kind, ruled)
    arch = architecture(q.device)
    config = tuned.read().get(tuned.key(arch, kind, q, block_q, block_k, ruled=ruled))
    block = worked_off(kind, block_q, block_k)
    if config is None:
        config = from_table(arch, kind, q.shape[3], q.dtype, block, gain)
    return cut(kind, LaunchConfig(*config), block)


def row(kind: str, ruled: bool) -> str:
    """Name in KINDS for "forward", "dq" or "dkdv"; `ruled`: with a rule or a gain."""
    return f"{kind} rule" if of_keys(kind) and ruled else kind


def of_keys(kind: str) -> bool:
    """Whether a program owns keys and its loop runs over queries, instead of the reverse."""
    return kind.removeprefix(PACKING).startswith("dkdv")


def worked_off(kind: str, block_q: int, block_k: int) -> int:
    """Length of the blocks that a program owns: of keys for "dkdv", else of queries."""
    return block_k if of_keys(kind) else block_q


def from_table(
    arch: str, kind: str, D: int, dtype: torch.dtype, block: int, gain: bool = False
) -> LaunchConfig:
    """Look up the configuration of one of KINDS.

    Args:
        block: length from `worked_off`.
    """
    if arch == "interpreted":
        return INTERPRETED
    place = KINDS.index(kind.removeprefix(PACKING).removeprefix(ROUNDING))
    if dtype == torch.float32 and not kind.startswith(ROUNDING):
        return FP32["cuda" if arch.startswith("sm_") else "hip"][bucket(D)][place]
    table, shorter = (PACKED, SHORT_PACKED) if kind.startswith(PACKING) else (TABLE, SHORT)
    if kind.startswith(ROUNDING):
        table, shorter = ROUNDED, {}
    config = table[arch][bucket(D)][place]
    short = cut(kind, config, block) != config and (arch, bucket(D)) in shorter
    if short:
        config = shorter[arch, bucket(D)][place]
    return WITH_GAIN.get((arch, bucket(D), kind, short), config) if gain else config


def cut(kind: str, config: LaunchConfig, block: int) -> LaunchConfig:
    """Cut the tile that processes a block to the block."""
    if of_keys(kind):
        return config._replace(tile_n=tile(block, config.tile_n))
    return config._replace(tile_m=tile(block, config.tile_m))


def sizes(kind: str, config: LaunchConfig, block_q: int, block_k: int) -> dict[str, int]:
    """Constants of a kernel that name its blocks, its tiles, which are loads if PACKED, and for
    "forward" the loads in a turn."""
    packed = kind.startswith(PACKING)
    tile_m, tile_n = config.tile_m, config.tile_n
    if packed and of_keys(kind):
        tile_m = math.gcd(tile_m, block_q)
    elif packed:
        # Masked loads run one by one; a tile of 64 rows has registers for a load of 64 keys.
        tile_n = math.gcd(tile_n, block_k, tile_m)
    made = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "TILE_M": tile_m, "TILE_N": tile_n}
    if kind.startswith(ROUNDING):
        return made
    if kind.endswith("forward"):
        made["LOADS"] = min(config.tile_n // tile_n, 2)
    return {**made, "PACKED": packed}


def width(arch: str, config: LaunchConfig, D: int, *, packed: bool = False) -> int:
    """Number of columns of the values in a product of the forward pass.

    Where warps multiply for themselves, Triton lays out a product along its longer side. With more
    columns than rows, the warps would have to exchange the weights of each tile.
    """
    block_d = padded_dim(D)
    halved = arch in HALVED and config.tile_m < block_d and not packed
    return block_d // 2 if halved else block_d


def packs(
    arch: str, kind: str, D: int, dtype: torch.dtype, block_q: int, block_k: int, gain: bool
) -> bool:
    """Whether there is a kernel over packed operands: for 16 bits on architectures of PACKED, head
    dims whose rows start at multiples of 16 bytes, blocks processed by tiles of PACKED_ROWS or
    more, and loads of half a tile at least.

    Args:
        kind: one of KINDS, with "packed " before it.
    """
    if D * dtype.itemsize % 16:
        return False
    interpreted = arch == "interpreted"
    if not interpreted and (dtype == torch.float32 or bucket(D) not in PACKED.get(arch, {})):
        return False
    block = worked_off(kind, block_q, block_k)
    config = cut(kind, from_table(arch, kind, D, dtype, block, gain), block)
    load = sizes(kind, config, block_q, block_k)["TILE_M" if of_keys(kind) else "TILE_N"]
    own, other = (config.tile_n, config.tile_m)[:: 1 if of_keys(kind) else -1]
    return 2 * load >= other and own >= PACKED_ROWS[arch]


def columns(
    arch: str,
    kind: str,
    D: int,
    dtype: torch.dtype,
    block_q: int,
    blocks: int,
    curved: bool = False,
) -> LaunchConfig:
    """Choose the configuration of a kernel over columns of a rest: "forward", "dq", "dkdv" or
    "dpooled".

    Args:
        blocks: number of columns, Kk.
        curved: with the second order.
    """
    like = "dkdv" if kind == "dpooled" else kind
    # Few programs process a set of mean keys; short tiles make more programs.
    block = worked_off(like, block_q, min(blocks, 128 if kind == "dpooled" else 64))
    # The smallest tiles, since the kernel holds two sets of sums.
    wide = dtype == torch.float32 and kind == "forward"
    config = from_table(arch, like, BUCKETS[-1] if wide else D, dtype, block)
    if dtype != torch.float32:
        config = COLUMNS.get((arch, bucket(D), kind), config)
        config = WITH_CURVE.get((arch, bucket(D), kind), config) if curved else config
    return cut(like, config, block)


def pool(
    arch: str, kind: str, D: int, dtype: torch.dtype, block_k: int, curved: bool = False
) -> LaunchConfig:
    """Choose the configuration of one of POOLS, with the load cut to the block.

    Args:
        curved: with the second order.
    """
    if arch == "interpreted":
        config = INTERPRETED
    else:
        table = POOL_FP32 if dtype == torch.float32 else POOL[arch]
        config = table[bucket(D)][POOLS.index(kind)]
        if curved and dtype != torch.float32:
            config = WITH_CURVE.get((arch, bucket(D), kind), config)
    return config._replace(tile_n=tile(block_k, config.tile_n))


def turns(
    arch: str, D: int, dtype: torch.dtype, block_q: int, block_k: int
) -> tuple[LaunchConfig, LaunchConfig]:
    """Look up the configurations of `rest_turns`, of TURN_KINDS, with load and tile cut to the
    block."""
    if arch == "interpreted":
        of_pool = columns = INTERPRETED
    else:
        table = TURNS_FP32 if dtype == torch.float32 else TURNS[arch]
        of_pool, columns = table[bucket(D)]
    return of_pool._replace(tile_n=tile(block_k, of_pool.tile_n)), cut("forward", columns, block_q)


def choose_turns(q: Tensor, block_q: int, block_k: int) -> tuple[LaunchConfig, LaunchConfig]:
    """Choose the configurations of `rest_turns`, those of `turns` where none was timed; the warps
    are those of the second."""
    arch, kept = architecture(q.device), tuned.read()
    given = turns(arch, q.shape[3], q.dtype, block_q, block_k)
    names = (tuned.key(arch, kind, q, block_q, block_k, ruled=False) for kind in TURN_KINDS)
    of_pool, columns = (
        LaunchConfig(*kept.get(name, config)) for name, config in zip(names, given, strict=True)
    )
    return of_pool._replace(tile_n=tile(block_k, of_pool.tile_n)), cut("forward", columns, block_q)


def group(config: LaunchConfig, blocks: int) -> int:
    """Number of a head's query blocks, of `blocks`, that are pooled for as the rows of one
    product."""
    return tile(blocks, config.tile_m)


def groups_at_once(
    size: CardSize, columns: LaunchConfig, block_q: int, pair: int, group: int
) -> int:
    """Upper bound on the groups of query blocks whose pooled keys and values are held at once.

    As many as half of the last cache holds, so that one kernel reads from it what another wrote,
    if their programs fill the card. Otherwise as many as LARGE holds, or as fill the card FULL
    times: from memory, a larger chunk costs no more, and each wave of programs hides the end of
    the one before.

    Args:
        columns: configuration of the kernel over the columns.
        pair: bytes of the pooled keys and values of one query block.
        group: query blocks in a group.
    """
    held = size.cache // 2 // pair // group
    programs = size.processors * max(1, WARPS // columns.num_warps)
    pairs = programs / -(-block_q // columns.tile_m)
    if held * group >= pairs:
        return held
    return max(math.ceil(FULL * pairs / group), LARGE // pair // group)


def groups_in_turns(
    size: CardSize,
    given: tuple[LaunchConfig, LaunchConfig],
    block_q: int,
    blocks: tuple[int, int],
    pair: int,
) -> int:
    """Upper bound on the groups of query blocks in a chunk of `rest_turns`: as many as let the
    last cache hold all rooms, or more if it takes more to fill the card with two chunks.

    Args:
        given: configurations from `turns`.
        blocks: number of query and of key blocks.
        pair: bytes of the pooled keys and values of one query block.
    """
    of_pool, columns = given
    rows = group(of_pool, blocks[0])
    turns = math.ceil(blocks[1] / POOL_BLOCKS) + rows * math.ceil(block_q / columns.tile_m)
    places = size.processors * max(1, WARPS // columns.num_warps)
    return max(size.cache // (ROOMS * rows * pair), math.ceil(places / (2 * turns)))


def linear(arch: str, D: int, dtype: torch.dtype) -> LinearConfig:
    if arch == "interpreted":
        return LinearConfig(32, 32, 4)
    if dtype == torch.float32:
        return LINEAR_FP32[bucket(D)]
    return LINEAR_INSTEAD.get((arch, bucket(D)), LINEAR[bucket(D)])


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the states of inputs of a dtype: sums over many tokens exceed the range of fp16."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def part_blocks(D: int, block: int) -> int:
    """Number of blocks in a part, whatever the rest of the call: its sums are always the same."""
    return max(1, PART_ROWS * D // block)


def part_tile(arch: str, dtype: torch.dtype, block: int) -> int:
    """Tile of a part; the smallest one under the interpreter and in fp32."""
    return tile(block, 16 if dtype == torch.float32 else PART_TILE.get(arch, 16))


def facts(arch: str, D: int, dtype: torch.dtype, block: int) -> tuple[LinearConfig, int]:
    """Configuration of parts that come with facts of blocks, its tile cut to the block, and
    pipeline stages."""
    if arch == "interpreted" or dtype == torch.float32:
        return linear(arch, D, dtype)._replace(tile=part_tile(arch, dtype, block)), 1
    config = FACTS_INSTEAD.get((arch, bucket(D)), FACTS[bucket(D)])
    config = config._replace(tile=tile(block, config.tile))
    return config, FACTS_STAGES[arch] if config.tile >= block and D <= 128 else 1


def slope(arch: str, D: int, dtype: torch.dtype) -> LinearConfig:
    """Configuration for a rest's first order; parts have tiles of their own."""
    config, row = linear(arch, D, dtype), (arch, bucket(D))
    if dtype == torch.float32:
        return config
    config = SLOPE_INSTEAD.get(row, config)
    return SLOPE_FP16.get(row, config) if dtype == torch.float16 else config


def sums(arch: str, dtype: torch.dtype) -> SumsConfig:
    return SumsConfig(32, 1024, 32, 4, 1) if arch == "interpreted" else SUMS[dtype]


def bucket(D: int) -> int:
    return next(most for most in BUCKETS if most >= D)


def padded_dim(D: int) -> int:
    """Power of two that a tile of head dim D takes; products need at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def depth(kind: str, D: int) -> int:
    """Head dim that a product of a kernel needs; one of 8 bits needs at least 32."""
    return max(D, 32) if kind.startswith(ROUNDING) else D


def dims(D: int) -> dict[str, int]:
    """Constants of a kernel for a head dim."""
    return {"D": D, "BLOCK_D": padded_dim(D)}


def tile(block: int, most: int) -> int:
    """Power of two, 16 to `most`, that covers a block with the least work.

    A tile costs its rows, padding included, plus the time of 16 rows to start.
    """
    sizes = [1 << power for power in range(4, most.bit_length())]
    return min(reversed(sizes), key=lambda size: -(-block // size) * (size + 16))


def pattern_strides(*patterns: Tensor | None) -> Iterator[int]:
    """Yield the distances to the patterns of the next sample and head, in patterns; 0 if shared.

    Args:
        patterns: (B or 1, H or 1, ...) each, contiguous, or None.
    """
    for x in patterns:
        B, H = (1, 1) if x is None else x.shape[:2]
        yield H if B > 1 else 0
        yield 1 if H > 1 else 0


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """Name of the row of TABLE: the device's own, or the next older or smaller one."""
    if device.type != "cuda":
        return "interpreted"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12:
        return "sm_120"
    if major == 8 and minor > 0:
        return "sm_89" if minor >= 9 else "sm_86"
    return f"sm_{min(major, 10)}0"


@lru_cache(maxsize=16)
def card_size(device: torch.device) -> CardSize:
    if device.type != "cuda":
        return INTERPRETED_CARD
    found = torch.cuda.get_device_properties(device)
    return CardSize(found.multi_processor_count, found.L2_cache_size)
