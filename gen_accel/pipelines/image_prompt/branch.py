"""What an adapter adds to each attention, and what is kept of images for it.

B rows of a batch, N tokens of video or image, H heads, D dim of a head, G groups of tokens, T
tokens of one, C width of those.
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
from gen_accel.pipelines.image_prompt.strength import Masks, token_weights

_WEIGHTS = 64  # scales, of which each block and step may have another


class Term(NamedTuple):
    """One attention to images, for all rows of a call: weight * (Attn(q, k, v) - start).

    Args:
        k, v: (B, T, H, D).
        start_k, start_v: subtracted; None for nothing.
        weight: of no dimension, or (1 or B, N, 1, 1) by N; None for 1. Not a number, for each of
            which torch.compile would make a graph.
        frames: of the video, where each attends by itself, in a row of its own; None elsewhere.
    """

    k: Tensor
    v: Tensor
    start_k: Tensor | None = None
    start_v: Tensor | None = None
    weight: Tensor | dict[int, Tensor] | None = None
    frames: int | None = None


class Branch:
    """What is added to one attention, filled before each forward pass: a family calls it with the
    queries. To torch.compile, all of a model are alike.

    Gradient checkpointing calls it again during the backward pass, with gradients, maybe after a
    forward pass without: those two do not share. After another one with gradients, by other
    images, it would compute with those: the backward pass is refused then.
    """

    def __init__(self, site: ImageAttention) -> None:
        self.site = site
        self.clear()

    def clear(self) -> None:
        self.terms: tuple[Term, ...] = ()
        self.graded: tuple[Term, ...] = ()
        self.turn = 0

    def fill(self, terms: tuple[Term, ...], turn: int) -> None:
        """
        Args:
            turn: another number for what may be other terms.
        """
        self.terms = terms
        if torch.is_grad_enabled():
            self.graded, self.turn = terms, turn

    @property
    def acts(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.graded if torch.is_grad_enabled() else self.terms)

    def __call__(self, q: Tensor, samples: slice) -> Tensor | None:
        """(b, N, H, D) of queries of the samples; None for nothing."""
        terms, total = self.graded if torch.is_grad_enabled() else self.terms, None
        frames = terms[0].frames if terms else None
        if terms and not self.site.by_sample:
            self._check_rows(len(q), len(terms[0].k), frames)
        if frames is not None:  # one after the other, as where all attend together
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
        # A graph would be made anew for each number.
        if total is None or not total.requires_grad or torch.compiler.is_compiling():
            return total
        return cast(Tensor, _OfOneTurn.apply(total, self.turn))

    def _check_rows(self, given: int, rows: int, frames: int | None) -> None:
        """Raise ValueError for another number of rows than the prompt was set for."""
        if given == rows * (frames or 1):
            return
        videos = "samples" if frames is None else f"videos of {frames} frames"
        raise ValueError(
            f"{self.site.name} is given {given} rows at a time, of {rows} {videos}: image prompts "
            "do not go with what runs a part of them, as FasterCache and split inference do; "
            "disable it"
        )

    def _weight(self, weight: Tensor | dict[int, Tensor], q: Tensor, samples: slice) -> Tensor:
        if not isinstance(weight, dict):
            return weight
        if q.shape[1] not in weight:
            raise ValueError(
                f"{self.site.name} attends over {q.shape[1]} tokens, masks and scales by frame "
                f"are for the {max(weight)} of what is made: there are others beside them, or the "
                "model does not divide this size. Give no mask, and scales for all frames"
            )
        own = weight[q.shape[1]].to(q)
        return own if len(own) == 1 else own[samples]

    def __deepcopy__(self, memo: dict) -> "Branch":
        """Empty: it is filled before it is called, and what is there may hold a graph."""
        copy = memo[id(self)] = object.__new__(type(self))
        Branch.__init__(copy, deepcopy(self.site, memo))
        return copy


class _OfOneTurn(torch.autograd.Function):
    """The same tensor, whose backward pass raises ValueError where gradient checkpointing computed
    what it needs in another turn: what was saved is then of that one, the context of the first."""

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
    """A number for what the forward passes with gradients are shown, `now`, which changes with it;
    see `Branch`."""

    def __init__(self) -> None:
        self.now = 0
        self.forget()

    def forget(self) -> None:
        self._shown: tuple[Any, ...] = ()
        self._how: Any = None

    def take(self, shown: tuple[Any, ...], how: Any) -> None:
        """
        Args:
            shown: compared by identity.
            how: by value.
        """
        same = len(shown) == len(self._shown) and all(map(operator.is_, shown, self._shown))
        if not same or how != self._how:
            self.now += 1
        self._shown, self._how = shown, how

    def __deepcopy__(self, memo: dict) -> "Turns":
        """Empty, as a branch's."""
        copy = memo[id(self)] = Turns()
        return copy


