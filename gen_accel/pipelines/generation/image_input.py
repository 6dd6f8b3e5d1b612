"""Image prompts of a run: pictures, adapter, encoder and scale."""

import math
from dataclasses import dataclass, replace
from typing import Any

from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.image_prompt import ImagePrompt, load_image_prompt
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.image_prompt.formats import find_adapter, read_adapter


@dataclass(frozen=True)
class ImageInput:
    """Image prompts of all videos, beside their texts. Pictures are files or PIL images.

    Args:
        images: the images; several act together.
        adapter: file, folder or hub repository of the adapter, see `load_image_prompt`.
        scale: strength; 1 is the strength in training, 0 the model without the images.
        negative: image of the negative prompt; None for "no image".
        masks: one mask for all images, or one for each: white in the area of the image, black
            elsewhere.
        encoder: folder or hub repository of a CLIP vision model, if the adapter needs one and
            neither its file nor the pipeline names it.
    """

    images: tuple[Any, ...]
    adapter: Any
    scale: float = 1.0
    negative: Any = None
    masks: tuple[Any, ...] = ()
    encoder: Any = None

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError(f"an image prompt needs an image; adapter {self.adapter} has none")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale of an image prompt must be finite, got {self.scale}")
        if len(self.masks) not in (0, 1, len(self.images)):
            raise ValueError(
                f"masks must be one, or one for each of {len(self.images)} images, got "
                f"{len(self.masks)}"
            )

    def opened(self) -> "ImageInput":
        """Read all pictures, and find and check the adapter.

        Raises:
            FileNotFoundError: an image or the adapter is missing.
            ValueError: a file is no image, or no adapter.
        """
        path = find_adapter(self.adapter)
        read_adapter(path)  # refused before a model is loaded
        return replace(
            self,
            images=tuple(as_rgb(image) for image in self.images),
            adapter=path,
            negative=None if self.negative is None else as_rgb(self.negative),
            masks=tuple(as_rgb(mask).convert("L") for mask in self.masks),
        )

    def identity(self) -> dict[str, Any]:
        """Identify pictures, adapter, scale and encoder; call it after `opened`."""
        pictures = {"images": self.images, "masks": self.masks}
        negative = None if self.negative is None else prompt_list.pixels(self.negative)
        return {name: [*map(prompt_list.pixels, some)] for name, some in pictures.items()} | {
            "negative": [negative],
            "adapter": prompt_list.identity(self.adapter),
            "scale": self.scale,
            "encoder": None if self.encoder is None else prompt_list.identity(self.encoder),
        }

    def load(self, pipe: Any) -> ImagePrompt:
        """Load the adapter onto a pipeline, and set the images."""
        prompt = load_image_prompt(
            pipe, self.adapter, scale=self.scale, image_encoder=self.encoder
        )
        try:
            masks = None if not self.masks else [*self.masks]
            if masks is not None and len(masks) == 1:  # for all images
                masks = masks[0]
            prompt.set_image([*self.images], negative=self.negative, mask=masks)
        except BaseException:
            prompt.remove()
            raise
        return prompt
