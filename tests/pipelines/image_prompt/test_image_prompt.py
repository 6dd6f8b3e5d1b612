"""Image prompts on live models: what they add, where, by what, and no trace of them after."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    LTXConditionPipeline,
    LTXPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from peft import LoraConfig
from support import hunyuan, image_adapters, wan
from support.image_models import CASES, ltx_inputs, output
from support.image_prompts import (
    METHODS,
    TOKENS,
    WIDTH,
    Projector,
    adapter,
    added,
    assert_as_before,
    identity,
    noise,
    sites,
    trace,
)
from support.tiny import ltx as tiny_ltx
from torch import nn
from torch._dynamo.testing import CompileCounter

from gen_accel import ScaleRange, attach, load_image_prompt
from gen_accel.attention_processors.image_prompt import (
    ImageAdapter,
    KeysValues,
    OtherText,
    image_attention,
    new_adapter,
)
from gen_accel.pipelines.image_prompt.projectors import Resampler
from gen_accel.pipelines.image_prompt.strength import (
    Masks,
    block_scales,
    frame_spans,
    levels,
)
from gen_accel.video import VideoShape


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model():
    return wan.transformer()


# What is added


@torch.no_grad()
def test_scale_0_is_the_base_model(case):
    model, given = case.build(), case.inputs()
    before, base = trace(model), output(model, given)
    prompt = load_image_prompt(model, adapter(model), scale=0.0)
    assert torch.equal(output(model, given), base)  # also without an image
    prompt.set_embeds(noise(1, WIDTH).expand(2, -1), each=True)
    assert torch.equal(output(model, given), base)
    prompt.set_scale(1.0)
    pictured = output(model, given)
    assert not torch.allclose(pictured, base, atol=1e-4)
    with prompt.paused():
        assert torch.equal(output(model, given), base)
    assert torch.equal(output(model, given), pictured)
    prompt.remove()
    prompt.remove()
    assert_as_before(model, before)
    assert torch.equal(output(model, given), base)


def test_training_begins_at_the_base_model_and_moves_all(case):
    model, given = case.build().requires_grad_(False), case.inputs()
    for layer in model.modules():  # tiny models whose last layer is zero would stop any gradient
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.2)
    base = output(model, given)
    new = identity(model)
    assert {id(p) for p in new.trained} == {
        id(p) for part in (new.projector, new.layers) for p in part.parameters()
    }
    with load_image_prompt(model, new) as prompt:
        with prompt.using(noise(2, WIDTH), keep=torch.tensor([True, False])):
            out = output(model, given)
            assert torch.equal(out, base)
            (out * noise(*out.shape, seed=3)).mean().backward()
        for name, parameter in new.named_parameters():
            if name.startswith("start."):
                assert parameter.grad is None
            else:
                assert parameter.grad.abs().max() > 0, name
        # A step away from the start, it is another model.
        with torch.no_grad():
            for parameter in new.trained:
                parameter -= 10 * parameter.grad / parameter.grad.norm()
        prompt.set_embeds(noise(2, WIDTH), each=True)
        assert not torch.equal(output(model, given), base)


def test_a_clone_starts_beside_the_base_model(model):
    new = new_adapter(model, Projector(32), variant="base", start="clone")
    assert new.start is None
    assert torch.equal(new.layers["0"].to_k.weight, model.blocks[0].attn2.to_k.weight)
    with torch.no_grad(), load_image_prompt(model, new) as prompt:
        prompt.set_embeds(noise(1, WIDTH))
        assert not torch.allclose(wan.forward(model), wan.forward(wan.transformer()), atol=1e-4)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn2 takes tokens of width 32"):
        new_adapter(model, Projector(8), variant="base")
    with pytest.raises(ValueError, match="start must be"):
        new_adapter(model, Projector(32), variant="base", start="zero")


def test_a_lora_is_not_copied_into_a_new_adapter(model):
    own = model.blocks[0].attn2.to_k.weight.detach().clone()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    new = identity(model)
    assert torch.equal(new.layers["0"].to_k.weight, own)
    base = wan.forward(model)
    with load_image_prompt(model, new) as prompt, prompt.using(noise(2, WIDTH)):
        assert torch.equal(wan.forward(model), base)


@torch.no_grad()
def test_what_is_added_is_the_attention_to_the_image(model):
    one, features = adapter(model), noise(2, WIDTH)
    layer, attn = one.layers["0"], model.blocks[0].attn2
    seen = []
    hook = attn.norm_q.register_forward_hook(lambda _, args, out: seen.append(out))
    base = added(model, lambda: wan.forward(model))
    hook.remove()
    q = seen[0].unflatten(2, (wan.HEADS, wan.HEAD_DIM))
    tokens = one.projector(features).reshape(1, 2 * TOKENS, -1)
    k, v = attn.norm_k(layer.to_k(tokens)), layer.to_v(tokens)
    k, v = (x.unflatten(2, (wan.HEADS, wan.HEAD_DIM)).expand(2, -1, -1, -1) for x in (k, v))
    want = base + 0.7 * image_attention(q, k, v).flatten(2)
    with load_image_prompt(model, one, scale=0.7) as prompt:
        prompt.set_embeds(features)
        torch.testing.assert_close(added(model, lambda: wan.forward(model)), want)


@pytest.mark.parametrize("key_norm", ["none", "own", "plain"])
@pytest.mark.parametrize("registers", [0, 2])
def test_keys_values(key_norm, registers):
    model = wan.transformer()
    layers = {"1": KeysValues(6, 32, bias=True, registers=registers)}
    one = ImageAdapter("base", Projector(6), layers, key_norm=key_norm)
    k, v = one.keys_values(sites(model)[1], noise(2, TOKENS, 6))
    assert k.shape == v.shape == (2, TOKENS + registers, wan.HEADS, wan.HEAD_DIM)
    with torch.no_grad(), load_image_prompt(model, one) as prompt:
        prompt.set_embeds(noise(2, WIDTH))
        assert "1 of 2 attentions" in prompt.describe()
        assert torch.isfinite(wan.forward(model)).all()


def test_a_plain_norm_of_keys(model):
    """Of keys that are as small as its epsilon."""
    layers = {"0": KeysValues(6, 32, bias=False)}
    one = ImageAdapter("lynx_light", Projector(6), layers, key_norm="plain")
    tokens = 1e-3 * noise(1, TOKENS, 6)
    keys = layers["0"].to_k(tokens)
    want = keys * (keys.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    for dtype in (torch.float32, torch.bfloat16):
        k, _ = one.to(dtype).keys_values(sites(model)[0], tokens.to(dtype))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(k.flatten(2).float(), want, atol=tolerance, rtol=tolerance)


def test_an_adapter_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="key_norm must be one of"):
        ImageAdapter("base", Projector(6), {"0": KeysValues(6, 32, bias=False)}, key_norm="rms")
    with pytest.raises(ValueError, match="needs layers"):
        ImageAdapter("base", Projector(6), {})


@torch.no_grad()
def test_adapters_add_up(model):
    def run():
        wan.forward(model)

    base = added(model, run)
    alone = []
    for seed in (0, 7):
        with load_image_prompt(model, adapter(model, seed)) as prompt:
            prompt.set_embeds(noise(1, WIDTH, seed=seed))
            alone.append(added(model, run) - base)
    prompts = [
        load_image_prompt(model, adapter(model, seed), name=str(seed), scale=scale)
        for seed, scale in ((0, 1.0), (7, 0.5))
    ]
    for seed, prompt in zip((0, 7), prompts, strict=True):
        prompt.set_embeds(noise(1, WIDTH, seed=seed))
    torch.testing.assert_close(added(model, run) - base, alone[0] + 0.5 * alone[1])
    prompts[0].remove()
    torch.testing.assert_close(added(model, run) - base, 0.5 * alone[1])
    prompts[1].remove()
    assert torch.equal(added(model, run), base)


# Beside methods and LoRAs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("family", [wan, hunyuan], ids=lambda family: family.__name__)
@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")
@torch.no_grad()
@pytest.mark.slow
def test_with_each_method_in_any_order(family, method):
    model = family.transformer()
    before, base = trace(model), family.forward(model)
    one = adapter(model)
    with attach(model, method):
        sparse = family.forward(model)
    assert_as_before(model, before)

    def load():
        prompt = load_image_prompt(model, one)
        prompt.set_embeds(noise(1, WIDTH))
        return prompt

    prompt = load()
    alone = family.forward(model)
    handle = attach(model, method)
    both = family.forward(model)
    assert not torch.allclose(both, sparse, atol=1e-4)
    assert not torch.allclose(both, alone, atol=1e-4)
    prompt.remove()
    assert torch.equal(family.forward(model), sparse)
    prompt = load()
    assert torch.equal(family.forward(model), both)
    with handle.paused():
        assert torch.equal(family.forward(model), alone)
    handle.detach()
    assert torch.equal(family.forward(model), alone)
    prompt.remove()
    assert_as_before(model, before)
    assert torch.equal(family.forward(model), base)


@pytest.mark.parametrize("first", ["lora", "prompt"])
@torch.no_grad()
def test_beside_a_lora(model, first):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)

    def lora():
        torch.manual_seed(9)
        model.add_adapter(config)

    def load():
        prompt = load_image_prompt(model, one)
        prompt.set_embeds(noise(1, WIDTH))
        return prompt

    one = adapter(model)
    if first == "lora":
        lora()
        tuned, prompt = wan.forward(model), load()
        both = wan.forward(model)
        assert not torch.allclose(both, tuned, atol=1e-4)
        prompt.remove()
        assert torch.equal(wan.forward(model), tuned)
        prompt = load()
        model.unload_lora()
        with load_image_prompt(wan.transformer(), one, name="other") as other:
            assert other.name == "other"
    else:
        prompt = load()
        prompted = wan.forward(model)
        lora()
        both = wan.forward(model)
        assert not torch.allclose(both, prompted, atol=1e-4)
        model.unload_lora()
        assert torch.equal(wan.forward(model), prompted)
    prompt.remove()
    assert torch.equal(wan.forward(model), wan.forward(wan.transformer()))


# How strongly, and where


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


# What is computed once


class Counter:
    """Runs of the projector and of one layer."""

    def __init__(self, adapter):
        self.runs = []
        adapter.projector.register_forward_hook(partial(self._add, "projector"))
        adapter.layers["0"].register_forward_hook(partial(self._add, "layer"))

    def _add(self, name, *_):
        self.runs.append(name)

    def take(self):
        found, self.runs = sorted(self.runs), []
        return found


@torch.no_grad()
def test_keys_and_values_are_computed_once():
    pipe = wan.pipeline()
    one = adapter(pipe.transformer)
    count = Counter(one)
    prompt = load_image_prompt(pipe, one)
    prompt.set_embeds(noise(1, WIDTH))
    first = wan.generate(pipe, 4)
    both = ["layer", "layer", "projector", "projector"]  # image, and none for the negative prompt
    assert count.take() == both
    assert torch.equal(wan.generate(pipe, 4), first)
    prompt.set_scale(0.5)
    wan.generate(pipe, 4, prompt=["a", "b"])
    assert count.take() == []
    prompt.set_scale(1.0)
    for change in (
        lambda: prompt.set_embeds(noise(1, WIDTH, seed=1)),
        lambda: one.layers["0"].to_k.weight.mul_(2),
        lambda: one.double(),
    ):
        change()
        other = wan.generate(pipe, 4)
        assert count.take() == both
        assert not torch.equal(other, first)
        first = other
    # The model's own norm of keys is part of them.
    pipe.transformer.blocks[0].attn2.norm_k.weight.mul_(3)
    changed = wan.generate(pipe, 4)
    assert count.take() == ["layer", "layer"]
    assert not torch.equal(changed, first)
    pipe.transformer.to(torch.bfloat16)
    assert torch.isfinite(wan.generate(pipe, 2)).all()


def test_with_gradients_nothing_is_kept(model):
    one = adapter(model).requires_grad_(True)
    count = Counter(one)
    prompt = load_image_prompt(model, one)
    prompt.set_embeds(noise(1, WIDTH))
    count.take()
    for _ in range(2):
        wan.forward(model).square().mean().backward()
        assert count.take() == ["layer", "projector"]
    with torch.no_grad():
        wan.forward(model)
        wan.forward(model)
    assert count.take() == ["layer"]
    with torch.inference_mode():
        wan.forward(model)
    one.requires_grad_(False)
    wan.forward(model).square().mean().backward()  # through what was kept, for a LoRA
    assert count.take() == []


def test_rows_that_train_by_features_of_their_own(model):
    one = adapter(model).requires_grad_(True)
    prompt = load_image_prompt(model, one)
    features, keep = noise(2, WIDTH), torch.tensor([False, True])
    with prompt.using(features, keep):
        out = wan.forward(model)
    given = wan.inputs()
    for row, own in enumerate((torch.zeros(1, WIDTH), features[1:])):
        prompt.set_embeds(own)
        alone = output(model, {k: x[row : row + 1] for k, x in given.items()})
        torch.testing.assert_close(out[row : row + 1], alone)
    with (
        pytest.raises(ValueError, match=r"keep must be of shape \(2,\), got \(1,\)"),
        prompt.using(features, keep[:1]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="3 images, one for each prompt"),
        prompt.using(noise(3, WIDTH)),
    ):
        wan.forward(model)


@pytest.mark.parametrize("family", [wan, hunyuan], ids=lambda family: family.__name__)
def test_gradient_checkpointing(family):
    model = family.transformer().train()
    one = adapter(model).requires_grad_(True)
    prompt = load_image_prompt(model, one)

    def gradients():
        one.zero_grad()
        with prompt.using(noise(2, WIDTH)):
            loss = family.forward(model).square().mean()
        with torch.no_grad():  # such as another opinion on the same batch
            prompt.set_embeds(noise(1, WIDTH, seed=4))
            family.forward(model)
        loss.backward()
        return [p.grad.clone() for p in one.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changed", ["features", "keep", "image", "scale", None])
@pytest.mark.slow
def test_gradient_checkpointing_of_two_forward_passes(model, changed):
    """The first would be computed again with what the second one was shown."""
    model.train().enable_gradient_checkpointing()
    one = adapter(model).requires_grad_(True)
    prompt = load_image_prompt(model, one)
    features, keep = noise(2, WIDTH), torch.tensor([True, True])

    def loss(again=False):
        other = changed if again else None
        if changed == "image":
            prompt.set_embeds(noise(1, WIDTH, seed=int(again)))
            return wan.forward(model).square().mean()
        prompt.set_scale(0.5 if other == "scale" else 0.8)
        rows = noise(2, WIDTH, seed=4) if other == "features" else features
        with prompt.using(rows, ~keep if other == "keep" else keep):
            return wan.forward(model).square().mean()

    if changed is None:
        (loss() + loss()).backward()
        both = [p.grad.clone() for p in one.parameters()]
        one.zero_grad()
        for _ in range(2):
            loss().backward()
        for a, b in zip(both, one.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad)
        return
    first, second = loss(), loss(again=True)
    second.backward()
    with pytest.raises(ValueError, match=r"another forward pass .* run backward\(\) after each"):
        first.backward()
    for again in (False, True):
        loss(again).backward()
    model.disable_gradient_checkpointing()
    (loss() + loss(again=True)).backward()


# Guidance


def calls_of(model, run):
    """Arguments and output of each forward pass in `run`."""
    found = []
    hook = model.register_forward_hook(
        lambda _, args, kwargs, out: found.append((args, kwargs, out[0])), with_kwargs=True
    )
    run()
    hook.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "video"])
def test_a_negative_prompt_in_calls_of_its_own(kind):
    """Which video to video does not name."""
    pipe, model = wan.PIPELINES[kind](), wan.transformer()
    image, negative = noise(1, WIDTH), noise(1, WIDTH, seed=1)
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    alone = load_image_prompt(model, adapter(model))
    for given in (negative, None):
        prompt.set_embeds(image, negative=given)
        calls = calls_of(pipe.transformer, lambda: wan.generate(pipe, 2))
        assert len(calls) == 4
        for place, (_, kwargs, out) in enumerate(calls):
            against = torch.zeros(1, WIDTH) if given is None else given
            alone.set_embeds(against if place % 2 else image)
            assert torch.equal(model(**kwargs)[0], out)


@torch.no_grad()
def test_a_negative_prompt_in_the_first_rows():
    pipe, unet = image_adapters.pipeline("sd"), image_adapters.sd_unet()
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    alone = load_image_prompt(unet, adapter(unet))
    images, negative = noise(2, WIDTH), noise(1, WIDTH, seed=1)

    def rows_by(given):
        """The rows of each call, and the features that each is to go by."""
        calls = calls_of(pipe.unet, lambda: pipe(**given))
        for args, kwargs, out in calls:
            states = kwargs["encoder_hidden_states"]
            for row in range(len(out)):
                yield row, args[0][row : row + 1], args[1], states[row : row + 1], out[row]

    def assert_rows(given, features):
        for row, x, t, states, out in rows_by(given):
            alone.set_embeds(features[row])
            own = unet(x, t, encoder_hidden_states=states, return_dict=False)[0][0]
            torch.testing.assert_close(out, own)

    together = images
    prompt.set_embeds(images, negative=negative)
    assert_rows(image_adapters.arguments("sd"), [negative, together])
    assert_rows(image_adapters.arguments("sd", guided=False), [together])
    # One image for each of two prompts, with two pictures of each prompt.
    prompt.set_embeds(images, negative=negative, each=True)
    one, two = images.split(1)
    given = image_adapters.arguments("sd", prompts=2) | {
        "num_images_per_prompt": 2,
        "latents": noise(4, 4, 8, 8),
    }
    assert_rows(given, [*[negative] * 4, one, one, two, two])
    prompt.set_embeds(noise(3, WIDTH), each=True)
    with pytest.raises(ValueError, match="3 images, one for each prompt, do not go with 4 rows"):
        pipe(**given)


@torch.no_grad()
def test_another_pipeline_with_the_same_model():
    """Each goes by its own guidance, whatever the other ran with, or whether it ran."""
    pipe, lone = image_adapters.pipeline("sd"), image_adapters.pipeline("sd")
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    prompts = [load_image_prompt(p, adapter(p.unet)) for p in (pipe, lone)]
    prompts.append(load_image_prompt(lone.unet, adapter(lone.unet), name="more", scale=0.0))
    for prompt in prompts:
        prompt.set_embeds(noise(1, WIDTH), negative=noise(1, WIDTH, seed=1))
    runs = [{"guided": True}, {"guided": False, "prompts": 2}, {"guided": True}]
    wants = [image_adapters.generate(lone, "sd", **run) for run in runs]
    for run, want in zip(runs, wants, strict=True):
        assert torch.equal(image_adapters.generate(other, "sd", **run), want)
        image_adapters.generate(pipe, "sd", guided=not run["guided"])
    # On the model alone it goes by the pipeline that runs.
    prompts[1].set_scale(0.0)
    prompts[2].set_scale(1.0)
    for run, want in zip(runs, wants, strict=True):
        assert torch.equal(image_adapters.generate(lone, "sd", **run), want)


@torch.no_grad()
def test_rows_that_may_be_of_either_prompt():
    pipe = image_adapters.pipeline("sd")
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    prompt.set_embeds(noise(1, WIDTH))
    image_adapters.generate(pipe, "sd")
    x, text = noise(2, 4, 8, 8), noise(2, 6, image_adapters.CROSS)
    with pytest.raises(ValueError, match="its 2 rows may hold those of a negative prompt or not"):
        pipe.unet(x, 500, encoder_hidden_states=text)
    prompt.set_embeds(noise(1, WIDTH).expand(2, -1), each=True)
    both = pipe.unet(x, 500, encoder_hidden_states=text).sample
    for row in range(2):  # as two calls of a row each
        own = slice(row, row + 1)
        prompt.set_embeds(noise(1, WIDTH))
        one = pipe.unet(x[own], 500, encoder_hidden_states=text[own]).sample
        torch.testing.assert_close(both[own], one, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [1, 2])
def test_guidance_with_a_third_side(prompts):
    base = image_adapters.pipeline("sd")
    unet = type(base.unet).from_config(base.unet.config, in_channels=8).eval()
    parts = base.components | {"unet": unet}
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    load_image_prompt(pipe, adapter(pipe.unet)).set_embeds(noise(1, WIDTH))
    given = image_adapters.arguments("sd", prompts=prompts)
    for name in ("latents", "height", "width"):
        del given[name]
    given |= {"image": noise(prompts, 4, 8, 8), "num_inference_steps": 1}
    with pytest.raises(
        ValueError, match=f"guides by an image too, in a third of its {3 * prompts}"
    ):
        pipe(**given)


def test_guidance_that_a_pipeline_keeps_to_itself():
    """It is not asked of what its run holds: that has a third side, and does not say so."""
    base = image_adapters.pipeline("sdxl")
    unet = type(base.unet).from_config(base.unet.config, in_channels=8).eval()
    encoder = ("image_encoder", "feature_extractor")
    parts = {name: x for name, x in base.components.items() if name not in encoder}
    pipe = StableDiffusionXLInstructPix2PixPipeline(**(parts | {"unet": unet}))
    load_image_prompt(pipe, adapter(unet)).set_embeds(noise(1, WIDTH))
    given = image_adapters.arguments("sdxl", size=(64, 64))
    given |= {"image": torch.rand(1, 3, 64, 64), "num_inference_steps": 1}
    del given["latents"]
    with pytest.raises(ValueError, match="does not tell whether a negative prompt is among its 3"):
        pipe(**given)


def test_rows_that_do_not_divide():
    model = CASES["ltx"].build()
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    given = {k: x[:1] if isinstance(x, torch.Tensor) else x for k, x in ltx_inputs().items()}
    with (
        model.cache_context("cond_uncond"),
        pytest.raises(ValueError, match="1 rows do not divide into negative and positive ones"),
    ):
        output(model, given)


@torch.no_grad()
def test_the_first_rows_of_pipelines_that_tell():
    """CogVideoX keeps to itself whether there is guidance, and runs all in one kind of call."""
    case = CASES["cogvideox"]
    model, given = case.build(), case.inputs()
    prompt = load_image_prompt(model, adapter(model))
    image, negative = noise(1, WIDTH), noise(1, WIDTH, seed=1)
    prompt.set_embeds(image, negative=negative)
    positive = output(model, given)
    prompt.set_embeds(negative)
    against = output(model, given)
    prompt.set_embeds(image, negative=negative)
    with model.cache_context("cond_uncond"):
        both = output(model, given)
    torch.testing.assert_close(both[:1], against[:1])
    torch.testing.assert_close(both[1:], positive[1:])
    assert torch.equal(output(model, given), positive)


@torch.no_grad()
def test_masks_of_one_image_for_each_prompt():
    model = wan.transformer()
    prompt = load_image_prompt(model, adapter(model))
    features, mask = noise(2, WIDTH), torch.rand(2, 18, 22)
    prompt.set_embeds(features, mask=mask, each=True)
    both = wan.forward(model)
    given = wan.inputs()
    for row in range(2):
        own = slice(row, row + 1)
        prompt.set_embeds(features[own], mask=mask[own])
        alone = output(model, {k: x[own] for k, x in given.items()})
        torch.testing.assert_close(both[own], alone, atol=1e-5, rtol=1e-4)


# Pipelines, copies, offloading, graphs


@torch.no_grad()
def test_two_transformers():
    pipe = wan.two_stage()
    stock = wan.generate(pipe, 4)
    with load_image_prompt(pipe, adapter(pipe.transformer)) as prompt:
        prompt.set_embeds(noise(1, WIDTH))
        assert "2 of 2 attentions of WanTransformer3DModel, 2 of 2" in prompt.describe()
        assert not torch.allclose(wan.generate(pipe, 4), stock, atol=1e-4)
    assert torch.equal(wan.generate(pipe, 4), stock)


@torch.no_grad()
@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_one_of_two_transformers(part):
    """The other would subtract what its own layers are no copies of."""
    pipe = wan.two_stage()
    stock, one = wan.generate(pipe, 4), identity(getattr(pipe, part))
    with pytest.raises(ValueError, match="has transformer and transformer_2: say which by part="):
        load_image_prompt(pipe, one)
    with load_image_prompt(pipe, one, part=part) as prompt:
        prompt.set_embeds(noise(1, WIDTH))
        assert torch.equal(wan.generate(pipe, 4), stock)
    one.metadata["recipe"] = {"part": part}
    with load_image_prompt(pipe, one) as prompt:
        prompt.set_embeds(noise(1, WIDTH))
        assert torch.equal(wan.generate(pipe, 4), stock)
    with pytest.raises(ValueError, match="part must be one of transformer, transformer_2, got"):
        load_image_prompt(pipe, one, part="unet")


@torch.no_grad()
@pytest.mark.filterwarnings("error::gen_accel.attention_processors.image_prompt.OtherText")
def test_text_weights_that_are_others(model):
    one = identity(model)
    load_image_prompt(model, one).remove()
    other = wan.transformer().to(torch.bfloat16)  # rounding is no other model
    load_image_prompt(other, copy.deepcopy(one)).remove()
    prompt = load_image_prompt(model, one)
    prompt.set_embeds(noise(1, WIDTH))
    wan.forward(model)
    for block in model.blocks:  # as a LoRA is merged
        block.attn2.to_v.weight.add_(0.05 * block.attn2.to_v.weight.std())
    with pytest.warns(OtherText, match="differ by 0.0"):
        wan.forward(model)
    prompt.remove()
    with pytest.warns(OtherText, match=r"to_k and to_v of blocks\.0\.attn2 and others"):
        load_image_prompt(model, one)


@torch.no_grad()
def test_processors_that_are_replaced_after_loading():
    pipe = image_adapters.pipeline("sd")
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    prompt.set_embeds(noise(1, WIDTH))
    prompted = image_adapters.generate(pipe, "sd")
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"processor of down_blocks.*attn2 was replaced after"):
        image_adapters.generate(pipe, "sd")
    pipe.unfuse_qkv_projections()
    assert torch.equal(image_adapters.generate(pipe, "sd"), prompted)
    pipe.enable_attention_slicing()
    with pytest.raises(ValueError, match="was replaced after"):
        image_adapters.generate(pipe, "sd")


@torch.no_grad()
@pytest.mark.parametrize("mask", [torch.ones(8, 8), torch.ones(1, 17, 8, 8)], ids=["one", "each"])
def test_masks_where_other_frames_stand_beside_the_video(mask):
    for kind in (LTXPipeline, LTXConditionPipeline):
        pipe = tiny_ltx.pipeline(kind)
        prompt = load_image_prompt(pipe, adapter(pipe.transformer))
        prompt.set_embeds(noise(1, WIDTH), mask=mask)
        if kind is LTXPipeline:
            assert torch.isfinite(tiny_ltx.generate(pipe)).all()
        else:
            reason = "given further frames" if mask.ndim == 4 else "only 105 are of what it makes"
            with pytest.raises(ValueError, match=reason):
                tiny_ltx.generate(pipe)
            prompt.set_embeds(noise(1, WIDTH))
            assert torch.isfinite(tiny_ltx.generate(pipe)).all()


@torch.no_grad()
def test_masks_where_other_images_stand_beside_the_image():
    case = CASES["flux"]
    model, given = case.build(), case.inputs()
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH), mask=torch.ones(8, 8))
    assert torch.isfinite(output(model, given)).all()
    reference = given["img_ids"] + torch.tensor([1.0, 0.0, 0.0])
    given["img_ids"] = torch.cat([given["img_ids"], reference])
    given["hidden_states"] = given["hidden_states"].repeat(1, 2, 1)
    with pytest.raises(ValueError, match="given 24 tokens, and only 12 are of what it makes"):
        output(model, given)


@torch.no_grad()
def test_frames_that_come_before_the_video():
    pipe = wan.PIPELINES["control"]()
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale(1.0, frames=(0, 1))
    wan.generate(pipe, 1)
    given = {"reference_images": [wan.picture(1)]}
    with pytest.raises(ValueError, match="VACE puts its reference images before the frames"):
        wan.generate(pipe, 1, **given)
    prompt.set_scale(1.0)
    prompt.set_embeds(noise(1, WIDTH), mask=torch.ones(1, 9, 8, 8))
    with pytest.raises(ValueError, match="Give scales without frames, and a mask for all"):
        wan.generate(pipe, 1, **given)
    prompt.set_embeds(noise(1, WIDTH), mask=torch.ones(8, 8))
    assert torch.isfinite(wan.generate(pipe, 1, **given)).all()
    case = CASES["cogvideox 1.5"]
    model = case.build()
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale(1.0, frames=(0, 1))
    with pytest.raises(ValueError, match=r"CogVideoX 1\.5 may fill up its latents"):
        output(model, case.inputs())


@torch.no_grad()
def test_queries_are_not_made_for_nothing():
    """Flux's are those before rotation, which its processor does not keep."""
    case = CASES["flux"]
    model, seen = case.build(), []
    attn = model.transformer_blocks[0].attn
    attn.to_q.register_forward_hook(lambda *_: seen.append(1))
    prompt = load_image_prompt(model, adapter(model), scale=0.0)
    prompt.set_embeds(noise(1, WIDTH))
    output(model, case.inputs())
    assert len(seen) == 1
    prompt.set_scale(1.0)
    output(model, case.inputs())
    assert len(seen) == 3


