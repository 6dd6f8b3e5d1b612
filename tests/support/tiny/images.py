"""What tiny image models share: one frame, latents as a row of tokens or as a picture, and the
other parts of their pipelines."""

from functools import cache
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextConfig, Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel

GRIDS = ((1, 9, 11), (1, 6, 7))
HEIGHT, WIDTH = 36, 44  # pixels of what pipelines make: in tokens 9 x 11
TEXT = 16  # tokens that a prompt is padded to
TWO_LEVELS: dict[str, Any] = {  # of an autoencoder, whose latents have half the picture's sides
    "block_out_channels": (4, 4),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 2,
}
PROMPT, NEGATIVE = "a red square moves right", "a blue circle"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positions(height: int, width: int, *, axes: int = 3, image: int = 0) -> Tensor:
    """(N, axes): which image, row, column, and zeros."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.zeros(height * width, axes)
    ids[:, 0], ids[:, 1], ids[:, 2] = image, rows.flatten(), columns.flatten()
    return ids


def poke_token(given: dict[str, Any], width: int, row: int, column: int) -> None:
    """Where latents are a row of tokens, of which the image is the first."""
    given["hidden_states"][0, row * width + column] += 1


def poke_patch(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    """Where latents are (B, C, H, W), in patches of 2 x 2."""
    given["hidden_states"][0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def pipeline(kind: type, **parts: Any) -> Any:
    """Of `parts`, with a scheduler."""
    pipe = kind(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> Tensor:
    """Latents of two steps, of the same noise and prompt each time."""
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(5),
        "max_sequence_length": TEXT,
        "output_type": "latent",
    }
    return pipe(**(given | options)).images


@cache
def autoencoder(channels: int) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(**TWO_LEVELS, latent_channels=channels, shift_factor=0.1).eval()


def tokenizer() -> Any:
    """With the chat template that some pipelines ask for: the messages, and nothing else."""
    made = new_tokenizer()
    made.model_max_length = TEXT
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


@cache
def t5(width: int) -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


@cache
def clip(kind: type, width: int, projected: int = 4) -> Any:
    """
    Args:
        kind: CLIPTextModel, or that with a projection.
        projected: width of the projection.
    """
    torch.manual_seed(4)
    own: dict[str, Any] = {"projection_dim": projected, "max_position_embeddings": TEXT}
    return kind(CLIPTextConfig(**causal(width, layers=2) | own)).eval()


@cache
def qwen3(width: int) -> Qwen3ForCausalLM:
    torch.manual_seed(5)
    config = Qwen3Config(**causal(width, layers=2), num_key_value_heads=2, head_dim=4)
    return Qwen3ForCausalLM(config).eval()


def causal(width: int, *, layers: int) -> dict[str, Any]:
    """Configuration of a language model for the tokenizer's ids."""
    return {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
