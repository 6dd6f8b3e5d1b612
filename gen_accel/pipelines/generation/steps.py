"""Progress of a generation: what is said before its first step, and steps that move layer by
layer."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gen_accel.attention_processors.attached.clock import first_transformer, served_transformers
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.seam import is_compiled
from gen_accel.measure.cost.figures import Range, duration
from gen_accel.measure.cost.forecast import Forecast, forecast
from gen_accel.method import Method
from gen_accel.pipelines.generation.config import Clip, Loading
from gen_accel.pipelines.generation.decode import is_streamed
from gen_accel.pipelines.generation.progress import Part, Tick
from gen_accel.pipelines.generation.sampling import parameters, served_family, token_grid
from gen_accel.served import STEPS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LONG = 600.0  # seconds from which a run says how to shorten it
OFTEN = 0.2  # seconds between two looks at the layers
DECODING = 2.0  # dense steps that decoding is taken to last where nothing is forecast
# FLOPs of a run that its first steps forecast soon enough: some seconds of a CPU, or of a card.
BRIEF = {"cpu": 2e12}
BRIEF_ON_CARDS = 1e15
SHORTER = "fewer --frames, a smaller --height and --width, or fewer --steps make it shorter"


@dataclass(frozen=True)
class Expected:
    """Estimate of a clip before its first step.

    Args:
        tokens: of the video; None if the pipeline rounds sizes in its own way.
        steps: None if the pipeline decides them.
        forecast: None for a short run, and a model that nothing is known of.
    """

    tokens: int | None
    steps: int | None
    forecast: Forecast | None = None

    @property
    def seconds(self) -> Range | None:
        """Seconds of a clip; None without a forecast."""
        return None if self.forecast is None else self.forecast.total(self.forecast.sparse)

    @property
    def seconds_of_both(self) -> Range | None:
        """Seconds of a dense and a sparse clip together; None without a forecast."""
        if self.forecast is None or (sparse := self.seconds) is None:
            return None
        dense = self.forecast.total(self.forecast.dense)
        return Range(dense.low + sparse.low, dense.high + sparse.high, sparse.source)

    @property
    def dense(self) -> float:
        """Seconds of a step with every layer dense; 1 without a forecast."""
        return 1.0 if self.forecast is None else _middle(self.forecast.dense)

    @property
    def weights(self) -> tuple[float, float]:
        """Lengths of denoising and decoding a clip, in the unit of `dense`."""
        sparse = 1.0 if self.forecast is None else _middle(self.forecast.sparse)
        known = None if self.forecast is None else self.forecast.decoding
        last = DECODING * self.dense if known is None else _middle(known)
        return (self.steps or STEPS) * sparse, last

    @property
    def of_both(self) -> tuple[float, float, float, float]:
        """Lengths of denoising and decoding a dense clip, then a sparse one."""
        return ((self.steps or STEPS) * self.dense, self.weights[1], *self.weights)

    def words(self, seconds: Range | None, videos: int = 1) -> str:
        """Say what begins: "denoising 0/50, 131,040 tokens, about 28-31 h on this machine"."""
        told = [f"denoising 0/{self.steps}" if self.steps else "denoising"]
        told += [f"{self.tokens:,} tokens"] if self.tokens else []
        if seconds is not None:
            each, whole = duration(seconds), duration(seconds.times(videos))
            told.append(f"about {each} {'each, ' * (videos > 1)}on this machine")
            told += [f"{whole} in all"] if videos > 1 else []
            if seconds.high * videos >= LONG:
                told[-1] += f"; {SHORTER}, and --plan says what takes how long"
        return ", ".join(told)


def expected(
    pipe: "DiffusionPipeline",
    clip: Clip,
    method: Method,
    schedule: Schedule | None,
    loading: Loading,
) -> Expected:
    """Forecast a clip, a result of `filled`, on the device of its pipeline. Only a run of more
    than some seconds is worth the second that a forecast takes."""
    if not is_streamed(pipe):
        return Expected(None, clip.steps)
    tokens = token_grid(pipe, clip).video_tokens
    unknown = Expected(tokens, clip.steps)
    if clip.steps is None or clip.steps * _flops(pipe, tokens) < BRIEF.get(
        pipe._execution_device.type, BRIEF_ON_CARDS
    ):
        return unknown
    assert clip.frames is not None
    assert clip.height is not None
    assert clip.width is not None
    try:
        found = forecast(
            pipe,
            method,
            dtype=loading.dtype,
            guidance_scale=clip.guidance_scale,
            offload=loading.offload,
            quantize=loading.quantize,
            height=clip.height,
            width=clip.width,
            num_frames=clip.frames,
            schedule=schedule,
            steps=clip.steps,
            text=clip.max_tokens,
        )
    except ValueError:  # a model that nothing is known of
        return unknown
    return Expected(tokens, clip.steps, found)


def _middle(one: Range) -> float:
    return sum(one.pair()) / 2


def _flops(pipe: "DiffusionPipeline", tokens: int) -> float:
    """FLOPs of a dense step, by and large."""
    module = first_transformer(pipe)
    weights = sum(value.numel() for value in module.parameters())
    sites = served_family(pipe).self_attentions(module)
    return 2.0 * tokens * (2 * weights + 4 * tokens * sum(one.heads * one.dim for one in sites))


@contextmanager
def stepping(
    pipe: "DiffusionPipeline",
    part: Part,
    clip: Clip,
    *,
    runs: int = 1,
    shortened: float = 1.0,
) -> Iterator[Tick]:
    """Yield a tick for `denoise`, and move `part` at each layer of a model as well.

    A layer counts as done when its work was given to the device. The first step is taken to have
    as many calls as guidance makes, each later one as many as the step before. A pipeline that
    reports no steps is counted by its layers alone. Layers of a compiled model are not counted.

    Args:
        clip: a result of `filled`.
        runs: times that the pipeline runs, one after the other, for the parts of a long video.
        shortened: share of the steps that are run.
    """
    step = seen = run = 0
    models, told = served_transformers(pipe).values(), time.monotonic()
    family, scale = served_family(pipe), clip.guidance_scale
    twice = family.image_prompts.guidance == "sequential" and (scale is None or scale > 1)
    layers = [
        {id(site.module): site.module for site in family_of(model).self_attentions(model)}
        for model in models
        if not is_compiled(model)
    ]
    usual = len(layers[0]) * (1 + twice) if layers else 0
    reports = "callback_on_step_end" in parameters(pipe)

    def show(*, at_once: bool = False) -> None:
        total = max(1, int(len(pipe.scheduler.timesteps) * shortened))
        within = min(seen / usual, 1.0) if usual else 0.0
        share = (run + min((step + within) / total, 1.0)) / runs
        words = f"step {min(step + 1, total)} of {total}"
        words = f"part {run + 1} of {runs}, {words}" if runs > 1 else words
        part.show(words, share, at_once=at_once)

    def tick(done: int, total: int) -> None:
        nonlocal step, seen, run, usual
        run += done < step and run + 1 < runs
        usual, step, seen = seen if done > 1 and seen else usual, done, 0
        show(at_once=done == 1 and run == 0)

    def passed(module: nn.Module, args: object, output: object) -> None:
        nonlocal step, seen, told
        seen += 1
        if not reports and seen >= usual:
            step, seen = step + 1, 0
        if (now := time.monotonic()) - told >= OFTEN:
            told = now
            show()

    part.show("prompt")
    with ExitStack() as stack:
        for modules in layers:
            for module in modules.values():
                stack.callback(module.register_forward_hook(passed).remove)
        yield tick
