"""Training from the clips' first frames: cache, loss, resume, validation and what is refused."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import LTXPipeline, WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from support import finetuning as ft
from support import hunyuan, inputs, wan
from support.runs import WEIGHTS
from support.tiny import cogvideox, ltx

import gen_accel
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.families import family_for
from gen_accel.attention_processors.families.latents import FIRST_FRAME, IS_GIVEN, LAST_FRAME
from gen_accel.lora import dry_run, trainer
from gen_accel.lora.batches import draw
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.inputs import Asked, condition_for
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.checkpoint import found as checkpoints
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import Take
from gen_accel.lora.data.finding import find_videos
from gen_accel.lora.objective import Objective
from gen_accel.lora.step_trace import StepTracer
from gen_accel.measure.cost.model import subject_of
from gen_accel.measure.video_io import write_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.sampling import Clip, sample

IMAGES = "encoder_hidden_states_image"
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32, 48
SMALL: dict[str, Any] = {
    "method": "radial",
    "settings": ("block=4",),
    "stages": ("5:1", "9:1"),
    "height": SIZE[0],
    "width": SIZE[1],
    "max_tokens": 512,
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0)
    for i in range(2):
        video = noise.integers(0, 256, (9, *SIZE, 3)).astype(np.uint8)
        path = write_video(video, made / f"{i}.mp4", fps=16)
        path.with_suffix(".txt").write_text("a red square moves left")
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Wan for image to video with CLIP's features, one for both, and ones for a last frame with
    and without such features, each in a folder."""
    folder = tmp_path_factory.mktemp("models")
    wan.PIPELINES["image with encoder"]().save_pretrained(folder / "image")
    wan.pipeline(expand_timesteps=True).save_pretrained(folder / "both")
    inputs.wan_first_and_last().save_pretrained(folder / "last")
    wan.PIPELINES["image"]().save_pretrained(folder / "either")
    return folder


@pytest.fixture
def config(models, clips, tmp_path):
    def make(name="image", **fields):
        given = {"model": str(models / name), "data": str(clips)}
        return ft.config(fields.pop("out", tmp_path / "run"), **(SMALL | given | fields))

    return make


def encoded(pipe, clips, out, **options):
    options = {"frames": (5, 9), "sizes": [SIZE], "max_tokens": 16, "store": "float32"} | options
    cache(pipe, clips, out, **options)
    return LatentCache(out)


def first_of(pipe, picture, frames):
    family = family_for(pipe.transformer, "training")
    return family.first_frame(pipe, pipe.transformer, Image.fromarray(picture), frames)


