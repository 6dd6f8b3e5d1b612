"""Optimizers by name or class, with settings."""

import inspect
from ast import literal_eval
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gen_accel.lora.config import TrainConfig
from gen_accel.parsing import shown

# Arguments that fields of a config give.
FIELDS = {"lr": "learning_rate", "betas": "betas", "weight_decay": "weight_decay"}


def new_optimizer(
    parameters: Iterable[nn.Parameter | dict[str, Any]], config: TrainConfig
) -> torch.optim.Optimizer:
    """Build the optimizer that a config names.

    Args:
        parameters: those that train, or groups of them as torch's optimizers take them.

    Raises ValueError for one that is no class, refuses the settings, or cannot train here.
    """
    kind = _class_of(config.optimizer)
    arguments = _arguments(config, kind)
    given: Any = list(parameters)  # torch takes parameters or groups, in types not both
    try:
        with redirect_stdout(StringIO()):  # some greet
            made = kind(given, **arguments)
    except Exception as error:
        raise ValueError(f"optimizer {config.optimizer} refuses its settings: {error}") from error
    if config.ema_decay and averages_itself(made):
        raise ValueError(f"optimizer {config.optimizer} averages by itself: leave ema_decay out")
    needed = [
        name
        for name, one in list(inspect.signature(kind.step).parameters.items())[1:]
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    if needed:
        raise ValueError(
            f"optimizer {config.optimizer} does not train here: its steps need {needed[0]}"
        )
    return made


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    module, _, own = name.rpartition(".")
    try:
        found = getattr(import_module(module), own, None)
    except ImportError as error:
        raise ValueError(f"optimizer {name} cannot be imported: {error}") from None
    if found is None:
        raise ValueError(f"optimizer {name} is not there: {module} has no {own}")
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a class of torch.optim.Optimizer, got {name}")
    return found


def bytes_of_state(config: TrainConfig, shapes: Mapping[tuple[int, ...], int]) -> int:
    """Count the bytes that an optimizer keeps between steps, by a step on each shape.

    Args:
        shapes: how many parameters there are of each shape, in float32.

    Raises RuntimeError if the optimizer makes no step on this machine.
    """
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]  # some keep no zeros
    for one in parameters:
        one.grad = torch.full_like(one, 1e-3)
    optimizer: Any = new_optimizer(parameters, config)
    try:
        if averages_itself(optimizer):
            optimizer.train()
        with redirect_stdout(StringIO()):
            optimizer.step()
    except Exception as error:
        raise RuntimeError(f"optimizer {config.optimizer} makes no step: {error}") from error
    found = 0
    for one, times in zip(parameters, shapes.values(), strict=True):
        kept = (x for x in tree_leaves(optimizer.state[one]) if isinstance(x, torch.Tensor))
        found += times * sum(x.untyped_storage().nbytes() for x in kept)
    return found


def averages_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has other parameters for use than for training, as schedule-free ones,
    which `train` and `eval` switch between."""
    return callable(getattr(optimizer, "train", None)) and callable(
        getattr(optimizer, "eval", None)
    )


def _arguments(config: TrainConfig, kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Collect the arguments of an optimizer: the config's rate, and what is given besides."""
    taken = inspect.signature(kind.__init__).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    plain = config.optimizer in ("adamw", "adamw8bit")
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    for name in ("betas", "weight_decay"):
        if not plain and not config.is_given(name):
            continue
        if name not in taken and not takes_all:
            raise ValueError(f"optimizer {config.optimizer} takes no {name}: leave it out")
        arguments[name] = getattr(config, name)
    for setting in config.optimizer_settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(
                f"a setting of an optimizer is written field=value, got {shown(setting)}"
            )
        if name in FIELDS:
            raise ValueError(
                f"optimizer_settings: {name} is the config's {FIELDS[name]}: give it there"
            )
        if name in arguments:
            raise ValueError(f"optimizer_settings: {name} is set twice")
        if name == "params" or (name not in taken and not takes_all):
            known = ", ".join(n for n in list(taken)[2:] if n not in FIELDS)
            raise ValueError(
                f"optimizer {config.optimizer} has no setting {shown(name)}; it has {known}"
            )
        arguments[name] = _value(text)
    return arguments


def _value(text: str) -> Any:
    """Read a number, a boolean, none or a tuple; anything else is text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
