"""Which rows of a call are of the negative prompt, and which model of a pipeline is served."""

import copy

import pytest
import torch
from diffusers import (
    LTXConditionPipeline,
    LTXPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from support import image_adapters, wan
from support.image_models import CASES, ltx_inputs, output
from support.image_prompts import (
    WIDTH,
    adapter,
    assert_as_before,
    identity,
    noise,
    trace,
)
from support.tiny import ltx as tiny_ltx

from gen_accel import load_image_prompt
from gen_accel.attention_processors.image_prompt import (
    OtherText,
)
from gen_accel.pipelines.image_prompt.projectors import Resampler


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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="whether its 2 rows include a negative prompt"):
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
@pytest.mark.parametrize("record", [[1.0], ["x"] * 32, [10**400] * 32, None])
def test_a_record_of_text_weights_that_was_changed(model, record):
    one = identity(model)
    one.metadata["text_weights"]["0"] = record
    with pytest.raises(ValueError, match=r"must hold 32 numbers for blocks\.0\.attn2, got"):
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
            reason = "given further frames" if mask.ndim == 4 else "only 105 are of its output"
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
    with pytest.raises(ValueError, match="given 24 tokens, and only 12 are of its output"):
        output(model, given)


@pytest.mark.slow
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


@pytest.mark.slow
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
