import copy
import math
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from support import hunyuan, wan
from support.tiny import skyreels

import gen_accel
from gen_accel.attention_processors.families import family_named
from gen_accel.pipelines.long_video import (
    RULES,
    TECHNIQUES,
    PositionInterpolation,
    Riflex,
    apply_rule,
    extend,
    known_trained_frames,
)
from gen_accel.pipelines.long_video.continuation import LatentConstraint, matched, noised
from gen_accel.pipelines.long_video.ultravico import UltraViCo
from gen_accel.video import latent_frames

family = family_named("wan")

ROTARY = ("riflex", "position_interpolation")


def frequencies(base: float, dim: int) -> torch.Tensor:
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def tables(model) -> list[torch.Tensor]:
    return [model.rope.freqs_cos.clone(), model.rope.freqs_sin.clone()]


def all_equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def demo_pipe():
    pipe = WanPipeline.from_pretrained(str(gen_accel.demo.path()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def demo_latents(run, frames: int = 65, **options):
    arguments = {
        "prompt": "a red circle moves right slowly",
        "num_frames": frames,
        "height": 96,
        "width": 96,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return run(**(arguments | options)).frames


# The table of the model


def test_the_frequencies_are_those_of_the_stock_table():
    model = wan.transformer(attention_head_dim=32)
    stock = tables(model)
    own = family.temporal_frequencies(model)
    assert own.dtype == torch.float64
    torch.testing.assert_close(
        torch.atan2(stock[1][1, : 2 * len(own) : 2], stock[0][1, : 2 * len(own) : 2]), own.float()
    )
    family.set_temporal_frequencies(model, own)
    assert all_equal(tables(model), stock)


def test_other_frequencies_change_the_time_axis_alone_and_none_brings_it_back():
    model = wan.transformer()
    stock = tables(model)
    freqs = family.temporal_frequencies(model) * 0.3
    family.set_temporal_frequencies(model, freqs)
    family.set_temporal_frequencies(model, freqs)  # what is kept is the model's own
    cos, sin = tables(model)
    angles = torch.outer(torch.arange(len(cos), dtype=torch.float64), freqs)
    pairs = len(freqs)
    assert torch.equal(cos[:, : 2 * pairs : 2], angles.cos().float())
    assert torch.equal(sin[:, 1 : 2 * pairs : 2], angles.sin().float())
    assert torch.equal(cos[:, 2 * pairs :], stock[0][:, 2 * pairs :])
    assert torch.equal(sin[:, 2 * pairs :], stock[1][:, 2 * pairs :])
    family.set_temporal_frequencies(model, None)
    family.set_temporal_frequencies(model, None)
    assert all_equal(tables(model), stock)


def test_the_table_comes_back_in_the_precision_that_the_model_has_by_then():
    model, other = wan.transformer(), wan.transformer()
    family.set_temporal_frequencies(model, family.temporal_frequencies(model) * 0.3)
    model.to(torch.bfloat16)
    family.set_temporal_frequencies(model, None)
    assert all_equal(tables(model), tables(other.to(torch.bfloat16)))
    assert model.state_dict().keys() == other.state_dict().keys()


def test_frequencies_of_another_number_of_pairs_are_refused():
    with pytest.raises(ValueError, match=r"freqs must be of shape \(4,\), got \(3,\)"):
        family.set_temporal_frequencies(wan.transformer(), torch.ones(3))


# The mathematics of the rules


@pytest.mark.parametrize(
    ("base", "dim", "trained", "k", "period"),
    [(256, 16, 33, 4, 50), (10_000, 16, 13, 2, 20), (10_000, 44, 21, 4, 22)],
    ids=["HunyuanVideo", "CogVideoX", "Wan"],
)
def test_riflex_finds_the_published_intrinsic_frequency(base, dim, trained, k, period):
    own = frequencies(base, dim)
    assert Riflex().intrinsic(own, trained) == k
    assert round(2 * math.pi / own[k - 1].item()) == period


def test_riflex_lowers_one_frequency_so_that_a_period_outlasts_the_video():
    own = frequencies(256, 16)
    made = Riflex().frequencies(own, 66, 33)
    assert made[3].item() == pytest.approx(0.9 * 2 * math.pi / 66, rel=1e-15)
    assert 2 * math.pi / made[3] > 66
    rest = [i for i in range(8) if i != 3]
    assert torch.equal(made[rest], own[rest])
    assert torch.equal(own, frequencies(256, 16))


def test_riflex_leaves_what_does_not_repeat():
    own = frequencies(256, 16)  # the period of pair 4 is 50.3
    assert torch.equal(Riflex().frequencies(own, 50, 33), own)
    assert torch.equal(Riflex(k=1).frequencies(own, 33, 33), own)
    assert not torch.equal(Riflex().frequencies(own, 51, 33), own)


def test_riflex_takes_a_given_pair():
    own = frequencies(10_000, 44)
    changed = (Riflex(k=6).frequencies(own, 81, 21) != own).nonzero()
    assert changed.tolist() == [[5]]
    with pytest.raises(ValueError, match="k must be from 1 to 22, got 23"):
        Riflex(k=23).frequencies(own, 81, 21)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Riflex(k=0)


def test_interpolation_puts_all_frames_where_the_trained_ones_were():
    own = frequencies(10_000, 44)
    made = PositionInterpolation().frequencies(own, 84, 21)
    torch.testing.assert_close(84 * made, 21 * own, rtol=1e-14, atol=0)
    assert torch.equal(PositionInterpolation().frequencies(own, 21, 21), own)
    assert torch.equal(PositionInterpolation().frequencies(own, 9, 21), own)


# A rule on a live transformer


@pytest.mark.parametrize("rule", ROTARY)
def test_a_rule_equals_a_model_built_with_its_frequencies(rule):
    model, built = wan.transformer(), wan.transformer()
    made = {"riflex": Riflex(), "position_interpolation": PositionInterpolation()}[rule]
    freqs = made.frequencies(frequencies(10_000, 8), 9, 3)
    rope = WanRotaryPosEmbed(16, (1, 2, 2), 32)
    angles = torch.outer(torch.arange(32, dtype=torch.float64), freqs).repeat_interleave(2, 1)
    rope.freqs_cos = torch.cat((angles.cos().float(), rope.freqs_cos[:, 8:]), 1)
    rope.freqs_sin = torch.cat((angles.sin().float(), rope.freqs_sin[:, 8:]), 1)
    built.rope = rope
    plain = wan.forward(model, 9)
    with apply_rule(model, rule, frames=9, trained=3):
        ruled = wan.forward(model, 9)
    assert torch.equal(ruled, wan.forward(built, 9))
    assert not torch.equal(ruled, plain)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_acts_on_longer_grids_alone_and_leaves_no_trace(rule):
    model = wan.transformer()
    stock, short, long = tables(model), wan.forward(model, 3), wan.forward(model, 9)
    handle = apply_rule(model, rule, frames=9, trained=3)
    changed = not torch.equal(wan.forward(model, 9), long)
    assert changed == (rule != "none")
    assert torch.equal(wan.forward(model, 3), short)
    wan.forward(model, 9)
    handle.remove()
    handle.remove()
    assert all_equal(tables(model), stock)
    assert torch.equal(wan.forward(model, 9), long)
    assert not model._forward_pre_hooks


def test_frequencies_are_for_the_length_given_or_the_longer_grid():
    model = wan.transformer()

    def ruled(frames, grid):
        with apply_rule(model, "position_interpolation", frames=frames, trained=3):
            return wan.forward(model, grid)

    assert torch.equal(ruled(4, 9), ruled(9, 9))
    assert not torch.equal(ruled(12, 9), ruled(9, 9))


def test_a_rule_serves_training():
    """The table changes in place between two forward passes whose gradients are both wanted."""
    model = wan.transformer()
    with apply_rule(model, "riflex", frames=9, trained=3):
        alone = wan.gradients(model, 9)
        model.zero_grad()
        loss = wan.forward(model, 9).square().mean()
        wan.forward(model, 3)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_rule_survives_sampling_in_inference_mode():
    model = wan.transformer()
    stock = tables(model)
    with apply_rule(model, "riflex", frames=9, trained=3), torch.inference_mode():
        sampled = wan.forward(model, 9)
    assert all_equal(tables(model), stock)
    with apply_rule(model, "riflex", frames=9, trained=3):
        out = wan.forward(model, 9)
        out.square().mean().backward()
    assert torch.equal(out, sampled)


def test_a_copy_of_a_ruled_model_is_ruled_by_itself():
    model = wan.transformer()
    plain = wan.forward(model, 9)
    with apply_rule(model, "riflex", frames=9, trained=3):
        ruled, twin = wan.forward(model, 9), copy.deepcopy(model)
    assert torch.equal(wan.forward(model, 9), plain)
    assert torch.equal(wan.forward(twin, 9), ruled)


@pytest.mark.slow
def test_a_rule_holds_in_a_whole_graph():
    model = wan.transformer()
    plain = wan.forward(model, 9)
    handle = apply_rule(model, "position_interpolation", frames=9, trained=3)
    with torch.no_grad():
        ruled = wan.forward(model, 9)
        handle.remove()
        handle = apply_rule(model, "position_interpolation", frames=9, trained=3)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        assert torch.equal(wan.forward(compiled, 9), ruled)
        assert torch.equal(wan.forward(compiled, 3), wan.forward(model, 3))
        assert torch.equal(wan.forward(compiled, 9), ruled)
        handle.remove()
        assert torch.equal(wan.forward(compiled, 9), plain)
        with pytest.raises(ValueError, match="compiled already"):
            extend(compiled, "riflex", num_frames=33, trained_frames=9)


def test_a_rule_is_refused_where_it_cannot_be_kept():
    model = wan.transformer()
    with pytest.raises(ValueError, match="rule must be one of none, riflex"):
        apply_rule(model, "yarn", frames=9, trained=3)
    with pytest.raises(ValueError, match="trained must be at least 1, got 0"):
        apply_rule(model, "none", frames=9, trained=0)
    with (
        apply_rule(model, "riflex", frames=9, trained=3),
        pytest.raises(ValueError, match="has a rule on its frequencies already"),
    ):
        apply_rule(model, "position_interpolation", frames=9, trained=3)
    with pytest.raises(ValueError, match="no family serves Linear"):
        apply_rule(torch.nn.Linear(2, 2), "riflex", frames=9, trained=3)


# extend


def test_lengths_in_pixel_frames():
    assert [latent_frames("n", n, 4) for n in (1, 5, 81)] == [1, 2, 21]
    assert [latent_frames("n", n, 4, 2) for n in (5, 13)] == [1, 2]
    with pytest.raises(
        ValueError, match="n must be 1 or a multiple of 4 more, got 80; nearest: 77 or 81"
    ):
        latent_frames("n", 80, 4)
    with pytest.raises(ValueError, match="nearest: 1"):
        latent_frames("n", 0, 4)


def test_the_trained_length_is_known_by_family_and_for_the_demo_model(demo_pipe):
    assert known_trained_frames(wan.transformer()) == 81
    assert family.longest(wan.transformer()) == 32
    assert known_trained_frames(wan.transformer(in_channels=48)) == 121  # Wan 2.2 TI2V-5B
    assert known_trained_frames(demo_pipe.transformer) == 33
    assert gen_accel.demo.TRAINED_FRAMES == 33
    with extend(demo_pipe, "riflex", num_frames=65) as longer:
        assert (longer.target.trained, longer.target.frames) == (9, 17)
        assert longer.describe() == (
            "riflex: 17 latent frames, trained at 9: period of pair 2 from 13.5 to 18.9"
        )
    with extend(wan.transformer(), "position_interpolation", num_frames=121) as longer:
        assert (longer.target.trained, longer.target.frames) == (21, 31)
        assert longer.describe().endswith("temporal frequencies times 0.677")


def test_a_models_own_folder_says_what_it_was_trained_at(tmp_path):
    wan.transformer().save_pretrained(tmp_path / "transformer")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    file = tmp_path / "gen_accel.json"
    for text, frames in (("{}", 81), ('{"trained_frames": 49}', 49)):
        file.write_text(text)
        assert known_trained_frames(model) == frames
    for given in ("0", "true", '"9"', "1.5"):
        file.write_text(f'{{"trained_frames": {given}}}')
        with pytest.raises(ValueError, match=r"gen_accel\.json must hold trained_frames"):
            known_trained_frames(model)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"gen_accel\.json must hold trained_frames"):
        known_trained_frames(model)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"gen_accel\.json is no JSON"):
        known_trained_frames(model)


@pytest.mark.parametrize("technique", ROTARY)
def test_no_longer_than_trained_is_said_to_be_off(technique):
    with extend(wan.transformer(), technique, num_frames=81) as longer:
        assert ": off" in longer.describe()


def test_a_name_holds_options():
    given = ["riflex:k=2", "ultravico:alpha=0.8:beta=0.5"]
    longer = extend(wan.transformer(), given, num_frames=33, trained_frames=9)
    assert longer.techniques == (Riflex(k=2), UltraViCo(alpha=0.8, beta=0.5))
    longer.remove()


def test_what_cannot_be_extended_is_refused():
    model, lengths = wan.transformer(), {"num_frames": 33, "trained_frames": 9}
    for technique, options, message in (
        ("yarn", {}, f"technique must be one of {', '.join(TECHNIQUES)}, got 'yarn'"),
        (Riflex, {}, "must be a name or an instance"),
        ((), {}, "must name at least one"),
        ("riflex", {"name": "x"}, "riflex has no option name; it takes k"),
        ("position_interpolation", {"k": 1}, "has no option k; it takes no options"),
        ("riflex:name=x", {}, "riflex has no field 'name'; its fields: k"),
        ("riflex:k=x", {}, "k of riflex must be int or none, got 'x'"),
        ("riflex:4", {}, "a setting is written field=value, got '4'"),
        ("riflex:k=1", {"k": 1}, "options of riflex are given twice: 'riflex:k=1' and k"),
        ("yarn:k=1", {}, "technique must be one of .*, got 'yarn'"),
        (Riflex(), {"k": 1}, "options k go with one technique given by its name"),
        (("riflex", "riflex"), {}, "riflex is given twice"),
        (ROTARY, {}, "riflex does not go with position_interpolation: both set"),
        (("continuation", "riflex"), {}, "continuation does not go with riflex"),
        ("riflex", {"k": 5}, "k must be from 1 to 4, got 5"),
        ("riflex", {"num_frames": 34}, "num_frames must be 1 or a multiple of 4 more, got 34"),
        ("riflex", {"trained_frames": 8}, "trained_frames must be 1 or a multiple of 4"),
        ("riflex", {"num_frames": 129}, "num_frames must be at most 125"),
        ("continuation", {}, "continuation calls the pipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            extend(model, technique, **(lengths | options))
        assert not model._forward_pre_hooks
    with pytest.raises(TypeError, match="neither a pipeline"):
        extend(3, "riflex", **lengths)


def test_a_transformer_alone_is_extended_but_not_called():
    model = wan.transformer()
    longer = extend(model, "riflex", num_frames=33, trained_frames=9, k=1)
    with pytest.raises(TypeError, match="extend the pipeline"):
        longer(prompt="a cat")
    longer.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        longer(prompt="a cat")


def test_a_technique_that_fails_takes_the_others_off():
    class Fails:
        name = "fails"
        excludes: ClassVar = {}

        def apply(self, target):
            assert target.transformers["transformer"]._forward_pre_hooks
            raise ValueError("not this model")

    model = wan.transformer()
    with pytest.raises(ValueError, match="not this model"):
        extend(model, (Riflex(), Fails()), num_frames=33, trained_frames=9)
    assert not model._forward_pre_hooks


def test_both_transformers_of_a_pipeline_are_extended():
    pipe = wan.two_stage()
    plain = wan.generate(pipe, num_frames=33)
    with extend(pipe, "position_interpolation", num_frames=33, trained_frames=9) as longer:
        stages = longer.target.transformers
        assert list(stages) == ["transformer", "transformer_2"]
        given = {"generator": torch.Generator().manual_seed(5)}
        ruled = wan.generate(longer, num_frames=33, **given)
        assert all(
            torch.equal(m.rope.freqs_cos, stages["transformer"].rope.freqs_cos)
            for m in stages.values()
        )
    assert not torch.equal(ruled, plain)
    assert torch.equal(wan.generate(pipe, num_frames=33), plain)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("technique", ROTARY)
def test_the_demo_model_is_extended_and_set_free(demo_pipe, technique):
    plain, trained = demo_latents(demo_pipe), demo_latents(demo_pipe, 33)
    with extend(demo_pipe, technique, num_frames=65) as longer:
        ruled = demo_latents(longer)
        assert torch.equal(demo_latents(longer, 33), trained)
        arguments = {"prompt": "a red circle moves right slowly", "output_type": "latent"}
        arguments |= {"height": 96, "width": 96, "num_inference_steps": 1}
        asked = longer(**arguments, max_sequence_length=16).frames
    assert asked.shape[2] == 17
    assert torch.isfinite(ruled).all()
    assert not torch.equal(ruled, plain)
    assert torch.equal(demo_latents(demo_pipe), plain)


@pytest.mark.slow
def test_a_sparse_method_sees_no_difference(demo_pipe):
    """Before and after attach alike, and the plans are those of the method alone."""
    method = gen_accel.Radial(block=32)
    with gen_accel.attach(demo_pipe, method) as handle:
        sparse = demo_latents(demo_pipe)
        density = handle.summary().density
    with (
        extend(demo_pipe, "riflex", num_frames=65) as longer,
        gen_accel.attach(demo_pipe, method),
    ):
        first = demo_latents(longer)
    with gen_accel.attach(demo_pipe, method) as handle:
        with extend(demo_pipe, "riflex", num_frames=65) as longer:
            second = demo_latents(longer)
            assert handle.summary().density == density < 1
        assert torch.equal(demo_latents(demo_pipe), sparse)
    assert torch.equal(first, second)
    assert not torch.equal(first, sparse)


# Continuation: mathematics


def test_noised_is_the_straight_line_of_flow_matching():
    g = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 2, 3, 4, 5, generator=g) for _ in range(2))
    assert torch.equal(noised(clean, noise, 0.0), clean)
    assert torch.equal(noised(clean, noise, 1.0), noise)
    assert torch.equal(noised(clean, noise, torch.tensor(0.25)), 0.75 * clean + 0.25 * noise)


def test_matching_takes_over_mean_and_deviation_of_each_channel():
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 5, 6, generator=g, dtype=torch.float64) * 3 + 1
    reference = torch.randn(2, 3, 2, 5, 6, generator=g, dtype=torch.float64) * 0.2 - 4
    full, over = matched(latents, reference), (2, 3, 4)
    torch.testing.assert_close(full.mean(over), reference.mean(over))
    torch.testing.assert_close(full.std(over, correction=0), reference.std(over, correction=0))
    # An affine map of each channel: what it does to differences is one factor.
    factor = (full[:, :, 1:] - full[:, :, :-1]) / (latents[:, :, 1:] - latents[:, :, :-1])
    torch.testing.assert_close(factor, factor[:, :, :1, :1, :1].expand_as(factor))
    torch.testing.assert_close(matched(full, reference), full)
    torch.testing.assert_close(matched(latents, reference, 0.25), 0.75 * latents + 0.25 * full)
    assert matched(latents, reference, 0) is latents


