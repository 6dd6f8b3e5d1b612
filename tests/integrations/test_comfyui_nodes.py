"""The nodes of the ComfyUI pack besides the mechanics, against the stand-in."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.comfyui_host import (
    BLOCKS,
    HEADS,
    OVERRIDE,
    WIDTH,
    Adapter,
    Patcher,
    WanModel,
    Weighted,
    latents,
    optimized_attention,
)
from torch import nn

import gen_accel
from gen_accel import (
    METHODS,
    VSA,
    BlockMixture,
    Dense,
    Mixed,
    Neighborhood,
    Piecewise,
    Radial,
    Reuse,
    Rule,
    SparseLinear,
    VideoShape,
)
from gen_accel.attention_processors.attached.recipe import Recipe
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.lora import comfyui as layouts
from gen_accel.method import Step
from gen_accel.pipelines.long_video import PositionInterpolation, Riflex
from gen_accel.pipelines.long_video.rotating_anchors import RotatingAnchors
from gen_accel.pipelines.tuning import preset as presets

GRID = VideoShape(5, 8, 8)
ALWAYS = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}


@pytest.fixture
def sparse(pack):
    def put(patcher, method="sparse_linear", keep=30.0, **inputs):
        node = pack.NODE_CLASS_MAPPINGS["GenAccelSparseAttention"]()
        return node.patch(patcher, method, keep, **(ALWAYS | inputs))[0]

    return put


def apart(name, **members):
    """A model of another class than Wan's, with the stand-in's tokens."""
    model = WanModel()
    model.__class__ = type(name, (nn.Module,), {**vars(WanModel), **members})
    return model


def by_hand(attend, x, **forward):
    """The stand-in with `attend(q, k, v, layer)`, (B, H, N, D), in the place of self-attention."""
    model = WanModel()

    def attention(q, k, v, *, transformer_options, mask=None):
        if q.shape != k.shape:
            return optimized_attention(q, k, v, HEADS)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, transformer_options["block_index"]).transpose(1, 2).flatten(2)

    model.attention = attention
    return Patcher(model).forward(x, **forward)


def of(method, video=GRID, **options):
    def attend(q, k, v, layer):
        return gen_accel.attention(q, k, v, video=video, method=method.for_layer(layer), **options)

    return attend


def test_every_node_is_one_that_comfyui_can_list(pack, monkeypatch):
    paths = SimpleNamespace(
        get_filename_list=lambda folder: ["a.safetensors"],
        models_dir="/nowhere",
        add_model_folder_path=lambda name, path: None,
        get_folder_paths=lambda name: [],
    )
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for kind in pack.NODE_CLASS_MAPPINGS.values():
        inputs = kind.INPUT_TYPES()
        json.dumps(inputs)  # as ComfyUI sends it
        for name, (of_type, *about) in (pair for part in inputs.values() for pair in part.items()):
            if isinstance(of_type, list):
                assert all(isinstance(choice, str) for choice in of_type), name
                assert not about or about[0].get("default", of_type[0]) in of_type
        assert callable(getattr(kind, kind.FUNCTION))
        assert kind.DESCRIPTION.endswith(".")


MADE = {
    "sparse_linear": SparseLinear(critical=0.3),
    "piecewise": Piecewise(0.3),
    "neighborhood": Neighborhood((-1, 4, 4)),
    "block_mixture": BlockMixture(select="topk", scope="query_head", topk=(2, 14, 22)),
    "reuse": Reuse(SparseLinear(critical=0.3)),
    "sla": SparseLinear(critical=0.3),
    "vsa": VSA(critical=0.3),
    "sol-attn": Piecewise(
        select="threshold", tau=1.3, centre="key", score="mean", band=1, tile="raster"
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_methods_by_name(pack, name):
    assert {*pack.methods.METHODS} == {"radial", *MADE}
    method, density = pack.methods.Asked(name, 0.3)(GRID)
    assert method == MADE[name]
    assert density == {"neighborhood": 0.25, "sol-attn": None}.get(name, 0.3)


@pytest.mark.parametrize("name", ["piecewise", "neighborhood", "block_mixture", "sol-attn", "vsa"])
def test_a_method_runs_layer_by_layer(sparse, name):
    x = latents()
    patched = sparse(Patcher(WanModel()), name)
    assert torch.allclose(patched.forward(x), by_hand(of(MADE[name]), x), atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "method"),
    [
        ({"method": "radial", "decay_factor": 0.2}, Radial(decay_factor=0.2)),
        ({"method": "sol-attn", "tau": 0.5}, replace(MADE["sol-attn"], tau=0.5)),
        ({"block_size": "64"}, SparseLinear(critical=0.3, block_q=64, block_k=64)),
        (
            {"method": "piecewise", "sink_conditioning": "exact_kv_and_rows"},
            Piecewise(0.3, sink=1, sink_queries=True),
        ),
        (
            {"method": "radial", "decay_factor": 1.0, "sink_conditioning": "off"},
            Radial(sink=False),
        ),
        (
            {"method": "radial", "decay_factor": 1.0, "settings": "anchor_every=2\nrest=means"},
            Radial(anchor_every=2, rest="means"),
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:40],
)
def test_inputs_of_other_nodes(pack, sparse, inputs, method):
    patched = sparse(Patcher(WanModel()), **inputs)
    [attached] = patched.get_attachment(pack.override.KEY)
    assert attached.choose(GRID)[0] == method


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"decay_factor": 0.5}, "decay_factor is of radial"),
        ({"method": "neighborhood", "block_size": "64"}, "neighborhood has no block_size"),
        ({"sink_conditioning": "exact_kv"}, "sparse_linear has none: set it to"),
        ({"method": "radial", "sink_conditioning": "exact_kv_and_rows"}, "radial has none"),
        ({"settings": "criticl=0.2"}, "did you mean 'critical'?"),
        ({"settings": "critical=much"}, "critical of sparse_linear must be float"),
        ({"settings": "critical=2"}, "critical must be in"),
    ],
)
def test_what_a_method_does_not_have_is_refused_at_once(sparse, inputs, said):
    with pytest.raises(ValueError, match=said):
        sparse(Patcher(WanModel()), **inputs)


def test_dense_timesteps_and_extra_tokens(sparse):
    x, model, levels = latents(), Patcher(WanModel()), torch.tensor([1.0, 0.8, 0.5, 0.0])
    model.model_options["transformer_options"]["sample_sigmas"] = levels
    patched = sparse(model, dense_timesteps=2)
    for sigma, is_dense in ((1.0, True), (0.9, True), (0.8, True), (0.6, True), (0.5, False)):
        dense = torch.equal(patched.forward(x, sigma), model.forward(x, sigma))
        assert dense is is_dense, sigma
    kind = type("HunyuanVideo", (WanModel,), {})
    beside = Patcher(kind(front=7))
    few, many = (sparse(beside, extra_tokens=count).forward(x) for count in (6, 7))
    assert torch.equal(few, beside.forward(x))
    assert not torch.equal(many, few)


def test_a_quiet_node_says_nothing(sparse, caplog):
    patched = sparse(Patcher(WanModel()), verbose=False)
    patched.forward(latents())
    assert patched.clean_up(caplog) == []


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_the_node_of_a_method_has_its_fields_and_defaults(pack, name):
    kind = METHODS[name]
    node = pack.NODE_CLASS_MAPPINGS[f"GenAccel{kind.__name__}"]
    inputs = node.INPUT_TYPES()
    given = {key: about["default"] for key, (_, about) in inputs["required"].items()}
    assert {*given, *inputs["optional"]} == {*kind.__dataclass_fields__} - {"sha256"}
    assert all(about["tooltip"] for key, (_, about) in inputs["required"].items())
    assert node().make(**given) == (kind(),)


def test_the_node_of_a_method_takes_words_and_methods(pack, sparse):
    make = pack.NODE_CLASS_MAPPINGS
    given = {"window": "3, 8,8", "is_causal": "true,false,false"}
    [window] = make["GenAccelNeighborhood"]().make(**given)
    assert window == Neighborhood((3, 8, 8), is_causal=(True, False, False))
    [again] = make["GenAccelReuse"]().make(method=window, every=3, residual="cpu")
    assert again == Reuse(window, every=3, residual="cpu")
    [mine] = make["GenAccelRadial"]().make(anchor_every="4")
    x = latents()
    patched = sparse(Patcher(WanModel()), custom_method=mine)
    assert torch.allclose(patched.forward(x), by_hand(of(Radial(anchor_every=4)), x), atol=1e-5)
    with pytest.raises(ValueError, match=r"window of neighborhood must be int,int,int, got '3'"):
        make["GenAccelNeighborhood"]().make(window="3")


def steps_of(model, count):
    levels = torch.linspace(1, 0, count + 1)
    model.model_options["transformer_options"]["sample_sigmas"] = levels
    return [float(level) for level in levels[:-1]]


def test_reuse_learns_in_its_first_step_and_forgets_after_the_run(sparse, caplog):
    x, model = latents(), Patcher(WanModel())
    levels = steps_of(model, 3)
    method = Reuse(SparseLinear(critical=0.1), residual=True)
    patched = sparse(model, custom_method=method)
    first, second = (patched.forward(x, level) for level in levels[:2])
    assert torch.allclose(first, model.forward(x), atol=1e-5)  # which is dense
    # Of the same q, k and v, the residual of the dense step makes up for all that is left out.
    assert torch.allclose(second, first, atol=1e-4)
    other = patched.forward(x + 0.5, levels[2])
    assert not torch.allclose(other, model.forward(x + 0.5), atol=1e-4)
    patched.clean_up(caplog)
    assert torch.allclose(patched.forward(x + 0.5), model.forward(x + 0.5), atol=1e-5)


RULES = Mixed(
    (
        Rule(Dense(), steps=(0, 1)),
        Rule(SparseLinear(critical=0.1), layers=(1,), heads=(0,)),
        Rule(Radial(decay_factor=0.2), layers=(1, 2)),
    ),
    steps=3,
)


def test_a_tuned_preset_runs_by_layer_head_and_step(pack, tmp_path, monkeypatch):
    model, x = Patcher(WanModel()), latents()
    levels = steps_of(model, 3)
    sizes = {"num_layers": BLOCKS, "num_attention_heads": 1, "attention_head_dim": WIDTH}
    made_for = SimpleNamespace(
        transformer={"class": "WanTransformer3DModel", **sizes}, grid=(5, 8, 8), dtype="float32"
    )
    tuned = SimpleNamespace(method=RULES, density=0.4, made_for=made_for)
    (tmp_path / "mine.json").write_text("{}")
    nodes = pack.preset_nodes
    monkeypatch.setattr(nodes, "preset_folders", lambda: [tmp_path])
    monkeypatch.setattr(presets, "read_preset", lambda path: tuned)
    assert "mine.json" in nodes.PresetNode.INPUT_TYPES()["required"]["preset"][0]
    patched, said = nodes.PresetNode().patch(model, "mine.json", min_tokens=0)
    assert "density 0.400, tuned at 5 x 8 x 8 tokens, 3 steps" in said
    for step, level in enumerate(levels):

        def attend(q, k, v, layer, step=step):
            method = RULES.for_layer(layer).at(Step(step, 3))
            return gen_accel.attention(q, k, v, video=GRID, method=method)

        assert torch.allclose(patched.forward(x, level), by_hand(attend, x), atol=1e-5)
    steps_of(patched, 4)
    with pytest.raises(ValueError, match="rules are for 3 steps, this run has 4"):
        patched.forward(x, 0.5)
    other = Patcher(apart("Kandinsky5"))
    with pytest.raises(ValueError, match="tuned on WanTransformer3DModel, got Kandinsky5"):
        nodes.PresetNode().patch(other, "mine.json")
    made_for.transformer["num_layers"] = 30
    with pytest.raises(ValueError, match=f"tuned on 30 blocks of width {WIDTH}, got {BLOCKS}"):
        nodes.PresetNode().patch(model, "mine.json")


def test_presets_by_name_are_the_rules_of_the_library(pack):
    model, x = Patcher(WanModel()), latents()
    levels = steps_of(model, 10)
    patched, said = pack.preset_nodes.PresetNode().patch(model, "balanced", min_tokens=0)
    assert said.startswith("balanced, a rule that was not measured here: Piecewise(critical=0.2")
    for step, level in enumerate(levels):
        exact = by_hand(
            lambda q, k, v, layer: gen_accel.attention(
                q, k, v, video=GRID, method=Piecewise(0.2) if layer else Full()
            ),
            x,
        )
        exact = model.forward(x) if step in (1, 2) else exact
        assert torch.allclose(patched.forward(x, level), exact, atol=1e-5), step


def extended(pack, model, technique, trained, settings=""):
    return pack.extend_nodes.ExtendNode().patch(model, technique, trained, settings)[0]


@pytest.mark.slow
def test_anchors_hold_in_sparse_and_in_dense_calls(pack, sparse, caplog):
    model, x = Patcher(WanModel()), latents(frames=9)
    video, technique = VideoShape(9, 8, 8), RotatingAnchors(window=1, interval=4)
    levels = steps_of(model, 4)
    longer = extended(pack, model, "rotating_anchors", 17, "window=1 interval=4")

    def anchored(method, step):
        def attend(q, k, v, layer):
            plan = technique.adjusted(method.plan(video), video, 5, step)
            return gen_accel.kernels.run(q, k, v, plan, scale=q.shape[-1] ** -0.5)

        return attend

    for step in (0, 1):
        exact = by_hand(anchored(Full(), step), x)
        assert torch.allclose(longer.forward(x, levels[step]), exact, atol=1e-5)
    assert torch.equal(longer.forward(latents(5)), model.forward(latents(5)))  # not longer
    for both in (
        sparse(longer, "radial", 90.0, start_percent=0.5),
        extended(
            pack,
            sparse(model, "radial", 90.0, start_percent=0.5),
            *("rotating_anchors", 17),
            "window=1 interval=4",
        ),
    ):
        radial = pack.methods.Asked("radial", 0.9)(video)[0]
        dense, thin = both.forward(x, levels[1]), both.forward(x, levels[3])
        assert torch.allclose(dense, by_hand(anchored(Full(), 1), x), atol=1e-5)
        assert torch.allclose(thin, by_hand(anchored(radial, 3), x), atol=1e-5)
        assert OVERRIDE not in both.model_options["transformer_options"]
    told = " ".join(both.clean_up(caplog))
    assert "with rotating_anchors" in told


class EmbedND(nn.Module):
    """ComfyUI's, of one head of 16: cosines and sines of positions times frequencies."""

    theta, axes_dim = 10000.0, [8, 4, 4]

    def forward(self, ids):
        parts = []
        for axis, dim in enumerate(self.axes_dim):
            own = self.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angle = ids[..., axis].double()[..., None] * own
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
            parts.append(turn.unflatten(-1, (2, 2)).float())
        return torch.cat(parts, dim=-3).unsqueeze(1)


