"""Key frames of MiniMax-H3: cached, shown and trained as its pipeline has them."""

import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import finetuning as ft
from support.clips import footage, sounding, tone
from support.runs import WEIGHTS

from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.families import family_named
from gen_accel.attention_processors.families.latents import FIRST_FRAME, LAST_FRAME
from gen_accel.lora import dry_run, forecast_training, trainer
from gen_accel.lora.batches import Batches, Draw
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.objective import Objective
from gen_accel.lora.prepare import model_of
from gen_accel.lora.step_trace import StepTracer
from gen_accel.measure.cost.model import subject_of
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.sampling import Clip, sample

minimax_h3 = pytest.importorskip("support.tiny.minimax_h3")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FRAMES, SIDE, PROMPT = 124, 64, "a red square"
FAMILY = family_named("minimax_h3")
SMALL: dict[str, Any] = {
    "method": "radial",
    "settings": ("block=4",),
    "stages": (f"{FRAMES}:2",),
    "height": SIDE,
    "width": SIDE,
    "max_tokens": 16,
    "sound": True,
    "fps": 24.0,
    "caption_dropout": 0.0,
}
CONDITIONS = ("first_frame", "last_frame")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(2):
        heard = tone(FRAMES / 24, 32_000, 330.0 + 110 * i)
        film = sounding(folder / f"{i}.mkv", footage(FRAMES, SIDE, SIDE, seed=i), heard, 32_000)
        film.with_suffix(".txt").write_text(PROMPT)
    return folder


@pytest.fixture(scope="module")
def caches(clips, tmp_path_factory):
    """One for each condition."""
    made = {}
    for condition in CONDITIONS:
        folder = tmp_path_factory.mktemp(condition)
        given = {"frames": [FRAMES], "sizes": [(SIDE, SIDE)], "max_tokens": 16, "fps": 24.0}
        given |= {"sound": True, "store": "float32", "condition": condition, "device": "cpu"}
        cache(minimax_h3.training(), clips, folder, **given)
        made[condition] = LatentCache(folder)
    return made


@pytest.fixture(scope="module")
def pipe():
    return minimax_h3.training()


def batch_of(pipe, latents, out, shown, seed=0):
    """A batch of the first clip, some of whose key frames are shown."""
    shares = {"first_frame_dropout": 0.5, "last_frame_dropout": 0.5}
    shares = dict([*shares.items()][: len(shown)])
    given = ft.config(out, **SMALL, condition=latents.condition, **shares)
    here: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
    adapter: Any = SimpleNamespace(inputs=lambda *_: ())
    batches = Batches(given, model_of(given, pipe), latents, adapter, here)
    clean = latents.latents(0, 37)
    drawn = Draw(torch.zeros_like(clean), 0.5, True, frames=seed)
    drawn = drawn._replace(**dict(zip(("framed", "ended"), shown, strict=False)))
    return batches.of([0], [clean], [drawn])


def watched(model, run):
    """Arguments and outputs of the transformer's calls meanwhile."""
    found = []

    def keep(module, args, given, out):
        tensors = {name: x for name, x in given.items() if torch.is_tensor(x)}
        found.append(({name: x.clone() for name, x in tensors.items()}, out))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        made = run()
    hook.remove()
    return found, made


@pytest.mark.parametrize(
    "shown",
    [(True,), (False,), (True, True), (True, False), (False, True), (False, False)],
    ids=str,
)
def test_the_model_is_called_as_by_its_pipeline(pipe, caches, tmp_path, shown):
    """Argument for argument and bit for bit, with the noise on the key frames."""
    latents = caches[CONDITIONS[len(shown) - 1]]
    pictures = [Image.fromarray(x) for x in latents.pictures(0)]
    names = ("image", "last_image")
    given = {n: x for n, x, s in zip(names, pictures, shown, strict=False) if s}
    size = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "num_inference_steps": 3}
    calls, _ = watched(
        pipe.transformer,
        lambda: pipe(
            prompt=PROMPT,
            **given,
            **size,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
        ),
    )
    conditions = batch_of(pipe, latents, tmp_path, shown, seed=7).conditions
    count = sum(shown) * 4
    for theirs, (video, audio) in calls:
        sound, of_sound = minimax_h3.heard(theirs)
        rows = theirs["hidden_states"][0, count:].view(37, 2, 2, 24, 1, 2, 2)
        noisy = rows.permute(3, 0, 4, 1, 5, 2, 6).reshape(1, 24, 37, 4, 4)
        time = theirs["timestep"][theirs["timestep_indices"][-1:]]
        ((ours, again),), (said, told) = watched(
            pipe.transformer,
            lambda noisy=noisy, sound=sound, time=time, of_sound=of_sound: FAMILY.predict_heard(
                pipe.transformer, noisy, sound, 1 - time.double(), of_sound, conditions
            ),
        )
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            assert torch.equal(ours[name], x), name
        assert all(torch.equal(a, b) for a, b in zip(again, (video, audio), strict=True))
        assert torch.equal(minimax_h3.rows(-said), video[0, count:])
        assert torch.equal(torch.cat(told.chunk(2, -1), 1), -audio)


