"""Methods on live diffusers pipelines: sparse while attached, and no trace of it after."""

import copy
import gc
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_wan
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from support.image_adapters import CROSS, sd_unet
from support.methods import FEW_METHODS, LINEAR, MIXTURE, RADIAL, WINDOW
from support.wan import (
    GRID,
    HEAD_DIM,
    HEADS,
    LAYERS,
    PIPELINES,
    euler,
    forward,
    generate,
    gradients,
    inputs,
    picture,
    pipeline,
    processors,
    transformer,
    two_stage,
    unipc,
)
from torch._dynamo.testing import CompileCounter

from gen_accel import (
    Dense,
    Neighborhood,
    Piecewise,
    Radial,
    Schedule,
    VideoShape,
    attach,
    attention,
)
from gen_accel.attention_processors.attached.attachment import attachments_of
from gen_accel.attention_processors.attached.clock import Clock
from gen_accel.attention_processors.seam import SparseProcessor
from gen_accel.parsing import brief
from gen_accel.pipelines import Displaced

SPARSE = [
    RADIAL,
    WINDOW,
    Neighborhood(window=(3, 4, 2), stride=(2, 1, 2), is_causal=(True, False, False)),
    Radial(rule="code-2025-11", block=16, sink=False),
    Radial(rule="paper", block=16, sink=False),
]
VIDEO = VideoShape(5, 9, 11)  # of `wan.inputs()`

MODEL = "transformer.blocks.0"


@pytest.fixture(scope="module")
def model():
    """Shared: a test leaves it as it found it."""
    return transformer()


@pytest.fixture(scope="module")
def pipe():
    """Shared: a test leaves it as it found it."""
    return pipeline()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ran(handle, layer=MODEL):
    """Step to "sparse" or the reason why not."""
    return handle.summary().to_dict()["layers"][layer]["steps"]


def same_objects(now, then):
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in b)


# Pipelines


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")
def test_every_pipeline(name):
    pipe = PIPELINES[name]()
    original = processors(pipe)
    steps = 4 if name == "two stages" else 2
    stock = generate(pipe, steps)
    with attach(pipe, Dense()):
        assert torch.equal(generate(pipe, steps), stock)
    for method in FEW_METHODS:
        with attach(pipe, method) as handle:
            out = generate(pipe, steps)
            ours = [p for p in processors(pipe) if isinstance(p, SparseProcessor)]
        assert len(ours) == len(original) // 2  # self-attention, not cross-attention
        assert torch.isfinite(out).all()
        assert not torch.allclose(out, stock, atol=1e-3)
        assert handle.summary().density < 1
        layers = handle.summary().to_dict()["layers"]
        assert len(layers) == len(ours)
    assert same_objects(processors(pipe), original)
    assert torch.equal(generate(pipe, steps), stock)


def test_a_pipeline_decodes_and_takes_a_batch(pipe):
    with attach(pipe, RADIAL):
        videos = generate(pipe, prompt=["a", "b"], output_type="np", num_frames=5)
    assert videos.shape == (2, 5, 80, 112, 3)


def test_a_last_image():
    pipe = PIPELINES["image"]()
    stock = generate(pipe, last_image=picture(1))
    with attach(pipe, RADIAL) as handle:
        assert not torch.allclose(generate(pipe, last_image=picture(1)), stock, atol=1e-3)
    assert handle.summary().to_dict()["tokens"] == math.prod(GRID)


def test_reference_images_lengthen_the_grid():
    pipe = PIPELINES["control"]()
    with attach(pipe, RADIAL) as handle:
        generate(pipe, 1, reference_images=[picture(1)])
    assert handle.summary().to_dict()["tokens"] == (GRID[0] + 1) * GRID[1] * GRID[2]


# The answer


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_kernels_agree_when_attached(model, method):
    with attach(model, method, kernel="reference") as handle:
        exact, exact_gradients = forward(model), gradients(model)
    assert 0 < handle.summary().density < 1
    with attach(model, method, kernel="gather") as handle:
        out, grads = forward(model), gradients(model)
    assert handle.summary().to_dict()["kernels"] == ["gather"]
    assert not torch.allclose(out, forward(model), atol=1e-3)
    assert (out - exact).abs().max() < 1e-5
    assert grads.keys() == exact_gradients.keys()
    scale = max(g.abs().max().item() for g in exact_gradients.values())
    assert largest_difference(grads, exact_gradients) < 1e-5 * max(scale, 1)


