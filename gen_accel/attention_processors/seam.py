"""The seam with diffusers: a stock processor with its one attention call replaced.

The stock processor projects, normalises and rotates; those parts change from release to release
and are not copied here. Its own code runs, with the name of the attention call bound to ours in a
copy of its globals. Nothing is patched: the stock class, its module and all other instances keep
the original.

Attention and taps are separate: taps, which add to the output, stay while methods are attached and
detached under them.
"""

import inspect
import pickle
import types
from collections.abc import Callable, Hashable, Mapping
from copy import deepcopy
from threading import get_ident
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from gen_accel.parsing import shown


class Call(NamedTuple):
    """One attention call of a stock processor. Tensors are (B, N, H, D).

    Args:
        stock: runs the call as diffusers would have.
        refused: the given arguments that only the stock call takes.
        mask: as given.
        tokens: the number in the processor's first tensor, `hidden_states`. Where text attends
            jointly with video or image, this counts video or image tokens, or all.
        number: the place of the call in this run of the processor.
        parallel: how tokens are sharded; None if this process holds all of q, k and v.
        heads: the heads of the layer in q, k and v; None for all.
        trains: whether a gradient is needed, though none is recorded.
        hidden_states: the processor's first tensor, (B, `tokens`, width), which q, k and v are
            projected from; None unless a method with a gate asks for it.
        gate: what the layer's gate gives for them, (B, `tokens`, H, D), once it is computed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    stock: Callable[[], Tensor]
    refused: list[str]
    mask: Tensor | None = None
    tokens: int = 0
    number: int = 0
    parallel: "Parallel | None" = None
    heads: slice | None = None
    trains: bool = False
    hidden_states: Tensor | None = None
    gate: Tensor | None = None


class Parallel(NamedTuple):
    """Spread of the tokens of a call over processes.

    Args:
        config: diffusers' `ContextParallelConfig`, whose degrees are numbers by now.
        alone: runs the stock call on all tokens, given their q, k, v and mask, for some heads.
    """

    config: Any
    alone: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


# (processor, its call) -> output (B, N, H, D), in a graph.
Traced = Callable[[Any, Call], Tensor]

# (call, its output (B, N, H, D)) -> the output to use instead.
Tap = Callable[[Call, Tensor], Tensor]

# (what the processor returned, *its arguments) -> what to return instead.
Finish = Callable[..., Any]


def _of_stock(name: str) -> property:
    """Make an attribute of the stock processor one of the bound processor, too."""

    def put(self: "BoundProcessor", value: object) -> None:
        setattr(self.stock, name, value)

    return property(lambda self: getattr(self.stock, name), put)


class BoundProcessor:
    """A diffusers attention processor whose attention call goes to `attend`, then through `taps`
    in order. The processor's result goes through `finishes`.

    Args:
        stock: the processor found on the model. It is kept, and put back in the end. In the place
            of a bound one, its stock processor is taken over, with its taps and finishes.
        name: of its attention call, a global of its module with the signature of diffusers'
            `dispatch_attention_fn`, or "F.scaled_dot_product_attention".
        attend: ours.
        alike: processors with an equal value share graphs of torch.compile; with None, none is
            shared. The compiler tells processors apart by their class and attributes, not by code
            bound to other names.
        traced: replaces `attend` in a graph, with the running processor as the first argument. All
            processors that share a graph use the first one's.
        also: what other globals of the stock code are bound to; equal for equal `alike`.
        poses: whether `isinstance` takes it for the stock class, which its model looks for.
    """

    takes_hidden = False  # whether calls carry `hidden_states`

    def __init__(
        self,
        stock: Any,
        name: str,
        attend: Callable[[Call], Tensor],
        alike: Hashable = None,
        traced: "Traced | None" = None,
        *,
        also: Mapping[str, Any] = MappingProxyType({}),
        poses: bool = False,
    ) -> None:
        self.taps: tuple[Tap, ...] = ()
        self.finishes: tuple[Finish, ...] = ()
        if isinstance(stock, BoundProcessor):
            self.taps, self.finishes, stock = stock.taps, stock.finishes, stock.stock
        if isinstance(stock, nn.Module):
            raise ValueError(
                f"{type(stock).__name__} has parameters of its own, which `.to()` and "
                "`state_dict()` would no longer find below another processor; unload it first, "
                "diffusers' image prompts by pipe.unload_ip_adapter()"
            )
        if not calls(stock, name):
            raise ValueError(
                f"{type(stock).__name__} does not call {name}, so its attention cannot be "
                "replaced; put the model's own processors back first, a UNet's by "
                "set_attn_processor(AttnProcessor2_0()), without attention slicing or xformers"
            )
        self.stock, self.name, self._attend = stock, name, attend
        kind = getattr(self, "unbound", type(self))
        key = (kind, type(stock), name, alike)
        found = None if alike is None else _classes.get(key)
        if found is None:
            traced = traced or _without_processor(attend)
            found = _class(kind, type(stock), name, traced, also, poses=poses)
            if alike is not None:
                _classes[key] = found
        self.__class__ = found

    def _copy_taps(self, source: "BoundProcessor", memo: dict) -> None:
        """Copy callable objects. Plain functions are not copied, and act on both models then."""
        self.taps = deepcopy(source.taps, memo)
        self.finishes = deepcopy(source.finishes, memo)

    # diffusers sets these two on the processor; dense steps must obey them.
    _attention_backend = _of_stock("_attention_backend")
    _parallel_config = _of_stock("_parallel_config")


class SparseProcessor(BoundProcessor):
    """A processor that a method was attached to.

    Args:
        owner: the handle that puts this on a model.
        layer: the owner's description of the attention that this is on; has `attend(call)`.
        alike: see `BoundProcessor`, among the processors of this owner.

    Attributes:
        has_ended: it runs the model's own attention, in graphs too.
        place: (1,) int64 on the CPU, by which `processor_at` finds this one. To a graph it is
            data, where an attribute of Python would be a constant.
    """

    def __init__(
        self,
        stock: Any,
        name: str,
        owner: Any,
        layer: Any,
        alike: Hashable = None,
        traced: Traced | None = None,
    ) -> None:
        shared = None if alike is None else (id(owner), alike)
        BoundProcessor.__init__(self, stock, name, layer.attend, shared, traced)
        self.owner, self.layer, self._alike, self._traced = owner, layer, alike, traced
        self.has_ended = False
        with torch.inference_mode(False):
            self.place = torch.tensor([id(self)], device="cpu")
        _placed[id(self)] = self

    def end(self) -> None:
        """Run the model's own attention alone from now on, as the method is detached."""
        self._attend, self.has_ended = _as_stock, True

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            "a model with a method attached cannot be pickled: detach() first, and attach again "
            "where it is loaded; save_processors keeps the method and its parameters"
        )

    def __deepcopy__(self, memo: dict) -> "SparseProcessor":
        """Bind the copy to the copy of its owner: a plain function is never copied."""
        twin = memo[id(self)] = object.__new__(type(self))
        if isinstance(twin, TrainableProcessor):
            nn.Module.__init__(twin)
        stock, owner = deepcopy(self.stock, memo), deepcopy(self.owner, memo)
        layer, traced = deepcopy(self.layer, memo), deepcopy(self._traced, memo)
        given = stock, self.name, owner, layer, self._alike, traced
        if isinstance(twin, TrainableProcessor):
            TrainableProcessor.__init__(twin, *given)
        else:
            SparseProcessor.__init__(twin, *given)
        if self.has_ended:
            twin.end()
        twin._copy_taps(self, memo)
        return twin


