"""Samplers on exact noise levels: closed forms, steps, refusals, and through `generate`."""

import itertools
import math
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from support import wan
from support.tiny import trainings

from gen_accel import registry
from gen_accel.attention_processors.attached.clock import noise_levels
from gen_accel.demo.job import lora_path
from gen_accel.pipelines.generation.config import Clip, GenerateConfig
from gen_accel.pipelines.generation.plan import plan_of
from gen_accel.pipelines.generation.sampling import denoise, filled
from gen_accel.pipelines.sampler import Sampler, equal_steps, wasted_step

GIVEN = (1.0, 0.9375, 0.8333, 0.625)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
OWN = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    "stretched": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1),
    "karras": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
    "dynamic": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


def set_to(sampler, own, steps, **given):
    made = sampler.scheduler(own)
    made.set_timesteps(steps, device="cpu", **given)
    return made


def same(found, due):
    due = torch.tensor([*due, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.double(), due, rtol=0, atol=1.1e-6)


@pytest.mark.parametrize("name", [None, *registry.SAMPLERS])
@pytest.mark.parametrize("own", OWN)
def test_levels_are_the_closed_form(own, name):
    for steps in range(2, 9):
        due = [5 * t / (1 + 4 * t) for t in (1 - i / steps for i in range(steps))]
        made = set_to(Sampler(name, shift=5.0), OWN[own](), steps)
        same(made.sigmas, due)
        assert torch.equal(made.timesteps, made.sigmas[:-1] * 1000)
    same(set_to(Sampler(name, levels=GIVEN), OWN[own](), 4).sigmas, GIVEN)
    if own in ("euler", "unipc"):  # the scheduler's own shift
        same(set_to(Sampler(name), OWN[own](), 4).sigmas, (1, 0.9, 0.75, 0.5))
        # Pipelines that give equal steps themselves, and a shift of their size.
        sigmas = torch.linspace(1, 0.25, 4).tolist()
        made = set_to(Sampler(name), OWN[own](), 4, mu=2.0, sigmas=sigmas)
        same(made.sigmas, (1, 0.9, 0.75, 0.5))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde"])
def test_a_shift_by_the_size_is_kept(name):
    own = OWN["dynamic"]()
    own.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.5)
    made = set_to(Sampler(name), OWN["dynamic"](), 4, mu=1.5)
    torch.testing.assert_close(made.sigmas, own.sigmas)


@pytest.mark.slow
def test_every_family_that_trains_has_exact_levels():
    seen = set()
    for family, training in trainings():
        own = training.pipeline().scheduler
        if family == "cogvideox" or own.config.get("invert_sigmas"):
            with pytest.raises(ValueError, match="sampler"):
                Sampler("euler").scheduler(own)
            continue
        seen.add(family)
        for steps in range(2, 9):
            same(set_to(Sampler(shift=7.0), own, steps).sigmas, equal_steps(steps, 7.0))
    assert {"wan", "hunyuan_video", "ltx"} <= seen


def test_h3_runs_as_many_steps_as_asked_for():
    own = pytest.importorskip("diffusers").MiniMaxH3Scheduler(shift=12.0)
    own.set_timesteps(9)
    made = set_to(Sampler(), own, 8)
    assert torch.equal(made.timesteps, own.timesteps)
    assert torch.equal(made.sigmas, own.sigmas)
    same(set_to(Sampler(shift=6.0), own, 4).sigmas, equal_steps(4, 6.0))
    same(set_to(Sampler(levels=GIVEN), own, 4).sigmas, GIVEN)
    with pytest.raises(ValueError, match="steps by euler alone, got sampler lcm"):
        Sampler("lcm").scheduler(own)

    class Pipe:
        scheduler, audio_scheduler = own, type(own)(shift=3.0)

    pipe = Pipe()
    with Sampler(shift=6.0).at_work(pipe):
        pipe.audio_scheduler.set_timesteps(4)
        same(pipe.audio_scheduler.sigmas, equal_steps(4, 3.0))
    assert (pipe.scheduler, pipe.audio_scheduler) == (own, Pipe.audio_scheduler)


def test_entries_that_pipelines_read_are_kept():
    own = FlowMatchEulerDiscreteScheduler(base_image_seq_len=77, max_shift=2.05)
    for name in registry.SAMPLERS:
        config = Sampler(name, levels=GIVEN).scheduler(own).config
        assert (config["base_image_seq_len"], config["max_shift"]) == (77, 2.05)


