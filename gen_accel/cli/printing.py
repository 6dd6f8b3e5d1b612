"""Output of the verbs: lines, tables, and figures as JSON."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from shutil import get_terminal_size
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import typer
from pydantic import field_validator

from gen_accel.config import Outputs, option
from gen_accel.paths import check_output, expanded
from gen_accel.registry import NOT_ASKED

if TYPE_CHECKING:
    from rich.table import Table

    from gen_accel.pipelines.tuning import Preset

STANDARD_OUTPUT = Path("-")
CURVE = ("attention", "density", "predicted error", "mean", "worst", "")


class FiguresConfig(Outputs):
    """Figures of a verb, as JSON."""

    json_file: Path | None = option(
        None,
        "Output",
        "File for the figures, as JSON; - is standard output, alone.",
        name="json",
        metavar="FILE",
        kept=False,
        writes=True,
    )

    @field_validator("json_file")
    @classmethod
    def _can_be_written(cls, file: Path | None) -> Path | None:
        if file != STANDARD_OUTPUT:
            check_output(file)
        return file

    def outputs(self) -> dict[str, list[Path]]:
        found = super().outputs()
        return {name: where for name, where in found.items() if where != [STANDARD_OUTPUT]}

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

    @contextmanager
    def objects(self) -> Iterator[list[object]]:
        """Take objects, which are written at the end, a line of JSON each. For "-", standard
        output is kept free of all else meanwhile."""
        from gen_accel.io import plain, replacing

        found: list[object] = []
        with redirect_stdout(sys.stderr) if self.is_quiet else nullcontext():
            yield found
        lines = [json.dumps(plain(one), ensure_ascii=False, allow_nan=False) for one in found]
        text = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        if self.is_quiet:
            typer.echo(text, nl=False)
        elif self.json_file is not None:
            with replacing(expanded(self.json_file)) as partial:
                partial.write_bytes(text)


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


def print_rows(rows: Mapping[str, str]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    print_table(table, rows.items())
    typer.echo()


def print_table(table: "Table", rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console

    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def print_comparison(report: Mapping[str, Any]) -> None:
    density = report["density"]
    dense, sparse = f"{report['dense_seconds']:.1f} s", f"{report['sparse_seconds']:.1f} s"
    if busy := report.get("busy"):
        times = {"sparse": sparse, "speed-up": f"not shown: {busy}"}
    else:
        whole = f"{report['total_speedup']:.2f}x as fast"
        times = {"sparse": f"{sparse}, {report['speedup']:.2f}x as fast", "with decoding": whole}
        if "alike" in report:
            gain = f"{report['speedup_alike']:.2f}x beside dense attention with the same"
            times["like for like"] = f"{gain} {report['alike']}"
    rows = {
        "dense": f"{dense} for {report['steps']} steps, by {report['beside']}",
        **times,
        "tokens": f"{report['tokens']}",
        "density": "all dense" if density is None else f"{density:.3f} where sparse",
        "kernel": report["kernel"],
        "PSNR, SSIM": f"{report['psnr_db']:.1f} dB, {report['ssim']:.3f} against dense",
        **_beside_psnr(report),
    }
    if "cache" in report:
        skipped = f"{len(report['skipped_steps'])} of {report['steps']} steps skipped"
        rows["cache"] = f"{report['cache']}: {skipped}, in the sparse clip alone"
    if report["compile_seconds"]:
        rows["compiling"] = f"{report['compile_seconds']:.1f} s, not counted"
    if "detector" in report:
        rows["dense shows"] = report["detector"]["dense"]["shows"]
        rows["sparse shows"] = report["detector"]["sparse"]["shows"]
    if "without_lora" in report:
        rows["without its LoRA"] = report["without_lora"]["shows"]
    print_rows(rows)


def fidelity_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """Rows of a comparison with a reference, by the fields of `Fidelity`; what is missing has
    none."""
    return {
        "PSNR": f"{found['psnr_db']:.2f} dB",
        "SSIM": f"{found['ssim']:.4f}",
        **_beside_psnr(found),
    }


def _beside_psnr(found: Mapping[str, Any]) -> dict[str, str]:
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


def what_is_missing(found: Mapping[str, Any]) -> list[str]:
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
    for name, title in (("tuning", "tuning prompts"), ("held_out", "held-out prompts")):
        scores = [run["score"] for run in preset.measured.get(name, [])]
        if scores:
            lines.append(
                f"measured on {len(scores)} {title}: mean {fmean(scores):.3g}, "
                f"worst {min(scores):.3g}"
            )
    return lines


def curve_rows(preset: Mapping[str, Any], most: int | None = None) -> list[list[str]]:
    """Rows of `CURVE` by rising cost: what was measured, the preset itself, and the others.

    Args:
        preset: as its file holds it.
        most: about the number of rows, for which some of the others are left out.
    """
    names = ("cost", "density", "predicted")
    rows = {run["predicted"]: run for run in preset["measured"].get("runs", [])}
    rows = {preset["predicted"]: {name: preset[name] for name in names}} | rows
    points = [one for one in preset["curve"] if one["predicted_error"] not in rows]
    count = min(len(points), max(most - len(rows), 2)) if most else len(points)
    for i in range(count):
        point = points[i * (len(points) - 1) // max(count - 1, 1)]
        rows[point["predicted_error"]] = point
    return [
        [
            f"{one['cost']:.3f}",
            f"{one['density']:.3f}",
            f"{error:.3g}",
            *(f"{one[name]:.3g}" if name in one else "" for name in ("mean", "worst")),
            "taken" if one["cost"] == preset["cost"] else "",
        ]
        for error, one in sorted(rows.items(), reverse=True)
    ]