class TestCache:
    @pytest.mark.slow
    def test_what_is_kept_of_each_clip(self, clips, tmp_path):
        pipe = wan.PIPELINES["image with encoder"]()
        found = encoded(pipe, clips, tmp_path)
        assert found.condition == "first_frame"
        assert len(found) == 2
        first = Image.fromarray(found.pictures(1)[0])
        kept = family_for(pipe.transformer, "training").first_frame(
            pipe, pipe.transformer, first, 9
        )
        for name, x in found.first_frame(1).items():
            assert torch.equal(x, kept[name]), name
        cut = found.first_frame(1, 2)
        assert torch.equal(cut[FIRST_FRAME], kept[FIRST_FRAME][:, :2])
        assert torch.equal(cut["encoder_hidden_states_image"], kept["encoder_hidden_states_image"])
        again = encoded(pipe, clips, tmp_path)
        assert again.digest == found.digest

    def test_the_pictures_are_the_clips_first_frames(self, clips, tmp_path):
        pipe = wan.pipeline(expand_timesteps=True)
        found = encoded(pipe, clips, tmp_path, condition="first_frame")
        video = find_videos(clips)[0].read(frames=9, size=SIZE, fps=None)
        assert np.array_equal(found.pictures(0)[0], video[0])
        assert np.array_equal(found.pictures(2)[0], video[0])

    def test_a_chunk_begins_with_its_own_frame(self, clips, tmp_path):
        pipe = wan.pipeline(expand_timesteps=True)
        options = {"frames": (5,), "condition": "first_frame", "take": Take("middle")}
        found = encoded(pipe, clips, tmp_path, **options)
        begins = [entry.begin or 0 for entry in found.entries]
        assert all(begin > 0 for begin in begins)
        for i, begin in enumerate(begins):
            video = find_videos(clips)[i].read(frames=9, size=SIZE, fps=None)
            assert np.array_equal(found.pictures(i)[0], video[begin])
            own = first_of(pipe, found.pictures(i)[0], 5)
            assert torch.equal(found.first_frame(i)[FIRST_FRAME], own[FIRST_FRAME])
        assert len({entry.frame_key for entry in found.entries}) == len(found)

    @pytest.mark.slow
    def test_each_length_has_a_last_frame_of_its_own(self, clips, tmp_path):
        pipe = inputs.wan_first_and_last()
        found = encoded(pipe, clips, tmp_path)
        assert (found.condition, found.causal) == ("last_frame", False)
        assert [entry.pixel_frames for entry in found.entries] == [5, 9, 5, 9]
        video = find_videos(clips)[1].read(frames=9, size=SIZE, fps=None)
        family = family_for(pipe.transformer, "training")
        for i, frames in ((2, 5), (3, 9)):
            first, last = found.pictures(i)
            assert np.array_equal(first, video[0])
            assert np.array_equal(last, video[frames - 1])
            pictures = [Image.fromarray(x) for x in (first, last)]
            own = first_of(pipe, first, frames)
            own |= family.last_frame(pipe, pipe.transformer, *pictures, frames)
            kept = found.first_frame(i)
            assert kept.keys() == own.keys() == {FIRST_FRAME, LAST_FRAME, IMAGES}
            assert all(torch.equal(x, own[name]) for name, x in kept.items())
        either = encoded(wan.PIPELINES["image"](), clips, tmp_path, condition="last_frame")
        assert either.digest != found.digest

    def test_pictures_are_refused(self, clips, tmp_path):
        with pytest.raises(ValueError, match="a picture is its own first frame"):
            encoded(wan.PIPELINES["image"](), clips, tmp_path, frames=(1, 5))

    def test_from_text_a_cache_is_as_it_was(self, clips, tmp_path):
        found = encoded(wan.pipeline(expand_timesteps=True), clips, tmp_path)
        assert found.condition == "text"
        assert all(entry.frame_key is None for entry in found.entries)
        with pytest.raises(ValueError, match="holds no first frames: cache again"):
            found.first_frame(0)
        with pytest.raises(ValueError, match="holds no first frames: cache again"):
            found.pictures(0)[0]

    @pytest.mark.slow
    def test_other_weights_of_the_same_clip_are_encoded_again(self, clips, tmp_path):
        """With a first frame the latents stay, and from text they are used again."""
        pipe = wan.pipeline(expand_timesteps=True)
        text = encoded(pipe, clips, tmp_path)
        both = encoded(pipe, clips, tmp_path, condition="first_frame")
        assert [e.latent_key for e in both.entries] == [e.latent_key for e in text.entries]
        assert text.digest != both.digest
        image = encoded(wan.PIPELINES["image"](), clips, tmp_path)
        assert {e.frame_key for e in image.entries}.isdisjoint(e.frame_key for e in both.entries)

    @pytest.mark.slow
    def test_hunyuan_videos_text_is_of_each_clip(self, clips, tmp_path):
        pipe = hunyuan.image_pipeline()
        found = encoded(pipe, clips, tmp_path, frames=(9,), max_tokens=40)
        family = family_for(pipe.transformer, "training")
        texts = [entry.text_key for entry in found.entries]
        assert len(set(texts)) == 2
        for i, entry in enumerate(found.entries):
            image = Image.fromarray(found.pictures(i)[0])
            own = family.encode_prompt_with(pipe, pipe.transformer, [image], entry.caption, 40)
            for name, x in found.conditions(i).items():
                assert torch.equal(x, own[name][0]), name
        dropped = family.encode_prompt_with(pipe, pipe.transformer, (), "", 40)
        name = "encoder_hidden_states"
        assert torch.equal(found.empty[name], dropped[name][0])

    def test_image_prompts_are_refused(self, clips, tmp_path):
        with pytest.raises(ValueError, match="an image prompt is trained under condition text"):
            encoded(wan.PIPELINES["image"](), clips, tmp_path, images=SimpleNamespace())


