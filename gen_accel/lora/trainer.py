"""Train a LoRA or an image prompt through sparse attention, on videos of any length."""

import gc
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.recipe import Recipe, read_recipe, sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.registry import method_from, saved_options
from gen_accel.io import room_told
from gen_accel.lora import checkpoint
from gen_accel.lora.adapters import ImagePromptAdapter, Lora, fields_of_lora
from gen_accel.lora.artefact import held_guidance, join_experts, teacher_hash, weights_file
from gen_accel.lora.batches import Batches, epoch_steps, levels_of, plan_clips, seed_of
from gen_accel.lora.caching.inputs import FIRST_FRAME, TEXT
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.causal import stream_of
from gen_accel.lora.config import CHECKPOINTS, LOGS, Stage, TrainConfig
from gen_accel.lora.evaluate import FOLDER, FixedLoss, Validation, steps_above
from gen_accel.lora.experts import BOTH, LOW
from gen_accel.lora.memory import (
    Swapper,
    check_allocations,
    checkpoint_activations,
    peak_gb,
)
from gen_accel.lora.model import ModelToTrain, cast_base
from gen_accel.lora.objective import Objective
from gen_accel.lora.processes import ProcessGroups, accelerator_for, alone_in, by_main, share
from gen_accel.lora.progress import Bar, RemainingTime
from gen_accel.lora.report import METRICS, TrainingPage, cut_metrics
from gen_accel.lora.state import StateFields, TrainingState, whole
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.lora_file import FACTORED, load_factored
from gen_accel.pipelines.long_video import apply_rule
from gen_accel.process import answered, leave_closed_terminal
from gen_accel.registry import needed_for
from gen_accel.video import temporal_patch

