"""Training an image prompt: what is cached, drawn and trained, what it leaves, what is refused."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from demo_model import clips
from PIL import Image
from support import finetuning as ft
from support import hunyuan, wan
from support.clips import SIZE, footage, read_clip, refuse
from support.finetuning import IMAGES as RADIAL
from support.finetuning import IMAGES_FULL as FULL
from support.finetuning import NO_DROPOUT
from support.paths import ROOT
from support.runs import assert_same_run, files, metadata, state

import gen_accel
from gen_accel.attention_processors.families import family_named
from gen_accel.demo import world
from gen_accel.lora import TrainConfig, dry_run, print_config, read_config, trainer
from gen_accel.lora.batches import draw
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.inputs import ImageCoder
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.prepare import check_cache, model_of, prepare
from gen_accel.measure.video_io import write_video
from gen_accel.pipelines.image_prompt import load_image_prompt
from gen_accel.pipelines.image_prompt.formats import WEIGHTS, read_adapter

CONFIGS = sorted((ROOT / "configs" / "image_prompt").glob("*.yaml"))
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def begun(given, clips=None, **options):
    """A training before its first step."""
    made = ft.model(**options)
    accelerator = trainer.accelerator_for(given)
    return trainer.Trainer(given, accelerator, made, clips or ft.Clips())


@pytest.fixture
def folder(tmp_path):
    """Three clips of 9, 13 and 9 frames: with a PNG, with a JPEG, without an image."""
    data = tmp_path / "data"
    for i, (name, frames) in enumerate((("a", 9), ("b", 13), ("c", 9))):
        path = write_video(footage(frames, seed=i), data / f"{name}.mp4", fps=24)
        path.with_suffix(".txt").write_text("something moves left")
    noise("a").save(data / "a.png")
    noise("b").save(data / "b.jpg", quality=95)
    return data


def noise(seed, mode="RGB", size=(40, 24)):
    drawn = np.random.default_rng([*seed.encode()]).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(drawn.astype(np.uint8)).convert(mode)


@pytest.fixture
def build(folder, tmp_path):
    def run(**options):
        data = options.pop("data", folder)
        given = {"frames": [9], "sizes": [SIZE], "max_tokens": 8, "device": "cpu"}
        given["images"] = ImageCoder("pixels", size=32)
        return cache(wan.pipeline(), data, tmp_path / "cache", **(given | options))

    return run


def shown(image, size=32):
    """What the small encoder sees of an image."""
    small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


class TestCache:
    def test_the_image_beside_the_clip_or_its_middle_frame(self, build, folder, tmp_path):
        report = build()
        assert (report.encoded, report.images, report.broken) == (3, 3, {})
        assert "3 images encoded" in str(report)
        found = LatentCache(tmp_path / "cache")
        assert torch.equal(found.image(0), shown(noise("a")))
        assert torch.equal(found.image(1), shown(Image.open(folder / "b.jpg")))
        middle = read_clip(folder / "c.mp4", frames=9, size=SIZE)[4]
        assert torch.equal(found.image(2), shown(Image.fromarray(middle)))
        assert found.no_image.shape == (3, 32, 32)
        assert found.no_image.abs().max() < 0.01
        found.verify()

    def test_a_changed_image_makes_its_own_new(self, build, folder, tmp_path, monkeypatch):
        build()
        before = LatentCache(tmp_path / "cache")
        noise("other").save(folder / "a.png")
        monkeypatch.setattr(family_named("wan"), "encode_video", refuse)
        monkeypatch.setattr(family_named("wan"), "encode_prompt", refuse)
        report = build()
        assert (report.encoded, report.kept, report.texts, report.images) == (0, 3, 0, 1)
        after = LatentCache(tmp_path / "cache")
        assert torch.equal(after.image(0), shown(noise("other")))
        assert after.entries[1:] == before.entries[1:]
        assert after.digest != before.digest
        assert build().images == 0

    def test_another_encoder_makes_the_images_new(self, build, tmp_path, monkeypatch):
        build()
        monkeypatch.setattr(family_named("wan"), "encode_video", refuse)
        report = build(images=ImageCoder("pixels", size=16))
        assert (report.encoded, report.images) == (0, 3)
        assert LatentCache(tmp_path / "cache").image(0).shape == (3, 16, 16)

    def test_features_of_an_image_encoder(self, build, folder, tmp_path):
        pipe = wan.PIPELINES["image with encoder"]()
        vision = pipe.image_encoder
        vision.save_pretrained(tmp_path / "clip")
        pipe.image_processor.save_pretrained(tmp_path / "clip")
        build(images=ImageCoder("plus", source=str(tmp_path / "clip")), store="float32")
        found = LatentCache(tmp_path / "cache")
        pixels = pipe.image_processor(noise("a"), return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = vision(pixels, output_hidden_states=True).hidden_states[-2][0]
            zeros = torch.zeros_like(pixels)
            black = vision(zeros, output_hidden_states=True).hidden_states[-2][0]
        torch.testing.assert_close(found.image(0), expected)
        torch.testing.assert_close(found.no_image, black)

    def test_without_images_nothing_is_different(self, build, folder, tmp_path):
        report = build(images=None)
        assert report.images is None
        assert "images encoded" not in str(report)
        with_files = LatentCache(tmp_path / "cache").digest
        shutil.rmtree(tmp_path / "cache")
        for path in (folder / "a.png", folder / "b.jpg"):
            path.unlink()
        build(images=None)
        found = LatentCache(tmp_path / "cache")
        assert found.digest == with_files
        assert all(entry.image_key is None for entry in found.entries)
        with pytest.raises(ValueError, match="holds no images: cache again"):
            found.image(0)

    @pytest.mark.parametrize("damage", ["text", "cut", "16 bits"])
    def test_broken_images_are_left_out_by_name(self, build, folder, tmp_path, damage):
        path = folder / "a.png"
        match damage:
            case "text":
                path.write_bytes(b"no image")
            case "cut":
                path.write_bytes(path.read_bytes()[:-900])
            case "16 bits":
                Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
        report = build()
        assert list(report.broken) == ["a.mp4"]
        assert "its image cannot be read" in report.broken["a.mp4"]
        assert [e.name for e in LatentCache(tmp_path / "cache").entries] == ["b.mp4", "c.mp4"]
        with pytest.raises(OSError, match=r"a.mp4 is broken: its image cannot be read"):
            build(on_broken="stop")

    def test_a_manifest_names_them(self, build, folder, tmp_path):
        noise("m").save(folder / "m.webp", lossless=True)
        manifest = folder / "clips.csv"
        manifest.write_text("video,caption,image\na.mp4,x,m.webp\nb.mp4,y,\n")
        build(data=manifest)
        found = LatentCache(tmp_path / "cache")
        assert torch.equal(found.image(0), shown(noise("m")))
        assert torch.equal(found.image(1), shown(Image.open(folder / "b.jpg")))
        manifest.write_text("video,caption,image\na.mp4,x,none.png\n")
        with pytest.raises(FileNotFoundError, match=r"1 images of .* are not there: .*none.png"):
            build(data=manifest)
        build(data=manifest, images=None)

    def test_captions_for_the_teacher(self, build, folder, tmp_path):
        (folder / "a.teacher.txt").write_text("a square moves left")
        with pytest.raises(
            ValueError, match=r"2 of 3 videos have no caption for the teacher: b\.mp4"
        ):
            build(teacher=True)
        build()
        plain = LatentCache(tmp_path / "cache")
        with pytest.raises(ValueError, match="holds no captions for a teacher: cache again"):
            plain.teacher(0)
        manifest = folder / "clips.csv"
        rows = ["a.mp4,x,a square moves left", "b.mp4,x,x"]
        manifest.write_text("\n".join(["video,caption,teacher_caption", *rows]))
        report = build(data=manifest, teacher=True)
        assert (report.encoded, report.texts) == (0, 2)
        found = LatentCache(tmp_path / "cache")
        (folder / "a.txt").write_text("a square moves left")
        build(data=folder)
        said = LatentCache(tmp_path / "cache").conditions(0)
        for name, x in found.teacher(0).items():
            assert torch.equal(x, said[name])
            assert torch.equal(found.teacher(1)[name], found.conditions(1)[name])

    def test_two_images_are_one_too_many(self, build, folder):
        noise("a").save(folder / "a.webp")
        with pytest.raises(ValueError, match=r"a.mp4 must have one image .* got a.png, a.webp"):
            build()


class TestDraws:
    def test_shares(self):
        given = TrainConfig(adapter="image_prompt", caption_dropout=0.1, image_dropout=0.2)
        count = 6000
        found = [draw(given, step, 0, (1, 1, 1, 1), shift=1.0)[2:4] for step in range(count)]
        expected = {(False, True): 0.08, (True, False): 0.18, (False, False): 0.02}
        for kind, share in expected.items():
            spread = 4 * math.sqrt(share * (1 - share) / count)
            assert abs(found.count(kind) / count - share) < spread, kind

    @pytest.mark.parametrize("name", ["caption", "image"])
    def test_all_of_one_kind(self, name):
        fields = NO_DROPOUT | {f"{name}_dropout": 1.0}
        given = TrainConfig(adapter="image_prompt", **fields)
        found = {draw(given, step, 0, (1, 1, 1, 1), shift=1.0)[2:4] for step in range(100)}
        assert found == {(name != "caption", name != "image")}

    def test_noise_and_levels_are_those_of_a_lora(self):
        for step in range(20):
            a, b = (
                draw(TrainConfig(adapter=adapter), step, 1, (2, 3, 4, 5), shift=3.0)
                for adapter in ("lora", "image_prompt")
            )
            assert torch.equal(a.noise, b.noise)
            assert a.sigma == b.sigma


class TestTraining:
    def test_it_begins_at_the_model(self, tmp_path):
        given = ft.config(tmp_path / "a", **(RADIAL | NO_DROPOUT | {"stages": ("9:2",)}))
        first = ft.train(given)
        lora = ft.config(
            tmp_path / "b", method="radial", settings=(), caption_dropout=0.0, stages=("9:2",)
        )
        plain = ft.train(lora)
        assert first.losses[0] == plain.losses[0]
        assert first.losses[1] != plain.losses[1]

    @pytest.mark.parametrize("method", ["dense", "radial", "sparse_linear"])
    def test_all_of_the_adapter_trains_from_the_first_step(self, tmp_path, method):
        settings = ft.SPARSE if method == "sparse_linear" else ()
        given = ft.config(tmp_path, **(RADIAL | {"method": method, "settings": settings}))
        run = begun(given)
        stock = {n: x.clone() for n, x in run.model.transformer.state_dict().items()}
        loss = run.objective(*run.batches(0, [0, 1], 3, 0))
        loss.backward()
        trained = {n for n, p in run.objective.named_parameters() if p.requires_grad}
        assert trained == set(run.state.names)
        assert all(name.startswith("image_adapter.") for name in trained)
        kinds = {name.split(".")[1] for name in trained}
        assert kinds == {"projector", "layers"}
        for name, parameter in run.objective.named_parameters():
            if name in trained:
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name
        run.state.optimizer.step()
        now = run.model.transformer.state_dict()
        assert all(torch.equal(x, now[name]) for name, x in stock.items())

    def test_clips_see_their_own_images_or_none(self, tmp_path):
        given = ft.config(tmp_path, **(FULL | {"image_dropout": 0.6}))
        run = begun(given)
        clips, kept = ft.Clips(), 0
        for step in range(20):
            chosen = [step % 5, (step + 1) % 5, 0, 1]
            [features] = run.batches(step, chosen, 3, 0).shown
            for place, clip in enumerate(chosen[:2]):
                drawn = draw(given, step, place, clips.latents(clip, 3).shape, shift=3.0)
                expected = clips.image(clip) if drawn.pictured else clips.no_image
                assert torch.equal(features[place], expected)
                kept += drawn.pictured
        assert 5 < kept < 35

    def test_the_teacher_reads_what_the_image_shows(self, tmp_path):
        fields = {"objective": "distill", "image_dropout": 0.4, "caption_dropout": 0.4}
        run = begun(ft.config(tmp_path, **(FULL | fields)))
        clips, kinds = ft.Clips(), set()
        for step in range(20):
            taught = run.batches(step, [0, 1, 2, 3], 3, 0).teacher_conditions
            for place in range(2):
                drawn = draw(run.config, step, place, clips.latents(place, 3).shape, shift=3.0)
                kinds.add((drawn.captioned, drawn.pictured))
                expected = clips.conditions(place) if drawn.captioned else clips.empty
                if drawn.pictured:
                    expected = clips.teacher(place)
                assert all(torch.equal(taught[name][place], x) for name, x in expected.items())
        assert len(kinds) == 4

    def test_without_an_image_there_is_nothing_to_distill(self, tmp_path):
        fields = RADIAL | NO_DROPOUT | {"objective": "distill", "method": "dense"}
        shown = begun(ft.config(tmp_path, **fields))
        assert shown.objective(*shown.batches(0, [0, 1], 3, 0)).item() > 1e-3
        blind = begun(ft.config(tmp_path, **(fields | {"image_dropout": 1.0})))
        assert blind.objective(*blind.batches(0, [0, 1], 3, 0)).item() < 1e-10

    def test_it_learns_from_the_teacher(self, tmp_path):
        fields = {"objective": "distill", "stages": ("9:40",), "learning_rate": 3e-3}
        done = ft.train(ft.config(tmp_path, **(RADIAL | NO_DROPOUT | fields)))
        assert sum(done.losses[-10:]) < 0.7 * sum(done.losses[:10])
        assert json.loads((done.folder / "gen_accel.json").read_text())["recipe"]["objective"] == (
            "distill"
        )

    def test_each_attention_is_held_to_what_the_words_would_add(self, tmp_path):
        fields = {"objective": "distill_attention", "batch_size": 2}
        run = begun(ft.config(tmp_path, **(RADIAL | NO_DROPOUT | fields)))
        batch = run.batches(0, [0, 1], 3, 0)
        loss = run.objective(*batch)
        expected, at = [], {}
        clean, noise, sigma, conditions, taught = batch[:5]
        [image] = batch.shown
        transformer, adapter = run.model.transformer, run.adapter
        mix = sigma.view(-1, 1, 1, 1, 1)
        call = {"hidden_states": (1 - mix) * clean + mix * noise, "timestep": sigma * 1000}

        def before(module, args):
            at[module] = args

        attentions = [block.attn2 for block in transformer.blocks]
        hooks = [one.register_forward_pre_hook(before) for one in attentions]
        with torch.no_grad(), adapter.showing(image):
            transformer(**call, **conditions)
            for hook in hooks:
                hook.remove()
            shown = [one.forward(*at[one]) for one in attentions]
            told = transformer.condition_embedder.text_embedder(taught["encoder_hidden_states"])
            with adapter.teaching():
                transformer(**call, **conditions)  # nothing is added from here on
            for one, given in zip(attentions, shown, strict=True):
                wanted = one.forward(at[one][0], told)
                expected.append((given - wanted).square().mean() / wanted.square().mean())
        assert loss.item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-4)
        assert loss.item() > 1e-4

        loss.backward()
        for name, parameter in run.objective.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name

    def test_without_an_image_attention_is_as_it_was(self, tmp_path):
        fields = {"objective": "distill_attention", "image_dropout": 1.0}
        run = begun(ft.config(tmp_path, **(RADIAL | NO_DROPOUT | fields)))
        assert run.objective(*run.batches(0, [0, 1], 3, 0)).item() < 1e-10

    def test_it_learns_from_attention(self, tmp_path):
        fields = {"objective": "distill_attention", "stages": ("9:40",), "learning_rate": 3e-3}
        done = ft.train(ft.config(tmp_path, **(RADIAL | NO_DROPOUT | fields)))
        assert sum(done.losses[-10:]) < 0.7 * sum(done.losses[:10])

    def test_attention_over_text_and_video_together_is_refused(self, tmp_path):
        given = ft.config(tmp_path, **(RADIAL | {"objective": "distill_attention"}))
        with pytest.raises(ValueError, match="are over video, text: take objective distill"):
            model_of(given, hunyuan.pipeline())

    def test_it_learns(self, tmp_path):
        given = ft.config(tmp_path, **(RADIAL | {"stages": ("9:40",), "learning_rate": 3e-3}))
        done = ft.train(given)
        assert sum(done.losses[-10:]) < sum(done.losses[:10])

    def test_in_two_parts(self, tmp_path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        ft.train(ft.config(whole, **FULL))
        shutil.copytree(whole, parts)
        shutil.rmtree(parts / "image_prompt")
        shutil.rmtree(parts / trainer.CHECKPOINTS / "step-000004")
        done = ft.train(ft.config(parts, **FULL), resume=True)
        assert len(done.losses) == 2
        os.rename(whole / "image_prompt", whole / "lora")
        os.rename(parts / "image_prompt", parts / "lora")
        assert_same_run(parts, whole)
        tensors = state(whole).tensors
        assert {name.split("/")[0] for name in tensors} == {"model", "ema", "optimizer"}
        assert not any(".start." in name for name in tensors)

    def test_gradient_checkpointing_changes_nothing(self, tmp_path):
        given = ft.config(tmp_path / "a", **RADIAL)
        plain = ft.train(given)
        saving = ft.train(given.replaced(out=str(tmp_path / "b"), gradient_checkpointing=True))
        assert saving.losses == plain.losses

    def test_videos_with_their_images(self, tmp_path):
        noise("v").save(tmp_path / "v.png")
        fields = {
            "validate_every": 2,
            "validation_prompts": ("something moves left",),
            "validation_frames": 5,
            "validation_steps": 2,
            "guidance_scale": 3.0,
            "max_tokens": 16,
            "stages": ("9:2",),
            "ema_decay": 0.5,
            "learning_rate": 0.1,
        }
        seen = []
        for i, images in enumerate(((), (str(tmp_path / "v.png"),))):
            out = tmp_path / str(i)
            given = ft.config(out, **(RADIAL | fields), validation_images=images)
            ft.train(given, pipe=wan.pipeline())
            names = [name for name in files(out / "validation") if name.endswith(".mp4")]
            assert names == [
                "step-000000/00.mp4",
                "step-000002/00.beside_start.mp4",
                "step-000002/00.mp4",
            ]
            seen.append([(out / "validation" / names[j]).read_bytes() for j in (0, 2)])
        assert seen[0][0] == seen[1][0]  # the model as it came, whatever the image
        assert seen[0][1] != seen[1][1]

    def test_what_it_leaves(self, tmp_path):
        given = ft.config(tmp_path, **FULL)
        run = begun(given)
        done = run.train(False)
        assert done.folder == tmp_path / "image_prompt"
        assert files(done.folder) == ["README.md", "gen_accel.json", WEIGHTS]
        newest = state(tmp_path).path
        assert files(newest / "image_prompt") == ["README.md", "gen_accel.json", WEIGHTS]
        about = json.loads(metadata(done.folder / WEIGHTS)["gen_accel"])
        assert about == json.loads((done.folder / "gen_accel.json").read_text())
        assert about["blocks"] == {str(i): f"blocks.{i}.attn2" for i in range(wan.LAYERS)}
        assert (about["variant"], about["image_size"]) == ("pixels", 32)
        assert about["recipe"]["method"] == "radial"
        assert about["recipe"]["stages"] == list(FULL["stages"])
        assert about["recipe"]["rank"] == 0
        found = read_adapter(done.folder)
        averages = {n: x for n, x in state(tmp_path).tensors.items() if n.startswith("ema/")}
        for name, x in found.projector.items():
            assert torch.equal(x, averages[f"ema/image_adapter.projector.{name}"])

    def test_it_loads_as_the_model_that_was_trained(self, tmp_path):
        given = ft.config(tmp_path, **(RADIAL | {"learning_rate": 0.05}))
        run = begun(given)
        done = run.train(False)
        transformer = run.model.transformer.eval()
        features = torch.stack([ft.Clips().image(i) for i in (0, 1)])
        pipe = wan.pipeline()
        with torch.no_grad():
            plain = wan.forward(pipe.transformer, 3, 4, 8)
            with run.adapter._prompt.using(features):
                trained = wan.forward(transformer, 3, 4, 8)
            gen_accel.attach(pipe, gen_accel.Radial())
            prompt = load_image_prompt(pipe, done.folder)
            prompt.set_embeds(features, each=True)
            assert torch.equal(wan.forward(pipe.transformer, 3, 4, 8), trained)
            assert (trained - plain).abs().max() > 1e-3
            prompt.set_scale(0.0)
            sparse = wan.forward(pipe.transformer, 3, 4, 8)
            prompt.remove()
            assert torch.equal(wan.forward(pipe.transformer, 3, 4, 8), sparse)

    def test_to_go_on_from(self, tmp_path):
        given = ft.config(tmp_path / "a", **(RADIAL | NO_DROPOUT | {"stages": ("9:20",)}))
        first = ft.train(given)
        again = given.replaced(out=str(tmp_path / "b"), init_adapter=str(first.folder))
        second = ft.train(again.replaced(stages=("9:1",)))
        assert second.losses[0] < first.losses[0]
        still = ft.train(again.replaced(out=str(tmp_path / "c"), learning_rate=1e-30))
        a, b = read_adapter(first.folder), read_adapter(still.folder)
        for name, x in a.projector.items():
            torch.testing.assert_close(b.projector[name], x, rtol=0, atol=1e-20)
        assert all(torch.equal(x, b.start[name]) for name, x in a.start.items())
        with pytest.raises(ValueError, match=r"makes 4 tokens of an image, image_tokens is 3"):
            ft.train(again.replaced(out=str(tmp_path / "d"), image_tokens=3))
        other = wan.pipeline(transformer=wan.transformer(num_layers=3))
        with pytest.raises(ValueError, match=r"the adapter was trained on another model"):
            model_of(again, other)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = tmp_path_factory.mktemp("image_clips")
    clips.write_pictured(made, frames=9, count=4, size=48)
    return made


class TestDemo:
    def demo_config(self, out, data, **fields):
        small = {
            "model": "demo",
            "adapter": "image_prompt",
            "data": str(data),
            "out": str(out),
            "height": 48,
            "width": 48,
            "max_tokens": 16,
            "stages": ("9:2",),
            "method": "radial",
            "dense_layers": 0,
            "mixed_precision": "no",
            "log_with": "none",
            "device": "cpu",
            "batch_size": 2,
            "warmup_steps": 0,
        }
        return TrainConfig(**(small | fields))

    def test_end_to_end(self, data, tmp_path):
        given = self.demo_config(tmp_path / "run", data)
        done = gen_accel.lora.train(given)
        assert (done.steps, done.folder) == (2, tmp_path / "run" / "image_prompt")
        assert all(math.isfinite(loss) for loss in done.losses)
        pipe = wan.WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        with load_image_prompt(pipe, done.folder) as prompt:
            prompt.set_image(data / "0000.png")
            latents = pipe(
                "something moves left slowly",
                height=48,
                width=48,
                num_frames=9,
                num_inference_steps=2,
                max_sequence_length=16,
                output_type="latent",
            ).frames
        assert latents.isfinite().all()

    def test_a_cache_without_images_will_not_do(self, data, tmp_path):
        given = self.demo_config(tmp_path / "run", data, stages=("9:1",))
        lora = TrainConfig(
            **{
                name: getattr(given, name)
                for name in ("model", "data", "height", "width", "max_tokens", "stages")
            },
            out=str(tmp_path / "lora"),
            device="cpu",
        )
        gen_accel.lora.prepare.cache_clips(lora)
        cached = str(tmp_path / "lora" / "cache")
        given = given.replaced(data=None, cache=cached)
        with pytest.raises(ValueError, match="holds no images, which adapter image_prompt needs"):
            prepare(given, trainer.accelerator_for(given))
        gen_accel.lora.prepare.cache_clips(given.replaced(data=str(data)))
        pipe = gen_accel.lora.prepare.load_pipe(given)
        check_cache(given, pipe, LatentCache(cached))
        with pytest.raises(ValueError, match=r"of 32 pixels, asked for is .* 16 pixels"):
            check_cache(given.replaced(image_size=16), pipe, LatentCache(cached))

    def test_clips_with_images(self, data):
        ends = ("mp4", "png", "teacher.txt", "txt")
        assert files(data) == [f"{i:04d}.{end}" for i in range(4) for end in ends]
        for i, scene in enumerate(clips.SHOWN[:4]):
            caption = (data / f"{i:04d}.txt").read_text().strip()
            assert caption == clips.anonymous_caption(scene) == f"something moves {motion(scene)}"
            assert (data / f"{i:04d}.teacher.txt").read_text() == scene.caption + "\n"
            still = np.asarray(Image.open(data / f"{i:04d}.png"))
            assert still.shape == (48, 48, 3)
            found = still.reshape(-1, 3)
            colour = np.array(world.COLORS[scene.color])
            area = (np.abs(found - colour).max(1) < 20).sum()
            assert 250 < area < 500
            assert (still[0] == world.BACKGROUND).all()

    def test_pairs_that_no_clip_shows(self):
        pairs = clips.NOT_SHOWN
        assert len(set(pairs)) == 24
        assert set(world.UNSEEN) < set(pairs)
        for one in world.COLORS:
            for other in world.SHAPES:
                assert sum((s.color, s.shape) == (one, other) for s in pairs) == 2
        for direction in world.DIRECTIONS:
            for speed in world.SPEEDS:
                assert sum((s.direction, s.speed) == (direction, speed) for s in pairs) == 3
        left = clips.SHOWN
        assert set(left) | set(pairs) == set(world.SCENES)
        assert not set(left) & set(pairs)

    def test_clips_without_images_are_as_before(self, tmp_path):
        world.write_clips(tmp_path, frames=5, count=1, size=48)
        assert files(tmp_path) == ["0000.mp4", "0000.txt"]
        assert (tmp_path / "0000.txt").read_text() == world.SHOWN[0].caption + "\n"
        assert set(world.SHOWN) == set(world.SEEN) - set(world.scored_scenes(12))

    def test_stills_are_whole(self):
        for i, scene in enumerate(world.SCENES[::8]):
            still = clips.still(scene, size=48, generator=torch.Generator().manual_seed(i))
            edge = torch.cat([still[0], still[-1], still[:, 0], still[:, -1]])
            assert (edge == world.BACKGROUND).all()
        with pytest.raises(ValueError, match="size must be at least 32 pixels, got 31"):
            clips.still(world.SCENES[0], size=31, generator=torch.Generator())


def motion(scene):
    return f"{scene.direction} {scene.speed}"


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rank": 4}, "rank 4 is not used by adapter image_prompt: leave out what belongs to"),
            ({"init_lora": "x", "alpha": 2.0}, "alpha 2 is not used by"),
            ({"train_processors": False}, "train_processors False is not used by"),
            (
                {"image_features": "embedding"},
                "image_features embedding does not apply without an image_enc",
            ),
            (
                {"image_encoder": "x", "image_size": 16},
                "image_size 16 does not apply to an image_enc",
            ),
            (
                {"objective": "distill_attention", "gradient_checkpointing": True},
                "gradient_checkpointing on saves nothing under objective distill_attention",
            ),
            ({"image_tokens": 0}, "image_tokens must be at least 1, got 0"),
            ({"image_dropout": 1.5}, "image_dropout must be from 0 to 1, got 1.5"),
            (
                {"validation_prompts": ("a", "b"), "validation_images": ("a.png",)},
                "validation_images must be as many as validation_prompts, 2, got 1",
            ),
        ],
        ids=str,
    )
    def test_what_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(adapter="image_prompt", **fields)

    @pytest.mark.parametrize("name", ["image_tokens", "init_adapter", "image_dropout"])
    def test_what_a_lora_does_not_use(self, name):
        value = {"image_tokens": 8, "init_adapter": "x", "image_dropout": 0.0}[name]
        with pytest.raises(ValueError, match=rf"{name} .* is not used by adapter lora"):
            TrainConfig(**{name: value})

    def test_a_lora_adds_nothing_to_an_attention_alone(self):
        with pytest.raises(ValueError, match="distill_attention is for adapter image_prompt"):
            TrainConfig(objective="distill_attention")

    def test_what_is_printed_is_read_again(self, tmp_path):
        given = TrainConfig(adapter="image_prompt", image_tokens=8, image_dropout=0.2)
        (tmp_path / "a.yaml").write_text(print_config(given))
        assert read_config(tmp_path / "a.yaml") == given

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"init_adapter": "nowhere"}, "no adapter for init_adapter at nowhere"),
            (
                {"validation_prompts": ("a",), "validation_images": ("nowhere.png",)},
                "validation_images: there is no file at nowhere.png",
            ),
        ],
        ids=str,
    )
    def test_what_is_not_there(self, tmp_path, fields, message):
        given = ft.config(tmp_path, **(RADIAL | fields))
        with pytest.raises(FileNotFoundError, match=message):
            trainer.train(given)
        if "init_adapter" in fields:
            with pytest.raises(FileNotFoundError, match="no adapter at nowhere"):
                model_of(given, wan.pipeline())

    def test_sharding_is_refused(self, tmp_path, monkeypatch):
        given = ft.config(tmp_path, **RADIAL)
        kind = type(trainer.accelerator_for(given).distributed_type)
        monkeypatch.setattr(trainer.Accelerator, "distributed_type", kind.FSDP)
        with pytest.raises(ValueError, match="adapter image_prompt needs the model whole"):
            trainer.accelerator_for(given)

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_config_that_is_shipped(self, path):
        done = dry_run(read_config(path))
        assert done.steps == 2
        assert all(math.isfinite(loss) for loss in done.losses)
