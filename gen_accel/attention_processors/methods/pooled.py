"""The option of block methods by which what they leave out comes back, pooled."""

from typing import Literal

from torch import Tensor

from gen_accel.kernels.rest_cost import Orders, Problem, centre_of
from gen_accel.plan import Centre, Rest, RestOrder, Slots

Pool = Literal["means"]
Around = Literal["query", "key", "auto"]
Order = RestOrder | Literal["auto"]


def rest_of(
    rest: Pool | None, centre: Centre = "query", order: Order = "auto", *, flat: bool = False
) -> Rest | None:
    """Rest of a plan, by the options `rest`, `centre` and `order` of a method.

    Args:
        flat: blocks are runs of tokens, or lie within a frame: their queries are too far from
            their mean for the second order, which the order "auto" is else around queries.

    Raises:
        ValueError: none of their values, an order of the other centre, or options of a rest that
            is not asked for.
    """
    made = Rest(centre, order_around(centre, order, flat=flat))
    if rest not in (None, "means"):
        raise ValueError(f"rest must be None or 'means', got {rest!r}")
    if rest is None and (centre, order) != ("query", "auto"):
        raise ValueError(
            f"centre and order are for rest='means', got centre={centre!r} and order={order!r} "
            "with rest=None"
        )
    return None if rest is None else made


def order_around(centre: Centre, order: Order, *, flat: bool) -> RestOrder:
    """Order that "auto" stands for; any other is itself."""
    if order != "auto":
        return order
    if centre == "key":
        return "zeroth"
    return "first" if flat else "second"


def orders_around(order: Order, *, flat: bool) -> Orders:
    """What an option comes to around each centre."""
    return Orders(order_around("query", order, flat=flat), order_around("key", order, flat=flat))


def centre_of_call(
    centre: Around, orders: Orders, q: Tensor, slots: Slots, entries: int | None
) -> Centre:
    """Centre of a call: "auto" is, on GPUs, the one that a model of their
    products and bytes calls faster for the same quality; elsewhere it is "query".

    Nothing waits for the device.

    Args:
        orders: of the rest around each.
        q: (B, H, N, D).
        slots: how its tokens lie in blocks.
        entries: how many pairs of blocks a head keeps at most. None: their scores alone tell,
            which lie on the device; then "auto" is "query".
    """
    if centre != "auto":
        return centre
    if entries is None or q.device.type != "cuda":
        return "query"
    B, H, N, D = q.shape
    blocks = slots.block_q, slots.block_k
    pairs = (len(slots.slots) // blocks[0]) * (len(slots.slots) // blocks[1])
    problem, density = Problem(B * H, N, D, *blocks), min(entries / pairs, 1.0)
    return centre_of(problem, density, q.device, orders)
