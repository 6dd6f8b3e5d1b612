"""Image attention that an adapter adds to each attention, and the cached keys and values for it.

B rows of a batch, N tokens of video or image, H heads, D dim of a head, G groups of image tokens,
T tokens of a group, C width of an image token.
"""

import operator
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gen_accel.attention_processors.families import ImageAttention
from gen_accel.attention_processors.image_prompt import (
    ImageAdapter,
    image_attention,
    own_norm,
    own_projection,
)
from gen_accel.pipelines.image_prompt.features import Features, count
from gen_accel.pipelines.image_prompt.guidance import Layout
from gen_accel.pipelines.image_prompt.strength import Masks, Strength, token_weights
from gen_accel.video import VideoShape

_WEIGHTS = 64  # most scales to keep weights for; each block and step may have its own


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
            self._check_rows(len(q), len(terms[0].k), frames)
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

    def _check_rows(self, given: int, rows: int, frames: int | None) -> None:
        """Raise ValueError for a number of rows that the prompt was not set for."""
        if given == rows * (frames or 1):
            return
        videos = "samples" if frames is None else f"videos of {frames} frames"
        raise ValueError(
            f"{self.site.name} is given {given} rows at a time, of {rows} {videos}: image prompts "
            "do not work with features that run a part of the rows, such as FasterCache and split "
            "inference; disable them"
        )

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
    """Keys and values for one arrangement of rows.

    Args:
        terms: terms of each attention, without weights.
        layout: sides of the rows, each with its number of rows.
        x: an input of the model, for device and dtype.
        unet: the model attends over several grids, each smaller than the one before.
    """

    def __init__(
        self,
        terms: list[tuple[ImageTerm, ...]],
        images: "Images | None",
        layout: Layout,
        x: Tensor,
        *,
        unet: bool,
    ) -> None:
        self.terms, self._unet = terms, unet
        self._masks = None if images is None else images.masks
        self._each = images is not None and images.each
        self._layout, self._device, self._dtype = layout, x.device, x.dtype
        self._weights: dict[tuple, list[Weight]] = {}

    def terms_of(
        self,
        place: int,
        scale: Strength,
        grid: VideoShape | None,
        spans: Sequence[tuple[int, int]] | None,
        frames: int | None,
    ) -> tuple[ImageTerm, ...]:
        """Return the terms of the attention at `place`, with weights for this scale.

        Args:
            grid: grid of the tokens, if the weights need it.
            spans: see `strength.frame_spans`.
            frames: number of frames that are rows of their own; else None.
        """
        weights = self.weights(scale, grid, spans)
        pairs = zip(self.terms[place], weights, strict=True)
        return tuple(term._replace(weight=weight, frames=frames) for term, weight in pairs)

    def weights(
        self,
        scale: Strength,
        grid: VideoShape | None,
        spans: Sequence[tuple[int, int]] | None,
    ) -> list[Weight]:
        """Return the weight of each term, for an attention with this scale."""
        key = scale, grid
        if key not in self._weights:
            while len(self._weights) >= _WEIGHTS:
                self._weights.pop(next(iter(self._weights)))
            self._weights[key] = self._new_weights(scale, grid, spans)
        return self._weights[key]

    def _new_weights(
        self,
        scale: Strength,
        grid: VideoShape | None,
        spans: Sequence[tuple[int, int]] | None,
    ) -> list[Weight]:
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


class Side:
    """Image tokens (G, T, C), of G separate images or of all images as one group.

    Keys and values are computed once for each attention.

    Args:
        start: tokens of the projector's initial weights, if the adapter needs them.
    """

    def __init__(self, tokens: Tensor, start: Tensor | None = None) -> None:
        self.tokens, self.start = tokens, start
        self.watched = Watched(())
        self.made: dict[tuple[str, str], list[Tensor]] = {}  # by model and attention

    def keys_values(self, adapter: ImageAdapter, part: str, site: ImageAttention) -> list[Tensor]:
        """Return keys and values, (G, T, H, D) each, then the keys and values of `start`."""
        key = part, site.number
        if key not in self.made:
            found = [*adapter.keys_values(site, self.tokens)]
            if self.start is not None:
                found += adapter.start_keys_values(site, self.start)
            self.made[key] = found
        return self.made[key]


@dataclass(eq=False)
class Images:
    """Images that were set, and the tokens, keys and values computed of them.

    Args:
        seen: the encoder made the features.
        sides: tokens of "positive" and "negative", each added when first needed.
        batches: keys and values by model, layout of rows, device and dtype.
    """

    features: Features
    negative: Features | None
    masks: Masks | None
    each: bool
    seen: bool
    sides: "dict[str, Side]" = field(default_factory=dict)
    batches: "dict[tuple, RowTerms]" = field(default_factory=dict)

    @property
    def count(self) -> int:
        return count(self.features)

    def forget(self, part: str) -> None:
        """Drop the keys and values of one model."""
        for side in self.sides.values():
            side.made = {key: kept for key, kept in side.made.items() if key[0] != part}
        self.batches = {key: kept for key, kept in self.batches.items() if key[0] != part}


class Watched:
    """Record of tensors that tells whether they were replaced or written to.

    Args:
        placed: also notice a new storage, as `.to()` keeps the parameter object. Not for tensors
            that offloading moves.
    """

    def __init__(self, tensors: Sequence[Tensor], *, placed: bool = True) -> None:
        # The kept tensor shares the memory, so that its address is not reused.
        self._held = [(x, x.detach() if placed else x, _version(x)) for x in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._held) and all(
            x is held
            and _version(x) == version
            and (x.data_ptr(), x.dtype, x.device) == (kept.data_ptr(), kept.dtype, kept.device)
            for x, (held, kept, version) in zip(tensors, self._held, strict=True)
        )


def own_weights(adapter: ImageAdapter, site: ImageAttention) -> list[Tensor]:
    """List the model's own weights that keys and values depend on.

    Offloaded weights on the meta device are left out: they are new tensors each time.
    """
    modules = [own_norm(site)] if adapter.key_norm == "own" else []
    if adapter.start is not None:
        modules += [own_projection(site, name) for name in (site.to_k, site.to_v)]
    found = [x for module in modules if module is not None for x in module.parameters()]
    return [x for x in found if not x.is_meta]


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


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
