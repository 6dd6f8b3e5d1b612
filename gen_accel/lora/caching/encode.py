"""Encoding of clips, captions and images into a cache of latents."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from gen_accel.io import clear_partial
from gen_accel.lora.caching.chunks import CacheFields, CacheOptions, ClipChunk
from gen_accel.lora.caching.encoders import (
    Encoders,
    check_trained,
    factors_of,
    hash_of,
    load_encoders,
)
from gen_accel.lora.caching.inputs import CONTROL, TEXT, Asked, check_sound, condition_for
from gen_accel.lora.caching.preview import ContactSheet
from gen_accel.lora.caching.store import SHARD_BYTES, Store
from gen_accel.lora.caching.work import (
    CAPTIONS,
    CLIPS,
    IMAGES,
    NOTHING,
    SHOWN_CAPTIONS,
    Encoding,
    Workers,
)
from gen_accel.lora.data.finding import Data, find_videos, not_taken, refuse_prompts
from gen_accel.lora.data.report import (
    CropLoss,
    Report,
    buckets_of,
    unused_frames,
)
from gen_accel.lora.data.survey import check_scenes
from gen_accel.pipelines.generation.progress import Progress, waiting
from gen_accel.process import locked, unwinding
from gen_accel.video import (
    latent_frames,
    nearest,
    patch_of,
    temporal_patch,
)

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from typing_extensions import Unpack

    Model = str | Path | Encoders | DiffusionPipeline


def cache(
    model_or_pipe: "Model",
    data: Data,
    out: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    executor: Workers | None = None,
    **options: "Unpack[CacheFields]",
) -> Report:
    """Encode all clips and captions of a data set that `out` does not hold yet.

        cache("models/Wan2.1", "clips", "cache", frames=(81, 161), sizes=[(480, 832)], fps=16)
        LatentCache("cache").latents(0)

    All clips are read once before the first is encoded, so that their faults are reported early.
    A killed run leaves its finished shards to the next run. A second run in the same folder is
    refused while the first one lasts.

    Args:
        model_or_pipe: the folder of a pipeline, a repository on the hub, or a pipeline, which is
            used as it is. The transformer of a folder or repository is not loaded.
        data: see `find_videos`.
        device: device to encode on; "auto" is the accelerator if there is one. The encoders of a
            pipeline are moved there while they work.
        dtype: dtype of the loaded encoders; "auto" is float32 for the autoencoder and, on a GPU,
            bfloat16 for the text encoders. Not for a pipeline, which has its own.
        shard_bytes: bytes to hold in memory before a shard is written.
        executor: workers that read and encode; this process writes what they send. None: this
            process does all of it. The cache is the same.
        options: see `CacheOptions`.

    Raises:
        ValueError: data that `find_videos` refuses, a model that `check_model` refuses, sizes or
            lengths that the model cannot take, a length or one of several sizes that no clip
            fills, an offloaded pipeline, or texts that `store` cannot hold.
        OSError: a broken clip with on_broken="stop", a folder that cannot be written, or a folder
            that another run writes to.
    """
    asked = CacheOptions(**options)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    videos = find_videos(
        data,
        rule=asked.rule,
        images=asked.images is not None,
        pictures="all" if asked.pictures else "captioned",
        default_caption=asked.default_caption,
        masks=asked.masks,
        controls=asked.condition == CONTROL,
        teacher=asked.teacher,
        repeats=asked.repeats,
        needed=asked.why_clips,
    )
    rules = [*map(asked.rule_of, videos)]
    if any(rule.take.scenes == "cut" for rule in rules):
        check_scenes()
    folder = Path(out)
    with unwinding(), locked(folder):
        clear_partial(folder)
        encoders = load_encoders(model_or_pipe, device, dtype)
        asked = replace(asked, condition=_condition(encoders, model_or_pipe, asked.condition))
        refuse_prompts(videos, asked.why_clips)
        sizes = {size: None for rule in rules for size in rule.sizes}
        _check_fit(encoders, replace(asked, sizes=[*sizes]))
        run = Encoding(encoders, asked, executor)
        with waiting("hashing the encoders"):
            run.hash_models()
        with Progress() as bar, Store(folder, shard_bytes, bar) as store:
            chunks = run.find_chunks(videos, store, bar)
            sheet = ContactSheet(chunks, run.frames_of)
            new = run.encode(chunks, store, bar, sheet.see)
            done = [chunk for chunk in chunks if all(key in store for key in chunk.entry.keys)]
            if not done:
                reasons = (run.broken or run.left_out).values()
                raise ValueError(
                    f"no clip could be encoded: {next(iter(reasons), 'none is left')}"
                )
            pictures = run.keep_pictures(done, store)
            always = [run.text_key(""), *pictures, *(key for key in run.unread if key in store)]
            if asked.images is not None:
                always.append(run.image_key(NOTHING))
            keys = chain(always, (key for chunk in done for key in chunk.entry.keys))
            manifest = _manifest(run, done, pictures)
            removed = store.finish(manifest, keys, (chunk.entry.fields() for chunk in done))
            reconstruction = sheet.write(store, done, encoders, bar)
    new_clips = {*new[CLIPS]}
    encoded = sum(chunk.entry.latent_key in new_clips for chunk in done)
    unread = sum(chunk.entry.latent_key is None for chunk in done)
    report = Report(
        folder=folder,
        encoded=encoded,
        kept=len(done) - encoded - unread,
        removed=removed,
        unread=unread,
        texts=len(new[CAPTIONS]) + len(new[SHOWN_CAPTIONS]),
        short=tuple(run.short),
        broken=run.broken,
        damaged=store.lost,
        images=None if asked.images is None else len({*new[IMAGES]} - {run.image_key(NOTHING)}),
        left_out=run.left_out | not_taken(data),
        converted=run.converted,
        losses=_losses(done),
        buckets=buckets_of((one.frames, one.size, one.seconds) for one in done),
        videos=len(videos),
        reconstruction=reconstruction,
    )
    report.write()
    return report


def _losses(done: Sequence[ClipChunk]) -> list[CropLoss]:
    """Return the losses of each clip by crop and length."""
    found = []
    clips = (chunk for chunk in done if not chunk.video.is_prompt)
    for video, group in groupby(clips, lambda chunk: chunk.video):
        first, *others = group
        parts = ((one.begin, one.frames) for one in (first, *others))
        unused = unused_frames(first.total, parts)
        found.append(CropLoss(video.name, first.lost, unused, first.total))
    return found


def _manifest(run: Encoding, done: Sequence[ClipChunk], pictures: list[str]) -> dict[str, object]:
    options = run.options
    about: dict[str, object] = {
        "model": type(run.encoders.pipe).__name__,
        "causal": run.causal,
        "fps": options.fps,
        "store": options.store,
        "max_tokens": options.max_tokens,
        "options": {  # by the names of a config's fields
            "take": options.take.how,
            "scenes": options.take.scenes,
            "trigger": options.captions.trigger,
            "prefix": options.captions.prefix,
            "shuffle_tags": options.captions.shuffle,
            "tag_orders": options.captions.orders,
            "default_caption": options.default_caption,
            "repeats": options.repeats,
        },
        "empty": run.text_key(""),
        "digests": _digests(run, done),
    }
    for name in ("masks", "sound"):
        if getattr(options, name):
            about[name] = True
    if run.given_frames is not None:
        about |= {"condition": options.condition, "pictures": pictures}
    if options.images is not None:
        about["images"] = {**options.images.about, "nothing": run.image_key(NOTHING)}
    return about


def _digests(run: Encoding, done: Sequence[ClipChunk]) -> dict[str, str]:
    """Hash the clips that fill each length, by its number of latent frames.

    With a causal autoencoder the hash is the same if clips are encoded at a longer length.
    """
    coding, _ = factors_of(run.encoders.pipe, run.encoders.family)
    hashes = {coding.latents_of(length): hashlib.sha256() for length in run.options.frames}
    for chunk in done:
        video, entry = chunk.video, chunk.entry
        latents = chunk.source if run.causal else entry.latent_key
        keys = [key for key in entry.keys if key != entry.latent_key]
        shown = [video.name, video.repeats, video.is_picture]
        seen = hash_of([*shown, chunk.size, keys, latents]).encode()
        for frames, digest in hashes.items():
            fits = entry.frames >= frames if run.causal else entry.frames == frames
            if fits or video.is_picture:  # pictures train in any stage
                digest.update(seen)
    return {str(frames): digest.hexdigest() for frames, digest in hashes.items()}


def _check_fit(encoders: Encoders, options: CacheOptions) -> None:
    """Refuse inputs, lengths and sizes that the model does not take."""
    if options.condition != TEXT and (options.images is not None or options.teacher):
        raise ValueError(
            f"an image prompt is trained under condition text, got {options.condition}"
        )
    if options.condition == CONTROL and options.pictures:
        raise ValueError(
            "a control is a film, which pictures have none of: leave pictures and lengths of 1 "
            "frame out"
        )
    if options.condition != TEXT and options.pictures:
        raise ValueError(
            "a picture is its own first frame, so that nothing is left to learn: leave pictures "
            "and lengths of 1 frame out, or take condition text"
        )
    pipe, config = encoders.pipe, encoders.transformer.config
    check_sound(encoders.family, encoders.transformer, options.fps if options.sound else None)
    check_trained(encoders.family, type(pipe).__name__, config)
    coding, space = factors_of(pipe, encoders.family)
    for length in options.frames:
        if not coding.codes(length):
            near = " or ".join(map(str, nearest(length, coding.frames, coding.first)))
            raise ValueError(
                f"frames must be {coding.rule} for this autoencoder, got {length}; nearest: {near}"
            )
        latent_frames("frames", length, coding, temporal_patch(encoders.transformer))
    patches = patch_of(config)[1:]
    for size in options.sizes:
        if any(side % (space * step) for side, step in zip(size, patches, strict=True)):
            rule = " and ".join(str(space * step) for step in patches)
            raise ValueError(f"sizes must be multiples of {rule} (height, width), got {size}")
    channels = getattr(pipe.vae.config, "z_dim", None) or pipe.vae.config.latent_channels
    taken = encoders.family.latent_channels(config)
    if taken != channels:
        raise ValueError(
            f"the transformer takes {taken} channels where the latents have "
            f"{channels}: such a model is not trained"
        )


def _condition(encoders: Encoders, model: "Model", condition: str | None) -> str:
    """Choose the condition of a cache, see `condition_for`."""
    pipe = encoders.pipe
    index = {**pipe.config, "_class_name": type(pipe).__name__}
    name = model if isinstance(model, str | Path) else type(pipe).__name__
    asked = Asked(str(name), condition)
    return condition_for(index, encoders.transformer.config, asked).condition
