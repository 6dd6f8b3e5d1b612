"""Method: what to compute. Its contract, with each optional part and its default.

A method is an instance with `method(q, k, v, *, video, kernel) -> Tensor`, usually of a frozen
dataclass, whose fields are its options. With a call and a `plan` it runs everywhere.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from gen_accel.plan import Plan
from gen_accel.room import check_room
from gen_accel.video import VideoShape


class Method(Protocol):
    """Call that every method has. Its optional parts are in `MethodParts`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        video: VideoShape,
        kernel: Callable[[Tensor, Tensor, Tensor, Plan], Tensor],
    ) -> Tensor:
        """Compute attention over the pairs that the method keeps.

        Args:
            q, k, v: (B, H, N, D), N == video.tokens, video first, text last.
            kernel: runs a plan on q, k and v, at the scale of the model: a
                `gen_accel.kernels.Runner`, whose `name` the user asked for. A method that computes
                by itself need not call it; such a method runs in eager mode and is refused inside
                `torch.compile`.

        Returns:
            (B, H, N, D) in q's dtype.
        """
        ...


class Memory(Protocol):
    """State of a method from one denoising step of a run to the next, empty when made by the part
    `memory`: one for each layer and for each call in a step, since guidance makes two calls.

    The owner is whoever runs the model, such as attached attention; the method itself holds no
    state. At dense steps `learn` receives the output of dense attention; at the steps that follow,
    the method's call receives the memory as `memory=`. A call that needs a gradient gets none.
    The memory is dropped at a new run, at another grid, batch, dtype or device, after an exception
    in the model, and when the method is detached.

    Attributes:
        every: steps after which to learn anew; 0: never in the same run.
        refuses_training: why no gradient can do without the memory; "": one can.
        for_less: advice for a memory that is too large, as the end of an error.
    """

    every: int
    refuses_training: str
    for_less: str

    def learn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        *,
        video: VideoShape,
        kernel: Callable[[Tensor, Tensor, Tensor, Plan], Tensor],
        first: Self | None,
    ) -> None:
        """Store what the following steps need.

        Args:
            q, k, v: (B, H, N, D), as for the call of the method.
            dense: (B, H, N, D), output of dense attention.
            first: memory of the first call of this step; None in that call itself.
        """
        ...

    def size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        """Bytes on the model's device after `learn` on q of shape (B, H, N, D), without anything
        as small as a plan."""
        ...

    def host_size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        """Bytes in the memory of the host, if the device has its own; arguments as in `size`."""
        ...


class MethodParts(NamedTuple):
    """Optional parts of a method. A missing part is None, or the default given here.

    Args:
        plan: (video, device) -> Plan, the pattern on a grid. For a pattern that depends on q and
            k, the plan for smooth random ones, for pictures and estimates.
        plan_for: (q, k, *, video, scale, kernel) -> Plan, for a method whose pattern depends on q
            and k. scale multiplies q k^T, None for 1 / sqrt(D); kernel is a kernel's name, "auto"
            by default. A choice that does not depend on them takes them too.
        for_layer: (layer) -> method of one layer, counted from 0. Default: itself.
        at: (progress) -> method at one step, from 0 at the first sparse step to 1 at the last; 0
            where the number of steps is unknown. Takes the parameters that the method has.
            Default: itself.
        at_step: (step, steps) -> method at a denoising step, counted from 0 whatever the schedule
            keeps dense, of so many; steps is None where unknown. A method has `at` or `at_step`.
            Default: itself.
        for_heads: (heads) -> method of a process that holds this slice of a layer's heads.
            Default: itself.
        together: (methods) -> one method that gives each head its own of `methods`, one a head;
            None where it cannot. Their blocks are then chosen at once.
        for_device: (device) -> method with device-dependent options filled in, as saved to files.
            Default: itself.
        unfit: (model, layer, heads) -> why a layer of so many heads, in a transformer of that
            class, cannot run it; "": it can. Default: any layer can.
        within: (video, whole) -> method for a layer whose grid is smaller than the model's.
            Default: itself.
        tiled: (tile) -> method whose blocks are that box, (frames, rows, columns), or one of
            several for each layer, for a method that leaves the box to `calibrate`.
        tile_tokens: fewest tokens of that box, up to twice as many; 0: already chosen.
        branch: (heads, dim) -> nn.Module, the initial parameters of one layer. The call
            then takes `branch=`. A branch may have `silent() -> bool`: see `is_silent`.
        memory: () -> Memory, an empty one, kept from step to step. The call then takes
            `memory=`, and runs without where there is none. A method has a branch or a memory.
        parts: (q, k, v, *, video, kernel) -> (O_s, O_l), as `calibrate` fits a branch to.
        density: (video) -> share of token pairs that are kept. Default: of `plan`.
        block_mask: (video) -> (Kq, Kk) bool, key blocks of each query block. Default: of `plan`.
        is_dense: whether the method stands for the model's own attention, which then runs.
        thins_by_time: whether all pairs of a single frame are kept.
        needs_all_heads: why a process that holds some of the heads cannot run it; "": it can.
        least_grid: smallest (frames, rows, columns) that can be planned.
        named_layers: layers that the options name, counted from 0; a model without them is
            refused.
    """

    plan: Callable[[VideoShape, torch.device], Plan] | None = None
    plan_for: Callable[..., Plan] | None = None
    for_layer: Callable[[int], Any] | None = None
    at: Callable[[float], Any] | None = None
    at_step: Callable[[int, int | None], Any] | None = None
    for_heads: Callable[[slice], Any] | None = None
    together: Callable[[tuple[Any, ...]], Any] | None = None
    for_device: Callable[[torch.device], Any] | None = None
    unfit: Callable[[str, int, int], str] | None = None
    within: Callable[[VideoShape, VideoShape], Any] | None = None
    tiled: Callable[[Any], Any] | None = None
    branch: Callable[[int, int], nn.Module] | None = None
    memory: Callable[[], Memory] | None = None
    parts: Callable[..., tuple[Tensor, Tensor]] | None = None
    density: Callable[[VideoShape], float] | None = None
    block_mask: Callable[[VideoShape], Tensor] | None = None
    is_dense: bool = False
    thins_by_time: bool = False
    needs_all_heads: str = ""
    least_grid: tuple[int, int, int] = (1, 1, 1)
    tile_tokens: int = 0
    named_layers: tuple[int, ...] = ()

    @property
    def has_plan(self) -> bool:
        return self.plan is not None


