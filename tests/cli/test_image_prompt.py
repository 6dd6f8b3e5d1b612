"""Image prompts on the command line, and the demo with an image."""

import json
import re

import numpy as np
import pytest
import torch
from demo_model import clips
from PIL import Image
from support import image_adapters, wan

from gen_accel import Radial, VideoShape, demo
from gen_accel.attention_processors.image_prompt import new_adapter
from gen_accel.demo import job, page, world
from gen_accel.demo.detector import detect
from gen_accel.measure import read_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.sampling import Clip
from gen_accel.pipelines.image_prompt.formats import base_of, write_adapter
from gen_accel.pipelines.image_prompt.projectors import Linear, Pixels

PROMPT = "something moves right slowly"
SMALL = ("--frames", "5", "--height", "48", "--width", "48", "--steps", "2")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image") / "model"
    wan.pipeline().save_pretrained(folder)
    return folder


def written(folder, projector, variant, **metadata):
    """An adapter that does something."""
    transformer = wan.transformer()
    made = new_adapter(transformer, projector, variant=variant)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    write_adapter(folder, made, {**base_of(transformer), **metadata})
    return folder


def projector(kind, **sizes):
    torch.manual_seed(0)
    return kind(width=wan.HEADS * wan.HEAD_DIM, tokens=4, **sizes)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image") / "adapter"
    return written(folder, projector(Pixels, channels=(8, 8)), "pixels", image_size=16)


@pytest.fixture
def pictures(tmp_path):
    """Two images, and a mask of the left half."""
    half = np.zeros((24, 24), np.uint8)
    half[:, :12] = 255
    made = {"red": Image.new("RGB", (20, 16), "red"), "blue": Image.new("RGB", (9, 9), "blue")}
    made["mask"] = Image.fromarray(half)
    paths = {name: tmp_path / "pictures" / f"{name}.png" for name in made}
    (tmp_path / "pictures").mkdir()
    for name, image in made.items():
        image.save(paths[name])
    return paths


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_help_teaches(run):
    shown = run("generate", "--help").stdout
    for option in ("prompt", "adapter", "scale", "negative", "mask", "encoder"):
        assert f"--image-{option}" in shown
    assert "--image-adapter outputs/lora/image_prompt --image-scale 0.8" in shown
    assert "gen-accel demo --image-prompt red_triangle.png" in run("demo", "--help").stdout


def test_demo_is_a_name_of_the_command_line_alone(refused, model, tmp_path, monkeypatch):
    assert demo.model_named("demo") == str(demo.path())
    assert demo.adapter_named("demo") == str(demo.image_prompt_path())
    assert demo.model_named("./demo") == demo.adapter_named("./demo") == "./demo"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    Image.new("RGB", (8, 8)).save("a.png")
    args = ("generate", "--model", model, "--prompt", PROMPT, "--image-prompt", "a.png")
    assert str(demo.image_prompt_path()) in refused(*args, "--image-adapter", "demo")
    assert "no image-prompt adapter in demo" in refused(*args, "--image-adapter", "./demo")


@pytest.mark.slow
def test_generate_by_an_image(run, model, adapter, pictures, tmp_path):
    def video(name, *args):
        out = tmp_path / name
        args = ("--prompt", PROMPT, *args, "--method", "dense", "--out", out)
        shown = run("generate", "--model", model, *SMALL, *args).stdout
        return read_video(out), shown

    seen = ("--image-adapter", adapter, "--image-prompt", pictures["red"])
    plain, shown = video("plain")
    assert "image prompt" not in shown
    red, shown = video("red", *seen)
    assert "pixels, 4 tokens an image, 2 of 2 attentions of WanTransformer3DModel" in shown
    assert "1 image; scale 1.0" in shown
    assert (red != plain).any()
    assert (video("off", *seen, "--image-scale", "0")[0] == plain).all()
    several = ("--image-prompt", pictures["blue"], "--image-scale", "0.5")
    masks = ("--image-mask", pictures["mask"], "--image-negative", pictures["blue"])
    both, shown = video("both", *seen, *several, *masks)
    assert "2 images, masked; scale 0.5" in shown
    assert (both != red).any()
    assert (both != plain).any()


