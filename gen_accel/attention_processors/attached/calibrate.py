"""Fit a method to a model, without training it: its tile, and the parameters of its layers.

A good tile has tokens that are alike, so that one mean represents them well. The variance of keys
within boxes costs next to nothing and names the few boxes that are worth a try. (On the demo
model, the variance of values orders them wrongly.) The best of the few depends on the method as
well, and is measured.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean, mode
from typing import Any, cast

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import Attachment, attachment_of
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import (
    Layer,
    Observed,
    Observer,
    is_offloaded,
    on_device,
)
from gen_accel.attention_processors.methods.blocks import even_tile
from gen_accel.attention_processors.methods.sparse_linear import LinearBranch, SparseLinear
from gen_accel.attention_processors.seam import SparseProcessor, is_compiled
from gen_accel.method import Box, Method
from gen_accel.plan import widest
from gen_accel.video import VideoShape

PADDING = 1.125  # slots for each token, in boxes that pad little
FEW = 6  # boxes that are tried
HEADS = 4  # of a layer that are looked at, so that many boxes take less than the dense step
MULTIPLE = 16  # of the tokens of a box on GPUs, whose kernels multiply by such tiles

# Penalties on proj, as shares of the mean square of O_l. It changes little from token to token, so
# that least squares alone finds large weights, which fail on the next prompt.
RIDGES = tuple(10.0**power for power in range(-6, 5))


@dataclass(frozen=True)
class TileFit:
    """The boxes that were chosen. Printable.

    Args:
        tile: one, as (frames, rows, columns), or one for each layer where they differ. A layer
            that was not seen has the box that most others have.
        errors: by the number of a layer, relative L2 errors of the method's attention against
            dense, of the boxes that were tried, the best first.
    """

    tile: Box | tuple[Box, ...]
    errors: dict[int, tuple[tuple[Box, float], ...]]

    def __str__(self) -> str:
        lines = ["layer  relative L2 error by tile"]
        for layer, tried in self.errors.items():
            told = (f"{' x '.join(map(str, box))}: {error:.4f}" for box, error in tried)
            lines.append(f"{layer:<5}  {', '.join(told)}")
        return "\n".join(lines)


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
    """Errors of a method before and after its fit. Printable; `to_dict()` for a report.
    `calibrate` measures them on the samples of the fit.

    Args:
        layers: the layers whose parameters were fitted; none for a method without parameters.
        tile: the boxes that were chosen; None where that was not left open.
    """

    layers: tuple[LayerFit, ...]
    tile: TileFit | None = None

    @property
    def before(self) -> float:
        """Mean over the layers; NaN without layers."""
        return fmean(layer.before for layer in self.layers) if self.layers else math.nan

    @property
    def after(self) -> float:
        return fmean(layer.after for layer in self.layers) if self.layers else math.nan

    def to_dict(self) -> dict[str, Any]:
        layers = {
            layer.name: {"before": layer.before, "after": layer.after} for layer in self.layers
        }
        tile = None if self.tile is None else asdict(self.tile)
        if not self.layers:
            return {"tile": tile}
        return {"before": self.before, "after": self.after, "layers": layers, "tile": tile}

    def __str__(self) -> str:
        if not self.layers:
            return str(self.tile or "nothing was fitted: no box of as many tokens fits the grid")
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'relative L2 error':<{width}}  before   after"]
        rows = [*((x.name, x.before, x.after) for x in self.layers)]
        rows.append(("mean", self.before, self.after))
        lines += [f"{name:<{width}}  {before:.4f}  {after:.4f}" for name, before, after in rows]
        lines += [] if self.tile is None else [str(self.tile)]
        return "\n".join(lines)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 4,
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """Choose the tile of the attached method, and fit `proj` or `alpha` of every layer to dense
    attention.

        handle = gen_accel.attach(pipe, SparseLinear())
        prompts = ["a cat surfs", "a dog runs through snow"]
        print(gen_accel.calibrate(pipe, prompts, height=480, width=832, num_frames=81))
        video = pipe("a dog surfs", height=480, width=832, num_frames=81).frames

    A tile that is "auto" becomes, for each layer, the box with which the method's attention errs
    least against dense, of the six boxes within which its keys vary least and of the one that
    "auto" stands for. Boxes hold as many tokens as the smaller block to twice as many, fit the
    grid and pad it by an eighth at most, where there are some that do. The first step of the
    first prompt that the schedule leaves sparse tells, so that a tile costs the steps until then,
    densely. The handle then runs and saves the method with these tiles.

    For parameters, the pipeline generates each prompt densely. In each sparse layer and step the
    difference between the dense output and O_s is regressed on O_l, for all heads together (proj),
    or for each head (alpha, within [0, 1]): least squares in closed form, for proj with the
    penalty that does best on prompts (of a single one, on steps) that are left out in turn. Sums
    are kept in fp64 and no batch is, so that it takes as much memory as one generation.

    Args:
        pipe: a pipeline with `SparseLinear` or `Piecewise` attached. Layers and steps that its
            schedule keeps dense are left out.
        prompts: what the model is used for; for parameters a handful, at least two, for a tile
            one.
        num_inference_steps: few suffice for parameters, as they span all noise levels. For tiles
            as many as will be used: they are chosen by one step.
        seed: of the first prompt's noise; each further prompt takes the next.
        call: what else the pipeline is called with: sizes, guidance scale, an image.

    Raises:
        ValueError: nothing to fit: neither parameters nor a tile, no prompt, or no sparse step.
    """
    handle = attachment_of(pipe)
    _check(handle, pipe, prompts)
    steps = num_inference_steps
    tile = _fit_tile(handle, pipe, prompts[0], steps, seed, call)
    if not handle.branches:
        return Calibration((), tile)
    kinds = {"project": _ProjSums, "alpha": _AlphaSums}
    sums: dict[str, _Sums] = {}

    def add(layer: Layer, o_s: Tensor, o_l: Tensor, dense: Tensor, prompt: int) -> None:
        fold = prompt if len(prompts) > 1 else handle.clock.step
        if layer.name not in sums:
            assert isinstance(layer.method, SparseLinear)  # alone has a branch
            sums[layer.name] = kinds[layer.method.combine](o_s)
        sums[layer.name].add(o_s, o_l, dense, fold)

    _observe(handle, pipe, prompts, add, steps, seed, call)
    branches = {name: cast(LinearBranch, branch) for name, branch in handle.branches.items()}
    fits = tuple(total.fit(name, branches[name]) for name, total in sums.items())
    return Calibration(fits, tile)


def measure_calibration(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 4,
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """Measure the errors of O_s alone and of the output with the branches as they are now, for
    example on prompts that the fit did not see. Arguments and errors are as in `calibrate`;
    nothing is changed."""
    sums: dict[str, Tensor] = {}  # squares of both errors and of the dense output
    samples = 0

    def add(layer: Layer, o_s: Tensor, o_l: Tensor, dense: Tensor, prompt: int) -> None:
        nonlocal samples
        samples += dense[..., 0].numel()
        assert layer.branch is not None
        ours = on_device(layer.branch, o_s.device)(o_s, o_l)
        errors = o_s - dense, ours - dense, dense
        squares = torch.stack([error.to(widest(error.device)).square().sum() for error in errors])
        sums[layer.name] = sums.get(layer.name, 0) + squares

    handle = attachment_of(pipe)
    _check(handle, pipe, prompts)
    if not handle.branches:
        raise ValueError(f"{handle.method} has no parameters whose errors could be measured")
    _observe(handle, pipe, prompts, add, num_inference_steps, seed, call)
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
    current = 0

    def observe(seen: Observed) -> None:
        layer, q, k, v, dense, video, run = seen
        o_s, o_l = layer.method.parts(q, k, v, video=video, kernel=run)
        add(layer, o_s, o_l, dense, current)

    with _observing(handle, observe, num_inference_steps):
        for current, prompt in enumerate(prompts):
            run_to_latents(pipe, prompt, num_inference_steps, seed + current, call)


def _fit_tile(
    handle: Attachment,
    pipe: Any,
    prompt: str,
    num_inference_steps: int,
    seed: int,
    call: dict[str, Any],
) -> TileFit | None:
    """Generate densely up to the first step that is not to be dense, and give the method the tile
    with the least error in that step."""
    tokens = handle.method.tile_tokens
    if not tokens:
        return None
    errors = TileErrors(tokens)

    def look(seen: Observed) -> None:
        errors.add(seen.layer.method, seen)

    with _observing(handle, _once(handle, look), num_inference_steps), suppress(_Enough):
        run_to_latents(pipe, prompt, num_inference_steps, seed, call)
    fit = errors.fit()
    if fit is not None:
        handle.exchange(handle.method.tiled(fit.tile))
    return fit


def _once(handle: Attachment, observe: Observer) -> Observer:
    """Call `observe` in the first step that is seen; raise _Enough in the next."""
    first: int | None = None

    def watch(seen: Observed) -> None:
        nonlocal first
        if first is not None and handle.clock.step != first:
            raise _Enough
        first = handle.clock.step
        observe(seen)

    return watch


class _Enough(Exception):
    """Ends a generation after the one step that was wanted."""


def _check(handle: Attachment, pipe: Any, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list that holds at least one, got {prompts!r}")
    if not handle.branches and (handle.method.has_branch or not handle.method.tile_tokens):
        raise ValueError(
            f"{handle.method} has nothing to fit: attach SparseLinear(), or Piecewise() for its "
            f"tile, with a schedule that leaves layers sparse, got {handle.schedule}"
        )
    for name, branch in handle.branches.items():
        if is_offloaded(branch):
            raise ValueError(
                f"the parameters of {name} are offloaded: calibrate before the model is"
            )
    check_not_compiled(pipe, "calibrate")


@contextmanager
def _observing(handle: Attachment, observe: Observer, steps: int) -> Iterator[None]:
    """Show the sparse layers and steps to `observe` inside, and run them dense; ValueError where
    there was none."""
    was_seen = False

    def watch(seen: Observed) -> None:
        nonlocal was_seen
        was_seen = True
        observe(seen)

    handle.observe = watch
    try:
        yield
    finally:
        handle.observe = None
    if not was_seen:
        raise ValueError(
            f"the schedule keeps all of {steps} steps dense, so that there is nothing to fit: "
            f"{handle.schedule}"
        )


class _Sums(ABC):
    """Sums over the rows of one layer that least squares needs."""

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
        """Add the rows of one head: O_s, O_l and the dense output."""

    @abstractmethod
    def solve(self, branch: LinearBranch) -> Tensor:
        """Set the branch, and return the squares that the fit takes off the residual."""


class _ProjSums(_Sums):
    """Y = X W with X = [O_l, 1] and Y = dense - O_s, over all rows of all heads. X^T X and X^T Y
    of each fold are kept."""

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
        # With one fold, none can be left out; the gain is then zero throughout.
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
    """Return the squares that the weights take off these rows' residual; negative if they add."""
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


