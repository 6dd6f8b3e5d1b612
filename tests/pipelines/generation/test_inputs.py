"""Videos from frames and from other videos, by every family whose pipelines make them."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from support.inputs import as_class, frames_of, models, picture

from gen_accel import Dense, Neighborhood
from gen_accel.attention_processors.families.pipelines import choose_in, part_of, takes
from gen_accel.measure import read_video
from gen_accel.pipelines.generation import generate as module
from gen_accel.pipelines.generation.config import ConditioningFiles as Files
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.inputs import open_files
from gen_accel.pipelines.generation.loading import load
from gen_accel.pipelines.generation.plan import plan_of
from gen_accel.pipelines.generation.sampling import Clip, parameters

PROMPT, SEED = "a red square moves right", 3

CALLS = [(name, kind) for name, model in models().items() for kind in model.calls(model.size)]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the configs of pipelines, with the pipelines, made once each."""
    made = {}

    def find(name):
        if name not in made:
            pipe, folder = models()[name].build(), tmp_path_factory.mktemp("models") / name
            pipe.set_progress_bar_config(disable=True)
            pipe.save_config(folder)
            part = part_of(json.loads((folder / "model_index.json").read_text()))
            getattr(pipe, part).save_config(folder / part)
            made[name] = folder, pipe
        return made[name]

    return find


@pytest.fixture
def ready(folders, monkeypatch):
    """A folder whose pipeline is there already, of the class that is chosen."""

    def find(name, given):
        folder, pipe = folders(name)
        asked, strength = given.kinds, given.strength is not None
        own = as_class(pipe, choose_in(folder, asked, strength=strength))
        monkeypatch.setattr(module, "load", lambda *options, cache: own)
        return folder, own

    return find


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_the_video_is_that_of_the_pipeline_and_sparse_attention_sees_its_grid(
    ready, tmp_path, monkeypatch, name, kind
):
    model = models()[name]
    frames, height, width = model.size
    given, arguments = model.calls(model.size)[kind]
    folder, pipe = ready(name, given)
    known = parameters(pipe)
    sizes: dict[str, Any] = {"height": height, "width": width} if "height" in known else {}
    clip = Clip(frames=frames, steps=model.steps, seed=SEED, **sizes)

    def made(method):
        options: dict[str, Any] = {**clip.given(), **given.given(), "out": tmp_path / "video"}
        options["overwrite"] = True
        [one] = generate(folder, [PROMPT], method=method, **options)
        return one, read_video(one.files["video"])

    _, video = made(Dense())
    asked = {"num_frames": frames} if "num_frames" in known else {}
    torch.manual_seed(SEED)
    output = pipe(
        prompt=PROMPT,
        num_inference_steps=model.steps,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **(sizes | asked | arguments),
    )
    own = np.asarray(output.video if hasattr(output, "video") else output.frames[0])
    assert video.shape == (model.made.get(kind, frames), height, width, 3)
    if kind != "video":  # which may come before what is made
        row = takes(type(pipe).__name__)
        assert row is not None
        assert row.length(pipe, frames, arguments) == ({}, len(video))
    np.testing.assert_array_equal(video, (own * 255).round().astype(np.uint8))

    grids, call = set(), Neighborhood.__call__

    def seen(self, q, k, v, *, video, kernel):
        grids.add(video.grid)
        return call(self, q, k, v, video=video, kernel=kernel)

    monkeypatch.setattr(Neighborhood, "__call__", seen)
    sparse, other = made(Neighborhood(window=(-1, 2, 2)))
    assert model.grid(kind) in grids
    density = sparse.summary.density
    assert density is not None
    assert density < 1
    whys = {record.why_dense for record in sparse.summary.records.values()}
    assert whys - {"fills the cache"} == {None}
    assert other.shape == video.shape
    assert (other != video).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "chosen"),
    [
        ("wan", "text", "WanPipeline"),
        ("wan", "video", "WanVideoToVideoPipeline"),
        ("wan_token_timesteps", "first frame", "WanImageToVideoPipeline"),
        ("cogvideox", "video", "CogVideoXVideoToVideoPipeline"),
        ("ltx", "first frame", "LTXImageToVideoPipeline"),
        ("ltx", "last frame", "LTXConditionPipeline"),
        ("skyreels_forcing", "first frame", "SkyReelsV2DiffusionForcingImageToVideoPipeline"),
        ("animatediff_saved", "video", "AnimateDiffVideoToVideoPipeline"),
        ("motif", "first frame", "MotifVideoImage2VideoPipeline"),
    ],
)
def test_a_folder_is_loaded_as_the_class_that_is_needed(tmp_path, name, kind, chosen):
    model = models()[name.removesuffix("_saved")]
    build = model.build
    if name == "animatediff_saved":
        from pipelines.generation.test_generate_families import animated as build
    pipe = build()
    pipe.save_pretrained(tmp_path)
    given = model.calls(model.size)[kind][0]
    loaded = load(tmp_path, given=given)
    assert type(loaded).__name__ == chosen
    part = part_of(json.loads((tmp_path / "model_index.json").read_text()))
    before, after = (getattr(one, part).state_dict() for one in (pipe, loaded))
    assert before.keys() == after.keys()
    for weight, same in zip(before.values(), after.values(), strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=0)


