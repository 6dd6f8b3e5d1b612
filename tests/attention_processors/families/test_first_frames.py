"""First frames as conditions of training, held to the pipelines that make videos from them."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, WanImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from support import hunyuan, wan
from support.tiny import cogvideox, ltx
from torch import Tensor

from gen_accel.attention_processors.families import family_for, family_named
from gen_accel.attention_processors.families.latents import FIRST_FRAME, IS_GIVEN, in_place

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
}


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("kind", WAN)
def test_wan_sees_what_its_pipeline_shows(kind, frames):
    """Also for a clip that is shorter than what is cached of it: 9 frames."""
    pipe = WAN[kind]()
    part = "transformer_2" if kind == "two experts" else "transformer"
    model = getattr(pipe, part)
    given, out = call_of(pipe, part, num_frames=frames)
    shown = wan_family.encode_prompt(pipe, ["a red square moves right"])
    kept = wan_family.first_frame(pipe, model, picture(), 9)
    cut = {
        n: x[:, : given["hidden_states"].shape[2]] if x.ndim == 4 else x for n, x in kept.items()
    }
    assert ("encoder_hidden_states_image" in cut) == (kind == "image with encoder")
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
    shown = hunyuan_family.encode_prompt_with(pipe, model, picture(), text, 40)
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
        hunyuan_family.encode_prompt_with(pipe, pipe.transformer, image, "a red square", 40)
        for image in (picture(0), picture(1), None, Image.new("RGB", (WIDTH, HEIGHT)))
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
