"""Encoding of clips, captions and images into a cache of latents."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from gen_accel.attention_processors.lengths import latent_frames, patch_of, temporal_patch
from gen_accel.io import clear_partial
from gen_accel.lora.caching.chunks import AS_WRITTEN, START, ClipChunk, Executor
from gen_accel.lora.caching.encoders import (
    Encoders,
    check_trained,
    factors_of,
    hash_of,
    load_encoders,
)
from gen_accel.lora.caching.inputs import FIRST_FRAME, ImageCoder, condition_for
from gen_accel.lora.caching.latents import Entry
from gen_accel.lora.caching.preview import Preview
from gen_accel.lora.caching.store import SHARD_BYTES, Store
from gen_accel.lora.caching.work import Encoding
from gen_accel.lora.data.captions import Captions, repeated
from gen_accel.lora.data.clips import CaptionedVideo, Size
from gen_accel.lora.data.finding import check_teacher_captions, find_videos
from gen_accel.lora.data.report import (
    CropLoss,
    Report,
    buckets_of,
    lost_picture,
    unused_frames,
)
from gen_accel.lora.data.scenes import Take, check_scenes
from gen_accel.pipelines.generation.loading import DTYPES
from gen_accel.pipelines.generation.progress import Progress, waiting
from gen_accel.process import locked, unwinding


def cache(
    model_or_pipe: Any,
    data: str | Path | Sequence[CaptionedVideo],
    out: str | Path,
    *,
    frames: Sequence[int],
    sizes: Sequence[Size],
    fps: float | None = None,
    max_tokens: int | None = None,
    on_broken: Literal["skip", "stop"] = "skip",
    store: Literal["float16", "bfloat16", "float32"] = "float16",
    device: str = "auto",
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    images: ImageCoder | None = None,
    teacher: bool = False,
    take: Take = START,
    captions: Captions = AS_WRITTEN,
    default_caption: str | None = None,
    repeats: Sequence[str] = (),
    pictures: bool = False,
    workers: int = 0,
    condition: Literal["text", "first_frame"] | None = None,
    masks: bool = False,
    executor: Executor | None = None,
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
        data: see `find_videos`; or the videos themselves.
        frames: lengths in pixel frames. A chunk of a clip is encoded at the longest length that it
            fills and, unless the autoencoder is causal, at each shorter length too.
        sizes: (height, width) in pixels; a clip takes the size of the nearest aspect ratio.
        fps: frame rate to resample clips to; None keeps the stored frames.
        max_tokens: length of the text, the pipeline's `max_sequence_length`.
        on_broken: "skip" leaves out a clip that cannot be read, "stop" ends the run.
        store: dtype in the shards. Latents have unit variance, for which float16 has eight times
            the resolution of bfloat16. Values that overflow it are refused.
        device: device to encode on; "auto" is the accelerator if there is one. The encoders of a
            pipeline are moved there while they work.
        dtype: dtype of the loaded encoders; "auto" is float32 for the autoencoder and, on a GPU,
            bfloat16 for the text encoders. Not for a pipeline, which has its own.
        shard_bytes: bytes to hold in memory before a shard is written.
        images: also encode the image prompt of each clip, by default its middle frame.
        teacher: also encode each clip's caption for the teacher; all clips must have one.
        take: which chunks of each clip are encoded.
        captions: what is made of the captions.
        default_caption: caption of clips without one; None refuses them.
        repeats: how often clips are shown, PATTERN=NUMBER each; see `captions.repeated`. It goes
            before the data's own numbers.
        pictures: also take pictures, as clips of one frame; a length of 1 takes them in any case.
        workers: threads that read clips ahead of the encoder; 0 reads between two clips.
        condition: "first_frame" also encodes the first frame of each clip. None: as the model's
            pipeline makes videos.
        masks: also keep the mask of each clip that has one, see `masks`.
        executor: workers that read and encode; this process writes what they send. None: this
            process does all of it. The cache is the same.

    Raises:
        ValueError: data that `find_videos` refuses, a model that `check_model` refuses, sizes or
            lengths that the model cannot take, a length or one of several sizes that no clip
            fills, an offloaded pipeline, or texts that `store` cannot hold.
        OSError: a broken clip with on_broken="stop", a folder that cannot be written, or a folder
            that another run writes to.
    """
    _check_options(frames, sizes, fps, max_tokens, on_broken, store, shard_bytes, workers)
    pictures = pictures or 1 in frames
    if take.scenes == "cut":
        check_scenes()
    if isinstance(data, str | Path):
        videos = find_videos(
            data,
            images=images is not None,
            pictures="all" if pictures else "captioned",
            default_caption=default_caption,
            masks=masks,
        )
    else:
        videos = data
    if not videos:
        raise ValueError("data holds no videos")
    if repeats:
        videos = repeated(videos, repeats)
    if masks and all(video.mask is None for video in videos):
        raise ValueError(
            f"masks is on, and no clip of {data if isinstance(data, str | Path) else 'data'} has "
            "one: put clip.mask.mp4 beside clip.mp4, or a column mask into the manifest"
        )
    if teacher:
        check_teacher_captions([v for v in videos if pictures or not v.is_picture])
    folder = Path(out)
    with unwinding(), locked(folder):
        clear_partial(folder)
        encoders = load_encoders(model_or_pipe, device, dtype)
        shown = _condition(encoders, model_or_pipe, condition)
        if shown == FIRST_FRAME and (images is not None or teacher):
            raise ValueError("an image prompt is trained under condition text, got first_frame")
        if shown == FIRST_FRAME and pictures:
            raise ValueError(
                "a picture is its own first frame, so that nothing is left to learn: leave "
                "pictures and lengths of 1 frame out, or take condition text"
            )
        _check_fit(encoders, frames, sizes)
        with waiting("hashing the encoders"):
            run = Encoding(
                encoders=encoders,
                frames=tuple(sorted(set(frames))),
                sizes=tuple(sizes),
                fps=None if fps is None else float(fps),
                max_tokens=max_tokens,
                on_broken=on_broken,
                store=store,
                images=images,
                teacher=teacher,
                take=take,
                captions=captions,
                pictures=pictures,
                repeats=tuple(repeats),
                default_caption=default_caption,
                workers=workers,
                condition=shown,
                masks=masks,
                executor=executor,
            )
            run.hash_models()
        return _fill(folder, run, videos, shard_bytes)