# Arguments of each callable part: positional, then keywords.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plan": (("video", "device"), ()),
    "plan_for": (("q", "k"), ("video", "scale", "kernel")),
    "for_layer": (("layer",), ()),
    "at": (("progress",), ()),
    "at_step": (("step", "steps"), ()),
    "for_heads": (("heads",), ()),
    "together": (("methods",), ()),
    "for_device": (("device",), ()),
    "unfit": (("model", "layer", "heads"), ()),
    "within": (("video", "whole"), ()),
    "tiled": (("tile",), ()),
    "branch": (("heads", "dim"), ()),
    "memory": ((), ()),
    "parts": (("q", "k", "v"), ("video", "kernel")),
    "density": (("video",), ()),
    "block_mask": (("video",), ()),
}
CALL = ("q", "k", "v"), ("video", "kernel")  # with a branch, `branch=` too; or `memory=`
LEARN = ("q", "k", "v", "dense"), ("video", "kernel", "first")
SIZE = ("shape", "itemsize"), ()
# Lower bounds in bytes. Of a plan: the place of a token, to and fro, and a pair of blocks. Of
# smooth q and k: a token, with the waves and the noise that make it.
PLACE, MOST_BLOCK, QK = 8, 256, 5 * 64 * 4
# A public name this similar to a part that a method lacks counts as a misspelling of that part.
NEAR = 0.85

_checked: set[type] = set()


def parts_of(method: Any) -> MethodParts:
    """Read the optional parts of `method`, bound to it."""
    defaults = MethodParts._field_defaults
    return MethodParts._make(getattr(method, name, default) for name, default in defaults.items())


def check_method(method: Any) -> None:
    """Raise ValueError, in one line, for a broken contract: a class, an object that cannot be
    called as a method is, a part of a wrong type or with other arguments, a misspelt part."""
    if isinstance(method, type) or not callable(method) or isinstance(method, nn.Module):
        module = ", a module: its parameters belong in branch(heads, dim)"
        hint = module if isinstance(method, nn.Module) else ""
        shown = type(method).__name__ if hint else repr(method)
        raise ValueError(f"method must be an instance such as Radial(), got {shown}{hint}")
    if torch.compiler.is_compiling():
        return
    kind = type(method)
    own = any(callable(value) or name in MethodParts._fields for name, value in _own(method))
    # The class of a partial or a bound method does not show the function that it calls.
    lasting = not own and inspect.isfunction(inspect.getattr_static(kind, "__call__", None))
    name, parts = _name(method), parts_of(method)
    for part, value in zip(MethodParts._fields, parts, strict=True):
        if kind not in _checked or not callable(value):
            _check_part(name, part, value)
    try:
        hash(method)
    except TypeError as error:
        raise ValueError(
            f"{name} must be hashable, as an instance of a frozen dataclass is: {error}"
        ) from None
    if lasting and kind in _checked:
        return
    positional, keywords = CALL
    keywords = keywords if parts.branch is None else (*keywords, "branch")
    if parts.memory is not None:
        _check_memory(name, parts)
        keywords = (*keywords, "memory")
    _check_call(name, "__call__", method, positional, keywords)
    _check_names(name, method)
    if lasting:
        _checked.add(kind)


