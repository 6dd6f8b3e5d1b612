"""Both experts of a pipeline: one run after the other, and one folder of both LoRAs."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.runs import WEIGHTS, assert_same_lora, files, losses, state

import gen_accel
from gen_accel.attention_processors.attached.recipe import folders_of, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.io import file_sha256
from gen_accel.lora import checkpoint, dry_run, prepare, push, trainer
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.evaluate import sampling_on, steps_above
from gen_accel.lora.experts import NOISE, PARTS
from gen_accel.measure.video_io import read_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip

pytestmark = pytest.mark.usefixtures("one_thread")

BOUNDARY = 0.875
BOTH = {
    "part": "both",
    "stages": ("9:2", "17:2:position_interpolation"),
    "dense_steps": 1,
    "lora_dropout": 0.2,
    "gradient_accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 1,
    "ema_decay": 0.9,
    "checkpoint_every": 3,
}


def model_for(config, pipe=None):
    """The expert of a run, of tiny models or of a pipeline."""
    number = PARTS.index(config.part)
    made = wan.transformer(number) if pipe is None else getattr(pipe, config.part)
    return ft.model(pipe, transformer=made, boundary=BOUNDARY)


@pytest.fixture
def train(monkeypatch):
    """`gen_accel.lora.train` with tiny experts in the place of a folder."""

    def trained(config, *, resume=False, pipe=None, clips=None):
        def prepared(own, accelerator):
            return model_for(own, pipe and pipe()), clips or ft.Clips()

        with monkeypatch.context() as patch:
            patch.setattr(prepare, "prepare", prepared)
            patch.setattr(TrainConfig, "check", lambda *args, **options: None)
            return trainer.train(config, resume=resume)

    return trained


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "prepare", lambda own, _: (model_for(own), ft.Clips()))
        patch.setattr(TrainConfig, "check", lambda *args, **options: None)
        done = trainer.train(ft.config(out, **BOTH))
    return out, done


class TestTraining:
    @pytest.mark.slow
    def test_each_is_what_it_is_alone(self, both, tmp_path):
        """To the bit."""
        out, done = both
        assert done.folder == out / "lora"
        assert done.steps == len(done.losses) == 8
        for part, noise in NOISE.items():
            given = ft.config(tmp_path / part, **BOTH | {"part": part})
            alone = ft.train(given, model=model_for(given))
            assert_same_lora(out / noise / "lora", alone.folder)
            assert losses(out / noise) == alone.losses
            folder = out / "lora" / ("" if part == PARTS[0] else part)
            for name in (WEIGHTS, "processors.safetensors"):
                mine, theirs = load_file(folder / name), load_file(alone.folder / name)
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(x, mine[key]) for key, x in theirs.items())
            assert read_recipe(folder) == replace(read_recipe(alone.folder), parts=PARTS)

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize("part", PARTS)
    def test_resume(self, both, train, tmp_path, part):
        """In the first run, or in the second, whose first is then not run again."""
        out, _ = both
        copy = shutil.copytree(out, tmp_path / "copy")
        shutil.rmtree(copy / "lora")
        shutil.rmtree(copy / NOISE[part] / "lora")
        for path in checkpoint.found(copy / NOISE[part] / "checkpoints")[1:]:
            shutil.rmtree(path)
        if part == PARTS[0]:
            shutil.rmtree(copy / NOISE[PARTS[1]])
        done = train(ft.config(copy, **BOTH), resume=True)
        assert len(done.losses) == (1 if part == PARTS[1] else 5)
        assert_same_lora(copy / "lora", out / "lora")
        for noise in NOISE.values():
            assert state(copy / noise).state["sha256"] == state(out / noise).state["sha256"]

    def test_a_stop_in_the_first_ends_both(self, train, tmp_path):
        class Stopping(ft.Clips):
            def latents(self, index, frames):
                if not stopped:
                    stopped.append(1)
                    signal.raise_signal(signal.SIGTERM)
                return super().latents(index, frames)

        stopped = []
        done = train(ft.config(tmp_path / "run", **BOTH), clips=Stopping())
        assert (done.folder, done.steps) == (None, 1)
        assert not (tmp_path / "run" / NOISE[PARTS[1]]).exists()

    def test_a_run_is_there_already(self, both, train, tmp_path):
        copy = shutil.copytree(both[0], tmp_path / "copy")
        for noise in NOISE.values():  # also if only the second one's folder is there
            with pytest.raises(ValueError, match=f"{noise} holds a run of step-000004"):
                train(ft.config(copy, **BOTH))
            shutil.rmtree(copy / noise)

    @pytest.mark.slow
    def test_go_on_from_a_run_of_both(self, both, train, tmp_path):
        out, _ = both
        given = BOTH | {"stages": ("9:1",), "learning_rate": 1e-30, "ema_decay": 0.0}
        train(ft.config(tmp_path / "run", **given, init_lora=str(out / "lora")))
        for part in ("", "transformer_2"):
            places = tmp_path / "run", out
            ours, theirs = (load_file(place / "lora" / part / WEIGHTS) for place in places)
            for name, x in theirs.items():
                torch.testing.assert_close(ours[name], x, rtol=0, atol=1e-20)

    @pytest.mark.slow
    def test_each_is_taught_by_its_own(self, train, tmp_path):
        plain = {"part": "both", "stages": ("9:1",), "method": "radial"}
        plain |= {"settings": (), "dense_steps": 0}
        first = train(ft.config(tmp_path / "a", **plain))
        taught = plain | {"objective": "distill", "teacher_lora": str(first.folder)}
        train(ft.config(tmp_path / "b", **taught))
        for part in ("", "transformer_2"):
            recipe = read_recipe(tmp_path / "b" / "lora" / part)
            assert recipe.teacher == file_sha256(first.folder / part / WEIGHTS)

    @pytest.mark.slow
    def test_the_second_is_sampled_with_the_first(self, train, tmp_path, monkeypatch):
        """With its LoRA and its attention; the second's dense steps begin after its steps."""
        seen = []
        sampled = {"validate_every": 100, "validation_prompts": ("a cat",), "max_tokens": 16}
        sampled |= {"validation_steps": 4, "guidance_scale": 1.0, "dense_steps": 2}
        given = ft.config(tmp_path / "run", **BOTH | {"stages": ("9:2",)} | sampled)
        sample = trainer.Validation.__call__

        def noted(validation, done):
            pipe, part = validation.pipe, validation.config.part
            first = pipe.transformer
            is_attached = hasattr(first.blocks[0].attn1.processor, "owner")
            handle = getattr(pipe, part).blocks[0].attn1.processor.owner
            named = [*getattr(first, "peft_config", {})]
            seen.append((part, handle.schedule, is_attached, named))
            return sample(validation, done)

        monkeypatch.setattr(trainer.Validation, "__call__", noted)
        train(given, pipe=wan.two_stage)
        before = steps_above(wan.two_stage(), Clip(steps=4), BOUNDARY)
        assert 0 < before < 4
        high, low = Schedule(dense_steps=2), Schedule(dense_steps=max(0, 2 - before))
        assert [(part, one) for part, one, _, _ in seen] == [
            *[(PARTS[0], high)] * 2,
            *[(PARTS[1], low)] * 2,
        ]
        assert all(is_attached for _, _, is_attached, _ in seen)
        assert [len(named) for *_, named in seen] == [1] * 4
        assert (tmp_path / "run" / "low_noise/validation/step-000002/00.mp4").is_file()

    @pytest.mark.slow
    def test_a_dry_run(self):
        model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        size = {"height": 64, "width": 64, "stages": ("9:40", "17:40")}
        found = dry_run(ft.config("unused", part="both", model=model, **size))
        assert found.steps == len(found.losses) == 4