def boxes(video: VideoShape, tokens: int, device: torch.device) -> list[Box]:
    """Boxes of `tokens` to twice as many tokens that fit the grid, in order of padding: all that
    pad it little, and a few in any case."""
    F, H, W = (range(1, min(size, 2 * tokens) + 1) for size in video.grid)
    multiple = 1 if device.type == "cpu" else MULTIPLE
    found = [
        box
        for box in product(F, H, W)
        if tokens <= math.prod(box) <= 2 * tokens and not math.prod(box) % multiple
    ]
    found.sort(key=lambda box: (slots(box, video), box))
    little = sum(slots(box, video) <= PADDING * video.video_tokens for box in found)
    return found[: max(FEW, little)]


def fits(box: Box, video: VideoShape) -> bool:
    return all(side <= size for side, size in zip(box, video.grid, strict=True))


def slots(box: Box, video: VideoShape) -> int:
    """Number of slots of a grid that is cut into boxes."""
    return math.prod(-(-n // side) * side for n, side in zip(video.grid, box, strict=True))


def purest(k: Tensor, video: VideoShape, tokens: int) -> list[Box]:
    """Choose the few boxes within which keys vary least, and `even_tile` if it fits. None where no
    box does.

    Args:
        k: (B, H, N, D); some of the heads are read, one at a time.
        tokens: the least number in a box.
    """
    within = dict.fromkeys(boxes(video, tokens, k.device), 0.0)
    if not within:
        return []
    for head in k.split(1, 1)[:: -(-k.shape[1] // HEADS)]:
        purity = Purity(head, video)
        for box in within:
            within[box] += purity.within(box).mean().item()
    even = even_tile(video, tokens)
    more = [even] if fits(even, video) else []
    return [*dict.fromkeys([*sorted(within, key=lambda x: (within[x], x))[:FEW], *more])]


class TileErrors:
    """Errors of a method's attention with each of a few boxes, over the calls that are seen. The
    boxes of a layer are the `purest` of its first call.

    Args:
        tokens: the least number in a box.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.video: VideoShape | None = None  # of the first call; on a UNet, others differ
        self.squares: dict[int, dict[Box, float]] = {}  # by the number of a layer
        self.dense: dict[int, float] = {}

    def add(self, method: Method, seen: Observed) -> None:
        """Add a call. Calls on another grid than the first are left out."""
        layer, (q, k, v, dense, video, run) = seen.layer.number, seen[1:]
        self.video = self.video or video
        if video.grid != self.video.grid:
            return
        if layer not in self.squares:
            self.squares[layer] = dict.fromkeys(purest(k, video, self.tokens), 0.0)
        squares, wide = self.squares[layer], widest(dense.device)
        self.dense[layer] = self.dense.get(layer, 0.0) + dense.to(wide).square().sum().item()
        for box in squares:
            out = method.tiled(box)(q, k, v, video=video, kernel=run)
            squares[box] += (out - dense).to(wide).square().sum().item()

    def fit(self) -> TileFit | None:
        """Return the boxes that err least; None where none fits the grid."""
        errors: dict[int, tuple[tuple[Box, float], ...]] = {}
        for layer, squares in sorted(self.squares.items()):
            if not squares:
                continue
            by = {box: math.sqrt(total / self.dense[layer]) for box, total in squares.items()}
            errors[layer] = tuple(sorted(by.items(), key=lambda one: (one[1], one[0])))
        if not errors:
            return None
        best = {layer: tried[0][0] for layer, tried in errors.items()}
        usual = mode(best.values())
        if len(set(best.values())) == 1:
            return TileFit(usual, errors)
        return TileFit(tuple(best.get(n, usual) for n in range(max(best) + 1)), errors)


class Purity:
    """Prefix sums over the places of a grid, from which the sums of any box follow.

    Args:
        x: (B, H, N, D), the video first.
    """

    def __init__(self, x: Tensor, video: VideoShape) -> None:
        x = x[:, :, : video.video_tokens].to(widest(x.device))
        x = x - x.mean(2, keepdim=True)
        self.total = x.square().sum((2, 3))  # (B, H)
        self.grid = video.grid
        sums = x.unflatten(2, video.grid)
        for axis in (2, 3, 4):
            sums = sums.cumsum(axis)
        self.before = torch.nn.functional.pad(sums, (0, 0, 1, 0, 1, 0, 1, 0))

    def within(self, box: Box) -> Tensor:
        """Variance about the means of boxes, as a share of the variance about the mean of all, (B,
        H): 0 where the tokens of each box are equal, 1 where boxes tell nothing."""
        sums, counts = self.before, torch.ones((), device=self.before.device)
        for axis, (size, side) in enumerate(zip(self.grid, box, strict=True)):
            cuts = torch.tensor([*range(0, size, side), size], device=sums.device)
            sums = sums.index_select(2 + axis, cuts).diff(dim=2 + axis)
            counts = counts[..., None] * cuts.diff()
        between = (sums.square().sum(-1) / counts).sum((2, 3, 4))
        return 1 - between / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)


def check_not_compiled(pipe: Any, verb: str) -> None:
    """Refuse, by a ValueError, a compiled model, in whose graphs nothing is observed.

    Args:
        verb: what is to be done first, for the error.
    """
    for name, transformer in served_transformers(pipe).items():
        if is_compiled(transformer):
            raise ValueError(f"{name} is compiled already: {verb} first, and compile then")


def check_bare(pipe: Any, verb: str) -> None:
    """Refuse, by a ValueError, a compiled model, or one with something attached.

    Args:
        verb: see `check_not_compiled`.
    """
    check_not_compiled(pipe, verb)
    for name, transformer in served_transformers(pipe).items():
        held = [getattr(part, "processor", None) for part in transformer.modules()]
        if any(isinstance(one, SparseProcessor) for one in held):
            raise ValueError(f"a method is attached to {name} already: detach() first")


def run_to_latents(pipe: Any, prompt: str, steps: int, seed: int, call: Mapping[str, Any]) -> None:
    """Run a pipeline on a prompt, without decoding. The noise is drawn on the CPU."""
    pipe(
        prompt=prompt,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        **call,
    )
