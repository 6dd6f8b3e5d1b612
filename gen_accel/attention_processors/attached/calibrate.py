"""Fit a method to a model, without training it: its tile, and the parameters of its layers.

A good tile has tokens that are alike, so that one mean represents them well. The variance of keys
within boxes costs next to nothing and names the few boxes that are worth a try. (On the demo
model, the variance of values orders them wrongly.) The best of the few depends on the method as
well, and is measured.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import fmean, mode
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import Attachment, attachment_of
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import Observed, is_offloaded
from gen_accel.attention_processors.methods.blocks import even_tile
from gen_accel.attention_processors.methods.sparse_linear import LinearBranch
from gen_accel.attention_processors.seam import SparseProcessor, is_compiled
from gen_accel.method import Box, Method
from gen_accel.parsing import shown
from gen_accel.plan import widest
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Key = TypeVar("Key", bound=Hashable)

PADDING = 1.125  # slots for each token, in boxes that pad little
FEW = 6  # boxes that are tried
HEADS = 4  # of a layer that are looked at, so that many boxes take less than the dense step
MULTIPLE = 16  # of the tokens of a box on GPUs, whose kernels multiply by such tiles

# Penalties on proj, as shares of the mean square of O_l. It changes little from token to token, so
# that least squares alone finds large weights, which fail on the next prompt.
RIDGES = tuple(10.0**power for power in range(-6, 5))


class StopObserving(Exception):
    """Ends the generation under way, and all that follow."""


def observe_dense(
    handle: Attachment,
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    look: Callable[[Observed, int], None],
    *,
    steps: int,
    seed: int,
    call: Mapping[str, object],
) -> None:
    """Generate each prompt with dense attention, as far as the latents.

    Args:
        look: gets each call that the method would have computed, and the number of the prompt. It
            may raise `StopObserving`.
        seed: of the first prompt's noise, drawn on the CPU; each further prompt takes the next.
        call: further arguments of the pipeline.
    """
    current = 0
    handle.observe = lambda seen: look(seen, current)
    try:
        with suppress(StopObserving):
            for current, prompt in enumerate(prompts):
                pipe(  # pyright: ignore[reportCallIssue]
                    prompt=prompt,
                    num_inference_steps=steps,
                    generator=torch.Generator("cpu").manual_seed(seed + current),
                    output_type="latent",
                    **call,
                )
    finally:
        handle.observe = None


def check_not_compiled(pipe: "DiffusionPipeline", verb: str) -> None:
    """Raise ValueError for a compiled model, in whose graphs nothing is observed."""
    for name, transformer in served_transformers(pipe).items():
        if is_compiled(transformer):
            raise ValueError(f"{name} is compiled already: {verb} first, and compile then")


def check_bare(pipe: "DiffusionPipeline", verb: str) -> None:
    """Raise ValueError for a compiled model, or one with something attached."""
    check_not_compiled(pipe, verb)
    for name, transformer in served_transformers(pipe).items():
        held = [getattr(part, "processor", None) for part in transformer.modules()]
        if any(isinstance(one, SparseProcessor) for one in held):
            raise ValueError(f"a method is attached to {name} already: detach() first")


class RelativeErrors(Generic[Key]):
    """Relative L2 errors against dense attention, summed over calls by a key."""

    def __init__(self) -> None:
        self.squares: dict[Key, tuple[float, float]] = {}  # of the error and of the dense output

    def add(self, key: Key, out: Tensor, dense: Tensor) -> None:
        """Add a call, (B, H, N, D) each. Waits for the device."""
        wide = widest(dense.device)
        error, whole = self.squares.get(key, (0.0, 0.0))
        error += (out - dense).to(wide).square().sum().item()
        self.squares[key] = error, whole + dense.to(wide).square().sum().item()

    def of(self, key: Key) -> float:
        error, whole = self.squares[key]
        return math.sqrt(error / whole)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


@dataclass(frozen=True)
class TileFit:
    """The boxes that were chosen. Printable.

    Args:
        tile: one, as (frames, rows, columns), or one for each layer if they differ. A layer
            that was not seen has the box that most others have.
        errors: by the number of a layer, relative L2 errors of the method's attention against
            dense, of the boxes that were tried, the best first.
    """

    tile: Box | tuple[Box, ...]
    errors: dict[int, tuple[tuple[Box, float], ...]]

    def __str__(self) -> str:
        rows = [["layer", "relative L2 error by tile"]]
        for layer, tried in self.errors.items():
            told = (f"{' x '.join(map(str, box))}: {error:.4f}" for box, error in tried)
            rows.append([str(layer), ", ".join(told)])
        return table(rows)


@dataclass(frozen=True)
class LayerFit:
    """Relative L2 error of one layer's attention output against dense, before and after, on so
    many rows (tokens of all heads, calls and prompts)."""

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
        tile: the boxes that were chosen; None if it was given.
    """

    layers: tuple[LayerFit, ...]
    tile: TileFit | None = None

    @property
    def before(self) -> float:
        """Mean over the layers; NaN without layers."""
        return fmean(layer.before for layer in self.layers) if self.layers else math.nan

    @property
    def after(self) -> float:
        """Mean over the layers; NaN without layers."""
        return fmean(layer.after for layer in self.layers) if self.layers else math.nan

    def to_dict(self) -> dict[str, object]:
        tile = None if self.tile is None else asdict(self.tile)
        if not self.layers:
            return {"tile": tile}
        layers = {one.name: {"before": one.before, "after": one.after} for one in self.layers}
        return {"before": self.before, "after": self.after, "layers": layers, "tile": tile}

    def __str__(self) -> str:
        if not self.layers:
            return str(self.tile or "nothing was fitted: no box of as many tokens fits the grid")
        rows = [(x.name, x.before, x.after) for x in self.layers]
        rows.append(("mean", self.before, self.after))
        cells = [[name, f"{before:.4f}", f"{after:.4f}"] for name, before, after in rows]
        told = table([["relative L2 error", "before", "after"], *cells])
        return told if self.tile is None else f"{told}\n{self.tile}"


