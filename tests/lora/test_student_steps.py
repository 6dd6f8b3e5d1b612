"""Steps of a student in few: their levels, starts, targets and weights."""

import math
import shutil
from itertools import groupby, pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.objectives import batch, built, say_something

from gen_accel import Piecewise
from gen_accel.attention_processors.attached.recipe import WEIGHTS, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import family_named
from gen_accel.lora import TrainConfig, trainer
from gen_accel.lora.adapters import active
from gen_accel.lora.artefact import TEACHER
from gen_accel.lora.batches import Batch
from gen_accel.lora.student_steps import StudentSteps, check_student_steps, walk
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.plan import plan_of
from gen_accel.pipelines.sampler import Sampler, equal_steps, shifted, unshifted

family = family_named("wan")
pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(count=4, substeps=3, shift=3.0, starts="own", sampler="euler"):
    return StudentSteps((*equal_steps(count, shift), 0.0), substeps, shift, starts, sampler)


def fields(**more):
    plain = {"objective": "distill", "method": "dense", "settings": (), "student_steps": 2}
    return plain | {"stages": ("9:4",), "caption_dropout": 0.0} | more


class TestLevels:
    def test_the_trained_levels_are_those_that_are_sampled(self):
        given = TrainConfig(**fields(student_steps=4))
        steps = StudentSteps.of(given, 5.0)
        assert steps.levels == pytest.approx((1, 0.9375, 5 / 6, 0.625, 0), abs=1e-12)
        scheduler = Sampler("euler", shift=5.0).scheduler(wan.euler())
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.tolist() == pytest.approx(steps.levels, abs=1e-6)
        assert StudentSteps.of(TrainConfig(objective="distill"), 5.0) is None

    def test_the_teacher_steps_on_levels_of_its_own_number(self):
        steps = steps_of(4, substeps=3, shift=7.0)
        within = [steps.within(k) for k in range(4)]
        assert [one[-1] for one in within[:-1]] == [one[0] for one in within[1:]]
        found = [level for one in within for level in one[:-1]]
        assert found == pytest.approx(equal_steps(12, 7.0), abs=1e-12)
        for level in (1.0, 0.3, 0.0):
            assert unshifted(shifted(level, 7.0), 7.0) == pytest.approx(level)

    def test_given_levels(self):
        given = TrainConfig(**fields(student_steps=3, noise_levels=(1.0, 0.757, 0.522)))
        steps = StudentSteps.of(given, 3.0)
        assert steps.levels == (1.0, 0.757, 0.522, 0.0)
        assert steps.substeps == 3

    @pytest.mark.parametrize("sampler", ["euler", "lcm"])
    def test_weights_make_it_the_error_after_the_step(self, sampler):
        steps = steps_of(4, shift=5.0, sampler=sampler)
        lengths = [a * (1 - b) if sampler == "lcm" else a - b for a, b in pairwise(steps.levels)]
        weights = [steps.weight(k) for k in range(4)]
        assert sum(weights) / 4 == pytest.approx(1)
        for weight, length in zip(weights, lengths, strict=True):
            assert weight / weights[-1] == pytest.approx((length / lengths[-1]) ** 2)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"objective": "flow"}, "student_steps 2 is for objective distill"),
            ({"teacher_steps": 7}, "teacher_steps 7 must be a multiple of student_steps 2, as 6"),
            (
                {"noise_levels": (1.0,)},
                "are the noise at which each of student_steps 2 begins: give",
            ),
            (
                {"sampled_steps": 2},
                "sampled_steps 2 says .* which student_steps does: leave it out",
            ),
            ({"masks": True}, "starts own begins with none: leave them out"),
            ({"weighting": "cosmap"}, "weighting cosmap says .* which student_steps does"),
            ({"student_steps": None, "starts": "data"}, "give student_steps, as 4"),
            ({"student_steps": None, "student_sampler": "lcm"}, "give student_steps, as 4"),
            ({"teacher_settings": ("block=4",)}, "is of a teacher_method, and none"),
        ],
    )
    def test_fields_that_do_not_go_together(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**(fields() | wrong))

    def test_models_that_have_no_such_steps(self, tmp_path):
        given = ft.config(tmp_path, **fields())
        with pytest.raises(ValueError, match="through two transformers"):
            check_student_steps(given, family, 0.875)
        with pytest.raises(ValueError, match="predicts 'v': leave it out"):
            check_student_steps(given, family_named("cogvideox"), None)


