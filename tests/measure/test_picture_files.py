"""Pictures of files: what is wrong with one is said with its name."""

import pytest
from PIL import Image

from gen_accel.lora.data.clips import open_image
from gen_accel.measure import read_video
from gen_accel.pipelines.image_prompt.encoder import as_rgb


def test_a_picture_of_too_many_pixels_is_told_or_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    said = r"bomb\.png has 1,600 pixels, and at most 20 are read: scale it down$"
    with pytest.raises(OSError, match=said):
        read_video(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=said):
        as_rgb(tmp_path / "bomb.png")
    with pytest.raises(OSError, match=r"^the image of a has 1,600 pixels"):
        open_image((tmp_path / "bomb.png").read_bytes(), "the image of a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.warns(UserWarning, match=r"bomb\.png is large, 40 x 40 = 1,600 pixels") as told:
        assert read_video(tmp_path / "bomb.png").shape == (1, 40, 40, 3)
    assert len(told) == 1