def test_features_that_are_refused_when_they_are_set(model):
    prompt = load_image_prompt(model, adapter(model))
    with pytest.raises(ValueError, match=r"does not take features of \(1, 6\)"):
        prompt.set_embeds(noise(1, WIDTH), negative=noise(1, WIDTH + 1))
    prompt.remove()
    with pytest.raises(ValueError, match="'default' was removed: load it again"):
        prompt.set_embeds(noise(1, WIDTH))
    with pytest.raises(ValueError, match=r"give one image as features\[None\]"):
        Resampler(6, 8, tokens=2, dim=8, depth=1, heads=1)(noise(5, 6))


@torch.no_grad()
def test_image_to_video_with_an_encoder_of_its_own():
    pipe = wan.PIPELINES["image with encoder"]()
    encoder, before = pipe.image_encoder, trace(pipe.transformer)
    stock = wan.generate(pipe)
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    assert not torch.allclose(wan.generate(pipe), stock, atol=1e-4)
    prompt.remove()
    assert_as_before(pipe.transformer, before)
    assert pipe.image_encoder is encoder
    assert torch.equal(wan.generate(pipe), stock)


def linear_of(embedding):
    """A projector of an encoder's embeddings."""
    made = Projector(image_adapters.CROSS)
    made.proj = nn.Linear(embedding, TOKENS * made.width)
    return made