def calibrate(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 4,
    seed: int = 0,
    **call: object,
) -> Calibration:
    """Choose the tile of the attached method, and fit `proj` or `alpha` of every layer to dense
    attention.

        handle = gen_accel.attach(pipe, SparseLinear())
        prompts = ["a cat surfs", "a dog runs through snow"]
        print(gen_accel.calibrate(pipe, prompts, height=480, width=832, num_frames=81))
        video = pipe("a dog surfs", height=480, width=832, num_frames=81).frames

    A tile that is "auto" becomes, for each layer, the box with which the method's attention errs
    least against dense, of the six boxes within which its keys vary least and of the one that
    "auto" stands for. The first step of the first prompt that the schedule leaves sparse tells.
    The handle then runs and saves the method with these tiles.

    For parameters, the pipeline generates each prompt densely. In each sparse layer and step the
    difference between the dense output and O_s is regressed on O_l, for all heads together (proj),
    or for each head (alpha, within [0, 1]): least squares in closed form, for proj with the
    penalty that does best on prompts (of a single one, on steps) that are left out in turn. It
    takes as much memory as one generation.

    Args:
        pipe: a pipeline with `SparseLinear` or `Piecewise` attached. Layers and steps that its
            schedule keeps dense are left out.
        prompts: what the model is used for; for parameters a handful, at least two, for a tile
            one.
        num_inference_steps: few suffice for parameters, as they span all noise levels. For tiles
            as many as will be used: they are chosen by one step.
        seed: of the first prompt's noise; each further prompt takes the next.
        call: further arguments of the pipeline: sizes, guidance scale, an image.

    Raises:
        ValueError: nothing to fit: neither parameters nor a tile, no prompt, or no sparse step.
    """
    handle, tile = _checked(pipe, prompts), None
    run = partial(observe_dense, steps=num_inference_steps, seed=seed, call=call)
    if handle.method.tile_tokens:
        errors = TileErrors(handle.method.tile_tokens)
        first: list[int] = []

        def try_boxes(seen: Observed, prompt: int) -> None:
            if first and handle.clock.step != first[0]:
                raise StopObserving
            first[:] = [handle.clock.step]
            errors.add_call(seen.layer.method, seen)

        run(handle, pipe, prompts[:1], try_boxes)
        _check_sparse(first, handle, num_inference_steps)
        tile = errors.fit()
        if tile is not None:
            handle.exchange(handle.method.tiled(tile.tile))
    if not handle.branches:
        return Calibration((), tile)
    sums: dict[str, LeastSquares] = {}

    def add(seen: Observed, prompt: int) -> None:
        o_s, o_l, branch = _parts(seen)
        name, dense = seen.layer.name, seen.dense
        fold = prompt if len(prompts) > 1 else handle.clock.step
        sums.setdefault(name, LeastSquares(branch, dense.device)).add(o_s, o_l, dense, fold)

    run(handle, pipe, prompts, add)
    _check_sparse(sums, handle, num_inference_steps)
    return Calibration(tuple(total.fit(name) for name, total in sums.items()), tile)