@pytest.mark.slow
def test_a_video_of_ltx_is_made_anew_in_part(ready, tmp_path):
    """With a strength it is no condition, and the less of it, the nearer."""
    size = (9, 96, 64)
    still = frames_of(size, 1) * 9

    def made(strength):
        given = Files(video=still, strength=strength)
        folder, pipe = ready("ltx", given)
        assert type(pipe).__name__ == "LTXConditionPipeline"
        clip = Clip(height=96, width=64, steps=4, seed=SEED)
        options: dict[str, Any] = {**clip.given(), **given.given(), "out": tmp_path / "video"}
        options["overwrite"] = True
        [one] = generate(folder, [PROMPT], method=Dense(), **options)
        steps = {step for _, step in one.summary.records}
        return read_video(one.files["video"]).astype(float), len(steps)

    (little, few), (much, all_of_them) = made(0.25), made(1.0)
    assert little.shape == much.shape == (9, 96, 64, 3)
    assert (few, all_of_them) == (1, 4)
    assert (little != much).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan_image", "wan", "cogvideox_image"])
def test_dense_and_sparse_are_compared_from_the_same_input(ready, tmp_path, name):
    model = models()[name]
    kind = "video" if name == "wan" else "first frame"
    given = model.calls(model.size)[kind][0]
    frames, height, width = model.size
    folder, _ = ready(name, given)
    clip = Clip(frames=frames, height=height, width=width, steps=2, seed=SEED)
    options: dict[str, Any] = {**clip.given(), **given.given()}
    [both] = generate(
        folder,
        [PROMPT],
        method=Neighborhood(window=(-1, 2, 2)),
        out=tmp_path / "v.gif",
        compare=True,
        **options,
    )
    assert both.report is not None
    assert 0 < both.report["density"] < 1
    [dense] = generate(folder, [PROMPT], method=Dense(), out=tmp_path / "dense.gif", **options)
    alone = read_video(dense.files["video"])
    np.testing.assert_array_equal(read_video(both.files["dense"]), alone)


@pytest.mark.slow
def test_a_list_goes_on_where_the_picture_is_the_same(ready, tmp_path, capsys):
    size = models()["wan_image"].size
    picture(0, *size[1:]).save(tmp_path / "first.png")
    clip = Clip(frames=5, height=48, width=64, steps=1)

    def made(image, **options):
        given = Files(image=image)
        folder, _ = ready("wan_image", given)
        common: dict[str, Any] = {**clip.given(), **given.given(), "method": Dense()}
        found = generate(folder, ["a", "b"], out=tmp_path / "v.gif", **common, **options)
        return len(found)

    assert made(tmp_path / "first.png") == 2
    assert made(tmp_path / "first.png") == 0
    assert made(picture(0, *size[1:])) == 0  # the same pixels
    assert made(picture(1, *size[1:]), overwrite=True) == 2


@pytest.mark.slow
def test_latents_of_a_video_from_a_picture_are_kept(ready, tmp_path):
    from gen_accel.pipelines.generation.decode import load_latents

    given = Files(image=picture(0, 48, 64))
    folder, _ = ready("wan_image", given)
    clip = Clip(frames=5, height=48, width=64, steps=1)
    kept = tmp_path / "v.safetensors"
    options: dict[str, Any] = {**clip.given(), **given.given(), "out": tmp_path / "v"}
    generate(folder, [PROMPT], method=Dense(), save_latents=kept, **options)
    assert load_latents(kept)[0].shape == (1, 16, 2, 6, 8)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        (
            "wan",
            Files(image=picture(0, 8, 8)),
            "from text alone or a video: leave --image out, or use ",
        ),
        ("wan_image", Files(), r"from a first frame .*: give --image FIRST.png"),
        (
            "wan_first_and_last",
            Files(image=picture(0, 8, 8)),
            "give --last-image LAST.png",
        ),
        (
            "wan_image_encoder",
            Files(image=picture(0, 8, 8), last_image=picture(1, 8, 8)),
            "leave --last-image out, or use ",
        ),
        ("wan_image", Files(last_image=picture(0, 8, 8)), "give --image FIRST.png"),
        (
            "wan_vace",
            Files(video=[picture(0, 8, 8)], strength=0.5),
            "takes no strength",
        ),
        ("wan_token_timesteps", Files(video=[picture(0, 8, 8)]), "leave --video out"),
        ("cosmos2", Files(), "from a first frame or a video: give "),
    ],
)
def test_what_the_weights_do_not_take_is_refused_before_they_are_loaded(
    folders, no_loading, tmp_path, name, given, words
):
    folder, _ = folders(name)
    with pytest.raises(ValueError, match=words):
        generate(folder, [PROMPT], out=tmp_path / "v.gif", method=Dense(), **given.given())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("technique", "given"),
    [
        ("continuation", Files(image=picture(0, 8, 8))),
        ("fresh_noise", Files(video=[picture(0, 8, 8)])),
        ("window_noise", Files(video=[picture(0, 8, 8)])),
    ],
)
def test_techniques_with_noise_of_their_own_are_refused(
    folders, no_loading, tmp_path, technique, given
):
    name = "wan_image" if given.image is not None else "wan"
    folder, _ = folders(name)
    with pytest.raises(ValueError, match=f"{technique} does not go with a "):
        generate(
            folder,
            [PROMPT],
            out=tmp_path / "v.gif",
            method=Dense(),
            **given.given(),
            extend=technique,
        )


