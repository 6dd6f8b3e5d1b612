"""One training: its steps, its checkpoints, and what shows how it goes."""

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.recipe import Recipe, sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import family_for
from gen_accel.attention_processors.lengths import temporal_patch
from gen_accel.attention_processors.methods.options import method_from, saved_options
from gen_accel.endings import answered, leave_closed_terminal
from gen_accel.extras import needed_for
from gen_accel.files import replacing, room_told
from gen_accel.lora import checkpoint
from gen_accel.lora.activations import checkpoint_activations
from gen_accel.lora.adapters import fields_of_lora, put_on
from gen_accel.lora.artefact import held_guidance, teacher_hash
from gen_accel.lora.base import cast_base
from gen_accel.lora.batches import PLAN, Batches, plan_clips
from gen_accel.lora.caching.inputs import FIRST_FRAME
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import Stage, TrainConfig
from gen_accel.lora.fixed_loss import Figures, FixedLoss
from gen_accel.lora.loss import Loss
from gen_accel.lora.memory import peak_gb
from gen_accel.lora.model import Model
from gen_accel.lora.objective import Objective, seed_of
from gen_accel.lora.processes import by_main
from gen_accel.lora.progress import Bar, Clock
from gen_accel.lora.report import LOGS, METRICS, Page, record_of
from gen_accel.lora.resume import about_data, check_agreement, plan_of
from gen_accel.lora.sharing import Groups, share
from gen_accel.lora.state import TrainingState, whole
from gen_accel.lora.swapping import Swapper
from gen_accel.lora.validate import FOLDER, Validation, steps_above
from gen_accel.method import on_device
from gen_accel.names import EXPERTS
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.long_video.rope import apply_rule