def test_the_answer_is_that_of_the_public_function(model):
    """With the queries, keys and values that the stock attention call is given."""
    attn = model.blocks[0].attn1
    x = torch.randn(2, VIDEO.tokens, HEADS * HEAD_DIM)
    rotary = model.rope(inputs()["hidden_states"])
    calls = []

    def spy(call):
        calls.append(call)
        return call.stock()

    stock = attn.processor
    attn.set_processor(
        SparseProcessor(stock, "dispatch_attention_fn", None, SimpleNamespace(attend=spy))
    )
    attn(x, None, None, rotary)
    attn.set_processor(stock)
    q, k, v = (t.transpose(1, 2) for t in calls[0][:3])
    expected = attention(q, k, v, video=VIDEO, method=WINDOW, kernel="reference")
    expected = attn.to_out[0](expected.transpose(1, 2).flatten(2))
    with attach(model, WINDOW):
        forward(model)
        assert (attn(x, None, None, rotary) - expected).abs().max() < 1e-5


def test_sizes_change_under_one_handle(model):
    sizes = [(5, 18, 22), (1, 10, 6), (7, 6, 30), (2, 8, 8)]
    fresh = []
    for size in sizes:
        with attach(model, RADIAL):
            fresh.append(forward(model, *size))
    with attach(model, RADIAL):
        for size, expected in [*zip(sizes, fresh, strict=True), (sizes[0], fresh[0])]:
            assert torch.equal(forward(model, *size), expected)
            one = {name: x[1:] for name, x in inputs(*size).items()}
            assert torch.allclose(model(**one).sample, expected[1:], atol=1e-5)


def test_equal_token_counts_are_told_apart(model):
    method = Neighborhood(window=(-1, 2, 2))
    with attach(model, method, kernel="reference"):
        exact = [forward(model, 3, 8, 12), forward(model, 3, 12, 8)]
    with attach(model, method):
        for size, expected in zip([(3, 8, 12), (3, 12, 8)], exact, strict=True):
            assert (forward(model, *size) - expected).abs().max() < 1e-5


def test_a_size_that_the_patches_do_not_divide_is_refused(model):
    with attach(model, RADIAL), pytest.raises(ValueError, match=r"\(5, 19, 23\).*\(5, 18, 22\)"):
        forward(model, 5, 19, 23)


def test_one_of_two_transformers_is_attached_anew():
    pipe = two_stage()
    first, second = pipe.transformer, pipe.transformer_2
    both = attach(pipe, RADIAL)
    with attach(second, WINDOW):
        assert all(block.attn1.processor.owner is both for block in first.blocks)
    both.detach()
    assert type(first.blocks[0].attn1.processor) is type(second.blocks[0].attn1.processor)


def test_a_patch_along_frames():
    model = transformer(patch_size=(2, 2, 2))
    with attach(model, WINDOW) as handle:
        forward(model, 6, 10, 14)
    assert handle.summary().to_dict()["tokens"] == 3 * 5 * 7


# Schedule


def test_dense_layers(model):
    stock = forward(model)
    with attach(model, RADIAL, schedule=Schedule(dense_layers=1)) as handle:
        first = forward(model)
    assert ran(handle) == {0: "dense (dense layer)"}
    assert ran(handle, "transformer.blocks.1") == {0: "sparse"}
    with attach(model, RADIAL, schedule=Schedule(dense_layers=(1,))) as handle:
        second = forward(model)
    assert ran(handle) == {0: "sparse"}
    assert ran(handle, "transformer.blocks.1") == {0: "dense (dense layer)"}
    with attach(model, RADIAL):
        none = forward(model)
    for a, b in [(stock, first), (first, second), (second, none)]:
        assert not torch.allclose(a, b, atol=1e-3)
    for layers in (LAYERS, (0, 1)):
        with attach(model, RADIAL, schedule=Schedule(dense_layers=layers)):
            assert torch.equal(forward(model), stock)


def test_dense_layers_count_control_blocks_too():
    pipe = PIPELINES["control"]()
    with attach(pipe, RADIAL, schedule=Schedule(dense_layers=1)) as handle:
        generate(pipe, 1)
    assert ran(handle, "transformer.vace_blocks.0") == {0: "dense (dense layer)"}
    assert ran(handle, "transformer.vace_blocks.1") == {0: "sparse"}


