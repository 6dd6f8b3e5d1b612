"""The forward pass under way: which transformer of a pipeline, its grid, its denoising step, its
texts and their masks."""

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import Family, Given
from gen_accel.attention_processors.seam import Call, is_compiled
from gen_accel.attention_processors.tokens import Tokens, seen_text

if TYPE_CHECKING:
    from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin

# As pipelines name them.
TRANSFORMERS = ("transformer", "transformer_2", "transformer_ref", "unet")
KEPT = "_gen_accel_trained"  # attribute of a transformer: what came with its weights for a method

# Why the step of a pass is read outside of a graph.
STEPS = (
    "a schedule of steps, or a method that follows them, needs fullgraph=False or "
    "compile_repeated_blocks()"
)

# Text tokens that each sample sees, by their places among the tokens beside the grid.
Seen = tuple[tuple[int, ...], ...]


def served_transformers(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
) -> "dict[str, ModelMixin]":
    """Map the names that a pipeline has for its transformers to them; TypeError for an object
    without any."""
    if isinstance(pipe_or_transformer, nn.Module):
        return {TRANSFORMERS[0]: cast("ModelMixin", pipe_or_transformer)}
    found = {name: getattr(pipe_or_transformer, name, None) for name in TRANSFORMERS}
    transformers = {name: module for name, module in found.items() if module is not None}
    if not transformers:
        kind = type(pipe_or_transformer).__name__
        raise TypeError(f"{kind} is neither a pipeline with a transformer nor a module")
    return transformers


def first_transformer(pipe_or_transformer: "DiffusionPipeline | nn.Module") -> "ModelMixin":
    return next(iter(served_transformers(pipe_or_transformer).values()))


def class_of(transformer: nn.Module) -> str:
    """Name of a transformer's class, without the prefix that sharding gives it."""
    return type(transformer).__name__.removeprefix("FSDP")


class SchedulerOf:
    """A pipeline's scheduler, looked up at each call because users may exchange it. The reference
    is weak, as the pipeline owns the model."""

    def __init__(self, pipe: "DiffusionPipeline") -> None:
        self._pipe = ref(pipe)

    def __call__(self) -> "ConfigMixin":
        alive = self._pipe()
        if alive is None:
            raise RuntimeError("the pipeline attached to is gone; attach to the one now in use")
        return alive.scheduler

    def __reduce__(self) -> str:
        raise pickle.PicklingError(
            "a pipeline with a method attached cannot be pickled: detach() first, and attach "
            "again where it is loaded"
        )

    def __deepcopy__(self, memo: dict) -> "SchedulerOf":
        """Refer to the copy's scheduler where the whole pipeline is copied."""
        pipe = self._pipe()
        return SchedulerOf(memo.get(id(pipe), pipe))


class Clock:
    """The grid and the step of the forward pass under way.

    Args:
        scheduler: returns the pipeline's scheduler as it is now. Without one, a step lasts until
            the timestep changes; the two calls of classifier-free guidance are one step.
    """

    def __init__(self, scheduler: "Callable[[], ConfigMixin] | None") -> None:
        self.scheduler = scheduler
        self.tokens: Tokens | None = None
        self.texts: tuple[int, ...] | None = None  # text tokens of each sample, for graphs
        self.step = 0
        self.steps: int | None = None
        self.runs = 0  # that have begun
        self.lost = False  # whether another scheduler than this steps
        self._count = 0
        self._timestep: float | None = None
        self._timesteps: Tensor | None = None
        self._begin = 0
        self._levels: tuple[int, tuple[float, ...]] | None = None  # the run they are of

    def advance(self, timestep: Tensor, *, rising: bool = False) -> bool:
        """Read the step before a forward pass, and return whether a new run begins with it.

        The timestep itself, which waits for a GPU, is read at the first call of a run, and at each
        one without a scheduler or with one that counts no steps. It falls from step to step, or is
        `rising`.
        """
        if self.scheduler is None:
            now = timestep.max().item()  # where each token has its own: of those still noisy
            now = -now if rising else now
            before, self._timestep = self._timestep, now
            new = before is None or now > before
            self._count = 0 if new else self._count + (now != before)
            self.step = self._count
            self.runs += new
            return new
        scheduler = self.scheduler()
        new = scheduler.timesteps is not self._timesteps  # a new list for each run
        if new:
            self._timesteps, self._timestep = scheduler.timesteps, None
            begin = getattr(scheduler, "begin_index", None)  # Wan's video-to-video sets none
            self._begin = _place(scheduler, timestep) if begin is None else begin
        self.step = _taken(scheduler, timestep, self._begin)
        self.steps = len(scheduler.timesteps) - self._begin
        self.lost = self._stands_still(scheduler, timestep)
        self.runs += new
        return new

    def _stands_still(self, scheduler: "ConfigMixin", timestep: Tensor) -> bool:
        """Whether another scheduler steps: the timestep moves and is not in this one's list."""
        index = getattr(scheduler, "step_index", None)
        if index is not None and index < len(scheduler.timesteps):  # a step has begun
            self._timestep = None
            return False
        before, self._timestep = self._timestep, timestep.max().item()
        known = bool((scheduler.timesteps == self._timestep).any())
        return before not in (None, self._timestep) and not known

    def levels(self) -> tuple[float, ...] | None:
        """Noise at the beginning of each step of the run, and at the end; None without a
        pipeline. Reads the scheduler's list once a run."""
        if self.scheduler is None or self.steps is None:
            return None
        if self._levels is None or self._levels[0] != self.runs:
            self._levels = self.runs, noise_levels(self.scheduler(), self.steps)
        return self._levels[1]