class Rotating(WanModel):
    """One that keeps what its rotary module made."""

    def __init__(self):
        super().__init__()
        self.rope_embedder = EmbedND()

    def forward(self, x, *args, **kwargs):
        sides = [torch.arange(n) for n in (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)]
        self.ids = torch.cartesian_prod(*sides)[None].float()
        self.made = self.rope_embedder(self.ids)
        return super().forward(x, *args, **kwargs)


Rotating.__name__ = "WanModel"


@pytest.mark.parametrize(
    ("name", "settings", "technique"),
    [
        ("position_interpolation", "", PositionInterpolation()),
        ("riflex", "k=1", Riflex(k=1)),
    ],
)
def test_rotary_frequencies_of_time_change_in_longer_passes_alone(pack, name, settings, technique):
    model = Patcher(Rotating())
    longer = extended(pack, model, name, 17, settings)  # 5 latent frames
    inner = longer.get_model_object("diffusion_model.rope_embedder")
    network = model.model.diffusion_model
    for frames in (5, 29):
        longer.forward(latents(frames))
        exact = network.rope_embedder(network.ids)
        assert network.rope_embedder is inner.own
        if frames == 5:
            assert torch.equal(network.made, exact)
            continue
        own = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        angle = network.ids[..., 0].double()[..., None] * technique.frequencies(own, frames, 5)
        assert torch.equal(network.made[..., 4:, :, :], exact[..., 4:, :, :])
        assert torch.allclose(network.made[0, 0, :, :4, 0, 0], angle[0].cos().float(), atol=1e-6)
        assert torch.allclose(network.made[0, 0, :, :4, 1, 0], angle[0].sin().float(), atol=1e-6)
        assert not torch.allclose(network.made, exact, atol=1e-3)