@pytest.mark.turns(3)
@pytest.mark.parametrize("scheduler", [euler, unipc])
@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        (Schedule(dense_steps=2), {0, 1}, set()),
        (Schedule(dense_start=0.25), {1}, set()),
        (Schedule(dense_start=0.26, dense_end=0.25), {1, 2}, {3}),
        (Schedule(dense_steps=1, dense_start=0.25), {0, 1}, set()),
        (Schedule(dense_steps=1, dense_end=0.5), {0}, {2, 3}),
    ],
    ids=str,
)
def test_dense_steps(scheduler, schedule, first, last):
    pipe = pipeline(scheduler=scheduler())
    stock = generate(pipe, 4)
    with attach(pipe, RADIAL) as handle:
        sparse = generate(pipe, 4)
        assert ran(handle) == dict.fromkeys(range(4), "sparse")
    with attach(pipe, RADIAL, schedule=schedule) as handle:
        out = generate(pipe, 4)
        expected = dict.fromkeys(range(4), "sparse")
        expected |= dict.fromkeys(first, "dense (first steps)")
        expected |= dict.fromkeys(last, "dense (last steps)")
        assert ran(handle) == expected
        # Guidance calls the model twice a step.
        assert {record.calls for record in handle.summary().records.values()} == {2}
        again = generate(pipe, 4)
        assert ran(handle) == expected
    assert torch.equal(out, again)
    assert not torch.allclose(out, stock, atol=1e-3)
    assert not torch.allclose(out, sparse, atol=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(dense_steps=3),
        Schedule(dense_steps=50),
        Schedule(dense_start=1.0),
        Schedule(dense_end=1.0),
        Schedule(dense_steps=1, dense_start=0.3, dense_end=0.3),
    ],
    ids=str,
)
def test_all_steps_dense_is_stock(pipe, schedule):
    stock = generate(pipe, 3)
    with attach(pipe, RADIAL, schedule=schedule) as handle:
        assert torch.equal(generate(pipe, 3), stock)
    assert all(kind != "sparse" for kind in ran(handle).values())
    assert handle.summary().density is None
    assert handle.summary().flops_share == 1


@pytest.mark.parametrize("scheduler", [euler, unipc])
def test_video_to_video_counts_its_own_steps(scheduler):
    pipe = pipeline(WanVideoToVideoPipeline, scheduler=scheduler())
    with attach(pipe, RADIAL, schedule=Schedule(dense_start=0.25, dense_end=0.25)) as handle:
        for _ in range(2):
            generate(pipe, 8, strength=0.5)
            assert ran(handle) == {
                0: "sparse",
                1: "dense (first steps)",
                2: "sparse",
                3: "dense (last steps)",
            }


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize(
    "kind",
    [
        *(DDIMScheduler, DDPMScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler),
        *(PNDMScheduler, EulerDiscreteScheduler),
    ],
    ids=lambda kind: kind.__name__,
)
def test_steps_with_schedulers_that_count_none(kind, begin):
    """But for the last one, which does. PNDM's second timestep comes twice."""
    scheduler = kind(**({"skip_prk_steps": True} if kind is PNDMScheduler else {}))
    clock, x = Clock(lambda: scheduler), torch.zeros(1, 1, 1, 1)
    for _ in range(2):
        seen = []
        scheduler.set_timesteps(5)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        total = len(scheduler.timesteps) - begin
        for time in scheduler.timesteps[begin:]:
            for _ in range(2):  # guidance calls twice
                new = clock.advance(time.expand(2))
                assert new == (not seen)
                seen.append(clock.step)
            assert clock.steps == total
            if kind in (PNDMScheduler, EulerDiscreteScheduler):
                scheduler.step(x, time, x)
        assert seen == [step for step in range(total) for _ in range(2)]


def test_two_stages_share_one_count():
    pipe = two_stage()
    with attach(pipe, RADIAL, schedule=Schedule(dense_start=0.25)) as handle:
        for _ in range(2):
            generate(pipe, 4)
            high, low = ran(handle), ran(handle, "transformer_2.blocks.0")
            assert high == {0: "sparse", 1: "dense (first steps)"}
            assert low == {2: "sparse", 3: "sparse"}


@pytest.mark.parametrize("name", ["token timesteps", "token timesteps, image"])
def test_token_timesteps_count_steps(name):
    pipe = PIPELINES[name]()
    expected = {0: "dense (first steps)", 1: "sparse", 2: "sparse"}
    with attach(pipe, RADIAL, schedule=Schedule(dense_steps=1)) as handle:
        generate(pipe, 3)
        assert ran(handle) == expected
    with attach(pipe.transformer, RADIAL, schedule=Schedule(dense_steps=1)) as handle:
        generate(pipe, 3)
        assert ran(handle) == expected


def test_steps_without_a_pipeline_are_changes_of_the_timestep(model):
    stock = forward(model, time=900.0)
    with attach(model, RADIAL, schedule=Schedule(dense_steps=2)) as handle:
        for _ in range(2):  # the second run starts over
            assert torch.equal(forward(model, time=900.0), stock)
            assert torch.equal(forward(model, time=900.0), stock)  # guidance
            for time in (600.0, 600.0, 300.0, 0.0):
                out = forward(model, time=time)
            assert ran(handle) == {
                0: "dense (first steps)",
                1: "dense (first steps)",
                2: "sparse",
                3: "sparse",
            }
    assert not torch.allclose(out, forward(model, time=0.0), atol=1e-3)


