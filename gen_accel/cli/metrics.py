"""`gen-accel metrics`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.printing import print_rows


@app.command(short_help="What a video does over time, or its distance to another.")
def metrics(
    video: Annotated[Path, typer.Argument(help="A video file, or a folder of PNG frames.")],
    reference: Annotated[
        Path | None, typer.Argument(help="To compare with: the same scene, made another way.")
    ] = None,
    lag: Annotated[
        int | None,
        typer.Option(help="Frames: also the similarity that far apart. Without a reference."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """Loops, drift, motion and flicker of a video; or PSNR, SSIM and LPIPS against a reference.

    \b
    gen-accel metrics long.mp4
    gen-accel metrics long.mp4 --lag 81 --json long.json
        how alike frames are that lie 81 apart: 1 is a repetition, 0 as alike as any two
    gen-accel metrics sparse.mp4 dense.mp4

    Frames are read once, a few at a time, so that any length fits. LPIPS needs torchvision and
    its weights on this machine; nothing is downloaded.
    """
    early.check_files("video", [video, reference])
    early.check_output(json)
    if reference is not None and lag is not None:
        raise ValueError(f"--lag is for a video without a reference, got {lag}")
    early.announce("torch")
    from gen_accel.measure import write_json
    from gen_accel.measure.motion import measure_file
    from gen_accel.measure.quality import compare_files

    if reference is None:
        found: Any = measure_file(video, lag=lag)
        _print_motion(found)
    else:
        found = compare_files(video, reference)
        _print_fidelity(found)
    if json is not None:
        write_json(json, found.to_dict())
        typer.echo(json)


def _print_motion(found: Any) -> None:
    red, green, blue = found.color_drift
    at = "" if found.loop_lag is None else f", after {found.loop_lag} frames"
    rows = {
        "frames": f"{found.frames} at {found.fps:g} a second",
        "loop score": f"{found.loop_score:.3f}{at}",
        "colour drift": f"{red:+.4f} red, {green:+.4f} green, {blue:+.4f} blue in 100 frames",
        "contrast drift": f"{found.contrast_drift:+.4f} in 100 frames",
        "dynamic degree": f"{found.dynamic_degree:.3f}, the fastest move {found.flow:.2f} pixels",
        "flicker": f"{found.flicker:.4f}, 1 is still",
    }
    if found.similarity is not None:
        rows["similarity"] = f"{found.similarity:.3f} at the lag asked for"
    print_rows(rows)


def _print_fidelity(found: Any) -> None:
    rows = {
        "frames": f"{found.frames}",
        "PSNR": f"{found.psnr_db:.2f} dB",
        "SSIM": f"{found.ssim:.4f}",
    }
    if found.lpips is not None:
        rows["LPIPS"] = f"{found.lpips:.4f}, 0 is identical"
    print_rows(rows)
    if found.lpips_missing is not None:
        typer.echo(found.lpips_missing)
