"""The plan of a generation: a config with all that its LoRA, preset and pipeline fill in, checked
before any work; what a video of it keeps as settings, and what it will cost."""

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gen_accel import kernels, published, registry
from gen_accel.attention_processors import Dense, method_class, method_name
from gen_accel.attention_processors.attached.attachment import AttachOptions
from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.attached.recipe import folders_of, read_recipe
from gen_accel.attention_processors.attached.records import Summary
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.trained import check_files_used
from gen_accel.attention_processors.families.pipelines import choose_in, takes
from gen_accel.attention_processors.methods.registry import method_from, options_of
from gen_accel.config import is_words
from gen_accel.hub import index_in, parted
from gen_accel.io import check_folder, plain, read_fields, read_index
from gen_accel.measure.clip_settings import ClipSettings, fingerprint, versions
from gen_accel.measure.quality import check_installed, check_metrics
from gen_accel.measure.video_io import check_writable
from gen_accel.method import Method
from gen_accel.parsing import as_text, is_told, shown
from gen_accel.paths import (
    DEMO,
    check_output,
    check_replaceable,
    expanded,
    model_named,
    numbered,
    real,
)
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.config import (
    ATTENTION,
    OWN,
    GenerateConfig,
    prompts_of,
    values_of_clip,
)
from gen_accel.pipelines.generation.decode import LATENTS
from gen_accel.pipelines.generation.inputs import (
    CallArguments,
    OpenedFiles,
    OpenedImages,
    check_length,
    fit,
    identity,
    in_length,
    open_files,
    open_image_prompt,
    own_arguments,
)
from gen_accel.pipelines.generation.loading import find_device, missing_files, needed_parts
from gen_accel.pipelines.generation.lora_words import names_of
from gen_accel.pipelines.generation.model_index import (
    asked_run,
    check_model,
    folder_of,
    frame_rate_of,
    frames_in,
    index_of,
    known_run,
    location_of,
    pipeline_class,
    whole_run,
)
from gen_accel.pipelines.generation.of_blocks import is_of_blocks
from gen_accel.pipelines.generation.quantising import check_plain
from gen_accel.pipelines.generation.sampling import check_clip, filled
from gen_accel.pipelines.generation.step_cache import check_cache, skipped_steps
from gen_accel.pipelines.generation.stream import StreamSettings, stream_clip
from gen_accel.pipelines.long_video import check_names
from gen_accel.pipelines.tuning.preset import Preset, by_rule, choose_preset, read_preset
from gen_accel.published import FewSteps, few_steps, trained_method
from gen_accel.registry import LinearKernel

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.measure.cost.forecast import Forecast
    from gen_accel.pipelines.generation.stream_cost import StreamForecast