def check_class(kind: Any, name: str) -> None:
    """Raise ValueError, in one line, for anything but a class of methods, called `name`.

    Its call must name `video` and `kernel`, so that a file that says "module:Class" reaches no
    class of another purpose. An instance is checked by `check_method`.
    """
    bases = kind.__mro__ if isinstance(kind, type) else ()
    call = next((vars(base)["__call__"] for base in bases if "__call__" in vars(base)), None)
    if call is None or issubclass(kind, nn.Module):
        wanted = "a class with __call__(self, q, k, v, *, video, kernel)"
        raise ValueError(f"method {name!r} must be {wanted}, got {kind!r}")
    positional, keywords = CALL
    _check_call(kind.__name__, "__call__", call, ("self", *positional), keywords)
    if not {*keywords} <= {*inspect.signature(call).parameters}:
        raise ValueError(f"__call__ of {kind.__name__} must name {' and '.join(keywords)}")


def layer_method(method: Method, layer: int) -> Any:
    """Method of one layer, for methods that differ from layer to layer."""
    own = parts_of(method).for_layer
    return method if own is None else own(layer)


@lru_cache(maxsize=256)
def method_at(method: Method, progress: float) -> Any:
    """Method of a step, for methods that change over a run: see `at` of `MethodParts`."""
    own = parts_of(method).at
    if own is None:
        return method
    made = own(progress)
    check_method(made)
    return made


def method_at_step(method: Method, step: int, steps: int | None) -> Any:
    """Method of a denoising step, counted from 0: see `at_step` of `MethodParts`."""
    own = parts_of(method).at_step
    return method if own is None else own(step, steps)


def of_heads(method: Method, heads: slice | None) -> Any:
    """Method of a process that holds some heads of a layer; None for all."""
    own = parts_of(method).for_heads
    return method if own is None or heads is None else own(heads)


def check_layers(method: Method, blocks: Collection[int]) -> None:
    """Refuse layers that a model with self-attention in these `blocks` does not have."""
    check_named(f"layers of {_name(method)}", parts_of(method).named_layers, blocks)


def check_named(option: str, named: Collection[int], blocks: Collection[int]) -> None:
    """Raise ValueError where an option names a block that is not in `blocks`."""
    unknown = sorted({*named} - {*blocks})
    if unknown:
        raise ValueError(
            f"{option} must name blocks that attend over the grid, {min(blocks)} to "
            f"{max(blocks)} here, got {', '.join(map(str, unknown))}"
        )


def on_device(method: Method, device: torch.device) -> Any:
    """Method with the defaults of a device filled in, where they differ by device."""
    own = parts_of(method).for_device
    return method if own is None else own(device)


def layers_differ(method: Method) -> bool:
    """Whether layers run another method than `method` itself."""
    return parts_of(method).for_layer is not None and layer_method(method, 0) != method


def branch_of(method: Method, heads: int, dim: int) -> nn.Module | None:
    """Initial parameters of one layer; None for a method that has none."""
    made = parts_of(method).branch
    return None if made is None else made(heads, dim)


def memory_of(method: Method) -> Memory | None:
    """Make an empty memory; None for a method that keeps nothing from step to step."""
    made = parts_of(method).memory
    return None if made is None else made()


def is_silent(branch: nn.Module) -> bool:
    """Whether a branch reports by `silent()` that it adds nothing. Synchronises the device."""
    said = getattr(branch, "silent", None)
    return said is not None and bool(said())


def tiled(method: Method, tile: tuple[int, int, int] | tuple[tuple[int, int, int], ...]) -> Any:
    """Method with blocks of this box, (frames, rows, columns), or with one box for each layer."""
    own = parts_of(method).tiled
    return method if own is None else own(tile)


def within(method: Method, video: VideoShape, whole: VideoShape) -> Any:
    """Method for attention over `video` in a model whose grid is `whole`."""
    own = parts_of(method).within
    return method if own is None else own(video, whole)


