"""Pictures of a method: its blocks, the tokens that one token sees, and rules as a table."""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.summary import spans
from gen_accel.attention_processors.methods.mixed import Mixed, head_method
from gen_accel.io import replacing
from gen_accel.memory import check_room
from gen_accel.method import Method
from gen_accel.paths import expanded
from gen_accel.registry import needed_for
from gen_accel.video import VideoShape

KEPT, LEFT_OUT, GAP = (11, 107, 93), (226, 225, 220), (255, 255, 255)
MARK, FAINT = "#eb5e28", "#696970"
ASPECT = 1.25  # of the picture of all frames, width over height
TITLE = 120  # characters in a line of a picture's title
MOST_BLOCKS = 1024  # a side, in a picture; more are averaged
SHADES = " ░▒▓█"
HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}

DENSE = "---"

Token = tuple[int, int, int]
Rows = tuple[tuple[str, tuple[str, ...]], ...]  # of one layer: heads, and a cell for each step


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
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png")
    plan = method.planned(video)
    token = token or middle(video)
    seen = seen_by(method, video, token)

    with needed_for("a picture of a pattern", extra="quality"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    density = f"density {plan.density:.3f} (sparsity {1 - plan.density:.3f})"
    size = f"{video} = {video.tokens} tokens, {density}"
    title = [*textwrap.wrap(str(method), TITLE), size, *_notes(method)]
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
        f"{video} = {video.tokens} tokens, density {plan.density:.3f} "
        f"(sparsity {1 - plan.density:.3f})",
        *_notes(method),
        f"{rows} x {columns} blocks of {plan.block_q} x {plan.block_k} tokens, "
        "queries down, keys across:",
    ]
    told = [
        line
        for text in words
        for line in textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    ]
    return "\n".join([*told, *lines])


def mask_facts(method: Method, video: VideoShape) -> dict[str, Any]:
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


def _notes(method: Method) -> list[str]:
    """Notes for the reader of the picture, about methods that depend on more than the grid."""
    notes = []
    if method.is_dynamic:
        notes.append(
            "data decides: this is the pattern of smooth random q and k, not of a model's"
        )
    if method.layers_differ:
        notes.append("layers differ: this is the first")
    return notes


def _pooled(keep: Tensor, rows: int, columns: int) -> Tensor:
    """(Kq, Kk) bool to (rows, columns) in [0, 1], the share that is kept."""
    blocks = " x ".join(map(str, keep.shape))
    check_room(f"a picture of {blocks} blocks", 4 * keep.numel(), "ask for fewer tokens")
    return F.adaptive_avg_pool2d(keep[None, None].float(), (rows, columns))[0, 0]


def _mosaic(seen: Tensor, video: VideoShape) -> tuple[np.ndarray, list]:
    """(h, w, 3) uint8 of all frames in reading order, and the top left corner (x, y) of each."""
    height, width = video.height, video.width
    columns = max(1, min(video.frames, round(math.sqrt(video.frames * ASPECT * height / width))))
    rows = -(-video.frames // columns)
    gap_y, gap_x = max(2, height // 5), max(1, width // 12)
    image = np.empty((rows * (height + gap_y), columns * (width + gap_x), 3), np.uint8)
    image[:] = GAP
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
    cells = _Table(method, video, heads)
    layers = [layer] if layer is not None else [*method.named_layers]
    alike: dict[Rows, list[int]] = {}
    for one in layers:
        alike.setdefault(cells.rows(one), []).append(one)
    blocks = [
        (f"layer{'s' if len(some) > 1 else ''} {spans(some)}", rows)
        for rows, some in alike.items()
    ]
    if layer is None:
        others = cells.rows(max(method.named_layers, default=-1) + 1)
        if any(cell != DENSE for _, row in others for cell in row):
            blocks.append(("other layers" if layers else "all layers", others))
    lines = [line for title, rows in blocks for line in _block(title, rows, width)]
    legend = [part for line in cells.legend() for part in textwrap.wrap(line, width)]
    return "\n".join([*lines, *legend])


class _Table:
    """Cells of a table: a letter for the family, and the share of token pairs that are kept."""

    def __init__(self, method: Mixed, video: VideoShape, heads: int | None) -> None:
        self._method, self._video = method, video
        self._heads = heads or max(method.named_heads, default=-1) + 1
        self._more = heads is None  # heads that no rule names
        self._letters: dict[str, str] = {}
        self._known: dict[Any, str] = {}

    def rows(self, layer: int) -> Rows:
        """Rows of a layer, those of equal neighbours together; heads that no rule names last."""
        methods = self._method.for_layer(layer).methods
        found: list[tuple[list[int], tuple[str, ...]]] = []
        for head in range(self._heads + self._more):
            row = tuple(self._cell(head_method(one, head)) for one in methods)
            if found and found[-1][1] == row and head < self._heads:
                found[-1][0].append(head)
            else:
                found.append(([head], row))
        others = found.pop() if self._more else None
        rows = [(f"head{'s' if len(some) > 1 else ''} {spans(some)}", row) for some, row in found]
        if len(rows) == 1 and not self._more:
            rows = [("all heads", rows[0][1])]
        if others and (not rows or any(cell != DENSE for cell in others[1])):
            rows.append(("others" if rows else "all heads", others[1]))
        return tuple(rows)

    def _cell(self, method: Any) -> str:
        if method not in self._known:
            self._known[method] = self._made(method)
        return self._known[method]

    def _made(self, method: Any) -> str:
        if method.is_dense:
            return DENSE
        name = method_name(method).rpartition(":")[2]
        if name not in self._letters:
            free = (one for one in name.upper() if one not in self._letters.values())
            self._letters[name] = next(free, "?")
        share = min(99, round(100 * method.density(self._video)))
        return f"{self._letters[name]}{share:02d}"

    def legend(self) -> Iterator[str]:
        """Say what the cells mean."""
        kinds = [f"{letter} {name}" for name, letter in self._letters.items()]
        if kinds:
            yield f"{', '.join(kinds)}; the number: token pairs kept, in %"
        yield f"{DENSE} dense, as are layers and heads that are not listed; all count from 0"


def _block(title: str, rows: Rows, width: int) -> Iterator[str]:
    """Lines of the layers that have these rows."""
    steps = len(rows[0][1])
    first = [i for i in range(steps) if i == 0 or any(row[i] != row[i - 1] for _, row in rows)]
    ends = [*first[1:], steps]
    heads = [name for name, _ in rows]
    side = max(map(len, ["steps", *heads]))
    columns = []
    for begin, end in zip(first, ends, strict=True):
        cells = [spans(range(begin, end)), *(row[begin] for _, row in rows)]
        wide = max(map(len, cells))
        columns.append([cell.rjust(wide) for cell in cells])
    yield from textwrap.wrap(title, width, subsequent_indent="  ")
    begin = 0
    while begin < len(columns):
        end, used = begin, 2 + side
        while end < len(columns) and (used + 1 + len(columns[end][0]) <= width or end == begin):
            used += 1 + len(columns[end][0])
            end += 1
        for i, name in enumerate(["steps", *heads]):
            yield f"  {name:<{side}} {' '.join(column[i] for column in columns[begin:end])}"
        begin = end
