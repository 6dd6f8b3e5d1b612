"""What every benchmark of a kernel needs: inputs, calls, and the gate before the clock."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel import VideoShape, attention
from gen_accel.attention_processors.methods.blocks import smooth_qk
from gen_accel.kernels import allowance
from gen_accel.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARITY_TOKENS = 2048  # the reference holds a matrix of tokens x tokens in fp64


def draw(
    video: VideoShape,
    method: Any,
    *,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> list[Tensor]:
    """q, k and v, (1, H, N, D), made on the device. Random, but where q and k make the pattern
    smooth over the grid: in noise no block is better than another."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, heads, video.tokens, dim)
    smooth = smooth_qk(video, dim) if method.is_dynamic else ()
    drawn = []
    for place in range(3):  # one after the other, so that one at a time is there in fp32
        x = torch.randn(shape, generator=generator, device=device)
        if place < len(smooth):
            x = 0.5 * x + smooth[place].to(device)
        drawn.append(x.to(dtype))
    return drawn


def call(video: VideoShape, method: Any, kernel: str, like: Tensor) -> Callable[..., Tensor]:
    """The public function on q, k and v; a method's parameters are random, as if trained."""
    branch = method.branch(like.shape[1], like.shape[3])
    if branch is not None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        branch = branch.to(like.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        trained: nn.Module | None = None if branch is None else branch.to(q.dtype)
        return attention(q, k, v, video=video, method=method, kernel=kernel, branch=trained)

    return run


def step(run: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> Callable[[], Any]:
    """A call that gives the output and, with `backward`, the gradients of q, k and v."""
    if not backward:
        return torch.no_grad()(lambda: [run(*inputs)])
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    weight = torch.linspace(-1, 1, leaves[0].numel(), device=leaves[0].device)
    weight = weight.view(leaves[0].shape).to(leaves[0].dtype)

    def both() -> list[Tensor]:
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    return both


def planned(video: VideoShape, method: Any, inputs: list[Tensor]) -> Plan:
    """The plan of a method for one call, of its q and k where these decide."""
    if method.is_dynamic:
        return method.plan_for(*inputs[:2], video=video)
    return method.planned(video, inputs[0].device)


class ParityFailed(ValueError):
    """A kernel errs more than it may.

    Args:
        what: "output", or "gradient" where the output is right.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


def check_parity(
    video: VideoShape, method: Any, kernel: str, inputs: list[Tensor], backward: bool
) -> None:
    """Raises ParityFailed where a kernel errs more than twice as much as the reference in its
    dtype, and its own allowance for the output."""
    reference = call(video, method, "reference", inputs[0])
    ours = call(video, method, kernel, inputs[0])
    plan = planned(video, method, inputs)
    more = allowance(kernel, *inputs, plan, scale=inputs[0].shape[3] ** -0.5)
    hold(f"{kernel} at {video}", ours, reference, inputs, backward, more=more)


def hold(
    who: str,
    actual: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    backward: bool,
    *,
    more: float = 0.0,
) -> dict[str, float]:
    """Errors as shares of what is allowed, of the output and with `backward` of the gradients.

    Error is the largest distance from the reference in fp64. Twice as much as the
    reference errs in the dtype of the inputs is allowed, and one spacing of floats.

    Args:
        more: what is allowed to the output beside, by the kernel.

    Raises:
        ParityFailed: for one that is above 1, or no number.
    """
    exact = step(reference, [x.double() for x in inputs], backward)()
    low = step(reference, inputs, backward)()
    ours = step(actual, inputs, backward)()
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    shares = {}
    for name, x, y, z in zip(names, ours, low, exact, strict=False):
        error = (x.double() - z).abs().max().item()
        spacing = torch.finfo(inputs[0].dtype).eps * z.abs().max().item()
        budget = 2 * ((y.double() - z).abs().max().item() + spacing)
        budget += more if name == "output" else 0.0
        if not error <= budget:
            raise ParityFailed(
                f"{who} fails parity: {name} errs by {error:.2e}, allowed are {budget:.2e}",
                name.split()[0],
            )
        shares[name] = error / budget if budget else 0.0
    return shares


def shrink(video: VideoShape, method: Any) -> VideoShape:
    """Halve the longest side that the method lets be halved, until a reference is cheap."""
    while video.tokens > PARITY_TOKENS:
        halves = [
            VideoShape(*(-(-n // 2) if i == axis else n for i, n in enumerate(video.grid)))
            for axis in sorted(range(3), key=lambda axis: -video.grid[axis])
        ]
        smaller = next((half for half in halves if half != video and fits(half, method)), None)
        if smaller is None:
            break
        video = smaller
    return video


def fits(video: VideoShape, method: Any) -> bool:
    """A window, for one, may not be larger than its axis."""
    try:
        method.planned(video)
    except ValueError:
        return False
    return True


def brief(method: Any) -> str:
    """A method's repr without the options left at their defaults."""
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    default = {f.name: f.default for f in dataclasses.fields(method)}
    changed = [f"{name}={value}" for name, value in options.items() if value != default[name]]
    return f"{type(method).__name__}({', '.join(changed)})"
