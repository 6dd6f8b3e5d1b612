"""Z-Image: latents and texts come in lists, and both are filled up to multiples of 32 tokens."""

from functools import partial
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from support.tiny import Case, images
from support.tiny.images import GRIDS, noise
from torch import Tensor, nn

LENGTHS = (40, 3)  # of texts: filled up to 64 and to 32 tokens


def transformer() -> Any:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    for name, token in model.named_parameters():  # learned, and made empty
        if name.endswith("pad_token"):
            nn.init.normal_(token)
    return model.eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    lengths = (5,) * batch if lengths is None else lengths
    return {
        "x": [noise(4, frames, 2 * height, 2 * width, seed=i) for i in range(batch)],
        "t": torch.full((batch,), 1 - time / 1000),
        "cap_feats": [noise(length, 12, seed=9 + i) for i, length in enumerate(lengths)],
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["x"][0][:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    """The model itself pads, with zeros: there is nothing to change."""


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: value[number : number + 1] for name, value in given.items()}


def call(model: nn.Module, given: dict[str, Any]) -> Tensor:
    return torch.stack(model(**given, return_dict=False)[0])


def pipeline() -> Any:
    return images.pipeline(
        ZImagePipeline,
        vae=images.autoencoder(4),
        text_encoder=images.qwen3(12).model,
        tokenizer=images.tokenizer(),
        transformer=transformer(),
    )


# Guidance makes a batch of a text of 41 tokens and one of 4.
generate = partial(
    images.generate,
    prompt=8 * f"{images.PROMPT} ",
    negative_prompt=images.NEGATIVE,
    guidance_scale=4.0,
    max_sequence_length=64,
)

CASES = [
    Case(
        "z_image",
        transformer,
        inputs,
        poke,
        GRIDS,
        lengths=LENGTHS,
        padding=padding,
        call=call,
        row=row,
        pipeline=pipeline,
        generate=generate,
    )
]
