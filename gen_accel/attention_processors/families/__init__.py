"""Model families of diffusers, one a file. `contract.Family` names the parts of such a file.

A family holds geometry and names; the processors' code stays diffusers' own. This file has what
families share, and finds the family of a model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families.contract import Family, Preset, family_named
from gen_accel.attention_processors.lengths import vae_factor
from gen_accel.attention_processors.seam import Call, add_tap
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.names import FAMILIES
from gen_accel.video import VideoShape

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Family",
    "ImageAttention",
    "Preset",
    "SelfAttention",
    "classes_for",
    "encoded",
    "family_for",
    "family_named",
    "family_of",
    "image_classes",
    "image_family_of",
    "image_sites",
    "in_patches",
    "in_stacks",
    "outside_graphs",
    "prefix_lengths",
    "served_classes",
    "split_tokens",
    "standardised",
    "tap_image",
    "tap_joint_attention",
    "unguided",
    "video_classes",
    "without_text",
]

FEW = 12  # classes that an error lists

# Classes that cannot be served, and why not.
LINEAR = "its self-attention is linear, without pairs of tokens to leave out"
REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": (
        "its tokens see a cache of earlier chunks, some of them compressed, causally by a block "
        "mask of FlexAttention over padded tokens"
    ),
    "ChromaTransformer2DModel": (
        "its pipelines add the mask of the text to the scores as a bias of 0 or 1, which weighs "
        "padding down without hiding it"
    ),
    "Kandinsky6SRTransformer3DModel": (
        "its tokens come in tiles of 8 x 8, among which a sparse attention of its own, which "
        "cannot be turned off, chooses by a block mask of FlexAttention"
    ),
    "SanaControlNetModel": LINEAR,
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": (
        "its forward pass takes tokens without the grid that they come from"
    ),
    "SanaWMTransformer3DModel": (
        "its self-attention is a gated delta rule, or softmax in modules that have no processor "
        "to replace"
    ),
    "WanAnimate2Transformer3DModel": (
        "a frame sees the reference's tokens of its own time alone, by a block mask of "
        "FlexAttention over padded tokens"
    ),
}

Read = TypeVar("Read", bound=Callable)

# q (b, N, H, D) and its samples of the batch, to (b, N, H, D) or nothing
ImageBranch = Callable[[Tensor, slice], Tensor | None]


class SelfAttention(NamedTuple):
    """One attention over the video's tokens.

    Args:
        layer: the number of its block, which `Schedule.dense_layers` counts.
        heads, dim: attention heads, and the dim of one.
        tokens: function from the model's tokens and the call to this attention's tokens, where
            they differ: levels of a UNet, attention within frames, a text that is cut.
        call: the number of the attention call over the grid, where the processor makes several.
    """

    name: str
    module: Any
    layer: int
    heads: int
    dim: int
    tokens: Callable[[Tokens, Call], Tokens] | None = None
    call: int | None = None


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
    transformer: nn.Module,
    stacks: Sequence[str],
    heads: int,
    dim: int,
    *,
    attention: str = "attn",
) -> list[SelfAttention]:
    """List one attention of every block of some stacks, with layers numbered through all.

    Args:
        attention: its name in a block.
    """
    names = [
        f"{stack}.{place}"
        for stack in stacks
        for place in range(len(cast(nn.ModuleList, transformer.get_submodule(stack))))
    ]
    return [
        SelfAttention(name, transformer.get_submodule(f"{name}.{attention}"), layer, heads, dim)
        for layer, name in enumerate(names)
    ]


def outside_graphs(reader: Read) -> Read:
    """Keep a reader of positions outside of graphs, in which positions are not known."""
    why = "positions are read outside of graphs: use fullgraph=False or compile_repeated_blocks()"
    return torch.compiler.disable(reader, reason=why)  # pyright: ignore[reportReturnType]


def prefix_lengths(mask: Tensor, ahead: int = 0) -> tuple[int, ...] | None:
    """Number of tokens that a mask (B, N) leaves of each text; None where padding comes before a
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


def image_sites(
    transformer: nn.Module,
    names: Sequence[str],
    *,
    heads: str = "heads",
    to_k: str = "to_k",
    to_v: str = "to_v",
    norm: str | None = None,
) -> list[ImageAttention]:
    """List attentions by name, numbered from 0, with sizes read from their projections.

    Args:
        heads: name in an attention of the number of its heads; others as in `ImageAttention`.
    """
    sites = []
    for number, name in enumerate(names):
        module: Any = transformer.get_submodule(name)
        count, keys = getattr(module, heads), getattr(module, to_k)
        dim, width = keys.out_features // count, keys.in_features
        site = ImageAttention(name, str(number), module, count, dim, width, to_k, to_v, norm)
        sites.append(site)
    return sites


