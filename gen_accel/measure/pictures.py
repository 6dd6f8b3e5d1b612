"""Pictures for people: videos next to each other, and what a method keeps.

Sheets put videos, (F, H, W, 3) uint8, beside each other with words above and below. Masks show the
blocks of a method, the tokens that one token sees, and rules as a table.
"""

import math
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.records import spans
from gen_accel.attention_processors.methods.mixed import Mixed, head_method
from gen_accel.io import replacing
from gen_accel.measure.cost.figures import wrapped
from gen_accel.memory import check_room
from gen_accel.method import Method
from gen_accel.parsing import brief
from gen_accel.paths import check_output, expanded
from gen_accel.plan import Plan
from gen_accel.registry import needed_for
from gen_accel.video import VideoShape

Rgb = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Token = tuple[int, int, int]  # frame, row and column
Rows = tuple[tuple[str, tuple[str, ...]], ...]  # of one layer: heads, and a cell for each step

PLAIN_SIGNS = {"\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-", "\N{EM DASH}": "-"}
# Files of fonts with more than ASCII, of Linux, macOS and Windows, as Pillow finds them.
FONTS = (
    *("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "wqy-zenhei.ttc"),
    *("Arial Unicode.ttf", "PingFang.ttc", "arial.ttf", "msyh.ttc", "malgun.ttf"),
)
NO_CHARACTER = "\U0010fffe"  # which no font has
SHEET_WIDTH = 2400  # pixels, of the frames in one row of a contact sheet at most
ROW_TEXT, ROW_FONT, ROW_GAP = 320, 12, 6  # pixels, of rows with text on their left
BACKGROUND, INK, FAINT_INK = (44, 46, 52), (240, 240, 242), (174, 176, 184)

KEPT, LEFT_OUT, GAP = (11, 107, 93), (226, 225, 220), (255, 255, 255)
MARK, FAINT = "#eb5e28", "#696970"
ASPECT = 1.25  # of the picture of all frames, width over height
TITLE = 120  # characters in a line of a picture's title
MOST_BLOCKS = 1024  # a side, in a picture; more are averaged
SHADES = " ░▒▓█"
HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}

