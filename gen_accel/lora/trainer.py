"""Train a LoRA or an image prompt through sparse attention, on videos of any length."""

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from torch import Tensor, nn

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.recipe import Recipe, sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import family_for
from gen_accel.attention_processors.methods.options import method_from, saved_options
from gen_accel.extras import needed_for
from gen_accel.files import replacing
from gen_accel.lora import checkpoint
from gen_accel.lora.adapters import fields_of_lora, put_on
from gen_accel.lora.artefact import held_guidance, teacher_hash
from gen_accel.lora.config import Stage, TrainConfig, differences
from gen_accel.lora.latents import LatentCache
from gen_accel.lora.model import Model
from gen_accel.lora.objective import SIGMAS, Objective, draw, order, seed_of
from gen_accel.lora.validate import Validation
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.sampling import steps_bar
from gen_accel.pipelines.long_video.rope import apply_rule

with needed_for("training", extra="train"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
STEADY = 0.95  # of the running mean that the bar shows


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        folder: of what was trained; None where it was interrupted.
        losses: of each step that this run made.
    """

    folder: Path | None
    steps: int
    losses: list[float]
    seconds: float


def train(config: TrainConfig, *, resume: bool = False) -> Trained:
    """Cache what is not cached yet, train, and leave a LoRA in `config.out/lora`, or an image
    prompt in `config.out/image_prompt`.

    Runs by itself or under `accelerate launch`. An interruption (Ctrl-C, SIGTERM) is answered
    with a checkpoint after the step under way; a second one ends at once.

    Args:
        resume: go on from the newest whole checkpoint in `config.out`, bit by bit as if nothing
            had happened.

    Raises:
        ValueError: whatever in `config` does not fit the model, the clips or an earlier run, all
            of it before the first step.
        OSError: a model, folder or file that is not there.
    """
    from gen_accel.lora.prepare import prepare

    check_out(config, resume)
    accelerator = accelerator_for(config)
    model, cache = prepare(config, accelerator)
    return run(config, accelerator, model, cache, resume=resume)


def accelerator_for(config: TrainConfig) -> Accelerator:
    if config.optimizer == "adamw8bit":
        _bitsandbytes()
    if not torch.distributed.is_initialized():  # else a second run keeps the first one's precision
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # Not as a number, in place of which the launcher's is taken.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation),
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=str(Path(config.out) / "logs"),
        # Said here, as a launcher of several processes does not pass it on.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        step_scheduler_with_optimizer=False,
        # The others wait while one process encodes the clips.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if config.adapter == "image_prompt" and accelerator.distributed_type.value == "FSDP":
        raise ValueError(
            "adapter image_prompt needs the model whole in each process, FSDP cuts it into parts: "
            "launch with configs/accelerate/ddp.yaml"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU: take bf16 or no")
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation,
            "gradient_clipping": config.max_grad_norm,
        }
    return accelerator


def check_out(config: TrainConfig, resume: bool) -> None:
    """Refuse to mix two runs, before anything is loaded."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, but {out} is a file")
    earlier = checkpoint.found(out / CHECKPOINTS)
    if resume and not earlier:
        raise ValueError(f"nothing to resume: {out / CHECKPOINTS} holds no checkpoint")
    if not resume and earlier:
        raise ValueError(
            f"{out} holds a run of {earlier[-1].name}: go on with --resume, or give another --out"
        )


def run(
    config: TrainConfig,
    accelerator: Accelerator,
    model: Model,
    cache: LatentCache,
    *,
    resume: bool = False,
) -> Trained:
    """`train` with the model and the latents at hand."""
    return _Run(config, accelerator, model, cache).go(resume)


