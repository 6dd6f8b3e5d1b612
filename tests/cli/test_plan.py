"""Verbs that say what a run will cost, and what there is: their width, their JSON, refusals."""

import json
import re
import time

import pytest
from typer.testing import CliRunner

import gen_accel.demo
from gen_accel.cli.app import app
from gen_accel.cli.printing import terminal_width
from gen_accel.measure.cost import rates
from gen_accel.measure.machine import ExternalLoad

CLIP = ("--frames", "33", "--height", "96", "--width", "96")
HUGE = ("--frames", "161", "--height", "720", "--width", "1280")
VERBS = {
    "doctor": ("doctor",),
    "list": ("list",),
    "models": ("models",),
    "models of a family": ("models", "wan"),
    "models of a published name": ("models", "Wan2.1-T2V-14B"),
    "models of a refused class": ("models", "SanaTransformer2DModel"),
    "estimate": ("estimate", "--model", "demo", *CLIP, "--efficiency", "0.7"),
    "estimate with a curve": (
        *("estimate", "--model", "demo", *CLIP, "--efficiency", "0.7", "--gpu", "4090", "--curve"),
    ),
    "estimate of a stream": (
        *("estimate", "--model", "Wan2.1-T2V-1.3B", "--stream", "--gpu", "4090"),
        *("--frames", "1000", "--guidance-scale", "1"),
    ),
    "techniques": ("show", "--model", "demo", "--frames", "129", "--extend", "riflex"),
    "estimate for a card": (
        *("estimate", "--model", "Wan2.2-T2V-A14B", "--gpu", "4090", "--offload", "model"),
        *("--frames", "81", "--height", "480", "--width", "832"),
    ),
    "show": ("show", "neighborhood", "--frames", "5", "--height", "12", "--width", "12"),
    "show of pixels": ("show", "radial", "--model", "demo", *CLIP),
    "generate": ("generate", "--model", "demo", *CLIP, "--plan", "--steps", "20"),
}


@pytest.fixture(autouse=True)
def quiet_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ExternalLoad, "busy", lambda self: None)
    monkeypatch.setattr(rates, "measure_rates", lambda *args: dict.fromkeys(rates.KINDS, 5e10))
    monkeypatch.setattr("gen_accel.measure.cost.rates.measure_efficiency", lambda *args: 0.8)


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_lines_fit_a_terminal_of_80_columns(run, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(*VERBS[verb]).stdout
    assert shown.strip()
    wide = [line.strip() for line in shown.splitlines() if len(line) > 80]
    assert [line for line in wide if " " in line] == []  # a path is not broken


def test_a_wider_terminal_is_used(monkeypatch):
    monkeypatch.setenv("COLUMNS", "132")
    assert terminal_width() == 132
    monkeypatch.delenv("COLUMNS")
    assert terminal_width() == 80, "where the output is no terminal"


@pytest.mark.turns(3)
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "generate"])
def test_json_on_standard_output_is_alone(run, verb):
    data = json.loads(run(*VERBS[verb], "--json", "-").stdout)
    assert data


@pytest.mark.slow
def test_json_in_a_file_comes_beside_the_lines(run, tmp_path):
    out = tmp_path / "cost.json"
    shown = run(*VERBS["estimate for a card"], "--json", out).stdout
    assert "does not fit into 24 GB" in " ".join(shown.split())
    held = json.loads(out.read_text())
    assert held["device"] == "NVIDIA GeForce RTX 4090"
    assert held["peak_bytes"]["none"][0] > held["peak_bytes"]["model"][0] > 24e9
    assert held["fits"] is False
    assert held["fits_with"] == "group"
    low, high = held["seconds"]["dense_total"]
    assert 0 < low < high
    assert [part["name"] for part in held["parts"]][:2] == ["transformer", "transformer_2"]


@pytest.mark.slow
def test_a_plan_is_of_the_run_that_the_options_describe(run, tmp_path):
    """Frames, steps, method and schedule come from the options of `generate`; nothing is made."""
    out = tmp_path / "clip.mp4"
    args = ("--model", "demo", "--prompt", "a red circle moves right", *CLIP, "--out", out)
    args += ("--method", "neighborhood", "--set", "window=5,12,12", "--dense-start", "0.25")
    planned = run("generate", *args, "--steps", "20", "--plan").stdout
    estimated = run(
        *("estimate", "--model", "demo", *CLIP, "--method", "neighborhood"),
        *("--set", "window=5,12,12", "--dense-start", "0.25", "--steps", "20"),
    ).stdout
    free = re.compile(r"into [\d.]+ GB")  # memory, which changes meanwhile
    assert free.sub("", planned) == free.sub("", estimated)
    assert "20 steps" in planned
    assert "75%" in planned
    assert not out.exists()


@pytest.mark.slow
def test_a_plan_of_a_stream_is_of_its_lora(run):
    """Its chunks, and guidance held in it; what is of a whole clip is refused."""
    args = ("--model", "demo", "--stream", "--gpu", "4090", "--frames", "1000")
    planned = run("generate", *args, "--plan").stdout
    assert "chunks of 3 latent frames, the last 2" in planned
    assert "6 steps and a pass into the cache" in " ".join(planned.split())
    assert "1,000 frames:" in planned
    for flag, value in (("--dense-start", "0.2"), ("--method", "radial"), ("--efficiency", "1")):
        refused = run("estimate", *args, flag, value, code=2).stderr
        assert f"{flag} is of a whole clip, got --stream too" in refused


