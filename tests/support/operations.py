"""What a device is asked to do: operations of torch as they reach it, and which it may not do."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What makes or names memory without work of the device.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
}
FREE |= {"_unsafe_view"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}
# From the documentation of torch.use_deterministic_algorithms, of what attention might use: those
# that raise on CUDA, and those whose results depend on an order there unless it is on.
RAISE = {"put_", "histc", "bincount", "median", "kthvalue", "scatter_reduce", "scatter_reduce_"}
BY_ORDER = {"scatter_add", "scatter_add_", "index_add", "index_add_", "index_put_", "cumsum"}


class Operations(TorchDispatchMode):
    """Note the names of operations inside, each of which launches something on a device.

    Raises:
        AssertionError: one that waits for the device, or of which torch's documentation says that
            its result differs from run to run there. Whole numbers may be added in any order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS | RAISE, f"{func} waits, or raises"
        out = func(*args, **(kwargs or {}))
        if name in BY_ORDER:
            assert not torch.is_floating_point(args[0]), f"{func} of {args[0].dtype}"
        if name not in FREE and not func.is_view:
            self.names.append(name)
        return out
