"""First frames as conditions of training, held to the pipelines that make videos from them."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, WanImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from support import hunyuan, inputs, wan
from support.tiny import cogvideox, ltx
from torch import Tensor

from gen_accel.attention_processors.families import family_for, family_named
from gen_accel.attention_processors.families.latents import (
    FIRST_FRAME,
    IS_GIVEN,
    LAST_FRAME,
    LAST_IS_GIVEN,
    in_place,
)

wan_family = family_named("wan")

ltx_family = family_named("ltx")

hunyuan_family = family_named("hunyuan_video")

cog_family = family_named("cogvideox")

HEIGHT, WIDTH = 32, 48


def picture(index: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Image.Image:
    g = torch.Generator().manual_seed(index)
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=g)
    return Image.fromarray(pixels.numpy())


def call_of(pipe: Any, part: str = "transformer", **options: Any) -> tuple[dict, Tensor]:
    """Arguments and output of the transformer at the last step of a run."""
    calls = []
    hook = getattr(pipe, part).register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    given: dict[str, Any] = {
        "prompt": "a red square moves right",
        "image": picture(),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(5),
        "max_sequence_length": 512,
        "output_type": "latent",
    }
    pipe(**(given | options))
    hook.remove()
    return calls[-1]


def predicted(pipe: Any, part: str, noisy: Tensor, time: Tensor, shown: dict) -> tuple[dict, Any]:
    """Arguments and output of the transformer in the family's `predict`."""
    model = getattr(pipe, part)
    calls = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        out = family_for(model, "training").predict(model, noisy, level(time), shown)
    hook.remove()
    (args, kwargs), *rest = calls
    assert not rest
    return {"hidden_states": args[0], **kwargs}, out


def level(time: Tensor) -> Tensor:
    """The noise level whose timestep is this one to the bit."""
    near = time / 1000
    below, above = (torch.nextafter(near, torch.tensor(to)) for to in (0.0, 1.0))
    return next(one for one in (near, below, above) if torch.equal(one * 1000, time))


def batched(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[None] for name, x in conditions.items()}


def two_experts() -> Any:
    """As Wan 2.2 I2V A14B."""
    models = [wan.transformer(i, in_channels=2 * wan.CHANNELS + 4) for i in (0, 1)]
    parts = {"transformer": models[0], "transformer_2": models[1], "boundary_ratio": 0.9}
    return wan.pipeline(WanImageToVideoPipeline, **parts)


WAN = {
    "image": wan.PIPELINES["image"],
    "image with encoder": wan.PIPELINES["image with encoder"],
    "two experts": two_experts,
    "token timesteps": wan.PIPELINES["token timesteps, image"],
    "two experts, last frame": two_experts,
    "last frame": inputs.wan_first_and_last,
}


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("kind", WAN)
def test_wan_sees_what_its_pipeline_shows(kind, frames):
    """Without a last frame also for a clip that is shorter than what is cached of it: 9 frames."""
    pipe = WAN[kind]()
    part = "transformer_2" if kind.startswith("two experts") else "transformer"
    model = getattr(pipe, part)
    last = {"last_image": picture(1)} if "last" in kind else {}
    given, out = call_of(pipe, part, num_frames=frames, **last)
    shown = wan_family.encode_prompt(pipe, ["a red square moves right"])
    kept = wan_family.first_frame(pipe, model, picture(), 9)
    cut = {
        n: x[:, : given["hidden_states"].shape[2]] if x.ndim == 4 else x for n, x in kept.items()
    }
    if last:
        cut |= wan_family.last_frame(pipe, model, picture(), picture(1), frames)
    assert ("encoder_hidden_states_image" in cut) == (kind in ("image with encoder", "last frame"))
    noisy = given["hidden_states"][:, : wan.CHANNELS]
    time = given["timestep"].flatten()[-1:].float()
    own, velocity = predicted(pipe, part, noisy, time, shown | batched(cut))
    assert own.keys() - {"return_dict"} <= given.keys()
    for name in own.keys() - {"return_dict"}:
        assert torch.equal(own[name], given[name].float()), name
    assert torch.equal(velocity, out)


@pytest.mark.parametrize("kind", ["token_replace", "latent_concat"])
def test_hunyuan_video_sees_what_its_pipeline_shows(kind):
    pipe = hunyuan.image_pipeline(kind)
    model = pipe.transformer
    more = {"max_sequence_length": 40, "guidance_scale": 1.0}
    given, out = call_of(pipe, "transformer", **more)
    text = "a red square moves right"
    shown = hunyuan_family.encode_prompt_with(pipe, model, [picture()], text, 40)
    kept = hunyuan_family.first_frame(pipe, model, picture(), 9)
    assert kept[FIRST_FRAME].shape == (hunyuan.CHANNELS, 1, 4, 6)
    noisy = given["hidden_states"][:, : hunyuan.CHANNELS]
    if kind == "token_replace":
        noisy = torch.cat([torch.full_like(noisy[:, :, :1], 9.0), noisy[:, :, 1:]], 2)
    own, velocity = predicted(
        pipe, "transformer", noisy, given["timestep"].float(), shown | batched(kept)
    )
    for name in own.keys() - {"return_dict", "guidance"}:
        assert torch.equal(own[name].float(), given[name].float()), name
    assert own["guidance"].item() == given["guidance"].item() == 1000
    assert torch.equal(velocity, out)