def measure_calibration(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 4,
    seed: int = 0,
    **call: object,
) -> Calibration:
    """Measure the errors of O_s alone and of the output with the branches as they are now, for
    example on prompts that the fit did not see. Arguments and errors are as in `calibrate`;
    nothing is changed."""
    handle = _checked(pipe, prompts)
    if not handle.branches:
        raise ValueError(f"{handle.method} has no parameters whose errors could be measured")
    errors: RelativeErrors[tuple[str, str]] = RelativeErrors()
    samples: dict[str, int] = {}

    @torch.no_grad()
    def compare(seen: Observed, prompt: int) -> None:
        o_s, o_l, branch = _parts(seen)
        name, dense = seen.layer.name, seen.dense
        samples[name] = samples.get(name, 0) + dense[..., 0].numel()
        errors.add((name, "before"), o_s, dense)
        errors.add((name, "after"), branch(o_s, o_l), dense)

    steps = num_inference_steps
    observe_dense(handle, pipe, prompts, compare, steps=steps, seed=seed, call=call)
    _check_sparse(samples, handle, steps)
    return Calibration(
        tuple(
            LayerFit(name, errors.of((name, "before")), errors.of((name, "after")), rows)
            for name, rows in samples.items()
        )
    )


def _checked(pipe: "DiffusionPipeline", prompts: Sequence[str]) -> Attachment:
    """Return the handle of the method to fit; ValueError as `calibrate`."""
    handle = attachment_of(pipe)
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list that holds at least one, got {shown(prompts)}")
    method = handle.method
    fits = handle.branches if method.defines("branch") else method.tile_tokens
    if method.defines("gate") or not fits:
        raise ValueError(
            f"{method} has nothing to fit: attach SparseLinear(), or Piecewise() for its "
            f"tile, with a schedule that leaves layers sparse, got {handle.schedule}"
        )
    for name, branch in handle.branches.items():
        if is_offloaded(branch):
            raise ValueError(
                f"the parameters of {name} are offloaded: calibrate before the model is"
            )
    check_not_compiled(pipe, "calibrate")
    return handle


def _check_sparse(seen: Sized, handle: Attachment, steps: int) -> None:
    """Raise ValueError if nothing was seen, as no step is sparse."""
    if not seen:
        raise ValueError(
            f"the schedule keeps all of {steps} steps dense, so that there is nothing to fit: "
            f"{handle.schedule}"
        )


def _parts(seen: Observed) -> tuple[Tensor, Tensor, LinearBranch]:
    """O_s and O_l of a call, and the branch that combines them."""
    layer = seen.layer
    assert isinstance(layer.branch, LinearBranch)
    parts = layer.method.parts(seen.q, seen.k, seen.v, video=seen.video, kernel=seen.run)
    return *parts, layer.branch


