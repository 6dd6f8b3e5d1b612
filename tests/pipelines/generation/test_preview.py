"""Pictures of a video that is being made: like the video, of each family, and without effect."""

import inspect
import warnings
from functools import wraps

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import cases
from torch import nn
from torch.nn import functional as F

from gen_accel import Dense, Radial, demo
from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.families import families, family_of
from gen_accel.attention_processors.families.base import Generation
from gen_accel.measure import read_video
from gen_accel.paths import preview_of
from gen_accel.pipelines.generation import preview
from gen_accel.pipelines.generation.decode import decode_stream, load_latents
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.loading import load
from gen_accel.pipelines.generation.preview import (
    NoPreview,
    Preview,
    channels_of,
    colored,
    colors_of,
    contact_sheet,
    false_colors,
    frames_first,
    published_colors,
)
from gen_accel.pipelines.generation.sampling import Clip, denoise, filled, parameters

PROMPT = "a red square moves right"


@pytest.fixture(scope="module")
def pipe():
    return load(demo.path())


def likeness(frames: np.ndarray, video: np.ndarray) -> float:
    """Correlation of a preview's frames, (F, h, w, 3), with the video's nearest frames."""
    shown = np.linspace(0, len(video) - 1, len(frames)).round().astype(int)
    pixels = torch.tensor(video[shown]).float().movedim(-1, 1)
    small = F.adaptive_avg_pool2d(pixels, frames.shape[1:3]).movedim(1, -1)
    return float(np.corrcoef(frames.flatten(), small.numpy().flatten())[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt", [PROMPT, "a blue circle moves up", "a yellow triangle moves left"]
)
def test_it_looks_like_the_video_before_that_is_made(pipe, tmp_path, prompt):
    """At three quarters of the steps, by a map fitted to the decoder."""
    clip = filled(pipe, Clip(frames=17, height=96, width=96, steps=8))
    drawn = {}

    class Kept(Preview):
        def draw(self, done):
            clean = preview._clean(self.pipe, self._before, self._now, done)
            drawn[done] = colored(self.pipe, frames_first(self.pipe, self.clip, clean))

    with Kept(pipe, clip, tmp_path / "a.png", 2).seeing(lambda done, total: None) as (tick, watch):
        latents = denoise(pipe, prompt, clip, tick=tick, watch=watch).latents
    video = np.concatenate([*decode_stream(pipe, latents)])
    assert [*drawn] == [2, 4, 6, 8]
    assert drawn[8].shape == (5, 12, 12, 3)
    assert likeness(drawn[6], video) > 0.7
    assert likeness(drawn[8], video) > 0.8
    # The latents themselves, with their noise, are less like it.
    assert likeness(drawn[6], video) > likeness(drawn[2], video)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Dense(), Radial()], ids=str)
def test_the_video_is_the_same_with_and_without(tmp_path, method):
    made = {}
    for every in (None, 1):
        out = tmp_path / f"{every}.gif"
        [one] = generate(
            demo.path(),
            [PROMPT],
            out=out,
            method=method,
            frames=9,
            height=48,
            width=48,
            steps=3,
            save_latents=out.with_suffix(".safetensors"),
            preview=every,
        )
        made[every] = read_video(out), load_latents(one.files["latents"])[0]
    assert np.array_equal(made[None][0], made[1][0])
    assert torch.equal(made[None][1], made[1][1])
    assert one.files["preview"] == tmp_path / "1.preview.png"
    assert Image.open(one.files["preview"]).size == (3 * 6 * 8, 6 * 8)
    assert not (tmp_path / "None.preview.png").exists()