def noise_levels(scheduler: "ConfigMixin", steps: int) -> tuple[float, ...]:
    """Noise at the beginning of the last `steps` steps that a scheduler is set to, and at the end:
    1 for pure noise, 0 for none.

    Levels that exceed 1, as of noise that is added to the video and not mixed with it, are
    level / (1 + level). A scheduler without levels gives its timesteps, as a share of its training
    steps.
    """
    found = getattr(scheduler, "sigmas", None)
    if found is None or len(found) < steps:
        most = scheduler.config.get("num_train_timesteps", 1000)
        levels = [float(t) / most for t in torch.as_tensor(scheduler.timesteps).tolist()]
    else:
        levels = torch.as_tensor(found, dtype=torch.float64).tolist()
    if max(levels) > 1.0 + 1e-6:
        levels = [level / (1 + level) for level in levels]
    levels = levels[-(steps + 1) :] if len(levels) > steps else [*levels, 0.0]
    return tuple(levels)


def _taken(scheduler: "ConfigMixin", timestep: Tensor, begin: int) -> int:
    """Number of steps of a run so far."""
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        if index is None:  # before the first step, or where copies of the scheduler are stepped
            return max(0, _mean_place(scheduler, timestep) - begin)
        return index - begin
    if hasattr(scheduler, "counter"):  # PNDM's, whose timesteps repeat
        return scheduler.counter
    return _place(scheduler, timestep) - begin  # DDIM, DDPM and CogVideoX's two


def _mean_place(scheduler: "ConfigMixin", timestep: Tensor) -> int:
    """Index of `timestep`, or the mean over the first sample's frames that are still noisy."""
    timesteps = scheduler.timesteps
    if timestep.ndim < 2 or timesteps.ndim > 1:
        return _place(scheduler, timestep)
    frames = timestep[0].flatten().to(timesteps.device)[:, None]
    equal = (timesteps == frames).float()
    noisy = equal.amax(1)
    return int((equal.argmax(1) * noisy).sum() / noisy.sum().clamp_min(1))


def _place(scheduler: "ConfigMixin", timestep: Tensor) -> int:
    timesteps = scheduler.timesteps
    found = (timesteps == timestep.max().to(timesteps.device)).nonzero()
    return int(found[0]) if len(found) else 0


# Facts of a pass that its blocks read, of the clock and of the pass itself. Counters, from which
# later passes continue, are none.
OF_CLOCK = ("tokens", "texts", "step", "steps")
OF_PASS = ("dense_step", "is_dense", "progress", "refusal", "own")


