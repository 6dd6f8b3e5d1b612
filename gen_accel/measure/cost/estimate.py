"""Estimate of the gain from sparse attention for one model and size, without generating.

The model of time is simple:

    step time     ∝  FLOPs: self-attention and everything else
    sparse layer  =  dense self-attention x computed density / efficiency
    speed-up      =  1 / (1 - share x sparse x (1 - computed density / efficiency))

`share` is self-attention's part of a step's FLOPs, `sparse` the part of all (layer, step) pairs
that the schedule leaves to the method. Of rules, dense pairs are none of them, and densities are
means over the heads of the others. `computed density` is the share of token pairs that a block
kernel computes, with padding and the cost of a pooled rest. `efficiency` is the achieved share of
the ideal 1 / computed density: how much faster than dense attention the kernel is on this device,
times its computed density. It is measured once for a device and kept.

A method with a memory is also dense at the steps in which it learns. A clip that is made chunk
after chunk is the sum of the forward passes of its chunks, each with the history that it sees.

FLOPs are counted as `families.layers` says: linear layers, convolutions and the products of all
attention. Not counted: norms, activations, rotary embeddings, the text encoder, the autoencoder,
and what an `Estimate` lists under `uncounted`. The share of attention is therefore overrated if
attention runs at a higher rate than matrix products, and underrated if it runs at a lower one.
The speed-up is of the denoising alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gen_accel.attention_processors.attached.layer import asked
from gen_accel.attention_processors.attached.schedule import Schedule, as_schedule
from gen_accel.attention_processors.attached.step_state import StateBytes, state_bytes
from gen_accel.attention_processors.families.base import Pass
from gen_accel.attention_processors.families.layers import Flops
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, MixedHeads
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.measure.cost.model import Source, Subject, subject_of
from gen_accel.measure.cost.rates import known_efficiency
from gen_accel.memory import in_words
from gen_accel.method import Method, Step, StepState, check_method, check_named
from gen_accel.parsing import brief, fits, wrong_type
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

OWN_ATTENTION = "the model's own attention"  # the origin of its efficiency, 1
WORTH = 1.1  # the least speed-up that pays for a changed result
LONGEST = 1024  # frames
CALLS = 2  # of the transformer in a step where guidance runs it with the prompt and without
# Plans of more block pairs than this take gigabytes: the search for a length stops there.
MOST_PAIRS = 50_000_000
MOST_STEPS = 10**9
POINTS = 10  # lengths of a curve, besides the one asked for


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost and speed-up to expect. Printable; `to_dict()` for a report.

    Args:
        num_frames, height, width: as a user gives them, in frames and pixels.
        multiples: pixels that divide height and width.
        video: the token grid that they make, with the text if it attends with the video.
        density, computed_density: shares of the token pairs that are kept, and computed.
        attention_flops, sparse_attention_flops: of all self-attention in one step, all its calls,
            with every layer dense and with every layer sparse.
        step_flops: of the whole transformer in one dense step, all its calls.
        calls: of the transformer in a step, one where guidance is distilled; of a clip that is
            made in chunks, for each of them.
        passes: calls in all steps, guidance aside.
        pass_tokens: tokens that attend in one of them, at most.
        sparse_share: share of the (layer, step) pairs that the schedule leaves sparse and in which
            no method learns; of clips that are made in chunks without the attention of passes that
            only fill a cache.
        memory: bytes that a method keeps from step to step, on the model's device and on the host,
            for all calls of one sample in `dtype`; None: nothing.
        efficiency: achieved share of the ideal 1 / computed density; `efficiency_from` names its
            origin.
        speedup: of the denoising.
        pays_from: the least number of frames from which the speed-up is at least 1.1, found by
            bisection at this height and width; None if there is none up to `searched_to`.
        uncounted: in words, work that the FLOPs leave out, as model and size do not determine it.
    """

    model: str
    method: Method
    schedule: Schedule
    steps: int
    num_frames: int
    height: int
    width: int
    multiples: tuple[int, int]
    video: VideoShape
    density: float
    computed_density: float
    attention_flops: float
    sparse_attention_flops: float
    step_flops: float
    sparse_share: float
    efficiency: float
    efficiency_from: str
    speedup: float
    pays_from: int | None
    searched_to: int
    uncounted: tuple[str, ...] = ()
    memory: StateBytes | None = None
    dtype: torch.dtype | None = None
    calls: int = CALLS
    passes: int
    pass_tokens: int

    @property
    def tokens(self) -> int:
        return self.video.tokens

    @property
    def attention_share(self) -> float:
        """Self-attention's part of a dense step's FLOPs."""
        return self.attention_flops / self.step_flops

    @property
    def limit(self) -> float:
        """The speed-up if sparse attention took no time at all."""
        return 1 / max(1 - self.attention_share * self.sparse_share, 1e-9)

    @property
    def pays(self) -> bool:
        return self.speedup >= WORTH

    def to_dict(self) -> dict[str, object]:
        return {
            "model": self.model,
            "method": str(self.method),
            "schedule": str(self.schedule),
            "steps": self.steps,
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "multiples": [*self.multiples],
            "grid": list(self.video.grid),
            "tokens": self.tokens,
            "density": self.density,
            "sparsity": 1 - self.density,
            "computed_density": self.computed_density,
            "calls_per_step": self.calls,
            "passes": self.passes,
            "tokens_per_pass": self.pass_tokens,
            "attention_flops_per_step": self.attention_flops,
            "sparse_attention_flops_per_step": self.sparse_attention_flops,
            "flops_per_step": self.step_flops,
            "attention_share": self.attention_share,
            "sparse_share": self.sparse_share,
            "efficiency": self.efficiency,
            "efficiency_from": self.efficiency_from,
            "speedup": self.speedup,
            "speedup_limit": self.limit,
            "pays": self.pays,
            "pays_from_frames": self.pays_from,
            "searched_to_frames": self.searched_to,
            "memory_bytes": 0 if self.memory is None else self.memory.device,
            "host_memory_bytes": 0 if self.memory is None else self.memory.host,
            "uncounted": list(self.uncounted),
        }

    def head(self, more: str = "") -> Iterator[str]:
        """Lines of the run and its density.

        Args:
            more: end of the last line.
        """
        yield (
            f"{self.model}, {self.num_frames} frames of {self.height} x {self.width}: "
            f"{self.video} = {self.tokens} tokens"
        )
        if self.passes != self.steps:
            yield (
                f"made chunk after chunk: {self.passes} calls of the model in all steps, guidance "
                f"aside, each of at most {self.pass_tokens} tokens with what the chunk sees"
            )
        yield f"{brief(self.method)}, {brief(self.schedule)}, {self.steps} steps"
        yield (
            f"density {self.density:.3f} (sparsity {1 - self.density:.3f}), "
            f"{self.computed_density:.3f} computed with padding{more}"
        )

    def __str__(self) -> str:
        calls = "both guidance calls" if self.calls == CALLS else "one call"
        lines = [
            *self.head(),
            f"FLOPs a step, {calls}: self-attention {self.attention_flops:.3g} "
            f"dense, {self.sparse_attention_flops:.3g} sparse; whole transformer "
            f"{self.step_flops:.3g} dense, {self.attention_share:.0%} of it self-attention",
            "predicted speed-up of the denoising beside the model's own dense attention: "
            f"{self.speedup:.2f}x, with "
            f"{self.sparse_share:.0%} of the layers and steps sparse and a kernel efficiency "
            f"of {self.efficiency:.2f} ({self.efficiency_from}); free attention would give "
            f"{self.limit:.2f}x",
            *(f"not counted: {what}" for what in self.uncounted),
        ]
        places = ("the model's device", "the host")
        lines += [
            f"memory kept from step to step on {place}, {calls}: "
            f"{in_words(size)} a sample in {self.dtype}"
            for size, place in zip(self.memory or (0, 0), places, strict=True)
            if size
        ]
        pays = f"pays off ({WORTH}x or more) from {self.pays_from} frames at this size"
        if self.pays:
            return "\n".join([*lines, pays])
        longer = f"no length up to {self.searched_to} frames reaches {WORTH}x at this size"
        if self.pays_from is not None:
            longer = f"it {pays}"
        said = f"do not bother: {self.speedup:.2f}x is not worth a changed result; {longer}"
        return "\n".join([*lines, said])


