"""The measurements that a profile is made of: errors, seconds and weights of steps."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gen_accel import kernels
from gen_accel.attention_processors.attached.attachment import attach_method
from gen_accel.attention_processors.attached.clock import noise_levels, served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.kernels import Runner
from gen_accel.kernels.base import scale_of
from gen_accel.kernels.self_check import answer_of_rows
from gen_accel.measure.machine import interleaved
from gen_accel.method import Method, RunPlan
from gen_accel.pipelines.generation.decode import decode_stream, is_streamed
from gen_accel.pipelines.tuning.preset import ScoredPrompt
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.pipelines.tuning.config import Objective

MOST_PSNR = 200.0  # dB, of equal videos, whose PSNR is infinite
# A call with fewer tokens than this many times the rows is computed whole, which is no dearer.
WHOLE = 160
SHARE = 0.25  # of a method's error that a disturbance adds: larger ones saturate
ROUNDS = 5  # of timings


@dataclass(frozen=True)
class PipelineCall:
    """Arguments of the pipeline beside the prompt.

    Args:
        steps: num_inference_steps.
        seed: of the noise of the first prompt; each further prompt takes the next.
        more: sizes, guidance scale and others, by the pipeline's own names.
    """

    steps: int
    seed: int = 0
    more: Mapping[str, object] = field(default_factory=dict)


def generate(pipe: "DiffusionPipeline", prompt: str, number: int, call: PipelineCall) -> Tensor:
    """Run the pipeline as far as the latents, (1, C, f, h, w). The noise is drawn on the CPU.

    Args:
        number: of the prompt, which decides its seed.
    """
    made = pipe.__call__(
        prompt=prompt,
        num_inference_steps=call.steps,
        generator=torch.Generator().manual_seed(call.seed + number),
        output_type="latent",
        **call.more,
    )
    latents = made.frames if hasattr(made, "frames") else made[0]
    if not torch.isfinite(latents).all():
        raise ValueError("the model made latents that are not finite: try dtype float32")
    return latents


def decoded(pipe: "DiffusionPipeline", latents: Tensor) -> np.ndarray:
    """Decode to (F, H, W, 3) uint8."""
    return np.concatenate([*decode_stream(pipe, latents)])


def check_decodes(pipe: "DiffusionPipeline") -> None:
    """Refuse, by a ValueError, a pipeline whose latents cannot be decoded here."""
    if not is_streamed(pipe):
        raise ValueError(
            f"the latents of {type(pipe).__name__} cannot be decoded outside of it, as an "
            "objective on pixels needs: give objective='latent_error'"
        )


Passes = list[tuple[int, object]]  # step and output of each forward pass, in order


@contextmanager
def keeping(pipe: "DiffusionPipeline", step: Callable[[], int]) -> Iterator[Passes]:
    """Keep what the transformers return inside.

    Args:
        step: tells the denoising step under way.
    """
    passes: Passes = []

    def kept(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        passes.append((step(), _copied(output)))
        return output

    with _in_place(pipe, kept):
        yield passes


@contextmanager
def repeating(pipe: "DiffusionPipeline", passes: Passes, before: int) -> Iterator[None]:
    """Return what the transformers returned in the kept passes of the steps before `before`."""
    known = [output for step, output in reversed(passes) if step < before]

    def repeated(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        return _copied(known.pop()) if known else forward(*args, **kwargs)

    with _in_place(pipe, repeated):
        yield


@contextmanager
def _in_place(pipe: "DiffusionPipeline", replacement: Callable[..., object]) -> Iterator[None]:
    """Call `replacement(forward, ...)` in the place of each transformer's forward. Hooks, which
    read the step, run as before."""
    with ExitStack() as stack:
        for module in served_transformers(pipe).values():
            if "forward" in module.__dict__:
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = partial(replacement, module.forward)
        yield


# Copies the tensors of an output, which schedulers may write into.
_copied = partial(tree_map_only, Tensor, Tensor.clone)


def relative_error(latents: Tensor, dense: Tensor) -> float:
    """Root of the squared difference over the squares of the dense latents."""
    dense = dense.to(latents.device).double()
    return ((latents.double() - dense).norm() / dense.norm()).item()


def scored(
    pipe: "DiffusionPipeline",
    objective: "Objective",
    prompt: str,
    seed: int,
    latents: Tensor,
    dense: Tensor,
    video: np.ndarray | None = None,
) -> ScoredPrompt:
    """Score a sparse generation by "psnr", "latent_error", or a function of both videos.

    Args:
        dense: latents of the dense video.
        video: the dense video, if it is decoded already.
    """
    error = relative_error(latents, dense)
    if objective == "latent_error":
        score = -error
    else:
        video = decoded(pipe, dense.to(latents.device, latents.dtype)) if video is None else video
        if callable(objective):
            score = float(objective(video, decoded(pipe, latents)))
        else:
            from gen_accel.measure.quality import psnr  # of an extra

            score = min(psnr(decoded(pipe, latents), video), MOST_PSNR)
    return {"prompt": prompt, "seed": seed, "score": score, "latent_error": error}


class PromptErrors(NamedTuple):
    """Errors of all candidates in one dense generation.

    Args:
        errors, squares: see `Profile`, without the prompts.
        densities: (L, C).
        layers: (L,).
        sigmas: (S + 1,).
        latents: of the dense video.
        passes: that it was made of.
    """

    errors: Tensor
    squares: Tensor
    densities: Tensor
    layers: Tensor
    sigmas: Tensor
    latents: Tensor
    passes: Passes


class AttentionSample(NamedTuple):
    """Inputs of one attention call, kept to time candidates on."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    video: VideoShape
    scale: float

    @classmethod
    def of(cls, call: Observed) -> "AttentionSample":
        """Copy the last sample of a call."""
        q, k, v = (x[-1:].clone() for x in (call.q, call.k, call.v))
        return cls(call.layer.number, q, k, v, call.video, scale_of(call.run, q))


