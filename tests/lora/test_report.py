"""The page of a training, and its last lines."""

import base64
import io
import re
import signal
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support import finetuning as ft
from support import wan

from gen_accel.lora import trainer, training_run
from gen_accel.lora.curves import BOX, Line, draw_chart, running_mean
from gen_accel.lora.report import METRICS, REPORT
from gen_accel.lora.state import TrainingState
from gen_accel.lora.validate import read_numbers, write_strip

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a <b>red</b> square & more"
VIDEOS = {
    "stages": ("9:2", "9:2:riflex"),
    "validate_every": 2,
    "validation_prompts": (PROMPT, "a blue circle"),
    "validation_frames": 5,
    "validation_steps": 1,
    "guidance_scale": 1.0,
    "max_tokens": 16,
    "loss_every": 2,
    "held_out": 2,
}


class Parsed(HTMLParser):
    """Tags with attributes, and text, of a page that closes what it opens."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def of(self, tag, name):
        return [about[name] for kind, about in self.tags if kind == tag and name in about]

    @property
    def text(self):
        return " ".join(word for word in self.words if word)


def page(out):
    return Parsed((out / REPORT).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("seen") / "my run"
    return out, ft.train(ft.config(out, **VIDEOS), model=ft.model(pipe=wan.pipeline()))


class TestPage:
    def test_what_it_holds(self, seen):
        out, _ = seen
        found = page(out)
        for words in (
            *("Training of my run", "complete", "4 of 4", "Held-out loss", "Learning rate"),
            *("Gradient norm", "Seconds a step", "Memory", "9 frames", "running mean"),
            *("step 0 on the left, step 4 on the right", PROMPT, "a blue circle"),
            *("gen-accel generate --model demo", f"--from-lora '{out / 'lora'}'"),
            "--frames 9 --height 32 --width 64",
        ):
            assert words in found.text, words
        # Loss, loss at fixed noise, rate, norm, seconds, memory; and two stages in each.
        assert sum(tag == "svg" for tag, _ in found.tags) == 6
        assert sum(about.get("class") == "band" for _, about in found.tags) == 12
        given = [about for tag, about in found.tags if tag == "tr" and about.get("class")]
        assert len(given) == sum(
            map(ft.config(out, **VIDEOS).is_given, vars(trainer.TrainConfig()))
        )

    def test_nothing_is_fetched(self, seen):
        """Pictures lie inside, videos beside it, by paths that hold when the folder moves."""
        out, _ = seen
        found = page(out)
        assert not [tag for tag, _ in found.tags if tag in ("script", "link", "b ")]
        assert "http" not in (out / REPORT).read_text()
        pictures = found.of("img", "src")
        assert len(pictures) == 6
        for one in pictures:
            kind, data = one.split(",")
            assert kind == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(data))).height == 32
        videos = found.of("video", "src") + found.of("a", "href")
        assert videos[:2] == [f"validation/step-000004/0{i}.beside_start.mp4" for i in range(2)]
        assert all((out / one).is_file() for one in videos)

    def test_its_last_lines(self, seen):
        out, done = seen
        held, videos, report, use = done.lines
        assert re.fullmatch(r"held-out loss [\d.]+ -> [\d.]+", held)
        assert videos == f"videos: {out / 'validation'}"
        assert report == f"report: {out / REPORT}"
        assert use.startswith("use it: gen-accel generate --model demo --prompt ")

    def test_without_videos_and_losses(self, tmp_path):
        done = ft.train(ft.config(tmp_path / "run", log_with="tensorboard"))
        found = page(tmp_path / "run")
        assert "Samples" not in found.text
        assert "by noise level" not in found.text
        assert sum(tag == "svg" for tag, _ in found.tags) == 5
        assert re.fullmatch(r"loss [\d.]+ -> [\d.]+, means of 2 steps", done.lines[0])
        assert f"curves: tensorboard --logdir {tmp_path / 'run' / 'logs'}" in done.lines

    def test_of_an_image_prompt(self, tmp_path):
        given = ft.config(tmp_path / "run", **ft.IMAGES, stages=("9:2",))
        done = ft.train(given)
        use = f"--image-prompt image.png --image-adapter {tmp_path}/run/image_prompt --frames 9"
        assert use in done.lines[-1]
        assert use in page(tmp_path / "run").text

    def test_of_the_second_expert(self, tmp_path):
        made = ft.model(boundary=0.5)
        done = ft.train(ft.config(tmp_path, part="transformer_2", stages=("9:1",)), model=made)
        assert "load_into_transformer_2=True" in done.lines[-1]

    def test_of_a_run_that_diverged(self, tmp_path, monkeypatch):
        monkeypatch.setattr(TrainingState, "clip", TrainingState.clip)
        ft.poison(2)
        given = ft.config(tmp_path / "run", checkpoint_every=1)
        with pytest.raises(ValueError, match="gradient of step 2 is not finite"):
            ft.train(given)
        found = page(tmp_path / "run")
        assert "the gradient of step 2 is not finite: lower learning_rate" in found.text
        assert "2 of 4" in found.text
        assert f"--from-lora {tmp_path}/run/checkpoints/step-000002/lora" in found.text
        assert {"class": "state fault"} in [about for _, about in found.tags]

    def test_of_a_run_that_was_stopped_and_goes_on(self, tmp_path):
        given = ft.config(tmp_path / "run", stages=("9:5",))

        class Stopping(ft.Clips):
            def latents(self, index, frames):
                run.stopping = (tmp_path / "run" / METRICS).exists()
                return super().latents(index, frames)

        run = training_run.Run(given, trainer.accelerator_for(given), ft.model(), Stopping())
        run.stopping = False
        done = run.go(resume=False)
        assert done.folder is None
        assert "stopped, --resume goes on" in page(tmp_path / "run").text
        assert not any(line.startswith("use it") for line in done.lines)
        ft.train(given, resume=True)
        found = page(tmp_path / "run")
        assert "complete" in found.text
        assert "5 of 5" in found.text
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_a_strip(self, tmp_path):
        video = np.zeros((17, 8, 400, 3), np.uint8)
        video[:, :, :, 0] = np.arange(17)[:, None, None] * 15
        write_strip(video, tmp_path / "00.frames.jpg")
        assert read_numbers(tmp_path / "00.frames.jpg") == [0, 3, 6, 10, 13, 16]
        with Image.open(tmp_path / "00.frames.jpg") as strip:
            assert strip.size == (6 * 200 + 5 * 4, 4)
            seen = [strip.getpixel((204 * i + 100, 2))[0] for i in range(6)]
        assert np.allclose(seen, [0, 45, 90, 150, 195, 240], atol=6)


class TestCurves:
    STAGES = ((0, "9 frames"), (60, "17 frames"))

    def test_places(self):
        line = Line("loss", [(0, 1.0), (50, 2.0), (100, 3.0)], "main")
        chart = draw_chart("Loss", [line], steps=100, stages=self.STAGES, mark=line)
        points = [
            tuple(map(float, p)) for p in re.findall(r"([\d.]+) ([\d.]+)", chart.lines[0].path)
        ]
        assert [x for x, _ in points] == [0, BOX / 2, BOX]
        assert points[0][1] > points[1][1] == BOX / 2 > points[2][1]
        assert chart.start == pytest.approx(points[0][1] / 10, abs=0.1)
        assert [(band.left, band.width) for band in chart.bands] == [(0, 60), (60, 40)]
        assert {tick.label for tick in chart.up} == {"1", "2", "3"}

    def test_what_is_not_finite_is_left_out(self):
        line = Line("norm", [(1, float("nan")), (2, float("inf")), (3, 1.0)], "main")
        chart = draw_chart("Norm", [line], steps=3, stages=self.STAGES)
        assert chart.lines[0].dots == [(100, 50)]
        assert draw_chart("Norm", [line._replace(points=[])], steps=3, stages=()) is None
        assert running_mean([1.0, float("nan"), 3.0], 0.5) == [1.0, 1.0, 2.0]

    def test_many_points_are_thinned_with_their_peaks(self):
        points = [(i, 5.0 if i == 7777 else float(i % 2)) for i in range(10_000)]
        chart = draw_chart("Loss", [Line("", points, "main")], steps=10_000, stages=())
        assert chart.lines[0].path.count("L") < 450
        top = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", chart.lines[0].path))
        assert top == pytest.approx(BOX * 0.06 / 1.12, abs=1)
