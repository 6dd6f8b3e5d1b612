"""Preparation of a training: load the model, check the config against it, cache the clips."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gen_accel import demo
from gen_accel.attention_processors.families import family_for, family_of
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.cluster import Cluster, connected
from gen_accel.lora.adapters import read_start
from gen_accel.lora.artefact import (
    check_guidance,
    check_start,
    check_teacher,
    target_modules,
)
from gen_accel.lora.batches import levels_of, sigmas_of
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.encoders import (
    PREFIX,
    Encoders,
    TextEncoders,
    check_trained,
    factors_of,
    load_encoders,
)
from gen_accel.lora.caching.inputs import (
    CONTROL,
    LAST_FRAME,
    TEXT,
    Conditioned,
    ImageCoder,
    check_family,
    check_sound,
    condition_for,
    condition_in,
    describe_images,
)
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.preview import known_reconstruction
from gen_accel.lora.caching.store import is_finished
from gen_accel.lora.caching.work import Workers
from gen_accel.lora.causal import check_chunks
from gen_accel.lora.config import CAUSAL, TrainConfig
from gen_accel.lora.data.clips import why_clips
from gen_accel.lora.data.finding import refuse_prompts
from gen_accel.lora.data.report import REPORT, Report
from gen_accel.lora.data.survey import check_filled
from gen_accel.lora.evaluate import encoded_prompts
from gen_accel.lora.experts import is_there
from gen_accel.lora.memory import check_adapter, check_allocations, check_batch, check_blocks
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.objective import shift_of, text_attentions
from gen_accel.lora.optimizers import new_optimizer
from gen_accel.lora.processes import by_main, check_shareable, check_tokens
from gen_accel.lora.student_steps import check_student_steps
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.config import ConditioningFiles
from gen_accel.pipelines.generation.loading import DTYPES, Loading, find_device, load
from gen_accel.pipelines.generation.model_index import (
    index_of,
    load_part,
    part_class,
    places_of,
)
from gen_accel.pipelines.generation.progress import waiting
from gen_accel.pipelines.generation.quantising import hollow_of, load_quantised
from gen_accel.pipelines.generation.sampling import Clip, check_fits, filled, token_grid
from gen_accel.pipelines.long_video import check_names, check_rule, known_trained_frames
from gen_accel.pipelines.sampler import SOUND, own_shift
from gen_accel.process import check_free
from gen_accel.registry import needed_for
from gen_accel.video import Coding, VideoShape, latent_frames, temporal_patch

with needed_for("training", extra="train"):
    from accelerate import Accelerator

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

BLACK = np.zeros((1, 1, 3), np.uint8)  # a first frame, for the choice of a pipeline
# Fields of clips and captions whose values a cache keeps.
OPTIONS = [
    "take",
    "scenes",
    "trigger",
    "prefix",
    "shuffle_tags",
    "tag_orders",
    "default_caption",
    "repeats",
]
AGAIN = "give data, or cache again with this config"


def prepare(config: TrainConfig, accelerator: Accelerator) -> tuple[ModelToTrain, LatentCache]:
    """Load the pipeline, check the config against it, and cache the missing clips."""
    folder, main = config.cache_folder, accelerator.is_main_process
    if not config.sets and not folder.exists():
        raise ValueError(
            f"data is not given and {folder} holds no cache: give the videos, or a cache made "
            "with `gen-accel cache`"
        )
    source = source_of(config)
    index = index_of(source)  # refuses a folder that names other code
    if config.context_parallel > 1 and is_there(index, config.part):
        kind = part_class(index[config.part], config.part)
        check_shareable(config, hollow_of(kind, str(source), config.part))  # before its weights
    if config.sets:
        by_main(accelerator, partial(check_free, folder))
        by_main(accelerator, partial(check_clips, config))
    with waiting(f"loading the model {config.model}") if main else nullcontext():
        pipe = load_pipe(config, cut=accelerator.distributed_type.value == "FSDP")
    model = model_of(config, pipe)
    encoders = encoders_of(config, pipe)
    if config.sets:
        by_main(accelerator, lambda: print(_cached(config, encoders), file=sys.stderr))
    latents = LatentCache(folder)
    check_cache(config, pipe, latents)
    if not config.sets and main:
        remade = known_reconstruction(latents, config.model == demo.NAME)
        if remade is not None:
            print(remade, file=sys.stderr)
    unused = [name for name in pipe.components if name.startswith(PREFIX)]
    if not config.validate_every:
        unused += ["vae", "image_encoder"]
    else:
        if model.condition == TEXT:  # other pipelines read a text with its picture
            prompts = encoded_prompts(config, encoders, folder, accelerator)
            model = model._replace(prompts=prompts)
        if model.prompts is None:
            if encoders.texts is not None:
                encoders.texts.load()
            unused = []
    for part in unused:
        if getattr(pipe, part, None) is not None:
            setattr(pipe, part, None)
    return model, latents


def check_cache(config: TrainConfig, pipe: "DiffusionPipeline", latents: LatentCache) -> None:
    """Refuse, by a ValueError, a cache of other clips or captions than are asked for, or one that
    lacks what the config needs. A field that is not given takes what the cache has."""
    for fault in _cache_faults(config, pipe, latents):
        raise ValueError(fault)


def _cache_faults(
    config: TrainConfig, pipe: "DiffusionPipeline", latents: LatentCache
) -> Iterator[str]:
    here, (_, factor) = latents.folder, factors_of(pipe, family_of(getattr(pipe, config.part)))
    wanted = {(height // factor, width // factor) for height, width in config.clip_sizes}
    others = {(entry.height, entry.width) for entry in latents.entries} - wanted
    if others:
        height, width = min(others)
        asked = ", ".join(f"{height} x {width}" for height, width in config.clip_sizes)
        yield (
            f"{here} holds clips of {height * factor} x {width * factor} pixels, asked for are "
            f"{asked}"
        )
    for name in filter(config.is_given, OPTIONS):
        asked = getattr(config, name)
        held = latents.options.get(name, config.options()[name].default)
        held = tuple(held) if isinstance(held, list) else held
        if asked != held:
            now = shown(asked)
            yield f"{here} was made with {name} {shown(held)}, asked for is {now}: {AGAIN}"
    if config.images and not any(entry.is_picture for entry in latents.entries):
        yield (
            f"images is {config.images:g}, and {here} holds no pictures: add some with captions "
            "to data, or leave images out"
        )
    bare = [entry.name for entry in latents.entries if entry.latent_key is None]
    if bare and (needed := why_clips(config.needs_clips)):
        yield (
            f"{here} holds the captions of {len(bare)} clips and prompts alone, as "
            f"{shown(bare[0])}: {AGAIN}; clips are needed {needed}"
        )
    if config.masks and not latents.has_masks:
        yield f"{here} holds no masks: {AGAIN}"
    if config.sound and not latents.has_sound:
        yield f"{here} holds no sound: {AGAIN}"
    if latents.fps != config.fps:
        yield f"{here} holds clips at {latents.fps} frames a second, asked for are {config.fps}"
    for entry in latents.entries if config.reads_teacher_captions else ():
        if entry.teacher_key is None:
            yield (
                f"{here} holds no caption for the teacher of {entry.name}, which objective "
                f"{config.objective} of an image prompt needs: {AGAIN}"
            )
    condition = condition_of(config, pipe).condition
    if condition not in (TEXT, latents.condition):
        held = latents.condition
        yield f"{here} was made for condition {held}, asked for is {condition}: {AGAIN}"
    if config.adapter == "image_prompt":
        coder, found = ImageCoder.of(config), latents.images
        if found is None:
            yield f"{here} holds no images, which adapter image_prompt needs: {AGAIN}"
        elif {name: found.get(name) for name in coder.about} != coder.about:
            yield (
                f"{here} holds images for {describe_images(found)}, asked for is "
                f"{describe_images(coder.about)}: cache again with this config"
            )


def check_components(config: TrainConfig, *, fetch: bool = False) -> None:
    """Let each part that needs no model refuse its fields, before one is loaded.

    Args:
        fetch: see `TrainConfig.check`, which refuses first.

    Raises ValueError for a method, technique or optimizer that does not train, and for sizes that
    cannot fit into memory.
    """
    config.check(fetch=fetch)
    method = method_from(config.method, config.settings)
    if config.objective == CAUSAL:
        config.zones.check_method(method)
    state = method.step_state()
    if state is not None and state.refuses_training:
        raise ValueError(f"method {shown(config.method)} does not train: {state.refuses_training}")
    if config.rank == 0 and not (config.train_processors and method.has_parameters):
        raise ValueError(
            "rank is 0, which leaves nothing to train: only a method with parameters, such as "
            f"sparse_linear, trains without a LoRA, and method is {shown(config.method)}"
        )
    check_names(config.sample_with, "sample_with")
    new_optimizer([nn.Parameter(torch.zeros(1, 1))], config)
    check_allocations(config)


def load_pipe(config: TrainConfig, *, cut: bool = False) -> "DiffusionPipeline":
    """Load the pipeline on the CPU, without its text encoders; see `encoders_of`. Its models are
    moved to a device when they are needed.

    Args:
        cut: see `load_quantised`.
    """
    source = source_of(config)
    index = index_of(source)
    places = places_of(index, str(source))
    asked = condition_in(source, config)
    given = ConditioningFiles(
        image=None if asked.condition in (TEXT, CONTROL) else BLACK,
        last_image=BLACK if asked.condition == LAST_FRAME else None,
    )
    parts: dict[str, Any] = dict.fromkeys(_text_encoders(index))
    if config.is_quantised and is_there(index, config.part):
        parts[config.part] = load_quantised(
            part_class(index[config.part], config.part),
            str(source),
            config.part,
            str(config.base),
            DTYPES[config.precision],
            find_device(config.device),
            cut=cut,
        )
    loading = Loading(dtype=config.precision, device="cpu")
    pipe = load(source, loading, None if asked.is_own else given, parts=parts)
    if getattr(pipe, "vae", None) is not None and pipe.vae.dtype != torch.float32:
        # Load it again: casting back does not undo the rounding.
        pipe.vae = load_part(*places["vae"], index["vae"], torch.float32)
    if config.sound and getattr(pipe, "audio_vae", None) is not None:
        pipe.audio_vae = load_part(*places["audio_vae"], index["audio_vae"], torch.float32)
    return pipe


def encoders_of(config: TrainConfig, pipe: "DiffusionPipeline") -> Encoders:
    """Take a pipeline's encoders, those of text to be loaded when they are needed."""
    encoders = load_encoders(pipe, config.device, "auto")
    source = source_of(config)
    index = index_of(source)
    kinds = {n: index[n] for n in _text_encoders(index) if getattr(pipe, n, None) is None}
    dtype, places = DTYPES[config.precision], places_of(index, str(source))
    texts = TextEncoders(pipe, places, kinds, dtype, config.cache_folder)
    return encoders._replace(texts=texts if kinds else None)


