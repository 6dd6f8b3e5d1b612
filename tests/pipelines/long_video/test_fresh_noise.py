"""Fresh noise at each step: what a step gives, which noise levels, and when."""

from copy import deepcopy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from support import hunyuan, wan

import gen_accel
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.sampler import equal_steps

LONG, TRAINED = {"num_frames": 33, "trained_frames": 17}, {"num_frames": 17}


def flowing(**config):
    pipe = wan.pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | config))
    return pipe


def latents(run, seed=0, **options):
    arguments = {
        "prompt": "a cat",
        "height": 80,
        "width": 112,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "max_sequence_length": 8,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return run(**(arguments | options)).frames


def test_a_step_keeps_what_is_predicted_and_no_noise():
    pipe, seen = flowing(), []

    def keep(module, args, kwargs, out):
        seen.append((kwargs["hidden_states"], kwargs["timestep"], out[0]))

    hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    with extend(pipe, "fresh_noise", **LONG) as longer:
        found = latents(longer)
    hook.remove()
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(found.shape, generator=drawn)
    sigmas = [t.item() / 1000 for _, t, _ in seen] + [0.0]
    assert len(seen) == 3
    for (given, _, velocity), now, then in zip(seen, sigmas[:-1], sigmas[1:], strict=True):
        torch.testing.assert_close(given, x, rtol=1e-4, atol=1e-4)
        clean = x - now * velocity
        x = (1 - then) * clean + then * torch.randn(found.shape, generator=drawn)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "options", "shift"),
    [
        ({}, {}, 3.0 * 9 / 5),
        ({}, {"shift": 2.0}, 2.0),
        ({"use_dynamic_shifting": True}, {}, None),
        ({"use_dynamic_shifting": True}, {"shift": 2.0}, 2.0),
    ],
    ids=str,
)
def test_noise_levels_are_shifted_by_the_length(config, options, shift):
    with extend(flowing(**config), "fresh_noise", **LONG, **options) as longer:
        sampler = longer.techniques[0].sampler(longer.target, longer.target.frames)
        made = sampler.scheduler(longer.target.pipe.scheduler)
        assert made.config.stochastic_sampling
        assert made.config.use_dynamic_shifting == (shift is None)
        if shift is not None:
            assert made.shift == pytest.approx(shift)
            assert longer.describe().endswith(f"noise levels with shift {shift:g}")


def test_of_another_flow_matching_scheduler_the_shift_is_kept():
    pipe = wan.pipeline()
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    with extend(pipe, "fresh_noise", **LONG) as longer:
        assert longer.describe().endswith("shift 9")
        assert torch.isfinite(latents(longer)).all()
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)


@pytest.mark.parametrize("steps", [3, 13])
def test_a_few_steps_are_at_exact_levels(steps):
    pipe, seen = flowing(), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"].flatten()[0].item() / 1000),
        with_kwargs=True,
    )
    with extend(pipe, "fresh_noise", shift=2.0, **LONG) as longer:
        latents(longer, num_inference_steps=steps)
    hook.remove()
    own = FlowMatchEulerDiscreteScheduler(shift=2.0)
    own.set_timesteps(steps)
    due = equal_steps(steps, 2.0) if steps == 3 else own.sigmas[:-1].tolist()
    assert seen == pytest.approx(due, abs=1e-6)


def test_it_goes_by_the_seed():
    with extend(flowing(), "fresh_noise", **LONG) as longer:
        first, again, other = latents(longer), latents(longer), latents(longer, seed=1)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        several = [torch.Generator().manual_seed(seed) for seed in (1, 0)]
        both = latents(longer, prompt=["a cat"] * 2, generator=several)
    torch.testing.assert_close(both, torch.cat([other, first]), rtol=1e-4, atol=1e-4)


