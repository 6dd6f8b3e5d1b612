"""Work and memory of a call, counted on the meta device, which computes nothing.

A call is run with tensors that have shapes and no values, which takes a second for a model of any
size. Counted are FLOPs of matrix products and convolutions, FLOPs of attention, the bytes that all
other operators read and write, and the most bytes that are alive at a time. Attention is counted
as a fused kernel runs it: its scores are never in memory.

Not counted: scratch memory within an operator, what an allocator rounds up to or keeps, and the
weights, which are there before the call.
"""

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gen_accel.attention_processors.families.decoders import parts_of
from gen_accel.measure.cost.model import ComponentSize, Subject, cast
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import ModelMixin

BACKWARD = 2.5  # products of attention's backward pass over those of its forward pass
FEW, MORE = 5, 8  # latent frames at which an autoencoder is traced
ONE_BY_ONE = 3  # the same for an autoencoder that decodes latent frames one by one
MOST_TRACED = 64  # traces that a process remembers

Args = tuple[Any, ...]  # of an operator
Kwargs = Mapping[str, Any]

_TRACED: dict[Hashable, "Work | None"] = {}


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
        sparse: FLOPs of the attention of a method.
    """

    products: float
    attention: float
    moved: float
    peak: int = 0
    at_attention: int = 0
    longest: int = 0
    sparse: float = 0.0

    def extended(self, least: "Work", more: "Work", times: float) -> "Work":
        """Add `times` the work of `more` beyond `least`; memory is the maximum."""
        return Work(
            products=self.products + times * (more.products - least.products),
            attention=self.attention + times * (more.attention - least.attention),
            moved=self.moved + times * (more.moved - least.moved),
            peak=max(self.peak, more.peak),
            at_attention=max(self.at_attention, more.at_attention),
            longest=max(self.longest, more.longest),
        )


def traced(call: Callable[[], object]) -> Work:
    """Run `call`, whose tensors are on the meta device, and count its work."""
    memory = _Memory()
    attention = _AttentionCount(memory)
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


def step_work(subject: Subject, grid: VideoShape, batch: int) -> Work | None:
    """Trace one call of the transformer; None if its family cannot make the arguments.

    Equal blocks cost the same, so that of each list of blocks one and two are traced.
    """
    model = subject.model
    if not subject.family.serves("traced calls"):
        return None
    given = subject.family.inputs(model, grid, subject.text or 0, batch)
    lists = {
        name: blocks
        for name, blocks in model.named_children()
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 2 and are_alike(blocks)
    }

    def at(**lengths: int) -> Work:
        try:
            for name, blocks in lists.items():
                setattr(model, name, blocks[: lengths.get(name, 1)])
            return traced(lambda: model(**given, return_dict=False))
        finally:
            for name, blocks in lists.items():
                setattr(model, name, blocks)

    def trace() -> Work | None:
        try:
            whole = least = at()
            for name, blocks in lists.items():
                whole = whole.extended(least, at(**{name: 2}), len(blocks) - 1)
        except Exception:  # a class of the family that takes more than these arguments
            return None
        return whole

    about = type(model), repr(subject.config), subject.text, next(model.parameters()).dtype
    return remembered(("step", *about, grid, batch), trace)


def are_alike(blocks: nn.ModuleList) -> bool:
    """Whether all blocks have parameters of the same names and shapes."""
    first = [(name, value.shape) for name, value in blocks[0].named_parameters()]
    return all(
        [(name, value.shape) for name, value in block.named_parameters()] == first
        for block in blocks
    )


def decoding(
    vae: ComponentSize, subject: Subject, grid: VideoShape, dtype: torch.dtype
) -> Work | None:
    """Trace the decoding as `pipelines.generation.decode` does it: in parts if the family can,
    else as a whole; None if that is unknown."""
    return _autoencoder("decode", vae.model, subject, grid, dtype)


def encoding(
    vae: ComponentSize, subject: Subject, grid: VideoShape, dtype: torch.dtype
) -> Work | None:
    """Trace the encoding of a clip as a whole, as caching does it; None if that is unknown."""
    return _autoencoder("encode", vae.model, subject, grid, dtype)


def _autoencoder(
    way: str, model: "ModelMixin | None", subject: Subject, grid: VideoShape, dtype: torch.dtype
) -> Work | None:
    """Trace an autoencoder once at each size, which takes most of a forecast: at two lengths, from
    which longer clips are extrapolated."""
    if model is None:
        return None
    cast(model, dtype)
    if subject.family.generation.tiled:
        model.enable_tiling()
    kind, few, more, parts = type(model).__name__, FEW, MORE, None
    if way == "decode" and kind == subject.family.generation.autoencoder:
        parts = parts_of(model)
        if parts is not None and kind == "AutoencoderKLWan":
            few, more = ONE_BY_ONE, ONE_BY_ONE + 1
    frames, rows, columns = (n * p for n, p in zip(grid.grid, subject.patch, strict=True))

    def at(length: int) -> Work:
        if way == "encode":
            count = subject.frames(-(-length // subject.patch[0]))
            size = count, subject.spatial * rows, subject.spatial * columns
            x = torch.zeros(1, 3, *size, dtype=dtype, device="meta")
            return traced(lambda: model.encode(x, return_dict=False))
        channels = model.config.get("z_dim") or model.config.get("latent_channels")
        z = torch.zeros(1, channels, length, rows, columns, dtype=dtype, device="meta")
        if parts is None:
            return traced(lambda: model.decode(z, return_dict=False))

        decode = parts

        def drain() -> None:
            for _ in decode(model, [z]):  # one part is held while the next is made, as in decoding
                pass

        return traced(drain)

    def trace() -> Work | None:
        try:
            if frames <= more:
                return at(frames)
            short, longer = at(few), at(more)
        except Exception:  # an autoencoder that takes more than this
            return None
        times = (frames - few) / (more - few)
        peak = short.peak + times * (longer.peak - short.peak)  # grows if coded as a whole
        if way == "encode":
            return replace(longer, peak=round(peak))
        return replace(short.extended(short, longer, times), peak=round(max(peak, short.peak)))

    scales = subject.patch, subject.spatial, subject.temporal
    key = (way, type(model), repr(model.config), subject.family, *scales, grid.grid, dtype)
    return remembered(key, trace)


def remembered(key: Hashable, trace: Callable[[], Work | None]) -> Work | None:
    """Return the trace under a key, made once in a process."""
    if key not in _TRACED:
        while len(_TRACED) >= MOST_TRACED:
            _TRACED.pop(next(iter(_TRACED)))
        _TRACED[key] = trace()
    return _TRACED[key]


class _Memory(TorchDispatchMode):
    """Follows each storage from the operator that makes it to the end of its last tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.moved = 0.0
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {one.untyped_storage()._cdata for one in given}
        new = sum(self._follow(one, known) for one in tree_leaves(made) if isinstance(one, Tensor))
        self.peak = max(self.peak, self.alive)
        self._count(function._overloadpacket, args, kwargs, made, given, new)
        return made

    def _count(
        self,
        packet: OpOverloadPacket,
        args: Args,
        kwargs: Kwargs,
        made: object,
        given: list[Tensor],
        new: int,
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


class _AttentionCount(TorchFunctionMode):
    """Replaces attention by its output, and counts what it would have cost."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.flops = 0.0
        self.most = self.longest = 0
        self.memory = memory

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value")
        q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.flops += _attention_flops(q, k, v, back=False)
        if q.numel() >= self.longest:
            self.most = max(self.most, self.memory.alive)
            self.longest = q.numel()
        return out


@dataclass(frozen=True)
class Segment:
    """A piece of a call, in the order of its operators.

    Args:
        before, after: bytes alive at its two ends, of what the call itself made.
        work: its peak is the most bytes alive in between; attention is the model's own.
    """

    name: str
    before: int
    after: int
    work: Work


class Timeline(_Memory):
    """Follows the memory and the work of a call in named segments, backward passes too.

    Unlike `traced` it runs attention itself, so that the tensors must have values or be fake.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attended = self.thinned = 0.0
        self.segments: list[Segment] = []
        self._name = ""
        self._at = self._marks()
        self._high = 0

    def begin(self, name: str) -> None:
        """End the segment under way and begin another one; "" for none."""
        now = self._marks()
        if self._name:
            products, attended, moved, thinned = (
                after - before for before, after in zip(self._at[1:], now[1:], strict=True)
            )
            work = Work(products, attended, moved, self._high, sparse=thinned)
            self.segments.append(Segment(self._name, int(self._at[0]), self.alive, work))
        self._name, self._at, self._high = name, now, self.alive

    def attend(self, q: Tensor, k: Tensor, v: Tensor, share: float, *, back: bool) -> None:
        """Count the attention of a method, of a share of all pairs of q, k and v, (..., N, D)."""
        self.thinned += share * _attention_flops(q, k, v, back=back)

    def _marks(self) -> tuple[float, float, float, float, float]:
        return self.alive, self.products, self.attended, self.moved, self.thinned

    def _follow(self, tensor: Tensor, known: set[int]) -> int:
        size = super()._follow(tensor, known)
        self._high = max(self._high, self.alive)
        return size

    def _count(
        self,
        packet: OpOverloadPacket,
        args: Args,
        kwargs: Kwargs,
        made: object,
        given: list[Tensor],
        new: int,
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
