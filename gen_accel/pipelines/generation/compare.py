"""Comparison of a dense and a sparse clip from one seed: speed-up, and how close they are."""

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.attached.attachment import (
    Attachment,
    AttachOptions,
    SilentBranch,
)
from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.attached.records import Summary
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.kernels import flex
from gen_accel.measure import Fidelity, measure_fidelity, side_by_side
from gen_accel.measure.machine import ExternalLoad, environment
from gen_accel.method import Method
from gen_accel.parsing import brief
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.decode import is_streamed
from gen_accel.pipelines.generation.progress import Part, Progress
from gen_accel.pipelines.generation.sampling import (
    CallArguments,
    Clip,
    Sample,
    check_clip,
    sample,
    served_family,
)
from gen_accel.pipelines.generation.step_cache import caching, skipped_steps
from gen_accel.pipelines.generation.steps import Expected, stepping
from gen_accel.pipelines.linear_layers import words_of
from gen_accel.pipelines.tuning.preset import Preset
from gen_accel.registry import NOT_ASKED
from gen_accel.served import STEPS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Unpack

WARM_UP_FRAMES = 17  # and one step: one-time costs are paid before the clocks start
SHOWN_WIDTH = 288  # pixels; narrower clips are enlarged side by side


@dataclass(frozen=True)
class Comparison:
    """Both clips, with the summaries of their runs.

    Args:
        clip: the clip as generated, with all values filled.
        compile_seconds: time in compilers during the sparse run, subtracted from its time.
        metrics: see `measure_fidelity`.
        alike: what both clips ran by beside the attention, in words.
        cache: of the sparse clip; None for none.
        busy: words for a processor that others used meanwhile, so that times tell little; None
            if they did not, and on other devices.
    """

    prompt: str
    clip: Clip
    dense: Sample
    sparse: Sample
    dense_summary: Summary
    summary: Summary
    compile_seconds: float
    environment: dict[str, Any]
    metrics: tuple[str, ...] | None = None
    alike: str = ""
    busy: str | None = None
    cache: str | None = None

    @property
    def speedup(self) -> float:
        """Speed-up of the denoising, which includes the attention; decoding is the same."""
        return self.dense.denoise_seconds / self.sparse.denoise_seconds

    @cached_property
    def fidelity(self) -> Fidelity:
        """Closeness of the sparse clip to the dense one."""
        return measure_fidelity(
            [self.sparse.video], [self.dense.video], metrics=self.metrics, fps=self.clip.fps
        )

    @property
    def labels(self) -> list[str]:
        kind = type(self.summary.method).__name__.lower()
        return [
            f"dense  {self.dense.denoise_seconds:.1f} s",
            f"{kind}  {self.sparse.denoise_seconds:.1f} s",
        ]

    def caption(self, *, with_times: bool) -> str:
        """Say in one line what sparse attention gained, if the times mean anything, and cost."""
        density = self.summary.density
        kept = "all steps dense" if density is None else f"density {density:.2f} where sparse"
        told = f"{kept}, PSNR {self.fidelity.psnr_db:.1f} dB"
        return f"{self.speedup:.2f}x as fast, {told}" if with_times else told

    def pair(self, *, with_times: bool = True) -> np.ndarray:
        """Join dense left and sparse right, with seconds above and figures below, (F, H, W, 3)
        uint8."""
        videos = [self.dense.video, self.sparse.video]
        scale = max(1, SHOWN_WIDTH // videos[0].shape[2])
        caption = self.caption(with_times=with_times)
        return side_by_side(videos, self.labels, caption=caption, scale=scale)

    def to_dict(self) -> dict[str, Any]:
        ran, closeness = self.summary.to_dict(), self.fidelity.to_dict()
        kernels = sorted({r.choice.kernel for r in self.summary.records.values() if r.choice})
        seconds = {"dense": self.dense_summary.seconds, "sparse": self.summary.seconds}
        cached = {"cache": self.cache, "skipped_steps": skipped_steps(self.summary)}
        cached = {} if self.cache is None else cached
        known = {"frames", *(("enlarged",) if self.fidelity.enlarged == 1 else ())}
        of_clip = ("seed", "frames", "height", "width", "steps", "guidance_scale", "fps")
        return {
            "prompt": self.prompt,
            **{name: getattr(self.clip, name) for name in of_clip},
            "tokens": ran["tokens"],
            "attention": f"{brief(self.summary.method)}, {brief(self.summary.schedule)}",
            "method": ran["method"],
            "schedule": ran["schedule"],
            "kernel": ", ".join(kernels) or "none, all dense",
            "kernel_reasons": ran["kernels"],
            "density": ran["density"],
            "sparsity": ran["sparsity"],
            "attention_flops_share": ran["attention_flops_share"],
            "beside": f"the model's own attention{self.alike and f'; {self.alike} in both'}",
            "dense_seconds": self.dense.denoise_seconds,
            "sparse_seconds": self.sparse.denoise_seconds,
            "speedup": self.speedup,
            "attention_seconds": seconds if None not in seconds.values() else None,
            "dense_decode_seconds": self.dense.decode_seconds,
            "sparse_decode_seconds": self.sparse.decode_seconds,
            "dense_total_seconds": self.dense.seconds,
            "sparse_total_seconds": self.sparse.seconds,
            "total_speedup": self.dense.seconds / self.sparse.seconds,
            "compile_seconds": self.compile_seconds,
            "busy": self.busy,
            **cached,
            "psnr_db": closeness.pop("psnr_db"),
            "ssim": closeness.pop("ssim"),
            **{
                name: one
                for name, one in closeness.items()
                if name not in known and one not in (None, NOT_ASKED)
            },
            "environment": self.environment,
        }


def compare_with_dense(
    pipe: "DiffusionPipeline",
    prompt: str,
    clip: Clip,
    *,
    method: Method,
    preset: Preset | None = None,
    part: Part | None = None,
    known: Expected | None = None,
    metrics: tuple[str, ...] | None = None,
    inputs: CallArguments | None = None,
    cache: str | None = None,
    **options: "Unpack[AttachOptions]",
) -> Comparison:
    """Generate densely, then with `method`, in one process and from one seed, each after a run on
    a short clip.

    Args:
        clip: a result of `sampling.filled`.
        preset: the method's own, if it has one; the sparse run then warns of another call than it
            was tuned for.
        part: of a bar, which shows the progress of both; None: a bar of their own.
        known: what is known of the clip before.
        metrics: figures beside PSNR and SSIM, see `measure_fidelity`.
        inputs: pictures and video of both, see `inputs.fit`.
        cache: of the sparse clip alone, see `step_cache.caching`.
        options: of `gen_accel.attach`; the dense clip uses the model's own attention.
    """
    device = pipe._execution_device
    warm = _warm_up_method(pipe, method)
    short = _warm_up_clip(pipe, clip, warm, inputs)
    known = known or Expected(None, clip.steps)
    weights = known.of_both
    # The work of the warm-up as a share of the clip's, by frames and steps.
    share = 1.0 if short.frames is None else short.frames / (clip.frames or short.frames)
    share *= (short.steps or 1) / (clip.steps or max(short.steps or 1, STEPS))
    with ExitStack() as stack:
        whole = part or stack.enter_context(Progress()).parted()
        first, *clips = whole.parts(
            share * sum(weights),
            sum(weights[:2]),
            sum(weights[2:]),
            labels=("", "clip 1 of 2", "clip 2 of 2"),
        )
        shortened = 1.0 if inputs is None else inputs.shortened

        def made(
            handle: Attachment, clip: Clip, part: Part, cache: str | None = None
        ) -> tuple[Sample, Summary]:
            denoising, decoding = part.parts(*known.weights)
            steps = stepping(pipe, denoising, clip, shortened=shortened)
            cached = caching(pipe, cache, options.get("schedule"), clip.steps)
            with handle, cached, handle.gathering(), steps as tick:
                taken = sample(
                    pipe,
                    prompt,
                    clip,
                    tick=tick,
                    inputs=inputs,
                    decoding=lambda: decoding.ticker("decoding"),
                )
                return taken, handle.summary()

        warm_ups = first.parts(1, 1, labels=("warm-up 1 of 2", "warm-up 2 of 2"))
        made(attach(pipe, Dense()), short, warm_ups[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SilentBranch)  # the measured run warns
            untimed: AttachOptions = {**options, "schedule": None, "timed": False}
            handle = attach(pipe, warm, **untimed)
        made(handle, short, warm_ups[1])
        load = ExternalLoad() if device.type == "cpu" else None
        handle = attach(pipe, Dense(), timed=options.get("timed", False))
        dense, dense_summary = made(handle, clip, clips[0])
        handle = attach(pipe, method if preset is None else None, preset=preset, **options)
        before = len(flex.compile_seconds)
        sparse, summary = made(handle, clip, clips[1], cache)
    compiled = sum(flex.compile_seconds[before:])
    frames, height, width, _ = sparse.video.shape
    return Comparison(
        prompt,
        clip.model_copy(update={"frames": frames, "height": height, "width": width}),
        dense,
        replace(sparse, denoise_seconds=sparse.denoise_seconds - compiled),
        dense_summary,
        summary,
        compiled,
        environment(device),
        metrics,
        words_of(pipe),
        None if load is None else load.busy(),
        cache,
    )


def _warm_up_method(pipe: "DiffusionPipeline", method: Method) -> Method:
    """Return rules that run each method of rules once, each in a layer and step of its own; other
    methods as they are."""
    if not isinstance(method, Mixed):
        return method
    sparse = {r.method: r for r in method.rules if not r.method.is_dense}
    family = served_family(pipe)
    layers = sorted({site.layer for site in family.self_attentions(first_transformer(pipe))})
    steps = max(family.generation.least_steps, -(-len(sparse) // len(layers)))
    rules = []
    for i, rule in enumerate(sparse.values()):
        step, place = divmod(i, len(layers))
        rules.append(Rule(rule.method, (layers[place],), rule.heads, (step, step + 1)))
    return Mixed(tuple(rules), steps) if rules else Dense()


def _warm_up_clip(
    pipe: "DiffusionPipeline", clip: Clip, method: Method, inputs: CallArguments | None
) -> Clip:
    """Shorten a clip for the warm-up to few frames and steps.

    The frames stay if `method` does not fit the short clip, if the pipeline's allowed lengths are
    unknown, or if there is a picture or video, which was fitted to them.
    """
    if isinstance(method, Mixed):
        few = method.steps
    else:
        share = 1.0 if inputs is None else inputs.shortened
        least = math.ceil(served_family(pipe).generation.least_steps / share)
        few = None if clip.steps is None else min(clip.steps, least)
    whole = clip.model_copy(update={"steps": few})
    if inputs is not None or not is_streamed(pipe) or clip.frames is None:
        return whole
    short = whole.model_copy(update={"frames": min(clip.frames, WARM_UP_FRAMES)})
    try:
        check_clip(pipe, short, method)
    except ValueError:
        return whole
    return short
