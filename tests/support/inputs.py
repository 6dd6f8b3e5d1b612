"""Tiny pipelines that make a video from frames or a video, and how they are called for it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import diffusers
import numpy as np
import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLLTX2Video,
    CogVideoXPipeline,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosVideoToWorldPipeline,
    EasyAnimateInpaintPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    Kandinsky5I2VPipeline,
    LTX2Pipeline,
    LTXPipeline,
    LucyEditPipeline,
    MotifVideoPipeline,
    PIAPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    UNetMotionModel,
    WanImageToVideoPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image
from support import hunyuan, wan
from support.tiny import (
    animatediff,
    anyflow,
    anyflow_far,
    cases_of,
    chronoedit,
    cogvideox,
    cosmos,
    easyanimate,
    framepack,
    helios,
    hunyuan_video15,
    kandinsky5,
    kandinsky6,
    ltx,
    ltx2,
    motif,
    skyreels,
)
from support.tiny.wan import noise, with_encoder
from torch import Tensor

from gen_accel.pipelines.generation.config import ConditioningFiles as Files

Calls = dict[str, tuple[Files, dict[str, Any]]]


def picture(index: int, height: int, width: int) -> Image.Image:
    """Noise."""
    g = torch.Generator().manual_seed(index)
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=g)
    return Image.fromarray(pixels.numpy())


@dataclass(frozen=True)
class Model:
    """A tiny pipeline, as it is saved.

    Args:
        build: of the class that the folder's index names.
        size: frames, height and width of what is asked.
        calls: kinds, in words, to what is given and what the pipeline itself is called with.
        made: frames of what it makes, where it is not what is asked.
        token: frames and pixels, in rows and columns, of a token.
        grids: kinds to the grid, where frames are put beside those of the video.
        more: of every call.
        steps: of denoising.
    """

    build: Callable[[], Any]
    size: tuple[int, int, int]
    calls: Callable[[tuple[int, int, int]], Calls]
    made: Mapping[str, int] = field(default_factory=dict)
    token: tuple[int, int, int] = (4, 16, 16)
    grids: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    steps: int = 2

    def grid(self, kind: str) -> tuple[int, int, int]:
        (frames, height, width), (t, rows, columns) = self.size, self.token
        own = ((frames - 1) // t + 1, height // rows, width // columns)
        return self.grids.get(kind, own)


def prompted(pipe: Any, **embeddings: Any) -> Any:
    """A pipeline that has embeddings in the place of its text encoder."""
    kind = type(pipe)
    call = kind.__call__

    @wraps(call)
    def called(self: Any, prompt: str, **given: Any) -> Any:
        return call(self, **(embeddings | given))

    held = {"__call__": called, "embeddings": embeddings}
    pipe.__class__ = type(kind.__name__, (kind,), held)
    return pipe


def as_class(pipe: Any, name: str) -> Any:
    """The pipeline of another class with the same parts."""
    if type(pipe).__name__ == name:
        return pipe
    kind = getattr(diffusers, name)
    known = inspect.signature(kind).parameters
    parts = {**pipe.config, **pipe.components}
    made = kind(**{part: value for part, value in parts.items() if part in known})
    made.set_progress_bar_config(disable=True)
    embeddings = getattr(pipe, "embeddings", None)
    return made if embeddings is None else prompted(made, **embeddings)


def frames_of(size: tuple[int, int, int], count: int | None = None) -> list[Image.Image]:
    frames, height, width = size
    return [picture(10 + i, height, width) for i in range(count or frames)]


def text(size: tuple[int, int, int]) -> Calls:
    return {"text": (Files(), {})}


def first(size: tuple[int, int, int]) -> Calls:
    start = picture(0, *size[1:])
    return {"first frame": (Files(image=start), {"image": start})}


def both(size: tuple[int, int, int]) -> Calls:
    start, end = (picture(i, *size[1:]) for i in range(2))
    return {
        "first and last frame": (
            Files(image=start, last_image=end),
            {"image": start, "last_image": end},
        )
    }


def remade(size: tuple[int, int, int]) -> Calls:
    video = frames_of(size)
    return {"video": (Files(video=video, strength=0.5), {"video": video, "strength": 0.5})}


def continued(count: int) -> Callable[[tuple[int, int, int]], Calls]:
    def calls(size: tuple[int, int, int]) -> Calls:
        video = frames_of(size, count)
        return {"video": (Files(video=video), {"video": video})}

    return calls


def several(*parts: Callable[[tuple[int, int, int]], Calls]) -> Any:
    def calls(size: tuple[int, int, int]) -> Calls:
        return {kind: call for part in parts for kind, call in part(size).items()}

    return calls


def vace(size: tuple[int, int, int]) -> Calls:
    """Frames to keep are black in the mask, and frames to make are grey in the video."""
    frames, height, width = size
    start, end = (picture(i, height, width) for i in range(2))
    grey = Image.new("RGB", (width, height), (128, 128, 128))
    make, keep = (Image.new("L", (width, height), shade) for shade in (255, 0))
    video = frames_of(size)
    between, holes = [grey] * (frames - 2), [make] * (frames - 2)
    return text(size) | {
        "first frame": (
            Files(image=start),
            {"video": [start, *between, grey], "mask": [keep, *holes, make]},
        ),
        "last frame": (
            Files(last_image=end),
            {"video": [grey, *between, end], "mask": [make, *holes, keep]},
        ),
        "first and last frame": (
            Files(image=start, last_image=end),
            {"video": [start, *between, end], "mask": [keep, *holes, keep]},
        ),
        "video": (Files(video=video), {"video": video}),
    }


def ltx_calls(size: tuple[int, int, int]) -> Calls:
    frames, height, width = size
    start, end = (picture(i, height, width) for i in range(2))
    before = frames_of(size, 9)
    at_end = LTXVideoCondition(image=end, frame_index=frames - 1)
    return (
        text(size)
        | first(size)
        | {
            "last frame": (Files(last_image=end), {"conditions": [at_end]}),
            "first and last frame": (
                Files(image=start, last_image=end),
                {"conditions": [LTXVideoCondition(image=start), at_end]},
            ),
            "video": (
                Files(video=before),
                {"conditions": [LTXVideoCondition(video=before, frame_index=0)]},
            ),
        }
    )


def ltx2_calls(size: tuple[int, int, int]) -> Calls:
    _, height, width = size
    start, end = (picture(i, height, width) for i in range(2))
    before = frames_of(size, 9)
    at_end = LTX2VideoCondition(end, index=-1)
    return (
        text(size)
        | first(size)
        | {
            "last frame": (Files(last_image=end), {"conditions": [at_end]}),
            "first and last frame": (
                Files(image=start, last_image=end),
                {"conditions": [LTX2VideoCondition(start, index=0), at_end]},
            ),
            "video": (
                Files(video=before),
                {"conditions": [LTX2VideoCondition(before, index=0)]},
            ),
        }
    )


def overlapping(size: tuple[int, int, int]) -> Calls:
    video = frames_of(size, 6)  # of which 5 are whole latents
    return {"video": (Files(video=video), {"video": video, "overlap_history": 5})}


def in_chunks(size: tuple[int, int, int]) -> Calls:
    """Calls of AnyFlow FAR, which takes a picture as a video of one frame."""
    start, video = picture(0, *size[1:]), frames_of(size, 5)
    chunks = {"chunk_partition": [1, 2, 2]}

    def pixels(*frames: Image.Image) -> Tensor:
        values = torch.tensor([np.asarray(frame).tolist() for frame in frames])
        return values.permute(0, 3, 1, 2)[None] / 255

    return {
        "text": (Files(), chunks),
        "first frame": (Files(image=start), {"video": pixels(start)} | chunks),
        "video": (
            Files(video=video),
            {"video": pixels(*video), "chunk_partition": [1, 1, 2, 1]},
        ),
    }


def inpainted(size: tuple[int, int, int]) -> Calls:
    frames, height, width = size
    start, end = (picture(i, height, width) for i in range(2))
    video = frames_of(size)

    def tensors(given: Mapping[int, Image.Image], keep: bool = True) -> dict[str, Any]:
        pixels = torch.zeros(1, 3, frames, height, width)
        mask = torch.full((1, 1, frames, height, width), 255.0)
        for place, image in given.items():
            values = torch.tensor(np.asarray(image).tolist())
            pixels[0, :, place] = values.permute(2, 0, 1) / 255
            if keep:
                mask[0, :, place] = 0
        return {"video": pixels, "mask_video": mask}

    return {
        "first frame": (Files(image=start), tensors({0: start})),
        "last frame": (Files(last_image=end), tensors({frames - 1: end})),
        "first and last frame": (
            Files(image=start, last_image=end),
            tensors({0: start, frames - 1: end}),
        ),
        "video": (
            Files(video=video, strength=0.5),
            tensors(dict(enumerate(video)), keep=False) | {"strength": 0.5},
        ),
    }


def wan_first_and_last() -> Any:
    """With an image encoder whose features are of two pictures."""
    like = wan.PIPELINES["image with encoder"]()
    model = wan.transformer(
        in_channels=2 * wan.CHANNELS + 4,
        image_dim=wan.IMAGE_WIDTH,
        added_kv_proj_dim=wan.HEADS * wan.HEAD_DIM,
        pos_embed_seq_len=10,
    )
    return WanImageToVideoPipeline(**(like.components | {"transformer": model}))


def skyreels_image() -> Any:
    model = wan.transformer(
        kind=type(skyreels.transformer()),
        in_channels=2 * wan.CHANNELS + 4,
        image_dim=wan.IMAGE_WIDTH,
        added_kv_proj_dim=wan.HEADS * wan.HEAD_DIM,
    )
    return with_encoder(SkyReelsV2ImageToVideoPipeline, model)


def lucy() -> Any:
    return wan.pipeline(LucyEditPipeline, transformer=wan.transformer(in_channels=32))


def hunyuan_image() -> Any:
    """Without its text encoder, a model of text and pictures."""
    parts = hunyuan.pipeline(transformer=hunyuan.transformer(image_condition_type="token_replace"))
    kept = ("vae", "transformer", "scheduler", "text_encoder_2", "tokenizer_2")
    lacking: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "image_processor"))
    pipe: Any = HunyuanVideoImageToVideoPipeline(
        **lacking,
        **{name: parts.components[name] for name in kept},
    )
    return prompted(
        pipe,
        prompt_embeds=noise(1, 8, hunyuan.TEXT_WIDTH, seed=5),
        pooled_prompt_embeds=noise(1, hunyuan.POOLED_WIDTH, seed=6),
        prompt_attention_mask=torch.ones(1, 8, dtype=torch.long),
    )


def hunyuan_skyreels() -> Any:
    model = hunyuan.transformer(in_channels=2 * hunyuan.CHANNELS)
    parts = hunyuan.pipeline(transformer=model)
    return HunyuanSkyreelsImageToVideoPipeline(**parts.components)


def hunyuan15() -> Any:
    seen = hunyuan_video15.seen
    width, glyphs = hunyuan_video15.TEXT_WIDTH, hunyuan_video15.GLYPHS
    tokens = hunyuan_video15.TEXT
    return prompted(
        hunyuan_video15.image_pipeline(),
        prompt_embeds=noise(1, tokens, width, seed=6),
        prompt_embeds_mask=seen(tokens, (7,)),
        negative_prompt_embeds=noise(1, tokens, width, seed=7),
        negative_prompt_embeds_mask=seen(tokens, (3,)),
        prompt_embeds_2=noise(1, glyphs, hunyuan_video15.GLYPHS_WIDTH, seed=8),
        prompt_embeds_mask_2=seen(glyphs, (3,)),
        negative_prompt_embeds_2=torch.zeros(1, glyphs, hunyuan_video15.GLYPHS_WIDTH),
        negative_prompt_embeds_mask_2=seen(glyphs, (0,)),
    )


def cog(**config: Any) -> Any:
    return cogvideox.pipeline(cogvideox.transformer(max_text_seq_length=226, **config))


class Silent(torch.nn.Module):
    """In the place of what makes sound of LTX-2's spectrograms."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, spectrograms: Any) -> Any:
        return spectrograms


