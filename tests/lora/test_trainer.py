"""Training from a pipeline and clips on disk: precision, videos meanwhile, what is refused."""

import math
import shutil
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from support import checks, wan
from support import finetuning as ft
from support.objectives import batch, built, say_something
from support.runs import (
    WEIGHTS,
    assert_same_run,
    files,
    losses,
    metrics,
    state,
)

import gen_accel
from gen_accel.attention_processors.attached.recipe import (
    read_recipe,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.lora import checkpoint, dry_run, trainer
from gen_accel.lora.artefact import target_modules, write_lora
from gen_accel.lora.checkpoint import TENSORS
from gen_accel.lora.objective import Objective
from gen_accel.lora.prepare import cache_clips, check_components, model_of
from gen_accel.lora.state import TrainingState
from gen_accel.lora.trainer import CHECKPOINTS
from gen_accel.measure.video_io import read_video

pytestmark = pytest.mark.usefixtures("one_thread")


class TestPrecision:
    def grads(self, checkpointing, dtype=torch.float32, dropout=0.3):
        objective, _ = built("flow", lora_dropout=dropout)
        say_something(objective)
        if checkpointing:
            objective.transformer.enable_gradient_checkpointing()
        objective.to(dtype).train()
        clean, noise, sigma, conditions = batch()
        torch.manual_seed(5)
        text = {name: x.to(dtype) for name, x in conditions.items()}
        objective(clean.to(dtype), noise.to(dtype), sigma.to(dtype), text).backward()
        return {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}

    @pytest.mark.slow
    def test_gradient_checkpointing_changes_no_gradient(self):
        """With dropout: what is computed again has to draw the same."""
        plain, saved = self.grads(False), self.grads(True)
        assert plain.keys() == saved.keys()
        exact = self.grads(False, torch.float64, dropout=0.0)
        undropped, saved_undropped = self.grads(False, dropout=0.0), self.grads(True, dropout=0.0)
        for name, grad in plain.items():
            assert torch.equal(saved[name], grad), name
            checks.assert_no_worse(saved_undropped[name], undropped[name], exact[name])

    @pytest.mark.slow
    def test_bfloat16(self, tmp_path):
        """The model in half precision, what trains in float32, and to be resumed to the bit."""
        made = ft.model(transformer=wan.transformer().to(torch.bfloat16))
        given = ft.config(tmp_path / "a", mixed_precision="bf16", checkpoint_every=2)
        done = ft.train(given, model=made)
        assert all(math.isfinite(loss) for loss in done.losses)
        stock = wan.transformer().to(torch.bfloat16).state_dict()
        for name, parameter in made.transformer.named_parameters():
            trains = "lora_" in name or ".branch." in name
            assert parameter.requires_grad == trains, name
            before = stock.get(name.replace(".base_layer", ""))
            assert parameter.dtype == (torch.float32 if trains else before.dtype), name
        assert {x.dtype for x in load_file(done.folder / WEIGHTS).values()} == {torch.float32}
        out = tmp_path / "b"
        shutil.copytree(tmp_path / "a", out)
        shutil.rmtree(out / trainer.CHECKPOINTS / "step-000004")
        ft.train(
            given.replaced(out=str(out)),
            model=ft.model(transformer=wan.transformer().to(torch.bfloat16)),
            resume=True,
        )
        assert_same_run(out, tmp_path / "a")

    def test_float16_needs_a_gpu(self, tmp_path):
        with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU: take bf16 or no"):
            trainer.accelerator_for(ft.config(tmp_path, mixed_precision="fp16"))

    @pytest.mark.parametrize(("cpu", "warned"), [("AVX2", 1), ("AVX512", 0)])
    def test_bfloat16_on_a_cpu_that_is_slow_in_it(self, tmp_path, monkeypatch, cpu, warned):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.accelerator_for(ft.config(tmp_path, mixed_precision="bf16"))
        assert sum("take mixed_precision no" in str(one.message) for one in found) == warned

    def test_bitsandbytes_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
        with pytest.raises(ValueError, match=r"pip install \".+\[quantized\]\""):
            trainer.train(ft.config(tmp_path, optimizer="adamw8bit"))

    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_ends_the_run(self, tmp_path):
        class Broken(ft.Clips):
            def latents(self, index, frames):
                found = super().latents(index, frames)
                started = (tmp_path / trainer.METRICS).exists()
                return found * math.inf if started and len(losses(tmp_path)) == 3 else found

        given = ft.config(tmp_path, checkpoint_every=1, keep_checkpoints=1)
        with pytest.raises(ValueError, match=r"the loss of step 3 is nan: lower learning_rate"):
            ft.train(given, Broken())
        assert state(tmp_path).state["step"] == 3
        assert all(x.isfinite().all() for x in state(tmp_path).tensors.values())
        assert len(ft.train(given, resume=True).losses) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(("step", "fields"), [(3, {}), (1, {"max_grad_norm": 0})])
    def test_a_gradient_that_is_not_finite_ends_the_run(self, tmp_path, monkeypatch, step, fields):
        """With a finite loss, at the last step and before; nothing of it is written."""
        given = ft.config(tmp_path / "run", checkpoint_every=1, keep_checkpoints=1, **fields)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "clip", TrainingState.clip)  # as it was, afterwards
            ft.poison(step)
            with pytest.raises(ValueError, match=f"gradient of step {step} is not finite") as told:
                ft.train(given)
        assert f"--resume goes on from step-{step:06d}" in str(told.value)
        assert len(losses(tmp_path / "run")) == state(tmp_path / "run").state["step"] == step
        assert not (tmp_path / "run" / "lora").exists()
        assert len(ft.train(given, resume=True).losses) == 4 - step

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [4.0, 1.0])
    def test_a_step_that_float16_leaves_out(self, tmp_path, monkeypatch, scale):
        """The scale of the loss is halved then; one of 1 is to blame for nothing."""
        given = ft.config(tmp_path, checkpoint_every=1, keep_checkpoints=4)
        accelerator = trainer.accelerator_for(given)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setattr(TrainingState, "clip", TrainingState.clip)
        ft.poison(2)
        if scale == 1:
            with pytest.raises(ValueError, match="gradient of step 2 is not finite"):
                trainer.run(given, accelerator, ft.model(), ft.Clips())
            return
        assert len(trainer.run(given, accelerator, ft.model(), ft.Clips()).losses) == 4
        assert accelerator.scaler.get_scale() == scale / 2
        saved = [load_file(path / TENSORS) for path in checkpoint.found(tmp_path / CHECKPOINTS)]
        same = [
            all(torch.equal(x, b[name]) for name, x in a.items() if name.startswith("model/"))
            for a, b in pairwise(saved)
        ]
        assert same == [False, True, False]

    @pytest.mark.parametrize("what", ["model", "ema", "optimizer"])
    def test_what_is_not_finite_is_not_saved(self, tmp_path, monkeypatch, what):
        advance, calls = TrainingState.advance, []

        def broken(self):
            rate = advance(self)
            calls.append(1)
            if len(calls) == 2:
                first = self.parameters()[0]
                average = self.ema.shadow_params[0]
                moment = self.optimizer.state[first]["exp_avg"]
                with torch.no_grad():
                    {"model": first, "ema": average, "optimizer": moment}[what].fill_(math.inf)
            return rate

        monkeypatch.setattr(TrainingState, "advance", broken)
        given = ft.config(tmp_path, checkpoint_every=1, keep_checkpoints=1, ema_decay=0.9)
        with pytest.raises(ValueError, match=f"state after step 2 is not finite.*: {what}/"):
            ft.train(given)
        assert state(tmp_path).state["step"] == 1

    def test_a_lora_that_is_not_finite_is_not_written(self, tmp_path, trained):
        folder, transformer = trained
        weights = {"blocks.0.attn1.to_q.lora_A.weight": torch.full((2, 2), math.nan)}
        with pytest.raises(ValueError, match=r"the LoRA for .* is not finite.*blocks\.0\.attn1"):
            write_lora(tmp_path / "lora", transformer, weights, None, read_recipe(folder))
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_the_length_of_the_gradient_is_limited(self, tmp_path):
        """With SGD's step the parameters would move by at most that; AdamW hides it, the log
        shows the length before."""
        free = ft.train(ft.config(tmp_path / "a", max_grad_norm=0, stages=("9:2",)))
        assert metrics(tmp_path / "a")[0]["grad_norm"] > 0
        assert math.isfinite(metrics(tmp_path / "a")[0]["grad_norm"])
        assert (
            free.losses[0]
            == ft.train(ft.config(tmp_path / "b", max_grad_norm=1e-9, stages=("9:2",))).losses[0]
        )
        a, b = state(tmp_path / "a").tensors, state(tmp_path / "b").tensors
        name = next(name for name in a if name.endswith("lora_B.default.weight/exp_avg"))
        assert b[name].norm() < 1e-8 < a[name].norm()


