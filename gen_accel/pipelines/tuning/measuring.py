"""The measurements that a profile is made of: errors, seconds and weights of steps."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel import kernels
from gen_accel.attention_processors.attached.attachment import Attachment, attach_method
from gen_accel.attention_processors.attached.clock import noise_levels, served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.attached.observing import check_bare
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.kernels import Runner
from gen_accel.kernels.base import scale_of
from gen_accel.kernels.self_check import answer_of_rows
from gen_accel.measure.machine import interleaved
from gen_accel.method import Method, RunPlan
from gen_accel.pipelines.generation.decode import decode_stream, is_streamed
from gen_accel.pipelines.tuning.preset import Preset, check_model, transformer_of
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.pipelines.tuning.config import Objective


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
    more: Mapping[str, Any] = field(default_factory=dict)


class StopGeneration(Exception):
    """Ends a generation after the calls that were wanted."""


class Passes:
    """Outputs of a model in a generation, pass by pass.

    Attributes:
        outputs: of each pass, in order, with its step.
    """

    def __init__(self) -> None:
        self.outputs: list[tuple[int, Any]] = []


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


@contextmanager
def keeping(pipe: "DiffusionPipeline", step: Callable[[], int]) -> Iterator[Passes]:
    """Keep what the transformers return inside.

    Args:
        step: tells the denoising step under way.
    """
    passes = Passes()

    def kept(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        passes.outputs.append((step(), _copied(output)))
        return output

    with _in_place(pipe, kept):
        yield passes


@contextmanager
def repeating(pipe: "DiffusionPipeline", passes: Passes, before: int) -> Iterator[None]:
    """Return what the transformers returned in the kept passes of the steps before `before`."""
    known = iter([output for step, output in passes.outputs if step < before])
    done = object()

    def repeated(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = next(known, done)
        return forward(*args, **kwargs) if output is done else _copied(output)

    with _in_place(pipe, repeated):
        yield


@contextmanager
def _in_place(pipe: "DiffusionPipeline", replacement: Callable) -> Iterator[None]:
    """Call `replacement(forward, ...)` in the place of each transformer's forward. Hooks, which
    read the step, run as before."""
    before = []
    for module in served_transformers(pipe).values():
        own = module.__dict__.get("forward")
        before.append((module, own))
        forward = module.forward

        def replaced(*args: Any, _forward: Callable = forward, **kwargs: Any) -> Any:
            return replacement(_forward, *args, **kwargs)

        module.forward = replaced
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _copied(output: Any) -> Any:
    """Copy the tensors of an output, which schedulers may write into."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    if isinstance(output, dict):  # diffusers' outputs are dictionaries too
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    return output


MOST_PSNR = 200.0  # dB, of equal videos, whose PSNR is infinite


def score_of_videos(objective: "Objective", dense: np.ndarray, sparse: np.ndarray) -> float:
    """Score a sparse video by "psnr", or by a function."""
    if callable(objective):
        return float(objective(dense, sparse))
    from gen_accel.measure.quality import psnr  # of an extra

    return min(psnr(sparse, dense), MOST_PSNR)


# A call with fewer tokens than this many times the rows is computed whole, which is no dearer.
WHOLE = 160
SHARE = 0.25  # of a method's error that a disturbance adds: larger ones saturate
ROUNDS = 5  # of timings


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


class Observer:
    """Observer of a dense generation: of each step, the first pass, which is the conditional one
    where guidance makes two, and the last sample of it.

    Attributes:
        heard: a call of the first and of the middle layer, half way through the steps.
    """

    def __init__(
        self,
        handle: Attachment,
        candidates: Sequence[Method],
        call: PipelineCall,
        rows: int,
        kernel: str,
    ) -> None:
        self.handle, self.candidates, self.kernel = handle, candidates, kernel
        self.steps, self.rows = call.steps, rows
        self.errors: dict[tuple[int, int], Tensor] = {}
        self.squares: dict[tuple[int, int], Tensor] = {}
        self.densities: dict[int, list[list[float]]] = {}
        self.heard: dict[int, AttentionSample] = {}

    def __call__(self, call: Observed) -> None:
        layer, q, k, v, dense, video, run = call
        step, number = self.handle.clock.step, layer.number
        if (step, number) in self.errors:
            return
        q, k, v, dense = (x[-1:] for x in (q, k, v, dense))
        scale = scale_of(run, q)
        tokens = self._rows(video.tokens, q.device, step, number)
        wanted = dense[0] if tokens is None else dense[0][:, tokens]
        self.squares[step, number] = _mean_squares(wanted)
        errors, kept = [], []
        whole = self.handle.clock.tokens
        for candidate in self.candidates:
            if candidate.is_dense:
                errors.append(torch.zeros_like(self.squares[step, number]))
                kept.append(1.0)
                continue
            method = candidate.for_layer(number)
            method = method if whole is None else method.within(video, whole.video)
            out, density = answer(method, q, k, v, video, tokens, scale, self.kernel)
            errors.append(_mean_squares(out - wanted))
            kept.append(density)
        self.errors[step, number] = torch.stack(errors, -1)
        self.densities.setdefault(number, []).append(kept)
        if step == self.steps // 2:
            self.heard[number] = AttentionSample.of(call)

    def _rows(self, tokens: int, device: torch.device, step: int, layer: int) -> Tensor | None:
        """Rows at which candidates are compared, others at each call; None for all."""
        if tokens <= WHOLE * self.rows:
            return None
        g = torch.Generator().manual_seed(step * 10_007 + layer)
        return torch.randperm(tokens, generator=g)[: self.rows].sort().values.to(device)


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


