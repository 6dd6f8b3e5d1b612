"""Every family that trains, held to its pipeline: what is encoded, predicted and learned."""

import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from safetensors.torch import load_file
from support import finetuning as ft
from support.clips import footage, sounding, tone
from support.runs import WEIGHTS
from support.tiny import Training, cogvideox, hunyuan_video15, trainings
from torch import Tensor

from gen_accel import extend
from gen_accel.attention_processors.families import FAMILIES, Family, family_named
from gen_accel.lora import TrainConfig, dry_run
from gen_accel.lora.batches import SIGMAS
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.objective import Noising, shift_of
from gen_accel.lora.prepare import model_of
from gen_accel.pipelines.generation.loading import add_loras
from gen_accel.pipelines.long_video import RULES, apply_rule
from gen_accel.pipelines.sampler import shifted
from gen_accel.video import Coding, vae_factor

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.turns(3)]

CASES = trainings()
IN_SECONDS = [one for one in CASES if one[1].rate is not None]
# Rotary, and of latent frames that lie evenly in time.
ROTARY = [one for one in CASES if one[1].rules and one[1].is_even]
PROMPT = "a red square moves right"


def copied(value):
    """Copy an argument, which some pipelines overwrite."""
    return value.clone() if isinstance(value, Tensor) else value