with needed_for("training", extra="train"):
    from accelerate import Accelerator, PartialState
    from accelerate.utils import set_seed


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Args:
        folder: folder of the trained adapter; None if the training was interrupted.
        losses: loss of each step that this run made.
        lines: where videos and report are, the first and the last loss, and the command that uses
            the result, for people; of the main process alone.
    """

    folder: Path | None
    steps: int
    losses: list[float]
    seconds: float
    lines: tuple[str, ...] = ()


def train(config: TrainConfig, *, resume: bool = False) -> Trained:
    """Cache the missing clips, train, and write a LoRA to `config.out/lora`, or an image prompt to
    `config.out/image_prompt`.

    Runs by itself or under `accelerate launch`. An interruption (Ctrl-C, SIGTERM, a closed
    terminal) writes a checkpoint after the step under way; a second one ends the run at once.
    A second run in the same `config.out` is refused while the first one lasts.

    With part "both" it trains one expert after the other, each in a folder of its own, and
    `config.out/lora` holds both LoRAs.

    Args:
        resume: go on from the newest whole checkpoint in `config.out`, bit by bit as if nothing
            had happened.

    Raises:
        ValueError: before the first step, a config that does not fit the model, the clips or an
            earlier run; during the training, a loss, a gradient or parameters that are not
            finite. Such a gradient is not applied, and such parameters are not written.
        OSError: a missing model, folder or file, a full disk, or an `out` that another run uses.
    """
    runs = config.runs()
    for one in runs[:1] if resume else runs:
        check_out(one, resume)
    if config.part != BOTH:
        return run(config, accelerator_for(config), resume=resume)
    config.check(fetch=True)
    made: list[Trained] = []
    for one in runs:
        result = _complete(one) if resume else None
        if result is None:
            goes_on = resume and bool(checkpoint.found(Path(one.out) / CHECKPOINTS))
            first = made[0].folder if made else None
            result = run(one, accelerator_for(one), resume=goes_on, beside=first)
            gc.collect()  # the model of the first expert, before the second is loaded
        made.append(result)
        if result.folder is None:
            break
    folders = [one.folder for one in made if one.folder is not None]
    out = Path(config.out) / "lora" if len(folders) == len(runs) else None
    if out is not None:
        by_main(PartialState(), partial(join_experts, *folders, out))
    losses = [loss for one in made for loss in one.losses]
    lines = tuple(line for one in made for line in one.lines)
    steps, seconds = sum(one.steps for one in made), sum(one.seconds for one in made)
    return Trained(out, steps, losses, seconds, lines)


def run(
    config: TrainConfig,
    accelerator: Accelerator,
    model: ModelToTrain | None = None,
    cache: LatentCache | None = None,
    *,
    resume: bool = False,
    beside: Path | None = None,
) -> Trained:
    """Run one training in its folder, alone.

    Args:
        model, cache: if they are loaded already.
        beside: see `Trainer`.
    """
    from gen_accel.lora.prepare import check_components, prepare

    with alone_in(Path(config.out), accelerator, own=Path(config.out) / CHECKPOINTS):
        if model is None or cache is None:
            check_out(config, resume)  # another run may have ended since
            check_components(config, fetch=True)
            config.check_files()
            model, cache = prepare(config, accelerator)
        return Trainer(config, accelerator, model, cache, beside=beside).train(resume)


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
    if not resume and (folder := out / config.adapter).exists():
        raise FileExistsError(f"{folder} is there already: give another --out")


def _complete(config: TrainConfig) -> Trained | None:
    """Return the result of an expert whose training is complete; None for any other."""
    folder = Path(config.out) / "lora"
    saved = checkpoint.found(Path(config.out) / CHECKPOINTS)
    if not saved or not folder.is_dir() or not checkpoint.is_end(saved[-1], config):
        return None
    return Trained(folder, checkpoint.step_of(saved[-1]), [], 0.0)


class Trainer:
    """One training. `__init__` builds its parts, `train` runs its steps.

    Args:
        beside: folder with the LoRA of the pipeline's other expert, for validation videos.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: ModelToTrain,
        cache: LatentCache,
        *,
        beside: Path | None = None,
    ) -> None:
        # The clips of all steps, which epochs are counted in.
        self.groups = ProcessGroups.of(config, accelerator)
        self.epochs = epoch_steps(config, model, cache, self.groups.count)
        self._asked = [*config.stages]
        config = config.in_steps(self.epochs)
        check_allocations(config)
        self.plans = plan_clips(config, model, cache, self.groups.count)
        self.config, self.accelerator, self.model, self.cache = config, accelerator, model, cache
        self.beside, self.out = beside, Path(config.out)
        self.stopping = self.prolonged = False
        transformer, device = model.transformer, accelerator.device

        # Sparse attention and the adapter on the frozen model.
        self.method = method_from(config.method, config.settings).for_device(device)
        self.recipe = self._build_recipe()
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
        given = config, model, self.handle, self.recipe
        self.adapter = (
            Lora(*given) if config.adapter == "lora" else ImagePromptAdapter(*given, cache)
        )

        # The loss, and where the model's memory goes.
        share(transformer, self.groups, device)
        kind = config.gradient_checkpointing
        checkpoint_activations(transformer, kind, parts=config.checkpoint_parts)
        about = model.schedule, model.shift, model.sound_shift
        self.objective = Objective.of(config, transformer, self.adapter, *about)
        cast_training_params([self.objective], dtype=torch.float32)
        cast_base(transformer, config)
        swaps = config.blocks_to_swap > 0
        if swaps:
            self.swapper = Swapper(self.objective, transformer, config.blocks_to_swap, device)
        transformer.train()

        # Batches, optimizer, learning rate and average.
        self.batches = Batches(config, model, cache, self.adapter, accelerator)
        self.state = TrainingState(self.objective, config, accelerator, is_placed=swaps)

    def train(self, resume: bool) -> Trained:
        """Run the steps that are left, evaluate and save where it is due, and write the result."""
        config, accelerator = self.config, self.accelerator
        start = self.load_checkpoint() if resume else 0
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            cut_metrics(self.out / METRICS, start)
        self._build_evaluation(start)
        shown = {  # numbers and text alone, which TensorBoard takes
            k: v if isinstance(v, int | float | str | bool) else str(v)
            for k, v in vars(config).items()
        }
        accelerator.init_trackers("gen_accel", config=shown)
        began, losses, done = time.perf_counter(), [], start
        with self.page.told(), self._stopping(), self.bar.open():
            self.evaluate_if_due(start, first=True)
            for step in range(start, config.total_steps):
                loss, stop = self.train_step(step)
                losses.append(loss)
                done = step + 1
                last = done == config.total_steps
                if self.clock.is_due("checkpoint", done) or last or stop:
                    self.save_checkpoint(done)
                self.evaluate_if_due(done, stops=stop and not last)
                if stop and not last:
                    break
        folder = None
        if done == config.total_steps:
            folder = self.out / self.adapter.FOLDER
            by_main(accelerator, partial(self._artefact(), folder))
        accelerator.end_training()
        lines = self.page.end(done, folder)
        return Trained(folder, done, losses, time.perf_counter() - began, lines)

    def train_step(self, step: int) -> tuple[float, bool]:
        """Take one optimizer step. Returns the mean loss of all processes, and whether to stop."""
        began = time.perf_counter()
        number, stage, inside = self.config.stage_at(step)
        # Other random numbers, such as dropout's, depend on the step too.
        rank = self.accelerator.process_index
        torch.manual_seed(seed_of(self.config.seed, step, 1 + rank + 10**9))
        clips = self.plans[number][inside]
        stage = replace(stage, frames=self.batches.frames_of(stage, clips))
        with self._rule(stage):
            loss, norm, stop = self.forward_backward(step, clips, stage.frames)
        figures = {
            "loss": loss,
            "learning_rate": self.state.advance(),
            "grad_norm": norm,
            "frames": stage.frames,
            "seconds": time.perf_counter() - began,
        }
        if (peak := peak_gb(self.accelerator.device)) is not None:
            figures["memory_gb"] = peak
        self._log(step, figures, {"step": step} | figures)
        self.bar.step(step, loss, figures["seconds"])
        return loss, stop

    def forward_backward(
        self, step: int, clips: list[int], frames: int
    ) -> tuple[float, float, bool]:
        """Run all micro-steps of a step on clips of some pixel frames.

        Returns the mean loss over all processes, the norm of the gradients, and whether to stop
        after the step.
        """
        mean, norm, count = 0.0, None, self.config.gradient_accumulation
        reduced, latents = (math.nan, False), self.model.frames(frames)
        for micro in range(count):
            with self.accelerator.accumulate(self.state.wrapped):
                loss = self.state.wrapped(*self.batches(step, clips, latents, micro))
                mean += loss.item() / count
                self.accelerator.backward(self.groups.summed(loss))
                if self.accelerator.sync_gradients:
                    norm = self.state.clip()
                    reduced = self.reduce_loss(step, mean, norm)
                self.state.update()
        return reduced[0], math.nan if norm is None else norm, reduced[1]

    def reduce_loss(self, step: int, mean: float, norm: float | None) -> tuple[float, bool]:
        """Return the mean loss of all processes, and whether any was asked to stop, before one
        changes a parameter. ValueError in all for a loss or gradient that is not finite."""
        broken = norm is not None and not math.isfinite(norm) and not self.state.scales_down
        own = torch.tensor(
            [mean, float(self.stopping), float(broken)], device=self.accelerator.device
        )
        reduced = self.accelerator.reduce(own, "mean")
        assert isinstance(reduced, Tensor)
        loss, stopping, breaking = reduced.tolist()
        if not math.isfinite(loss) or breaking:
            what = f"loss of step {step} is {loss}"
            if math.isfinite(loss):
                what = f"gradient of step {step} is not finite"
            back = "no checkpoint is there yet"
            if saved := checkpoint.found(self.out / CHECKPOINTS):
                back = f"--resume goes on from {saved[-1].name}"
            raise ValueError(
                f"the {what}: lower learning_rate, or use mixed_precision bf16 or no, in a new "
                f"run, which may start from the {self.adapter.FOLDER} of a checkpoint; {back}"
            )
        return loss, stopping > 0

    def evaluate_if_due(self, done: int, *, first: bool = False, stops: bool = False) -> None:
        """Measure, sample and report after `done` steps, each if it is due.

        Args:
            first: before the first step of this run.
            stops: the run was asked to stop; it measures when it goes on.
        """
        is_new = first and (done == 0 or self.prolonged)
        if self.fixed is not None and not stops and (is_new or self.clock.is_due("loss", done)):
            self._measure_fixed_loss(self.fixed, done)
        due = self.validation if self.clock.is_due("validation", done) else None
        # A run that goes on samples again if the one before was killed there.
        if due is not None and (not (first and done) or due.lacks(done)):
            if first and self.accelerator.distributed_type.value == "FSDP":
                self._run_outermost()
            self._validate(due, done)
        saved = self.clock.is_due("checkpoint", done)
        if first or saved or stops or due is not None or self.clock.is_due("loss", done):
            self.page.write(done)

    def save_checkpoint(self, done: int) -> None:
        """Write a checkpoint after `done` steps. All processes must call this; one writes."""
        tensors = self.state.tensors()
        about = {
            "step": done,
            "config": json.loads(json.dumps(vars(self.config))),
            "asked": self._asked,  # stages, of which some may be in epochs
            **self._depends(),
            **self.state.numbers(),
        }
        save = partial(
            checkpoint.save,
            self.out / CHECKPOINTS,
            tensors,
            about,
            keep=self.config.keep_checkpoints,
            adapter=(self.adapter.FOLDER, self._artefact()),
        )
        by_main(self.accelerator, save)

    def load_checkpoint(self) -> int:
        """Restore the newest whole checkpoint. Returns the number of steps done by then."""
        config, folder = self.config, self.out / CHECKPOINTS
        found = checkpoint.load_newest(folder)
        if found is None:
            raise ValueError(f"no checkpoint in {folder} is whole and finite")
        flag = "--init-lora" if config.adapter == "lora" else "--init-adapter"
        start = f"{flag} {found.path / self.adapter.FOLDER}"
        checkpoint.check_agreement(found.path, found.state, self._depends(), config, start=start)
        self.prolonged = found.state["config"]["stages"] != list(config.stages)
        self.state.restore(found.tensors, found.state)
        if self.accelerator.is_main_process:  # finish what a killed run may have begun
            checkpoint.prune(folder, found.path, keep=config.keep_checkpoints)
        self.accelerator.print(f"resumed after step {found.state['step']} from {found.path}")
        return found.state["step"]

    def _depends(self) -> StateFields:
        """Fields of a checkpoint that the training depends on, beside the config."""
        latents = [self.model.frames(stage.frames) for stage in self.config.curriculum]
        return {
            "data": self.cache.digest,
            "stage_data": [self.cache.digest_at(frames) for frames in latents],
            "shift": self.model.shift,  # which some schedulers make of the longest stage
            "teacher": self.recipe.teacher,
            "processes": self.groups.count,
        }

    def _artefact(self) -> Callable[[Path], object]:
        """Return a function that writes the present weights, or their average if one is kept."""
        with self.state.averaged():
            return self.adapter.writer(whole)

    def _build_recipe(self) -> Recipe:
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
            condition="either"
            if config.first_frame_dropout
            else FIRST_FRAME
            if config.last_frame_dropout
            else model.condition,
            clips=len(self.cache),
            batch=config.batch_size * config.gradient_accumulation * self.groups.count,
            levels=levels_of(config, model.shift),
            sampler=None if config.student_steps is None else config.student_sampler,
            stream=stream_of(config, model.shift),
        )

    def _build_evaluation(self, start: int) -> None:
        """Build the losses at fixed noise, the validation videos, the bar and the page."""
        config, main = self.config, self.accelerator.is_main_process
        model, calls = self.model, {"loss": 0, "validation": 0}
        self.validation = self.fixed = None
        if config.validate_every:
            assert model.pipe is not None
            if self.beside is not None:
                first = model.pipe.transformer
                recipe = read_recipe(self.beside)
                if recipe.lora_kind in FACTORED:
                    load_factored(first, weights_file(self.beside), recipe, "beside")
                else:
                    model.pipe.load_lora_weights(self.beside)
                attach(first, from_lora=self.beside, kernel=config.kernel, record=False)
            self.validation = Validation(
                config,
                model.pipe,
                self.out / FOLDER,
                self.accelerator,
                self.adapter,
                trained_frames=model.trained_frames,
                shift=model.shift,
                prompts=model.prompts,
                pictures=None if model.condition == TEXT else self.cache.pictures,
                chunked=self.objective.chunked,
            )
            calls["validation"] = self.validation.calls
        if config.loss_every:
            self.fixed = FixedLoss(config, model, self.cache, self.batches, self.accelerator)
            passes = len(self.fixed.clips) * len(self.fixed.levels)
            calls["loss"] = passes // self.groups.count
        every = {
            "loss": config.loss_every,
            "validation": config.validate_every,
            "checkpoint": config.checkpoint_every,
        }
        self.clock = RemainingTime(config, every, calls, self.epochs)
        self.bar = Bar(self.clock, start, shown=main)
        self.page = TrainingPage(self.out, config, self.recipe, epoch=self.clock.epoch, shown=main)

    def _measure_fixed_loss(self, fixed: FixedLoss, done: int) -> None:
        name, began = "held-out loss" if self.config.held_out else "loss at fixed noise", 0.0
        with self.bar.beside("loss") as show, self.state.averaged():
            began = time.perf_counter()

            def tell(i: int, total: int) -> None:
                show(f"{name}, {i}/{total}", i / total)

            figures = fixed(done, self.state.wrapped, self._rule, tell)
        levels = {f"fixed_loss/{level}": x for level, x in figures.levels.items()}
        record = asdict(figures)
        if record not in self.page.records:  # a resumed run may measure again
            self.page.records.append(record)
            line = {**record, "seconds": time.perf_counter() - began}
            self._log(done, {"fixed_loss": figures.fixed_loss} | levels, line)
        self.bar.fixed(self.page.fixed_words())

    def _validate(self, validation: Validation, done: int) -> None:
        """Sample the validation videos as the adapter will generate: with the average, the longest
        stage's rule, and the schedule beside the LoRA."""
        recipe, model, prompts = self.recipe, self.model, len(self.config.validation_prompts)
        longest = [one for one in self.config.curriculum if one.frames == recipe.frames][-1]
        schedule = recipe.build_schedule()
        if self.config.part == LOW and model.boundary is not None and model.pipe is not None:
            # The expert for low noise counts its own steps, after those of the other one.
            before = steps_above(model.pipe, validation.clip, model.boundary)
            schedule = replace(schedule, dense_steps=max(0, schedule.dense_steps - before))
        model.transformer.eval()
        with (
            self.bar.beside("validation") as show,
            self.state.averaged(),
            self._rule(longest),
            self.handle.scheduled(schedule),
        ):

            def tell(i: int, step: int, steps: int) -> None:
                words = f"validation {i + 1}/{prompts}, step {step}/{steps}"
                show(words, (i + step / steps) / prompts)

            validation.tell = tell
            validation(done)
        model.transformer.train()

    @torch.no_grad()
    def _run_outermost(self) -> None:
        """Run the outermost module once, before validation runs an inner one.

        FSDP takes the module that runs first for the outermost.
        """
        clips = self.plans[0][0]
        frames = self.model.frames(self.batches.frames_of(self.config.curriculum[0], clips))
        self.state.wrapped(*self.batches(0, clips, frames, 0))

    @contextmanager
    def _rule(self, stage: Stage) -> Iterator[None]:
        """Apply a stage's rule on the rotary frequencies inside the context."""
        trained = self.model.trained_frames
        if stage.rope == "none" or trained is None or stage.frames <= trained:
            yield
            return
        patch = temporal_patch(self.model.transformer)
        applied = apply_rule(
            self.model.transformer,
            stage.rope,
            frames=self.model.frames(stage.frames) // patch,
            trained=self.model.frames(trained) // patch,
        )
        try:
            yield
        finally:
            applied.remove()

    def _log(self, step: int, tracked: dict[str, float], line: Mapping[str, object]) -> None:
        """Give figures to the trackers, and a line to `metrics.jsonl`."""
        with room_told(self.out / LOGS):
            self.accelerator.log(tracked, step=step)
        if self.accelerator.is_main_process:
            path = self.out / METRICS
            with room_told(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop the training after the step at the first Ctrl-C, SIGTERM or SIGHUP, and at once at
        the second."""

        def ask(number: int, frame: object) -> None:
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
