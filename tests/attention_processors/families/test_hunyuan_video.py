"""HunyuanVideo: video and padded text in one attention, and what training asks of the family."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from peft import LoraConfig
from support.checks import assert_no_worse
from support.hunyuan import (
    DOUBLE,
    FRAMES,
    GRID,
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LAYERS,
    LENGTHS,
    POOLED_WIDTH,
    SINGLE,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    autoencoder,
    forward,
    generate,
    gradients,
    inputs,
    pipeline,
    transformer,
)
from support.methods import FEW_METHODS, LINEAR, MIXTURE, RADIAL, WINDOW
from support.wan import processors
from torch._dynamo.testing import CompileCounter

from gen_accel import (
    Dense,
    Radial,
    Schedule,
    VideoShape,
    attach,
    attention,
    calibrate,
    load_processors,
    save_processors,
)
from gen_accel.attention_processors.families import family_named, family_of
from gen_accel.attention_processors.seam import SparseProcessor
from gen_accel.kernels import reference
from gen_accel.pipelines.long_video import extend

hunyuan_video = family_named("hunyuan_video")

SPARSE = [
    RADIAL,
    Radial(rule="code-2025-11", block=16, sink=False),
    WINDOW,
    MIXTURE,
    LINEAR,
]
GRID_OF_INPUTS = (5, 9, 11)

pytestmark = pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")


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


def same_objects(now, then):
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in b)


def ran(handle):
    layers = handle.summary().to_dict()["layers"]
    return {name: row["steps"] for name, row in layers.items()}


# The answer


@pytest.mark.slow
def test_dense_is_stock_and_detach_leaves_no_trace(model):
    original, stock, grads = processors(model), forward(model), gradients(model)
    with attach(model, Dense()):
        assert torch.equal(forward(model), stock)
    for method in SPARSE:
        with attach(model, method) as handle:
            out = forward(model)
            with handle.paused():
                assert torch.equal(forward(model), stock)
        assert torch.isfinite(out).all()
        assert not torch.allclose(out, stock, atol=1e-3)
        assert 0 < handle.summary().density < 1
    assert same_objects(processors(model), original)
    assert torch.equal(forward(model), stock)
    assert largest_difference(gradients(model), grads) == 0


@pytest.mark.parametrize("method", SPARSE, ids=str)
@pytest.mark.parametrize("place", [1, DOUBLE], ids=["two streams", "one stream"])
def test_each_sample_is_attention_over_its_own_text(model, place, method):
    """That of the public function with the queries, keys and values of the stock call."""
    site = hunyuan_video.self_attentions(model)[place]
    attn, given = site.module, inputs()
    mask = torch.ones(2, 1, 1, 5 * 9 * 11 + TEXT, dtype=torch.bool)
    g = torch.Generator().manual_seed(2)
    for row, length in enumerate(LENGTHS):
        mask[row, ..., 5 * 9 * 11 + length :] = False
    call = {
        "hidden_states": torch.randn((2, 5 * 9 * 11, HEADS * HEAD_DIM), generator=g),
        "encoder_hidden_states": torch.randn((2, TEXT, HEADS * HEAD_DIM), generator=g),
        "attention_mask": mask,
        "image_rotary_emb": model.rope(given["hidden_states"]),
    }
    calls = []

    def spy(call):
        calls.append(call)
        return call.stock()

    stock = attn.processor
    attn.set_processor(
        SparseProcessor(stock, "dispatch_attention_fn", None, SimpleNamespace(attend=spy))
    )
    dense = attn(**call)
    attn.set_processor(stock)
    assert all(torch.equal(a, b) for a, b in zip(attn(**call), dense, strict=True))
    with attach(model, method):
        forward(model)
        found = attn(**call)

    own = method.for_layer(place) if hasattr(method, "for_layer") else method
    for row, length in enumerate(LENGTHS):
        video = VideoShape(*GRID_OF_INPUTS, length)
        q, k, v = (x[row : row + 1, : video.tokens].transpose(1, 2) for x in calls[0][:3])
        outs = []
        for x in ((q, k, v), (q.double(), k.double(), v.double())):
            out = attention(*x, video=video, method=own, kernel="reference")
            outs.append(out.transpose(1, 2).flatten(2))
        ends = (slice(None, video.video_tokens), slice(video.video_tokens, None))
        projections = (attn.to_out[0], attn.to_add_out) if place < DOUBLE else (None, None)
        for end, projection, actual in zip(ends, projections, found, strict=True):
            low, exact = (out[:, end] for out in outs)
            if projection is not None:
                weights = projection.weight.detach().double(), projection.bias.detach().double()
                low = projection(low)
                exact = torch.nn.functional.linear(exact, *weights)
            # Twice for the attention and twice for the projection, which rounds in other batches.
            assert_no_worse(actual[row : row + 1, : low.shape[1]], low, exact, factor=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_kernels_agree_when_attached(model, method):
    with attach(model, method, kernel="reference"):
        exact, exact_gradients = forward(model), gradients(model)
    with attach(model, method):
        out, grads = forward(model), gradients(model)
    assert (out - exact).abs().max() < 1e-5
    assert grads.keys() == exact_gradients.keys()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    scale = max(g.abs().max().item() for g in exact_gradients.values())
    assert largest_difference(grads, exact_gradients) < 1e-5 * max(scale, 1)


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_text_sees_all_and_is_seen_by_all(method):
    video = VideoShape(*GRID_OF_INPUTS, 7)
    own = method.for_layer(0) if hasattr(method, "for_layer") else method
    plan = own.plan(video)
    order = plan.slots[plan.slots >= 0].argsort()
    seen = reference.pairs(plan)[0, 0][plan.slots >= 0][:, plan.slots >= 0][order][:, order]
    assert seen[video.video_tokens :].all()
    assert seen[:, video.video_tokens :].all()
    assert not seen.all()


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_padding_of_text_is_never_seen(model, method):
    given, other = inputs(), inputs()
    for row, length in enumerate(LENGTHS):
        other["encoder_hidden_states"][row, length:] = 100.0
    with attach(model, method):
        expected = model(**given).sample
        assert torch.equal(model(**other).sample, expected)
        other["encoder_hidden_states"][1, LENGTHS[1] - 1] += 1.0
        changed = model(**other).sample
    assert torch.equal(changed[0], expected[0])
    assert (changed[1] - expected[1]).abs().amin((0, 2, 3)).max() > 0


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_neither_the_batch_nor_the_padding_matters(model, method):
    given = inputs()
    with attach(model, method):
        together = model(**given).sample
        for row, length in enumerate(LENGTHS):
            alone = {name: x[row : row + 1] for name, x in given.items()}
            assert torch.allclose(model(**alone).sample, together[row : row + 1], atol=1e-5)
            for name in ("encoder_hidden_states", "encoder_attention_mask"):
                alone[name] = alone[name][:, :length]
            assert torch.allclose(model(**alone).sample, together[row : row + 1], atol=1e-5)


def test_samples_of_equally_long_texts_share_one_call(model):
    lengths = (4, 7, 4, TEXT)
    with attach(model, WINDOW) as handle:
        together = forward(model, lengths=lengths)
        assert {record.calls for record in handle.summary().records.values()} == {3}
        for row in range(4):
            alone = {name: x[row : row + 1] for name, x in inputs(lengths=lengths).items()}
            assert torch.allclose(model(**alone).sample, together[row : row + 1], atol=1e-5)
    with attach(model, WINDOW) as handle:
        forward(model, lengths=(5, 5))
    assert {record.calls for record in handle.summary().records.values()} == {1}


def test_sizes_and_lengths_change_under_one_handle(model):
    cases = [((5, 18, 22), LENGTHS), ((1, 10, 6), (1, 9)), ((2, 8, 8), (9, 9)), ((7, 6, 30), (2,))]
    fresh = []
    for size, lengths in cases:
        with attach(model, RADIAL):
            fresh.append(forward(model, *size, lengths=lengths))
    with attach(model, RADIAL):
        for (size, lengths), expected in zip([*cases, cases[0]], [*fresh, fresh[0]], strict=True):
            assert torch.equal(forward(model, *size, lengths=lengths), expected)


def test_patches_along_frames_and_a_size_they_do_not_divide():
    model = transformer(patch_size_t=2)
    with attach(model, WINDOW) as handle:
        forward(model, 6, 10, 14, lengths=(TEXT,))
        assert handle.summary().to_dict()["tokens"] == 3 * 5 * 7 + TEXT
        with pytest.raises(ValueError, match=r"\(5, 10, 15\).*\(4, 10, 14\)"):
            forward(model, 5, 10, 15)


@pytest.mark.parametrize("condition", ["token_replace", "latent_concat"])
def test_models_of_image_to_video(condition):
    model = transformer(image_condition_type=condition)
    stock = forward(model)
    with attach(model, Dense()):
        assert torch.equal(forward(model), stock)
    with attach(model, RADIAL, kernel="reference"):
        exact = forward(model)
    with attach(model, RADIAL) as handle:
        out = forward(model)
        assert len(ran(handle)) == LAYERS
    assert (out - exact).abs().max() < 1e-5
    assert not torch.allclose(out, stock, atol=1e-3)


def broken_masks():
    tokens = 5 * 9 * 11 + TEXT
    keys = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    early = keys.clone()
    early[1, ..., 5 * 9 * 11 - 1 :] = False
    return {
        "hides video": early,
        "causal": torch.ones(tokens, tokens, dtype=torch.bool).tril(),
        "bias": torch.full((2, 1, 1, tokens), -0.5),
    }


@pytest.mark.parametrize("name", broken_masks())
def test_any_other_mask_is_refused(model, name):
    mask = broken_masks()[name]
    attn = model.single_transformer_blocks[1].attn
    call = {
        "hidden_states": torch.randn(2, 5 * 9 * 11, HEADS * HEAD_DIM),
        "encoder_hidden_states": torch.randn(2, TEXT, HEADS * HEAD_DIM),
        "attention_mask": mask,
    }
    stock = attn(**call)
    with attach(model, RADIAL):
        forward(model)
        match = r"does not take attn_mask of transformer\.single_transformer_blocks\.1"
        with pytest.raises(ValueError, match=match):
            attn(**call)
    with attach(model, Dense()):
        forward(model)
        found = attn(**call)
    assert all(torch.equal(a, b) for a, b in zip(found, stock, strict=True))


# Layers, steps and pipelines


def test_layers_are_counted_through_both_kinds_of_blocks(model):
    names = [f"transformer.transformer_blocks.{i}" for i in range(DOUBLE)]
    names += [f"transformer.single_transformer_blocks.{i}" for i in range(SINGLE)]
    sites = hunyuan_video.self_attentions(model)
    assert [f"transformer.{site.name}" for site in sites] == names
    assert [site.layer for site in sites] == list(range(LAYERS))
    with attach(model, RADIAL, schedule=Schedule(dense_layers=(1, 2))) as handle:
        forward(model)
    kinds = ["sparse", "dense (dense layer)", "dense (dense layer)", "sparse"]
    assert ran(handle) == {name: {0: kind} for name, kind in zip(names, kinds, strict=True)}


def test_the_token_refiner_is_left_alone(model):
    refiner = model.context_embedder
    before = processors(refiner)
    assert len(before) == 1
    with attach(model, RADIAL):
        assert same_objects(processors(refiner), before)
        ours = [p for p in processors(model) if isinstance(p, SparseProcessor)]
    assert len(ours) == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_a_pipeline_with_guidance(pipe, method):
    """Embedded guidance, and two calls a step whose texts are not equally long."""
    options = {"negative_prompt": "a", "true_cfg_scale": 3.0}
    original, stock = processors(pipe), generate(pipe, **options)
    with attach(pipe, Dense()):
        assert torch.equal(generate(pipe, **options), stock)
    with attach(pipe, method, kernel="reference"):
        exact = generate(pipe, **options)
    with attach(pipe, method) as handle:
        out = generate(pipe, **options)
        assert {record.calls for record in handle.summary().records.values()} == {2}
        other = generate(pipe, **options, guidance_scale=1.0)
    assert (out - exact).abs().max() < 1e-4
    assert not torch.allclose(out, stock, atol=1e-3)
    assert not torch.allclose(out, other, atol=1e-3)
    assert same_objects(processors(pipe), original)
    assert torch.equal(generate(pipe, **options), stock)


def test_a_pipeline_decodes_a_batch_of_prompts(pipe):
    prompts = ["a red square", "a blue circle moves up"]
    size = {"num_frames": 5, "height": 64, "width": 64}
    with attach(pipe, RADIAL):
        both = generate(pipe, prompt=prompts, output_type="np", **size)
    assert both.shape == (2, 5, 64, 64, 3)


def test_dense_steps(pipe):
    schedule = Schedule(dense_start=0.5, dense_end=0.25)
    with attach(pipe, RADIAL, schedule=schedule) as handle:
        for _ in range(2):
            generate(pipe, 4)
            for steps in ran(handle).values():
                kinds = [steps[step].split(" (")[0] for step in range(4)]
                assert kinds == ["dense", "dense", "sparse", "dense"]
    tokens = GRID[0] * GRID[1] * GRID[2]
    assert tokens < handle.summary().to_dict()["tokens"] <= tokens + 16


def test_calibration_and_its_parameters_on_disk(tmp_path):
    pipe = pipeline()
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": 16}
    with attach(pipe, LINEAR):
        fit = calibrate(pipe, ["a red square", "a blue circle"], num_inference_steps=2, **size)
        expected = generate(pipe)
        save_processors(pipe, tmp_path)
    assert len(fit.layers) == LAYERS
    assert fit.after < fit.before
    with load_processors(pipe, tmp_path):
        assert torch.equal(generate(pipe), expected)


def test_deepcopy_while_attached(model):
    with attach(model, RADIAL):
        twin, expected = copy.deepcopy(model), forward(model)
    stock = forward(model)
    assert torch.equal(forward(twin), expected)
    twin.transformer_blocks[0].attn.processor.owner.detach()
    assert torch.equal(forward(twin), stock)


def test_bfloat16(model):
    low = transformer().to(torch.bfloat16)
    given = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs().items()}
    given["timestep"], given["guidance"] = inputs()["timestep"], inputs()["guidance"]
    with attach(low, RADIAL), torch.no_grad():
        out = low(**given).sample
    with attach(model, RADIAL), torch.no_grad():
        exact = forward(model)
    with torch.no_grad():
        dense = (low(**given).sample - forward(model)).abs().max()
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 2 * dense


# torch.compile


CASES = [
    ((5, 18, 22), LENGTHS),
    ((3, 10, 14), LENGTHS),
    ((5, 18, 22), (5, 5)),
    ((3, 10, 14), (9,)),
]


@pytest.mark.nightly
def test_compile_repeated_blocks(dynamo):
    """Layers that differ, in being dense, get graphs of their own, and so do lengths of texts."""
    model = transformer()
    with torch.no_grad(), attach(model, RADIAL, schedule=Schedule(dense_layers=(0, 3))):
        expected = [forward(model, *size, lengths=lengths) for size, lengths in CASES]
        graphs = CompileCounter()
        model.compile_repeated_blocks(backend=graphs, fullgraph=True)
        counts = []
        for _ in range(2):
            for (size, lengths), exact in zip(CASES, expected, strict=True):
                assert (forward(model, *size, lengths=lengths) - exact).abs().max() < 1e-5
            counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.nightly
def test_compile_the_whole_model(dynamo):
    model = transformer()
    with torch.no_grad(), attach(model, RADIAL, schedule=Schedule(dense_layers=1)):
        expected = [forward(model, *size, lengths=lengths) for size, lengths in CASES[::2]]
        model.compile(backend="eager")
        for (size, lengths), exact in zip(CASES[::2], expected, strict=True):
            assert (forward(model, *size, lengths=lengths) - exact).abs().max() < 1e-5


def test_lengths_of_texts_do_not_fit_one_graph(dynamo):
    model = transformer()
    with attach(model, RADIAL):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"need fullgraph=False or compile_repeated_blocks"):
            forward(compiled)


# Training


@pytest.mark.slow
@pytest.mark.parametrize("method", FEW_METHODS, ids=str)
def test_a_step_of_training(method):
    model = transformer()
    blocks = tuple(f"{site.name}." for site in hunyuan_video.self_attentions(model))
    endings = [e for group in hunyuan_video.lora_targets.values() for e in group]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks)
    ]
    targets = [name for name in linear if any(name.endswith(f".{e}") for e in endings)]
    for ending in endings:
        assert any(name.endswith(f".{ending}") for name in linear), ending
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=targets))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)
    assert not any("context_embedder" in name for name in trained)

    given = inputs()
    clean, sigma = given.pop("hidden_states"), torch.tensor([0.3, 0.8])
    conditions = {n: x for n, x in given.items() if n not in ("timestep", "guidance")}
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    mix = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - mix) * clean + mix * noise
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)

    def loss():
        velocity = hunyuan_video.predict(model, noisy, sigma, conditions)
        return (velocity - (noise - clean)).square().mean()

    with attach(model, method):
        losses = []
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            optimizer.zero_grad()
            losses.append(loss())
            losses[-1].backward()
            grads = {name: p.grad.clone() for name, p in trained.items()}
            if not checkpointing:
                plain = grads
        assert largest_difference(grads, plain) < 1e-6
        assert torch.equal(*losses)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        # B is zero at the start, so that A has no gradient yet.
        assert all(g.abs().max() > 0 for name, g in grads.items() if "lora_B" in name)
        optimizer.step()
        assert loss() < losses[0]


def test_latents_are_those_of_the_pipeline(pipe):
    g = torch.Generator().manual_seed(6)
    video = torch.rand((1, 3, 9, 32, 48), generator=g) * 2 - 1
    latents = hunyuan_video.encode_video(pipe, video)
    posterior = autoencoder().encode(video).latent_dist
    assert latents.shape == (1, pipe.transformer.config.in_channels, 3, 4, 6)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    assert torch.equal(latents, posterior.mode() * autoencoder().config.scaling_factor)

    drawn = [
        hunyuan_video.encode_video(pipe, video, torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    spread = (drawn[0] - latents) / (posterior.std * autoencoder().config.scaling_factor)
    assert 0.8 < spread.std() < 1.2
    with pytest.raises(ValueError, match=r"4 n \+ 1 frames, got 8"):
        hunyuan_video.encode_video(pipe, video[:, :, :8])


def test_the_beginning_of_a_clip_has_latents_of_its_own(pipe):
    """So that no length of a clip may be cut from another one's latents."""
    video = torch.rand((1, 3, 17, 32, 32), generator=torch.Generator().manual_seed(7)) * 2 - 1
    long, short = (hunyuan_video.encode_video(pipe, video[:, :, :n]) for n in (17, 9))
    assert not hunyuan_video.training.causal_vae
    assert (long[:, :, :3] - short).abs().max() > 0.01 * long.abs().max()


