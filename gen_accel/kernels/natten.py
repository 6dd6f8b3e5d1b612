"""NATTEN's kernels for windows over a grid: CUDA only, an optional dependency.

The library takes the numbers of `Neighborhood`, which the plan carries in `Windows.boxes`, and
reads q, k and v in token order: no lists, no padding. Text is passed as additional keys and
values. Queries of the text, which see all, run in torch's own attention beside it.

References:
    Hassani et al., "Generalized Neighborhood Attention", 2025, https://arxiv.org/abs/2504.16922.
    NATTEN 0.21.7, `natten.functional` (`na1d`, `na2d`, `na3d`, `attention`). Windows are shifted
    inwards at borders, an even window has one token more before than after, and the queries of a
    stride share the window of their middle one, or of their last where causal: as here, see
    `spans` of the method. Unlike here, a window has at least two tokens. The log-sum-exp is
    natural, over the grid and the additional keys together, and has no backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels.base import AutoPlace, Facts, Kernel, KernelFailed, order_reasons
from gen_accel.plan import Plan, Windows

INSTALL = "pip install natten --no-build-isolation"
DTYPES = (torch.bfloat16, torch.float16)
AXES = ("frames", "rows", "columns")
# Major compute capabilities that NATTEN has kernels of their own for. Kernels for older cards are
# of the generation of FlashAttention-2, without its speed.
FAST = (9, 10)


class Natten(Kernel):
    """NATTEN's windows over a grid."""

    def unsupported(self, facts: Facts) -> list[str]:
        reasons = []
        if not installed():
            reasons.append(
                f"natten is not installed: {INSTALL}; wheels: https://natten.org/install"
            )
        if facts.device.type != "cuda" or torch.version.hip:
            reasons.append(f"NATTEN's kernels run on CUDA only, got {facts.device.type}")
        if facts.dtype not in DTYPES:
            reasons.append(f"it takes bfloat16 and float16, got {facts.dtype}")
        if facts.dim % 8:
            reasons.append(f"head dim must be a multiple of 8, got {facts.dim}")
        if facts.gain:
            reasons.append("it takes no gain on scores")
        if facts.grad and facts.lse:
            reasons.append("its log-sum-exp has no gradient")
        reasons += order_reasons(facts)
        if facts.pattern != "windows":
            reasons.append("it takes windows over a grid alone, as Neighborhood makes them")
        elif facts.plan is not None:
            reasons += _plan_reasons(facts.plan)
        return reasons or _library_reasons(facts.lse)

    def place(self, facts: Facts) -> AutoPlace:
        if facts.device.type == "cpu":
            return AutoPlace(65, "it needs CUDA")
        if facts.pattern != "windows":
            return AutoPlace(36, "it takes windows over a grid alone")
        if torch.cuda.is_available() and torch.cuda.get_device_capability(facts.device)[0] in FAST:
            return AutoPlace(4)
        return AutoPlace(12, "its kernels for this card are an older generation's")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        with _on_its_device(q, scale):
            return over_grid(q, k, v, plan, scale=scale)[0]

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute output and log-sum-exp, without a gradient. The wide output is rounded too: the
        library writes q's dtype."""
        with _on_its_device(q, scale), torch.no_grad():
            out, lse = over_grid(q, k, v, plan, scale=scale, return_lse=True)
        return out, lse


kernel = Natten()


def _plan_reasons(plan: Plan) -> list[str]:
    assert isinstance(plan.partial, Windows)
    boxes = plan.partial.boxes
    if boxes is None:
        return ["the windows of this plan are no boxes of one size"]
    if plan.trimmed:
        return ["this plan leaves out pairs of its windows"]
    single = [
        f"a window must have at least 2 {name}, got 1 of {size}"
        for name, size, window in zip(AXES, boxes.grid, boxes.window, strict=True)
        if window == 1 < size
    ]
    return single or ([] if max(boxes.grid) > 1 else ["the grid is a single token"])


@contextmanager
def _on_its_device(q: Tensor, scale: float) -> Iterator[None]:
    if scale == 0:
        raise KernelFailed("NATTEN takes a scale of 0 for its default")
    try:
        with torch.cuda.device_of(q):
            yield
    except NotImplementedError as error:
        raise KernelFailed(f"NATTEN has no kernel for this: {error}") from error


def over_grid(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, **lse: bool
) -> list[Tensor]:
    """Compute attention in windows, (B, H, N, D) in and out; with `return_lse=True` also the
    log-sum-exp of each row, (B, H, N) fp32."""
    boxes = plan.partial.boxes if isinstance(plan.partial, Windows) else None
    assert boxes is not None
    # NATTEN does not accept an axis of one token.
    long = [axis for axis, size in enumerate(boxes.grid) if size > 1]
    video, sizes = q.shape[2] - boxes.text, [boxes.grid[axis] for axis in long]
    on_grid = (x[:, :, :video].transpose(1, 2).unflatten(1, sizes) for x in (q, k, v))
    options: dict[str, object] = {**lse}
    if boxes.text:
        keys, values = (x[:, :, video:].transpose(1, 2).contiguous() for x in (k, v))
        options |= {"additional_keys": keys, "additional_values": values}
    for name, numbers in (
        ("kernel_size", boxes.window),
        ("stride", boxes.stride),
        ("dilation", boxes.dilation),
        ("is_causal", boxes.is_causal),
    ):
        options[name] = tuple(numbers[axis] for axis in long)
    made = _library(len(long))(*(x.contiguous() for x in on_grid), scale=scale, **options)
    found = made if isinstance(made, tuple) else (made,)
    found = [x.flatten(1, len(long)).transpose(1, 2) for x in found]
    if not boxes.text:
        return found
    q = q[:, :, video:]
    if lse:
        given = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        text = [x.transpose(1, 2) for x in _dense()(*given, scale=scale, **lse)]
    else:
        text = [F.scaled_dot_product_attention(q, k, v, scale=scale)]
    return [torch.cat(pair, dim=2) for pair in zip(found, text, strict=True)]


def _library(axes: int) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Import `na1d`, `na2d` or `na3d`."""
    natten = import_module("natten")
    return (natten.na1d, natten.na2d, natten.na3d)[axes - 1]


def _dense() -> Callable[..., tuple[Tensor, Tensor]]:
    """Import the library's `attention`, (B, N, H, D); torch's own returns no log-sum-exp."""
    return import_module("natten").attention


@cache
def _library_reasons(lse: bool = False) -> list[str]:
    try:
        natten = import_module("natten")
    except ImportError as error:
        return [f"natten cannot be imported: {error}"]
    if not natten.HAS_LIBNATTEN:
        return [f"this natten was built without its CUDA kernels: {INSTALL}"]
    if lse and "return_lse" not in signature(natten.na3d).parameters:
        return ["this natten gives no log-sum-exp, as 0.21.5 and later do"]
    return []


@cache
def installed() -> bool:
    try:
        return find_spec("natten") is not None
    except ValueError:  # barred by hand, as `None` among the modules
        return False