class TestValidation:
    PROMPT = "a red square moves right"

    def given(self, out, **fields):
        return ft.config(out, stages=("9:3",), max_tokens=16, **fields)

    @pytest.mark.slow
    def test_videos_beside_the_start_and_the_same_losses(self, tmp_path):
        given = self.given(
            tmp_path / "with",
            validate_every=2,
            validation_prompts=(self.PROMPT,),
            validation_frames=5,
            validation_steps=1,
            guidance_scale=1.0,
            ema_decay=0.5,
            lora_dropout=0.2,
        )
        made = ft.model(pipe=wan.pipeline())
        done = ft.train(given, model=made)
        videos = tmp_path / "with" / "validation"
        assert files(videos) == [
            "prompts.json",
            "step-000000/00.frames.jpg",
            "step-000000/00.mp4",
            "step-000002/00.beside_start.mp4",
            "step-000002/00.frames.jpg",
            "step-000002/00.mp4",
            "step-000003/00.beside_start.mp4",
            "step-000003/00.frames.jpg",
            "step-000003/00.mp4",
        ]
        start = read_video(videos / "step-000000" / "00.mp4")
        beside = read_video(videos / "step-000003" / "00.beside_start.mp4")
        assert start.shape == (5, 32, 64, 3)
        assert beside.shape[0] == 5
        assert beside.shape[2] >= 128
        without = self.given(tmp_path / "without", ema_decay=0.5, lora_dropout=0.2)
        assert ft.train(without).losses == done.losses
        a, b = state(tmp_path / "with"), state(tmp_path / "without")
        assert all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())

    def test_it_samples_as_the_lora_is_used(self, tmp_path, monkeypatch):
        """Dense steps, and the rule of the last stage at the longest length, whatever is shown."""
        seen = []

        def sampled(validation, done):
            handle = validation.pipe.transformer.blocks[0].attn1.processor.owner
            seen.append((handle.schedule, handle))

        rules = []
        monkeypatch.setattr(trainer.Validation, "__call__", sampled)
        apply = trainer.apply_rule
        monkeypatch.setattr(
            trainer,
            "apply_rule",
            lambda *args, **lengths: rules.append((args[1], lengths)) or apply(*args, **lengths),
        )
        given = ft.config(
            tmp_path,
            stages=("17:1", "17:1:riflex"),
            dense_steps=2,
            validate_every=1,
            validation_prompts=(self.PROMPT,),
            validation_frames=9,
        )
        ft.train(given, model=ft.model(pipe=wan.pipeline()))
        assert [schedule for schedule, _ in seen] == [Schedule(dense_steps=2)] * 3
        assert seen[0][1].schedule == Schedule()
        assert rules == [("riflex", {"frames": 5, "trained": 2})] * 4

    def test_it_needs_prompts(self, tmp_path):
        with pytest.raises(ValueError, match=r"validate_every .* needs validation_prompts"):
            self.given(tmp_path, validate_every=1)