def ltx2_autoencoder() -> Any:
    torch.manual_seed(2)
    return AutoencoderKLLTX2Video(
        latent_channels=ltx2.CHANNELS,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        down_block_types=("LTX2VideoDownBlock3D",) * 3,
        downsample_type=("spatiotemporal",) * 3,
        decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(True, True, True),
        upsample_factor=(1, 1, 1),
        patch_size=1,
    ).eval()


def ltx2_text() -> Any:
    pipe = ltx2.pipeline(ltx2.transformer())
    pipe.register_modules(vocoder=Silent(), vae=ltx2_autoencoder())
    pipe = LTX2Pipeline(**pipe.components)  # which reads the sizes of the autoencoder
    pipe.set_progress_bar_config(disable=True)
    return prompted(
        pipe,
        prompt_embeds=noise(1, ltx2.TEXT, ltx2.TEXT_WIDTH, seed=6),
        prompt_attention_mask=torch.ones(1, ltx2.TEXT),
        negative_prompt_embeds=noise(1, ltx2.TEXT, ltx2.TEXT_WIDTH, seed=7),
        negative_prompt_attention_mask=torch.ones(1, ltx2.TEXT),
        stg_scale=0.0,
        modality_scale=1.0,
    )


def kandinsky5_image() -> Any:
    tokens, width = kandinsky5.TEXT, kandinsky5.TEXT_WIDTH
    pipe = kandinsky5.pipeline(Kandinsky5I2VPipeline, kandinsky5.transformer(visual_cond=True))
    return prompted(
        pipe,
        prompt_embeds_qwen=noise(1, tokens, width, seed=5),
        prompt_embeds_clip=noise(1, kandinsky5.POOLED_WIDTH, seed=6),
        prompt_cu_seqlens=torch.tensor([0, tokens]),
        negative_prompt_embeds_qwen=noise(1, tokens, width, seed=7),
        negative_prompt_embeds_clip=noise(1, kandinsky5.POOLED_WIDTH, seed=8),
        negative_prompt_cu_seqlens=torch.tensor([0, tokens]),
    )


