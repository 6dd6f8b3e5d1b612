"""Profiles measured on tiny pipelines, and on the demo model against radial attention."""

import warnings
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from support.wan import FRAMES, HEADS, HEIGHT, LAYERS, WIDTH, pipeline, transformer

import gen_accel
from gen_accel import Profiled, Radial, Schedule, attach, measure_profile
from gen_accel.attention_processors.attached import profiling
from gen_accel.attention_processors.attached.profiling import collect

SAMPLED: dict[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "max_sequence_length": 8,
}
PROMPTS = ["a cat", "a dog", "a cow"]


def measured(pipe=None, prompts=PROMPTS, **options):
    given = {"share": 0.4, "block": 8, "every": 2, "num_inference_steps": 4}
    return measure_profile(pipe or pipeline(), prompts, **(given | options), **SAMPLED)


def latents(pipe):
    made = pipe(
        "a hen",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **SAMPLED,
    )
    return made.frames


@pytest.fixture(autouse=True)
def _no_comparison(monkeypatch, request):
    """Random weights attend nowhere in particular, so that no pattern is better."""
    if "demo" not in request.node.name:
        monkeypatch.setattr(profiling, "radial_of", lambda video, method: None)


def test_it_runs_on_the_model_it_was_measured_on(tmp_path):
    pipe = pipeline()
    dense = latents(pipe)
    found = measured(pipe, out=tmp_path / "profile.safetensors")
    assert torch.equal(latents(pipe), dense)
    assert found.method == Profiled.load(tmp_path / "profile.safetensors", 0.4)
    assert found.method.named_layers == tuple(range(LAYERS))
    assert {*found.errors["profile"]} == {*range(LAYERS)}
    assert 0 < found.mean() < 1
    assert "held-out prompt" in str(found)
    with attach(pipe, found.method, schedule=Schedule(dense_steps=1)) as handle:
        assert not torch.equal(latents(pipe), dense)
        assert handle.summary().to_dict()["layers"]
    assert torch.equal(latents(pipe), dense)


def test_both_calls_of_guidance_are_seen_and_dense_output_is_unchanged(monkeypatch):
    pipe, calls, outputs = pipeline(), [], {}
    add = profiling.MassSums.add

    def counted(self, layer, *rest):
        calls.append(layer)
        return add(self, layer, *rest)

    monkeypatch.setattr(profiling.MassSums, "add", counted)
    before = pipe.transformer.forward

    def kept(*args, **kwargs):
        out = before(*args, **kwargs)
        outputs.setdefault(len(calls) > 0, []).append(out[0].clone())
        return out

    plain = []
    pipe.transformer.forward = lambda *a, **k: plain.append(before(*a, **k)) or plain[-1]
    call = {"guidance_scale": 4.0, **SAMPLED}
    drawn = torch.Generator().manual_seed(0)
    pipe("a cat", num_inference_steps=4, generator=drawn, output_type="latent", **call)
    pipe.transformer.forward = kept
    collect(pipe, ["a cat"], block=8, every=2, steps=4, call=call)
    assert len(calls) == LAYERS * 2 * 2  # steps 1 and 3, two calls each
    seen = [x for some in outputs.values() for x in some]
    assert len(seen) == len(plain)
    assert all(torch.equal(a, b[0]) for a, b in zip(seen, plain, strict=True))


def test_the_same_runs_make_the_same_profile():
    one, other = (collect(pipeline(), ["a cat"], block=8, steps=2, call=SAMPLED) for _ in range(2))
    assert one.digest == other.digest
    assert one.heads(0) == HEADS


def test_a_model_of_other_layers_is_refused_before_it_is_changed():
    found = measured(prompts=PROMPTS[:2])
    model = transformer(num_layers=LAYERS + 1)
    before = [block.attn1.processor for block in model.blocks]
    with pytest.raises(ValueError, match=f"got layer {LAYERS}: measure one"):
        attach(model, found.method)
    assert [block.attn1.processor for block in model.blocks] == before
    with pytest.raises(ValueError, match="this model has 4"):
        attach(transformer(num_attention_heads=4), found.method)


@pytest.mark.parametrize(
    ("prompts", "options", "why"),
    [
        ("a cat", {}, "must be a list of texts"),
        (["a cat"], {}, "two or more, of which the last is held out"),
        (PROMPTS, {"every": 0}, "every must be a whole number"),
        (PROMPTS, {"out": "profile.pt"}, r"called \*\.safetensors"),
    ],
)
def test_what_cannot_be_measured_is_refused(prompts, options, why):
    with pytest.raises(ValueError, match=why):
        measured(prompts=prompts, **options)


def test_something_attached_is_refused():
    pipe = pipeline()
    with attach(pipe, Radial()), pytest.raises(ValueError, match=r"already: detach\(\) first"):
        measured(pipe)


def test_a_profile_that_errs_more_than_radial_attention_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "radial_of", lambda video, method: Radial(decay_factor=50.0))
    sparse = Profiled(0.1, block=8)
    monkeypatch.setattr(profiling, "at_density", lambda method, density, video: sparse)
    with pytest.raises(ValueError, match=r"errs by .*, and radial attention of the same density"):
        measured(out=tmp_path / "profile.safetensors")
    assert not (tmp_path / "profile.safetensors").exists()


@pytest.mark.slow
def test_on_the_demo_model_it_errs_less_than_radial_attention():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle moves right quickly", "a blue square moves down slowly"]
    call = {"height": 96, "width": 96, "num_frames": 33, "guidance_scale": 1.0}
    found = measure_profile(
        pipe, prompts, share=0.2, block=16, every=4, num_inference_steps=4, **call
    )
    assert found.mean("at radial's density") <= 0.9 * found.mean("radial")
    assert found.to_dict()["layers"].keys() == {str(n) for n in found.errors["radial"]}
    assert str(found).splitlines()[-1].startswith("mean")
