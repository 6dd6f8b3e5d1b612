"""What single families do in a training beside what all do."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline, SkyReelsV2DiffusionForcingPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.clips import footage
from support.runs import WEIGHTS
from support.tiny import cosmos, kandinsky5, ltx2, skyreels

from gen_accel import extend
from gen_accel.attention_processors.families import family_named, family_of
from gen_accel.attention_processors.families.kandinsky import positions_by_size
from gen_accel.attention_processors.families.latents import FIRST_FRAME
from gen_accel.lora import TrainConfig, dry_run
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.objective import Objective
from gen_accel.lora.prepare import model_of
from gen_accel.pipelines.long_video import known_trained_frames

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red square moves right"
SIZES = {"num_frames": 9, "height": 32, "width": 48}


def calls_of(pipe, run):
    """What the transformer is given and gives meanwhile, which pipelines overwrite."""
    found = []

    def keep(module, args, named, out):
        copied = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in named.items()}
        found.append((copied, out[0]))

    hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        result = run()
    hook.remove()
    return found, result


def generate(pipe, steps=2, **options):
    given = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    given |= {"generator": torch.Generator().manual_seed(5)} | SIZES
    return pipe(prompt=PROMPT, **(given | options)).frames


class TestCosmos:
    """Predict2, whose pipeline steps by the scales of EDM."""

    def test_from_a_first_frame_as_the_pipeline_calls_it(self):
        pipe, family = cosmos.predict2(), family_named("cosmos")
        picture, model = wan.picture(0).resize((48, 32)), pipe.transformer
        options = {"image": picture, "max_sequence_length": 16}
        calls, _ = calls_of(pipe, lambda: generate(pipe, **options))
        told = family.encode_prompt(pipe, [PROMPT], 16)
        assert torch.equal(calls[0][0]["encoder_hidden_states"], told["encoder_hidden_states"])
        frame = {FIRST_FRAME: calls[0][0]["hidden_states"][:, :, :1]}
        assert len(calls) == 2
        for i, (theirs, out) in enumerate(calls):
            s = pipe.scheduler.sigmas[i]
            noisy = theirs["hidden_states"].clone()
            noisy[:, :, 0] = 7  # of no account
            ((ours, again),), velocity = calls_of(
                pipe,
                lambda noisy=noisy, s=s: family.predict(
                    model, noisy, (s / (s + 1)).view(1), told | frame
                ),
            )
            assert ours.keys() == theirs.keys() - {"hidden_states"}
            for name in ("timestep", "encoder_hidden_states", "condition_mask", "padding_mask"):
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-8, rtol=1e-7)
            assert ours["fps"] == theirs["fps"] == 16
            assert torch.equal(again, out)
            assert torch.equal(velocity, out)

    def test_the_first_frame_is_what_the_pipeline_encodes(self, monkeypatch):
        pipe, family = cosmos.predict2(), family_named("cosmos")
        picture = wan.picture(0).resize((48, 32))
        found = family.first_frame(pipe, pipe.transformer, picture, 9)[FIRST_FRAME]
        video = pipe.video_processor.preprocess(picture, 32, 48).unsqueeze(2)
        monkeypatch.setattr(  # the pipeline draws, and the training takes the mode
            DiagonalGaussianDistribution, "sample", lambda own, generator: own.mode()
        )
        theirs = pipe.prepare_latents(
            video, 1, wan.CHANNELS, 32, 48, 9, False, torch.float32, torch.device("cpu")
        )[1]
        torch.testing.assert_close(found, theirs[0, :, :1], atol=1e-5, rtol=1e-5)

    def test_the_scales_of_edm_lead_a_velocity_to_the_clip(self):
        """A network that gives noise - clean at t = s / (1 + s) takes the pipeline there."""
        pipe = cosmos.predict2()
        g = torch.Generator().manual_seed(1)
        clean, noise = torch.randn(2, 1, wan.CHANNELS, 3, 4, 6, generator=g)
        hook = pipe.transformer.register_forward_hook(lambda *_: (noise - clean,))
        picture = wan.picture(0).resize((48, 32))
        start = clean / pipe.sigma_max + noise  # which it takes times the highest level
        made = generate(pipe, 6, image=picture, latents=start, max_sequence_length=16)
        hook.remove()
        torch.testing.assert_close(
            made[:, :, 1:],
            (clean + pipe.sigma_min * noise)[:, :, 1:],
            atol=1e-3,
            rtol=1e-3,
        )

    def test_clips_of_another_rate(self):
        """As the pipeline with that rate. Predict2.5 is not told."""
        pipe, family = cosmos.predict2(), family_named("cosmos")
        picture = wan.picture(0).resize((48, 32))
        options = {"image": picture, "max_sequence_length": 16, "fps": 10}
        ((theirs, out), *_), _ = calls_of(pipe, lambda: generate(pipe, 1, **options))
        s = pipe.scheduler.sigmas[0]
        told = family.encode_prompt(pipe, [PROMPT], 16)
        told |= {FIRST_FRAME: theirs["hidden_states"][:, :, :1]}
        with torch.no_grad():
            given = (pipe.transformer, theirs["hidden_states"], (s / (s + 1)).view(1))
            found = family.predict(*given, told | {"fps": torch.tensor([10.0])})
            own = family.predict(*given, told)
        torch.testing.assert_close(found, out, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(own, out, atol=1e-4)
        other = cosmos.predict25()
        text = family.encode_prompt(other, [PROMPT], 16)
        noisy, level = torch.randn(1, wan.CHANNELS, 3, 4, 6), torch.tensor([0.5])
        with torch.no_grad():
            a, b = (
                family.predict(other.transformer, noisy, level, text | more)
                for more in ({}, {"fps": torch.tensor([10.0])})
            )
        assert torch.equal(a, b)

    def test_interpolated_positions_are_those_of_twice_the_rate(self):
        model, family = cosmos.predict2().transformer, family_named("cosmos")
        latents = torch.zeros(1, wan.CHANNELS + 1, 5, 4, 6)
        own = {fps: model.rope(latents, fps=fps) for fps in (16, 10, None)}
        at_twice = {fps: model.rope(latents, fps=2 * fps) for fps in (16, 10)}
        freqs = family.temporal_frequencies(model)
        family.set_temporal_frequencies(model, freqs)
        for fps, tables in own.items():
            for mine, theirs in zip(model.rope(latents, fps=fps), tables, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
        family.set_temporal_frequencies(model, freqs / 2)
        for fps, tables in at_twice.items():
            halved = model.rope(latents, fps=fps)
            for mine, theirs, before in zip(halved, tables, own[fps], strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
                assert (mine - before).abs().max() > 0.1
        with pytest.raises(ValueError, match=r"freqs must be of shape \(4,\), got \(3,\)"):
            family.set_temporal_frequencies(model, freqs[:3])
        family.set_temporal_frequencies(model, None)
        again = model.rope(latents, fps=16)
        assert all(torch.equal(x, y) for x, y in zip(again, own[16], strict=True))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({}, "Cosmos 1 is preconditioned by the scales of EDM"),
            ({"extra_pos_embed_type": None, "controlnet_block_every_n": 7}, "a second model"),
        ],
    )
    def test_models_that_are_not_trained(self, config, message, tmp_path):
        pipe = cosmos.predict25()
        pipe.transformer = cosmos.transformer(in_channels=wan.CHANNELS, **config)
        clip = CaptionedVideo("clip", PROMPT, b"never read")
        with pytest.raises(ValueError, match=message):
            cache(pipe, [clip], tmp_path, frames=[9], sizes=[(32, 48)])
        with pytest.raises(ValueError, match=message):
            model_of(ft.config("unused"), pipe)

    def test_cosmos_1_is_refused_before_it_is_fetched(self):
        with pytest.raises(ValueError, match=r"no training for .*Cosmos 1 is preconditioned"):
            dry_run(TrainConfig(model="nvidia/Cosmos-1.0-Diffusion-7B-Text2World"))

    def test_its_padding_mask_needs_torchvision(self, monkeypatch):
        monkeypatch.setattr(
            "gen_accel.attention_processors.families.cosmos.find_spec", lambda name: None
        )
        with pytest.raises(ValueError, match="pip install torchvision"):
            model_of(ft.config("unused"), cosmos.predict25())

    def test_lengths(self):
        family = family_named("cosmos")
        first, second = cosmos.transformer(), cosmos.predict2().transformer
        assert (known_trained_frames(first), known_trained_frames(second)) == (121, 93)
        assert tuple(family.sizes_of(one.config).temporal for one in (first, second)) == (8, 4)
        assert tuple(family.sizes_of(one.config).fps for one in (first, second)) == (30, 16)
        assert family.longest(first) == 8
        assert family.longest(second) == 16  # of rows and columns
        with pytest.raises(ValueError, match="Cosmos 1 has learnt positions"):
            extend(first, "riflex", num_frames=41, trained_frames=17)


class TestKandinsky:
    def test_from_a_first_frame_as_the_pipeline_calls_it(self):
        pipe = kandinsky5.texts(Kandinsky5I2VPipeline, visual_cond=True)
        family, picture = family_named("kandinsky5"), wan.picture(0).resize((48, 32))
        calls, _ = calls_of(pipe, lambda: generate(pipe, image=picture))
        told = family.encode_prompt(pipe, [PROMPT], 16)
        channels = kandinsky5.CHANNELS
        for i, (theirs, out) in enumerate(calls):
            noisy = theirs["hidden_states"][..., :channels].movedim(-1, 1).clone()
            frame = {FIRST_FRAME: noisy[:, :, :1].clone()}
            noisy[:, :, 0] = 7  # of no account
            level = pipe.scheduler.sigmas[i].view(1)
            ((ours, again),), velocity = calls_of(
                pipe,
                lambda noisy=noisy, level=level, frame=frame: family.predict(
                    pipe.transformer, noisy, level, told | frame
                ),
            )
            for name in ("hidden_states", "timestep", "encoder_hidden_states", "text_rope_pos"):
                assert torch.equal(ours[name], theirs[name]), name
            assert torch.equal(again, out)
            assert torch.equal(velocity.movedim(1, -1), out)

    def test_texts_are_encoded_alone_and_padded(self):
        pipe, family = kandinsky5.texts(), family_named("kandinsky5")
        prompts = [PROMPT, "a blue circle", ""]
        found = family.encode_prompt(pipe, prompts, 16)
        assert len(set(found["text_tokens"].tolist())) == 3
        for row, prompt in enumerate(prompts):
            text, clip, lengths = pipe.encode_prompt([prompt], max_sequence_length=16)
            count = found["text_tokens"][row].item()
            assert count == lengths.diff().item() == text.shape[1]
            states = found["encoder_hidden_states"][row]
            assert torch.equal(states[:count], text[0])
            assert not states[count:].any()
            assert torch.equal(found["pooled_projections"][row], clip[0])

    def test_texts_of_one_length_in_a_batch(self):
        pipe, family = kandinsky5.texts(), family_named("kandinsky5")
        noisy, level = torch.randn(2, kandinsky5.CHANNELS, 3, 4, 6), torch.tensor([0.5, 0.7])
        told = family.encode_prompt(pipe, [PROMPT, PROMPT], 16)
        with torch.no_grad():
            assert family.predict(pipe.transformer, noisy, level, told).shape == noisy.shape
            mixed = family.encode_prompt(pipe, [PROMPT, "a circle"], 16)
            with pytest.raises(ValueError, match=r"text_tokens must be one number in a batch"):
                family.predict(pipe.transformer, noisy, level, mixed)
        given = ft.config("unused", stages=("9:2",), height=32, width=48, batch_size=2)
        with pytest.raises(ValueError, match=r"batch_size must be 1 for Kandinsky 5.*got 2: "):
            model_of(given, pipe)

    @pytest.mark.parametrize("size", [(60, 60), (106, 106), (59, 60), (60, 108)])
    def test_positions_by_size(self, size):
        pipe = kandinsky5.texts()
        height, width = (8 * n for n in size)
        assert positions_by_size(height, width) == pipe._get_scale_factor(height, width)

    def test_its_own_sparse_attention(self):
        pipe = kandinsky5.texts(attention_type="nabla")
        with pytest.raises(ValueError, match="attention_type 'nabla', does not go with a method"):
            model_of(ft.config("unused"), pipe)

    def test_of_single_images(self):
        family = family_named("kandinsky5")
        assert "makes no videos" in family.no_training("Kandinsky5T2IPipeline", {})
        assert family.no_training("Kandinsky5T2VPipeline", {}) is None


class TestLTX2:
    def test_the_video_does_not_hear(self):
        """Its prediction is that of the pipeline's call without sound, whatever the sound is."""
        pipe, family = ltx2.texts(), family_named("ltx2")
        model, told = pipe.transformer, family.encode_prompt(pipe, [PROMPT], 16)
        g = torch.Generator().manual_seed(1)
        noisy, level = torch.randn(1, ltx2.CHANNELS, 3, 2, 3, generator=g), torch.tensor([0.7])
        given = {
            "hidden_states": ltx2.packed(noisy),
            "timestep": 1000 * level,
            "sigma": 1000 * level,
            **told,
            **{"num_frames": 3, "height": 2, "width": 3, "return_dict": False},
        }
        heard = []
        with torch.no_grad():
            predicted = ltx2.packed(family.predict(model, noisy, level, told))
            for sound in (5, 9):
                audio = torch.randn(1, sound, ltx2.SOUND_CHANNELS, generator=g)
                words = torch.randn(1, 16, ltx2.TEXT_WIDTH, generator=g)
                more = {"audio_hidden_states": audio, "audio_num_frames": sound}
                more["audio_encoder_hidden_states"] = words
                apart = model(**given, **more, isolate_modalities=True)[0]
                assert torch.equal(predicted, apart)
                heard.append(model(**given, **more)[0])
        assert not torch.allclose(heard[0], predicted, atol=1e-4)
        assert not torch.allclose(heard[0], heard[1], atol=1e-5)

    @pytest.mark.parametrize("config", [{}, {"rope_type": "split"}], ids=["interleaved", "split"])
    def test_interpolated_positions_are_those_of_twice_the_rate(self, config):
        """Positions are in seconds: half the frequency is half the time."""
        model, family = ltx2.transformer(**config), family_named("ltx2")
        coords = [
            model.rope.prepare_video_coords(2, 5, 2, 3, torch.device("cpu"), fps=fps)
            for fps in (24.0, 48.0)
        ]
        own, at_twice = (model.rope(x) for x in coords)
        family.set_temporal_frequencies(model, family.temporal_frequencies(model) / 2)
        halved = model.rope(coords[0])
        assert all(x.shape == y.shape for x, y in zip(halved, own, strict=True))
        for mine, theirs, before in zip(halved, at_twice, own, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)
            assert (mine - before).abs().max() > 0.1
        family.set_temporal_frequencies(model, None)
        again = model.rope(coords[0])
        assert all(torch.equal(x, y) for x, y in zip(again, own, strict=True))

    def test_its_frequencies_turn_a_frame_into_the_next(self):
        model, family = ltx2.transformer(), family_named("ltx2")
        coords = model.rope.prepare_video_coords(1, 4, 1, 1, torch.device("cpu"))
        cos, sin = (x[0].double() for x in model.rope(coords))
        padding = model.rope.dim % 6
        freqs = family.temporal_frequencies(model)
        turned = (torch.complex(cos, sin)[2] / torch.complex(cos, sin)[1])[padding::6]
        expected = torch.complex(freqs.cos(), freqs.sin())
        low = freqs < 100  # the model's own table is float32
        torch.testing.assert_close(turned[low], expected[low], atol=1e-2, rtol=0)

    def test_the_connectors_belong_to_the_text(self, tmp_path):
        """Another one makes other latents of the same prompt."""
        from gen_accel.lora.caching.encoders import Encoders

        parts = family_named("ltx2").training.text_parts
        states = []
        for weight in (0.0, 1.0):
            pipe = ltx2.texts()
            with torch.no_grad():
                pipe.connectors.text_proj_in.weight += weight
            found = Encoders(pipe, pipe.transformer, torch.device("cpu")).states(*parts)
            states.append(dict(map(tuple, found)))
        assert states[0]["text_encoder"] == states[1]["text_encoder"]
        assert states[0]["connectors"] != states[1]["connectors"]