class _Run:
    """One training, from the first check to what is left on disk."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: Model, cache: LatentCache
    ) -> None:
        self.config, self.accelerator, self.model, self.cache = config, accelerator, model, cache
        self.out = Path(config.out)
        self.family: Any = family_for(model.transformer, "training")
        self.plans = [self._clips(*numbered) for numbered in enumerate(config.curriculum)]
        self.method = method_from(config.method, config.settings)
        self.recipe = self._recipe()
        self.stopping = False

        transformer = model.transformer
        transformer.requires_grad_(False)
        set_seed(config.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the linear branch")
            self.handle = attach(
                transformer,
                self.method,
                schedule=Schedule(dense_layers=config.dense_layers),
                kernel=config.kernel,
            )
        self.adapter = put_on(config, model, self.handle, self.recipe, cache)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.objective = Objective(
            transformer,
            self.family,
            config.objective,
            self.adapter,
            guidance=config.teacher_guidance,
        )
        cast_training_params([self.objective], dtype=torch.float32)
        transformer.train()
        self.names = [n for n, p in self.objective.named_parameters() if p.requires_grad]

        optimizer = self._optimizer()
        self.schedule = get_scheduler(
            config.schedule if config.schedule != "constant" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.total_steps,
        )
        self.wrapped, self.optimizer = accelerator.prepare(self.objective, optimizer)
        self.ema = None
        if config.ema_decay:
            self.ema = EMAModel(self._parameters(), decay=config.ema_decay)
            self.ema.to(device=accelerator.device)

    def go(self, resume: bool) -> Trained:
        config, accelerator = self.config, self.accelerator
        start = self._resume() if resume else 0
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.clear_partial(self.out)
            checkpoint.clear_partial(self.out / CHECKPOINTS)
            _cut_metrics(self.out / METRICS, start)
        validation = self._validation()
        accelerator.init_trackers("gen_accel", config=_loggable(config))
        began, losses, step = time.perf_counter(), [], start
        with self._stopping(), self._bar(start) as tick:
            if start == 0 and validation is not None:
                if accelerator.distributed_type.value == "FSDP":
                    self._run_outermost()
                self._validate(validation, 0)
            for step in range(start, config.total_steps):
                loss, stop = self._step(step)
                losses.append(loss)
                tick(step, loss)
                done = step + 1
                last = done == config.total_steps
                if done % config.checkpoint_every == 0 or last or stop:
                    self._save(done)
                if validation is not None and (done % config.validate_every == 0 or last):
                    self._validate(validation, done)
                if stop and not last:
                    accelerator.end_training()
                    return Trained(None, done, losses, time.perf_counter() - began)
        folder = self._write(self.out / self.adapter.FOLDER)
        accelerator.end_training()
        return Trained(folder, config.total_steps, losses, time.perf_counter() - began)

    @torch.no_grad()
    def _run_outermost(self) -> None:
        """FSDP takes what runs first for the outermost module; validation runs an inner one."""
        _, stage, _ = self._stage(0)
        self.wrapped(*self._batch(0, self.plans[0][0], self.model.frames(stage.frames), 0))

    def _step(self, step: int) -> tuple[float, bool]:
        """One optimizer step; the mean loss over all processes, and whether to stop."""
        config, accelerator = self.config, self.accelerator
        began = time.perf_counter()
        number, stage, inside = self._stage(step)
        clips, mean = self.plans[number][inside], 0.0
        frames = self.model.frames(stage.frames)
        # What else draws random numbers, such as dropout, goes by the step too.
        torch.manual_seed(seed_of(config.seed, step, 1 + accelerator.process_index + 10**9))
        with self._rule(stage):
            for micro in range(config.gradient_accumulation):
                with accelerator.accumulate(self.wrapped):
                    batch = self._batch(step, clips, frames, micro)
                    loss = self.wrapped(*batch)
                    mean += loss.item() / config.gradient_accumulation
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = self._clip()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        told: Any = torch.tensor([mean, float(self.stopping)], device=accelerator.device)
        told = accelerator.reduce(told, "mean")
        loss, stop = told.tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {step} is {loss}: lower learning_rate, or use mixed_precision "
                "bf16 or no; the last checkpoint is untouched"
            )
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self._parameters())
        figures = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,  # pyright: ignore[reportPossiblyUnboundVariable]
            "frames": stage.frames,
            "seconds": time.perf_counter() - began,
        }
        accelerator.log(figures, step=step)
        if accelerator.is_main_process:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        return loss, stop > 0

    def _batch(self, step: int, clips: list[int], frames: int, micro: int) -> tuple:
        """This process's clips of a micro-step: latents, noise, noise levels, conditions, those of
        the teacher, those without a caption, and what the adapter is shown beside."""
        config, accelerator = self.config, self.accelerator
        size, ranks = config.batch_size, accelerator.num_processes
        first = (micro * ranks + accelerator.process_index) * size
        latents, conditions, draws = [], [], []
        numbers = clips[first : first + size]
        for place in range(first, first + size):
            clean = self.cache.latents(clips[place], frames)
            drawn = draw(
                config,
                step,
                place,
                clean.shape,
                shift=self.model.shift,
                sigmas=_sigmas(config, self.model),
            )
            shown = self.cache.conditions(clips[place]) if drawn.captioned else self.cache.empty
            latents.append(clean)
            conditions.append(shown)
            draws.append(drawn)
        put = partial(torch.Tensor.to, device=accelerator.device)

        def together(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: put(torch.stack([one[name] for one in each])) for name in each[0]}

        taught = untold = None
        if config.objective != "flow":
            taught = self.adapter.taught(self.cache, numbers, draws)
        if config.teacher_guidance > 1:
            untold = together([self.cache.empty] * size)
        return (
            put(torch.stack(latents)),
            put(torch.stack([drawn.noise for drawn in draws])),
            put(torch.tensor([drawn.sigma for drawn in draws])),
            together(conditions),
            None if taught is None else together(taught),
            untold,
            *map(put, self.adapter.inputs(self.cache, numbers, draws)),
        )

    def _clip(self) -> float:
        limit = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self._parameters(), limit)
        return float(norm) if norm is not None else math.nan

    def _stage(self, step: int) -> tuple[int, Stage, int]:
        """Number and stage that a step belongs to, and which of its steps it is."""
        for number, stage in enumerate(self.config.curriculum):
            if step < stage.steps:
                return number, stage, step
            step -= stage.steps
        raise IndexError(step)

    def _clips(self, number: int, stage: Stage) -> list[list[int]]:
        """Which clips each step of a stage shows; ValueError where none is long enough."""
        config, frames = self.config, self.model.frames(stage.frames)
        buckets = self.cache.buckets(frames)
        if not buckets:
            longest = max((entry.pixel_frames for entry in self.cache.entries), default=0)
            raise ValueError(
                f"no clip is long enough for stage {stage}: {stage.frames} frames are needed, the "
                f"longest of {len(self.cache)} has {longest}"
            )
        batch = config.batch_size * config.gradient_accumulation * self.accelerator.num_processes
        chosen = [buckets[size] for size in sorted(buckets)]
        return order(chosen, stage.steps, batch, seed_of(config.seed, number, stage.steps))

    @contextmanager
    def _rule(self, stage: Stage) -> Iterator[None]:
        """The rotary frequencies of a stage."""
        trained = self.model.trained_frames
        if stage.rope == "none" or trained is None or stage.frames <= trained:
            yield
            return
        lengths = {
            "frames": self.model.frames(stage.frames),
            "trained": self.model.frames(trained),
        }
        applied = apply_rule(self.model.transformer, stage.rope, **lengths)
        try:
            yield
        finally:
            applied.remove()

    def _parameters(self) -> list[nn.Parameter]:
        """Those that train, in an order that the wrapping does not change."""
        return [p for p in self.wrapped.parameters() if p.requires_grad]

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        kind: Any = torch.optim.AdamW if config.optimizer == "adamw" else _bitsandbytes()
        return kind(
            [p for p in self.objective.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def _recipe(self) -> Recipe:
        config, model = self.config, self.model
        rules = [s.rope for s in config.curriculum if s.frames == config.longest]
        return Recipe(
            base_model=config.model,
            transformer=sizes(model.transformer),
            part=config.part,
            method=method_name(self.method),
            options=saved_options(self.method),
            schedule={"dense_layers": config.dense_layers, "dense_steps": config.dense_steps},
            rope=rules[-1],
            trained_frames=model.trained_frames,
            frames=config.longest,
            height=config.height,
            width=config.width,
            stages=tuple(str(stage) for stage in config.curriculum),
            steps=config.total_steps,
            **fields_of_lora(config),
            objective=config.objective,
            data=self.cache.digest,
            teacher_guidance=held_guidance(config),
            teacher=teacher_hash(config),
            techniques=config.sample_with,
        )

    def _save(self, done: int) -> None:
        """A checkpoint after `done` steps. All processes take part, one writes."""
        parameters = dict(zip(self.names, map(_whole, self._parameters()), strict=True))
        tensors = {f"model/{name}": x for name, x in parameters.items()}
        if self.ema is not None:
            average = map(_whole, self.ema.shadow_params)
            tensors |= {f"ema/{n}": x for n, x in zip(self.names, average, strict=True)}
        tensors |= self._optimizer_tensors()
        scaler = self.accelerator.scaler
        state = {
            "step": done,
            "config": _plain(self.config),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": self.ema.optimization_step if self.ema is not None else None,
            "optimizer": self.accelerator.distributed_type.value,
            "data": self.cache.digest,
            "teacher": self.recipe.teacher,
            "processes": self.accelerator.num_processes,
        }
        artefact = self._artefact()
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.out / CHECKPOINTS,
                tensors,
                state,
                keep=self.config.keep_checkpoints,
                adapter=(self.adapter.FOLDER, artefact),
            )
        self.accelerator.wait_for_everyone()

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        if self.accelerator.distributed_type.value == "DEEPSPEED":  # it alone knows where they are
            return {}
        tensors = {}
        for name, parameter in zip(self.names, self._parameters(), strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                value = value if isinstance(value, Tensor) else torch.tensor(value)
                tensors[f"optimizer/{name}/{key}"] = _whole(value)
        return tensors

    @torch.no_grad()
    def _resume(self) -> int:
        """Put everything where the newest whole checkpoint left it; the steps done by then."""
        found = checkpoint.load_newest(self.out / CHECKPOINTS)
        if found is None:
            raise ValueError(f"no checkpoint in {self.out / CHECKPOINTS} is whole")
        tensors, state = found.tensors, found.state
        changed = differences(self.config, state["config"])
        if state["data"] != self.cache.digest:
            changed["data (clips and captions)"] = (state["data"][:12], self.cache.digest[:12])
        before, now = state.get("teacher"), self.recipe.teacher
        if before != now:
            changed["teacher_lora (its weights)"] = (before and before[:12], now and now[:12])
        batch = self.accelerator.num_processes * self.config.batch_size
        if "batch_size" not in changed and state["processes"] * self.config.batch_size != batch:
            changed["processes"] = (state["processes"], self.accelerator.num_processes)
        if changed:
            listed = "; ".join(f"{k}: {a!r}, now {b!r}" for k, (a, b) in changed.items())
            raise ValueError(f"{found.path} is of another run, which differs in {listed}")
        for name, parameter in zip(self.names, self._parameters(), strict=True):
            _fill(parameter, tensors[f"model/{name}"])
        if self.accelerator.state.deepspeed_plugin is not None:  # it trains copies of its own
            self.optimizer.optimizer.refresh_fp32_params()
        if self.ema is not None:
            for name, average in zip(self.names, self.ema.shadow_params, strict=True):
                _fill(average, tensors[f"ema/{name}"])
            self.ema.optimization_step = state["ema_steps"]
        self._resume_optimizer(tensors)
        self.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(
            self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.print(f"resumed after step {state['step']} from {found.path}")
        return state["step"]

    def _resume_optimizer(self, tensors: dict[str, Tensor]) -> None:
        if not any(name.startswith("optimizer/") for name in tensors):
            self.accelerator.print("the optimizer's averages begin anew: DeepSpeed keeps its own")
            return
        for name, parameter in zip(self.names, self._parameters(), strict=True):
            prefix = f"optimizer/{name}/"
            for key, value in tensors.items():
                if key.startswith(prefix):
                    like = _like(parameter, value)
                    self.optimizer.state[parameter][key.removeprefix(prefix)] = like

    def _artefact(self) -> Callable[[Path], Any]:
        """Writes what trains as it is now, its average where one is kept."""
        with self._averaged():
            return self.adapter.writer(_whole)

    def _write(self, folder: Path) -> Path:
        artefact = self._artefact()
        if self.accelerator.is_main_process:
            artefact(folder)
        self.accelerator.wait_for_everyone()
        return folder

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average in the place of the parameters."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._parameters())
        self.ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self.ema.restore(self._parameters())

    def _validation(self) -> Validation | None:
        if not self.config.validate_every:
            return None
        assert self.model.pipe is not None
        folder = self.out / "validation"
        return Validation(
            self.config,
            self.model.pipe,
            folder,
            self.accelerator,
            self.adapter,
            trained_frames=self.model.trained_frames,
        )

    def _validate(self, validation: Validation, done: int) -> None:
        recipe: Any = self.recipe
        as_used = Stage(recipe.frames, 1, recipe.rope), recipe.build_schedule()
        self.model.transformer.eval()
        with self._averaged(), self._rule(as_used[0]), self.handle.scheduled(as_used[1]):
            validation(done)
        self.model.transformer.train()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the training after the step; the second at once."""

        def ask(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.accelerator.print("stopping after this step; once more to stop at once")

        before = {}
        with suppress(ValueError):  # not the main thread, as in a notebook's worker
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _bar(self, start: int) -> Iterator[Callable[[int, float], None]]:
        """A bar with the running loss and the time that remains, on stderr."""
        if not self.accelerator.is_main_process:
            yield lambda step, loss: None
            return
        running = math.nan
        with steps_bar() as bar:
            task = bar.add_task(
                "training", total=self.config.total_steps, completed=start, unit="steps"
            )

            def tick(step: int, loss: float) -> None:
                nonlocal running
                running = loss if math.isnan(running) else STEADY * running + (1 - STEADY) * loss
                _, stage, _ = self._stage(step)
                text = f"{stage.frames} frames, loss {running:.4f}"
                bar.update(task, completed=step + 1, description=text)

            yield tick


def _sigmas(config: TrainConfig, model: Model) -> tuple[float, float]:
    if model.boundary is None:
        return SIGMAS
    if config.part == "transformer":
        return model.boundary, SIGMAS[1]
    return SIGMAS[0], model.boundary


def _whole(x: Any) -> Tensor:
    """On the CPU, put together from the parts that the processes hold."""
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu()


def _like(parameter: Any, value: Tensor) -> Any:
    """`value` on the parameter's device, and cut as the parameter is."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        # Counters of steps stay where the optimizer keeps them.
        return value.clone() if value.ndim == 0 else value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _fill(parameter: Any, value: Tensor) -> None:
    parameter.copy_(_like(parameter, value))


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _loggable(config: TrainConfig) -> dict[str, Any]:
    """TensorBoard takes numbers and text alone."""
    return {
        k: v if isinstance(v, int | float | str | bool) else str(v)
        for k, v in asdict(config).items()
    }


def _cut_metrics(path: Path, steps: int) -> None:
    """Drop the lines of steps that will be made again, and one that was half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < steps:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    with replacing(path) as new:
        new.write_text("".join(kept), encoding="utf-8")


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes"
        ) from None
    return AdamW8bit
