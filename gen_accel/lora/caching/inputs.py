"""Inputs of a training beside noisy latents: its condition, first frames, image prompts, masks.

A mask is a film or a picture in gray, which weighs the loss of each latent: white counts as 1,
black as `mask_floor`. It is resampled, resized and cropped as its clip is, and averaged over the
pixels and frames of each latent.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_accel.attention_processors.families import Given
from gen_accel.attention_processors.families.pipelines import choose, part_of, takes
from gen_accel.attention_processors.image_prompt import Projector
from gen_accel.hub import fetched, index_file
from gen_accel.io import read_fields, read_index
from gen_accel.lora.caching.encoders import Encoders, hash_of, model_state, on_device
from gen_accel.lora.config import CONDITIONS, DROPOUTS, TrainConfig
from gen_accel.lora.data.clips import IMAGE_SUFFIXES, CaptionedVideo, Size
from gen_accel.lora.data.survey import ClipFacts
from gen_accel.pipelines.image_prompt import projectors
from gen_accel.pipelines.image_prompt.encoder import ImageEncoder, as_rgb, pixels
from gen_accel.registry import FIRST, LAST, VIDEO
from gen_accel.video import Coding

if TYPE_CHECKING:
    from gen_accel.attention_processors.families.base import Family

TEXT, FIRST_FRAME, LAST_FRAME, CONTROL = CONDITIONS
MASK = "mask"  # of a clip: its tensor in a cache, and its name among a batch's conditions
_ASKED = {TEXT: (), FIRST_FRAME: (FIRST,), LAST_FRAME: (FIRST, LAST), CONTROL: (VIDEO,)}
# Shares of clips that are shown without a frame, to how the weights must make videos then.
_WITHOUT = {
    "first_frame_dropout": (TEXT, "text alone"),
    "last_frame_dropout": (FIRST_FRAME, "a first frame alone"),
}
_ARGUMENTS = ("plain", "ltx", "minimax_h3")  # ways to a frame of the clip


class Conditioned(NamedTuple):
    """Conditions that a training shows the model beside noisy latents.

    Args:
        condition: "text", "first_frame", "last_frame" for both frames, or "control".
        pipeline: name of the pipeline class that makes videos so.
        is_own: whether it is the model's own class.
        transformer: config of the model's first transformer.
    """

    condition: str
    pipeline: str
    is_own: bool
    transformer: Given


class Asked(NamedTuple):
    """Fields of a `TrainConfig` that decide its condition, for a cache without a config."""

    model: str
    condition: str | None
    first_frame_dropout: float = 0.0
    last_frame_dropout: float = 0.0


def condition_for(index: Given, transformer: Given, config: TrainConfig | Asked) -> Conditioned:
    """Choose the condition of a training, by default as the model's pipeline makes videos.

    Args:
        index: contents of the pipeline's `model_index.json`, or the config of a pipeline.
        transformer: config of its first transformer.

    Raises:
        ValueError: a condition that the weights do not have, or a share of clips without a frame
            for weights that need it.
    """
    own, asked = str(index.get("_class_name")), config.condition
    found = _pipelines(index, transformer, own, config.model)
    if not found:
        raise ValueError(
            f"{own} of {config.model} makes videos neither from text nor from a first frame, "
            "alone or with a last one: only such models are trained"
        )
    if asked is None and [*found] == [CONTROL]:
        raise ValueError(
            f"{own} of {config.model} is trained with control films: give condition control, and "
            "clip.control.mp4 beside each clip.mp4"
        )
    if asked is None:
        row = takes(own)
        plain = TEXT if row is None or row.text else FIRST_FRAME
        asked = plain if plain in found else next(iter(found))
    if asked not in found:
        raise ValueError(
            f"condition must be {' or '.join(found)} for {own} of {config.model}, got {asked}"
        )
    for name, (other, words) in _WITHOUT.items():
        share, conditions = getattr(config, name), DROPOUTS[name]
        if share and other not in found:
            raise ValueError(
                f"{name} {share:g} is for models that also make videos from {words}, which {own} "
                f"of {config.model} does not: leave it out"
            )
        if share and asked not in conditions:
            raise ValueError(
                f"{name} {share:g} is for condition {conditions[0]}, and {own} of {config.model} "
                f"trains under {asked}: give condition {conditions[0]}"
            )
    return Conditioned(asked, found[asked], found[asked] == own, transformer)


def condition_in(source: str | Path, config: TrainConfig) -> Conditioned:
    """Choose the condition of the pipeline in a folder or on the hub, by its configs alone.

    Args:
        source: path or name of the pipeline.

    Raises:
        ValueError: see `condition_for`.
        OSError: no pipeline there.
    """

    def find(name: str) -> Path | str:
        is_here = isinstance(source, Path) and source.exists()
        return Path(source) / name if is_here else fetched(str(source), name)

    index, about = read_index(index_file(source)), {}
    with suppress(OSError):  # the class may tell enough
        about = read_fields(find(f"{part_of(index)}/config.json"))
    return condition_for(index, about, config)


def _pipelines(index: Given, transformer: Given, own: str, model: object) -> dict[str, str]:
    """Map each condition that the weights have to the class of pipeline for it."""
    if takes(own) is None:
        return {TEXT: own}
    found = {}
    for condition, kinds in _ASKED.items():
        with suppress(ValueError):
            name = choose(index, transformer, kinds, model)
            row = takes(name)
            assert row is not None, name
            is_controlled = row.role == "control"  # which takes a control video for text alone too
            if is_controlled == (condition == CONTROL) and (
                condition in (TEXT, CONTROL) or row.by in _ARGUMENTS
            ):
                found[condition] = name
    return found


# Channels of the small encoder that trains along. The last of its four convolutions sees half of
# an image.
CHANNELS = (16, 32, 48, 64)


class ImageCoder:
    """Images as the cache keeps them: uint8 pixels, or features of a frozen image encoder.

    The encoder is loaded when it is first needed.

    Args:
        variant: "pixels"; "base" or "plus" for an encoder's embedding or hidden states; see
            `image_prompt.formats`.
        size: pixels a side, for "pixels".
        source: folder or hub repository of the encoder.

    Attributes:
        about: description that a cache keeps of its images, fit for JSON.
    """

    def __init__(self, variant: str, *, size: int = 32, source: str | None = None) -> None:
        self.variant, self.size, self.source = variant, size, source
        self.about: dict[str, object] = {"variant": variant}
        self.about |= {"size": size} if source is None else {"source": source}

    def __getstate__(self) -> dict[str, object]:
        """Leave the encoder out, which another process loads when it needs it."""
        return {name: value for name, value in vars(self).items() if name != "_encoder"}

    @classmethod
    def of(cls, config: TrainConfig) -> "ImageCoder":
        variant = "pixels"
        if config.image_encoder is not None:
            variant = {"embedding": "base", "patches": "plus"}[config.image_features]
        return cls(variant, size=config.image_size, source=config.image_encoder)

    @cached_property
    def _encoder(self) -> ImageEncoder:
        return ImageEncoder(self.variant, None, self.source, size=self.size)

    def state(self) -> str:
        """Hash of all inputs of the features but the image."""
        if self.source is None:
            return hash_of([self.variant, self.size])
        model, extractor = self._encoder.given, self._encoder.extractor
        assert model is not None
        assert extractor is not None
        return hash_of([self.variant, model_state("image encoder", model), extractor.to_dict()])

    def check(self, image: Image.Image) -> Image.Image:
        """Convert an image to RGB. Raises OSError for one that an encoder cannot be shown."""
        try:
            return as_rgb(image)
        except ValueError as error:
            raise OSError(str(error)) from error

    def __call__(self, image: Image.Image) -> Tensor:
        """Encode an image: (3, S, S) uint8 for "pixels", else features, (E,) or (S, E).

        Raises:
            OSError: see `check`.
        """
        rgb = self.check(image)
        return pixels(rgb, self.size) if self.source is None else self._encoder([rgb])[0]

    def nothing(self) -> Tensor:
        """Return the stand-in for no image, in the form of an encoded image."""
        found = self._encoder.negative()
        assert isinstance(found, Tensor)
        if self.source is not None:
            return found[0]
        return ((found[0] + 1) * 127.5).round().to(torch.uint8)  # of pixels in [-1, 1]

    def at_work(self, device: torch.device) -> AbstractContextManager[None]:
        """Keep the encoder on the device inside the context."""
        model = self._encoder.given
        return on_device([] if model is None else [model], device)

    def shape(self, *, patches: int, embedding: int) -> tuple[int, ...]:
        """Return the shape of one image's features, for an encoder of the given sizes."""
        if self.variant == "pixels":
            return 3, self.size, self.size
        return (embedding,) if self.variant == "base" else (patches, embedding)

    def new_projector(self, features: Sequence[int], width: int, tokens: int) -> Projector:
        """Build an untrained projector.

        Args:
            features: shape of the features of one image.
            width, tokens: of the tokens of an image.
        """
        if self.variant == "pixels":
            return projectors.Pixels(width, tokens, channels=CHANNELS)
        kind = projectors.Linear if self.variant == "base" else projectors.Resampler
        return kind(features[-1], width, tokens)


