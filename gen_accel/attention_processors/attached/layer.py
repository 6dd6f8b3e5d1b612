"""One attention call of a layer that a method was attached to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.extension import AttentionExtension
from gen_accel.attention_processors.seam import (
    Call,
)
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape


def no_graph(extension: AttentionExtension) -> str:
    return f"{extension.name} differs from step to step, which a graph of torch.compile cannot"


def on_device(branch: nn.Module, device: torch.device) -> nn.Module:
    """Offloading moves the parameters that it found on a model: those of a branch that came later
    are moved here. Those that it holds elsewhere it brings itself."""
    return branch if is_offloaded(branch) else branch.to(device)


def is_offloaded(branch: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in branch.parameters())


class Layer(NamedTuple):
    """One attention that a method was attached to.

    Args:
        name: for reports.
        number: of its block.
        branch: the method's parameters in this layer.
        tokens: see `SelfAttention`.
    """

    name: str
    number: int
    method: Any
    branch: Any
    tokens: Callable[[Tokens, Call], Tokens | None] | None = None


def check_tokens(layer: Layer, call: Call, tokens: Tokens) -> None:
    q, k, video = call.q.shape[1], call.k.shape[1], tokens.video
    if k != video.tokens or q not in (k, k - tokens.before, video.video_tokens):
        raise ValueError(
            f"attention of {layer.name} runs over {k} tokens, the latents make {video}: a size "
            "that the model's patches do not divide, or a model that this family does not describe"
        )


# layer, q, k, v and the dense output (B, H, N, D), the grid, and what runs a plan on q, k, v
Observer = Callable[[Layer, Tensor, Tensor, Tensor, Tensor, VideoShape, Callable], None]


@torch.compiler.disable(
    reason="the mask of a text is not known in a graph; use the model uncompiled"
)
def refuse_mask(layer: str) -> None:
    """Outside of the graph, which would swallow the error."""
    raise ValueError(
        f"the mask of a text is not known in a graph, that of {layer}; use the model uncompiled, "
        "or texts that need no padding"
    )


@torch.compiler.disable(
    reason="a technique for longer video that differs from step to step cannot be in a graph"
)
def refuse_graph(extension: AttentionExtension) -> None:
    """Outside of the graph, which would swallow the error."""
    raise ValueError(no_graph(extension) + "; use the model uncompiled")