def seen(case) -> tuple[object, list[torch.Tensor], list[tuple]]:
    """Run the pipeline of a case, and return what it reports and is called with."""
    pipe, found, calls = case.pipeline(), [], []
    kind, call = type(pipe), type(pipe).__call__

    @wraps(call)
    def watched(self, *args, **kwargs):
        bound = inspect.signature(call).bind_partial(self, *args, **kwargs).arguments
        calls.append(tuple(bound.get(name) for name in ("num_frames", "height", "width")))

        def keep(pipe, step, timestep, tensors):
            found.append(tensors["latents"].clone())
            return tensors

        if "callback_on_step_end" in parameters(self):
            kwargs["callback_on_step_end"] = keep
        return call(self, *args, **kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": watched})
    made = case.generate(pipe)
    return pipe, found, [made, *calls]


VIDEOS = [case for case in cases() if case.pipeline is not None]


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("case", VIDEOS, ids=lambda case: case.name)
def test_each_family_has_a_way_to_colours(case, tmp_path):
    pipe = case.pipeline()
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    if not hasattr(pipe, "vae"):
        pytest.skip("a modular pipeline, which generate does not load")
    if family_of(first_transformer(pipe)).kind == "image":
        pytest.skip("makes no video")
    assert parts
    drawn = []
    if "callback_on_step_end" in parameters(pipe):
        pipe, latents, (_, (frames, height, width)) = seen(case)
    else:
        shown = Preview(pipe, Clip(), tmp_path / "a.png", 1)
        with shown.seeing(lambda done, total: drawn.append((done, total))):
            made = case.generate(pipe)
        assert drawn, "no step was seen"
        latents, (frames, height, width) = [shown._now], (None, None, None)
        assert latents[0].shape == made.shape
    clip = Clip(frames=frames, height=height, width=width)
    channels = channels_of(pipe.vae)
    for one in latents:
        found = frames_first(pipe, clip, one)
        assert found.ndim == 4
        assert len(found) == channels
        assert sorted(found.shape[1:]) != sorted((1, 1, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error", NoPreview)
            pictures = colored(pipe, found)
        assert pictures.shape == (min(8, found.shape[1]), *found.shape[2:], 3)
        assert pictures.std() > 0


def test_tokens_come_back_to_their_places(pipe, monkeypatch):
    """Of all orders of axes, each latent to its own frame, row and column."""
    clip = Clip(frames=9, height=32, width=48)
    whole = torch.arange(16 * 3 * 4 * 6.0).view(16, 3, 4, 6)  # C, f, h, w
    tokens = whole.flatten(1).T
    other = torch.full((5, 16), -1.0)
    given = {
        "cfhw": whole,
        "fchw": whole.transpose(0, 1),
        "fhwc": torch.cat([whole, whole]).movedim(0, -1),  # with channels of a condition
        "tokens last": torch.cat([other, tokens]),
        "tokens first": torch.cat([tokens, other]),
    }
    for axes, latents in given.items():
        family = type("F", (), {"generation": Generation(axes=axes)})
        monkeypatch.setattr(preview, "served_family", lambda pipe, family=family: family)
        assert torch.equal(frames_first(pipe, clip, latents[None]), whole), axes


def test_published_factors_are_for_published_autoencoders(pipe):
    assert published_colors(pipe.vae) is None  # of Wan's class and channels, but not Wan's
    for one in (one for family in families() for one in family.colors):
        channels = one.factors.shape[1]
        vae = type(one.autoencoder, (), {"config": {"z_dim": channels, one.entry: one.value}})
        factors, bias = published_colors(vae())
        assert factors.shape == (channels, 3)
        first = [float(x) for x in one.rows.split()[::channels]]
        assert factors[0].tolist() == pytest.approx(first)
        assert bias.tolist() == pytest.approx(one.bias)


def test_without_a_decoder_the_colours_are_false(pipe, monkeypatch):
    latents = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def fail(*args, **kwargs):
        raise RuntimeError("kernel size too large")

    expected = false_colors(latents)
    monkeypatch.setattr(preview, "fitted_colors", fail)
    assert all(map(torch.equal, colors_of(pipe, latents), expected))
    frames = colored(pipe, latents)
    assert frames.std() > 30  # of 255: half of the range is two deviations


def test_a_fault_of_a_picture_is_none_of_the_video(pipe, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no colour")

    monkeypatch.setattr(preview, "colored", fail)
    clip = filled(pipe, Clip(frames=5, height=48, width=48, steps=2))
    path = preview_of(tmp_path / "a.mp4")
    with (
        Preview(pipe, clip, path, 1).seeing(lambda done, total: None) as (tick, watch),
        pytest.warns(
            NoPreview, match=r"no preview at .*a\.preview\.png any more: no colour"
        ) as told,
    ):
        denoise(pipe, PROMPT, clip, tick=tick, watch=watch)
    assert [one.category for one in told].count(NoPreview) == 1
    assert not path.exists()


def test_frames_lie_in_rows_of_four():
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(100, 2)
    sheet = contact_sheet(frames.repeat(3, 3))
    assert sheet.shape == (2 * 9, 4 * 300, 3)
    assert sheet[4, 150::300, 0].tolist() == [0, 1, 2, 3]
    assert sheet[13, 150::300, 0].tolist() == [4, 5, 0, 0]


def test_what_cannot_be_asked_for(tmp_path):
    given = {"out": tmp_path / "a.mp4", "method": Radial()}
    with pytest.raises(ValueError, match="preview must be at least 1, got 0"):
        generate(demo.path(), [PROMPT], preview=0, **given)
    with pytest.raises(ValueError, match="compare measures times, which previews add to"):
        generate(demo.path(), [PROMPT], preview=2, compare=True, **given)