def estimate(
    pipe_or_config: Source,
    method: Method,
    *,
    height: int,
    width: int,
    num_frames: int,
    schedule: Schedule | None = None,
    text: int | None = None,
    steps: int = 50,
    efficiency: float | None = None,
    remeasure: bool = False,
) -> Estimate:
    """Estimate tokens, density, FLOPs and speed-up of `method`, without running the model.

        size = {"height": 480, "width": 832, "num_frames": 81}
        print(gen_accel.estimate("Wan2.1-T2V-1.3B", Radial(), **size))

    The module's docstring has the formula and lists the counted work.

    Args:
        pipe_or_config: a pipeline that makes videos, its transformer, a transformer's config, the
            folder of a saved pipeline or its repository on the hub, of which only config files
            are read, or a name: of a published model, of a family (`gen-accel models`) or of a
            class. If the autoencoder is not known, its sizes are the family's.
        height, width: pixels.
        num_frames: frames of the video, not latents.
        schedule: layers and steps that stay dense.
        text: tokens of the prompt. Default: as many as the pipelines make of every prompt.
        steps: denoising steps, of which the schedule may keep a share dense.
        efficiency: achieved share of the ideal 1 / computed density, the kernel_efficiency
            that benchmarks/kernel_speed.py writes. Without, it is measured on the device that the
            model is on, or on the best one there is, which takes seconds the first time and is
            kept in the cache folder, unless others used the processor meanwhile.
        remeasure: measure the efficiency even if the cache folder knows it.

    Raises:
        ValueError: a model that makes no videos or is unknown, sizes that it cannot make, or a
            method that does not fit them.
    """
    schedule = as_schedule(schedule)
    check_method(method)
    given = {
        "height": (height, int, "480"),
        "width": (width, int, "832"),
        "num_frames": (num_frames, int, "81"),
        "steps": (steps, int, "50"),
        "text": (text, int | None, "512"),
        "efficiency": (efficiency, float | None, "0.9"),
    }
    for name, (value, hint, right) in given.items():
        if not fits(value, hint):
            raise wrong_type(name, hint, value, right)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if steps > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS:,}, got {steps:,}")
    if efficiency is not None and not 0 < efficiency < math.inf:
        raise ValueError(f"efficiency must be positive, got {efficiency}")
    subject = subject_of(pipe_or_config, text)
    schedule.check_layers(subject.blocks)
    check_named(f"layers of {type(method).__name__}", method.named_layers, subject.blocks)
    grid = subject.grid(height, width, num_frames)
    of_method, kinds = _sparse(subject, schedule, steps, method)
    density, computed, plan = _densities(kinds, subject, grid, steps)  # before a measurement

    reached, source = 1.0, OWN_ATTENTION
    if not all(kind.is_dense for kind in kinds):
        reached, source = efficiency or 1.0, "given"
        if efficiency is None:
            windows = plan is not None and plan.partial is not None
            reached, source = known_efficiency(
                subject.device, subject.dtype, subject.head_dim, windows, remeasure
            )
    parts = subject.passes(grid, steps)
    (attention_flops, rest), thinned = step_flops(subject, parts, steps)
    calls = 1 if subject.family.generation.distilled else CALLS

    def speedup_of(clip: VideoShape, computed: float) -> float:
        (attention, rest), thinned = step_flops(subject, subject.passes(clip, steps), steps)
        share = attention / (attention + rest) * thinned
        return 1 / max(1 - share * of_method * (1 - computed / reached), 1e-9)

    speedup = speedup_of(grid, computed)
    pays_from, searched = _pays_from(
        subject, kinds, grid, steps, speedup_of, speedup >= WORTH, plan
    )
    sites = [
        (method.for_layer(site.layer), site.heads, site.dim)
        for site in subject.sites
        if schedule.why_layer(site.layer) is None
    ]
    most = max(subject.seen(one.video, one.lengths).tokens for one in parts if not one.is_dense)
    held = state_bytes(sites, 1, most, subject.dtype.itemsize)
    return Estimate(
        model=subject.name,
        method=method,
        schedule=schedule,
        steps=steps,
        num_frames=num_frames,
        height=height,
        width=width,
        multiples=subject.multiples,
        video=subject.whole(grid),
        density=density,
        computed_density=computed,
        attention_flops=calls * attention_flops,
        sparse_attention_flops=calls * attention_flops * (1 - thinned + thinned * computed),
        step_flops=calls * (attention_flops + rest),
        sparse_share=of_method * thinned,
        efficiency=reached,
        efficiency_from=source,
        speedup=speedup,
        pays_from=None if pays_from is None else subject.frames(pays_from),
        searched_to=subject.frames(searched),
        uncounted=subject.uncounted,
        memory=StateBytes(*(calls * size for size in held)),
        dtype=subject.dtype,
        calls=calls,
        passes=round(sum(one.times for one in parts)),
        pass_tokens=most,
    )


