"""Cost of a stream: its cache against a real one, constant in length, and its words."""

import pytest
from support import wan

from gen_accel.pipelines.generation.config import Clip
from gen_accel.pipelines.generation.stream import Streamer, StreamSettings, stream_clip
from gen_accel.pipelines.generation.stream_cost import forecast_stream
from gen_accel.pipelines.zones import Zones

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"height": 64, "width": 96}


def forecast_of(zones, source, **more):
    given = {"gpu": "4090", "dtype": "float32", "fps": 16.0, "guidance_scale": 1.0, **SIZE}
    return forecast_stream(source, zones=zones, **(given | more))


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline(scheduler=wan.euler())


@pytest.mark.parametrize("middle", ["none", "salient", "grid", "all"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_cache_is_as_large_as_a_real_one(pipe, tmp_path_factory, middle, scale):
    folder = tmp_path_factory.getbasetemp() / "stream_cost"
    if not folder.exists():
        pipe.save_pretrained(folder)
    zones = Zones(2, window=1, sink=1, middle=middle, remembered=2)
    found = forecast_of(zones, str(folder), guidance_scale=scale)
    clip = Clip(frames=45, steps=1, guidance_scale=scale, max_tokens=8, **SIZE)
    made = Streamer(pipe, stream_clip(pipe, clip), StreamSettings(zones), "a")
    assert found.cache == [made.cached for _ in made.latents()][-1]
    assert found.frames == made.lengths.latents * made.lengths.factor


def test_a_frame_costs_the_same_at_any_length():
    zones = Zones(3, window=2)
    short, long = (forecast_of(zones, "Wan2.1-T2V-1.3B", frames=n) for n in (100, 100_000))
    assert short.frame == long.frame
    assert short.peak == long.peak
    assert long.total == 100_000


def test_what_more_costs_costs_more():
    plain = forecast_of(Zones(3, window=1), "Wan2.1-T2V-1.3B", steps=4)
    for zones, more in (
        (Zones(3, window=2), {"steps": 4}),
        (Zones(3, window=1, middle="salient"), {"steps": 4}),
        (Zones(3, window=1), {"steps": 8}),
        (Zones(3, window=1), {"steps": 4, "guidance_scale": 5.0}),
    ):
        assert forecast_of(zones, "Wan2.1-T2V-1.3B", **more).frame.low > plain.frame.low
    few = plain.to_dict()
    assert few["keys"] == 2 * 3 * 4 * 6
    assert few["frames_per_chunk"] == 12


def test_a_text_that_attends_with_the_video_is_of_the_chunk_alone():
    size = {"height": 480, "width": 848, "dtype": "auto", "gpu": "h100", "fps": 24.0, "text": 1000}
    zones, frame = Zones(3, window=2), 30 * 53
    made = {
        model: forecast_of(zones, model, **size, steps=4)
        for model in ("HunyuanVideo-1.5", "Wan2.1-T2V-14B")
    }
    assert made["HunyuanVideo-1.5"].keys == 9 * frame + 1000
    assert made["HunyuanVideo-1.5"].cache == 2 * 2 * 6 * frame * 54 * 2048
    assert made["Wan2.1-T2V-14B"].keys == 9 * frame
    film = forecast_of(zones, "LTX-Video", **(size | {"width": 832, "fps": 25.0, "text": 128}))
    assert film.frames == 24
    assert film.keys == 9 * 15 * 26


def test_words():
    zones, size = Zones(3, window=2), {"height": 480, "width": 832, "dtype": "auto"}
    fast = forecast_of(zones, "Wan2.1-T2V-1.3B", gpu="h100", **size, steps=2, fps=8.0)
    slow = forecast_of(zones, "Wan2.1-T2V-14B", **size, guidance_scale=5.0)
    words = " ".join(fast.lines(1000))
    assert "it keeps up" in words
    assert "14,040 keys" in words
    assert fast.fits
    assert "falls behind" in " ".join(slow.lines(1000))
    assert slow.fits is False
