"""The plan of a generation: a config with all that its LoRA, preset and pipeline fill in, checked
before any work; what a video of it keeps as settings, and what it will cost."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gen_accel import kernels, registry
from gen_accel.attention_processors import method_class, method_name
from gen_accel.attention_processors.attached.recipe import folders_of, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.summary import Summary
from gen_accel.attention_processors.families.pipelines import choose_in, takes
from gen_accel.attention_processors.methods.registry import method_from, options_of
from gen_accel.config import is_words
from gen_accel.io import plain, read_fields
from gen_accel.measure.clip_settings import ClipSettings, fingerprint, versions
from gen_accel.measure.quality import check_installed, check_metrics
from gen_accel.measure.report import beside, report_of
from gen_accel.measure.video_io import check_writable
from gen_accel.method import Method
from gen_accel.parsing import as_text
from gen_accel.paths import check_replaceable, expanded, model_named
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.config import (
    ATTENTION,
    GenerateConfig,
    sources_of,
    values_of_clip,
)
from gen_accel.pipelines.generation.decode import check_latents_path
from gen_accel.pipelines.generation.inputs import (
    CallArguments,
    OpenedFiles,
    OpenedImages,
    check_length,
    fit,
    open_files,
    open_image_prompt,
)
from gen_accel.pipelines.generation.loading import find_device
from gen_accel.pipelines.generation.model_index import (
    check_model,
    folder_of,
    index_of,
    pipeline_class,
)
from gen_accel.pipelines.generation.preview import preview_of
from gen_accel.pipelines.generation.sampling import check_clip, filled
from gen_accel.pipelines.long_video import check_names
from gen_accel.pipelines.tuning.preset import Preset, choose_preset, read_preset

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.measure.cost.forecast import Forecast

STEPS = 50  # of a pipeline without a default


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
    files: OpenedFiles | None = None
    images: OpenedImages | None = None
    arguments: CallArguments | None = None
    videos: tuple[Video, ...] = ()
    several: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def techniques(self) -> tuple[str, ...]:
        """Techniques for video longer than the model was trained on."""
        return self.config.techniques or ()

    def left(self) -> list[int]:
        """Numbers of the videos to make: all, or the unfinished ones of a list."""
        resume = self.several and not self.config.overwrite
        return [
            i
            for i, video in enumerate(self.videos)
            if not resume
            or not prompt_list.is_done(video.target, self.inputs_of(video), video.latents)
        ]

    def inputs_of(self, video: Video) -> dict[str, Any]:
        """Collect the inputs of one video: the request, its prompt and its seed."""
        return {**self.request, "prompt": video.prompt, "seed": video.seed}

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
        config, arguments, steps = self.config, None, self.config.steps
        if self.files is not None:
            config, arguments = fit(pipe, config, self.files)
        config = filled(pipe, config, () if arguments is None else arguments.values)
        method, schedule, preset = self.method, self.schedule, self.preset
        if preset is not None:
            call = _call_of(config.frames, config.height, config.width, steps)
            method, schedule, found = choose_preset(preset, pipe, schedule, call)
            if found is not None:
                config = config.model_copy(update={"steps": _steps_of(found, steps, preset)})
            # No tuned preset fits this call: attach the rule of that name.
            preset = found or (None if config.from_lora is None else preset)
        frames, trained = config.frames, config.trained_frames
        if self.asked.extend is None and not (frames and trained and frames > trained):
            config = config.model_copy(update={"extend": "none", "trained_frames": None})
        if config.techniques and frames is None:
            kind, name = type(pipe).__name__, config.techniques[0]
            raise ValueError(f"frames must be given with {name}: {kind} has no default")
        assert method is not None, "planned"
        check_clip(pipe, config, method)
        return replace(
            self,
            config=config,
            arguments=arguments,
            method=method,
            schedule=schedule,
            preset=preset,
        )

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
    own = config.preset is None and config.from_lora is None
    if config.has_schedule or own:
        schedule = Schedule(
            dense_layers=config.dense_layers,
            dense_steps=config.dense_steps,
            dense_start=config.dense_start,
            dense_end=config.dense_end,
            dense=config.dense_at,
            dense_noise=config.dense_noise,
        )
    plan = GenerationPlan(
        config, config, config.built_method() if own else None, schedule=schedule
    )
    if config.preset is not None:
        plan = _with_preset(plan, config.preset)
    if config.from_lora is not None:
        plan = _with_lora(plan, config.from_lora)
    texts = config.texts
    if not texts:
        raise ValueError("no prompts: give --prompt TEXT, or --prompts FILE with one on each line")
    files = open_files(config) if config.kinds else None
    if config.compare:
        if plan.method is not None and plan.method.is_dense:
            raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
        check_metrics(config.metrics)
    check_names(plan.techniques)
    check_model(config.model)
    _check_inputs(folder_of(config.model), files, config.frames)
    if not elsewhere:
        plan.check_kernels()
    several = config.prompts is not None or len(texts) > 1
    videos = _videos(config, texts, several)
    for video in videos:
        _check_files(config, video, several)
    images = open_image_prompt(config) if config.image_prompt else None
    plan = replace(plan, files=files, images=images, several=several, videos=videos)
    return replace(plan, request=_request(plan))


def _check_inputs(folder: Path, files: OpenedFiles | None, frames: int | None) -> None:
    """Refuse what a model in a folder makes no video from, and a video of another length; a model
    on the hub is left to `load`."""
    if not (folder / "model_index.json").is_file():
        return
    asked = () if files is None else files.kinds
    row = takes(choose_in(folder, asked, strength=bool(files and files.strength is not None)))
    if row is not None and files is not None and files.video is not None and frames is not None:
        check_length(files.video, files.video.count(frames), frames, row, files.strength)


def _with_preset(plan: GenerationPlan, preset: str | Path | Preset) -> GenerationPlan:
    """Read a preset's file, with its method and number of steps. A name is left to `fitted`."""
    if isinstance(preset, str) and preset in registry.PRESETS:
        return replace(plan, preset=preset)
    found = preset if isinstance(preset, Preset) else read_preset(preset)
    steps = _steps_of(found, plan.config.steps, preset)
    config = plan.config.model_copy(update={"steps": steps})
    return replace(plan, preset=found, method=found.method, config=config)


