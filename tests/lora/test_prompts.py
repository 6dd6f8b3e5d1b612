"""Validation prompts in the cache, and text encoders that are loaded for new texts alone."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from support import hunyuan, wan

import gen_accel
from gen_accel.attention_processors.families.base import USES
from gen_accel.lora import evaluate
from gen_accel.lora.batches import levels_of
from gen_accel.lora.caching import encoders as text_encoders
from gen_accel.lora.evaluate import Validation
from gen_accel.lora.prepare import cache_clips, prepare
from gen_accel.lora.trainer import accelerator_for
from gen_accel.pipelines.generation.sampling import Clip, filled, sample
from gen_accel.pipelines.sampler import equal_steps

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red square moves left"
SHOWN = {
    "stages": ("9:1",),
    "validate_every": 1,
    "validation_prompts": (PROMPT, "a blue square"),
    "validation_frames": 5,
    "validation_steps": 2,
    "method": "radial",
    "settings": (),
}


@pytest.fixture
def loads(monkeypatch):
    """Names of the text encoders that were loaded."""
    seen, load_part = [], text_encoders.load_part

    def noted(source, name, *rest):
        seen.append(name)
        return load_part(source, name, *rest)

    monkeypatch.setattr(text_encoders, "load_part", noted)
    return seen


class TestTextEncoders:
    @pytest.mark.slow
    def test_only_new_texts_need_them(self, on_disk, loads):
        given = on_disk(**SHOWN)
        cache_clips(given)
        assert loads == ["text_encoder"]
        report = cache_clips(given)
        assert (report.encoded, report.texts) == (0, 0)
        assert loads == ["text_encoder"]

    @pytest.mark.slow
    def test_not_for_a_complete_cache_and_known_prompts(self, on_disk, loads):
        given = on_disk(**SHOWN)
        accelerator = accelerator_for(given)
        first, _ = prepare(given, accelerator)
        assert loads == ["text_encoder"]
        assert first.pipe.text_encoder is None
        second, _ = prepare(given, accelerator)
        assert loads == ["text_encoder"]
        assert [set(one) for one in first.prompts] == [
            {"prompt_embeds", "negative_prompt_embeds"}
        ] * 2
        for a, b in zip(first.prompts, second.prompts, strict=True):
            assert all(torch.equal(x, b[name]) for name, x in a.items())
        more = given.replaced(validation_prompts=(PROMPT, "a green square"))
        third, _ = prepare(more, accelerator)
        assert loads == ["text_encoder"] * 2
        assert torch.equal(third.prompts[0]["prompt_embeds"], first.prompts[0]["prompt_embeds"])

    @pytest.mark.slow
    def test_changed_files_are_hashed_again(self, on_disk, loads, home, tmp_path):
        model = shutil.copytree(home / "model", tmp_path / "model")
        given = on_disk(model=str(model))
        assert cache_clips(given).texts == 2
        other = wan.UMT5EncoderModel(wan.text_encoder().config)
        other.save_pretrained(model / "text_encoder")
        report = cache_clips(given)
        assert (report.encoded, report.texts) == (0, 2)
        assert loads == ["text_encoder"] * 2

    @pytest.mark.slow
    def test_hashes_are_those_of_the_loaded(self, on_disk, tmp_path):
        """A cache from before there was a record stays complete."""
        given = on_disk()
        cache_clips(given)
        record = tmp_path / "run" / "cache" / text_encoders.RECORD
        record.unlink()
        report = cache_clips(given)
        assert (report.encoded, report.texts) == (0, 0)
        assert record.exists()
        whole = gen_accel.lora.cache(
            wan.WanPipeline.from_pretrained(given.model),
            given.data,
            tmp_path / "run" / "cache",
            frames=(9, 17),
            sizes=[(given.height, given.width)],
            fps=given.fps,
            max_tokens=given.max_tokens,
            device="cpu",
        )
        assert (whole.encoded, whole.texts) == (0, 0)

    @pytest.mark.slow
    def test_a_damaged_file_of_a_prompt_is_written_again(self, on_disk, loads, tmp_path):
        given = on_disk(**SHOWN)
        accelerator = accelerator_for(given)
        first, _ = prepare(given, accelerator)
        file = min((tmp_path / "run" / "cache").glob("prompt-*.safetensors"))
        half = file.read_bytes()[:100]
        file.unlink()  # what was read is the file's own memory
        file.write_bytes(half)
        again, _ = prepare(given, accelerator)
        assert loads == ["text_encoder"] * 2
        for a, b in zip(first.prompts, again.prompts, strict=True):
            assert all(torch.equal(x, b[name]) for name, x in a.items())


class TestSameVideos:
    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize("mixed", ["no", "bf16"])
    @pytest.mark.parametrize("family", ["wan", "hunyuan"])
    def test_as_with_the_whole_pipeline(self, tmp_path, on_disk, family, mixed, monkeypatch):
        if family == "hunyuan":
            hunyuan.pipeline().save_pretrained(tmp_path / "model")
            fields = {"model": str(tmp_path / "model"), "data": None}
        else:
            fields = {}
        given = on_disk(**SHOWN | fields | {"mixed_precision": mixed})
        accelerator = accelerator_for(given)
        if family == "hunyuan":
            monkeypatch.setattr("gen_accel.lora.prepare.LatentCache", lambda folder: None)
            monkeypatch.setattr("gen_accel.lora.prepare.check_cache", lambda *_: None)
            monkeypatch.setattr("gen_accel.lora.prepare.known_reconstruction", lambda *_: None)
            (tmp_path / "run" / "cache").mkdir(parents=True)
        model, _ = prepare(given, accelerator)
        adapter = type("None", (), {"sampling": staticmethod(lambda i: nullcontext())})
        made = Validation(
            *(given, model.pipe, tmp_path / "videos", accelerator, adapter),
            trained_frames=None,
            shift=model.shift,
            prompts=model.prompts,
        )
        videos = []
        monkeypatch.setattr(made, "_write", lambda i, made, done: videos.append(made.video))
        made(0)
        whole = load_whole(given, model.pipe)
        for i, prompt in enumerate(given.validation_prompts):
            with accelerator.autocast(), torch.no_grad():
                expected = sample(whole, prompt, made.clip.model_copy(update={"seed": i})).video
            assert (videos[i] == expected).all()
        assert (videos[0] != videos[1]).any()


@pytest.mark.parametrize("steps", [4, 6])
def test_samples_are_at_the_levels_that_train(tmp_path, on_disk, steps):
    given = on_disk(**SHOWN | {"sampled_steps": 4, "validation_steps": steps})
    accelerator = accelerator_for(given)
    model, _ = prepare(given, accelerator)
    places = given, model.pipe, tmp_path / "videos", accelerator, None
    clip = Validation(*places, trained_frames=None, shift=model.shift).clip
    made = clip.sampling.scheduler(model.pipe.scheduler)
    made.set_timesteps(clip.steps)
    assert (clip.sampler, clip.steps) == ("euler", steps)
    due = equal_steps(steps, model.shift)
    assert made.sigmas[:-1].tolist() == pytest.approx(due, abs=1e-6)
    if steps == 4:
        assert clip.levels == levels_of(given, model.shift)


def load_whole(given, pipe):
    """The pipeline with its text encoders, as validation called it before."""
    whole = type(pipe).from_pretrained(given.model, dtype=pipe.transformer.dtype)
    whole.vae = pipe.vae
    whole.set_progress_bar_config(disable=True)
    return whole


class TestVisits:
    def test_the_autoencoder_comes_after_the_last_step(self, monkeypatch):
        pipe, seen = wan.pipeline(), []
        clip = filled(
            pipe, Clip(frames=5, height=32, width=64, steps=1, guidance_scale=1.0, max_tokens=8)
        )
        moved = evaluate._moved

        def noted(model, device):
            seen.append(type(model).__name__)
            return moved(model, device)

        monkeypatch.setattr(evaluate, "_moved", noted)
        vae = pipe.vae
        device = torch.device("cpu")

        def run(**given):
            assert pipe.vae is None
            seen.append("denoise")
            return pipe(**given)

        with evaluate.sampling_on(device, pipe, pipe.transformer, prompt=None, run=run) as called:
            sample(pipe, PROMPT, clip, run=called)
        assert seen == ["UMT5EncoderModel", "denoise", "AutoencoderKLWan"]
        assert pipe.vae is vae

    def test_it_is_back_after_an_error(self):
        pipe = wan.pipeline()
        vae = pipe.vae

        def broken(**given):
            raise RuntimeError("broken")

        device = torch.device("cpu")
        with (
            pytest.raises(RuntimeError, match="broken"),
            evaluate.sampling_on(device, pipe, pipe.transformer, prompt=None, run=broken) as run,
        ):
            run(prompt=PROMPT)
        assert pipe.vae is vae

    def test_a_family_without_encoded_prompts_keeps_its_text_encoder(
        self, on_disk, loads, monkeypatch
    ):
        monkeypatch.setitem(USES, "encoded prompts", lambda family: False)
        given = on_disk(**SHOWN)
        model, _ = prepare(given, accelerator_for(given))
        assert model.prompts is None
        assert model.pipe.text_encoder is not None
        assert loads == ["text_encoder"]