def _fill(
    folder: Path, run: Encoding, videos: Sequence[CaptionedVideo], shard_bytes: int
) -> Report:
    """Encode the tensors that the folder lacks, and write its manifest and its report."""
    with Progress() as bar, Store(folder, shard_bytes, bar) as store:
        chunks = run.find_chunks(videos, store, bar)
        preview = Preview(chunks, len(chunks), run.frames_of)
        texts = run.encode_texts(chunks, store, bar)
        pictures = run.encode_images(chunks, store, bar)
        run.encode_first_frames(chunks, store, bar)
        run.keep_masks(chunks, store, bar)
        new = run.encode_clips(chunks, store, bar, preview)
        held = bytearray(all(key in store for key in chunk.keys) for chunk in chunks)
        if not any(held):
            reasons = (run.broken or run.left_out).values()
            raise ValueError(f"no clip could be encoded: {next(iter(reasons), 'none is left')}")

        def done() -> Iterator[ClipChunk]:
            return compress(chunks, held)

        kept = run.keep_pictures(done(), store)
        manifest = _manifest(run) | kept | {"digests": _digests(run, done())}
        keys = chain(_keys(run, done()), kept.get("pictures", ()))
        entries = (_entry(chunk, factors_of(run.encoders.pipe)) for chunk in done())
        removed = store.finish(manifest, keys, entries)
        reconstruction = preview.write(store, sum(held), run.encoders, bar)
        encoded = sum(chunk.latent_key in new for chunk in done())
        report = Report(
            folder=store.folder,
            encoded=encoded,
            kept=sum(held) - encoded,
            removed=removed,
            texts=texts,
            short=tuple(run.short),
            broken=run.broken,
            damaged=store.damaged,
            images=pictures,
            left_out=run.left_out,
            losses=_losses(done()),
            buckets=buckets_of((one.frames, one.size, _seconds(run, one)) for one in done()),
            videos=len(videos),
            reconstruction=reconstruction,
        )
    report.write()
    return report


def _seconds(run: Encoding, chunk: ClipChunk) -> float | None:
    """Return how long a chunk is; None if unknown, and for a picture."""
    total, lasts = chunk.about["total"], chunk.about["seconds"]
    if chunk.video.is_picture:
        return None
    if run.fps is not None:
        return chunk.frames / run.fps
    return chunk.frames * lasts / total if lasts and total else None


def _losses(done: Iterable[ClipChunk]) -> list[CropLoss]:
    """Return what is lost of each clip."""
    found = []
    for _, group in groupby(done, lambda chunk: chunk.number):
        chunks = list(group)
        video, about = chunks[0].video, chunks[0].about
        picture = lost_picture(tuple(about["size"]), chunks[0].size)
        unused = unused_frames(about["total"], ((one.begin, one.frames) for one in chunks))
        found.append(CropLoss(video.name, picture, unused, about["total"]))
    return found


