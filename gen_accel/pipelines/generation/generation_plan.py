"""The plan of a generation: a config with all that its LoRA, preset and pipeline fill in, checked
before any work."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gen_accel import kernels, registry
from gen_accel.attention_processors import method_class
from gen_accel.attention_processors.attached.recipe import Recipe, folders_of, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.io import plain, read_fields
from gen_accel.measure.quality import check_installed, check_metrics
from gen_accel.measure.report import beside, report_of
from gen_accel.measure.video_io import check_writable
from gen_accel.method import Method
from gen_accel.paths import check_replaceable, expanded, model_named
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.config import (
    GenerateConfig,
    values_of_clip,
)
from gen_accel.pipelines.generation.decode import check_latents_path
from gen_accel.pipelines.generation.inputs import (
    CallArguments,
    OpenedFiles,
    OpenedImages,
    fit,
    open_files,
    open_image_prompt,
)
from gen_accel.pipelines.generation.loading import check_length_of, check_model, find_device
from gen_accel.pipelines.generation.preview import preview_of
from gen_accel.pipelines.generation.sampling import check_clip, filled
from gen_accel.pipelines.long_video import check_names
from gen_accel.pipelines.tuning.preset import Preset, choose_preset, read_preset

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Video(NamedTuple):
    """One video of a plan.

    Args:
        target: output file or folder.
        latents: file for its latents; None keeps none.
    """

    prompt: str
    seed: int
    target: Path
    latents: Path | None = None


@dataclass(frozen=True)
class GenerationPlan:
    """Several videos from one pipeline, by one method.

    `plan_of` adds the parts of a LoRA and the videos; `fitted` adds the pipeline's defaults.

    Args:
        asked: the config as it was asked for, with the names of files.
        config: the same with the parts of a LoRA or preset, later of the pipeline.
        method: method to attach; the LoRA's own with `from_lora`, the preset's with `preset`.
        preset: see `gen_accel.attach`; `fitted` finds what a name stands for.
        techniques: techniques for video longer than the model was trained on.
        only_longer: use the techniques only for video longer than `trained_frames`.
        files: opened pictures and video that the videos are made from; `fitted` makes `arguments`
            of them.
        images: opened image prompt.
        several: outputs are numbered, and a record lies beside each, see `prompt_list`.
        request: inputs of all videos, as `prompt_list.is_done` compares them.
    """

    asked: GenerateConfig
    config: GenerateConfig
    method: Method | None = None
    preset: str | Preset | None = None
    schedule: Schedule | None = None
    techniques: tuple[str, ...] = ()
    trained_frames: int | None = None
    only_longer: bool = False
    files: OpenedFiles | None = None
    images: OpenedImages | None = None
    arguments: CallArguments | None = None
    videos: tuple[Video, ...] = ()
    several: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)

    def left(self) -> list[int]:
        """Numbers of the videos to make: all, or of a list those that are not finished."""
        resume = self.several and not self.config.overwrite
        return [
            i
            for i, video in enumerate(self.videos)
            if not resume
            or not prompt_list.is_done(video.target, self.inputs_of(video), video.latents)
        ]

    def inputs_of(self, video: Video) -> dict[str, Any]:
        """Collect the inputs of one video: the request, its prompt and its clip."""
        clip = values_of_clip(self.clip_of(video))
        return {**self.request, "prompt": video.prompt, **clip}

    def clip_of(self, video: Video) -> GenerateConfig:
        return self.config.model_copy(update={"seed": video.seed})

    def attention(self) -> dict[str, str]:
        """Identify what is attached: a method, or a preset by its name or a hash of its file."""
        if self.preset is None:
            return {"method": repr(self.method)}
        if not isinstance(self.preset, Preset):
            return {"preset": self.preset}
        held = json.dumps(plain(self.preset.to_dict()), sort_keys=True)
        return {"preset": hashlib.sha256(held.encode()).hexdigest()}

    def fitted(self, pipe: "DiffusionPipeline") -> "GenerationPlan":
        """Fill the clip's open values with the pipeline's own, and drop techniques that are for
        longer video only.

        Raises ValueError for values that the pipeline does not take or would round, and for a
        preset of another model.
        """
        if self.files is not None and self.arguments is None:
            config, arguments = fit(pipe, self.config, self.files)
            return replace(self, config=config, arguments=arguments).fitted(pipe)
        arguments = () if self.arguments is None else self.arguments.values
        if self.preset is not None:
            whole = filled(pipe, self.config, arguments)
            asked = {"num_frames": whole.frames, "height": whole.height, "width": whole.width}
            asked["num_inference_steps"] = self.config.steps
            method, schedule, found = choose_preset(self.preset, pipe, self.schedule, asked)
            config = self.config if found is None else _solved(self.config, found, self.preset)
            chosen = replace(self, method=method, schedule=schedule, preset=None, config=config)
            # No tuned preset fits this call: attach the rule of that name.
            rest = None if self.config.from_lora is None else self.preset
            return replace(chosen.fitted(pipe), preset=found or rest)
        config = filled(pipe, self.config, arguments)
        techniques, trained_frames = self.techniques, self.trained_frames
        frames = config.frames
        if self.only_longer and not (frames and trained_frames and frames > trained_frames):
            techniques, trained_frames = (), None
        if techniques and frames is None:
            kind = type(pipe).__name__
            raise ValueError(f"frames must be given with {techniques[0]}: {kind} has no default")
        assert self.method is not None, "planned"
        check_clip(pipe, config, self.method)
        return replace(self, config=config, techniques=techniques, trained_frames=trained_frames)

    def check_kernels(self) -> None:
        """Refuse, by a ValueError, a named kernel that does not run on the device."""
        for kernel in (self.config.kernel, self.config.dense_kernel or "auto"):
            if kernel != "auto":
                kernels.check_kernel(kernel, find_device(self.config.device))


def plan_of(config: GenerateConfig, *, elsewhere: bool = False) -> GenerationPlan:
    """Plan the videos of a config: read its LoRA, preset and pictures, and check its files.

    Args:
        config: checked by its `check`.
        elsewhere: other machines make the videos, whose devices are not known here.

    Raises:
        ValueError, OSError: any fault that can be found before the model is loaded.
    """
    schedule = None
    own = config.preset is not None or config.from_lora is not None
    if config.has_schedule or not own:
        layers = {"dense": config.dense_at, "dense_noise": config.dense_noise}
        shares = ("dense_layers", "dense_steps", "dense_start", "dense_end")
        schedule = Schedule(**{name: getattr(config, name) for name in shares}, **layers)
    plan = GenerationPlan(
        asked=config,
        config=config,
        schedule=schedule,
        techniques=config.techniques or (),
        trained_frames=config.trained_frames,
    )
    if config.preset is not None:
        plan = _with_preset(plan, config.preset)
    if config.from_lora is not None:
        plan = _with_lora(plan, config.from_lora)
    elif config.preset is None:
        plan = replace(plan, method=config.built_method())
    texts = config.texts
    if not texts:
        raise ValueError("no prompts: give --prompt TEXT, or --prompts FILE with one on each line")
    if config.kinds:
        plan = replace(plan, files=open_files(config))
    if config.compare:
        if plan.method is not None and plan.method.is_dense:
            raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
        check_metrics(config.metrics)
    check_names(plan.techniques)
    check_model(config.model)
    check_length_of(config.model, plan.files, config.frames)
    if not elsewhere:
        plan.check_kernels()
    several = config.prompts is not None or len(texts) > 1
    plan = replace(plan, several=several, videos=_videos(config, texts, several))
    for video in plan.videos:
        _check_files(config, video, several)
    if config.image_prompt:
        plan = replace(plan, images=open_image_prompt(config))
    return replace(plan, request=_request(plan))


def _with_preset(plan: GenerationPlan, preset: str | Path | Preset) -> GenerationPlan:
    """Read a preset's file, with its method and number of steps. A name is left to `fitted`."""
    if isinstance(preset, str) and preset in registry.PRESETS:
        return replace(plan, preset=preset)
    found = preset if isinstance(preset, Preset) else read_preset(preset)
    config = _solved(plan.config, found, preset)
    return replace(plan, preset=found, method=found.method, config=config)