def test_techniques_that_cannot_be_are_refused(pack):
    model = Patcher(Rotating())
    longer = extended(pack, model, "riflex", 81)
    with pytest.raises(ValueError, match="both set the temporal frequencies"):
        extended(pack, longer, "position_interpolation", 81)
    with pytest.raises(ValueError, match="riflex does not go with riflex: it is on already"):
        extended(pack, longer, "riflex", 81)
    with pytest.raises(ValueError, match="k of riflex must be int or none"):
        extended(pack, model, "riflex", 81, "k=x")
    other = Patcher(apart("LTXBaseModel", inner_dim=WIDTH))
    with pytest.raises(ValueError, match="LTXBaseModel has no rotary frequencies"):
        extended(pack, other, "riflex", 81)
    extended(pack, other, "ultravico", 81)


class Network(WanModel):
    """With layers of the original names."""

    def __init__(self, width=16):
        super().__init__()
        self.rope_embedder = EmbedND()
        for block in self.blocks:
            block.self_attn = nn.ModuleDict({one: nn.Linear(width, width) for one in "qkvo"})


Network.__name__ = "WanModel"


@pytest.fixture
def lora(pack, monkeypatch):
    """The node, on a file or folder."""

    def load(model, path, **inputs):
        monkeypatch.setattr(pack.lora_nodes, "lora_path", lambda name: path)
        monkeypatch.setattr(pack.lora_nodes, "lora_adapter", lambda: Adapter)
        return pack.lora_nodes.LoadLoraNode().load(model, "mine", 0.5, **inputs)

    return load


