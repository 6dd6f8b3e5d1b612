"""Zones of earlier chunks that a chunk of a video sees."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from gen_accel.parsing import convert, example, shown, wrong_type
from gen_accel.registry import nearest_to
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from gen_accel.method import Method

Middle = Literal["none", "salient", "grid", "all"]
MIDDLES: tuple[Middle, ...] = get_args(Middle)
SHARE = 16  # tokens of a chunk for each one that a middle keeps
CELL = 4  # side of a cell of the grid, in tokens
STEPS = 6  # of a chunk, unless told


@dataclass(frozen=True)
class Zones:
    """Zones of earlier chunks that a chunk sees.

    Args:
        frames: latent frames of a chunk, after patchify.
        window: newest chunks, of which all tokens are seen.
        sink: first chunks that are seen for ever.
        middle: of the chunks between: "none"; "salient": the tokens whose values are farthest from
            the chunk's mean value, and one mean of all others; "grid": the means of cells of 4 x 4
            tokens; "all" their tokens.
        remembered: chunks of the middle; the oldest falls out.

    Raises:
        ValueError: numbers out of range, a window below the sink, or a middle of another name.
    """

    frames: int = 3
    window: int = 2
    sink: int = 0
    middle: Middle = "none"
    remembered: int = 4

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("window", 1), ("sink", 0), ("remembered", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
        if self.window < self.sink:
            raise ValueError(
                f"window {self.window} is below sink {self.sink}: take a window of as many or more"
            )
        if self.middle not in MIDDLES:
            raise ValueError(f"middle must be one of {', '.join(MIDDLES)}, got {self.middle!r}")

    def __str__(self) -> str:
        sink = f", the first {self.sink}" if self.sink else ""
        middle = f", {self.middle} of {self.remembered} between" if self.middle != "none" else ""
        return f"chunks of {self.frames} latent frames, the last {self.window}{sink}{middle}"

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)

    def check_method(self, method: "Method") -> None:
        """Refuse, by a ValueError, a sparse method beside a middle, whose counts no kernel
        takes."""
        if self.middle != "none" and not method.is_dense:
            raise ValueError(
                f"{type(method).__name__} sees the chunks of the window and the sink alone: take "
                "middle none, or method dense"
            )

    def tokens(self, video: VideoShape) -> int:
        """Number of keys that a chunk of this grid sees once the cache is full, its own and its
        text among them."""
        return video.tokens + self.kept(video)

    def kept(self, video: VideoShape) -> int:
        """Number of tokens whose keys and values a cache holds once it is full."""
        return video.video_tokens * (self.window + self.sink) + self._middle(video)

    def _middle(self, video: VideoShape) -> int:
        """Number of tokens in the middle."""
        if self.middle == "none":
            return 0
        each = video.video_tokens
        if self.middle == "salient":
            each = salient_tokens(each) + 1
        elif self.middle == "grid":
            each = -(-video.height // CELL) * -(-video.width // CELL) * video.frames
        return self.remembered * each


def salient_tokens(tokens: int) -> int:
    """Number of a chunk's tokens that stay exact in a middle."""
    return max(1, tokens // SHARE - 1)


def read_zones(words: Sequence[str]) -> dict[str, Any]:
    """Read "field=value" each, of a field of `Zones` or noise, which is the noise level of the
    chunks that are seen. Later ones win. ValueError for another field, or a value of another
    type."""
    hints, found = get_type_hints(Zones) | {"noise": float}, {}
    for word in words:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or name not in hints:
            hint = nearest_to(name, [*hints])
            raise ValueError(
                f"zones are {'=..., '.join(hints)}=..., with commas between, got "
                f"{shown(word)}{hint}"
            )
        try:
            found[name] = convert(text, hints[name], is_text=True)
        except (TypeError, ValueError, OverflowError):
            right = f"{name}={example(hints[name])}"
            raise wrong_type(f"{name} of zones", hints[name], text, right) from None
    return found
