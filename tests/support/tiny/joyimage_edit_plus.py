"""JoyImage Edit Plus: the image, references of one or more sizes, their padding, and text."""

from functools import partial
from math import prod
from typing import Any

import torch
from diffusers import JoyImageEditPlusTransformer3DModel
from support.tiny import Case
from support.tiny.images import GRIDS, noise
from torch import Tensor, nn

TEXT = 7


def transformer() -> Any:
    torch.manual_seed(0)
    model = JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=12,
        mlp_width_ratio=2.0,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    ).eval()
    for name, table in model.named_parameters():
        if name.endswith("modulate_table"):  # which begin as zeros
            torch.nn.init.normal_(table)
    return model


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
    references: tuple[int, ...] = (),
) -> dict[str, Any]:
    """
    Args:
        references: rows of each sample's reference, of three columns.
    """
    shapes = [[(frames, height, width)] for _ in range(batch)]
    for shape, rows in zip(shapes, references, strict=False):
        shape.append((1, rows, 3))
    patches = frames * height * width + 3 * max(references, default=0)
    lengths = (TEXT,) * batch if lengths is None else lengths
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    return {
        "hidden_states": noise(batch, patches, 4, 1, 2, 2),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, TEXT, 12, seed=2),
        "encoder_hidden_states_mask": mask.float(),
        "shape_list": shapes,
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    _, height, width = given["shape_list"][0][0]
    given["hidden_states"][0, (frame * height + row) * width + column] += 1


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for sample, length in enumerate(lengths):
        given["encoder_hidden_states"][sample, length:] += 1


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: x[number : number + 1] for name, x in given.items()}


def call(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The prediction with zeros at the padding of a smaller reference, which nobody reads."""
    out = model(**given, return_dict=False)[0]
    tokens = torch.tensor([sum(map(prod, shapes)) for shapes in given["shape_list"]])
    real = torch.arange(out.shape[1]) < tokens[:, None]
    return out.where(real.view(*real.shape, 1, 1, 1, 1), 0)


padded: dict[str, Any] = {"lengths": (TEXT, 4), "padding": padding, "row": row}
CASES = [
    Case("joyimage_edit_plus", transformer, inputs, poke, GRIDS, **padded),
    Case(
        "joyimage_edit_plus, references",
        transformer,
        partial(inputs, references=(5, 3)),
        poke,
        GRIDS,
        call=call,
        **padded,
    ),
]
