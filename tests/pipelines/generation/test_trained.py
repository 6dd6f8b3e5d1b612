"""Weights that were trained sparse: in models, in FastVideo's adapters, and in words."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import wan
from support.tiny import cases_of

import gen_accel
from gen_accel import VSA, Piecewise, Schedule, SparseLinear, attach
from gen_accel.attention_processors.attached.trained import trained_of
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.lora import add_loras
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.lora_file import split_whole
from gen_accel.pipelines.generation.lora_words import names_of, words_of
from gen_accel.pipelines.generation.plan import AsPublished, plan_of
from gen_accel.published import METHODS, trained_method

WIDTH = wan.HEADS * wan.HEAD_DIM
METHOD = VSA(0.3, (2, 3, 4))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def gates(name="blocks.{}.to_gate_compress.{}"):
    """As FastWan's checkpoint names them."""
    return {
        name.format(i, part): drawn(WIDTH, *((WIDTH,) if part == "weight" else ()), seed=i)
        for i in range(wan.LAYERS)
        for part in ("weight", "bias")
    }


@pytest.fixture(scope="module")
def fastwan(tmp_path_factory):
    """A folder of a tiny Wan with gates in its transformer's file."""
    folder = tmp_path_factory.mktemp("gated")
    wan.pipeline().save_pretrained(folder)
    held = load_file(folder / WEIGHTS)
    save_file(held | gates(), folder / WEIGHTS, {"format": "pt"})
    return folder


def given(handle):
    return {
        f"blocks.{i}.{name}": x
        for i, gate in enumerate(handle.branches.values())
        for name, x in gate.state_dict().items()
    }


def same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def test_the_gates_of_a_model_are_found_and_used(fastwan, recwarn):
    pipe = load(fastwan, Loading(device="cpu"))
    with attach(pipe, METHOD) as handle:
        same(given(handle), gates())
        found = wan.forward(pipe.transformer).detach()
    assert not [one for one in recwarn if "silent" in str(one.message)]
    plain = wan.pipeline()
    handle = attach(plain, METHOD)
    for i, gate in enumerate(handle.branches.values()):
        gate.load_state_dict(
            {n.removeprefix(f"blocks.{i}."): x for n, x in gates().items() if f".{i}." in n}
        )
    assert torch.equal(wan.forward(plain.transformer), found)


def test_another_method_refuses_them(fastwan):
    pipe = load(fastwan, Loading(device="cpu"))
    for method in (Piecewise(0.2), gen_accel.Dense(), VSA(0.2, coarse="once")):
        with pytest.raises(ValueError, match=r"holds gates of VSA for 2 blocks.*--method vsa"):
            attach(pipe, method)
    # In Python, on a pipeline that diffusers loaded.
    plain = wan.pipeline()
    attach(plain, Piecewise(0.2)).detach()
    assert gen_accel.load_trained(plain, fastwan) == wan.LAYERS
    with pytest.raises(ValueError, match="does not use"):
        attach(plain, Piecewise(0.2))


def test_a_run_refuses_them_before_anything_is_loaded(fastwan, tmp_path):
    plain, file = tmp_path / "plain", written(tmp_path, adapter())
    wan.pipeline().save_pretrained(plain)
    said = r"holds gates of VSA for 2 blocks of the model, which .*--method vsa"
    for given in ({"model": str(fastwan)}, {"model": str(plain), "loras": (str(file),)}):
        run = GenerateConfig(prompt=("a",), out=tmp_path / "a.mp4", **given)
        for other in ({"preset": "fast"}, {"method": "radial"}, {}):
            with pytest.raises(ValueError, match=said):
                plan_of(run.model_copy(update=other))
        plan = plan_of(run.model_copy(update={"method": METHOD}))
        assert plan.method == METHOD
        with pytest.raises(ValueError, match=r"compare makes a dense clip too: .*Dense"):
            plan_of(run.model_copy(update={"method": METHOD, "compare": True}))


