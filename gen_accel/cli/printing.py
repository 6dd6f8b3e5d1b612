"""Output of the verbs, and the silencing of the libraries below them."""

from pathlib import Path
from typing import Any


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
    rows = {
        "dense": f"{report['dense_seconds']:.1f} s for {report['steps']} steps",
        "sparse": f"{report['sparse_seconds']:.1f} s, {report['speedup']:.2f}x as fast",
        "with decoding": f"{report['total_speedup']:.2f}x as fast",
        "tokens": f"{report['tokens']}",
        "density": "all dense" if density is None else f"{density:.3f} where sparse",
        "kernel": report["kernel"],
        "PSNR, SSIM": f"{report['psnr_db']:.1f} dB, {report['ssim']:.3f} against dense",
    }
    if report["compile_seconds"]:
        rows["compiling"] = f"{report['compile_seconds']:.1f} s, not counted"
    if "detector" in report:
        rows["dense shows"] = report["detector"]["dense"]["shows"]
        rows["sparse shows"] = report["detector"]["sparse"]["shows"]
    if "longer" in report:
        made = report["longer"]
        rows[f"{made['frames']} frames"] = f"{made['dense']['shows']} (dense, no LoRA)"
        for name, clip in made["trained"].items():
            title = ", ".join((name, *clip["techniques"]))
            rows[title] = f"{clip['shows']}, {clip['times_as_fast']:.2f}x as fast"
    print_rows(rows)


def quiet() -> None:
    """Turn off the progress bars of loading a model; bars of downloads stay."""
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    if diffusers.utils.is_transformers_available():
        import transformers.utils.logging

        transformers.utils.logging.disable_progress_bar()
