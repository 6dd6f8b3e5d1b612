"""Measure a profile: the mass of dense attention by blocks, for the method `Profiled`."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import attach_method
from gen_accel.attention_processors.attached.calibrate import check_bare, run_to_latents
from gen_accel.attention_processors.attached.clock import class_of, served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.methods.blocks import Box, even_tile, layout_of
from gen_accel.attention_processors.methods.masses import (
    FLOOR,
    Form,
    LayerMasses,
    Masses,
    check_masses_path,
    fit_offsets,
    levels_of,
    offsets_of,
    tiles_of,
    tokens_of_tiles,
)
from gen_accel.attention_processors.methods.profiled import Profiled
from gen_accel.attention_processors.methods.radial import Radial
from gen_accel.kernels.base import scale_of
from gen_accel.kernels.mass import block_mass
from gen_accel.memory import check_room
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.plan import widest
from gen_accel.video import VideoShape

LEAST = 1e-3  # share of pairs of a profile that is compared
HALVINGS = 12


@dataclass(frozen=True)
class MeasuredProfile:
    """Profile of a model, with its errors on a prompt that was held out. Printable.

    Args:
        method: to attach.
        errors: by layer, relative L2 error of its attention against dense.
        radial: radial attention with the same density, or the sparsest there is on this grid; None
            where it leaves nothing out.
        radial_errors: errors of `radial`; empty where there is none.
        alike_errors: errors of the profile at the density of `radial`.
    """

    method: Profiled
    errors: dict[int, float]
    radial: Radial | None
    radial_errors: dict[int, float]
    alike_errors: dict[int, float]

    @property
    def error(self) -> float:
        """Mean over the layers."""
        return fmean(self.errors.values())

    @property
    def radial_error(self) -> float:
        """Mean over the layers; NaN without radial attention to compare with."""
        return fmean(self.radial_errors.values()) if self.radial_errors else math.nan

    @property
    def alike_error(self) -> float:
        """Mean over the layers of the profile at the density of radial attention; NaN without."""
        return fmean(self.alike_errors.values()) if self.alike_errors else math.nan

    def to_dict(self) -> dict[str, Any]:
        parts = {"error": self.errors, "radial": self.radial_errors, "alike": self.alike_errors}
        layers = {
            str(n): {name: errors.get(n) for name, errors in parts.items()} for n in self.errors
        }
        means = {"error": self.error, "radial": self.radial_error, "alike": self.alike_error}
        return means | {"layers": layers}

    def __str__(self) -> str:
        lines = ["relative L2 error on the held-out prompt"]
        if self.radial is None:
            rows = [*((str(n), error) for n, error in self.errors.items()), ("mean", self.error)]
            return "\n".join([*lines, *(f"{name:<5}  {error:.4f}" for name, error in rows)])
        lines.append("layer  profile  at radial's density  radial")
        table = [
            (str(n), error, self.alike_errors[n], self.radial_errors[n])
            for n, error in self.errors.items()
        ]
        table.append(("mean", self.error, self.alike_error, self.radial_error))
        lines += [f"{name:<5}  {a:.4f}   {b:<19.4f}  {c:.4f}" for name, a, b, c in table]
        return "\n".join(lines)


def measure_profile(
    pipe: Any,
    prompts: Sequence[str],
    *,
    share: float = 0.1,
    form: Form = "offsets",
    held_out: str | None = None,
    block: int = 64,
    every: int = 4,
    num_inference_steps: int = 20,
    seed: int = 0,
    out: str | Path | None = None,
    **call: Any,
) -> MeasuredProfile:
    """Measure which blocks each layer and head attends to, in a few dense generations.

        found = gen_accel.measure_profile(
            pipe, prompts, out="profile.safetensors", num_frames=81, height=480, width=832
        )
        print(found)
        gen_accel.attach(pipe, found.method, schedule=Schedule(dense_start=0.2))

    Dense attention runs as it does without, bit for bit. Beside it, each n-th step sums the mass
    of each pair of blocks, over both calls of guidance. One prompt is held out: on it the
    attention of the profile is compared with dense attention, and with `Radial` at the same
    density, or at the least density that it has on this grid.

    Args:
        pipe: a pipeline with nothing attached. Load LoRAs first, as another model attends
            elsewhere.
        prompts: what the model is used for, two to four. The last is held out, unless `held_out`
            is given.
        share: of the method that is returned; from the file any other can be taken.
        form: "offsets" keeps one weight for each distance of two blocks and one for each frame of
            keys, which hold at any size and length. "blocks" keeps one for each pair of blocks of
            this grid, layers x heads x blocks^2 numbers.
        block: tokens in a block.
        every: the steps every - 1, 2 every - 1 and so on are looked at.
        seed: of the first prompt's noise; each further prompt takes the next.
        out: file to write, *.safetensors.
        call: what else the pipeline is called with: sizes, guidance scale.

    Raises:
        ValueError: fewer than two prompts, something attached, a compiled model, layers with
            grids of several sizes, or a profile that errs more than `Radial` on the prompt that
            was held out.
    """
    if isinstance(prompts, str) or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompts must be a list of texts, got {shown(prompts)}")
    seen = [*prompts] if held_out is not None else [*prompts[:-1]]
    if not seen:
        raise ValueError(
            f"prompts must be two or more, of which the last is held out, got {shown(prompts)}"
        )
    last = held_out if held_out is not None else prompts[-1]
    for name, value in (("block", block), ("every", every), ("steps", num_inference_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {shown(value)}")
    path = None if out is None else expanded(out)
    if path is not None:
        check_masses_path(path)
    steps = num_inference_steps
    masses = collect(
        pipe, seen, form=form, block=block, every=every, steps=steps, seed=seed, call=call
    )
    method = Profiled(share, sha256=masses.digest)
    found = _held_out(pipe, method, last, min(every, steps), steps, seed + len(seen), call)
    if found.alike_error > found.radial_error:
        raise ValueError(
            f"on the prompt held out the profile errs by {found.alike_error:.3f}, and radial "
            f"attention of the same density by {found.radial_error:.3f}: what this model attends "
            "to depends on the prompt; measure more prompts, or use Radial or Piecewise"
        )
    if path is None:
        return found
    return replace(found, method=method.save(path))


def collect(
    pipe: Any,
    prompts: Sequence[str],
    *,
    form: Form = "offsets",
    block: int = 64,
    every: int = 4,
    steps: int = 20,
    seed: int = 0,
    call: Mapping[str, Any],
) -> Masses:
    """Sum the mass of dense attention over prompts; arguments and errors as `measure_profile`."""
    check_bare(pipe, "measure")
    sums, every = MassSums(form, block), min(every, steps)

    def look(call: Observed) -> None:
        if handle.clock.step % every == every - 1:
            sums.add(call.layer.number, call.q, call.k, call.video, scale_of(call.run, call.q))

    with attach_method(pipe, Profiled(), record=False) as handle:
        handle.observe = look
        for number, prompt in enumerate(prompts):
            run_to_latents(pipe, prompt, steps, seed + number, call)
    transformer = next(iter(served_transformers(pipe).values()))
    seen = seen_by(prompts, every=every, steps=steps, seed=seed, call=call)
    return sums.masses(class_of(transformer), seen)


def seen_by(
    prompts: Sequence[str], *, every: int, steps: int, seed: int, call: Mapping[str, Any]
) -> str:
    """Hash what `collect` is given."""
    plain = (bool, int, float, str, type(None))
    told = {name: value for name, value in call.items() if isinstance(value, plain)}
    about = json.dumps([[*prompts], seed, steps, every, told], sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()


class MassSums:
    """Sums of the mass of dense attention, layer by layer.

    By offset only what the fit needs is kept: sums by offset, by frame of the key and by query.

    Args:
        block: tokens in a block, which is `even_tile` of the first grid.
    """

    def __init__(self, form: Form, block: int) -> None:
        self.form: Form = form
        self.block = block
        self.grid: Box | None = None
        self.tile: Box = (1, 1, 1)
        self.calls: dict[int, int] = {}
        self.sums: dict[int, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def add(self, layer: int, q: Tensor, k: Tensor, video: VideoShape, scale: float) -> None:
        """Add one call, q and k (B, H, N, D).

        Raises:
            ValueError: another grid than the first call's.
        """
        if self.grid is None:
            self.grid, self.tile = video.grid, _tile_of(video, self.block)
        if video.grid != self.grid:
            raise ValueError(
                f"attention runs over {video.grid} tokens in layer {layer}, and over {self.grid} "
                "before: a profile is of one grid; use Piecewise, which looks at each"
            )
        tokens = math.prod(self.tile)
        layout = layout_of(video, q.device, tokens, tokens, self.tile)
        T = math.prod(tiles_of(self.grid, self.tile))
        check_room(
            f"the mass of {q.shape[1]} heads by {T} x {T} blocks",
            4 * q.shape[0] * q.shape[1] * T * T,
            f"give larger blocks than block={self.block}",
            q.device,
        )
        mass = block_mass(q, k, layout.slots, scale=scale)[:, :, :T, :T].mean(0).float()
        found = (mass.cpu(),) if self.form == "blocks" else self._by_offset(mass)
        known = self.sums.get(layer)
        if known is not None:
            if known[0].shape != found[0].shape:
                raise ValueError(f"layer {layer} has attentions with several numbers of heads")
            found = tuple(old + new for old, new in zip(known, found, strict=True))
        self.sums[layer] = found
        self.calls[layer] = self.calls.get(layer, 0) + 1

    def _by_offset(self, mass: Tensor) -> tuple[Tensor, ...]:
        assert self.grid is not None
        tiles = tiles_of(self.grid, self.tile)
        index = offsets_of(tiles).to(mass.device).flatten()
        count = math.prod(2 * n - 1 for n in tiles)
        by_offset = mass.new_zeros(len(mass), count).index_add_(1, index, mass.flatten(1))
        by_frame = mass.sum(1).unflatten(1, (tiles[0], -1)).sum(-1)
        return by_offset.cpu(), by_frame.cpu(), mass.sum(-1).cpu()

    def masses(self, model: str, seen: str) -> Masses:
        """Return what was summed, as the mean over the calls.

        Raises:
            ValueError: no attention over a known grid was seen.
        """
        if self.grid is None:
            raise ValueError(
                "no attention over a known grid was seen, so that there is nothing to measure"
            )
        layers = {n: self._layer(n) for n in sorted(self.sums)}
        return Masses(model, self.form, self.tile, self.grid, layers, seen)

    def _layer(self, layer: int) -> LayerMasses:
        assert self.grid is not None
        tiles = tiles_of(self.grid, self.tile)
        held = tokens_of_tiles(self.grid, self.tile)
        sums = tuple(one.double() / self.calls[layer] for one in self.sums[layer])
        if self.form == "blocks":
            scores = (sums[0].clamp_min(math.exp(FLOOR)) / held).log()
            frames = scores.new_zeros(len(scores), tiles[0]).half()
            return LayerMasses(scores.half(), frames, levels_of(scores.half()))
        by_offset, by_frame, by_query = sums
        weights, frames = fit_offsets(by_offset, by_frame, by_query, self.grid, self.tile)
        shape = (len(weights), *(2 * n - 1 for n in tiles))
        bare = LayerMasses(
            weights.view(shape).half(),
            frames.half(),
            levels_of(torch.zeros(len(weights), 1, 1).half()),
        )
        alone = Masses("", self.form, self.tile, self.grid, {0: bare})
        heads = range(len(weights))
        scores = alone.scores(0, heads, VideoShape(*self.grid), torch.device("cpu"))
        return LayerMasses(bare.weights, bare.frames, levels_of(scores.half()))


def _tile_of(video: VideoShape, block: int) -> Box:
    """The even box of so many tokens, cut to a grid that is smaller."""
    F, R, C = (min(x) for x in zip(even_tile(video, block), video.grid, strict=True))
    return F, R, C


def radial_of(video: VideoShape, method: Profiled) -> Radial | None:
    """Radial attention with the density and the rest of a profile, or the sparsest on this grid;
    None where it leaves nothing out."""
    goal = method.density(video)

    def radial(factor: float) -> Radial:
        return Radial(decay_factor=factor, rest=method.rest, centre=method.centre)

    low, high = 1e-3, 64.0
    for _ in range(HALVINGS):
        factor = math.sqrt(low * high)
        low, high = (low, factor) if radial(factor).density(video) > goal else (factor, high)
    found = radial(low)
    return found if found.density(video) < 1 else None


def at_density(method: Profiled, density: float, video: VideoShape) -> Profiled:
    """Profile that keeps another share of the token pairs, of which text is all kept."""
    share = 1 - (1 - density) * (video.tokens / video.video_tokens) ** 2
    return replace(method, share=min(max(share, LEAST), 1.0))


def _held_out(
    pipe: Any,
    method: Profiled,
    prompt: str,
    every: int,
    steps: int,
    seed: int,
    call: dict[str, Any],
) -> MeasuredProfile:
    """Compare a profile and radial attention with dense attention, on one prompt."""
    squares: dict[tuple[str, int], float] = {}
    radials: list[Radial | None] = []

    def look(call: Observed) -> None:
        if handle.clock.step % every != every - 1:
            return
        layer, q, k, v, dense, video, run = call
        if not radials:
            radials.append(radial_of(video, method))
        compared: dict[str, Any] = {"ours": method.for_layer(layer.number)}
        if (radial := radials[0]) is not None:
            alike = at_density(method, radial.density(video), video)
            compared |= {"radial": radial, "alike": alike.for_layer(layer.number)}
        found = {"dense": dense}
        for name, one in compared.items():
            found[name] = one(q, k, v, video=video, kernel=run) - dense
        for name, x in found.items():
            total = x.to(widest(x.device)).square().sum().item()
            squares[name, layer.number] = squares.get((name, layer.number), 0.0) + total

    with attach_method(pipe, method, record=False) as handle:
        handle.observe = look
        run_to_latents(pipe, prompt, steps, seed, call)
    layers = sorted({layer for _, layer in squares})

    def errors(name: str) -> dict[int, float]:
        return {
            n: math.sqrt(squares[name, n] / squares["dense", n])
            for n in layers
            if (name, n) in squares
        }

    if not layers:
        raise ValueError(f"no attention over a known grid was seen in {steps} steps of {prompt!r}")
    return MeasuredProfile(method, errors("ours"), radials[0], errors("radial"), errors("alike"))