def answer(
    method: Method,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video: VideoShape,
    tokens: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, float]:
    """Compute what a method gives for some tokens of one sample, (H, R, D), or for all, and the
    share of token pairs that it keeps."""
    plans: list[Plan] = []

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        plans.append(plan)
        if tokens is None:
            return kernels.run(q, k, v, plan, scale=scale, kernel=kernel)
        out = torch.zeros_like(q)
        out[0, :, tokens] = answer_of_rows(q, k, v, plan, tokens, scale=scale)
        return out

    out = method(q, k, v, video=video, kernel=Runner(run, kernel, scale))[0]
    density = statistics.fmean(plan.density for plan in plans) if plans else 1.0
    return out if tokens is None else out[:, tokens], density


def observe(
    pipe: "DiffusionPipeline",
    prompt: str,
    number: int,
    call: PipelineCall,
    candidates: Sequence[Method],
    *,
    rows: int = 64,
    kernel: str = "auto",
) -> tuple[PromptErrors, dict[int, AttentionSample]]:
    """Generate a prompt densely, and measure all candidates on its attention.

    Looked at is the first pass of each step, which is the conditional one if guidance makes two,
    and the last sample of it.

    Returns:
        The errors, and calls to time candidates on, by layer, half way through the steps.

    Raises:
        ValueError: steps in which no attention over a known grid ran.
    """
    errors: dict[tuple[int, int], Tensor] = {}  # by step and layer, as the next one
    squares: dict[tuple[int, int], Tensor] = {}
    densities: dict[int, list[list[float]]] = {}
    heard: dict[int, AttentionSample] = {}

    def mean_squares(x: Tensor) -> Tensor:  # (H,) fp32 of (H, R, D)
        return x.float().square().mean((1, 2)).cpu()

    def look(seen: Observed) -> None:
        step, layer = place = handle.clock.step, seen.layer.number
        if place in errors:
            return
        q, k, v, dense = (x[-1:] for x in (seen.q, seen.k, seen.v, seen.dense))
        tokens = None  # all rows, or some, which are others at each call
        if seen.video.tokens > WHOLE * rows:
            drawn = torch.Generator().manual_seed(step * 10_007 + layer)
            order = torch.randperm(seen.video.tokens, generator=drawn)
            tokens = order[:rows].sort().values.to(q.device)
        wanted = dense[0] if tokens is None else dense[0][:, tokens]
        squares[place] = mean_squares(wanted)
        off, kept = [], []
        whole, scale = handle.clock.tokens, scale_of(seen.run, q)
        for candidate in candidates:
            if candidate.is_dense:
                off.append(torch.zeros_like(squares[place]))
                kept.append(1.0)
                continue
            method = candidate.for_layer(layer)
            method = method if whole is None else method.within(seen.video, whole.video)
            out, density = answer(method, q, k, v, seen.video, tokens, scale, kernel)
            off.append(mean_squares(out - wanted))
            kept.append(density)
        errors[place] = torch.stack(off, -1)
        densities.setdefault(layer, []).append(kept)
        if step == call.steps // 2:
            heard[layer] = AttentionSample.of(seen)

    probe = Mixed((Rule(candidates[0]),), call.steps)  # not run, as an observer is there
    with attach_method(pipe, probe, kernel=kernel, record=False) as handle:
        handle.observe = look
        with keeping(pipe, lambda: handle.clock.step) as passes:
            latents = generate(pipe, prompt, number, call)
        sigmas = torch.tensor(noise_levels(pipe.scheduler, call.steps))
    layers = sorted(densities)
    places = [[(step, layer) for layer in layers] for step in range(call.steps)]
    lacking = [one for some in places for one in some if one not in errors]
    if not layers or lacking:
        where = f"layer {lacking[0][1]} at step {lacking[0][0]}" if lacking else "any layer"
        raise ValueError(
            f"attention of {where} was not seen in {call.steps} steps: two transformers with "
            "other layers, or a pipeline that skips steps, cannot be tuned"
        )

    def grid(of: dict[tuple[int, int], Tensor]) -> Tensor:
        return torch.stack([torch.stack([of[one] for one in some]) for some in places])

    means = [torch.tensor(densities[layer]).mean(0) for layer in layers]
    seen = PromptErrors(
        grid(errors),
        grid(squares),
        torch.stack(means).float(),
        torch.tensor(layers),
        sigmas,
        latents,
        passes,
    )
    return seen, heard