def told(ready, name, given, **sizes):
    from gen_accel.pipelines.generation.inputs import fit

    _, pipe = ready(name, given)
    clip, inputs = fit(pipe, Clip(**sizes), open_files(given))
    return clip, inputs


def test_a_picture_decides_the_sizes_at_the_area_of_the_model(ready):
    given = Files(image=picture(0, 1920, 1080))
    clip, inputs = told(ready, "wan_image", given)
    assert (clip.height, clip.width) == (848, 480)  # 480 x 832 by default, multiples of 16
    assert inputs.values["image"].size == (480, 848)
    assert inputs.told == ("the first frame, 1920 x 1080, makes a video of 848 x 480",)
    clip, _ = told(ready, "wan_image", given, width=96)
    assert (clip.height, clip.width) == (176, 96)


def test_a_picture_of_another_shape_is_cropped_from_its_centre(ready):
    image = np.zeros((40, 96, 3), np.uint8)
    image[:, 32:64, 0] = 255  # the third in the middle
    clip, inputs = told(ready, "wan_image", Files(image=image), height=64, width=32)
    assert (clip.height, clip.width) == (64, 32)
    cropped = np.asarray(inputs.values["image"])
    assert cropped.shape == (64, 32, 3)
    assert (cropped == (255, 0, 0)).all()
    [line] = inputs.told
    assert line == "the first frame, 40 x 96, is cropped to 64 x 32: 79% is lost"


def test_pictures_are_turned_and_made_rgb(ready, tmp_path):
    from PIL import Image

    wide = picture(0, 32, 64)
    exif = wide.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide.save(tmp_path / "turned.png", exif=exif)
    opened = open_files(Files(image=tmp_path / "turned.png"))
    assert opened.image.image.size == (32, 64)
    for mode in ("L", "P", "1", "LA"):
        wide.convert(mode).save(tmp_path / f"{mode}.png")
        assert open_files(Files(image=tmp_path / f"{mode}.png")).image.image.mode == "RGB"
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    seen = open_files(Files(image=tmp_path / "clear.png")).image.image
    assert np.asarray(seen).min() == 255  # on white


def test_a_video_decides_the_frames(ready):
    video = frames_of((11, 48, 64))
    clip, inputs = told(ready, "wan", Files(video=video), height=48, width=64)
    assert clip.frames == 9
    assert len(inputs.values["video"]) == 9
    assert inputs.told == ("the video has 11 frames: its first 9 are used",)
    clip, inputs = told(ready, "wan", Files(video=video), height=48, width=64, frames=5)
    assert clip.frames == len(inputs.values["video"]) == 5
    assert inputs.told == ("the video has more than 5 frames: its first 5 are used",)


def test_a_video_that_is_too_short_is_refused(folders, no_loading, tmp_path):
    folder, _ = folders("wan")
    given = Files(video=frames_of((9, 48, 64)))
    with pytest.raises(ValueError, match="the video has 9 frames, and 13 are asked"):
        generate(
            folder,
            [PROMPT],
            out=tmp_path / "v.gif",
            method=Dense(),
            **given.given(),
            frames=13,
        )


def test_a_video_that_leaves_nothing_to_make_is_refused(folders, no_loading, tmp_path):
    folder, _ = folders("ltx")
    given = Files(video=frames_of((9, 32, 32)))
    with pytest.raises(ValueError, match=r"has 9 frames or more.* or --strength to remake it"):
        generate(
            folder,
            [PROMPT],
            out=tmp_path / "v.gif",
            method=Dense(),
            **given.given(),
            frames=9,
        )


