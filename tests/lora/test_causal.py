"""Training of chunks: the loss of a clip against its chunks one by one, draws, refusals."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import finetuning as ft
from support import wan
from support.image_models import cogvideox
from support.objectives import built, say_something

from gen_accel.attention_processors.attached.recipe import WEIGHTS, read_recipe
from gen_accel.attention_processors.families import family_named
from gen_accel.lora import TrainConfig
from gen_accel.lora.adapters import active
from gen_accel.lora.causal import CausalChunks, check_chunks
from gen_accel.measure.video_io import read_video
from gen_accel.pipelines.generation.stream import StreamSettings
from gen_accel.pipelines.long_video.chunks import ChunkedAttention
from gen_accel.pipelines.zones import Zones

family = family_named("wan")
pytestmark = pytest.mark.usefixtures("one_thread")


def fields(**more):
    plain = {"objective": "causal", "method": "dense", "settings": (), "chunk_frames": 1}
    return plain | {"stages": ("17:4",), "caption_dropout": 0.0, "middle": "salient"} | more


def clip(frames=5, count=2):
    g = torch.Generator().manual_seed(3)
    size = count, wan.CHANNELS, frames, *ft.LATENTS
    clean, noise = (torch.randn(size, generator=g) for _ in range(2))
    return clean, noise, torch.rand((count, frames, 6, wan.TEXT_WIDTH), generator=g)


def objective_of(**more):
    given = TrainConfig(**fields(**more))
    made, stock = built("causal", method="dense", settings=())
    made._chunks = CausalChunks.of(given, made.transformer, 3.0)
    made.chunked = ChunkedAttention(made.transformer, made._chunks.zones)
    say_something(made)
    return made, stock


class TestLoss:
    @torch.no_grad()
    @pytest.mark.parametrize("seed", [1, 2, 5])
    def test_it_is_the_mean_over_the_chunks_one_by_one(self, seed):
        objective, _ = objective_of()
        clean, noise, text = clip()
        seeds = torch.tensor([seed, 40])
        sigma = torch.full((2,), 0.5)
        told = {"encoder_hidden_states": text}
        mask = torch.rand((2, 1, *clean.shape[2:]), generator=torch.Generator().manual_seed(4))
        mask = mask if seed == 5 else None
        found = objective(clean, noise, sigma, told, None, None, mask, (), None, None, seeds)
        drawn = objective._chunks.draw(seeds.tolist(), sigma, clean)
        objective.chunked.remove()

        attention, losses = ChunkedAttention(objective.transformer, drawn.zones), []
        mask = torch.ones_like(clean) if mask is None else mask.expand_as(clean)
        for i in range(5):
            x, e, c, m = (one[:, :, i : i + 1] for one in (clean, noise, drawn.noise, mask))
            told = {"encoder_hidden_states": text[:, i]}

            def mix(noise, levels, x=x, i=i):
                s = levels[:, i].view(-1, 1, 1, 1, 1)
                return (1 - s) * x + s * noise, levels[:, i]

            with attention.chunk("cond"):
                noisy, level = mix(e, drawn.levels)
                said = family.predict(objective.transformer, noisy, level, told)
                losses.append((m * (said - (e - x)).square()).sum())
            with attention.chunk("cond", keeps=True):
                family.predict(objective.transformer, *mix(c, drawn.context), told)
        attention.remove()
        torch.testing.assert_close(found, sum(losses) / mask.sum(), rtol=1e-5, atol=0)

    @torch.no_grad()
    def test_guidance_is_taught_by_chunks_too(self):
        """The teacher, which is the model without the LoRA here, sees its own chunks."""
        objective, stock = objective_of()
        objective._guidance = 3.0
        clean, noise, text = clip()
        told, empty = ({"encoder_hidden_states": x} for x in (text, torch.zeros_like(text)))
        seeds, sigma = torch.tensor([7, 40]), torch.full((2,), 0.5)

        @contextmanager
        def teaching():
            with active(objective.transformer, None):
                yield

        objective._adapter.teaching = teaching
        found = objective(clean, noise, sigma, told, None, empty, None, (), None, None, seeds)
        drawn = objective._chunks.draw(seeds.tolist(), sigma, clean)
        own = objective.chunked.now
        objective.chunked.remove()

        def all_chunks(model, text):
            attention = ChunkedAttention(model, drawn.zones)
            attention.now = own
            split = objective._chunks.split
            parts = []
            for noise_of, levels in ((drawn.noise, drawn.context), (noise, drawn.levels)):
                s = levels.view(2, 5, 1, 1, 1, 1)
                parts.append((1 - s) * split(clean) + s * split(noise_of))
            said = family.predict(
                model,
                own.rows(*parts),
                own.rows(drawn.context, drawn.levels),
                {"encoder_hidden_states": own.rows(text, text)},
            )
            attention.remove()
            return own.noisy(said)

        cond, uncond = (all_chunks(stock, x) for x in (text, torch.zeros_like(text)))
        student = all_chunks(objective.transformer, text)
        expected = F.mse_loss(student, uncond + 3.0 * (cond - uncond))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert found > 0

    @torch.no_grad()
    def test_without_seeds_all_chunks_have_the_level_after_clean_ones(self):
        objective, _ = objective_of()
        drawn = objective._chunks.draw(None, torch.tensor([0.3, 0.6]), clip()[0])
        assert drawn.levels.tolist() == [pytest.approx([0.3] * 5), pytest.approx([0.6] * 5)]
        assert not drawn.context.any()
        assert drawn.zones == Zones(1, 2, 0, "salient", 4)


class TestDraws:
    def test_they_follow_from_the_seeds(self):
        chunks = CausalChunks.of(TrainConfig(**fields()), wan.transformer(), 3.0)
        like = clip()[0]
        one, same = (chunks.draw([3, 4], torch.zeros(2), like) for _ in range(2))
        assert one.zones == same.zones
        for a, b in zip(one[:3], same[:3], strict=True):
            assert torch.equal(a, b)
        other = chunks.draw([5, 4], torch.zeros(2), like)
        assert not torch.equal(one.levels[0], other.levels[0])
        assert torch.equal(one.levels[1], other.levels[1])

    def test_all_kinds_of_caches_are_shown(self):
        given = TrainConfig(**fields(window=3, middle="none"))
        chunks = CausalChunks.of(given, wan.transformer(), 3.0)
        like, seen, own, clean = torch.zeros(1, 1, 4, 1, 1), set(), 0, 0
        for seed in range(200):
            drawn = chunks.draw([seed], torch.zeros(1), like)
            seen.add((drawn.zones.window, drawn.zones.sink > 0, drawn.zones.middle))
            own += drawn.zones.middle == "none"
            clean += not drawn.context.any()
            assert drawn.context.max() <= 0.3
        assert len(seen) == 3 * 2 * 3
        assert 110 < own < 160
        assert 30 < clean < 90


class TestTraining:
    @pytest.mark.slow
    def test_resume_is_the_same_to_the_bit(self, tmp_path):
        given = ft.config(tmp_path / "a", **fields(checkpoint_every=2))
        whole = ft.train(given)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
        shutil.rmtree(tmp_path / "b" / "lora")
        rest = ft.train(given.replaced(out=str(tmp_path / "b")), resume=True)
        assert rest.losses == whole.losses[2:]
        files = [tmp_path / one / "lora" / WEIGHTS for one in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()

    @pytest.mark.slow
    def test_checkpointing_sees_the_same_chunks_again(self, tmp_path):
        made = [
            ft.train(ft.config(tmp_path / kind, **fields(), gradient_checkpointing=kind)).losses
            for kind in ("off", "on")
        ]
        assert made[0] == pytest.approx(made[1], rel=1e-5)

    def test_the_lora_says_how_it_streams(self, tmp_path):
        given = ft.config(tmp_path, **fields(stages=("17:1",), sink=1, context_noise=0.15))
        recipe = read_recipe(ft.train(given).folder)
        zones = Zones(1, 2, 1, "salient", 4)
        assert StreamSettings.of(recipe) == StreamSettings(zones, 0.05, 3.0)
        assert StreamSettings.of(replace(recipe, stream=None)) is None

    @pytest.mark.slow
    def test_validation_videos_are_streams(self, tmp_path):
        prompts = ("0: a\n9: b",)
        sampled = {"validate_every": 2, "validation_prompts": prompts, "validation_steps": 2}
        given = ft.config(tmp_path, **fields(**sampled, validation_frames=25, guidance_scale=1.0))
        whole = ft.train(given, pipe=wan.pipeline())
        plain = ft.train(ft.config(tmp_path / "plain", **fields()))
        assert whole.losses == plain.losses
        shown = tmp_path / "validation" / "step-000004"
        assert len(read_video(shown / "00.mp4")) == 25

    @pytest.mark.slow
    def test_the_loss_falls(self, tmp_path):
        losses = ft.train(ft.config(tmp_path, **fields(stages=("17:60",)))).losses
        assert sum(losses[-15:]) < sum(losses[:15])


class TestRefusals:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"objective": "flow"}, "chunk_frames 1 is for objective causal, got flow"),
            ({"window": 1, "sink": 2}, "window 1 is below sink 2"),
            ({"middle": "none", "remembered": 3}, "remembered 3 is of a middle"),
            ({"student_steps": 4}, "student_steps 4 does not go with objective causal"),
            (
                {"condition": "first_frame"},
                "condition first_frame does not go with objective causal",
            ),
            ({"stages": ("17:4:riflex",)}, "begin again in each chunk .* leave riflex out"),
            ({"teacher_guidance": 3.0}, "give teacher_lora, the LoRA of a causal training"),
            ({"teacher_lora": "x"}, "give teacher_guidance, as 3"),
            ({"part": "both"}, "part both does not go with objective causal"),
            ({"validation_prompts": ("0: a\n17: b",)}, "from frame 17, and its video has 17"),
        ],
    )
    def test_fields_that_do_not_go_together(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**(fields() | wrong))

    def test_clips_that_chunks_do_not_divide(self):
        given, model = TrainConfig(**fields(chunk_frames=2)), wan.transformer()
        with pytest.raises(ValueError, match="5 latent frames, which are not two or more chunks"):
            check_chunks(given, model, "text", [5])
        with pytest.raises(ValueError, match="not two or more chunks of chunk_frames 2"):
            check_chunks(given, model, "text", [2])
        check_chunks(given, model, "text", [4])

    def test_models_that_do_not_stream(self):
        given = TrainConfig(**fields())
        with pytest.raises(ValueError, match="no streams for CogVideoXTransformer3DModel"):
            check_chunks(given, cogvideox(), "text", [5])
        with pytest.raises(ValueError, match="trained under condition first_frame"):
            check_chunks(given, wan.transformer(), "first_frame", [5])