def test_the_loss_is_of_what_is_generated(pipe, caches, tmp_path):
    """Gradients reach all latents of video and sound, and no key frame."""
    latents = caches["last_frame"]
    batch: Any = batch_of(pipe, latents, tmp_path, (True, True))
    g = torch.Generator().manual_seed(0)
    noise, sound = (torch.randn(x.shape, generator=g) for x in (batch.clean, batch.sound))
    batch = batch._replace(noise=noise, sound_noise=sound)
    adapter: Any = SimpleNamespace(modules={})
    objective = Objective(pipe.transformer, FAMILY, "flow", adapter, shifts=(12.0, 3.0))
    outs = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, out: outs.append(out))
    loss = objective(*batch)
    hook.remove()
    [(video, heard)] = outs
    towards = torch.autograd.grad(loss, (video, heard))
    pipe.transformer.zero_grad()
    assert not towards[0][0, :8].any()
    assert (towards[0][0, 8:] != 0).all(1).all()
    assert (towards[1] != 0).all()
    target = (noise - batch.clean)[0], (sound - batch.sound)[0]
    of_video = (-video[0, 8:] - minimax_h3.rows(target[0][None])).square().mean()
    told = torch.cat(torch.chunk(-heard[0], 2), 1)
    torch.testing.assert_close(loss, of_video + (told - target[1]).square().mean())


def test_each_step_draws_its_own_noise_on_the_key_frames(pipe, caches, tmp_path):
    assert 1 - FAMILY.training.frame_noise == pipe.keyframe_noise_aug
    seen = [
        batch_of(pipe, caches["last_frame"], tmp_path, (True, True), seed).conditions
        for seed in (0, 0, 1)
    ]
    for name in (FIRST_FRAME, LAST_FRAME):
        clean = caches["last_frame"].first_frame(0)[name]
        assert torch.equal(seen[0][name], seen[1][name])
        assert not torch.equal(seen[0][name], seen[2][name])
        assert 0.0007 < (seen[0][name] - 0.999 * clean).std() < 0.0013


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model") / "h3"
    minimax_h3.whole_pipeline().save_pretrained(str(found), overwrite_modular_index=True)
    return found


@pytest.mark.turns(2)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_trained_sampled_resumed_and_used(folder, clips, tmp_path, monkeypatch, condition):
    """Bit for bit, with videos that begin, and end, as a clip does."""
    names = ("image", "last_image")[: 1 + CONDITIONS.index(condition)]
    began = []

    def watched(*args, inputs, **options):
        began.append([np.array(inputs.values[name]) for name in names])
        return sample(*args, inputs=inputs, **options)

    monkeypatch.setattr("gen_accel.lora.evaluate.sample", watched)
    given = ft.config(
        tmp_path / "run",
        **SMALL,
        model=str(folder),
        data=str(clips),
        condition=condition,
        checkpoint_every=1,
        validate_every=2,
        validation_prompts=("a blue circle",),
        validation_steps=2,
    )
    done: Any = trainer.train(given)
    assert all(0 < loss < 100 for loss in done.losses)
    assert read_recipe(done.folder).condition == condition
    pictures = LatentCache(tmp_path / "run" / "cache").pictures(0)
    assert len(began) == 2
    assert all(np.array_equal(one, pictures) for one in began)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000002")
    again = given.replaced(out=str(tmp_path / "again"), validate_every=0)
    assert trainer.train(again, resume=True).losses == done.losses[1:]
    whole, resumed = (load_file(tmp_path / x / "lora" / WEIGHTS) for x in ("run", "again"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    clip = Clip(frames=FRAMES, height=SIDE, width=SIDE, steps=2)
    asked: Any = {"from_lora": done.folder, **clip.given()}
    for name, picture in zip(names, pictures, strict=True):
        with pytest.raises(ValueError, match=rf"give one, --{name.replace('_', '-')} "):
            generate(folder, [PROMPT], out=tmp_path / "a.mp4", **asked)
        asked[name] = picture
    (made,) = generate(folder, [PROMPT], out=tmp_path / "b.mp4", **asked)
    assert made.files["video"].is_file()


def test_a_share_without_key_frames(pipe, caches, tmp_path):
    """Shown at all choices, the LoRA is for text alone too."""
    given = ft.config(
        tmp_path,
        **SMALL,
        condition="last_frame",
        first_frame_dropout=0.5,
        last_frame_dropout=0.5,
        batch_size=2,
    )
    done: Any = ft.train(given, caches["last_frame"], model=model_of(given, pipe))
    assert all(0 < loss < 100 for loss in done.losses)
    assert read_recipe(done.folder).condition == "either"


def test_a_plan_counts_key_frames_and_what_the_text_encoder_makes_of_them():
    subject, traces = subject_of("MiniMax-H3", text=512), []
    for condition in ("text", "last_frame"):
        fields = {"condition": condition, "sound": True, "fps": 24.0, "caption_dropout": 0.0}
        tracer = StepTracer(subject, TrainConfig(**fields, rank=4, method="dense"))
        traces.append(tracer.trace(subject.grid(480, 832, FRAMES), 1.0))
    frame = 15 * 26  # tokens, and as many of the text encoder beside those around them
    tokens = 512 + 2 * round(FRAMES / 24 * 40) + 37 * frame
    plain, given = traces
    held = 4 * (4 * (8 + frame) * 5120 + 2 * frame * 4 * 24)  # bytes at all four choices
    assert abs(given.batch - plain.batch - held) < 20_000
    more = (tokens + 2 * (8 + 2 * frame)) / tokens
    assert abs((given.work.attention / plain.work.attention) ** 0.5 - more) < 1e-3


def test_a_plan_says_what_only_sampled_videos_leave_out(folder):
    given = ft.config("unused", **SMALL, model=str(folder), condition="first_frame")
    sampled = given.replaced(validate_every=2, validation_prompts=("a",))
    plans = (forecast_training(one, gpus=["h100"], here=False) for one in (given, sampled))
    notes = [" ".join(one.notes) for one in plans]
    assert ["key frames" in one for one in notes] == [False, True]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_dry_run(folder, clips, tmp_path, condition):
    fields = {"condition": condition, "first_frame_dropout": 0.5}
    given = ft.config(tmp_path, **SMALL, **fields, model=str(folder), data=str(clips))
    assert all(np.isfinite(dry_run(given).losses))