def _steps_of(preset: Preset, asked: int | None, name: object) -> int:
    """Return the number of steps that a preset was solved for; ValueError if another is asked."""
    solved = preset.method.steps
    if asked not in (None, solved):
        raise registry.other_steps(name, solved, asked)
    return solved


def _call_of(
    frames: int | None, height: int | None, width: int | None, steps: int | None
) -> dict[str, int | None]:
    """Describe a call by the pipelines' names, for `choose_preset`."""
    return {"num_frames": frames, "height": height, "width": width, "num_inference_steps": steps}


def _with_lora(plan: GenerationPlan, from_lora: Path) -> GenerationPlan:
    """Add method, weights, guidance and techniques of a LoRA of `gen_accel.lora`."""
    config = plan.config
    if plan.preset is None:
        _check_method(config, from_lora)
    recipe = read_recipe(from_lora)
    _check_experts(from_lora, config.model)
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
    changed: dict[str, Any] = {}
    if recipe.holds_guidance and config.guidance_scale is None:
        if config.negative_prompt is not None:
            raise ValueError(
                f"negative_prompt {config.negative_prompt!r} needs guidance, and from_lora "
                f"{from_lora} holds it: leave it out, or give a guidance_scale above 1"
            )
        changed["guidance_scale"] = 1.0
    if recipe.rank:  # at rank 0 only the method's own parameters were trained
        changed["loras"] = (*config.loras, str(from_lora))
    if config.extend is None and recipe.techniques:
        changed["extend"] = tuple(recipe.techniques)
        changed["trained_frames"] = config.trained_frames or recipe.trained_frames
    elif config.trained_frames is not None and not config.techniques:
        raise ValueError(
            f"trained_frames is for a technique, got {config.trained_frames} and none"
        )
    method = plan.method if plan.preset is not None else recipe.build_method()
    return replace(plan, method=method, config=config.model_copy(update=changed))


def _check_method(config: GenerateConfig, from_lora: Path) -> None:
    """Refuse a method beside a LoRA, which brings its own. A LoRA's own class may be typed, as
    module:Class: that imports it, which a LoRA's file does not."""
    method = config.method
    if method is None and not config.set:
        return
    kind = method_class(method) if isinstance(method, str) and ":" in method else None
    if kind is None or config.set or type(read_recipe(from_lora).build_method()) is not kind:
        raise ValueError(
            f"from_lora {from_lora} brings its own method, got {method or ' '.join(config.set)} "
            "too: leave --method and --set out"
        )


def _check_experts(from_lora: Path, model: str) -> None:
    """Refuse a LoRA of two experts that is not whole, or for a model in a folder with one."""
    parts = folders_of(from_lora)
    index = folder_of(model) / "model_index.json"
    if len(parts) == 1 or not index.is_file():
        return
    held = read_fields(index)
    for part in parts:
        if (held.get(part) or [None])[0] is None:
            raise ValueError(
                f"from_lora {from_lora} is for {' and '.join(parts)}, and {model} has no {part}: "
                "give a pipeline of two experts, as Wan 2.2 A14B"
            )


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
        "trained_frames": config.trained_frames,
        **values_of_clip(config),
    }
    if plan.files is not None:
        request["given"] = plan.files.identity()
    if config.compare:  # its report states how long it took
        named = ("kernel", "timed", "device", "dense_kernel", "metrics")
        where = {name: getattr(config, name) for name in named}
        request["compare"] = {name: one for name, one in plain(where).items() if one is not None}
    return request