def test_prompts_are_encoded_as_the_pipeline_does(pipe):
    prompts = ["a red square moves right", ""]
    conditions = hunyuan_video.encode_prompt(pipe, prompts, 16)
    states, pooled, mask = pipe.encode_prompt(prompts, max_sequence_length=16)
    assert torch.equal(conditions["encoder_hidden_states"], states)
    assert torch.equal(conditions["pooled_projections"], pooled)
    assert torch.equal(conditions["encoder_attention_mask"], mask)
    assert states.shape == (2, 16, TEXT_WIDTH)
    assert pooled.shape == (2, POOLED_WIDTH)
    lengths = mask.sum(1)
    assert lengths[0] == lengths[1] + 5 < 16
    assert not conditions["encoder_hidden_states"].requires_grad
    alone = hunyuan_video.encode_prompt(pipe, prompts[1:], 16)
    for name, x in conditions.items():
        assert torch.allclose(x[1:], alone[name], atol=1e-6)
    default = hunyuan_video.encode_prompt(pipe, prompts[:1])["encoder_hidden_states"]
    assert default.shape[1] == hunyuan_video.sizes.text
    assert torch.allclose(default[:, : lengths[0]], states[:1, : lengths[0]], atol=1e-6)


def test_predict_is_the_call_of_the_pipeline(pipe):
    """Seen from inside of a run of the pipeline, whose prompt is encoded by the family."""
    calls = []

    def record(module, args, kwargs, out):
        calls.append((kwargs, out[0]))

    hook = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    generate(pipe, 2)
    hook.remove()
    conditions = hunyuan_video.encode_prompt(pipe, ["a red square moves right"], 16)
    with torch.no_grad():
        for kwargs, out in calls:
            noisy, sigma = kwargs["hidden_states"], kwargs["timestep"] / 1000
            given = conditions | {"guidance": kwargs["guidance"]}
            found = hunyuan_video.predict(pipe.transformer, noisy, sigma, given)
            assert torch.allclose(found, out, atol=1e-5)
            # Without guidance given: 1.
            one = conditions | {"guidance": torch.tensor([1000.0])}
            found = hunyuan_video.predict(pipe.transformer, noisy, sigma, conditions)
            assert torch.equal(found, hunyuan_video.predict(pipe.transformer, noisy, sigma, one))
            assert not torch.allclose(found, out, atol=1e-5)


