"""Attentions of a model: where they lie, and how an image prompt is added to one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

Read = TypeVar("Read", bound=Callable)

# q (b, N, H, D) and its samples of the batch, to (b, N, H, D) or nothing
ImageBranch = Callable[[Tensor, slice], Tensor | None]


# Plan by which diffusers splits a model over processes, by the names of its modules.
SplitPlan = dict[str, Any]


# A model of diffusers or a part of one, with the attributes of its class.
Model = Any


class Removable(Protocol):
    """A change of a model that comes off again, as a hook of torch does."""

    def remove(self) -> None:
        """Take it off again."""


class SelfAttention(NamedTuple):
    """One attention over the video's tokens.

    Args:
        layer: number of its block, as `Schedule.dense_layers` counts.
        heads, dim: attention heads, and the dim of one.
        tokens: function from the model's tokens and the call to this attention's tokens, if they
            differ: levels of a UNet, attention within frames, a text that is cut.
        call: number of the attention call over the grid, if the processor makes several.
    """

    name: str
    module: Any
    layer: int
    heads: int
    dim: int
    tokens: Callable[[Tokens, Call], Tokens] | None = None
    call: int | None = None

    @property
    def width(self) -> int:
        """Size of a token's hidden states, which its first linear layer takes."""
        linear = (part for part in self.module.modules() if isinstance(part, nn.Linear))
        return next((part.in_features for part in linear), self.heads * self.dim)


class ImageAttention(NamedTuple):
    """One attention that an image prompt is added to.

    Args:
        name: as in `named_modules`.
        number: in the files of adapters.
        heads, dim: attention heads, and the dim of one.
        width: of the image tokens that its projections take.
        to_k, to_v: names in `module` of the projections that a new adapter starts from.
        norm: name in `module` of the norm of its keys, over all heads together or over each.
        by_sample: its processor calls the attention once a sample.
    """

    name: str
    number: str
    module: Any
    heads: int
    dim: int
    width: int
    to_k: str = "to_k"
    to_v: str = "to_v"
    norm: str | None = None
    by_sample: bool = False


def in_stacks(
    transformer: Model, stacks: Sequence[str], heads: int, dim: int, attention: str
) -> list[SelfAttention]:
    """List one attention of every block of some stacks, with layers numbered through all.

    Args:
        attention: its name in a block.
    """
    names = [
        f"{stack}.{place}"
        for stack in stacks
        for place in range(len(transformer.get_submodule(stack)))
    ]
    return [
        SelfAttention(name, transformer.get_submodule(f"{name}.{attention}"), layer, heads, dim)
        for layer, name in enumerate(names)
    ]


def image_sites(
    transformer: Model,
    names: Sequence[str],
    *,
    heads: str = "heads",
    to_k: str = "to_k",
    to_v: str = "to_v",
    norm: str = "norm_k",
) -> list[ImageAttention]:
    """List attentions by name, numbered from 0, with sizes read from their projections.

    Args:
        heads: name in an attention of the number of its heads; others as in `ImageAttention`.
    """
    sites = []
    for number, name in enumerate(names):
        module: Model = transformer.get_submodule(name)
        count, keys = getattr(module, heads), getattr(module, to_k)
        held = None if getattr(module, norm, None) is None else norm
        dim, width = keys.out_features // count, keys.in_features
        site = ImageAttention(name, str(number), module, count, dim, width, to_k, to_v, held)
        sites.append(site)
    return sites


def in_first_call(add: ImageBranch, call: Call, out: Tensor) -> Tensor:
    """Tap of an attention that has queries of the grid alone; of several calls, the first."""
    if call.number:
        return out
    added = add(call.q, slice(0, len(call.q)))
    return out if added is None else out + added.to(out.dtype)


def beside_text(
    add: ImageBranch, text_first: bool, by_sample: bool, call: Call, out: Tensor
) -> Tensor:
    """Tap of an attention that has queries of the text beside the queries of the grid."""
    text = call.q.shape[1] - call.tokens
    rows = slice(text, None) if text_first else slice(0, call.tokens)
    first = call.number if by_sample else 0
    added = add(call.q[:, rows], slice(first, first + len(call.q)))
    if added is None:
        return out
    added = added.to(out.dtype)
    if text_first:
        return torch.cat([out[:, :text], out[:, text:] + added], 1)
    return torch.cat([out[:, : call.tokens] + added, out[:, call.tokens :]], 1)


def outside_graphs(reader: Read) -> Read:
    """Keep a reader of positions outside of graphs, in which positions are not known."""
    why = "positions are read outside of graphs: use fullgraph=False or compile_repeated_blocks()"
    return torch.compiler.disable(reader, reason=why)  # pyright: ignore[reportReturnType]


def prefix_lengths(mask: Tensor, ahead: int = 0) -> tuple[int, ...] | None:
    """Number of tokens that a mask (B, N) leaves of each text; None if padding comes before a
    token. Waits for the device.

    Args:
        ahead: tokens in front of each text, none of them padding.
    """
    seen = mask.bool()
    lengths = seen.sum(1, keepdim=True)
    is_prefix = (seen == (torch.arange(seen.shape[1], device=mask.device) < lengths)).all(1)
    found = torch.stack([lengths[:, 0], is_prefix.to(lengths.dtype)], 1).tolist()
    return tuple(ahead + n for n, _ in found) if all(prefix for _, prefix in found) else None


def without_text(tokens: Tokens, call: Call) -> Tokens:
    """Tokens of an attention over the grid alone, in a model whose other attentions see text."""
    return Tokens(VideoShape(*tokens.video.grid))


def text_of_call(tokens: Tokens, call: Call) -> Tokens:
    """Tokens with as much text as this call has, whose padding may be left out."""
    video = tokens.video
    return Tokens(VideoShape(*video.grid, text=call.k.shape[1] - video.video_tokens))


def in_patches(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of latents in patches; ValueError if patches leave a rest."""
    if any(size % side for size, side in zip(sizes, patch, strict=True)):
        whole = tuple(size // side * side for size, side in zip(sizes, patch, strict=True))
        raise ValueError(
            f"latents of {tuple(sizes)} (frames, height, width) are not whole patches of "
            f"{tuple(patch)}; the nearest below are {whole}"
        )
    frames, height, width = (size // side for size, side in zip(sizes, patch, strict=True))
    return frames, height, width


def split_tokens() -> SplitPlan:
    """Parts of context-parallel plans that split and gather alike in many models: "tokens" (B, N,
    width), "rotary", the cosines and sines (N, dim), and "gathered", the output.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    rotary = ContextParallelInput(split_dim=0, expected_dims=2)
    return {
        "tokens": ContextParallelInput(split_dim=1, expected_dims=3),
        "rotary": (rotary, rotary),
        "gathered": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
