"""Linear layers of a model on a CPU, by oneDNN with weights in its own order.

PyTorch multiplies fp32 matrices by MKL, which takes its slower paths on processors of other
makers. oneDNN does not, and applies GELU to a product before it leaves the cache. The answer is
the same to fp32 rounding. Which is faster is measured, once in a process for each size.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.kernels.base import is_forward_mode
from gen_accel.parsing import shown
from gen_accel.registry import LinearKernel

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Times, for "auto" to take oneDNN. Where both are alike, as on a Xeon, noise must not decide, as a
# run would not repeat bit for bit.
FASTER = 1.5
PROBE = 1e9  # multiplications and additions, at most, of a few calls each
LARGEST_ERROR = 1e-5  # of a feed-forward whose outputs are below 1
FEWEST_ROWS = 128  # of a product; below, looking whether the weight has changed costs too much
PACKED = "_packed"  # attribute of a layer


class Packed:
    """A layer's weight in the order of oneDNN, made when it is needed and again when the weight
    changes. A copy of the layer makes its own."""

    def __init__(self) -> None:
        # The weight, which holds on to its memory, the sums of its rows as integers, and itself
        # in the other order.
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Packed, ()

    def of(self, weight: Tensor, rows: int) -> Tensor:
        """The reordered weight, (out, in).

        Args:
            rows: of a typical product.
        """
        # Merging a LoRA writes into `weight.data`, which counts no version. Reading all of the
        # weight costs as much as some rows of the product.
        weight = weight.detach()
        sums = weight.view(torch.int32).sum(1)
        if self._known is not None:
            of, before, made = self._known
            if of.data_ptr() == weight.data_ptr() and torch.equal(sums, before):
                return made
        made = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self._known = weight, sums, made
        return made


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by oneDNN where it can, and as before elsewhere: in training,
    for other dtypes, on other devices, in graphs and for a few rows."""

    def forward(self, input: Tensor) -> Tensor:
        out = product(self, input)
        return super().forward(input) if out is None else out


class PackedGELU(GELU):
    """diffusers' layer of a feed-forward that ends in GELU, as one product if its layer is packed,
    or holds a LoRA that is merged into a packed one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer = _alone(self.proj)
        out = None if layer is None else product(layer, hidden_states, gelu=self.approximate)
        return super().forward(hidden_states) if out is None else out


def product(layer: PackedLinear, x: Tensor, *, gelu: str | None = None) -> Tensor | None:
    """Multiply (..., in) by a layer's weight and add its bias, by oneDNN; None if it cannot.

    Args:
        gelu: GELU of the result: "none" for the exact one, "tanh".
    """
    weight, bias = layer.weight, layer.bias
    if torch.compiler.is_compiling() or type(x) is not Tensor or type(weight) is not nn.Parameter:
        return None
    if not (x.dtype == weight.dtype == torch.float32 and x.device == weight.device == CPU):
        return None
    rows = x.numel() // max(1, x.shape[-1])
    if rows < FEWEST_ROWS or torch.is_autocast_enabled("cpu"):
        return None
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if (trained and torch.is_grad_enabled()) or is_forward_mode():
        return None
    if peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return None
    packed = vars(layer)[PACKED].of(weight, rows)
    kind, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, kind, [], algorithm)


CPU = torch.device("cpu")


def _alone(layer: nn.Module) -> PackedLinear | None:
    """The packed layer that is all of a layer; None if there is more, such as a LoRA or a hook."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if type(layer) is PackedLinear:
        return layer
    base = getattr(layer, "base_layer", None)
    merged = getattr(layer, "merged", False) and not getattr(layer, "disable_adapters", True)
    return _alone(base) if merged and isinstance(base, nn.Module) else None


@cache
def onednn_gain(width: int, inner: int, gelu: str | None, threads: int) -> float:
    """How many times as fast oneDNN runs a feed-forward here. 0 if it is not there, or errs.

    Args:
        width, inner: features of its outer and inner tokens.
        gelu: see `product`.
        threads: that are set.
    """
    rows = min(max(FEWEST_ROWS, int(PROBE / (4 * width * inner))), 4096)
    with torch.random.fork_rng([]):
        up, down = PackedLinear(width, inner), PackedLinear(inner, width)
        x = torch.rand(rows, width) - 0.5
    for layer in (up, down):
        vars(layer.requires_grad_(False))[PACKED] = Packed()

    def plain() -> Tensor:
        out = F.linear(x, up.weight, up.bias)
        out = out if gelu is None else F.gelu(out, approximate=gelu)
        return F.linear(out, down.weight, down.bias)

    def packed() -> Tensor | None:
        out = product(up, x, gelu=gelu)
        return None if out is None else product(down, out)

    with torch.inference_mode():
        try:
            out = packed()
        except (RuntimeError, AttributeError):
            return 0.0
        if out is None or (out - plain()).abs().max() > LARGEST_ERROR:
            return 0.0
        least = dict.fromkeys((plain, packed), float("inf"))
        for _ in range(5):
            for call in least:
                start = time.perf_counter()
                call()
                least[call] = min(least[call], time.perf_counter() - start)
    return least[plain] / least[packed]


