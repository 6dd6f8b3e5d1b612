"""`gen-accel metrics`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gen_accel import registry
from gen_accel.cli.app import app
from gen_accel.cli.loading import loading
from gen_accel.cli.printing import (
    FiguresConfig,
    fidelity_rows,
    print_rows,
    print_table,
    what_is_missing,
)
from gen_accel.cli.verb import verb
from gen_accel.config import option
from gen_accel.paths import FILM_SUFFIXES, check_files, expanded

if TYPE_CHECKING:
    from gen_accel.measure.motion import Motion
    from gen_accel.measure.quality import Fidelity

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Columns of a table: field and digits, by title.
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


class MetricsConfig(FiguresConfig):
    """Videos, and the figures that are measured of them."""

    VERB = "metrics"

    videos: tuple[Path, ...] = option(
        (),
        "Videos",
        "Video files, folders of PNG frames, or folders of videos.",
        metavar="VIDEO...",
        accept="video",
    )
    reference: Path | None = option(
        None,
        "Videos",
        "Video of the same scene, made another way, that each is compared with. Default: of two "
        "videos alone, the second.",
        metavar="FILE",
        accept="video",
    )
    each: bool = option(False, "Videos", "Two or more videos, each by itself.")
    fps: float | None = option(
        None,
        "Videos",
        "Frames per second of folders of frames, which state none.",
        ge=0.01,
        le=1000.0,
    )
    metrics: tuple[str, ...] | None = option(
        None,
        "Figures",
        "Metrics beside PSNR and SSIM: lpips, vmaf, cvvdp. Default: lpips and vmaf, if they can "
        "be computed.",
        metavar="NAME[,NAME]",
        choices=registry.METRICS,
        commas=True,
    )
    lag: int | None = option(
        None, "Figures", "Distance in frames of the similarity, without a reference.", ge=1
    )
    by_frame: bool = option(
        False,
        "Figures",
        "Figures of each frame in --json too: PSNR, SSIM, or colours, contrast, similarity.",
        form="Figures of each frame in the download too.",
    )

    def inputs(self) -> dict[str, list[Path]]:
        there = [path for path in self.videos if expanded(path).exists()]
        return {**super().inputs(), "videos": [film for path in there for film in _within(path)]}

    def check(self) -> tuple[list[Path], Path | None]:
        """Return the videos, with the videos in folders in place of the folders, and the
        reference.

        Raises:
            FileNotFoundError, ValueError: a missing file, or options that do not go together.
        """
        check_files("video", *self.videos, self.reference)
        if not self.videos:
            raise ValueError("give a VIDEO")
        films = [film for path in self.videos for film in _within(path)]
        reference = self.reference
        if reference is None and not self.each and len(films) == len(self.videos) > 1:
            if len(films) > 2:
                raise ValueError(
                    f"got {len(films)} videos: give --reference FILE to compare them with it, or "
                    "--each for each by itself"
                )
            films, reference = films[:1], films[1]
        if self.lag is not None and reference is not None:
            raise ValueError(f"--lag is for a video without a reference, got {self.lag}")
        if self.metrics is not None and reference is None:
            told = ",".join(self.metrics)
            raise ValueError(f"--metrics {told} compares with a reference: give two videos")
        if "vmaf" in (self.metrics or ()) and reference is not None:
            for path in (*films, reference):
                if path.suffix.lower() in PICTURES:
                    raise ValueError(f"vmaf is for videos, and {path} is a picture")
        if self.by_frame and self.json_file is None:
            raise ValueError("--by-frame writes each frame's figures to --json FILE: give one")
        registry.check_metrics(self.metrics)
        return films, reference


@verb(
    app,
    MetricsConfig,
    short_help="Loops, drift and motion of videos, or their distance to another.",
    positional=("videos",),
)
def metrics(config: MetricsConfig) -> None:
    """Loops, drift, motion and flicker of videos; or how close they are to a reference.

    \b
    gen-accel metrics long.mp4
    gen-accel metrics long.mp4 --lag 81 --json long.json
        how alike frames are that lie 81 apart: 1 is a repetition, 0 as alike as any two
    gen-accel metrics sparse.mp4 dense.mp4
        PSNR, SSIM, VMAF, and LPIPS if its weights are there
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
    films, reference = config.check()
    with loading(None):
        from gen_accel.measure.motion import measure_file
        from gen_accel.measure.quality import check_pair, compare_files

    found: Mapping[str, Fidelity | Motion]
    if reference is None:
        found = {str(film): measure_file(film, lag=config.lag, fps=config.fps) for film in films}
    else:
        for film in films:
            check_pair(film, reference)
        found = {
            str(film): compare_files(film, reference, metrics=config.metrics, fps=config.fps)
            for film in films
        }
    results = {path: one.to_dict() for path, one in found.items()}
    if not config.is_quiet:
        _print(results, is_compared=reference is not None)
    if config.by_frame:
        results = {path: one | {"by_frame": found[path].by_frame} for path, one in results.items()}
    config.show((), {"videos": results} if len(results) > 1 else next(iter(results.values())))


def motion_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """Rows of a video's changes over time, by the fields of `Motion`."""
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
        rows["similarity"] = f"{found['similarity']:.3f} at the given distance"
    return rows


def _within(path: Path) -> list[Path]:
    """The videos of a folder; `path` itself if it is a video, or a folder of PNG frames."""
    folder = expanded(path)
    if not folder.is_dir() or any(folder.glob("[0-9][0-9][0-9][0-9]*.png")):
        return [path]
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in FILM_SUFFIXES)
    if not found:
        raise ValueError(
            f"{path} holds neither PNG frames named like 0000.png nor videos, which end in "
            f"{', '.join(FILM_SUFFIXES)}"
        )
    return found


def _print(results: Mapping[str, Mapping[str, Any]], *, is_compared: bool) -> None:
    """Print figures by video; of one video alone without its name."""
    first, *others = results.values()
    if others:
        _print_table(results, COMPARED if is_compared else ALONE)
    elif is_compared:
        print_rows({"frames": f"{first['frames']}", **fidelity_rows(first)})
    else:
        print_rows(motion_rows(first))
    for reason in sorted({why for one in results.values() for why in what_is_missing(one)}):
        typer.echo(reason)


def _print_table(
    found: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, int]]
) -> None:
    """Print a line for each video."""
    from rich import box
    from rich.table import Table

    known = {
        title: column
        for title, column in columns.items()
        if any(one[column[0]] is not None for one in found.values())
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("video", overflow="fold")
    for title in known:
        table.add_column(title, justify="right")
    rows = [
        ["" if one[name] is None else f"{one[name]:.{digits}f}" for name, digits in known.values()]
        for one in found.values()
    ]
    print_table(table, [[path, *row] for path, row in zip(_short(found), rows, strict=True)])


def _short(paths: Iterable[str]) -> list[str]:
    """Paths without the folders that they share."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return [str(Path(*one[shared:])) for one in parts]
