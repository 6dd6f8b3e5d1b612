"""ConsisID: CogVideoX with a face beside its blocks."""

from typing import Any

from diffusers import ConsisIDTransformer3DModel
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # without OpenCV
from support.tiny import Case, cogvideox
from support.tiny.cogvideox import poke, rotary_inputs
from support.tiny.wan import noise
from torch import Tensor

FACE_WIDTH, SCALES = 8, 2


def transformer() -> Any:
    # Two thirds of the width are what the cross-attention to the face takes.
    return cogvideox.transformer(
        ConsisIDTransformer3DModel,
        **cogvideox.ROTARY,
        num_attention_heads=3,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=FACE_WIDTH,
        LFE_vit_dim=FACE_WIDTH,
        LFE_depth=SCALES,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        LFE_num_scale=SCALES,
    )


def face(batch: int) -> dict[str, Any]:
    return {
        "id_cond": noise(batch, FACE_WIDTH, seed=6),
        "id_vit_hidden": [noise(batch, 5, FACE_WIDTH, seed=7 + i) for i in range(SCALES)],
    }


def inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    given = rotary_inputs(frames, height, width, **options)
    return given | face(len(given["hidden_states"]))


def row(given: dict[str, Any], row: int) -> dict[str, Any]:
    alone = {
        name: value[row : row + 1] if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    return alone | {"id_vit_hidden": [x[row : row + 1] for x in given["id_vit_hidden"]]}


def pipeline() -> Any:
    return cogvideox.pipeline(transformer(), ConsisIDPipeline)


def generate(pipe: Any) -> Tensor:
    return cogvideox.generate(pipe, **face(1))


CASES = [
    Case("consisid", transformer, inputs, poke, row=row, pipeline=pipeline, generate=generate)
]
