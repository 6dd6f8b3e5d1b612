"""Measure a profile: the mass of dense attention by blocks, for the method `Profiled`."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import attach_method
from gen_accel.attention_processors.attached.calibrate import (
    RelativeErrors,
    check_bare,
    observe_dense,
    table,
)
from gen_accel.attention_processors.attached.clock import class_of, first_transformer
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.methods.blocks import Box, even_tile, layout_of
from gen_accel.attention_processors.methods.profiled import (
    LayerMasses,
    Masses,
    Profiled,
    check_masses_path,
    fit_offsets,
    offsets_of,
    tiles_of,
)
from gen_accel.attention_processors.methods.radial import Radial
from gen_accel.kernels.base import scale_of
from gen_accel.kernels.choosing import block_mass
from gen_accel.memory import check_room
from gen_accel.method import Method
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LEAST = 1e-3  # least share of pairs of a compared profile
PROFILE, ALIKE, RADIAL = "profile", "at radial's density", "radial"


@dataclass(frozen=True)
class MeasuredProfile:
    """Profile of a model, with its errors on a prompt that was held out. Printable.

    Args:
        method: to attach.
        errors: by what ran and by layer, relative L2 error of its attention against dense:
            "profile", and "radial" attention of the same density, or of the least there is on
            this grid; the profile errs so much "at radial's density". None of these two if radial
            attention leaves nothing out.
    """

    method: Profiled
    errors: Mapping[str, Mapping[int, float]]

    def mean(self, ran: str = PROFILE) -> float:
        """Mean error over the layers; NaN for what did not run."""
        return fmean(self.errors[ran].values()) if ran in self.errors else math.nan

    def to_dict(self) -> dict[str, object]:
        layers = {
            str(n): {k: by[n] for k, by in self.errors.items()} for n in self.errors[PROFILE]
        }
        return {"mean": {ran: self.mean(ran) for ran in self.errors}, "layers": layers}

    def __str__(self) -> str:
        rows = {str(n): [by[n] for by in self.errors.values()] for n in self.errors[PROFILE]}
        rows["mean"] = [self.mean(ran) for ran in self.errors]
        cells = [[name, *(f"{error:.4f}" for error in row)] for name, row in rows.items()]
        told = table([["layer", *self.errors], *cells])
        return f"relative L2 error on the held-out prompt\n{told}"


def measure_profile(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    share: float = 0.1,
    held_out: str | None = None,
    block: int = 64,
    every: int = 4,
    num_inference_steps: int = 20,
    seed: int = 0,
    out: str | Path | None = None,
    **call: object,
) -> MeasuredProfile:
    """Measure which blocks each layer and head attends to, in a few dense generations.

        found = gen_accel.measure_profile(
            pipe, prompts, out="profile.safetensors", num_frames=81, height=480, width=832
        )
        print(found)
        gen_accel.attach(pipe, found.method, schedule=Schedule(dense_start=0.2))

    Dense attention runs as it does without, bit for bit. Beside it, each n-th step sums the mass
    of each pair of blocks: one weight for each distance of two blocks and one for each frame of
    keys, which hold at any size and length. On the held-out prompt, the attention of the profile
    is compared with dense attention, and with `Radial` at the same density, or the least that it
    has on this grid.

    Args:
        pipe: a pipeline with nothing attached. Load LoRAs first, as another model attends
            elsewhere.
        prompts: what the model is used for, two to four. The last is held out, unless `held_out`
            is given.
        share: of the method that is returned; from the file any other can be taken.
        block: tokens in a block.
        every: the steps every - 1, 2 every - 1 and so on are looked at.
        seed: of the first prompt's noise; each further prompt takes the next.
        out: file to write, *.safetensors.
        call: further arguments of the pipeline: sizes, guidance scale.

    Raises:
        ValueError: fewer than two prompts, something attached, a compiled model, layers with
            grids of several sizes, or a profile that errs more than `Radial` on the prompt that
            was held out.
    """
    if isinstance(prompts, str) or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompts must be a list of texts, got {shown(prompts)}")
    *seen, last = prompts if held_out is None else [*prompts, held_out]
    if not seen:
        raise ValueError(
            f"prompts must be two or more, of which the last is held out, got {shown(prompts)}"
        )
    for name, value in (("block", block), ("every", every), ("steps", num_inference_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {shown(value)}")
    path = None if out is None else expanded(out)
    if path is not None:
        check_masses_path(path)
    steps = num_inference_steps
    masses = collect(pipe, seen, block=block, every=every, steps=steps, seed=seed, call=call)
    method = Profiled(share, sha256=masses.digest)
    found = _held_out(pipe, method, last, min(every, steps), steps, seed + len(seen), call)
    if found.mean(ALIKE) > found.mean(RADIAL):
        raise ValueError(
            f"on the prompt held out the profile errs by {found.mean(ALIKE):.3f}, and radial "
            f"attention of the same density by {found.mean(RADIAL):.3f}: what this model attends "
            "to depends on the prompt; measure more prompts, or use Radial or Piecewise"
        )
    return found if path is None else replace(found, method=method.save(path))


def collect(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    block: int = 64,
    every: int = 4,
    steps: int = 20,
    seed: int = 0,
    call: Mapping[str, object],
) -> Masses:
    """Sum the mass of dense attention over prompts; arguments and errors as `measure_profile`."""
    check_bare(pipe, "measure")
    sums, every = MassSums(block), min(every, steps)

    def look(seen: Observed, prompt: int) -> None:
        if handle.clock.step % every == every - 1:
            sums.add(seen.layer.number, seen.q, seen.k, seen.video, scale_of(seen.run, seen.q))

    with attach_method(pipe, Profiled(), record=False) as handle:
        observe_dense(handle, pipe, prompts, look, steps=steps, seed=seed, call=call)
    transformer = first_transformer(pipe)
    known = seen_by(prompts, every=every, steps=steps, seed=seed, call=call)
    return sums.masses(class_of(transformer), known)


def seen_by(
    prompts: Sequence[str], *, every: int, steps: int, seed: int, call: Mapping[str, object]
) -> str:
    """Hash the arguments of `collect`."""
    plain = (bool, int, float, str, type(None))
    told = {name: value for name, value in call.items() if isinstance(value, plain)}
    about = json.dumps([[*prompts], seed, steps, every, told], sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()


class MassSums:
    """Sums of the mass of dense attention, layer by layer, as the fit needs them: by offset of two
    tiles, by frame of the key and by query. A block is `even_tile` of the first grid."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.grid: Box | None = None
        self.tile: Box = (1, 1, 1)
        self.calls: dict[int, int] = {}
        self.sums: dict[int, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def add(self, layer: int, q: Tensor, k: Tensor, video: VideoShape, scale: float) -> None:
        """Add one call, q and k (B, H, N, D); ValueError for another grid than the first
        call's."""
        if self.grid is None:
            self.grid, even = video.grid, even_tile(video, self.block)
            F, R, C = map(min, even, video.grid)  # a smaller grid cuts the box
            self.tile = F, R, C
        if video.grid != self.grid:
            raise ValueError(
                f"attention runs over {video.grid} tokens in layer {layer}, and over {self.grid} "
                "before: a profile is of one grid; use Piecewise, which looks at each"
            )
        tokens, tiles = math.prod(self.tile), tiles_of(self.grid, self.tile)
        layout = layout_of(video, q.device, tokens, tokens, self.tile)
        T = math.prod(tiles)
        check_room(
            f"the mass of {q.shape[1]} heads by {T} x {T} blocks",
            4 * q.shape[0] * q.shape[1] * T * T,
            f"give larger blocks than block={self.block}",
            q.device,
        )
        mass = block_mass(q, k, layout.slots, scale=scale)[:, :, :T, :T].mean(0).float()
        index = offsets_of(tiles).to(mass.device).flatten()
        count = math.prod(2 * n - 1 for n in tiles)
        by_offset = mass.new_zeros(len(mass), count).index_add_(1, index, mass.flatten(1))
        by_frame = mass.sum(1).unflatten(1, (tiles[0], -1)).sum(-1)
        found = by_offset.cpu(), by_frame.cpu(), mass.sum(-1).cpu()
        if layer in self.sums:
            if len(self.sums[layer][0]) != len(by_offset):
                raise ValueError(f"layer {layer} has attentions with several numbers of heads")
            found = tuple(old + new for old, new in zip(self.sums[layer], found, strict=True))
        self.sums[layer] = found
        self.calls[layer] = self.calls.get(layer, 0) + 1

    def masses(self, model: str, seen: str) -> Masses:
        """Fit the means over the calls; ValueError if no attention over a known grid was seen."""
        if self.grid is None:
            raise ValueError(
                "no attention over a known grid was seen, so that there is nothing to measure"
            )
        layers: dict[int, LayerMasses] = {}
        for n in sorted(self.sums):
            by_offset, by_frame, by_query = (x.double() / self.calls[n] for x in self.sums[n])
            layers[n] = fit_offsets(by_offset, by_frame, by_query, self.grid, self.tile)
        return Masses(model, self.tile, self.grid, layers, seen)


def radial_of(video: VideoShape, method: Profiled) -> Radial | None:
    """Radial attention with the density and the rest of a profile, or the sparsest on this grid;
    None if it leaves nothing out."""
    found = Radial.keeping(method.density(video), video)
    if found.density(video) >= 1:
        return None
    return replace(found, rest=method.rest, centre=method.centre)


def at_density(method: Profiled, density: float, video: VideoShape) -> Profiled:
    """Profile that keeps another share of the token pairs, of which text is all kept."""
    share = 1 - (1 - density) * (video.tokens / video.video_tokens) ** 2
    return replace(method, share=min(max(share, LEAST), 1.0))


def _held_out(
    pipe: "DiffusionPipeline",
    method: Profiled,
    prompt: str,
    every: int,
    steps: int,
    seed: int,
    call: Mapping[str, object],
) -> MeasuredProfile:
    """Compare a profile and radial attention with dense attention, on one prompt."""
    errors: RelativeErrors[tuple[str, int]] = RelativeErrors()
    compared: dict[str, Method] = {}

    def look(seen: Observed, number: int) -> None:
        if handle.clock.step % every != every - 1:
            return
        if not compared:
            compared[PROFILE] = method
            if (radial := radial_of(seen.video, method)) is not None:
                density = radial.density(seen.video)
                compared.update({ALIKE: at_density(method, density, seen.video), RADIAL: radial})
        for name, one in compared.items():
            own = one.for_layer(seen.layer.number)
            out = own(seen.q, seen.k, seen.v, video=seen.video, kernel=seen.run)
            errors.add((name, seen.layer.number), out, seen.dense)

    with attach_method(pipe, method, record=False) as handle:
        observe_dense(handle, pipe, [prompt], look, steps=steps, seed=seed, call=call)
    if not errors.squares:
        raise ValueError(f"no attention over a known grid was seen in {steps} steps of {prompt!r}")
    layers = sorted({layer for _, layer in errors.squares})
    return MeasuredProfile(
        method, {name: {n: errors.of((name, n)) for n in layers} for name in compared}
    )
