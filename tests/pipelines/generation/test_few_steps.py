"""Published weights of few steps: known by name, loaded from the layout of their files, and
sampled as their publishers do."""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import wan
from support.tiny import hunyuan_video15, ltx2, minimax_h3

from gen_accel import demo
from gen_accel.attention_processors.attached.trained import trained_of
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.demo.job import lora_path
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.model_index import index_of
from gen_accel.pipelines.generation.plan import AsPublished, plan_of
from gen_accel.pipelines.generation.sampling import denoise, filled
from gen_accel.pipelines.sampler import Sampler, equal_steps
from gen_accel.published import FEW_STEPS, few_steps

DMD = (1.0, 0.757, 0.522)
RCM = (0.9877, 0.9338, 0.8529, 0.609)
LTX = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
LIGHTNING = (1.0, 0.9375, 0.8333333, 0.625)
NEAR = 2e-6  # as UniPC begins at 1 - 1e-6
CAUSVID = (0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074)
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
    "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model.safetensors": (
        "euler",
        LIGHTNING,
        1.0,
    ),
    "Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors": ("lcm", CAUSVID, 1.0),
    "tianweiy/CausVid/autoregressive_checkpoint": ("lcm", DMD, 1.0),
    "tianweiy/CausVid/autoregressive_checkpoint_warp_4step_cfg2": (
        "lcm",
        equal_steps(4, 8.0),
        1.0,
    ),
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors": ("lcm", DMD, 1.0),
    "Wan2.1_T2V_1.3B_SelfForcing_DMD-FP16.safetensors": ("lcm", LIGHTNING, 1.0),
    "Efficient-Large-Model/LongLive-1.3B": ("lcm", LIGHTNING, 1.0),
    "zhuhz22/Causal-Forcing/chunkwise": ("lcm", LIGHTNING, 1.0),
    "aejion/AccVideo-WanX-T2V-14B": ("unipc", equal_steps(10, 5.0), 1.0),
    "Lightricks/LTX-2-19b-distilled": ("euler", LTX, 1.0),
    "minimax_h3_fl2v_turbo_8step_v1.0_bf16.safetensors": ("euler", equal_steps(8, 12.0), None),
    "minimax_h3_fl2v_turbo_8step_v1.0_768p_bf16.safetensors": ("euler", equal_steps(8, 6.0), None),
    "minimax_h3_fl2v_turbo_4step_v1.1_768p_bf16.safetensors": ("euler", equal_steps(4, 6.0), None),
    "hunyuanvideo1.5_480p_i2v_step_distilled": ("euler", equal_steps(8, 7.0), None),
    "FastVideo/FastHunyuan": ("euler", equal_steps(6, 17.0), 6.0),
}
ASKED = {"model": "demo", "prompt": ("a red circle moves left",), "method": "dense"}
SIZES = {"frames": 9, "height": 48, "width": 64, "max_tokens": 8}


def of(tmp_path, name, **fields):
    """Config of a generation with a LoRA of that name, and what was told."""
    home, _, last = name.rpartition("/") if "_noise" in name else ("", "", name.replace("/", "-"))
    file = tmp_path / home / f"{last.removesuffix('.safetensors')}.safetensors"
    file.parent.mkdir(exist_ok=True)
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
    assert seen == pytest.approx(levels, abs=NEAR)


def test_each_has_a_name_that_is_tried():
    found = {few_steps(name) for name in PUBLISHED}
    assert {one for one in FEW_STEPS if not one.about.startswith("FastH3")} <= found
    assert few_steps("someone/wan-style-lora") is None
    assert few_steps("FastVideo/CausalWan2.2-I2V-A14B-Preview", "WanCausalDMDPipeline") is None
    assert few_steps("TencentARC/RollingForcing") is None
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


OF_WAN = {  # layers of the original model, by diffusers' names
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
}
OF_LTX = {"transformer_blocks.1.attn1.to_q": "transformer_blocks.1.attn1.to_q"}
OF_H3 = {"transformer_blocks.1.attn.to_q": "transformer_blocks.1.attn.to_q"}
RANK = 2
PAIRS, KOHYA = ("lora_A", "lora_B"), ("lora_down", "lora_up")


class Adapter(NamedTuple):
    """A LoRA as published.

    Args:
        files: their names, by the transformer that each is for.
        layers: in the file, and in the model.
        build: a tiny pipeline of the class that it is for; None: the embedded model.
        pair: names of the two matrices.
        prefix: of all names.
        alpha: of each layer; None for none.
        alpha_of_all: of all layers, in the metadata.
        added: what is added to whole parameters: names in the file, and in the model.
        size: frames, height and width.
        expected: sampler, noise of each step.
    """

    files: Mapping[str, str]
    expected: tuple[str, tuple[float, ...]]
    layers: Mapping[str, str] = OF_WAN
    build: Callable[[], Any] | None = None
    pair: tuple[str, str] = PAIRS
    prefix: str = "diffusion_model."
    alpha: float | None = None
    alpha_of_all: float | None = None
    added: Mapping[str, str] = {}
    size: tuple[int, int, int] = (5, 32, 32)