class ForwardPass:
    """The forward pass under way, as the layers read it.

    Args:
        masks_alike: each layer makes the same mask, so that reading one is enough.

    Attributes:
        dense_step: the reason why all layers are dense at this step; None if they are not.
        is_dense: whether all layers are dense and no method learns: one graph for each value.
        learns: methods with a memory learn at this step, the last that is dense at the start.
        progress: of the run, see `Schedule.progress`; graphs read it when they run.
        refusal: why the grid is not known; raised where a method is to run.
        own: why the model's own attention runs in this pass; None if a method may.
        knows_grid: whether the grid is known, which a graph may depend on.
        is_one_graph: this pass is traced with the model, so that what is read are symbols.
        steps, passes: each step of the generation to `dense_step` there, and to its passes.
        seen_passes, paused: passes in all, and how many ran as if nothing were attached.
    """

    def __init__(self, clock: Clock, masks_alike: bool) -> None:
        self.clock = clock
        self.dense_step: str | None = None
        self.is_dense = self.learns = False
        self.progress = 0.0
        self.refusal: ValueError | None = None
        self.own: str | None = None
        self.knows_grid = False
        self.is_one_graph = False
        self.steps: dict[int, str | None] = {}
        self.passes: dict[int, int] = {}
        self.seen_passes = self.paused = 0
        self.masks_alike = masks_alike
        self._read: tuple[ref, tuple, Seen | None] | None = None

    def begin(
        self, family: Family, transformer: nn.Module, given: Given, *, reads_texts: bool
    ) -> None:
        """Read the grid, and for graphs the lengths of the texts, from a call's arguments."""
        traced = torch.compiler.is_compiling()
        if not traced:
            self.seen_passes += 1
        self._read, self.refusal, self.is_one_graph = None, None, traced
        self.own = family.stays_dense(transformer, given)
        try:
            held = None if self.own is not None else family.tokens(transformer, given)
            self.clock.tokens = held
        except ValueError as error:
            self.clock.tokens, self.refusal = None, error
        self.knows_grid = self.clock.tokens is not None
        self.clock.texts = None
        if not reads_texts or not self.knows_grid:
            return
        if traced or is_compiled(transformer) or family.attention.masks == "pairs":
            self._read_texts(family, transformer, given)

    @torch.compiler.disable(
        reason="the lengths of texts need fullgraph=False or compile_repeated_blocks()"
    )
    def _read_texts(self, family: Family, transformer: nn.Module, given: Given) -> None:
        """Read the lengths of the texts outside of a graph, as this waits for the device."""
        self.clock.texts = family.text_lengths(transformer, given)

    @torch.compiler.disable(reason=STEPS)
    def advance(
        self,
        timestep: Tensor,
        *,
        rising: bool,
        schedule: Schedule,
        needed: bool,
        fresh: bool,
        learning: bool,
    ) -> bool:
        """Read the step, and return whether a new generation begins with it. Runs outside of a
        graph, which would otherwise be compiled again for each step.

        Args:
            needed: an answer depends on the step.
            fresh: a new run of the scheduler begins a new generation.
        """
        begins = self.clock.advance(timestep, rising=rising) and fresh
        if needed and self.clock.lost:
            raise ValueError(
                "the timestep changes while the scheduler of the attached pipeline stands still, "
                "so that steps cannot be counted: attach to the pipeline that runs"
            )
        if begins:
            self.forget()
            self.seen_passes = 1
        step, steps = self.clock.step, self.clock.steps
        levels = None if schedule.dense_noise is None else self.clock.levels()
        self.learns = learning and schedule.is_last_at_start(step, steps, levels)
        self.set_dense(schedule.why_step(step, steps, levels))
        self.progress = schedule.progress(step, steps, levels)
        self.steps[step] = self.dense_step
        self.passes[step] = self.passes.get(step, 0) + 1
        return begins

    def set_dense(self, why: str | None) -> None:
        self.dense_step, self.is_dense = why, why is not None and not self.learns

    def forget(self) -> None:
        """Drop the counts of earlier steps."""
        self.steps, self.passes = {}, {}
        self.seen_passes = self.paused = 0

    def remember(self, output: object) -> None:
        """Return to this pass when its backward pass begins. Gradient checkpointing runs blocks
        again then, and other forward passes may have run meanwhile."""
        facts = [
            (of, name, getattr(of, name))
            for of, names in ((self.clock, OF_CLOCK), (self, OF_PASS))
            for name in names
        ]

        def back(grad: Tensor) -> None:
            self._read = None
            for of, name, value in facts:
                setattr(of, name, value)

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(back)

    def seen(self, layer: str, call: Call, tokens: Tokens) -> Sequence[Sequence[int]] | None:
        """Return which tokens beside the grid each sample sees in a call of `layer`, None for all;
        ValueError for a mask that hides others. Most models give all layers one mask, which is
        read once, as this waits for the device."""
        mask = call.mask
        if mask is None:
            return None
        if self.clock.texts is not None:
            return tuple(range(n) for n in self.clock.texts)
        key, read = (tokens, mask.shape, mask.dtype), self._read
        if read is None or read[1] != key or not (self.masks_alike or read[0]() is mask):
            read = ref(mask), key, seen_text(mask, tokens.complete(call.q), tokens)
            self._read = read
        seen = read[2]
        if seen is None:
            raise ValueError(
                f"sparse attention does not take attn_mask of {layer}, a mask that hides "
                f"more than padding of the text, got {tuple(mask.shape)} {mask.dtype}; "
                "attach Dense() or detach for this model"
            )
        return seen
