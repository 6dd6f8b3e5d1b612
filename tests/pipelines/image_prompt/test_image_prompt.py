"""Image prompts on live models: what they add, where, by what, and no trace of them after."""

import copy
import gc
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig
from support import hunyuan, wan
from support.image_models import output
from support.image_prompts import (
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
from support.methods import FEW_METHODS
from torch import nn
from torch._dynamo.testing import CompileCounter

from gen_accel import attach, load_image_prompt
from gen_accel.attention_processors.image_prompt import (
    ImageAdapter,
    KeysValues,
    image_attention,
    new_adapter,
)

# What is added


@pytest.mark.turns(5)
@pytest.mark.slow
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


@pytest.mark.turns(5)
@pytest.mark.slow
def test_training_begins_at_the_base_model_and_moves_all(case):
    if case.family == "anyflow_far":
        pytest.skip("its own attention, FlexAttention, has no backward pass on a CPU")
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


@pytest.mark.turns(5)
@pytest.mark.parametrize("method", FEW_METHODS, ids=lambda method: type(method).__name__)
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


@pytest.mark.slow
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


# Pipelines, copies, offloading, graphs


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
    with pytest.raises(ValueError, match="no family serves Linear; served: "):
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