def step_flops(subject: Subject, passes: Sequence[Pass], steps: int) -> tuple[Flops, float]:
    """Return the FLOPs of a dense step, one sample in each of its passes, and the share of its
    attention in which a method may run. What runs once is spread over the steps."""
    attention = rest = thinned = 0.0
    for one in passes:
        share, of = one.times / steps, subject.flops(one.video, one.lengths)
        attention, rest = attention + share * of.attention, rest + share * of.rest
        thinned += 0.0 if one.is_dense else share * of.attention
    return Flops(attention, rest), thinned / attention


def over_lengths(source: Source, known: Estimate) -> list[Estimate]:
    """Estimate the run of `known` at other lengths, from short ones to twice its own.

    Args:
        source: the model, as `estimate` takes it.
        known: an estimate of that model, whose method, size, schedule, steps and efficiency hold
            for all.

    Returns:
        Estimates by rising length, `known` among them. Lengths that are too short for the method
        are left out.
    """
    subject = subject_of(source)
    own = subject.grid(known.height, known.width, known.num_frames).frames
    tokens = {round(x) for x in np.linspace(1, 2 * own, POINTS)} - {own}
    found = [known]
    for frames in {*map(subject.frames, tokens)} - {known.num_frames}:
        try:
            one = estimate(
                subject,
                known.method,
                height=known.height,
                width=known.width,
                num_frames=frames,
                schedule=known.schedule,
                steps=known.steps,
                efficiency=known.efficiency,
            )
        except ValueError:
            continue  # a window that is longer than so short a clip
        found.append(one)
    return sorted(found, key=lambda one: one.num_frames)