class LeastSquares:
    """Regression of Y = dense - O_s on X, over the rows of one layer: X^T X and X^T Y.

    For proj, X = [O_l, 1], of all heads together; the sums of each fold are kept. For alpha,
    X = O_l - O_s, whose weight is 1 - alpha, for each head.
    """

    def __init__(self, branch: LinearBranch, device: torch.device) -> None:
        self.branch, self.samples, self.wide = branch, 0, widest(device)
        zero = torch.zeros((), dtype=self.wide, device=device)
        self.dense = self.residual = zero  # squares of the dense output, and of Y
        self.folds: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, o_s: Tensor, o_l: Tensor, dense: Tensor, fold: int) -> None:
        """Add a call, (B, H, N, D) each. Rows of one fold are left out together."""
        self.samples += dense[..., 0].numel()
        heads = dense.shape[1]
        for head in range(heads):  # fp64 of one head at a time
            s, l, d = (x[:, head].flatten(0, 1).to(self.wide) for x in (o_s, o_l, dense))
            y = d - s
            self.dense = self.dense + d.square().sum()
            self.residual = self.residual + y.square().sum()
            if self.branch.alpha is None:
                x = torch.cat([l, l.new_ones(len(l), 1)], 1)
                xx, xy = x.T @ x, x.T @ y
            else:
                fold, own = 0, F.one_hot(torch.tensor(head), heads).to(y)
                xx, xy = own * (l - s).square().sum(), own * ((l - s) * y).sum()
            if fold in self.folds:
                xx, xy = self.folds[fold][0] + xx, self.folds[fold][1] + xy
            self.folds[fold] = xx, xy

    @torch.no_grad()
    def fit(self, name: str) -> LayerFit:
        """Set the branch to what takes most off the residual."""
        xx, xy = (torch.stack(parts).sum(0) for parts in zip(*self.folds.values(), strict=True))
        branch = self.branch
        if branch.alpha is not None:
            weights = (xy / xx.clamp_min(torch.finfo(self.wide).tiny)).clamp(0, 1)
            branch.alpha.copy_(1 - weights)
        else:
            assert branch.proj is not None
            folds = self.folds.values()
            gains = [
                sum(_gain(_ridge(xx - x, xy - y, ridge), x, y).item() for x, y in folds)
                for ridge in RIDGES
            ]
            # With one fold, none can be left out; the gain is then zero throughout.
            best = max(range(len(RIDGES)), key=lambda i: (gains[i], i))
            weights = _ridge(xx, xy, RIDGES[best])
            branch.proj.weight.copy_(weights[:-1].T)
            branch.proj.bias.copy_(weights[-1])
        left = (self.residual - _gain(weights, xx, xy)).clamp_min(0)
        before, after = ((x / self.dense).sqrt().item() for x in (self.residual, left))
        return LayerFit(name, before, after, self.samples)