class TestSkyReels:
    @pytest.mark.parametrize("told", [False, True])
    def test_diffusion_forcing_with_all_frames_alike(self, told):
        """The pipeline's synchronous mode, of models with and without the frame rate."""
        family = family_named("skyreels")
        model = skyreels.transformer(inject_sample_info=told)
        pipe = wan.pipeline(SkyReelsV2DiffusionForcingPipeline, transformer=model)
        text = family.encode_prompt(pipe, [PROMPT], 16)
        rates = {24: torch.tensor([24.0]), 16: torch.tensor([16.0])}
        made = {}
        for rate, fps in rates.items():
            calls, _ = calls_of(
                pipe, lambda rate=rate: generate(pipe, max_sequence_length=16, fps=rate)
            )
            assert len(calls) == 2
            for theirs, out in calls:
                times = theirs["timestep"]
                assert times.shape == (1, 3)
                assert (times == times[0, 0]).all()
                with torch.no_grad():
                    found = family.predict(
                        model, theirs["hidden_states"], times[:, 0] / 1000, text | {"fps": fps}
                    )
                torch.testing.assert_close(found, out, atol=1e-5, rtol=1e-5)
            made[rate] = found
        assert torch.equal(made[16], made[24]) != told

    def test_a_batch_that_is_told_the_rate(self):
        family, model = family_named("skyreels"), skyreels.transformer(inject_sample_info=True)
        noisy, level = torch.randn(2, wan.CHANNELS, 3, 4, 6), torch.tensor([0.5, 0.7])
        text = {"encoder_hidden_states": torch.randn(2, 5, wan.TEXT_WIDTH)}
        with torch.no_grad():
            both = family.predict(model, noisy, level, text)
            for i in range(2):
                row = {name: x[i : i + 1] for name, x in text.items()}
                alone = family.predict(model, noisy[i : i + 1], level[i : i + 1], row)
                torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "model", "frames"),
    [
        ("skyreels", skyreels.transformer, 97),
        ("kandinsky5", kandinsky5.transformer, 121),
        ("ltx2", ltx2.transformer, 481),
    ],
)
def test_what_is_known_of_the_published_models(name, model, frames):
    assert known_trained_frames(model()) == frames
    assert frames == family_named(name).sizes.frames