@torch.no_grad()
def test_images_go_through_the_encoder_of_the_pipeline():
    pipe = image_adapters.pipeline("sd")
    made = new_adapter(pipe.unet, linear_of(image_adapters.EMBEDDING), variant="base")
    prompt = load_image_prompt(pipe, made)
    picture = image_adapters.picture()
    with pytest.raises(FileNotFoundError, match="no image at nowhere"):
        prompt.set_image("nowhere.png")
    for image in (picture, [picture, picture]):
        prompt.set_image(image, negative=picture)
        assert torch.isfinite(image_adapters.generate(pipe, "sd")).all()
    prompt.set_image(picture)
    base = image_adapters.generate(pipe, "sd")
    prompt.remove()
    assert torch.equal(image_adapters.generate(pipe, "sd"), base)  # which it started from


@torch.no_grad()
@pytest.mark.slow
def test_the_encoder_that_the_adapter_names(tmp_path):
    image_adapters.vision().save_pretrained(tmp_path)
    image_adapters.extractor().save_pretrained(tmp_path)
    picture, seen = image_adapters.picture(), {}

    def shown(pipe, **options):
        made = new_adapter(pipe.unet, linear_of(image_adapters.EMBEDDING), variant="base")
        made.layers["1"].to_v.weight.mul_(2)
        made.metadata["image_encoder"] = str(tmp_path)
        with load_image_prompt(pipe, made, **options) as prompt:
            prompt.set_image(picture)
            return image_adapters.generate(pipe, "sd")

    own = image_adapters.vision(seed=8)  # gives features that mean nothing to the adapter
    for name, kept in (("named", None), ("own", own)):
        pipe = image_adapters.pipeline("sd")
        pipe.image_encoder = kept
        seen[name] = shown(pipe)
        seen[f"{name}, given"] = shown(pipe, image_encoder=tmp_path)
        assert pipe.image_encoder is kept
    assert torch.equal(seen["named"], seen["named, given"])
    assert torch.equal(seen["named"], seen["own, given"])
    assert torch.equal(seen["named"], seen["own"])


