"""Image tokens: an adapter's projector applied to the features of images and of "no image".

I images, G groups of them, T tokens of a group, C width of a token, H heads, D dim of a
head, B rows of a batch.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gen_accel.attention_processors.families import ImageAttention
from gen_accel.attention_processors.image_prompt import ImageAdapter, own_norm, own_projection
from gen_accel.io import typed
from gen_accel.parsing import shown
from gen_accel.pipelines.image_prompt.guidance import Pipe
from gen_accel.pipelines.image_prompt.projectors import PIXELS
from gen_accel.pipelines.image_prompt.strength import Masks

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from gen_accel.pipelines.image_prompt.encoder import ImageEncoder


# (I, E) or (I, sequence, E), I images, or several of them by name
Features = Tensor | Mapping[str, Tensor]


def count(features: Features) -> int:
    if isinstance(features, Mapping):
        counts = {name: len(x) for name, x in features.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"features must be of as many images each, got {counts}")
        return next(iter(counts.values()))
    if not isinstance(features, Tensor) or features.ndim < 2 or not len(features):
        shape = tuple(features.shape) if isinstance(features, Tensor) else features
        raise ValueError(
            f"features must be a tensor, (images, ...), or tensors by name, got {shown(shape)}"
        )
    return len(features)


def shapes(features: Features) -> str:
    found = {name: tuple(x.shape) for name, x in _named(features).items()}
    return str(found if isinstance(features, Mapping) else found[""])


def _alike(one: Features, other: Features) -> bool:
    """Whether two features have the same shape, up to the number of images."""
    first, second = ({n: x.shape[1:] for n, x in _named(x).items()} for x in (one, other))
    return first == second


def _named(features: Features) -> dict[str, Tensor]:
    return {**features} if isinstance(features, Mapping) else {"": features}


class TrainingRows(NamedTuple):
    """Features of a training batch, a row each.

    Args:
        keep: (B,) bool; rows that are False have no image.
    """

    features: Features
    keep: Tensor | None


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
        batches: keys and values, a `branch.RowTerms` by model, layout of rows, device and dtype.
    """

    features: Features
    negative: Features | None
    masks: Masks | None
    each: bool
    seen: bool
    sides: "dict[str, Side]" = field(default_factory=dict)
    batches: dict[tuple, object] = field(default_factory=dict)

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


class ImageTokens:
    """Tokens of one adapter, by its present projector and by the projector before training."""

    def __init__(self, adapter: ImageAdapter, encoder: "EncoderOf") -> None:
        self.adapter, self._encoder = adapter, encoder

    def kept(self, images: Images, side: str) -> Side:
        """Return the tokens of one side, computed once until the adapter's weights change.

        Args:
            side: "positive" for the images, "negative" for the negative images.

        Raises ValueError for features that the adapter does not take.
        """
        weights = [*self.adapter.parameters(), *self.adapter.buffers()]
        found = images.sides.get(side)
        if found is None or not found.watched.holds(weights):
            images.batches.clear()
            with torch.inference_mode(False), torch.no_grad():
                found = images.sides[side] = self.projected(images, side)
            found.watched = Watched(weights)
        return found

    def projected(self, images: Images, side: str) -> Side:
        """Compute the tokens of `kept` again, with gradients."""
        features = images.features if side == "positive" else self._negative(images)
        found = [x for x in self._project(features) if x is not None]
        if len(found[0]) < images.count:
            found = [x.expand(images.count, -1, -1) for x in found]
        if images.masks is None and not images.each:  # all in one softmax
            found = [x.flatten(0, 1)[None] for x in found]
        return Side(*found)

    def of_rows(self, rows: TrainingRows) -> Side:
        """Compute the tokens of a training batch, with gradients."""
        features = rows.features
        if rows.keep is not None:
            keep, null = rows.keep, self.adapter.projector.null(features)

            def kept(x: Tensor, nothing: Tensor) -> Tensor:
                chosen = keep.to(x.device).view(-1, *[1] * (x.ndim - 1))
                return torch.where(chosen, x, nothing.to(x))

            features = tree_map(kept, features, null)
        return Side(*self._project(features))

    def _negative(self, images: Images) -> Features:
        if images.negative is not None:
            return images.negative
        if self.adapter.variant != "base":  # whose "no image" is zeros, without an encoder
            encoder = self._encoder()
            if images.seen or encoder.is_there:
                nothing = encoder.negative()
                if images.seen or _alike(nothing, images.features):
                    return nothing
        return self.adapter.projector.null(images.features)

    def _project(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Compute tokens, (I, T, C), by the projector and by the projector before training."""
        weight = next(self.adapter.projector.parameters(), None)
        if weight is not None:
            features = tree_map(partial(_placed, weight), features)
        projector = self.adapter.projector
        try:
            tokens = projector(features)
        except (RuntimeError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the {self.adapter.variant} adapter does not take features of "
                f"{shapes(features)}: {error}"
            ) from error
        if tokens.ndim != 3 or tokens.shape[-1] != projector.width:
            raise ValueError(
                f"the projector must give (images, tokens, {projector.width}), got "
                f"{tuple(tokens.shape)} for features of {shapes(features)}"
            )
        if self.adapter.start is None:
            return tokens, None
        with torch.no_grad():
            return tokens, self.adapter.start(features)


class EncoderOf:
    """Factory of the image encoder, which is made when it is needed.

    It uses the encoder that the user gave, else the one that the adapter's file names, as features
    of another encoder mean nothing to the adapter, else the pipeline's own. An encoder with the
    pipeline is not kept, as it would keep the pipeline alive; the others are loaded once.
    """

    def __init__(
        self, pipe: Pipe, adapter: ImageAdapter, given: "PreTrainedModel | str | Path | None"
    ) -> None:
        self._pipe, self._variant = pipe, adapter.variant
        told = adapter.metadata
        self._size = typed(told, "image_size", int, origin="the adapter", default=PIXELS)
        named = typed(told, "image_encoder", str, origin="the adapter", default=None)
        self._given = named if given is None else given
        self._kept: ImageEncoder | None = None

    def __call__(self) -> "ImageEncoder":
        from gen_accel.pipelines.image_prompt.encoder import ImageEncoder  # needs Pillow

        if self._given is None:
            return ImageEncoder(self._variant, self._pipe(), size=self._size)
        if self._kept is None:
            self._kept = ImageEncoder(self._variant, None, self._given, size=self._size)
        return self._kept

    def __deepcopy__(self, memo: dict) -> "EncoderOf":
        """Share the encoder with the copy, as it is not part of a model."""
        copy = object.__new__(type(self))
        vars(copy).update(vars(self))
        copy._pipe = deepcopy(self._pipe, memo)
        return copy


def _placed(weight: Tensor, features: Tensor) -> Tensor:
    if not features.is_floating_point():
        return features.to(weight.device)
    return features.to(weight.device, weight.dtype)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
