"""Public attention function: checks, then method, then kernel."""

from functools import lru_cache, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel import kernels
from gen_accel.method import Method, check_method
from gen_accel.parsing import shown
from gen_accel.video import VideoShape

MOST_DIM = 256  # of a head; no kernel has to support more


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    video: VideoShape,
    method: Method,
    kernel: str = "auto",
    scale: float | None = None,
    branch: nn.Module | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the token pairs that `method` keeps.

    Args:
        q, k, v: (B, H, N, D), same dtype and device, N == video.tokens, video first, text last.
        video: the token grid.
        method: what to compute, e.g. `Radial()`. Changes the answer.
        kernel: how to compute it: "auto" or a name from `gen_accel.kernels.KERNELS`. Never
            changes the answer, and a named kernel never falls back to another one.
        scale: factor of q k^T; default 1 / sqrt(D).
        branch: parameters of the method's branch, made by its `branch(heads, dim)`.
        gate: (B, H, N, D), what the method's `gate(heads, dim, width)` gives for each token.

    Returns:
        (B, H, N, D) in q's dtype; under autocast, in autocast's dtype.

    Raises:
        ValueError: arguments that are no tensors, or of integers; shapes that do not fit, a head
            dim over 256, a scale that is not finite; an unknown kernel, or one that cannot run
            this; an invalid method (see `gen_accel.method.check_method`); a branch or gate for a
            method that has none, or for other heads.
    """
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}")
    if not isinstance(video, VideoShape):
        raise ValueError(
            f"video must be a VideoShape, such as VideoShape(5, 7, 6), got {shown(video)}"
        )
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must share one (B, H, N, D) shape, got {shapes}")
    if q.numel() == 0:
        raise ValueError(f"q, k and v must not be empty, got {tuple(q.shape)}")
    if q.shape[2] != video.tokens:
        raise ValueError(f"q has {q.shape[2]} tokens, the video {video} has {video.tokens}")
    q, k, v = kernels.as_autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = [f"{x.dtype} on {x.device}" for x in (q, k, v)]
        raise ValueError(f"q, k and v must share one dtype and device, got {kinds}")
    if q.shape[-1] > MOST_DIM:
        raise ValueError(f"head dim must be at most {MOST_DIM}, got {q.shape[-1]}")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    given: object = scale
    is_number = isinstance(given, Real | torch.SymFloat | None)
    if not is_number or not abs(factor) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be a number, finite in fp32, got {shown(factor)}")
    kernels.check_name(kernel)
    check_method(method)
    run = partial(kernels.run, scale=factor, kernel=kernel)
    run = kernels.Runner(run, kernel, factor, takes_answers=True)
    options: dict[str, Any] = {}
    if branch is not None:
        if not method.defines("branch"):
            raise ValueError(f"{type(method).__name__} has no branch, got branch={branch}")
        _check_branch(branch, method, q.shape[1], q.shape[3])
        options["branch"] = branch
    if gate is not None:
        if not method.defines("gate"):
            raise ValueError(f"{type(method).__name__} has no gate, got gate={shown(gate)}")
        if not isinstance(gate, Tensor) or gate.shape != q.shape:
            got = tuple(gate.shape) if isinstance(gate, Tensor) else type(gate).__name__
            raise ValueError(f"gate must be a tensor {tuple(q.shape)}, as q, got {got}")
        options["gate"] = gate
    return method(q, k, v, video=video, kernel=run, **options)


def _check_branch(branch: object, method: Method, heads: int, dim: int) -> None:
    """Raise ValueError for a branch whose parameters have shapes for other heads."""
    if torch.compiler.is_compiling() or not isinstance(branch, nn.Module):
        return
    wanted = dict(_shapes(method, heads, dim))
    have = {name: tuple(x.shape) for name, x in branch.state_dict().items()}
    # Adapters have parameters of other names.
    if any(have.get(name, shape) != shape for name, shape in wanted.items()):
        raise ValueError(
            f"branch must be as {type(method).__name__}.branch({heads}, {dim}) makes it, with the "
            f"shapes {wanted}, got {have}"
        )


@lru_cache(maxsize=64)
def _shapes(method: Method, heads: int, dim: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of the parameters of a branch, without allocating any."""
    with torch.device("meta"):
        made = method.branch(heads, dim)
    assert made is not None, "the method has one"
    return tuple((name, tuple(x.shape)) for name, x in made.state_dict().items())
