"""Token grid of one video: the only geometry that the rest of the package sees."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoShape:
    """Grid of one video, in tokens after patchify, not in pixels or latents.

    Tokens come frame by frame, row by row, column by column, then `text` tokens. A model that
    puts its text first is reordered in its family's file and nowhere else.
    """

    frames: int
    height: int
    width: int
    text: int = 0

    def __post_init__(self) -> None:
        # Check for the wrong types, since in a graph sizes are symbols.
        for size in (*self.grid, self.text):
            if size is None or isinstance(size, bool | float | str):
                raise ValueError(f"video sizes must be whole numbers, got {self}")
        if min(self.frames, self.height, self.width) < 1 or self.text < 0:
            raise ValueError(f"video sizes must be at least 1 and text at least 0, got {self}")

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text

    def __str__(self) -> str:
        text = f" + {self.text} text" if self.text else ""
        return f"{self.frames} x {self.height} x {self.width}{text}"