def _mean_squares(x: Tensor) -> Tensor:
    """(H,) fp32 of (H, R, D)."""
    return x.float().square().mean((1, 2)).cpu()


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

    Returns:
        The errors, and calls to time candidates on, by layer.

    Raises:
        ValueError: steps in which no attention over a known grid ran.
    """
    probe = Mixed((Rule(candidates[0]),), call.steps)  # not run, as an observer is there
    with attach_method(pipe, probe, kernel=kernel, record=False) as handle:
        observer = Observer(handle, candidates, call, rows, kernel)
        handle.observe = observer
        with keeping(pipe, lambda: handle.clock.step) as passes:
            latents = generate(pipe, prompt, number, call)
        sigmas = torch.tensor(noise_levels(pipe.scheduler, call.steps))
    layers = sorted({layer for _, layer in observer.errors})
    lacking = [
        (step, layer)
        for step in range(call.steps)
        for layer in layers
        if (step, layer) not in observer.errors
    ]
    if not layers or lacking:
        where = f"layer {lacking[0][1]} at step {lacking[0][0]}" if lacking else "any layer"
        raise ValueError(
            f"attention of {where} was not seen in {call.steps} steps: two transformers with "
            "other layers, or a pipeline that skips steps, cannot be tuned"
        )

    def grid(of: dict[tuple[int, int], Tensor]) -> Tensor:
        by_step = [
            torch.stack([of[step, layer] for layer in layers]) for step in range(call.steps)
        ]
        return torch.stack(by_step)

    densities = [torch.tensor(observer.densities[layer]).mean(0) for layer in layers]
    seen = PromptErrors(
        grid(observer.errors),
        grid(observer.squares),
        torch.stack(densities).float(),
        torch.tensor(layers),
        sigmas,
        latents,
        passes,
    )
    return seen, observer.heard


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
    kernel: str = "auto",
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
        attach_method(pipe, Mixed((rule,), call.steps), kernel=kernel, record=False),
        repeating(pipe, seen.passes, step),
    ):
        latents = generate(pipe, prompt, number, call)
    error = relative_error(latents, seen.latents)
    return error / (SHARE * math.sqrt(max(relative.double().sum().item(), 1e-30)))


def relative_error(latents: Tensor, dense: Tensor) -> float:
    """Root of the squared difference over the squares of the dense latents."""
    dense = dense.to(latents.device).double()
    return ((latents.double() - dense).norm() / dense.norm()).item()


def seconds_of(
    heard: dict[int, AttentionSample], candidates: Sequence[Method], kernel: str = "auto"
) -> tuple[Tensor, float]:
    """Time all candidates and dense attention in turn, the choice of blocks included.

    Returns:
        (C,) shares of dense attention, the mean over the first and the middle layer of the medians
        of rounds, and the seconds of dense attention.
    """
    numbers = sorted(heard)
    shares, dense_seconds = [], []
    for number in sorted({numbers[0], numbers[len(numbers) // 2]}):
        call = heard[number]
        runner = Runner(partial(kernels.run, scale=call.scale, kernel=kernel), kernel, call.scale)
        calls: dict[str, Callable[[], Any]] = {
            "dense": partial(
                F.scaled_dot_product_attention, call.q, call.k, call.v, scale=call.scale
            )
        }
        for i, candidate in enumerate(candidates):
            method = candidate.for_layer(number)
            calls[str(i)] = partial(
                method, call.q, call.k, call.v, video=call.video, kernel=runner
            )
        with torch.no_grad():
            taken = interleaved(calls, rounds=ROUNDS, device=call.q.device)
        medians = {name: statistics.median(times) for name, times in taken.items()}
        dense_seconds.append(medians["dense"])
        shares.append(
            [
                1.0 if candidate.is_dense else medians[str(i)] / medians["dense"]
                for i, candidate in enumerate(candidates)
            ]
        )
    return torch.tensor(shares).mean(0), statistics.fmean(dense_seconds)


def priced(
    preset: Preset, candidates: Sequence[Method], pipe: "DiffusionPipeline"
) -> tuple[Tensor, Tensor]:
    """Time candidates and dense attention on q, k and v of the preset's first tuning prompt, half
    way through the steps; nothing is generated beyond them.

    Returns:
        (C,) fp32 shares of dense attention, and the seconds of dense attention of a layer.

    Raises:
        ValueError: a preset of another model or grid, or without its prompts, or a pipeline that
            something is attached to.
    """
    transformer = transformer_of(pipe)
    check_model(preset, transformer, "the preset")
    check_bare(pipe, "priced")
    prompts = preset.made_by.get("prompts", ())
    if not prompts:
        raise ValueError("the preset does not name its tuning prompts: tune again")
    kernel, steps = preset.made_by.get("kernel", "auto"), preset.method.steps
    call = PipelineCall(steps, preset.made_by.get("seed", 0), preset.made_for.call)
    heard: dict[int, AttentionSample] = {}

    def hear(seen: Observed) -> None:
        step, number = handle.clock.step, seen.layer.number
        if step < steps // 2:
            return
        if step > steps // 2 or number in heard:
            raise StopGeneration
        heard[number] = AttentionSample.of(seen)

    probe = Mixed((Rule(candidates[0]),), steps)  # not run, as an observer is there
    with attach_method(pipe, probe, kernel=kernel, record=False) as handle:
        handle.observe = hear
        with suppress(StopGeneration):
            generate(pipe, prompts[0], 0, call)
    if not heard:
        raise ValueError("no attention over a known grid was seen, so that nothing can be timed")
    grid = next(iter(heard.values())).video.grid
    if tuple(grid) != tuple(preset.made_for.grid):
        raise ValueError(
            f"the preset was tuned on {preset.made_for.grid} tokens, and the model makes {grid}"
        )
    shares, dense = seconds_of(heard, candidates, kernel)
    return shares.float(), torch.tensor(dense)


Tick = Callable[[int, int], None]


def scored(
    preset: Preset,
    pipe: "DiffusionPipeline",
    held_out: Sequence[str],
    objective: Callable[[np.ndarray, np.ndarray], float] | None,
    tick: Tick,
) -> dict[str, list[dict[str, Any]]]:
    """Generate the tuning prompts and others densely and by a preset's rules, and score them.

    Args:
        objective: where the preset's bound is on a function of one's own.

    Raises:
        ValueError: a preset of another model, or without its prompts, or an objective that is
            missing.
    """
    transformer = transformer_of(pipe)
    check_model(preset, transformer, "the preset")
    tuning = tuple(preset.made_by.get("prompts", ()))
    name = preset.bound.get("objective", "psnr")
    if not tuning:
        raise ValueError("the preset does not name its tuning prompts: tune again")
    if name not in ("psnr", "latent_error") and objective is None:
        raise ValueError(f"the bound is on {name!r}: give objective=, the function itself")
    if name != "latent_error":
        check_decodes(pipe)
    call = PipelineCall(preset.method.steps, preset.made_by.get("seed", 0), preset.made_for.call)
    prompts = [*tuning, *held_out]
    runs = []
    for i, prompt in enumerate(prompts):
        tick(i, len(prompts))
        latents = []
        for method in (Dense(), preset.method):
            with attach_method(
                pipe, method, kernel=preset.made_by.get("kernel", "auto"), record=False
            ):
                latents.append(generate(pipe, prompt, i, call))
        error = relative_error(latents[1], latents[0])
        score = -error
        if name != "latent_error":
            score = score_of_videos(objective or name, *(decoded(pipe, x) for x in latents))
        run = {"prompt": prompt, "seed": call.seed + i, "score": score}
        runs.append(run | {"latent_error": error})
    tick(len(prompts), len(prompts))
    return {"tuning": runs[: len(tuning)], "held_out": runs[len(tuning) :]}
