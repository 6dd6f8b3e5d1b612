"""Image attention that an adapter adds to the attentions of one model, and its terms for a call.

B rows of a batch, N tokens of video or image, H heads, D dim of a head, G groups of image tokens,
T tokens of a group.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import Family, ImageAttention, argument_names
from gen_accel.attention_processors.image_prompt import (
    ImageAdapter,
    image_attention,
    warn_of_other_text,
)
from gen_accel.pipelines.image_prompt.guidance import Calls, Layout
from gen_accel.pipelines.image_prompt.strength import Strength, token_weights
from gen_accel.pipelines.image_prompt.tokens import Images, Side, Watched
from gen_accel.video import VideoShape, temporal_patch, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

_WEIGHTS = 64  # most scales to keep weights for; each block and step may have its own
Spans = Sequence[tuple[int, int]] | None  # see `strength.frame_spans`


Weight = Tensor | dict[int, Tensor] | None  # see `ImageTerm`


class ImageTerm(NamedTuple):
    """One attention to images, for all rows of a call: weight * (Attn(q, k, v) - start).

    Args:
        k, v: (B, T, H, D).
        start_k, start_v: keys and values whose attention is subtracted; None for nothing.
        weight: a scalar tensor, or (1 or B, N, 1, 1) by N; None for 1. Never a Python number, as
            torch.compile would compile a graph for each.
        frames: number of frames, if each frame attends by itself in a row of its own; else None.
    """

    k: Tensor
    v: Tensor
    start_k: Tensor | None = None
    start_v: Tensor | None = None
    weight: Weight = None
    frames: int | None = None


class Branch:
    """Image attention of one site, filled with terms before each forward pass.

    A family calls the branch with the queries. All branches of a model look alike to
    torch.compile.

    Gradient checkpointing calls the branch again during the backward pass, with gradients. Terms
    of passes with gradients (`graded`) are therefore kept apart from terms of passes without. If
    another pass with gradients has since filled in other images, the backward pass is refused.
    """

    def __init__(self, site: ImageAttention) -> None:
        self.site = site
        self.clear()

    def clear(self) -> None:
        self.terms: tuple[ImageTerm, ...] = ()
        self.graded: tuple[ImageTerm, ...] = ()
        self.turn = 0

    def fill(self, terms: tuple[ImageTerm, ...], turn: int) -> None:
        """Set the terms of the next forward pass.

        Args:
            turn: number that changes whenever the terms may have changed.
        """
        self.terms = terms
        if torch.is_grad_enabled():
            self.graded, self.turn = terms, turn

    @property
    def acts(self) -> bool:
        """Whether there are terms to add."""
        return bool(self.graded if torch.is_grad_enabled() else self.terms)

    def __call__(self, q: Tensor, samples: slice) -> Tensor | None:
        """Attend to the images, (b, N, H, D) for the queries of `samples`; None without terms."""
        terms, total = self.graded if torch.is_grad_enabled() else self.terms, None
        frames = terms[0].frames if terms else None
        if terms and not self.site.by_sample:
            given, rows = len(q), len(terms[0].k)
            if given != rows * (frames or 1):
                videos = "samples" if frames is None else f"videos of {frames} frames"
                raise ValueError(
                    f"{self.site.name} is given {given} rows at a time, of {rows} {videos}: image "
                    "prompts do not work with features that run a part of the rows, such as "
                    "FasterCache and split inference; disable them"
                )
        if frames is not None:  # join the frames of a video, as if they attended together
            q = q.unflatten(0, (-1, frames)).flatten(1, 2)
            samples = slice(0, len(q))
        for term in terms:
            out = image_attention(q, term.k[samples].to(q), term.v[samples].to(q))
            if term.start_k is not None and term.start_v is not None:
                k, v = term.start_k[samples].to(q), term.start_v[samples].to(q)
                out = out - image_attention(q, k, v)
            if term.weight is not None:
                out = out * self._weight(term.weight, q, samples)
            total = out if total is None else total + out
        if total is not None and frames is not None:
            total = total.unflatten(1, (frames, -1)).flatten(0, 1)
        # Not in a graph, which would be compiled again for each number of a turn.
        if total is None or not total.requires_grad or torch.compiler.is_compiling():
            return total
        return cast(Tensor, _OfOneTurn.apply(total, self.turn))

    def _weight(self, weight: Tensor | dict[int, Tensor], q: Tensor, samples: slice) -> Tensor:
        if not isinstance(weight, dict):
            return weight
        if q.shape[1] not in weight:
            raise ValueError(
                f"{self.site.name} attends over {q.shape[1]} tokens, but masks and scales by "
                f"frame are for the {max(weight)} of the output: other tokens stand beside them, "
                "or the model does not divide this size. Give no mask, and scales for all frames"
            )
        own = weight[q.shape[1]].to(q)
        return own if len(own) == 1 else own[samples]

    def __deepcopy__(self, memo: dict) -> "Branch":
        """Copy without terms, which may hold a graph; a branch is filled before each call."""
        copy = memo[id(self)] = object.__new__(type(self))
        Branch.__init__(copy, deepcopy(self.site, memo))
        return copy


class _OfOneTurn(torch.autograd.Function):
    """Identity that refuses a backward pass of another turn, by a ValueError.

    Gradient checkpointing replaces the saved tensor by a recomputed one, with the turn at that
    time; `ctx.turn` keeps the turn of the first forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: int) -> Tensor:
        ctx.turn = turn
        ctx.save_for_backward(torch.tensor(turn, device="cpu"))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (turn,) = ctx.saved_tensors
        if int(turn) != ctx.turn:
            raise ValueError(
                "gradient checkpointing ran an image prompt again after another forward pass with "
                "other images or scales, so that these gradients would be of the wrong image: run "
                "backward() after each forward pass, or disable gradient checkpointing"
            )
        return grad, None


