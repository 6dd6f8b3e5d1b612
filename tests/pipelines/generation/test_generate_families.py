"""`gen-accel generate` on saved pipelines of families whose latents are not Wan's."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AnimateDiffPipeline,
    CogVideoXPipeline,
    DiffusionPipeline,
    LTXPipeline,
    MotionAdapter,
)
from PIL import Image
from support import wan
from support.tiny import (
    Case,
    allegro,
    animatediff,
    cases_of,
    cogvideox,
    helios,
    latte,
    ltx,
    ltx2,
    mochi,
    skyreels,
)

from gen_accel.attention_processors.families import FAMILIES, family_for, family_named
from gen_accel.attention_processors.image_prompt import new_adapter
from gen_accel.measure import read_video
from gen_accel.measure.video_io import video_fps
from gen_accel.pipelines.generation.decode import load_latents, save_latents
from gen_accel.pipelines.generation.sampling import Clip, filled, sample, sound_of
from gen_accel.pipelines.image_prompt.formats import base_of, write_adapter
from gen_accel.pipelines.image_prompt.projectors import Pixels

pytestmark = pytest.mark.slow

PROMPT = "a red square moves right"


class Saved(NamedTuple):
    """A pipeline, and what is asked of it.

    Args:
        size: frames, height and width.
        made: frames that these are rounded to.
        window: smaller than the token grid.
        frames: what the pipeline calls their number.
    """

    build: Callable[[], Any]
    size: tuple[int, int, int]
    made: int
    window: str
    frames: str = "num_frames"


def text_to_video() -> Any:
    """Whose text is as long as the pipeline asks for."""
    return cogvideox.pipeline(cogvideox.transformer(max_text_seq_length=226), CogVideoXPipeline)


def animated() -> Any:
    parts = animatediff.animated()
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    tokenizer: Any = new_tokenizer()
    tokenizer.model_max_length = 16
    return AnimateDiffPipeline(
        parts.vae, parts.text_encoder, tokenizer, parts.unet, adapter, parts.scheduler
    )


def of(cases: list[Case]) -> Callable[[], Any]:
    build = cases[0].pipeline
    assert build is not None
    return build


PIPELINES = {
    "cogvideox": Saved(text_to_video, (9, 48, 64), 9, "-1,2,3"),
    "ltx": Saved(lambda: ltx.pipeline(LTXPipeline), (9, 96, 64), 9, "-1,2,2"),
    "mochi": Saved(mochi.pipeline, (9, 48, 64), 7, "-1,2,3"),
    "skyreels": Saved(of(skyreels.CASES), (9, 48, 64), 9, "-1,2,3"),
    "animatediff": Saved(animated, (3, 24, 32), 3, "-1,5,5"),
    "latte": Saved(of(latte.CASES), (3, 48, 64), 3, "-1,2,3", "video_length"),
    "allegro": Saved(of(allegro.CASES), (9, 48, 64), 9, "-1,2,3"),
    "helios": Saved(of(helios.CASES), (9, 48, 64), 33, "-1,2,3"),  # whole chunks
}
for family, window in (("anyflow", "-1,2,3"), ("cosmos3", "-1,2,2")):
    if cases_of(family):  # which an older diffusers lacks
        PIPELINES[family] = Saved(of(cases_of(family)), (9, 48, 64), 9, window)
LONG = ("cogvideox", "ltx", "mochi", "helios")  # four runs, more than 2 s
OTHERS = [name for name in PIPELINES if name not in ("skyreels", "anyflow")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the pipeline of that name, saved once."""
    saved = {}

    def find(name):
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp("families") / name
            PIPELINES[name].build().save_pretrained(saved[name])
        return saved[name]

    return find


def asked(name, folder, *more):
    sizes = zip(("--frames", "--height", "--width"), PIPELINES[name].size, strict=True)
    options = [str(part) for pair in sizes for part in pair]
    return [
        "generate",
        "--model",
        folder(name),
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        *options,
        *more,
    ]


@pytest.mark.turns(5)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_video_is_that_of_the_pipeline(run, folder, tmp_path, name):
    frames, height, width = PIPELINES[name].size
    result = run(*asked(name, folder, "--method", "dense", "--seed", "3", "--out", tmp_path / "v"))
    assert "denoising 0/2" in result.stderr
    video = read_video(tmp_path / "v")
    assert video.shape == (PIPELINES[name].made, height, width, 3)

    pipe: Any = DiffusionPipeline.from_pretrained(folder(name))
    pipe.set_progress_bar_config(disable=True)
    if name == "allegro":
        pipe.vae.enable_tiling()
    output = pipe(
        prompt=PROMPT,
        height=height,
        width=width,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **{PIPELINES[name].frames: frames},
    )
    own = output.video if name == "cosmos3" else output.frames[0]
    np.testing.assert_array_equal(video, (np.asarray(own) * 255).round().astype(np.uint8))