DENSE = "---"


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
    canvas = np.full((frames, bottom + len(foot), total, 3), BACKGROUND, np.uint8)
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
        first, *rest = text.split("\n")
        faint = (_text(line, ROW_TEXT, ROW_FONT, FAINT_INK)[ROW_FONT // 2 :] for line in rest)
        words = np.concatenate([_text(first, ROW_TEXT, ROW_FONT), *faint])
        row = np.full(
            (max(map(len, (words, *pictures))) + ROW_GAP, total, 3), BACKGROUND, np.uint8
        )
        row[: len(words), :ROW_TEXT] = words
        left = ROW_TEXT
        for one in pictures:
            row[: len(one), left : left + one.shape[1]] = one
            left += one.shape[1] + ROW_GAP
        parts.append(row)
    if foot:
        parts.append(_text(foot, total, ROW_FONT, FAINT_INK))
    return np.concatenate(parts) if parts else np.zeros((1, total, 3), np.uint8)


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


def _text(text: str, width: int, size: int, ink: Rgb = INK) -> np.ndarray:
    """`text` on a bar as wide as asked and as high as its lines need, (h, width, 3)."""
    for sign, plain in PLAIN_SIGNS.items():
        text = text.replace(sign, plain)
    (font, text), margin, line = _written(text, size), size // 2, size * 4 // 3
    lines = _wrap(text, font, width - 2 * margin)
    bar = Image.new("RGB", (width, len(lines) * line + 2 * margin), BACKGROUND)
    draw = ImageDraw.Draw(bar)
    for i, words in enumerate(lines):
        draw.text((margin, margin + i * line), words, fill=ink, font=font)
    return np.asarray(bar)


def _written(text: str, size: int) -> tuple[Font, str]:
    """The font with the fewest gaps, and the text with what it lacks as \\u732b.

    Pillow's own font has little beyond ASCII, which it is taken for; else fonts of the system.
    """
    font = ImageFont.load_default(size=size)
    if text.isascii():
        return font, text

    def look(font: Font, sign: str) -> bytes:
        image = Image.new("1", (2 * size, 2 * size))
        ImageDraw.Draw(image).text((0, 0), sign, fill=1, font=font)
        return image.tobytes()

    def lacking(font: Font, text: str) -> set[str]:
        gap = look(font, NO_CHARACTER)
        return {c for c in text if not c.isascii() and look(font, c) == gap}

    known: list[Font] = []
    for name in FONTS:
        with suppress(OSError):  # not on this system
            known.append(ImageFont.truetype(name, size))
    if known:
        font = min(known, key=lambda one: len(lacking(one, text)))
    else:
        plain = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in plain if not unicodedata.combining(c))
    lost = lacking(font, text)
    signs = (c.encode("ascii", "backslashreplace").decode() if c in lost else c for c in text)
    return font, "".join(signs)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """The fewest lines no wider than `width` pixels; a word breaks only where it must."""
    for columns in range(len(text), 1, -1):
        lines = textwrap.wrap(text, columns)
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return list(text) or [""]


def _row(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Pictures next to each other, shorter ones filled up at the top, (h, w, 3)."""
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    row = np.full((height, width, 3), BACKGROUND, np.uint8)
    left = 0
    for picture in pictures:
        row[height - len(picture) :, left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return row


def mask_picture(
    method: Method, video: VideoShape, path: str | Path, *, token: Token | None = None
) -> Path:
    """Write a PNG: the key blocks of each query block on the left, the tokens that one token sees
    on the right.

    For a method whose pattern depends on q and k, smooth random q and k are used, and a note says
    so.

    Args:
        video: the grid, in tokens.
        token: frame, row and column; the middle of the video without.

    Raises:
        ValueError: a token outside of the video, or `path` without .png.
        OSError: `path` cannot be written.
    """
    path = expanded(path)
    check_output(path, ".png")
    plan = method.planned(video)
    token = token or middle(video)
    seen = seen_by(method, video, token)

    with needed_for("a picture of a pattern", extra="quality"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    title = [*textwrap.wrap(brief(method), TITLE), _size(video, plan), *_notes(method)]
    figure.suptitle("\n".join(title), fontsize=12)

    rows, columns = plan.keep.shape[-2:]
    side = max(-(-rows // MOST_BLOCKS), -(-columns // MOST_BLOCKS))
    share = _pooled(plan.keep[0, 0], -(-rows // side), -(-columns // side)).numpy()[..., None]
    image = share * np.array(KEPT) + (1 - share) * np.array(LEFT_OUT)
    extent = (0, columns, rows, 0)
    left.imshow(image.round().astype(np.uint8), extent=extent, aspect="auto")
    left.set_title(
        f"{rows} x {columns} blocks of {plan.block_q} x {plan.block_k} tokens", fontsize=11
    )
    left.set_xlabel("key block")
    left.set_ylabel("query block")

    mosaic, corners = _mosaic(seen, video)
    right.imshow(mosaic, interpolation="nearest")
    x, y = corners[token[0]]
    right.plot(x + token[2], y + token[1], "s", color=MARK, markersize=4)
    for frame, (x, y) in enumerate(corners):
        ink = MARK if frame == token[0] else FAINT
        right.text(x, y - 0.7, str(frame), fontsize=6, color=ink, va="bottom", ha="left")
    right.set_axis_off()
    right.set_title(
        f"the token at frame {token[0]}, row {token[1]}, column {token[2]} (orange) sees "
        f"{int(seen.sum())} of {video.tokens}",
        fontsize=11,
    )
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def mask_text(method: Method, video: VideoShape, width: int = 80) -> str:
    """Draw the blocks for a terminal: queries down, keys across.

    Half-block characters show every block where these fit; otherwise shades show the share that is
    kept.

    Args:
        width: characters in a line at most.
    """
    plan = method.planned(video)
    keep = plan.keep[0, 0]
    rows, columns = keep.shape
    if columns <= width:
        padded = F.pad(keep, (0, 0, 0, rows % 2))
        lines = [
            "".join(HALVES[top, bottom] for top, bottom in zip(*pair.tolist(), strict=True))
            for pair in padded.view(-1, 2, columns)
        ]
    else:
        # A character is about twice as high as it is wide.
        share = _pooled(keep, max(1, min(rows, width // 2)), width)
        shade = (share * (len(SHADES) - 1)).ceil().long()
        lines = ["".join(SHADES[i] for i in line) for line in shade.tolist()]
    words = [
        str(method),
        _size(video, plan),
        *_notes(method),
        f"{rows} x {columns} blocks of {plan.block_q} x {plan.block_k} tokens, "
        "queries down, keys across:",
    ]
    return "\n".join([*wrapped(words, width), *lines])


def mask_facts(method: Method, video: VideoShape) -> dict[str, object]:
    """Figures of a picture, for a report."""
    plan = method.planned(video)
    return {
        "method": str(method),
        "grid": list(video.grid),
        "text": video.text,
        "tokens": video.tokens,
        "density": plan.density,
        "sparsity": 1 - plan.density,
        "computed_density": plan.computed_density,
        "blocks": list(plan.keep.shape[-2:]),
        "block_q": plan.block_q,
        "block_k": plan.block_k,
        "notes": _notes(method),
    }


def seen_by(method: Method, video: VideoShape, token: Token) -> Tensor:
    """(N,) bool: the tokens that the token at (frame, row, column) sees.

    Computes one row of the pattern, without the N x N mask.
    """
    for name, place, size in zip(("frame", "row", "column"), token, video.grid, strict=True):
        if not 0 <= place < size:
            raise ValueError(f"{name} of the token must be from 0 to {size - 1}, got {place}")
    plan = method.planned(video)
    index = (token[0] * video.height + token[1]) * video.width + token[2]
    slot = plan.places[index]
    row = plan.keep[0, 0, slot // plan.block_q].repeat_interleave(plan.block_k) & plan.real
    if plan.partial is not None:
        # A rule that differs between samples and heads is shown for the first of each.
        row = row & plan.partial.allows(slot, torch.arange(len(row))).view(-1, len(row))[0]
    return row[plan.places]


def middle(video: VideoShape) -> Token:
    return video.frames // 2, video.height // 2, video.width // 2


def _size(video: VideoShape, plan: Plan) -> str:
    return (
        f"{video} = {video.tokens} tokens, density {plan.density:.3f} "
        f"(sparsity {1 - plan.density:.3f})"
    )


def _notes(method: Method) -> list[str]:
    """Notes for the reader of the picture, about methods that depend on more than the grid."""
    notes = []
    if method.is_dynamic:
        notes.append(
            "data decides: this is the pattern of smooth random q and k, not of a model's"
        )
    if method.for_layer(0) != method:
        notes.append("layers differ: this is the first")
    return notes


def _pooled(keep: Tensor, rows: int, columns: int) -> Tensor:
    """(Kq, Kk) bool to (rows, columns) in [0, 1], the share that is kept."""
    blocks = " x ".join(map(str, keep.shape))
    check_room(f"a picture of {blocks} blocks", 4 * keep.numel(), "ask for fewer tokens")
    return F.adaptive_avg_pool2d(keep[None, None].float(), (rows, columns))[0, 0]


def _mosaic(seen: Tensor, video: VideoShape) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(h, w, 3) uint8 of all frames in reading order, and the top left corner (x, y) of each."""
    height, width = video.height, video.width
    columns = max(1, min(video.frames, round(math.sqrt(video.frames * ASPECT * height / width))))
    rows = -(-video.frames // columns)
    gap_y, gap_x = max(2, height // 5), max(1, width // 12)
    size = (rows * (height + gap_y), columns * (width + gap_x), 3)
    image = np.full(size, GAP, np.uint8)
    frames = seen[: video.video_tokens].view(video.grid).numpy()
    corners = []
    for i, frame in enumerate(frames):
        y = i // columns * (height + gap_y) + gap_y
        x = i % columns * (width + gap_x)
        image[y : y + height, x : x + width] = np.where(frame[..., None], KEPT, LEFT_OUT)
        corners.append((x, y))
    return image, corners


def rules_text(
    method: Mixed,
    video: VideoShape,
    *,
    layer: int | None = None,
    heads: int | None = None,
    width: int = 80,
) -> str:
    """Draw the rules: equal layers together, equal neighbouring heads in a row, equal neighbouring
    steps in a column.

    Args:
        video: the grid that densities are of.
        layer: the only one to draw; None: all that a rule names.
        heads: how many a layer has; None: not known.
        width: characters in a line at most.

    Raises:
        ValueError: a negative layer, or a method that does not fit the grid.
    """
    if layer is not None and layer < 0:
        raise ValueError(f"layer must be 0 or more, got {layer}")
    count = heads or max(method.named_heads, default=-1) + 1
    letters: dict[str, str] = {}
    known: dict[Method, str] = {}

    def cell(one: Method) -> str:
        """A letter for the family, and the share of token pairs that are kept."""
        if one.is_dense:
            return DENSE
        if one not in known:
            name = method_name(one).rpartition(":")[2]
            if name not in letters:
                letters[name] = next((x for x in name.upper() if x not in letters.values()), "?")
            known[one] = f"{letters[name]}{min(99, round(100 * one.density(video))):02d}"
        return known[one]

    def rows_of(number: int) -> Rows:
        """Rows of a layer, those of equal neighbours together; heads that no rule names last."""
        methods = method.for_layer(number).methods
        cells = [
            tuple(cell(head_method(one, head)) for one in methods)
            for head in range(count + (heads is None))
        ]
        others = cells.pop() if heads is None else ()
        alike = [[*some] for _, some in groupby(range(count), lambda head: cells[head])]
        found = [(f"head{'s' * (len(some) > 1)} {spans(some)}", cells[some[0]]) for some in alike]
        if len(found) == 1 and heads:
            found = [("all heads", cells[0])]
        if others and (not found or {*others} != {DENSE}):
            found.append(("others" if found else "all heads", others))
        return tuple(found)

    shown: dict[Rows, list[int]] = {}
    for one in [*method.named_layers] if layer is None else [layer]:
        shown.setdefault(rows_of(one), []).append(one)
    blocks = [
        (f"layer{'s' * (len(some) > 1)} {spans(some)}", rows) for rows, some in shown.items()
    ]
    if layer is None:
        rest = rows_of(max(method.named_layers, default=-1) + 1)
        if any({*row} != {DENSE} for _, row in rest):
            blocks.append(("other layers" if blocks else "all layers", rest))
    legend = [f"{DENSE} dense, as are layers and heads that are not listed; all count from 0"]
    if letters:
        kinds = ", ".join(f"{letter} {name}" for name, letter in letters.items())
        legend.insert(0, f"{kinds}; the number: token pairs kept, in %")
    lines = [line for title, rows in blocks for line in _block(title, rows, width)]
    return "\n".join([*lines, *(part for one in legend for part in textwrap.wrap(one, width))])


def _block(title: str, rows: Rows, width: int) -> Iterator[str]:
    """Lines of the layers that have these rows; equal neighbouring steps share a column."""
    names, cells = zip(*rows, strict=True)
    side = max(map(len, ["steps", *names]))
    alike = [
        [*some] for _, some in groupby(range(len(cells[0])), lambda i: [row[i] for row in cells])
    ]
    columns = []
    for some in alike:
        column = [spans(some), *(row[some[0]] for row in cells)]
        columns.append([one.rjust(max(map(len, column))) for one in column])
    yield from textwrap.wrap(title, width, subsequent_indent="  ")
    while columns:
        count, used = 0, 2 + side
        while count < len(columns) and (used + 1 + len(columns[count][0]) <= width or not count):
            used += 1 + len(columns[count][0])
            count += 1
        for i, name in enumerate(["steps", *names]):
            yield f"  {name:<{side}} {' '.join(column[i] for column in columns[:count])}"
        columns = columns[count:]
