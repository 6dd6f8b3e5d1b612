"""AnyFlow FAR: a chunk of video after a cache of earlier ones, the oldest in coarser patches."""

from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
)
from support import wan
from support.tiny import Case, anyflow
from support.tiny.wan import noise
from torch import Tensor

LIMIT = 3  # chunks that are seen whole, the chunk itself among them
PARTITION = (1, 1, 2, 2, 2)


def transformer() -> Any:
    own = {"full_chunk_limit": LIMIT, "chunk_partition": PARTITION}
    return anyflow.transformer(AnyFlowFARTransformer3DModel, **own)


def inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """A chunk whose cache has two chunks, and one of a frame in coarser patches; the chunk and the
    former make up the frames."""
    chunk = max(1, frames // 3)
    past = frames - chunk
    given = anyflow.inputs(chunk, height, width, **options)
    batch, coarse = len(given["hidden_states"]), height // 2 * (width // 2)
    sizes = {"compressed_cache": coarse, "full_cache": past * height * width}
    return given | {
        "chunk_partition": [1, past - past // 2, past // 2, chunk],
        "kv_cache": [
            {
                name: noise(2, batch, wan.HEADS, length, wan.HEAD_DIM, seed=10 * layer + number)
                for number, (name, length) in enumerate(sizes.items())
            }
            for layer in range(wan.LAYERS)
        ],
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 3},
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    past = sum(given["chunk_partition"][1:-1])
    if frame >= past:
        anyflow.poke(given, frame - past, row, column)
        return
    height, width = (size // 2 for size in given["hidden_states"].shape[3:])
    keys = given["kv_cache"][0]["full_cache"][0]
    keys[0, :, (frame * height + row) * width + column] += 1


def one(given: dict[str, Any], row: int) -> dict[str, Any]:
    some = slice(row, row + 1)
    cache = [{name: x[:, some] for name, x in layer.items()} for layer in given["kv_cache"]]
    alone = {name: x[some] for name, x in given.items() if isinstance(x, Tensor)}
    return {**given, **alone, "kv_cache": cache, "kv_cache_flag": {**given["kv_cache_flag"]}}


def pipeline() -> Any:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    return wan.pipeline(AnyFlowFARPipeline, transformer=transformer(), scheduler=scheduler)


def generate(pipe: Any, **more: Any) -> Tensor:
    """Five chunks, of which the last two see coarse ones."""
    given: dict[str, Any] = {"num_frames": 29, "num_inference_steps": 2} | more
    made = pipe(
        prompt="a red square moves right",
        height=96,
        width=64,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=16,
        output_type="latent",
        **given,
    )
    return made.frames


CASES = [
    Case("anyflow_far", transformer, inputs, poke, row=one, pipeline=pipeline, generate=generate)
]
