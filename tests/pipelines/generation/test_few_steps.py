"""Published weights of few steps: known by name, and sampled as their publishers do."""

import warnings

import pytest
from safetensors.torch import save_file
from support import wan

from gen_accel.demo.job import lora_path
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.plan import AsPublished, plan_of
from gen_accel.pipelines.generation.sampling import denoise, filled
from gen_accel.pipelines.sampler import Sampler, equal_steps
from gen_accel.published import FEW_STEPS, few_steps

DMD = (1.0, 0.757, 0.522)
RCM = (0.9877, 0.9338, 0.8529, 0.609)
LTX = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
LIGHTNING = (1.0, 0.9375, 0.8333333, 0.625)
PUBLISHED = {  # names of weights: sampler, noise of each step, guidance
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": ("lcm", DMD, 1.0),
    "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P": ("lcm", RCM, 1.0),
    "lightx2v/Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v": ("lcm", LIGHTNING, 1.0),
    "lightx2v/Wan2.2-Lightning": ("euler", LIGHTNING, 1.0),
    "lightx2v/Wan2.2-Distill-Loras:wan2.2_t2v_A14b_high_4step.safetensors": (
        "euler",
        LIGHTNING,
        1.0,
    ),
    "Lightricks/LTX-2-19b-distilled": ("euler", LTX, 1.0),
    "minimax_h3_fl2v_turbo_8step_v1.0_bf16.safetensors": ("euler", equal_steps(8, 12.0), 1.0),
    "minimax_h3_fl2v_turbo_8step_v1.0_768p_bf16.safetensors": ("euler", equal_steps(8, 6.0), 1.0),
    "minimax_h3_fl2v_turbo_4step_v1.1_768p_bf16.safetensors": ("euler", equal_steps(4, 6.0), 1.0),
    "hunyuanvideo1.5_480p_i2v_step_distilled": ("euler", equal_steps(8, 7.0), 1.0),
    "FastVideo/FastHunyuan": ("euler", equal_steps(6, 17.0), 6.0),
}
ASKED = {"model": "demo", "prompt": ("a red circle moves left",), "method": "dense"}
SIZES = {"frames": 9, "height": 48, "width": 64, "max_tokens": 8}


def of(tmp_path, name, **fields):
    """Config of a generation with a LoRA of that name, and what was told."""
    file = tmp_path / f"{name.replace('/', '-').removesuffix('.safetensors')}.safetensors"
    save_file({"a.lora_A.weight": wan.transformer().patch_embedding.weight}, file)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", AsPublished)
        config = plan_of(GenerateConfig(**ASKED | {"loras": (str(file),)} | fields)).config
    return config, [str(one.message) for one in told if one.category is AsPublished]


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_sampled_as_published(tmp_path, name):
    sampler, levels, scale = PUBLISHED[name]
    config, [said] = of(tmp_path, name)
    assert "sampled as published" in said
    assert (config.sampler, config.steps, config.guidance_scale) == (sampler, len(levels), scale)
    pipe, seen = wan.pipeline(), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"].flatten()[0].item() / 1000),
        with_kwargs=True,
    )
    sizes = {**SIZES, "guidance_scale": 1.0}
    denoise(pipe, "a cat", filled(pipe, config.model_copy(update=sizes)))
    hook.remove()
    assert seen == pytest.approx(levels, abs=1e-6)


def test_each_has_a_name_that_is_tried():
    found = {few_steps(name) for name in PUBLISHED}
    assert {one for one in FEW_STEPS if not one.about.startswith("FastH3")} <= found
    assert few_steps("someone/wan-style-lora") is None
    for one in FEW_STEPS:
        Sampler(one.sampler, one.levels, one.shift)
        assert not one.levels or len(one.levels) == one.steps


def test_what_is_asked_for_stays(tmp_path):
    name = "lightx2v/Wan2.2-Lightning"
    config, _ = of(tmp_path, name, steps=8)
    assert (config.steps, config.shift, config.levels) == (8, 5.0, ())
    config, _ = of(tmp_path, name, shift=3.0)
    assert (config.sampler, config.shift, config.guidance_scale) == (None, 3.0, 1.0)
    config, _ = of(tmp_path, "FastWan", steps=8)
    assert (config.sampler, config.levels, config.steps) == (None, (), 8)
    config, told = of(tmp_path, name, sampler="lcm", levels=(1.0, 0.5), guidance_scale=1.0)
    assert (config.sampler, config.levels, told) == ("lcm", (1.0, 0.5), [])
    config, told = of(tmp_path, name, guidance_scale=4.0)
    assert config.guidance_scale == 4.0
    assert "guided twice" in told[0]
    config, _ = of(tmp_path, "style")
    assert (config.sampler, config.steps) == (None, None)


def test_a_lora_of_ours_brings_its_own(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AsPublished)
        plan_of(GenerateConfig(**ASKED | {"method": None, "from_lora": lora_path()}))