class TestTrain:
    """From the pipeline and the clips on disk."""

    @pytest.mark.slow
    def test_caches_trains_and_resumes(self, on_disk, tmp_path, capsys):
        given = on_disk(checkpoint_every=2)
        done = gen_accel.lora.train(given)
        assert done.folder == tmp_path / "run" / "lora"
        assert done.steps == len(done.losses) == 4
        assert (tmp_path / "run" / "cache" / "cache.db").exists()
        recipe = read_recipe(done.folder)
        assert recipe.base_model == given.model
        cached = gen_accel.lora.LatentCache(tmp_path / "run" / "cache")
        assert recipe.data == cached.digest
        shutil.rmtree(done.folder)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
        moved = given.replaced(data=None, cache=str(tmp_path / "run" / "cache"))
        again = gen_accel.lora.train(moved, resume=True)
        assert again.losses == done.losses[2:]
        assert losses(tmp_path / "run") == done.losses
        pipe = wan.WanPipeline.from_pretrained(given.model)
        pipe.load_lora_weights(again.folder)

        before = capsys.readouterr().err
        assert "clips encoded, 0 kept" in before
        assert "nothing has changed" not in before
        shutil.rmtree(again.folder)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
        gen_accel.lora.train(given, resume=True)
        [line] = [line for line in capsys.readouterr().err.splitlines() if "encoded" in line]
        assert line.endswith(f"; nothing has changed, see {tmp_path}/run/cache/report.json")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"height": 48}, "holds clips of 32 x 64 pixels, asked for are 48 x 64"),
            ({"fps": 8.0}, "holds clips at 16.0 frames a second, asked for are 8.0"),
        ],
        ids=str,
    )
    def test_a_cache_of_other_clips_is_refused(self, on_disk, tmp_path, fields, message):
        cache_clips(on_disk(cache=str(tmp_path / "cache")))
        other = on_disk(data=None, cache=str(tmp_path / "cache"), **fields)
        with pytest.raises(ValueError, match=message):
            gen_accel.lora.train(other)

    def test_trained_frames_that_are_no_latents(self, on_disk):
        given = on_disk(trained_frames=80, stages=("17:1:riflex",))
        with pytest.raises(ValueError, match=r"trained_frames must be .* got 80"):
            gen_accel.lora.train(given)

    @pytest.mark.slow
    def test_prompts_train_without_a_clip(self, on_disk, tmp_path):
        (tmp_path / "p.txt").write_text("a red square\na blue circle\na green star\n")
        about = {"objective": "distill", "student_steps": 2, "loss_every": 1, "held_out": 1}
        about |= {"data": str(tmp_path / "p.txt"), "checkpoint_every": 1, "keep_checkpoints": 9}
        given = on_disk(stages=("9:1e", "17:1"), **about)
        done = gen_accel.lora.train(given)
        assert done.steps == 3, "two of three prompts, then one step"
        assert [row["frames"] for row in metrics(tmp_path / "run") if "loss" in row] == [9, 9, 17]
        for name in ("lora", "checkpoints/step-000002", "checkpoints/step-000003"):
            shutil.rmtree(tmp_path / "run" / name)
        assert gen_accel.lora.train(given, resume=True).losses == done.losses[1:]
        cached = {"data": None, "cache": str(given.cache_folder), "out": tmp_path / "other"}
        with pytest.raises(ValueError, match="the captions of 3 clips and prompts alone, as 'a b"):
            gen_accel.lora.train(on_disk(**cached))

    @pytest.mark.slow
    def test_a_dry_run_before_does_no_harm(self, on_disk):
        """What Accelerate remembers of it is another precision."""
        given = on_disk(mixed_precision="bf16", stages=("9:1",))
        assert dry_run(given).steps == 2
        assert math.isfinite(gen_accel.lora.train(given).losses[0])

    @pytest.mark.slow
    def test_tensorboard(self, on_disk, tmp_path):
        pytest.importorskip("tensorboard")
        gen_accel.lora.train(on_disk(log_with="tensorboard", stages=("9:1",)))
        assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))

    @pytest.mark.slow
    def test_the_last_expert_sees_low_noise(self, tmp_path):
        """Of two, each is trained at the noise levels that it serves."""
        seen = []

        class Watched(Objective):
            def forward(self, clean, noise, sigma, *more):
                seen.extend(sigma.tolist())
                return super().forward(clean, noise, sigma, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "Objective", Watched)
            for part in ("transformer", "transformer_2"):
                given = ft.config(tmp_path / part, part=part, stages=("9:6",))
                done = ft.train(given, boundary=0.6)
                assert read_recipe(done.folder).part == part
        assert min(seen[:6]) >= 0.6 >= max(seen[6:])


