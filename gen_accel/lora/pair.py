"""Training of two experts in one run, with one of them on the device at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_accel.extras import needed_for
from gen_accel.lora.batches import PLAN
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import HIGH, LOW, PARTS, Turns, config_of
from gen_accel.lora.latents import LatentCache
from gen_accel.lora.model import Model
from gen_accel.lora.state import whole
from gen_accel.lora.trainer import Run

with needed_for("training", extra="train"):
    from accelerate import Accelerator

CPU = torch.device("cpu")


class Pair(Run):
    """One run that trains both experts by turns.

    Each half is a run of one expert with its own steps, noise levels, optimizer, learning rate
    and average. What is written, shown and sampled is common. An expert that is not needed lies
    in the CPU's memory, with its optimizer and average.

    Attributes:
        active: the expert on the device.
        moves: how often an expert came to the device.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: Model, cache: LatentCache
    ) -> None:
        self.together = PARTS
        self.config, self.accelerator, self.model, self.cache = config, accelerator, model, cache
        self.out, self.plan = Path(config.out), PLAN
        self.turns = Turns(config)
        self._halves: dict[str, Run] = {}
        self.active: str | None = None
        self.moves = 0
        for part in PARTS:
            own: Any = model._replace(transformer=getattr(model, part), transformer_2=None)
            half = Run(config_of(config, part), accelerator, own, cache, together=PARTS)
            half.name_step = partial(self._name_step, part)
            self._halves[part] = half
            self._move(part, CPU)  # from where Accelerate placed it
        first = self._halves[HIGH]
        self.recipe, self.adapter, self.family = first.recipe, first.adapter, first.family
        self.stopping = self.prolonged = False

    @property
    def halves(self) -> tuple[Run, ...]:
        return tuple(self._halves.values())

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop. The half that takes the step says so to all
        processes."""
        return self._halves[HIGH].stopping

    @stopping.setter
    def stopping(self, asked: bool) -> None:
        for half in self.halves:
            half.stopping = asked

    def bring(self, part: str) -> Run:
        """Bring an expert to the device, after the other one has left it."""
        if self.active != part:
            if self.active is not None:
                self._move(self.active, CPU)
            self.active = None
            self._move(part, self.accelerator.device)
            self.active = part
            self.moves += 1
        return self._halves[part]

    def _move(self, part: str, device: torch.device) -> None:
        half = self._halves[part]
        half.objective.to(device)
        half.state.to(device)

    def _step(self, step: int) -> tuple[float, bool]:
        part, own = self.turns.at(step)
        figures, stop = self.bring(part)._take(own)
        self._log_step(step, figures, part)
        return figures["loss"], stop

    def _ready(self, part: str) -> Run:
        return self.bring(part)

    def _name_step(self, part: str, own: int) -> str:
        return f"step {self.turns.step_of(part, own)}, of {part},"

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}/{name}": x
            for part, half in self._halves.items()
            for name, x in half.state.tensors().items()
        }

    def _numbers(self) -> dict[str, Any]:
        return {"experts": {part: half.state.numbers() for part, half in self._halves.items()}}

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for part, half in self._halves.items():
            own = {
                name.removeprefix(f"{part}/"): x
                for name, x in tensors.items()
                if name.startswith(f"{part}/")
            }
            half.state.restore(own, numbers["experts"][part])

    def _teachers(self) -> str | None:
        found = [half.recipe.teacher for half in self.halves]
        return None if None in found else " ".join(map(str, found))

    def _artefact(self) -> Any:
        writers = {}
        for part, half in self._halves.items():
            with half.state.averaged():
                writers[part] = half.adapter.writer(whole)
        return partial(writers[HIGH], second=writers[LOW])

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Let the pipeline bring each expert when it calls it.

        The first is there from the beginning, as a pipeline runs on the device of its first
        model.
        """
        hooks = []
        for part, half in self._halves.items():

            def before(module: Any, args: Any, part: str = part) -> None:
                self.bring(part)

            hooks.append(half.model.transformer.register_forward_pre_hook(before, prepend=True))
        self.bring(HIGH)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
