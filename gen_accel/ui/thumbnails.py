"""Small pictures of what jobs made, for the gallery and the queue."""

import io
from contextlib import suppress
from pathlib import Path

from PIL import Image

from gen_accel.io import replacing
from gen_accel.measure.video_io import read_picture, read_stream
from gen_accel.outputs import comparison_files
from gen_accel.ui.queue import DONE, INTERRUPTED, STOPPED, Queue, QueuedJob

THUMBNAIL = "thumbnail.jpg"  # in the folder of a job
LARGEST = (192, 112)  # pixels: width and height; twice as many as are shown


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
                picture = _first(made)
                with replacing(small) as partial:
                    partial.write_bytes(as_jpeg(picture, LARGEST))
                return small
    return None


def as_jpeg(image: Image.Image, largest: tuple[int, int]) -> bytes:
    """Write an image as a JPEG of some width and height at most."""
    image = image.convert("RGB")
    image.thumbnail(largest)
    held = io.BytesIO()
    image.save(held, format="JPEG", quality=80)
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


def _first(path: Path) -> Image.Image:
    if path.suffix == ".png":
        return read_picture(path, path)
    return Image.fromarray(next(read_stream(path, frames=1))[0])