def test_hunyuan_videos_text_depends_on_the_frame():
    pipe = hunyuan.image_pipeline()
    made = [
        hunyuan_family.encode_prompt_with(pipe, pipe.transformer, images, "a red square", 40)
        for images in ([picture(0)], [picture(1)], (), [Image.new("RGB", (WIDTH, HEIGHT))])
    ]
    states = [one["encoder_hidden_states"] for one in made]
    assert len({x.shape for x in states}) == 1
    assert not torch.equal(states[0][:, -10:], states[1][:, -10:])
    assert torch.equal(states[2], states[3])


@pytest.fixture
def by_mode(monkeypatch):
    """The mode of what an autoencoder makes, also where a pipeline draws."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )


@pytest.mark.usefixtures("by_mode")
def test_ltx_sees_what_its_pipeline_shows():
    pipe = ltx.pipeline(LTXImageToVideoPipeline)
    image, text = picture(size=(64, 96)), "a red square moves right"
    sizes = {"height": 64, "width": 96, "num_frames": 17, "max_sequence_length": 16}
    given, out = call_of(pipe, image=image, **sizes)
    shown = ltx_family.encode_prompt(pipe, [text], 16)
    kept = ltx_family.first_frame(pipe, pipe.transformer, image, 17)
    noisy = pipe._unpack_latents(given["hidden_states"], 3, 2, 3)
    noisy = torch.cat([torch.full_like(noisy[:, :, :1], 9.0), noisy[:, :, 1:]], 2)
    time = given["timestep"].flatten()[-1:].float()
    own, velocity = predicted(pipe, "transformer", noisy, time, shown | batched(kept))
    for name in ("hidden_states", "timestep", *shown):
        assert torch.equal(own[name].float(), given[name].float()), name
    assert torch.equal(pipe._pack_latents(velocity), out)


@pytest.mark.usefixtures("by_mode")
def test_ltx_sees_what_its_pipeline_shows_of_a_last_frame():
    """Its tokens are before those of the video. Without it a sample is as from the first alone."""
    pipe, size = ltx.pipeline(LTXConditionPipeline), (64, 96)
    text, images = "a red square moves right", [picture(i, size) for i in range(2)]
    ends = [LTXVideoCondition(image=images[i], frame_index=16 * i) for i in range(2)]
    sizes = {"height": 64, "width": 96, "num_frames": 17, "max_sequence_length": 16}
    given, out = call_of(pipe, image=None, conditions=ends, image_cond_noise_scale=0.0, **sizes)
    shown = ltx_family.encode_prompt(pipe, [text], 16)
    shown |= batched(ltx_family.first_frame(pipe, pipe.transformer, images[0], 17))
    both = shown | batched(ltx_family.last_frame(pipe, pipe.transformer, *images, 17))
    noisy = pipe._unpack_latents(given["hidden_states"][:, 6:], 3, 2, 3)
    noisy = torch.cat([torch.full_like(noisy[:, :, :1], 9.0), noisy[:, :, 1:]], 2)
    time = given["timestep"].flatten()[-1:].float()
    own, velocity = predicted(pipe, "transformer", noisy, time, both)
    for name in ("hidden_states", "timestep", "video_coords", "encoder_hidden_states"):
        assert torch.equal(own[name].float(), given[name].float()), name
    assert torch.equal(pipe._pack_latents(velocity), out[:, 6:])
    two = {name: torch.cat([x, x]) for name, x in both.items()}
    two[LAST_IS_GIVEN] = torch.tensor([0.0, 1.0])
    again = ltx_family.predict(
        pipe.transformer, torch.cat([noisy, noisy]), level(time).repeat(2), two
    )
    torch.testing.assert_close(again[1:], velocity)
    given, out = call_of(
        pipe, image=None, conditions=ends[:1], image_cond_noise_scale=0.0, **sizes
    )
    noisy = pipe._unpack_latents(given["hidden_states"], 3, 2, 3)
    alone = {name: x[:1] for name, x in two.items()}
    own, velocity = predicted(pipe, "transformer", noisy, time, alone)
    assert torch.equal(own["video_coords"], given["video_coords"])
    assert torch.equal(pipe._pack_latents(velocity), out)


COG = {"1.0": cogvideox.ROTARY, "1.5": cogvideox.LATER}


@pytest.mark.usefixtures("by_mode")
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("version", COG)
def test_cogvideox_sees_what_its_pipeline_shows(version, inverted):
    pipe = cogvideox.pipeline(cogvideox.transformer(**COG[version], max_text_seq_length=16))
    pipe.vae = deepcopy(pipe.vae)
    pipe.vae.register_to_config(invert_scale_latents=inverted, scaling_factor=0.7)
    pipe.vae_scaling_factor_image = 0.7
    frames = 13 if version == "1.5" else 9
    image, sizes = picture(size=(80, 112)), {"height": 80, "width": 112, "num_frames": frames}
    given, out = call_of(pipe, image=image, **sizes, max_sequence_length=16)
    shown = cog_family.encode_prompt(pipe, ["a red square moves right"], 16)
    kept = cog_family.first_frame(pipe, pipe.transformer, image, frames)
    noisy = given["hidden_states"].transpose(1, 2)[:, : cogvideox.CHANNELS]
    own, said = predicted(
        pipe, "transformer", noisy, given["timestep"].float(), shown | batched(kept)
    )
    for name in own.keys() - {"return_dict", "image_rotary_emb"}:
        assert torch.equal(own[name].float(), given[name].float()), name
    assert ("ofs" in own) == (version == "1.5")
    for table, of_pipe in zip(own["image_rotary_emb"], given["image_rotary_emb"], strict=True):
        assert torch.equal(table, of_pipe)
    assert torch.equal(said.transpose(1, 2), out)


def test_wans_first_latent_is_the_clips_own():
    """The image alone, and the first latent of a clip that begins with it."""
    pipe = wan.pipeline(expand_timesteps=True)
    first = wan_family.first_frame(pipe, pipe.transformer, picture(), 9)[FIRST_FRAME]
    pixels = [pipe.video_processor.preprocess(picture(i)) for i in range(9)]
    clip = wan_family.encode_video(pipe, torch.stack(pixels, 2))
    torch.testing.assert_close(clip[0, :, :1], first)


def test_a_sample_without_its_last_frame_is_as_from_the_first_alone():
    """And two samples that have it, with CLIP's features of two pictures each, as each alone."""
    model = two_experts().transformer
    noisy = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    sigma, text = torch.tensor([0.7, 0.4]), torch.ones(2, 4, wan.TEXT_WIDTH)
    plain = {"encoder_hidden_states": text, FIRST_FRAME: torch.ones(2, 16, 3, 4, 6)}
    last = {LAST_FRAME: torch.zeros(2, 16, 1, 4, 6), LAST_IS_GIVEN: torch.tensor([1.0, 0.0])}
    two = inputs.wan_first_and_last().transformer
    images = torch.randn(2, 2, 5, wan.IMAGE_WIDTH, generator=torch.Generator().manual_seed(1))
    seen = plain | {"encoder_hidden_states_image": images, LAST_FRAME: last[LAST_FRAME]}
    with torch.no_grad():
        first, both = (
            wan_family.predict(model, noisy, sigma, one) for one in (plain, plain | last)
        )
        each = [
            wan_family.predict(
                two, noisy[i : i + 1], sigma[i : i + 1], {n: x[i : i + 1] for n, x in seen.items()}
            )
            for i in range(2)
        ]
        together = wan_family.predict(two, noisy, sigma, seen)
    torch.testing.assert_close(both[1], first[1])
    assert not torch.equal(both[0], first[0])
    torch.testing.assert_close(together, torch.cat(each))


