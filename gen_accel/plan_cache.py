"""Cache of plans and layouts, by method and grid, as far as memory allows."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

# Bytes that all functions remember together. A result that takes more is remembered alone, until
# the next one is asked for.
MOST = 512 << 20
# Least bytes that a result takes beside its tensors.
LEAST = 1 << 14

Function = TypeVar("Function", bound=Callable[..., Any])


class PlanCache:
    """Results of functions by their arguments, the least recently used forgotten first.

    A result may grow after it was made, as a plan does when a kernel prepares it, so the sizes of
    all are taken anew when one is added. A forgotten result lives on where it is in use.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return the result known by `key`, which is hashable, or else call `make`."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        made = make()
        with self._lock:
            self._known[key] = made
            self._shrink()
        return made

    def forget(self) -> None:
        """Forget all results."""
        with self._lock:
            self._known.clear()

    def bytes(self) -> int:
        """Bytes of all results together."""
        with self._lock:
            return sum(map(bytes_of, self._known.values()))

    def _shrink(self) -> None:
        sizes = {key: bytes_of(made) for key, made in self._known.items()}
        total = sum(sizes.values())
        while total > self.most and len(self._known) > 1:
            key, _ = self._known.popitem(last=False)
            total -= sizes[key]


PLAN_CACHE = PlanCache(MOST)


def plan_cached(function: Function) -> Function:
    """Make `PLAN_CACHE` remember the results of a function by its arguments, which are positional
    and hashable. torch.compile does not trace it: a graph takes the result as it is."""

    @torch.compiler.disable(reason="a plan is made once for a grid, between two graphs")
    @wraps(function)
    def cached(*args: Any) -> Any:
        return PLAN_CACHE.get((function, *args), lambda: function(*args))

    made: Any = cached
    return made


def bytes_of(result: Any) -> int:
    """Bytes of the tensors that a result holds, each storage once, and `LEAST`."""
    return LEAST + sum(dict(map(_storage, _tensors(result))).values())


def _storage(x: Tensor) -> tuple[int, int]:
    """Identity of a tensor's storage, and its bytes."""
    try:
        storage = x.untyped_storage()
    except NotImplementedError:  # a tensor wrapped by torch.func
        return id(x), x.numel() * x.element_size()
    return storage._cdata, storage.nbytes()


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (tuple, list)):
        for one in held:
            yield from _tensors(one)
    elif isinstance(held, dict):
        yield from _tensors([*held.values()])
    elif is_dataclass(held):
        yield from _tensors(vars(held))