class Video(NamedTuple):
    """One video of a plan.

    Args:
        latents: file for its latents; None keeps none.
        texts: all prompts of a stream, as they were given.
    """

    prompt: str
    seed: int
    target: Path
    latents: Path | None = None
    texts: tuple[str, ...] = ()


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
        request: inputs of all videos, as `prompt_list.is_done` compares them.
    """

    asked: GenerateConfig
    config: GenerateConfig
    method: Method | None = None
    preset: str | Path | Preset | None = None
    schedule: Schedule | None = None
    files: OpenedFiles | None = None
    images: OpenedImages | None = None
    arguments: CallArguments | None = None
    videos: tuple[Video, ...] = ()
    request: Mapping[str, object] = field(default_factory=dict)

    @property
    def techniques(self) -> tuple[str, ...]:
        """Techniques for video longer than the model was trained on."""
        return self.config.techniques or ()

    @property
    def told(self) -> tuple[str, ...]:
        """Lines about what was made of the length, the pictures and the video that are given, and
        about a cache of few steps."""
        config, lines = self.config, () if self.arguments is None else self.arguments.told
        if config.steps is not None and (
            few := registry.cached_in_few(config.cache, config.steps)
        ):
            lines = (*lines, few)
        if (seconds := self.asked.seconds) is None:
            return lines
        rate = f"{config.fps:g} frames a second"
        return (f"{seconds:g} s at {rate}: {config.frames} frames", *lines)

    @property
    def dense_kernel(self) -> str | None:
        """Kernel of dense steps and layers; None for the model's own attention."""
        asked = self.config.dense_kernel
        return None if asked == OWN or (asked == "auto" and self._is_dense) else asked

    @property
    def linear_kernel(self) -> LinearKernel:
        """Kernel of the linear layers."""
        asked = self.config.linear_kernel
        return "torch" if asked == "auto" and self._is_dense else asked

    @property
    def _is_dense(self) -> bool:
        """Whether the model runs as it is, but for what is named."""
        return self.method is not None and self.method.is_dense

    @property
    def options(self) -> AttachOptions:
        """Options of `gen_accel.attach` beside what is attached."""
        return {
            "schedule": self.schedule,
            "kernel": self.config.kernel,
            "dense_kernel": self.dense_kernel,
            "timed": self.config.timed,
        }

    def left(self) -> list[int]:
        """Numbers of the videos to make: all, or the unfinished ones of a list.

        Raises FileExistsError for a file that a video of a list would replace, and that is not its
        own, unless `overwrite` is given.
        """
        if not self.config.is_list:
            return [*range(len(self.videos))]
        found = []
        for i, video in enumerate(self.videos):
            asked, target = self.inputs_of(video), video.target
            if prompt_list.is_done(target, asked, video.latents):
                continue
            files = {} if self.config.overwrite else self.files_of(video)
            for kind, path in files.items():
                if kind not in ("record", "preview") and not prompt_list.is_own(
                    path, target, asked
                ):
                    raise FileExistsError(
                        f"{path} is there already, and not of this prompt with these options: "
                        "--overwrite replaces it, or give another --out"
                    )
            found.append(i)
        return found

    def inputs_of(self, video: Video) -> dict[str, object]:
        """Collect the inputs of one video: the request, its prompt and its seed."""
        return {**self.request, "prompt": video.prompt, "seed": video.seed}

    def clip_of(self, video: Video) -> GenerateConfig:
        return self.config.model_copy(update={"seed": video.seed})

    def files_of(self, video: Video) -> dict[str, Path]:
        """All files that making a video writes, by their kind."""
        latents = {} if video.latents is None else {"latents": video.latents}
        return self.config.files_of(video.target) | latents

    def attention(self) -> dict[str, str]:
        """Identify what is attached: a method, or a preset by its name or a hash of its file."""
        if self.preset is None:
            return {"method": repr(self.method)}
        if not isinstance(self.preset, Preset):
            return {"preset": str(self.preset)}
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
        elif (known := known_run(config.model)) is not None:  # else pictures decide the sizes
            sizes = known._asdict() | asked_run(config)
            config = config.model_copy(update=sizes)
        if config.stream:
            return replace(self, config=stream_clip(pipe, config))
        config = filled(pipe, config, () if arguments is None else arguments.values)
        arguments = in_length(
            pipe, config.frames, arguments, own_arguments(type(pipe), config.call)
        )
        method, schedule, preset = self.method, self.schedule, self.preset
        if preset is not None:
            call = _call_of(config.frames, config.height, config.width, steps)
            quiet = self.asked.preset is None
            method, schedule, found = choose_preset(preset, pipe, schedule, call, quiet=quiet)
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
        if config.cache is not None:
            check_cache(pipe, config.cache)
        attached = {"method": method, "schedule": schedule, "preset": preset}
        return replace(self, config=config, arguments=arguments, **attached)

    def check_kernels(self) -> None:
        """Refuse, by a ValueError, a device that is not here, and a named kernel that does not
        run on it."""
        device = find_device(self.config.device)
        for kernel in (self.config.kernel, self.dense_kernel or "auto"):
            if kernel != "auto":
                kernels.check_kernel(kernel, device)


class AsPublished(UserWarning):
    """Weights from elsewhere are run as they were published: their attention, or their few
    steps."""


