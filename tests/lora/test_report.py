"""The page of a training, and its last lines."""

import base64
import io
import re
import shutil
import signal
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support import finetuning as ft
from support import wan

from gen_accel.lora import trainer
from gen_accel.lora.evaluate import write_strip
from gen_accel.lora.report import METRICS, REPORT
from gen_accel.lora.state import TrainingState

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
    @pytest.mark.slow
    def test_what_it_holds(self, seen):
        out, _ = seen
        found = page(out)
        for words in (
            *("Training of my run", "complete", "4 of 4", "held-out loss", "seconds a step"),
            *("step 0 on the left, step 4 on the right", PROMPT, "a blue circle"),
            *("gen-accel generate --model demo", f"--from-lora '{out / 'lora'}'"),
            "--frames 9 --height 32 --width 64",
        ):
            assert words in found.text, words
        assert "validate_every: 2" in found.text

    @pytest.mark.slow
    def test_a_run_that_samples_no_more_keeps_its_samples(self, seen, tmp_path):
        out = shutil.copytree(seen[0], tmp_path / "on")
        shutil.rmtree(out / "lora")
        held = {"loss_every": 2, "held_out": 2, "max_tokens": 16}
        ft.train(ft.config(out, stages=("9:2", "9:3:riflex"), **held), resume=True)
        found = page(out)
        assert "5 of 5" in found.text
        assert "step 0 on the left, step 4 on the right" in found.text
        assert PROMPT in found.text

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

    @pytest.mark.slow
    def test_without_videos_and_losses(self, tmp_path):
        done = ft.train(ft.config(tmp_path / "run", log_with="tensorboard"))
        found = page(tmp_path / "run")
        assert "Samples" not in found.text
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

        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), Stopping())
        run.stopping = False
        done = run.train(resume=False)
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
        with Image.open(tmp_path / "00.frames.jpg") as strip:
            assert strip.info["comment"] == b"0,3,6,10,13,16"
            assert strip.size == (6 * 200 + 5 * 4, 4)
            seen = [strip.getpixel((204 * i + 100, 2))[0] for i in range(6)]
        assert np.allclose(seen, [0, 45, 90, 150, 195, 240], atol=6)