@pytest.mark.parametrize("name", ["dense_start", "dense_end"])
def test_shares_of_the_steps_need_a_pipeline(model, name):
    original = processors(model)
    with pytest.raises(ValueError, match=r"attach to the pipeline, or use dense_steps"):
        attach(model, RADIAL, schedule=Schedule(**{name: 0.2}))
    assert same_objects(processors(model), original)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_layers": -1}, "dense_layers must be at least 0, got -1"),
        ({"dense_layers": (0, -2)}, "dense_layers must be at least 0"),
        ({"dense_steps": -1}, "dense_steps must be at least 0, got -1"),
        ({"dense_start": 5}, "from 0 to 1, got 5; dense_steps counts steps"),
        ({"dense_end": -0.1}, "dense_end is a share of the steps, from 0 to 1, got -0.1"),
        ({"dense_start": math.nan}, "from 0 to 1, got nan"),
    ],
)
def test_a_schedule_says_what_is_wrong_with_it(options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Schedule(**options)


def test_records_are_those_of_the_last_run(pipe):
    with attach(pipe, RADIAL) as handle:
        for steps in (3, 2, 1, 1):  # of runs of one step too, which never count back
            generate(pipe, steps)
            records = handle.summary().records
            assert {step for _, step in records} == set(range(steps))
            assert {record.calls for record in records.values()} == {2}


def test_a_run_that_was_broken_off_is_not_counted(pipe):
    def stop(*_):
        raise KeyboardInterrupt

    with attach(pipe, RADIAL, schedule=Schedule(dense_steps=1)) as handle:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, 3, callback_on_step_end=stop)
        generate(pipe, 2)
        assert ran(handle) == {0: "dense (first steps)", 1: "sparse"}
        assert {record.calls for record in handle.summary().records.values()} == {2}


def test_the_scheduler_may_be_exchanged():
    pipe = pipeline(scheduler=euler())
    with attach(pipe, RADIAL, schedule=Schedule(dense_start=0.5)) as handle:
        generate(pipe, 2)
        pipe.scheduler = unipc()
        generate(pipe, 4)
        assert list(ran(handle).values()).count("dense (first steps)") == 2


def test_a_pipeline_that_is_gone():
    pipe = pipeline()
    model = pipe.transformer
    attach(pipe, RADIAL)
    del pipe
    gc.collect()
    with pytest.raises(RuntimeError, match="pipeline attached to is gone; attach to the one now"):
        forward(model)


# Summary


@pytest.mark.parametrize("method", [RADIAL, WINDOW], ids=str)
def test_summary_agrees_with_the_plan(model, method):
    plan = method.plan(VIDEO)
    with attach(model, method, schedule=Schedule(dense_layers=1)) as handle:
        forward(model)
    summary = handle.summary()
    assert summary.density == pytest.approx(method.density(VIDEO))
    assert summary.flops_share == pytest.approx((1 + plan.computed_density) / 2)
    data = summary.to_dict()
    dense = 4 * 2 * HEADS * VIDEO.tokens**2 * HEAD_DIM
    assert data["attention_flops"] == pytest.approx(dense * (1 + plan.computed_density))
    assert data["sparsity"] == pytest.approx(1 - method.density(VIDEO))
    assert data["tokens"] == VIDEO.tokens
    assert data["attention_seconds"] is None
    assert data["method"] == str(method)


def test_summary_prints(model):
    with attach(model, RADIAL, schedule=Schedule(dense_layers=1), timed=True) as handle:
        assert "nothing ran yet" in str(handle.summary())
        forward(model)
        summary = handle.summary()
    text = str(summary)
    assert brief(RADIAL) in text
    assert "kernel: gather" in text
    assert f"{VIDEO.tokens} tokens, density {summary.density:.3f}" in text
    assert "1 x dense (dense layer)" in text
    assert summary.seconds > 0
    rows = summary.to_dict()["layers"].values()
    assert summary.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert f"attention took {summary.seconds:.2f} s" in text


def test_summary_after_a_failure(model):
    with attach(model, Neighborhood(window=(-1, 99, 3))) as handle:
        with pytest.raises(ValueError, match="window 99 is larger"):
            forward(model)
        assert "nothing ran yet" in str(handle.summary())


# Coming off again


def test_detach_after_an_exception(model):
    original, stock = processors(model), forward(model)

    def broken():
        with attach(model, RADIAL):
            forward(model)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert same_objects(processors(model), original)
    assert not model._forward_pre_hooks
    assert torch.equal(forward(model), stock)