class Case:
    """A family, and one of its pipelines."""

    def __init__(self, family: Family, training: Training):
        self.family, self.training = family, training
        self.pipe = training.pipeline()
        frames, height, width = training.size
        self.sizes = {"num_frames": frames, "height": height, "width": width}

    def run(self, steps: int = 2, **options):
        given = {
            "prompt": PROMPT,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(5),
            "output_type": "latent",
        }
        return self.pipe(**(given | self.sizes | self.training.options | options))

    def calls(self, call, *args, **kwargs):
        """Record what the transformer is given and gives meanwhile."""
        found = []

        def keep(module, given, named, out):
            if self.training.compared(named):
                found.append((given, {k: copied(v) for k, v in named.items()}, out[0]))

        hook = self.pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        with torch.no_grad():
            result = call(*args, **kwargs)
        hook.remove()
        return found, result

    def pixels(self, frames: int | None = None) -> Tensor:
        sizes = self.sizes | ({} if frames is None else {"num_frames": frames})
        g = torch.Generator().manual_seed(6)
        return torch.rand((1, 3, *sizes.values()), generator=g) * 2 - 1

    @property
    def coding(self) -> Coding:
        return self.family.sizes.coding(vae_factor(self.pipe, "temporal"))

    def latents(self, seed: int) -> Tensor:
        space = vae_factor(self.pipe, "spatial")
        frames, height, width = self.training.size
        channels = self.family.latent_channels(self.pipe.transformer.config)
        shape = (1, channels, self.coding.latents_of(frames), height // space, width // space)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def fed(self, latents: Tensor) -> Tensor:
        return (self.training.fed or self.training.lay)(latents)

    def starts(self, latents: Tensor) -> Tensor:
        return (self.training.starts or self.training.lay)(latents)

    def said(self, predicted: Tensor) -> Tensor:
        return (self.training.said or self.training.lay)(predicted)

    def predict(self, noisy: Tensor, level: Tensor, conditions, theirs) -> Tensor:
        """The training's prediction for the video, with the sound of the pipeline's call."""
        model = self.pipe.transformer
        if self.training.heard is None:
            return self.family.predict(model, noisy, level, conditions)
        sound = self.training.heard(theirs)
        return self.family.predict_heard(model, noisy, sound[0], level, sound[1], conditions)[0]

    @property
    def sound(self):
        """Fields of a training, of a cache too, with sound where the model needs some."""
        needs = self.family.training.needs_sound
        return {"sound": True, "fps": self.family.sizes.fps} if needs else {}


def name_of(one: tuple[str, Training]) -> str:
    return one[1].name


@pytest.fixture(params=CASES, ids=name_of)
def case(request):
    family, training = request.param
    return Case(family_named(family), training)


def test_every_family_that_trains_is_here():
    trained = {name for name in FAMILIES if family_named(name).serves("training")}
    assert trained == {family for family, _ in CASES}
    assert trained >= {"wan", "hunyuan_video", "cogvideox", "ltx", "mochi", "hunyuan_video15"}
    for name in trained:
        assert family_named(name).training.tiny
        assert family_named(name).tiny_conditions is not None
        assert family_named(name)._text(None)


# What is encoded


class Decoded(Exception):
    pass


@pytest.mark.slow
def test_the_pipeline_decodes_the_latents_of_a_video(case, monkeypatch):
    video = case.pixels()
    latents = case.family.encode_video(case.pipe, video)
    assert latents.dtype == torch.float32
    assert latents.shape == case.latents(0).shape
    assert not latents.requires_grad
    with torch.no_grad():
        raw = case.pipe.vae.encode(case.training.coloured(video)).latent_dist.mode()

    def step(predicted, timestep, sample, **kwargs):
        made = case.training.lay(latents)
        return (made if made.shape == sample.shape else sample,)  # the other is sound

    decode = case.pipe.vae.decode

    def watched(x, *args, **kwargs):
        raise Decoded(x, decode(x, *args, **kwargs)[0])

    with monkeypatch.context() as patch:
        patch.setattr(case.pipe.scheduler, "step", step)
        patch.setattr(case.pipe.vae, "decode", watched)
        with pytest.raises(Decoded) as caught:
            case.run(output_type="np")
    taken, shown = caught.value.args
    torch.testing.assert_close(taken, raw, atol=1e-5, rtol=1e-5)
    pixels = case.family.decode_video(case.pipe, latents)
    assert pixels.shape == video.shape
    assert pixels.std() > 1e-3
    shown = shown[:, :, -pixels.shape[2] :]
    torch.testing.assert_close(case.training.coloured(pixels), shown, atol=1e-4, rtol=1e-4)


def test_latents_are_drawn_from_the_posterior(case):
    video = case.pixels()
    mode = case.family.encode_video(case.pipe, video)
    drawn = [
        case.family.encode_video(case.pipe, video, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], mode)


def test_the_first_latents_are_those_of_the_beginning_where_it_is_said(case):
    coding = case.coding
    lengths = [coding.first + chunks * coding.frames for chunks in (3, 6)]
    video = case.pixels(lengths[1])
    long = case.family.encode_video(case.pipe, video)
    short = case.family.encode_video(case.pipe, video[:, :, : lengths[0]])
    assert short.shape[2] == coding.base + 3 * coding.latents
    apart = (long[:, :, : short.shape[2]] - short).abs().max() / long.abs().max()
    if case.family.training.causal_vae:
        assert apart < 1e-4
    else:
        assert apart > 0.01
    wrong = 2 * coding.frames
    with pytest.raises(ValueError, match=f"{re.escape(coding.rule)} frames, got {wrong}"):
        case.family.encode_video(case.pipe, case.pixels(wrong))


def test_prompts_are_encoded_as_the_pipeline_does(case):
    (call, *_), _ = case.calls(case.run)
    found = case.family.encode_prompt(case.pipe, [PROMPT], case.training.tokens)
    for name, x in found.items():
        assert not x.requires_grad
        if name in call[1]:  # with its filling cut off, or else a length
            theirs = call[1][name]
            assert torch.equal(x[:, : theirs.shape[1]], theirs), name
            assert not x[:, theirs.shape[1] :].any()
        else:
            assert x.item() == call[1]["encoder_hidden_states"].shape[1]
    assert next(iter(found.values())).shape[1] == case.training.tokens
    # Several in one call, of which the last one is empty, are each as alone.
    prompts = [PROMPT, "a blue circle", ""]
    together = case.family.encode_prompt(case.pipe, prompts, case.training.tokens)
    for row, prompt in enumerate(prompts):
        alone = case.family.encode_prompt(case.pipe, [prompt], case.training.tokens)
        assert alone.keys() == together.keys()
        for name, x in alone.items():
            torch.testing.assert_close(together[name][row : row + 1], x, atol=1e-5, rtol=1e-5)
    assert not torch.equal(*(next(iter(together.values()))[row] for row in (0, 1)))


def test_prompts_have_the_pipelines_length_unless_told_otherwise(case):
    found = case.family.encode_prompt(case.pipe, [PROMPT])
    assert next(iter(found.values())).shape[1] == (case.family.sizes.text or 512)


# What the transformer is given


def same(ours, theirs, name):
    """Two arguments, bit by bit."""
    if isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs), name
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, name)
        return
    a, b = torch.as_tensor(ours), torch.as_tensor(theirs)
    kind = b.dtype if isinstance(theirs, Tensor) else a.dtype
    a, b = torch.broadcast_tensors(a.to(kind), b.to(kind))
    assert torch.equal(a, b), name


