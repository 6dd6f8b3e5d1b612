"""Fit the parameters of sparse-linear attention to a model, without training it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import Attachment, attachment_of
from gen_accel.attention_processors.attached.layer import Layer, is_offloaded, on_device
from gen_accel.attention_processors.attached.transformers import served_transformers
from gen_accel.attention_processors.methods.sparse_linear import LinearBranch
from gen_accel.attention_processors.seam import is_compiled
from gen_accel.plan import widest
from gen_accel.video import VideoShape

# Penalties on proj, as shares of the mean square of O_l. It changes little from token to token, so
# that least squares alone finds large weights, which fail on the next prompt.
RIDGES = tuple(10.0**power for power in range(-6, 5))


@dataclass(frozen=True)
class LayerFit:
    """Relative L2 error of one layer's attention output against dense, before and after.

    Args:
        samples: rows (tokens of all heads, calls and prompts) that it was fitted to.
    """

    name: str
    before: float
    after: float
    samples: int


@dataclass(frozen=True)
class Calibration:
    """Printable; `to_dict()` for a report. Of `calibrate`, errors are those on the samples of the
    fit."""

    layers: tuple[LayerFit, ...]

    @property
    def before(self) -> float:
        """Mean over the layers."""
        return sum(layer.before for layer in self.layers) / len(self.layers)

    @property
    def after(self) -> float:
        return sum(layer.after for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        layers = {
            layer.name: {"before": layer.before, "after": layer.after} for layer in self.layers
        }
        return {"before": self.before, "after": self.after, "layers": layers}

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'relative L2 error':<{width}}  before   after"]
        rows = [*((x.name, x.before, x.after) for x in self.layers)]
        rows.append(("mean", self.before, self.after))
        lines += [f"{name:<{width}}  {before:.4f}  {after:.4f}" for name, before, after in rows]
        return "\n".join(lines)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 4,
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """Fit `proj` or `alpha` of every layer to the dense attention of a few generations.

        handle = gen_accel.attach(pipe, SparseLinear())
        prompts = ["a cat surfs", "a dog runs through snow"]
        print(gen_accel.calibrate(pipe, prompts, height=480, width=832, num_frames=81))
        video = pipe("a dog surfs", height=480, width=832, num_frames=81).frames

    The pipeline generates each prompt densely. In each sparse layer and step the difference
    between the dense output and O_s is regressed on O_l, for all heads together (proj), or for
    each head (alpha, within [0, 1]): least squares in closed form, for proj with the penalty that
    does best on prompts (of a single one, on steps) that are left out in turn. Sums are kept in
    fp64 and no batch is, so that it takes as much memory as one generation.

    Args:
        pipe: a pipeline with `SparseLinear` attached. Layers and steps that its schedule keeps
            dense are left out.
        prompts: what the model is used for; a handful, at least two.
        num_inference_steps: few suffice, as they span all noise levels.
        seed: of the first prompt's noise; each further prompt takes the next.
        call: what else the pipeline is called with: sizes, guidance scale, an image.

    Raises:
        ValueError: nothing to fit: no `SparseLinear` attached, no prompt, or no sparse step.
    """
    kinds = {"project": _ProjSums, "alpha": _AlphaSums}
    sums: dict[str, _Sums] = {}

    def add(layer: Layer, o_s: Tensor, o_l: Tensor, dense: Tensor, prompt: int) -> None:
        fold = prompt if len(prompts) > 1 else handle.clock.step
        if layer.name not in sums:
            sums[layer.name] = kinds[layer.method.combine](o_s)
        sums[layer.name].add(o_s, o_l, dense, fold)

    handle = attachment_of(pipe)
    _observe(handle, pipe, prompts, add, num_inference_steps, seed, call)
    return Calibration(
        tuple(total.fit(name, handle.branches[name]) for name, total in sums.items())
    )


def measure_calibration(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 4,
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """The errors of O_s alone and of what the branches make of it now, on other prompts, say, than
    those of the fit. Arguments and errors are those of `calibrate`; nothing is changed."""
    sums: dict[str, Tensor] = {}  # squares of both errors and of the dense output
    samples = 0

    def add(layer: Layer, o_s: Tensor, o_l: Tensor, dense: Tensor, prompt: int) -> None:
        nonlocal samples
        samples += dense[..., 0].numel()
        ours = on_device(layer.branch, o_s.device)(o_s, o_l)
        errors = o_s - dense, ours - dense, dense
        squares = torch.stack([error.to(widest(error.device)).square().sum() for error in errors])
        sums[layer.name] = sums.get(layer.name, 0) + squares

    _observe(attachment_of(pipe), pipe, prompts, add, num_inference_steps, seed, call)
    fits = []
    for name, squares in sums.items():
        before, after = (squares[:2] / squares[2]).sqrt().tolist()
        fits.append(LayerFit(name, before, after, samples // len(sums)))
    return Calibration(tuple(fits))


def _observe(
    handle: Attachment,
    pipe: Any,
    prompts: Sequence[str],
    add: Callable[[Layer, Tensor, Tensor, Tensor, int], None],
    num_inference_steps: int,
    seed: int,
    call: dict[str, Any],
) -> None:
    """Generate densely, and show `add` O_s, O_l and the dense output, (B, H, N, D), of each sparse
    layer and step, and the number of the prompt."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list that holds at least one, got {prompts!r}")
    if not handle.branches:
        raise ValueError(
            f"{handle.method} has nothing to fit: attach SparseLinear(), with a schedule that "
            f"leaves layers sparse, got {handle.schedule}"
        )
    for name, branch in handle.branches.items():
        if is_offloaded(branch):
            raise ValueError(
                f"the parameters of {name} are offloaded: calibrate before the model is"
            )
    for name, transformer in served_transformers(pipe).items():
        if is_compiled(transformer):
            raise ValueError(f"{name} is compiled already: calibrate first, and compile then")
    seen, current = 0, 0

    def observe(
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        video: VideoShape,
        run: Callable,
    ) -> None:
        nonlocal seen
        seen += 1
        o_s, o_l = layer.method.parts(q, k, v, video=video, kernel=run)
        add(layer, o_s, o_l, dense, current)

    handle.observe = observe
    try:
        for current, prompt in enumerate(prompts):
            pipe(
                prompt=prompt,
                num_inference_steps=num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(seed + current),
                output_type="latent",
                **call,
            )
    finally:
        handle.observe = None
    if not seen:
        raise ValueError(
            f"the schedule keeps all of {num_inference_steps} steps dense, so that there is "
            f"nothing to fit: {handle.schedule}"
        )


