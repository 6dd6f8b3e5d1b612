"""Attach a method to a live diffusers pipeline or transformer, and take it off again."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import nn

from gen_accel.attention_processors.attached.attachment import (
    Attachment,
    AttachOptions,
    SilentBranch,
    attach_method,
)
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.method import Method, is_silent

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.pipelines.tuning.preset import Preset


def attach(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    method: Method | None = None,
    *,
    from_lora: str | Path | None = None,
    preset: "str | Path | Preset | None" = None,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    dense_kernel: str | None = None,
    timed: bool = False,
    self_check: bool | None = None,
    record: bool = True,
    watch: bool = False,
    padding_once: bool | None = None,
) -> Attachment:
    """Make the self-attention of a pipeline's transformers use `method`.

        handle = gen_accel.attach(pipe, Radial(), schedule=Schedule(dense_start=0.2))
        video = pipe(prompt, ...).frames
        print(handle.summary())
        handle.detach()

    The handle is also a context manager that detaches at its end. Attaching again replaces the
    method. Frames, height, width and batch are read from each call and may change between calls.
    Additions to the attention, such as image prompts, keep working.

    Args:
        pipe_or_transformer: a diffusers pipeline, with one or two transformers, or a transformer.
            Attach before `torch.compile`.
        method: e.g. `Radial()`. `Dense()` runs the model's own attention.
        from_lora: a folder that `gen_accel.lora.train` wrote, instead of a method. It gives the
            method with its parameters, the schedule unless one is given, and the rule on the
            rotary frequencies, which is removed with the handle. Load the weights of the LoRA by
            `pipe.load_lora_weights(folder)`, before or after.
        preset: a file that `gen_accel.tune` wrote, instead of a method; or "quality", "balanced"
            or "fast", for the one that is kept for this model, or a rule if none is. With
            `from_lora` it replaces the LoRA's own method.
        schedule: layers and steps that stay dense. Without a pipeline, steps are told apart by
            changes of the timestep, and shares of steps cannot be given.
        kernel: "auto" or a name from `gen_accel.kernels.KERNELS`, which then never falls back.
        dense_kernel: kernel of dense layers and steps, and of `Dense()`: a name from `KERNELS`,
            or "auto" for the fastest that is as exact as torch's own attention, possibly that
            attention itself. By default the model's own attention, bit for bit.
        timed: also measure the seconds spent in attention; on a GPU this waits for each call.
        self_check: compare some rows with the reference the first time that a kernel meets a
            method, shape, dtype and device. By default everywhere but on the CPU and MPS.
        record: count calls for `summary()` and `explain()`, at up to two small operations a call.
        watch: compute 64 rows of each sparse layer exactly at each step, and report their error in
            `summary()`. It costs 64 of N rows of dense attention, in one of the two calls of
            guidance.
        padding_once: in the attention to text, on a CPU, count the equal keys that padding without
            a mask leaves as one key of their weight. The answer is the same to rounding. By
            default wherever the model is not its own: not in dense steps, nor with `Dense()`,
            unless there is a `dense_kernel`.

    A method with parameters, such as `SparseLinear()`, starts at its initial values each time.

    Raises:
        ValueError: a class that no family serves, a compiled transformer, an unknown kernel, an
            object that is no method, a schedule that cannot be kept, or a LoRA or preset of
            another model. At the first step of a run, a preset for another number of steps.
        FileNotFoundError: no LoRA in `from_lora`, or no preset.
        TypeError: neither a pipeline nor a module.

    Warns:
        OtherAttention: an active LoRA was trained with another method.
        NothingSaved: `Radial()` in a model of single frames.
        SilentBranch: a method with parameters, which starts at its initial values each time.
        OtherThanTuned: at the first step, a preset that was tuned for another grid, guidance,
            LoRA or dtype.
        NotMeasured: a named preset that is a rule, as nothing was tuned for this model.
    """
    found = trained = others = None
    if preset is not None:
        from gen_accel.pipelines.tuning.preset import choose_preset

        if method is not None:
            raise ValueError(f"give a method or preset, got both: {method!r} and {preset}")
        method, schedule, found = choose_preset(preset, pipe_or_transformer, schedule)
    elif from_lora is not None and method is not None:
        raise ValueError(f"give a method or from_lora, got both: {method!r} and {from_lora}")
    own = method is None  # the LoRA's
    if from_lora is not None:
        trained = _TrainedLora(from_lora, pipe_or_transformer)
        if own:
            method, others = trained.method, trained.others
            schedule = trained.schedule if schedule is None else schedule
    options: AttachOptions = {
        "schedule": schedule,
        "kernel": kernel,
        "dense_kernel": dense_kernel,
        "timed": timed,
        "self_check": self_check,
        "record": record,
        "watch": watch,
        "padding_once": padding_once,
    }
    if own and trained is not None and trained.has_processors:
        from gen_accel.attention_processors.attached.storage import load_processors

        handle = load_processors(pipe_or_transformer, trained.folder, others=others, **options)
    else:
        # None is refused there.
        handle = attach_method(pipe_or_transformer, method, **options)  # pyright: ignore[reportArgumentType]
        if preset is None and handle.branches and all(map(is_silent, handle.branches.values())):
            gated = handle.method.defines("gate")
            what, fit = ("gate", "") if gated else ("linear branch", "fit it with calibrate, ")
            warnings.warn(
                f"the {what} of {type(handle.method).__name__} is still silent, so that this is "
                f"sparse attention alone: {fit}train it, or load it with load_processors, all of "
                "gen_accel",
                SilentBranch,
                stacklevel=2,
            )
    if trained is not None:
        trained.finish(handle, pipe_or_transformer)
    if found is not None:  # warn at the first pass of a call unlike those that it was tuned for
        from gen_accel.pipelines.tuning.preset import preset_watch

        clock, transformers = handle.clock, served_transformers(pipe_or_transformer)
        hook = preset_watch(
            pipe_or_transformer,
            found,
            lambda: None if clock.tokens is None else clock.tokens.video,
        )
        first = next(iter(transformers.values()))
        handle.companions.append(first.register_forward_pre_hook(hook).remove)
    return handle


class _TrainedLora:
    """Files of `gen_accel.lora.train`, to attach.

    Args:
        folder: of the LoRA, or its file.

    Attributes:
        others: folders of the further parts of the pipeline that trained in the same run, by
            name. A transformer by itself takes the LoRA of its own part.
        has_processors: whether parameters of the method were saved beside it.
    """

    def __init__(
        self, folder: str | Path, pipe_or_transformer: "DiffusionPipeline | nn.Module"
    ) -> None:
        from gen_accel.attention_processors.attached import recipe as recipes
        from gen_accel.attention_processors.attached.storage import FILE
        from gen_accel.paths import expanded

        folder = expanded(folder)
        self.folder = folder.parent if folder.is_file() else folder
        self.recipe = recipe = recipes.read_recipe(self.folder)
        transformers, self.others = served_transformers(pipe_or_transformer), dict[str, Path]()
        if not isinstance(pipe_or_transformer, nn.Module):
            known = recipes.folders_of(self.folder)
            self.others = {part: path for part, path in known.items() if part != recipe.part}
        for part in self.others.keys() - transformers.keys():
            raise ValueError(
                f"{self.folder} holds LoRAs for {' and '.join(recipe.parts)}, and this "
                f"{type(pipe_or_transformer).__name__} has no {part}: load a pipeline of two "
                "experts"
            )
        own = transformers.get(recipe.part, next(iter(transformers.values())))
        self.models = [own, *(transformers[part] for part in self.others)]
        for source, model in zip((self.folder, *self.others.values()), self.models, strict=True):
            recipes.check_base(recipes.read_recipe(source), model)
        self.has_processors = (self.folder / FILE).is_file()
        self.method, self.schedule = self.recipe.build_method(), self.recipe.build_schedule()

    def finish(
        self, handle: Attachment, pipe_or_transformer: "DiffusionPipeline | nn.Module"
    ) -> None:
        """Lay the rule on the rotary frequencies that it trained with, and watch the guidance."""
        recipe = self.recipe
        if recipe.rope != "none":
            from gen_accel.pipelines.long_video import apply_recipe

            try:
                for model in self.models:
                    rule = apply_recipe(recipe, model, pipe_or_transformer)
                    handle.companions.append(rule.remove)
            except ValueError:
                handle.detach()
                raise
        if recipe.holds_guidance and not isinstance(pipe_or_transformer, nn.Module):
            watch = _GuidanceWatch(pipe_or_transformer, recipe.teacher_guidance)
            handle.companions.append(self.models[0].register_forward_pre_hook(watch).remove)


class _GuidanceWatch:
    """A hook that warns of the first call with guidance.

    The hook holds the pipeline weakly, as the pipeline owns the model. A copy of the pipeline gets
    a hook that watches the copy.
    """

    def __init__(self, pipe: "DiffusionPipeline", scale: float) -> None:
        self._pipe, self._scale, self._told = ref(pipe), scale, False

    def __call__(self, module: nn.Module, args: tuple) -> None:
        # A graph cannot warn, and some pipelines do not tell whether they guide.
        if torch.compiler.is_compiling() or self._told:
            return
        if not getattr(self._pipe(), "do_classifier_free_guidance", False):
            return
        self._told = True
        from gen_accel.attention_processors.attached.recipe import GuidedTwice

        warnings.warn(
            f"the LoRA holds a guidance of {self._scale:g} and is guided again: call the pipeline "
            "with guidance_scale=1, which takes half the time",
            GuidedTwice,
            stacklevel=2,
        )

    def __deepcopy__(self, memo: dict) -> "_GuidanceWatch":
        pipe = self._pipe()
        if pipe is None:
            return self
        return _GuidanceWatch(memo.get(id(pipe), pipe), self._scale)
