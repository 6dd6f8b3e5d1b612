"""What image prompts are added through: taps on stock processors, where each family has them."""

import copy
import gc
from functools import partial
from itertools import permutations
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from support.hunyuan import forward as hunyuan_forward
from support.hunyuan import transformer as hunyuan_transformer
from support.image_models import (
    CASES,
    JOINT,
    cogvideox,
    flux,
    flux_inputs,
    ltx,
    ltx_inputs,
    mochi,
    noise,
    output,
    unet,
)
from support.methods import RADIAL, WINDOW
from support.products import NIGHTLY, in_turns
from support.tiny import is_here
from support.wan import HEAD_DIM, HEADS, forward, gradients, inputs
from support.wan import transformer as wan_transformer
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from gen_accel import Dense, Reuse, attach
from gen_accel.attention_processors.attached.attachment import extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.attention_processors.families import (
    argument_names,
    by_name,
    classes_for,
    family_for,
)
from gen_accel.attention_processors.seam import (
    BoundProcessor,
    SparseProcessor,
    TappedProcessor,
    add_tap,
)

IMAGE_TOKENS = 4
UNETS = ("stable_diffusion", "animatediff")
FRAMES = ("latte", "animatediff")  # each is a row of its own
MIXED = ("mochi", "motif")  # the text is in the queries by then


# Of each way in which images reach the attention one is compiled by day, the others by night.
COMPILED = ("wan image", "hunyuan", "unet")


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def processors(model):
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def same_objects(now, then):
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def tap_all(model, add, first=False):
    """`add(site, q, samples)` on all sites, or the first; what takes it off."""
    family = family_for(model, "image prompts")
    sites = family.image_attentions(model)
    off = [family.tap_image(model, s, partial(add, s)) for s in (sites[:1] if first else sites)]
    return lambda: [remove() for remove in off]


def nothing(site, q, samples):
    return None


def linear(site, q, samples):
    """Of the queries, so that what it is given is in what it gives."""
    return 0.5 * q + 0.1