def test_matching_a_channel_without_contrast_gives_the_mean():
    reference = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    full = matched(torch.full((1, 2, 3, 4, 4), 7.0), reference)
    torch.testing.assert_close(full, reference.mean((2, 3, 4), keepdim=True).expand_as(full))


# Continuation: chunks of 5 latent frames, of which 2 are held and the first is left out

CHUNK, OVERLAP, LEAD = 5, 2, 1
CHUNKED = {"num_frames": 33, "trained_frames": 17, "overlap": OVERLAP}


def continued(pipe, options=None, **arguments):
    given = {"num_frames": 33, "generator": torch.Generator().manual_seed(5)}
    with extend(pipe, "continuation", **(CHUNKED | (options or {}))) as longer:
        return wan.generate(longer, **(given | arguments))


@pytest.mark.parametrize("scheduler", [wan.euler, wan.unipc])
@pytest.mark.parametrize("kind", ["text", "two stages", "token timesteps"])
def test_a_held_part_is_known_at_every_step_and_at_the_end_bit_for_bit(scheduler, kind):
    pipe = wan.PIPELINES[kind]()
    pipe.scheduler = scheduler()
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, wan.CHANNELS, CHUNK, 10, 14, generator=g)
    known = torch.randn(1, wan.CHANNELS, OVERLAP, 10, 14, generator=g)
    part, seen = slice(LEAD, LEAD + OVERLAP), []

    def see(model, args, kwargs):
        seen.append(kwargs["hidden_states"][:, :, part].clone())

    models = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    hooks = [model.register_forward_pre_hook(see, with_kwargs=True) for model in models]
    options = {"num_frames": 17, "guidance_scale": 1.0, "latents": noise}
    out = wan.generate(
        pipe, 4, callback_on_step_end=LatentConstraint(known, noise, LEAD), **options
    )
    for hook in hooks:
        hook.remove()
    assert torch.equal(out[:, :, part], known)
    assert torch.equal(seen[0], noise[:, :, part])
    assert len(seen) == 4
    for held, sigma in zip(seen[1:], pipe.scheduler.sigmas[1:-1], strict=True):
        assert 0 < sigma < 1
        assert torch.equal(held, (1 - sigma) * known + sigma * noise[:, :, part])
    free = wan.generate(pipe, 4, **options)
    assert not torch.equal(out[:, :, part.stop :], free[:, :, part.stop :])


