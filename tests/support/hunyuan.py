"""Tiny HunyuanVideo models and pipelines of diffusers' own classes, with random weights."""

from functools import cache
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

CHANNELS = 4
TEXT_WIDTH, POOLED_WIDTH = 8, 12
HEADS, HEAD_DIM = 2, 16
DOUBLE, SINGLE = 2, 2
LAYERS = DOUBLE + SINGLE
LENGTHS = (7, 3)  # text tokens of the two samples of `inputs()`, which are padded to 9
TEXT = 9

# Pixels. In tokens 3 x 5 x 7: no side divides a tile.
FRAMES, HEIGHT, WIDTH = 9, 80, 112
GRID = (3, 5, 7)


def transformer(seed: int = 0, **config: Any) -> Any:
    """In evaluation mode; `config` overrides what is tiny here."""
    torch.manual_seed(seed)
    tiny = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": DOUBLE,
        "num_single_layers": SINGLE,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": POOLED_WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideoTransformer3DModel(**(tiny | config)).eval()


def inputs(
    frames: int = 5,
    height: int = 18,
    width: int = 22,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    text: int = TEXT,
    time: float = 700.0,
) -> dict[str, Tensor]:
    """Arguments of a forward pass; sizes in latents. As given, 5 x 9 x 11 tokens."""
    g = torch.Generator().manual_seed(1)
    batch = len(lengths)
    return {
        "hidden_states": torch.randn((batch, CHANNELS, frames, height, width), generator=g),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": torch.randn((batch, text, TEXT_WIDTH), generator=g),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(lengths)[:, None]).long(),
        "pooled_projections": torch.randn((batch, POOLED_WIDTH), generator=g),
        "guidance": torch.full((batch,), 6000.0),
    }


def forward(model: nn.Module, *sizes: int, **options: Any) -> Tensor:
    return model(**inputs(*sizes, **options), return_dict=False)[0]


def gradients(model: nn.Module, *sizes: int, **options: Any) -> dict[str, Tensor]:
    """Of a scalar of the output, with regard to all parameters that are trained."""
    model.zero_grad()
    forward(model, *sizes, **options).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@cache
def autoencoder() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(2)
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


@cache
def text_encoders() -> tuple[LlamaModel, CLIPTextModel]:
    torch.manual_seed(3)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
    )
    clip = CLIPTextConfig(
        vocab_size=64,
        hidden_size=POOLED_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=POOLED_WIDTH,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaModel(llama).eval(), CLIPTextModel(clip).eval()


def pipeline(**parts: Any) -> HunyuanVideoPipeline:
    """Both tokenizers are the demo model's, one token a word. `parts` replaces components."""
    llama, clip = text_encoders()
    common = {
        "text_encoder": llama,
        "tokenizer": new_tokenizer(),
        "vae": autoencoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": clip,
        "tokenizer_2": new_tokenizer(),
    }
    if "transformer" not in parts:
        parts["transformer"] = transformer()
    pipe = HunyuanVideoPipeline(**(common | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def picture_encoder() -> LlavaForConditionalGeneration:
    """A model of text and pictures, of 24 x 24 tokens each, as the pipeline counts them."""
    torch.manual_seed(4)
    llama = LlamaConfig(
        vocab_size=80,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
    )
    index = len(picture_tokenizer()) - 1
    config = LlavaConfig(
        vision_config=vision, text_config=llama, image_token_index=index, pad_token_id=0
    )
    return LlavaForConditionalGeneration(config).eval()


def picture_tokenizer() -> Any:
    """The demo model's, with the marks of the pipeline's template; the last is the picture's."""
    tokenizer = new_tokenizer()
    marks = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
    tokenizer.add_tokens([*marks], special_tokens=True)
    return tokenizer


def image_pipeline(kind: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    """With a first frame in the place of the first tokens, or "latent_concat"."""
    channels = 2 * CHANNELS + 1 if kind == "latent_concat" else CHANNELS
    parts = pipeline(transformer=transformer(image_condition_type=kind, in_channels=channels))
    pipe: Any = HunyuanVideoImageToVideoPipeline(
        **parts.components
        | {
            "text_encoder": picture_encoder(),
            "tokenizer": picture_tokenizer(),
            "image_processor": CLIPImageProcessor(size=48, crop_size=48),
        }
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, steps: int = 2, **options: Any) -> Tensor:
    """Latents of the same noise and prompt each time, one call a step."""
    given: dict[str, Any] = {
        "prompt": "a red square moves right",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(5),
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**(given | options)).frames
