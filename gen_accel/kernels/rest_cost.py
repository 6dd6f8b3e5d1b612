"""Cost of the rest of a plan on a device, by a model of products and bytes, and the cheaper centre
for it.

A kernel takes the longest of its products, its bytes from memory and its bytes through the last
cache, plus a moment to start. With N tokens and head dim D, Kq query and Kk key blocks:

    kept          4 density N N D products; K and V once from memory, once a query block from cache
    around keys   4 N Kk D products; K and V once, the output, which the kept keys go on from,
                  written and read; a start for the common key of a head, as around queries
    around queries  the same, and 6 Kq N D for pooling, whose 2 Kq Kk D numbers are written and
                  read again in the same launch, in chunks that the cache holds or, if they must be
                  larger to fill the card, in memory
    first order   4 N D D, to make a slope of K and V and, with the columns, to apply it

Nothing here is measured: rates are from the makers' data sheets, times the share of them that
attention reaches. A device without a row is judged by its products alone.
"""

import math
from typing import NamedTuple

import torch

from gen_accel.kernels.triton import configs
from gen_accel.plan import Centre, RestOrder

MULTIPLY_ADD = 2  # operations


class KernelRates(NamedTuple):
    """Rates of a card: operations a second of attention in 16 bits; bytes a second from and to
    memory, and through the last cache; seconds until a further kernel runs; and its size."""

    flops: float
    memory: float = math.inf
    cache: float = math.inf
    start: float = 0.0
    size: configs.CardSize = configs.INTERPRETED_CARD


# Half of the products on paper, of RTX cards nine tenths and more, which FlashAttention-2 is
# published to reach on a 4090; four fifths of the bytes; for caches, measurements by others of the
# same generation, to a factor of 1.5 or so. In order: A100, H100, B200; RTX 3090, 4090, 5090;
# MI300X.
CARDS = {
    "sm_80": KernelRates(156e12, 0.8 * 1.56e12, 4.0e12, 3e-6, configs.CardSize(108, 40 << 20)),
    "sm_90": KernelRates(495e12, 0.8 * 3.35e12, 5.5e12, 3e-6, configs.CardSize(132, 50 << 20)),
    "sm_100": KernelRates(1125e12, 0.8 * 8.0e12, 10e12, 3e-6, configs.CardSize(148, 126 << 20)),
    "sm_86": KernelRates(64e12, 0.8 * 0.94e12, 2.5e12, 3e-6, configs.CardSize(82, 6 << 20)),
    "sm_89": KernelRates(165e12, 0.8 * 1.01e12, 4.5e12, 3e-6, configs.CardSize(128, 72 << 20)),
    "sm_120": KernelRates(200e12, 0.8 * 1.79e12, 6.0e12, 3e-6, configs.CardSize(170, 96 << 20)),
    "gfx942": KernelRates(650e12, 0.8 * 5.3e12, 10e12, 5e-6, configs.CardSize(304, 4 << 20)),
}
UNKNOWN = KernelRates(1e12)  # only ratios of its times are used

# Factor by which a plan with mean keys needs more density to come as near to dense attention as a
# plan with mean queries, by the order of the mean queries; in PSNR of whole clips of the demo
# model. Zeroth, four prompts, blocks of 128 queries: 1.2 to 1.4 at density 0.1, more than 2 at
# 0.2. Second, six prompts, blocks of 64: 1.8 at 0.1, and no density up to 0.2 is enough at 0.2.
WORTH: dict[RestOrder, float] = {"zeroth": 1.3, "first": 1.3, "second": 1.7}


class Orders(NamedTuple):
    """Order of the rest around mean queries, and around mean keys."""

    query: RestOrder = "second"
    key: RestOrder = "zeroth"


AUTO = Orders()  # orders of methods whose blocks are boxes


