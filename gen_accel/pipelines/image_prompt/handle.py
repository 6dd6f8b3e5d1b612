"""Handle of an image-prompt adapter on a live diffusers pipeline.

B rows of a batch, N tokens of video or image, H heads, D dim of a head, I images, T tokens of an
image, C width of a token, E width of a feature.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.clock import Clock
from gen_accel.attention_processors.families import Given, by_name, family_for
from gen_accel.attention_processors.image_prompt import ImageAdapter, warn_of_other_text
from gen_accel.pipelines.image_prompt.branch import AdapterTarget, RowTerms, Spans
from gen_accel.pipelines.image_prompt.guidance import Layout, Pipe, layout_of
from gen_accel.pipelines.image_prompt.strength import (
    Mask,
    Masks,
    Scale,
    ScaleRange,
    Scales,
    Strength,
    frame_spans,
    scale_ranges,
)
from gen_accel.pipelines.image_prompt.tokens import (
    EncoderOf,
    Features,
    Images,
    ImageTokens,
    TrainingRows,
    Watched,
    count,
    own_weights,
    shapes,
)
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline, ModelMixin
    from transformers import PreTrainedModel

    from gen_accel.pipelines.image_prompt.encoder import Picture, Pictures

_LAYOUTS = 8  # most layouts of a batch to keep keys and values for


class ImagePrompt:
    """Handle that `load_image_prompt` returns; owns the model's branches and the cached tensors.

    Keys and values depend on the images alone. They are computed when first needed, and again
    when images, the adapter's weights, device or dtype change. Writes through `.data` of weights
    go unnoticed: call `set_image` again after them.
    """

    def __init__(
        self,
        models: "Mapping[str, ModelMixin]",
        pipe: "DiffusionPipeline | None",
        adapter: ImageAdapter,
        name: str,
        scale: "Scale | Sequence[ScaleRange]",
        image_encoder: "PreTrainedModel | str | Path | None",
    ) -> None:
        self.adapter, self.name = adapter, name
        self.companions: list[Callable[[], None]] = []  # called by `remove`
        self._pipe = Pipe(pipe)
        self._clock = Clock(None if pipe is None else self._pipe.scheduler)
        self._encoder = EncoderOf(self._pipe, adapter, image_encoder)
        self._tokens = ImageTokens(adapter, self._encoder)
        self._removed = self._paused = False
        self._images: Images | None = None
        self._rows: TrainingRows | None = None
        families = {part: family_for(model, "image prompts") for part, model in models.items()}
        self._parts = {
            part: AdapterTarget(part, model, families[part], pipe, adapter)
            for part, model in models.items()
        }
        self._scales: dict[str, Scales] = {}
        self._scale: tuple[ScaleRange, ...] = ()
        self.set_scale(scale)
        # All checks come before this line, so that a refusal leaves the model unchanged.
        try:
            for part, model in models.items():
                own = self._parts[part]
                own.put_on(model, self.name, partial(self._prepare, own))
        except BaseException:
            self.remove()
            raise

    def set_image(
        self,
        image: "Pictures",
        *,
        negative: "Pictures | None" = None,
        mask: "Mask | None" = None,
        each: bool = False,
    ) -> None:
        """Set the images that prompt the following calls.

        Args:
            image: a PIL image, a path, or several. Several act together on every video.
            negative: image of the negative prompt, one or one for each image; by default the
                features of "no image" that the adapter was trained with.
            mask: area in which each image acts: (H, W) for all, (I, H, W), or (I, frames of the
                video, H, W), in [0, 1], of any size. Without masks, the tokens of several images
                share one softmax; with masks, each image has its own.
            each: the images are one for each prompt of the batch.

        Raises:
            ValueError: images that the encoder does not take, no encoder, or masks that do not
                fit.
            FileNotFoundError: an image file is missing.
        """
        encoder = self._encoder()
        features = encoder(_listed(image))
        against = None if negative is None else encoder(_listed(negative))
        self._set(features, against, mask, each, seen=True)

    def set_embeds(
        self,
        embeds: Features,
        *,
        negative: Features | None = None,
        mask: "Mask | None" = None,
        each: bool = False,
    ) -> None:
        """Set the features that prompt the following calls, as the adapter's encoder gives them.

        Args:
            embeds: (I, E) embeddings or (I, sequence, E) hidden states; for FaceID adapters face
                vectors, (I, 512); for FaceID-Plus dict(id=vectors, clip=hidden states).
            negative, mask, each: see `set_image`.

        Raises:
            ValueError: features that the adapter does not take, or masks that do not fit.
        """
        self._set(embeds, negative, mask, each, seen=False)

    def set_scale(
        self,
        scale: "Scale | Sequence[ScaleRange]",
        *,
        frames: tuple[int, int] | None = None,
        steps: tuple[float, float] | None = None,
    ) -> None:
        """Set how strongly the image acts.

        At 0 the model runs exactly as without the image prompt, except that the LoRA of a FaceID
        adapter stays on until `remove`.

        Args:
            scale: a number; numbers by block, {"blocks.3": 0.5}, for a UNet also in the form of
                diffusers, {"down": {"block_2": [0.0, 1.0]}}, all others 0; a list with a number
                for each attention; "style" or "style+layout", for SDXL; or a list of
                `ScaleRange`s. The last range that holds counts; the scale is 0 if none holds.
            frames, steps: frames and steps to act at; see `ScaleRange`. A latent frame gets the
                mean over its pixel frames.

        Raises:
            ValueError: an unknown block, frames on a model of images, or shares of the steps
                without a pipeline, which alone knows the number of steps.
        """
        ranges = scale_ranges(scale, frames, steps)
        scales = {}
        for part in self._parts.values():
            scales[part.name] = Scales(ranges, [branch.site.name for branch in part.branches])
            if scales[part.name].needs_frames and part.factor is None:
                raise ValueError(
                    "frames of a scale need the pipeline, which knows how many a latent of "
                    f"{part.kind} is of: load the image prompt on that"
                    if part.moving
                    else f"frames of a scale need a video; {part.kind} makes images"
                )
            if scales[part.name].needs_total and self._pipe() is None:
                raise ValueError(
                    "steps are shares of the steps, which only a pipeline knows: load the image "
                    "prompt on the pipeline, or count steps"
                )
        self._scale, self._scales = ranges, scales

    @contextmanager
    def using(self, features: Features, keep: Tensor | None = None) -> Iterator[None]:
        """Prompt each row of a batch by features of its own, with gradients, for training.

        With gradient checkpointing, run a backward pass before the next forward pass by other
        features; a backward pass that comes too late raises ValueError.

        Args:
            features: features of each row of the batch.
            keep: (B,) bool; rows that are False use the features of "no image".
        """
        if keep is not None and keep.shape != (count(features),):
            raise ValueError(
                f"keep must be of shape ({count(features)},), got {tuple(keep.shape)}"
            )
        before, self._rows = self._rows, TrainingRows(features, keep)
        try:
            yield
        finally:
            self._rows = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model as without the image prompt, inside the context."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def describe(self) -> str:
        """Describe adapter, attentions, images and scale in one line."""
        images = "no image set"
        if self._images is not None:
            images = f"{self._images.count} image{'s' if self._images.count > 1 else ''}"
            images += ", one a prompt" if self._images.each else ""
            images += ", masked" if self._images.masks is not None else ""
        places = ", ".join(
            f"{len(part.branches)} of {part.attentions} attentions of {part.kind}"
            for part in self._parts.values()
        )
        scale = ", ".join(str(one) for one in self._scale)
        if len(self._scale) == 1 and (self._scale[0].frames, self._scale[0].steps) == (None,) * 2:
            scale = f"scale {self._scale[0].scale}"
        variant, tokens = self.adapter.variant, self.adapter.projector.tokens
        return (
            f"image prompt {self.name!r}: {variant}, {tokens} tokens an image, {places}; "
            f"{images}; {scale}"
        )

    def remove(self) -> None:
        """Take the adapter off and restore the model. Does nothing the second time."""
        for part in self._parts.values():
            part.take_off()
        while self.companions:
            self.companions.pop()()
        self._images, self._removed = None, True

    def __enter__(self) -> "ImagePrompt":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _set(
        self,
        features: Features,
        negative: Features | None,
        mask: "Mask | None",
        each: bool,
        *,
        seen: bool,
    ) -> None:
        if self._removed:
            raise ValueError(f"the image prompt {self.name!r} was removed: load it again")
        number = count(features)
        if negative is not None and count(negative) not in (1, number):
            raise ValueError(
                f"negative must be one image, or one for each of {number}, got {count(negative)}"
            )
        masks = None if mask is None else Masks(mask, number)
        images = Images(features, negative, masks, each, seen)
        # Refuses features that the adapter does not take.
        tokens = self._tokens.kept(images, "positive").tokens
        if negative is not None:
            against = self._tokens.kept(images, "negative").tokens
            if against.shape != tokens.shape:
                raise ValueError(
                    f"negative must be features like those of the image, got {shapes(negative)} "
                    f"for {shapes(features)}"
                )
        self._images = images

    @torch.compiler.disable(
        reason="an image prompt needs fullgraph=False or compile_repeated_blocks()"
    )
    def _prepare(
        self, part: AdapterTarget, model: "ModelMixin", args: tuple, kwargs: dict
    ) -> None:
        """Fill the branches of all attentions before a forward pass."""
        scales, given = self._scales[part.name], by_name(part.names, args, kwargs)
        unset = self._images is None and self._rows is None
        if unset and not self._paused and not scales.silent:
            raise ValueError(
                f"no image is set for the {self.adapter.variant} adapter {self.name!r}: call "
                "set_image or set_embeds, set_scale(0.0), or remove()"
            )
        if self._paused or unset:
            part.fill()
            return
        if scales.needs_step:
            rising = part.family.attention.rising
            self._clock.advance(part.family.timestep(given), rising=rising)
            scales.at(self._clock.step, self._clock.steps)
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        assert isinstance(x, Tensor)
        images, rows = self._images, self._rows
        strengths, grid, spans = self._strengths(part, scales, model, given)
        if grid is not None and x.ndim == 3 and x.shape[1] != grid.video_tokens:
            raise ValueError(
                f"masks cannot be placed: {type(model).__name__} is given {x.shape[1]} tokens, "
                f"and only {grid.video_tokens} are of its output; the others are of frames or "
                "images to follow. Give no mask"
            )
        acts = any(map(_acts, strengths))
        layout: Layout = (("training", len(x)),)
        how = part.family.image_prompts
        # Guidance is recognised by earlier calls, so calls with nothing to add are noted too.
        if rows is None and (acts or how.guidance != "batched"):
            each = images is not None and images.each and images.count == len(x)
            layout = layout_of(self._pipe, model, part.calls, len(x), how, each=each)
        if not acts:
            part.fill()
            return
        part.check_taps()
        frames = part.family.tokens(model, given).video.frames if part.apart else None
        if torch.is_grad_enabled():
            shown = (images,) if rows is None else rows
            part.turns.take(shown, (layout, strengths, grid, frames))
        if rows is not None:
            batch = RowTerms(part, None, layout, x, {"training": self._tokens.of_rows(rows)})
        else:
            assert images is not None
            batch = self._batch(part, images, layout, x)
        part.fill(
            [
                batch.terms_of(place, strength, grid, spans, frames) if _acts(strength) else ()
                for place, strength in enumerate(strengths)
            ]
        )

    def _strengths(
        self, part: AdapterTarget, scales: Scales, model: "ModelMixin", given: Given
    ) -> tuple[list[Strength], VideoShape | None, Spans]:
        """Return the scale in each attention, the grid, and the frame spans.

        Grid and spans are None unless needed, as not every call tells the grid.
        """
        shown = None if self._rows is not None else self._images
        masks = None if shown is None else shown.masks
        grid = spans = None
        if scales.needs_frames or masks is not None:
            grid = part.family.tokens(model, given).video
            unknown = None
            if scales.needs_frames or (masks is not None and masks.moving):
                unknown = part.family.no_frames(model, given)
            if unknown is not None:
                raise ValueError(
                    f"frames of scales and masks are not known here: {unknown}. Give scales "
                    "without frames, and a mask for all frames"
                )
            if part.factor is not None:
                alone = part.family.sizes.first_alone
                spans = frame_spans(grid.frames, part.factor, part.patch, first_alone=alone)
        used = spans if scales.needs_frames else None
        return [scales.of(place, used) for place in range(len(part.branches))], grid, spans

    def _batch(self, part: AdapterTarget, images: Images, layout: Layout, x: Tensor) -> RowTerms:
        """Return the terms for the rows of a call, kept from an earlier call if possible."""
        if torch.is_grad_enabled() and self.adapter.trained:
            sides = {side: self._tokens.projected(images, side) for side, _ in layout}
            return RowTerms(part, images, layout, x, sides)
        sides = {side: self._tokens.kept(images, side) for side, _ in layout}
        own = [x for branch in part.branches for x in own_weights(self.adapter, branch.site)]
        if not part.watched.holds(own):
            if images.batches:  # not at the first call
                warn_of_other_text(self.adapter, [branch.site for branch in part.branches])
            part.watched = Watched(own, placed=False)
            images.forget(part.name)
        key = (part.name, layout, x.device, x.dtype)
        made = images.batches.get(key)
        if not isinstance(made, RowTerms):
            with torch.inference_mode(False), torch.no_grad():
                made = RowTerms(part, images, layout, x, sides)
            while len(images.batches) >= _LAYOUTS:
                images.batches.pop(next(iter(images.batches)))
            images.batches[key] = made
        return made


def _acts(strength: Strength) -> bool:
    return any(strength) if isinstance(strength, tuple) else strength != 0


def _listed(given: "Pictures") -> "list[Picture]":
    return [*given] if isinstance(given, list | tuple) else [given]