class Settings:
    """Settings of the videos of a plan, as their files keep them; see `measure.clip_settings`.

    Args:
        plan: a result of `fitted`.
    """

    def __init__(self, pipe: "DiffusionPipeline", plan: GenerationPlan) -> None:
        self.device = pipe._execution_device.type
        self.wordless: dict[str, str] = {}
        self.fields = self._fields(plan)
        self.files: dict[str, dict[str, str | None]] = {}
        for name, value in self.fields.items():
            texts = [str(one) for one in (value if isinstance(value, list) else [value])]
            found = {text: fingerprint(*sources_of(name, text)) for text in texts}
            if sources_of(name, "x"):
                self.files[name] = found

    def of(self, video: Video, summary: Summary, *, dense: bool = False) -> ClipSettings:
        """Return the settings of one video.

        Args:
            summary: of its run.
            dense: it is the dense clip of a comparison.
        """
        left = ATTENTION if dense else ()
        fields = {name: value for name, value in self.fields.items() if name not in left}
        fields |= {"prompt": [video.prompt], "seed": video.seed}
        if dense:
            fields["method"] = "dense"
        files = {name: value for name, value in self.files.items() if name not in left}
        wordless = {name: value for name, value in self.wordless.items() if name not in left}
        kernels = {one.choice.kernel for one in summary.records.values() if one.choice}
        ran = {"device": self.device, "kernels": sorted(kernels)}
        return ClipSettings(fields, files, versions(), ran, wordless)

    def _fields(self, plan: GenerationPlan) -> dict[str, Any]:
        """Fields of all videos, as words."""
        asked, dtype = plan.asked, plan.asked.dtype
        if dtype == "auto":
            dtype = "float32" if self.device == "cpu" else "bfloat16"
        extend = plan.techniques or "none"
        whole = plan.config.model_copy(
            update={"dtype": dtype, "loras": asked.loras, "extend": extend}
        )
        kinds = {"preset": "a preset", "video": "a video"}
        fields = {}
        for name, value in whole.kept().items():
            if is_words(value):
                fields[name] = value
            elif name != "method":
                self.wordless[name] = f"{kinds.get(name, 'a picture')} that was given in Python"
        if asked.preset is None and asked.from_lora is None and plan.method is not None:
            try:
                name, options = method_name(plan.method), written_options(plan.method)
                if method_from(name, options) == plan.method:
                    return fields | {"method": name} | ({"set": options} if options else {})
            except ValueError:
                pass  # no words make this method again
            self.wordless["method"] = repr(plan.method)
        return fields


def written_options(method: Method) -> list[str]:
    """Write the options of a method that differ from their defaults, "field=value" each, as
    `method_from` reads them. A method within is written by its name, and its options."""
    written = []
    for one in options_of(type(method)):
        value = getattr(method, one.name)
        if value == one.default:
            continue
        if options_of(type(value)):
            written.append(f"{one.name}={method_name(value)}")
            written += [f"{one.name}.{inner}" for inner in written_options(value)]
        else:
            written.append(f"{one.name}={as_text(value)}")
    return written


def forecast_generate(config: GenerateConfig, *, gpu: str | None = None) -> "Forecast":
    """Forecast one video of a config, which is checked as far as that goes without the model.

    Values that it leaves open are the defaults of its pipeline's class.

    Args:
        gpu: a card of `measure.cost.rates`; None: this machine.

    Raises:
        ValueError: what `forecast` refuses, or a size that is given neither by the config nor by
            the pipeline.
    """
    from gen_accel.measure.cost.forecast import forecast
    from gen_accel.measure.cost.model import subject_of

    if not config.texts:
        config = config.replaced(prompt=("any prompt",))  # as none changes the cost
    plan = plan_of(config)
    config, model = plan.config, model_named(config.model)
    subject = subject_of(model)
    kind = pipeline_class(index_of(config.model)["_class_name"])
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__call__).parameters.items()
        if isinstance(parameter.default, int | float)
    }
    frames = config.frames or known.get(subject.family.generation.frames_argument)
    height, width = (getattr(config, side) or known.get(side) for side in ("height", "width"))
    if frames is None or height is None or width is None:
        missing = {"--frames": frames, "--height": height, "--width": width}
        lacking = ", ".join(option for option, size in missing.items() if size is None)
        raise ValueError(f"give {lacking}: {kind.__name__} has no default")
    steps = config.steps or known.get("num_inference_steps") or STEPS
    method, schedule = plan.method, plan.schedule
    if plan.preset is not None:
        call = _call_of(int(frames), int(height), int(width), config.steps)
        method, schedule, found = choose_preset(plan.preset, subject.model, schedule, call)
        steps = steps if found is None else found.method.steps
    assert method is not None, "planned"
    scale = config.guidance_scale
    scale = known.get("guidance_scale") if scale is None else scale
    about: Any = subject.model.config
    distilled = about.get("guidance_embeds", False)
    return forecast(
        model,
        method,
        gpu=gpu,
        dtype=config.dtype,
        guidance=None if scale is None or distilled else scale > 1,
        offload=config.offload,
        height=int(height),
        width=int(width),
        num_frames=int(frames),
        schedule=schedule,
        steps=int(steps),
        text=config.max_tokens,
    )