def attended(q, k, v):
    """(b, N, H, D) of q, with the keys and values (b, T, H D) of image tokens, written out."""
    k, v = (x.unflatten(2, q.shape[2:]) for x in (k, v))
    weights = torch.einsum("bnhd,bthd->bhnt", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnt,bthd->bnhd", weights, v)


# Every family


def test_there_is_a_case_for_each_class():
    cases = {type(case.build()).__name__: case.family for case in CASES.values()}
    assert cases == {
        kind: name for kind, name in classes_for("image prompts").items() if is_here(kind)
    }


def test_sites(case):
    model = case.build()
    family = family_for(model, "image prompts")
    assert family.name == case.family
    modules = dict(model.named_modules())
    sites = family.image_attentions(model)
    assert sites
    for place, site in enumerate(sites):
        assert modules[site.name] is site.module
        k, v = getattr(site.module, site.to_k), getattr(site.module, site.to_v)
        assert k.weight.shape == v.weight.shape == (site.heads * site.dim, site.width)
        number = 2 * place + 1 if case.family in UNETS else place
        assert site.number == str(number)
        if site.norm is not None:
            normalised = getattr(site.module, site.norm).weight.numel()
            assert normalised in (site.dim, site.heads * site.dim)
    assert len({site.width for site in sites}) == 1


@pytest.mark.parametrize("name", ["wan", "flux", "unet"])
def test_sites_with_a_lora(name):
    model = CASES[name].build()
    sites = family_for(model, "image prompts").image_attentions(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    assert family_for(model, "image prompts").image_attentions(model) == sites


@torch.no_grad()
def test_the_grid_and_the_timestep_are_read_from_the_call(case):
    model, given = case.build(), case.inputs()
    family = family_for(model, "image prompts")
    seen = []

    def hook(module, args, kwargs):
        told = by_name(argument_names(type(module)), args, kwargs)
        video = family.tokens(module, told).video
        seen.append((video.grid, video.text, family.timestep(told)))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    output(model, given)
    ((grid, text, time),) = seen
    assert (grid, text) == (case.grid, case.text)
    assert torch.equal(time, torch.as_tensor(given["timestep"]))


def test_grids_that_are_none():
    model = cogvideox(patch_size_t=2)
    told = {"hidden_states": noise(1, 3, 4, 6, 8), "encoder_hidden_states": noise(1, 5, 8)}
    with pytest.raises(ValueError, match=r"\(3, 6, 8\).*not whole patches of \(2, 2, 2\)"):
        family_for(model, "image prompts").tokens(model, told)
    model = mochi()
    told = {"hidden_states": noise(1, 4, 3, 5, 8), "encoder_hidden_states": noise(1, 7, 16)}
    with pytest.raises(ValueError, match=r"\(3, 5, 8\).*not whole patches of \(1, 2, 2\)"):
        family_for(model, "image prompts").tokens(model, told)
    model, given = ltx(), ltx_inputs()
    with pytest.raises(ValueError, match=r"num_frames, height and width.*None, 3, 4"):
        family_for(model, "image prompts").tokens(model, given | {"num_frames": None})
    family = family_for(flux(), "image prompts")
    given = flux_inputs()
    given["img_ids"] = torch.cat([given["img_ids"], given["img_ids"] + torch.tensor([1, 0, 9])])
    assert family.tokens(None, given).video.grid == (1, 3, 4)


@pytest.mark.turns(5)
@torch.no_grad()
def test_a_tap_that_gives_nothing_changes_nothing(case):
    model, given = case.build(), case.inputs()
    before, stock = processors(model), output(model, given)
    remove = tap_all(model, nothing)
    tapped = [p for p in processors(model) if isinstance(p, TappedProcessor)]
    assert len(tapped) == len(family_for(model, "image prompts").image_attentions(model))
    assert torch.equal(output(model, given), stock)
    remove()
    remove()
    assert same_objects(processors(model), before)
    assert torch.equal(output(model, given), stock)


@pytest.mark.turns(5)
@torch.no_grad()
def test_a_tap_that_adds(case):
    model, given = case.build(), case.inputs()
    before, stock = processors(model), output(model, given)
    remove = tap_all(model, linear)
    added = output(model, given)
    assert not torch.allclose(added, stock, atol=1e-4)
    again = tap_all(model, nothing)
    assert torch.equal(output(model, given), added)
    remove()
    assert torch.equal(output(model, given), stock)
    again()
    assert same_objects(processors(model), before)


@pytest.mark.turns(5)
@torch.no_grad()
def test_a_tap_sees_the_video_alone(case):
    """In the first block its queries follow the video and not the text."""
    model, given, seen = case.build(), case.inputs(), []
    tap_all(model, lambda site, q, samples: seen.append((q, samples)), first=True)
    output(model, given)
    text = given["encoder_hidden_states"]
    other_text = tuple(x + 1 for x in text) if isinstance(text, tuple) else text + 1
    output(model, given | {"encoder_hidden_states": other_text})
    latents = "sample" if case.family in UNETS else "hidden_states"
    output(model, given | {latents: given[latents] + noise(*given[latents].shape, seed=9)})
    calls = len(seen) // 3
    assert calls == (2 if case.family == "mochi" else 1)
    rows, tokens = 2, case.tokens or torch.Size(case.grid).numel()
    if case.family in FRAMES:
        rows, tokens = 2 * case.grid[0], tokens // case.grid[0]
    for place in range(calls):
        samples = slice(place, place + 1) if case.family == "mochi" else slice(0, rows)
        runs = seen[place::calls]
        assert all(rows == samples for _, rows in runs)
        (first, _), (with_text, _), (with_video, _) = runs
        assert first.shape[:2] == (samples.stop - samples.start, tokens)
        if case.family not in MIXED:
            assert torch.equal(first, with_text)
        assert not torch.allclose(first, with_video, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in JOINT if name != "flux"])
def test_joint_attention_keeps_the_rows_of_the_text(name):
    model, given = CASES[name].build(), CASES[name].inputs()
    family = family_for(model, "image prompts")
    site = family.image_attentions(model)[0]
    before, after, queries = [], [], []
    add_tap(site.module, family.attention.call, partial(keep, before))
    family.tap_image(model, site, lambda q, samples: queries.append(q) or linear(site, q, samples))
    add_tap(site.module, family.attention.call, partial(keep, after))
    output(model, given)
    tokens = torch.Size(CASES[name].grid).numel()
    text_first = name.startswith("cogvideox")
    for (call, was), (_, now), q in zip(before, after, queries, strict=True):
        split = call.q.shape[1] - tokens if text_first else tokens
        parts = [slice(0, split), slice(split, None)]
        text, video = parts if text_first else parts[::-1]
        assert torch.equal(q, call.q[:, video])
        assert torch.equal(now[:, text], was[:, text])
        assert torch.equal(now[:, video], was[:, video] + linear(site, q, None))
    if name == "mochi":
        assert [call.q.shape[1] - tokens for call, _ in before] == [6, 2]
        assert [call.number for call, _ in before] == [0, 1]


def keep(seen, call, out):
    seen.append((call, out))
    return out


# What it equals


class ByHand:
    """Wan's cross-attention with an image prompt, written out for one head dim."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def __call__(self, attn, x, text, attention_mask=None, rotary_emb=None):
        q = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1))
        image = None
        if attn.add_k_proj is not None:
            image, text = text[:, :-512], text[:, -512:]
        out = attended(q, attn.norm_k(attn.to_k(text)), attn.to_v(text))
        if image is not None:
            k, v = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
            out = out + attended(q, k, v)
        out = out + attended(q, self.k, self.v)
        return attn.to_out[0](out.flatten(2))


@pytest.mark.parametrize("name", ["wan", "wan image", "skyreels"])
def test_wan_equals_the_sum_by_hand(name):
    """Also with the image of an I2V model, whose processor calls attention twice."""
    model, given = CASES[name].build(), CASES[name].inputs()
    stock = output(model, given)
    k, v = noise(2, IMAGE_TOKENS, HEADS * HEAD_DIM), noise(2, IMAGE_TOKENS, HEADS * HEAD_DIM)
    remove = tap_all(model, lambda site, q, samples: attended(q, k[samples], v[samples]))
    found = output(model, given)
    remove()
    for block in model.blocks:
        block.attn2.set_processor(ByHand(k, v))
    exact = output(model, given)
    assert (exact - stock).abs().max() > 1e-2
    assert (found - exact).abs().max() < 1e-5


def linear_projector(rows, width):
    """A published projector, (B, 1, rows) features to image tokens of that width."""
    return {
        "proj.weight": noise(IMAGE_TOKENS * width, rows, seed=4) * 0.3,
        "proj.bias": noise(IMAGE_TOKENS * width, seed=5),
        "norm.weight": 1 + 0.1 * noise(width, seed=6),
        "norm.bias": noise(width, seed=7),
    }


def projected(projector, features, width):
    x = F.linear(features, projector["proj.weight"], projector["proj.bias"])
    x = x.reshape(len(x), IMAGE_TOKENS, width)
    return F.layer_norm(x, (width,), projector["norm.weight"], projector["norm.bias"])


def adapter(sites, width, *, bias):
    """Projections of a published adapter, by the numbers of its file."""
    made = {}
    for site in sites:
        for place, name in enumerate(("to_k_ip", "to_v_ip")):
            seed = 10 * int(site.number) + place
            inner = site.heads * site.dim
            made[f"{site.number}.{name}.weight"] = noise(inner, width, seed=seed) * 0.5
            if bias:
                made[f"{site.number}.{name}.bias"] = noise(inner, seed=seed)
    return made


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_equals_the_adapters_of_diffusers(name):
    model, given = CASES[name].build(), CASES[name].inputs()
    stock = output(model, given)
    sites = family_for(model, "image prompts").image_attentions(model)
    width = 24 if name == "flux" else 8
    projector = linear_projector(6, width)
    layers = adapter(sites, width, bias=name == "flux")
    features = noise(2, 6, seed=8)
    tokens = projected(projector, features, width)

    def branch(site, q, samples):
        k, v = (
            F.linear(
                tokens[samples],
                layers[f"{site.number}.{part}.weight"],
                layers.get(f"{site.number}.{part}.bias"),
            )
            for part in ("to_k_ip", "to_v_ip")
        )
        return attended(q, k, v)

    remove = tap_all(model, branch)
    found = output(model, given)
    remove()
    model._load_ip_adapter_weights(
        [{"image_proj": projector, "ip_adapter": layers}], low_cpu_mem_usage=False
    )
    if name == "flux":
        more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [features[:, None]]}}
    else:
        more = {"added_cond_kwargs": {"image_embeds": [features[:, None]]}}
    exact = output(model, given | more)
    assert (exact - stock).abs().max() > 1e-2
    assert (found - exact).abs().max() < 1e-5


@pytest.mark.turns(5)
@pytest.mark.slow
@torch.no_grad()
def test_two_image_prompts_add_up(case):
    model, given = case.build(), case.inputs()
    tap_all(model, lambda site, q, samples: 0.3 * q)
    remove = tap_all(model, lambda site, q, samples: 0.2 * q + 0.1)
    twice = output(model, given)
    other = case.build()
    tap_all(other, linear)
    assert (twice - output(other, given)).abs().max() < 1e-5
    remove()
    assert not torch.allclose(output(model, given), twice, atol=1e-4)


# Together with sparse attention


@pytest.mark.slow
def test_added_on_top_of_sparse_attention():
    """Of a model whose texts are padded to one length, for each method and for none."""
    model, outs = hunyuan_transformer(), {}
    family = family_for(model, "image prompts")
    site = family.image_attentions(model)[0]
    for method in (None, Dense(), RADIAL):
        handle = None if method is None else attach(model, method)
        bare = hunyuan_forward(model)
        before, after = [], []
        off = [
            add_tap(site.module, family.attention.call, partial(keep, before)),
            family.tap_image(model, site, partial(linear, site)),
            add_tap(site.module, family.attention.call, partial(keep, after)),
        ]
        tapped = hunyuan_forward(model)
        ((call, was),), ((_, now),) = before, after
        assert call.tokens == 495
        assert torch.equal(now[:, 495:], was[:, 495:])
        assert torch.equal(now[:, :495], was[:, :495] + linear(site, call.q[:, :495], None))
        outs[method] = was, tapped
        for remove in off:
            remove()
        assert torch.equal(hunyuan_forward(model), bare)
        if handle is not None:
            handle.detach()
    assert torch.equal(outs[None][1], outs[Dense()][1])
    # The padding of a text is no query: its rows are anything with one, and zero with the other.
    sparse, dense = (outs[method][0][0, :502] for method in (RADIAL, None))
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert not torch.allclose(outs[RADIAL][1], outs[None][1], atol=1e-4)


def test_a_schedule_and_paused_leave_taps_on():
    model = hunyuan_transformer()
    stock = hunyuan_forward(model)
    remove = tap_all(model, linear)
    tapped = hunyuan_forward(model)
    with attach(model, RADIAL) as handle:
        assert not torch.allclose(hunyuan_forward(model), tapped, atol=1e-4)
        with handle.paused():
            assert torch.equal(hunyuan_forward(model), tapped)
            remove()
            assert torch.equal(hunyuan_forward(model), stock)
    assert torch.equal(hunyuan_forward(model), stock)


ACTIONS = ("attach", "attach other", "extend", "tap", "tap other")


def orders():
    """A third of the orders to put four things on, with two to take them off again."""
    found = []
    for actions in permutations(ACTIONS, 4):
        for step in (1, 3):
            found.append((actions, tuple(actions[step * i % 4] for i in range(4))))
    return found[::3]


def at(model):
    """As the attention call of Wan's self-attention and that of HunyuanVideo's can be tapped by
    anyone, and both are attached to."""
    return [block.attn1 for block in model.blocks]


@pytest.mark.slow
def test_any_order_restores_the_model():
    model, given = wan_transformer(), inputs(3, 10, 14)
    before, stock = processors(model), output(model, given)

    def tap(amount):
        off = [add_tap(a, "dispatch_attention_fn", partial(scaled, amount)) for a in at(model)]
        return lambda: [remove() for remove in off]

    extension = AttentionExtension("nothing", trained=1, adjust=lambda plan, *rest: plan)
    put = {
        "attach": lambda: attach(model, RADIAL).detach,
        "attach other": lambda: attach(model, WINDOW).detach,
        "extend": lambda: extend_attention(model, extension),
        "tap": lambda: tap(0.5),
        "tap other": lambda: tap(-0.3),
    }
    for on, off in orders():
        # Attaching replaces, so that detaching the one before does nothing.
        left, taken = [], {}
        for action in on:
            taken[action] = put[action]()
            left.append(action)
            check(model, left)
        for action in off:
            taken[action]()
            left.remove(action)
            check(model, left)
        assert same_objects(processors(model), before), (on, off)
        assert torch.equal(output(model, given), stock)
        assert not model._forward_pre_hooks


def scaled(amount, call, out):
    return out + amount * call.q


def check(model, left):
    """The taps are there as long as they were not taken off, and bound to what is attached."""
    taps = sum(action.startswith("tap") for action in left)
    attached = [action for action in left if action.startswith("attach")]
    for attn in at(model):
        processor = attn.processor
        assert len(getattr(processor, "taps", ())) == taps
        if "extend" in left:
            assert isinstance(processor, SparseProcessor)
        if not attached and "extend" not in left:
            assert not isinstance(processor, SparseProcessor)
            assert isinstance(processor, TappedProcessor) == bool(taps)
        if isinstance(processor, BoundProcessor):
            assert not isinstance(processor.stock, BoundProcessor)


@pytest.mark.parametrize("first", ["tap", "attach"])
def test_the_order_does_not_change_what_is_computed(first):
    model = hunyuan_transformer()
    before = processors(model)
    if first == "attach":
        handle = attach(model, RADIAL)
        expected_processors = processors(model)
        remove = tap_all(model, linear)
        assert same_objects(processors(model), expected_processors)
    else:
        remove = tap_all(model, linear)
        handle = attach(model, RADIAL)
    found = hunyuan_forward(model)
    other = hunyuan_transformer()
    tap_all(other, linear)
    attach(other, RADIAL)
    assert torch.equal(hunyuan_forward(other), found)
    handle.detach()
    remove()
    assert same_objects(processors(model), before)


def test_a_refused_attach_leaves_taps():
    model = wan_transformer()
    remove = tap_all(model, linear)
    before, tapped = processors(model), forward(model)
    model.blocks[1].attn1.set_processor(lambda *args, **kwargs: None)
    odd = processors(model)
    with pytest.raises(ValueError, match="does not call dispatch_attention_fn"):
        attach(model, RADIAL)
    assert same_objects(processors(model), odd)
    model.blocks[1].attn1.set_processor(before[2])
    assert torch.equal(forward(model), tapped)
    remove()


# Training, compilation, copies


class Branch(nn.Module):
    """An image branch with parameters, as adapters have: keys and values of its own."""

    def __init__(self, seed, tokens=IMAGE_TOKENS, inner=HEADS * HEAD_DIM):
        super().__init__()
        torch.manual_seed(seed)
        self.k = nn.Parameter(torch.randn(1, tokens, inner))
        self.v = nn.Parameter(torch.randn(1, tokens, inner))

    def forward(self, q, samples):
        k, v = (x.unflatten(2, q.shape[2:]).expand(len(q), -1, -1, -1) for x in (self.k, self.v))
        parts = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)


def branches(model):
    """One on each site, which differ; and what takes them off."""
    family = family_for(model, "image prompts")
    sites = family.image_attentions(model)
    made = [Branch(i, inner=site.heads * site.dim) for i, site in enumerate(sites)]
    off = [family.tap_image(model, site, b) for site, b in zip(sites, made, strict=True)]
    return made, lambda: [remove() for remove in off]


@pytest.mark.parametrize("method", [None, RADIAL], ids=str)
def test_gradient_checkpointing(method):
    model = wan_transformer()
    made, _ = branches(model)
    if method is not None:
        attach(model, method)

    def run():
        found = gradients(model)
        mine = [p.grad.clone() for b in made for p in b.parameters()]
        for b in made:
            b.zero_grad()
        return [*found.values(), *mine]

    plain = run()
    assert all(grad.abs().max() > 0 for grad in plain[-2 * len(made) :])
    model.enable_gradient_checkpointing()
    for again, grad in zip(run(), plain, strict=True):
        assert (again - grad).abs().max() < 1e-6


@pytest.mark.turns(5)
@pytest.mark.slow
def test_gradient_checkpointing_in_each_family(case):
    if case.family == "anyflow_far":
        pytest.skip("its own attention, FlexAttention, has no backward pass on a CPU")
    model, given = case.build(), case.inputs()
    made, _ = branches(model)

    def run():
        output(model, given).square().mean().backward()
        found = [p.grad.clone() for b in made for p in b.parameters()]
        for module in (model, *made):
            module.zero_grad()
        return found

    plain = run()
    assert all(grad.abs().max() > 0 for grad in plain)
    model.enable_gradient_checkpointing()
    model.train()
    for again, grad in zip(run(), plain, strict=True):
        assert (again - grad).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES] if NIGHTLY else COMPILED, indirect=True)
def test_compile_as_one_graph(dynamo, case):
    """But Mochi's processor, which reads the lengths of texts."""
    model, given = case.build(), case.inputs()
    branches(model)
    with torch.no_grad():
        exact = output(model, given)
        compiled = torch.compile(model, backend="eager", fullgraph=case.family != "mochi")
        assert (output(compiled, given) - exact).abs().max() < 1e-5


@pytest.mark.slow
def test_compile_with_a_method(dynamo):
    model = wan_transformer()
    branches(model)
    with attach(model, RADIAL):
        exact = gradients(model)
        found = gradients(torch.compile(model, backend="eager", fullgraph=True))
    for name, grad in exact.items():
        assert (found[f"_orig_mod.{name}"] - grad).abs().max() < 1e-6


@pytest.mark.nightly
@pytest.mark.parametrize("method", [None, RADIAL], ids=str)
def test_compile_with_a_tap_that_no_graph_takes(dynamo, method):
    """What is left to Python runs as the layer that it is of."""
    model = wan_transformer()

    @torch.compiler.disable
    def outside(site, q, samples):
        return (int(site.number) + 1) * linear(site, q, samples)

    tap_all(model, outside)
    for layer, attn in enumerate(at(model)):
        add_tap(attn, "dispatch_attention_fn", partial(apart, layer))
    if method is not None:
        attach(model, method)
    with torch.no_grad():
        exact = forward(model)
        assert (forward(torch.compile(model, backend="eager")) - exact).abs().max() < 1e-5


@torch.compiler.disable
def apart(layer, call, out):
    return out * (1 + layer)


@pytest.mark.slow
def test_compile_sees_taps_come_and_go(dynamo):
    model = wan_transformer()
    stock = forward(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(forward(compiled), stock)
    _, remove = branches(model)
    exact = forward(model)
    assert not torch.allclose(exact, stock, atol=1e-3)
    assert (forward(compiled) - exact).abs().max() < 1e-6
    remove()
    assert torch.equal(forward(compiled), stock)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "attached"), in_turns([wan_transformer, hunyuan_transformer], [False, True])
)
def test_compile_repeated_blocks_shares_graphs_but_not_taps(dynamo, build, attached):
    """More blocks than the graphs that torch keeps for one code, and one of them untapped."""
    layers = {"num_layers": 10} | (
        {"num_single_layers": 0} if build is hunyuan_transformer else {}
    )
    model = build(**layers)
    run = hunyuan_forward if build is hunyuan_transformer else forward
    branches(model)
    with torch.no_grad():
        if attached:
            attach(model, RADIAL)
        twin = copy.deepcopy(model)
        family = family_for(twin, "image prompts")
        for site in family.image_attentions(twin):
            processor = site.module.processor
            for parameter in processor.taps[0].args[0].parameters():
                parameter.neg_()
        last = family_for(model, "image prompts").image_attentions(model)[-1].module
        last.processor.taps = ()
        expected = [run(model), run(twin)]
        assert not torch.allclose(*expected, atol=1e-3)
        graphs = CompileCounter()
        for one, exact in zip((model, twin), expected, strict=True):
            one.compile_repeated_blocks(backend=graphs, fullgraph=True)
            assert (run(one) - exact).abs().max() < 1e-5
        others = len(model._repeated_blocks) - 1
        assert graphs.frame_count <= 3 + others  # tapped, untapped, and those of the copy


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "unet", "mochi"])
def test_deepcopy(name):
    """The copy has its own taps, which hold copies of what they held."""
    model, given = CASES[name].build(), CASES[name].inputs()
    made, remove = branches(model)
    if name == "hunyuan":
        attach(model, RADIAL)
    tapped = output(model, given)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, given), tapped)
    with torch.no_grad():
        for branch in made:
            branch.v.zero_()
    assert torch.equal(output(twin, given), tapped)
    remove()
    assert torch.equal(output(twin, given), tapped)
    assert not torch.allclose(output(model, given), tapped, atol=1e-4)