def test_the_trained_length_and_the_pipeline_afterwards_are_as_ever():
    pipe = flowing()
    scheduler, plain = pipe.scheduler, latents(pipe, **TRAINED)
    long = latents(pipe, num_frames=33)
    with extend(pipe, "fresh_noise", **LONG) as longer:
        assert torch.equal(latents(longer, **TRAINED), plain)
        assert not torch.equal(latents(longer), long)
        assert pipe.scheduler is scheduler
        with pytest.raises(ValueError, match="prompt"):
            latents(longer, prompt=None)
        assert pipe.scheduler is scheduler
    assert torch.equal(latents(pipe, num_frames=33), long)


@pytest.mark.parametrize("other", ["riflex", "ultravico", "rotating_anchors", "window_noise"])
def test_it_goes_with_other_techniques(other):
    pipe = flowing()
    with extend(pipe, "fresh_noise", **LONG) as longer:
        alone = latents(longer)
    with extend(pipe, other, **LONG) as longer:
        without = latents(longer)
    with extend(pipe, (other, "fresh_noise"), **LONG) as longer:
        both = latents(longer)
    assert not torch.equal(both, alone)
    assert not torch.equal(both, without)


def test_it_goes_with_a_sparse_method_and_its_steps():
    pipe = flowing()
    schedule = Schedule(dense_steps=1)
    with (
        gen_accel.attach(pipe, gen_accel.Radial(block=16), schedule=schedule) as handle,
        extend(pipe, "fresh_noise", **LONG) as longer,
    ):
        assert torch.isfinite(latents(longer)).all()
        assert handle.summary().density < 1


def test_hunyuan_video():
    pipe = hunyuan.pipeline()
    given = {"num_frames": 33, "generator": torch.Generator().manual_seed(5)}
    plain = hunyuan.generate(pipe, **given)
    with extend(pipe, "fresh_noise", **LONG) as longer:
        given["generator"].manual_seed(5)
        found = hunyuan.generate(longer, **given)
    assert found.shape == plain.shape
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)


def test_what_is_refused():
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        extend(flowing(), "fresh_noise", shift=0, **LONG)
    with pytest.raises(ValueError, match="extend that, not a transformer"):
        extend(wan.transformer(), "fresh_noise", **LONG)
    with pytest.raises(ValueError, match="fresh_noise does not go with continuation"):
        extend(flowing(), ("fresh_noise", "continuation"), **LONG)
    with pytest.raises(ValueError, match="num_frames must be at most 125"):
        extend(flowing(), "fresh_noise", num_frames=129, trained_frames=17)
    with pytest.raises(ValueError, match=r"the share of the video \(invert_sigmas\)"):
        extend(flowing(invert_sigmas=True), "fresh_noise", **LONG)
    pipe = wan.pipeline()
    for scheduler in (DDIMScheduler(), UniPCMultistepScheduler()):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=f"flow matching: .* a {type(scheduler).__name__}"):
            extend(pipe, "fresh_noise", **LONG)
    with pytest.raises(ValueError, match="needs num_frames, which WanVideoToVideoPipeline"):
        extend(wan.PIPELINES["video"](), "fresh_noise", **LONG)


def test_a_copy_of_the_scheduler_steps_by_itself():
    pipe = flowing()
    with extend(pipe, "fresh_noise", **LONG) as longer:
        technique, target = longer.techniques[0], longer.target
        with technique.sampler(target, 9).at_work(pipe, torch.Generator().manual_seed(0)):
            first, second = pipe.scheduler, deepcopy(pipe.scheduler)
            x = torch.zeros(1, 1, 2, 2)
            for scheduler in (first, second):
                scheduler.set_timesteps(3)
            for t in first.timesteps:
                for scheduler in (first, second):
                    scheduler.step(x, t, x)
                assert first.step_index == second.step_index
            with pytest.raises(ValueError, match="all frames are as noisy"):
                first.step(x, t, x, per_token_timesteps=t)


class Twice:
    """Another technique that runs the pipeline."""

    name, excludes = "twice", {}

    def apply(self, target):
        return lambda: None

    def generate(self, target, arguments):
        return target.pipe(**arguments)


def test_two_that_run_the_pipeline_are_refused():
    with pytest.raises(ValueError, match="twice and fresh_noise do not go together"):
        extend(flowing(), (Twice(), "fresh_noise"), **LONG)
