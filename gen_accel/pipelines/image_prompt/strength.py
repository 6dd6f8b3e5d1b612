"""Strength of an image prompt: scales by block, step and frame, and masks over the picture.

F frames after patchify, P pixel frames, I images, S attentions of a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.parsing import shown
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from PIL import Image

# Scales by block of SDXL's UNet. Wang et al., "InstantStyle", 2024,
# https://arxiv.org/abs/2404.02733.
PRESETS: dict[str, dict[str, "Scale"]] = {
    "style": {"up": {"block_0": [0.0, 1.0, 0.0]}},
    "style+layout": {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
}
Strength = float | tuple[float, ...]  # of one attention; of each frame if they differ
# A number for all attentions, one for each, numbers by block, or the name of a preset.
Scale: TypeAlias = "float | str | Sequence[float] | Mapping[str, Scale]"
Mask: TypeAlias = "Tensor | np.ndarray | Image.Image | Sequence[Mask]"

_SIDES = ("down", "mid", "up")


@dataclass(frozen=True)
class ScaleRange:
    """A scale on some frames at some steps.

    Args:
        scale: a number, numbers by block, or a preset; see `ImagePrompt.set_scale`.
        frames: first pixel frame, and the one after the last; None for all.
        steps: first denoising step, and the one after the last; None for all. If either is a
            float, both are shares of all steps, rounded up to whole steps: (0.0, 0.5) is the
            first half, (0, 1) the first step.
    """

    scale: "Scale"
    frames: tuple[int, int] | None = None
    steps: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "steps"):
            given = getattr(self, name)
            if given is None:
                continue
            if len(given) != 2 or not 0 <= given[0] < given[1]:
                raise ValueError(
                    f"{name} must be (first, one after the last), 0 <= first < last, got {given}"
                )
            object.__setattr__(self, name, tuple(given))
        if self.frames is not None and not all(isinstance(x, int) for x in self.frames):
            raise ValueError(f"frames counts frames of the video, got {self.frames}")
        if self.needs_total and self.steps is not None and self.steps[1] > 1:
            raise ValueError(
                f"steps must be whole numbers, or shares from 0.0 to 1.0, got {self.steps}"
            )

    @property
    def needs_total(self) -> bool:
        """Whether `steps` are shares."""
        return self.steps is not None and any(isinstance(x, float) for x in self.steps)

    def holds(self, step: int, steps: int | None) -> bool:
        """Whether the range holds at `step` of `steps`, counted from 0."""
        if self.steps is None:
            return True
        first, stop = self.steps
        if self.needs_total:
            assert steps is not None
            first, stop = (math.ceil(share * steps - 1e-9) for share in (first, stop))
        return first <= step < stop


def scale_ranges(
    scale: "Scale | ScaleRange | Sequence[ScaleRange]",
    frames: tuple[int, int] | None,
    steps: tuple[float, float] | None,
) -> tuple[ScaleRange, ...]:
    """Convert the arguments of `ImagePrompt.set_scale` to ranges.

    Raises ValueError for frames or steps given beside ranges, or for numbers among ranges.
    """
    given = [scale] if isinstance(scale, ScaleRange) else scale
    several = [*given] if isinstance(given, (list, tuple)) else []
    ranges = [one for one in several if isinstance(one, ScaleRange)]
    if not ranges:
        return (ScaleRange(cast("Scale", given), frames, steps),)
    if frames is not None or steps is not None:
        raise ValueError("frames and steps belong to each ScaleRange: give them there")
    if len(ranges) < len(several):
        raise ValueError(f"scale must hold numbers or ScaleRanges, not both: {given}")
    return tuple(ranges)


class Scales:
    """Scales of `set_scale`, for the attentions of one model.

    Args:
        names: names of the attentions.
    """

    def __init__(self, ranges: Sequence[ScaleRange], names: Sequence[str]) -> None:
        self._all = [(one, block_scales(one.scale, names)) for one in ranges]
        self._now = self._all
        self.silent = not any(any(scales) for _, scales in self._all)
        self.needs_step = any(one.steps is not None for one in ranges)
        self.needs_total = any(one.needs_total for one in ranges)
        self.needs_frames = any(one.frames is not None for one in ranges)

    def at(self, step: int, steps: int | None) -> None:
        """Move to a step, counted from 0."""
        self._now = [held for held in self._all if held[0].holds(step, steps)]

    def of(self, place: int, spans: Sequence[tuple[int, int]] | None) -> float | tuple[float, ...]:
        """Return an attention's scale at the present step: one for all frames, or one for each.

        Args:
            place: index of the attention in `names`.
            spans: result of `frame_spans`, if `needs_frames`.

        Raises ValueError for frames beyond the video.
        """
        if spans is None:
            return self._now[-1][1][place] if self._now else 0.0
        pixels = np.zeros(spans[-1][1])
        for one, scales in self._now:
            first, stop = one.frames or (0, len(pixels))
            if first >= len(pixels):
                raise ValueError(
                    f"frames {one.frames} of a scale lie beyond the video of {len(pixels)} frames"
                )
            pixels[first:stop] = scales[place]
        means = tuple(float(pixels[first:stop].mean()) for first, stop in spans)
        return means[0] if len(set(means)) == 1 else means


def frame_spans(
    frames: int, factor: int, patch: int, *, first_alone: bool = True
) -> list[tuple[int, int]]:
    """Find the pixel frames, first and one after the last, of each of F frames of tokens.

    Args:
        factor: pixel frames in a latent frame.
        patch: latent frames in a token.
        first_alone: the first latent frame holds one pixel frame.
    """
    missing = factor - 1 if first_alone else 0
    stops = [patch * (frame + 1) * factor - missing for frame in range(frames)]
    return list(zip([0, *stops], stops, strict=False))


def block_scales(scale: "Scale", names: Sequence[str]) -> tuple[float, ...]:
    """Resolve a scale to one number for each of S attentions.

    Args:
        scale: a number; a list of S numbers; a dict by names of blocks ("blocks.3" stands for all
            attentions in it) or in the form of diffusers,
            {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5}; or a preset. Attentions that a dict
            does not name get 0.

    Raises:
        ValueError: an unknown block, a wrong count of numbers, or another kind of value.
    """
    if isinstance(scale, str):
        if scale not in PRESETS:
            known = " or ".join(map(repr, PRESETS))
            raise ValueError(
                f"scale must be a number, numbers by block or {known}, got {shown(scale)}"
            )
        try:
            return _by_side(PRESETS[scale], names)
        except ValueError as error:
            raise ValueError(
                f"{shown(scale)} is for the blocks of SDXL's UNet: {error}"
            ) from error
    if isinstance(scale, dict):
        if scale and all(key in _SIDES for key in scale):
            return _by_side(scale, names)
        return _by_name(scale, names)
    if isinstance(scale, (list, tuple)):
        if len(scale) != len(names):
            raise ValueError(
                f"scale must have a number for each of the {len(names)} attentions, got "
                f"{len(scale)}: {names[0]} to {names[-1]}"
            )
        return tuple(_number(one, name) for one, name in zip(scale, names, strict=True))
    return (_number(scale, "scale"),) * len(names)


def _by_name(scale: "Mapping[str, Scale]", names: Sequence[str]) -> tuple[float, ...]:
    scales = [0.0] * len(names)
    for key, value in scale.items():
        places = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{key}.")]
        if not places:
            raise ValueError(f"scale names {shown(key)}, which is none of: {', '.join(names)}")
        for place in places:
            scales[place] = _number(value, key)
    return tuple(scales)


def _by_side(scale: "Mapping[str, Scale]", names: Sequence[str]) -> tuple[float, ...]:
    """Resolve a dict in the form of diffusers.

    `names` are a UNet's: down_blocks.1.attentions.0.transformer_blocks.0.attn2.
    """
    keys = [_side_of(name) for name in names]
    blocks: dict[str, dict[str, int]] = {}  # side to block to attentions
    for side, block, place in filter(None, keys):
        inside = blocks.setdefault(side, {})
        inside[block] = max(inside.get(block, 0), place + 1)
    there = ", ".join(
        side if side == "mid" else f"{side}.{block} ({count})"
        for side, inside in blocks.items()
        for block, count in inside.items()
    )
    scales: dict[tuple[str, str, int], float] = {}
    for side, given in scale.items():
        inside = blocks.get(side, {})
        by_block = given if isinstance(given, dict) else dict.fromkeys(inside, given)
        for block, values in by_block.items():
            if block not in inside:
                raise ValueError(
                    f"scale names {side}.{block}, where no attention is; there are: {there}"
                )
            several = values if isinstance(values, (list, tuple)) else [values]
            several = [*several] * (inside[block] if len(several) == 1 else 1)
            if len(several) != inside[block]:
                raise ValueError(
                    f"scale of {side}.{block} must have {inside[block]} numbers, got {values}"
                )
            for place, value in enumerate(several):
                scales[side, block, place] = _number(value, f"{side}.{block}")
        if not inside:
            raise ValueError(
                f"scale names {shown(side)}, where no attention is; there are: {there}"
            )
    return tuple(0.0 if key is None else scales.get(key, 0.0) for key in keys)


def _side_of(name: str) -> tuple[str, str, int] | None:
    parts = name.split(".")
    if parts[0] == "mid_block":
        return "mid", "", int(parts[2])
    if parts[0] in ("down_blocks", "up_blocks"):
        return parts[0].removesuffix("_blocks"), f"block_{parts[1]}", int(parts[3])
    return None


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"scale must be a number at {where}, got {shown(value)}")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite at {where}, got {value}")
    return float(value)


class Masks:
    """Masks of the area in which each image acts.

    Args:
        given: (H, W) for all images, (I, H, W), or (I, P, H, W), in [0, 1]; tensor, array, or
            pictures of one channel.
        images: I.

    Raises ValueError for masks of another shape, number or range.
    """

    def __init__(self, given: "Mask", images: int) -> None:
        mask = _tensor(given)
        if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
            raise ValueError(
                "mask must be (height, width), (images, height, width) or (images, frames, "
                f"height, width), got {tuple(mask.shape)}"
            )
        if mask.ndim == 2:
            mask = mask.expand(images, *mask.shape)
        if len(mask) != images:
            raise ValueError(f"mask must be one for each of {images} images, got {len(mask)}")
        low, high = mask.aminmax()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"mask must be from 0 to 1, got {low.item():.4g} to {high.item():.4g}"
            )
        self.values = mask[:, None] if mask.ndim == 3 else mask  # (I, P or 1, H, W)

    @property
    def moving(self) -> bool:
        """Whether each frame has a mask of its own."""
        return self.values.shape[1] > 1

    def fit(self, grid: VideoShape, spans: Sequence[tuple[int, int]] | None) -> Tensor:
        """Resample the masks to a grid of tokens, (I, N) float32: bicubically over rows and
        columns, as diffusers does for images, by the mean over frames. ValueError for masks for
        another number of frames."""
        mask, frames = self.values, self.values.shape[1]
        if frames > 1:
            if spans is None and grid.frames > 1:
                raise ValueError(
                    f"mask has {frames} frames, and only the pipeline knows how many a latent is "
                    "of: load the image prompt on the pipeline, or give one mask for all frames"
                )
            pixels = 1 if spans is None else spans[-1][1]
            if frames != pixels:
                raise ValueError(f"mask has {frames} frames, the video {pixels}")
            assert spans is not None
            mask = torch.stack([mask[:, first:stop].mean(1) for first, stop in spans], 1)
        mask = F.interpolate(mask, size=(grid.height, grid.width), mode="bicubic")
        return mask.expand(-1, grid.frames, -1, -1).flatten(1)


def _tensor(given: "Mask") -> Tensor:
    """Convert masks to a tensor, float32 on the CPU."""
    if isinstance(given, (list, tuple)):
        parts = [_tensor(one) for one in given]
        if len({part.shape for part in parts}) != 1:
            raise ValueError(f"masks must be of one size, got {[tuple(p.shape) for p in parts]}")
        return torch.stack(parts)
    if hasattr(given, "getbands"):  # of Pillow, which is no part of the core
        picture = cast("Image.Image", given)
        if picture.mode not in ("L", "1"):
            raise ValueError(f"mask must be a picture of one channel, got mode {picture.mode}")
        return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)
    if not isinstance(given, Tensor):
        given = torch.as_tensor(np.asarray(given))
    return given.detach().to("cpu", torch.float32)


def levels(grid: VideoShape, *, unet: bool = True) -> list[VideoShape]:
    """List the grids that a model attends over.

    A UNet halves rows and columns from one grid to the next, rounded up.
    """
    found = [grid]
    while unet and (grid.height, grid.width) != (1, 1):
        grid = VideoShape(grid.frames, (grid.height + 1) // 2, (grid.width + 1) // 2)
        found.append(grid)
    return found


def token_weights(
    scale: Strength,
    masks: Masks | None,
    grid: VideoShape,
    spans: Sequence[tuple[int, int]] | None,
    *,
    unet: bool = True,
) -> list[dict[int, Tensor]]:
    """Compute the weights (N,) of the tokens, by N, for each image, or once without masks."""
    images = 1 if masks is None else len(masks.values)
    found: list[dict[int, Tensor]] = [{} for _ in range(images)]
    for level in levels(VideoShape(*grid.grid), unet=unet):
        frames = torch.tensor(scale).expand(level.frames)
        weights = frames.repeat_interleave(level.height * level.width).expand(images, -1)
        if masks is not None:
            weights = weights * masks.fit(level, spans)
        for image, own in enumerate(weights):
            found[image].setdefault(level.video_tokens, own)
    return found
