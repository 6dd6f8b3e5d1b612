"""The grid that an attached model works with, at the sizes that people generate.

Latents are those of the pipelines' own `prepare_latents`, the model runs as it is, and nothing is
computed: on the meta device tensors have shapes alone.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from support import hunyuan, wan
from support.image_models import cogvideox, ltx
from torch import Tensor

from gen_accel import Dense, VideoShape, attach
from gen_accel.attention_processors.attached.clock import Clock
from gen_accel.attention_processors.families import family_named

META = torch.device("meta")
TEXT = 6

# Height and width in pixels.
SIZES = [
    *((480, 832), (832, 480), (480, 640), (640, 480), (624, 624), (544, 960)),
    *((960, 544), (576, 1024), (704, 1280), (720, 1280), (1280, 720), (1088, 1920)),
]
FRAMES = range(17, 242, 4)


class Model(NamedTuple):
    """
    Args:
        frames, pixels: that one token is made of on the time axis, all but the first, and along
            each side.
        text: tokens in the same attention.
        pipeline: without the parts that `prepare_latents` does not ask, so that the autoencoder is
            taken to be the published one.
        inputs: of the model beside its latents, given those and the true grid.
    """

    frames: int
    pixels: int
    text: int
    pipeline: Callable[[], Any]
    inputs: Callable[[Tensor, VideoShape], dict[str, Any]]


def wan_pipeline(pixels: int = 8, **config: Any) -> Any:
    model = wan.transformer(num_layers=1, rope_max_seq_len=1024, **config).to(META)
    pipe = WanPipeline(*[None] * 4, transformer=model)
    pipe.vae_scale_factor_spatial = pixels
    return pipe


def hunyuan_pipeline() -> Any:
    model = hunyuan.transformer(num_layers=1, num_single_layers=1).to(META)
    return HunyuanVideoPipeline(None, None, model, *[None] * 4)


def cogvideox_pipeline() -> Any:
    model = cogvideox(use_rotary_positional_embeddings=True).to(META)
    return CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())


def ltx_pipeline() -> Any:
    return LTXPipeline(*[None] * 4, transformer=ltx().to(META))


def wan_inputs(latents: Tensor, video: VideoShape) -> dict[str, Tensor]:
    return {"timestep": empty(1), "encoder_hidden_states": empty(1, TEXT, wan.TEXT_WIDTH)}


def hunyuan_inputs(latents: Tensor, video: VideoShape) -> dict[str, Tensor]:
    given = hunyuan.inputs(1, 2, 2, lengths=(TEXT,), text=TEXT)
    return {name: x.to(META) for name, x in given.items() if name != "hidden_states"}


def cogvideox_inputs(latents: Tensor, video: VideoShape) -> dict[str, Tensor]:
    return {"encoder_hidden_states": empty(1, TEXT, 8), "timestep": empty(1)}


def ltx_inputs(latents: Tensor, video: VideoShape) -> dict[str, Any]:
    sides = {"num_frames": video.frames, "height": video.height, "width": video.width}
    text = {"encoder_hidden_states": empty(1, TEXT, 16), "encoder_attention_mask": None}
    return {"timestep": empty(1), **text, **sides}


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


MODELS = {
    "wan": Model(4, 16, 0, wan_pipeline, wan_inputs),
    "wan_ti2v": Model(4, 32, 0, lambda: wan_pipeline(16, in_channels=48), wan_inputs),
    "hunyuan_video": Model(4, 16, TEXT, hunyuan_pipeline, hunyuan_inputs),
    "cogvideox": Model(4, 16, TEXT, cogvideox_pipeline, cogvideox_inputs),
    "ltx": Model(8, 32, 0, ltx_pipeline, ltx_inputs),
}


def grids(
    name: str, sizes: Iterable[tuple[int, int]], lengths: Iterable[int]
) -> Iterator[tuple[VideoShape, VideoShape, set[int]]]:
    """For each size and length the true grid, by hand, and what the attached model then holds: the
    grid, and the tokens in its attention."""
    model = MODELS[name]
    pipe = model.pipeline()
    channels = pipe.transformer.config.in_channels
    noise = {"batch_size": 1, "num_channels_latents": channels, "generator": None}
    noise |= {"dtype": torch.float32, "device": META}
    with attach(pipe.transformer, Dense()) as handle, torch.no_grad():
        for (height, width), frames in product(sizes, lengths):
            size = {"height": height, "width": width, "num_frames": frames}
            times = 1 + (frames - 1) // model.frames
            sides = height // model.pixels, width // model.pixels
            video = VideoShape(times, *sides, text=model.text)
            latents = pipe.prepare_latents(**noise, **size)
            pipe.transformer(latents, **model.inputs(latents, video), return_dict=False)
            assert handle.clock.tokens is not None
            found = {record.tokens for record in handle.records.values()}
            yield video, handle.clock.tokens.video, found


@pytest.mark.slow
def test_wan_has_its_true_grid_at_every_size_and_length(monkeypatch):
    """All that runs of the model is what comes before its forward pass."""
    none = wraps(WanTransformer3DModel.forward)(lambda *args, **kwargs: None)
    monkeypatch.setattr(WanTransformer3DModel, "forward", none)
    made = [(true, held) for true, held, _ in grids("wan", SIZES, FRAMES)]
    assert len(made) == 684
    assert [(true, held) for true, held in made if held != true] == []


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_true_grid_is_what_attends(name):
    sizes = (448, 832), (704, 1280), (1280, 704)
    for true, held, found in grids(name, sizes, range(17, 242, 56)):
        assert held == true
        assert found == {true.tokens}


def test_coordinates_that_are_no_whole_frames_are_refused():
    with pytest.raises(ValueError, match="whole frames"):
        family_named("ltx").tokens(ltx(), {"video_coords": torch.ones(1, 3, 4)})


def test_ltx2_needs_a_grid_or_coordinates():
    with pytest.raises(ValueError, match="or video_coords"):
        family_named("ltx2").tokens(None, {"hidden_states": torch.zeros(1)})


def test_frames_at_timesteps_of_their_own_are_at_their_mean_step():
    """As in diffusion forcing, where copies of the scheduler are stepped and itself is not."""
    scheduler = wan.unipc()
    scheduler.set_timesteps(10)
    clock = Clock(lambda: scheduler)
    times = scheduler.timesteps
    for places, mean in [((0, 0, 0, 0), 0), ((0, 2, 4, 10), 2), ((9, 9, 10, 10), 9)]:
        now = torch.tensor([[times[i] if i < 10 else 0 for i in places]])
        clock.advance(now)
        assert clock.step == mean
    clock.advance(times[3:4] / 1000)  # as models that take it scaled
    assert clock.step == 0