@pytest.mark.slow
def test_nothing_holds_on_to_a_model():
    model = wan_transformer()
    branches(model)
    handle = attach(model, RADIAL)
    forward(model)
    gone = ref(model), ref(handle)
    del model, handle
    gc.collect()
    assert [alive() for alive in gone] == [None, None]


def test_what_takes_a_tap_off_can_be_copied_with_the_model():
    model = wan_transformer()
    stock = forward(model)
    family = family_for(model, "image prompts")
    site = family.image_attentions(model)[0]
    remove = family.tap_image(model, site, Branch(0))
    tapped = forward(model)
    twin, theirs = copy.deepcopy((model, remove))
    theirs()
    assert torch.equal(forward(twin), stock)
    assert torch.equal(forward(model), tapped)
    assert not any(isinstance(p, BoundProcessor) for p in processors(twin))


# Living with the rest of diffusers


def test_save_pretrained_while_tapped(tmp_path):
    model = wan_transformer()
    stock, keys = forward(model), model.state_dict().keys()
    branches(model)
    assert model.state_dict().keys() == keys
    model.save_pretrained(tmp_path)
    assert torch.equal(forward(type(model).from_pretrained(tmp_path).eval()), stock)


def test_attention_backend_reaches_the_stock_processor():
    model = wan_transformer()
    stock = [block.attn2.processor for block in model.blocks]
    tap_all(model, nothing)
    model.set_attention_backend("_native_math")
    assert {p._attention_backend.value for p in stock} == {"_native_math"}
    model.reset_attention_backend()
    assert {p._attention_backend for p in stock} == {None}