def _ridge(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """(D + 1, D) weights; zeros without rows."""
    penalty = (ridge * xx.diagonal().mean()).clamp_min(torch.finfo(xx.dtype).tiny)
    return torch.linalg.solve(xx + penalty * torch.eye(len(xx)).to(xx), xy)


def _gain(weights: Tensor, xx: Tensor, xy: Tensor) -> Tensor:
    """Squares that weights take off the residual; negative if they add."""
    predicted = xx @ weights if weights.ndim > 1 else xx * weights
    return (2 * weights * xy).sum() - (weights * predicted).sum()


def boxes(video: VideoShape, tokens: int, device: torch.device) -> list[Box]:
    """Boxes of `tokens` to twice as many tokens that fit the grid, in order of padding: all that
    pad it little, and a few in any case."""
    sides = (range(1, min(size, 2 * tokens) + 1) for size in video.grid)
    multiple = 1 if device.type == "cpu" else MULTIPLE
    fit: list[Box] = [
        (box[0], box[1], box[2])
        for box in product(*sides)
        if tokens <= math.prod(box) <= 2 * tokens and not math.prod(box) % multiple
    ]
    slots = {
        box: math.prod(-(-n // side) * side for n, side in zip(video.grid, box, strict=True))
        for box in fit
    }
    little = sum(held <= PADDING * video.video_tokens for held in slots.values())
    return sorted(fit, key=lambda box: (slots[box], box))[: max(FEW, little)]


def purest(k: Tensor, video: VideoShape, tokens: int) -> list[Box]:
    """Choose the few boxes, of `tokens` to twice as many, within which keys (B, H, N, D) vary
    least, and `even_tile` if it fits. Some of the heads are read, one at a time."""
    within = dict.fromkeys(boxes(video, tokens, k.device), 0.0)
    if not within:
        return []
    for head in k.split(1, 1)[:: -(-k.shape[1] // HEADS)]:
        purity = Purity(head, video)
        for box in within:
            within[box] += purity.within(box).mean().item()
    even = even_tile(video, tokens)
    more = [even] if all(n <= size for n, size in zip(even, video.grid, strict=True)) else []
    return [*dict.fromkeys([*sorted(within, key=lambda x: (within[x], x))[:FEW], *more])]


class TileErrors(RelativeErrors[tuple[int, Box]]):
    """Errors of a method's attention by layer and box, over the calls that are seen. The boxes of
    a layer are the `purest` of its first call, of `tokens` to twice as many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.video: VideoShape | None = None  # of the first call; on a UNet, others differ
        self.tried: dict[int, list[Box]] = {}

    def add_call(self, method: Method, seen: Observed) -> None:
        """Add a call. Calls on another grid than the first are left out."""
        layer, q, k, v, dense, video, run = seen
        self.video = self.video or video
        if video.grid != self.video.grid:
            return
        if layer.number not in self.tried:
            self.tried[layer.number] = purest(k, video, self.tokens)
        for box in self.tried[layer.number]:
            out = method.tiled(box)(q, k, v, video=video, kernel=run)
            self.add((layer.number, box), out, dense)

    def fit(self) -> TileFit | None:
        """Return the boxes that err least; None if none fits the grid."""
        found: dict[int, list[tuple[float, Box]]] = {}
        for layer, box in sorted(self.squares):
            found.setdefault(layer, []).append((self.of((layer, box)), box))
        if not found:
            return None
        errors = {
            layer: tuple((box, error) for error, box in sorted(tried))
            for layer, tried in found.items()
        }
        best = {layer: tried[0][0] for layer, tried in errors.items()}
        usual = mode(best.values())
        if len(set(best.values())) == 1:
            return TileFit(usual, errors)
        return TileFit(tuple(best.get(n, usual) for n in range(max(best) + 1)), errors)


class Purity:
    """Prefix sums of x, (B, H, N, D), over the places of a grid, from which the sums of any box
    follow."""

    def __init__(self, x: Tensor, video: VideoShape) -> None:
        x = x[:, :, : video.video_tokens].to(widest(x.device))
        x = x - x.mean(2, keepdim=True)
        self.total = x.square().sum((2, 3))  # (B, H)
        self.grid = video.grid
        sums = x.unflatten(2, video.grid)
        for axis in (2, 3, 4):
            sums = sums.cumsum(axis)
        self.before = F.pad(sums, (0, 0, 1, 0, 1, 0, 1, 0))

    def within(self, box: Box) -> Tensor:
        """Variance about the means of boxes, as a share of the variance about the mean of all, (B,
        H): 0 if the tokens of each box are equal, 1 if boxes tell nothing."""
        sums, counts = self.before, torch.ones((), device=self.before.device)
        for axis, (size, side) in enumerate(zip(self.grid, box, strict=True)):
            cuts = torch.tensor([*range(0, size, side), size], device=sums.device)
            sums = sums.index_select(2 + axis, cuts).diff(dim=2 + axis)
            counts = counts[..., None] * cuts.diff()
        between = (sums.square().sum(-1) / counts).sum((2, 3, 4))
        return 1 - between / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)
