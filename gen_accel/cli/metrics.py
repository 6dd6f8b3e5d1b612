"""`gen-accel metrics`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.json_out import STANDARD_OUTPUT, JsonFile, check_json, show_result
from gen_accel.cli.options import Metrics, check_metrics
from gen_accel.cli.printing import fidelity_rows, print_rows, what_is_missing
from gen_accel.paths import expanded

FILMS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@app.command(short_help="What videos do over time, or their distance to another.")
def metrics(
    videos: Annotated[
        list[Path],
        typer.Argument(
            metavar="VIDEO...", help="Video files, folders of PNG frames, or folders of videos."
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Compare each with it: the same scene, made another way. Of two videos alone, "
            "the second is the reference.",
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Two or more videos, each by itself.")
    ] = False,
    metrics: Metrics = None,
    lag: Annotated[
        int | None,
        typer.Option(help="Frames: also the similarity that far apart. Without a reference."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second of folders of frames, which state none.")
    ] = None,
    by_frame: Annotated[
        bool,
        typer.Option(
            "--by-frame",
            help="Into --json also each frame: PSNR and SSIM, or colours, contrast and, by lag, "
            "the similarity.",
        ),
    ] = False,
    json: JsonFile = None,
) -> None:
    """Loops, drift, motion and flicker of videos; or how close they are to a reference.

    \b
    gen-accel metrics long.mp4
    gen-accel metrics long.mp4 --lag 81 --json long.json
        how alike frames are that lie 81 apart: 1 is a repetition, 0 as alike as any two
    gen-accel metrics sparse.mp4 dense.mp4
        PSNR, SSIM, VMAF, and LPIPS where its weights are
    gen-accel metrics sparse.mp4 dense.mp4 --metrics vmaf,cvvdp --json -
    gen-accel metrics a.mp4 b.mp4 c.mp4 --reference dense.mp4
    gen-accel metrics long.mp4 --by-frame --json long.json
        for charts: how colours drift, and how alike frames are at each lag

    Frames are read a few at a time, so that any length fits. VMAF needs an ffmpeg with libvmaf,
    which imageio-ffmpeg brings. It was trained on films of 1080 lines: on small clips it ranks,
    and its scale means little. cvvdp, which is ColorVideoVDP, takes a tenth of a second for each
    frame of 288 x 288 pixels on a core of a CPU. Frames of up to 144 pixels are enlarged for both,
    pixel by pixel. Nothing is downloaded.
    """
    early.check_files("video", [*videos, reference])
    check_json(json)
    films, to = _films(videos, reference, each=each)
    _check(films, to, metrics, lag, fps)
    if by_frame and json is None:
        raise ValueError("--by-frame writes each frame's figures to --json FILE: give one")
    asked = check_metrics(metrics)
    early.announce("torch")
    if to is not None:
        from gen_accel.measure.quality import check_pair, compare_files, figures_by_frame

        for film in films:
            check_pair(film, to)
        _tell_all(
            {str(f): compare_files(f, to, metrics=asked, fps=fps) for f in films},
            json,
            {str(f): figures_by_frame(f, to) for f in films} if by_frame else {},
        )
    else:
        from gen_accel.measure.motion import curves_of_file, measure_file

        _tell_all(
            {str(film): measure_file(film, lag=lag, fps=fps) for film in films},
            json,
            {str(film): curves_of_file(film).to_dict() for film in films} if by_frame else {},
        )


def _films(
    videos: Sequence[Path], reference: Path | None, *, each: bool
) -> tuple[list[Path], Path | None]:
    """Return the videos, with those of folders in the place of the folders, and the reference."""
    films: list[Path] = []
    for path in videos:
        films += _within(path)
    if reference is not None or each:
        return films, reference
    if len(films) == len(videos) == 2:
        return films[:1], films[1]
    if len(films) == len(videos) > 2:
        raise ValueError(
            f"got {len(videos)} videos: give --reference FILE to compare them with it, or --each "
            "for each by itself"
        )
    return films, None


def _within(path: Path) -> list[Path]:
    """The videos of a folder; `path` itself where it is a video, or a folder of PNG frames."""
    folder = expanded(path)
    if not folder.is_dir() or any(folder.glob("[0-9][0-9][0-9][0-9]*.png")):
        return [path]
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in FILMS)
    return found or [path]  # which the reader refuses, with the names that it looks for


def _check(
    films: Sequence[Path],
    reference: Path | None,
    metrics: str | None,
    lag: int | None,
    fps: float | None,
) -> None:
    """Refuse options that do not go together."""
    if lag is not None and reference is not None:
        raise ValueError(f"--lag is for a video without a reference, got {lag}")
    if metrics is not None and reference is None:
        raise ValueError(f"--metrics {metrics} compares with a reference: give two videos")
    if fps is not None and not 0.01 <= fps <= 1000:
        raise ValueError(f"--fps must be 0.01 to 1000 frames a second, got {fps:g}")
    if metrics is not None and "vmaf" in metrics.split(",") and reference is not None:
        pictures = [path for path in (*films, reference) if path.suffix.lower() in PICTURES]
        if pictures:
            raise ValueError(f"vmaf is for videos, and {pictures[0]} is a picture")


def _tell_all(found: Mapping[str, Any], json: Path | None, frames: Mapping[str, Any]) -> None:
    """Print or write results by video; of one video alone without its name.

    Args:
        frames: figures by frame, of the same videos or of none.
    """
    data = {
        path: one.to_dict() | ({"by_frame": frames[path]} if frames else {})
        for path, one in found.items()
    }
    if len(found) == 1:
        [(path, one)] = found.items()
        _tell(data[path], json, lambda: _print_one(one))
        return
    _tell({"videos": data}, json, lambda: _print_table(found))


def _tell(data: Any, json: Path | None, show: Any) -> None:
    if json != STANDARD_OUTPUT:
        show()
    show_result((), data, json)


def _print_one(found: Any) -> None:
    if _is_compared(found):
        print_rows({"frames": f"{found.frames}", **fidelity_rows(found.to_dict())})
        for reason in what_is_missing(found.to_dict()):
            typer.echo(reason)
    else:
        _print_motion(found)


def _is_compared(found: Any) -> bool:
    from gen_accel.measure.quality import Fidelity

    return isinstance(found, Fidelity)


def motion_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """Rows of what a video does over time, by the fields of `Motion`."""
    red, green, blue = found["color_drift"]
    at = "" if found["loop_lag"] is None else f", after {found['loop_lag']} frames"
    rows = {
        "frames": f"{found['frames']} at {found['fps']:g} a second",
        "loop score": f"{found['loop_score']:.3f}{at}",
        "colour drift": f"{red:+.4f} red, {green:+.4f} green, {blue:+.4f} blue in 100 frames",
        "contrast drift": f"{found['contrast_drift']:+.4f} in 100 frames",
    }
    if found["flow_missing"] is None:
        rows["dynamic degree"] = (
            f"{found['dynamic_degree']:.3f}, the fastest move {found['flow']:.2f} pixels"
        )
    rows["flicker"] = f"{found['flicker']:.4f}, 1 is still"
    if found["similarity"] is not None:
        rows["similarity"] = f"{found['similarity']:.3f} at the lag asked for"
    return rows


def _print_motion(found: Any) -> None:
    print_rows(motion_rows(found.to_dict()))
    if found.flow_missing is not None:
        typer.echo(found.flow_missing)


def _print_table(found: Mapping[str, Any]) -> None:
    """A line for each video."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first = next(iter(found.values()))
    columns = COMPARED if _is_compared(first) else ALONE
    known = {
        title: (name, digits)
        for title, (name, digits) in columns.items()
        if any(getattr(one, name) is not None for one in found.values())
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("video", overflow="fold")
    for title in known:
        table.add_column(title, justify="right")
    for path, one in zip(_short(found), found.values(), strict=True):
        values = [(getattr(one, name), digits) for name, digits in known.values()]
        table.add_row(path, *(_number(value, digits) for value, digits in values))
    Console(highlight=False, markup=False).print(table)
    said = {reason for one in found.values() for reason in what_is_missing(one.to_dict())}
    for reason in sorted(said):
        typer.echo(reason)


def _short(paths: Iterable[str]) -> list[str]:
    """Paths without the folders that they share."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return [str(Path(*one[shared:])) for one in parts]


COMPARED = {
    "frames": ("frames", 0),
    "PSNR dB": ("psnr_db", 2),
    "SSIM": ("ssim", 4),
    "LPIPS": ("lpips", 4),
    "VMAF": ("vmaf", 1),
    "lowest": ("vmaf_lowest", 1),
    "JOD": ("cvvdp_jod", 2),
}
ALONE = {
    "frames": ("frames", 0),
    "loop": ("loop_score", 3),
    "flow px": ("flow", 2),
    "dynamic": ("dynamic_degree", 3),
    "flicker": ("flicker", 4),
}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
