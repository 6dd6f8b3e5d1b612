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
    """Images that the videos go by, beside their texts. Pictures are files or PIL images.

    Args:
        images: several act together.
        adapter: what reads them, see `load_image_prompt`: a file, a folder, or a repository of
            the hub.
        scale: 1 is as it was trained, 0 the model without.
        negative: what the negative prompt goes by; without, "no image".
        masks: white where an image acts, black where it does not: one for all, or one for each.
        encoder: folder or hub repository of a CLIP vision model, where the adapter needs one and
            neither its file nor the pipeline says which.
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
        """With all pictures read, and the adapter found and looked at.

        Raises:
            FileNotFoundError: no such image, or no adapter.
            ValueError: what is no image, or no adapter.
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
        """What it is told apart from others by; of one that is `opened`."""
        pictures = {"images": self.images, "masks": self.masks}
        negative = None if self.negative is None else prompt_list.pixels(self.negative)
        return {name: [*map(prompt_list.pixels, some)] for name, some in pictures.items()} | {
            "negative": [negative],
            "adapter": prompt_list.identity(self.adapter),
            "scale": self.scale,
            "encoder": None if self.encoder is None else prompt_list.identity(self.encoder),
        }

    def load(self, pipe: Any) -> ImagePrompt:
        """Put it on a pipeline."""
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
