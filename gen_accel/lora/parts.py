"""Gradient checkpointing within a block: its attentions and its feed-forward one by one.

A block that is computed again for its backward pass holds what all of its layers keep at once.
Here each part of it keeps its inputs alone as well, and is computed once more when its own
backward pass comes. So the largest part counts in the place of the sum, for a third forward pass
of the parts. The values are the same ones, and so are the gradients.

Parts are the modules that a block runs itself, and nothing in them is known by name: the same rule
serves every family.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gen_accel.lora.base import block_names

FEWEST = 2  # parts with linear layers, below which there is nothing to part


def parts_of(block: nn.Module) -> list[nn.Module]:
    """List the parts of a block: its modules that hold others, as attentions, feed-forward and
    modulations.

    Empty for a block of another form: one with linear layers beside its parts, as where attention
    and feed-forward share a layer, or with fewer than two parts that hold any.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def is_part(module: nn.Module) -> bool:
        is_layer = isinstance(module, BaseTunerLayer | nn.ModuleList | nn.ModuleDict)
        return not is_layer and any(True for _ in module.children())

    parts = [module for module in block.children() if is_part(module)]
    linear = [_linear_layers(part) for part in parts]
    is_whole = len(set().union(*linear)) == len(_linear_layers(block))
    return parts if is_whole and sum(map(bool, linear)) >= FEWEST else []


def _linear_layers(module: nn.Module) -> set[nn.Module]:
    return {one for one in module.modules() if isinstance(one, nn.Linear)}


def kinds_without_parts(transformer: nn.Module) -> tuple[str, ...]:
    """Classes of the blocks that have no parts, and are computed again as a whole."""
    blocks = [transformer.get_submodule(name) for name in block_names(transformer)]
    return tuple(dict.fromkeys(type(block).__name__ for block in blocks if not parts_of(block)))


def run_in_parts(block: nn.Module, *args: Any) -> Any:
    """Run a block, of which each part keeps its inputs alone."""
    with _parted(block):
        return block(*args)


@contextmanager
def _parted(block: nn.Module) -> Iterator[None]:
    """Let the parts of a block keep their inputs alone inside the context."""
    parts = parts_of(block)
    before = [vars(part).get("forward") for part in parts]
    for part in parts:
        vars(part)["forward"] = partial(_checkpointed, part.forward)
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            del vars(part)["forward"]
            if forward is not None:  # as of diffusers' hooks
                vars(part)["forward"] = forward


def _checkpointed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run `forward` as `torch.utils.checkpoint` does.

    Tensors are given one by one, by their place: others would be kept by the block's own
    checkpoint too. A part runs to its end, so that hooks after its last layer run as well.
    """
    leaves, form = tree_flatten((args, kwargs))

    def run(*given: Any) -> Any:
        args, kwargs = tree_unflatten(list(given), form)
        return forward(*args, **kwargs)

    with set_checkpoint_early_stop(False):
        return checkpoint(run, *leaves, use_reentrant=False)
