"""What training draws, in which order, and by which loss: flow matching and distillation."""

import math
import shutil
from contextlib import suppress
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.objectives import batch, built, say_something
from support.runs import (
    WEIGHTS,
    assert_apart,
    with_recipe,
)

from gen_accel.attention_processors.attached.recipe import (
    read_recipe,
)
from gen_accel.attention_processors.families import family_named
from gen_accel.io import file_sha256
from gen_accel.lora import TrainConfig, dry_run, trainer
from gen_accel.lora.batches import draw, order
from gen_accel.lora.evaluate import guidance_of
from gen_accel.pipelines.sampler import shifted

family = family_named("wan")

pytestmark = pytest.mark.usefixtures("one_thread")


class TestDistill:
    def test_the_teacher_is_the_model_as_it_came(self):
        objective, stock = built("distill")
        say_something(objective)
        clean, noise, sigma, conditions = batch()
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        with torch.no_grad():
            student = family.predict(objective.transformer, noisy, sigma, conditions)
            teacher = family.predict(stock, noisy, sigma, conditions)
            assert torch.equal(
                objective(clean, noise, sigma, conditions), F.mse_loss(student, teacher)
            )
            assert_apart(student, teacher)
            again = family.predict(objective.transformer, noisy, sigma, conditions)
        assert torch.equal(again, student)

    def test_nothing_to_learn_through_the_models_own_attention(self):
        objective, _ = built("distill", "dense", ())
        assert objective(*batch()).item() == 0
        objective, _ = built("distill")
        assert objective(*batch()).item() > 0

    @pytest.mark.parametrize("kind", ["flow", "distill"])
    @pytest.mark.parametrize("combine", ["project", "alpha"])
    def test_gradients_reach_all_that_trains(self, kind, combine):
        objective, _ = built(kind, settings=(*ft.SPARSE, f"combine={combine}"))
        say_something(objective)
        objective(*batch()).backward()
        names = {n for n, p in objective.named_parameters() if p.requires_grad}
        assert {n for n, p in objective.named_parameters() if p.grad is not None} == names
        assert all("lora_" in name or "processor.branch" in name for name in names)
        for name, parameter in objective.named_parameters():
            if name in names:
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0, name

    @pytest.mark.slow
    def test_it_comes_closer_to_the_dense_model(self, tmp_path):
        done = ft.train(ft.config(tmp_path, objective="distill", stages=("17:24",)))
        assert sum(done.losses[-8:]) < sum(done.losses[:8])
        assert read_recipe(done.folder).objective == "distill"