@pytest.mark.slow
def test_each_part_of_the_input_counts(model, adapter, pictures, tmp_path):
    clip = Clip(frames=5, height=48, width=48, steps=2)
    made = {}
    for name, options in {
        "one": {},
        "two": {"image_prompt": (pictures["red"], Image.open(pictures["blue"]))},
        "negative": {"image_negative": pictures["blue"]},
        "mask": {"image_mask": (pictures["mask"],)},
        "own masks": {
            "image_prompt": (pictures["red"], pictures["red"]),
            "image_mask": (pictures["mask"], Image.new("RGB", (24, 24), "white")),
        },
    }.items():
        given = {"image_prompt": (pictures["red"],), "image_adapter": adapter} | options
        [one] = generate(
            model,
            [PROMPT],
            out=tmp_path / name,
            method=Radial(),
            **clip.given(),
            **given,
        )
        assert f"{len(given['image_prompt'])} image" in one.image
        made[name] = read_video(one.files["video"])
    names = [*made]
    for i, name in enumerate(names):
        for other in names[:i]:
            assert (made[name] != made[other]).any(), (name, other)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_an_image_acts_on_weights_of_8_bits(how, pictures, tmp_path):
    """As on the demo's own weights: nearer to them than to the clip without the image."""
    clip = Clip(frames=5, height=48, width=48, steps=2).given()
    seen = {"image_prompt": pictures["red"], "image_adapter": "demo"}

    def video(name, **options):
        given = {"method": "radial", "out": tmp_path / name} | clip | options
        [one] = generate("demo", [PROMPT], **given)
        assert one.summary.density is not None  # it was sparse
        return read_video(one.files["video"]).astype(float)

    own, plain, held = video("own", **seen), video("plain"), video("held", quantize=how, **seen)
    moved, off = (abs(one - own).mean() for one in (plain, held))
    assert 0 < off < moved


@pytest.mark.slow
def test_a_comparison_and_latents_say_what_image_there_was(
    run, model, adapter, pictures, tmp_path
):
    seen = ("--image-adapter", adapter, "--image-prompt", pictures["red"])
    args = ("--prompt", PROMPT, *seen, "--compare", "--out", tmp_path / "clip.mp4")
    shown = run("generate", "--model", model, *SMALL, *args).stdout
    report = json.loads((tmp_path / "clip.json").read_text())
    assert report["image_prompt"] in shown
    assert "1 image; scale 1.0" in report["image_prompt"]
    kept = tmp_path / "clip.safetensors"
    args = ("--prompt", PROMPT, *seen, "--save-latents", kept, "--out", tmp_path / "clip.png")
    run("generate", "--model", model, *SMALL, *args)
    assert report["image_prompt"].encode() in kept.read_bytes()


@pytest.mark.slow
def test_the_encoder_is_that_of_the_adapter_or_the_one_given(model, pictures, tmp_path):
    vision = image_adapters.vision()
    vision.save_pretrained(tmp_path / "clip")
    image_adapters.extractor().save_pretrained(tmp_path / "clip")
    linear = projector(Linear, embedding=vision.config.projection_dim)
    named = written(tmp_path / "a", linear, "base", image_encoder=str(tmp_path / "clip"))
    unnamed = written(tmp_path / "b", linear, "base")

    def video(adapter, **options):
        options |= {"method": Radial(), "frames": 5, "height": 48, "width": 48, "steps": 1}
        options |= {"image_prompt": (pictures["red"],), "image_adapter": adapter}
        out = tmp_path / "clip.mp4"
        options |= {"out": out, "overwrite": True}
        return read_video(generate(model, [PROMPT], **options)[0].files["video"])

    assert (video(named) == video(unnamed, image_encoder=tmp_path / "clip")).all()
    with pytest.raises(ValueError, match=r"WanPipeline has no image_encoder: give image_encoder="):
        video(unnamed)


REFUSED = {
    "no adapter": (("--image-prompt", "{red}"), ("--image-adapter", "got --image-prompt alone")),
    "no image": (("--image-adapter", "{adapter}"), ("got --image-adapter alone",)),
    "scale alone": (("--image-scale", "0"), ("--image-prompt", "got --image-scale alone")),
    "mask alone": (("--image-mask", "{mask}"), ("got --image-mask alone",)),
    "nothing there": (
        ("--image-prompt", "{red}.jpg", "--image-adapter", "{adapter}"),
        ("no image at", "red.png.jpg"),
    ),
    "text": (
        ("--image-prompt", "{text}", "--image-adapter", "{adapter}"),
        ("text.png is no image",),
    ),
    "text for a mask": (
        *(("--image-prompt", "{red}", "--image-adapter", "{adapter}", "--image-mask", "{text}"),),
        ("text.png is no image",),
    ),
    "masks": (
        (
            "--image-prompt",
            "{red}",
            "--image-adapter",
            "{adapter}",
            *["--image-mask", "{mask}"] * 2,
        ),
        ("masks must be one, or one for each of 1 images, got 2",),
    ),
    "scale": (
        ("--image-prompt", "{red}", "--image-adapter", "{adapter}", "--image-scale", "inf"),
        ("image_scale must be finite, got inf",),
    ),
    "adapter": (
        ("--image-prompt", "{red}", "--image-adapter", "{red}.none"),
        ("no adapter at", "red.png.none"),
    ),
    "no adapter file": (
        ("--image-prompt", "{red}", "--image-adapter", "{text}"),
        ("an adapter is a .safetensors or .bin file, got text.png",),
    ),
}