def plan_of(config: GenerateConfig, *, elsewhere: bool = False) -> GenerationPlan:
    """Plan the videos of a config: read its LoRA, preset and pictures, and check its files.

    Args:
        config: checked by its `check`.
        elsewhere: other machines make the videos, whose devices are not known here.

    Raises:
        ValueError, OSError: any fault that can be found before the model is loaded.
    """
    asked, config = config, _as_published(config)
    preset, schedule = config.chosen_preset, config.built_schedule()
    config = config.model_copy(update={"preset": preset})
    if (seconds := config.seconds) is not None:
        length = {"frames": frames_in(config.model, seconds, config.fps), "seconds": None}
        config = config.model_copy(update=length)
    method = None
    if config.stream:
        config = _with_own_stream(config)
    if preset is None and config.from_lora is None:
        method, schedule = config.built_method(), schedule or Schedule()
    elif isinstance(preset, str | Path) and preset not in registry.PRESETS:
        preset = read_preset(preset)
    if isinstance(preset, Preset):  # a name is left to `fitted`
        steps = _steps_of(preset, config.steps, config.preset)
        method, config = preset.method, config.model_copy(update={"steps": steps})
    if config.from_lora is not None:
        config, own = _with_lora(config, config.from_lora)
        method = own if preset is None else method
        config.check_sampling()
    if config.stream:
        seen = _seen_by(config)
        if method is not None:
            seen.zones.check_method(method)
    if not (texts := config.texts):
        raise ValueError("no prompts: give --prompt TEXT, or --prompts FILE with one on each line")
    files = open_files(config) if config.kinds else None
    if config.compare:
        if method is not None and method.is_dense:
            raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
        check_metrics(config.metrics)
        check_installed()
    check_names(config.techniques or ())
    check_model(config.model)
    folder = folder_of(config.model)
    _check_weights(config, folder, method or by_rule(str(preset), quiet=True)[0])
    if index_in(folder) is not None:  # a model on the hub is left to `load`
        if config.quantize is not None:
            check_plain(folder, config.quantize)
        kind = choose_in(folder, config.kinds, strength=config.strength is not None)
        row = takes(kind)
        if config.call:
            own_arguments(pipeline_class(kind), config.call)
        if row and files and files.video and (frames := config.frames):
            has = sum(1 for _ in files.video.frames(frames))
            check_length(files.video, has, frames, row, config.strength)
    plan = GenerationPlan(
        asked,
        config,
        method,
        preset,
        schedule,
        files,
        open_image_prompt(config) if config.image_prompt else None,
    )
    if not elsewhere:
        plan.check_kernels()
    plan = replace(plan, videos=_videos(config, texts), request=_request(plan))
    for video in plan.videos:
        for kind, path in plan.files_of(video).items():
            if kind in ("video", "dense", "side by side"):
                check_writable(path, frames=config.frames)
            elif kind == "latents":
                check_output(path, LATENTS)
                check_folder(real(path).parent)
            else:
                check_replaceable(path)
    return plan


def _check_weights(config: GenerateConfig, folder: Path, method: Method) -> None:
    """Refuse a method that leaves out what the files of the model and its LoRAs hold for another;
    those on the hub are left to `attach`."""
    own = [one for part in TRANSFORMERS for one in sorted(folder.glob(f"{part}/*.safetensors"))]
    held: dict[str, list[Path]] = {config.model: own}
    for source, _ in map(parted, config.loras):
        path = expanded(source)
        held[source] = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    check_files_used(held, method)
    if config.compare:
        try:
            check_files_used(held, Dense())
        except ValueError as error:
            raise ValueError(f"compare makes a dense clip too: {error}") from None


def _with_own_stream(config: GenerateConfig) -> GenerateConfig:
    """Check the prompts, and take the embedded LoRA of the demo model where none is given, and
    dense attention where no method is. A sparse method has no middle unless one is asked for."""
    prompts_of(config.prompt)
    if config.from_lora is not None:
        return config
    changed: dict[str, Any] = {"method": config.method or "dense"}
    embedded = Path(model_named(DEMO))
    if not config.loras and model_named(config.model) == str(embedded):
        lora = embedded.with_name("stream_lora")
        if config.method is None:
            return config.model_copy(update={"from_lora": lora})
        changed["loras"] = (str(lora),)
    if config.method is not None and not config.built_method().is_dense:
        changed["zones"] = ("middle=none", *config.zones)  # of which the last counts
    return config.model_copy(update=changed)


def _seen_by(config: GenerateConfig) -> StreamSettings:
    """Return what a chunk of a stream sees, as far as that is known without the model."""
    lora = config.from_lora
    known = None if lora is None else StreamSettings.of(read_recipe(lora))
    return (known or StreamSettings()).changed(config.zones)


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