def _with_lora(plan: GenerationPlan, from_lora: Path) -> GenerationPlan:
    """Add method, weights, guidance and techniques of a LoRA of `gen_accel.lora`."""
    config = plan.config
    # The LoRA's file imports nothing: a class of one's own is imported where it is typed.
    method = config.method
    kind = method_class(method) if isinstance(method, str) and ":" in method else None
    is_other = bool(config.set) or (method is not None and kind is None)
    if plan.preset is None and (is_other or not _is_method_of(from_lora, kind)):
        raise ValueError(
            f"from_lora {from_lora} brings its own method, got {method or ' '.join(config.set)} "
            "too: leave --method and --set out"
        )
    recipe = read_recipe(from_lora)
    _check_experts(recipe, from_lora, config.model)
    if recipe.part != "transformer":
        raise ValueError(
            f"from_lora {from_lora} is for {recipe.part}: load it in Python, by "
            "pipe.load_lora_weights(folder, load_into_transformer_2=True)"
        )
    if recipe.condition == "first_frame" and config.image is None:
        raise ValueError(
            f"from_lora {from_lora} was trained on clips with their first frame: give one, "
            "--image FIRST.png"
        )
    changed: dict[str, Any] = _guidance(config, recipe, from_lora)
    if recipe.rank:  # at rank 0 only the method's own parameters were trained
        changed["loras"] = (*config.loras, str(from_lora))
    own = config.techniques is None
    plan = replace(plan, config=config.model_copy(update=changed), only_longer=own)
    if own and recipe.techniques:
        frames = plan.trained_frames or recipe.trained_frames
        plan = replace(plan, techniques=tuple(recipe.techniques), trained_frames=frames)
    elif plan.trained_frames is not None and not plan.techniques:
        raise ValueError(f"trained_frames is for a technique, got {plan.trained_frames} and none")
    return plan if plan.preset is not None else replace(plan, method=recipe.build_method())