class TestGuidedTeacher:
    """A LoRA that holds the guidance of its teacher."""

    FIELDS: ClassVar = {"method": "radial", "settings": ("block=4",), "stages": ("9:6",)}

    @pytest.fixture
    def teacher(self, tmp_path):
        return ft.train(ft.config(tmp_path / "teacher", **self.FIELDS, seed=4)).folder

    def test_the_target(self):
        objective, stock = built("distill", guidance=3.0)
        say_something(objective)
        clean, noise, sigma, conditions = batch()
        nothing = {name: torch.zeros_like(x) for name, x in conditions.items()}
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise
        with torch.no_grad():
            student = family.predict(objective.transformer, noisy, sigma, conditions)
            told, untold = (family.predict(stock, noisy, sigma, c) for c in (conditions, nothing))
            loss = objective(clean, noise, sigma, conditions, None, nothing)
        assert_apart(told, untold)
        torch.testing.assert_close(loss, F.mse_loss(student, 3 * told - 2 * untold))

    @pytest.mark.slow
    def test_it_is_taught_by_the_lora_through_its_attention(self, teacher, tmp_path):
        alike = {"objective": "distill", "teacher_lora": str(teacher), "caption_dropout": 0.0}
        same = ft.config(tmp_path / "a", **self.FIELDS, **alike, init_lora=str(teacher))
        assert ft.train(same).losses[0] == 0  # it says what it starts from
        guided = same.replaced(out=str(tmp_path / "b"), teacher_guidance=3.0, stages=("9:24",))
        done = ft.train(guided)
        assert done.losses[0] > 0
        assert sum(done.losses[-6:]) < sum(done.losses[:6])
        recipe = read_recipe(done.folder)
        assert (recipe.teacher_guidance, recipe.holds_guidance) == (3.0, True)
        assert not read_recipe(teacher).holds_guidance

    @pytest.mark.slow
    def test_the_teacher_stays_and_is_not_kept(self, teacher, tmp_path):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields)
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        saved = load_file(teacher / WEIGHTS)
        assert not any(".teacher." in name for name in run.state.names)
        run.train(False)
        transformer = run.model.transformer
        for name, x in get_peft_model_state_dict(transformer, adapter_name="teacher").items():
            assert torch.equal(x, saved[f"transformer.{name}"]), name
        kept = load_file(tmp_path / "a" / "lora" / WEIGHTS)
        assert kept.keys() == saved.keys()
        assert not any(torch.equal(kept[name], saved[name]) for name in kept if "lora_B" in name)

    @pytest.mark.slow
    def test_resume_is_the_same_to_the_bit(self, teacher, tmp_path):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields, checkpoint_every=3)
        ft.train(given)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000006")
        ft.train(given.replaced(out=str(tmp_path / "b")), resume=True)
        a, b = (load_file(tmp_path / x / "lora" / WEIGHTS) for x in "ab")
        assert all(torch.equal(a[name], b[name]) for name in a)

    @pytest.mark.slow
    def test_a_dense_teacher(self, tmp_path):
        """Its own attention is full where the student's is sparse."""
        plain = self.FIELDS | {"method": "dense", "settings": ()}
        teacher = ft.train(ft.config(tmp_path / "teacher", **plain, seed=4)).folder
        alike = {"objective": "distill", "teacher_lora": str(teacher), "init_lora": str(teacher)}
        done = ft.train(ft.config(tmp_path / "a", **plain, **alike))
        assert done.losses[0] == 0
        whole = self.FIELDS | {"settings": ("block=1024",)}
        done = ft.train(ft.config(tmp_path / "b", **whole, **alike))
        assert done.losses[0] < 1e-10
        sparse = self.FIELDS | {"settings": ("block=4", "decay_factor=0.1")}
        done = ft.train(ft.config(tmp_path / "c", **sparse, **alike))
        assert done.losses[0] > 1e-6
        branches = {"method": "sparse_linear", "settings": ft.SPARSE, "stages": ("9:6",)}
        given = ft.config(tmp_path / "d", **branches, **alike)
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        assert any("branch" in name for name in run.state.names)
        assert run.train(False).losses[0] > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("fails", [False, True], ids=["taught", "failed"])
    def test_teaching_leaves_no_trace(self, teacher, tmp_path, fails):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields)
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())

        def flags():
            return {n: p.requires_grad for n, p in run.objective.named_parameters()}

        before, said = flags(), partial(wan.forward, run.model.transformer)
        say_something(run.objective)
        with torch.no_grad():
            student = said()
            with suppress(KeyError), run.adapter.teaching():
                assert_apart(said(), student)
                assert flags() == before
                if fails:
                    raise KeyError
            assert torch.equal(said(), student)
        assert flags() == before
        assert {n for n, trains in before.items() if trains} == {
            n for n in before if ".default." in n
        }

    @pytest.mark.slow
    def test_the_same_with_checkpointing_and_dropout(self, teacher, tmp_path):
        fields = self.FIELDS | {
            "objective": "distill",
            "teacher_lora": str(teacher),
            "teacher_guidance": 2.0,
            "lora_dropout": 0.3,
        }
        plain = ft.train(ft.config(tmp_path / "a", **fields)).losses
        again = ft.config(tmp_path / "b", **fields, gradient_checkpointing=True)
        assert ft.train(again).losses == plain

    @pytest.mark.slow
    def test_another_teacher_is_another_run(self, teacher, tmp_path):
        fields = {"objective": "distill", "teacher_lora": str(teacher), "teacher_guidance": 2.0}
        given = ft.config(tmp_path / "a", **self.FIELDS, **fields, checkpoint_every=3)
        folder = ft.train(given).folder
        assert read_recipe(folder).teacher == file_sha256(teacher / WEIGHTS)
        shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-000006")
        moved = given.replaced(teacher_lora=str(shutil.copytree(teacher, tmp_path / "moved")))
        ft.train(moved, resume=True)
        other = ft.train(ft.config(tmp_path / "other", **self.FIELDS, seed=5)).folder
        with pytest.raises(ValueError, match=r"differs in teacher_lora \(its weights\): "):
            ft.train(given.replaced(teacher_lora=str(other)), resume=True)
        with pytest.raises(ValueError, match="differs in teacher_lora"):
            ft.train(given.replaced(teacher_lora=None), resume=True)

    @pytest.mark.slow
    def test_guidance_is_passed_on_and_not_doubled(self, teacher, tmp_path):
        held = str(with_recipe(teacher, tmp_path / "held", teacher_guidance=3.0))
        given = ft.config(tmp_path / "a", **self.FIELDS, objective="distill", teacher_lora=held)
        assert read_recipe(ft.train(given).folder).teacher_guidance == 3.0
        again = given.replaced(out=str(tmp_path / "b"), init_lora=held)
        assert ft.train(again).losses[0] == 0
        with pytest.raises(ValueError, match="holds a guidance of 3 already, teacher_guidance is"):
            ft.train(given.replaced(out=str(tmp_path / "c"), teacher_guidance=2.0))
        flow = ft.config(tmp_path / "d", **self.FIELDS, init_lora=held)
        with pytest.raises(ValueError, match=r"holds a guidance of 3, this .* is of 1: start"):
            ft.train(flow)

    @pytest.mark.slow
    def test_a_teacher_with_other_layers_and_by_its_file(self, tmp_path):
        fields = self.FIELDS | {"rank": 3, "targets": ("attention", "feed_forward")}
        teacher = ft.train(ft.config(tmp_path / "teacher", **fields)).folder
        (teacher / WEIGHTS).rename(teacher / "other.safetensors")
        file = str(teacher / "other.safetensors")
        given = ft.config(tmp_path / "a", **self.FIELDS, objective="distill", teacher_lora=file)
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        saved = load_file(file)
        own = get_peft_model_state_dict(run.model.transformer, adapter_name="teacher")
        assert {f"transformer.{name}" for name in own} == saved.keys()
        assert all(torch.equal(x, saved[f"transformer.{name}"]) for name, x in own.items())
        assert all("ff.net" not in name for name in run.state.names)

    def test_without_captions_it_says_what_the_model_says_without(self, tmp_path):
        fields = {"method": "dense", "settings": (), "objective": "distill", "stages": ("9:2",)}
        given = ft.config(tmp_path, **fields, teacher_guidance=5.0, caption_dropout=1.0)
        assert ft.train(given).losses[0] == 0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"stages": ("9:6:position_interpolation",)}, "rule 'none', stages .* write its rule"),
            ({"method": "sparse_linear", "settings": ft.SPARSE}, "give teacher_method dense"),
            ({"part": "transformer_2"}, "is of transformer, asked for is part transformer_2"),
        ],
        ids=["rule", "parameters", "part"],
    )
    def test_a_teacher_that_does_not_fit(self, teacher, tmp_path, fields, message):
        given = ft.config(
            tmp_path / "a",
            **(self.FIELDS | fields),
            objective="distill",
            teacher_lora=str(teacher),
        )
        with pytest.raises(ValueError, match=message):
            ft.train(given)

    @pytest.mark.slow
    def test_its_rule_counts_where_there_is_one(self, tmp_path):
        fields = self.FIELDS | {"stages": ("5:1", "9:2:position_interpolation")}
        teacher = str(ft.train(ft.config(tmp_path / "teacher", **fields)).folder)
        given = ft.config(tmp_path / "a", **fields, objective="distill", teacher_lora=teacher)
        ft.train(given)
        with pytest.raises(ValueError, match="is for a model of 5 frames, trained_frames is 9"):
            ft.train(given.replaced(out=str(tmp_path / "b")), trained_frames=9)

    def test_a_teacher_of_another_model(self, teacher, tmp_path):
        given = ft.config(
            tmp_path / "a", **self.FIELDS, objective="distill", teacher_lora=str(teacher)
        )
        with pytest.raises(ValueError, match="trained on another model"):
            ft.train(given, transformer=wan.transformer(num_layers=3))

    def test_models_that_are_not_guided_so(self, tmp_path):
        fields = {"objective": "distill", "teacher_guidance": 3.0}
        given = ft.config(tmp_path, **self.FIELDS, **fields)
        with pytest.raises(ValueError, match="a pipeline of two transformers guides both or none"):
            ft.train(given, boundary=0.9)
        hunyuan = given.replaced(model="hunyuanvideo-community/HunyuanVideo")
        with pytest.raises(ValueError, match="holds a guidance of its own"):
            dry_run(hunyuan)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"teacher_guidance": 0.5}, "teacher_guidance must be at least 1, got 0.5"),
            ({"teacher_guidance": math.inf}, "must be at least 1 and finite, got inf"),
            ({"teacher_guidance": 3.0}, "teacher_guidance 3 is for objective distill"),
            ({"teacher_lora": "x"}, "teacher_lora x is for objective distill"),
            (
                {"teacher_lora": "x", "objective": "distill", "adapter": "image_prompt"},
                "teacher_lora x is for .*, got distill of image_prompt: leave it out",
            ),
            (
                {
                    "teacher_lora": "x",
                    "objective": "distill",
                    "rank": 0,
                    "method": "sparse_linear",
                },
                "teacher_lora x teaches a LoRA, and rank is 0: give",
            ),
        ],
        ids=["scale", "infinite", "flow", "flow with lora", "image prompt", "no rank"],
    )
    def test_what_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**fields)

    def test_validation_goes_without_guidance(self, teacher, tmp_path):
        held = str(with_recipe(teacher, tmp_path / "held", teacher_guidance=3.0))
        distilled = TrainConfig(objective="distill", teacher_guidance=3.0)
        assert guidance_of(TrainConfig()) == 5.0
        assert guidance_of(distilled) == 1.0
        assert guidance_of(distilled.replaced(guidance_scale=2.0)) == 2.0
        assert guidance_of(TrainConfig(objective="distill", teacher_lora=held)) == 1.0
        assert guidance_of(TrainConfig(objective="distill", teacher_lora=str(teacher))) == 5.0