def test_chunks_join_as_by_hand():
    pipe = wan.pipeline()
    whole = continued(pipe)
    g = torch.Generator().manual_seed(5)
    first = wan.generate(pipe, num_frames=17, generator=g)
    video = first
    while video.shape[2] < 9:
        noise = torch.randn(first.shape, generator=g)
        known = video[:, :, -OVERLAP:]
        made = wan.generate(
            pipe,
            num_frames=17,
            latents=noise,
            callback_on_step_end=LatentConstraint(known, noise, LEAD),
        )
        assert torch.equal(made[:, :, LEAD : LEAD + OVERLAP], known)
        fresh = made[:, :, LEAD + OVERLAP :]
        video = torch.cat((video, matched(fresh, video[:, :, -2:])), dim=2)
    assert torch.equal(whole, video)
    assert torch.equal(continued(pipe, num_frames=25), whole[:, :, :7])
    assert torch.equal(continued(pipe, num_frames=29), whole[:, :, :8])  # the last is cut
    unmatched = continued(pipe, {"color_match": 0.0})
    assert torch.equal(unmatched[:, :, :CHUNK], whole[:, :, :CHUNK])
    assert not torch.equal(unmatched, whole)


def test_what_fits_one_chunk_is_the_plain_call():
    pipe = wan.pipeline()
    assert torch.equal(continued(pipe, num_frames=9), wan.generate(pipe))
    assert torch.equal(continued(pipe, num_frames=17), wan.generate(pipe, num_frames=17))


