"""Published weights that make a video chunk by chunk: sampled as their publishers do, known by
name, and loaded from their files' names."""

import json
import re
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from support import single_files as files
from support import wan

from gen_accel.measure.video_io import count_frames
from gen_accel.pipelines.generation.assemble import assemble
from gen_accel.pipelines.generation.config import Clip, GenerateConfig
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.plan import AsPublished, forecast_generate, plan_of
from gen_accel.pipelines.generation.stream import NotTrained, Streamer, StreamSettings, stream_clip
from gen_accel.pipelines.zones import Zones
from gen_accel.published import few_steps

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red square moves right"
SIZE: dict[str, Any] = {"height": 32, "width": 48, "max_tokens": 8}
CHUNK = 3  # latent frames
DMD = (1.0, 0.9375, 5 / 6, 0.625)  # timesteps 1000, 750, 500 and 250, shifted by 5
WHOLE = Zones(3, window=6)


class Published(NamedTuple):
    """The loop of a publisher.

    Args:
        levels: noise of each step.
        attention: most latent frames of an attention, its own among them.
        sink: first latent frames that stay.
        is_relative: whether positions are those in the attention, or those in the video.
    """

    levels: tuple[float, ...]
    attention: int = 21
    sink: int = 0
    is_relative: bool = False

    def seen(self, chunk: int) -> list[tuple[int, int]]:
        """Chunks that one sees, itself the last, and the position of each."""
        sink = range(min(self.sink // CHUNK, chunk))
        recent = (self.attention - self.sink) // CHUNK
        found = [*sink, *range(max(len(sink), chunk + 1 - recent), chunk + 1)]
        return [(one, place if self.is_relative else one) for place, one in enumerate(found)]


LOOPS = {
    "gdhe17/Self-Forcing:checkpoints/self_forcing_dmd.safetensors": Published(DMD),
    "tianweiy/CausVid/autoregressive_checkpoint": Published((1.0, 0.757, 0.522)),
    "Efficient-Large-Model/LongLive-1.3B": Published(DMD, 12, 3, is_relative=True),
}


class Masked:
    """Self-attention of all chunks of a video at once, each of which sees some before it."""

    def __init__(self, loop):
        self.loop = loop

    def __call__(self, attn, x, _text=None, _mask=None, rotary=None):
        heads = [attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)]
        cos, sin = rotary
        count = x.shape[1] // self.tokens
        q, k, v = (one.unflatten(2, (attn.heads, -1)).chunk(count, 1) for one in heads)
        cos, sin = cos.chunk(count, 1), sin.chunk(count, 1)

        def turned(x, place):
            real, imaginary = x[..., 0::2], x[..., 1::2]
            c, s = cos[place][..., 0::2], sin[place][..., 1::2]
            parts = real * c - imaginary * s, real * s + imaginary * c
            return torch.stack(parts, -1).flatten(-2)

        made = []
        for chunk in range(count):
            seen = self.loop.seen(chunk)
            keys = torch.cat([turned(k[one], place) for one, place in seen], 1)
            values = torch.cat([v[one] for one, _ in seen], 1)
            queries = turned(q[chunk], seen[-1][1])
            scores = torch.einsum("bnhd,bmhd->bhnm", queries, keys) / queries.shape[-1] ** 0.5
            made.append(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), values))
        return attn.to_out[0](torch.cat(made, 1).flatten(2))


@torch.no_grad()
def sampled(pipe, loop, noises):
    """Latents of the chunks by a publisher's loop without a cache: each step runs all chunks so
    far, the clean ones at timestep 0."""
    model = pipe.transformer
    text, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=8)
    masked, clean = Masked(loop), []
    before = [block.attn1.processor for block in model.blocks]
    for block in model.blocks:
        block.attn1.processor = masked
    for noise in noises:
        x, *fresh = noise
        masked.tokens = tokens = x[0, 0].numel() // 4
        for step, level in enumerate(loop.levels):
            times = torch.tensor([0.0] * len(clean) + [1000 * level]).repeat_interleave(tokens)
            video = torch.cat([*clean, x], 2)
            [flow] = model(video, times[None], text, return_dict=False)
            x0 = x - level * flow[:, :, -CHUNK:]
            if step + 1 < len(loop.levels):
                low = loop.levels[step + 1]
                x = (1 - low) * x0 + low * fresh[step]
        clean.append(x0)
    for block, own in zip(model.blocks, before, strict=True):
        block.attn1.processor = own
    return clean