def test_the_linear_branches_of_turbowan(tmp_path):
    wan.pipeline().save_pretrained(tmp_path)
    dim, held = wan.HEAD_DIM, load_file(tmp_path / WEIGHTS)
    name = "net.blocks.1.self_attn.attn_op.local_attn.proj_l"
    proj = {f"{name}.weight": drawn(dim, dim), f"{name}.bias": drawn(dim)}
    save_file(held | proj, tmp_path / WEIGHTS, {"format": "pt"})
    pipe = load(tmp_path, Loading(device="cpu"))
    for method in (VSA(0.2), SparseLinear(0.2, combine="alpha")):
        with pytest.raises(ValueError, match=r"linear branches of SLA for 1 blocks.*linear_over"):
            attach(pipe, method)
    handle = attach(pipe, SparseLinear(0.3, linear_over="all", block_q=16, block_k=16))
    first, second = (branch.proj for branch in handle.branches.values())
    assert not first.weight.any()
    assert torch.equal(second.weight, proj[f"{name}.weight"])
    assert torch.equal(second.bias, proj[f"{name}.bias"])


def adapter(**changed):
    """In the form of FastVideo's, for the tiny Wan."""
    held = {
        "blocks.0.attn1.to_q.lora_A.weight": drawn(2, WIDTH, seed=1),
        "blocks.0.attn1.to_q.lora_B.weight": drawn(WIDTH, 2, seed=2),
        "blocks.0.attn1.to_q.diff_b": drawn(WIDTH, seed=3),
        "blocks.1.attn1.norm_q.diff": drawn(WIDTH, seed=4),
    }
    name = "blocks.{}.attn1.to_gate_compress.set_{}"
    held |= {key: x for key, x in gates(name).items() if key.endswith("weight")}
    return held | changed


def written(tmp_path, tensors, **metadata):
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path, {"format": "fastvideo-lora-v2", **metadata})
    return path