def unlaid(case, given: Tensor) -> Tensor:
    """The latents (B, C, f, h, w) that the transformer was given, found by their numbers."""
    plan = case.latents(0)
    numbers = torch.arange(1, plan.numel() + 1, dtype=torch.float64).view(plan.shape)
    places = case.fed(numbers)
    assert places.shape == given.shape
    is_latent = places > 0
    flat = torch.empty(plan.numel(), dtype=given.dtype)
    flat[places[is_latent].long() - 1] = given[is_latent]
    return flat.view(plan.shape)


def test_predict_is_the_call_of_the_pipeline(case):
    calls, _ = case.calls(case.run)
    assert len(calls) == 2
    conditions = case.family.encode_prompt(case.pipe, [PROMPT], case.training.tokens)
    for args, theirs, out in calls:
        assert not args
        noisy = unlaid(case, theirs["hidden_states"])
        level = case.training.level(theirs["timestep"])
        more = {"guidance": theirs["guidance"]} if "guidance" in theirs else {}
        ((mine, ours, again),), predicted = case.calls(
            case.predict, noisy, level, conditions | more, theirs
        )
        ours |= dict(zip(("hidden_states",), mine, strict=False))
        ignored = {"return_dict", "attention_kwargs", *case.training.apart}
        used = {k for k, v in theirs.items() if v is not None} - ignored
        assert {k for k, v in ours.items() if v is not None} - ignored == used
        for name in used:
            same(ours[name], theirs[name], name)
        assert torch.equal(again, out)
        assert torch.equal(case.said(predicted), out)


@pytest.mark.parametrize("case", IN_SECONDS, indirect=True, ids=name_of)
def test_clips_of_another_rate(case):
    """Counts where positions are in seconds: as the pipeline with that rate."""
    assert case.family.training.takes_fps
    calls, _ = case.calls(case.run, **{case.training.rate: 12})
    conditions = case.family.encode_prompt(case.pipe, [PROMPT], case.training.tokens)
    _, theirs, out = calls[0]
    noisy = unlaid(case, theirs["hidden_states"])
    level = case.training.level(theirs["timestep"])
    with torch.no_grad():
        given = {**conditions, "fps": torch.tensor([12.0])}
        assert torch.equal(
            case.said(case.family.predict(case.pipe.transformer, noisy, level, given)), out
        )
        own = case.family.predict(case.pipe.transformer, noisy, level, conditions)
        assert not torch.allclose(case.said(own), out, atol=1e-4)


# Noise levels


@contextmanager
def foretelling(case, clean: Tensor, noise: Tensor, met: list):
    """A transformer that predicts the training's target, whatever it is given."""
    noising = Noising(case.family, case.pipe.scheduler.config)

    def predict(module, args, named, out):
        level = case.training.level(named["timestep"]).float()
        if case.training.compared(named):
            given = named["hidden_states"].clone()
            met.append((level, given, noising.mix(clean, noise, level)))
        made = case.said(noising.target(clean, noise, level))
        return (made, *out[1:]) if isinstance(out, tuple) else type(out)(sample=made)

    hook = case.pipe.transformer.register_forward_hook(predict, with_kwargs=True)
    yield
    hook.remove()


