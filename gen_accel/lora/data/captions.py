"""Captions of a clip as they are encoded: with a trigger word, and tags in several orders."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain

from gen_accel.lora.data.clips import CaptionedVideo


@dataclass(frozen=True)
class Captions:
    """Changes of the captions of a clip.

    Args:
        trigger: word before every caption that does not hold it, with a comma after.
        prefix: text put before every caption as it is, after the trigger.
        shuffle: number of tags that stay in front while the others change their order; tags have
            commas between them. None changes no order.
        orders: number of orders of the tags, the written one included.
    """

    trigger: str | None = None
    prefix: str | None = None
    shuffle: int | None = None
    orders: int = 4

    def __post_init__(self) -> None:
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle must not be negative, got {self.shuffle}")
        if self.orders < 1:
            raise ValueError(f"orders must be at least 1, got {self.orders}")

    def of(self, video: CaptionedVideo) -> tuple[str, ...]:
        """Make the texts to encode. One of them is drawn at each step, all alike.

        Texts repeat where a caption has fewer orders than asked for, so that each caption keeps
        its share. A single text stays alone.
        """
        written = [video.caption, *video.more_captions]
        each = [[self._headed(text) for text in self._orders(caption)] for caption in written]
        texts = tuple(chain.from_iterable(each))
        return texts if len(set(texts)) > 1 else texts[:1]

    def _headed(self, text: str) -> str:
        text = f"{self.prefix or ''}{text}"
        if self.trigger is None or re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", text):
            return text
        return f"{self.trigger}, {text}" if text else self.trigger

    def _orders(self, caption: str) -> list[str]:
        """Return `orders` texts, the first as it is written."""
        if self.shuffle is None:
            return [caption]
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        front, rest = tags[: self.shuffle], tags[self.shuffle :]
        if len(rest) < 2:
            return [caption] * self.orders
        found = {tuple(rest): caption}
        for number in range(1, 8 * self.orders):  # some of the orders come twice
            if len(found) == self.orders:
                break
            order = tuple(sorted(rest, key=lambda tag, n=number: _hash(caption, n, tag)))
            found.setdefault(order, ", ".join([*front, *order]))
        texts = list(found.values())
        return [texts[i % len(texts)] for i in range(self.orders)]


def repeated(videos: Sequence[CaptionedVideo], patterns: Sequence[str]) -> list[CaptionedVideo]:
    """Set `repeats` of the videos whose names match a pattern; the last match counts.

    Args:
        patterns: see `parse_repeats`.

    Raises ValueError for a pattern that matches no name.
    """
    found = list(videos)
    for text in patterns:
        pattern, count = parse_repeats(text)
        matching = [i for i, video in enumerate(found) if fnmatchcase(video.name, pattern)]
        if not matching:
            raise ValueError(
                f"repeats {text!r} matches none of the {len(found)} clips, as {found[0].name}"
            )
        for i in matching:
            found[i] = replace(found[i], repeats=count)
    return found


def parse_repeats(text: object) -> tuple[str, int]:
    """Parse "people/*=3" to a pattern of names and a number. Raises ValueError for other text."""
    pattern, equals, count = str(text).rpartition("=")
    if not (equals and pattern and count.strip().isdecimal() and int(count) >= 1):
        raise ValueError(
            "repeats count some clips against the others, as people/*=3, PATTERN=NUMBER each, "
            f"got {text!r}"
        )
    return pattern.strip(), int(count)


def _hash(*words: object) -> bytes:
    return hashlib.sha256(repr(words).encode()).digest()
