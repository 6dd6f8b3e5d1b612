"""Places of the video's tokens in models of ComfyUI's, by the model's class.

Written for ComfyUI 0.19.3 (comfy/ldm), and for MiniMax-H3 as of its commits 003617c, which says
nothing of the order of its tokens, and 01a56b7, which does. A model whose class is not here stays
dense: the order of its tokens is not known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch

from gen_accel import VideoShape

Grid = tuple[int, int, int]  # frames, rows and columns
Options = Mapping[str, Any]  # a model's `transformer_options` in an attention call
TEXT = "gen_accel_text"  # of the options: number of the tokens of text that a pass is given
SAID = "minimax_h3_layout"  # of the options: MiniMax-H3's order of tokens, since ComfyUI 0.35


@dataclass(frozen=True)
class Place:
    """The video among an attention call's tokens.

    Args:
        video: its grid, and as text all tokens beside it.
        front: how many of these come before it; the others come after it.
    """

    video: VideoShape
    front: int = 0


@dataclass(frozen=True)
class Layout:
    """Order of the tokens of one model.

    Args:
        patch: frames, rows and columns of latents in one token.
        find: the place of a grid among that many tokens, or None where it is not known.
        width: of a token in self-attention over the video, all heads together, where the model
            also has self-attention over something else; None where it has not.
        numbers_blocks: whether `transformer_options` says the number of the block.
        projection: name of the layer that q is projected by, with {} for the number of the block;
            None where gates have no place.
        projected: how many of q, k and v that layer gives, one after another.
        gate: name of the layer that holds a gate where ComfyUI loads it with the model, whose own
            forward pass leaves it out; None where there is none.
    """

    patch: Grid
    find: Callable[[Grid, int, Options], Place | None]
    width: int | None = None
    numbers_blocks: bool = True
    projection: str | None = None
    projected: int = 1
    gate: str | None = None

    def grid(self, latents: tuple[int, ...]) -> Grid | None:
        """Grid in tokens of latents (B, C, T, H, W), or (B, C, H, W) of an image."""
        if len(latents) not in (4, 5):
            return None
        sides = latents[2:] if len(latents) == 5 else (1, *latents[2:])
        # The models pad the latents to whole patches.
        frames, rows, columns = (-(-n // p) for n, p in zip(sides, self.patch, strict=True))
        return frames, rows, columns


def layout_of(model: Any) -> Layout | None:
    """Find the layout of a diffusion model, by the name of its class or of the nearest base; None
    where none is known."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((_LAYOUTS[name](model) for name in names if name in _LAYOUTS), None)


def class_name(model: Any) -> str:
    """Return the name of a diffusion model's class, also of a compiled one."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return type(model).__name__


def _alone(grid: Grid, tokens: int, options: Options) -> Place | None:
    """Find the grid if there is nothing else."""
    return Place(VideoShape(*grid)) if tokens == prod(grid) else None


def _first(grid: Grid, tokens: int, options: Options) -> Place | None:
    """Find the grid before text, references or poses."""
    beside = tokens - prod(_said(grid, options))
    return Place(VideoShape(*_said(grid, options), text=beside)) if beside >= 0 else None


def _last(grid: Grid, tokens: int, options: Options) -> Place | None:
    """Find the grid between text and the reference images that the model counts. Outside of the
    blocks, there is attention over text alone."""
    beside = tokens - prod(grid)
    front = beside - sum(options.get("reference_image_num_tokens", ()))
    if front < 0 or "block_index" not in options:
        return None
    return Place(VideoShape(*grid, text=beside), front)


def _end(grid: Grid, tokens: int, options: Options) -> Place | None:
    """Find the grid behind text, key frames, references and sound. Before the blocks, there is
    attention over the text alone."""
    beside, said = tokens - prod(grid), options.get(SAID)
    if beside < 0 or tokens == options.get(TEXT):
        return None
    if said is None:
        return Place(VideoShape(*grid, text=beside), beside)
    *before, last = said.segments
    if last != (beside, tokens, "video"):
        return None
    parts = (sum(end - start for start, end, _ in run) for _, run in groupby(before, _sort))
    return Place(VideoShape(*grid, beside, tuple(filter(None, parts))), beside)


def _sort(segment: tuple[int, int, str]) -> str:
    """Tell words, pictures and sound apart, of which those side by side are one part."""
    kind = segment[2]
    return "sound" if "audio" in kind else "words" if kind == "text" else "pictures"


def _wan(with_reference: bool) -> Callable[[Grid, int, Options], Place | None]:
    """Find the grid that the model says, with reference frames behind the latents. `ref_conv` puts
    one more frame before it, which is the first one of its rotary positions too."""

    def find(grid: Grid, tokens: int, options: Options) -> Place | None:
        frames, rows, columns = _said(grid, options)
        if with_reference and tokens == (frames + 1) * rows * columns:
            frames += 1
        return _alone((frames, rows, columns), tokens, options)

    return find


def _said(grid: Grid, options: Options) -> Grid:
    frames, rows, columns = options.get("grid_sizes", grid)
    return int(frames), int(rows), int(columns)


def _image_patch(model: Any) -> Grid:
    size = model.patch_size
    return (1, size, size) if isinstance(size, int) else (1, *size) if len(size) == 2 else (*size,)


_LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "VaceWanModel": lambda m: Layout(_image_patch(m), _wan(m.ref_conv is not None)),
    "WanModel": lambda m: Layout(
        _image_patch(m), _wan(m.ref_conv is not None), projection="blocks.{}.self_attn.q"
    ),
    "WanModel_S2V": lambda m: Layout(_image_patch(m), _first),
    "HumoWanModel": lambda m: Layout(_image_patch(m), _first),
    "SCAILWanModel": lambda m: Layout(_image_patch(m), _first),
    "Kandinsky5": lambda m: Layout(_image_patch(m), _alone),
    "HunyuanVideo": lambda m: Layout(_image_patch(m), _last),
    "Flux": lambda m: Layout(_image_patch(m), _last),
    "QwenImageTransformer2DModel": lambda m: Layout(_image_patch(m), _last),
    "MiniMaxH3Model": lambda m: Layout(
        _image_patch(m),
        _end,
        numbers_blocks=False,
        projection="blocks.{}.attn.qkv_proj",
        projected=3,
        gate="blocks.{}.attn.to_gate_compress",
    ),
    "AsymmDiTJoint": lambda m: Layout(_image_patch(m), _first, numbers_blocks=False),
    "LTXBaseModel": lambda m: Layout((1, 1, 1), _alone, m.inner_dim, numbers_blocks=False),
    "MiniTrainDIT": lambda m: Layout(
        (m.patch_temporal, m.patch_spatial, m.patch_spatial), _alone, numbers_blocks=False
    ),
}
