"""Rules of mixed attention as a table: what each head of a layer runs at each step."""

import textwrap
from collections.abc import Iterator
from typing import Any

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.summary import spans
from gen_accel.attention_processors.methods.mixed import Mixed, head_method
from gen_accel.method import density_of, parts_of
from gen_accel.video import VideoShape

DENSE = "---"

Rows = tuple[tuple[str, tuple[str, ...]], ...]  # of one layer: heads, and a cell for each step


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
    cells = _Cells(method, video, heads)
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


class _Cells:
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
        if parts_of(method).is_dense:
            return DENSE
        name = method_name(method).rpartition(":")[2]
        if name not in self._letters:
            free = (one for one in name.upper() if one not in self._letters.values())
            self._letters[name] = next(free, "?")
        share = min(99, round(100 * density_of(method, self._video)))
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