def densities_of(
    method: Method, video: VideoShape, past: int = 0
) -> tuple[float, float, Plan | None]:
    """Return the kept and computed share of the token pairs, and the plan if there is one.

    Args:
        past: frames of the grid without queries, which what is beside it then lacks too.
    """
    if method.is_dense:
        return 1.0, 1.0, None  # runs the model's own attention
    if not method.defines("plan"):  # depends on the values: the method's own density must do
        density = method.density(video)
        return density, density, None
    plan, times = method.planned(video), 1.0
    if past:
        plan = asked(plan, Tokens(video, past=past))
        times = video.tokens / ((video.frames - past) * video.height * video.width)
    return times * plan.density, times * plan.computed_density, plan


def _densities(
    kinds: Mapping[Method, float], subject: Subject, clip: VideoShape, steps: int
) -> tuple[float, float, Plan | None]:
    """Return the mean over methods, each with its share, and over the passes that make a clip, by
    their attention, of what `densities_of` returns; of the plans, the largest."""
    works: dict[tuple[VideoShape, int], float] = {}
    for one in subject.passes(clip, steps):
        if not one.is_dense:
            key = subject.seen(one.video, one.lengths), one.past
            of = one.times * subject.flops(one.video, one.lengths).attention
            works[key] = works.get(key, 0.0) + of
    kept = computed = 0.0
    plans = []
    for (video, past), work in works.items():
        for method, share in kinds.items():
            part = share * (work / sum(works.values()))
            density, of_blocks, plan = densities_of(method, video, past)
            kept, computed = kept + part * density, computed + part * of_blocks
            plans += [] if plan is None else [plan]
    return kept, computed, max(plans, key=_block_pairs, default=None)