class TestWalk:
    """A teacher whose data are Gaussian has a way in closed form."""

    MEAN, SPREAD = 0.7, 0.5

    def spread(self, s):
        return math.sqrt((1 - s) ** 2 * self.SPREAD**2 + s**2)

    def at(self, z, s):
        return (1 - s) * self.MEAN + self.spread(s) * z

    def velocity(self, x, sigma):
        s = sigma.view(-1, 1)[0].item()
        z = (x - (1 - s) * self.MEAN) / self.spread(s)
        slope = (s - (1 - s) * self.SPREAD**2) / self.spread(s)
        return -self.MEAN + slope * z

    @pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
    def test_the_target_is_the_mean_velocity(self, shift):
        z = torch.linspace(-2, 2, 9).view(1, -1)
        steps = steps_of(4, substeps=16, shift=shift)
        for k, (high, low) in enumerate(pairwise(steps.levels)):
            expected = (self.at(z, high) - self.at(z, low)) / (high - low)
            found = steps.target(k, self.at(z, high), self.velocity)
            assert (found - expected).abs().max() < 1e-2

    def test_it_is_of_second_order(self):
        z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, -1)

        def error(count):
            levels = [0.9 - 0.6 * i / count for i in range(count + 1)]
            end = walk(lambda x, s: self.velocity(x, s).double(), self.at(z, 0.9), levels)
            return (end - self.at(z, 0.3)).abs().max().item()

        assert 3.4 < error(16) / error(32) < 4.6

    def test_one_step_is_eulers(self):
        x = torch.randn(2, 3)
        v = torch.randn(2, 3)
        torch.testing.assert_close(walk(lambda *_: v, x, (0.9, 0.4)), x - 0.5 * v)


class TestLoss:
    def test_one_step_of_the_teacher_from_clips_is_a_weighted_distill(self):
        objective, _ = built("distill")
        say_something(objective)
        steps = steps_of(4, substeps=1, starts="data")
        clean, noise, _, conditions = batch()
        for k in range(4):
            sigma = torch.full((len(clean),), steps.levels[k])
            objective._steps = None
            plain = objective(clean, noise, sigma, conditions)
            objective._steps = steps
            found = objective(clean, noise, sigma, conditions)
            torch.testing.assert_close(found, steps.weight(k) * plain)

    @pytest.mark.parametrize("starts", ["own", "teacher"])
    @pytest.mark.parametrize("sampler", ["euler", "lcm"])
    def test_it_begins_where_the_steps_before_have_led(self, starts, sampler):
        objective, stock = built("distill")
        say_something(objective)
        objective._steps = steps = steps_of(3, substeps=2, starts=starts, sampler=sampler)
        clean, noise, _, conditions = batch()
        seeds = torch.arange(len(clean)) + 5
        drawing = [torch.Generator().manual_seed(5 + i) for i in range(len(clean))]

        def of(model):
            return lambda x, s: family.predict(model, x, s, conditions)

        x, levels = noise, steps.levels
        with torch.no_grad():
            for k in range(2):
                start, (high, low) = x, levels[k : k + 2]
                if starts == "own":
                    x = walk(of(objective.transformer), start, (high, low))
                else:
                    x = walk(of(stock), start, steps.within(k))
                if sampler == "lcm":  # to the end of that line, and back by other noise
                    clear = start + (x - start) * high / (high - low)
                    other = [torch.randn(noise.shape[1:], generator=g) for g in drawing]
                    x = (1 - low) * clear + low * torch.stack(other)
            end = walk(of(stock), x, steps.within(2))
            said = of(objective.transformer)(x, torch.full((len(x),), levels[2]))
            expected = F.mse_loss(said, (x - end) / levels[2]) * steps.weight(2)
            sigma = torch.full((len(x),), levels[2])
            given = Batch(torch.zeros_like(clean), noise, sigma, conditions, fresh=seeds)
            found = objective(*given)
        torch.testing.assert_close(found, expected)
        assert found > 0

    def test_gradients_are_of_the_last_call_alone(self):
        objective, _ = built("distill")
        say_something(objective)
        objective._steps = steps = steps_of(3, substeps=2)
        clean, noise, _, conditions = batch()
        sigma = torch.full((len(clean),), steps.levels[2])
        objective(clean, noise, sigma, conditions).backward()
        found = [p.grad.clone() for p in objective.parameters() if p.requires_grad]

        with torch.no_grad():
            predict = {
                "student": lambda x, s: objective._student(x, s, conditions),
                "teacher": lambda x, s: objective._teacher(x, s, conditions),
            }
            x = steps.start(2, noise, **predict, fresh=lambda: noise)
            target = steps.target(2, x, predict["teacher"])
        objective.zero_grad()
        loss = F.mse_loss(objective._student(x, sigma, conditions), target) * steps.weight(2)
        loss.backward()
        again = [p.grad for p in objective.parameters() if p.requires_grad]
        for a, b in zip(found, again, strict=True):
            torch.testing.assert_close(a, b)


