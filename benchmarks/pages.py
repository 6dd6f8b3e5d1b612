"""Tables of docs, each between the marks of its name, `<!-- name -->` and `<!-- /name -->`, and
words that several of them have."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gen_accel import demo

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_model.remake import weights_sha256

RESULTS = Path(__file__).parent / "results"
UNSCORED = "what these clips show was not scored"


def table_in(text: str, name: str) -> str:
    """Return what the text of a page has between the marks of a name."""
    return _split(text, name)[1]


def with_table(text: str, name: str, table: str) -> str:
    """Put a table between the marks of a name, in the place of what the text has there."""
    head, _, tail = _split(text, name)
    return f"{head}{table}{tail}"


def write_table(page: Path, name: str, table: str) -> None:
    """Put a table into a page, between the marks of a name."""
    text = with_table(page.read_text(encoding="utf-8"), name, table)
    page.write_text(text, encoding="utf-8")


def write_between_marks(page: Path, rows: Sequence[str]) -> None:
    """Put lines into a page, between its marks of results."""
    write_table(page, "results", "\n".join(rows))


def read_result(name: str) -> dict[str, Any]:
    """Read a result file by its name without ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def weights_of(model: str = demo.NAME) -> str:
    """Hash of all weights of a model, by which clips and results know it.

    Args:
        model: `demo.NAME`, or a pipeline folder.
    """
    return weights_sha256(demo.path() if model == demo.NAME else Path(model))


def begun(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """Read a result file that a study of the demo model goes on with; `empty` without one.

    Raises SystemExit for figures of other weights, which would be mixed with those to come.
    """
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    if report.get("weights", weights_of()) != weights_of():
        raise SystemExit(f"{path} has figures of another demo model: take it away, to begin again")
    return report | {"weights": weights_of()}


def machine(report: Mapping[str, Any]) -> str:
    """Name the machine of a result file, with the processor's model where the file has it."""
    known = report.get("processor") or {}
    model = f" (family {known['family']}, model {known['model']})" if known.get("model") else ""
    threads = report["threads"]
    return f"{report['device']}{model}, {threads} thread{'s' * (threads > 1)}"


def right(rows: Sequence[Mapping[str, Any]]) -> str:
    """Count the clips that show what was asked for."""
    return f"{sum(row['right'] for row in rows)} of {len(rows)}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Write the mean of values, in brackets the worst and the best."""
    mean, worst, best = (
        f"{x:.{digits}f}" for x in (statistics.fmean(values), min(values), max(values))
    )
    return f"{mean} ({worst} to {best})"


def _split(text: str, name: str) -> tuple[str, str, str]:
    """Split a page before and behind a table; the marks stay with the rest."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    head, rest = text.split(begin)
    table, tail = rest.split(end)
    return f"{head}{begin}", table, f"{end}{tail}"