def test_an_adapter_is_its_products_its_differences_and_its_gates(tmp_path):
    pipe, plain = wan.pipeline(), wan.transformer()
    add_loras(pipe, [(str(written(tmp_path, adapter())), 0.5)])
    held = adapter()
    with torch.no_grad():
        q = plain.blocks[0].attn1.to_q
        down, up = (held[f"blocks.0.attn1.to_q.lora_{x}.weight"] for x in "AB")
        q.weight += 0.5 * up @ down
        q.bias += 0.5 * held["blocks.0.attn1.to_q.diff_b"]
        plain.blocks[1].attn1.norm_q.weight += 0.5 * held["blocks.1.attn1.norm_q.diff"]
    own = attach(plain, METHOD)
    for i, gate in enumerate(own.branches.values()):
        gate.to_gate_compress.weight.data = 0.5 * gates()[f"blocks.{i}.to_gate_compress.weight"]
    attach(pipe, METHOD)
    with torch.no_grad():
        found, expected = wan.forward(pipe.transformer), wan.forward(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


WRONG = {
    "a layer": ({"blocks.7.attn1.to_q.diff_b": drawn(WIDTH)}, r"lacks, or has in another size"),
    "a size": ({"blocks.0.attn1.to_q.diff_b": drawn(3)}, r"lacks, or has in another size"),
    "a gate's block": (
        {"blocks.7.to_gate_compress.weight": drawn(WIDTH, WIDTH)},
        r"gates of VSA of no attention of WanTransformer3DModel",
    ),
    "a gate's size": (
        {"blocks.0.attn1.to_gate_compress.set_weight": drawn(WIDTH, 3)},
        r"must be \(32, 32\) for WanTransformer3DModel, got \(32, 3\)",
    ),
    "a whole weight": ({"blocks.0.attn1.to_q.set_weight": drawn(WIDTH, WIDTH)}, "lacks, or has"),
    "infinity": ({"blocks.0.attn1.to_q.diff_b": drawn(WIDTH) / 0}, r"not finite"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path, how):
    changed, said = WRONG[how]
    pipe = wan.pipeline()
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        add_loras(pipe, [(str(written(tmp_path, adapter(**changed))), 1.0)])
    same(pipe.transformer.state_dict(), before)
    assert trained_of(pipe.transformer) is None


def test_the_names_of_fasth3_are_those_of_the_model():
    model = cases_of("minimax_h3")[0].build()
    attention = model.transformer_blocks[0].attn
    rows, width = attention.to_q.weight.shape
    held = {
        "transformer_blocks.0.attn.to_q.lora_A.weight": drawn(2, width),
        "transformer_blocks.0.attn.to_q.lora_B.weight": drawn(rows, 2),
        "transformer_blocks.0.attn.norm_q.diff": drawn(*attention.norm_q.weight.shape),
        "proj_in.diff_b": drawn(*model.proj_in.bias.shape),
        "transformer_blocks.0.attn.to_gate_compress.set_weight": drawn(rows, width),
    }
    low, whole = split_whole(held, model, "FastH3")
    assert {*low} == {f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight" for x in "AB"}
    assert {*whole.added} == {"transformer_blocks.0.attn.norm_q.weight", "proj_in.bias"}
    whole.apply(model, 1.0, "FastH3")
    handle = attach(model, VSA(0.5, (1, 2, 2)))
    first = next(iter(handle.branches.values()))
    assert torch.equal(first.to_gate_compress.weight, held[[*held][-1]])


def test_show_says_what_a_file_is(run, tmp_path):
    path = written(tmp_path, adapter(), finetuned_model="FastVideo/FastH3-4-step-VSA")
    said = " ".join(run("show", "--lora", path).stdout.split())
    for part in (
        "a LoRA of rank 2 on 1 layers, 2 differences of whole weights, trained gates of VSA in 2",
        "FastH3 of FastVideo for MiniMax-H3, trained by VSA at a sparsity of 0.9",
        "Its publisher samples FastH3, 4 steps by --sampler euler --steps 4",
        "--method fasth3, which is --method vsa --set critical=0.1; generate --lora takes it",
    ):
        assert part in said
    found = json.loads(run("show", "--lora", path, "--json", "-").stdout)
    assert (found["gates"], found["whole"], found["ranks"]) == (2, 2, {"2": 1})
    assert found["method"] == "fasth3"


def test_show_of_a_lora_goes_alone(refused, tmp_path):
    path = written(tmp_path, adapter())
    assert "--lora goes with" in refused("show", "radial", "--lora", path)
    assert "no LoRA at" in refused("show", "--lora", tmp_path / "nowhere.safetensors")


PUBLISHED = {  # name of a file: the recipe
    "Minimax-H3-Turbo-SLA-rank64.safetensors": "turbo_sla",
    "turbo_sla_lora.safetensors": "turbo_sla",
    "FastH3-4-step-VSA.safetensors": "fasth3",
    "fasth3_dense_rank64.safetensors": "fasth3_dense",
    "FastWan2.1-T2V-1.3B.safetensors": "fastwan",
    "TurboWan2.1-T2V-14B-720P.safetensors": "turbowan",
    "style.safetensors": None,
}


@pytest.mark.parametrize(("name", "recipe"), PUBLISHED.items())
def test_a_file_is_known_by_its_name(tmp_path, name, recipe):
    save_file({"a.lora_A.weight": drawn(2, 2)}, tmp_path / name)
    assert trained_method(*names_of(str(tmp_path / name))) == recipe
    assert trained_method(*names_of(f"someone/{name.partition('.')[0]}")) == recipe


def test_recipes_are_methods_whose_settings_may_be_changed():
    for name, one in METHODS.items():
        assert method_from(name) == method_from(one.method, one.settings)
    assert method_from("turbo_sla") == Piecewise(
        0.15, rest=None, score="mean", tile="raster", block_q=128
    )
    assert not method_from("turbo_sla").has_parameters
    assert method_from("fasth3", ["critical=0.2"]) == VSA(0.2)
    with pytest.raises(ValueError, match="did you mean 'turbo_sla'"):
        method_from("turbosla")


def test_generate_takes_the_attention_of_published_weights(tmp_path):
    path = tmp_path / "h3_turbo_sla.safetensors"
    save_file({"a.lora_A.weight": drawn(2, 2)}, path)
    steps = {"sampler": "euler", "steps": 4, "guidance_scale": 1.0}
    given = {"model": "demo", "prompt": ("a red circle moves right quickly",), **steps}
    with pytest.warns(AsPublished, match=r"Turbo-SLA.*--method turbo_sla"):
        plan = plan_of(GenerateConfig(**given, loras=(str(path),)))
    assert plan.method == method_from("turbo_sla")
    assert plan.schedule == Schedule()
    for asked in ({"method": "radial"}, {"preset": "fast"}, {"loras": ()}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", AsPublished)
            plan = plan_of(GenerateConfig(**given, **({"loras": (str(path),)} | asked)))
        assert plan.method in (None, method_from("radial"))


PAIR = {"{}.lora_A.weight": drawn(4, 8), "{}.lora_B.weight": drawn(8, 4)}
KOHYA = {"{}.lora_down.weight": drawn(4, 8), "{}.lora_up.weight": drawn(8, 4)}
WAN, H3 = "diffusion_model.blocks.0.self_attn.q", "transformer_blocks.0.attn.to_q"
LAYOUTS = {  # a file as published: the name, the layer, its tensors, and what is said of it
    "FastWan": (
        "FastWan2.1-T2V-1.3B.safetensors",
        "blocks.0.attn1.to_q",
        {**PAIR, "{}.diff_b": drawn(8), "blocks.0.to_gate_compress.set_weight": drawn(8, 8)},
        ("1 differences", "gates of VSA in 1", "--method fastwan", "0.2", "--guidance-scale 1"),
    ),
    "FastH3": (
        "FastH3-4-step-VSA.safetensors",
        H3,
        {**PAIR, f"{H3[:-5]}.to_gate_compress.set_weight": drawn(8, 8)},
        ("gates of VSA in 1", "--method fasth3", "critical=0.1", "--steps 4"),
    ),
    "FastH3, dense": (
        "fasth3_dense.safetensors",
        H3,
        PAIR,
        ("trained dense", "--method dense", "--steps 4"),
    ),
    "Turbo-SLA": (
        "Minimax-h3-Turbo-SLA.safetensors",
        H3,
        PAIR,
        ("best 15 % of the blocks", "--method turbo_sla", "--steps 4"),
    ),
    "TurboWan": (
        "TurboWan2.1-T2V-1.3B.safetensors",
        "blocks.0.self_attn.q",
        {**PAIR, "blocks.0.self_attn.attn_op.local_attn.proj_l.weight": drawn(8, 8)},
        ("linear branches of SLA in 1", "--method turbowan", "linear_over=all", "--levels"),
    ),
    "LightX2V": (
        "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
        WAN,
        {**KOHYA, "{}.alpha": torch.tensor(4.0), "{}.diff_b": drawn(8)},
        ("1 differences", "Wan 2.1 of LightX2V, 4 steps", "--shift 5", "--guidance-scale 1"),
    ),
    "Lightning": (
        "Wan22-Lightning-high_noise.safetensors",
        WAN,
        PAIR,
        ("Wan 2.2 of LightX2V, 4 steps", "--steps 4", "--guidance-scale 1"),
    ),
    "LTX-2, distilled": (
        "ltx-2-19b-distilled-lora-384.safetensors",
        "diffusion_model.transformer_blocks.0.attn1.to_q",
        PAIR,
        ("LTX-2 distilled, 8 steps", "--levels 1,0.99375", "--guidance-scale 1"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_published_file_is_told_in_words(tmp_path, layout):
    name, layer, tensors, said = LAYOUTS[layout]
    save_file({key.format(layer): x for key, x in tensors.items()}, tmp_path / name)
    lines, about = words_of(tmp_path / name)
    told = " ".join(lines)
    for part in ("a LoRA of rank 4 on 1 layers", *said):
        assert part in told, told
    assert about["others"] == 0
