"""Small pictures of what jobs made."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

from gen_accel.measure.video_io import write_video
from gen_accel.ui.queue import DONE, FAILED, STOPPED, QueuedJob
from gen_accel.ui.thumbnails import THUMBNAIL, thumbnail

NAME = "20260101-000000-000000"


@pytest.fixture
def queue(tmp_path):
    (tmp_path / NAME).mkdir()
    return SimpleNamespace(folder=tmp_path.resolve(), place=lambda job: tmp_path / job.id)


def film(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(np.full((2, 240, 480, 3), level, np.uint8), path, fps=8)


def level_of(small):
    image = Image.open(small)
    assert image.size == (192, 96)
    return round(np.asarray(image).mean(), -1)


def test_a_training_shows_its_newest_sample(queue):
    out = queue.folder / "trainings" / "a"
    job = QueuedJob(NAME, "train", {}, kind="train", about={"out": str(out)}, state=STOPPED)
    assert thumbnail(queue, job) is None
    out.mkdir(parents=True)
    assert thumbnail(queue, job) is None
    Image.new("RGB", (480, 240)).save(out / "preview.png")
    for step, level in ((100, 50), (200, 200)):
        film(out / "samples" / f"step-{step:06d}" / "00.mp4", level)
    assert level_of(thumbnail(queue, job)) == 200
    film(out / "samples" / "step-000300" / "00.mp4", 50)
    assert level_of(thumbnail(queue, job)) == 200  # it is made once


def test_no_file_from_elsewhere_is_shown(queue, tmp_path_factory):
    there = tmp_path_factory.mktemp("there") / "a.mp4"
    film(there, 100)
    link = queue.folder / NAME / "video.mp4"
    link.symlink_to(there)
    for out in (there, link, link.with_name("none.mp4")):
        assert thumbnail(queue, QueuedJob(NAME, "generate", {"out": str(out)}, state=DONE)) is None
    link.unlink()
    film(link, 100)
    made = QueuedJob(NAME, "generate", {"out": str(link)}, state=FAILED)
    assert thumbnail(queue, made) is None
    assert not (queue.folder / NAME / THUMBNAIL).exists()