def kandinsky6_either() -> Any:
    tokens, width = kandinsky6.TEXT, kandinsky6.TEXT_WIDTH
    return prompted(
        kandinsky6.pipeline(),
        prompt_embeds=noise(1, tokens, width, seed=5),
        pooled_prompt_embeds=noise(1, kandinsky6.POOLED_WIDTH, seed=6),
        negative_prompt_embeds=noise(1, tokens, width, seed=7),
        negative_pooled_prompt_embeds=noise(1, kandinsky6.POOLED_WIDTH, seed=8),
        sample_audio=False,
    )


def cosmos_of(kind: type, scheduler: Any = None, vae: Any = None) -> Any:
    """Of Cosmos 1, 2 or 2.5."""
    model = cosmos.transformer(
        in_channels=wan.CHANNELS + 1, out_channels=wan.CHANNELS, extra_pos_embed_type=None
    )
    pipe: Any = kind(
        transformer=model,
        vae=vae or wan.autoencoder(),
        scheduler=scheduler or wan.unipc(),
        safety_checker=cosmos.Unchecked(),
        text_encoder=None,
        tokenizer=None,
    )
    return prompted(
        pipe,
        prompt_embeds=noise(1, 5, wan.TEXT_WIDTH, seed=6),
        negative_prompt_embeds=noise(1, 5, wan.TEXT_WIDTH, seed=7),
    )


