"""HunyuanVideo: video and padded text in one attention."""

from typing import Any

from support import hunyuan
from support.tiny import Case, Training
from torch import Tensor


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    lengths = (hunyuan.TEXT,) * batch if lengths is None else lengths
    return hunyuan.inputs(frames, 2 * height, 2 * width, lengths=lengths, time=time)


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for row, length in enumerate(lengths):
        given["encoder_hidden_states"][row, length:] += 1


CASES = [
    Case(
        "hunyuan_video",
        hunyuan.transformer,
        inputs,
        poke,
        lengths=hunyuan.LENGTHS,
        padding=padding,
        pipeline=hunyuan.pipeline,
        generate=hunyuan.generate,
    )
]

TRAINING = [
    Training(
        "hunyuan_video",
        lambda: hunyuan.pipeline(transformer=hunyuan.transformer(guidance_embeds=True)),
        (9, 32, 48),
        {"guidance_scale": 1.0, "max_sequence_length": 16},
    )
]
