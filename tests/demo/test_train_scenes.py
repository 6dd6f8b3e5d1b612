"""The training of a model of the world of several objects, and the score of what it makes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from demo_model import train_scenes
from demo_model.judge import judge, scored_scenes
from demo_model.scenes import BEHIND, MOVES, Group, Scene, draw, scene_of
from demo_model.train import Phase, new_tokenizer, new_transformer, psnr
from demo_model.train_scenes import FIELDS, REPORT, STAGES, Padded, Run, said, shown, words
from diffusers.models.transformers import transformer_wan

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch):
    """Two steps a stage, of small batches and models."""
    for name, value in {
        "AUTOENCODER": Phase(2, 1, 5, 32),
        "FRAMES": 5,
        "MEASURED": 8,
        "TEXT_STEPS": 2,
        "TEXT_BATCH": 4,
        "SHARD": 4,
        "PICTURES": 4,
        "CLIPS": 4,
        "PICTURE_PHASES": (Phase(2, 2, 1, 96),),
        "CLIP_PHASES": (Phase(2, 2, 2, 96),),
        "HEADS": 1,
        "LAYERS": 2,
        "CHECKPOINT": 1,
    }.items():
        monkeypatch.setattr(train_scenes, name, value)
    monkeypatch.setattr(train_scenes, "fidelity", lambda vae: {"db": 1.0})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.rglob("*.safetensors")
    return {f"{file.parent.name}/{k}": v for file in files for k, v in load_file(file).items()}


def sampled(folder: Path, scene: Scene, seed: int, frames: int, steps: int) -> torch.Tensor:
    """A clip of the pipeline in a folder, (F, H, W, 3) uint8."""
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        scene.caption,
        height=96,
        width=96,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames[0]
    return (video.movedim(1, -1) * 255).round().to(torch.uint8)


def trained(monkeypatch, work: Path, *options: str) -> Path:
    out = work / "out"
    args = ["train_scenes", "--work", str(work), "--out", str(out), "--no-compile", *options]
    monkeypatch.setattr(sys, "argv", args)
    train_scenes.main()
    return out


def test_a_training_that_is_broken_off_ends_in_the_same_bits(short, monkeypatch, tmp_path):
    nothing = "--from", str(tmp_path / "nothing")
    whole = trained(monkeypatch, tmp_path / "whole", *nothing)
    update, broken = train_scenes.update, 0

    def breaks_off(*args):
        nonlocal broken
        broken += 1
        if broken % 3 == 2:  # at the second step of each stage, and the third time at none
            raise KeyboardInterrupt
        update(*args)

    monkeypatch.setattr(train_scenes, "update", breaks_off)
    for _ in STAGES:
        with pytest.raises(KeyboardInterrupt):
            trained(monkeypatch, tmp_path / "parts", *nothing)
    parts = trained(monkeypatch, tmp_path / "parts", *nothing)
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys() != set()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []

    report = json.loads((parts / REPORT).read_text("utf-8"))
    assert [*report] == ["autoencoder", "text", "clips"]
    (scene,) = scored_scenes(1)
    assert not judge(sampled(parts, scene, seed=0, frames=5, steps=1), scene).strict


def test_what_is_finished_is_where_a_training_begins(short, monkeypatch, tmp_path):
    first = trained(monkeypatch, tmp_path / "first", "--until", "text", "--from", str(tmp_path))
    assert [*json.loads((first / REPORT).read_text("utf-8"))] == ["autoencoder", "text"]
    then = trained(monkeypatch, tmp_path / "then", "--until", "pictures", "--from", str(first))
    assert not (tmp_path / "then" / "autoencoder.safetensors").exists()
    before, after = weights(first), weights(then)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(name.startswith("transformer/") for name in after.keys() - before.keys())
    configs = [path.read_text("utf-8") for path in then.glob("*/config.json")]
    assert [text for text in configs if str(tmp_path) in text] == [] != configs


def test_what_ships_keeps_what_the_judge_sees():
    scene = scored_scenes(1)[0]
    run = Run(train_scenes.OUT, torch.device("cpu"), compiles=False)
    figures = run.report["autoencoder"]
    assert figures["db"] >= 34
    vae: Any = AutoencoderKLWan.from_pretrained(train_scenes.OUT / "vae", dtype=torch.float32)
    video = draw(scene, frames=33, seed=7).video.permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        shown = vae.decode(vae.encode(video).latent_dist.mode()).sample
    assert psnr((shown - video).square().mean().item()) == pytest.approx(figures["db"], abs=4)
    pixels = ((shown[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)
    assert judge(pixels, scene).strict


def test_what_ships_makes_first_frames_as_asked():
    pictures = [
        judge(sampled(train_scenes.OUT, scene, seed=i, frames=1, steps=10), scene)
        for i, scene in enumerate(scored_scenes(5))
    ]
    assert sum(one.right for one in pictures) >= 3


def test_one_token_stands_for_the_padding_of_any_length(monkeypatch):
    transformer = new_transformer(heads=1, layers=1, text=8).eval()
    torch.nn.init.normal_(transformer.proj_out.weight)
    noisy, text = torch.randn(2, 16, 1, 4, 4), torch.zeros(2, 512, 8)
    text[:, :20] = torch.randn(2, 20, 8)
    time = torch.tensor([500.0, 900.0])
    padded = Padded()
    padded.draw(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    lengths = (padded.more[:, 0, 0, -1].exp() + train_scenes.TEXT_TOKENS - 1).round().int()
    assert 32 < lengths.min() < lengths.max() < 512
    with torch.no_grad():
        for i, length in enumerate(lengths.tolist()):
            one = noisy[i : i + 1], time[i : i + 1], text[i : i + 1, :length]
            padded.more = torch.zeros(1, 1, 1, train_scenes.TEXT_TOKENS)
            padded.more[..., -1] = torch.tensor(length - train_scenes.TEXT_TOKENS + 1.0).log()
            wanted = transformer(*one, return_dict=False)[0]
            monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", padded)
            short = text[i : i + 1, : train_scenes.TEXT_TOKENS]
            found = transformer(one[0], one[1], short, return_dict=False)[0]
            monkeypatch.undo()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_truth_of_tokens_is_where_the_objects_are():
    scene = Scene(
        Group(1, "small", "red", "cross"),
        MOVES,
        "right",
        "quickly",
        Group(1, "large", "blue", "square"),
        BEHIND,
    )
    film = draw(scene, frames=5, seed=0)
    found = shown(scene, film)
    assert found.shape == (2, 12, 12, 4)
    for i, (color, form) in enumerate(((1, 7), (3, 4))):
        x, y = film.centers[i, 0].remainder(96).tolist()
        at = found[0, int(y // 8), int(x // 8)].tolist()
        row, column = ((place % 8 - 4) / 4 + 8 for place in (y, x))
        assert at[:2] == [color, form]
        assert at[2:] == pytest.approx([row, column], abs=0.5)
    assert not found[0, 0, 0].any()


def test_words_and_fields_are_those_of_the_captions():
    tokenizer = new_tokenizer(words())
    lengths = []
    for seed in range(300):
        scene = scene_of(seed)
        ids = tokenizer(scene.caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        lengths.append(len(ids))
        told = [known[i] for i, known in zip(said(scene), FIELDS.values(), strict=True)]
        assert told[:4] == [getattr(scene.group, name) for name in [*FIELDS][:4]]
    assert max(lengths) < train_scenes.TEXT_TOKENS


def test_drawn_first_frames_are_right_and_others_are_not():
    scenes = scored_scenes(20)
    for seed, scene in enumerate(scenes):
        picture = draw(scene, frames=1, seed=seed).video
        assert judge(picture, scene).strict
        assert not judge(picture, scenes[seed - 1]).right