def test_predict_without_embedded_guidance():
    model = transformer(guidance_embeds=False)
    given = inputs()
    noisy = given.pop("hidden_states")
    conditions = {n: x for n, x in given.items() if n not in ("timestep", "guidance")}
    expected = model(noisy, timestep=given["timestep"], **conditions).sample
    found = hunyuan_video.predict(model, noisy, given["timestep"] / 1000, conditions)
    assert torch.allclose(found, expected, atol=1e-6)


# The rotary table


def test_own_frequencies_are_those_of_the_model(model):
    rope, latents = model.rope, torch.zeros(1, 1, 9, 6, 4)
    stock = rope(latents)
    freqs = hunyuan_video.temporal_frequencies(model)
    assert freqs.dtype == torch.float64
    assert torch.allclose(freqs, torch.tensor([1.0, 256.0**-0.5], dtype=torch.float64))
    hunyuan_video.set_temporal_frequencies(model, freqs)
    try:
        for found, expected in zip(model.rope(latents), stock, strict=True):
            assert (found - expected).abs().max() < 1e-6
    finally:
        hunyuan_video.set_temporal_frequencies(model, None)
    assert model.rope is rope


def test_other_frequencies_turn_the_time_axis_alone():
    model, latents = transformer(), torch.zeros(1, 1, 9, 6, 4)
    names, out = list(model.state_dict()), forward(model)
    stock = [x.view(9, 3, 2, -1) for x in model.rope(latents)]
    own = hunyuan_video.temporal_frequencies(model)
    hunyuan_video.set_temporal_frequencies(model, 2 * own)  # replaced by the next
    hunyuan_video.set_temporal_frequencies(model, own / 2)
    assert torch.equal(hunyuan_video.temporal_frequencies(model), own)
    halved = [x.view(9, 3, 2, -1) for x in model.rope(latents)]
    for found, expected in zip(halved, stock, strict=True):
        assert torch.equal(found[..., 4:], expected[..., 4:])
        assert (found[::2, ..., :4] - expected[:5, ..., :4]).abs().max() < 1e-6
        assert (found[1, ..., :4] - expected[1, ..., :4]).abs().max() > 1e-3
    assert list(model.state_dict()) == names
    assert not torch.allclose(forward(model), out, atol=1e-4)
    before = model.rope(latents)
    model.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.rope(latents), before, strict=True))
    with pytest.raises(ValueError, match=r"freqs must be of shape \(2,\), got \(3,\)"):
        hunyuan_video.set_temporal_frequencies(model, torch.ones(3))
    fresh = transformer()
    hunyuan_video.set_temporal_frequencies(fresh, own / 2)
    hunyuan_video.set_temporal_frequencies(fresh, None)
    hunyuan_video.set_temporal_frequencies(fresh, None)
    assert torch.equal(forward(fresh), out)


@pytest.mark.parametrize("technique", ["riflex", "position_interpolation"])
def test_techniques_on_the_time_axis(pipe, technique):
    size = {"height": 48, "width": 64, "num_frames": 29}
    stock, rope = generate(pipe, 1, **size), pipe.transformer.rope
    with attach(pipe, RADIAL):
        sparse = generate(pipe, 1, **size)
    with extend(pipe, technique, num_frames=29, trained_frames=17) as extended:
        longer, short = generate(extended, 1, **size), generate(pipe, 1)
        with attach(pipe, RADIAL):
            both = generate(pipe, 1, **size)
    assert not torch.allclose(longer, stock, atol=1e-5)
    assert not torch.allclose(both, sparse, atol=1e-5)
    assert torch.equal(short, generate(pipe, 1))
    assert pipe.transformer.rope is rope
    assert torch.equal(generate(pipe, 1, **size), stock)


def test_the_family_serves_the_pipeline(pipe):
    assert isinstance(pipe, HunyuanVideoPipeline)
    assert family_of(pipe.transformer) is hunyuan_video
    assert pipe.vae_scale_factor_temporal == hunyuan_video.sizes.temporal
