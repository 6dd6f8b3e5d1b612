"""One of several data sets of a training, with settings of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from gen_accel.config import Config, mapping_in, option
from gen_accel.lora.data.clips import ClipRule, How, Scenes, Take, parse_sizes


class Dataset(Config):
    """One of several data sets of a training. What is not given is the training's."""

    VERB: ClassVar[str] = "train"

    data: str = option(
        ..., "Data set", "Videos with captions, as the field data has them.", reads=Path
    )
    repeats: int = option(
        1,
        "Data set",
        "Number of times that its clips are shown while others are shown once.",
        ge=1,
    )
    sizes: tuple[str, ...] = option((), "Data set", "Sizes as HEIGHTxWIDTH.", commas=True)
    frames: tuple[int, ...] = option(
        (), "Data set", "Numbers of frames, of those of the stages, that its clips are cut to."
    )
    take: How | None = option(None, "Data set", "Piece of a clip longer than a stage.")
    scenes: Scenes | None = option(None, "Data set", "Scene detection.")
    trigger: str | None = option(
        None, "Data set", "Word put before every caption that does not hold it."
    )
    prefix: str | None = option(None, "Data set", "Text put before every caption.")
    default_caption: str | None = option(None, "Data set", "Caption of clips that have none.")
    shuffle_tags: int | None = option(
        None, "Data set", "Number of leading tags that keep their place.", ge=0
    )

    @classmethod
    def parse(cls, told: str | Mapping[Any, object], origin: str) -> "Dataset":
        """Read a data set from a folder, from fields by name, or from these as YAML in braces.

        Args:
            origin: where it stands, for errors.
        """
        if isinstance(told, str):
            is_folder = not told.lstrip().startswith("{")
            told = {"data": told} if is_folder else mapping_in(told, origin)
        made = cls.read(told, origin=origin)
        if made.sizes:
            try:
                parse_sizes(",".join(made.sizes))
            except ValueError as error:
                raise ValueError(f"{origin}: {error}") from None
        return made

    def rule(self, own: ClipRule) -> ClipRule:
        """Say how its clips are cut and captioned.

        Args:
            own: of the training, for what is not given.

        Raises ValueError for a number of frames that is not of the training.
        """
        if unknown := {*self.frames} - {*own.frames}:
            raise ValueError(
                f"frames of the data set {self.data} must be of the stages, "
                f"{', '.join(map(str, own.frames))}, got {min(unknown)}"
            )
        said = {"trigger": self.trigger, "prefix": self.prefix, "shuffle": self.shuffle_tags}
        return ClipRule(
            Take(self.take or own.take.how, self.scenes or own.take.scenes),
            replace(own.captions, **{name: x for name, x in said.items() if x is not None}),
            parse_sizes(",".join(self.sizes)) if self.sizes else own.sizes,
            sorted(self.frames) or own.frames,
        )