def _as_published(config: GenerateConfig) -> GenerateConfig:
    """Take the attention and the few steps that weights from elsewhere were published with, where
    none are named; of weights that differ none."""
    sources = {source: names_of(source) for source in (parted(one)[0] for one in config.loras)}
    sources[config.model] = _names_of_model(config.model)
    own = config.method is None and config.preset is None and config.chosen_preset is not None
    methods = {name: of for of, names in sources.items() if (name := trained_method(*names))}
    if own and len(methods) == 1:
        [(name, source)] = methods.items()
        warnings.warn(
            f"{source} is {published.METHODS[name].about}: taken is its attention, --method "
            f"{name}. --method or --preset takes another",
            AsPublished,
            stacklevel=3,
        )
        config = config.model_copy(update={"method": name})
    if config.from_lora is not None:
        return config
    few = {one: of for of, names in sources.items() if (one := few_steps(*names))}
    return _in_few_steps(config, *few.popitem()) if len(few) == 1 else config


def _names_of_model(model: str) -> tuple[str, ...]:
    """Return the names by which a model may be known: its own, the pipeline of its folder, and the
    file that `assemble` linked as its transformer."""
    index = index_in(folder_of(model))
    own = None if index is None else read_fields(index).get("_class_name")
    files = (one.resolve().name for one in folder_of(model).glob("transformer/original.*"))
    return model_named(model), str(own), *files


def _in_few_steps(config: GenerateConfig, few: FewSteps, source: str) -> GenerateConfig:
    """Sample as published weights are, as far as no option says otherwise."""
    changed: dict[str, Any] = {}
    scale, is_open = config.guidance_scale, config.sampling is None and not config.own_sampler
    if is_open and (not few.levels or config.steps in (None, few.steps)):
        changed = {"sampler": few.sampler, "levels": few.levels, "shift": few.shift}
    if is_open and config.steps is None:
        changed["steps"] = few.steps
    if config.stream and few.zones:
        changed["zones"] = (*few.zones, *config.zones)  # of which the last counts
    if scale is None and few.guidance_scale is not None:
        changed["guidance_scale"] = few.guidance_scale
    elif scale is not None and scale > 1 and few.guidance_scale == 1.0:
        warnings.warn(
            f"{source} is {few.about}, which hold their guidance: with --guidance-scale {scale:g} "
            "they are guided twice, by two calls a step; leave it out",
            AsPublished,
            stacklevel=4,
        )
    if changed:
        warnings.warn(
            f"{source} is {few.about}: sampled as published, "
            f"{few.as_stream if 'zones' in changed else few.words}, as far as nothing else is "
            "asked for",
            AsPublished,
            stacklevel=4,
        )
    return config.model_copy(update=changed)


def _with_lora(config: GenerateConfig, from_lora: Path) -> tuple[GenerateConfig, Method]:
    """Add weights, guidance and techniques of a LoRA of `gen_accel.lora`. Also returns its method.

    A method may stand beside it only as the LoRA's own class, typed as module:Class: that imports
    it, which a LoRA's file does not.
    """
    method, alone = config.method, config.preset is None
    kind = method_class(method) if isinstance(method, str) and ":" in method else None
    is_other = alone and (bool(config.set) or (method is not None and kind is None))
    recipe = None if is_other else read_recipe(from_lora)
    if recipe is None or (alone and kind not in (None, type(recipe.build_method()))):
        raise ValueError(
            f"from_lora {from_lora} brings its own method, got {method or ' '.join(config.set)} "
            "too: leave --method and --set out"
        )
    parts, index = folders_of(from_lora), index_in(folder_of(config.model))
    held = read_index(index) if len(parts) > 1 and index is not None else None
    for part in parts:
        if held is not None and (held.get(part) or [None])[0] is None:
            raise ValueError(
                f"from_lora {from_lora} is for {' and '.join(parts)}, and {config.model} has no "
                f"{part}: give a pipeline of two experts, as Wan 2.2 A14B"
            )
    if recipe.part != "transformer":
        raise ValueError(
            f"from_lora {from_lora} is for {recipe.part}: load it in Python, by "
            "pipe.load_lora_weights(folder, load_into_transformer_2=True)"
        )
    if recipe.condition in ("first_frame", "last_frame") and config.image is None:
        raise ValueError(
            f"from_lora {from_lora} was trained on clips with their first frame: give one, "
            "--image FIRST.png"
        )
    if recipe.condition == "last_frame" and config.last_image is None:
        raise ValueError(
            f"from_lora {from_lora} was trained on clips with their last frame too: give one, "
            "--last-image LAST.png"
        )
    if recipe.condition == "control" and config.video is None:
        raise ValueError(
            f"from_lora {from_lora} was trained on clips with a control film: give one, "
            "--video CONTROL.mp4"
        )
    changed: dict[str, object] = {}
    if (recipe.holds_guidance or recipe.sampler) and config.guidance_scale is None:
        if config.negative_prompt is not None:
            raise ValueError(
                f"negative_prompt {shown(config.negative_prompt)} needs guidance, and from_lora "
                f"{from_lora} goes without: leave it out, or give a guidance_scale above 1"
            )
        changed["guidance_scale"] = 1.0
    if recipe.rank:  # at rank 0 only the method's own parameters were trained
        changed["loras"] = (*config.loras, str(from_lora))
    if config.frames is None:
        changed["frames"] = recipe.frames
    if config.extend is None and recipe.techniques:
        changed["extend"] = tuple(recipe.techniques)
        changed["trained_frames"] = config.trained_frames or recipe.trained_frames
    elif config.trained_frames is not None and not config.techniques:
        raise ValueError(
            f"trained_frames is for a technique, got {config.trained_frames} and none"
        )
    count = len(recipe.levels)
    own = config.sampling is None and config.steps in (None, count)
    if count and own and not config.model_copy(update=changed).own_sampler:
        sampler = recipe.sampler or "euler"
        changed |= {"sampler": sampler, "levels": recipe.levels, "steps": count}
    return config.model_copy(update=changed), recipe.build_method()


