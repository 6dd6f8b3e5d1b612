"""Weights of the loss, the pseudo-Huber loss, and the noise levels of few steps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from support import finetuning as ft
from support.objectives import batch, built, say_something

from gen_accel.attention_processors.families import family_named
from gen_accel.lora import trainer
from gen_accel.lora.batches import SIGMAS, draw, levels_of
from gen_accel.lora.objective import Loss, Noising

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {"method": "radial", "settings": ()}


def errors(count=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn((count, 4, 5), generator=g), torch.randn((count, 4, 5), generator=g)


class TestLoss:
    def test_plain(self):
        a, b = errors()
        assert torch.equal(Loss()(a, b), F.mse_loss(a, b))

    def test_huber_between_square_and_size(self):
        a, b = errors()
        torch.testing.assert_close(Loss(huber=1e3)(a, b), F.mse_loss(a, b), rtol=1e-4, atol=0)
        narrow = Loss(huber=1e-4)(a, b) / 2e-4
        torch.testing.assert_close(narrow, (a - b).abs().mean(), rtol=1e-3, atol=0)

    def test_weights_and_counts(self):
        a, b = errors()
        weights, counts = torch.tensor([1.0, 2.0, 0.5]), torch.zeros_like(a)
        counts[:, 1] = 1
        wanted = ((a - b)[:, 1].square().mean(1) * weights).mean()
        torch.testing.assert_close(Loss()(a, b, weights, counts), wanted)
        torch.testing.assert_close(
            Loss()(a, b, weights), ((a - b).square().mean((1, 2)) * weights).mean()
        )

    def test_cosmap(self):
        sigma = torch.tensor([0.1, 0.5, 1.0])
        found = Loss(weighting="cosmap").weights(sigma, Noising(family_named("wan")))
        wanted = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (0.1, 0.5, 1.0)]
        torch.testing.assert_close(found, torch.tensor(wanted))

    def test_min_snr(self):
        snr = torch.tensor([0.0, 1.0, 5.0, 20.0, math.inf])
        like = SimpleNamespace(snr=lambda sigma: snr)
        found = Loss(weighting="min_snr").weights(torch.zeros(5), like)
        wanted = torch.tensor([0.0, 1 / 2, 5 / 6, 5 / 21, 0.0])
        torch.testing.assert_close(found, wanted)

    def test_of_another_prediction(self):
        with pytest.raises(ValueError, match="min_snr is for models that predict 'v', and Wan"):
            Loss(weighting="min_snr").check(family_named("wan"))

    def test_in_the_objective(self):
        objective, _ = built("flow", **PLAIN)
        say_something(objective)
        clean, noise, sigma, conditions = batch()
        with torch.no_grad():
            objective._error = Loss(huber=0.5, weighting="cosmap")
            found = objective(clean, noise, sigma, conditions)
            mix = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - mix) * clean + mix * noise
            said = family_named("wan").predict(objective.transformer, noisy, sigma, conditions)
        e = (said - (noise - clean)).square().flatten(1)
        each = (2 * 0.5 * ((e + 0.25).sqrt() - 0.5)).mean(1)
        weights = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        torch.testing.assert_close(found, (each * weights).mean())

    @pytest.mark.slow
    def test_a_training_minimises_it(self, tmp_path):
        fields = PLAIN | {"stages": ("9:2",)}
        plain = ft.train(ft.config(tmp_path / "a", **fields)).losses
        huber = ft.train(ft.config(tmp_path / "b", **fields, huber=0.1)).losses
        assert all(0 < h < p for h, p in zip(huber, plain, strict=True))


class TestNoiseLevels:
    def levels(self, **fields):
        given = ft.config("unused", **fields)
        return [draw(given, step, 0, (1, 1, 2, 2), shift=3.0).sigma for step in range(200)]

    def test_only_these(self):
        assert set(self.levels(noise_levels=(1.0, 0.757, 0.522))) == {1.0, 0.757, 0.522}

    @pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
    def test_those_that_are_sampled(self, shift):
        """As FlowMatchEulerDiscreteScheduler has them of the steps that pipelines give it."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 9)[:-1])
        found = levels_of(ft.config("unused", sampled_steps=8), shift)
        torch.testing.assert_close(torch.tensor(found), scheduler.sigmas[:-1])

    def test_each_is_drawn_alike(self):
        found = self.levels(sampled_steps=4)
        counts = [found.count(level) for level in sorted(set(found))]
        assert len(counts) == 4
        assert min(counts) > 30

    def test_an_expert_has_its_own(self):
        given = ft.config("unused", noise_levels=(1.0, 0.9, 0.3))
        assert levels_of(given, 1.0, (0.875, SIGMAS[1])) == (1.0, 0.9)
        assert levels_of(given, 1.0, (SIGMAS[0], 0.875)) == (0.3,)
        with pytest.raises(ValueError, match=r"no noise level of 1, 0.9, 0.3 is of part"):
            levels_of(given, 1.0, (0.95, 0.99))

    def test_nothing_else_changes(self):
        """Other draws are as without."""
        plain, few = (ft.config("unused", **f) for f in ({}, {"sampled_steps": 4}))
        a, b = (draw(given, 3, 1, (1, 1, 2, 2), shift=3.0) for given in (plain, few))
        assert a.sigma not in levels_of(few, 3.0)
        assert b.sigma in levels_of(few, 3.0)

    def test_a_training(self, tmp_path):
        done = ft.train(ft.config(tmp_path, **PLAIN, sampled_steps=2, stages=("9:2",)))
        assert len(done.losses) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"huber": 0.0}, "huber must be above 0, got 0"),
        ({"noise_levels": (1.2,)}, "noise_levels must be above 0 and at most 1"),
        ({"sampled_steps": 0}, "sampled_steps must be from 1 to 1000, got 0"),
        ({"noise_levels": (1.0,), "sampled_steps": 4}, "give one of them"),
        ({"noise_levels": (1.0,), "shift": 3.0}, "shift 3 says how noise levels are drawn"),
        ({"sampled_steps": 4, "logit_mean": 1.0}, "logit_mean 1 says how noise levels are drawn"),
        ({"min_snr": 3.0}, "min_snr 3 is for weighting min_snr, got none"),
    ],
)
def test_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ft.config(tmp_path, **fields)


def test_a_weighting_of_another_family_is_refused_before_a_step(tmp_path):
    given = ft.config(tmp_path, **PLAIN, weighting="min_snr")
    with pytest.raises(ValueError, match="take cosmap or none"):
        trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