def from_a_picture():
    return kandinsky5.texts(Kandinsky5I2VPipeline, visual_cond=True)


@pytest.mark.slow
@pytest.mark.parametrize("build", [cosmos.predict2, from_a_picture], ids=["cosmos", "kandinsky5"])
def test_two_steps_from_first_frames_resumed_bit_for_bit(build, tmp_path):
    pipe = build()
    footages = [CaptionedVideo(f"clip {i}", PROMPT, footage(9, 32, 48, seed=i)) for i in range(2)]
    sizes = {"frames": [9], "sizes": [(32, 48)], "max_tokens": 16, "device": "cpu"}
    cache(pipe, footages, tmp_path / "cache", **sizes)
    latents = LatentCache(tmp_path / "cache")
    assert latents.condition == "first_frame"
    assert latents.first_frame(0)[FIRST_FRAME].shape == latents.latents(0)[:, :1].shape
    small = {"method": "radial", "settings": ("block=4",), "stages": ("9:2",), "max_tokens": 16}
    small |= {"height": 32, "width": 48, "trained_frames": 9, "checkpoint_every": 1}
    given = ft.config(tmp_path / "a", **small)
    done = ft.train(given, latents, model=model_of(given, pipe))
    assert len(done.losses) == 2
    assert all(0 < loss < 100 for loss in done.losses)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000002")
    given = ft.config(tmp_path / "b", **small)
    again = ft.train(given, latents, model=model_of(given, build()), resume=True)
    assert again.losses == done.losses[1:]
    a, b = (load_file(x.folder / WEIGHTS) for x in (done, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("build", [cosmos.predict2, from_a_picture], ids=["cosmos", "kandinsky5"])
def test_the_given_frame_has_no_part_in_the_loss(build):
    """Neither what is noised there, nor what is predicted there."""
    pipe = build()
    family = family_of(pipe.transformer)
    channels = family.latent_channels(pipe.transformer.config)
    g = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 1, channels, 3, 4, 6, generator=g)
    told = family.encode_prompt(pipe, [PROMPT], 16) | {FIRST_FRAME: clean[:, :, :1].clone()}
    objective = Objective(pipe.transformer, family, "flow", no_adapter())
    level = torch.tensor([0.5])
    with torch.no_grad():
        loss = objective(clean, noise, level, told)
        other = noise.clone()
        other[:, :, 0] += 5
        assert torch.equal(objective(clean, other, level, told), loss)
        without = {name: x for name, x in told.items() if name != FIRST_FRAME}
        assert not torch.allclose(objective(clean, noise, level, without), loss)


def no_adapter():
    """A training of nothing."""
    return SimpleNamespace(modules={}, showing=nullcontext, teaching=nullcontext)
