"""What a technique for longer video is, and what it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import nn

from gen_accel.attention_processors.families import Family
from gen_accel.moved import signpost

if not TYPE_CHECKING:
    __getattr__ = signpost("pipelines.long_video.technique")


@dataclass(frozen=True, eq=False)
class Target:
    """What is extended, and how far. Lengths in latent frames after patchify: tokens along time.

    Args:
        pipe: None where a transformer alone was given.
        transformers: by their names in the pipeline; both of a pipeline with two.
        families: the family of each, by the same names.
        frames: of the video asked for. The live grid may differ from call to call: a technique
            reads it from the call, and does nothing where it is not longer than `trained`.
        trained: the length that the model was trained at.
        temporal_factor: pixel frames that one latent frame stands for, all but the first.
        temporal_patch: latent frames in one token.
    """

    pipe: Any | None
    transformers: Mapping[str, nn.Module]
    families: Mapping[str, Family]
    frames: int
    trained: int
    temporal_factor: int = 4
    temporal_patch: int = 1

    @property
    def subject(self) -> Any:
        """What was given: the pipeline, or the transformer alone."""
        return next(iter(self.transformers.values())) if self.pipe is None else self.pipe

    @property
    def longer(self) -> bool:
        """Whether the video asked for is longer than the model knows."""
        return self.frames > self.trained

    def pixel_frames(self, frames: int) -> int:
        """Frames of the video that so many latent frames after patchify decode to."""
        return (frames * self.temporal_patch - 1) * self.temporal_factor + 1


class Technique(Protocol):
    """A frozen dataclass of options.

    `apply` puts the technique on the live model, checks before it changes anything, and returns
    what takes it off again, leaving the model bit-identical. It is called once; what it returns
    is called once.

    A technique that needs more than one call of the pipeline, or acts during a call alone, has,
    besides, `generate(target, arguments)`: it runs the pipeline with the keyword arguments of its
    call, `num_frames` filled in, and returns what one call would have returned.

    Args:
        name: its entry in `TECHNIQUES`.
        excludes: names of the techniques that it cannot be used with, each with the reason.
    """

    name: ClassVar[str]
    excludes: ClassVar[Mapping[str, str]]

    def apply(self, target: Target) -> Callable[[], None]: ...

    def describe(self, target: Target) -> str:
        """One line on what it does to a video of the length asked for."""
        ...