def cosmos_autoencoder() -> Any:
    torch.manual_seed(2)
    return AutoencoderKLCosmos(
        latent_channels=wan.CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()


def animated() -> Any:
    """As `animatediff.animated`, with a tokenizer of one token a word."""
    pipe = animatediff.animated()
    tokenizer: Any = new_tokenizer()
    tokenizer.model_max_length = 16
    pipe.register_modules(tokenizer=tokenizer)
    return pipe


def animated_image() -> Any:
    """PIA, whose UNet takes a picture and a mask beside the noisy latents."""
    parts = animated()
    config = dict(parts.unet.config) | {"in_channels": 9}
    torch.manual_seed(0)
    model: Any = UNetMotionModel.from_config(config)
    model.eval()
    made = {**parts.components, "unet": model}
    return PIAPipeline(**made)


def edm() -> Any:
    return EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    )


def easyanimate_inpaint() -> Any:
    tokens, width = easyanimate.TEXT, easyanimate.TEXT_WIDTH
    model = easyanimate.transformer(**easyanimate.INPAINT)
    pipe = easyanimate.pipeline(model, EasyAnimateInpaintPipeline)
    pipe.vae.register_to_config(cache_mag_vae=True)  # as that of the published models
    return prompted(
        pipe,
        prompt_embeds=noise(1, tokens, width, seed=6),
        prompt_attention_mask=torch.ones(1, tokens),
        negative_prompt_embeds=noise(1, tokens, width, seed=7),
        negative_prompt_attention_mask=torch.ones(1, tokens),
    )