def test_what_is_learned_leads_the_pipeline_from_the_noise_to_the_clip(case):
    """Its scheduler walks through the training's mixes, and ends at the clean latents."""
    clean, noise = case.latents(0), case.latents(1)
    start, met = noise, []
    with foretelling(case, clean, noise, met):
        case.run(4, latents=case.starts(start))
        start = Noising(case.family, case.pipe.scheduler.config).mix(clean, noise, met[0][0])
        met.clear()
        made = case.run(4, latents=case.starts(start))
    tolerance = {"atol": 5 * case.training.near, "rtol": case.training.near}
    assert len(met) == 4
    levels = [level.item() for level, _, _ in met]
    assert levels == sorted(levels, reverse=True)
    assert all(0 <= level <= 1 for level in levels)
    for _, given, mixed in met:
        torch.testing.assert_close(given, case.fed(mixed), **tolerance)
    ends = case.training.ends or case.training.lay
    torch.testing.assert_close(made.frames, ends(clean), **tolerance)


def test_the_training_meets_the_levels_of_the_pipeline(case):
    """All but the ends, which the draws leave out by a thousandth."""
    calls, _ = case.calls(case.run, 10)
    levels = [case.training.level(named["timestep"]).item() for _, named, _ in calls]
    assert max(levels) > 0.95
    assert all(-1e-9 <= level <= SIGMAS[1] + 2e-3 for level in levels)
    noising = Noising(case.family, case.pipe.scheduler.config)
    ends = torch.tensor(SIGMAS)
    ratios = noising.snr(ends)
    assert ratios[0] > 100
    assert ratios[1] < 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_v_prediction_is_the_schedulers(shift):
    """Noise and velocity of diffusers' own training script."""
    scheduler = CogVideoXDDIMScheduler(**cogvideox.PUBLISHED, snr_shift_scale=shift)
    noising = Noising(family_named("cogvideox"), scheduler.config)
    g = torch.Generator().manual_seed(2)
    clean, noise = torch.randn((2, 5, 3, 2, 2, 2), generator=g)
    times = torch.tensor([0, 1, 500, 998, 999])
    level = times / 1000
    mixed = scheduler.add_noise(clean, noise, times)
    torch.testing.assert_close(noising.mix(clean, noise, level), mixed)
    velocity = scheduler.get_velocity(clean, noise, times)
    torch.testing.assert_close(noising.target(clean, noise, level), velocity)
    assert torch.equal(noising.mix(clean, noise, level)[-1], noise[-1])
    alphas = scheduler.alphas_cumprod[times]
    found, expected = noising.snr(level).double(), alphas / (1 - alphas)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


def test_without_a_scheduler_it_is_the_published_one():
    published = CogVideoXDDIMScheduler(**cogvideox.PUBLISHED, snr_shift_scale=1.0)
    family, level = family_named("cogvideox"), torch.linspace(0, 1, 11)
    assert torch.equal(Noising(family).snr(level), Noising(family, published.config).snr(level))


@pytest.mark.parametrize(
    "scheduler",
    [CogVideoXDDIMScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=["epsilon", "flow"],
)
def test_another_schedule_is_refused(scheduler):
    with pytest.raises(ValueError, match="trains by v_prediction at 1000 timesteps, and the sch"):
        Noising(family_named("cogvideox"), scheduler.config)


def test_the_shift_of_tokens_is_the_pipelines():
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, time_shift_type="exponential"
    )
    levels = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    for tokens in (300, 4576):
        mu = calculate_shift(tokens, 256, 4096, 0.95, 2.05)
        scheduler.set_timesteps(sigmas=levels.tolist(), mu=mu)
        shift = shift_of(scheduler.config, tokens)
        ours = torch.tensor([shifted(level, shift) for level in levels.tolist()])
        torch.testing.assert_close(scheduler.sigmas[:-1], ours)
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=7.0).config, 300) == 7.0
    assert shift_of({"flow_shift": 3.0}, 300) == 3.0
    assert shift_of({}, 300) == 1.0


# What is refused


def test_a_text_without_positions_is_refused():
    case = Case(family_named("cogvideox"), cogvideox.TRAINING[0])
    conditions = case.family.encode_prompt(case.pipe, [PROMPT], 8)
    with pytest.raises(ValueError, match=r"max_tokens must be 16, .* got 8: leave it out"):
        case.family.predict(
            case.pipe.transformer, case.latents(0), torch.tensor([0.5]), conditions
        )


