"""Losses of the same clips at fixed noise while a LoRA trains, and the clips that are held out."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from support import finetuning as ft
from support.forked import Forked
from support.paths import environment
from support.runs import launch, state

from gen_accel.lora import TrainConfig, trainer
from gen_accel.lora.batches import held_out, sigmas_of
from gen_accel.lora.evaluate import CLIPS, LEVELS, evaluating, noise_levels
from gen_accel.lora.report import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

MEASURED = ft.FULL | {"loss_every": 3}


def fixed(out):
    return read_metrics(out / trainer.METRICS)[1]


def values(out):
    return [{k: x for k, x in one.items() if k != "seconds"} for one in fixed(out)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "run"
    ft.train(ft.config(out, **MEASURED))
    return out


def named(*names):
    """A cache of clips with these names, of which two may have the same bytes."""
    about = {"is_picture": None}
    keys = [name.removeprefix("copy of ") for name in names]
    entries = [
        SimpleNamespace(name=name, latent_key=key, **about)
        for name, key in zip(names, keys, strict=True)
    ]
    return SimpleNamespace(entries=entries)


def test_prompts_are_held_out_each_by_itself():
    entries = [
        SimpleNamespace(name=f"{i // 2}", latent_key=None, is_picture=None) for i in range(16)
    ]
    held = held_out(TrainConfig(held_out=2, loss_every=1), SimpleNamespace(entries=entries))
    assert len(held) == 4
    assert {i ^ 1 for i in held} == held, "a prompt in all of its sizes"


class TestFixedLoss:
    @pytest.mark.slow
    def test_the_training_is_the_same_without(self, measured, whole):
        """With dropout, the average of the weights, accumulation and a rule, to the bit."""
        a, b = state(measured), state(whole)
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())
        steps, again = (read_metrics(out / trainer.METRICS)[0] for out in (measured, whole))
        assert [one["loss"] for one in steps] == [one["loss"] for one in again]

    def test_what_is_written(self, measured):
        found = fixed(measured)
        assert [one["after"] for one in found] == [0, 3, 6, 8]
        assert {one["clips"] for one in found} == {5}
        assert {one["frames"] for one in found} == {17}
        assert not any(one["held_out"] for one in found)
        for one in found:
            assert len(one["levels"]) == LEVELS
            assert one["fixed_loss"] == pytest.approx(sum(one["levels"].values()) / LEVELS)
        assert found[-1]["fixed_loss"] < found[0]["fixed_loss"]

    @pytest.mark.slow
    def test_it_depends_on_the_model_and_the_clips_alone(self, measured, tmp_path):
        """At step 0, where all models are the same, whatever the training is like."""
        other = {"learning_rate": 0.5, "batch_size": 3, "lora_dropout": 0.0, "ema_decay": 0.0}
        ft.train(ft.config(tmp_path, **(MEASURED | other | {"stages": ("17:1",)})))
        rule = {"stages": ("17:1:position_interpolation",)}
        ft.train(ft.config(tmp_path / "rule", **(MEASURED | other | rule)))
        assert values(tmp_path / "rule")[0] == values(measured)[0]
        # Other positions are another model.
        assert values(tmp_path)[0]["fixed_loss"] != values(measured)[0]["fixed_loss"]

    @pytest.mark.slow
    def test_the_average_of_the_weights_is_measured(self, tmp_path):
        plain = {"stages": ("9:3",), "loss_every": 3}
        ft.train(ft.config(tmp_path / "a", **plain))
        ft.train(ft.config(tmp_path / "b", **plain, ema_decay=0.999))
        without, averaged = values(tmp_path / "a"), values(tmp_path / "b")
        assert without[0] == averaged[0]
        start = averaged[0]["fixed_loss"]
        moved = [abs(one[-1]["fixed_loss"] - start) for one in (without, averaged)]
        assert 0 < moved[1] < 0.9 * moved[0]

    @pytest.mark.slow
    def test_a_resumed_run_writes_the_same_lines(self, measured, tmp_path):
        """Stopped after the checkpoint and before the loss that is due there."""
        out = tmp_path / "run"

        class Stopping(ft.Clips):
            def latents(self, index, frames):
                found = super().latents(index, frames)
                steps = read_metrics(out / trainer.METRICS)[0]
                if len(steps) == 5 and going:
                    going.clear()
                    run.stopping = True
                return found

        going = [True]
        given = ft.config(out, **MEASURED)
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), Stopping())
        assert run.train(resume=False).steps == 6
        assert [one["after"] for one in fixed(out)] == [0, 3]
        ft.train(given, resume=True)
        assert values(out) == values(measured)
        lines = [json.loads(line) for line in (out / trainer.METRICS).read_text().splitlines()]
        before = (measured / trainer.METRICS).read_text().splitlines()
        kinds = [[key in line for key in ("step", "after")] for line in lines]
        assert kinds == [[key in json.loads(line) for key in ("step", "after")] for line in before]

    @pytest.mark.slow
    @pytest.mark.parametrize("objective", ["distill", "distill_attention"])
    def test_of_an_image_prompt(self, tmp_path, objective):
        about = {**ft.IMAGES, "objective": objective, "stages": ("9:2",), "held_out": 2}
        ft.train(ft.config(tmp_path, **about, loss_every=1))
        found = fixed(tmp_path)
        assert [one["after"] for one in found] == [0, 1, 2]
        assert len({one["fixed_loss"] for one in found}) == 3
        assert all(math.isfinite(one["fixed_loss"]) for one in found)

    @pytest.mark.slow
    def test_two_processes_give_the_figures_of_one(self, tmp_path):
        about = {"stages": ["9:2"], "loss_every": 1, "held_out": 3}
        launch({"out": str(tmp_path / "two"), "fields": about}, launcher=False)
        # In a process of its own too: what ran before in this one may change a sum's last bit.
        job = {"out": str(tmp_path / "one"), "fields": about | {"batch_size": 2}}
        child = Forked("support.finetuning", [json.dumps([job])], environment(OMP_NUM_THREADS="1"))
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        one, two = values(tmp_path / "one"), values(tmp_path / "two")
        assert one[0] == two[0]  # three clips at four levels: nothing is left over
        assert one[-1]["fixed_loss"] == pytest.approx(two[-1]["fixed_loss"], rel=1e-5)
        assert one[0]["held_out"]

    def test_modules_keep_their_modes(self):
        module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
        module[0].eval()
        with evaluating(module):
            assert not any(one.training for one in module.modules())
        assert [one.training for one in module.modules()] == [True, False, True]


class TestNoiseLevels:
    def test_quantiles_of_what_trains(self):
        model = ft.model(shift=1.0)
        flat = TrainConfig(timestep_sampling="uniform")
        for level, wanted in zip(noise_levels(flat, model), (1, 3, 5, 7), strict=True):
            assert level == pytest.approx(wanted / 8, abs=0.05)
        pushed = noise_levels(flat, model._replace(shift=10.0))
        assert pushed == pytest.approx([10 * x / (8 + 9 * x) for x in (1, 3, 5, 7)], abs=0.05)

    def test_of_an_expert(self):
        model = ft.model(boundary=0.9)
        for part in ("transformer", "transformer_2"):
            given = TrainConfig(part=part)
            low, high = sigmas_of(given, model)
            assert all(low <= level <= high for level in noise_levels(given, model))


class TestHeldOut:
    NAMES = tuple(f"{i}.mp4" for i in range(40))

    def test_a_number(self):
        chosen = held_out(TrainConfig(held_out=5, loss_every=1), named(*self.NAMES))
        assert len(chosen) == 5
        backwards = held_out(TrainConfig(held_out=5, loss_every=1), named(*self.NAMES[::-1]))
        assert {39 - i for i in backwards} == chosen

    def test_a_share_stays_when_clips_are_added(self):
        given = TrainConfig(held_out=0.2, loss_every=1)
        few, more = held_out(given, named(*self.NAMES[:20])), held_out(given, named(*self.NAMES))
        assert few == {i for i in more if i < 20}
        assert 0 < len(few) < len(more) < 20
        assert len(held_out(TrainConfig(held_out=1e-9, loss_every=1), named(*self.NAMES))) == 1

    def test_no_copy_of_one_trains(self):
        [one] = held_out(TrainConfig(held_out=1, loss_every=1), named(*self.NAMES))
        first = self.NAMES[one]
        cache = named(*self.NAMES, f"copy of {first}")
        chosen = held_out(TrainConfig(held_out=1, loss_every=1), cache)
        assert {cache.entries[i].latent_key for i in chosen} == {first}
        assert len(chosen) == 2

    @pytest.mark.slow
    def test_none_of_them_trains(self, tmp_path):
        given = ft.config(tmp_path, stages=("9:8", "17:8"), held_out=2, loss_every=8)
        run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
        trains = {clip for stage in run.plans for clips in stage for clip in clips}
        held = held_out(given, ft.Clips())
        assert trains == set(range(5)) - held
        run.train(resume=False)
        assert {one["clips"] for one in fixed(tmp_path)} == {2}
        assert all(one["held_out"] for one in fixed(tmp_path))

    @pytest.mark.slow
    def test_training_clips_are_measured_where_none_is(self, tmp_path):
        clips = ft.Clips((ft.LATENTS,) * 20)
        ft.train(ft.config(tmp_path, stages=("9:1",), loss_every=1), clips)
        assert fixed(tmp_path)[0]["clips"] == CLIPS

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"held_out": -1}, "held_out must be at least 0, got -1"),
            ({"held_out": 1.5}, "held_out must be a whole number of clips, or a share"),
            ({"held_out": math.inf}, "held_out must be at least 0 and finite, got inf"),
            (
                {"held_out": 2, "loss_every": 0},
                "held_out 2 keeps clips from training .* give loss",
            ),
            ({"loss_every": -1}, "loss_every must be at least 0, got -1"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**({"loss_every": 1} | fields))

    def test_none_is_left_to_train(self, tmp_path):
        with pytest.raises(ValueError, match="held_out 5 leaves no clip for stage 9:4: lower it"):
            ft.train(ft.config(tmp_path, held_out=5, loss_every=1))
        assert not (tmp_path / trainer.METRICS).exists()
