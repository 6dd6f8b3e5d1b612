"""Two experts that train by turns, with one of them on the device at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import HIGH, LOW, PARTS, Turns
from gen_accel.lora.state import whole

CPU = torch.device("cpu")


class Experts:
    """The trainings of both experts. One that is not needed lies in the CPU's memory, with its
    LoRA, optimizer and average.

    Args:
        device: device of the expert that is needed.
        train: makes the training of a part, a `trainer.Run`, with its expert on the device.

    Attributes:
        halves: the training of each part.
        active: the part on the device; None before the first.
        moves: how often an expert came to the device.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, train: Callable[[str], Any]
    ) -> None:
        self.device, self.turns = device, Turns(config)
        self.halves: dict[str, Any] = {}
        self.active: str | None = None
        self.moves = 0
        for part in PARTS:
            half = self.halves[part] = train(part)
            half.name_step = partial(self._name_step, part)
            self.move(part, CPU)

    def at(self, step: int) -> tuple[str, int]:
        """Return the part that takes a step, and its own number of the step."""
        return self.turns.at(step)

    def bring(self, part: str) -> Any:
        """Bring an expert to the device, after the other one has left it; return its training."""
        if self.active != part:
            if self.active is not None:
                self.move(self.active, CPU)
            self.active = None
            self.move(part, self.device)
            self.active = part
            self.moves += 1
        return self.halves[part]

    def move(self, part: str, device: torch.device) -> None:
        half = self.halves[part]
        half.objective.to(device)
        half.state.to(device)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Let the pipeline bring each expert when it calls it.

        The first is there from the beginning, as a pipeline runs on the device of its first
        model.
        """
        hooks = []
        for part, half in self.halves.items():

            def before(module: Any, args: Any, part: str = part) -> None:
                self.bring(part)

            hooks.append(half.model.transformer.register_forward_pre_hook(before, prepend=True))
        self.bring(HIGH)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """Collect the tensors of both on the CPU, by the names that `restore` reads."""
        return {
            f"{part}/{name}": x
            for part, half in self.halves.items()
            for name, x in half.state.tensors().items()
        }

    def numbers(self) -> dict[str, Any]:
        """Collect the rest of their state, fit for JSON."""
        return {"experts": {part: half.state.numbers() for part, half in self.halves.items()}}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for part, half in self.halves.items():
            begin = f"{part}/"
            own = {k.removeprefix(begin): x for k, x in tensors.items() if k.startswith(begin)}
            half.state.restore(own, numbers["experts"][part])

    def teachers(self) -> str | None:
        """Return the hashes of the teachers' LoRAs; None without."""
        found = [half.recipe.teacher for half in self.halves.values()]
        return None if None in found else " ".join(found)

    def writer(self) -> Callable[..., Any]:
        """Return a function that writes both LoRAs as they are now into a given folder."""
        writers = {}
        for part, half in self.halves.items():
            with half.state.averaged():
                writers[part] = half.adapter.writer(whole)
        return partial(writers[HIGH], second=writers[LOW])

    def _name_step(self, part: str, own: int) -> str:
        return f"step {self.turns.step_of(part, own)}, of {part},"
