"""`gen-accel tune`, and what it wrote in the other verbs, on a tiny pipeline."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import wan
from support.wan import FRAMES, GRID, HEIGHT, WIDTH
from typer.testing import CliRunner

from gen_accel import Mixed, Piecewise, Radial, Rule, VideoShape, demo
from gen_accel.attention_processors.attached.recipe import sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.cli import app
from gen_accel.measure import pictures, read_video
from gen_accel.measure.cost import estimate
from gen_accel.measure.cost.model import subject_of
from gen_accel.parsing import brief
from gen_accel.pipelines.generation import generate
from gen_accel.pipelines.long_video import apply_rule
from gen_accel.pipelines.tuning import OtherThanTuned, read_preset, tune_model
from gen_accel.pipelines.tuning import preset as presets
from gen_accel.pipelines.tuning.config import TuneConfig
from gen_accel.pipelines.tuning.preset import MadeFor, NotMeasured, Preset, write_preset

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
SIZES = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH)
HERE = ("--device", "cpu", "--kernel", "gather")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, prompts, and the preset that `gen-accel tune` made of them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tune")
    wan.pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a cat\n\na dog\n")
    given = ("--prompts", folder / "prompts.txt", *SIZES, *HERE, "--steps", 3, "--seed", 2)
    asked = ("--quality", 40, "--cost", "density", "--out", folder / "preset.json")
    words = map(str, ("tune", "--model", folder / "model", *given, *asked))
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, done.output
    (folder / "said.txt").write_text(done.stdout)
    (folder / "progress.txt").write_text(done.stderr)
    return folder


def solved(folder: Path) -> Mixed:
    return read_preset(folder / "preset.json").method


def test_tune_writes_a_preset_and_says_what_it_found(home):
    names = sorted(path.name for path in home.glob("preset*"))
    profiled = [name for name in names if re.fullmatch(r"preset\.[0-9a-f]{8}\.safetensors", name)]
    assert names == [*profiled, "preset.json", "preset.safetensors"]
    found = read_preset(home / "preset.json")
    said = (home / "said.txt").read_text()
    assert found.method.steps == 3
    assert found.made_for.grid == GRID
    assert found.made_for.call == {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    assert found.bound == {"mean": 40.0, "objective": "psnr"}
    assert found.made_by["seed"] == 2
    assert found.made_by["prompts"] == ["a cat"]
    assert found.made_by["held_out"] == ["a dog"]
    for words in (f"density {found.density:.3f}", "held-out prompts: mean", "verified", "taken"):
        assert words in said
    assert str(home / "preset.json") in "".join(said.split())
    told = (home / "progress.txt").read_text()
    for stage in (
        "scout",
        "masses 1/1",
        "profile 1/1",
        "weights 3/3",
        "seconds 1/1",
        "verify",
        "hold out 1/1",
    ):
        assert stage in told


def test_a_preset_is_solved_anew_without_a_model(run, home, tmp_path):
    given = ("tune", "--preset", home / "preset.json", "--overwrite")
    out = tmp_path / "new.json"
    for asked, steps in (
        (("--quality", 30), 3),
        (("--steps", 6), 6),
        (("--quality", 30, "--steps", 6), 6),
    ):
        said = run(*given, *asked, "--out", out).stdout
        assert "not verified" in said
        found = read_preset(out)
        assert found.method.steps == steps
        assert not found.verified
        assert found.bound["mean"] == (30 if "--quality" in asked else 40)
    assert (tmp_path / "new.safetensors").is_file()
    before = read_preset(home / "preset.json").predicted
    run(*given, "--quality", 30, "--out", out)
    assert read_preset(out).predicted > before
    # Beyond all that the score tells, in both directions.
    run(*given, "--quality", "-1e9", "--out", out)
    assert read_preset(out).density < 0.2
    run(*given, "--quality", "1e4", "--out", out)
    assert read_preset(out).density == 1


REFUSED = {
    "model and preset": (("--preset", "P", "--model", "demo", "--steps", 2), "--preset goes with"),
    "nothing to solve": (("--preset", "P"), "for --quality, --steps or both"),
    "onto itself": (("--preset", "P", "--steps", 2, "--out", "P"), "is read, as --preset"),
    "a name": (("--preset", "fast", "--steps", 2), "only a file can be solved again"),
    "no model": (("--prompts", "T"), "give --model and --prompts"),
    "no prompts": (("--model", "demo"), "give --model and --prompts"),
    "words of the demo": (("--model", "demo", "--prompts", "T"), "does not know 'cat'"),
    "held out": (("--model", "M", "--prompts", "T", "--held-out", "no.txt"), "no.txt"),
    "suffix": (("--model", "M", "--prompts", "T", "--out", "a.yaml"), "must end in .json"),
    "number": (("--model", "M", "--prompts", "T", "--quality", "nan"), "quality must be finite"),
    "minutes": (("--model", "M", "--prompts", "T", "--minutes", 0), "minutes must be above 0"),
    "steps": (("--model", "M", "--prompts", "T", "--steps", 0), "steps must be from 1 to 1000"),
    "objective": (
        ("--model", "M", "--prompts", "T", "--objective", "psn"),
        "must be one of psnr, latent_error",
    ),
    "no error": (("--model", "M", "--prompts", "T", "--objective", "latent_error"), "--quality"),
    "cost": (("--model", "M", "--prompts", "T", "--cost", "watts"), "seconds, density"),
    "scale": (("--model", "M", "--prompts", "T", "--scale", "median"), "mean, even, worst"),
}


@pytest.mark.parametrize(("args", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_tuned_is_refused(refused, home, no_loading, tmp_path, args, words):
    places = {"P": home / "preset.json", "M": home / "model", "T": home / "prompts.txt"}
    given = [places.get(one, one) for one in args]
    out = () if "--out" in args else ("--out", tmp_path / "out.json")
    assert words in refused("tune", *given, *out)
    assert not list(tmp_path.iterdir())


def test_sizes_that_the_model_cannot_make_are_refused(refused, home, tmp_path):
    given = ("--model", home / "model", "--prompts", home / "prompts.txt", "--frames", 10)
    line = refused("tune", *given, "--height", 80, "--width", 80, "--out", tmp_path / "p.json")
    assert "frames must be 1 more than a multiple of 4, got 10" in line


def test_guidance_and_positions_of_a_lora_are_tuned_with(home, monkeypatch, tmp_path):
    from support import finetuning as ft

    fields = {"method": "radial", "settings": (), "stages": ("13:1:riflex",)}
    ft.train(ft.config(tmp_path / "run", **fields))
    pipe, seen = wan.pipeline(), []

    class Tuning:
        def __init__(self, pipe, prompts, held_out, call, options, *others):
            with pytest.raises(ValueError, match="rule"):  # it has one already
                apply_rule(pipe.transformer, "riflex", frames=4, trained=3)
            seen.append((call, options))

        def go(self):
            return "found"

    loaded = []
    monkeypatch.setattr(tune_model, "load", lambda model, loading: loaded.append(loading) or pipe)
    monkeypatch.setattr(tune_model, "Tuning", Tuning)
    lora = tmp_path / "run" / "lora"
    given = {"model": str(home / "model"), "prompts": home / "prompts.txt", "from_lora": lora}
    clip = {"frames": 13, "height": 32, "width": 64, "steps": 3, "seed": 5}
    config = TuneConfig(**given, **clip, quality=20.0, out=tmp_path / "a.json")
    assert tune_model.tune_model(config) == "found"
    [(call, options)] = seen
    more = call.more
    assert (more["num_frames"], more["height"], more["width"]) == (13, 32, 64)
    assert (call.steps, call.seed, options.quality) == (3, 5, 20.0)
    assert "guidance_scale" not in more
    assert loaded[0].loras == (str(lora),)
    apply_rule(pipe.transformer, "riflex", frames=4, trained=3).remove()


@pytest.mark.parametrize("lora", [False, True])
def test_generate_by_a_preset(run, refused, home, tmp_path, monkeypatch, lora):
    preset, out = home / "preset.json", tmp_path / "a.gif"
    more = ()
    if lora:
        from support import finetuning as ft

        ft.train(ft.config(tmp_path / "run", method="radial", settings=(), stages=("9:1",)))
        more = ("--from-lora", tmp_path / "run" / "lora")
    model = ("generate", "--model", home / "model", "--prompt", "a hen", *SIZES, *HERE)
    with warnings.catch_warnings(record=True) as told:
        said = run(*model, "--preset", preset, *more, "--out", out)
    assert f"Mixed: {len(solved(home).rules)} rules for 3 steps" in said.stdout
    assert read_video(out).shape == (FRAMES, HEIGHT, WIDTH, 3)
    other = [one for one in told if issubclass(one.category, OtherThanTuned)]
    assert ["tuned for LoRAs none" in str(one.message) for one in other] == [True] * lora


def test_another_number_of_steps_is_refused_before_the_model_is_loaded(
    refused, home, no_loading, tmp_path
):
    preset = home / "preset.json"
    solve = f"was solved for 3 steps, not 4: gen-accel tune --preset {preset} --steps 4 --out"
    given = ("--preset", preset, "--steps", 4)
    model = ("--model", home / "model")
    for line in (
        refused("generate", *model, "--prompt", "a", *given, "--out", tmp_path / "a.gif"),
        refused("estimate", *model, *SIZES, *given),
        refused("demo", *given, "--out", tmp_path / "demo"),
    ):
        assert solve in line
    with pytest.raises(ValueError, match=r"solved for 3 steps, not 4"):
        generate.generate(home / "model", ["a"], out=tmp_path / "a.gif", preset=preset, steps=4)
    with pytest.raises(ValueError, match="takes the place of --method"):
        generate.generate(
            home / "model", ["a"], out=tmp_path / "a.gif", preset=preset, method=Radial()
        )


@pytest.mark.parametrize("verb", ["generate", "estimate", "show", "demo"])
def test_a_preset_takes_the_place_of_a_method(refused, home, no_loading, tmp_path, verb):
    grid = ("--frames", 2, "--height", 3, "--width", 4)
    given = {
        "generate": ("--model", home / "model", "--prompt", "a", "--out", tmp_path / "a.gif"),
        "estimate": ("--model", "wan", *SIZES),
        "show": grid,
        "demo": ("--out", tmp_path / "demo"),
    }[verb]
    method = ("radial",) if verb == "show" else ("--method", "radial")
    for wrong in (method, ("--set", "block=4")):
        line = refused(verb, *wrong, *given, "--preset", home / "preset.json")
        assert "takes the place of --method and --set" in line
    line = refused(verb, *given, "--preset", "balancd")
    assert "no preset at balancd; the names of presets are quality, balanced, fast" in line
    assert "is no preset" in refused(verb, *given, "--preset", home / "model" / "model_index.json")


def test_a_list_of_prompts_notices_another_preset_and_warns_once(run, home, tmp_path):
    out, preset = tmp_path / "a.gif", tmp_path / "preset.json"
    for path in home.glob("preset*"):  # with the profiles beside it
        shutil.copy(path, tmp_path)
    model = ("generate", "--model", home / "model", "--prompts", home / "prompts.txt", *HERE)
    size = ("--frames", 13, "--height", HEIGHT, "--width", WIDTH)
    given = (*model, *size, "--preset", preset, "--out", out)
    with pytest.warns(OtherThanTuned, match="tuned for grid") as told:
        run(*given)
    assert len(told) == 1
    record = json.loads((tmp_path / "a-000.gif.done.json").read_text())
    assert len(record["asked"]["preset"]) == 64
    assert "2 of 2 are done already" in run(*given).stderr
    held = json.loads(preset.read_text())
    held["rules"] = held["rules"][1:]
    preset.write_text(json.dumps(held))
    with pytest.warns(OtherThanTuned):
        assert "are done already" not in run(*given, "--overwrite").stderr


def test_a_named_preset_is_a_rule_that_warns_once(run, home, tmp_path):
    model = ("generate", "--model", home / "model", "--prompts", home / "prompts.txt", *HERE)
    size = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 3)
    with pytest.warns(NotMeasured, match="preset 'fast' is a rule") as told:
        said = run(*model, *size, "--preset", "fast", "--out", tmp_path / "a.gif")
    assert len(told) == 1
    assert brief(Piecewise(presets.RULES["fast"].critical, score="pooled")) in said.stdout
    assert "1 x dense (first steps), step 1" in said.stdout


def test_a_comparison_by_a_preset(run, home, tmp_path):
    model = ("generate", "--model", home / "model", "--prompt", "a cat", *SIZES, *HERE)
    out = tmp_path / "a.gif"
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherThanTuned)
        run(*model, "--seed", 2, "--preset", home / "preset.json", "--compare", "--out", out)
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["method"] == repr(solved(home))
    assert report["steps"] == 3
    # The same prompt and seed as those that it was tuned on; files of 256 colours differ a little.
    measured = read_preset(home / "preset.json").measured["tuning"][0]["score"]
    assert float(report["psnr_db"]) == pytest.approx(measured, abs=0.1)


def test_an_estimate_by_a_preset_counts_its_dense_steps(run, home):
    given = ("estimate", "--model", home / "model", *SIZES, "--efficiency", 0.8)
    said = run(*given, "--preset", home / "preset.json").stdout
    assert "3 steps" in said
    rules = (Rule(Radial(decay_factor=0.2), layers=(0,), steps=(0, 2)),)
    sizes = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "efficiency": 0.8}
    config = wan.transformer().config | {"_class_name": "WanTransformer3DModel"}
    found = estimate.estimate(config, Mixed(rules, 4), steps=4, **sizes)
    assert found.sparse_share == 2 / 8
    assert found.density == Radial(decay_factor=0.2).density(VideoShape(*GRID))
    one = (Rule(Radial(decay_factor=0.2), layers=(0,), heads=(1,), steps=(0, 2)),)
    half = estimate.estimate(config, Mixed(one, 4), steps=4, **sizes)
    assert half.density == pytest.approx((found.density + 1) / 2)
    dense = {"schedule": Schedule(dense_steps=4), "steps": 4, **sizes}
    assert estimate.estimate(config, Mixed(rules, 4), **dense).speedup == 1
    with pytest.warns(NotMeasured, match="is a rule for this model"):
        run(*given, "--preset", "balanced")


def test_show_draws_rules_as_a_table(run, refused, home):
    said = run("show", "--preset", home / "preset.json").stdout
    assert "layer 0" in said
    assert "measured on 1 tuning prompts" in said
    assert max(map(len, said.splitlines())) <= 80
    one = run("show", "--preset", home / "preset.json", "--layer", 1).stdout
    assert "layer 0" not in one
    assert "at least 0" in refused("show", "--preset", home / "preset.json", "--layer", -1)
    grid = ("--frames", 2, "--height", 3, "--width", 4)
    assert "--layer" in refused("show", "radial", *grid, "--layer", 1)
    assert "dense_start=0.2" in run("show", *grid).stdout, "the default"
    assert "--frames" in refused("show", "radial")
    with pytest.warns(NotMeasured):
        assert "dense_start=0.2" in run("show", "--preset", "balanced", *grid).stdout


def test_show_draws_the_frontier_of_a_preset(run, refused, home, tmp_path):
    picture = tmp_path / "preset.png"
    said = run("show", "--preset", home / "preset.json", "--out", picture).stdout
    assert said.splitlines()[-1] == str(picture)
    with Image.open(picture) as found:
        assert found.width > found.height > 500
    picture.unlink()
    line = refused("show", "--preset", home / "preset.json", "--out", picture, "--token", "0,0,0")
    assert "leave --token out" in line


def test_a_preset_by_name_is_the_same_to_all_verbs(run, refused, tmp_path, monkeypatch):
    """What was tuned for a model, at the sizes that it was tuned for; the rule at others."""
    rules = Mixed((Rule(Radial(decay_factor=0.2), layers=(3,), steps=(1, 2)),), 2)
    call = {"num_frames": 65, "height": 96, "width": 96}
    for name, loras in (("demo", ()), ("demo_long", ("abc-100",))):
        write_demo_preset(tmp_path / f"{name}-balanced.json", rules, loras=loras, **call)
    monkeypatch.setattr(presets, "BUNDLED_PRESETS", tmp_path)
    given = ("show", "--preset", "balanced", "--model")
    said = run(*given, "demo", "--frames", 65).stdout
    assert said.count("layer 3") == 1
    assert "LoRAs" not in said
    for frames, method in ((65, rules), (33, Piecewise(0.2)), (None, Piecewise(0.2))):
        sized = () if frames is None else ("--frames", frames)
        for verb in (("estimate",), ("generate", "--plan"), ("show",)):
            found = json.loads(run(*verb, "--model", "demo", *sized, "--json", "-").stdout)
            found = found[0] if isinstance(found, list) else found
            if verb == ("show",) and method == rules:
                assert found["rules"][0]["layers"] == [3]
            else:
                assert found["method"] == str(method), (verb, frames)
    clip = ("--frames", 5, "--height", 48, "--width", 64)
    with pytest.warns(NotMeasured):
        assert "dense_start=0.2" in run(*given, "Wan2.1-T2V-1.3B", *clip).stdout
    line = refused(*given, "Wan2.1-T2V-1.3B", "--layer", 1)
    assert "balanced is a rule for Wan2.1-T2V-1.3B at this size" in line


def test_a_table_of_rules():
    video = VideoShape(5, 12, 12)
    sparse, denser = Radial(decay_factor=0.2), Piecewise(0.2, tile=(1, 8, 8))
    rules = (
        Rule(sparse, layers=(0, 1, 3), heads=(0, 1), steps=(1, 4)),
        Rule(denser, layers=(0, 1, 3), heads=(2,), steps=(3, 5)),
        Rule(denser, layers=(2,), steps=(0, 5)),
    )
    R, P = (f"{k}{round(100 * m.density(video)):02d}" for k, m in (("R", sparse), ("P", denser)))
    text = pictures.rules_text(Mixed(rules, 5), video, heads=4).splitlines()
    assert text[:5] == [
        "layers 0-1, 3",
        "  steps       0 1-2   3   4",
        f"  heads 0-1 --- {R} {R} ---",
        f"  head 2    --- --- {P} {P}",
        "  head 3    --- --- --- ---",
    ]
    assert text[5:8] == ["layer 2", "  steps     0-4", f"  all heads {P}"]
    assert text[8] == "R radial, P piecewise; the number: token pairs kept, in %"
    many = tuple(Rule(sparse, heads=(i % 3,), steps=(i, i + 1)) for i in range(50))
    wide = pictures.rules_text(Mixed(many, 50), video)
    assert wide.startswith("all layers\n")
    assert max(map(len, wide.splitlines())) <= 80
    assert wide.count("  steps ") > 2


def write_demo_preset(path, rules, *, loras=(), **call):
    """A preset of the embedded model, for 5 frames, or as the call has it."""
    scheduler = {"class": "UniPCMultistepScheduler", "config": {}}
    model = sizes(subject_of(demo.path()).model)
    made_for = MadeFor(model, (2, 12, 12), call, scheduler, (1.0, 0.5, 0.0), "float32", loras)
    write_preset(path, Preset(rules, made_for, {}, 0.5, 0.5, 0.1))


@pytest.mark.nightly
def test_the_demo_by_a_preset(run, tmp_path):
    """Its rules are for two steps, after one of which the warm-up ends."""
    rules = Mixed((Rule(Radial(decay_factor=0.2), heads=(1,), steps=(1, 2)),), 2)
    write_demo_preset(tmp_path / "p.json", rules)
    given = ("--frames", 5, "--without-lora", "--preset", tmp_path / "p.json")
    run("demo", *given, "--out", tmp_path / "demo")
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["method"] == repr(rules)
    assert report["steps"] == 2
    assert read_video(tmp_path / "demo" / "sparse.mp4").shape == (5, 96, 96, 3)


@pytest.mark.nightly
@pytest.mark.skipif(
    not demo.image_prompt_path().is_dir(),
    reason="the demo model's image prompt is not trained yet",
)
def test_the_demo_with_an_image_by_a_preset(run, refused, tmp_path):
    rules = Mixed((Rule(Radial(decay_factor=0.2), heads=(1,), steps=(1, 2)),), 2)
    write_demo_preset(tmp_path / "p.json", rules)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    given = ("demo", "--frames", 5, "--image-prompt", tmp_path / "red.png", "--preset")
    run(*given, tmp_path / "p.json", "--out", tmp_path / "tuned")
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert report["method"] == repr(rules)
    assert report["steps"] == 2
    assert read_video(tmp_path / "tuned" / "sparse.mp4").shape == (5, 96, 96, 3)
    with pytest.warns(NotMeasured, match="preset 'fast' is a rule"):
        run(*given, "fast", "--steps", 2, "--out", tmp_path / "rule")
    report = json.loads((tmp_path / "rule" / "report.json").read_text())
    assert report["method"].startswith("Piecewise(critical=0.1")