def _is_method_of(from_lora: Path, kind: type[Method] | None) -> bool:
    """Whether a LoRA was trained through methods of `kind`; None stands for any."""
    return kind is None or type(read_recipe(from_lora).build_method()) is kind


def _videos(config: GenerateConfig, texts: tuple[str, ...], several: bool) -> tuple[Video, ...]:
    def numbered(path: Path) -> list[Path]:
        path = expanded(path)
        return prompt_list.numbered(path, len(texts)) if several else [path]

    latents: list[Path | None] = [None] * len(texts)
    if config.save_latents is not None:
        latents = [*numbered(config.save_latents)]
    config.replaced(seed=config.seed + len(texts) - 1)  # refused if it is too large
    each = zip(texts, numbered(config.out), latents, strict=True)
    return tuple(
        Video(text, config.seed + i, target, path) for i, (text, target, path) in enumerate(each)
    )


def _check_files(config: GenerateConfig, video: Video, several: bool) -> None:
    """Raise early the errors that writing the files would raise after the work."""
    check_writable(video.target, frames=config.frames)
    if config.compare:
        check_installed()
        for name in ("dense", "side_by_side"):
            check_writable(beside(video.target, name), frames=config.frames)
        check_replaceable(report_of(video.target))
    if several:
        check_replaceable(prompt_list.record_of(video.target))
    if video.latents is not None:
        check_latents_path(video.latents)
    if config.preview is not None:
        check_replaceable(preview_of(video.target))


def _request(plan: GenerationPlan) -> dict[str, Any]:
    config = plan.config
    request = prompt_list.sources(config) | {
        "image": None if plan.images is None else plan.images.identity(),
        **plan.attention(),
        "schedule": str(plan.schedule),
        "techniques": [*plan.techniques],
        "trained_frames": plan.trained_frames,
    }
    if plan.files is not None:
        request["given"] = plan.files.identity()
    if config.compare:  # its report states how long it took
        named = ("kernel", "timed", "device", "dense_kernel", "metrics")
        where = {name: getattr(config, name) for name in named}
        request["compare"] = {name: one for name, one in plain(where).items() if one is not None}
    return request


def _check_experts(recipe: Recipe, from_lora: str | Path, model: str | Path) -> None:
    """Refuse a LoRA of two experts that is not whole, or for a model in a folder with one."""
    parts = folders_of(from_lora)
    index = expanded(model_named(model)) / "model_index.json"
    if len(parts) == 1 or not index.is_file():
        return
    held = read_fields(index)
    for part in parts:
        if (held.get(part) or [None])[0] is None:
            raise ValueError(
                f"from_lora {from_lora} is for {' and '.join(parts)}, and {model} has no {part}: "
                "give a pipeline of two experts, as Wan 2.2 A14B"
            )


def _guidance(config: GenerateConfig, recipe: Recipe, from_lora: Path) -> dict[str, float]:
    """Turn guidance off if the LoRA holds it, unless a guidance scale is given."""
    if not recipe.holds_guidance or config.guidance_scale is not None:
        return {}
    if config.negative_prompt is not None:
        raise ValueError(
            f"negative_prompt {config.negative_prompt!r} needs guidance, and from_lora "
            f"{from_lora} holds it: leave it out, or give a guidance_scale above 1"
        )
    return {"guidance_scale": 1.0}


def _solved(config: GenerateConfig, preset: Preset, name: object) -> GenerateConfig:
    """Take the number of steps that a preset was solved for; ValueError for another one."""
    solved = preset.method.steps
    if config.steps is None:
        return config.model_copy(update={"steps": solved})
    if config.steps != solved:
        raise registry.other_steps(name, solved, config.steps)
    return config
