"""Output of the verbs, and the silencing of the libraries below them."""

from pathlib import Path
from typing import Any

from gen_accel.registry import NOT_ASKED


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


def quiet() -> None:
    """Turn off the progress bars of loading a model; bars of downloads stay."""
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    if diffusers.utils.is_transformers_available():
        import transformers.utils.logging

        transformers.utils.logging.disable_progress_bar()