def test_clips_that_leave_half_a_patch_are_refused(tmp_path):
    case = Case(family_named("cogvideox"), cogvideox.TRAINING[2])
    message = r"frames must be 5 or a multiple of 8 more, got 17; nearest: 13 or 21"
    with pytest.raises(ValueError, match=message):
        model_of(config(case, tmp_path, stages=("17:2",)), case.pipe)
    with pytest.raises(ValueError, match=message):
        cache(case.pipe, clips(case, tmp_path), tmp_path, frames=[17], sizes=[(32, 48)])


def test_a_model_from_image_to_video_is_refused(tmp_path):
    pipe = hunyuan_video15.training()
    pipe.transformer = hunyuan_video15.transformer(task_type="i2v")
    clip = CaptionedVideo("clip", PROMPT, footage(9, 64, 96))
    with pytest.raises(ValueError, match="task_type 'i2v' makes video of an image: take"):
        cache(pipe, [clip], tmp_path, frames=[9], sizes=[(64, 96)], device="cpu")


# Training


def clips(case, folder: Path) -> list[CaptionedVideo]:
    """Two clips, in files with sound where the model needs some."""
    frames, height, width = case.training.size
    found = [footage(frames, height, width, seed=i) for i in range(2)]
    if case.sound:
        folder.mkdir(exist_ok=True)
        rate, fps = 32_000, round(case.family.sizes.fps)
        heard = [tone(frames / fps, rate, pitch) for pitch in (440.0, 330.0)]
        found = [
            sounding(folder / f"{i}.mkv", *both, rate, fps)
            for i, both in enumerate(zip(found, heard, strict=True))
        ]
    return [CaptionedVideo(f"clip {i}", PROMPT, one) for i, one in enumerate(found)]


def config(case, out, **fields) -> TrainConfig:
    frames, height, width = case.training.size
    small = {
        "method": "radial",
        "settings": ("block=4",),
        "stages": (f"{frames}:2",),
        "height": height,
        "width": width,
        "max_tokens": case.training.tokens,
        "trained_frames": frames,
        "checkpoint_every": 1,
        "alpha": 3.0,
        **case.sound,
        **({"caption_dropout": 0.0} if case.family.generation.distilled else {}),
    }
    return ft.config(out, **(small | fields))


@pytest.mark.slow
def test_two_steps_resumed_bit_for_bit(case, tmp_path):
    frames, height, width = case.training.size
    report = cache(
        case.pipe,
        clips(case, tmp_path / "clips"),
        tmp_path / "cache",
        frames=[frames],
        sizes=[(height, width)],
        max_tokens=case.training.tokens,
        device="cpu",
        **case.sound,
    )
    assert report.reconstruction is not None
    assert all(0 < one < 30 for one in report.reconstruction.psnr.values())  # untrained
    latents = LatentCache(tmp_path / "cache")
    assert latents.causal == case.family.training.causal_vae
    assert latents.latents(0).shape == case.latents(0).shape[1:]
    given = config(case, tmp_path / "a")
    done = ft.train(given, latents, model=model_of(given, case.pipe))
    assert done.steps == 2
    assert all(0 < loss < 100 for loss in done.losses)
    weights = load_file(done.folder / WEIGHTS)
    assert any(x.abs().max() > 0 for name, x in weights.items() if "lora_B" in name)

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000002")
    given, fresh = config(case, tmp_path / "b"), case.training.pipeline()
    again = ft.train(given, latents, model=model_of(given, fresh), resume=True)
    assert again.losses == done.losses[1:]
    resumed = load_file(again.folder / WEIGHTS)
    assert all(torch.equal(resumed[name], x) for name, x in weights.items())

    # On and off a pipeline of its own.
    pipe = Case(case.family, case.training)
    before, model = pipe.run().frames, pipe.pipe.transformer
    add_loras(pipe.pipe, [(str(done.folder), 1.0)])
    assert model.peft_config["lora_0"].lora_alpha == 3
    assert not torch.equal(pipe.run().frames, before)
    model.unload_lora()
    assert torch.equal(pipe.run().frames, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({family for family, _ in CASES}))