class TestLoss:
    @pytest.mark.parametrize("given", [None, (1.0, 0.0)])
    def test_it_leaves_out_what_is_given(self, given):
        model = wan.transformer()
        family = family_for(model, "training")
        adapter = SimpleNamespace(modules={}, showing=nullcontext)
        objective = Objective(model, family, "flow", adapter)
        g = torch.Generator().manual_seed(0)
        clean, noise = (torch.randn(2, 16, 3, 4, 4, generator=g) for _ in range(2))
        sigma = torch.tensor([0.3, 0.8])
        shown = {
            "encoder_hidden_states": torch.randn(2, 4, wan.TEXT_WIDTH, generator=g),
            FIRST_FRAME: torch.randn(2, 16, 1, 4, 4, generator=g),
        }
        if given is not None:
            shown[IS_GIVEN] = torch.tensor(given)
        mix = sigma.view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            loss = objective(clean, noise, sigma, shown)
            velocity = family.predict(model, (1 - mix) * clean + mix * noise, sigma, shown)
        errors = (velocity - (noise - clean)).square()
        kept = [errors[0, :, 1:], errors[1, :, 1:] if given is None else errors[1]]
        torch.testing.assert_close(loss, torch.cat([x.flatten() for x in kept]).mean())

    def test_with_channels_of_its_own_all_latents_count(self):
        model = wan.transformer(in_channels=36)
        family = family_for(model, "training")
        objective = Objective(
            model, family, "flow", SimpleNamespace(modules={}, showing=nullcontext)
        )
        g = torch.Generator().manual_seed(0)
        clean, noise, frame = (torch.randn(1, 16, 3, 4, 4, generator=g) for _ in range(3))
        sigma = torch.tensor([0.5])
        shown = {"encoder_hidden_states": torch.zeros(1, 4, wan.TEXT_WIDTH), FIRST_FRAME: frame}
        with torch.no_grad():
            velocity = family.predict(model, (clean + noise) / 2, sigma, shown)
            loss = objective(clean, noise, sigma, shown)
        assert torch.equal(loss, F.mse_loss(velocity, noise - clean))

    def test_given_frames_are_dropped_at_their_shares(self):
        given = ft.config("unused", first_frame_dropout=0.3, last_frame_dropout=0.6)
        drawn = [draw(given, i, 0, (1,), shift=1.0) for i in range(2000)]
        assert abs(np.mean([not one.framed for one in drawn]) - 0.3) < 0.03
        assert abs(np.mean([not one.ended for one in drawn]) - 0.6) < 0.03
        plain = draw(ft.config("unused"), 7, 0, (1,), shift=1.0)
        assert (drawn[7].sigma, drawn[7].captioned) == (plain.sigma, plain.captioned)
        assert torch.equal(drawn[7].noise, plain.noise)