@dataclass(frozen=True)
class Perturbation(Method):
    """Dense attention with a share of a method's error added.

    Args:
        share: 0 for dense, 1 for the method.
    """

    method: Method
    share: float = SHARE

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        exact = Dense()(q, k, v, video=video, kernel=kernel)
        return exact.lerp(self.method(q, k, v, video=video, kernel=kernel), self.share)

    def for_layer(self, layer: int) -> "Perturbation":
        return Perturbation(self.method.for_layer(layer), self.share)

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return self.method.planned(video, device)


def weight_of_step(
    pipe: "DiffusionPipeline",
    prompt: str,
    number: int,
    call: PipelineCall,
    seen: PromptErrors,
    *,
    step: int,
    method: Method,
    relative: Tensor,
    kernel: str,
) -> float:
    """Weight of a step: relative error of the final latents over the relative error of attention.

    One step runs with a share of a method's error in all layers, and all others run dense. The
    steps before it are not computed again.

    Args:
        method: a candidate in the middle of the others.
        relative: (L,), its squared relative errors at the step, by layer.
    """
    rule = Rule(Perturbation(method), steps=(step, step + 1))
    with (
        attach_method(
            pipe, Mixed((rule,), call.steps), kernel=kernel, record=False, padding_once=False
        ),
        repeating(pipe, seen.passes, step),
    ):
        latents = generate(pipe, prompt, number, call)
    error = relative_error(latents, seen.latents)
    return error / (SHARE * math.sqrt(max(relative.double().sum().item(), 1e-30)))


def seconds_of(
    heard: dict[int, AttentionSample], candidates: Sequence[Method], kernel: str
) -> tuple[Tensor, float]:
    """Time all candidates and dense attention in turn, the choice of blocks included.

    Returns:
        (C,) shares of dense attention, the mean over the first and the middle layer of the medians
        of rounds, and the seconds of dense attention.
    """
    numbers = sorted(heard)
    shares, dense_seconds = [], []
    for number in sorted({numbers[0], numbers[len(numbers) // 2]}):
        _, q, k, v, video, scale = heard[number]
        runner = Runner(partial(kernels.run, scale=scale, kernel=kernel), kernel, scale)
        calls: dict[str, Callable[[], object]] = {
            "dense": partial(F.scaled_dot_product_attention, q, k, v, scale=scale)
        }
        for i, one in enumerate(candidates):
            calls[str(i)] = partial(one.for_layer(number), q, k, v, video=video, kernel=runner)
        with torch.no_grad():
            taken = interleaved(calls, rounds=ROUNDS, device=q.device)
        dense, *medians = (statistics.median(times) for times in taken.values())
        dense_seconds.append(dense)
        shares.append(
            [
                1.0 if one.is_dense else median / dense
                for one, median in zip(candidates, medians, strict=True)
            ]
        )
    return torch.tensor(shares).mean(0), statistics.fmean(dense_seconds)