def test_half_precision():
    for name in ("wan", "hunyuan", "unet", "flux"):
        case = CASES[name]
        model = case.build()
        given = {
            key: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in case.inputs().items()
        }
        tap_all(model.to(torch.bfloat16), lambda site, q, samples: q.float())
        assert output(model, given).dtype == torch.bfloat16


def test_another_processor_in_the_place_of_ours_stays():
    model = wan_transformer()
    remove = tap_all(model, linear)
    attn, own = model.blocks[0].attn2, object()
    attn.processor = own
    remove()
    assert attn.processor is own
    assert not isinstance(model.blocks[1].attn2.processor, BoundProcessor)


def test_refusals():
    model = wan_transformer()
    attn = model.blocks[0].attn2
    remove = add_tap(attn, "dispatch_attention_fn", keep)
    before = attn.processor
    with pytest.raises(ValueError, match="is on this WanAttention already; remove it first"):
        add_tap(attn, "dispatch_attention_fn", keep)
    with pytest.raises(
        ValueError, match=r"is bound at dispatch_attention_fn, and not at F.scaled"
    ):
        add_tap(attn, "F.scaled_dot_product_attention", scaled)
    assert attn.processor is before
    remove()
    with pytest.raises(ValueError, match=r"WanAttnProcessor does not call F.scaled_dot_product"):
        add_tap(attn, "F.scaled_dot_product_attention", keep)
    assert not isinstance(attn.processor, BoundProcessor)

    model = unet()
    site = family_for(model, "image prompts").image_attentions(model)[0]
    site.module.set_processor(IPAdapterAttnProcessor2_0(8, 8))
    with pytest.raises(
        ValueError, match=r"IPAdapterAttnProcessor2_0 has param.*unload_ip_adapter"
    ):
        family_for(model, "image prompts").tap_image(model, site, partial(linear, site))
    with pytest.raises(
        ValueError, match=r"no family serves Linear; served: see `gen-accel models`"
    ):
        family_for(nn.Linear(1, 1), "image prompts")