class TrainableProcessor(SparseProcessor, nn.Module):
    """A processor of a layer with parameters, and a module of the model like any other. The
    parameters are in `transformer.parameters()` and `state_dict()`, and follow `.to()`."""

    def __init__(
        self, stock: Any, name: str, owner: Any, layer: Any, alike: Hashable, traced: Traced | None
    ) -> None:
        nn.Module.__init__(self)
        SparseProcessor.__init__(self, stock, name, owner, layer, alike, traced)
        self.branch: nn.Module = layer.branch
        self.takes_hidden = layer.is_gated


class TappedProcessor(BoundProcessor):
    """A processor with the model's own attention, which stays only as long as it has taps.

    Args:
        model: the model that it is part of. Its tapped processors are alike.
        attend: in the place of the model's own attention, outside of graphs; it stays then
            without taps too.
        in_graphs: whether `attend` runs in graphs too; only then the options of `BoundProcessor`
            that change the stock code have a meaning.
    """

    def __init__(
        self,
        stock: Any,
        name: str,
        model: nn.Module | None = None,
        attend: Callable[[Call], Tensor] | None = None,
        *,
        in_graphs: bool = False,
        also: Mapping[str, Any] = MappingProxyType({}),
        poses: bool = False,
    ) -> None:
        self._model = None if model is None else ref(model)
        self._options = {"in_graphs": in_graphs, "also": also, "poses": poses}
        attend = attend or _as_stock
        alike, traced = self._model, _without_processor(attend if in_graphs else _as_stock)
        if in_graphs and alike is not None:
            alike = alike, attend
        BoundProcessor.__init__(self, stock, name, attend, alike, traced, also=also, poses=poses)

    def __deepcopy__(self, memo: dict) -> "TappedProcessor":
        twin = memo[id(self)] = object.__new__(type(self))
        model = None if self._model is None else self._model()
        stock, attend = deepcopy(self.stock, memo), deepcopy(self._attend, memo)
        model = memo.get(id(model), model)
        TappedProcessor.__init__(twin, stock, self.name, model, attend, **self._options)
        twin._copy_taps(self, memo)
        return twin


