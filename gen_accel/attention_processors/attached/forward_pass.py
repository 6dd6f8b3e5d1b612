"""The forward pass under way: its grid, its denoising step, its texts and their masks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import Clock, Moment
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.seam import is_compiled
from gen_accel.attention_processors.tokens import Tokens, seen_text

# Why the step of a pass is read outside of a graph.
STEPS = (
    "a schedule of steps, or a method that follows them, needs fullgraph=False or "
    "compile_repeated_blocks()"
)

# Text tokens that each sample sees, by their places among the tokens beside the grid.
Seen = tuple[tuple[int, ...], ...]


class Readers(NamedTuple):
    """Functions of a family that read the arguments of a forward pass. They are held one by one,
    as a module cannot be copied with a model."""

    video_shape: Callable
    timestep: Callable
    rising: bool
    mask_of_pairs: bool
    before: Callable | None
    text_lengths: Callable | None

    @classmethod
    def of(cls, family: Any) -> "Readers":
        return cls(
            family.video_shape,
            family.timestep,
            family.TIMESTEPS_RISE,
            family.MASK_OF_PAIRS,
            family.before,
            family.text_lengths,
        )


class Kept(NamedTuple):
    """Facts of a pass that its blocks read, kept for gradient checkpointing, which runs them
    again.

    Args:
        dense_step, is_dense, progress, refusal: see `ForwardPass`.
    """

    moment: Moment
    dense_step: str | None
    is_dense: bool
    progress: float
    refusal: ValueError | None


class ForwardPass:
    """The forward pass under way, as the layers read it.

    Args:
        clock: holds the grid, the lengths of the texts and the step.
        masks_alike: each layer makes the same mask anew, so that reading one is enough.

    Attributes:
        dense_step: the reason why all layers are dense at this step; None where they are not.
        is_dense: whether all layers are dense and no method learns. torch.compile makes one graph
            for each value, and does not depend on the reason.
        learns: methods with a memory learn at this step, the last that is dense at the start.
        progress: of the run, see `Schedule.progress`; graphs read it when they run.
        refusal: why the grid is not known; raised where a method is to run.
        knows_grid: whether the grid is known, which a graph may depend on without holding the
            grid.
        is_one_graph: the whole model is traced, this pass with it, so that the values read are
            symbols.
        steps: each step of the generation to `dense_step` there, in their order.
        passes: how many there were of each step.
        seen_passes: how many there were in all.
        paused: how many ran as if nothing were attached.
    """

    def __init__(self, clock: Clock, masks_alike: bool) -> None:
        self.clock = clock
        self.dense_step: str | None = None
        self.is_dense = self.learns = False
        self.progress = 0.0
        self.refusal: ValueError | None = None
        self.knows_grid = False
        self.is_one_graph = False
        self.steps: dict[int, str | None] = {}
        self.passes: dict[int, int] = {}
        self.seen_passes = self.paused = 0
        self._masks_alike = masks_alike
        self._read: tuple[ref, tuple, Seen | None] | None = None

    def begin(self, read: Readers, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Read the grid, and for graphs the lengths of the texts, from a call's arguments."""
        traced = torch.compiler.is_compiling()
        if not traced:
            self.seen_passes += 1
        self._read, self.refusal, self.is_one_graph = None, None, traced
        try:
            video = read.video_shape(transformer, *args, **kwargs)
            before = 0 if read.before is None else read.before(transformer, *args, **kwargs)
            self.clock.tokens = Tokens(video, before)
        except ValueError as error:
            self.clock.tokens, self.refusal = None, error
        self.knows_grid = self.refusal is None
        self.clock.texts = None
        if read.text_lengths is None or self.refusal is not None:
            return
        if traced or is_compiled(transformer) or read.mask_of_pairs:
            self._read_texts(read.text_lengths, transformer, args, kwargs)

    @torch.compiler.disable(
        reason="the lengths of texts need fullgraph=False or compile_repeated_blocks()"
    )
    def _read_texts(self, lengths: Callable, transformer: Any, args: tuple, kwargs: dict) -> None:
        """Read the lengths of the texts outside of a graph, as this waits for the device."""
        self.clock.texts = lengths(transformer, *args, **kwargs)

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
            fresh: where the scheduler begins anew, so does the generation.
            learning: the method has a memory.
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

    def remember(self, output: Any) -> None:
        """Return to this pass when its backward pass begins. Gradient checkpointing runs blocks
        again then, and other forward passes may have run meanwhile."""
        kept = self.dense_step, self.is_dense, self.progress, self.refusal
        now = Kept(self.clock.now(), *kept)
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._return_to, now))

    def _return_to(self, kept: Kept, grad: Tensor) -> None:
        self.clock.return_to(kept.moment)
        self.dense_step, self.is_dense = kept.dense_step, kept.is_dense
        self.progress, self.refusal, self._read = kept.progress, kept.refusal, None

    def seen(self, layer: str, mask: Tensor, q: Tensor, tokens: Tokens) -> Sequence[Sequence[int]]:
        """Return which tokens beside the grid each sample sees; ValueError for a mask that hides
        others.

        Most models give all layers of a pass one mask, or equal ones. The mask is read once, as
        reading waits for the device.

        Args:
            layer: its name, for the error.
            mask: as attention calls take it.
            q: (B, N, H, D).
        """
        if self.clock.texts is not None:
            return tuple(range(n) for n in self.clock.texts)
        key = tokens, mask.shape, mask.dtype
        if self._read is None or self._read[1] != key or not self._is_read(mask):
            self._read = ref(mask), key, seen_text(mask, tokens.complete(q), tokens)
        seen = self._read[2]
        if seen is None:
            raise ValueError(
                f"sparse attention does not take attn_mask of {layer}, a mask that hides "
                f"more than padding of the text, got {tuple(mask.shape)} {mask.dtype}; "
                "attach Dense() or detach for this model"
            )
        return seen

    def _is_read(self, mask: Tensor) -> bool:
        """Whether `mask` is the mask that was read last, or stands for the same one."""
        assert self._read is not None
        return self._masks_alike or self._read[0]() is mask


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model returns: one, or some in lists, tuples and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_of(part)