def _block_pairs(plan: Plan | None) -> int:
    return 0 if plan is None else math.prod(plan.blocks.shape)


def _sparse(
    subject: Subject, schedule: Schedule, steps: int, method: Method
) -> tuple[float, Mapping[Method, float]]:
    """Return the share of all pairs of an attention and a step that are not dense, and the methods
    that run there, each with its share of the heads."""
    sites = [site for site in subject.sites if schedule.why_layer(site.layer) is None]
    pairs = len(subject.sites) * steps
    if not isinstance(method, Mixed):
        memories = [method.for_layer(site.layer).step_state() for site in sites]
        sparse = sum(_sparse_steps(schedule, steps, memory) for memory in memories)
        return sparse / pairs, {method: 1.0}
    counts: dict[Method, float] = {}
    sparse = 0
    for site in sites:
        layer = method.for_layer(site.layer)
        for step in schedule.sparse_steps(steps):
            now = layer.at(Step(step, steps))
            if now.is_dense:
                continue
            sparse += 1
            groups = [(now, range(site.heads))]
            if isinstance(now, MixedHeads):
                groups = now.groups(site.heads)
            for kind, heads in groups:
                counts[kind] = counts.get(kind, 0.0) + len(heads) / site.heads
    if not sparse:
        return 0.0, {Dense(): 1.0}
    return sparse / pairs, {kind: count / sparse for kind, count in counts.items()}


def _sparse_steps(schedule: Schedule, steps: int, memory: StepState | None) -> int:
    """Number of sparse steps: neither dense by the schedule nor steps in which a memory learns.

    The memory learns at the last dense step at the start, which costs nothing, or else at the
    first step; then again after each `every` steps.
    """
    sparse = schedule.sparse_steps(steps)
    if memory is None or not sparse:
        return len(sparse)
    learned = 1 if sparse[0] == 0 else 0
    if memory.every:
        since = len(sparse) if sparse[0] else len(sparse) - 1
        learned += since // memory.every
    return len(sparse) - learned


def _pays_from(
    subject: Subject,
    kinds: Mapping[Method, float],
    grid: VideoShape,
    steps: int,
    speedup_of: Callable[[VideoShape, float], float],
    is_worth: bool,
    plan: Plan | None,
) -> tuple[int | None, int]:
    """Return the least number of token frames that pays off, and the longest length tried.

    Upwards by doubling if the length asked for does not pay off, then by bisection.

    Args:
        speedup_of: of a length and the density that is computed there.
        is_worth, plan: of the length asked for.
    """
    last = max(grid.frames, (LONGEST - 1) // (subject.temporal * subject.patch[0]) + 1)
    if speedup_of(VideoShape(last, grid.height, grid.width), 0.0) < WORTH:
        return None, last  # not even if sparse attention took no time

    def pays(frames: int) -> tuple[bool, int]:
        """Whether a length pays off, and how many pairs of blocks its plan holds."""
        clip = VideoShape(frames, grid.height, grid.width)
        try:
            _, computed, plan = _densities(kinds, subject, clip, steps)
        except ValueError:
            return False, 0  # a window longer than so short a clip
        return speedup_of(clip, computed) >= WORTH, _block_pairs(plan)

    pairs = _block_pairs(plan)
    low, high = 0 if is_worth else grid.frames, grid.frames
    while low == high:
        room = math.floor(low * (MOST_PAIRS / max(pairs, 1)) ** 0.5)
        last = min(last, max(low, room))
        high = min(2 * low, last)
        if high == low:
            return None, low
        good, pairs = pays(high)
        low = low if good else high
    searched = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle)[0] else (middle, high)
    return high, searched
