"""Which clips, pictures and captions a step shows, and the fields of a config that say so."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from support import finetuning as ft
from support.clips import refuse

import gen_accel
from gen_accel.lora import TrainConfig, prepare, print_config, read_config
from gen_accel.lora.batches import Batches, plan_clips
from gen_accel.lora.caching.latents import Entry, LatentCache
from gen_accel.lora.config import FREE_TO_CHANGE
from gen_accel.lora.data.report import Report
from gen_accel.lora.prepare import cache_clips

pytestmark = pytest.mark.usefixtures("one_thread")


class Listed(tuple):
    @property
    def sizes(self):
        rows = [(e.frames, e.height, e.width, e.pixel_frames) for e in self]
        return np.array(rows, np.int32)


class Entries:
    """In the place of a `LatentCache`, without tensors.

    Args:
        entries: fields of each entry beside frames and size.
    """

    def __init__(self, *entries):
        given = {"frames": 5, "height": 4, "width": 8}
        self.entries = Listed(
            Entry(**({"name": f"{i}", "caption": "", "pixel_frames": 17, "latent_key": "",
                      "text_key": ""} | given | one))
            for i, one in enumerate(entries)
        )  # fmt: skip

    def __len__(self):
        return len(self.entries)

    fitting, buckets = LatentCache.fitting, LatentCache.buckets
    _fits, causal = LatentCache._fits, True


BEFORE = [0, 2, 3, 1, 2, 1, 0, 1, 2, 3, 0, 3]
PICTURE = {"is_picture": True, "frames": 1, "pixel_frames": 1}


def plan(entries, processes=1, **fields):
    config = ft.config("unused", **({"stages": ("17:400",)} | fields))
    return plan_clips(config, ft.model(), entries, processes)


def test_repeats_count():
    (steps,) = plan(Entries({}, {"repeats": 3}, {"height": 8, "repeats": 4}), stages=("17:800",))
    shown = Counter(clip for clips in steps for clip in clips)
    assert shown[2] == pytest.approx(400, abs=60)  # the other size
    assert shown[1] == pytest.approx(3 * shown[0], abs=3)
    (alone,) = plan(Entries({}, {"repeats": 3}), stages=("17:40",))
    for i in range(0, 40, 4):  # a round shows each as often as it repeats
        assert Counter(clip for clips in alone[i : i + 4] for clip in clips) == {0: 1, 1: 3}


def test_pictures_are_mixed_in_at_their_share():
    entries = Entries({}, {}, {}, PICTURE, PICTURE | {"height": 8})
    config = {"images": 0.25, "batch_size": 2, "gradient_accumulation": 2}
    (steps,) = plan(entries, **config)
    assert {len(clips) for clips in steps} == {4}
    kinds = [{entries.entries[clip].is_picture for clip in clips} for clips in steps]
    assert {frozenset(kind) for kind in kinds} == {frozenset({True}), frozenset({None})}
    assert kinds.count({True}) == pytest.approx(100, abs=25)
    assert {entries.entries[c].height for clips in steps for c in clips if c > 2} == {4, 8}
    assert plan(entries, **config) == [steps]
    # Which steps show pictures does not depend on how many come after.
    (fewer,) = plan(entries, **config)
    assert [clips[0] > 2 for clips in fewer[:100]] == [clips[0] > 2 for clips in steps[:100]]
    assert plan(entries, **config, seed=1) != [steps]


def test_a_longer_stage_begins_like_a_shorter():
    """With two sizes, repeats and pictures."""
    picture = {"is_picture": True, "frames": 1}
    entries = Entries({}, {"repeats": 3}, {"height": 8}, picture, picture)
    (steps,) = plan(entries, images=0.3, stages=("17:60",))
    assert {clips[0] > 2 for clips in steps} == {True, False}
    for count in range(1, 60, 7):
        assert plan(entries, images=0.3, stages=(f"17:{count}",)) == [steps[:count]]


def test_the_plan_is_what_it_was():
    entries = Entries({}, {}, {}, {"height": 8})
    # Resumed runs depend on it.
    (steps,) = plan(entries, stages=("17:12",))
    assert [clips[0] for clips in steps] == BEFORE


def test_a_stage_of_one_frame_takes_pictures_and_first_frames():
    entries = Entries({}, PICTURE)
    (steps,) = plan(entries, stages=("1:20",))
    assert {clip for clips in steps for clip in clips} == {0, 1}
    (steps,) = plan(entries, stages=("17:20",))
    assert {clip for clips in steps for clip in clips} == {0}


def test_images_without_pictures():
    with pytest.raises(ValueError, match=r"images is 0\.5, and the cache holds no pictures"):
        plan(Entries({}), images=0.5)


def test_a_step_of_pictures_has_one_frame():
    entries = Entries({}, PICTURE)
    alone = SimpleNamespace(process_index=0, num_processes=1)
    batches = Batches(ft.config("unused"), ft.model(), entries, None, alone)
    (stage,) = ft.config("unused", stages=("17:4",)).curriculum
    assert [batches.frames_of(stage, [clip]) for clip in (0, 1)] == [17, 1]


@pytest.mark.slow
def test_a_text_is_drawn_by_the_seed_and_the_step_alone():
    class Told(ft.Clips):
        def __init__(self):
            super().__init__()
            self.told = []
            self.entries[1].text_keys = ("a", "b", "c")

        def conditions(self, index, text=0):
            self.told.append((index, text))
            return super().conditions(index)

    def told(step, place=0, seed=0):
        clips = Told()
        config = ft.config("unused", caption_dropout=0.0, seed=seed, batch_size=2)
        accelerator = SimpleNamespace(num_processes=1, process_index=0, device="cpu")
        adapter = SimpleNamespace(inputs=lambda *args: ())
        Batches(config, ft.model(), clips, adapter, accelerator)(step, [1, 1, 0, 0], 3, place // 2)
        return clips.told

    first = [told(step)[0] for step in range(60)]
    assert first[:20] == [told(step)[0] for step in range(20)]
    counts = Counter(text for _, text in first)
    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) > 9
    assert [told(step)[1] for step in range(10)] != first[:10]
    assert [told(step, seed=1)[0] for step in range(10)] != first[:10]
    assert {text for _, text in told(3, place=2)} == {0}  # clip 0 has one text


def test_height_and_width_are_the_first_of_sizes():
    sizes = ("480x832", "832x480")
    usual = TrainConfig(model="a/model")
    assert (usual.clip_sizes, usual.height) == (((480, 832),), 480)
    given = TrainConfig(sizes=("832x480", "480x832"))
    assert (given.height, given.width) == (832, 480)
    assert given.clip_sizes == ((832, 480), (480, 832))
    given = TrainConfig(sizes=("96x96", *sizes), height=832, width=480)
    assert (given.height, given.width) == (832, 480)
    assert given.replaced(rank=4).clip_sizes == given.clip_sizes
    assert TrainConfig(stages=("81:2",), images=0.1).clip_lengths == [1, 81]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ("480",)}, "sizes are written HEIGHTxWIDTH, as 480x832,832x480, got '480'"),
        ({"sizes": ("96x96", "96x96")}, "sizes must differ, got 96x96, 96x96"),
        (
            {"sizes": ("480x832",), "height": 96, "width": 96},
            "height 96 and width 96, of the videos sampled, are none of sizes 480x832: leave both",
        ),
        ({"sizes": ("96x96",), "height": 96}, "height 96 and width 832, .* none of sizes 96x96"),
        ({"images": 1.0}, "images must be at least 0 and below 1, got 1.0"),
        ({"images": -0.1}, "images must be at least 0"),
        ({"shuffle_tags": -1}, "shuffle_tags must be at least 0, got -1"),
        ({"shuffle_tags": 0, "tag_orders": 0}, "tag_orders must be from 1 to 1000"),
        ({"tag_orders": 2}, "tag_orders 2 is for shuffle_tags, which is not given"),
        ({"repeats": ("3",)}, "as people/.*=3, PATTERN=NUMBER each, got '3'"),
        ({"trigger": " "}, "trigger must hold a word, got ' ': leave it out for none"),
        ({"default_caption": ""}, "default_caption must hold a word, got ''"),
    ],
    ids=str,
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_a_file_has_them_as_people_write_them(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(
        "sizes: [480x832, 832x480]\ntake: all\nscenes: off\nimages: 0.2\nshuffle_tags: 1\n"
        "trigger: sks\nrepeats: people/*=3\n"
    )
    given = read_config(path)
    assert given == TrainConfig(
        sizes=("480x832", "832x480"),
        take="all",
        images=0.2,
        shuffle_tags=1,
        trigger="sks",
        repeats=("people/*=3",),
    )
    again = tmp_path / "again.yaml"
    again.write_text(print_config(given))
    assert yaml.safe_load(again.read_text())["scenes"] == "off"
    assert read_config(again) == given
    path.write_text("take: end\n")
    with pytest.raises(ValueError, match="take must be one of start, middle, all"):
        read_config(path)


def test_a_continuation_may_not_change_the_clips():
    names = ("sizes", "take", "scenes", "images", "repeats", "trigger", "prefix")
    names += ("default_caption", "shuffle_tags", "tag_orders")
    assert not {*names} & {*FREE_TO_CHANGE}
    assert {*names} <= {*TrainConfig.options()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--sizes", "480x832,832"), "sizes are written HEIGHTxWIDTH"),
        (("--repeats", "3"), "PATTERN=NUMBER each, got '3'"),
        (("--take", "end"), "take must be one of start, middle, all, got 'end'"),
        (("--images", "x"), "images must be float, got 'x'"),
    ],
    ids=str,
)
def test_flags_that_are_refused_before_anything_is_loaded(run, tmp_path, args, message):
    result = run("cache", "--data", tmp_path, "--out", tmp_path / "run", *args, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")


def test_scenes_without_their_extra_are_refused_before_a_model_is_loaded(on_disk, monkeypatch):
    monkeypatch.setattr("gen_accel.lora.data.survey.find_spec", lambda name: None)
    monkeypatch.setattr(prepare, "load_pipe", refuse)
    with pytest.raises(ModuleNotFoundError, match=r".+\[scenes\]"):
        gen_accel.lora.train(on_disk(scenes="cut"))


@pytest.fixture
def mixed(home, tmp_path):
    """Clips of two shapes, pictures, and several captions of one clip."""
    data = shutil.copytree(home / "clips", tmp_path / "data")
    (data / "0.1.txt").write_text("a green square")
    rng = np.random.default_rng(5)
    for name, size in (("p", (64, 128)), ("q", (128, 64))):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("a red, green, blue picture")
    tall = rng.integers(0, 256, (17, 64, 32, 3)).astype(np.uint8)
    gen_accel.measure.write_video(tall, data / "tall.mp4", fps=16)
    (data / "tall.txt").write_text("a tall clip")
    return data


@pytest.mark.slow
def test_all_of_it_trains_and_resumes_to_the_bit(on_disk, mixed, tmp_path):
    fields = {
        "data": str(mixed),
        "sizes": ("32x64", "64x32"),
        "stages": ("9:6", "17:4:position_interpolation", "1:2"),
        "images": 0.4,
        "shuffle_tags": 1,
        "trigger": "sks",
        "repeats": ("tall*=4",),
        "take": "all",
        "checkpoint_every": 5,
        "keep_checkpoints": 5,
    }
    given = on_disk(**fields)
    done = gen_accel.lora.train(given)
    rows = [row["frames"] for row in metrics(tmp_path / "run")]
    assert {*rows[:6]} == {1, 9}
    assert set(rows[6:]) == {1, 17}
    for name in ("lora", "checkpoints/step-000012", "checkpoints/step-000010"):
        shutil.rmtree(tmp_path / "run" / name)
    again = gen_accel.lora.train(given, resume=True)
    assert again.losses == done.losses[5:]
    other = on_disk(**fields | {"images": 0.3})
    shutil.rmtree(tmp_path / "run" / "lora")
    with pytest.raises(ValueError, match=r"differs in images: 0\.4, now 0\.3"):
        gen_accel.lora.train(other, resume=True)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_cache_that_was_made_otherwise_is_refused(on_disk, mixed, tmp_path):
    folder = str(tmp_path / "cache")
    made = on_disk(cache=folder, data=str(mixed), sizes=("32x64", "64x32"), take="middle")
    report = cache_clips(made)
    assert isinstance(report, Report)
    assert report.left_out.keys() == {"p.png", "q.png"}
    sizes = {"sizes": ("32x64", "64x32"), "cache": folder, "data": None}
    for fields, message in (
        ({"take": "all"}, "was made with take 'middle', asked for is 'all': give data, or cache"),
        ({"trigger": "sks"}, "was made with trigger None, asked for is 'sks'"),
        ({"images": 0.5}, "images is 0.5, and .*cache holds no pictures: add some"),
        ({"sizes": ("32x64",)}, "holds clips of 64 x 32 pixels, asked for are 32 x 64"),
    ):
        with pytest.raises(ValueError, match=message):
            gen_accel.lora.train(on_disk(**sizes | fields))
    done = gen_accel.lora.train(on_disk(**sizes, stages=("9:1",)))  # takes what the cache has
    assert done.steps == 1


@pytest.mark.slow
def test_sizes_that_do_not_fit_the_model(on_disk):
    with pytest.raises(ValueError, match="40"):
        gen_accel.lora.train(on_disk(sizes=("32x64", "40x64")))


@pytest.mark.slow
def test_a_dry_run_with_all_of_it(tmp_path):
    given = {"model": "demo", "sizes": ("64x96", "96x64"), "out": str(tmp_path / "run")}
    given |= {"images": 0.5, "shuffle_tags": 0, "trigger": "sks", "take": "all", "scenes": "cut"}
    assert gen_accel.lora.dry_run(TrainConfig(**given, repeats=("a=2",), rank=2)).steps == 2
    with pytest.raises(ValueError, match=r"width must be a multiple of .*, got 100"):
        gen_accel.lora.dry_run(TrainConfig(**given | {"sizes": ("64x96", "64x100")}))


@pytest.mark.slow
def test_the_command_says_what_it_found(run, on_disk, mixed, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(print_config(on_disk(data=str(mixed), sizes=("32x64", "64x32"))))
    said = run("cache", path).stdout
    assert "4 clips encoded" in said
    assert "left out, 2:" in said
    assert "  p.png: a picture, which images or a stage of 1 frame would take" in said
    assert "4 to train on" in said
