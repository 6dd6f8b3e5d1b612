"""Memory of a training: gradient checkpointing, and blocks that wait in CPU memory."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.families.weights import block_names
from gen_accel.lora.config import TrainConfig
from gen_accel.memory import check_room

if TYPE_CHECKING:
    from diffusers import ModelMixin

T = TypeVar("T")
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
    whole = (type(one).__name__ for one in blocks_of(transformer) if not parts_of(one))
    return tuple(dict.fromkeys(whole))


def run_in_parts(block: nn.Module, *args: object) -> object:
    """Run a block, of which each part keeps its inputs alone."""
    parts = parts_of(block)
    before = [vars(part).get("forward") for part in parts]
    for part in parts:
        vars(part)["forward"] = partial(_part, part.forward)
    try:
        return block(*args)
    finally:
        for part, forward in zip(parts, before, strict=True):
            del vars(part)["forward"]
            if forward is not None:  # as of diffusers' hooks
                vars(part)["forward"] = forward


def _part(forward: Callable, *args: object, **kwargs: object) -> object:
    """Run a part's `forward` as `torch.utils.checkpoint` does.

    Tensors are given one by one, by their place: others would be kept by the block's own
    checkpoint too. A part runs to its end, so that hooks after its last layer run as well.
    """
    leaves, form = tree_flatten((args, kwargs))

    def run(*given: object) -> object:
        args, kwargs = tree_unflatten(list(given), form)
        return forward(*args, **kwargs)

    with set_checkpoint_early_stop(False):
        return checkpoint(run, *leaves, use_reentrant=False)


def checkpoint_activations(transformer: "ModelMixin", kind: str, *, parts: bool = False) -> None:
    """Let a model of diffusers keep each block's inputs only, and compute the rest again.

    Args:
        kind: "off"; "on"; or "offload", by which the inputs wait in CPU memory, pinned if there
            is a GPU.
        parts: whether the parts of a block keep their inputs only as well.
    """
    if kind != "off":
        run = partial(checkpointed, offloads=kind == "offload", in_parts=parts)
        transformer.enable_gradient_checkpointing(run)


def checkpointed(module: nn.Module, *args: object, offloads: bool, in_parts: bool) -> object:
    """Run `module` as `torch.utils.checkpoint` does.

    Args:
        offloads: inputs that carry a gradient wait in CPU memory. Others, such as a text that all
            blocks read, are the same for all blocks.
        in_parts: each of its parts keeps its inputs only as well.
    """
    run = partial(run_in_parts, module) if in_parts else module.__call__
    if not offloads:
        return checkpoint(run, *args, use_reentrant=False)
    carrying = {(x.data_ptr(), x.shape) for x in args if isinstance(x, Tensor) and x.requires_grad}

    def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        return (x.device, to_host(x)) if (x.data_ptr(), x.shape) in carrying else x

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    # Applies to the inputs alone: inside of the checkpoint torch's own hooks are in force.
    with saved_tensors_hooks(pack, unpack):
        return checkpoint(run, *args, use_reentrant=False)


def to_host(x: Tensor) -> Tensor:
    """Copy a tensor into CPU memory, in the order of the device's stream."""
    pinned = x.device.type == "cuda"
    host = torch.empty_like(x, device="cpu", pin_memory=pinned)
    return host.copy_(x, non_blocking=pinned)


NUMBER = 8  # bytes of a number in a list
ACTIVATIONS = 5  # activations that a block holds at once: its input, q, k, v and the output
RESIDENT = 2  # most waiting blocks on the device: one at work, and the next


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """List the blocks with video attention, in the order in which they run."""
    return [transformer.get_submodule(name) for name in block_names(transformer)]


def spread(blocks: Sequence[T], count: int) -> list[T]:
    """Take `count` of a model's blocks, evenly spread, the last one with them."""
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


def check_blocks(count: int, transformer: nn.Module) -> None:
    """Raise ValueError for more blocks to swap than the model has."""
    have = len(blocks_of(transformer))
    if count > have:
        raise ValueError(
            f"blocks_to_swap must be at most {have}, the blocks of {type(transformer).__name__}, "
            f"got {count}"
        )


class Swapper:
    """Holder of the blocks that wait, evenly spread over the model.

    Args:
        module: what trains, with the model in it. It is moved to the device, but for the frozen
            weights of the blocks that wait.
        transformer: the model.
        count: number of blocks that wait, at least 1.

    Attributes:
        resident: numbers of those among them that are on the device now.
    """

    def __init__(
        self, module: nn.Module, transformer: nn.Module, count: int, device: torch.device
    ) -> None:
        check_blocks(count, transformer)
        self.device, self.blocks = device, spread(blocks_of(transformer), count)
        self._side = torch.Stream(device) if device.type == "cuda" else None
        self._waiting = [_frozen(block) for block in self.blocks]
        self._here: dict[int, _Copies] = {}
        try:
            for held in self._waiting:
                _place(dict.fromkeys(held))
            module.to(device)
        finally:
            for held in self._waiting:
                _place(held)
        for held in self._waiting:
            for place, parameter in held.items():
                scales = getattr(parameter, "quant_state", None)
                if scales is not None:  # of bitsandbytes, which stay on the device
                    scales.to(device)
                held[place] = _mapped(parameter, _to_host)
            _place(held)
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self._before, i))

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(self._here))

    def _before(self, number: int, block: nn.Module, args: object) -> None:
        """Bring a block's weights before it runs, let the earlier ones go, and fetch the next."""
        for gone in [other for other in self._here if other != number]:
            self._here.pop(gone).arrive()  # nobody may take the memory that is still written
            _place(self._waiting[gone])
        self._fetch(number)
        self._here[number].arrive()
        # Backward passes come through the blocks from the last to the first.
        ahead = number - 1 if torch._C._current_graph_task_id() != -1 else number + 1
        if self._side is not None and 0 <= ahead < len(self.blocks):
            self._fetch(ahead)

    def _fetch(self, number: int) -> None:
        if number not in self._here:
            self._here[number] = _Copies(self._waiting[number], self.device, self._side)
            _place(self._here[number].parameters)


