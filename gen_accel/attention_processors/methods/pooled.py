"""Options of block methods that add the blocks left out to the softmax, pooled."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from gen_accel.plan import Centre, Rest, RestOrder, Slots

if TYPE_CHECKING:
    from gen_accel.kernels.rest_cost import Orders

Pool = Literal["means"]
Around = Literal["query", "key", "auto"]
Order = RestOrder | Literal["auto"]


def rest_of(
    rest: Pool | None, centre: Centre = "query", order: Order = "auto", *, flat: bool = False
) -> Rest | None:
    """Build the `Rest` of a plan from a method's options `rest`, `centre` and `order`.

    Args:
        flat: blocks are runs of tokens, or lie within a frame. Their queries are too far from
            their mean for the second order, which "auto" otherwise is around queries.

    Raises:
        ValueError: an unknown value, an order that the centre does not have, or options without a
            rest.
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
    """Resolve the order "auto"; other orders are returned as they are."""
    if order != "auto":
        return order
    if centre == "key":
        return "zeroth"
    return "first" if flat else "second"


def orders_around(order: Order, *, flat: bool) -> "Orders":
    """Resolve an order around each centre."""
    from gen_accel.kernels.rest_cost import Orders

    return Orders(order_around("query", order, flat=flat), order_around("key", order, flat=flat))


def centre_of_call(
    centre: Around, orders: "Orders", q: Tensor, slots: Slots, entries: int | None
) -> Centre:
    """Resolve the centre of a call. On GPUs "auto" is the faster one for the same quality, by a
    model of products and bytes; elsewhere it is "query".

    Nothing waits for the device.

    Args:
        orders: the order of the rest around each centre.
        q: (B, H, N, D).
        slots: the layout of the tokens in blocks.
        entries: the most pairs of blocks that a head keeps. None: this depends on scores on the
            device; then "auto" is "query".
    """
    if centre != "auto":
        return centre
    if entries is None or q.device.type != "cuda":
        return "query"
    B, H, N, D = q.shape
    blocks = slots.block_q, slots.block_k
    pairs = (len(slots.slots) // blocks[0]) * (len(slots.slots) // blocks[1])
    from gen_accel.kernels.rest_cost import Problem, centre_of

    problem, density = Problem(B * H, N, D, *blocks), min(entries / pairs, 1.0)
    return centre_of(problem, density, q.device, orders)