class TestUse:
    @pytest.fixture
    def pipe(self, both):
        loaded = wan.two_stage()
        loaded.load_lora_weights(both[0] / "lora")
        loaded.load_lora_weights(both[0] / "lora" / "transformer_2", load_into_transformer_2=True)
        return loaded

    def test_attached_they_are_what_was_trained(self, both, pipe):
        out, _ = both
        size = (5, *ft.LATENTS)
        handle = gen_accel.attach(pipe, from_lora=out / "lora")
        assert handle.schedule == Schedule(dense_steps=1)
        assert {name.partition(".")[0] for name in handle.branches} == {*PARTS}
        with torch.no_grad(), handle.scheduled(Schedule()):
            said = [wan.forward(getattr(pipe, part), *size) for part in PARTS]
        handle.detach()
        lone = [wan.transformer(i) for i in range(2)]
        for i, (part, folder) in enumerate(folders_of(out / "lora").items()):
            lone[i].load_lora_adapter(str(folder), prefix="transformer", weight_name=WEIGHTS)
            with gen_accel.attach(lone[i], from_lora=folder, schedule=Schedule()), torch.no_grad():
                assert torch.equal(wan.forward(lone[i], *size), said[i]), part
        assert not torch.equal(said[0], said[1])

    @pytest.mark.slow
    def test_generate_loads_both(self, both, tmp_path):
        wan.two_stage().save_pretrained(tmp_path / "model")
        generate(
            tmp_path / "model",
            ["a red square"],
            out=tmp_path / "a.mp4",
            from_lora=both[0] / "lora",
            frames=9,
            height=32,
            width=64,
            steps=2,
            max_tokens=8,
            dtype="float32",
            device="cpu",
        )
        assert read_video(tmp_path / "a.mp4").shape[0] == 9
        pipe = load(
            tmp_path / "model",
            Loading(dtype="float32", device="cpu", loras=(f"{both[0]}/lora:0.5",)),
        )
        assert pipe.get_list_adapters() == {part: ["lora_0"] for part in PARTS}
        scales = {
            part: {
                module.scaling["lora_0"]
                for module in getattr(pipe, part).modules()
                if hasattr(module, "scaling") and "lora_0" in module.scaling
            }
            for part in PARTS
        }
        assert scales == {part: {0.5} for part in PARTS}

    def test_a_lora_without_its_second_is_refused(self, both, tmp_path):
        folder = shutil.copytree(both[0] / "lora", tmp_path / "lora")
        shutil.rmtree(folder / "transformer_2")
        match = "was trained with transformer_2 in one run, whose LoRA is missing"
        with pytest.raises(FileNotFoundError, match=match):
            gen_accel.attach(wan.two_stage(), from_lora=folder)
        with pytest.raises(FileNotFoundError, match=match):
            generate(
                "x/y",
                ["a"],
                out=tmp_path / "a.mp4",
                from_lora=folder,
                frames=9,
                height=32,
                width=64,
            )

    def test_a_pipeline_of_one_expert_is_refused(self, both, tmp_path):
        with pytest.raises(ValueError, match="this WanPipeline has no transformer_2"):
            gen_accel.attach(wan.pipeline(), from_lora=both[0] / "lora")
        wan.pipeline().save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="has no transformer_2: give a pipeline of two"):
            generate(
                tmp_path / "model",
                ["a"],
                out=tmp_path / "a.mp4",
                from_lora=both[0] / "lora",
                frames=9,
                height=32,
                width=64,
            )

    def test_the_card_and_the_upload_are_of_both(self, both):
        folder = both[0] / "lora"
        card = (folder / "README.md").read_text()
        assert 'pipe.load_lora_weights("lora")\n' in card
        second = 'pipe.load_lora_weights("lora/transformer_2", load_into_transformer_2=True)'
        assert second in card
        assert "gen-accel generate" in card
        found = push(folder, "me/it", dry_run=True)
        own = {name for name in files(folder) if not name.endswith(".md")}
        assert {*found.files} - {"README.md"} == own
        assert found.left_out == ()