class _Sums(ABC):
    """What least squares needs of the rows of one layer."""

    def __init__(self, like: Tensor) -> None:
        self.samples = 0
        self.dense = like.new_zeros((), dtype=widest(like.device))  # squares of the dense output
        self.residual = like.new_zeros((), dtype=widest(like.device))  # squares of dense - O_s

    def add(self, o_s: Tensor, o_l: Tensor, dense: Tensor, fold: int) -> None:
        B, H, N, _ = dense.shape
        self.samples += B * H * N
        wide = widest(dense.device)
        for head in range(H):  # fp64 of one head at a time
            s, l, d = (x[:, head].flatten(0, 1).to(wide) for x in (o_s, o_l, dense))
            self.dense += d.square().sum()
            self.residual += (d - s).square().sum()
            self.add_head(head, fold, s, l, d)

    @torch.no_grad()
    def fit(self, name: str, branch: LinearBranch) -> LayerFit:
        left = (self.residual - self.solve(branch)).clamp_min(0)
        before, after = (math.sqrt((x / self.dense).item()) for x in (self.residual, left))
        return LayerFit(name, before, after, self.samples)

    @abstractmethod
    def add_head(self, head: int, fold: int, s: Tensor, l: Tensor, d: Tensor) -> None:
        """Rows of O_s, O_l and the dense output."""

    @abstractmethod
    def solve(self, branch: LinearBranch) -> Tensor:
        """Set the branch; the squares that the fit takes off the residual."""


class _ProjSums(_Sums):
    """Y = X W with X = [O_l, 1] and Y = dense - O_s, over all rows of all heads. What is kept is
    X^T X and X^T Y of each fold."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.folds: dict[int, tuple[Tensor, Tensor]] = {}

    def add_head(self, head: int, fold: int, s: Tensor, l: Tensor, d: Tensor) -> None:
        x = torch.cat([l, l.new_ones(len(l), 1)], 1)
        products = x.T @ x, x.T @ (d - s)
        known = self.folds.get(fold)
        if known is not None:
            products = known[0] + products[0], known[1] + products[1]
        self.folds[fold] = products

    def solve(self, branch: LinearBranch) -> Tensor:
        assert branch.proj is not None
        folds = [*self.folds.values()]
        xx, xy = (torch.stack(parts).sum(0) for parts in zip(*folds, strict=True))
        gains = [
            sum(_gain(_ridge(xx - x, xy - y, ridge), x, y).item() for x, y in folds)
            for ridge in RIDGES
        ]
        # Of one fold nothing can be left out; the gain is then zero throughout.
        best = max(range(len(RIDGES)), key=lambda i: (gains[i], i))
        weights = _ridge(xx, xy, RIDGES[best])
        branch.proj.weight.copy_(weights[:-1].T)
        branch.proj.bias.copy_(weights[-1])
        return _gain(weights, xx, xy)


def _ridge(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """(D + 1, D) weights; zeros where there are no rows."""
    penalty = (ridge * xx.diagonal().mean()).clamp_min(torch.finfo(xx.dtype).tiny)
    return torch.linalg.solve(xx + penalty * torch.eye(len(xx)).to(xx), xy)


def _gain(weights: Tensor, xx: Tensor, xy: Tensor) -> Tensor:
    """The squares that the weights take off the residual of these rows; negative if they add."""
    return (2 * weights * xy).sum() - (weights * (xx @ weights)).sum()


class _AlphaSums(_Sums):
    """dense - O_s = (1 - alpha) (O_l - O_s), for each head."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.xx, self.xy = (
            like.new_zeros(like.shape[1], dtype=widest(like.device)) for _ in range(2)
        )

    def add_head(self, head: int, fold: int, s: Tensor, l: Tensor, d: Tensor) -> None:
        self.xx[head] += (l - s).square().sum()
        self.xy[head] += ((l - s) * (d - s)).sum()

    def solve(self, branch: LinearBranch) -> Tensor:
        assert branch.alpha is not None
        share = (self.xy / self.xx.clamp_min(torch.finfo(self.xx.dtype).tiny)).clamp(0, 1)
        branch.alpha.copy_(1 - share)
        return (2 * share * self.xy - share.square() * self.xx).sum()
