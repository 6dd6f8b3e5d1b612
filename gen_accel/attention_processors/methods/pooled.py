"""The option of block methods by which what they leave out comes back, pooled."""

from typing import Literal

from torch import Tensor

from gen_accel.kernels.rest_cost import Problem, centre_of
from gen_accel.plan import Centre, Rest, RestOrder, Slots

Pool = Literal["means"]
Around = Literal["query", "key", "auto"]


def rest_of(
    rest: Pool | None, centre: Centre = "query", order: RestOrder = "zeroth"
) -> Rest | None:
    """Rest of a plan, by the options `rest`, `centre` and `order` of a method.

    Raises:
        ValueError: none of their values, a first order around queries, or options of a rest that
            is not asked for.
    """
    made = Rest(centre, order)
    if rest not in (None, "means"):
        raise ValueError(f"rest must be None or 'means', got {rest!r}")
    if rest is None and made != Rest():
        raise ValueError(
            f"centre and order are for rest='means', got centre={centre!r} and order={order!r} "
            "with rest=None"
        )
    return None if rest is None else made


def centre_of_call(centre: Around, q: Tensor, slots: Slots, entries: int | None) -> Centre:
    """Centre of a call: "auto" is, on GPUs, the one that a model of their
    products and bytes calls faster for the same quality; elsewhere it is "query".

    Nothing waits for the device.

    Args:
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
    return centre_of(Problem(B * H, N, D, *blocks), min(entries / pairs, 1.0), q.device)