def add_tap(
    module: Any,
    name: str,
    tap: Tap | Finish,
    *,
    model: nn.Module | None = None,
    kind: Literal["taps", "finishes"] = "taps",
) -> Callable[[], None]:
    """Put `tap` on the attention calls of a module's processor, after the taps that are on it, or
    as one of the "finishes", `tap(result, attn, hidden_states, ...)`, on its result.

    It stays while methods are attached and detached. The returned function removes the tap, and
    puts the stock processor back where nothing else is left. A second call does nothing.

    Args:
        module: an attention of a diffusers model.
        name: of its attention call; see `BoundProcessor`.
        model: the model of `module`. Its tapped processors share graphs of torch.compile.

    Raises:
        ValueError: a processor that does not call `name`, or has parameters; a tap already on.
    """
    processor = module.processor
    if not isinstance(processor, BoundProcessor):
        processor = TappedProcessor(processor, name, model)
    elif processor.name != name:
        raise ValueError(
            f"the processor of {type(module).__name__} is bound at {processor.name}, and not at "
            f"{name}; add the tap there"
        )
    if any(one is tap for one in getattr(processor, kind)):
        raise ValueError(f"{tap} is on this {type(module).__name__} already; remove it first")
    setattr(processor, kind, (*getattr(processor, kind), tap))
    put_processor(module, processor)
    return Removal(module, kind, tap)


def released(processor: BoundProcessor, model: nn.Module | None = None) -> Any:
    """Return the processor to put on the module when the attention of `processor` goes: the stock
    one, or a tapped one where taps are left."""
    if not processor.taps and not processor.finishes:
        return processor.stock
    return TappedProcessor(processor, processor.name, model)


class Removal:
    """Removes a tap or finish; an object, as a closure would not be copied with the model."""

    def __init__(self, module: Any, kind: str, added: Tap | Finish) -> None:
        self._module, self._kind, self._added = module, kind, added

    @property
    def is_on(self) -> bool:
        """Whether the tap or finish is still on, and no other processor was put in its place."""
        return any(one is self._added for one in getattr(self._module.processor, self._kind, ()))

    def __call__(self) -> None:
        processor = self._module.processor
        if not isinstance(processor, BoundProcessor):
            return
        left = tuple(one for one in getattr(processor, self._kind) if one is not self._added)
        setattr(processor, self._kind, left)
        own = processor.taps or processor.finishes or processor._attend is not _as_stock
        if isinstance(processor, TappedProcessor) and not own:
            put_processor(self._module, processor.stock)


def put_processor(module: Any, processor: Any) -> None:
    if module.processor is processor:
        return
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # Mochi's
        module._modules.pop("processor", None)  # in whose place only a module may be put
        module.processor = processor


def calls(stock: object, name: str) -> bool:
    """Whether a stock processor, without parameters of its own, makes an attention call of this
    name; see `BoundProcessor`."""
    function: Any = type(stock).__call__
    code = getattr(function, "__code__", None)
    if code is None or isinstance(stock, nn.Module):
        return False
    return set(name.split(".")) <= set(code.co_names)


def _as_stock(call: Call) -> Tensor:
    return call.stock()


class _ProcessorRun:
    """State of one run of a processor for its attention calls, cleared after the run."""

    def __init__(self) -> None:
        self.thread: int | None = None  # of the last run; None of one in a graph
        self.clear()

    def clear(self) -> None:
        self.processor: Any = None
        self.hidden_states: Tensor | None = None
        self.tokens = self.number = 0


# By their address, which is their `place`.
_placed: WeakValueDictionary[int, SparseProcessor] = WeakValueDictionary()


def processor_at(place: Tensor) -> SparseProcessor:
    """Return the processor of a `place`."""
    return _placed[int(place)]


def _without_processor(attend: Callable[[Call], Tensor]) -> Traced:
    return lambda processor, call: attend(call)


# Classes that processors which are alike share, as long as one of them lives.
_classes: WeakValueDictionary[tuple, type] = WeakValueDictionary()