def test_samples_without_their_first_frame_stay_as_they_are():
    noisy = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    time, first = torch.tensor([700.0, 300.0]), torch.ones(2, 4, 1, 2, 2)
    shown = {FIRST_FRAME: first, IS_GIVEN: torch.tensor([1.0, 0.0]), "text": time}
    latents, times, rest = in_place(noisy, time, shown)
    assert list(rest) == ["text"]
    assert torch.equal(latents[0, :, :1], first[0])
    assert torch.equal(latents[0, :, 1:], noisy[0, :, 1:])
    assert torch.equal(latents[1], noisy[1])
    assert times.tolist() == [[0, 700, 700], [300, 300, 300]]
    latents, times, _ = in_place(noisy, time, {FIRST_FRAME: first})
    assert torch.equal(latents[:, :, :1], first)
    assert times[:, 0].tolist() == [0, 0]


def test_without_its_first_frame_wan_predicts_as_from_text():
    model = wan.transformer()
    noisy = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    text = {"encoder_hidden_states": torch.ones(1, 4, wan.TEXT_WIDTH)}
    frame = {FIRST_FRAME: torch.ones(1, 16, 1, 4, 6), IS_GIVEN: torch.zeros(1)}
    with torch.no_grad():
        plain, shown = (
            wan_family.predict(model, noisy, torch.tensor([0.7]), one)
            for one in (text, text | frame)
        )
    torch.testing.assert_close(shown, plain)