def source_of(config: TrainConfig) -> str | Path:
    """Folder or hub repository of the pipeline."""
    source = demo.model_named(config.model)
    folder = expanded(source)
    return folder if folder.exists() else source


def _text_encoders(index: Mapping[str, Any]) -> list[str]:
    return [name for name in index if name.startswith(PREFIX) and is_there(index, name)]


def condition_of(config: TrainConfig, pipe: "DiffusionPipeline") -> Conditioned:
    """Choose the condition that a pipeline is trained under; see `condition_for`."""
    transformer = getattr(pipe, "transformer", None) or getattr(pipe, config.part)
    index = {**pipe.config, "_class_name": type(pipe).__name__}
    return condition_for(index, transformer.config, config)


def model_of(config: TrainConfig, pipe: "DiffusionPipeline") -> ModelToTrain:
    """Check the config against the pipeline, and return the model to train.

    Raises ValueError for a field that does not fit the pipeline.
    """
    transformer = getattr(pipe, config.part, None)
    if transformer is None:
        raise ValueError(f"{type(pipe).__name__} of {config.model} has no {config.part}")
    check_trained(family_of(transformer), type(pipe).__name__, transformer.config)
    condition = condition_of(config, pipe).condition
    check_student_steps(config, family_of(transformer), pipe.config.get("boundary_ratio"))
    check_sound(family_of(transformer), transformer, config.fps if config.sound else None)
    coding, boundary = _coding(config, pipe), pipe.config.get("boundary_ratio")
    if condition != TEXT:
        _check_given_frames(config, transformer, coding, condition)
    elif config.validation_images and config.adapter == "lora":
        raise ValueError(
            f"validation_images are first frames, and {config.model} is trained from text: leave "
            "them out, or give condition first_frame"
        )
    if config.adapter == "image_prompt":
        family_for(transformer, "image prompts")
        if config.objective == "distill_attention":
            text_attentions(transformer)
        if config.init_adapter is not None:
            read_start(config, transformer)
    elif config.rank:
        target_modules(transformer, config.targets)
    if config.init_lora is not None:
        check_start(config.init_lora, config, transformer)
    check_guidance(config, transformer, boundary)
    lasting = [grid(config, pipe, stage.frames).frames for stage in config.curriculum]
    check_chunks(config, transformer, condition, lasting)
    method = method_from(config.method, config.settings)
    lengths = {*config.clip_lengths}
    if config.validate_every and config.validation_frames is not None:
        lengths.add(config.validation_frames)
    check_adapter(config, transformer)
    check_blocks(config.blocks_to_swap, transformer)
    check_shareable(config, transformer)
    for stage in config.curriculum:
        check_rule(transformer, stage.rope)
    for frames, size in product(sorted(lengths), config.clip_sizes):
        video = grid(config, pipe, frames, size)
        check_batch(config, transformer, video.tokens)
        check_tokens(config, frames, size, video.video_tokens)
        check_fits(method, video)
    trained = config.trained_frames
    if trained is None:
        try:
            trained = known_trained_frames(transformer)
        except ValueError:
            if any(stage.rope != "none" for stage in config.curriculum):
                raise
    if config.teacher_lora is not None:
        check_teacher(config, transformer, trained)
    if trained is not None:
        latent_frames("trained_frames", trained, coding, temporal_patch(transformer))
    shift = config.shift
    if shift is None:
        longest = grid(config, pipe, config.longest)
        shift = shift_of(pipe.scheduler.config, longest.video_tokens)
    sound = getattr(pipe, SOUND, None)  # in pipelines that copy the video's there is none
    if config.sound and sound is not None and config.noise_levels:
        raise ValueError(
            f"noise_levels are of the video, and {config.model} steps its sound at others: give "
            "sampled_steps, and shift, in their place"
        )
    made = ModelToTrain(
        transformer=transformer,
        pipe=pipe if config.validate_every else None,
        frames=coding.latents_of,
        trained_frames=trained,
        shift=float(shift),
        boundary=boundary,
        schedule=pipe.scheduler.config,
        condition=condition,
        sound_shift=own_shift(sound.config) if config.sound and sound is not None else None,
    )
    levels_of(config, made.shift, sigmas_of(config, made))  # refuses levels of the other expert
    return made


