"""Work and memory of a call, counted on the meta device, where nothing is computed.

A call is run with tensors that have shapes and no values, which takes a second for a model of any
size. Counted are FLOPs of matrix products and convolutions, FLOPs of attention, the bytes that all
other operators read and write, and the most bytes that are alive at a time. Attention is counted
as a fused kernel runs it: its scores are never in memory.

Not counted: scratch memory within an operator, what an allocator rounds up to or keeps, and the
weights, which are there before the call.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BACKWARD = 2.5  # products of attention's backward pass over those of its forward pass


@dataclass(frozen=True)
class Work:
    """Work of one call.

    Args:
        products: FLOPs of matrix products and convolutions.
        attention: FLOPs of both products of all attention.
        moved: bytes that all other operators read and write.
        peak: the most bytes alive at a time, without what was there before the call.
        at_attention: the most bytes alive while an attention runs, its output included.
        longest: elements of the longest query that attention took, all samples and heads.
    """

    products: float
    attention: float
    moved: float
    peak: int
    at_attention: int = 0
    longest: int = 0


def traced(call: Callable[[], Any]) -> Work:
    """Run `call`, whose tensors are on the meta device, and count its work."""
    attention = _Attention()
    memory = _Memory(attention)
    with torch.no_grad(), attention, memory:
        result = call()
    del result
    return Work(
        products=memory.products,
        attention=attention.flops,
        moved=memory.moved,
        peak=memory.peak,
        at_attention=attention.most,
        longest=attention.longest,
    )


class _Attention(TorchFunctionMode):
    """Replaces attention by its output, and counts what it would have cost."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.most = self.longest = 0
        self.memory: _Memory | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value")
        q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.flops += 2.0 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        if self.memory is not None and q.numel() >= self.longest:
            self.most = max(self.most, self.memory.alive)
            self.longest = q.numel()
        return out


class _Memory(TorchDispatchMode):
    """Follows each storage from the operator that makes it to the end of its last tensor."""

    def __init__(self, attention: _Attention) -> None:
        super().__init__()
        attention.memory = self
        self.products = self.moved = 0.0
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {one.untyped_storage()._cdata for one in given}
        new = sum(self._follow(one, known) for one in tree_leaves(made) if isinstance(one, Tensor))
        self.peak = max(self.peak, self.alive)
        self._count(function._overloadpacket, args, kwargs, made, given, new)
        return made

    def _count(
        self, packet: Any, args: Any, kwargs: Any, made: Any, given: list[Tensor], new: int
    ) -> None:
        """Count the work of an operator.

        Args:
            given: its tensors.
            new: bytes that it made.
        """
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=made)
        elif new:
            self.moved += new + sum(one.numel() * one.itemsize for one in given)
        elif packet.__name__.endswith("_"):  # in place
            self.moved += sum(one.numel() * one.itemsize for one in (*given, *given[:1]))

    def _follow(self, tensor: Tensor, known: set[int]) -> int:
        """Follow the storage of a tensor that an operator made; return its bytes, 0 for a view."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in known or key in self._sizes:
            return 0
        size = self._sizes[key] = storage.nbytes()
        self.alive += size
        weakref.finalize(storage, self._end, key)
        return size

    def _end(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


@dataclass(frozen=True)
class Segment:
    """A part of a call, in the order of its operators.

    Args:
        name: of the part.
        before, after: bytes alive at its two ends, of what the call itself made.
        peak: the most bytes alive in between.
        products, attention, moved: as of `Work`; attention is the model's own.
        sparse: FLOPs of the attention of a method.
    """

    name: str
    before: int
    after: int
    peak: int
    products: float
    attention: float
    moved: float
    sparse: float


class Timeline(_Memory):
    """Follows the memory and the work of a call in named segments, backward passes too.

    Unlike `traced` it runs what attention runs, so that the tensors must have values or be fake.
    """

    def __init__(self) -> None:
        attention = _Attention()
        super().__init__(attention)
        self.attended = self.thinned = 0.0
        self.segments: list[Segment] = []
        self._name = ""
        self._at = self._marks()
        self._high = 0

    def begin(self, name: str) -> None:
        """End the segment under way and begin another one; "" for none."""
        before, *counted = self._at
        now = self._marks()
        if self._name:
            work = [b - a for a, b in zip(counted, now[1:], strict=True)]
            self.segments.append(Segment(self._name, before, now[0], self._high, *work))
        self._name, self._at, self._high = name, now, now[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, share: float, *, back: bool) -> None:
        """Count the attention of a method, of a share of all pairs of q, k and v, (..., N, D)."""
        self.thinned += share * _attention_flops(q, k, v, back=back)

    def _marks(self) -> tuple[int, float, float, float, float]:
        return self.alive, self.products, self.attended, self.moved, self.thinned

    def _follow(self, tensor: Tensor, known: set[int]) -> int:
        size = super()._follow(tensor, known)
        self._high = max(self._high, self.alive)
        return size

    def _count(
        self, packet: Any, args: Any, kwargs: Any, made: Any, given: list[Tensor], new: int
    ) -> None:
        if "scaled_dot_product" not in packet.__name__:
            super()._count(packet, args, kwargs, made, given, new)
        elif packet.__name__.endswith("_backward"):
            self.attended += _attention_flops(*args[1:4], back=True)
        elif new:  # not the choice of an implementation
            self.attended += _attention_flops(*args[:3], back=False)


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *, back: bool) -> float:
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return (BACKWARD if back else 1.0) * 2.0 * pairs * (q.shape[-1] + v.shape[-1])
