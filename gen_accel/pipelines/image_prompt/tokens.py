"""Image tokens: an adapter's projector applied to the features of images and of "no image".

I images, T tokens of an image, C width of a token, B rows of a batch.
"""

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gen_accel.attention_processors.image_prompt import ImageAdapter
from gen_accel.pipelines.image_prompt.branch import Images, Side, Watched
from gen_accel.pipelines.image_prompt.features import Features, alike, mapped, shapes
from gen_accel.pipelines.image_prompt.guidance import Pipe

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from gen_accel.pipelines.image_prompt.encoder import ImageEncoder


class TrainingRows(NamedTuple):
    """Features of a training batch, a row each.

    Args:
        keep: (B,) bool; rows that are False have no image.
    """

    features: Features
    keep: Tensor | None


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
            null = self.adapter.projector.null(features)
            features = mapped(partial(_where_kept, rows.keep), features, null)
        return Side(*self._project(features))

    def _negative(self, images: Images) -> Features:
        if images.negative is not None:
            return images.negative
        # "base" adapters need no encoder: their "no image" is zeros.
        encoder = self._encoder(named=images.seen or self.adapter.variant != "base")
        if images.seen or encoder.is_there:
            nothing = encoder.negative()
            if images.seen or alike(nothing, images.features):
                return nothing
        return self.adapter.projector.null(images.features)

    def _project(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Compute tokens, (I, T, C), by the projector and by the projector before training."""
        weight = next(self.adapter.projector.parameters(), None)
        if weight is not None:
            features = mapped(partial(_placed, weight), features)
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
        self._pipe, self._given = pipe, given
        self._variant, self._size = adapter.variant, adapter.metadata.get("image_size")
        self._named = adapter.metadata.get("image_encoder")
        self._kept: ImageEncoder | None = None

    def __call__(self, *, named: bool = True) -> "ImageEncoder":
        """Return the encoder.

        Args:
            named: if the user gave none, use the encoder that the adapter's file names, if any.
        """
        if self._kept is not None:
            return self._kept
        from gen_accel.pipelines.image_prompt.encoder import ImageEncoder

        options = {} if self._size is None else {"size": self._size}
        given = self._given
        if given is None:
            if self._named is None or not named:
                return ImageEncoder(self._variant, self._pipe(), **options)
            given = self._named
        self._kept = ImageEncoder(self._variant, None, given, **options)
        return self._kept

    def __deepcopy__(self, memo: dict) -> "EncoderOf":
        """Share the encoder with the copy, as it is not part of a model."""
        copy = object.__new__(type(self))
        vars(copy).update(vars(self))
        copy._pipe = deepcopy(self._pipe, memo)
        return copy


def _where_kept(keep: Tensor, features: Tensor, null: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (features.ndim - 1)
    return torch.where(keep.to(features.device).view(shape), features, null.to(features))


def _placed(weight: Tensor, features: Tensor) -> Tensor:
    if not features.is_floating_point():
        return features.to(weight.device)
    return features.to(weight.device, weight.dtype)