class Batch:
    """Keys and values for one arrangement of rows.

    Args:
        terms: for each attention, without weights.
        layout: the sides that the rows are of, each with the number of its rows.
        x: an input of the model.
        unet: it attends over smaller and smaller grids.
    """

    def __init__(
        self,
        terms: list[tuple[Term, ...]],
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
        self._weights: dict[tuple, list[Any]] = {}

    def terms_of(
        self,
        place: int,
        scale: float | tuple[float, ...],
        grid: Any,
        spans: Sequence[tuple[int, int]] | None,
        frames: int | None,
    ) -> tuple[Term, ...]:
        """Of the attention at `place`, with weights for this scale.

        Args:
            grid: of the tokens, where weights need it.
            spans: see `strength.frame_spans`.
            frames: that are rows of their own.
        """
        weights = self.weights(scale, grid, spans)
        pairs = zip(self.terms[place], weights, strict=True)
        return tuple(term._replace(weight=weight, frames=frames) for term, weight in pairs)

    def weights(
        self, scale: float | tuple[float, ...], grid: Any, spans: Sequence[tuple[int, int]] | None
    ) -> list[Any]:
        """For each of the terms, of an attention with this scale."""
        key = scale, grid
        if key not in self._weights:
            while len(self._weights) >= _WEIGHTS:
                self._weights.pop(next(iter(self._weights)))
            self._weights[key] = self._new_weights(scale, grid, spans)
        return self._weights[key]

    def _new_weights(
        self, scale: float | tuple[float, ...], grid: Any, spans: Sequence[tuple[int, int]] | None
    ) -> list[Any]:
        if self._masks is None and not isinstance(scale, tuple):
            return [None if scale == 1 else torch.tensor(scale, device=self._device)]
        made = token_weights(scale, self._masks, grid, spans, unet=self._unet)
        if self._each and self._masks is not None:
            made = [{n: torch.stack([own[n] for own in made]) for n in made[0]}]
        return [{n: self._shaped(x) for n, x in own.items()} for own in made]

    def _shaped(self, weight: Tensor) -> Tensor:
        """(N,), or (I, N) for a prompt each, to (1 or B, N, 1, 1)."""
        weight = weight.to(self._device, self._dtype)
        if weight.ndim == 1:
            return weight[None, :, None, None]
        rows = [spread(weight, count) for _, count in self._layout]
        return torch.cat(rows)[:, :, None, None]


class Side:
    """Tokens (G, T, C): G images by themselves, or 1 of all. Their keys and values are computed
    once for each attention.

    Args:
        start: those of the projector as training began.
    """

    def __init__(self, tokens: Tensor, start: Tensor | None = None) -> None:
        self.tokens, self.start = tokens, start
        self.watched = Watched(())
        self.made: dict[tuple[str, str], list[Tensor]] = {}  # by model and attention

    def keys_values(self, adapter: ImageAdapter, part: str, site: ImageAttention) -> list[Tensor]:
        """(G, T, H, D) each: keys and values, and with a start those of it."""
        key = part, site.number
        if key not in self.made:
            found = [*adapter.keys_values(site, self.tokens)]
            if self.start is not None:
                found += adapter.start_keys_values(site, self.start)
            self.made[key] = found
        return self.made[key]


@dataclass(eq=False)
class Images:
    """What was set, and what is known of it.

    Args:
        seen: the encoder made the features.
        sides: "positive" and "negative", when they were first needed.
        batches: by model, arrangement of rows, device and dtype.
    """

    features: Features
    negative: Features | None
    masks: Masks | None
    each: bool
    seen: bool
    sides: "dict[str, Side]" = field(default_factory=dict)
    batches: "dict[tuple, Batch]" = field(default_factory=dict)

    @property
    def count(self) -> int:
        return count(self.features)

    def forget(self, part: str) -> None:
        """What was computed of tokens, for one model."""
        for side in self.sides.values():
            side.made = {key: kept for key, kept in side.made.items() if key[0] != part}
        self.batches = {key: kept for key, kept in self.batches.items() if key[0] != part}


class Watched:
    """Whether tensors are still what they were: the same, and not written to.

    Args:
        placed: and where they were, as `.to()` leaves a parameter the same. Not for what
            offloading moves.
    """

    def __init__(self, tensors: Sequence[Tensor], *, placed: bool = True) -> None:
        # What is kept shares its memory, whose address is therefore not given to another.
        self._held = [(x, x.detach() if placed else x, _version(x)) for x in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._held) and all(
            x is held
            and _version(x) == version
            and (x.data_ptr(), x.dtype, x.device) == (kept.data_ptr(), kept.dtype, kept.device)
            for x, (held, kept, version) in zip(tensors, self._held, strict=True)
        )


def own_weights(adapter: ImageAdapter, site: ImageAttention) -> list[Tensor]:
    """Weights of the model that keys and values depend on. Those held elsewhere, by offloading,
    are other tensors each time."""
    modules = [own_norm(site)] if adapter.key_norm == "own" else []
    if adapter.start is not None:
        modules += [own_projection(site, name) for name in (site.to_k, site.to_v)]
    found = [x for module in modules if module is not None for x in module.parameters()]
    return [x for x in found if not x.is_meta]


def spread(x: Tensor, rows: int) -> Tensor:
    """(G, ...) to (rows, ...): each as often as there are videos of a prompt."""
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