@pytest.mark.slow
def test_a_plan_needs_no_prompt_and_takes_the_defaults_of_the_pipeline(run):
    shown = run("generate", "--model", "demo", "--plan", "--gpu", "h100").stdout
    assert "demo, 33 frames of 96 x 96" in shown
    assert "20 steps" in shown
    assert "NVIDIA H100" in shown
    words = " ".join(shown.split())
    assert "below about 4,000 tokens sparse attention gains nothing" in words
    assert "pays off from" not in words or int(words.split("pays off from ")[1].split()[0]) > 33


@pytest.mark.slow
def test_a_model_has_a_run_of_its_own(run, tmp_path):
    """By its name; of a folder, of its pipeline's call; what is asked wins."""
    shown = run("estimate", "--model", "Wan2.1-T2V-14B", "--gpu", "4090").stdout
    assert "Wan2.1-T2V-14B, 81 frames of 480 x 832" in shown
    assert "50 steps" in shown
    shown = run("estimate", "--model", "HunyuanVideo", "--gpu", "h100", "--seconds", "2").stdout
    assert "HunyuanVideo, 49 frames of" in shown  # 24 a second
    refused = run("estimate", "--model", "demo", "--frames", "5", "--seconds", "2", code=2)
    assert "seconds 2 take the place of frames 5: leave one of the two out" in refused.stderr
    shown = run("estimate", "--model", "demo", "--gpu", "4090", "--frames", "65").stdout
    assert "demo, 65 frames of 96 x 96" in shown
    (tmp_path / "mine").symlink_to(gen_accel.demo.path())
    shown = run("estimate", "--model", tmp_path / "mine", "--gpu", "4090").stdout
    assert "81 frames of 480 x 832" in shown
    shown = run("show", "radial", "--model", "demo").stdout
    assert (
        shown == run("show", "radial", "--frames", "9", "--height", "12", "--width", "12").stdout
    )


@pytest.mark.slow
def test_a_plan_of_unguided_calls_takes_half(run):
    shown = [
        run("generate", "--model", "demo", *CLIP, "--plan", "--guidance-scale", scale).stdout
        for scale in ("1", "5")
    ]
    assert "one call a step" in shown[0]
    assert "with guidance" in shown[1]


def test_a_plan_loads_no_weights(run, monkeypatch):
    from diffusers import DiffusionPipeline

    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    assert "tokens" in run("generate", "--model", "demo", *CLIP, "--plan").stdout


def test_a_plan_refuses_what_the_run_would(refused):
    assert "'radail'" in refused("generate", "--model", "demo", "--plan", "--method", "radail")
    line = refused("generate", "--model", "demo", "--plan", "--frames", "34")
    assert "nearest: 33 or 37" in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("estimate", "--model", "wan", *HUGE, "--gpu", "h10"), "did you mean 'h100'?"),
        (("generate", "--model", "demo", "--plan", "--gpu", "409"), "did you mean '4090'?"),
        (("generate", "--model", "demo", "--gpu", "4090"), "--gpu 4090 is for --plan"),
        (("estimate", "--model", "wan", *HUGE, "--offload", "some"), "offload must be one of"),
        (("show", "radial", *HUGE), "148,377,600 tokens: sizes are tokens here; 161 x 720 x 1280"),
        (("show", "radial", *HUGE), "are 41 x 45 x 80: add --model wan"),
        (("show", "radial", "--model", "wna", *HUGE), "did you mean 'wan'?"),
        (("models", "wna"), "did you mean 'wan'?"),
        (("list", "--json", "/proc/nowhere/a.json"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(refused, args, said):
    assert said in refused(*args)


def test_pixels_of_a_model_are_its_tokens(run):
    tokens = ("--frames", "9", "--height", "12", "--width", "12")
    assert (
        run("show", "radial", "--model", "demo", *CLIP).stdout
        == run("show", "radial", *tokens).stdout
    )


@pytest.mark.slow
def test_a_large_grid_is_drawn_at_once(run):
    """161 frames of 720 x 1280 of Wan, of which the picture is drawn smaller."""
    run("show", "radial", "--model", "wan", *CLIP[:2], "--height", "480", "--width", "832")
    start = time.process_time()
    shown = run("show", "radial", "--model", "wan", *HUGE).stdout
    assert time.process_time() - start < 10
    assert "41 x 45 x 80 = 147600 tokens" in shown
    assert len(shown.splitlines()) < 60


def test_models_are_one_line_each(run):
    lines = run("models").stdout.splitlines()
    [wan_line] = [line for line in lines if line.startswith("  wan ")]
    assert wan_line.split()[-4:] == ["9", "yes", "yes", "yes"]
    assert "Wan 2.1 and 2.2, VACE" in wan_line
    shown = run("models", "wan").stdout
    for words in ("WanVACETransformer3DModel", "Wan2.1-T2V-1.3B", "to_q, to_k, to_v, to_out.0"):
        assert words in shown
    assert "WanVACE" not in run("models", "WanTransformer3DModel").stdout
    assert "linear, without" in " ".join(run("models", "SanaTransformer2DModel").stdout.split())


def test_a_missing_device_is_said_once(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("list").stdout.lower().count("no cuda device") == 1


def test_completion_is_there():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "--install-completion" in shown
    script = CliRunner().invoke(
        app,
        [],
        prog_name="gen-accel",
        env={"_GEN_ACCEL_COMPLETE": "complete_bash"}
        | {"COMP_WORDS": "gen-accel est", "COMP_CWORD": "1"},
    )
    assert "estimate" in script.stdout
