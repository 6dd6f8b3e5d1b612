"""Attach a method to a live diffusers pipeline or transformer, and take it off again."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import nn

from gen_accel.attention_processors.attached.attachment import Attachment, SilentBranch, put_on
from gen_accel.attention_processors.attached.recipe import (
    GuidedTwice,
    Recipe,
    check_base,
    folders_of,
    read_recipe,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.storage import CONFIG, load_processors
from gen_accel.attention_processors.attached.transformers import served_transformers
from gen_accel.attention_processors.lengths import latent_frames, temporal_patch, vae_factor
from gen_accel.method import Method, is_silent
from gen_accel.paths import expanded
from gen_accel.pipelines.long_video.rope import apply_rule
from gen_accel.pipelines.tuning.ladder import ladder_beside
from gen_accel.pipelines.tuning.named import choose_preset
from gen_accel.pipelines.tuning.preset import Preset, Watch


def attach(
    pipe_or_transformer: Any,
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
) -> "Attachment":
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
            or "fast", for the one that is kept for this model, or a rule where none is. With
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
            `summary()`. A head that errs more than twice as much as a preset's profile says runs
            denser from the next step on. It costs 64 of N rows of dense attention, in one of the
            two calls of guidance.

    A method with parameters, such as `SparseLinear()`, starts anew each time it is attached.

    Raises:
        ValueError: a class that no family serves, a compiled transformer, an unknown kernel, an
            object that is no method, a schedule that cannot be kept, or a LoRA or preset of
            another model. At the first step of a run, a preset for another number of steps.
        FileNotFoundError: no LoRA in `from_lora`, or no preset.
        TypeError: neither a pipeline nor a module.

    Warns:
        OtherAttention: an active LoRA was trained with another method.
        NothingSaved: `Radial()` in a model of single frames.
        SilentBranch: a method with parameters, which starts anew each time it is attached.
        OtherThanTuned: at the first step, a preset that was tuned for another grid, guidance,
            LoRA or dtype.
        NotMeasured: a named preset that is a rule, as nothing was tuned for this model.
    """
    if preset is not None:
        if method is not None:
            raise ValueError(f"give a method or preset, got both: {method!r} and {preset}")
        method, schedule, found = choose_preset(preset, pipe_or_transformer, schedule)
        options = {"kernel": kernel, "dense_kernel": dense_kernel, "timed": timed}
        options |= {"self_check": self_check, "record": record, "watch": watch}
        if watch and found is not None and not isinstance(preset, Preset):
            options["ladder"] = ladder_beside(found, preset)
        if from_lora is not None:
            handle = _attach_trained(
                pipe_or_transformer, from_lora, schedule=schedule, method=method, **options
            )
        else:
            handle = put_on(pipe_or_transformer, method, schedule=schedule, **options)
        if found is not None:
            _watch_preset(handle, pipe_or_transformer, found)
        return handle
    if from_lora is not None:
        if method is not None:
            raise ValueError(f"give a method or from_lora, got both: {method!r} and {from_lora}")
        options = {"kernel": kernel, "dense_kernel": dense_kernel, "timed": timed}
        options |= {"self_check": self_check, "record": record, "watch": watch}
        return _attach_trained(pipe_or_transformer, from_lora, schedule=schedule, **options)
    handle = put_on(
        pipe_or_transformer,
        method,
        schedule=schedule,
        kernel=kernel,
        dense_kernel=dense_kernel,
        timed=timed,
        self_check=self_check,
        record=record,
        watch=watch,
    )
    _warn_of_silence(handle)
    return handle


def _warn_of_silence(handle: Attachment) -> None:
    if handle.branches and all(is_silent(branch) for branch in handle.branches.values()):
        warnings.warn(
            f"the linear branch of {type(handle.method).__name__} is still silent, so that this "
            "is sparse attention alone: fit it with gen_accel.calibrate, train it, or load it "
            "with gen_accel.load_processors",
            SilentBranch,
            stacklevel=3,
        )


