"""Models that are sparse by themselves, on our kernels and without compilation.

Some processors of diffusers say by a `BlockMask` of FlexAttention which tokens see which.
Compiled, FlexAttention leaves the other blocks out. Uncompiled, it makes the matrix of all scores,
and leaves out nothing where a mask has lists of blocks and no mask function, as NABLA's has.
`attach_own` runs these processors with their attention call bound to
`gen_accel.block_mask.flex_attention`. Of diffusers 0.42.1 they are the classes in `OWN`.
"""

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from gen_accel import kernels
from gen_accel.attention_processors.families import family_of, served_classes
from gen_accel.attention_processors.families.sites import Removable
from gen_accel.attention_processors.methods.neighborhood import Neighborhood
from gen_accel.attention_processors.seam import (
    BoundProcessor,
    Call,
    SparseProcessor,
    TappedProcessor,
    is_compiled,
    put_processor,
    rebound,
    released,
)
from gen_accel.block_mask import create_block_mask, flex_attention
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CALL = "dispatch_attention_fn"


class Window(NamedTuple):
    """Windows of 3D neighbourhood attention, in the place of the mask of all token pairs, with the
    arguments of the function in diffusers that makes it."""

    frames: int
    rows: int
    columns: int
    kernel_size: tuple[int, int, int]
    device: torch.device

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """(B, H, N, D) in and out; the options are those of `kernels.run`."""
        video = VideoShape(self.frames, self.rows, self.columns)
        frames, rows, columns = map(min, self.kernel_size, video.grid)
        plan = Neighborhood((frames, rows, columns)).plan(video, q.device)
        return kernels.run(q, k, v, plan, **options)


class Own(NamedTuple):
    """One processor of diffusers that is sparse by itself.

    Args:
        also: other globals of its code that are bound to ours: what makes a mask of all token
            pairs, and warnings of FlexAttention's matrix.
        poses: whether its model looks for the class to make a mask.
        without_mask: whether it runs full attention by FlexAttention too.
        makers: methods of the model that make the mask of all token pairs, and the function in
            each that does.
    """

    also: Mapping[str, Any] = types.MappingProxyType({})
    poses: bool = False
    without_mask: bool = False
    makers: Mapping[str, str] = types.MappingProxyType({})


# As compiled FlexAttention looks to who asks.
_COMPILED = types.SimpleNamespace(
    flex_attention=types.SimpleNamespace(_torchdynamo_orig_callable=None)
)
_FAR = "_build_far_block_mask_from_far_cfg"
OWN: dict[str, Own] = {
    "AnyFlowCausalAttnProcessor": Own(
        without_mask=True, makers={"_forward_train": _FAR, "_forward_cache": _FAR}
    ),
    "Kandinsky5AttnProcessor": Own(),
    "Kandinsky6SRAttnProcessor": Own({"_warn_uncompiled_flex_attention": lambda: None}),
    "LTX2VideoVaeNeighborhoodAttnProcessor": Own({"_neighborhood_block_mask": Window}),
    "QwenImage21FlexAttnProcessor": Own({"flex_attention_module": _COMPILED}, poses=True),
    "WanAnimate2AttnProcessor": Own(makers={"create_mask": "create_block_mask"}),
}


def attach_own(
    pipe_or_model: "DiffusionPipeline | nn.Module", *, kernel: str = "auto"
) -> "OwnSparsity":
    """Run the sparse attention that a model has by itself on a kernel of ours.

        with gen_accel.attach_own(pipe) as own:
            video = pipe(prompt, ...).frames
        print(own.summary())

    The answer is that of compiled FlexAttention; nothing is compiled, and neither all scores nor a
    mask of all token pairs is made. What has no mask runs as before.

    Args:
        pipe_or_model: a diffusers pipeline, or one of its models: a transformer, or LTX-2's
            diffusion decoder. Attach before `torch.compile`.
        kernel: "auto" or a name from `gen_accel.kernels.KERNELS`, which then never falls back.

    Raises:
        ValueError: a model that is not sparse by itself, is compiled already, or has a method
            attached; an unknown kernel.
    """
    kernels.check_name(kernel)
    if isinstance(pipe_or_model, nn.Module):
        models = [pipe_or_model]
    else:
        models = [x for x in pipe_or_model.components.values() if isinstance(x, nn.Module)]
    sites: list[tuple[nn.Module, nn.Module, Any]] = [
        (model, module, module.processor)
        for model in models
        for module in model.modules()
        if _stock_of(getattr(module, "processor", None)) in OWN
    ]
    if not sites:
        names = ", ".join(type(model).__name__ for model in models)
        raise ValueError(
            f"no attention of {names} is sparse by itself; processors that are: {', '.join(OWN)}"
        )
    for model, module, found in sites:
        if is_compiled(model):
            raise ValueError(
                f"{type(model).__name__} is compiled already; load it again, attach, and compile "
                "then"
            )
        if isinstance(found, SparseProcessor):
            raise ValueError(
                f"a method is attached to {type(module).__name__} of {type(model).__name__}; "
                "detach it first, since it replaces the model's own sparse attention"
            )
    return OwnSparsity(sites, kernel)