def test_detach_twice(model):
    original = processors(model)
    handle = attach(model, RADIAL)
    handle.detach()
    other = attach(model, WINDOW)
    handle.detach()
    assert sum(isinstance(p, SparseProcessor) for p in processors(model)) == LAYERS
    other.detach()
    assert same_objects(processors(model), original)


def test_attaching_again_replaces(model):
    original, stock = processors(model), forward(model)
    with attach(model, WINDOW):
        window = forward(model)
    first = attach(model, RADIAL)
    second = attach(model, WINDOW)
    ours = [p for p in processors(model) if isinstance(p, SparseProcessor)]
    assert {p.owner for p in ours} == {second}
    assert not any(isinstance(p.stock, SparseProcessor) for p in ours)
    assert len(model._forward_pre_hooks) == 1
    assert torch.equal(forward(model), window)
    first.detach()
    assert torch.equal(forward(model), window)
    assert first.summary().records == {}
    second.detach()
    assert same_objects(processors(model), original)
    assert torch.equal(forward(model), stock)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("radial", {}),
        (Radial, {}),
        (WINDOW, {"kernel": "gathr"}),
        (WINDOW, {"schedule": Schedule(dense_start=0.5)}),
    ],
)
def test_a_refusal_leaves_the_earlier_attachment(model, method, options):
    with attach(model, RADIAL):
        before, out = processors(model), forward(model)
        with pytest.raises(ValueError, match=r"must be|attach to the pipeline"):
            attach(model, method, **options)
        assert same_objects(processors(model), before)
        assert torch.equal(forward(model), out)


# LoRA


def lora():
    return LoraConfig(
        r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )


def with_adapter(model):
    torch.manual_seed(7)
    model.add_adapter(lora())
    return model


def test_lora_before_or_after():
    model = transformer()
    with attach(model, RADIAL):
        without = forward(model)
        with_adapter(model)
        after = forward(model)
    before = with_adapter(transformer())
    with attach(before, RADIAL):
        assert torch.equal(forward(before), after)
        grads = gradients(before)
    assert not torch.allclose(after, without, atol=1e-3)
    names = {name for name, _ in before.named_parameters() if "lora_" in name}
    assert grads.keys() == names
    assert all(grads[name].abs().max() > 0 for name in names if "attn1" in name)
    with attach(before, RADIAL, kernel="reference"):
        assert largest_difference(grads, gradients(before)) < 1e-5


def test_lora_loaded_from_a_file(tmp_path):
    layers = get_peft_model_state_dict(with_adapter(transformer()))
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    loaded_first, attached_first = pipeline(), pipeline()
    loaded_first.load_lora_weights(tmp_path)
    with attach(loaded_first, RADIAL):
        expected = generate(loaded_first)
    with attach(attached_first, RADIAL):
        without = generate(attached_first)
        attached_first.load_lora_weights(tmp_path)
        assert torch.equal(generate(attached_first), expected)
        attached_first.unload_lora_weights()
        assert torch.equal(generate(attached_first), without)
    assert not torch.allclose(without, expected, atol=1e-3)


# Training, compilation, offloading


@pytest.mark.turns(3)
@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")
@pytest.mark.parametrize("method", FEW_METHODS, ids=str)
def test_gradient_checkpointing(method):
    model = transformer()
    with attach(model, method):
        plain = gradients(model)
        model.enable_gradient_checkpointing()
        assert largest_difference(gradients(model), plain) < 1e-6


def test_gradient_checkpointing_of_two_passes_before_one_backward():
    """Of as many tokens, at other steps: each is computed again as it was."""
    model = transformer()
    passes = [((5, 18, 22), 900.0), ((5, 22, 18), 500.0), ((3, 10, 14), 100.0)]
    schedule = Schedule(dense_steps=1)

    def found():
        outs = [forward(model, *size, time=time).square().mean() for size, time in passes]
        (outs[0] + outs[1]).backward()
        outs[2].backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return grads, [handle.clock.step, len(outs)]

    with attach(model, WINDOW, schedule=schedule) as handle:
        plain, _ = found()
        model.enable_gradient_checkpointing()
        again, (step, count) = found()
        assert largest_difference(again, plain) < 1e-6
        forward(model, 3, 10, 14, time=50.0)
        assert handle.clock.step == step + 1 == count  # counts on from the last pass


def test_dense_layers_that_are_none():
    model = transformer()
    before = processors(model)
    with pytest.raises(ValueError, match="over the grid, 0 to 1 here, got 7, 99"):
        attach(model, RADIAL, schedule=Schedule(dense_layers=(0, 99, 7)))
    assert processors(model) == before