class TestTraining:
    def test_steps_are_taken_by_turns(self, tmp_path, monkeypatch):
        seen = []
        forward = trainer.Objective.forward

        def look(self, *given):
            seen.append(given[2].tolist())
            return forward(self, *given)

        monkeypatch.setattr(trainer.Objective, "forward", look)
        given = ft.config(
            tmp_path, **fields(student_steps=3), gradient_accumulation=2, batch_size=2
        )
        ft.train(given)
        levels = equal_steps(3, 3.0)
        assert seen == [pytest.approx([levels[i % 3]] * 2) for i in range(8)]

    @pytest.mark.parametrize("teacher", ["dense", "radial"])
    def test_a_density_of_each_step_is_trained_in_its_step(self, tmp_path, monkeypatch, teacher):
        seen, at = [], Piecewise.at

        def look(self, step):
            seen.append(step.number)
            return at(self, step)

        monkeypatch.setattr(Piecewise, "at", look)
        densities = ("critical=0.9,0.6,0.4", "rest=none", "block_q=16", "block_k=16")
        own = {"method": "piecewise", "settings": densities, "teacher_method": teacher}
        given = ft.config(tmp_path, **fields(student_steps=3, stages=("9:3",), **own))
        ft.train(given)
        assert [number for number, _ in groupby(seen)] == [0, 1, 0, 1, 2]

    @pytest.mark.slow
    @pytest.mark.parametrize("sampler", ["euler", "lcm"])
    def test_resume_is_the_same_to_the_bit(self, tmp_path, sampler):
        more = {"teacher_guidance": 2.0, "checkpoint_every": 3, "stages": ("9:6",)}
        more["student_sampler"] = sampler
        given = ft.config(tmp_path / "a", **fields(**more))
        whole = ft.train(given)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000006")
        shutil.rmtree(tmp_path / "b" / "lora")
        rest = ft.train(given.replaced(out=str(tmp_path / "b")), resume=True)
        assert rest.losses == whole.losses[3:]
        files = [
            folder / "lora" / "pytorch_lora_weights.safetensors"
            for folder in (tmp_path / "a", tmp_path / "b")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()

    @pytest.mark.slow
    @pytest.mark.parametrize("sampler", ["euler", "lcm"])
    def test_the_lora_says_how_it_is_sampled(self, tmp_path, sampler):
        wan.pipeline().save_pretrained(tmp_path / "model")
        more = fields(teacher_guidance=2.0, student_sampler=sampler)
        given = ft.config(tmp_path / "a", **more, model="demo")
        folder = ft.train(given).folder
        recipe = read_recipe(folder)
        assert recipe.sampler == sampler
        assert recipe.levels == pytest.approx(equal_steps(2, 3.0))
        asked = GenerateConfig(model=str(tmp_path / "model"), from_lora=str(folder), prompt="a")
        config = plan_of(asked).config
        assert (config.sampler, config.steps, config.guidance_scale) == (sampler, 2, 1.0)
        assert config.levels == recipe.levels
        assert plan_of(asked.replaced(steps=5)).config.levels == ()

    @pytest.mark.slow
    def test_it_comes_nearer_to_the_teacher(self, tmp_path):
        more = {"teacher_guidance": 3.0, "stages": ("9:40",)}
        losses = ft.train(ft.config(tmp_path, **fields(**more))).losses
        assert sum(losses[-8:]) < sum(losses[:8])


class TestTeachersAttention:
    OWN = ("critical=0.3", "rest=none", "block_q=16", "block_k=16")

    @pytest.fixture
    def teacher(self, tmp_path):
        plain = {"method": "piecewise", "settings": self.OWN, "stages": ("9:3",)}
        return ft.train(ft.config(tmp_path / "teacher", **plain, seed=4)).folder

    @pytest.mark.parametrize(
        "student",
        [
            {"method": "piecewise", "settings": ("critical=1", *OWN[1:])},
            {"method": "piecewise", "settings": OWN, "dense_layers": 1},
            {"method": "dense", "settings": ()},
        ],
        ids=["method", "layers", "dense"],
    )
    def test_it_is_its_loras_own(self, teacher, tmp_path, student):
        given = ft.config(
            tmp_path / "a", **student, objective="distill", teacher_lora=str(teacher)
        )
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        _, noise, sigma, conditions = batch()
        model = run.model.transformer.eval()
        alone = wan.transformer()
        alone.load_lora_adapter(load_file(teacher / WEIGHTS), prefix="transformer")
        handle = attach(alone, from_lora=teacher)
        with torch.no_grad(), handle.scheduled(Schedule()):  # no dense first steps, as in training
            before = family.predict(model, noise, sigma, conditions)
            with run.adapter.teaching():
                found = family.predict(model, noise, sigma, conditions)
            with active(model, TEACHER):
                other = family.predict(model, noise, sigma, conditions)
            after = family.predict(model, noise, sigma, conditions)
            expected = family.predict(alone.eval(), noise, sigma, conditions)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert (found - other).abs().max() > 1e-4
        assert torch.equal(before, after)

    def test_it_may_be_another(self, tmp_path):
        own = {"method": "radial", "settings": ("block=4",)}
        taught = {"teacher_method": "radial", "teacher_settings": ("block=8",)}
        given = ft.config(tmp_path / "a", **own, **taught, objective="distill")
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        assert run.handle.method.block == 4
        with run.adapter.teaching():
            assert run.handle.method.block == 8
        assert run.handle.method.block == 4
        with pytest.raises(ValueError, match="give teacher_method dense"):
            ft.train(ft.config(tmp_path / "b", **taught, objective="distill"))