@pytest.mark.slow
def test_all_is_decoded_once_and_as_the_pipeline_decodes(monkeypatch):
    pipe, decode, calls = wan.pipeline(), wan.autoencoder().decode, []
    one = wan.generate(pipe, num_frames=17, output_type="np")

    def counted(z, **options):
        calls.append(z.shape[2])
        return decode(z, **options)

    monkeypatch.setattr(pipe.vae, "decode", counted)
    latents = continued(pipe)
    assert calls == []
    pixels = continued(pipe, output_type="np")
    assert calls == [9]
    assert pixels.shape == (1, 33, wan.HEIGHT, wan.WIDTH, 3)
    # The autoencoder is causal: the beginning is decoded as the first chunk alone.
    torch.testing.assert_close(torch.tensor(pixels[:, :17]), torch.tensor(one), rtol=0, atol=1e-6)
    assert latents.shape[2] == 9
    assert len(continued(pipe, output_type="pil")[0]) == 33


def test_several_prompts_and_generators_and_a_tuple():
    pipe = wan.pipeline()
    given = {"prompt": ["a red square", "a blue circle"], "guidance_scale": 1.0}

    def generators():
        return [torch.Generator().manual_seed(i) for i in (7, 8)]

    both = continued(pipe, **given, generator=generators())
    alone = continued(pipe, **(given | {"prompt": "a blue circle"}), generator=generators()[1:])
    assert both.shape == (2, wan.CHANNELS, 9, 10, 14)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    with extend(pipe, "continuation", **CHUNKED) as longer:
        found = longer(
            prompt="a red square",
            height=wan.HEIGHT,
            width=wan.WIDTH,
            num_inference_steps=1,
            max_sequence_length=16,
            output_type="latent",
            return_dict=False,
        )
    assert isinstance(found, tuple)
    assert found[0].shape[2] == 9