def _attach_trained(
    pipe_or_transformer: Any,
    folder: str | Path,
    *,
    schedule: Schedule | None = None,
    method: Method | None = None,
    **options: Any,
) -> Attachment:
    """Run `gen_accel.attach(pipe, from_lora=folder)`.

    Args:
        method: to attach in the place of the LoRA's own.
    """
    folder = expanded(folder)
    folder = folder.parent if folder.is_file() else folder
    recipe = read_recipe(folder)
    transformers = served_transformers(pipe_or_transformer)
    transformer: Any = transformers.get(recipe.part, next(iter(transformers.values())))
    check_base(recipe, transformer)
    others = _others(folder, recipe, transformers, pipe_or_transformer)
    for part, other in others.items():
        check_base(read_recipe(other), transformers[part])
    chosen = schedule if schedule is not None else recipe.build_schedule()
    if method is not None:
        handle = put_on(pipe_or_transformer, method, schedule=schedule, **options)
    elif folder.is_dir() and (folder / CONFIG).is_file():
        handle = load_processors(
            pipe_or_transformer, folder, others=others, schedule=chosen, **options
        )
    else:
        handle = put_on(pipe_or_transformer, recipe.build_method(), schedule=chosen, **options)
        _warn_of_silence(handle)
    if recipe.rope != "none" and recipe.trained_frames is not None:
        patch = temporal_patch(transformer)
        factor = vae_factor(pipe_or_transformer, "temporal") or 4
        try:
            lengths = {
                "frames": latent_frames("frames", recipe.frames, factor, patch),
                "trained": latent_frames("trained_frames", recipe.trained_frames, factor, patch),
            }
            for one in (transformer, *(transformers[part] for part in others)):
                handle.companions.append(apply_rule(one, recipe.rope, **lengths).remove)
        except ValueError:
            handle.detach()
            raise
    if recipe.holds_guidance and pipe_or_transformer is not transformer:
        watch = _GuidanceWatch(pipe_or_transformer, recipe.teacher_guidance)
        handle.companions.append(transformer.register_forward_pre_hook(watch).remove)
    return handle


def _others(
    folder: Path, recipe: Recipe, transformers: Mapping[str, Any], pipe_or_transformer: Any
) -> dict[str, Path]:
    """Map the further parts that trained in the same run to their folders.

    A transformer by itself takes the LoRA of its own part. Raises ValueError for a pipeline that
    lacks a part.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        return {}
    others = {part: path for part, path in folders_of(folder).items() if part != recipe.part}
    for part in others.keys() - transformers.keys():
        raise ValueError(
            f"{folder} holds LoRAs for {' and '.join(recipe.parts)}, and this "
            f"{type(pipe_or_transformer).__name__} has no {part}: load a pipeline of two experts"
        )
    return others


def _watch_preset(handle: Attachment, pipe_or_transformer: Any, preset: Preset) -> None:
    """Warn at the first pass of a call unlike the ones that the preset was tuned for."""
    transformer: Any = next(iter(served_transformers(pipe_or_transformer).values()))
    clock = handle.clock

    def grid() -> Any:
        return None if clock.tokens is None else clock.tokens.video

    watch = Watch(pipe_or_transformer, preset, grid)
    handle.companions.append(transformer.register_forward_pre_hook(watch).remove)


class _GuidanceWatch:
    """A hook that warns of the first call with guidance.

    The hook holds the pipeline weakly, as the pipeline owns the model. A copy of the pipeline gets
    a hook that watches the copy.
    """

    def __init__(self, pipe: Any, scale: float) -> None:
        self._pipe, self._scale, self._told = ref(pipe), scale, False

    def __call__(self, module: nn.Module, args: tuple) -> None:
        # A graph cannot warn, and some pipelines do not tell whether they guide.
        if torch.compiler.is_compiling() or self._told:
            return
        if not getattr(self._pipe(), "do_classifier_free_guidance", False):
            return
        self._told = True
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