class Problem(NamedTuple):
    """Sizes of one call: heads of all samples, tokens, head dim, slots of a query and of a key
    block, bytes of a number."""

    heads: int
    tokens: int
    dim: int
    block_q: int = 128
    block_k: int = 64
    size: int = 2

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of query and key blocks, Kq and Kk."""
        return -(-self.tokens // self.block_q), -(-self.tokens // self.block_k)

    @property
    def one(self) -> int:
        """Bytes of one of q, k and v."""
        return self.heads * self.tokens * self.dim * self.size


class KernelWork(NamedTuple):
    """Work of one kernel, or of all chunks of it: operations, bytes from and to memory, bytes
    through the cache, launches."""

    flops: float
    memory: float
    cache: float
    launches: int = 1


COMMON = KernelWork(0, 0, 0)  # reads a few keys of each head


def kept(problem: Problem, density: float) -> list[KernelWork]:
    heads, N, D = problem[:3]
    flops = 2 * MULTIPLY_ADD * density * heads * N * N * D
    return [KernelWork(flops, 4 * problem.one, 2 * problem.blocks[0] * density * problem.one)]


def around_keys(problem: Problem) -> list[KernelWork]:
    """List the work around mean keys: the common keys, the means of k, of v, and the columns."""
    means = KernelWork(0, problem.one, problem.one)
    share = problem.blocks[0] / problem.block_k  # of mean keys that all query blocks read
    return [COMMON, means, means, _columns(problem, 2 * problem.one * share)]


class Pooling(NamedTuple):
    """How keys are pooled around mean queries: mean queries that pool a key block together;
    whether the cache holds the pairs that exist at once."""

    rows: int = 64
    cached: bool = True


def pooling(problem: Problem, arch: str) -> Pooling:
    """How the Triton kernels pool in 16 bits on an architecture.

    Args:
        arch: as in `dearer`.
    """
    if arch not in CARDS:
        return Pooling()
    (Kq, Kk), D, size = problem.blocks, problem.dim, CARDS[arch].size
    given = configs.turns(arch, D, torch.bfloat16, problem.block_q, problem.block_k)
    rows, pair = configs.group(given[0], Kq), 2 * Kk * D * problem.size
    groups = configs.groups_in_turns(size, given, problem.block_q, problem.blocks, pair)
    groups = min(problem.heads * math.ceil(Kq / rows), configs.ROOMS * groups)
    return Pooling(rows, groups * rows * pair <= size.cache)


def around_queries(problem: Problem, pooling: Pooling) -> list[KernelWork]:
    """List the work around mean queries: the common keys; the means of q; pooling; the columns."""
    heads, N, D = problem[:3]
    Kq, _ = problem.blocks
    pairs = pooled_bytes(problem)
    flops = 3 * MULTIPLY_ADD * heads * Kq * N * D
    reads = 2 * problem.one * math.ceil(Kq / pooling.rows)
    memory = 0 if pooling.cached else pairs
    pool = KernelWork(flops, 2 * problem.one + memory, reads + pairs)
    columns = _columns(problem, pairs)
    columns = columns._replace(memory=columns.memory + memory, launches=0)
    means = KernelWork(0, problem.one, problem.one)
    return [COMMON, means, pool, columns]


def first_order(problem: Problem) -> list[KernelWork]:
    """List the work that the first order adds to either centre: the slope in parts, their sum, and
    its product with each query, of the kernel over the columns. K is read once more from the cache
    for means, and so is the slope for each query block."""
    heads, N, D = problem[:3]
    flops = MULTIPLY_ADD * heads * N * D * D
    one = problem.one
    rows = configs.part_blocks(D, problem.block_k) * problem.block_k
    parts = 4 * heads * D * D * math.ceil(N / rows)
    slopes = problem.blocks[0] * heads * D * D * problem.size
    return [
        KernelWork(flops, 2 * one + parts, 3 * one + parts),
        KernelWork(0, parts, parts, launches=2),
        KernelWork(flops, 0, slopes, launches=0),
    ]


def second_order(problem: Problem) -> list[KernelWork]:
    """List the work that the second order adds to the first one around queries: the facts, less
    what they replace, and the pooled keys once more through the cache."""
    means, (parts, total, _) = KernelWork(0, problem.one, problem.one), first_order(problem)
    # The sums of a head have the common key, for which the lower orders launch a kernel.
    replaced = means, parts, total._replace(launches=total.launches + COMMON.launches)
    queries, keys, heads, weighed = facts(problem)
    less = [_less(*two) for two in zip((queries, keys, heads), replaced, strict=True)]
    return [*less, weighed, KernelWork(0, 0, pooled_bytes(problem) / 2, launches=0)]


def _less(work: KernelWork, other: KernelWork) -> KernelWork:
    made = (own - others for own, others in zip(work[:3], other[:3], strict=True))
    return KernelWork(*made, launches=work.launches - other.launches)


def facts(problem: Problem) -> list[KernelWork]:
    """List the work of the facts of blocks: over q; over k and v, with the parts of the slope;
    the sums of a head; and over q and k once more. Rows of q come again from the cache, and so do
    those of longer blocks of k and v than a tile. Numbers of a block are few."""
    parts, total, _ = first_order(problem)
    again = 2 * problem.one if problem.block_k > configs.FACTS[128].tile else 0
    return [
        KernelWork(0, problem.one, 2 * problem.one),
        parts._replace(cache=parts.memory + again),
        total._replace(launches=1),
        KernelWork(0, 2 * problem.one, 2 * problem.one),
    ]


def pooled_bytes(problem: Problem) -> int:
    """Bytes of the keys and values of all pairs, which never exist at once."""
    Kq, Kk = problem.blocks
    return 2 * problem.heads * Kq * Kk * problem.dim * problem.size


def _columns(problem: Problem, cache: float) -> KernelWork:
    heads, N, D = problem[:3]
    flops = 2 * MULTIPLY_ADD * heads * N * problem.blocks[1] * D
    # q, and the output, which the kept keys read
    return KernelWork(flops, 3 * problem.one, cache)


def seconds(works: list[KernelWork], card: KernelRates) -> float:
    return sum(
        max(work.flops / card.flops, work.memory / card.memory, work.cache / card.cache)
        + work.launches * card.start
        for work in works
    )


def beyond_zeroth(problem: Problem, order: RestOrder) -> list[KernelWork]:
    """List the work that an order adds to the zeroth."""
    more = [] if order == "zeroth" else first_order(problem)
    return [*more, *second_order(problem)] if order == "second" else more


def dearer(problem: Problem, arch: str, orders: Orders = AUTO) -> float:
    """Extra seconds of pooling around mean queries, over pooling around mean keys.

    Args:
        arch: a row of CARDS; another name is an unknown card.
    """
    card = CARDS.get(arch, UNKNOWN)
    queries = around_queries(problem, pooling(problem, arch))
    queries += beyond_zeroth(problem, orders.query)
    keys = around_keys(problem) + beyond_zeroth(problem, orders.key)
    return seconds(queries, card) - seconds(keys, card)


def even_density(problem: Problem, arch: str, orders: Orders = AUTO) -> float:
    """Density from which mean queries are the faster way to the same quality: there their extra
    cost equals the cost of the extra keys that mean keys would need, `WORTH - 1` times the kept
    keys.

    Args:
        arch: as in `dearer`.
    """
    card = CARDS.get(arch, UNKNOWN)
    of_one = seconds(kept(problem, 1.0), card._replace(start=0.0))
    return dearer(problem, arch, orders) / ((WORTH[orders.query] - 1) * of_one)


def centre_of(
    problem: Problem, density: float, device: torch.device, orders: Orders = AUTO
) -> Centre:
    """Centre that "auto" takes for a plan of this density, in (0, 1]."""
    arch = configs.architecture(device)
    return "query" if density >= even_density(problem, arch, orders) else "key"
