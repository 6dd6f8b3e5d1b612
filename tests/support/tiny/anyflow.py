"""AnyFlow: latents with the frames before the channels, and a timestep for each of them."""

from typing import Any

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler
from support import wan
from support.tiny import Case
from support.tiny.wan import inputs as wan_inputs
from torch import Tensor


def transformer(kind: Any = AnyFlowTransformer3DModel, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(
        num_attention_heads=wan.HEADS,
        attention_head_dim=wan.HEAD_DIM,
        in_channels=wan.CHANNELS,
        out_channels=wan.CHANNELS,
        text_dim=wan.TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=wan.LAYERS,
        rope_max_seq_len=32,
        **more,
    ).eval()


def inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Tensor]:
    given = wan_inputs(frames, height, width, **options)
    times = given["timestep"][:, None].repeat(1, frames)
    return given | {
        "hidden_states": given["hidden_states"].transpose(1, 2).contiguous(),
        "timestep": times,
        "r_timestep": times - 300,
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, frame, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def pipeline() -> Any:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    return wan.pipeline(AnyFlowPipeline, transformer=transformer(), scheduler=scheduler)


CASES = [Case("anyflow", transformer, inputs, poke, pipeline=pipeline, generate=wan.generate)]
