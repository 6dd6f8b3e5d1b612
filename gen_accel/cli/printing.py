"""Output of the verbs: lines, tables, and figures as JSON."""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from shutil import get_terminal_size
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TextIO

import typer

from gen_accel.config import Config, option
from gen_accel.paths import check_output, expanded
from gen_accel.registry import NOT_ASKED

if TYPE_CHECKING:
    from gen_accel.pipelines.tuning import Preset, Tuned

STANDARD_OUTPUT = Path("-")
MOST_ROWS = 12  # of a curve
TITLES = {"tuning": "tuning prompts", "held_out": "held-out prompts"}


class FiguresConfig(Config):
    """Figures of a verb, as JSON."""

    json_file: Path | None = option(
        None,
        "Output",
        "File for the figures, as JSON; - is standard output, alone.",
        name="json",
        metavar="FILE",
        kept=False,
    )

    def check_json(self) -> None:
        """Refuse a file of --json that cannot be written."""
        if self.json_file != STANDARD_OUTPUT:
            check_output(self.json_file)

    @property
    def is_quiet(self) -> bool:
        """Whether standard output is for the figures alone."""
        return self.json_file == STANDARD_OUTPUT

    def show(self, lines: Iterable[str], data: object) -> None:
        """Print lines, and write the figures to the file of --json; for "-", print those alone."""
        from gen_accel.io import plain, write_json

        if self.is_quiet:
            text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
            typer.echo(text.encode(errors="backslashreplace"))  # of names that are not UTF-8
            return
        for line in lines:
            typer.echo(line)
        if self.json_file is not None:
            write_json(self.json_file, data)
            typer.echo(self.json_file)