def _manifest(run: Encoding) -> dict[str, Any]:
    about = {
        "model": type(run.encoders.pipe).__name__,
        "causal": run.encoders.family.training.causal_vae,
        "fps": run.fps,
        "store": run.store,
        "max_tokens": run.max_tokens,
        "options": {  # by the names of a config's fields
            "take": run.take.how,
            "scenes": run.take.scenes,
            "trigger": run.captions.trigger,
            "prefix": run.captions.prefix,
            "shuffle_tags": run.captions.shuffle,
            "tag_orders": run.captions.orders,
            "default_caption": run.default_caption,
            "repeats": run.repeats,
        },
        "empty": run.text_key(""),
    }
    if run.masks:
        about["masks"] = True
    if run.images is not None:
        about["images"] = {**run.images.about, "nothing": run.image_key("nothing")}
    return about


def _digests(run: Encoding, done: Iterable[ClipChunk]) -> dict[str, str]:
    """Hash the clips that fill each length, by its number of latent frames.

    With a causal autoencoder the hash is the same if clips are encoded at a longer length.
    """
    time, causal = factors_of(run.encoders.pipe)[0], run.encoders.family.training.causal_vae
    hashes = {(length - 1) // time + 1: hashlib.sha256() for length in run.frames}
    for chunk in done:
        held = (chunk.frames - 1) // time + 1
        latents = chunk.source if causal else chunk.latent_key
        video = chunk.video
        shown = [video.name, video.repeats, video.is_picture]
        seen = [*shown, chunk.size, chunk.keys[1:], latents]
        for frames, digest in hashes.items():
            fits = held >= frames if causal else held == frames
            if fits or video.is_picture:  # pictures train in any stage
                digest.update(hash_of(seen).encode())
    return {str(frames): digest.hexdigest() for frames, digest in hashes.items()}


def _keys(run: Encoding, done: Iterable[ClipChunk]) -> Iterator[str]:
    """Return the keys that stay in the cache."""
    yield run.text_key("")
    if run.images is not None:
        yield run.image_key("nothing")
    for chunk in done:
        yield from chunk.keys


def _entry(chunk: ClipChunk, factors: tuple[int, int]) -> dict[str, Any]:
    """Return the fields of a chunk's `Entry` that are set."""
    time, space = factors
    fields = Entry(
        name=chunk.video.name,
        caption=chunk.texts[0],
        frames=(chunk.frames - 1) // time + 1,
        height=chunk.size[0] // space,
        width=chunk.size[1] // space,
        pixel_frames=chunk.frames,
        latent_key=chunk.latent_key,
        text_key=chunk.text_keys[0],
        image_key=chunk.image_key,
        teacher_key=chunk.teacher_key,
        frame_key=chunk.frame_key,
        begin=chunk.begin or None,
        text_keys=chunk.text_keys if len(chunk.text_keys) > 1 else None,
        repeats=chunk.video.repeats if chunk.video.repeats > 1 else None,
        is_picture=chunk.video.is_picture or None,
        mask_key=chunk.mask_key,
    )
    return {name: value for name, value in vars(fields).items() if value is not None}


def _check_options(
    frames: Sequence[int],
    sizes: Sequence[Size],
    fps: float | None,
    max_tokens: int | None,
    on_broken: str,
    store: str,
    shard_bytes: int,
    workers: int,
) -> None:
    if not frames or any(length < 1 for length in frames):
        raise ValueError(f"frames must be lengths of at least 1, got {list(frames)}")
    if not sizes or any(side < 1 for size in sizes for side in size):
        raise ValueError(f"sizes must be pairs of height and width, got {list(sizes)}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if on_broken not in ("skip", "stop"):
        raise ValueError(f"on_broken must be skip or stop, got {on_broken!r}")
    if store not in DTYPES:
        raise ValueError(f"store must be one of {', '.join(DTYPES)}, got {store!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")


def _check_fit(encoders: Encoders, frames: Sequence[int], sizes: Sequence[Size]) -> None:
    pipe, config = encoders.pipe, encoders.transformer.config
    check_trained(encoders.family, type(pipe).__name__, config)
    time, space = factors_of(pipe)
    for length in frames:
        if (length - 1) % time:
            below = (length - 1) // time * time + 1
            raise ValueError(
                f"frames must be {time} n + 1 for this autoencoder, got {length}; nearest: "
                f"{below} and {below + time}"
            )
        latent_frames("frames", length, time, temporal_patch(encoders.transformer))
    patches = patch_of(config)[1:]
    for size in sizes:
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


def _condition(encoders: Encoders, model: Any, condition: str | None) -> str:
    """Choose the condition of a cache, see `condition_for`."""
    pipe = encoders.pipe
    index = {**pipe.config, "_class_name": type(pipe).__name__}
    name = model if isinstance(model, str | Path) else type(pipe).__name__
    asked = SimpleNamespace(model=name, condition=condition, first_frame_dropout=0.0)
    return condition_for(index, encoders.transformer.config, asked).condition