class TestRefusals:
    def test_fields(self):
        with pytest.raises(ValueError, match="part both trains a LoRA for each expert"):
            ft.config("unused", part="both", **ft.IMAGES)

    @pytest.mark.parametrize("part", ["transformer_2", "both"])
    def test_an_expert_that_is_missing(self, part, tmp_path):
        """By the index alone: no weights are there."""

        def refused(match, **index):
            (tmp_path / "model_index.json").write_text(json.dumps(index))
            with pytest.raises(ValueError, match=match):
                TrainConfig(part=part, model=str(tmp_path)).check()
            given = {"part": part, "model": str(tmp_path), "data": str(tmp_path)}
            with pytest.raises(ValueError, match=match):
                trainer.train(ft.config(tmp_path / "run", **given))

        one = ["diffusers", "WanTransformer3DModel"]
        (tmp_path / "transformer").mkdir()
        lacks = f"part {part} needs transformer_2, which .* lacks: give a pipeline of two"
        about = {"_class_name": "WanPipeline", "transformer": one, "boundary_ratio": 0.9}
        refused(lacks, **about)
        refused(lacks, **about, transformer_2=[None, None])
        refused(lacks, **about, transformer_2=one)  # its folder is not there
        (tmp_path / "transformer_2").mkdir()
        if part == "both":
            refused("part both needs a boundary_ratio", transformer=one, transformer_2=one)
        with pytest.raises(ValueError, match=f"part {part} needs a pipeline of two experts"):
            TrainConfig(part=part).check()

    def test_a_lora_of_one_to_go_on_from(self, both, tmp_path):
        lora = str(both[0] / "lora/transformer_2")
        config = TrainConfig(part="both", model="a/b", init_lora=lora)
        with pytest.raises(FileNotFoundError, match="has no folder transformer_2"):
            config.check()

    def test_encoders_come_for_a_video_and_the_trained_expert_is_there(self, monkeypatch):
        pipe, placed = wan.two_stage(), []
        monkeypatch.setattr(torch.nn.Module, "to", lambda one, device: placed.append(one))
        device = torch.device("cpu")
        with sampling_on(device, pipe, pipe.transformer_2, prompt=None, is_given=True):
            held = pipe.vae, pipe.text_encoder, pipe.transformer
            assert {*map(id, placed)} == {*map(id, held)}