def _check_given_frames(
    config: TrainConfig, transformer: "ModelMixin", coding: Coding, condition: str
) -> None:
    check_family(family_of(transformer), transformer, condition)
    if config.validation_last_images and condition != LAST_FRAME:
        raise ValueError(
            f"validation_last_images are for condition last_frame, and {config.model} is trained "
            f"under {condition}: leave them out"
        )
    if config.validation_images and condition == LAST_FRAME and not config.validation_last_images:
        raise ValueError(
            f"{config.model} is trained from first and last frames, got validation_images alone: "
            "give validation_last_images, one for each"
        )
    if config.adapter != "lora":
        raise ValueError(
            f"{config.model} makes videos from a first frame, and adapter {config.adapter} is "
            "trained on models from text to video"
        )
    if condition == CONTROL:
        return
    shortest = min(stage.frames for stage in config.curriculum)
    if shortest < (least := coding.frames_of(2)):
        raise ValueError(
            f"stages must have more than {shortest} frames, which the first frame gives: nothing "
            f"is left to learn; take {least} or more"
        )
    if config.images:
        raise ValueError(
            f"{config.model} is trained from first frames, and a picture is its own: leave images "
            "out, or take condition text"
        )


def grid(
    config: TrainConfig,
    pipe: "DiffusionPipeline",
    frames: int,
    size: tuple[int, int] | None = None,
) -> VideoShape:
    """Return the grid of a clip's tokens.

    Args:
        size: height and width in pixels; None takes the config's.

    Raises ValueError for a size that the autoencoder or the patches would round.
    """
    height, width = size or (config.height, config.width)
    clip = Clip(frames=frames, height=height, width=width)
    coding, patch = _coding(config, pipe), temporal_patch(getattr(pipe, config.part))
    if patch > 1:  # the pipelines fill up what patches leave
        latent_frames("frames", frames, coding, patch)
    row = takes(type(pipe).__name__)
    first = (row.image,) if row is not None and row.image else ()
    return token_grid(pipe, filled(pipe, clip, first))


