"""Training inputs of an image prompt: pixels, or the features of a frozen image encoder."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.fingerprint import model_state

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