def plan_of(method: Method, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
    """Plan of a method, on `device`; ValueError for a method without one, or too large a grid."""
    parts = parts_of(method)
    made = parts.plan
    if made is None:
        raise ValueError(f"{_name(method)} has no plan(video, device)")
    _check_room(method, video, smooth=parts.plan_for is not None)
    return made(video, torch.device(device))


def _check_room(method: Method, video: VideoShape, *, smooth: bool) -> None:
    """Refuse a grid whose plan cannot fit in memory.

    Args:
        smooth: whether q and k are made for the plan.
    """
    tokens = video.tokens
    size = 2 * PLACE * tokens + (tokens // MOST_BLOCK) ** 2
    size += QK * tokens if smooth else 0
    what = f"a plan of {_name(method)} for {video} = {tokens} tokens"
    check_room(what, size, "ask for fewer tokens")


def check_grid(method: Method, video: VideoShape) -> None:
    """Raise ValueError, with the plan's own message, for a method that does not fit the grid."""
    parts = parts_of(method)
    small = any(least > size for least, size in zip(parts.least_grid, video.grid, strict=True))
    if small and parts.has_plan:
        plan_of(method, video)


def density_of(method: Method, video: VideoShape) -> float:
    """Share of token pairs that are kept, in [0, 1]; ValueError without a plan or a density."""
    parts = parts_of(method)
    if parts.density is None and parts.plan is None:
        raise ValueError(f"{_name(method)} has neither plan(video, device) nor density(video)")
    return plan_of(method, video).density if parts.density is None else parts.density(video)


def why_no_graph(method: Method) -> str | None:
    """Say why `method` cannot run inside `torch.compile`; None where it can."""
    if parts_of(method).has_plan:
        return None
    return (
        f"{_name(method)} has no plan(video, device), without which no graph can run it; use the "
        "model uncompiled"
    )


def _name(method: Any) -> str:
    return method.__name__ if inspect.isroutine(method) else type(method).__name__


def _own(method: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of an instance, other than its class's and its options."""
    options = {one.name for one in fields(method)} if is_dataclass(method) else set()
    held = vars(method) if hasattr(method, "__dict__") else {}
    return ((name, value) for name, value in held.items() if name not in options)


def _check_part(kind: str, part: str, value: Any) -> None:
    default = MethodParts._field_defaults[part]
    if part in CALLS:
        if value is None:
            return
        if not callable(value):
            written = ", ".join(CALLS[part][0] + CALLS[part][1])
            raise ValueError(f"{part} of {kind} must be a method {part}({written}), got {value!r}")
        _check_call(kind, part, value, *CALLS[part])
    elif part == "least_grid":
        if not (
            isinstance(value, tuple)
            and len(value) == 3
            and all(isinstance(size, int) and size >= 1 for size in value)
        ):
            raise ValueError(f"{part} of {kind} must be three positive sizes, got {value!r}")
    elif not isinstance(value, type(default)):
        wanted = type(default).__name__
        raise ValueError(f"{part} of {kind} must be a {wanted}, got {value!r}")


def _check_memory(kind: str, parts: MethodParts) -> None:
    assert parts.memory is not None
    if parts.branch is not None:
        raise ValueError(f"{kind} must have a branch or a memory, got both")
    memory: Any = parts.memory()
    name = f"the memory of {kind}"
    for part, wanted in (("every", int), ("refuses_training", str), ("for_less", str)):
        value = getattr(memory, part, None)
        if not isinstance(value, wanted) or value is True or value is False:
            raise ValueError(f"{part} of {name} must be of type {wanted.__name__}, got {value!r}")
    for part, call in (("learn", LEARN), ("size", SIZE), ("host_size", SIZE)):
        value = getattr(memory, part, None)
        if not callable(value):
            written = ", ".join(call[0] + call[1])
            raise ValueError(f"{name} must have {part}({written}), got {value!r}")
        _check_call(name, part, value, *call)


def _check_call(
    kind: str,
    part: str,
    value: Callable,
    positional: tuple[str, ...],
    keywords: tuple[str, ...],
) -> None:
    star = ", *, " if keywords else ""
    must = f"{part} of {kind} must take ({', '.join(positional)}{star}{', '.join(keywords)})"
    try:
        taken = inspect.signature(value)
    except (TypeError, ValueError):  # a callable written in C
        if inspect.isbuiltin(value):
            raise ValueError(f"{must}, it is a builtin") from None
        return
    try:
        taken.bind(*positional, **dict.fromkeys(keywords))
    except TypeError:
        names = ", ".join(map(str, taken.parameters))
        raise ValueError(f"{must}, it takes ({names})") from None


def _check_names(kind: str, method: Any) -> None:
    """Refuse public names, other than options, that look like a part that is missing."""
    options = {one.name for one in fields(method)} if is_dataclass(method) else set()
    there = dir(method)
    missing = {name.replace("_", ""): name for name in MethodParts._fields if name not in there}
    for name in there:
        if name.startswith("_") or name in options or name in MethodParts._fields:
            continue
        plain = name.replace("_", "").lower()
        near = get_close_matches(plain, missing, n=1, cutoff=NEAR)
        if near:
            raise ValueError(
                f"no part of a method is called {name!r}, got {kind}.{name}; did you mean "
                f"{missing[near[0]]!r}? For another purpose choose another name, or one that "
                "begins with _"
            )