@torch.no_grad()
def test_an_encoder_that_is_gone_is_not_needed_for_embeddings(tmp_path):
    pipe = image_adapters.pipeline("sd")
    pipe.image_encoder = None
    made = new_adapter(pipe.unet, linear_of(image_adapters.EMBEDDING), variant="base")
    made.metadata["image_encoder"] = str(tmp_path / "gone")
    prompt = load_image_prompt(pipe, made)
    prompt.set_embeds(noise(1, image_adapters.EMBEDDING))
    assert torch.isfinite(image_adapters.generate(pipe, "sd")).all()
    with pytest.raises(ValueError, match=r"no CLIP vision model at .*gone"):
        prompt.set_image(image_adapters.picture())


@torch.no_grad()
def test_a_copied_model_has_a_prompt_of_its_own(model):
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    prompted = wan.forward(model)
    other = copy.deepcopy(model)
    assert torch.equal(wan.forward(other), prompted)
    prompt.set_scale(0.0)
    assert torch.equal(wan.forward(other), prompted)
    prompt.remove()
    assert torch.equal(wan.forward(other), prompted)
    assert torch.equal(wan.forward(model), wan.forward(wan.transformer()))
    model.add_module("image_prompt_default", nn.Module())  # the copy's is not in the way
    del model.image_prompt_default