def _class(
    kind: type, stock: type, name: str, traced: Traced, also: Mapping[str, Any], *, poses: bool
) -> type:
    """Make a class of `kind` with the stock processor's code bound to ours. It has the stock
    signature, by which diffusers' `Attention` decides which arguments to pass on.

    Graphs of torch.compile, which all of the class share, are made with `traced`.
    """
    run = _ProcessorRun()
    own: Any = stock.__call__
    namespace = own.__globals__ | also
    first, _, attribute = name.partition(".")
    if attribute:
        module = types.ModuleType(namespace[first].__name__)
        vars(module).update(vars(namespace[first]))
        bound = _bind(getattr(module, attribute), traced, run, heads_first=True)
        setattr(module, attribute, bound)
        namespace[first] = module
    else:
        namespace[first] = _bind(namespace[first], traced, run)
    function = rebound(own, namespace)

    def call(self: Any, attn: object, *args: Any, **kwargs: Any) -> object:
        first = args[0] if args else kwargs["hidden_states"]
        run.processor, run.tokens, run.number = self, first.shape[1], 0
        run.hidden_states = first if self.takes_hidden else None
        run.thread = None if torch.compiler.is_compiling() else get_ident()
        result = function(self.stock, attn, *args, **kwargs)
        run.clear()
        for finish in self.finishes:
            result = finish(result, attn, *args, **kwargs)
        return result

    call.__signature__ = inspect.signature(own)  # pyright: ignore[reportFunctionMemberAccess]
    members = {"__call__": call, "__init__": _made_anew, "__module__": kind.__module__}
    members["unbound"] = kind
    if poses:
        members["__class__"] = property(lambda self: stock)
    return type(kind.__name__, (kind,), members)


def _made_anew(self: object) -> None:
    """Refuse to be made without arguments, as diffusers makes new processors of a class."""
    raise ValueError(
        "diffusers replaces the processors of this model to load its image prompts: detach first, "
        "or load them by gen_accel.load_image_prompt, which keeps what is attached"
    )


def rebound(function: Any, namespace: dict[str, Any]) -> Callable:
    """Copy a function with a copy of its globals in which some are others."""
    # By its name, torch.compile would look what is bound up in the module itself.
    namespace.pop("__name__", None)
    copy = types.FunctionType(
        _copied(function.__code__),
        namespace,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _copied(code: types.CodeType) -> types.CodeType:
    """Copy a code object with those in it, by which torch.compile caches parts of a graph."""
    parts = (_copied(x) if isinstance(x, types.CodeType) else x for x in code.co_consts)
    return code.replace(co_consts=tuple(parts))


def _bind(
    stock_call: Callable, traced: Traced, run: _ProcessorRun, *, heads_first: bool = False
) -> Callable:
    """Make ours of an attention call, which takes and gives (B, H, N, D) if `heads_first`."""

    def attention_call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: "Tensor | BlockMask | None" = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_kwargs is not None:  # of the backend
            kwargs["attention_kwargs"] = attention_kwargs

        def stock() -> Tensor:
            out = stock_call(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                **kwargs,
            )
            return out.transpose(1, 2) if heads_first else out

        def alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
            options |= {**kwargs, "parallel_config": None}
            return stock_call(q, k, v, attn_mask=mask, **options)

        refused = []
        if dropout_p > 0:
            refused.append("dropout_p")
        if is_causal:
            refused.append("is_causal")
        if attention_kwargs:
            refused.append(f"attention_kwargs {shown(sorted(attention_kwargs))}")
        if isinstance(attn_mask, BlockMask):
            refused.append("a BlockMask as attn_mask")
        split = kwargs.get("parallel_config")
        parallel = None if split is None else Parallel(split.context_parallel_config, alone)
        q, k, v = query, key, value
        if heads_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        number, run.number = run.number, run.number + 1
        mask: Any = attn_mask  # a BlockMask is refused
        hidden = run.hidden_states
        call = Call(
            *(q, k, v, factor, stock, refused, mask, run.tokens, number, parallel),
            hidden_states=hidden,
        )
        processor = run.processor
        # torch.compile guards a processor's attributes, so that layers would not share a graph.
        if torch.compiler.is_compiling():
            out = traced(processor, call)
        elif processor is None or run.thread not in (None, get_ident()):
            raise RuntimeError(
                "the model runs in two threads at once, which neither its scheduler nor what is "
                "attached goes with: load a pipeline for each thread, or take turns"
            )
        else:
            out = processor._attend(call)
        for tap in processor.taps:
            out = tap(call, out)
        return out.transpose(1, 2) if heads_first else out

    return attention_call


def is_compiled(transformer: torch.nn.Module) -> bool:
    """Whether the transformer, or a block of it, is compiled: too late to change processors."""
    return hasattr(transformer, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None
        for module in transformer.modules()
    )
