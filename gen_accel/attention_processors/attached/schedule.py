"""Which layers and denoising steps stay dense."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gen_accel.method import check_named
from gen_accel.parsing import Natural, check_names, check_options, shown, tuples


@dataclass(frozen=True)
class Schedule:
    """Layers and steps that run the model's own attention instead of the sparse one.

    The first steps decide what a video shows, all but the very first: what attention leaves out
    of pure noise costs a clip least (docs/few_steps.md, Which steps). Most published quality rests
    on keeping the first fifth of the steps dense. `dense` and `dense_noise` name others.

    Args:
        dense_layers: the first so many blocks, or a tuple of their numbers.
        dense_steps: the first so many denoising steps.
        dense_start, dense_end: share of the steps, 0 to 1, from the second step on and to the
            last, rounded up to whole steps: 0.2 of 20 is the second to the fifth. They need a
            pipeline, which alone knows how many steps there are.
        dense: numbers of further dense steps, counted from 0; negative ones from the end, which
            needs a pipeline.
        dense_noise: (high, low), a range of noise levels, 1 for pure noise and 0 for none: each
            step that passes through it is dense, however many steps there are. A scheduler whose
            levels exceed 1 is read as level / (1 + level). It needs a pipeline.
    """

    dense_layers: Natural | tuple[Natural, ...] = 0
    dense_steps: Natural = 0
    dense_start: float = 0.0
    dense_end: float = 0.0
    dense: tuple[int, ...] = ()
    dense_noise: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("dense_start", "dense_end"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(
                    f"{name} is a share of the steps, from 0 to 1, got {share}"
                    + ("; dense_steps counts steps" if name == "dense_start" else "")
                )
        if self.dense_noise is not None:
            high, low = self.dense_noise
            if not 0 <= low < high <= 1:
                raise ValueError(
                    "dense_noise must be (high, low), 1 for pure noise and 0 for none, with "
                    f"0 <= low < high <= 1, got {self.dense_noise}"
                )

    @classmethod
    def of_file(cls, held: Mapping[str, object]) -> "Schedule":
        """Make a schedule of its fields as JSON holds them; ValueError for other fields."""
        check_names(held, cls, "its schedule")
        return cls(**{name: tuples(value) for name, value in held.items()})

    @property
    def named_layers(self) -> tuple[int, ...]:
        """Blocks that are dense by their numbers."""
        return () if isinstance(self.dense_layers, int) else self.dense_layers

    def check_layers(self, blocks: Collection[int]) -> None:
        """Refuse layers that a model with self-attention in these `blocks` does not have."""
        layers = self.dense_layers
        if isinstance(layers, int) and layers > max(blocks) + 1:
            raise ValueError(
                f"dense_layers must be at most {max(blocks) + 1}, the layers of this model, got "
                f"{layers}"
            )
        check_named("dense_layers", self.named_layers, blocks)

    @property
    def needs_step(self) -> bool:
        return self.dense_steps > 0 or bool(self.dense) or self.needs_total

    @property
    def needs_total(self) -> bool:
        """Whether it must know how many steps there are, or their noise, as a pipeline does."""
        shares = self.dense_start > 0 or self.dense_end > 0
        return shares or any(step < 0 for step in self.dense) or self.dense_noise is not None

    def progress(
        self, step: int, steps: int | None, levels: Sequence[float] | None = None
    ) -> float:
        """Progress of a run at `step` among its sparse steps: 0 at the first, 1 at the last. Also
        0 where `steps` is not known, and with fewer than two sparse steps."""
        sparse = self.sparse_steps(steps or 0, levels)
        if len(sparse) < 2:
            return 0.0
        before = sum(other < step for other in sparse)
        return min(1.0, before / (len(sparse) - 1))

    def sparse_steps(self, steps: int, levels: Sequence[float] | None = None) -> tuple[int, ...]:
        """Numbers of the sparse steps among `steps`.

        Args:
            levels: noise at the beginning of each step, and at the end; without, evenly spread.
        """
        return tuple(i for i in range(steps) if self.why_step(i, steps, levels) is None)

    def why_layer(self, layer: int) -> str | None:
        """The reason why `layer` is dense at all steps, counted from 0; None if it is not."""
        layers = self.dense_layers
        dense = layer < layers if isinstance(layers, int) else layer in layers
        return "dense layer" if dense else None

    def why_step(
        self, step: int, steps: int | None, levels: Sequence[float] | None = None
    ) -> str | None:
        """The reason why all layers are dense at `step` of `steps`, counted from 0; `levels` as in
        `sparse_steps`."""
        if step < self.dense_steps:
            return "first steps"
        if step in self.dense:
            return "named step"
        if not self.needs_total:
            return None
        assert steps is not None
        count = math.ceil(self.dense_start * steps - 1e-9)
        if min(1, steps - count) <= step < 1 + count:
            return "first steps"
        if self.dense_end and step >= steps - math.ceil(self.dense_end * steps - 1e-9):
            return "last steps"
        if step - steps in self.dense:
            return "named step"
        if self.dense_noise is not None and step < steps:
            if levels is None:
                levels = [1 - i / steps for i in range(steps + 1)]
            high, low = self.dense_noise
            begin, end = levels[step], levels[step + 1]
            if end < high and begin > low:
                return "noise of the step"
        return None

    def is_last_at_start(
        self, step: int, steps: int | None, levels: Sequence[float] | None = None
    ) -> bool:
        """Whether `step` is dense and the one after it is not."""
        more = steps is None or step + 1 < steps
        dense = self.why_step(step, steps, levels) is not None
        return dense and more and self.why_step(step + 1, steps, levels) is None


def as_schedule(given: object) -> Schedule:
    """Return `given`, or a schedule of nothing for None; ValueError for anything else."""
    if given is None:
        return Schedule()
    if not isinstance(given, Schedule):
        raise ValueError(f"schedule must be a Schedule, such as {Schedule(2)}, got {shown(given)}")
    return given
