"""Encoding of images to the features that an adapter's projector takes.

I images, E width of a feature, S features of one image.

The features depend on the variant: the embedding of a CLIP vision model ("base", "flux"), its
hidden states before the last layer ("plus", "full", half of "faceid_plus"), or the pixels
("pixels"). Vectors of faces ("faceid", "portrait", "lynx") come from face recognition, which is
not part of this package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from gen_accel.hub import REPOSITORY, reachable
from gen_accel.measure.video_io import read_picture
from gen_accel.paths import expanded
from gen_accel.pipelines.image_prompt.projectors import GREY, IDENTITY, PIXELS, normalised
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, PreTrainedModel

EMBEDDING = ("base", "flux")
HIDDEN = ("plus", "full")
BOTH = ("faceid_plus", "faceid_plus_v2")
FACES = ("faceid", "portrait", "lynx", "lynx_light")

Picture = Image.Image | str | Path | Tensor
Pictures = Picture | list[Picture] | tuple[Picture, ...]


class ImageEncoder:
    """Encoder of images for one variant of adapters, and of "no image".

    Uses a pipeline's own `image_encoder` and `feature_extractor` and leaves them unchanged; the
    argument `image_encoder` takes precedence.

    Args:
        variant: variant of the adapter.
        image_encoder: a CLIP vision model of transformers, or a folder or hub repository with
            such a model and its preprocessing.
        size: pixels a side, for "pixels".

    Attributes:
        given, extractor: the model of `image_encoder`, and its preprocessing if that was loaded.

    Raises:
        ValueError: a folder without such a model.
    """

    def __init__(
        self,
        variant: str,
        pipe: object,
        image_encoder: "PreTrainedModel | str | Path | None" = None,
        *,
        size: int = PIXELS,
    ) -> None:
        self.variant, self.size = variant, size
        self._pipe = pipe
        self.extractor: CLIPImageProcessor | None = None
        if isinstance(image_encoder, str | Path):
            self.given, self.extractor = load_encoder(image_encoder)
        else:
            self.given = image_encoder

    def __call__(self, images: Sequence[Picture]) -> Tensor:
        """Encode images: (I, E) embeddings, (I, S, E) hidden states, or (I, 3, S, S) pixels in
        [-1, 1].

        Raises:
            ValueError: no encoder, an encoder without the needed output, no images or broken
                ones, or a variant that takes vectors of faces.
        """
        if self.variant in (*FACES, *BOTH):
            more = "dict(id=vectors, clip=hidden(images))" if self.variant in BOTH else "vectors"
            raise ValueError(
                f"a {self.variant} adapter takes the vectors that face recognition gives, "
                f"(I, {IDENTITY}): pass set_embeds({more}) instead of images"
            )
        pictures = [as_rgb(image) for image in images]
        if not pictures:
            raise ValueError("no image given")
        if self.variant == "pixels":
            return normalised(torch.stack([pixels(image, self.size) for image in pictures]))
        return self._run(self._preprocess(pictures))

    def hidden(self, images: Sequence[Picture]) -> Tensor:
        """Encode images to hidden states, (I, S, E), the half of FaceID-Plus' features that CLIP
        gives. Crop the images to the face first."""
        return self._run(self._preprocess([as_rgb(image) for image in images]))

    def negative(self) -> "Tensor | dict[str, Tensor]":
        """Return the features of "no image", (1, ...), that the variant was trained with.

        They are zeros, the hidden states of an input of zeros, the embedding of a black image for
        "flux", or grey pixels for "pixels".
        """
        if self.variant == "pixels":
            grey = torch.full((1, 3, self.size, self.size), GREY, dtype=torch.uint8)
            return normalised(grey)
        if self.variant in FACES:
            return torch.zeros(1, IDENTITY)
        if self.variant == "flux":
            return self([Image.new("RGB", (IDENTITY, IDENTITY))])
        model = self._model()
        if self.variant == "base":
            return torch.zeros(1, model.config.projection_dim)
        side = self._preprocess([Image.new("RGB", (8, 8))])
        seen = self._run(torch.zeros_like(side))
        return {"id": torch.zeros(1, IDENTITY), "clip": seen} if self.variant in BOTH else seen

    @property
    def is_there(self) -> bool:
        """Whether there is an encoder to call, also for `negative`."""
        if self.variant == "pixels" or self.variant in FACES:
            return True
        return self.given is not None or getattr(self._pipe, "image_encoder", None) is not None

    def _model(self) -> "PreTrainedModel":
        model = (
            self.given if self.given is not None else getattr(self._pipe, "image_encoder", None)
        )
        if model is None:
            raise ValueError(
                f"a {self.variant} adapter reads what a CLIP vision model sees, and "
                f"{type(self._pipe).__name__} has no image_encoder: give image_encoder= (a model, "
                "a folder, or a hub repository), or features by set_embeds"
            )
        return model

    def _preprocess(self, images: list[Image.Image]) -> Tensor:
        """Preprocess images for the encoder, (I, 3, height, width).

        Images that are not square are cropped to the center.
        """
        extractor = self.extractor
        if extractor is None and self.given is None:
            extractor = getattr(self._pipe, "feature_extractor", None)
            if extractor is None:  # Wan's pipelines call it by another name
                extractor = getattr(self._pipe, "image_processor", None)
                extractor = extractor if hasattr(extractor, "image_mean") else None
        if extractor is None:
            extractor = _plain_extractor(self._model())
        return extractor(images, return_tensors="pt").pixel_values

    @torch.no_grad()
    def _run(self, pixels: Tensor) -> Tensor:
        model = self._model()
        pixels = pixels.to(_place(model), next(model.parameters()).dtype)
        if self.variant not in EMBEDDING:
            return model(pixels, output_hidden_states=True).hidden_states[-2]
        embeds = getattr(model(pixels), "image_embeds", None)
        if embeds is None:
            raise ValueError(
                f"a {self.variant} adapter reads image_embeds, which {type(model).__name__} has "
                "not: give image_encoder=, a CLIPVisionModelWithProjection"
            )
        return embeds


def load_encoder(source: str | Path) -> "tuple[PreTrainedModel, CLIPImageProcessor]":
    """Load a CLIP vision model with its projection, frozen, and its preprocessing.

    Raises:
        ValueError: another model, or no model.
        OSError: a repository that is not in the hub's cache and cannot be fetched.
    """
    with needed_for("an image encoder", extra="video"):
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
    if not expanded(source).exists() and REPOSITORY.fullmatch(str(source)):
        source = reachable(str(source))
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no CLIP vision model at {source}: {error}") from error
    try:
        extractor = CLIPImageProcessor.from_pretrained(source)
    except OSError:  # h94's repository has the weights alone
        extractor = _plain_extractor(model)
    return model.eval().requires_grad_(False), extractor


def as_rgb(image: Picture) -> Image.Image:
    """Convert any image to RGB of 8 bits, rotated by its EXIF data, on white if transparent.

    Args:
        image: a picture or its path; a tensor is (3, height, width), uint8 or in [0, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, a broken image, or one that is too large or has more than 8 bits.
    """
    if isinstance(image, Tensor):
        return _of_tensor(image)
    if isinstance(image, str | Path):
        path = expanded(image)
        try:
            image = read_picture(path, path)
        except OSError as error:
            if not path.is_file():
                raise FileNotFoundError(f"no image at {path}") from error
            raise ValueError(str(error)) from error
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"an image is a PIL image, a path or a tensor, got {type(image).__name__}"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"):
        raise ValueError(f"images have 8 bits a channel; this one is {image.mode}: convert it")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def pixels(image: Image.Image, size: int) -> Tensor:
    """Resize an image to a square, (3, size, size) uint8, without cropping."""
    small = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _of_tensor(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image is (3, height, width), got {tuple(image.shape)}")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"an image of floats is in [0, 1], got {low:g} to {high:g}")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"an image is uint8 or floats, got {image.dtype}")
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def _plain_extractor(model: "PreTrainedModel") -> "CLIPImageProcessor":
    """Build CLIP's preprocessing at the size that the model takes."""
    with needed_for("an image encoder", extra="video"):
        from transformers import CLIPImageProcessor
    side = model.config.image_size
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)


def _place(model: nn.Module) -> torch.device:
    """Return the device that the model computes on.

    For weights that are offloaded layer by layer, accelerate's hooks tell the device. Raises
    ValueError for weights on the meta device without such hooks.
    """
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise ValueError(
        f"the weights of {type(model).__name__} are on the meta device, and no hook loads them: "
        "load the image encoder with its weights"
    )
