"""One training of two experts, by turns."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from gen_accel.extras import needed_for
from gen_accel.lora.batches import PLAN
from gen_accel.lora.by_turns import Experts
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import BOTH, PARTS, config_of
from gen_accel.lora.model import Model
from gen_accel.lora.sharing import Groups
from gen_accel.lora.training_run import Run

with needed_for("training", extra="train"):
    from accelerate import Accelerator


def run_of(config: TrainConfig, accelerator: Accelerator, model: Model, cache: LatentCache) -> Run:
    """Return the run of one transformer, or of two experts."""
    if config.part == BOTH:
        return Pair(config, accelerator, model, cache)
    return Run(config, accelerator, model, cache)


class Pair(Run):
    """One run that trains both experts of a pipeline by turns.

    Each is trained by a run with its own steps, noise levels, optimizer, learning rate and
    average. What is written, shown and sampled is common.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: Model, cache: LatentCache
    ) -> None:
        self.config, self.accelerator, self.model, self.cache = config, accelerator, model, cache
        self.out, self.plan = Path(config.out), PLAN
        self.groups = Groups.of(config, accelerator)

        def train(part: str) -> Run:
            own = model._replace(transformer=getattr(model, part), transformer_2=None)
            return Run(config_of(config, part), accelerator, own, cache, together=PARTS)

        self.experts = Experts(config, accelerator.device, train)
        first: Run = self.halves[0]
        self.recipe, self.adapter = first.recipe, first.adapter
        self.stopping = self.prolonged = False

    @property
    def halves(self) -> tuple[Run, ...]:
        return tuple(self.experts.halves.values())

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS

    @property
    def stopping(self) -> bool:
        return self.halves[0].stopping

    @stopping.setter
    def stopping(self, asked: bool) -> None:
        for half in self.halves:
            half.stopping = asked

    def _step(self, step: int) -> tuple[float, bool]:
        part, own = self.experts.at(step)
        figures, stop = self._ready(part)._take(own)
        self._log_step(step, figures, part)
        return figures["loss"], stop

    def _ready(self, part: str) -> Run:
        return self.experts.bring(part)

    def _tensors(self) -> dict[str, Tensor]:
        return self.experts.tensors()

    def _numbers(self) -> dict[str, Any]:
        return self.experts.numbers()

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.experts.restore(tensors, numbers)

    def _teachers(self) -> str | None:
        return self.experts.teachers()

    def _sampling(self) -> AbstractContextManager[None]:
        return self.experts.sampling()

    def _artefact(self) -> Callable[[Path], Any]:
        return self.experts.writer()
