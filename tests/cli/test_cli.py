"""Every verb of the command line, on a tiny pipeline with random weights."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import pytest
import torch
from demo_model.train import Denoiser, new_autoencoder, new_tokenizer
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import gen_accel
from gen_accel import (
    METHODS,
    BlockMixture,
    Neighborhood,
    Radial,
    SparseLinear,
    VideoShape,
    demo,
)
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.cli import app
from gen_accel.demo import job
from gen_accel.kernels.reference import pairs
from gen_accel.measure import machine, pictures, read_video, video_io
from gen_accel.pipelines.generation import compare, loading, sampling

PROMPT = job.PROMPT
SMALL = ("--frames", "9", "--height", "48", "--width", "48", "--steps", "2")
GRID = ("--frames", "5", "--height", "12", "--width", "12")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Like the demo model, in half precision, but with two layers and no training."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    denoiser = Denoiser()
    denoiser.transformer.blocks = denoiser.transformer.blocks[:2]
    denoiser.transformer.register_to_config(num_layers=2)
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.05)
    pipe = WanPipeline(
        tokenizer=new_tokenizer(),
        text_encoder=denoiser.text_encoder,
        vae=new_autoencoder(),
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder)
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_help_has_an_example_of_every_verb(run):
    verbs = re.findall(r"^  (\w+) ", run("--help").stdout.split("Commands:")[1], re.MULTILINE)
    assert verbs == [
        "demo",
        "generate",
        "tune",
        "show",
        "estimate",
        "metrics",
        "list",
        "models",
        "build",
        "doctor",
        "push",
        "export",
        "assemble",
        "ui",
        "serve",
        "train",
        "cache",
    ]
    for verb in verbs:
        assert f"  gen-accel {verb}" in run(verb, "--help").stdout


def test_help_of_generate_says_where_models_and_rates_come_from(run):
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", run("generate", "--help").stdout).split())
    assert "any diffusers video pipeline of `gen-accel models`" in text
    assert "Default: the model's own." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code"),
    [("--help", 0), ("generate --help", 0), ("--version", 0), ("nope", 2), ("demo --nope", 2)],
)
def test_help_and_usage_errors_do_not_wait_for_torch(args, code):
    without = "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None)"
    program = f"{without}; from gen_accel.cli import main; main()"
    command = [sys.executable, "-c", program, *args.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code, result.stderr


@pytest.mark.slow
def test_every_public_name_is_found_when_asked_for():
    for name in dir(gen_accel):
        getattr(gen_accel, name)
    assert set(gen_accel.__all__) <= set(dir(gen_accel))
    with pytest.raises(AttributeError, match="atach"):
        gen_accel.atach  # noqa: B018


def test_version(run):
    assert run("--version").stdout.strip() == f"gen-accel {gen_accel.__version__}"


@pytest.mark.slow
def test_generate_mp4_with_a_comparison(run, model, tmp_path):
    out = tmp_path / "new" / "clip.mp4"
    args = ("--prompt", PROMPT, "--dense-steps", "1", "--compare", "--timed", "--out", out)
    result = run("generate", "--model", model, *SMALL, *args)
    names = ["clip.dense.mp4", "clip.json", "clip.mp4", "clip.side_by_side.mp4"]
    assert files(out.parent) == names
    assert all(name in result.stdout for name in names)
    report = json.loads((out.parent / "clip.json").read_text())
    video = VideoShape(3, 6, 6)
    assert report["tokens"] == video.tokens
    assert report["method"].startswith("Piecewise(critical=0.2,"), "the default"
    assert report["settings"]["ran"]["method"] == "piecewise"
    assert 0.2 < report["density"] < 1
    assert report["speedup"] == pytest.approx(report["dense_seconds"] / report["sparse_seconds"])
    assert float(report["psnr_db"]) > 10
    assert report["ssim"] <= 1
    if "vmaf_missing" not in report:
        assert 0 <= report["vmaf_lowest"] <= report["vmaf"] <= 100
        assert f"{report['vmaf']:.1f} of 100" in result.stdout
    assert report["enlarged"] == 6
    assert not {"cvvdp_jod", "cvvdp_missing"} & {*report}  # not asked for
    assert min(report["attention_seconds"].values()) > 0
    assert "dense_steps=1" in report["schedule"]
    assert (
        read_video(out).shape == read_video(out.parent / "clip.dense.mp4").shape == (9, 48, 48, 3)
    )


@pytest.mark.slow
def test_generate_each_prompt_of_a_file_as_a_gif(run, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\n  a blue square moves up slowly  \n", encoding="utf-8-sig")
    out = tmp_path / "clips" / "clip.gif"
    options = ("--method", "neighborhood", "--set", "window=-1,3,3", "--kernel", "reference")
    options += ("--dense-layers", "1", "--dense-kernel", "gather")
    result = run(
        "generate", "--model", model, *SMALL, "--prompts", prompts, *options, "--out", out
    )
    names = ["clip-000.gif", "clip-001.gif"]
    assert files(out.parent) == sorted([*names, *(f"{name}.done.json" for name in names)])
    assert "(seed 0, " in result.stdout
    assert "a blue square moves up slowly  (seed 1, " in result.stdout
    assert "kernel: gather, reference" in result.stdout
    first, second = (read_video(out.parent / name) for name in names)
    assert first.shape == second.shape == (9, 48, 48, 3)
    assert (first != second).any()


@pytest.mark.slow
def test_generate_frames_that_a_seed_repeats(run, model, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        args = ("--prompt", PROMPT, "--seed", seed, "--method", "dense", "--out", tmp_path / name)
        run("generate", "--model", model, *SMALL, *args)
    assert files(tmp_path / "a") == [f"{i:04d}.png" for i in range(9)]
    a, b, c = (read_video(tmp_path / name) for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.slow
def test_generate_with_a_lora(run, refused, model, tmp_path):
    from peft import LoraConfig

    pipe = WanPipeline.from_pretrained(model)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = {name: p for name, p in pipe.transformer.named_parameters() if "lora" in name}
    plain = {name.replace(".default", ""): p.detach() for name, p in layers.items()}
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=plain)
    made = []
    for lora in ((), ("--lora", tmp_path / "lora"), ("--lora", f"{tmp_path / 'lora'}:0.0")):
        args = ("--prompt", PROMPT, *lora, "--out", tmp_path / f"clip{len(made)}")
        run("generate", "--model", model, *SMALL, *args)
        made.append(read_video(tmp_path / f"clip{len(made)}"))
    assert (made[0] != made[1]).any()
    assert (made[0] == made[2]).all()
    args = ("--prompt", PROMPT, "--lora", tmp_path / "no", "--out", tmp_path / "x.mp4")
    assert str(tmp_path / "no") in refused("generate", "--model", model, *SMALL, *args)


def test_every_component_is_loaded_in_one_precision(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = loading.load(model, loading.Loading(dtype="float32", device="cpu"))
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


@pytest.mark.slow
def test_demo(run, model, tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--model", model, "--frames", "9", "--steps", "5", "--out", out)
    assert files(out) == [
        "contact_sheet.png",
        "dense.mp4",
        "mask.png",
        "race.mp4",
        "report.html",
        "report.json",
        "side_by_side.mp4",
        "sparse.mp4",
    ]
    for name in files(out):
        assert name in "".join(result.stdout.split())
    report = json.loads((out / "report.json").read_text())
    assert report["tokens"] == 3 * 12 * 12
    assert (report["frames"], report["steps"], report["seed"]) == (9, 5, job.SEED)
    assert report["prompt"] == PROMPT
    assert report["method"] == str(job.METHOD)
    assert report["density"] == pytest.approx(job.METHOD.density(VideoShape(3, 12, 12)))
    assert report["density"] + report["sparsity"] == pytest.approx(1)
    assert report["kernel"] == "gather"
    assert f"dense_start={job.DENSE_START}" in report["schedule"]
    assert report["speedup"] == pytest.approx(report["dense_seconds"] / report["sparse_seconds"])
    total = report["dense_total_seconds"] / report["sparse_total_seconds"]
    assert report["total_speedup"] == pytest.approx(total)
    assert 0 < report["attention_seconds"]["sparse"] < report["sparse_seconds"]
    assert min(report["dense_decode_seconds"], report["sparse_decode_seconds"]) > 0
    steps = report["steps_seconds"]
    assert [len(steps[name]) for name in ("dense", "sparse")] == [5, 5]
    assert sum(steps["dense"]) == pytest.approx(report["dense_seconds"])
    ratios = [a / b for a, b in zip(steps["dense"], steps["sparse"], strict=True)]
    assert report["speedup_of_steps"]["most"] == max(ratios)
    assert report["finished"] is True
    assert float(report["psnr_db"]) > 10
    assert 0.1 < report["ssim"] <= 1
    seen = report["detector"]
    assert seen["unchanged"] is (seen["dense"]["shows"] == seen["sparse"]["shows"])
    assert {"torch", "diffusers", "device", "threads"} <= report["environment"].keys()
    assert read_video(out / "dense.mp4").shape == (9, 96, 96, 3)
    assert Image.open(out / "mask.png").width > 800


@pytest.mark.nightly
def test_the_embedded_model_is_shown_with_its_lora_and_without(run, tmp_path):
    args = ("--prompt", "a red circle moves up slowly", "--frames", "5", "--steps", "1")
    result = run("demo", *args, "--out", tmp_path)
    assert "without its LoRA" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finished"] is True
    recipe = read_recipe(job.lora_path(guided=True))
    assert report["method"] == str(recipe.build_method())
    assert report["lora"]["trained_frames"] == demo.TRAINED_FRAMES
    assert report["lora"]["config"] == "configs/lora/demo_long.yaml"
    clips = [read_video(tmp_path / name) for name in ("dense.mp4", "without_lora.mp4")]
    assert [len(clip) for clip in clips] == [5, 5]
    assert "Without the LoRA the model showed: " in (tmp_path / "report.html").read_text()

    run("demo", *args, "--without-lora", "--method", "neighborhood", "--out", tmp_path / "plain")
    assert "without_lora.mp4" not in files(tmp_path / "plain")
    report = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert report["method"] == str(Neighborhood())
    assert "lora" not in report


@pytest.mark.slow
def test_demo_page_fetches_nothing(run, model, tmp_path):
    args = ("--frames", "5", "--steps", "1", "--method", "radial", "--set", "rule=paper")
    run("demo", "--model", model, *args, "--out", tmp_path)

    class Page(HTMLParser):
        sources: list = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "iframe")
            self.sources += [value for name, value in attrs if name in ("src", "href")]

    page, text = Page(), (tmp_path / "report.html").read_text()
    page.feed(text)
    assert len(page.sources) == 6
    assert all(source.startswith("data:") for source in page.sources)
    assert "PSNR" in text.split("In plain words")[0]
    assert "rule=&#39;paper&#39;" in text


@pytest.mark.slow
def test_compilation_is_not_counted(model, monkeypatch):
    """Whatever a kernel spends on it during the sparse run is taken off, and reported."""
    pipe = loading.load(model, loading.Loading(dtype="float32", device="cpu"))
    clip = sampling.filled(pipe, sampling.Clip(frames=5, height=48, width=48, steps=2))
    sample, compiled = compare.sample, 100.0

    def slow(*args, **kwargs):
        taken = sample(*args, **kwargs)
        compare.flex.compile_seconds.append(compiled)
        return sampling.Sample(taken.video, taken.denoise_seconds + compiled, taken.decode_seconds)

    monkeypatch.setattr(compare.flex, "compile_seconds", [])
    monkeypatch.setattr(compare, "sample", slow)
    result = compare.compare_with_dense(pipe, PROMPT, clip, method=Radial())
    assert result.compile_seconds == compiled
    assert 0 < result.sparse.denoise_seconds < compiled


def test_a_method_that_does_not_fit_a_short_clip_is_warmed_up_on_the_whole(model):
    pipe = loading.load(model, loading.Loading(dtype="float32", device="cpu"))
    clip = sampling.filled(pipe, sampling.Clip(frames=21, height=48, width=48, steps=2))
    for window, frames in ((5, 17), (6, 21)):
        warm = compare._warm_up_clip(pipe, clip, Neighborhood(window=(window, 3, 3)), None)
        assert (warm.frames, warm.steps) == (frames, 1)


def test_show_in_the_terminal(run):
    lines = run("show", "neighborhood", *GRID, "--set", "window=3,4,4").stdout.splitlines()
    keep = Neighborhood(window=(3, 4, 4)).plan(VideoShape(5, 12, 12)).keep[0, 0]
    first = next(i for i, line in enumerate(lines) if line.endswith("keys across:")) + 1
    assert any("density 0.067 (sparsity 0.933)" in line for line in lines[:first])
    drawn = [[(c in "▀█", c in "▄█") for c in line] for line in lines[first:]]
    rows = [[cell[half] for cell in line] for line in drawn for half in range(2)]
    assert rows[: len(keep)] == keep.tolist()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_show_says_where_data_or_the_layer_decide(run, method):
    shown = run("show", method, *GRID).stdout
    by_data = "block_mixture", "piecewise", "reuse", "sparse_linear", "vsa"
    assert ("smooth random q and k" in shown) == (method in by_data)
    assert ("layers differ" in shown) == (method == "block_mixture")


def test_show_of_one_partition_holds_for_all_layers(run):
    shown = run("show", "block_mixture", *GRID, "--set", "partition=3d").stdout
    assert "layers differ" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("method", [BlockMixture(), SparseLinear()])
def test_a_picture_says_that_data_decides(method, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    pictures.mask_picture(method, VideoShape(5, 12, 12), tmp_path / "mask.png")
    assert "smooth random q and k" in titles[0]


def test_show_fits_the_width_it_is_given():
    lines = pictures.mask_text(Radial(), VideoShape(65, 12, 12), 60).splitlines()
    assert max(map(len, lines)) <= 60
    text = lines[next(i for i, line in enumerate(lines) if line.endswith("across:")) + 1 :]
    assert len(text) == 30
    assert {len(line) for line in text} == {60}
    assert set("".join(text)) <= set(pictures.SHADES)


def test_show_as_a_picture(run, tmp_path):
    out = tmp_path / "new" / "mask.png"
    result = run("show", "radial", *GRID, "--token", "0,3,11", "--out", out)
    assert result.stdout.replace("\n", "") == str(out)
    assert Image.open(out).format == "PNG"
    assert files(tmp_path) == ["new/mask.png"]


@pytest.mark.parametrize(
    "method",
    [Radial(), Radial(rule="paper"), Neighborhood((3, 4, 3), dilation=(1, 2, 1))],
    ids=str,
)
@pytest.mark.parametrize("token", [(0, 0, 0), (4, 8, 9), (2, 3, 4)])
def test_the_row_of_one_token_is_that_of_the_whole_pattern(method, token):
    video = VideoShape(5, 9, 10, text=7)
    plan = method.plan(video)
    whole = pairs(plan)[0, 0][plan.places][:, plan.places]
    index = (token[0] * 9 + token[1]) * 10 + token[2]
    assert torch.equal(pictures.seen_by(method, video, token), whole[index])


def test_list(run):
    shown = run("list").stdout
    for word in ("radial", "decay_factor=1.0", "window=-1,8,8", "gen-accel models"):
        assert word in shown
    assert "no: FlexAttention has no backward on the CPU" in shown
    assert "code-2025-11" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", ["--help", *(pytest.param(v, marks=pytest.mark.nightly) for v in ("list", "doctor"))]
)
def test_a_reader_that_leaves_early_ends_the_program_quietly(verb):
    """Pipe `gen-accel list | head -1`."""
    program = [sys.executable, "-c", "from gen_accel.cli import main; main()", verb]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


@pytest.mark.parametrize("wheel", ["2.11.0", "2.11.0+cu128"])
def test_doctor(run, monkeypatch, wheel):
    """A wheel of torch need not carry the suffix that names its build, but torch itself does."""
    of_wheels = machine.metadata.version
    monkeypatch.setattr(
        machine.metadata,
        "version",
        lambda name: wheel if name == "torch" else of_wheels(name),
    )
    shown = run("doctor").stdout
    assert re.search(rf"^torch +{re.escape(torch.__version__)} *$", shown, re.MULTILINE)
    for name in (
        "diffusers",
        "peft",
        "triton",
        "xformers",
        "flash-attn-4",
        "natten",
        "C++ compiler",
        "CPU kernel",
        "int8 kernel",
        "ffmpeg",
        "CPU",
        "GPU",
    ):
        assert name in shown


def test_doctor_says_how_to_add_what_is_missing(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    shown = run("doctor").stdout
    assert re.search(r"C\+\+ compiler +missing", shown)
    assert "C++ compiler:\n  apt install g++" in shown
    assert "cpu, generating no: no C++ compiler" in run("list").stdout


@pytest.mark.slow
def test_estimate(run, model):
    args = ("--height", "96", "--width", "96", "--frames", "257", "--efficiency", "0.7")
    shown = run("estimate", "--model", model, *args, "--dense-start", "0.2").stdout
    assert "9360 tokens" in shown
    assert "speed-up" in shown
    assert "80%" in shown
    assert "These are figures of the CPU" in shown


def test_settings_become_fields():
    settings = ["window=3,8,-1", "is_causal=(true, no, 0)", "stride = 2,1,1"]
    assert method_from("neighborhood", settings) == Neighborhood(
        (3, 8, -1), stride=(2, 1, 1), is_causal=(True, False, False)
    )
    settings = ["rule=paper", "decay_factor=0.5", "sink=off", "block=64"]
    assert method_from("radial", settings) == Radial("paper", 0.5, False, 64)


RADIAL = ("--method", "radial")
BAD_OPTIONS = {
    "method": (("--method", "radail"), ("'radail'", "did you mean 'radial'")),
    "kernel": (("--kernel", "gatherer"), ("'gatherer'", "did you mean 'gather'")),
    "dense kernel": (
        ("--dense-kernel", "gatherer"),
        ("dense_kernel must be", "'gatherer'", "did you mean 'gather'"),
    ),
    "field": ((*RADIAL, "--set", "decay=2"), ("'decay'", "decay_factor", "did you mean")),
    "no value": ((*RADIAL, "--set", "sink"), ("'sink'", "field=value")),
    "bool": ((*RADIAL, "--set", "sink=maybe"), ("sink", "true/false", "'maybe'")),
    "int": ((*RADIAL, "--set", "block=1.5"), ("block", "int", "'1.5'")),
    "choice": ((*RADIAL, "--set", "rule=best"), ("rule", "balanced", "'best'")),
    "twice": ((*RADIAL, "--set", "block=1", "--set", "block=2"), ("block", "twice")),
    "value": ((*RADIAL, "--set", "block=0"), ("error: --set block=0: block", "at least 1")),
    "of no method": (("--set", "block=4"), ("--set 'block=4' is of a method: add --method",)),
    "tuple": (
        ("--method", "neighborhood", "--set", "window=3,x,3"),
        ("error: --set window=3,x,3: window", "int,int,int, got '3,x,3'; such as window=-1,8,8"),
    ),
    "length": (("--method", "neighborhood", "--set", "window=3,3"), ("int,int,int", "'3,3'")),
    "schedule": (("--dense-start", "5"), ("dense_start", "dense_steps")),
    "layers": (("--dense-layers", "a"), ("--dense-layers", "'a'")),
    "frames": (("--frames", "ten"), ("frames", "int", "'ten'")),
    "steps": (("--steps", "0"), ("steps", "from 1 to 10000, got 0")),
    "dtype": (("--dtype", "int8"), ("'int8'", "bfloat16")),
    "device": (("--device", "gpu"), ("'gpu'", "cuda")),
    "no such device": (
        ("--device", "mtia:0", "--plan", "--gpu", "h100"),
        ("'mtia:0'", "not there"),
    ),
    "prompt": (
        ("--prompt", "a" * 10_001),
        ("prompt must have at most 10,000", "10,001: 'aaa"),
    ),
    "negative": (
        ("--negative-prompt", "a" * 10_001),
        ("negative_prompt must have at",),
    ),
    "offload": (("--offload", "disk"), ("'disk'", "sequential")),
    "suffix": (("--out", "clip.avi"), ("clip.avi", ".mp4")),
    "fps": (("--fps", "0"), ("fps", "0.01")),
    "compare dense": (("--method", "dense", "--compare"), ("Dense()",)),
}


@pytest.mark.parametrize(("args", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(refused, model, no_loading, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    line = refused("generate", "--model", model, "--prompt", PROMPT, *args)
    assert all(word in line for word in words), line
    assert files(tmp_path) == []


def test_a_kernel_that_cannot_run_there_is_refused(refused, no_loading, tmp_path):
    given = ("--model", "demo", "--prompt", "a", "--out", tmp_path / "a.mp4")
    for option in ("--kernel", "--dense-kernel"):
        error = refused("generate", *given, option, "xformers", "--device", "cpu")
        assert "kernel 'xformers' cannot run on cpu: " in error


def test_a_prompt_that_the_embedded_model_does_not_know(refused, no_loading, tmp_path):
    said = "the demo model does not know 'cat' and 'surfs': it knows \"a COLOUR SHAPE moves"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A red circle moves left, slowly.\na cat surfs\n", encoding="utf-8")
    model = ("generate", "--model", "demo", "--out", tmp_path / "a.mp4")
    for line in (
        refused(*model, "--prompt", "A cat surfs left."),
        refused(*model, "--prompts", prompts),
        refused("demo", "--prompt", "a cat surfs", "--out", tmp_path),
        refused("demo", "--image-prompt", prompts, "--prompt", "a cat surfs", "--out", tmp_path),
    ):
        assert said in line
        assert "slowly or quickly" in line


@pytest.mark.slow
def test_the_embedded_model_goes_by_its_name(run, tmp_path):
    size = ("--frames", "5", "--height", "32", "--width", "32")
    assert "tokens" in run("estimate", "--model", "demo", *size).output
    out = tmp_path / "clip.gif"
    given = ("--model", "demo", "--prompt", "a red circle", "--steps", "1", "--out", out)
    run("generate", *given, *size)
    report = tmp_path / "clip.json"
    report.touch()
    again = run("generate", *given, *size, "--overwrite")
    assert f"of an earlier video: {report}\n" in again.stderr


def test_bad_models_are_refused(refused, no_loading, tmp_path):
    def line(model):
        return refused(
            "generate", "--model", model, "--prompt", PROMPT, "--out", tmp_path / "a.mp4"
        )

    assert "model_index.json" in line(tmp_path)
    assert str(tmp_path / "nothing") in line(tmp_path / "nothing")
    index = tmp_path / "model_index.json"
    index.write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    assert "makes images and no video" in line(tmp_path)
    index.write_text('{"transformer": ["diffusers", "AuraFlowTransformer2DModel"]}')
    assert "no family serves AuraFlowTransformer2DModel" in line(tmp_path)
    index.write_text("{")
    assert str(index) in line(tmp_path)
    assert files(tmp_path) == ["model_index.json"]


SIZES = {
    "frames": (("--frames", "10"), ("multiple of 4, got 10", "9 or 13")),
    "height": (("--height", "100"), ("height must be a multiple of 16, got 100", "96 or 112")),
    "width": (("--width", "8"), ("width must be a multiple of 16, got 8", "nearest: 16")),
    "window": (("--method", "neighborhood", "--set", "window=9,3,3"), ("3 frames", "at most 3")),
    "offload": (("--offload", "model", "--device", "cpu"), ("'model'", "GPU")),
}


@pytest.mark.parametrize(("args", "words"), SIZES.values(), ids=SIZES)
def test_what_the_model_cannot_make_is_refused(refused, model, monkeypatch, tmp_path, args, words):
    monkeypatch.setattr(WanTransformer3DModel, "forward", None)
    out = ("--out", tmp_path / "clip.mp4")
    line = refused("generate", "--model", model, "--prompt", PROMPT, *SMALL, *args, *out)
    assert all(word in line for word in words), line
    assert files(tmp_path) == []


def test_no_prompts_are_refused(refused, no_loading, model, tmp_path):
    out = ("--out", tmp_path / "clip.mp4")
    assert "prompts" in refused("generate", "--model", model, *out)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert str(empty) in refused("generate", "--model", model, "--prompts", empty, *out)
    empty.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused("generate", "--model", model, "--prompts", empty, *out)
    empty.write_text("a\n\n" + "b" * 10_001)
    said = refused("generate", "--model", model, "--prompts", empty, *out)
    assert f"prompt 2 of {empty} must have at most 10,000 characters, got 10,001: 'bbb" in said
    missing = tmp_path / "missing.txt"
    assert str(missing) in refused("generate", "--model", model, "--prompts", missing, *out)
    assert files(tmp_path) == ["empty.txt"]


def test_a_place_that_cannot_be_written_is_refused(refused, no_loading, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    args = ("generate", "--model", model, "--prompt", PROMPT, "--out")
    assert "is a file and no folder" in refused(*args, tmp_path / "file" / "clip.mp4")
    assert "is a file" in refused("demo", "--model", model, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_show_and_demo_are_refused(refused, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "mask.png")
    assert "'radail'" in refused("show", "radail", *GRID)
    assert "from 0 to 4, got 9" in refused("show", "radial", *GRID, "--token", "9,0,0", *out)
    assert "'1,2'" in refused("show", "radial", *GRID, "--token", "1,2", *out)
    assert "--out" in refused("show", "radial", *GRID, "--token", "1,2,3")
    assert ".png" in refused("show", "radial", *GRID, "--out", tmp_path / "mask.pdf")
    assert "at least 0" in refused("show", "radial", *GRID, "--text", "-1")
    assert "at most 5" in refused("show", "neighborhood", *GRID, "--set", "window=9,3,3")
    assert "nope" in refused("nope")
    assert "Dense()" in refused("demo", "--method", "dense", *out)
    assert "prompt" in refused("demo", "--prompt", " ", *out)
    monkeypatch.setattr(demo, "path", lambda: tmp_path / "model")
    assert str(tmp_path / "model") in refused("demo", *out)
    assert files(tmp_path) == []


def test_a_traceback_on_request():
    result = CliRunner().invoke(app, ["--traceback", "show", "radail", *GRID])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("verb", ["list", "show radail"])
def test_processes_of_a_launch_leave_their_group(tmp_path, verb):
    where = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        done = CliRunner().invoke(app, verb.split())
        assert torch.distributed.is_initialized() == (done.exit_code != 0)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "demo"])
def test_an_interrupted_run_leaves_no_clip(run, model, monkeypatch, tmp_path, verb):
    forward, calls = WanTransformer3DModel.forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == last:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    last = {"generate": 3, "demo": 7}[verb]  # of the demo, in the turn of the sparse one
    monkeypatch.setattr(WanTransformer3DModel, "forward", interrupted)
    args = {
        "generate": ("--prompt", PROMPT, *SMALL, "--out", tmp_path / "out" / "clip.mp4"),
        "demo": ("--frames", "5", "--steps", "2", "--out", tmp_path / "out"),
    }
    result = run(verb, "--model", model, *args[verb], code=130)
    assert result.stderr.strip().splitlines()[-1].startswith("interrupted")
    assert len(calls) == last
    left = {"generate": [], "demo": ["out/report.html", "out/report.json"]}[verb]
    assert files(tmp_path) == left


def test_an_interrupted_write_keeps_what_was_there(run, model, monkeypatch, tmp_path):
    def interrupted(frames, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(video_io, "encode", interrupted)
    (tmp_path / "clip.mp4").write_text("earlier")
    args = ("--prompt", PROMPT, *SMALL, "--out", tmp_path / "clip.mp4", "--overwrite")
    run("generate", "--model", model, *args, code=130)
    assert files(tmp_path) == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_text() == "earlier"