def describe_images(about: Mapping[str, object]) -> str:
    """Put `ImageCoder.about` into words."""
    if about["variant"] == "pixels":
        return f"a small encoder of {about['size']} pixels"
    return f"{about['variant']!r} of {about['source']}"


FRAME_MODELS = ("vae", "image_encoder")  # that encode first frames
_CONFIG = ("in_channels", "out_channels", "image_dim", "image_condition_type")


class GivenFrames:
    """Encoder of the frames, or of the control film, that a clip is given by, for one model.

    Args:
        encoders: the model without its transformer's weights.
        common: values that all keys depend on, such as the dtype in the shards.
        max_tokens: length of the text, the pipeline's `max_sequence_length`.
        condition: "first_frame", "last_frame" or "control".

    Raises:
        ValueError: a model that is not trained so.
    """

    def __init__(
        self, encoders: Encoders, common: list[object], max_tokens: int | None, condition: str
    ) -> None:
        self._encoders, self._max_tokens = encoders, max_tokens
        self._family, self._transformer = encoders.family, encoders.transformer
        self.condition = condition
        check_family(self._family, self._transformer, condition)
        about = {name: self._transformer.config.get(name) for name in _CONFIG}
        self._about = [*common, condition.replace("_", " "), about]

    @cached_property
    def _state(self) -> str:
        pipe = self._encoders.pipe
        models = [name for name in FRAME_MODELS if getattr(pipe, name, None) is not None]
        return hash_of([*self._about, *self._encoders.states(*models)])

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts are encoded together with the frame."""
        return self._family.serves("prompts with a first frame")

    def key(self, *clip: object) -> str:
        return hash_of([self._state, *clip])

    def text_key(self, text: str, *clip: object) -> str:
        """Return the key of a prompt.

        Args:
            text: key of the prompt without a frame.
            clip: what decides the frame; nothing for a dropped caption.
        """
        return hash_of([*self._about, text, *clip]) if self.reads_prompts else text

    def __call__(self, images: Sequence[Image.Image], frames: int) -> dict[str, Tensor]:
        """Encode the first frame, and the last one if there is one, of a clip of so many pixel
        frames."""
        pipe, transformer = self._encoders.pipe, self._transformer
        first, *ends = images
        found = self._family.first_frame(pipe, transformer, first, frames)
        for last in ends:
            found |= self._family.last_frame(pipe, transformer, first, last, frames)
        return found

    def control(self, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a control film, (F, H, W, 3) uint8."""
        return self._family.control(self._encoders.pipe, [*map(Image.fromarray, frames)])

    def prompt(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encode a prompt together with the given frames; (): with the stand-in for none."""
        encode = self._family.encode_prompt_with
        found = encode(self._encoders.pipe, self._transformer, images, prompt, self._max_tokens)
        return {name: x[0] for name, x in found.items()}


def check_family(family: "Family", transformer: object, condition: str) -> None:
    """Refuse, by a ValueError, a model that is not trained under a condition beside text."""
    training = family.training
    if not getattr(training, condition):
        frame, kind = condition.replace("_", " "), type(transformer).__name__
        other = FIRST_FRAME if condition == LAST_FRAME and training.first_frame else TEXT
        raise ValueError(f"no training from a {frame} for {kind}: take condition {other}")


def check_sound(family: "Family", transformer: object, fps: float | None) -> None:
    """Refuse, by a ValueError, a model that is not trained on sound, or not without.

    Args:
        fps: of the clips; None: no sound is trained.
    """
    own, training = family.sizes.fps, family.training
    if fps is None:
        if training.needs_sound:
            raise ValueError(
                f"{family.models} makes video and sound in one sequence, and trains with both: "
                f"give sound true and fps {own:g}"
            )
        return
    if not training.sound:
        kind = type(transformer).__name__
        raise ValueError(f"sound is for models that make some, as LTX-2, got {kind}: leave it out")
    if not training.takes_fps and fps != own:
        raise ValueError(
            f"fps must be {own:g} for {family.models}, the only pace of its videos and their "
            f"sound, got {fps:g}"
        )


ALIKE = 0.02  # most relative difference of the aspect ratio of what is beside a clip from its own


def film_beside(video: CaptionedVideo, what: str) -> CaptionedVideo | None:
    """Return the mask or control of a clip as a clip of its own; None if it has none.

    Args:
        what: "mask" or "control".
    """
    source = getattr(video, what)
    if source is None:
        return None
    is_picture = isinstance(source, Path) and source.suffix.lower() in IMAGE_SUFFIXES
    name = f"the {what} of {video.name}"
    return CaptionedVideo(name, "", source, repeats=video.repeats, is_picture=is_picture)


def check_beside(found: ClipFacts, about: ClipFacts, film: CaptionedVideo, what: str) -> None:
    """Compare a clip's mask or control with the clip.

    Args:
        found, about: what `survey` found out about it and about the clip.
        film: see `film_beside`; a picture is for all frames.

    Raises OSError for one of another length, or of another shape.
    """
    (height, width), (rows, columns) = about["size"], found["size"]
    if abs(columns * height / (rows * width) - 1) > ALIKE:
        raise OSError(
            f"its {what} is {rows} x {columns} pixels, the clip {height} x {width}: a {what} has "
            "its clip's shape"
        )
    if film.is_picture:
        return
    have, wanted = (
        one["frames"] if one["total"] is None else one["total"] for one in (found, about)
    )
    most = min(found["asked"], about["asked"])  # of either, no more may have been decoded
    alike = min(found["frames"], most) == min(about["frames"], most)
    # Without decoding, the whole length is known to a frame.
    if not alike or abs(have - wanted) > 1:
        raise OSError(f"its {what} has {have} frames, the clip {wanted}: make them equal")


def read_mask(
    video: CaptionedVideo,
    factors: tuple[Coding, int],
    *,
    frames: int,
    size: Size,
    fps: float | None,
    begin: int = 0,
) -> Tensor:
    """Read the mask of a part of a clip, and reduce it to the latents' grid.

    Returns:
        (f, h, w) float32 from 0 to 1.

    Raises OSError for a mask that cannot be read, has too few frames, or is black throughout.
    """
    mask = film_beside(video, "mask")
    assert mask is not None
    if mask.is_picture:
        pictures = mask.read(frames=1, size=size, fps=fps).repeat(frames, axis=0)
    else:
        pictures = mask.read(frames=frames, size=size, fps=fps, begin=begin)
    if len(pictures) < frames:
        raise OSError(f"its mask has {begin + len(pictures)} frames, {begin + frames} are needed")
    reduced = reduce_mask(pictures, factors)
    if not reduced.any():
        raise OSError(f"its mask is black in frames {begin} to {begin + frames - 1}")
    return reduced


def reduce_mask(frames: np.ndarray, factors: tuple[Coding, int]) -> Tensor:
    """Average a mask, (F, H, W, 3) uint8, over the pixels and frames of each latent.

    Args:
        factors: the coding of frames, and pixels a side in a latent.
    """
    coding, space = factors
    gray = torch.from_numpy(frames).float().mean(3) / 255
    count, height, width = gray.shape
    tiles = gray.view(count, height // space, space, width // space, space).mean((2, 4))
    return torch.stack([part.mean(0) for part in tiles.split(coding.spans(count))])
