"""Tiny Wan models and pipelines of diffusers' own classes, with random weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

CHANNELS = 16
TEXT_WIDTH = 8
IMAGE_WIDTH = 8
HEADS, HEAD_DIM = 2, 16
LAYERS = 2

# Pixels. In tokens 3 x 5 x 7: no side divides a tile.
FRAMES, HEIGHT, WIDTH = 9, 80, 112
GRID = (3, 5, 7)


def transformer(seed: int = 0, kind: type = WanTransformer3DModel, **config: Any) -> Any:
    """In evaluation mode; `config` overrides what is tiny here."""
    torch.manual_seed(seed)
    tiny = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": LAYERS,
        "rope_max_seq_len": 32,
    }
    return kind(**(tiny | config)).eval()


def inputs(
    frames: int = 5,
    height: int = 18,
    width: int = 22,
    *,
    batch: int = 2,
    time: float = 700.0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Arguments of a forward pass; sizes in latents. As given, 5 x 9 x 11 tokens."""
    g = torch.Generator().manual_seed(1)
    made = {
        "hidden_states": torch.randn((batch, CHANNELS, frames, height, width), generator=g),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": torch.randn((batch, 6, TEXT_WIDTH), generator=g),
    }
    return {name: x.to(device) for name, x in made.items()}


def forward(model: nn.Module, *sizes: int, **options: Any) -> Tensor:
    return model(**inputs(*sizes, **options), return_dict=False)[0]


def gradients(model: nn.Module, *sizes: int) -> dict[str, Tensor]:
    """Of a scalar of the output, with regard to all parameters that are trained."""
    model.zero_grad()
    forward(model, *sizes).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def processors(pipe_or_model: Any) -> list[Any]:
    """All of them, cross-attention included, in the order of the modules."""
    models = [pipe_or_model]
    if not isinstance(pipe_or_model, nn.Module):
        found = [getattr(pipe_or_model, name, None) for name in ("transformer", "transformer_2")]
        models = [model for model in found if model is not None]
    return [m.processor for model in models for m in model.modules() if hasattr(m, "processor")]


def euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


@cache
def autoencoder() -> AutoencoderKLWan:
    torch.manual_seed(2)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


@cache
def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(3)
    config = UMT5Config(
        vocab_size=64, d_model=TEXT_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return UMT5EncoderModel(config).eval()


def pipeline(kind: type = WanPipeline, **parts: Any) -> Any:
    """A pipeline of `kind` with UniPC, Wan's own scheduler. `parts` replaces components."""
    common = {
        "tokenizer": new_tokenizer(),
        "text_encoder": text_encoder(),
        "vae": autoencoder(),
        "scheduler": unipc(),
    }
    if "transformer" not in parts:
        parts["transformer"] = transformer()
    pipe = kind(**(common | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _image_to_video() -> Any:
    return pipeline(WanImageToVideoPipeline, transformer=transformer(in_channels=2 * CHANNELS + 4))


def _image_to_video_with_encoder() -> Any:
    torch.manual_seed(4)
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    model = transformer(
        in_channels=2 * CHANNELS + 4,
        image_dim=IMAGE_WIDTH,
        added_kv_proj_dim=HEADS * HEAD_DIM,
    )
    return pipeline(
        WanImageToVideoPipeline,
        transformer=model,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )


def _vace() -> Any:
    model = transformer(kind=WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=96)
    for block in model.vace_blocks:
        nn.init.normal_(block.proj_out.weight, std=0.2)
    return pipeline(WanVACEPipeline, transformer=model)


def two_stage() -> Any:
    """As Wan 2.2 A14B: one transformer for high noise, another one for low noise."""
    return pipeline(transformer=transformer(0), transformer_2=transformer(1), boundary_ratio=0.875)


PIPELINES: dict[str, Callable[[], Any]] = {
    "text": pipeline,
    "image": _image_to_video,
    "image with encoder": _image_to_video_with_encoder,
    "video": lambda: pipeline(WanVideoToVideoPipeline),
    "control": _vace,
    "two stages": two_stage,
    "token timesteps": lambda: pipeline(expand_timesteps=True),
    "token timesteps, image": lambda: pipeline(WanImageToVideoPipeline, expand_timesteps=True),
}


def generate(pipe: Any, steps: int = 2, **options: Any) -> Tensor:
    """Latents of the same noise and prompt each time. Guidance makes two calls a step."""
    given: dict[str, Any] = {
        "prompt": "a red square moves right",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(5),
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    if isinstance(pipe, WanImageToVideoPipeline):
        given["image"] = picture(0)
        if pipe.image_encoder is not None:
            given["max_sequence_length"] = 512  # the processor takes all beyond for the image
    if isinstance(pipe, WanVideoToVideoPipeline):
        del given["num_frames"]
        given |= {"video": [picture(i) for i in range(FRAMES)], "strength": 1.0}
    return pipe(**(given | options)).frames


def picture(index: int) -> Image.Image:
    """Noise of the size of the video."""
    g = torch.Generator().manual_seed(index)
    pixels = torch.randint(256, (HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=g)
    return Image.fromarray(pixels.numpy())
