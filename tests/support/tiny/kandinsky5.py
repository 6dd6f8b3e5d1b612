"""Kandinsky 5: video alone in self-attention."""

from functools import partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from support import hunyuan, wan
from support.tiny import Case, Training
from support.tiny.wan import noise
from torch import Tensor, nn

CHANNELS = 4
TEXT, TEXT_WIDTH, POOLED_WIDTH = 9, 8, 6


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "in_visual_dim": CHANNELS,
        "out_visual_dim": CHANNELS,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": POOLED_WIDTH,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
    }
    model = Kandinsky5Transformer3DModel(**(tiny | config))
    for name, weight in model.named_parameters():
        if name.endswith("modulation.out_layer.weight"):  # empty, so that no attention is added
            nn.init.normal_(weight, std=0.2)
    return model.eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
    channels: int = CHANNELS,
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, frames, 2 * height, 2 * width, channels),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "timestep": torch.full((batch,), time),
        "pooled_projections": noise(batch, POOLED_WIDTH, seed=4),
        "visual_rope_pos": [torch.arange(size) for size in (frames, height, width)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """Positions are those of all samples."""
    own = slice(number, number + 1)
    shared = "visual_rope_pos", "text_rope_pos", "scale_factor"
    return {name: x if name in shared else x[own] for name, x in given.items()}


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def call(model: nn.Module, given: dict[str, Any]) -> Tensor:
    return model(**given).sample


def pipeline(kind: type, model: Any) -> Any:
    """Without what makes embeddings of a prompt."""
    others = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe: Any = kind(
        transformer=model,
        vae=hunyuan.autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        **dict.fromkeys(others),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, frames: int = wan.FRAMES, **options: Any) -> Tensor:
    made = pipe(
        prompt_embeds_qwen=noise(1, TEXT, TEXT_WIDTH, seed=5),
        prompt_embeds_clip=noise(1, POOLED_WIDTH, seed=6),
        prompt_cu_seqlens=torch.tensor([0, TEXT]),
        negative_prompt_embeds_qwen=noise(1, TEXT, TEXT_WIDTH, seed=7),
        negative_prompt_embeds_clip=noise(1, POOLED_WIDTH, seed=8),
        negative_prompt_cu_seqlens=torch.tensor([0, TEXT]),
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=frames,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **options,
    )
    return made.frames


CASES = [
    Case(
        "kandinsky5",
        transformer,
        inputs,
        poke,
        call=call,
        row=row,
        pipeline=lambda: pipeline(Kandinsky5T2VPipeline, transformer()),
        generate=generate,
    ),
    Case(
        "kandinsky5_image",
        partial(transformer, visual_cond=True),
        partial(inputs, channels=2 * CHANNELS + 1),
        poke,
        call=call,
        row=row,
        pipeline=lambda: pipeline(Kandinsky5I2VPipeline, transformer(visual_cond=True)),
        # Its first frames are fitted to the statistics of those after them.
        generate=partial(generate, frames=21, image=wan.picture(0)),
    ),
]


class Processor:
    """In the place of Qwen's: one token a word, and no pictures."""

    def __init__(self) -> None:
        self.tokenizer = new_tokenizer()

    def __call__(self, text: list[str], images: None, videos: None, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens)


def texts(kind: type = Kandinsky5T2VPipeline, **config: Any) -> Any:
    """A pipeline with both text encoders."""
    llama, clip = hunyuan.text_encoders()
    pipe = pipeline(kind, transformer(in_text_dim2=hunyuan.POOLED_WIDTH, **config))
    processor: Any = Processor()
    pipe.register_modules(text_encoder=llama, text_encoder_2=clip, tokenizer_2=new_tokenizer())
    pipe.tokenizer = processor
    before = pipe.prompt_template.split("{}")[0]
    words = processor([before], None, None)["input_ids"][0]
    pipe.prompt_template_encode_start_idx = len(words) - 1  # without the end of the text
    return pipe


def last(latents: Tensor) -> Tensor:
    return latents.movedim(1, -1)


def beside_nothing(latents: Tensor) -> Tensor:
    """With the channels and the mask of given frames, of which there are none."""
    zeros = torch.zeros_like(latents)
    return last(torch.cat([latents, zeros, zeros[:, :1]], 1))


TRAINING = [
    Training(
        "kandinsky5",
        partial(texts, visual_cond=True),
        (9, 32, 48),
        {"guidance_scale": 1.0},
        lay=last,
        starts=beside_nothing,
        fed=beside_nothing,
    )
]