def test_a_pipeline_that_was_not_attached_to_but_shares_the_model():
    pipe = pipeline()
    other = WanPipeline(**(pipe.components | {"scheduler": euler()}))
    other.set_progress_bar_config(disable=True)
    with attach(pipe, RADIAL) as handle:
        generate(other)  # without a schedule, no step matters
        handle.schedule = Schedule(dense_start=0.5)
        for _ in range(2):  # before a run of its own, and after
            with pytest.raises(ValueError, match="attach to the pipeline that runs"):
                generate(other)
            generate(pipe)
            assert {step for _, step in handle.records} == {0, 1}


def test_processors_that_another_takes_the_place_of():
    """As fusing does in models whose processors it exchanges."""
    model = sd_unet()
    given = {
        "sample": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.ones(1, 5, CROSS),
        "return_dict": False,
    }

    @torch.no_grad()
    def out():
        return model(**given)[0]

    stock = out()
    handle = attach(model, Neighborhood((1, 5, 5)))
    sparse = out()
    assert not torch.equal(sparse, stock)
    model.fuse_qkv_projections()
    with pytest.warns(Displaced, match=r"such as FusedAttnProcessor2_0, and run dense: detach"):
        out()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Displaced)  # once
        out()
    handle.detach()
    model.unfuse_qkv_projections()  # which puts ours back
    assert torch.equal(out(), stock)
    assert not attachments_of(model)
    with attach(model, Neighborhood((1, 5, 5))):
        assert torch.equal(out(), sparse)
    assert torch.equal(out(), stock)


SIZES = [(5, 18, 22), (3, 10, 14)]


def check_compiled(model, compiled, tolerance, sizes=SIZES):
    for size in sizes:
        assert (forward(compiled, *size) - forward(model, *size)).abs().max() < tolerance
        exact, found = gradients(model, *size), gradients(compiled, *size)
        found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
        assert found.keys() == exact.keys()
        assert largest_difference(found, exact) < tolerance


@pytest.mark.slow
def test_compile_after_attach(dynamo):
    model = transformer()
    with attach(model, RADIAL, schedule=Schedule(dense_layers=1)):
        check_compiled(model, torch.compile(model, fullgraph=True, backend="eager"), 1e-6)


@pytest.mark.slow
def test_detach_after_compile(dynamo):
    model = transformer()
    stock = forward(model)
    handle = attach(model, RADIAL)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert not torch.allclose(forward(compiled), stock, atol=1e-3)
    handle.detach()
    assert torch.equal(forward(compiled), stock)


@pytest.mark.nightly
def test_compile_by_inductor(dynamo, compiler):
    model = transformer(num_layers=1)
    with attach(model, RADIAL):
        check_compiled(model, torch.compile(model, fullgraph=True), 1e-4, SIZES[:1])


@pytest.mark.slow
def test_compile_a_pipeline_once_for_all_steps(dynamo):
    pipe = pipeline()
    with attach(pipe, RADIAL, padding_once=False):
        expected = generate(pipe, 12)
    with attach(pipe, RADIAL):
        graphs = CompileCounter()
        pipe.transformer.compile(backend=graphs, fullgraph=True)
        assert torch.equal(generate(pipe, 12), expected)
    assert graphs.frame_count == 1


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compile_with_a_schedule_of_steps(dynamo, whole):
    """One graph for the dense steps and one for the sparse ones, however many steps there are."""
    pipe = pipeline()
    graphs = CompileCounter()
    schedule = Schedule(dense_start=0.25)
    with attach(pipe, RADIAL, schedule=schedule, padding_once=False):
        expected = generate(pipe, 12)
    with attach(pipe, RADIAL, schedule=schedule):
        model = pipe.transformer
        if whole:
            model.compile(backend=graphs)
        else:
            model.compile_repeated_blocks(backend=graphs, fullgraph=True)
        assert torch.equal(generate(pipe, 12), expected)
    assert graphs.frame_count <= 2 * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [LINEAR, *(pytest.param(m, marks=pytest.mark.nightly) for m in (RADIAL, MIXTURE))],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")
def test_compile_repeated_blocks_tells_layers_apart(dynamo, method):
    """Blocks share their code. Layers that are dense, those of another partition and those of a
    copy must not share their graphs; those with other parameters may, but not the parameters."""
    model = transformer(num_layers=10)  # more than the graphs that torch keeps for one code
    with torch.no_grad(), attach(model, method, schedule=Schedule(dense_layers=(1,))) as handle:
        for layer, branch in enumerate(handle.branches.values()):
            for parameter in branch.parameters():
                parameter.fill_(0.1 * layer + 0.1)
        twin = copy.deepcopy(model)
        theirs = twin.blocks[0].attn1.processor.owner
        for branch in theirs.branches.values():
            for parameter in branch.parameters():
                parameter.neg_()
        theirs.schedule = Schedule()
        expected = [forward(model), forward(twin)]
        assert not torch.allclose(*expected, atol=1e-3)
        for one, exact in zip((model, twin), expected, strict=True):
            one.compile_repeated_blocks(backend="eager", fullgraph=True)
            assert (forward(one) - exact).abs().max() < 1e-5