@pytest.mark.turns(5)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.nightly) if n in LONG else n for n in PIPELINES],
)
def test_a_window_is_compared_with_dense(run, folder, tmp_path, name):
    window = ("--method", "neighborhood", "--set", f"window={PIPELINES[name].window}")
    out = tmp_path / "clip.gif"
    result = run(*asked(name, folder, *window, "--compare", "--out", out))
    names = ["clip.dense.gif", "clip.gif", "clip.json", "clip.side_by_side.gif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    _, height, width = PIPELINES[name].size
    shape = (PIPELINES[name].made, height, width, 3)
    assert read_video(out).shape == read_video(tmp_path / "clip.dense.gif").shape == shape
    report = json.loads((tmp_path / "clip.json").read_text())
    assert (report["frames"], report["height"], report["width"]) == shape[:3]
    assert 0 < report["density"] < 1
    assert min(report[f"{kind}_seconds"] for kind in ("dense", "sparse", "dense_decode")) > 0
    for label in ("warm-up 1", "warm-up 2", "clip 1", "clip 2"):
        assert f"\n{label} of 2, step " in result.stderr


@pytest.mark.turns(5)
@pytest.mark.parametrize("name", [n for n in PIPELINES if n not in ("cosmos3", "allegro")])
def test_an_image_beside_the_text(run, folder, tmp_path, name):
    """Allegro's autoencoder makes grey of so few frames."""
    pipe = PIPELINES[name].build()
    model = pipe.unet if name == "animatediff" else pipe.transformer
    torch.manual_seed(1)
    width = family_for(model, "image prompts").image_attentions(model)[0].width
    made = new_adapter(model, Pixels(width=width, tokens=4, channels=(8, 8)), variant="pixels")
    for parameter in made.layers.parameters():
        torch.nn.init.normal_(parameter)
    write_adapter(tmp_path / "adapter", made, base_of(model) | {"image_size": 16})
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    seen = ("--image-adapter", tmp_path / "adapter", "--image-prompt", tmp_path / "red.png")

    def video(place, *more):
        run(*asked(name, folder, "--method", "dense", *more, "--out", tmp_path / place))
        return read_video(tmp_path / place)

    plain = video("plain")
    np.testing.assert_array_equal(video("off", *seen, "--image-scale", "0"), plain)
    assert (video("red", *seen) != plain).any()


@pytest.mark.parametrize("name", OTHERS)
def test_latents_that_could_not_be_decoded_are_not_kept(
    refused, folder, no_loading, tmp_path, name
):
    kept = tmp_path / "clip.safetensors"
    line = refused(*asked(name, folder, "--save-latents", kept, "--out", tmp_path / "clip.mp4"))
    assert "decode theirs in ways of their own" in line
    assert not [*tmp_path.iterdir()]


def test_latents_are_decoded_again_by_their_own_family_alone(run, refused, folder, tmp_path):
    kept, again = tmp_path / "clip.safetensors", tmp_path / "again"
    window = ("--method", "neighborhood", "--set", "window=-1,2,3")
    run(*asked("skyreels", folder, *window, "--save-latents", kept, "--out", tmp_path / "clip"))
    assert load_latents(kept)[0].shape == (1, 16, 3, 6, 8)
    run("generate", "--model", folder("skyreels"), "--from-latents", kept, "--out", again)
    np.testing.assert_array_equal(read_video(again), read_video(tmp_path / "clip"))
    line = refused("generate", "--model", folder("cogvideox"), "--from-latents", kept)
    assert "CogVideoXTransformer3DModel with AutoencoderKLCogVideoX" in line


RATES = {  # without a number
    "cogvideox": 8,
    "ltx": 25,
    "mochi": 30,
    "skyreels": 24,
    "anyflow": 16,
    "animatediff": 8,
    "latte": 8,
    "allegro": 15,
    "helios": 24,
    "cosmos3": 24,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_frames_a_second_are_those_of_the_model(name):
    pipe = PIPELINES[name].build()
    assert filled(pipe, Clip()).fps == RATES[name]
    assert filled(pipe, Clip(fps=12)).fps == 12


def test_models_of_one_family_may_differ_in_frames_a_second():
    assert filled(wan.pipeline(), Clip()).fps == 16
    pipe: Any = wan.pipeline()
    pipe.transformer.register_to_config(in_channels=48)
    assert filled(pipe, Clip()).fps == 24
    pipe = text_to_video()
    pipe.transformer.register_to_config(patch_size_t=2)
    assert filled(pipe, Clip()).fps == 16


def test_every_published_rate_is_a_number():
    for name in FAMILIES:
        assert family_named(name).sizes.fps in (8, 15, 16, 24, 25, 30)


TOLD = {  # pipelines that tell the model, by what argument and as what
    "ltx": (of(ltx.CASES), "frame_rate", int),
    "ltx2": (of(ltx2.CASES), "frame_rate", float),
    "skyreels": (of(skyreels.CASES[1:]), "fps", int),
}
if cases_of("cosmos3"):
    TOLD["cosmos3"] = (of(cases_of("cosmos3")), "fps", float)


@pytest.mark.parametrize("name", TOLD)
def test_a_model_that_takes_the_frames_a_second_is_told(name):
    build, argument, kind = TOLD[name]
    pipe = build()
    told: dict[str, Any] = {}

    def run(**arguments: Any) -> Any:
        told.update(arguments)
        raise InterruptedError

    for given, expected in ((Clip(fps=12.0), 12), (Clip(), RATES.get(name, 24))):
        with pytest.raises(InterruptedError):
            sample(pipe, PROMPT, filled(pipe, given), run=run)
        assert told[argument] == expected
        assert type(told[argument]) is kind


@pytest.mark.parametrize("rate", [24_000, None])
def test_sound_of_ltx2_has_the_rate_of_its_vocoder(rate):
    """Without a vocoder that says it, a pipeline is taken to make none."""
    heard = torch.zeros(1, 2, 480)
    vocoder = SimpleNamespace(config={} if rate is None else {"output_sampling_rate": rate})
    found = sound_of(SimpleNamespace(vocoder=vocoder), SimpleNamespace(audio=heard))
    if rate is None:
        assert found is None
        return
    assert found.rate == rate
    assert found.samples.shape == (2, 480)
    heard[0, 0, 3] = float("nan")
    pipe = SimpleNamespace(vocoder=vocoder, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"made sound that is not finite, in torch\.float16; try"):
        sound_of(pipe, SimpleNamespace(audio=heard))


def test_ltx2_writes_its_sound(tmp_path):
    """With a real vocoder, 96 times as long as its spectrogram."""
    torch.manual_seed(6)
    pipe = ltx2.with_vocoder(ltx2.texts())
    size = {"frames": 17, "height": 64, "width": 96, "max_tokens": 16}
    made = sample(pipe, PROMPT, filled(pipe, Clip(steps=2, guidance_scale=1.0, **size)))
    assert made.sound is not None
    assert made.sound.rate == 24_000
    assert made.sound.samples.shape[0] == 2
    assert made.sound.samples.any()


def test_a_rate_that_the_pipeline_would_round_is_refused(refused, folder, tmp_path):
    args = asked("ltx", folder, "--fps", "23.976", "--out", tmp_path / "clip.mp4")
    line = refused(*args)
    assert "fps must be whole with LTXPipeline, got 23.976; nearest: 23 or 24" in line
    assert not [*tmp_path.iterdir()]


def test_all_that_is_written_plays_as_the_model_was_told(run, folder, tmp_path):
    dense = ("--method", "dense", "--out")
    run(*asked("ltx", folder, *dense, tmp_path / "own.mp4"))
    run(*asked("ltx", folder, "--fps", "12", *dense, tmp_path / "given.mp4"))
    rates = [video_fps(tmp_path / f"{name}.mp4") for name in ("own", "given")]
    assert rates == [25, 12]
    own, given = (read_video(tmp_path / f"{name}.mp4") for name in ("own", "given"))
    assert not np.array_equal(own, given)

    window = ("--method", "neighborhood", "--set", "window=-1,2,3", "--compare")
    run(*asked("skyreels", folder, *window, "--out", tmp_path / "clip.mp4"))
    for name in ("clip", "clip.dense", "clip.side_by_side"):
        assert video_fps(tmp_path / f"{name}.mp4") == 24
    assert json.loads((tmp_path / "clip.json").read_text())["fps"] == 24


def test_latents_know_the_frames_a_second(run, folder, tmp_path):
    kept, again = tmp_path / "clip.safetensors", tmp_path / "again.mp4"
    dense = ("--method", "dense", "--save-latents", kept, "--out", tmp_path / "clip.mp4")
    run(*asked("skyreels", folder, *dense))
    latents, about = load_latents(kept)
    assert about["fps"] == 24
    decode = ("generate", "--model", folder("skyreels"), "--from-latents", kept, "--out", again)
    decode += ("--overwrite",)
    run(*decode)
    assert video_fps(again) == video_fps(tmp_path / "clip.mp4") == 24
    run(*decode, "--fps", "8")
    assert video_fps(again) == 8
    del about["fps"]
    save_latents(kept, latents, about)
    run(*decode)
    assert video_fps(again) == 16


def test_sizes_that_depend_on_the_model_may_be_left_to_it(run, refused, folder, tmp_path):
    args = ("generate", "--model", folder("cogvideox"), "--prompt", PROMPT, "--steps", "1")
    run(*args, "--method", "dense", "--out", tmp_path / "clip")
    assert read_video(tmp_path / "clip").shape == (9, 80, 112, 3)
    line = refused(*args, "--extend", "riflex", "--out", tmp_path / "more.mp4")
    assert "frames must be given with riflex: CogVideoXPipeline has no default" in line


def test_the_check_of_a_pipeline_speaks_for_itself(run, folder, tmp_path):
    args = asked("cogvideox", folder, "--height", "60", "--out", tmp_path / "clip.mp4")
    line = run(*args, code=2).stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "divisible by 8 but are 60 and 64" in line
    assert not [*tmp_path.iterdir()]


def test_a_unet_of_images_is_refused(refused, no_loading, tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    line = refused("generate", "--model", tmp_path, "--prompt", PROMPT)
    assert "UNet2DConditionModel" in line
    assert "makes images and no video" in line