def test_a_callback_runs_in_each_chunk_and_changes_all_but_what_is_held():
    pipe, steps = wan.pipeline(), []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, sorted(tensors)))
        return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    changed = continued(pipe, {"color_match": 0.0}, callback_on_step_end=callback, **inputs)
    assert steps == [(i, ["latents", "prompt_embeds"]) for i in (0, 1)] * 3
    plain = continued(pipe, {"color_match": 0.0})
    assert torch.equal(changed[:, :, :CHUNK], plain[:, :, :CHUNK] * 0.5)


def test_an_interrupted_pipeline_begins_no_further_chunk():
    pipe = wan.pipeline()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    assert continued(pipe, callback_on_step_end=stop).shape[2] == CHUNK


def test_continuation_runs_with_a_sparse_method():
    pipe = wan.pipeline()
    dense = continued(pipe)
    with gen_accel.attach(pipe, gen_accel.Radial(block=16)) as handle:
        sparse = continued(pipe)
        assert handle.summary().density < 1
        of_all_chunks = {record.calls for record in handle.records.values()}
        wan.generate(pipe)
        of_one = {record.calls for record in handle.records.values()}
    assert (of_all_chunks, of_one) == ({3 * 2}, {2})
    assert sparse.shape == dense.shape
    assert not torch.equal(sparse, dense)
    assert torch.equal(continued(pipe), dense)