def test_a_schedule_of_steps_does_not_fit_one_graph(dynamo, model):
    with attach(model, RADIAL, schedule=Schedule(dense_steps=1)):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"needs fullgraph=False or compile_repeated_blocks"):
            forward(compiled)


def test_accelerate_hooks():
    model = transformer()
    with attach(model, RADIAL):
        expected = forward(model)
        cpu_offload(model, execution_device="cpu")
        assert torch.equal(forward(model), expected)
        remove_hook_from_module(model, recurse=True)
    model, _ = cpu_offload_with_hook(transformer(), execution_device="cpu")
    stock = forward(model)
    with attach(model, RADIAL):
        assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), stock)


@pytest.mark.gpu
def test_model_cpu_offload():
    pipe = pipeline()
    pipe.enable_model_cpu_offload()
    stock = generate(pipe)
    with attach(pipe, RADIAL) as handle:
        first, second = generate(pipe), generate(pipe)
    assert torch.equal(first, second)
    assert not torch.allclose(first, stock, atol=1e-3)
    assert handle.summary().density < 1
    assert torch.equal(generate(pipe), stock)


# Living with the rest of diffusers


def test_attention_backend_reaches_the_stock_processor():
    model = transformer()
    stock = [block.attn1.processor for block in model.blocks]
    with attach(model, RADIAL, schedule=Schedule(dense_layers=1)):
        model.set_attention_backend("_native_math")
        assert {p._attention_backend.value for p in processors(model)} == {"_native_math"}
        assert {p._attention_backend.value for p in stock} == {"_native_math"}
        model.reset_attention_backend()
        assert {p._attention_backend for p in stock} == {None}


def test_dense_layers_obey_the_backend(monkeypatch):
    model, seen = transformer(), []
    registry = attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    stock = registry[name]

    def spy(*args, **kwargs):
        seen.append(kwargs["query"].shape[1] == kwargs["key"].shape[1])
        return stock(*args, **kwargs)

    monkeypatch.setitem(registry, name, spy)
    with attach(model, RADIAL, schedule=Schedule(dense_layers=1)):
        model.set_attention_backend("_native_math")
        forward(model)
        model.reset_attention_backend()
    assert seen.count(True) == 1  # self-attention of the dense layer
    assert seen.count(False) == LAYERS  # cross-attention


def test_save_pretrained_while_attached(tmp_path):
    model = transformer()
    stock = forward(model)
    with attach(model, RADIAL):
        model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(forward(loaded.eval()), stock)


def test_deepcopy_while_attached():
    model = transformer()
    handle = attach(model, RADIAL)
    expected = forward(model)
    twin = copy.deepcopy(model)
    handle.detach()
    # The copy has an attachment of its own, at sizes of its own.
    assert torch.equal(forward(twin), expected)
    assert twin.blocks[0].attn1.processor.owner is not handle
    small = forward(twin, 3, 10, 14)
    with attach(model, RADIAL):
        assert torch.equal(forward(model, 3, 10, 14), small)
        with torch.no_grad():
            twin.blocks[0].attn1.to_v.weight.zero_()
        assert torch.equal(forward(model, 3, 10, 14), small)
    attach(twin, WINDOW).detach()
    assert not any(isinstance(p, SparseProcessor) for p in processors(twin))
    assert not twin._forward_pre_hooks


def test_other_dtypes_while_attached():
    model = transformer()
    with attach(model, RADIAL) as handle:
        single = forward(model)
        model.to(torch.float64)
        double = model(**{name: x.double() for name, x in inputs().items()}, return_dict=False)[0]
        assert double.dtype == torch.float64
        assert (double - single).abs().max() < 1e-4
        model.to(torch.bfloat16)
        half = model(**{name: x.bfloat16() for name, x in inputs().items()}, return_dict=False)[0]
    assert half.dtype == torch.bfloat16
    assert (half - single).abs().max() < 0.1
    assert handle.summary().density < 1


def test_fused_projections(model):
    with attach(model, RADIAL):
        expected = forward(model)
        model.fuse_qkv_projections()
        assert torch.allclose(forward(model), expected, atol=1e-5)
        model.unfuse_qkv_projections()