def in_patches(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Frames, height and width of latents in patches; ValueError where patches leave a rest."""
    if any(size % side for size, side in zip(sizes, patch, strict=True)):
        whole = tuple(size // side * side for size, side in zip(sizes, patch, strict=True))
        raise ValueError(
            f"latents of {tuple(sizes)} (frames, height, width) are not whole patches of "
            f"{tuple(patch)}; the nearest below are {whole}"
        )
    return tuple(size // side for size, side in zip(sizes, patch, strict=True))


def tap_image(
    transformer: nn.Module, site: ImageAttention, add: ImageBranch
) -> Callable[[], None]:
    """Add what `add(q, samples)` gives for the queries q (b, N, H, D) of video or image and the
    slice of the batch that they are: (b, N, H, D), or None for nothing. Where each frame attends
    by itself, b counts the frames of all samples. Where a processor sums several attentions, only
    one is added to.

    Returns:
        A function that takes it off.
    """
    family = image_family_of(transformer)
    if family.tap_image is not None:
        return family.tap_image(transformer, site, add)
    tap = partial(_first_call, add)
    return add_tap(site.module, family.ATTENTION_CALL, tap, model=transformer)


def tap_joint_attention(
    transformer: nn.Module,
    site: ImageAttention,
    name: str,
    add: ImageBranch,
    *,
    text_first: bool = False,
) -> Callable[[], None]:
    """Tap attentions that have queries of the text beside the queries of the video."""
    tap = partial(_video_rows, add, text_first, site.by_sample)
    return add_tap(site.module, name, tap, model=transformer)


def _first_call(add: ImageBranch, call: Call, out: Tensor) -> Tensor:
    if call.number:
        return out
    added = add(call.q, slice(0, len(call.q)))
    return out if added is None else out + added.to(out.dtype)


def _video_rows(
    add: ImageBranch, text_first: bool, by_sample: bool, call: Call, out: Tensor
) -> Tensor:
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


def split_tokens() -> dict[str, Any]:
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


def encoded(pipe: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    """Encode a video by the autoencoder, to float32 latents that are not yet scaled; see a
    family's `encode_video`."""
    vae, step = pipe.vae, vae_factor(pipe, "temporal")
    if step is None:
        raise ValueError(f"{type(pipe).__name__} does not say how many frames a latent has")
    if (video.shape[2] - 1) % step:
        raise ValueError(f"video must have {step} n + 1 frames, got {video.shape[2]}")
    weight = next(vae.parameters())
    posterior = vae.encode(video.to(weight.device, weight.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents.float()


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor, *more: Any) -> Tensor:
    """Decode latents (B, C, f, h, w) in the autoencoder's own scale; see a family's
    `decode_video`.

    Args:
        more: further arguments of `vae.decode`.
    """
    weight = next(pipe.vae.parameters())
    return pipe.vae.decode(latents.to(weight.device, weight.dtype), *more, return_dict=False)[0]


def unguided(pipe: Any, prompts: Sequence[str], max_tokens: int) -> Any:
    """Encode prompts by the pipeline's own `encode_prompt`, on the device of its text encoder and
    without negative prompts.

    Args:
        max_tokens: the pipeline's `max_sequence_length`.
    """
    return pipe.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=max_tokens,
        device=next(pipe.text_encoder.parameters()).device,
    )


def standardised(latents: Tensor, mean: Any, std: Any) -> Tensor:
    """Standardise latents (B, C, f, h, w) by a mean and a standard deviation of each channel."""
    like = {"dtype": latents.dtype, "device": latents.device}
    mean, std = (torch.as_tensor(x, **like).view(1, -1, 1, 1, 1) for x in (mean, std))
    return (latents - mean) / std


def unstandardised(latents: Tensor, mean: Any, std: Any) -> Tensor:
    """Undo `standardised`."""
    like = {"dtype": latents.dtype, "device": latents.device}
    mean, std = (torch.as_tensor(x, **like).view(1, -1, 1, 1, 1) for x in (mean, std))
    return latents * std + mean


def served_classes() -> dict[str, str]:
    """Map each transformer class to the family that serves it."""
    return {kind: name for name in FAMILIES for kind in family_named(name).CLASSES}


def family_of(transformer: Any) -> Family:
    """Return the family of a model; ValueError for a class that no family serves, with the reason
    where there is one."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in REFUSED:
            raise ValueError(f"{kind.__name__} cannot be served: {REFUSED[kind.__name__]}")
    return _of(transformer, served_classes(), "no family serves")


def video_classes() -> list[str]:
    """List the `served_classes` that make videos."""
    served = served_classes()
    return [kind for kind, name in served.items() if family_named(name).KIND != "image"]


def classes_for(use: str) -> dict[str, str]:
    """Select the `served_classes` whose families have the parts that a key of `contract.USES`
    needs."""
    served = served_classes()
    return {kind: name for kind, name in served.items() if family_named(name).serves(use)}


def family_for(transformer: Any, use: str) -> Any:
    """Return the `Family` of a model; ValueError also for a class whose family lacks parts that a
    key of `contract.USES` needs."""
    family_of(transformer)
    return _of(transformer, classes_for(use), f"no {use} for")


def image_classes() -> dict[str, str]:
    """Map each transformer class to the family that adds image prompts to it."""
    return classes_for("image prompts")


def image_family_of(transformer: Any) -> Any:
    """Return the `Family` that adds image prompts to a model; ValueError where there is none."""
    return _of(transformer, image_classes(), "no image prompts for")


def _of(transformer: Any, served: dict[str, str], refusal: str) -> Family:
    for kind in type(transformer).__mro__:  # sharding makes a subclass with a name of its own
        if kind.__name__ in served:
            return family_named(served[kind.__name__])
    name = type(transformer).__name__
    known = ", ".join(sorted(served)) if len(served) <= FEW else "see `gen-accel models`"
    raise ValueError(f"{refusal} {name}; served: {known}")