class Turns:
    """Counter `now` of the inputs of forward passes with gradients; see `Branch`.

    It advances whenever the images or their scales change.
    """

    def __init__(self) -> None:
        self.now = 0
        self.forget()

    def forget(self) -> None:
        self._shown: tuple[object, ...] = ()
        self._how: object = None

    def take(self, shown: tuple[object, ...], how: object) -> None:
        """Note the inputs of a forward pass.

        Args:
            shown: features or images, compared by identity.
            how: layout and scales, compared by value.
        """
        same = len(shown) == len(self._shown) and all(map(operator.is_, shown, self._shown))
        if not same or how != self._how:
            self.now += 1
        self._shown, self._how = shown, how

    def __deepcopy__(self, memo: dict) -> "Turns":
        """Copy without content, like a branch."""
        copy = memo[id(self)] = Turns()
        return copy


class RowTerms:
    """Terms of each attention of a model for one arrangement of rows.

    Args:
        layout: sides of the rows, each with its number of rows.
        x: an input of the model, for device and dtype.
    """

    def __init__(
        self,
        target: "AdapterTarget",
        images: Images | None,
        layout: Layout,
        x: Tensor,
        sides: Mapping[str, Side],
    ) -> None:
        self._unet, self._layout = target.unet, layout
        self._device, self._dtype = x.device, x.dtype
        self._masks = None if images is None else images.masks
        self._each = images is not None and images.each
        self._weights: dict[tuple[Strength, VideoShape | None], list[Weight]] = {}
        groups = [slice(None)]
        if images is not None and images.masks is not None and not images.each:
            groups = [slice(i, i + 1) for i in range(images.count)]
        self._terms: list[tuple[ImageTerm, ...]] = []
        for branch in target.branches:
            made = {
                name: side.keys_values(target.adapter, target.name, branch.site)
                for name, side in sides.items()
            }
            several = []
            for group in groups:
                parts = [[spread(y[group], n) for y in made[side]] for side, n in layout]
                joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
                k, v, *start = (y.to(x.device, x.dtype) for y in joined)
                start_k, start_v = start or (None, None)
                several.append(ImageTerm(k, v, start_k, start_v))
            self._terms.append(tuple(several))

    def terms_of(
        self,
        place: int,
        scale: Strength,
        grid: VideoShape | None,
        spans: Spans,
        frames: int | None,
    ) -> tuple[ImageTerm, ...]:
        """Return the terms of the attention at `place`, with weights for this scale.

        Args:
            grid: grid of the tokens, if the weights need it.
            frames: number of frames that are rows of their own; else None.
        """
        if (scale, grid) not in self._weights:
            while len(self._weights) >= _WEIGHTS:
                self._weights.pop(next(iter(self._weights)))
            self._weights[scale, grid] = self._new_weights(scale, grid, spans)
        pairs = zip(self._terms[place], self._weights[scale, grid], strict=True)
        return tuple(term._replace(weight=weight, frames=frames) for term, weight in pairs)

    def _new_weights(self, scale: Strength, grid: VideoShape | None, spans: Spans) -> list[Weight]:
        if self._masks is None and not isinstance(scale, tuple):
            return [None if scale == 1 else torch.tensor(scale, device=self._device)]
        assert grid is not None
        made = token_weights(scale, self._masks, grid, spans, unet=self._unet)
        if self._each and self._masks is not None:
            made = [{n: torch.stack([own[n] for own in made]) for n in made[0]}]
        return [{n: self._shaped(x) for n, x in own.items()} for own in made]

    def _shaped(self, weight: Tensor) -> Tensor:
        """Reshape (N,), or (I, N) for an image a prompt, to (1 or B, N, 1, 1)."""
        weight = weight.to(self._device, self._dtype)
        if weight.ndim == 1:
            return weight[None, :, None, None]
        rows = [spread(weight, count) for _, count in self._layout]
        return torch.cat(rows)[:, :, None, None]