@pytest.mark.slow
def test_continuation_of_the_demo_model(demo_pipe):
    first = demo_latents(demo_pipe, 33)
    with extend(demo_pipe, "continuation", num_frames=65) as longer:
        latents = demo_latents(longer)
        assert longer.describe() == (
            "continuation: 17 latent frames, trained at 9: 3 chunks of 9, of which 4 are held"
        )
    assert latents.shape[2] == 17
    assert torch.equal(latents[:, :, :9], first)
    over = (2, 3, 4)
    new, before = latents[:, :, 9:13], latents[:, :, 5:9]
    torch.testing.assert_close(new.mean(over), before.mean(over), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.std(over), before.std(over), rtol=1e-4, atol=1e-4)
    assert torch.equal(demo_latents(demo_pipe, 33), first)


def test_continuation_refuses_what_it_cannot_keep():
    pipe = wan.pipeline()
    for options, message in (
        ({"overlap": 4}, "overlap must be at most 3, so that a chunk of 5 latent frames"),
        ({"overlap": 0}, "overlap must be at least 1, got 0"),
        ({"chunk": 18}, "chunk must be 1 or a multiple of 4 more, got 18"),
        ({"color_match": 1.5}, "color_match must be from 0 to 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            extend(pipe, "continuation", **(CHUNKED | options))
    image = wan.PIPELINES["image"]()
    assert isinstance(image, WanImageToVideoPipeline)
    with pytest.raises(ValueError, match="would begin each chunk from its image"):
        extend(image, "continuation", **CHUNKED)
    forcing = wan.pipeline(SkyReelsV2DiffusionForcingPipeline, transformer=skyreels.transformer())
    with pytest.raises(ValueError, match="goes on part by part itself: give it num_frames"):
        extend(forcing, "continuation", **CHUNKED)
    with pytest.raises(ValueError, match="latents must be noise for the first chunk, of 5"):
        continued(pipe, latents=torch.zeros(1, wan.CHANNELS, 9, 10, 14))
    with pytest.raises(ValueError, match="num_frames must be 1 or a multiple of 4 more, got 34"):
        continued(pipe, num_frames=34)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="needs a flow matching scheduler, got DDIMScheduler"):
        continued(pipe)


def test_the_chunk_is_an_option():
    pipe = wan.pipeline()
    options = {"trained_frames": 9, "chunk": 17}
    assert torch.equal(continued(pipe, options), continued(pipe))


# HunyuanVideo


@pytest.mark.parametrize("rule", ROTARY)
def test_a_rule_on_hunyuan_video(rule):
    model = hunyuan.transformer()
    short, long = hunyuan.forward(model, 3), hunyuan.forward(model, 9)
    with extend(model, rule, num_frames=33, trained_frames=9):
        ruled = hunyuan.forward(model, 9)
        assert torch.equal(hunyuan.forward(model, 3), short)
        assert torch.equal(hunyuan.forward(model, 9), ruled)
    assert torch.isfinite(ruled).all()
    assert not torch.equal(ruled, long)
    assert torch.equal(hunyuan.forward(model, 9), long)
    assert known_trained_frames(model) == 129


@pytest.mark.slow
def test_continuation_of_hunyuan_video():
    pipe = hunyuan.pipeline()
    first = hunyuan.generate(pipe, num_frames=17)
    with extend(pipe, "continuation", **CHUNKED) as longer:
        given = {"num_frames": 33, "generator": torch.Generator().manual_seed(5)}
        latents = hunyuan.generate(longer, **given)
        pixels = hunyuan.generate(longer, **given, output_type="pt")
    assert latents.shape[2] == 9
    assert torch.equal(latents[:, :, :CHUNK], first)
    assert pixels.shape[:3] == (1, 33, 3)


@pytest.mark.slow
def test_continuation_gives_what_the_pipeline_gives_unasked():
    pipe = hunyuan.pipeline()  # pictures, where Wan gives arrays
    with extend(pipe, "continuation", **CHUNKED) as longer:
        frames = longer(
            prompt="a red square moves right",
            height=hunyuan.HEIGHT,
            width=hunyuan.WIDTH,
            num_frames=33,
            num_inference_steps=1,
            max_sequence_length=16,
        ).frames
    assert len(frames[0]) == 33
    assert frames[0][0].size == (hunyuan.WIDTH, hunyuan.HEIGHT)
