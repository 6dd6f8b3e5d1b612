"""Options of a cache, and the keys of its tensors."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gen_accel.lora.caching.encoders import Encoders, hash_of
from gen_accel.lora.caching.inputs import FIRST_FRAME, TEXT, FirstFrames
from gen_accel.lora.caching.jobs import Spread
from gen_accel.lora.caching.latents import RECIPE
from gen_accel.lora.data.captions import Captions
from gen_accel.lora.data.clips import Size
from gen_accel.lora.data.report import why_broken
from gen_accel.lora.data.scenes import Take
from gen_accel.pipelines.generation.loading import DTYPES

if TYPE_CHECKING:
    from gen_accel.lora.caching.inputs import ImageCoder

START, AS_WRITTEN = Take(), Captions()


@dataclass
class Options:
    """Options of one call of `cache`, the keys of its tensors, and the clips found broken."""

    encoders: Encoders
    frames: tuple[int, ...]
    sizes: tuple[Size, ...]
    fps: float | None
    max_tokens: int | None
    on_broken: str
    store: str
    images: "ImageCoder | None" = None
    teacher: bool = False
    take: Take = START
    captions: Captions = AS_WRITTEN
    pictures: bool = False
    repeats: tuple[str, ...] = ()
    default_caption: str | None = None
    workers: int = 0
    condition: str = TEXT
    masks: bool = False
    spread: "Spread | None" = None
    broken: dict[str, str] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        common = [RECIPE, self.store]
        self.first_frames = None
        if self.condition == FIRST_FRAME:
            self.first_frames = FirstFrames(self.encoders, common, self.max_tokens)

    def hash_models(self) -> None:
        """Hash the encoders, which all keys depend on."""
        common = [RECIPE, self.store]
        self._vae = hash_of([*common, *self.encoders.states("vae")])
        texts = self.encoders.states(*self.encoders.family.training.text_parts, "tokenizer")
        self._text = hash_of([*common, self.max_tokens, *texts])
        self._image = None if self.images is None else hash_of([*common, self.images.state()])

    def text_key(self, caption: str, *clip: Any) -> str:
        key = hash_of([self._text, caption])
        return key if self.first_frames is None else self.first_frames.text_key(key, *clip)

    def image_key(self, *image: Any) -> str:
        assert self._image is not None
        return hash_of([self._image, *image])

    def _note(self, name: str, error: OSError) -> None:
        """Note a clip, or a chunk of one, that is left out. Raises OSError where none may be."""
        if self.on_broken == "stop":
            raise OSError(f"{name} is broken: {error}") from error
        self.broken[name] = str(error)
        self.left_out[name] = why_broken(str(error))

    def stored(self, x: Tensor) -> Tensor:
        """Convert a tensor to its form in the shards."""
        return x.to("cpu", DTYPES[self.store] if x.is_floating_point() else x.dtype)