@pytest.mark.parametrize("kind", ["SlicedAttnProcessor", "XFormersAttnProcessor"])
def test_processors_with_another_attention_call_are_refused(kind):
    """Of attention slicing and of xformers, on a UNet."""
    model = unet()
    if kind == "SlicedAttnProcessor":
        model.set_attention_slice("auto")
    else:
        model.set_attn_processor(XFormersAttnProcessor())
    before = processors(model)
    with pytest.raises(ValueError, match=rf"{kind} does not call F\.scaled.*processors back"):
        tap_all(model, nothing)
    assert same_objects(processors(model), before)
    model.set_attn_processor(AttnProcessor2_0())
    tap_all(model, nothing)()


class DropsKeys(WanAttnProcessor):
    """A processor whose attention call is given what only the model's own attention takes."""

    def __init__(self, *ordered, **given):
        super().__init__()
        self.ordered, self.given = ordered, given

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q, k, v = (
            x.unflatten(2, (attn.heads, -1))
            for x in (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        )
        out = dispatch_attention_fn(q, k, v, *self.ordered, **self.given)
        return attn.to_out[0](out.flatten(2))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"is_causal": True}, "is_causal"),
        ({"dropout_p": 0.5, "is_causal": True}, "dropout_p, is_causal"),
        ({"attention_kwargs": {"window": 8}}, r"attention_kwargs \['window'\]"),
        ((None, 0.0, False, None, False, {"window": 8}), r"attention_kwargs \['window'\]"),
    ],
    ids=str,
)
def test_what_a_method_cannot_replace_is_refused(given, named):
    model = wan_transformer()
    ordered, keywords = ((), given) if isinstance(given, dict) else (given, {})
    model.blocks[0].attn1.set_processor(DropsKeys(*ordered, **keywords))
    with attach(model, RADIAL):
        message = f"^sparse attention does not take {named} of transformer.blocks.0;"
        with pytest.raises(ValueError, match=message):
            forward(model)
    with attach(model, Dense()):  # the model's own attention runs, whatever it is given
        forward(model)


@pytest.mark.parametrize("method", [RADIAL, Reuse(RADIAL)], ids=str)
def test_a_block_mask_is_refused_by_name(method):
    model = wan_transformer()
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, "cpu")
    model.blocks[0].attn1.set_processor(DropsKeys(attn_mask=mask, backend="flex"))
    with (
        attach(model, method),
        pytest.raises(ValueError, match="does not take a BlockMask as attn_mask of transformer"),
    ):
        forward(model)


def test_nothing_given_is_no_reason_to_refuse():
    model = wan_transformer()
    given = {"dropout_p": 0.0, "is_causal": False, "attention_kwargs": {}}
    model.blocks[0].attn1.set_processor(DropsKeys(**given))
    with attach(model, RADIAL) as handle:
        forward(model)
        assert handle.summary().density is not None