with needed_for("training", extra="train"):
    from accelerate import Accelerator
    from accelerate.utils import set_seed

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Args:
        folder: folder of the trained adapter; None if the training was interrupted.
        losses: loss of each step that this run made.
        lines: where the videos and the report are, the loss from and to, and the command that uses
            the result, for people; of the main process alone.
    """

    folder: Path | None
    steps: int
    losses: list[float]
    seconds: float
    lines: tuple[str, ...] = ()


class Run:
    """One training, from the first check to the files on disk.

    Args:
        together: the parts of the pipeline that train in one run; empty where it is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: Model,
        cache: LatentCache,
        *,
        together: tuple[str, ...] = (),
    ) -> None:
        self.together = together
        self.name_step: Callable[[int], str] = lambda step: f"step {step}"  # for people
        self.config, self.accelerator, self.model, self.cache = config, accelerator, model, cache
        self.out = Path(config.out)
        self.family = family_for(model.transformer, "training")
        self.groups = Groups.of(config, accelerator)
        self.plans, self.plan = plan_clips(config, model, cache, self.groups.count), PLAN
        self.method = on_device(method_from(config.method, config.settings), accelerator.device)
        self.recipe = self._recipe()
        self.stopping = self.prolonged = False

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
                record=False,
            )
        self.adapter = put_on(config, model, self.handle, self.recipe, cache)
        share(transformer, self.groups, accelerator.device)
        kind = config.gradient_checkpointing
        checkpoint_activations(transformer, kind, parts=config.checkpoint_parts)
        self.objective = Objective(
            transformer,
            self.family,
            config.objective,
            self.adapter,
            guidance=config.teacher_guidance,
            schedule=model.schedule,
            loss=Loss.of(config),
        )
        cast_training_params([self.objective], dtype=torch.float32)
        cast_base(transformer, config)
        swaps = config.blocks_to_swap > 0
        self.swapper = None
        if swaps:
            waiting = transformer, config.blocks_to_swap, accelerator.device
            self.swapper = Swapper(self.objective, *waiting)
        transformer.train()
        self.batches = Batches(config, model, cache, self.adapter, accelerator)
        self.state = TrainingState(self.objective, config, accelerator, is_placed=swaps)

    def go(self, resume: bool) -> Trained:
        config, accelerator = self.config, self.accelerator
        start = self._resume() if resume else 0
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            _cut_metrics(self.out / METRICS, start)
        self._see(start)
        accelerator.init_trackers("gen_accel", config=_loggable(config))
        began, losses, done = time.perf_counter(), [], start
        with self.page.told(), self._stopping(), self.bar.open():
            self._look(start, first=True)
            for step in range(start, config.total_steps):
                loss, stop = self._step(step)
                losses.append(loss)
                done = step + 1
                last = done == config.total_steps
                if done % config.checkpoint_every == 0 or last or stop:
                    self._save(done)
                self._look(done, stops=stop and not last)
                if stop and not last:
                    break
        folder = None
        if done == config.total_steps:
            folder = self._write(self.out / self.adapter.FOLDER)
        accelerator.end_training()
        lines = self.page.end(done, folder)
        return Trained(folder, done, losses, time.perf_counter() - began, lines)

    def _see(self, start: int) -> None:
        """Make what shows how the training goes: losses at fixed noise, videos, bar and page."""
        config, main = self.config, self.accelerator.is_main_process
        self.validation = self._validation()
        self.fixed = self._fixed_losses() if config.loss_every else {}
        passes = sum(len(one.clips) * len(one.levels) for one in self.fixed.values())
        calls = {"loss": passes // self.groups.count, "validation": 0}
        if self.validation is not None:
            calls["validation"] = self.validation.calls
        every = {"loss": config.loss_every, "validation": config.validate_every}
        self.clock = Clock(config, every, calls)
        self.bar = Bar(self.clock, start, shown=main)
        self.page = Page(self.out, config, self.recipe, shown=main)

    def _look(self, done: int, *, first: bool = False, stops: bool = False) -> None:
        """Measure, sample and report after `done` steps, each where it is due.

        Args:
            first: before the first step of this run.
            stops: the run was asked to stop; it measures when it goes on.
        """
        validation = self.validation
        anew = first and (done == 0 or self.prolonged)
        if self.fixed and not stops and (anew or self.clock.is_due("loss", done)):
            self._measure(done)
        is_due = self.clock.is_due("validation", done) and (not first or done == 0)
        if validation is not None and is_due:
            if first and self.accelerator.distributed_type.value == "FSDP":
                self._run_outermost()
            self._validate(validation, done)
        saved = done % self.config.checkpoint_every == 0 or done == self.config.total_steps
        if first or saved or stops or is_due or self.clock.is_due("loss", done):
            self.page.write(done)

    def _fixed_losses(self) -> dict[str, FixedLoss]:
        """Make what measures each transformer that trains, by its part."""
        return {
            half.config.part: FixedLoss(
                half.config, half.model, self.cache, half.batches, self.accelerator
            )
            for half in self.halves
        }

    def _measure(self, done: int) -> None:
        """Measure the loss at fixed noise, and log it."""
        name = "held-out loss" if self.config.held_out else "loss at fixed noise"
        count = len(self.fixed)
        with self.bar.beside("loss") as show:
            for number, (part, fixed) in enumerate(self.fixed.items()):
                began, half = time.perf_counter(), self._ready(part)

                def tell(i: int, total: int, number: int = number) -> None:
                    show(f"{name}, {i}/{total}", (number + i / total) / count)

                with half.state.averaged():
                    figures = fixed(done, half.state.wrapped, half._rule, tell)
                self._log_fixed(figures, time.perf_counter() - began, half)

    def _log_fixed(self, figures: Figures, seconds: float, half: "Run") -> None:
        name = f"fixed_loss/{half.config.part}" if self.parts else "fixed_loss"
        by_level = {f"{name}/{level}": x for level, x in figures.levels.items()}
        with room_told(self.out / LOGS):
            self.accelerator.log({name: figures.mean} | by_level, step=figures.after)
        if self.accelerator.is_main_process:
            record = record_of(figures) | ({"part": half.config.part} if self.parts else {})
            if record not in self.page.records:  # as where a resumed run measures again
                note(self.out / METRICS, {**record, "seconds": seconds})
                self.page.records.append(record)
            self.bar.fixed(self.page.fixed_words())

    @torch.no_grad()
    def _run_outermost(self) -> None:
        """Run the outermost module once, before validation runs an inner one.

        FSDP takes the module that runs first for the outermost.
        """
        clips = self.plans[0][0]
        frames = self.model.frames(self.batches.frames_of(self.config.curriculum[0], clips))
        self.state.wrapped(*self.batches(0, clips, frames, 0))

    def _step(self, step: int) -> tuple[float, bool]:
        """Take one optimizer step. Returns the mean loss of all processes, and whether to stop."""
        figures, stop = self._take(step)
        self._log_step(step, figures)
        return figures["loss"], stop

    def _take(self, step: int) -> tuple[dict[str, float], bool]:
        """Take one optimizer step. Returns its figures, and whether to stop."""
        began = time.perf_counter()
        number, stage, inside = self.config.stage_at(step)
        # Other random numbers, such as dropout's, depend on the step too.
        rank = self.accelerator.process_index
        torch.manual_seed(seed_of(self.config.seed, step, 1 + rank + 10**9))
        clips = self.plans[number][inside]
        stage = replace(stage, frames=self.batches.frames_of(stage, clips))
        with self._rule(stage):
            loss, norm, stop = self._descend(step, stage, clips)
        figures = {
            "loss": loss,
            "learning_rate": self.state.advance(),
            "grad_norm": norm,
            "frames": stage.frames,
            "seconds": time.perf_counter() - began,
        }
        if (peak := peak_gb(self.accelerator.device)) is not None:
            figures["memory_gb"] = peak
        return figures, stop

    def _log_step(self, step: int, figures: dict[str, float], part: str | None = None) -> None:
        """Log a step's figures.

        Args:
            part: the expert that took it, of two.
        """
        of = {} if part is None else {"part": part}
        with room_told(self.out / LOGS):
            self.accelerator.log(
                figures if part is None else {f"{k}/{part}": x for k, x in figures.items()},
                step=step,
            )
        if self.accelerator.is_main_process:
            note(self.out / METRICS, {"step": step, **of, **figures})
        self.bar.step(step, figures["loss"], figures["seconds"], part)

    def _descend(self, step: int, stage: Stage, clips: list[int]) -> tuple[float, float, bool]:
        """Run all micro-steps of a step.

        Returns the mean loss over all processes, the norm of the gradients, and whether to stop
        after the step.
        """
        mean, norm, count = 0.0, None, self.config.gradient_accumulation
        told, frames = (math.nan, False), self.model.frames(stage.frames)
        for micro in range(count):
            with self.accelerator.accumulate(self.state.wrapped):
                loss = self.state.wrapped(*self.batches(step, clips, frames, micro))
                mean += loss.item() / count
                self.accelerator.backward(self.groups.summed(loss))
                if self.accelerator.sync_gradients:
                    norm = self.state.clip()
                    told = self._agree(step, mean, norm)
                self.state.update()
        return told[0], math.nan if norm is None else norm, told[1]

    def _agree(self, step: int, mean: float, norm: float | None) -> tuple[float, bool]:
        """Reduce the loss over all processes, before any of them changes a parameter.

        Returns the mean loss, and whether any process was asked to stop. Raises ValueError in all
        processes for a loss or a gradient that is not finite.
        """
        broken = norm is not None and not math.isfinite(norm) and not self.state.scales_down
        own = [mean, float(self.stopping), float(broken)]
        told: Any = torch.tensor(own, device=self.accelerator.device)
        told = self.accelerator.reduce(told, "mean")
        loss, stopping, breaking = told.tolist()
        if not math.isfinite(loss):
            raise ValueError(self._diverged(f"the loss of {self.name_step(step)} is {loss}"))
        if breaking:
            named = self.name_step(step)
            raise ValueError(self._diverged(f"the gradient of {named} is not finite"))
        return loss, stopping > 0

    def _diverged(self, what: str) -> str:
        saved = checkpoint.found(self.out / CHECKPOINTS)
        back = f"--resume goes on from {saved[-1].name}" if saved else "no checkpoint is there yet"
        return (
            f"{what}: lower learning_rate, or use mixed_precision bf16 or no, in a new run, which "
            f"may start from the {self.adapter.FOLDER} of a checkpoint; {back}"
        )

    @contextmanager
    def _rule(self, stage: Stage) -> Iterator[None]:
        """Apply a stage's rule on the rotary frequencies inside the context."""
        trained = self.model.trained_frames
        if stage.rope == "none" or trained is None or stage.frames <= trained:
            yield
            return
        patch = temporal_patch(self.model.transformer)
        lengths = {
            "frames": self.model.frames(stage.frames) // patch,
            "trained": self.model.frames(trained) // patch,
        }
        applied = apply_rule(self.model.transformer, stage.rope, **lengths)
        try:
            yield
        finally:
            applied.remove()

    def _recipe(self) -> Recipe:
        config, model = self.config, self.model
        rules = [s.rope for s in config.curriculum if s.frames == config.longest]
        return Recipe(
            base_model=config.model,
            transformer=sizes(model.transformer),
            part=config.part,
            parts=self.together,
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
            condition=_recorded(config, model.condition),
            clips=len(self.cache),
            batch=config.batch_size * config.gradient_accumulation * self.groups.count,
        )

    def _save(self, done: int) -> None:
        """Write a checkpoint after `done` steps. All processes must call this; one writes."""
        tensors = self._tensors()
        about = {
            "step": done,
            "config": json.loads(json.dumps(asdict(self.config))),
            **self._about(),
        }
        save = partial(
            checkpoint.save,
            self.out / CHECKPOINTS,
            tensors,
            about | self._numbers(),
            keep=self.config.keep_checkpoints,
            adapter=(self.adapter.FOLDER, self._artefact()),
        )
        by_main(self.accelerator, save)

    def _resume(self) -> int:
        """Restore the newest whole checkpoint. Returns the number of steps done by then."""
        found = checkpoint.load_newest(self.out / CHECKPOINTS)
        if found is None:
            raise ValueError(f"no checkpoint in {self.out / CHECKPOINTS} is whole and finite")
        config, about = self.config, self._about()
        flag = "init_lora" if config.adapter == "lora" else "init_adapter"
        start = f"--{flag.replace('_', '-')} {found.path / self.adapter.FOLDER}"
        check_agreement(found.path, found.state, about, config, start=start)
        self.prolonged = found.state["config"].get("stages") != list(config.stages)
        self.plan = plan_of(found.state)
        if self.plan != PLAN:
            for half in self.halves:
                args = half.config, half.model, self.cache, half.groups.count
                half.plans = plan_clips(*args, version=self.plan)
        self._restore(found.tensors, found.state)
        if self.accelerator.is_main_process:  # finish what a killed run may have begun
            checkpoint.prune(found.path.parent, found.path, keep=self.config.keep_checkpoints)
        self.accelerator.print(f"resumed after step {found.state['step']} from {found.path}")
        return found.state["step"]

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint records beside the config: all that the training depends on."""
        return about_data(self.config, self.model, self.cache) | {
            "plan": self.plan,
            "teacher": self._teachers(),
            "processes": self.groups.count,
        }

    @property
    def halves(self) -> "tuple[Run, ...]":
        """Return the run of each transformer: this one, or one for each of two experts."""
        return (self,)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the experts where two train; else empty."""
        return ()

    def _ready(self, part: str) -> "Run":
        """Return what trains a part, which is on the device from now on."""
        return self

    def _tensors(self) -> dict[str, Tensor]:
        return self.state.tensors()

    def _numbers(self) -> dict[str, Any]:
        return self.state.numbers()

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.state.restore(tensors, numbers)

    def _teachers(self) -> str | None:
        """Return a hash of the teacher's LoRA; None without one."""
        return self.recipe.teacher

    def _sampling(self) -> AbstractContextManager[None]:
        """Return a context in which the pipeline calls what trains."""
        return nullcontext()

    def _artefact(self) -> Callable[[Path], Any]:
        """Return a function that writes the present weights, or their average if one is kept."""
        with self.state.averaged():
            return self.adapter.writer(whole)

    def _write(self, folder: Path) -> Path:
        by_main(self.accelerator, partial(self._artefact(), folder))
        return folder

    def _validation(self) -> Validation | None:
        if not self.config.validate_every:
            return None
        assert self.model.pipe is not None
        folder = self.out / FOLDER
        return Validation(
            self.config,
            self.model.pipe,
            folder,
            self.accelerator,
            self.adapter,
            trained_frames=self.model.trained_frames,
            prompts=self.model.prompts,
            pictures=self.cache.picture if self.model.condition == FIRST_FRAME else None,
        )

    def _validate(self, validation: Validation, done: int) -> None:
        recipe = self.recipe
        stage: Any = Stage(recipe.frames, 1, recipe.rope)  # pyright: ignore[reportArgumentType]
        prompts = len(self.config.validation_prompts)
        with self.bar.beside("validation") as part:

            def tell(i: int, step: int, steps: int) -> None:
                if step == 0:  # a pipeline runs where its first model is
                    self._ready(EXPERTS[0])
                words = f"validation {i + 1}/{prompts}, step {step}/{steps}"
                part(words, (i + step / steps) / prompts)

            validation.tell = tell
            with ExitStack() as stack:
                for half in self.halves:
                    stack.enter_context(half._as_used(stage))
                stack.enter_context(self._sampling())
                validation(done)

    @contextmanager
    def _as_used(self, stage: Stage) -> Iterator[None]:
        """Put the transformer as it generates inside the context: with the average, the longest
        stage's rule, and the schedule beside the LoRA."""
        schedule = self._schedule_in_pipe()
        self.model.transformer.eval()
        with self.state.averaged(), self._rule(stage), self.handle.scheduled(schedule):
            yield
        self.model.transformer.train()

    def _schedule_in_pipe(self) -> Schedule:
        """Return the schedule of the validation videos. The expert for low noise, which counts its
        own steps, begins after those of the other one."""
        schedule: Any = self.recipe.build_schedule()
        model, steps = self.model, self.config.validation_steps
        if self.config.part != EXPERTS[1] or model.boundary is None:
            return schedule
        before = steps_above(model.pipe, steps, model.boundary)
        return replace(schedule, dense_steps=max(0, schedule.dense_steps - before))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop the training after the step at the first Ctrl-C, SIGTERM or SIGHUP, and at once at
        the second."""

        def ask(number: int, frame: Any) -> None:
            leave_closed_terminal()
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.accelerator.print("stopping after this step; once more to stop at once")

        before = {}
        with suppress(ValueError):  # not the main thread, as in a notebook's worker
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, *answered())}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _recorded(config: TrainConfig, condition: str) -> str:
    """Return a recipe's condition: "either" where some clips were shown without first frame."""
    return "either" if config.first_frame_dropout else condition


def _loggable(config: TrainConfig) -> dict[str, Any]:
    """Convert a config to numbers and text, the only values that TensorBoard takes."""
    return {
        k: v if isinstance(v, int | float | str | bool) else str(v)
        for k, v in asdict(config).items()
    }


def note(path: Path, figures: dict[str, Any]) -> None:
    """Add a line of JSON to a file. Raises OSError; for a full disk NoRoom, which names it."""
    with room_told(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def _cut_metrics(path: Path, steps: int) -> None:
    """Drop the lines of steps that will run again and of losses after them, and half lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            told = json.loads(line)
            if told["step"] < steps if "step" in told else told["after"] <= steps:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with replacing(path) as new:
        new.write_text("".join(kept), encoding="utf-8")
