"""Texts that a video file carries about itself, such as the prompt and the settings.

- Films (.mp4 and what is made of it by `ffmpeg -c copy`): the comment of the container, which
  every tool copies. It is JSON, behind the note on an odd size where there is one.
- GIF: a comment block of the same JSON, in ASCII as the format wants.
- PNG: a text chunk for each, iTXt where the text is beyond Latin-1. Every text chunk is read, by
  whatever program it was written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import PngImagePlugin

from gen_accel.measure.picture_files import read_picture

NAME = re.compile(r"[!-~]([ -~]{0,77}[!-~])?")  # what a PNG takes as a keyword
MARK = "gen_accel"  # the one key of our JSON
GIF_COMMENT, GIF_PART = b"\x21\xfe", 255  # the block's beginning; most bytes in a part of it


def checked_texts(about: Mapping[str, str] | None) -> dict[str, str]:
    """Copy the texts, their lone surrogates (of file names that are not UTF-8) escaped.

    Raises ValueError for a name that is not 1 to 79 characters of ASCII, or a value that is no
    text.
    """
    texts = {}
    for name, text in (about or {}).items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"a name in about must be 1 to 79 characters of ASCII, got {name!r}")
        if not isinstance(text, str):
            raise ValueError(f"about[{name!r}] must be text, got {text!r}")
        texts[name] = text.encode(errors="backslashreplace").decode()
    return texts


def comment_of(texts: Mapping[str, str], *, ascii_only: bool = False) -> str:
    """Write the texts as a comment, "" for none."""
    return json.dumps({MARK: dict(texts)}, ensure_ascii=ascii_only) if texts else ""


def texts_of(comment: str) -> dict[str, str]:
    """Texts in a comment that `comment_of` wrote, also behind other words; {} in any other."""
    start = comment.find(f'{{"{MARK}"')
    try:
        told = json.loads(comment[start:])[MARK] if start >= 0 else {}
        return checked_texts(told)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}


def png_chunks(texts: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """Chunks for Pillow's `save(pnginfo=)`."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    return chunks


def picture_texts(path: Path) -> dict[str, str]:
    """Texts in a PNG or GIF. Raises OSError as `read_picture`."""
    image = read_picture(path, path)
    if isinstance(image, PngImagePlugin.PngImageFile):
        return {str(name): str(text) for name, text in image.text.items()}
    comment = image.info.get("comment", b"")
    return texts_of(comment.decode(errors="replace") if isinstance(comment, bytes) else comment)


def add_gif_comment(path: Path, texts: Mapping[str, str]) -> None:
    """Put the texts into a GIF file, before its first frame."""
    if not texts:
        return
    data, comment = path.read_bytes(), comment_of(texts, ascii_only=True).encode()
    colours = data[10]  # the flag and the size of the global palette
    start = 13 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
    parts = (comment[i : i + GIF_PART] for i in range(0, len(comment), GIF_PART))
    block = GIF_COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    path.write_bytes(data[:start] + block + data[start:])
