"""Videos next to each other, words above and below. A video is (F, H, W, 3) uint8, RGB."""

import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PLAIN_SIGNS = {"\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-", "\N{EM DASH}": "-"}
SHEET_WIDTH = 2400  # pixels, of the frames in one row of a contact sheet at most
ROW_TEXT, ROW_FONT, ROW_GAP = 320, 12, 6  # pixels, of rows with text on their left
BACKGROUND, INK, FAINT_INK = (44, 46, 52), (240, 240, 242), (174, 176, 184)


def side_by_side(
    videos: Sequence[np.ndarray], labels: Sequence[str], *, caption: str = "", scale: int = 1
) -> np.ndarray:
    """Put videos next to each other, a label above each and `caption` below all of them.

    Args:
        videos: (F, H, W, 3) uint8 each, all of one shape.
        labels: one for each video; long ones wrap.
        scale: how many pixels wide and high one pixel becomes, without smoothing.

    Returns:
        (F, H', W', 3) uint8, where H' and W' leave room for text and gaps.

    Raises:
        ValueError: shapes differ, labels do not match, or scale < 1.
    """
    _check_videos(videos, labels)
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    frames, height, width = videos[0].shape[:3]
    height, width = scale * height, scale * width
    font, gap = _font_size(width), _gap(width)
    total = len(videos) * width + (len(videos) - 1) * gap
    head = _row([_text(label, width, font) for label in labels], gap)
    foot = _text(caption, total, font * 5 // 6, FAINT_INK) if caption else head[:0]
    top, bottom = len(head), len(head) + height
    canvas = np.empty((frames, bottom + len(foot), total, 3), np.uint8)
    canvas[:] = BACKGROUND
    canvas[:, :top] = head
    canvas[:, bottom:] = foot
    for i, video in enumerate(videos):
        left = i * (width + gap)
        canvas[:, top:bottom, left : left + width] = video.repeat(scale, 1).repeat(scale, 2)
    return canvas


def contact_sheet(
    videos: Sequence[np.ndarray], labels: Sequence[str], *, count: int = 9
) -> np.ndarray:
    """Draw one picture: a row for each video, its label above; a column for each of `count`
    frames.

    Args:
        videos: (F, H, W, 3) uint8 each, all of one shape. Frames are shrunk where a row would be
            wider than 2400 pixels.
        count: frames to show, evenly spaced from the first to the last; all if there are fewer.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: shapes differ, labels do not match, or count < 1.
    """
    _check_videos(videos, labels)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    frames, height, width = videos[0].shape[:3]
    shown = np.linspace(0, frames - 1, min(count, frames)).round().astype(int)
    shrink = min(1.0, SHEET_WIDTH / (width * len(shown)))
    width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    gap = _gap(width)
    total = len(shown) * width + (len(shown) - 1) * gap
    rows = [_row([_text(f"frame {i}", width, _font_size(width), FAINT_INK) for i in shown], gap)]
    for video, label in zip(videos, labels, strict=True):
        tiles = [Image.fromarray(video[i]).resize((width, height)) for i in shown]
        rows += [
            _text(label, total, _font_size(3 * width)),
            _row([np.asarray(t) for t in tiles], gap),
        ]
    return np.concatenate(rows)


def picture_rows(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, head: str = "", foot: str = ""
) -> np.ndarray:
    """Draw one picture: a row of pictures for each text, which stands on their left.

    Args:
        rows: lines of text and pictures, (H, W, 3) uint8, of any size and number.
        head, foot: text above and below all rows.

    Returns:
        (H', W', 3) uint8.
    """
    widths = [sum(one.shape[1] + ROW_GAP for one in pictures) for _, pictures in rows]
    total = ROW_TEXT + max(widths, default=0)
    parts = [_text(head, total, ROW_FONT, FAINT_INK)] if head else []
    for text, pictures in rows:
        words = _row_text(text)
        high = max(len(words), *(len(one) for one in pictures)) + ROW_GAP
        row = np.empty((high, total, 3), np.uint8)
        row[:] = BACKGROUND
        row[: len(words), :ROW_TEXT] = words
        left = ROW_TEXT
        for one in pictures:
            row[: len(one), left : left + one.shape[1]] = one
            left += one.shape[1] + ROW_GAP
        parts.append(row)
    if foot:
        parts.append(_text(foot, total, ROW_FONT, FAINT_INK))
    return np.concatenate(parts) if parts else np.zeros((1, total, 3), np.uint8)


def _row_text(text: str) -> np.ndarray:
    """Lines of text, the first of them bright, (h, ROW_TEXT, 3)."""
    first, *rest = text.split("\n")
    parts = [_text(first, ROW_TEXT, ROW_FONT), *(_faint(line) for line in rest)]
    return np.concatenate(parts)


def _faint(line: str) -> np.ndarray:
    return _text(line, ROW_TEXT, ROW_FONT, FAINT_INK)[ROW_FONT // 2 :]


def _check_videos(videos: Sequence[np.ndarray], labels: Sequence[str]) -> None:
    shapes = [video.shape for video in videos]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise ValueError(f"videos must be (F, H, W, 3) and of one shape, got {shapes}")
    if 0 in shapes[0] or any(video.dtype != np.uint8 for video in videos):
        raise ValueError(
            f"videos must be uint8 and not empty, "
            f"got {[f'{video.shape} {video.dtype}' for video in videos]}"
        )
    if len(labels) != len(videos):
        raise ValueError(f"{len(videos)} videos need as many labels, got {len(labels)}")


def _font_size(width: int) -> int:
    """Pixels, for text above a picture `width` pixels wide."""
    return min(max(width // 18, 11), 30)


def _gap(width: int) -> int:
    """Pixels between pictures `width` pixels wide."""
    return max(2, width // 64)


def _text(text: str, width: int, size: int, ink: tuple[int, int, int] = INK) -> np.ndarray:
    """`text` on a bar as wide as asked and as high as its lines need, (h, width, 3)."""
    font, margin, line = ImageFont.load_default(size=size), size // 2, size * 4 // 3
    lines = _wrap(_drawable(text), font, width - 2 * margin)
    bar = Image.new("RGB", (width, len(lines) * line + 2 * margin), BACKGROUND)
    draw = ImageDraw.Draw(bar)
    for i, words in enumerate(lines):
        draw.text((margin, margin + i * line), words, fill=ink, font=font)
    return np.asarray(bar)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The fewest lines no wider than `width` pixels; a word breaks only where it must."""
    for columns in range(len(text), 1, -1):
        lines = textwrap.wrap(text, columns)
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return list(text) or [""]


def _drawable(text: str) -> str:
    """`text` without accents and such, for Pillow's own font has little beyond ASCII."""
    for sign, plain in PLAIN_SIGNS.items():
        text = text.replace(sign, plain)
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _row(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Pictures next to each other, shorter ones filled up at the top, (h, w, 3)."""
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    row = np.empty((height, width, 3), np.uint8)
    row[:] = BACKGROUND
    left = 0
    for picture in pictures:
        row[height - len(picture) :, left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return row