def _videos(config: GenerateConfig, texts: tuple[str, ...]) -> tuple[Video, ...]:
    def places(path: Path) -> list[Path]:
        path = expanded(path)
        return numbered(path, len(texts)) if config.is_list else [path]

    if config.stream:
        return (Video(texts[0], config.seed, expanded(config.target), texts=texts),)
    kept = config.save_latents
    latents = [None] * len(texts) if kept is None else places(kept)
    config.replaced(seed=config.seed + len(texts) - 1)  # refused if it is too large
    seeds = range(config.seed, config.seed + len(texts))
    return tuple(map(Video, texts, seeds, places(config.target), latents))


def _request(plan: GenerationPlan) -> dict[str, object]:
    config = plan.config
    loras = map(parted, config.loras)
    request: dict[str, object] = {
        "model": identity(folder_of(config.model)),
        "dtype": config.dtype,
        "loras": [f"{identity(source)}:{weight:g}" for source, weight in loras],
        "from_lora": None if config.from_lora is None else identity(config.from_lora),
        "image": None if plan.images is None else plan.images.identity(),
        **plan.attention(),
        "schedule": str(plan.schedule),
        "techniques": [*plan.techniques],
        "trained_frames": config.trained_frames,
        **values_of_clip(config),
    }
    for name in ("quantize", "cache"):
        if (value := getattr(config, name)) is not None:
            request[name] = value
    if config.call:
        request["call"] = [*config.call]
    if plan.files is not None:
        request["given"] = plan.files.identity()
    if config.compare:  # its report states how long it took
        named = ("kernel", "timed", "device", "dense_kernel", "linear_kernel", "metrics")
        where = {name: getattr(config, name) for name in named}
        request["compare"] = {name: one for name, one in plain(where).items() if one is not None}
    return request


def settings_of(plan: GenerationPlan, device: str) -> ClipSettings:
    """Settings that all videos of a plan keep in their files, as words; see `settings_for`.

    Args:
        plan: a result of `fitted`.
        device: type of the device that it runs on.
    """
    asked, dtype = plan.asked, plan.asked.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    own = {"loras": asked.loras, "from_lora": asked.from_lora}  # an embedded one is found again
    changed = {**own, "dtype": dtype, "extend": plan.techniques or "none"}
    kinds = {"preset": "a preset", "video": "a video"}
    fields: dict[str, Any] = {}
    wordless: dict[str, str] = {}
    for name, value in plan.config.model_copy(update=changed).kept().items():
        if is_words(value):
            fields[name] = value
        elif name != "method":
            wordless[name] = f"{kinds.get(name, 'a picture')} that was given in Python"
    words = {} if plan.method is None else method_words(plan.method)
    if plan.config.preset is plan.config.from_lora is None and plan.method is not None:
        fields = {n: value for n, value in fields.items() if n not in ("method", "set")} | words
        if not words:
            wordless["method"] = repr(plan.method)
    files = {}
    for name, value in fields.items():
        if (one := GenerateConfig.options()[name]).reads is not None:
            texts = map(str, value if isinstance(value, list) else [value])
            files[name] = {text: fingerprint(*one.sources(text)) for text in texts}
    return ClipSettings(fields, files, versions(), {"device": device, **words}, wordless)