def _coding(config: TrainConfig, pipe: "DiffusionPipeline") -> Coding:
    return factors_of(pipe, family_of(getattr(pipe, config.part)))[0]


def check_clips(config: TrainConfig) -> None:
    """Refuse, by a ValueError, sizes and lengths that no clip fills, before a model is loaded.

    A finished cache knows its clips.
    """
    if not config.sets or is_finished(config.cache_folder):
        return
    pictures = 1 in config.clip_lengths
    used = [video for video in config.clips() if pictures or not video.is_picture]
    if any(video.is_prompt for video in used):
        condition = condition_in(source_of(config), config).condition
        refuse_prompts(used, why_clips(config.needs_clips, condition=condition))
    with waiting("looking at the first clips"):
        check_filled(used, config.rule, config.clip_sizes, config.fps)


def _cached(config: TrainConfig, encoders: Encoders) -> str:
    """Encode the missing clips, and say what came of it: in a line where all is as it was."""
    file = config.cache_folder / REPORT
    before = file.read_bytes() if file.is_file() else None
    report = cache_clips(config, encoders)
    new = report.encoded or report.removed or report.texts or report.damaged
    if new or before != file.read_bytes():
        return str(report)
    return f"{report.line}; nothing has changed, see {file}"


def cache_clips(
    config: TrainConfig, encoders: Encoders | None = None, executor: Workers | None = None
) -> Report:
    """Encode the missing clips, and return the report of `cache`.

    Args:
        encoders: of a config that was checked; None: it is checked, and they are loaded.
        executor: workers that encode, see `cache`.
    """
    if encoders is None:
        config.check()
        config.check_files()
        check_allocations(config)
        check_free(config.cache_folder)
        index_of(source_of(config))  # refuses a folder that names other code
        check_clips(config)
        encoders = loaded_encoders(config)
    return cache(
        encoders,
        config.sets,
        config.cache_folder,
        frames=config.rule.frames,
        sizes=config.rule.sizes,
        fps=config.fps,
        max_tokens=config.max_tokens,
        on_broken=config.on_broken,
        device=config.device,
        images=ImageCoder.of(config) if config.adapter == "image_prompt" else None,
        teacher=config.reads_teacher_captions,
        condition=config.condition,
        masks=config.masks,
        sound=config.sound,
        needs_clips=config.needs_clips,
        take=config.rule.take,
        captions=config.rule.captions,
        default_caption=config.default_caption,
        repeats=config.repeats,
        pictures=1 in config.clip_lengths,
        workers=config.workers,
        executor=executor,
    )


def cache_by(cluster: Cluster, config: TrainConfig) -> Report:
    """Encode the missing clips by workers of Ray, and return the report of `cache`.

    Raises ValueError for a cluster that `connected` refuses, and a machine that does not see the
    data or the model.
    """
    check_free(config.cache_folder)
    with connected(cluster, config.device) as machines:
        source = source_of(config)
        reads = [expanded(one.data) for one in config.sets]
        reads += [source] if isinstance(source, Path) else []
        workers = Workers(machines, partial(loaded_encoders, config), reads)
        return cache_clips(config, executor=workers)


def loaded_encoders(config: TrainConfig) -> Encoders:
    """Load the encoders of a config's model, for a cache alone."""
    return encoders_of(config, load_pipe(config.replaced(base=None)))  # nothing trains