def loaded(recipe, branches=None, lengths=None):
    layer = layouts.LoraLayer(torch.ones(2, 16), torch.ones(16, 2), 3.0, lengths)
    return layouts.Loaded({"blocks.1.self_attn.q": layer}, branches or {}, recipe)


@pytest.fixture
def recipe():
    return Recipe(
        base_model="demo",
        transformer={
            "class": "WanTransformer3DModel",
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH // HEADS,
        },
        part="transformer",
        method="sparse_linear",
        options={"critical": 0.3, "combine": "alpha"},
        schedule={"dense_layers": 1, "dense_steps": 1},
        rope="position_interpolation",
        trained_frames=17,
        frames=33,
        height=128,
        width=128,
        stages=("33:4",),
        steps=4,
        rank=2,
        alpha=3.0,
        targets=("attention",),
        objective="flow",
        data="",
        teacher_guidance=3.0,
        techniques=("fresh_noise",),
    )


def test_a_lora_comes_with_the_attention_that_it_was_trained_with(
    pack, lora, recipe, monkeypatch, tmp_path
):
    method, branches = SparseLinear(critical=0.3, combine="alpha"), {}
    for layer in (1, 2):
        branch = method.branch(HEADS, WIDTH // HEADS)
        for x in branch.parameters():
            nn.init.normal_(x.data, 0.5, 0.1)
        branches[layer] = branch
    held = {layer: dict(one.state_dict()) for layer, one in branches.items()}
    monkeypatch.setattr(layouts, "load", lambda path: loaded(recipe, held))
    model, x = Weighted(Network()), latents()
    levels = steps_of(model, 4)
    patched, said = lora(model, "unused")
    [(strength, adapter)] = patched.patches["diffusion_model.blocks.1.self_attn.q.weight"]
    assert (strength, adapter.weights[2], model.patches) == (0.5, 3.0, {})
    assert torch.equal(patched.forward(x, levels[0]), model.forward(x))  # a dense step

    def attend(q, k, v, layer):
        if layer == 0:
            return gen_accel.attention(q, k, v, video=GRID, method=Full())
        options = {"method": method.for_layer(layer), "branch": branches[layer]}
        return gen_accel.attention(q, k, v, video=GRID, **options)

    exact = by_hand(attend, x)
    assert torch.allclose(patched.forward(x, levels[1]), exact, atol=1e-5)
    assert not torch.allclose(by_hand(of(method), x), exact, atol=1e-3)
    rotary = patched.get_model_object("diffusion_model.rope_embedder")
    assert (rotary.trained, rotary.least) == (5, 9)
    for words in ("holds a guidance of 3: set cfg to 1", "fresh_noise; not done here", "rank 2"):
        assert words in said
    plain, _ = lora(model, "unused", attach_attention=False)
    assert torch.equal(plain.forward(x, levels[1]), model.forward(x))
    assert plain.patches.keys() == patched.patches.keys()


def test_a_lora_of_another_model_is_refused(lora, recipe, monkeypatch):
    monkeypatch.setattr(layouts, "load", lambda path: loaded(recipe))
    with pytest.raises(ValueError, match=r"mine does not fit .* such as blocks\.1\.self_attn\.q"):
        lora(Weighted(Network(width=24)), "unused")


def test_a_dora_is_computed_as_in_training(pack, recipe, monkeypatch):
    pack.lora_nodes._dora_adapter.cache_clear()
    monkeypatch.setattr(pack.lora_nodes, "lora_adapter", lambda: Adapter)
    g = torch.Generator().manual_seed(0)
    before, up, down = (torch.randn(n, m, generator=g) for n, m in ((6, 5), (6, 2), (2, 5)))
    lengths = torch.rand(6, generator=g) + 1
    layer = layouts.LoraLayer(down, up, 3.0, lengths)
    adapter = pack.lora_nodes.patch_of(layer)
    mixed = before + 1.5 * up @ down
    exact = lengths[:, None] * mixed / mixed.norm(dim=1, keepdim=True)
    for strength in (1.0, 0.5):
        found = adapter.calculate_weight(before.clone(), "", strength, 1.0, None, lambda x: x)
        assert torch.allclose(found, before + strength * (exact - before), atol=1e-6)


class Sized(WanModel):
    """With what an estimate counts: the width of a token, and 12 width^2 weights a block."""

    dim, num_heads = WIDTH, HEADS

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, 12 * WIDTH) for _ in range(BLOCKS))


