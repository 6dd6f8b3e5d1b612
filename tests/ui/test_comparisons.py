"""A comparison on the screen Compare, without a browser."""

import json

import numpy as np
import pytest

from gen_accel.measure import write_video
from gen_accel.ui.screens import compare as comparisons

REPORT = {
    "prompt": "a red circle moves left",
    "seed": 3,
    "frames": 5,
    "height": 32,
    "width": 48,
    "steps": 4,
    "fps": 8.0,
    "tokens": 1234,
    "attention": "Radial(decay_factor=0.5), Schedule()",
    "method": "Radial(decay_factor=0.5)",
    "schedule": "Schedule()",
    "kernel": "gather",
    "density": 0.25,
    "attention_flops_share": 0.4,
    "dense_seconds": 6.0,
    "sparse_seconds": 4.0,
    "speedup": 1.5,
    "attention_seconds": {"dense": 3.0, "sparse": 1.0},
    "busy": None,
    "psnr_db": 31.25,
    "ssim": 0.913,
    "vmaf": 71.0,
    "vmaf_lowest": 60.0,
    "settings": {
        "gen_accel": "settings",
        "version": 1,
        "fields": {"model": "demo", "method": "radial", "set": ["decay_factor=0.5"]},
    },
}
BUSY = "the machine was busy: other processes used 1.2 of 2 cores"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison whose third frames differ most."""
    place = tmp_path_factory.mktemp("compared") / "job"
    dense = np.full((5, 32, 48, 3), 100, np.uint8)
    sparse = dense.copy()
    sparse[2, :16] = 160
    for name, video in (("dense.mp4", dense), ("mp4", sparse), ("side_by_side.mp4", dense)):
        write_video(video, place / f"video.{name}", fps=8)
    (place / "video.json").write_text(json.dumps(REPORT))
    return place.parent


def figures(**changed):
    return {name: value for name, value, _ in comparisons.figures(REPORT | changed)}


def test_figures_are_the_ones_of_the_report():
    found = figures()
    assert found["Speed-up"] == "1.5\N{MULTIPLICATION SIGN}"
    assert found["Attention speed-up"] == "3\N{MULTIPLICATION SIGN}"
    assert found["Density, sparse steps"] == "25 %"
    assert (found["PSNR"], found["SSIM"], found["VMAF"]) == ("31.2 dB", "0.913", "71")
    assert (found["Tokens"], found["Seed"]) == ("1,234", "3")
    assert found["Denoising"] == "6.00 s dense, 4.00 s sparse"


def test_what_was_not_measured_has_no_row():
    found = figures(attention_seconds=None, vmaf=None, vmaf_lowest=None, density=None)
    assert not {"Attention speed-up", "VMAF", "Density, sparse steps"} & found.keys()


def test_a_busy_machine_has_no_speed_up_and_says_why(folder):
    found = figures(busy=BUSY)
    assert (found["Speed-up"], found["Attention speed-up"]) == ("not shown", "not shown")
    compared = comparisons.Compared(folder / "job")
    assert compared.busy == ""
    compared.report["busy"] = BUSY
    assert compared.busy == f"T{BUSY[1:]}, so that no speed-up is shown."


def test_identical_clips_have_an_infinite_psnr():
    assert figures(psnr_db="Infinity")["PSNR"] == "\N{INFINITY} dB"


def test_frames_are_read_by_number(folder):
    found = comparisons.Compared(folder / "job")
    frames = [comparisons.frame_of(found.sparse, i) for i in (1, 2)]
    assert frames[0].max() < 120 < frames[1][:8].min()
    with pytest.raises(ValueError, match="frame must be from 0 to 4, got 5"):
        comparisons.frame_of(found.sparse, 5)


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"video\.json"):
        comparisons.Compared(tmp_path)
    (tmp_path / "video.json").write_text(json.dumps(REPORT))
    with pytest.raises(FileNotFoundError, match=r"lacks a film: .*video\.mp4"):
        comparisons.Compared(tmp_path)


def test_a_heat_map_is_dark_where_frames_are_equal_and_brighter_the_farther_they_are():
    dense = np.full((8, 16, 3), 100, np.uint8)
    sparse = dense.copy()
    sparse[:4, :8], sparse[4:, 8:] = 116, 200
    picture = comparisons.heat_map(dense, sparse)
    factor = comparisons.SHOWN // 16
    corners = [picture[y * factor, x * factor].tolist() for y, x in ((0, 15), (0, 0), (7, 15))]
    assert corners[0] == [*comparisons.RAMP[0]]
    assert corners[2] == [*comparisons.RAMP[-1]]
    assert sum(corners[0]) < sum(corners[1]) < sum(corners[2])
    assert picture[-1, 0].tolist() == [*comparisons.RAMP[0]]  # the scale below
    assert picture[-1, -1].tolist() == [*comparisons.RAMP[-1]]


def test_differences_are_said_in_levels():
    dense = np.zeros((4, 4, 3), np.uint8)
    assert comparisons.difference_words(dense, dense, 7) == "Frame 7 is equal in both clips."
    sparse = dense.copy()
    sparse[0, 0] = 48
    said = comparisons.difference_words(dense, sparse, 7)
    assert "3.0 of 255 levels apart on average, 48 at most" in said


def test_a_small_frame_is_enlarged_by_whole_pixels_and_a_large_one_is_not():
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert comparisons.enlarged(frame, 7).shape == (4, 6, 3)
    assert (comparisons.enlarged(frame, 7)[::2, ::2] == frame).all()
    assert comparisons.enlarged(frame, 2) is not None
    assert comparisons.enlarged(frame, 2).shape == frame.shape


def test_the_chart_leaves_equal_frames_out():
    decibels = [30.0, "Infinity", 20.0, 25.0]
    chart = comparisons.chart_of(decibels)
    assert chart == {"frame": [0, 2, 3], "PSNR (dB)": [30.0, 20.0, 25.0]}


def test_the_mask_is_asked_for_as_on_a_command_line(folder, tmp_path):
    found = comparisons.Compared(folder / "job")
    sizes = {"frames": 5, "height": 32, "width": 48}
    assert comparisons.mask_options(found) == {
        "model": "demo",
        "method": "radial",
        "set": ["decay_factor=0.5"],
        **sizes,
    }
    ran = {"method": "piecewise", "set": ["critical=0.2"]}
    for settings, expected in (
        ({"fields": {"model": "demo", "preset": "balanced"}, "ran": ran}, ran),
        ({"fields": {"model": "demo", "preset": "fast"}, "ran": {}}, {"preset": "fast"}),
    ):
        other = json.loads(found.path.read_text())
        other["settings"] |= settings
        for film in (folder / "job").glob("*.mp4"):
            (tmp_path / film.name).write_bytes(film.read_bytes())
        (tmp_path / "video.json").write_text(json.dumps(other))
        said = comparisons.mask_options(comparisons.Compared(tmp_path))
        assert said == {"model": "demo", **expected, **sizes}, "what ran, not what its name is"


def test_the_page_of_a_comparison_holds_its_films(folder, tmp_path):
    found = comparisons.Compared(folder / "job")
    text = comparisons.write_page(found, tmp_path / "report.html").read_text()
    assert text.count("data:video/mp4") == 3
    assert "a red circle moves left: dense and sparse attention" in text