def _stock_of(processor: object) -> str:
    found = processor.stock if isinstance(processor, BoundProcessor) else processor
    return type(found).__name__


class OwnSparsity:
    """The handle of `attach_own`."""

    def __init__(self, sites: list[tuple[nn.Module, nn.Module, Any]], kernel: str) -> None:
        self._sites: list[tuple[nn.Module, nn.Module, TappedProcessor]] = []
        self._bound: list[tuple[nn.Module, str]] = []
        self._lighter: list[Removable] = []
        self._runs: dict[tuple[int, str], _Runs] = {}
        for model, module, found in sites:
            name = _stock_of(found)
            own, key = OWN[name], (id(model), name)
            if key not in self._runs:
                self._runs[key] = _Runs(name, kernel, without_mask=own.without_mask)
                self._rebind(model, own.makers)
                if any(kind.__name__ in served_classes() for kind in type(model).__mro__):
                    self._lighter += family_of(model).lighten(model, lambda: self.is_attached)
            options = {"also": own.also, "poses": own.poses}
            runs = self._runs[key]
            processor = TappedProcessor(found, CALL, model, runs, in_graphs=True, **options)
            put_processor(module, processor)
            self._sites.append((model, module, processor))

    def _rebind(self, model: nn.Module, makers: Mapping[str, str]) -> None:
        for method, maker in makers.items():
            function = getattr(type(model), method)
            make: Callable = create_block_mask
            if maker != "create_block_mask":
                made = function.__globals__[maker]
                make = rebound(made, made.__globals__ | {"create_block_mask": make})
            bound = rebound(function, function.__globals__ | {maker: make})
            setattr(model, method, types.MethodType(bound, model))
            self._bound.append((model, method))

    @property
    def is_attached(self) -> bool:
        """Whether some attention still runs by a kernel of ours."""
        return any(module.processor is processor for _, module, processor in self._sites)

    def detach(self) -> None:
        """Put the stock processors back. Does nothing the second time."""
        for model, module, processor in self._sites:
            if module.processor is processor:
                put_processor(module, released(processor, model))
        for model, method in self._bound:
            vars(model).pop(method, None)
        for lighter in self._lighter:
            lighter.remove()
        self._sites, self._bound, self._lighter = [], [], []

    def __enter__(self) -> "OwnSparsity":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def summary(self) -> str:
        """Say which processors ran, how often and by which kernels."""
        return "\n".join(map(str, self._runs.values()))


class _Runs:
    """Attention of the processors of one class, called `name`, on one model."""

    def __init__(self, name: str, kernel: str, *, without_mask: bool) -> None:
        self.name, self.kernel, self._without_mask = name, kernel, without_mask
        self.calls, self.ran = 0, dict[str, int]()

    def __str__(self) -> str:
        ran = ", ".join(f"{count} by {kernel}" for kernel, count in sorted(self.ran.items()))
        return f"{self.name}: {self.calls} calls with a mask" + (f", {ran}" if ran else "")

    @torch.compiler.disable(reason="a kernel runs between two graphs: compile without fullgraph")
    def __call__(self, call: Call) -> Tensor:
        mask: Any = call.mask
        if not isinstance(mask, BlockMask | Window):
            if mask is not None or not self._without_mask or call.parallel is not None:
                return call.stock()
            q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
            return F.scaled_dot_product_attention(q, k, v, scale=call.scale).transpose(1, 2)
        if call.parallel is not None or len(call.refused) > isinstance(mask, BlockMask):
            what = "context parallelism" if call.parallel is not None else call.refused[0]
            raise ValueError(
                f"{self.name} runs its own sparse attention by a kernel without {what}; detach "
                "what attach_own returned, and compile the model"
            )
        self.calls += 1
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        options: Any = {"scale": call.scale, "kernel": self.kernel, "report": self._count}
        if isinstance(mask, Window):
            return mask.attend(q, k, v, **options).transpose(1, 2)
        return flex_attention(q, k, v, mask, **options).transpose(1, 2)

    def _count(self, choice: kernels.Choice) -> None:
        self.ran[choice.kernel] = self.ran.get(choice.kernel, 0) + 1