Sized.__name__ = "WanModel"


def test_an_estimate_is_the_formula(pack, sparse):
    model = Patcher(Sized())
    latent = {"samples": torch.zeros(1, 4, 5, 16, 16)}
    node = pack.estimate_nodes.EstimateNode()

    def lines(patched, steps=10, efficiency=0.5, **given):
        done = node.estimate(patched, latent, steps, efficiency, **given)
        assert done["ui"] == {"text": [*done["result"]]}
        return done["result"][0].splitlines()

    assert lines(model) == [
        "5 x 8 x 8 = 320 tokens, all dense: no node of gen_accel is on the model"
    ]
    patched = sparse(model, start_percent=0.2, dense_blocks="0")
    attention, rest = 4 * 320**2 * WIDTH, 2 * 320 * 12 * WIDTH**2
    share, part = attention / (attention + rest), 0.8 * 2 / 3
    speedup = 1 / (1 - share * part * (1 - 0.3 / 0.5))
    found = lines(patched)
    assert found[0] == "5 x 8 x 8 = 320 tokens, 3 blocks, 10 steps"
    assert found[1].startswith(f"density 0.300 in {part:.0%} of the blocks and steps")
    assert "dense_blocks, outside of start_percent" in found[1]
    assert found[2] == f"self-attention is {share:.0%} of a dense step"
    assert found[3].startswith(f"expected speed-up of the sampling: {speedup:.2f}x")
    four = lines(patched, sigmas=torch.tensor([1.0, 0.9375, 0.8333, 0.625, 0.0]))
    assert four[0] == "5 x 8 x 8 = 320 tokens, 3 blocks, 4 steps"
    assert four[1].startswith("density 0.300 in 50% of the blocks and steps")  # 3 steps, 2 blocks
    few = sparse(model, min_tokens=1000)
    assert lines(few)[1] == "all dense: fewer than min_tokens"
    assert "unknown" not in " ".join(lines(sparse(model, "sol-attn")))
