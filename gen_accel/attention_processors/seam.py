"""Where our attention goes into diffusers: a stock processor with its one attention call replaced.

The stock processor projects, normalises and rotates; those parts change from release to release
and are not copied here. Its own code runs, with the name of the attention call bound to ours in a
copy of its globals. Nothing is patched: the stock class, its module and all other instances keep
the original.
"""

import inspect
import types
from collections.abc import Callable, Hashable
from copy import deepcopy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.video import VideoShape


class Call(NamedTuple):
    """One attention call of a stock processor. Tensors are (B, N, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    stock: Callable[[], Tensor]  # runs the call as diffusers would have
    refused: list[str]  # arguments given that only the stock call takes
    mask: Tensor | None = None  # as given; `text_lengths` reads it


class SparseProcessor:
    """A diffusers attention processor whose attention call goes to `attend`.

    Args:
        stock: the processor found on the model. It is kept, and comes back on detach.
        name: the global name of its attention call, which has the signature of diffusers'
            `dispatch_attention_fn`.
        attend: ours.
        owner: the handle that puts this on a model.
        alike: processors of one owner that have this in common share graphs of torch.compile, and
            with None, none does. To the compiler, code that is bound anew is what it was: all
            that it tells apart is the class.
    """

    def __init__(
        self,
        stock: Any,
        name: str,
        attend: Callable[[Call], Tensor],
        owner: Any,
        alike: Hashable = None,
    ) -> None:
        function: Any = type(stock).__call__
        code = getattr(function, "__code__", None)
        if code is None or name not in code.co_names:
            raise ValueError(
                f"{type(stock).__name__} does not call {name}, so its attention cannot be "
                "replaced; put the model's own processors back first"
            )
        self.stock, self.owner = stock, owner
        self._name, self._attend, self._alike = name, attend, alike
        key = object() if alike is None else (id(owner), alike)
        self.__class__ = _class(getattr(self, "unbound", type(self)), type(stock), key)
        namespace = {**function.__globals__, name: _bind(function.__globals__[name], attend)}
        # By its name, torch.compile would look the attention call up in the module itself.
        del namespace["__name__"]
        self._run = types.FunctionType(
            code, namespace, function.__name__, function.__defaults__, function.__closure__
        )
        self._run.__kwdefaults__ = function.__kwdefaults__

    def enter(self) -> None:
        """Before each call: what of this layer a graph that others share is to read."""

    def __deepcopy__(self, memo: dict) -> "SparseProcessor":
        """Bound to the copy of its owner: a function by itself is never copied."""
        copy = memo[id(self)] = object.__new__(type(self))
        stock, attend = deepcopy(self.stock, memo), deepcopy(self._attend, memo)
        owner = deepcopy(self.owner, memo)
        SparseProcessor.__init__(copy, stock, self._name, attend, owner, self._alike)
        return copy

    # diffusers sets these two on the processor; dense steps must obey them.
    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config


class TrainableProcessor(SparseProcessor, nn.Module):
    """The same for a method with parameters, a module of the model like any other: its parameters
    are in `transformer.parameters()` and `state_dict()`, and go where `.to()` sends them.

    Args:
        branch: holds the parameters; `attend` finds it in `owner.branch`.
    """

    def __init__(
        self,
        stock: Any,
        name: str,
        attend: Callable[[Call], Tensor],
        owner: Any,
        branch: nn.Module,
        alike: Hashable = None,
    ) -> None:
        nn.Module.__init__(self)
        SparseProcessor.__init__(self, stock, name, attend, owner, alike)
        self.branch = branch

    def enter(self) -> None:
        self.owner.branch = self.branch

    def __deepcopy__(self, memo: dict) -> "TrainableProcessor":
        copy = memo[id(self)] = object.__new__(type(self))
        nn.Module.__init__(copy)
        stock, attend = deepcopy(self.stock, memo), deepcopy(self._attend, memo)
        owner, branch = deepcopy(self.owner, memo), deepcopy(self.branch, memo)
        TrainableProcessor.__init__(copy, stock, self._name, attend, owner, branch, self._alike)
        return copy


@lru_cache(maxsize=64)
def _class(kind: type, stock: type, key: Hashable) -> type:
    """`kind` for one key, with the signature of the stock processor, by which diffusers'
    `Attention` decides which of its arguments to pass on."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.enter()
        return self._run(self.stock, *args, **kwargs)

    call.__signature__ = inspect.signature(stock.__call__)  # pyright: ignore[reportFunctionMemberAccess]
    members = {"__call__": call, "__module__": kind.__module__, "unbound": kind}
    return type(kind.__name__, (kind,), members)


def _bind(stock_call: Callable, attend: Callable[[Call], Tensor]) -> Callable:
    def attention_call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        def stock() -> Tensor:
            return stock_call(
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

        refused = []
        if dropout_p > 0:
            refused.append("dropout_p")
        if is_causal:
            refused.append("is_causal")
        if kwargs.get("parallel_config") is not None:
            refused.append("parallel_config (context parallelism)")
        k, v = key, value
        if enable_gqa:
            k, v = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (k, v))
        value_or_default = query.shape[-1] ** -0.5 if scale is None else scale
        return attend(Call(query, k, v, value_or_default, stock, refused, attn_mask))

    return attention_call


def text_lengths(mask: Tensor, q: Tensor, video: VideoShape) -> tuple[int, ...] | None:
    """How much text of each sample a mask leaves, where padding at the end of the text is all that
    it hides; None for any other mask. Waits for the device.

    Args:
        mask: True where a key is seen; a mask of keys is (B or 1, 1, 1, N) bool.
        q: (B, N, H, D)
    """
    B, N = q.shape[:2]
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[0] not in (1, B):
        return None
    if mask.shape[1:] != (1, 1, N):
        return None
    seen = mask[:, 0, 0].expand(B, N)
    lengths = seen.sum(1, keepdim=True) - video.video_tokens
    place = torch.arange(-video.video_tokens, video.text, device=mask.device)
    found = torch.cat([lengths, (seen == (place < lengths)).all(1, keepdim=True)], 1).tolist()
    if not all(is_prefix and length >= 0 for length, is_prefix in found):
        return None
    return tuple(length for length, _ in found)


def is_compiled(transformer: torch.nn.Module) -> bool:
    """Whether it, or a block of it, went through torch.compile: too late to change processors."""
    return hasattr(transformer, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None
        for module in transformer.modules()
    )
