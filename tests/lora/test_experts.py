"""Both experts of a pipeline in one run: by turns, one on the device, in one folder."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.clips import footage
from support.runs import WEIGHTS, assert_same_lora, files, launch, metrics, state

import gen_accel
from gen_accel.attention_processors.attached.recipe import folders_of, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.cli import early
from gen_accel.files import file_sha256
from gen_accel.lora import checkpoint, dry_run, pair, push, trainer, training_run
from gen_accel.lora.by_turns import Experts
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.experts import PARTS, Turns, config_of, resident
from gen_accel.lora.prepare import model_of
from gen_accel.lora.report import REPORT
from gen_accel.lora.validate import steps_above
from gen_accel.lora.visits import sampling_on
from gen_accel.measure.video_io import read_video, write_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip

pytestmark = pytest.mark.usefixtures("one_thread")

BOUNDARY = 0.875
EACH = {
    "lora_dropout": 0.2,
    "gradient_accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 1,
    "ema_decay": 0.9,
}
STAGES = ("9:4", "17:4:position_interpolation")
BOTH = EACH | {"part": "both", "stages": STAGES, "switch_every": 2, "checkpoint_every": 3}


def model(pipe=None, **fields):
    """A model of two experts."""
    if pipe is None:
        pair = wan.transformer(0), wan.transformer(1)
    else:
        pair = pipe.transformer, pipe.transformer_2
    given = {"transformer_2": pair[1], "boundary": BOUNDARY} | fields
    return ft.model(pipe, transformer=pair[0], **given)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "run"
    made = model()
    ft.train(ft.config(out, loss_every=4, **BOTH), model=made)
    return out, made


class TestTurns:
    def parts(self, steps, **fields):
        turns = Turns(ft.config("unused", part="both", stages=("9:400",), **fields))
        return [turns.at(step) for step in range(steps)]

    def test_they_alternate(self):
        assert self.parts(7, switch_every=2) == [
            *[("transformer", 0), ("transformer", 1), ("transformer_2", 0), ("transformer_2", 1)],
            *[("transformer", 2), ("transformer", 3), ("transformer_2", 2)],
        ]

    @pytest.mark.parametrize(("every", "share"), [(1, 0.5), (3, 0.2), (2, 0.35), (5, 0.8)])
    def test_shares_and_own_steps(self, every, share):
        config = ft.config(
            "unused", part="both", stages=("9:400",), switch_every=every, high_noise_steps=share
        )
        turns, counts = Turns(config), dict.fromkeys(PARTS, 0)
        for step in range(400):
            part, own = turns.at(step)
            assert own == counts[part] == turns.done(part, step)
            assert turns.step_of(part, own) == step
            counts[part] += 1
        assert abs(counts["transformer"] - 400 * share) <= every
        assert [config_of(config, part).total_steps for part in PARTS] == [*counts.values()]

    def test_what_is_resident(self):
        given = ft.config("unused", part="both", switch_every=1)
        assert resident(given) == (1, 1)
        assert resident(ft.config("unused", part="transformer_2")) == (1, 0)


class TestTraining:
    def test_each_is_what_it_is_alone(self, both, tmp_path):
        """To the bit, with the same number of steps."""
        out, _ = both
        for i, part in enumerate(PARTS):
            stages = ("9:2", "17:2:position_interpolation")
            given = ft.config(tmp_path / part, part=part, stages=stages, **EACH)
            alone = ft.train(
                given, model=ft.model(transformer=wan.transformer(i), boundary=BOUNDARY)
            )
            folder = out / "lora" / ("" if i == 0 else part)
            for name in (WEIGHTS, "processors.safetensors"):
                mine, theirs = load_file(folder / name), load_file(alone.folder / name)
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(x, mine[key]) for key, x in theirs.items())
            steps = [line for line in metrics(out) if "loss" in line]
            assert alone.losses == [line["loss"] for line in steps if line["part"] == part]
            recipe = read_recipe(folder)
            assert recipe == replace(read_recipe(alone.folder), parts=PARTS)

    def test_the_idle_one_is_off_the_device(self, both, tmp_path, monkeypatch):
        """Its tensors are taken away until it is brought back, and no result changes."""
        out, _ = both
        away, moves, ends = {}, [], []

        def tensors(half):
            found = [*half.objective.parameters(), *half.objective.buffers()]
            if half.state.ema is not None:
                found += half.state.ema.shadow_params
            return found + [
                x for held in half.state.optimizer.state.values() for x in held.values() if x.ndim
            ]

        def move(experts, part, device):
            half = experts.halves[part]
            if part not in away:
                away[part] = [(x, x.data) for x in tensors(half)]
                for x, _ in away[part]:
                    x.data = torch.empty(0)
                half.state.parameters()[0].grad = None
            else:
                assert [p for p in PARTS if p not in away] == [], "the other is off first"
                for x, value in away.pop(part):
                    x.data = value
            moves.append((part, part in away))

        monkeypatch.setattr(Experts, "move", move)
        begin = training_run.Run._take

        def take(run, step):
            ends.append([p for p in PARTS if p in away])
            return begin(run, step)

        monkeypatch.setattr(training_run.Run, "_take", take)
        given = ft.config(tmp_path / "run", **BOTH | {"checkpoint_every": 100})
        save = training_run.Run._save
        monkeypatch.setattr(training_run.Run, "_save", lambda run, done: restored(run, save, done))
        monkeypatch.setattr(pair.Pair, "_write", lambda run, folder: folder)

        def restored(run, save, done):
            for held in away.values():
                for x, value in held:
                    x.data = value
            save(run, done)

        ft.train(given, model=model())
        assert ends == [[part] for part in (PARTS[::-1][i // 2 % 2] for i in range(8))]
        # Both go off as they are made, then each turn brings one and sends the other off.
        assert moves[:3] == [(PARTS[0], True), (PARTS[1], True), (PARTS[0], False)]
        assert len(moves) == 2 + 1 + 2 * 3
        ours, theirs = state(tmp_path / "run").tensors, state(out).tensors
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())

    def test_all_of_an_expert_moves(self, tmp_path):
        """Parameters, buffers, average and optimizer."""
        given = ft.config(tmp_path / "run", **BOTH)
        run = trainer.run_of(given, trainer.accelerator_for(given), model(), ft.Clips())
        run._log_step = lambda *args: None
        run._step(0)
        half = run.experts.halves["transformer"]
        assert half.state.optimizer.state
        run.experts.move("transformer", torch.device("meta"))
        held = [x for one in half.state.optimizer.state.values() for x in one.values() if x.ndim]
        found = [*half.objective.parameters(), *half.objective.buffers()]
        found += [*half.state.ema.shadow_params, *held]
        assert {x.device.type for x in found} == {"meta"}
        other = run.experts.halves["transformer_2"]
        assert {x.device.type for x in other.objective.parameters()} == {"cpu"}

    def test_resume(self, both, tmp_path):
        out, _ = both
        copy = shutil.copytree(out, tmp_path / "copy")
        shutil.rmtree(copy / "lora")
        for path in checkpoint.found(copy / training_run.CHECKPOINTS)[1:]:
            shutil.rmtree(path)
        assert state(copy).state["step"] == 6
        ft.train(ft.config(copy, loss_every=4, **BOTH), model=model(), resume=True)
        a, b = state(copy), state(out)
        assert a.state["sha256"] == b.state["sha256"]
        assert a.state["experts"] == b.state["experts"]
        kinds = {name.split("/")[1] for name in a.tensors}
        assert kinds == {"model", "ema", "optimizer"}
        assert_same_lora(copy / "lora", out / "lora")
        at = {(x.get("step"), x.get("after"), x.get("part")): x for x in metrics(out)}
        for line in metrics(copy):
            before = at[line.get("step"), line.get("after"), line.get("part")]
            assert before.get("loss", before.get("fixed_loss")) == line.get(
                "loss", line.get("fixed_loss")
            )

    def test_more_steps_and_other_turns(self, both, tmp_path):
        out, _ = both
        copy = shutil.copytree(out, tmp_path / "copy")
        with pytest.raises(ValueError, match="differs in switch_every: 2, now 1"):
            ft.train(ft.config(copy, **BOTH | {"switch_every": 1}), model=model(), resume=True)
        longer = BOTH | {"stages": (STAGES[0], STAGES[1].replace("4", "8"))}
        with pytest.raises(ValueError, match="the learning rate of schedule cosine"):
            ft.train(ft.config(copy, **longer), model=model(), resume=True)

    def test_every_checkpoint_holds_both(self, both):
        out, _ = both
        newest = state(out).path / "lora"
        assert files(newest) == files(out / "lora")
        assert f"transformer_2/{WEIGHTS}" in files(newest)

    def test_a_broken_loss_names_the_step_and_the_expert(self, tmp_path):
        broken = wan.transformer(1)
        torch.nn.init.constant_(broken.proj_out.weight, torch.nan)
        with pytest.raises(ValueError, match="the loss of step 2, of transformer_2, is nan"):
            ft.train(ft.config(tmp_path / "run", **BOTH), model=model(transformer_2=broken))

    def test_losses_and_the_page_show_both(self, both):
        out, _ = both
        fixed = [line for line in metrics(out) if "fixed_loss" in line]
        assert [(x["after"], x["part"]) for x in fixed] == [
            (after, part) for after in (0, 4, 8) for part in PARTS
        ]
        low, high = ([float(x) for x in one["levels"]] for one in (fixed[1], fixed[0]))
        assert max(low) <= BOUNDARY <= min(high)
        page = (out / REPORT).read_text()
        for part in PARTS:
            assert f"Loss of {part}" in page
            assert f"Loss at fixed noise of {part} by noise level" in page

    def test_go_on_from_a_run_of_both(self, both, tmp_path):
        out, _ = both
        given = BOTH | {"stages": ("9:2",), "switch_every": 1, "learning_rate": 1e-30}
        given |= {"init_lora": str(out / "lora"), "ema_decay": 0.0}
        ft.train(ft.config(tmp_path / "run", **given), model=model())
        for part in ("", "transformer_2"):
            places = tmp_path / "run", out
            ours, theirs = (load_file(place / "lora" / part / WEIGHTS) for place in places)
            for name, x in theirs.items():
                torch.testing.assert_close(ours[name], x, rtol=0, atol=1e-20)

    def test_each_is_taught_by_its_own(self, tmp_path):
        plain = {"part": "both", "stages": ("9:2",), "switch_every": 1, "method": "radial"}
        plain |= {"settings": (), "dense_steps": 0}
        first = ft.train(ft.config(tmp_path / "a", **plain), model=model())
        taught = plain | {"objective": "distill", "teacher_lora": str(first.folder)}
        ft.train(ft.config(tmp_path / "b", **taught), model=model())
        for part in ("", "transformer_2"):
            recipe = read_recipe(tmp_path / "b" / "lora" / part)
            assert recipe.teacher == file_sha256(first.folder / part / WEIGHTS)
        assert len(set(state(tmp_path / "b").state["teacher"].split())) == 2

    def test_from_a_first_frame(self, tmp_path):
        """As Wan 2.2's I2V A14B."""
        made = [wan.transformer(i, in_channels=2 * wan.CHANNELS + 4) for i in range(2)]
        pipe = wan.pipeline(
            WanImageToVideoPipeline,
            transformer=made[0],
            transformer_2=made[1],
            boundary_ratio=0.9,
        )
        folder = tmp_path / "clips"
        path = write_video(footage(9, 32, 64), folder / "a.mp4", fps=16)
        path.with_suffix(".txt").write_text("a red square")
        cache(pipe, folder, tmp_path / "cache", frames=(9,), sizes=[(32, 64)], max_tokens=8)
        given = ft.config(tmp_path / "run", part="both", stages=("9:2",), switch_every=1)
        found = model_of(given, pipe)
        assert (found.condition, found.boundary) == ("first_frame", 0.9)
        done = ft.train(given, LatentCache(tmp_path / "cache"), model=found._replace(pipe=None))
        for folder in folders_of(done.folder).values():
            assert read_recipe(folder).condition == "first_frame"
            weights = load_file(folder / WEIGHTS)
            assert any(x.any() for name, x in weights.items() if "lora_B" in name)

    @pytest.mark.slow
    def test_two_processes_are_as_one(self, tmp_path):
        """To rounding: both experts, two clips a step."""
        fields = BOTH | {"lora_dropout": 0.0, "gradient_accumulation": 1}
        alone = ft.config(tmp_path / "one", **fields | {"batch_size": 2})
        ft.train(alone, model=model())
        (tmp_path / "two").mkdir()
        launch({"out": str(tmp_path / "two"), "fields": fields, "experts": 2}, launcher=False)
        for part in ("", "transformer_2"):
            ours, theirs = (
                load_file(tmp_path / one / "lora" / part / WEIGHTS) for one in ("one", "two")
            )
            for name, x in ours.items():
                torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-5)

    def test_a_dry_run(self):
        found = dry_run(
            ft.config(
                "unused",
                part="both",
                model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
                height=64,
                width=64,
                stages=("9:40", "17:40"),
            )
        )
        assert found.steps == 4


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
        assert handle.schedule == Schedule(dense_steps=2)
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

    def test_an_older_reader_takes_the_first(self, both):
        recipe = read_recipe(both[0] / "lora")
        assert (recipe.part, recipe.others) == ("transformer", ("transformer_2",))
        assert read_recipe(both[0] / "lora" / "transformer_2").others == ()

    def test_generate_loads_both(self, both, tmp_path):
        wan.two_stage().save_pretrained(tmp_path / "model")
        generate(
            tmp_path / "model",
            ["a red square"],
            out=tmp_path / "a.mp4",
            from_lora=both[0] / "lora",
            clip=Clip(9, 32, 64, steps=2, max_tokens=8),
            loading=Loading("float32", "cpu"),
        )
        assert read_video(tmp_path / "a.mp4").shape[0] == 9
        pipe = load(tmp_path / "model", Loading("float32", "cpu", loras=(f"{both[0]}/lora:0.5",)))
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
            generate("x/y", ["a"], out=tmp_path / "a.mp4", from_lora=folder, clip=Clip(9, 32, 64))

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
                clip=Clip(9, 32, 64),
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

    def test_validation_brings_each_expert(self, tmp_path):
        """The second begins after the steps of the first, which are no longer dense."""
        pipe = wan.two_stage()
        sampled = {"validate_every": 100, "validation_prompts": ("a cat",), "max_tokens": 16}
        sampled |= {"validation_steps": 4, "guidance_scale": 1.0}
        given = ft.config(tmp_path / "run", **BOTH | {"stages": ("9:4",)}, **sampled)
        made = model(pipe)
        run = trainer.run_of(given, trainer.accelerator_for(given), made, ft.Clips())
        seen = []
        for part in PARTS:
            getattr(pipe, part).register_forward_hook(
                lambda *args, part=part: seen.append((part, run.experts.active))
            )
        before = steps_above(pipe, 4, BOUNDARY)
        assert 0 < before < 4
        schedules = [half._schedule_in_pipe() for half in run.halves]
        assert schedules == [Schedule(dense_steps=2), Schedule(dense_steps=max(0, 2 - before))]
        run.go(resume=False)
        sampling = [parts for parts in seen if parts is not None]
        assert all(called == active for called, active in sampling)
        first = [called for called, _ in seen[:4]]
        assert first == ["transformer"] * before + ["transformer_2"] * (4 - before)
        assert (tmp_path / "run" / "validation" / "step-000004" / "00.mp4").is_file()


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"switch_every": 0}, "switch_every must be at least 1, got 0"),
            ({"high_noise_steps": 1.0}, "high_noise_steps must be a share between 0 and 1"),
            ({"switch_every": 10}, "stage 9:4 leaves transformer_2 no step"),
            (
                {"part": "transformer"},
                "switch_every is for part both, got 2 with part",
            ),
            ({"base": "nf4"}, "which base nf4 does not go with: take fp8"),
            (
                {"blocks_to_swap": 1, "gradient_checkpointing": "on"},
                "blocks_to_swap 1 does not go with part both",
            ),
            ({"context_parallel": 2}, "context_parallel 2 does not go with part both"),
            (
                {"objective": "distill", "teacher_guidance": 3.0},
                "leave it out, as a pipeline of two transformers guides both or none",
            ),
        ],
    )
    def test_fields(self, fields, match):
        with pytest.raises(ValueError, match=match):
            ft.config("unused", **BOTH | fields)

    def test_an_image_prompt(self):
        with pytest.raises(ValueError, match="part both trains a LoRA for each expert"):
            ft.config("unused", part="both", switch_every=1, **ft.IMAGES)

    @pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
    def test_what_places_the_model_itself(self, kind, tmp_path, monkeypatch):
        given = ft.config(tmp_path, **BOTH)
        kinds = type(trainer.accelerator_for(given).distributed_type)
        monkeypatch.setattr(trainer.Accelerator, "distributed_type", kinds[kind])
        with pytest.raises(ValueError, match=f"part both moves the experts .* {kind} places"):
            trainer.accelerator_for(given)

    @pytest.mark.parametrize("part", ["transformer_2", "both"])
    def test_an_expert_that_is_missing(self, part, tmp_path):
        """By the index alone: no weights are there."""

        def refused(match, **index):
            (tmp_path / "model_index.json").write_text(json.dumps(index))
            with pytest.raises(ValueError, match=match):
                early.check_config({"part": part, "model": str(tmp_path)})
            given = {"part": part, "model": str(tmp_path), "data": str(tmp_path)}
            given |= {"switch_every": 1} if part == "both" else {}
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
            early.check_config({"part": part})

    def test_a_lora_of_one_to_go_on_from(self, both, tmp_path):
        with pytest.raises(FileNotFoundError, match="has no folder transformer_2"):
            early.check_config(
                {"part": "both", "model": "a/b", "init_lora": str(both[0] / "lora/transformer_2")}
            )

    def test_a_pipeline_is_checked_for_both(self, tmp_path):
        given = ft.config(tmp_path, **BOTH)
        found = model_of(given, wan.two_stage())
        assert found.boundary == BOUNDARY
        assert found.transformer_2 is not None
        pipe = wan.two_stage()
        pipe.transformer_2 = None
        with pytest.raises(ValueError, match="has no transformer_2"):
            model_of(given, pipe)

    def test_encoders_come_for_a_video_and_experts_are_left_to_the_training(self, monkeypatch):
        pipe, placed = wan.two_stage(), []
        monkeypatch.setattr(torch.nn.Module, "to", lambda one, device: placed.append(one))
        experts = [getattr(pipe, part) for part in PARTS]
        with sampling_on(torch.device("cpu"), pipe, experts, prompt=None, is_given=True):
            assert {*map(id, placed)} == {id(pipe.vae), id(pipe.text_encoder)}