class LinesFile:
    """Objects as JSON, a line each, in a file of --json.

    Args:
        path: "-" is standard output, which is kept free of all else meanwhile; None is nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stdout: TextIO = sys.stdout
        self._open = ExitStack()
        if path != STANDARD_OUTPUT:
            check_output(path)

    def __enter__(self) -> "LinesFile":
        if self.path == STANDARD_OUTPUT:
            self._open.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def write(self, objects: Iterable[Mapping[str, Any]]) -> None:
        if self.path is None:
            return
        from gen_accel.io import plain, replacing

        lines = [json.dumps(plain(one), ensure_ascii=False, allow_nan=False) for one in objects]
        text = "".join(f"{line}\n" for line in lines)
        if self.path == STANDARD_OUTPUT:
            self._stdout.write(text)
            self._stdout.flush()
            return
        with replacing(expanded(self.path)) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def terminal_width() -> int:
    """Columns of the terminal; 80 where the output is no terminal, unless COLUMNS says more."""
    return max(40, get_terminal_size().columns)


def hanging(head: str, text: str) -> list[str]:
    """Wrap text after a head, further lines below its beginning."""
    below = " " * min(len(head), 30)
    lines = wrap(
        head + text,
        terminal_width(),
        subsequent_indent=below,
        break_on_hyphens=False,
        break_long_words=False,  # of a path, which would be no path any more
    )
    return lines or [head.rstrip()]


def print_files(files: dict[str, Path]) -> None:
    print_rows({name: str(path) for name, path in files.items()})


def print_rows(rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print()


def print_comparison(report: dict[str, Any]) -> None:
    density = report["density"]
    dense, sparse = f"{report['dense_seconds']:.1f} s", f"{report['sparse_seconds']:.1f} s"
    if busy := report.get("busy"):
        times = {"sparse": sparse, "speed-up": f"not told: {busy}"}
    else:
        whole = f"{report['total_speedup']:.2f}x as fast"
        times = {"sparse": f"{sparse}, {report['speedup']:.2f}x as fast", "with decoding": whole}
    rows = {
        "dense": f"{dense} for {report['steps']} steps",
        **times,
        "tokens": f"{report['tokens']}",
        "density": "all dense" if density is None else f"{density:.3f} where sparse",
        "kernel": report["kernel"],
        "PSNR, SSIM": f"{report['psnr_db']:.1f} dB, {report['ssim']:.3f} against dense",
        **_beside_psnr(report),
    }
    if report["compile_seconds"]:
        rows["compiling"] = f"{report['compile_seconds']:.1f} s, not counted"
    if "detector" in report:
        rows["dense shows"] = report["detector"]["dense"]["shows"]
        rows["sparse shows"] = report["detector"]["sparse"]["shows"]
    if "without_lora" in report:
        rows["without its LoRA"] = report["without_lora"]["shows"]
    print_rows(rows)


def fidelity_rows(found: dict[str, Any]) -> dict[str, str]:
    """Rows of a comparison with a reference, by the fields of `Fidelity`; what is missing has
    none."""
    return {
        "PSNR": f"{found['psnr_db']:.2f} dB",
        "SSIM": f"{found['ssim']:.4f}",
        **_beside_psnr(found),
    }


def _beside_psnr(found: dict[str, Any]) -> dict[str, str]:
    rows = {}
    if found.get("lpips") is not None:
        rows["LPIPS"] = f"{found['lpips']:.4f}, 0 is identical"
    factor = found.get("enlarged", 1)
    seen = f", frames seen {factor}x as large" if factor > 1 else ""
    if found.get("vmaf") is not None:
        rows["VMAF"] = f"{found['vmaf']:.1f} of 100, lowest frame {found['vmaf_lowest']:.1f}{seen}"
    if found.get("cvvdp_jod") is not None:
        rows["ColorVideoVDP"] = f"{found['cvvdp_jod']:.2f} JOD of 10{seen}"
    return rows


def what_is_missing(found: dict[str, Any]) -> list[str]:
    """Reasons why figures that were asked for are missing."""
    reasons = [value for key, value in found.items() if key.endswith("_missing")]
    return [reason for reason in reasons if reason not in (None, NOT_ASKED)]


def preset_lines(preset: "Preset") -> list[str]:
    """Say what a preset was made for, what it costs, and what was measured of it."""
    from gen_accel.pipelines.tuning.preset import least_scores

    grid = " x ".join(map(str, preset.made_for.grid))
    bound = preset.bound
    asked = [f"{name} {value:g}" for name, value in least_scores(bound).items()]
    lines = [
        f"{preset.method.steps} steps on {grid} tokens of {preset.made_for.transformer['class']}",
        f"density {preset.density:.3f}, attention {preset.cost:.2f} of dense, predicted error "
        f"{preset.predicted:.3g}",
        f"asked for {bound.get('objective', 'psnr')}, {' and '.join(asked)} at least: "
        + ("verified" if preset.verified else "not verified, predicted from the profile"),
    ]
    if preset.made_for.loras:
        lines.append(f"with LoRAs {', '.join(preset.made_for.loras)}")
    for name, title in TITLES.items():
        scores = [run["score"] for run in preset.measured.get(name, [])]
        if scores:
            lines.append(
                f"measured on {len(scores)} {title}: mean {fmean(scores):.3g}, "
                f"worst {min(scores):.3g}"
            )
    return lines


def print_curve(found: "Tuned") -> None:
    """Print the choices of a tuning, from sparse to dense, with its own and what was measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("attention", "density", "predicted error", "mean", "worst", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for one in _shown(found):
        own = one["cost"] == found.preset.cost
        scores = [f"{one[name]:.3g}" if name in one else "" for name in ("mean", "worst")]
        table.add_row(
            f"{one['cost']:.3f}",
            f"{one['density']:.3f}",
            f"{one['predicted']:.3g}",
            *scores,
            "taken" if own else "",
        )
    Console(highlight=False, markup=False).print(table)


def _shown(found: "Tuned") -> list[dict[str, float]]:
    """Rows of the curve by rising cost: what was measured, the choice, and some of the others."""
    preset = found.preset
    own = {"cost": preset.cost, "density": preset.density, "predicted": preset.predicted}
    rows = {run["predicted"]: run for run in preset.measured.get("runs", [])}
    rows = {own["predicted"]: own} | rows
    others = [point for point in found.points if point.predicted not in rows]
    room = max(MOST_ROWS - len(rows), 2)
    count = min(room, len(others))
    for i in range(count):
        point = others[i * (len(others) - 1) // max(count - 1, 1)]
        row = {"cost": point.cost, "density": point.density, "predicted": point.predicted}
        rows[point.predicted] = row
    return sorted(rows.values(), key=lambda row: -row["predicted"])
