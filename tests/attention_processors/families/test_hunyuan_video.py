"""HunyuanVideo: masks, text, image to video and guidance, which the shared tests do not have."""

import pytest
import torch
from support.hunyuan import (
    DOUBLE,
    FRAMES,
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LAYERS,
    LENGTHS,
    SINGLE,
    TEXT,
    WIDTH,
    forward,
    generate,
    inputs,
    pipeline,
    transformer,
)
from support.methods import LINEAR, MIXTURE, RADIAL, WINDOW
from support.wan import processors

from gen_accel import (
    Dense,
    Radial,
    Schedule,
    attach,
    calibrate,
    load_processors,
    save_processors,
)
from gen_accel.attention_processors.families import family_named
from gen_accel.attention_processors.seam import SparseProcessor

hunyuan_video = family_named("hunyuan_video")

SPARSE = [
    RADIAL,
    Radial(rule="code-2025-11", block=16, sink=False),
    WINDOW,
    MIXTURE,
    LINEAR,
]

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


def ran(handle):
    layers = handle.summary().to_dict()["layers"]
    return {name: row["steps"] for name, row in layers.items()}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.turns(3)
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


@pytest.mark.slow
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


# torch.compile


CASES = [
    ((5, 18, 22), LENGTHS),
    ((3, 10, 14), LENGTHS),
    ((5, 18, 22), (5, 5)),
    ((3, 10, 14), (9,)),
]


def test_lengths_of_texts_do_not_fit_one_graph(dynamo):
    model = transformer()
    with attach(model, RADIAL):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"need fullgraph=False or compile_repeated_blocks"):
            forward(compiled)


# Training


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