@pytest.mark.parametrize(("args", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_prompt_is_refused(
    refused, no_loading, model, adapter, pictures, tmp_path, args, words
):
    text = tmp_path / "pictures" / "text.png"
    text.write_text("not a picture")
    names = {**pictures, "adapter": adapter, "text": text}
    given = [arg.format(**names) for arg in args]
    out = ("--out", tmp_path / "out" / "clip.mp4")
    line = refused("generate", "--model", model, "--prompt", PROMPT, *given, *out)
    assert all(word in line for word in words), line
    assert files(tmp_path) == [f"pictures/{name}.png" for name in ("blue", "mask", "red", "text")]


class TestDemo:
    """With a tiny model and an untrained adapter."""

    @pytest.fixture(autouse=True)
    def embedded(self, adapter, monkeypatch):
        monkeypatch.setattr(demo, "image_prompt_path", lambda: adapter)

    @pytest.mark.slow
    def test_what_it_writes(self, run, model, tmp_path):
        still = tmp_path / "still.png"
        scene = world.Scene("red", "triangle", "right", "slowly")
        clips.picture(scene, 3).save(still)
        out = tmp_path / "out"
        args = ("--model", model, "--frames", "9", "--steps", "2", "--out", out)
        shown = run("demo", "--image-prompt", still, *args).stdout
        names = ["contact_sheet.png", "dense.mp4", "mask.png", "race.mp4"]
        names += ["report.html", "report.json", "side_by_side.mp4", "sparse.mp4"]
        assert files(out) == names
        assert all(name in "".join(shown.split()) for name in names)
        report = json.loads((out / "report.json").read_text())
        assert report["prompt"] == PROMPT
        assert (report["frames"], report["steps"]) == (9, 2)
        assert report["image"] == str(still)
        assert report["detector"]["image"] == "a red triangle"
        assert "pixels, 4 tokens" in report["image_prompt"]
        assert report["density"] == pytest.approx(Radial().density(VideoShape(3, 6, 6)))
        assert read_video(out / "dense.mp4").shape == (9, 96, 96, 3)
        beside = read_video(out / "side_by_side.mp4")
        assert len(beside) == 9
        assert beside.shape[2] > 3 * 96 * 2
        left = beside[0, :, : 96 * 2].astype(int)  # the image is left of both clips
        red = (left[..., 0] > 180) & (left[..., 1:] < 110).all(-1)
        assert red.sum() > 300
        page = (out / "report.html").read_text()
        assert "The detector says of the image: a red triangle." in page
        assert not re.search(r"<(script|link|iframe)", page)

    @pytest.mark.slow
    def test_the_image_decides(self, model, tmp_path):
        made = []
        for color in ("red", "blue"):
            image = Image.new("RGB", (8, 8), color)
            report, written = job.run(
                tmp_path / color, image=image, model=model, frames=5, steps=1
            )
            assert report["image"] == "a picture in memory"
            assert report["detector"]["image"] == page.UNKNOWN
            made.append(read_video(written["dense"]))
        assert (made[0] != made[1]).any()

    def test_the_notes(self):
        shows = {"shows": "a red circle moves right slowly"}
        detector = {"image": "a red circle", "dense": shows, "sparse": shows}
        report = {"prompt": PROMPT, "detector": detector, "frames": 33, "tokens": 1296, "steps": 2}
        report |= {"method": "Radial()", "busy": "others ran", "density": None}
        report |= {"dense_seconds": 2.0, "sparse_seconds": 1.0, "attention_seconds": None}
        report["image_prompt"] = "pixels, 4 tokens an image"
        assert "show what the image shows: dense, sparse." in " ".join(page.notes(report))
        other = report | {"detector": detector | {"image": "a blue circle"}}
        assert "show what the image shows: none." in " ".join(page.notes(other))
        unknown = report | {"detector": detector | {"image": page.UNKNOWN}}
        assert "only ever seen single coloured shapes" in " ".join(page.notes(unknown))

    def test_what_is_refused(self, refused, no_loading, model, tmp_path, monkeypatch):
        text = tmp_path / "text.txt"
        text.write_text("a red triangle")
        still = tmp_path / "still.png"
        Image.new("RGB", (8, 8)).save(still)
        out = tmp_path / "out"
        args = ("demo", "--model", model, "--out", out, "--image-prompt")
        assert "text.txt is no image" in refused(*args, text)
        assert "no image at" in refused(*args, tmp_path / "none.png")
        assert "--with-lora" in refused(*args, still, "--with-lora")
        assert "Dense()" in refused(*args, still, "--method", "dense")
        assert "the prompt is empty" in refused(*args, still, "--prompt", " ")
        monkeypatch.setattr(demo, "image_prompt_path", lambda: tmp_path / "gone")
        line = refused(*args, still)
        assert str(tmp_path / "gone") in line
        assert "gen-accel train configs/image_prompt/demo.yaml" in line
        assert files(tmp_path) == ["still.png", "text.txt"]


@pytest.mark.nightly
@pytest.mark.skipif(
    not demo.image_prompt_path().is_dir(),
    reason="the demo model's image prompt is not trained yet",
)
def test_the_embedded_adapter_shows_what_the_image_shows(tmp_path):
    scene = world.Scene("red", "triangle", "right", "slowly")
    still = clips.picture(scene, 3)
    report, written = job.run(tmp_path, image=still, steps=6)
    assert report["detector"]["image"] == "a red triangle"
    assert detect(read_video(written["dense"])).color == "red"
