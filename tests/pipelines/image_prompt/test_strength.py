"""How strongly an image prompt acts: by block, frame, step and place."""

import pytest
import torch
import torch.nn.functional as F
from support import image_adapters, wan
from support.image_models import CASES, output
from support.image_prompts import (
    WIDTH,
    adapter,
    added,
    noise,
)

from gen_accel import ScaleRange, load_image_prompt
from gen_accel.pipelines.image_prompt.strength import (
    Masks,
    block_scales,
    frame_spans,
    levels,
)
from gen_accel.video import VideoShape


def test_scales_by_block():
    names = [f"blocks.{i}.attn2" for i in range(12)]
    assert block_scales(0.5, names) == (0.5,) * 12
    assert block_scales({"blocks.1": 0.5}, names) == (0.0, 0.5, *[0.0] * 10)  # not blocks.10
    assert block_scales({"blocks": 1, "blocks.11.attn2": 2}, names) == (*[1.0] * 11, 2.0)
    assert block_scales([*range(12)], names) == tuple(map(float, range(12)))
    for wrong, message in (
        ({"blocks.12": 1.0}, r"'blocks.12', which is none of: blocks.0.attn2, "),
        ([1.0, 2.0], "a number for each of the 12 attentions, got 2"),
        ("loud", r"or 'style' or 'style\+layout', got 'loud'"),
        ("style", "is for the blocks of SDXL's UNet"),
        ({"up": 1.0}, "names 'up', where no attention is"),
        ({"blocks.1": [1.0]}, "must be a number at blocks.1"),
        (None, "must be a number"),
        (True, "must be a number"),
        (float("nan"), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            block_scales(wrong, names)


def test_scales_of_a_unet():
    names = [
        *[f"down_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in range(2)],
        *[f"down_blocks.2.attentions.{i}.transformer_blocks.0.attn2" for i in range(2)],
        *[
            f"up_blocks.0.attentions.{i}.transformer_blocks.{j}.attn2"
            for i in (0, 1, 2)
            for j in (0, 1)
        ],
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    assert block_scales({"up": {"block_0": [0.0, 1.0, 0.5]}, "mid": 2}, names) == (
        *(0, 0, 0, 0),
        *(0, 0, 1, 1, 0.5, 0.5),
        2,
    )
    assert block_scales({"down": [0.25, 0.5]}, names)[:4] == (0.25, 0.5, 0.25, 0.5)
    assert block_scales("style", names) == (0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0)
    assert block_scales("style+layout", names) == (0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0)
    assert block_scales({"down_blocks.1": 1.0}, names) == (1, 1, *[0] * 9)
    for wrong, message in (
        ({"up": {"block_1": 1.0}}, r"names up.block_1, where no attention is; there are: down"),
        ({"up": {"block_0": [1.0, 2.0]}}, "scale of up.block_0 must have 3 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            block_scales(wrong, names)


@torch.no_grad()
def test_a_block_without_a_scale_adds_nothing(model):
    base = [added(model, lambda: wan.forward(model), place) for place in (0, 1)]
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale({"blocks.1": 1.0})
    assert torch.equal(added(model, lambda: wan.forward(model)), base[0])
    assert not torch.equal(added(model, lambda: wan.forward(model), 1), base[1])
    prompt.set_scale([1.0, 0.0])
    assert not torch.equal(added(model, lambda: wan.forward(model)), base[0])


def test_frames_of_tokens():
    assert frame_spans(3, 4, 1) == [(0, 1), (1, 5), (5, 9)]
    assert frame_spans(2, 4, 2) == [(0, 5), (5, 13)]
    assert frame_spans(2, 6, 1) == [(0, 1), (1, 7)]


@torch.no_grad()
def test_scales_by_frame(model):
    """5 latent frames are 17 frames."""

    def frames():
        return added(model, lambda: wan.forward(model)).unflatten(1, (5, 99))

    base = frames()
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    whole = frames() - base
    prompt.set_scale(1.0, frames=(5, 11))
    delta = frames() - base
    for frame, share in enumerate((0.0, 0.0, 1.0, 0.5, 0.0)):
        torch.testing.assert_close(delta[:, frame], share * whole[:, frame])
    assert torch.equal(frames()[:, :2], base[:, :2])
    prompt.set_scale([ScaleRange(0.5), ScaleRange(2.0, frames=(1, 5)), ScaleRange(0, (9, 999))])
    for frame, share in enumerate((0.5, 2.0, 0.5, 0.0, 0.0)):
        torch.testing.assert_close((frames() - base)[:, frame], share * whole[:, frame])
    prompt.set_scale(1.0, frames=(17, 18))
    with pytest.raises(ValueError, match="lie beyond the video of 17 frames"):
        wan.forward(model)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(1, 3), (0.25, 0.75)])
def test_scales_by_step(steps):
    pipe = wan.pipeline()
    seen = []
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale(1.0, steps=steps)
    branch = prompt._parts["transformer"].branches[0]
    hook = pipe.transformer.register_forward_hook(lambda *_: seen.append(bool(branch.terms)))
    for _ in range(2):
        wan.generate(pipe, 4)
    hook.remove()
    assert seen == 2 * [*[False] * 2, *[True] * 4, *[False] * 2]


@torch.no_grad()
def test_scales_by_step_with_schedulers_that_count_none():
    """Stable Diffusion's DDIM says by the timestep alone where it is."""
    pipe = image_adapters.pipeline("sd")
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale(1.0, steps=(1, 2))
    branch, seen = prompt._parts["unet"].branches[0], []
    pipe.unet.register_forward_hook(lambda *_: seen.append(bool(branch.terms)))
    for _ in range(2):
        image_adapters.generate(pipe, "sd")
    assert seen == [False, True] * 2


@pytest.mark.parametrize("name", ["cogvideox", "mochi", "ltx"])
@torch.no_grad()
def test_frames_of_a_transformer_alone(name):
    case = CASES[name]
    model, given = case.build(), case.inputs()
    factor = {"cogvideox": 4, "mochi": 6, "ltx": 8}[name]
    count = 1 + (case.grid[0] - 1) * factor  # frames of the video
    prompt = load_image_prompt(model, adapter(model), scale=0.0)
    base = output(model, given)
    prompt.set_scale(1.0, frames=(1, 1 + factor))
    mask = torch.ones(1, count, 2, 2)
    prompt.set_embeds(noise(1, WIDTH), mask=mask)
    assert not torch.equal(output(model, given), base)
    mask[:, 1 : 1 + factor] = 0.0
    prompt.set_embeds(noise(1, WIDTH), mask=mask)
    assert torch.equal(output(model, given), base)
    prompt.set_embeds(noise(1, WIDTH), mask=mask[:, 1:])
    with pytest.raises(ValueError, match=f"mask has {count - 1} frames, the video {count}"):
        output(model, given)


@torch.no_grad()
def test_a_transformer_alone_counts_changes_of_the_timestep(model):
    base = wan.forward(model)
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale(1.0, steps=(1, 2))
    assert torch.equal(wan.forward(model), base)
    later = wan.inputs(time=500.0)
    assert not torch.equal(output(model, later), output(wan.transformer(), later))


def test_ranges_that_are_none(model):
    for wrong, message in (
        ({"frames": (3, 3)}, "0 <= first < last, got"),
        ({"frames": (0.0, 0.5)}, "frames counts frames"),
        ({"steps": (-1, 3)}, "0 <= first < last"),
        ({"steps": (0.5, 2)}, "whole numbers, or shares"),
    ):
        with pytest.raises(ValueError, match=message):
            ScaleRange(1.0, **wrong)
    prompt = load_image_prompt(model, adapter(model))
    with pytest.raises(ValueError, match="which only a pipeline knows"):
        prompt.set_scale(1.0, steps=(0.0, 0.5))
    with pytest.raises(ValueError, match="give them there"):
        prompt.set_scale([ScaleRange(1.0)], steps=(0, 1))
    with pytest.raises(ValueError, match="not both"):
        prompt.set_scale([ScaleRange(1.0), 1.0])
    unet = CASES["unet"].build()
    with pytest.raises(ValueError, match="UNet2DConditionModel makes images"):
        load_image_prompt(unet, adapter(unet)).set_scale(1.0, frames=(0, 1))


@torch.no_grad()
def test_masks_say_where_each_image_acts(model):
    def grid():
        return added(model, lambda: wan.forward(model)).unflatten(1, (5, 9, 11))

    base, features = grid(), noise(2, WIDTH)
    prompt = load_image_prompt(model, adapter(model))
    alone = []
    for one in features.split(1):
        prompt.set_embeds(one)
        alone.append(grid() - base)
    mask = torch.zeros(2, 9, 11)
    mask[0, :, :4], mask[1, 3:] = 1.0, 0.5
    prompt.set_embeds(features, mask=mask)
    want = sum(m[None, None, ..., None] * x for m, x in zip(mask, alone, strict=True))
    torch.testing.assert_close(grid() - base, want, atol=1e-5, rtol=1e-4)
    # A mask of its own for each of 17 frames.
    moving = torch.zeros(2, 17, 9, 11)
    moving[0, :3], moving[1, 5:9, :, 5:] = 1.0, 1.0
    prompt.set_embeds(features, mask=moving)
    delta = grid() - base
    torch.testing.assert_close(delta[:, 0], alone[0][:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(delta[:, 1], 0.5 * alone[0][:, 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(delta[:, 2, :, 5:], alone[1][:, 2, :, 5:], atol=1e-5, rtol=1e-4)
    assert torch.equal(grid()[:, 3:], base[:, 3:])
    # With a scale by frame they multiply.
    prompt.set_scale(0.5, frames=(0, 1))
    torch.testing.assert_close(
        grid()[:, 0] - base[:, 0], 0.5 * alone[0][:, 0], atol=1e-5, rtol=1e-4
    )
    assert torch.equal(grid()[:, 1:], base[:, 1:])
    prompt.set_scale(1.0)
    prompt.set_embeds(features, mask=torch.zeros(2, 5, 9, 11))
    with pytest.raises(ValueError, match="mask has 5 frames, the video 17"):
        wan.forward(model)


def test_masks_fit_the_grid_as_in_diffusers():
    mask = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0))
    want = F.interpolate(mask[None], size=(8, 8), mode="bicubic")[0].flatten(1)
    assert torch.equal(Masks(mask, 2).fit(VideoShape(1, 8, 8), None), want)
    assert levels(VideoShape(1, 5, 8))[1:3] == [VideoShape(1, 3, 4), VideoShape(1, 2, 2)]
    assert levels(VideoShape(3, 4, 3))[1:] == [VideoShape(3, 2, 2), VideoShape(3, 1, 1)]
    for wrong, message in (
        (mask[:1], "one for each of 2 images, got 1"),
        (mask * 255, "from 0 to 1, got"),
        (mask[0, 0], "got \\(32,\\)"),
        ([mask[0], mask[1, :8]], "of one size"),
        (image_adapters.picture(), "a picture of one channel, got mode RGB"),
    ):
        with pytest.raises(ValueError, match=message):
            Masks(wrong, 2)
    picture = image_adapters.picture().convert("L")
    assert Masks(picture, 2).values.shape == (2, 1, 24, 20)


@torch.no_grad()
def test_masks_on_every_level_of_a_unet():
    pipe = image_adapters.pipeline("sdxl")
    base = image_adapters.generate(pipe, "sdxl")
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    prompt.set_embeds(noise(2, WIDTH), mask=torch.ones(2, 16, 16))
    assert not torch.allclose(image_adapters.generate(pipe, "sdxl"), base, atol=1e-4)
    prompt.set_embeds(noise(2, WIDTH), mask=torch.zeros(16, 16))
    assert torch.equal(image_adapters.generate(pipe, "sdxl"), base)