def test_a_dry_run_of_its_published_model(name):
    family = family_named(name)
    model = next(iter(FAMILIES[name].published.values())).repository
    frames = family.sizes.coding().frames_of(9)
    side = 2 * family.sizes.spatial
    fields = {"height": 4 * side, "width": 4 * side, "stages": (f"{frames}:2",)}
    if family.training.needs_sound:
        fields |= {"sound": True, "fps": family.sizes.fps}
    if family.generation.distilled:
        fields["caption_dropout"] = 0.0
    done = dry_run(TrainConfig(model=model, method="dense", **fields))
    assert len(done.losses) == 2
    assert all(0 < loss < 100 for loss in done.losses)


# Rules on rotary frequencies


def tables(case, frames: int) -> list[Tensor]:
    """Cosines and sines that the first self-attention is given, frames of patches first."""
    found = []

    def keep(module, args, named):
        given = [x for x in (*args, *named.values()) if isinstance(x, tuple | list)]
        found.extend(given[0] if given else [named["rotary_emb"]])

    model, family = case.pipe.transformer, case.family
    hook = family.self_attentions(model)[0].module.register_forward_pre_hook(
        keep, with_kwargs=True
    )
    shape = list(case.latents(0).shape)
    shape[2] = frames * patch(case)
    conditions = family.encode_prompt(case.pipe, [PROMPT], case.training.tokens)
    with torch.no_grad():
        family.predict(model, torch.zeros(shape), torch.tensor([0.5]), conditions)
    hook.remove()
    assert found
    return [rows_by_frame(x, frames) for x in found]


def rows_by_frame(table: Tensor, frames: int) -> Tensor:
    tokens = max(range(table.ndim - 1), key=lambda axis: table.shape[axis])
    return table.movedim(tokens, 0).unflatten(0, (frames, -1))


def patch(case) -> int:
    return getattr(case.pipe.transformer.config, "patch_size_t", None) or 1


@pytest.mark.parametrize("case", ROTARY, indirect=True, ids=name_of)
def test_interpolated_positions_are_the_pipelines_own_between_frames(case):
    stock = tables(case, 8)
    with apply_rule(case.pipe.transformer, "position_interpolation", frames=8, trained=4):
        halved = tables(case, 8)
    for mine, own in zip(halved, stock, strict=True):
        torch.testing.assert_close(mine[::2], own[:4], atol=2e-3, rtol=0)
        assert (mine[1::2] - own[:4]).abs().max() > 0.01
    again = tables(case, 8)
    assert all(torch.equal(a, b) for a, b in zip(again, stock, strict=True))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_a_rule_acts_on_longer_clips_alone_and_leaves_no_trace(case, rule):
    short, long = (case.coding.frames_of(n * patch(case)) for n in (2, 8))
    given = {"num_frames": long, "trained_frames": short}
    if rule not in case.training.rules:
        why = r"take (window_noise|position_interpolation)|no longer video for|no rules on rotary"
        with pytest.raises(ValueError, match=why):
            extend(case.pipe, rule, **given)
        with pytest.raises(ValueError, match=why):
            apply_rule(case.pipe.transformer, rule, frames=8, trained=2)
        with pytest.raises(ValueError, match=why):
            model_of(config(case, "unused", stages=(f"{long}:2:{rule}",)), case.pipe)
        return
    lengths = {"num_frames": short}, {"num_frames": long}
    steps = case.family.generation.least_steps
    own = [case.run(steps, **length).frames for length in lengths]
    state = {name: x.clone() for name, x in case.pipe.transformer.state_dict().items()}
    with extend(case.pipe, rule, **given):
        ruled = [case.run(steps, **length).frames for length in lengths]
        assert case.pipe.transformer.state_dict().keys() == state.keys()
    assert torch.equal(ruled[0], own[0])
    assert not torch.allclose(ruled[1], own[1], atol=1e-6)
    after = [case.run(steps, **length).frames for length in lengths]
    assert all(torch.equal(a, b) for a, b in zip(after, own, strict=True))
    assert not case.pipe.transformer._forward_pre_hooks
    assert all(torch.equal(x, state[n]) for n, x in case.pipe.transformer.state_dict().items())
