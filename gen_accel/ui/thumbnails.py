"""Small pictures of what jobs made, for the gallery and the queue."""

import io
from contextlib import suppress
from itertools import islice
from pathlib import Path

from PIL import Image

from gen_accel.io import replacing
from gen_accel.measure.video_io import count_frames, frames_of, read_picture, read_stream
from gen_accel.paths import comparison_files
from gen_accel.ui.queue import DONE, INTERRUPTED, STOPPED, Queue, QueuedJob

THUMBNAIL = "thumbnail.jpg"  # in the folder of a job
LARGEST = (192, 112)  # pixels: width and height; twice as many as are shown
FURTHEST = 48  # number of the last frame that may stand for a film
STILL, FRAME = (640, 640), (320, 320)  # pixels: of a first frame alone, of a frame in a sheet
ACROSS = 4  # frames in a row of a sheet, and rows


def thumbnail(queue: Queue, job: QueuedJob) -> Path | None:
    """Return the small picture of what a job made, which the first call writes; None for none.

    A training that was stopped has one too.
    """
    small = queue.place(job) / THUMBNAIL
    with suppress(OSError, ValueError, StopIteration):  # nothing was made, or it is gone
        if small.is_file():
            return small
        if job.state in (DONE, STOPPED, INTERRUPTED):
            made = _made(job).resolve()
            if made.is_relative_to(queue.folder):  # a record may name any file
                picture = _picture(made)
                with replacing(small) as partial:
                    partial.write_bytes(encoded(picture, LARGEST))
                return small
    return None


def still(film: Path) -> bytes:
    """Write the first frame of a film as a WebP picture. Raises OSError for no film."""
    return encoded(_frame(film, 0), STILL, "WEBP")


def sheet(film: Path) -> bytes:
    """Write up to 16 frames of a film, evenly apart, beside and below each other as a JPEG. Raises
    OSError for no film."""
    last = count_frames(film) - 1
    cells = min(ACROSS**2, last + 1)
    chosen = {round(cell * last / max(1, cells - 1)) for cell in range(cells)}
    frames = list[Image.Image]()
    for number, frame in enumerate(frames_of(read_stream(film, frames=1))):
        if number in chosen:
            frames.append(Image.fromarray(frame))
            frames[-1].thumbnail(FRAME)
    width, height = frames[0].size
    rows = -(-len(frames) // ACROSS)
    found = Image.new("RGB", (width * min(ACROSS, len(frames)), height * rows))
    for cell, frame in enumerate(frames):
        found.paste(frame, (cell % ACROSS * width, cell // ACROSS * height))
    return encoded(found, found.size)


def encoded(image: Image.Image, largest: tuple[int, int], kind: str = "JPEG") -> bytes:
    """Write an image as a picture of some width and height at most."""
    image = image.convert("RGB")
    image.thumbnail(largest)
    held = io.BytesIO()
    image.save(held, format=kind, quality=80)
    return held.getvalue()


def _made(job: QueuedJob) -> Path:
    """File that shows best what a job made. Raises StopIteration for a training without one."""
    out = Path(str(job.about.get("out") or job.options.get("out")))
    if job.options.get("compare"):
        return comparison_files(out)["side by side"]
    if not out.is_dir():
        return out
    samples = sorted(out.rglob("step-*/00.mp4"), reverse=True)  # the newest first
    return next(iter(samples or out.rglob("preview.png")))  # or the clips that it learns from


def _picture(path: Path) -> Image.Image:
    if path.suffix == ".png":
        return read_picture(path, path)
    return _frame(path, min(count_frames(path) // 2, FURTHEST))  # the first is often empty


def _frame(film: Path, number: int) -> Image.Image:
    frames = frames_of(read_stream(film, frames=1))
    return Image.fromarray(next(islice(frames, number, None)))
