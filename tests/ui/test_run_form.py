"""The form of a run without a browser: its words, its values, and what it refuses to queue."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

import gradio
import numpy as np
from safetensors.numpy import save_file
from support.fake_worker import PLAN

from gen_accel.cli.estimate import EstimateConfig
from gen_accel.cli.metrics import MetricsConfig
from gen_accel.cli.show import ShowConfig
from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.generation.config import BUNDLED_PRESETS, GenerateConfig
from gen_accel.pipelines.tuning.config import TuneConfig
from gen_accel.registry import PRESETS, RULES
from gen_accel.ui import choices
from gen_accel.ui.choices import loras_in
from gen_accel.ui.files import Places
from gen_accel.ui.form import words_of
from gen_accel.ui.page import progress_box
from gen_accel.ui.queue import RUNNING, Outlook, QueuedJob
from gen_accel.ui.screens import generate
from gen_accel.ui.screens.generate import ELSEWHERE, RunForm
from gen_accel.ui.worker import Refused

# Words of a command line: a flag, a verb, a placeholder, Python's name of a class.
FOREIGN = re.compile(r"--[a-z]|gen-accel|module:|may be repeated|\b[A-Z]{3,}'s|Without")
# Fields that no form shows.
HIDDEN = {GenerateConfig: ELSEWHERE, ShowConfig: ("extend",)}
FORMS = (GenerateConfig, TrainConfig, MetricsConfig, EstimateConfig, ShowConfig, TuneConfig)


@pytest.fixture
def made(tmp_path):
    """Makes a form of a page with these models, and keeps what the page is asked and queues."""

    def made(*models, refuses="", **about):
        def known(verb, options):
            page.asked.append(options)
            if refuses:
                raise Refused(refuses)
            return [{"num_frames": 81, "height": 480, "width": 832, "steps": 50}]

        def submit(verb, options, **about):
            page.queued.append((options, about))
            return SimpleNamespace(id=str(len(page.queued)))

        page: Any = SimpleNamespace(
            models=models,
            places=Places(tmp_path),
            tab=gradio.Textbox(),
            asked=[],
            queued=[],
            questions=SimpleNamespace(known=known),
            queue=SimpleNamespace(submit=submit),
        )
        form = RunForm(page, "gen", **{"start": {}, **about})
        return form, page

    with gradio.Blocks():
        yield made


def entered(form, page, **changed):
    """Values of the components as the page opens, but for some fields."""
    held = {one: one.value for one in form.inputs} | {page.tab: "a tab"}
    return {**held, **{form.parts[name]: value for name, value in changed.items()}}


@pytest.mark.parametrize("config", FORMS)
def test_a_form_has_no_words_of_the_command_line(config):
    fields = config.options()
    told = {name: " ".join(words_of(one)) for name, one in fields.items() if name != "prompt"}
    shown = {name: text for name, text in told.items() if name not in HIDDEN.get(config, ())}
    assert not {name: text for name, text in shown.items() if FOREIGN.search(text)}


def test_an_empty_field_says_what_it_is_then(made):
    form, page = made("models/wan")
    for name in ("frames", "height", "width", "steps", "guidance_scale", "fps", "max_tokens"):
        part = form.parts[name]
        assert (part.value or None) is None, name
        assert part.placeholder.startswith("the model's own"), name
        assert "Default" not in (part.info or "")
    held = entered(form, page)
    assert form.asked(held)[0] == {
        "model": "models/wan",
        "prompt": [generate.PROMPTS[""][0]],
        "preset": "balanced",
    }


def test_what_the_plan_refuses_is_not_queued_and_said_in_the_words_of_the_form(made):
    form, page = made("models/wan", refuses="it needs a last frame: give --last-image LAST.png")
    with pytest.raises(Refused, match=r"^it needs a last frame: give Last image$"):
        form.submit(entered(form, page), "generate")
    assert page.queued == []
    long = "x" * 10_001
    for prompt, said in {" \n": "write a prompt", long: "prompt must have at most"}.items():
        with pytest.raises(ValueError, match=f"^{said}"):
            form.submit(entered(form, page, prompt=prompt), "generate")
    for count in (0, 17, 1.5):
        with pytest.raises(ValueError, match=f"from 1 to 16, got {count}$"):
            form.submit(entered(form, page) | {form.count: count}, "generate")
    assert page.queued == []
    said = form.worded("num_frames must be int or none, got 1.5; such as frames: 8")
    assert said == "Frames must be a whole number, got 1.5"
    assert form.worded("leave --method and --set out") == "leave Method and Options out"


def test_a_model_that_waits_for_a_picture_says_so_quietly_beside_its_own_sizes(made, tmp_path):
    index = {"_class_name": "WanImageToVideoPipeline", "transformer": ["diffusers", "x"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    channels = {"in_channels": 36, "out_channels": 16}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(channels))
    form, page = made(str(tmp_path))
    asked = []

    def known(verb, options):
        asked.append(verb)
        if verb == "generate":
            raise Refused("it makes a video from a first frame: give --image FIRST.png")
        return PLAN

    page.questions.known = known
    shown = form.told(entered(form, page))
    assert "ga-hint" in shown[form.line]
    assert "a first frame: give Image" in shown[form.line]
    sizes = {"frames": "81", "height": "480", "width": "832", "steps": "50", "seconds": "10.1"}
    for name, value in sizes.items():
        assert shown[form.parts[name]]["placeholder"] == value, name
    given = form.told(entered(form, page, image="first.png"))
    assert "ga-why" in given[form.line]
    assert asked == ["generate", "estimate", "generate"]


def test_the_first_model_is_chosen_and_the_embedded_one_is_last(tmp_path):
    from gen_accel.ui.app import Server

    with Server(tmp_path, models=["demo", "org/wan"], page=False, command=("false",)) as server:
        assert server.models == ("org/wan", "demo")


def test_seeds_follow_one_another_and_a_random_one_is_kept(made, monkeypatch):
    form, page = made("demo", many=True)
    held = entered(form, page, seed=7) | {form.count: 3}
    assert form.submit(held, "generate").id == "1"
    assert [options["seed"] for options, _ in page.queued] == [7, 8, 9]
    assert page.queued[1][1]["title"].endswith(", seed 8")
    monkeypatch.setattr(generate, "randrange", lambda most: most - 1)
    form.submit(entered(form, page) | {form.random: True}, "generate")
    assert page.queued[-1][0]["seed"] == 2**31 - 1
    shown = form.filled(page.queued[-1][0])
    assert (shown[form.parts["seed"]], shown[form.random]) == (2**31 - 1, False)


def test_a_size_of_the_menu_is_found_again(made):
    form, _ = made("models/wan")
    for size, words in {"1280x720": "1280x720", "1280x704": "custom", "": ""}.items():
        width, height = size.split("x") if size else (None, None)
        shown = form.filled({"model": "models/wan", "height": height, "width": width})
        assert shown[form.size] == words
    assert [value for _, value in generate._sizes("demo")] == ["", "custom"]
    assert generate.menu_of((16, 16)) == generate.MENU
    changed = dict(generate.menu_of((32, 32)).items() - generate.MENU.items())
    assert changed == {"720p, 16:9": "1280x704", "720p, 9:16": "704x1280"}


def test_a_menu_has_the_sizes_that_a_model_makes(made):
    form, page = made("models/ltx")
    held = entered(form, page) | {form.multiples: form.multiples.value}
    menu = form._menu({"multiples": [32, 32]}, held)
    assert ("720p, 16:9 (1280 x 704)", "1280x704") in menu[form.size]["choices"]
    assert menu[form.multiples] == [32, 32]
    typed = {form.parts["height"]: "704", form.parts["width"]: "1280", form.multiples: [32, 32]}
    assert form._menu({"multiples": [32, 32]}, held | typed)[form.size]["value"] == "1280x704"
    chosen = {form.size: "custom", form.multiples: [32, 32]}  # before a side is typed
    assert form._menu({"multiples": [32, 32]}, held | chosen) == {}


def test_loras_have_weights(made, tmp_path):
    form, page = made("models/wan")
    assert form.loras._listed(page)[form.loras.chosen]["info"] == choices.NO_LORA
    shown = form.filled({"model": "models/wan", "lora": ["a/style:0.8", "b.safetensors"]})
    held = entered(form, page) | {one: x for one, x in shown.items() if one in form.loras.parts}
    for i, (one, weight) in enumerate(zip(form.loras.weights, (0.8, 1, 1), strict=False)):
        assert shown[one].get("visible") is (i < 2)
        held[one] = weight
    assert form.asked(held)[0]["lora"] == ["a/style:0.8", "b.safetensors"]
    after = form.loras._of_choice(held | {form.loras.chosen: ["b.safetensors", "c:1"]})
    assert [after[one]["value"] for one in form.loras.weights[:2]] == [1.0, 1]
    # The sliders follow the choice later than a quick press.
    chosen = {**held, form.loras.chosen: ["b.safetensors", "c:1", "a/style"]}
    assert form.loras.texts(chosen) == ["b.safetensors", "c:1:1", "a/style:0.8"]


def test_loras_are_found_by_what_they_hold(tmp_path):
    for name, key in {
        "style/pytorch_lora_weights": "x.lora_A.weight",
        "vae": "conv.weight",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({key: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    save_file({"lora_unet_a.lora_down.weight": np.zeros(1)}, tmp_path / "kohya.safetensors")
    (tmp_path / "broken.safetensors").write_text("no")
    assert loras_in([tmp_path, tmp_path / "nope"]) == [
        ("kohya.safetensors", str(tmp_path / "kohya.safetensors")),
        ("style", str(tmp_path / "style")),
    ]


def test_what_a_preset_loses_is_what_its_file_records():
    told = choices.what_presets_lose()
    for name in PRESETS:
        file = json.loads((BUNDLED_PRESETS / f"demo-{name}.json").read_text())
        held_out = [one["score"] for one in file["measured"]["held_out"]]
        mean, worst = round(np.mean(held_out)), round(min(held_out))
        assert f"{name.capitalize()} {mean} dB on average, {worst} at worst" in told
        words = choices.CHOICES[name]
        assert words == f"{name.capitalize()}, {round(100 * RULES[name].critical)} %"


@pytest.mark.parametrize(("fps", "said"), [(16.0, "81 frames, 5.1 s<"), (None, "81 frames<")])
def test_the_line_below_the_form_tells_the_clip_that_is_made(fps, said):
    shown = re.sub(r"\s*<", "<", generate.plan_line({**PLAN, "fps": fps}))
    assert f"832 x 480, {said}" in shown


@pytest.mark.parametrize(
    ("tokens", "about", "said"),
    [
        (5_000, {}, "speed 1.4x as fast density 0.20 time 30 s to 44 s"),
        (1_296, {}, "speed no gain at this size density 0.20 time 30 s to 44 s"),
        (5_000, {"is_dense": True}, "time 30 s to 44 s"),
        (5_000, {"compares": True}, "speed 1.4x as fast density 0.20 time 80 s to 2 min"),
    ],
)
def test_the_line_below_the_form_tells_what_the_press_costs(tokens, about, said):
    line = generate.plan_line({**PLAN, "tokens": tokens}, **about)
    facts = [re.sub("<.*?>", "", x) for x in line.split("<span>")[2:-1]]
    assert " ".join(facts) == said


def test_a_warning_is_no_stage_of_a_job():
    notes = ("loading the model", "warning: a preset is a rule")
    job = QueuedJob("20260101-000000-000000", "generate", {}, state=RUNNING, notes=notes)
    assert "loading the model" in progress_box(job, Outlook())
    assert "warning" not in progress_box(job, Outlook())


def test_a_stream_goes_without_what_the_page_begins_with(made):
    form, page = made("demo", many=True, start={"preview": 2})
    held = entered(form, page, stream=True, zones="window=3", prompt="a red circle\n30: a square")
    assert form.asked(held)[0] == {
        "model": "demo",
        "prompt": ["a red circle", "30: a square"],
        "stream": True,
        "zones": "window=3",
    }
    assert "stream" not in made("demo")[0].parts  # of Compare and Longer
    line = generate.stream_line(
        {
            "frames": 1000,
            "frames_per_chunk": 12,
            "frames_per_second": [5.0, 10.0],
            "fps": 16.0,
            "seconds": {"chunk": [1.2, 2.4], "frame": [0.1, 0.2]},
            "peak_bytes": [4e9, 5e9],
            "fits": False,
            "device": "a card",
            "keys": 32_760,
        }
    )
    shown = re.sub(r"\s*<[^>]*>\s*", " ", line)
    for words in (
        "1,000 frames, 12 a chunk",
        "5 to 10 frames a second, plays at 16",
        "2 min to 3 min",
        "5 GB, constant",
        "does not fit",
    ):
        assert words in shown, shown