@cache
def models() -> dict[str, Model]:
    small = (9, 48, 64)
    found = {
        "wan": Model(wan.pipeline, small, several(text, remade)),
        "wan_image": Model(wan.PIPELINES["image"], small, several(first, both)),
        "wan_image_encoder": Model(wan.PIPELINES["image with encoder"], small, first),
        "wan_first_and_last": Model(wan_first_and_last, small, both),
        "wan_token_timesteps": Model(
            wan.PIPELINES["token timesteps"], small, several(text, first)
        ),
        "wan_vace": Model(wan.PIPELINES["control"], small, vace),
        "lucy": Model(
            lucy,
            small,
            lambda size: {"video": (Files(video=frames_of(size)), {"video": frames_of(size)})},
        ),
        "anyflow": Model(anyflow.pipeline, small, several(text, continued(5))),
        "anyflow_far": Model(
            anyflow_far.pipeline, (17, 48, 64), in_chunks, grids={"video": (4, 3, 4)}
        ),
        "chronoedit": Model(
            lambda: with_encoder(chronoedit.ChronoEditPipeline, chronoedit.transformer()),
            (5, 48, 64),
            first,
        ),
        "skyreels_image": Model(skyreels_image, small, first),
        "skyreels_forcing": Model(
            lambda: wan.pipeline(
                SkyReelsV2DiffusionForcingPipeline, transformer=skyreels.transformer()
            ),
            small,
            several(text, first, both, overlapping),
            made={"video": 6 + 9},
            grids={"first and last frame": (4, 3, 4)},  # the last one is put behind
        ),
        "hunyuan_image": Model(hunyuan_image, small, first),
        "hunyuan_skyreels": Model(hunyuan_skyreels, small, first),
        "hunyuan15": Model(hunyuan15, (9, 64, 64), first),
        "framepack": Model(
            framepack.pipeline,
            (9, 48, 32),
            several(first, both),
            made=dict.fromkeys(("first frame", "first and last frame"), 37),
            grids=dict.fromkeys(("first frame", "first and last frame"), (9, 3, 2)),
        ),
        "cogvideox": Model(
            lambda: cogvideox.pipeline(
                cogvideox.transformer(max_text_seq_length=226), CogVideoXPipeline
            ),
            small,
            several(text, remade),
        ),
        "cogvideox_image": Model(lambda: cog(**cogvideox.ROTARY), small, first),
        "ltx": Model(
            lambda: ltx.pipeline(LTXPipeline), (17, 96, 64), ltx_calls, token=(8, 32, 32)
        ),
        "ltx2": Model(ltx2_text, (17, 32, 64), ltx2_calls, token=(8, 8, 8)),
        "kandinsky5": Model(kandinsky5_image, (21, 48, 64), first),
        "kandinsky6": Model(kandinsky6_either, small, several(text, first)),
        "cosmos1": Model(
            lambda: cosmos_of(CosmosVideoToWorldPipeline, edm(), vae=cosmos_autoencoder()),
            small,
            several(first, continued(5)),
            token=(4, 8, 8),
        ),
        "animatediff": Model(animated, (3, 24, 32), several(text, remade), token=(3, 2, 2)),
        "animatediff_image": Model(animated_image, (3, 24, 32), first, token=(3, 2, 2)),
        "cosmos2": Model(
            lambda: cosmos_of(
                Cosmos2VideoToWorldPipeline,
                FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            ),
            small,
            several(first, continued(5)),
        ),
        "cosmos25": Model(
            lambda: cosmos_of(Cosmos2_5_PredictBasePipeline),
            small,
            several(text, first, continued(5)),
        ),
        "easyanimate": Model(easyanimate_inpaint, small, inpainted),
        "helios": Model(  # whole chunks
            helios.pipeline,
            (9, 64, 64),
            several(text, first, continued(33)),
            made=dict.fromkeys(("text", "first frame", "video"), 33),
            grids=dict.fromkeys(("text", "first frame", "video"), (9, 4, 4)),
        ),
        "motif": Model(lambda: motif.pipeline(MotifVideoPipeline), small, several(text, first)),
    }
    if cases_of("cosmos3"):
        build = cases_of("cosmos3")[0].pipeline
        assert build is not None
        found["cosmos3"] = Model(build, small, several(text, first, continued(5)))
    return found