@pytest.fixture(scope="module")
def pipe():
    """With scores that differ from key to key."""
    model = wan.transformer(qk_norm="rms_norm_across_heads")
    for block in model.blocks:
        block.attn1.norm_q.weight.data *= 3
        block.attn1.to_v.weight.data *= 3
        block.attn1.to_out[0].weight.data *= 3
    return wan.pipeline(scheduler=wan.euler(), transformer=model)


def as_known(name):
    """A clip and its settings, of what is known by a name."""
    few = few_steps(name)
    sampler = {"sampler": few.sampler, "steps": few.steps, "shift": few.shift}
    given = sampler | {"levels": few.levels, "guidance_scale": few.guidance_scale}
    return given, StreamSettings().changed(few.zones)


def chunks(pipe, name, frames):
    """Ours, and the noise of each."""
    given, settings = as_known(name)
    clip = stream_clip(pipe, Clip(frames=frames, **SIZE, **given))
    made = Streamer(pipe, clip, settings, PROMPT)
    found, noises = [*made.latents()], []
    for chunk in range(len(found)):
        generator = made._generator(chunk)
        noises.append([made._noise(generator) for _ in range(len(made.levels) - 1)])
    return found, noises


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize("name", LOOPS)
def test_it_is_the_publishers_loop(pipe, name):
    """All nine chunks, of which the last ones see no more than the attention holds."""
    loop = LOOPS[name]
    found, noises = chunks(pipe, name, 105)
    wanted = sampled(pipe, loop, noises)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    others = {  # a loop that is another one is seen to be
        "positions": loop._replace(is_relative=not loop.is_relative),
        "length": loop._replace(attention=loop.attention + CHUNK),
        "levels": loop._replace(levels=tuple(0.99 * one for one in loop.levels)),
    }
    if not loop.sink:
        others.pop("positions")  # which a rotation does not change
    for what, one in others.items():
        wrong = sampled(pipe, one, noises)
        assert (wrong[-1] - found[-1]).abs().max() > 1e-3, what