def test_the_loss_is_that_of_the_velocity():
    objective, stock = built("flow", "dense", ())
    clean, noise, sigma, conditions = batch()
    mix = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - mix) * clean + mix * noise
    with torch.no_grad():
        said = stock(noisy, timestep=1000 * sigma, **conditions, return_dict=False)[0]
        expected = ((said - (noise - clean)) ** 2).mean()
        assert torch.allclose(objective(clean, noise, sigma, conditions), expected, rtol=1e-6)


def sigmas(count=3000, shift=1.0, bounds=(1e-3, 1 - 1e-3), **fields):
    given = ft.config("unused", **fields)
    found = [
        draw(given, step, 0, (1, 1, 1, 1), shift=shift, sigmas=bounds).sigma
        for step in range(count)
    ]
    return torch.tensor(found, dtype=torch.float64).sort().values


def assert_distributed(found, cumulative, bounds=(1e-3, 1 - 1e-3)):
    """Kolmogorov-Smirnov at 1 %, of a distribution cut to the bounds."""
    low, high = (cumulative(torch.tensor(x, dtype=torch.float64)) for x in bounds)
    expected = (cumulative(found) - low) / (high - low)
    count = len(found)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((expected - steps[:-1]).max(), (steps[1:] - expected).max())
    assert distance < 1.63 / math.sqrt(count)
    assert bounds[0] <= found[0] <= found[-1] <= bounds[1]