ADAPTERS = {
    "LightX2V, Wan 2.1": Adapter(
        {"transformer": "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"},
        ("lcm", LIGHTNING),
        pair=KOHYA,
        alpha=1.0,
        added={"blocks.1.ffn.2.diff_b": "blocks.1.ffn.net.2.bias"},
    ),
    "LightX2V, Wan 2.2": Adapter(
        {
            "transformer": "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step.safetensors",
            "transformer_2": "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step.safetensors",
        },
        ("euler", LIGHTNING),
        build=wan.two_stage,
        pair=KOHYA,
        alpha=4.0,
    ),
    "CausVid": Adapter(
        {"transformer": "Wan21_CausVid_14B_T2V_lora_rank32.safetensors"},
        ("lcm", CAUSVID),
        added={
            "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
            "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
            "blocks.0.norm3.diff": "blocks.0.norm2.weight",
            "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
            "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        },
        build=lambda: wan.pipeline(
            transformer=wan.transformer(cross_attn_norm=True, qk_norm="rms_norm_across_heads")
        ),
    ),
    "AccVideo": Adapter(
        {"transformer": "Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors"},
        ("unipc", equal_steps(10, 5.0)),
        pair=KOHYA,
        alpha=2.0,
        added={"head.head.diff_b": "proj_out.bias"},
    ),
    "rCM": Adapter(
        {"transformer": "Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16.safetensors"},
        ("lcm", RCM),
    ),
    "LTX-2, distilled": Adapter(
        {"transformer": "ltx-2-19b-distilled-lora-384.safetensors"},
        ("euler", LTX),
        layers=OF_LTX,
        build=lambda: ltx2.with_vocoder(ltx2.texts()),
        size=(9, 64, 64),
    ),
    "MiniMax-H3, Turbo": Adapter(
        {"transformer": "minimax_h3_fl2v_turbo_4step_v1.1_768p_bf16.safetensors"},
        ("euler", equal_steps(4, 6.0)),
        layers=OF_H3,
        build=minimax_h3.whole_pipeline,
        prefix="",
        alpha_of_all=4.0,
        size=(124, 64, 64),
    ),
}


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def written(adapter, file, model):
    """Write one file of an adapter. Returns what each parameter of a model gains by it."""
    tensors, gains = {}, {}
    for seed, (theirs, ours) in enumerate(adapter.layers.items()):
        out, *into = model.get_parameter(f"{ours}.weight").shape
        down, up = drawn((RANK, *into), seed), drawn((out, RANK), seed + 100)
        name = adapter.prefix + theirs
        tensors |= {
            f"{name}.{adapter.pair[0]}.weight": down,
            f"{name}.{adapter.pair[1]}.weight": up,
        }
        if adapter.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha)
        scale = (adapter.alpha or adapter.alpha_of_all or RANK) / RANK
        gains[f"{ours}.weight"] = up @ down * scale
    for seed, (theirs, ours) in enumerate(adapter.added.items()):
        gains[ours] = tensors[adapter.prefix + theirs] = drawn(
            model.get_parameter(ours).shape, seed
        )
    about = {} if adapter.alpha_of_all is None else {"alpha": str(adapter.alpha_of_all)}
    save_file(tensors, file, about)
    return gains


def effective(model, name):
    """A parameter of a model with its adapters."""
    module, _, kind = name.rpartition(".")
    layer: Any = model.get_submodule(module)
    if kind != "weight" or not hasattr(layer, "active_adapters"):
        return getattr(layer.base_layer if hasattr(layer, "base_layer") else layer, kind)
    names = [one for one in layer.active_adapters if one in layer.lora_A]
    return layer.weight + sum(layer.get_delta_weight(one) for one in names)


def sampled(pipe, config, size):
    """Sample a clip. Returns the noise of each call of a transformer."""
    seen = []

    def look(module, args, given):
        seen.append(given["timestep"].flatten()[0].item())

    parts = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    hooks = [one.register_forward_pre_hook(look, with_kwargs=True) for one in parts if one]
    clip = dict(zip(("frames", "height", "width"), size, strict=True))
    denoise(pipe, "a red circle", filled(pipe, config.model_copy(update=clip)))
    for hook in hooks:
        hook.remove()
    if max(seen) <= 1:  # of MiniMax-H3: the share of the video
        return [1 - one for one in seen]
    return [one / 1000 for one in seen]


