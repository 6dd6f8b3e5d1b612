"""Inputs of a training beside noisy latents: its condition, first frames and image prompts."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gen_accel.attention_processors.families.pipelines import choose, part_of, takes
from gen_accel.hub import fetched
from gen_accel.io import read_fields
from gen_accel.lora.caching.encoders import Encoders, hash_of, model_state
from gen_accel.lora.config import TrainConfig
from gen_accel.registry import FIRST

TEXT, FIRST_FRAME = "text", "first_frame"
MASK = "mask"  # of a clip: its tensor in a cache, and its name among a batch's conditions
_ASKED = {TEXT: (), FIRST_FRAME: (FIRST,)}
_ARGUMENTS = ("plain", "ltx")  # ways to a frame of the clip


class Conditioned(NamedTuple):
    """Conditions that a training shows the model beside noisy latents.

    Args:
        condition: "text" or "first_frame".
        pipeline: name of the pipeline class that makes videos so.
        is_own: whether that is the model's own class.
        transformer: config of the model's first transformer.
    """

    condition: str
    pipeline: str
    is_own: bool
    transformer: Mapping[str, Any]


def condition_for(
    index: Mapping[str, Any], transformer: Mapping[str, Any], config: Any
) -> Conditioned:
    """Choose the condition of a training, by default as the model's pipeline makes videos.

    Args:
        index: contents of the pipeline's `model_index.json`, or the config of a pipeline.
        transformer: config of its first transformer.
        config: the `TrainConfig`, or anything else with its `model`, `condition` and
            `first_frame_dropout`.

    Raises:
        ValueError: a condition that the weights do not have, or a share of clips without their
            first frame for weights that need one.
    """
    own, asked = str(index.get("_class_name")), config.condition
    found = _pipelines(index, transformer, own, config.model)
    if not found:
        raise ValueError(
            f"{own} of {config.model} makes videos neither from text nor from a first frame "
            "alone: only such models are trained"
        )
    if asked is None:
        row = takes(own)
        plain = TEXT if row is None or row.text else FIRST_FRAME
        asked = plain if plain in found else next(iter(found))
    if asked not in found:
        raise ValueError(
            f"condition must be {' or '.join(found)} for {own} of {config.model}, got {asked}"
        )
    if config.first_frame_dropout and TEXT not in found:
        raise ValueError(
            f"first_frame_dropout {config.first_frame_dropout:g} is for models that also make "
            f"videos from text alone, which {own} of {config.model} does not: leave it out"
        )
    if config.first_frame_dropout and asked == TEXT:
        raise ValueError(
            f"first_frame_dropout {config.first_frame_dropout:g} is for condition first_frame, "
            f"and {own} of {config.model} trains from text: give condition first_frame"
        )
    return Conditioned(asked, found[asked], found[asked] == own, transformer)


def condition_in(source: Any, config: Any) -> Conditioned:
    """Choose the condition of the pipeline in a folder or on the hub, by its configs alone.

    Args:
        source: path or name of the pipeline.
        config: see `condition_for`.

    Raises:
        ValueError: see `condition_for`.
        OSError: no pipeline there.
    """
    path = source if hasattr(source, "exists") and source.exists() else None
    index = read_fields(path / "model_index.json" if path else fetched(source, "model_index.json"))
    name = f"{part_of(index)}/config.json"
    about: Mapping[str, Any] = {}
    with suppress(OSError):  # where the class tells enough
        about = read_fields(path / name if path else fetched(source, name))
    return condition_for(index, about, config)


def _pipelines(
    index: Mapping[str, Any], transformer: Mapping[str, Any], own: str, model: object
) -> dict[str, str]:
    """Map each condition that the weights have to the class of pipeline for it."""
    if takes(own) is None:
        return {TEXT: own}
    found = {}
    for condition, kinds in _ASKED.items():
        with suppress(ValueError):
            name = choose(index, transformer, kinds, model)
            row = takes(name)
            assert row is not None, name
            if condition == TEXT or row.by in _ARGUMENTS:
                found[condition] = name
    return found


# Channels of the small encoder that trains along. The last of its four convolutions sees half of
# an image.
CHANNELS = (16, 32, 48, 64)


class ImageCoder:
    """Images as the cache keeps them: uint8 pixels, or features of a frozen image encoder.

    The encoder is loaded when it is first needed.

    Args:
        variant: "pixels"; "base" or "plus" for an encoder's embedding or hidden states.
        size: pixels a side, for "pixels".
        source: folder or hub repository of the encoder.

    Attributes:
        about: description that a cache keeps of its images, fit for JSON.
    """

    def __init__(self, variant: str, *, size: int = 32, source: str | None = None) -> None:
        self.variant, self.size, self.source = variant, size, source
        self.about: dict[str, Any] = {"variant": variant}
        self.about |= {"size": size} if source is None else {"source": source}
        self._parts: SimpleNamespace | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the encoder out, which another process loads when it needs it."""
        return {**vars(self), "_parts": None}

    @classmethod
    def of(cls, config: TrainConfig) -> "ImageCoder":
        return cls(variant_of(config), size=config.image_size, source=config.image_encoder)

    def state(self) -> str:
        """Hash of all inputs of the features but the image."""
        words = [self.variant, self.size]
        if self.source is not None:
            parts = self._loaded()
            words = [self.variant, model_state("image encoder", parts.image_encoder)]
            words.append(parts.feature_extractor.to_dict())
        text = json.dumps(words, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, image: Image.Image) -> None:
        """Refuse, by an OSError, an image that cannot be shown to an encoder."""
        self._rgb(image)

    def __call__(self, image: Image.Image) -> Tensor:
        """Encode an image: (3, S, S) uint8 for "pixels", else features, (E,) or (S, E).

        Raises:
            OSError: see `check`.
        """
        from gen_accel.pipelines.image_prompt.encoder import ImageEncoder, pixels

        rgb = self._rgb(image)
        if self.source is None:
            return pixels(rgb, self.size)
        return ImageEncoder(self.variant, self._loaded())([rgb])[0]

    def nothing(self) -> Tensor:
        """Return the stand-in for no image, in the form of an encoded image."""
        from gen_accel.pipelines.image_prompt.encoder import ImageEncoder

        parts = None if self.source is None else self._loaded()
        found = ImageEncoder(self.variant, parts, size=self.size).negative()[0]
        # The encoder gives pixels in [-1, 1].
        return ((found + 1) * 127.5).round().to(torch.uint8) if self.source is None else found

    @contextmanager
    def at_work(self, device: torch.device) -> Iterator[None]:
        """Keep the encoder on the device inside the context."""
        if self.source is None:
            yield
            return
        model = self._loaded().image_encoder
        model.to(device)
        try:
            yield
        finally:
            model.to("cpu")

    def _rgb(self, image: Image.Image) -> Image.Image:
        from gen_accel.pipelines.image_prompt.encoder import as_rgb

        try:
            return as_rgb(image)
        except ValueError as error:
            raise OSError(str(error)) from error

    def _loaded(self) -> SimpleNamespace:
        """Load encoder and preprocessing once, under the names that a pipeline uses."""
        from gen_accel.pipelines.image_prompt.encoder import load_encoder

        if self._parts is None:
            assert self.source is not None
            model, extractor = load_encoder(self.source)
            self._parts = SimpleNamespace(image_encoder=model, feature_extractor=extractor)
        return self._parts