class AdapterTarget:
    """One model of a pipeline.

    Attributes:
        attentions: number of attentions that an image prompt could act in.
        unet: the model attends over several grids, each smaller than the one before.
        apart: each frame is a row of its own in the attentions.
        factor: pixel frames in a latent frame; None for a model of images, or if only the pipeline
            knows the number.
        patch: latent frames in a token.
        names: of the arguments of a forward pass.
        watched: own weights of the model that the kept keys and values depend on.
        taps: taps of the branches, which `undo` takes off.
    """

    def __init__(
        self,
        name: str,
        model: "ModelMixin",
        family: Family,
        pipe: "DiffusionPipeline | None",
        adapter: ImageAdapter,
    ) -> None:
        sites = family.image_attentions(model)
        _check(adapter, sites, model)
        warn_of_other_text(adapter, sites)
        self.name, self.kind, self.attentions = name, type(model).__name__, len(sites)
        self.branches = [Branch(site) for site in sites if site.number in adapter.layers]
        self.family, self.adapter, self.names = family, adapter, argument_names(type(model))
        self.unet = hasattr(model, "down_blocks")
        self.moving, self.apart = family.kind != "image", family.kind == "frames"
        factor = vae_factor(pipe, "temporal")
        self.factor = family.sizes_of(model.config).temporal if factor is None else factor
        self.patch = 1 if self.factor is None else temporal_patch(model)
        self.calls, self.turns, self.watched = Calls(), Turns(), Watched(())
        self.undo: list[Callable[[], None]] = []
        self.taps: list[Any] = []

    def put_on(self, model: "ModelMixin", name: str, prepare: Callable[..., None]) -> None:
        """Add the branches to the attentions, and call `prepare` before each forward pass."""
        child = child_name(name)
        model.add_module(child, self.calls)
        self.undo.append(partial(_drop, model, child))
        _renew(model)
        for branch in self.branches:
            tap = self.family.tap_image(model, branch.site, branch)
            self.taps.append(tap)
            self.undo.append(tap)
        self.undo.append(model.register_forward_pre_hook(prepare, with_kwargs=True).remove)

    def take_off(self) -> None:
        """Restore the model. Does nothing the second time."""
        while self.undo:
            self.undo.pop()()
        for branch in self.branches:
            branch.clear()
        self.turns.forget()
        self.taps.clear()

    def check_taps(self) -> None:
        """Raise ValueError if an attention's tap was replaced by another processor."""
        for branch, tap in zip(self.branches, self.taps, strict=True):
            if not tap.is_on:
                raise ValueError(
                    f"the processor of {branch.site.name} was replaced after the image prompt "
                    "was loaded, which no longer acts there: remove() it, set processors, slicing "
                    "or fused projections first, then load it again"
                )

    def fill(self, terms: Sequence[tuple[ImageTerm, ...]] = ()) -> None:
        """Set the terms of all branches; by default none."""
        for place, branch in enumerate(self.branches):
            branch.fill(terms[place] if terms else (), self.turns.now)


def child_name(name: str) -> str:
    """Name of the model's child module that marks an image prompt of this name."""
    return f"image_prompt_{name}"


def _check(adapter: ImageAdapter, sites: Sequence[ImageAttention], model: nn.Module) -> None:
    """Raise ValueError for an adapter of another model."""
    kind, by_number = type(model).__name__, {site.number: site for site in sites}
    strange = [number for number in adapter.layers if number not in by_number]
    if strange:
        raise ValueError(
            f"the adapter is for another model: it has layers for attentions "
            f"{', '.join(strange)}, {kind} has {', '.join(by_number)}"
        )
    width = adapter.projector.width
    for number, layer in adapter.layers.items():
        site = by_number[number]
        inner = site.heads * site.dim
        for name in ("to_k", "to_v"):
            module = getattr(layer, name)
            sizes = module.in_features, module.out_features
            if sizes != (width, inner):
                raise ValueError(
                    f"the adapter is for another model: {name} of its layer {number} takes "
                    f"{sizes[0]} to {sizes[1]}, the projector makes {width} and {site.name} of "
                    f"{kind} has {inner}"
                )
        if adapter.start is not None and site.width != width:
            raise ValueError(
                f"the adapter is for another model: it starts from {site.name} of {kind}, which "
                f"takes {site.width}, and its projector makes {width}"
            )


def _drop(model: nn.Module, child: str) -> None:
    if hasattr(model, child):
        delattr(model, child)
    _renew(model)


def _renew(model: nn.Module) -> None:
    """Clear diffusers' cache of the children that have hooks."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry._child_registries_cache = None


def spread(x: Tensor, rows: int) -> Tensor:
    """Repeat (G, ...) to (rows, ...), each entry once for each video of its prompt."""
    if len(x) == rows:
        return x
    if len(x) == 1:
        return x.expand(rows, *x.shape[1:])
    if rows % len(x):
        raise ValueError(
            f"{len(x)} images, one for each prompt, do not go with {rows} rows of a batch"
        )
    return x.repeat_interleave(rows // len(x), 0)