def test_a_model_that_trains_can_be_copied(model):
    prompt = load_image_prompt(model, adapter(model).requires_grad_(True))
    with prompt.using(noise(2, WIDTH)):
        wan.forward(model).mean().backward()
    prompt.set_embeds(noise(1, WIDTH))
    with torch.no_grad():
        assert torch.equal(wan.forward(copy.deepcopy(model)), wan.forward(model))


@torch.no_grad()
def test_a_pipeline_is_not_kept_alive():
    pipe = wan.pipeline()
    model, prompt = pipe.transformer, load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    wan.generate(pipe)
    del pipe
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone"):
        wan.forward(model)
    prompt.remove()
    wan.forward(model)


@pytest.mark.parametrize("loaded", ["before", "after"])
@torch.no_grad()
def test_offloading(model, loaded):
    """As enable_sequential_cpu_offload does it, with the CPU for the device."""
    one = identity(model)
    with torch.no_grad():
        one.layers["0"].to_v.weight.mul_(2)
    prompt = load_image_prompt(model, one)
    prompt.set_embeds(noise(1, WIDTH))
    want = wan.forward(model)
    if loaded == "after":
        prompt.remove()
    cpu_offload(model, execution_device=torch.device("cpu"))
    if loaded == "after":
        prompt = load_image_prompt(model, one)
        prompt.set_embeds(noise(1, WIDTH))
    for _ in range(2):
        torch.testing.assert_close(wan.forward(model), want)
    prompt.remove()
    offloaded = wan.forward(model)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(offloaded, wan.forward(wan.transformer()))