class TestTraining:
    @pytest.mark.slow
    def test_two_steps_a_resume_and_the_model_as_it_was(self, config, tmp_path, monkeypatch):
        """Of Wan 2.1 I2V: bit for bit, with videos that begin with a clip's first frame."""
        began = []

        def watched(*args, inputs, **options):
            began.append(np.array(inputs.values["image"]))
            return sample(*args, inputs=inputs, **options)

        monkeypatch.setattr("gen_accel.lora.evaluate.sample", watched)
        given = config(
            checkpoint_every=1,
            validate_every=2,
            validation_prompts=("a blue circle",),
            validation_steps=2,
            validation_frames=9,
        )
        done = trainer.train(given)
        assert len(done.losses) == 2
        recipe = read_recipe(done.folder)
        assert recipe.condition == "first_frame"
        videos = sorted(p.name for p in (tmp_path / "run" / "validation").rglob("*.mp4"))
        assert videos == ["00.beside_start.mp4", "00.mp4", "00.mp4"]
        picture = LatentCache(tmp_path / "run" / "cache").pictures(0)[0]
        assert [np.array_equal(one, picture) for one in began] == [True, True]
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000002")
        assert len(checkpoints(tmp_path / "again" / "checkpoints")) == 1
        trainer.train(given.replaced(out=str(tmp_path / "again"), validate_every=0), resume=True)
        whole, again = (load_file(tmp_path / x / "lora" / WEIGHTS) for x in ("run", "again"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        self._comes_off(given.model, done.folder)
        with pytest.raises(ValueError, match=r"first frame: give one, --image FIRST\.png"):
            generate(given.model, ["a circle"], out=tmp_path / "a.mp4", from_lora=done.folder)
        clip = Clip(frames=5, height=SIZE[0], width=SIZE[1], steps=1, max_tokens=512)
        first: dict[str, Any] = {"image": picture, **clip.given()}
        (made,) = generate(
            given.model, ["a circle"], out=tmp_path / "b.mp4", from_lora=done.folder, **first
        )
        assert made.files["video"].is_file()

    def _comes_off(self, model, folder):
        pipe = WanImageToVideoPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        stock = wan.generate(pipe, steps=1)
        pipe.load_lora_weights(folder)
        handle = gen_accel.attach(pipe, from_lora=folder)
        assert not torch.equal(wan.generate(pipe, steps=1), stock)
        handle.detach()
        pipe.unload_lora_weights()
        assert torch.equal(wan.generate(pipe, steps=1), stock)

    @pytest.mark.slow
    def test_from_first_and_last_frames(self, config, tmp_path, monkeypatch):
        """As Wan 2.1 FLF2V: what is trained, sampled, resumed and generated is given both."""
        ends = []

        def watched(*args, inputs, **options):
            ends.append([np.array(inputs.values[x]) for x in ("image", "last_image")])
            return sample(*args, inputs=inputs, **options)

        monkeypatch.setattr("gen_accel.lora.evaluate.sample", watched)
        sampled = {"validate_every": 2, "validation_prompts": ("a",), "validation_steps": 1}
        given = config("last", checkpoint_every=1, **sampled)
        done = trainer.train(given)
        assert read_recipe(done.folder).condition == "last_frame"
        pictures = LatentCache(tmp_path / "run" / "cache").pictures(0)
        assert len(ends) == 2
        assert all(np.array_equal(one, pictures) for one in ends)
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000002")
        trainer.train(given.replaced(out=str(tmp_path / "again"), validate_every=0), resume=True)
        whole, again = (load_file(tmp_path / x / "lora" / WEIGHTS) for x in ("run", "again"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        clip = Clip(frames=9, height=SIZE[0], width=SIZE[1], steps=1, max_tokens=512)
        asked: Any = {"image": pictures[0], "from_lora": done.folder, **clip.given()}
        with pytest.raises(ValueError, match=r"last frame too: give one, --last-image LAST\.png"):
            generate(given.model, ["a"], out=tmp_path / "a.mp4", **asked)
        (made,) = generate(
            given.model, ["a"], out=tmp_path / "b.mp4", last_image=pictures[1], **asked
        )
        assert made.files["video"].is_file()

    @pytest.mark.slow
    def test_a_share_without_their_last_frame(self, config):
        fields = {"condition": "last_frame", "last_frame_dropout": 0.5, "batch_size": 2}
        done = trainer.train(config("either", **fields, stages=("9:1",)))
        assert read_recipe(done.folder).condition == "first_frame"

    @pytest.mark.slow
    def test_a_model_for_both_with_a_share_from_text(self, config, tmp_path):
        fields = {"condition": "first_frame", "first_frame_dropout": 0.5, "batch_size": 2}
        done = trainer.train(config("both", **fields, caption_dropout=0.3))
        assert all(np.isfinite(done.losses))
        assert read_recipe(done.folder).condition == "either"

    @pytest.mark.slow
    def test_validation_images_are_first_frames(self, config, tmp_path, monkeypatch):
        began = []

        def watched(*args, inputs, **options):
            began.append(inputs.values["image"].getpixel((0, 0)))
            return sample(*args, inputs=inputs, **options)

        monkeypatch.setattr("gen_accel.lora.evaluate.sample", watched)
        Image.new("RGB", (SIZE[1], SIZE[0]), (200, 30, 30)).save(tmp_path / "red.png")
        images = (str(tmp_path / "red.png"),)
        given = {"validation_prompts": ("a",), "validation_images": images, "validation_steps": 1}
        both = {"condition": "first_frame", "validate_every": 1, "stages": ("5:1",)}
        trainer.train(config("both", **both, **given))
        assert began == [(200, 30, 30)] * 2

    @pytest.mark.slow
    def test_from_text_unless_asked(self, config):
        done = trainer.train(config("both", stages=("9:1",)))
        assert read_recipe(done.folder).condition == "text"

    @pytest.mark.slow
    def test_a_guided_teacher_sees_the_first_frame(self, config, tmp_path):
        """Without captions it says what the model says: all branches see the same frame."""
        fields = {"method": "dense", "settings": (), "objective": "distill", "stages": ("9:1",)}
        done = trainer.train(config(**fields, teacher_guidance=3.0, caption_dropout=1.0))
        assert done.losses[0] == 0

    @pytest.mark.slow
    def test_hunyuan_video(self, config, tmp_path):
        for kind in ("token_replace", "latent_concat"):
            hunyuan.image_pipeline(kind).save_pretrained(tmp_path / kind)
            given = config(
                model=str(tmp_path / kind),
                out=tmp_path / f"{kind} run",
                stages=("9:2",),
                max_tokens=40,
            )
            done = trainer.train(given)
            assert all(np.isfinite(done.losses))
            assert read_recipe(done.folder).condition == "first_frame"

    @pytest.mark.slow
    def test_cogvideox(self, config, tmp_path):
        model = cogvideox.transformer(**cogvideox.ROTARY, max_text_seq_length=16)
        pipe = cogvideox.pipeline(model, **cogvideox.PUBLISHED)
        pipe.save_pretrained(tmp_path / "model")
        given = config(model=str(tmp_path / "model"), stages=("9:2",), max_tokens=16)
        done = trainer.train(given)
        assert all(np.isfinite(done.losses))
        assert read_recipe(done.folder).condition == "first_frame"

    @pytest.mark.slow
    def test_ltx(self, config, clips, tmp_path):
        """From a folder for text, so that its class is chosen by the condition."""
        ltx.pipeline(LTXPipeline).save_pretrained(tmp_path / "model")
        fields = {"condition": "first_frame", "first_frame_dropout": 0.5, "batch_size": 2}
        size = {"height": 32, "width": 64, "max_tokens": 16, "stages": ("9:2",)}
        sampled = {"validate_every": 2, "validation_prompts": ("a",), "validation_steps": 1}
        given = config(model=str(tmp_path / "model"), **fields, **size, **sampled)
        done = trainer.train(given)
        assert all(np.isfinite(done.losses))
        assert read_recipe(done.folder).condition == "either"
        assert (tmp_path / "run" / "validation" / "step-000002" / "00.mp4").is_file()


class TestCondition:
    def _chosen(self, name, transformer, condition=None, share=0.0, ended=0.0, **index):
        asked = Asked("M", condition, share, ended)
        return condition_for({"_class_name": name, **index}, transformer, asked)

    def test_the_pipeline_decides(self):
        wide = {"in_channels": 36, "out_channels": 16}
        plain = {"in_channels": 16, "out_channels": 16}
        assert self._chosen("WanPipeline", plain).condition == "text"
        assert self._chosen("WanImageToVideoPipeline", wide)[:3] == (
            "first_frame",
            "WanImageToVideoPipeline",
            True,
        )
        assert self._chosen("WanImageToVideoPipeline", wide, "last_frame", ended=0.2)[:2] == (
            "last_frame",
            "WanImageToVideoPipeline",
        )
        two = wide | {"image_dim": 8, "pos_embed_seq_len": 514}
        assert self._chosen("WanImageToVideoPipeline", two).condition == "last_frame"
        both = {"expand_timesteps": True}
        assert self._chosen("WanPipeline", plain, **both).condition == "text"
        assert self._chosen("WanPipeline", plain, "first_frame", 0.2, **both)[:3] == (
            "first_frame",
            "WanImageToVideoPipeline",
            False,
        )
        assert self._chosen("LTXImageToVideoPipeline", {}).condition == "first_frame"
        assert self._chosen("LTXPipeline", {}, "first_frame").pipeline == "LTXImageToVideoPipeline"
        assert self._chosen("LTXImageToVideoPipeline", {}, "text").pipeline == "LTXPipeline"
        assert self._chosen("SomebodysPipeline", plain).condition == "text"

    @pytest.mark.parametrize(
        ("name", "config", "options", "message"),
        [
            ("WanPipeline", {}, {"condition": "first_frame"}, "must be text for Wan.* got first"),
            (
                "WanImageToVideoPipeline",
                {"in_channels": 36},
                {"condition": "text"},
                "must be first_frame or last_frame for WanImageToVideoPipeline of M, got text",
            ),
            (
                "WanImageToVideoPipeline",
                {"in_channels": 36},
                {"share": 0.1},
                "first_frame_dropout 0.1 is for models that also make videos from text alone",
            ),
            ("LTXPipeline", {}, {"share": 0.1}, "trains under text: give condition first_frame"),
            (
                "WanImageToVideoPipeline",
                {"in_channels": 36, "image_dim": 8, "pos_embed_seq_len": 514},
                {"ended": 0.1},
                "last_frame_dropout 0.1 is for models that also make videos from a first frame",
            ),
            (
                "WanImageToVideoPipeline",
                {"in_channels": 36, "image_dim": 8},
                {"condition": "last_frame"},
                "must be first_frame for WanImageToVideoPipeline of M, got last_frame",
            ),
            (
                "WanImageToVideoPipeline",
                {"in_channels": 36},
                {"ended": 0.1},
                "trains under first_frame: give condition last_frame",
            ),
            ("LucyEditPipeline", {}, {}, "neither from text nor from a first frame, alone or"),
        ],
    )
    def test_what_is_refused(self, name, config, options, message):
        with pytest.raises(ValueError, match=message):
            self._chosen(name, {"in_channels": 16, "out_channels": 16} | config, **options)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"first_frame_dropout": 1.5}, "first_frame_dropout must be from 0 to 1"),
            (
                {"condition": "text", "first_frame_dropout": 0.1},
                "first_frame_dropout 0.1 is for condition first_frame, got condition text",
            ),
            (
                {"condition": "first_frame", "adapter": "image_prompt"},
                "condition first_frame is for adapter lora, got adapter image_prompt",
            ),
            (
                {"first_frame_dropout": 0.1, "adapter": "image_prompt"},
                "first_frame_dropout 0.1 is for adapter lora",
            ),
            (
                {"condition": "first_frame", "last_frame_dropout": 0.1},
                "last_frame_dropout 0.1 is for condition last_frame, got condition first_frame",
            ),
            (
                {"validation_last_images": ("a.png",)},
                "validation_last_images must be as many as validation_images, 0, got 1",
            ),
            (
                {"validation_images": ("a.png",)},
                "validation_images must be as many as validation_prompts, 0, got 1",
            ),
        ],
        ids=str,
    )
    def test_fields_that_do_not_go_together(self, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            ft.config(tmp_path, **fields)

    def test_what_a_training_refuses(self, config, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="must have more than 1 frames, which the first"):
            trainer.train(config("both", condition="first_frame", stages=("1:1",)))
        with pytest.raises(ValueError, match="must have more than 1 frames, which the first"):
            trainer.train(config(stages=("1:1", "5:1")))
        images = {"validation_prompts": ("a",), "validation_images": ("nowhere.png",)}
        with pytest.raises(FileNotFoundError, match="no file at nowhere"):
            trainer.train(config(**images))
        Image.new("RGB", (64, 32)).save(tmp_path / "first.png")
        images["validation_images"] = (str(tmp_path / "first.png"),)
        with pytest.raises(ValueError, match="validation_images are first frames, and"):
            trainer.train(config("both", **images))
        with pytest.raises(ValueError, match="got validation_images alone: give validation_last"):
            trainer.train(config("last", **images))
        last = {"validation_last_images": images["validation_images"]}
        with pytest.raises(ValueError, match=r"are for condition last_frame, and .* under first"):
            trainer.train(config(**images, **last))
        prompts = {"adapter": "image_prompt", "rank": 128, "image_size": 32}
        with pytest.raises(ValueError, match="makes videos from a first frame, and adapter image"):
            trainer.train(config(**prompts))

    def test_before_the_model_is_loaded(self, config, monkeypatch):
        monkeypatch.setattr("gen_accel.lora.prepare.load", None)
        with pytest.raises(ValueError, match="condition must be first_frame for Wan"):
            trainer.train(config(condition="text"))

    def test_a_cache_without_first_frames(self, config, clips, tmp_path):
        encoded(wan.pipeline(expand_timesteps=True), clips, tmp_path / "cache", fps=16.0)
        given = config("both", data=None, cache=str(tmp_path / "cache"), condition="first_frame")
        with pytest.raises(ValueError, match="made for condition text, asked for is first_frame"):
            trainer.train(given)


BOTH = {"condition": "first_frame", "first_frame_dropout": 0.5}


ENDED = {"condition": "last_frame", "last_frame_dropout": 0.5}


@pytest.mark.parametrize(
    ("name", "fields"), [("image", {}), ("both", BOTH), ("last", {}), ("either", ENDED)]
)
def test_a_dry_run(config, name, fields):
    assert all(np.isfinite(dry_run(config(name, **fields)).losses))


def test_a_plan_counts_the_features_of_both_pictures():
    subject = subject_of(inputs.wan_first_and_last())
    train = TrainConfig(rank=4, dense_layers=1, condition="last_frame", mixed_precision="bf16")
    trace = StepTracer(subject, train).trace(subject.grid(*SIZE, 9), 0.3)
    latent = 4 * 4 * 6  # bytes of a channel of a latent
    assert trace.batch > 16 * (3 * 3 + 1) * latent + 4 * 10 * wan.IMAGE_WIDTH