class TestDraws:
    @pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4)])
    def test_logit_normal(self, shift, mean, std):
        def cumulative(sigma):
            level = sigma / (shift - (shift - 1) * sigma)
            return torch.special.ndtr((level.logit() - mean) / std)

        assert_distributed(sigmas(shift=shift, logit_mean=mean, logit_std=std), cumulative)

    @pytest.mark.parametrize("shift", [1.0, 5.0])
    def test_uniform(self, shift):
        found = sigmas(shift=shift, timestep_sampling="uniform")
        assert_distributed(found, lambda sigma: sigma / (shift - (shift - 1) * sigma))

    def test_levels_that_never_come(self):
        with pytest.raises(ValueError, match="change logit_mean 50, logit_std 1 or shift 1"):
            draw(TrainConfig(logit_mean=50.0), 0, 0, (1, 1, 1, 1), shift=1.0)

    @pytest.mark.parametrize("bounds", [(0.875, 0.999), (0.001, 0.875)])
    def test_of_one_of_two_experts(self, bounds):
        found = sigmas(1000, shift=3.0, bounds=bounds)
        assert_distributed(found, lambda s: torch.special.ndtr((s / (3 - 2 * s)).logit()), bounds)

    def test_the_shift_is_that_of_the_scheduler(self):
        scheduler = wan.euler()
        levels = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
        ours = torch.tensor([shifted(level.item(), 3.0) for level in levels])
        assert torch.allclose(scheduler.sigmas.double(), ours.double(), atol=1e-6)

    def test_a_draw_depends_on_seed_step_and_place_alone(self):
        given = ft.config("unused", caption_dropout=0.5)
        shape = (2, 3, 4, 5)
        torch.manual_seed(1)
        first = draw(given, 3, 1, shape, shift=3.0)
        torch.manual_seed(2)
        draw(given, 7, 0, shape, shift=3.0)
        again = draw(given, 3, 1, shape, shift=3.0)
        assert torch.equal(first.noise, again.noise)
        assert first[1:] == again[1:]
        for other in (
            draw(given, 4, 1, shape, shift=3.0),
            draw(given, 3, 2, shape, shift=3.0),
            draw(given.replaced(seed=1), 3, 1, shape, shift=3.0),
        ):
            assert not torch.equal(first.noise, other.noise)
            assert first.sigma != other.sigma
        assert draw(given, 3, 1, (9,), shift=3.0)[1:] == first[1:]

    def test_the_noise_is_normal(self):
        noise = draw(ft.config("unused"), 0, 0, (16, 8, 32, 32), shift=1.0).noise
        ordered = noise.flatten().double().sort().values
        expected = torch.special.ndtr(ordered)
        steps = torch.arange(1, len(ordered) + 1) / len(ordered)
        assert (expected - steps).abs().max() < 1.63 / math.sqrt(len(ordered))

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_captions_are_dropped_at_their_share(self, share):
        given = ft.config("unused", caption_dropout=share)
        shown = [draw(given, i, 0, (1,), shift=1.0).captioned for i in range(2000)]
        assert abs(np.mean(shown) - (1 - share)) <= 3 * math.sqrt(share * (1 - share) / 2000)

    @pytest.mark.slow
    def test_what_a_dropped_caption_is(self, tmp_path):
        """A clip without its caption is shown with the cache's empty one."""
        asked = []

        class Watched(ft.Clips):
            def conditions(self, index, text=0):
                asked.append(index)
                return super().conditions(index, text)

        ft.train(ft.config(tmp_path / "a", caption_dropout=1.0), Watched())
        assert not asked
        ft.train(ft.config(tmp_path / "b", caption_dropout=0.0), Watched())
        assert len(asked) == 4