def denoised(pipe, **fields):
    sizes = {"frames": 9, "height": 48, "width": 64, "guidance_scale": 1.0, "max_tokens": 8}
    return denoise(pipe, "a cat", filled(pipe, Clip(**sizes, **fields))).latents


@pytest.mark.parametrize("name", ["euler", "lcm", "dpmpp_2m_sde"])
def test_a_step_is_its_formula(name):
    pipe, seen = wan.pipeline(), []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["timestep"], out[0])),
        with_kwargs=True,
    )
    found = denoised(pipe, sampler=name, levels=GIVEN)
    hook.remove()
    assert [t.item() / 1000 for t, _ in seen] == pytest.approx(GIVEN)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(found.shape, generator=drawn)
    before = torch.zeros(())
    for i, (now, then) in enumerate(itertools.pairwise((*GIVEN, 0.0))):
        velocity = seen[i][1]
        if name == "euler":
            x = x + (then - now) * velocity
        elif name == "dpmpp_2m_sde":
            # Lu et al., 2022, algorithm 2 with the noise of appendix B; snr = (1 - s) / s.
            clean, kept = x - now * velocity, (then / (1 - then)) * (1 - now) / now
            slope = torch.zeros(())
            if 0 < i < len(GIVEN) - 1 and GIVEN[i - 1] < 1:
                past = math.log((1 - now) / now * GIVEN[i - 1] / (1 - GIVEN[i - 1]))
                slope = (clean - before) * -math.log(kept) / past
            x = (then / now) * kept * x + (1 - then) * (1 - kept**2) * (clean + slope / 2)
            x = x + then * (1 - kept**2) ** 0.5 * torch.randn(found.shape, generator=drawn)
            before = clean
        else:
            x = (1 - then) * (x - now * velocity)
            x = x + then * torch.randn(found.shape, generator=drawn)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_unipc_is_the_pipelines_own_with_its_levels_exact():
    pipe = wan.pipeline()
    pipe.scheduler = own = OWN["unipc"]()
    plain, exact = denoised(pipe, steps=4), denoised(pipe, steps=4, sampler="unipc")
    assert 0 < (plain - exact).abs().max() < 0.05 * plain.abs().max()
    assert pipe.scheduler is own
    assert torch.equal(denoised(pipe, steps=4, shift=3.0), exact)  # its own solver, where unsaid


def test_it_is_gone_after_an_error():
    pipe = wan.pipeline()
    before = pipe.scheduler
    with pytest.raises(KeyError), Sampler("euler", shift=2.0).at_work(pipe):
        raise KeyError
    assert pipe.scheduler is before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"levels": (1.0, 0.5, 0.5)}, "levels must fall .* got 1, 0.5, 0.5"),
        ({"levels": (1.2, 0.5)}, "above 0 and at most 1, .* got 1.2, 0.5"),
        ({"levels": (1.0, 0.0)}, "above 0 and at most 1"),
        ({"levels": GIVEN, "steps": 5}, "4 here, and steps are 5"),
        ({"levels": GIVEN, "shift": 3.0}, "leave shift 3 out"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"sampler": "heun"}, "sampler must be .*euler"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Clip(**fields)


def test_fresh_noise_samples_by_itself():
    asked = {"model": "demo", "prompt": ("red",), "sampler": "lcm"}
    with pytest.raises(ValueError, match="fresh_noise samples by itself: leave sampler, levels"):
        GenerateConfig(**asked, extend=("fresh_noise",)).check()
    with pytest.raises(ValueError, match="fresh_noise samples by itself"):
        plan_of(GenerateConfig(**asked, from_lora=lora_path()))
    plan_of(GenerateConfig(**asked, from_lora=lora_path(), extend=()))


def test_another_prediction_is_refused():
    pipe = wan.pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"sampler euler needs flow matching: .* a DDIMScheduler"):
        filled(pipe, Clip(sampler="euler"))


def test_a_wasted_step_is_told():
    pipe = wan.pipeline()
    pipe.scheduler = OWN["euler"]()
    with pytest.warns(UserWarning, match="last of 4 steps does next to nothing: .*0.0089.*0.5 is"):
        denoised(pipe, steps=4)
    for fields in ({"steps": 13}, {"steps": 4, "sampler": "euler"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            denoised(pipe, **fields)
    pipe.scheduler = OWN["unipc"]()
    pipe.scheduler.set_timesteps(4)
    assert wasted_step(pipe.scheduler) == ""


def test_dense_steps_by_noise_see_the_levels():
    made = set_to(Sampler("euler", levels=GIVEN), OWN["euler"](), 4)
    assert noise_levels(made, 4) == pytest.approx((*GIVEN, 0.0))