def settings_for(
    settings: ClipSettings,
    video: Video,
    summary: Summary,
    linear_kernel: LinearKernel,
    *,
    dense: bool = False,
) -> ClipSettings:
    """Return the settings of one video.

    Args:
        settings: of all videos of the plan.
        summary: of its run.
        linear_kernel: what ran its linear layers, which "auto" may decide otherwise another time.
        dense: it is the dense clip of a comparison.
    """
    prompts = [*video.texts] or [video.prompt]
    own: dict[str, object] = {"prompt": prompts, "seed": video.seed}
    own["linear_kernel"] = linear_kernel
    parts: dict[str, Any] = {
        part: {
            name: value
            for name, value in getattr(settings, part).items()
            if not (dense and name in ATTENTION)
        }
        for part in ("fields", "files", "wordless")
    }
    parts["fields"] |= own | ({"method": "dense"} if dense else {})
    kernels = {one.choice.kernel for one in summary.records.values() if one.choice}
    ran: dict[str, Any] = {"kernels": sorted(kernels)}
    if parts["fields"].get("cache") is not None:
        ran["skipped_steps"] = skipped_steps(summary)
    return replace(settings, ran=settings.ran | ran, **parts)


def method_words(method: Method) -> dict[str, Any]:
    """Return the fields of a config that make a method again; {} if no words do."""
    with suppress(ValueError):
        name, options = method_name(method), written_options(method)
        if method_from(name, options) == method:
            return {"method": name} | ({"set": options} if options else {})
    return {}


def written_options(method: Method) -> list[str]:
    """Write the options of a method that `is_told` names, "field=value" each, as `method_from`
    reads them. A method within is written by its name, and its options."""
    written = []
    for one in options_of(type(method)):
        value = getattr(method, one.name)
        if not is_told(one, method):
            continue
        if options_of(type(value)):
            written.append(f"{one.name}={method_name(value)}")
            written += [f"{one.name}.{inner}" for inner in written_options(value)]
        else:
            written.append(f"{one.name}={as_text(value)}")
    return written


def forecast_generate(
    config: GenerateConfig, *, gpu: str | None = None
) -> "Forecast | StreamForecast":
    """Forecast one video of a config, which is checked as far as that goes without the model.

    Values that it leaves open are what the model is usually run with, see `whole_run`.

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
    if config.stream:
        from gen_accel.pipelines.generation.stream_cost import forecast_stream

        _, height, width, _ = whole_run(config.model, config)
        return forecast_stream(
            model,
            zones=_seen_by(config).zones,
            height=height,
            width=width,
            fps=frame_rate_of(config.model, config.fps),
            frames=config.frames,
            steps=config.steps,
            gpu=gpu,
            dtype=config.dtype,
            guidance_scale=config.guidance_scale,
            offload=config.offload,
            quantize=config.quantize,
            text=config.max_tokens,
        )
    subject = subject_of(model)
    kind = pipeline_class(index_of(config.model)["_class_name"])
    begins = None
    if plan.files is not None and plan.files.video is None:
        begins = plan.files.source.height, plan.files.source.width
    frames, height, width, steps = whole_run(config.model, config, begins)
    method, schedule = plan.method, plan.schedule
    if plan.preset is not None:
        call = _call_of(frames, height, width, config.steps)
        quiet = plan.asked.preset is None
        method, schedule, found = choose_preset(
            plan.preset, subject.model, schedule, call, quiet=quiet
        )
        steps = steps if found is None else found.method.steps
    assert method is not None, "planned"
    scale, call = config.guidance_scale, inspect.signature(kind.__call__).parameters
    if scale is None and "guidance_scale" in call:
        own = call["guidance_scale"].default
        scale = own if isinstance(own, int | float) else None
    found = forecast(
        model,
        method,
        gpu=gpu,
        dtype=config.dtype,
        guidance_scale=scale,
        offload=config.offload,
        quantize=config.quantize,
        height=height,
        width=width,
        num_frames=frames,
        schedule=schedule,
        steps=steps,
        text=config.max_tokens,
    )
    needed = needed_parts(kind.__name__, config.kinds) if is_of_blocks(kind) else None
    to_fetch = None
    if not folder_of(config.model).exists():
        with suppress(OSError):  # unknown without a network
            to_fetch = sum(missing_files(location_of(config.model), needed).values())
    return replace(found, fps=frame_rate_of(config.model, config.fps), to_fetch=to_fetch)