def told(**fields):
    """Plan of a generation, and what is told of published weights."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", AsPublished)
        plan = plan_of(GenerateConfig(prompt=("a red circle",), **fields))
    return plan, [str(one.message) for one in found if one.category is AsPublished]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if one.layers is OF_H3 else [])
        for name, one in ADAPTERS.items()
    ],
)
def test_a_published_adapter_is_loaded_and_sampled(tmp_path, name):
    adapter = ADAPTERS[name]
    sampler, levels = adapter.expected
    model: Any = demo.path()
    if adapter.build is not None:
        model = tmp_path / "model"
        more = {"overwrite_modular_index": True} if adapter.layers is OF_H3 else {}
        adapter.build().save_pretrained(str(model), **more)
    plain = load(model, Loading(device="cpu"))
    loras, gains = [], {}
    for part, file in adapter.files.items():
        loras.append(str(tmp_path / file))
        gains[part] = written(adapter, tmp_path / file, getattr(plain, part))
    plan, [said] = told(model=str(model), loras=tuple(loras), method="dense")
    assert "sampled as published" in said
    config = plan.config
    scale = None if adapter.layers is OF_H3 else 1.0  # which takes none
    assert (config.sampler, config.steps, config.guidance_scale) == (sampler, len(levels), scale)
    pipe = load(model, Loading(device="cpu", loras=tuple(loras)))
    for part, parameters in gains.items():
        for key, gain in parameters.items():
            before = getattr(plain, part).get_parameter(key)
            torch.testing.assert_close(effective(getattr(pipe, part), key), before + gain)
    found = sampled(pipe, config, adapter.size)
    assert found == pytest.approx(levels, abs=NEAR)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def gates():
    width = wan.HEADS * wan.HEAD_DIM
    name = "blocks.{}.to_gate_compress.{}"
    shapes = {"weight": (width, width), "bias": (width,)}
    return {name.format(i, k): drawn(x, i) for i in range(wan.LAYERS) for k, x in shapes.items()}


def branches():
    name, dim = "blocks.{}.attn1.attn_op.local_attn.proj_l.{}", wan.HEAD_DIM
    shapes = {"weight": (dim, dim), "bias": (dim,)}
    return {name.format(i, k): drawn(x, i) for i in range(wan.LAYERS) for k, x in shapes.items()}


class Folder(NamedTuple):
    """A model as published.

    Args:
        name: of its folder.
        build: a tiny pipeline.
        written: class of the pipeline in its index; None as it is.
        more: tensors in its transformer's file.
        method: the attention that is taken; None for a preset.
        expected: sampler, noise of each step, guidance.
    """

    name: str
    expected: tuple[str, tuple[float, ...], float]
    build: Callable[[], Any] = wan.pipeline
    written: str | None = None
    more: Callable[[], dict[str, Any]] = dict
    method: str | None = None


FOLDERS = {
    "FastWan": Folder(
        "FastWan2.1-T2V-1.3B-Diffusers", ("lcm", DMD, 1.0), written="WanDMDPipeline",
        more=gates, method="fastwan",
    ),
    "FastWan by another name": Folder("mine", ("lcm", DMD, 1.0), written="WanDMDPipeline"),
    "FastWan, dense": Folder(
        "FastWan2.2-TI2V-5B-FullAttn-Diffusers", ("lcm", DMD, 1.0),
        wan.PIPELINES["token timesteps"], "WanDMDPipeline",
    ),
    "TurboWan": Folder(
        "TurboWan2.1-T2V-1.3B-Diffusers", ("lcm", RCM, 1.0), written="WanDMDPipeline",
        more=branches, method="turbowan",
    ),
    "HunyuanVideo 1.5": Folder(
        "hunyuanvideo1.5_480p_t2v_step_distilled", ("euler", equal_steps(8, 7.0), None),
        hunyuan_video15.training,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_published_model_is_loaded_and_sampled(tmp_path, name):
    one = FOLDERS[name]
    model, (sampler, levels, scale) = tmp_path / one.name, one.expected
    built = one.build()
    built.save_pretrained(model)
    if one.written is not None:
        index = model / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": one.written}))
        assert index_of(model)["_class_name"] == "WanPipeline"
    if held := one.more():
        save_file(load_file(model / WEIGHTS) | held, model / WEIGHTS, {"format": "pt"})
    plan, said = told(model=str(model))
    assert "sampled as published" in said[-1]
    assert len(said) == 1 + (one.method is not None)
    assert one.method is None or plan.method == method_from(one.method)
    config = plan.config
    assert (config.sampler, config.steps, config.guidance_scale) == (sampler, len(levels), scale)
    pipe = load(model, Loading(device="cpu"))
    assert type(pipe) is type(built)
    for key, x in built.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[key], x), key
    kept = trained_of(pipe.transformer)
    assert sum(len(layer) for layer in kept.layers.values()) == len(held) if held else kept is None
    assert sampled(pipe, config, (5, 32, 32)) == pytest.approx(levels, abs=NEAR)
