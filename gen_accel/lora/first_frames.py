"""Encoding of the clips' first frames, and of prompts that are encoded together with them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from gen_accel.lora.encoders import Encoders
from gen_accel.lora.fingerprint import hash_of

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
        return self._family.encode_prompt_with is not None

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
        encode: Any = self._family.encode_prompt_with
        found = encode(self._encoders.pipe, self._transformer, image, prompt, self._max_tokens)
        return {name: x[0] for name, x in found.items()}


def check_family(family: Any, transformer: Any) -> None:
    """Refuse, by a ValueError, a model that is not trained from first frames."""
    if family.first_frame is None:
        kind = type(transformer).__name__
        raise ValueError(f"no training from a first frame for {kind}: take condition text")