def test_another_frame_rate_is_said(ready, tmp_path):
    from gen_accel.measure import write_video

    frames = np.stack([np.asarray(frame) for frame in frames_of((5, 48, 64))])
    write_video(frames, tmp_path / "in.mp4", fps=30)
    _, inputs = told(ready, "wan", Files(video=tmp_path / "in.mp4"), height=48, width=64)
    [line] = inputs.told
    assert line == (
        "in.mp4 has 30 frames a second, and the video gets 16: --fps 30 keeps its speed"
    )
    options = {"height": 48, "width": 64, "fps": 30.0}
    assert not told(ready, "wan", Files(video=tmp_path / "in.mp4"), **options)[1].told


def test_a_strength_that_leaves_no_step_is_refused(ready):
    given = Files(video=frames_of((5, 48, 64)), strength=0.1)
    with pytest.raises(ValueError, match=r"strength 0.1 of 5 steps leaves none: ask for 10 steps"):
        told(ready, "wan", given, height=48, width=64, steps=5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strength": 0.5}, "give a video too"),
        ({"video": [], "strength": 0.0}, "strength must be above 0 and at most 1, got 0"),
        ({"video": [], "strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"video": [], "strength": float("nan")}, "strength must be above 0 and at most 1"),
    ],
)
def test_a_strength_that_means_nothing_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Files(**given).check_inputs()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"video": []}, "video must be a file, a folder"),
        ({"video": 3}, "video must be a path or none, got 3"),
        ({"video": np.zeros((2, 4, 4, 1), np.uint8)}, r"must be \(f, H, W, 3\)"),
        ({"video": [picture(0, 8, 8), picture(0, 8, 16)]}, "must have one size, got 8 x"),
        ({"image": 3}, "image must be a path or none, got 3"),
        ({"image": np.zeros((4, 4, 3))}, "must be uint8"),
    ],
)
def test_what_is_no_picture_or_video_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        open_files(Files(**given))


def test_what_is_given_counts_in_the_request(folders, tmp_path, no_loading):
    folder, _ = folders("wan_image")

    def request(**given):
        return planned(folder, tmp_path, **given).request["given"]

    same, other = picture(0, 8, 8), picture(1, 8, 8)
    same.save(tmp_path / "same.png")
    assert request(image=same) == request(image=tmp_path / "same.png") != request(image=other)
    assert request(image=same, last_image=other) != request(image=other, last_image=same)
    assert json.loads(json.dumps(request(image=same))) == request(image=same)


def test_a_plan_without_pictures_has_none(folders, tmp_path, no_loading):
    plan = planned(folders("wan")[0], tmp_path)
    assert plan.files is None
    assert "given" not in plan.request


def planned(folder, tmp_path, **given):
    options = {"model": folder, "prompt": "a", "method": Dense(), "out": tmp_path / "a.gif"}
    return plan_of(GenerateConfig(**options, **given))


# The command line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--image", "none.png"), "no first frame at none.png"),
        (("--last-image", "none.png"), "no last frame at none.png"),
        (("--video", "none.mp4"), "no video at none.mp4"),
        (("--image", "text.png"), "text.png is no image"),
        (("--strength", "0.5"), "give a video too"),
        (("--video", "video.mp4", "--strength", "1.5"), "at most 1, got 1.5"),
        (("--image", "red.png"), "leave --image out, or use "),
        (("--video", "video.mp4", "--extend", "continuation"), "continuation does not go with"),
        (("--from-latents", "text.png", "--image", "red.png"), "got --image"),
    ],
)
def test_a_command_line_is_refused_in_a_sentence(
    refused, folders, no_loading, tmp_path, monkeypatch, options, words
):
    folder, _ = folders("wan")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "video.mp4").write_text("no video")
    picture(0, 8, 8).save(tmp_path / "red.png")
    prompt = () if "--from-latents" in options else ("--prompt", "a", "--method", "dense")
    assert words in refused("generate", "--model", folder, *prompt, *options)


@pytest.mark.slow
def test_the_command_line_makes_a_video_from_a_picture(run, folders, ready, tmp_path):
    given = Files(image=picture(0, 96, 64))
    folder, _ = ready("wan_image", given)
    given.image.save(tmp_path / "cat.png")
    result = run(
        "generate",
        *("--model", folder, "--prompt", PROMPT, "--method", "dense", "--steps", "1"),
        *("--image", tmp_path / "cat.png", "--width", "64", "--height", "64", "--frames", "5"),
        *("--out", tmp_path / "v"),
    )
    assert "cat.png, 96 x 64, is cropped to 64 x 64: 33% is lost" in result.stderr.splitlines()
    assert read_video(tmp_path / "v").shape == (5, 64, 64, 3)