@torch.no_grad()
def test_offloading_as_a_whole(model):
    """As enable_model_cpu_offload does it, which wraps `forward`, and comes off in any order."""
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    want = wan.forward(model)
    _, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert torch.equal(wan.forward(model), want)
    hook.remove()
    assert torch.equal(wan.forward(model), want)
    _, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    prompt.remove()
    assert hasattr(model, "_hf_hook")
    assert torch.equal(wan.forward(model), wan.forward(wan.transformer()))
    hook.remove()


@pytest.mark.gpu
@torch.no_grad()
def test_enable_model_cpu_offload():
    pipe = wan.pipeline()
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    want = wan.generate(pipe)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(wan.generate(pipe).cpu(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_blocks_share_a_graph(model, compiler):
    torch._dynamo.reset()
    prompt = load_image_prompt(model, adapter(model))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale([0.5, 0.25])
    want = wan.forward(model)
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(wan.forward(model), want)
    assert counter.frame_count == 1
    prompt.set_embeds(noise(1, WIDTH, seed=2))
    assert not torch.allclose(wan.forward(model), want, atol=1e-4)
    prompt.set_scale([0.75, 2.0])
    wan.forward(model)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# What is refused


def test_no_image(model):
    load_image_prompt(model, adapter(model), name="face")
    with pytest.raises(ValueError, match=r"no image is set for the base adapter 'face': call"):
        wan.forward(model)


def test_a_name_is_given_once(model):
    prompt = load_image_prompt(model, adapter(model))
    before = trace(model)
    with pytest.raises(ValueError, match="'default' is on transformer already: remove it"):
        load_image_prompt(model, adapter(model))
    assert_as_before(model, before)
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="must not be empty or hold a dot"):
            load_image_prompt(model, adapter(model), name=name)
    prompt.remove()
    load_image_prompt(model, adapter(model))


def test_features_that_do_not_fit(model):
    prompt = load_image_prompt(model, adapter(model))
    for wrong, message in (
        (noise(1, 6), r"the base adapter does not take features of \(1, 6\)"),
        (noise(5), r"\(images, \.\.\.\), or tensors by name, got \(5,\)"),
        ({"id": noise(1, 5), "clip": noise(2, 5)}, "of as many images each"),
        ({"id": noise(1, 5)}, "does not take features"),
        (None, "must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt.set_embeds(wrong)
    with pytest.raises(ValueError, match="one for each of 3, got 2"):
        prompt.set_embeds(noise(3, 5), negative=noise(2, 5))


def test_the_adapter_of_another_model(model):
    before = trace(model)
    wider = wan.transformer(num_attention_heads=4)
    longer = wan.transformer(num_layers=3)
    for other, message in (
        (wider, r"to_k of its layer 0 takes 64 to 64, the projector makes 64 and blocks.0.attn2"),
        (longer, r"it has layers for attentions 2, WanTransformer3DModel has 0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_prompt(model, adapter(other))
    with pytest.raises(ValueError, match="no image prompts for Linear; served: "):
        load_image_prompt(nn.Linear(2, 2), adapter(model))
    with pytest.raises(TypeError, match="neither a pipeline"):
        load_image_prompt("a pipe", adapter(model))
    with pytest.raises(ValueError, match=r"'blocks\.7', which is none of"):
        load_image_prompt(model, adapter(model), scale={"blocks.7": 1.0})
    assert_as_before(model, before)


@torch.no_grad()
@pytest.mark.slow
def test_a_model_that_is_compiled(model):
    model.compile()
    with pytest.raises(ValueError, match="compiled already"):
        load_image_prompt(model, adapter(wan.transformer()))