def test_two_models_do_not_see_each_other():
    call = transformer_wan.WanAttnProcessor.__call__
    names = dict(vars(transformer_wan))
    one, other, third = transformer(0), transformer(0), transformer(0)
    stock = forward(third)
    with attach(one, RADIAL):
        radial = forward(one)
        with attach(other, WINDOW):
            window = forward(other)
            assert torch.equal(forward(one, 3, 10, 14), forward(one, 3, 10, 14))
            assert torch.equal(forward(other), window)
            assert torch.equal(forward(one), radial)
            assert torch.equal(forward(third), stock)
            assert not torch.allclose(radial, window, atol=1e-3)
            assert {type(p) for p in processors(third)} == {transformer_wan.WanAttnProcessor}
            assert vars(transformer_wan) == names
            assert transformer_wan.WanAttnProcessor.__call__ is call
            dispatch = attention_dispatch.dispatch_attention_fn
            assert transformer_wan.dispatch_attention_fn is dispatch
    assert torch.equal(forward(other), stock)


# Bad input


@pytest.mark.parametrize("method", ["radial", Radial, None], ids=str)
def test_what_is_not_a_method(model, method):
    with pytest.raises(ValueError, match=r"method must be an instance such as Radial\(\), got"):
        attach(model, method)


def test_an_unknown_kernel(model):
    with pytest.raises(ValueError, match="got 'gathr'; did you mean 'gather'"):
        attach(model, RADIAL, kernel="gathr")


def test_a_class_that_no_family_serves():
    with pytest.raises(
        ValueError, match=r"no family serves Linear; served: see `gen-accel models`"
    ):
        attach(torch.nn.Linear(2, 2), RADIAL)


@pytest.mark.parametrize("thing", ["a path", object(), None], ids=lambda x: type(x).__name__)
def test_neither_a_pipeline_nor_a_module(thing):
    with pytest.raises(TypeError, match="neither a pipeline with a transformer nor a module"):
        attach(thing, RADIAL)


@pytest.mark.parametrize("how", ["function", "method", "blocks"])
def test_a_compiled_transformer(how):
    pipe = pipeline()
    original = processors(pipe)
    if how == "function":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif how == "method":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="transformer is compiled already; load it again"):
            attach(target, RADIAL)
    assert same_objects(processors(pipe), original)


def test_tokens_that_are_not_the_grid(model):
    attn = model.blocks[0].attn1
    with attach(model, RADIAL):
        forward(model)
        with pytest.raises(ValueError, match="runs over 17 tokens, the latents make 5 x 9 x 11"):
            attn(torch.randn(1, 17, HEADS * HEAD_DIM))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((6, 3, 3), "window 6 is larger than the 5 frames of the video; use at most 5"),
        ((-1, 10, 3), "window 10 is larger than the 9 rows"),
        ((-1, 3, 12), "window 12 is larger than the 11 columns"),
    ],
)
def test_a_window_larger_than_the_video(model, window, message):
    with attach(model, Neighborhood(window=window)):
        with pytest.raises(ValueError, match=message):
            forward(model)
        forward(model, 7, 30, 30)


@pytest.mark.parametrize("method", [Neighborhood((6, 3, 3)), Piecewise(tile=(6, 3, 3))], ids=str)
def test_what_does_not_fit_is_refused_before_the_dense_steps(model, method):
    with attach(model, method, schedule=Schedule(dense_steps=5)):
        with pytest.raises(ValueError, match="is larger than the"):
            forward(model)
        forward(model, 7, 30, 30)
    with attach(model, method, schedule=Schedule(dense_layers=LAYERS)):
        forward(model)  # no layer is to run it


class NoCall:
    def __call__(self, attn, hidden_states, *args):
        return hidden_states


def test_a_processor_without_an_attention_call():
    model = transformer()
    with attach(model, WINDOW):
        out = forward(model)
        stock = model.blocks[1].attn1.processor
        model.blocks[1].attn1.set_processor(NoCall())
        before = processors(model)
        with pytest.raises(ValueError, match="NoCall does not call dispatch_attention_fn"):
            attach(model, RADIAL)
        assert same_objects(processors(model), before)
        model.blocks[1].attn1.set_processor(stock)
        assert torch.equal(forward(model), out)


def test_an_attention_mask(model):
    attn = model.blocks[0].attn1
    x = torch.randn(2, VIDEO.tokens, HEADS * HEAD_DIM)
    mask = torch.ones(VIDEO.tokens, VIDEO.tokens, dtype=torch.bool).tril()
    stock = attn(x, None, mask)
    with attach(model, RADIAL):
        forward(model)
        with pytest.raises(ValueError, match=r"does not take attn_mask of transformer\.blocks\.0"):
            attn(x, None, mask)
    with attach(model, Dense()):
        forward(model)
        assert torch.equal(attn(x, None, mask), stock)
