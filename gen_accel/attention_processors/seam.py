"""Where our attention goes into diffusers: a stock processor with its one attention call replaced.

The stock processor projects, normalises and rotates; those parts change from release to release
and are not copied here. Its own code runs, with the name of the attention call bound to ours in a
copy of its globals. Nothing is patched: the stock class, its module and all other instances keep
the original.
"""

import types
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """One attention call of a stock processor. Tensors are (B, N, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    stock: Callable[[], Tensor]  # runs the call as diffusers would have
    refused: list[str]  # arguments given that only the stock call takes


class SparseProcessor:
    """A diffusers attention processor whose attention call goes to `attend`.

    Args:
        stock: the processor found on the model. It is kept, and comes back on detach.
        name: the global name of its attention call, which has the signature of diffusers'
            `dispatch_attention_fn`.
        attend: ours.
        owner: the handle that puts this on a model.
    """

    def __init__(
        self, stock: Any, name: str, attend: Callable[[Call], Tensor], owner: Any
    ) -> None:
        function: Any = type(stock).__call__
        code = getattr(function, "__code__", None)
        if code is None or name not in code.co_names:
            raise ValueError(
                f"{type(stock).__name__} does not call {name}, so its attention cannot be "
                "replaced; put the model's own processors back first"
            )
        self.stock, self.owner = stock, owner
        self._name, self._attend = name, attend
        namespace = {**function.__globals__, name: _bind(function.__globals__[name], attend)}
        # By its name, torch.compile would look the attention call up in the module itself.
        del namespace["__name__"]
        self._run = types.FunctionType(
            code, namespace, function.__name__, function.__defaults__, function.__closure__
        )
        self._run.__kwdefaults__ = function.__kwdefaults__

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.stock, attn, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "SparseProcessor":
        """Bound to the copy of its owner: a function by itself is never copied."""
        copy = memo[id(self)] = object.__new__(type(self))
        stock, attend = deepcopy(self.stock, memo), deepcopy(self._attend, memo)
        SparseProcessor.__init__(copy, stock, self._name, attend, deepcopy(self.owner, memo))
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
        branch: holds the parameters; `attend` uses it.
    """

    def __init__(
        self,
        stock: Any,
        name: str,
        attend: Callable[[Call], Tensor],
        owner: Any,
        branch: nn.Module,
    ) -> None:
        nn.Module.__init__(self)
        SparseProcessor.__init__(self, stock, name, attend, owner)
        self.branch = branch

    def __deepcopy__(self, memo: dict) -> "TrainableProcessor":
        copy = memo[id(self)] = object.__new__(type(self))
        nn.Module.__init__(copy)
        stock, attend = deepcopy(self.stock, memo), deepcopy(self._attend, memo)
        owner, branch = deepcopy(self.owner, memo), deepcopy(self.branch, memo)
        TrainableProcessor.__init__(copy, stock, self._name, attend, owner, branch)
        return copy


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
        if attn_mask is not None:
            refused.append("attn_mask")
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
        return attend(Call(query, k, v, value_or_default, stock, refused))

    return attention_call


def is_compiled(transformer: torch.nn.Module) -> bool:
    """Whether it, or a block of it, went through torch.compile: too late to change processors."""
    return hasattr(transformer, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None
        for module in transformer.modules()
    )
