"""State of a training: parameters, their average (EMA), optimizer, learning rate."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.optimizers import averages_itself, new_optimizer
from gen_accel.registry import needed_for

with needed_for("training", extra="train"):
    from accelerate import Accelerator

StateFields = dict[str, Any]  # of a checkpoint's state.json


class TrainingState:
    """The state of one training, which a checkpoint keeps and restores to the bit.

    Args:
        is_placed: whether the objective's parameters lie where they are to be already.

    Attributes:
        names: names of the parameters that train.
        wrapped: the objective, wrapped for the launcher's kind of parallelism.
        schedule: learning-rate schedule.
        ema: moving average of the parameters; None if none is kept.
    """

    def __init__(
        self,
        objective: nn.Module,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        is_placed: bool = False,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.names = [n for n, p in objective.named_parameters() if p.requires_grad]
        trained = [p for p in objective.parameters() if p.requires_grad]
        groups: list[Any] = [*trained]
        if config.lora_plus is not None:
            # Hayou et al., 2024, https://arxiv.org/abs/2402.12354: B alone is faster.
            fast = [p for n, p in zip(self.names, trained, strict=True) if ".lora_B." in n]
            known = {id(parameter) for parameter in fast}
            rate = config.learning_rate * config.lora_plus
            groups = [
                {"params": [p for p in trained if id(p) not in known]},
                {"params": fast, "lr": rate},
            ]
        optimizer = new_optimizer(groups, config)
        self.schedule = learning_rates(optimizer, config)
        if averages_itself(optimizer) and self._is_deepspeed:
            raise ValueError(
                f"optimizer {config.optimizer} averages by itself, which DeepSpeed's copies of "
                "the parameters do not see: launch with configs/accelerate/ddp.yaml"
            )
        if is_placed or config.base is not None:
            # DDP would copy them between processes, each of which has read the same file.
            frozen = [n for n, p in objective.named_parameters() if not p.requires_grad]
            objective._ddp_params_and_buffers_to_ignore = frozen  # pyright: ignore
        self.wrapped, self.optimizer = accelerator.prepare(
            objective, optimizer, device_placement=[False, True] if is_placed else None
        )
        self._averages_itself = averages_itself(optimizer)
        if self._averages_itself:
            self.optimizer.train()
        self.ema = None
        if config.ema_decay:
            self.ema = EMAModel(self.parameters(), decay=config.ema_decay)
            self.ema.to(device=accelerator.device)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that train, in an order independent of the wrapping."""
        return [p for p in self.wrapped.parameters() if p.requires_grad]

    def clip(self) -> float | None:
        """Clip the gradients of a whole step. Returns their norm before clipping, or None if the
        launcher does not report it."""
        limit = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.parameters(), limit)
        return float(norm) if norm is not None else None

    @property
    def scales_down(self) -> bool:
        """Whether float16 loss scaling may be the cause of gradients that are not finite.

        The optimizer then skips the step and the scale is halved. A scale of 1 changes nothing.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def update(self) -> None:
        """Take the optimizer's step, if the micro-step is the last of a step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def advance(self) -> float:
        """Advance the learning rate and the average after a step.

        Returns the learning rate of that step.
        """
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters())
        return rate

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the average in for the parameters, if one is kept.

        Of an optimizer that averages by itself, its own. Switching back would round: the
        parameters are kept, so that a training does not depend on how often it is looked at.
        """
        if self._averages_itself:
            kept = [parameter.detach().clone() for parameter in self.parameters()]
            self.optimizer.eval()
            try:
                yield
            finally:
                self.optimizer.train()
                with torch.no_grad():
                    for parameter, value in zip(self.parameters(), kept, strict=True):
                        parameter.copy_(value)
            return
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Collect the tensors on the CPU, by the names that `restore` reads.

        All processes must call this.
        """
        parameters = zip(self.names, map(whole, self.parameters()), strict=True)
        tensors = {f"model/{name}": x for name, x in parameters}
        if self.ema is not None:
            average = map(whole, self.ema.shadow_params)
            tensors |= {f"ema/{n}": x for n, x in zip(self.names, average, strict=True)}
        return tensors | self._optimizer_tensors()

    def numbers(self) -> StateFields:
        """Collect the rest of the state, fit for JSON."""
        scaler = self.accelerator.scaler
        return {
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": self.ema.optimization_step if self.ema is not None else None,
            "optimizer": self.accelerator.distributed_type.value,
            **self._optimizer_numbers(),
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: StateFields) -> None:
        """Restore the state from `tensors` and `numbers` of an earlier run."""
        for name, parameter in zip(self.names, self.parameters(), strict=True):
            _fill(parameter, tensors[f"model/{name}"])
        if self.accelerator.state.deepspeed_plugin is not None:  # DeepSpeed trains its own copies
            self.optimizer.optimizer.refresh_fp32_params()
        if self.ema is not None:
            for name, average in zip(self.names, self.ema.shadow_params, strict=True):
                _fill(average, tensors[f"ema/{name}"])
            self.ema.optimization_step = numbers["ema_steps"]
        self._restore_optimizer(tensors, numbers)
        self.schedule.load_state_dict(numbers["schedule"])
        # The next step's rate as this run's number of steps has it, which may be another.
        self.schedule._last_lr = [
            base * factor(self.schedule.last_epoch)
            for base, factor in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(
            self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        if self.accelerator.scaler is not None and numbers["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        if self._is_deepspeed:  # holds its tensors privately
            return {}
        state = self.optimizer.state
        kept = {
            f"optimizer/{name}": state.get(parameter, {})
            for name, parameter in zip(self.names, self.parameters(), strict=True)
        }
        groups = enumerate(self.optimizer.param_groups)
        kept |= {f"optimizer group/{i}": group for i, group in groups}
        tensors = {
            f"{place}/{key}": whole(value)
            for place, held in kept.items()
            for key, value in held.items()
            if isinstance(value, Tensor)
        }
        return _apart(tensors)

    def _optimizer_numbers(self) -> StateFields:
        """Collect what an optimizer counts in plain numbers, per parameter and per group.

        AdamW counts in tensors.
        """
        if self.config.optimizer == "adamw" or self._is_deepspeed:
            return {}
        state = self.optimizer.state
        each = {
            name: _plain(state.get(parameter, {}))
            for name, parameter in zip(self.names, self.parameters(), strict=True)
        }
        return {
            "optimizer_numbers": each,
            "optimizer_groups": [_plain(group) for group in self.optimizer.param_groups],
        }

    @property
    def _is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type.value == "DEEPSPEED"

    def _restore_optimizer(self, tensors: Mapping[str, Tensor], numbers: StateFields) -> None:
        kept = any(name.startswith(("optimizer/", "optimizer group/")) for name in tensors)
        if self._is_deepspeed or not (kept or "optimizer_groups" in numbers):
            self.accelerator.print("the optimizer's averages begin again: DeepSpeed keeps its own")
            return
        for i, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                held = tensors.get(f"optimizer group/{i}/{key}")
                if held is not None and isinstance(value, Tensor):
                    group[key] = held.to(value.device)
            group.update(numbers.get("optimizer_groups", {i: {}})[i])
        each = numbers.get("optimizer_numbers", {})
        for name, parameter in zip(self.names, self.parameters(), strict=True):
            prefix = f"optimizer/{name}/"
            for key, value in tensors.items():
                if key.startswith(prefix):
                    held = self.optimizer.state[parameter]
                    held[key.removeprefix(prefix)] = _like(parameter, value)
            if each.get(name):
                self.optimizer.state[parameter].update(each[name])


def learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """Build the schedule of the learning rate over all steps of the config."""
    return get_scheduler(
        config.schedule if config.schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.total_steps,
    )


def whole(x: Tensor) -> Tensor:
    """Gather a tensor's shards from all processes, on the CPU."""
    gather = getattr(x.detach(), "full_tensor", x.detach)
    return gather().cpu()


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return `value` on the parameter's device, sharded like the parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        # Counters of steps stay where the optimizer keeps them.
        return value.clone() if value.ndim == 0 else value.to(parameter.device)
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share their memory with another, such as tables of an 8-bit optimizer."""
    seen: set[int] = set()
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = x.clone()
        seen.add(place)
    return tensors


def _plain(values: StateFields) -> StateFields:
    """Return those values that JSON holds to the bit."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, bool | int | str | None)
        or (isinstance(value, float) and math.isfinite(value))
    }


def _fill(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(_like(parameter, value))