def variant_of(config: TrainConfig) -> str:
    """Return the kind of adapter that a config asks for; see `image_prompt.formats`."""
    if config.image_encoder is None:
        return "pixels"
    return {"embedding": "base", "patches": "plus"}[config.image_features]


def about_images(config: TrainConfig) -> dict[str, Any]:
    """Describe the images that an adapter reads, for its file."""
    if config.image_encoder is None:
        return {"image_size": config.image_size}
    return {"image_encoder": config.image_encoder}


def describe_images(about: Mapping[str, Any]) -> str:
    """Put `ImageCoder.about` into words."""
    if about["variant"] == "pixels":
        return f"a small encoder of {about['size']} pixels"
    return f"{about['variant']!r} of {about['source']}"


def new_projector(config: TrainConfig, features: Sequence[int], width: int) -> Any:
    """Build an untrained projector.

    Args:
        features: shape of the features of one image.
        width: width of the tokens.
    """
    from gen_accel.pipelines.image_prompt import projectors

    match variant_of(config):
        case "pixels":
            return projectors.Pixels(width, config.image_tokens, channels=CHANNELS)
        case "base":
            return projectors.Linear(features[-1], width, config.image_tokens)
        case _:
            return projectors.Resampler(features[-1], width, config.image_tokens)


def features_shape(config: TrainConfig, *, patches: int, embedding: int) -> tuple[int, ...]:
    """Return the shape of one image's features, for an encoder of the given sizes."""
    shapes = {
        "pixels": (3, config.image_size, config.image_size),
        "base": (embedding,),
        "plus": (patches, embedding),
    }
    return shapes[variant_of(config)]


_MODELS = ("vae", "image_encoder")
_CONFIG = ("in_channels", "out_channels", "image_dim", "image_condition_type")


class FirstFrames:
    """Encoder of first frames, for one model.

    Args:
        encoders: the model without its transformer's weights.
        common: values that all keys depend on, such as the dtype in the shards.
        max_tokens: length of the text, the pipeline's `max_sequence_length`.

    Raises:
        ValueError: a model that is not trained from first frames.
    """

    def __init__(self, encoders: Encoders, common: list[Any], max_tokens: int | None) -> None:
        self._encoders, self._max_tokens = encoders, max_tokens
        self._family, self._transformer = encoders.family, encoders.transformer
        check_family(self._family, self._transformer)
        config = self._transformer.config
        about = {name: config.get(name) for name in _CONFIG}
        self._about = [*common, "first frame", about]

    @cached_property
    def _state(self) -> str:
        pipe = self._encoders.pipe
        models = [name for name in _MODELS if getattr(pipe, name, None) is not None]
        return hash_of([*self._about, *self._encoders.states(*models)])

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts are encoded together with the frame."""
        return self._family.serves("prompts with a first frame")

    def key(self, *clip: Any) -> str:
        return hash_of([self._state, *clip])

    def text_key(self, text: str, *clip: Any) -> str:
        """Return the key of a prompt.

        Args:
            text: key of the prompt without a frame.
            clip: what decides the frame; nothing for a dropped caption.
        """
        return hash_of([*self._about, text, *clip]) if self.reads_prompts else text

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in _MODELS:
                stack.enter_context(self._encoders.at_work(name))
            yield

    def __call__(self, image: Image.Image, frames: int) -> dict[str, Tensor]:
        """Encode the first frame of a clip of so many pixel frames."""
        return self._family.first_frame(self._encoders.pipe, self._transformer, image, frames)

    def prompt(self, prompt: str, image: Image.Image | None) -> dict[str, Tensor]:
        """Encode a prompt together with a frame, or with what stands for one if there is none."""
        encode = self._family.encode_prompt_with
        found = encode(self._encoders.pipe, self._transformer, image, prompt, self._max_tokens)
        return {name: x[0] for name, x in found.items()}


def check_family(family: Any, transformer: Any) -> None:
    """Refuse, by a ValueError, a model that is not trained from first frames."""
    if not family.training.first_frame:
        kind = type(transformer).__name__
        raise ValueError(f"no training from a first frame for {kind}: take condition text")