@dataclass(eq=False)
class LinearLayers:
    """The linear layers of a pipeline's transformers while they run by oneDNN; also a context
    manager. See `pack_linears`.

    Attributes:
        gain: times as fast as PyTorch's, measured here; None if oneDNN was not asked for.
    """

    gain: float | None
    _packed: list[nn.Linear]
    _fused: list[GELU]

    @property
    def is_on(self) -> bool:
        return bool(self._packed)

    def remove(self) -> None:
        """Make all layers what they were. Does nothing the second time."""
        for module in self._packed:
            module.__class__ = nn.Linear
            vars(module).pop(PACKED, None)
        for module in self._fused:
            module.__class__ = GELU
        self._packed, self._fused = [], []

    def __enter__(self) -> "LinearLayers":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def pack_linears(
    pipe_or_transformer: "DiffusionPipeline | nn.Module", kernel: LinearKernel = "auto"
) -> LinearLayers:
    """Run the linear layers of a pipeline's transformers by oneDNN until the result is removed.

        with pack_linears(pipe) as layers:
            video = pipe(prompt, ...).frames

    Only plain layers in fp32 on the CPU are taken, the ones below a LoRA too: quantised layers and
    layers that hooks of accelerate move are left alone. Weights may change meanwhile. In training
    and in graphs of torch.compile the layers run as before. The reordered weights take as much
    memory as the weights.

    Args:
        kernel: "auto" for oneDNN if it is 1.5 times as fast at the model's feed-forward, "onednn"
            in any case, "torch" for nothing.

    Raises:
        ValueError: an unknown kernel; "onednn" if this PyTorch lacks it, or layers not in fp32 on
            the CPU.
    """
    if kernel not in (known := get_args(LinearKernel)):
        raise ValueError(f"linear_kernel must be one of {', '.join(known)}, got {shown(kernel)}")
    if kernel == "torch" or words_of(pipe_or_transformer):  # or they are packed
        return LinearLayers(None, [], [])
    layers = list(_plain(pipe_or_transformer))
    fused = [
        module
        for model in served_transformers(pipe_or_transformer).values()
        for module in model.modules()
        if type(module) is GELU and not hasattr(module, "_hf_hook")
    ]
    gain = None
    if layers:
        typical, gelu = max(layers, key=lambda layer: layer.weight.numel()), None
        if fused:
            typical, gelu = fused[0].proj, fused[0].approximate
        gain = onednn_gain(
            typical.in_features, typical.out_features, gelu, torch.get_num_threads()
        )
    if kernel == "onednn" and not gain:
        why = "its layers are not in fp32 on the CPU" if not layers else "this PyTorch lacks it"
        raise ValueError(f"linear_kernel 'onednn' cannot run: {why}; 'auto' takes it where it can")
    if not gain or (kernel == "auto" and gain < FASTER):
        return LinearLayers(gain, [], [])
    for layer in layers:
        vars(layer)[PACKED] = Packed()
        layer.__class__ = PackedLinear
    for module in fused:
        module.__class__ = PackedGELU
    return LinearLayers(gain, layers, fused)


def words_of(pipe_or_transformer: "DiffusionPipeline | nn.Module") -> str:
    """Say which linear layers of a pipeline run by oneDNN; "" for none."""
    models = served_transformers(pipe_or_transformer).values()
    kinds = [type(module) for model in models for module in model.modules()]
    packed, fused = kinds.count(PackedLinear), kinds.count(PackedGELU)
    if not packed:
        return ""
    return f"{packed} linear layers by oneDNN" + (f", {fused} with their GELU" if fused else "")


def _plain(pipe_or_transformer: "DiffusionPipeline | nn.Module") -> Iterator[nn.Linear]:
    for model in served_transformers(pipe_or_transformer).values():
        for module in model.modules():
            if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
                weight = module.weight
                if weight.dtype == torch.float32 and weight.device == CPU:
                    yield module