Place = tuple[nn.Module, str]  # of a parameter: its module, and its name there
Held = dict[Place, nn.Parameter]


def _place(held: Mapping[Place, nn.Parameter | None]) -> None:
    for (module, name), parameter in held.items():
        module._parameters[name] = parameter


class _Copies:
    """Copies of a block's weights on the device, which a side stream may still be writing."""

    def __init__(self, waiting: Held, device: torch.device, side: torch.Stream | None) -> None:
        self._ready = None
        # Memory comes from the stream that computes, which is to wait for the copies: so it may
        # be given back there at any time after `arrive`.
        pairs: list[tuple[Tensor, Tensor]] = []

        def room(t: Tensor) -> Tensor:
            pairs.append((torch.empty_like(t, device=device), t))
            return pairs[-1][0]

        self.parameters = {place: _mapped(x, room) for place, x in waiting.items()}
        if side is not None:
            side.wait_stream(torch.accelerator.current_stream(device))
        with side or nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=side is not None)
        if side is not None:
            self._ready = side.record_event()

    def arrive(self) -> None:
        """Let the stream that computes wait until the copies are whole."""
        if self._ready is not None:
            torch.accelerator.current_stream().wait_event(self._ready)
            self._ready = None


def _frozen(block: nn.Module) -> Held:
    return {
        (module, name): parameter
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }


def _mapped(parameter: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the plain tensors that a frozen parameter consists of, in a copy.

    What bitsandbytes keeps beside its weights, a few percent of them, stays on the device.
    """
    if is_traceable_wrapper_subclass(parameter):
        names, context = parameter.__tensor_flatten__()
        inner = {name: _mapped(getattr(parameter, name), change) for name in names}
        made = type(parameter).__tensor_unflatten__(
            inner, context, parameter.size(), parameter.stride()
        )
        return nn.Parameter(made, requires_grad=False)
    if type(parameter) is Tensor:
        return change(parameter)
    if type(parameter) is nn.Parameter:
        return nn.Parameter(change(parameter.data), requires_grad=False)
    made = copy(parameter)
    made.data = change(parameter.data)
    return made


def _to_host(x: Tensor) -> Tensor:
    host = x.cpu()
    return host.pin_memory() if torch.cuda.is_available() else host


def check_allocations(config: TrainConfig) -> None:
    """Raise ValueError for sizes in the config that cannot fit with any model."""
    steps = config.total_steps
    clips = steps * config.batch_size * config.gradient_accumulation
    check_room(
        f"a list of the {clips} clips of {steps} steps",
        NUMBER * clips,
        "lower the steps of stages, batch_size or gradient_accumulation",
    )
    height, width = max(config.clip_sizes, key=lambda size: size[0] * size[1])
    pixels = 3 * config.longest * height * width
    size = f"{config.longest} frames of {height} x {width}"
    check_room(f"a clip of {size}", pixels, "lower stages, height or width")
    if config.max_tokens is not None:  # text encoders mask each pair of tokens
        check_room(f"max_tokens {config.max_tokens}", config.max_tokens**2, "lower it")
    if config.adapter == "image_prompt":
        side, tokens = config.image_size, config.image_tokens
        check_room(f"image_size {side}", 12 * side**2, "lower it")
        check_room(f"image_tokens {tokens}", 4 * NUMBER * tokens, "lower it")


def check_adapter(config: TrainConfig, transformer: nn.Module) -> None:
    """Raise ValueError for a LoRA whose parameters cannot fit, in float32."""
    if config.adapter != "lora" or not config.rank:
        return
    sites = family_of(transformer).self_attentions(transformer)
    size = sum(2 * site.heads * site.dim * config.rank * 4 for site in sites)
    check_room(f"a LoRA of rank {config.rank} on {len(sites)} attentions", size, "lower rank")


def check_batch(config: TrainConfig, transformer: "ModelMixin", tokens: int) -> None:
    """Raise ValueError for a batch of clips of some tokens that not even one block of the model
    can hold, or of several for a model whose texts must be of one length."""
    family = family_of(transformer)
    if config.batch_size > 1 and family.training.one_text_length:
        raise ValueError(
            f"batch_size must be 1 for {family.models}, which has no mask for captions of several "
            f"lengths, got {config.batch_size}: raise gradient_accumulation instead"
        )
    sites = family.self_attentions(transformer)
    width = max(site.heads * site.dim for site in sites)
    itemsize = 4 if config.mixed_precision == "no" else 2
    check_room(
        f"batch_size {config.batch_size} of {tokens} tokens each",
        ACTIVATIONS * config.batch_size * tokens * width * itemsize,
        "lower batch_size, or the frames of stages, height or width",
        transformer.device,
    )


def peak_gb(device: torch.device) -> float | None:
    """Return the most memory held so far, in GB (10^9 bytes): of an accelerator what torch has
    allocated there, of a CPU the resident memory of the process. None if that is unknown."""
    if device.type != "cpu":
        try:
            return torch.accelerator.max_memory_allocated(device) / 1e9
        except (RuntimeError, AttributeError):
            return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9
