"""Masks of clips: found, held to their clips, kept on the latents' grid, and weighing the loss."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import finetuning as ft
from support import wan
from support.clips import footage

from gen_accel.lora import trainer
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.inputs import reduce_mask
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.data.clips import Take
from gen_accel.lora.data.finding import find_videos
from gen_accel.lora.objective import Loss, Objective
from gen_accel.lora.prepare import check_cache
from gen_accel.measure.video_io import write_video
from gen_accel.video import Coding

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = HEIGHT, WIDTH = 32, 64
FRAMES = 9


def half(frames=FRAMES, height=HEIGHT, width=WIDTH):
    """White on the left, from frame 5 on everywhere."""
    made = np.zeros((frames, height, width, 3), np.uint8)
    made[:, :, : width // 2] = 255
    made[5:] = 255
    return made


def clip(folder, name, mask=None, frames=FRAMES, size=SIZE):
    path = write_video(footage(frames, *size), folder / f"{name}.mp4", fps=16)
    path.with_suffix(".txt").write_text("a red square")
    if mask is not None:
        write_video(mask, folder / f"{name}.mask.mp4", fps=16)
    return path


@pytest.fixture
def clips(tmp_path):
    """One clip with a film as its mask, one with a picture, one without."""
    folder = tmp_path / "clips"
    clip(folder, "a", half())
    clip(folder, "b")
    picture = np.zeros((HEIGHT // 2, WIDTH // 2, 3), np.uint8)
    picture[: HEIGHT // 4] = 255
    Image.fromarray(picture).save(folder / "b.mask.png")
    clip(folder, "c")
    return folder


def encoded(clips, out, **options):
    given = {"frames": (FRAMES,), "sizes": [SIZE], "masks": True, "max_tokens": 8}
    return cache(wan.pipeline(), clips, out, **(given | options))


class TestFound:
    def test_beside_their_clips(self, clips):
        found = find_videos(clips, masks=True)
        assert [video.name for video in found] == ["a.mp4", "b.mp4", "c.mp4"]
        names = [video.mask and video.mask.name for video in found]
        assert names == ["a.mask.mp4", "b.mask.png", None]

    def test_they_are_no_clips(self, clips):
        """Unless they have a caption of their own."""
        for pictures in ("no", "all"):
            found = find_videos(clips, pictures=pictures, default_caption="one")
            assert [(video.name, video.mask) for video in found] == [
                (name, None) for name in ("a.mp4", "b.mp4", "c.mp4")
            ]
        (clips / "a.mask.txt").write_text("black and white")
        assert "a.mask.mp4" in [video.name for video in find_videos(clips)]

    def test_in_a_manifest(self, clips):
        manifest = clips / "list.csv"
        manifest.write_text("video,caption,mask\na.mp4,red,b.mask.png\nb.mp4,red,\n")
        found = find_videos(manifest, masks=True)
        assert [v.mask and v.mask.name for v in found] == ["b.mask.png", "b.mask.png"]
        assert [v.mask for v in find_videos(manifest)] == [None, None]
        manifest.write_text("video,caption,mask\na.mp4,red,nowhere.png\n")
        with pytest.raises(FileNotFoundError, match=r"1 masks of .*nowhere"):
            find_videos(manifest, masks=True)

    def test_two_of_one_clip_are_refused(self, clips):
        Image.new("RGB", (WIDTH, HEIGHT)).save(clips / "a.mask.png")
        with pytest.raises(ValueError, match=r"a.mp4 must have one mask beside it, got a\.mask"):
            find_videos(clips, masks=True)


class TestReduced:
    def test_pixels_and_frames_of_a_latent(self):
        """The first latent is the first frame."""
        found = reduce_mask(half(), (Coding(4), 8))
        assert found.shape == (3, 4, 8)
        assert torch.equal(found[0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(4, 8))
        assert torch.equal(found[1, :, 4:], torch.zeros(4, 4))
        assert torch.equal(found[2], torch.ones(4, 8))
        one = np.zeros((5, 8, 8, 3), np.uint8)
        one[1, 0, 0] = 255
        found = reduce_mask(one, (Coding(4), 8)).flatten()
        assert torch.allclose(found, torch.tensor([0, 1 / 256]))

    def test_chunks_of_several_latents(self):
        """The first latent of each chunk of MiniMax-H3 is one frame."""
        coding = Coding(17, 5, first=5, base=2)
        assert coding.spans(39) == [1, 4, 4, 4, 4] * 2 + [1, 4]
        assert coding.latents_of(39) == 12
        assert [coding.frames_of(n) for n in (1, 2, 3, 7, 8)] == [5, 5, 22, 22, 39]
        film = np.zeros((39, 8, 8, 3), np.uint8)
        film[17] = 255
        film[38] = 255
        found = reduce_mask(film, (coding, 8)).flatten()
        assert found.tolist() == [0] * 5 + [1] + [0] * 5 + [0.25]

    def test_in_the_cache(self, clips, tmp_path):
        encoded(clips, tmp_path / "cache")
        held = LatentCache(tmp_path / "cache")
        film, picture, none = (held.mask(i, 3) for i in range(3))
        assert held.latents(0).shape[1:] == film.shape[1:]
        torch.testing.assert_close(film[0], reduce_mask(half(), (Coding(4), 8)), atol=0.03, rtol=0)
        assert picture[0, :, 0].min() > 0.9
        assert picture[0, :, 3].max() < 0.1
        assert torch.equal(none, torch.ones(1, 3, 4, 8))
        assert torch.equal(held.mask(0, 2), film[:, :2])

    def test_chunks_have_their_own(self, tmp_path):
        clip(tmp_path / "clips", "a", half(10), frames=10)
        encoded(tmp_path / "clips", tmp_path / "cache", frames=(5,), take=Take("all"))
        held = LatentCache(tmp_path / "cache")
        first, second = held.mask(0, 2), held.mask(1, 2)
        assert first[..., 4:].max() < 0.1
        assert second.min() > 0.9

    @pytest.mark.slow
    def test_only_what_changed_is_made_again(self, clips, tmp_path):
        encoded(clips, tmp_path / "cache")
        before = LatentCache(tmp_path / "cache")
        Image.new("RGB", (WIDTH, HEIGHT), "white").save(clips / "b.mask.png")
        report = encoded(clips, tmp_path / "cache")
        after = LatentCache(tmp_path / "cache")
        assert (report.encoded, report.kept) == (0, 3)
        assert torch.equal(after.mask(1, 3), torch.ones(1, 3, 4, 8))
        assert [a.latent_key for a in after.entries] == [b.latent_key for b in before.entries]
        assert after.entries[0].mask_key == before.entries[0].mask_key
        assert after.digest != before.digest
        assert after.digest_at(3) != before.digest_at(3)

    @pytest.mark.slow
    def test_without_masks_nothing_changes(self, clips, tmp_path):
        encoded(clips, tmp_path / "a", masks=False)
        for mask in clips.glob("*.mask.*"):
            mask.unlink()
        encoded(clips, tmp_path / "b", masks=False)
        a, b = LatentCache(tmp_path / "a"), LatentCache(tmp_path / "b")
        assert a.digest == b.digest
        assert (a.has_masks, a.entries[0].mask_key) == (False, None)


class TestHeldToTheirClips:
    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("mask", "match"),
        [
            (half(13), "its mask has 13 frames, the clip 9: make them equal"),
            (half(8), "its mask has 8 frames, the clip 9: make them equal"),
            (half(9, 64, 32), "its mask is 64 x 32 pixels, the clip 32 x 64"),
            (np.zeros((9, *SIZE, 3), np.uint8), "its mask is black in frames 0 to 8"),
        ],
    )
    def test_others_are_left_out_by_name(self, mask, match, clips, tmp_path, monkeypatch):
        clip(clips, "d", mask)
        report = encoded(clips, tmp_path / "cache")
        assert list(report.left_out) == ["d.mp4"]
        assert match in report.left_out["d.mp4"]
        assert len(LatentCache(tmp_path / "cache")) == 3
        with pytest.raises(OSError, match=f"d.mp4 is broken: {match}"):
            encoded(clips, tmp_path / "other", on_broken="stop")

    @pytest.mark.parametrize("first", [Take("all"), Take(scenes="cut")], ids=["all", "cut"])
    def test_a_clip_that_was_decoded_further_than_its_mask(self, first, tmp_path):
        """What is known of the clip from an earlier run may be of more frames than of the mask."""
        clip(tmp_path / "clips", "a", half(25), frames=25)
        out = tmp_path / "cache"
        encoded(tmp_path / "clips", out, take=first, masks=False)
        report = encoded(tmp_path / "clips", out, take=Take(scenes=first.scenes))
        assert not report.broken
        assert LatentCache(out).entries[0].mask_key is not None

    def test_before_anything_is_encoded(self, tmp_path, monkeypatch):
        clip(tmp_path / "clips", "a", half(13))
        pipe = wan.pipeline()
        monkeypatch.setattr(type(pipe), "encode_prompt", None)
        with pytest.raises(ValueError, match="no clip could be read: its mask has 13 frames"):
            cache(pipe, tmp_path / "clips", tmp_path / "c", frames=(9,), sizes=[SIZE], masks=True)

    def test_none_at_all_is_refused(self, tmp_path):
        clip(tmp_path / "clips", "a")
        with pytest.raises(ValueError, match=r"masks is on, and no clip of .* has one"):
            encoded(tmp_path / "clips", tmp_path / "cache")

    def test_a_cache_without_is_refused(self, clips, tmp_path):
        encoded(clips, tmp_path / "cache", masks=False, fps=16)
        given = ft.config(tmp_path, masks=True)
        with pytest.raises(ValueError, match="holds no masks: give data"):
            check_cache(given, wan.pipeline(), LatentCache(tmp_path / "cache"))

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"mask_floor": 0.5}, "mask_floor 0.5 is for masks"),
            ({"masks": True, "mask_floor": 1.5}, "mask_floor must be from 0 to 1"),
            (
                ft.IMAGES | {"masks": True, "objective": "distill_attention"},
                "masks does not go with objective distill_attention, which has",
            ),
        ],
    )
    def test_fields(self, fields, match):
        with pytest.raises(ValueError, match=match):
            ft.config("unused", **fields)


class Masked(ft.Clips):
    def mask(self, index, frames):
        g = torch.Generator().manual_seed(300 + index)
        return torch.rand((1, frames, *self.sizes[index]), generator=g).round()


class TestLoss:
    def run(self, tmp_path, clips=None, **fields):
        given = ft.config(tmp_path / "run", **fields)
        clips = clips or Masked()
        return trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), clips)

    @pytest.mark.parametrize("floor", [0.0, 0.25])
    def test_it_is_the_weighted_mean(self, floor, tmp_path, monkeypatch):
        run = self.run(tmp_path, masks=True, mask_floor=floor, batch_size=2)
        batch, seen = run.batches(0, [0, 1], 3, 0), []
        student = Objective._student
        monkeypatch.setattr(
            Objective, "_student", lambda *args: seen.append(student(*args)) or seen[-1]
        )
        with torch.no_grad():
            loss = run.objective(*batch)
        clean, noise = batch[:2]
        weights = torch.stack([Masked().mask(i, 3) for i in (0, 1)])
        weights = (floor + (1 - floor) * weights).expand_as(clean)
        errors = (seen[0] - (noise - clean)).square()
        torch.testing.assert_close(loss, (weights * errors).sum() / weights.sum())
        plain = self.run(tmp_path, batch_size=2)
        with torch.no_grad():
            assert abs(plain.objective(*plain.batches(0, [0, 1], 3, 0)) - loss) > 1e-4

    def test_white_masks_are_as_none(self, tmp_path):
        class White(ft.Clips):
            def mask(self, index, frames):
                return torch.ones(1, frames, *self.sizes[index])

        runs = self.run(tmp_path, White(), masks=True), self.run(tmp_path)
        losses = [run.objective(*run.batches(0, [0], 3, 0)) for run in runs]
        torch.testing.assert_close(*losses)

    def test_what_is_black_has_no_gradient(self):
        predicted = torch.randn(1, 2, 3, 4, 4, requires_grad=True)
        counts = torch.zeros_like(predicted)
        counts[..., :2] = 1
        Loss()(predicted, torch.zeros_like(predicted), None, counts).backward()
        assert predicted.grad[..., 2:].abs().max() == 0
        assert predicted.grad[..., :2].abs().min() > 0
        empty = Loss()(predicted, torch.zeros_like(predicted), None, torch.zeros_like(counts))
        assert empty == 0

    @pytest.mark.slow
    def test_a_training_and_its_losses_at_fixed_noise(self, clips, tmp_path):
        encoded(clips, tmp_path / "cache", fps=16)
        held = LatentCache(tmp_path / "cache")
        given = {"masks": True, "stages": ("9:2",), "loss_every": 2, "max_tokens": 8}
        done = ft.train(ft.config(tmp_path / "a", **given), held)
        other = ft.train(ft.config(tmp_path / "b", **given | {"masks": False}), held)
        assert done.losses != other.losses
        changed = given | {"mask_floor": 0.5, "stages": ("9:4",)}
        with pytest.raises(ValueError, match=r"mask_floor: 0\.0, now 0\.5"):
            ft.train(ft.config(tmp_path / "a", **changed), held, resume=True)