class TestOrder:
    def test_every_clip_before_any_comes_twice(self):
        plan = order([range(7)], steps=14, batch=2, seed=0)
        shown = [clip for clips in plan for clip in clips]
        assert len(shown) == 28
        rounds = [shown[i : i + 7] for i in range(0, 28, 7)]
        assert all(sorted(one) == list(range(7)) for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1

    def test_two_stages_alike_show_other_clips(self, tmp_path):
        given = ft.config(tmp_path, stages=("9:4", "9:4:riflex"))
        made = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        assert made.plans[0] != made.plans[1]

    def test_one_size_a_step_in_proportion(self):
        buckets = [[0, 1, 2, 3, 4, 5], [6, 7]]
        plan = order(buckets, steps=400, batch=3, seed=1)
        assert all(
            set(clips) <= set(buckets[0]) or set(clips) <= set(buckets[1]) for clips in plan
        )
        share = np.mean([clips[0] >= 6 for clips in plan])
        assert abs(share - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 400)
        for bucket in buckets:
            shown = [clip for clips in plan if clips[0] in bucket for clip in clips]
            whole = len(shown) // len(bucket) * len(bucket)
            for i in range(0, whole, len(bucket)):
                assert sorted(shown[i : i + len(bucket)]) == bucket

    def test_it_depends_on_the_seed_alone(self):
        torch.manual_seed(0)
        first = order([range(9)], 5, 2, seed=3)
        torch.manual_seed(1)
        assert order([range(9)], 5, 2, seed=3) == first
        assert order([range(9)], 5, 2, seed=4) != first

    def test_a_batch_larger_than_a_bucket(self):
        assert all(len(clips) == 5 for clips in order([[0], [1, 2]], 10, 5, seed=0))

    @pytest.mark.slow
    def test_clips_of_several_sizes_train(self, tmp_path):
        clips = ft.Clips(((4, 8), (6, 4), (4, 8), (6, 4)))
        done = ft.train(ft.config(tmp_path, stages=("9:8",), batch_size=2), clips)
        assert all(math.isfinite(loss) for loss in done.losses)