class TestRefusals:
    """All of it before the first step, and most before the weights are read."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rank": 0, "method": "radial", "settings": ()}, "leaves nothing to train"),
            ({"rank": 0, "train_processors": False}, "leaves nothing to train"),
            ({"targets": ()}, "targets is empty"),
            ({"stages": ()}, "stages is empty"),
            ({"stages": ("9",)}, "a stage is written frames:steps"),
            ({"stages": ("9:0",)}, "at least one frame and one step"),
            ({"stages": ("9:1:ntk",)}, "the rule of a stage must be one of"),
            ({"method": "raidal"}, "raidal"),
            ({"settings": ("critcal=1",)}, "did you mean 'critical'"),
            ({"kernel": "fast"}, "kernel"),
            ({"rank": -1}, "rank must be at least 0, got -1"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"learning_rate": 0.0}, "learning_rate must be above 0 and at most 1000, got 0.0"),
            (
                {"learning_rate": math.nan},
                "learning_rate must be above 0 and .*, got nan",
            ),
            ({"alpha": -1.0}, "alpha must be above 0"),
            ({"fps": math.inf}, "fps must be from 0.01 to 1000"),
            ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
            ({"caption_dropout": 1.1}, "caption_dropout must be from 0 to 1"),
            ({"ema_decay": 1.0}, "ema_decay must be at least 0"),
            ({"betas": (0.9, 1.0)}, "betas must be two shares"),
            ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
            ({"max_grad_norm": math.nan}, "max_grad_norm must be at least 0 and finite, got nan"),
            ({"seed": -1}, "seed must be from 0"),
            ({"trained_frames": 0}, "trained_frames must be at least 1"),
        ],
        ids=str,
    )
    def test_a_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            check_components(ft.config("unused", **fields))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"targets": ("attention", "to_x")}, "'to_x' is no linear layer in the blocks of Wan"),
            ({"part": "transformer_2"}, "has no transformer_2"),
            ({"stages": ("10:1",)}, "10"),
            ({"height": 40}, "40"),
            ({"init_lora": "nowhere"}, "no LoRA at nowhere"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_the_model(self, on_disk, fields, message):
        given = on_disk(**fields)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            model_of(given, wan.pipeline())

    def test_every_target_matches(self):
        model = wan.transformer()
        attention = target_modules(model, ("attention",))
        assert len(attention) == 8 * wan.LAYERS
        both = target_modules(model, ("attention", "feed_forward"))
        assert len(both) == 10 * wan.LAYERS
        assert target_modules(model, ("attn1.to_q",)) == [
            f"blocks.{i}.attn1.to_q" for i in range(wan.LAYERS)
        ]
        for target in ("to_out", "proj_out", "norm2", "q", ""):
            with pytest.raises(ValueError, match="no linear layer in the blocks"):
                target_modules(model, ("attention", target))

    @pytest.mark.slow
    def test_a_lora_of_another_model(self, on_disk, whole):
        pipe = wan.pipeline(transformer=wan.transformer(num_layers=3))
        with pytest.raises(ValueError, match="trained on another model"):
            model_of(on_disk(init_lora=str(whole / "lora")), pipe)

    def test_neither_data_nor_cache(self, on_disk):
        given = on_disk(data=None)
        with pytest.raises(ValueError, match=r"data is not given and .*cache holds no cache"):
            trainer.train(given)
        given = on_disk(data="nowhere")
        with pytest.raises(FileNotFoundError, match="data: there is nothing at nowhere"):
            trainer.train(given)

    def test_clips_that_are_too_short(self, on_disk, tmp_path):
        with pytest.raises(ValueError, match=r"no clip has 33 frames.*longest of .* has 17"):
            gen_accel.lora.train(on_disk(stages=("33:1",)))
        assert not (tmp_path / "run" / "lora").exists()
        with pytest.raises(
            ValueError, match=r"no clip is long enough for stage 33:1: 33 frames .* of 5 has 17"
        ):
            ft.train(ft.config(tmp_path / "b", stages=("9:1", "33:1")))

    def test_a_run_is_there_already(self, on_disk, whole):
        with pytest.raises(ValueError, match="holds a run of step-000008"):
            gen_accel.lora.train(on_disk(out=whole, model="nowhere"))