def planned(**fields):
    """Plan of a stream, and what is told of published weights."""
    given = {"prompt": (PROMPT,), "stream": True, "frames": 33, **SIZE}
    with pytest.warns(AsPublished) as told:
        plan = plan_of(GenerateConfig(**given | fields))
    return plan.config, [str(one.message) for one in told]


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The tiny model as FastVideo publishes its conversion of Self-Forcing."""
    place = tmp_path_factory.mktemp("models") / "SFWan2.1-T2V-1.3B-Diffusers"
    pipe.save_pretrained(place)
    classes = {
        "model_index.json": {
            "_class_name": "WanCausalDMDPipeline",
            "transformer": ["diffusers", "CausalWanTransformer3DModel"],
            "scheduler": ["diffusers", "SelfForcingFlowMatchScheduler"],
        },
        "transformer/config.json": {
            "_class_name": "CausalWanTransformer3DModel",
            "local_attn_size": -1,
            "sink_size": 0,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "SelfForcingFlowMatchScheduler",
            "extra_one_step": True,
        },
    }
    for name, given in classes.items():
        file = place / name
        file.write_text(json.dumps(json.loads(file.read_text()) | given))
    return place


def test_what_it_takes_is_told_and_flags_win(folder):
    config, [said] = planned(model=str(folder))
    assert "--stream --zones frames=3,window=6,noise=0 --sampler lcm --steps 4 --shift 5" in said
    sampling = config.sampler, config.steps, config.shift, config.guidance_scale
    assert sampling == ("lcm", 4, 5.0, 1.0)
    assert StreamSettings().changed(config.zones) == StreamSettings(WHOLE, 0.0)

    config, _ = planned(model=str(folder), zones=("window=2", "middle=salient"), steps=8)
    assert config.steps == 8
    seen = Zones(3, window=2, middle="salient")
    assert StreamSettings().changed(config.zones) == StreamSettings(seen, 0.0)
    config, [said] = planned(model=str(folder), stream=False)
    assert config.zones == ()
    assert "--zones" not in said


def test_a_plan_counts_what_it_sees(folder):
    given = {"model": str(folder), "stream": True, "frames": 1000, **SIZE}
    tokens = 3 * 2 * 3
    for zones, chunks in ({(): 6, ("window=3", "sink=2"): 5}).items():
        with pytest.warns(AsPublished):
            found = forecast_generate(GenerateConfig(**given, zones=zones), gpu="4090")
        assert found.keys == tokens * (chunks + 1)
        assert found.steps == 4


def test_fastvideos_folder_loads_and_streams(pipe, folder, tmp_path, recwarn):
    loaded = load(folder, Loading(device="cpu"))
    for key, x in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[key], x), key
    out = tmp_path / "clip.mp4"
    [made] = generate(folder, [PROMPT], stream=True, frames=21, out=out, device="cpu", **SIZE)
    assert count_frames(out) == 21
    assert str(WHOLE) in made.extension
    told = {one.category for one in recwarn}
    assert AsPublished in told
    assert NotTrained not in told


def test_the_original_names_are_assembled(pipe, tmp_path):
    """As they are once the published pickle is safetensors: all under "model."."""
    model = wan.transformer(3)
    pipe.save_pretrained(tmp_path / "base")
    base = wan.pipeline(scheduler=wan.euler(), transformer=wan.transformer(4))
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "self_forcing_dmd.safetensors"
    save_file({f"model.{key}": x for key, x in files.transformer_state(model).items()}, file)
    made = assemble(tmp_path / "mine", [str(file)], base=tmp_path / "base")
    assert made.files == {"transformer": file}
    loaded = load(made.folder, Loading(device="cpu"))
    for key, x in model.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[key], x), key
    config, [said] = planned(model=str(made.folder))  # by the name of the file
    assert "Self-Forcing" in said
    assert config.zones


def test_a_lora_of_peft_loads(pipe, tmp_path):
    """In the original names, as LongLive's is."""
    pipe.save_pretrained(tmp_path / "model")
    width = wan.HEADS * wan.HEAD_DIM
    g = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=g) for size in ((2, width), (width, 2)))
    name, file = "base_model.model.blocks.1.self_attn.k", tmp_path / "longlive_lora.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
    loaded = load(tmp_path / "model", Loading(device="cpu", loras=(str(file),)))
    layer = loaded.transformer.blocks[1].attn1.to_k
    torch.testing.assert_close(layer.get_delta_weight("lora_0"), up @ down)
    config, _ = planned(model=str(tmp_path / "model"), loras=(str(file),))
    seen = Zones(3, window=2, sink=1)
    assert StreamSettings().changed(config.zones) == StreamSettings(seen, 0.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--zones", "windo=3"), r"zones are frames=.*got 'windo=3'; did you mean 'window'"),
        (("--zones", "window=x"), "window of zones must be int, got 'x'"),
        (("--zones", "noise=1"), "noise of zones must be from 0 to below 1, got 1"),
        (("--zones", "sink=5"), "window 2 is below sink 5"),
        (("--lora", "lora.pt"), r"lora\.pt is a pickle.*generator_ema"),
    ],
)
def test_refused(refused, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.pt").write_bytes(b"PK")
    said = refused("generate", "--model", "demo", "--prompt", "a red circle", "--stream", *words)
    assert re.search(message, said), said


def test_refused_elsewhere(refused, tmp_path):
    file = tmp_path / "self_forcing_dmd.pt"
    file.write_bytes(b"PK")
    said = refused("generate", "--model", file, "--prompt", "a")
    assert "is a pickle" in said
    for verb in ("generate", "estimate"):
        given = ("--prompt", "a") if verb == "generate" else ()
        said = refused(verb, "--model", "demo", *given, "--zones", "window=3")
        assert "--zones is of a stream: add --stream" in said
