"""Encoding of clips, captions and images into a cache of latents."""

import math
from collections.abc import Sequence
from itertools import chain, compress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from gen_accel.attention_processors.lengths import latent_frames, patch_of, temporal_patch
from gen_accel.endings import unwinding
from gen_accel.files import clear_partial
from gen_accel.locks import locked
from gen_accel.lora.caching import record
from gen_accel.lora.caching.encoders import Encoders, check_trained, factors_of, load_encoders
from gen_accel.lora.caching.index import Again
from gen_accel.lora.caching.inputs import FIRST_FRAME, condition_for
from gen_accel.lora.caching.jobs import Spread
from gen_accel.lora.caching.options import AS_WRITTEN, START
from gen_accel.lora.caching.preview import Preview
from gen_accel.lora.caching.shards import SHARD_BYTES, Shards
from gen_accel.lora.caching.work import Run
from gen_accel.lora.data.captions import Captions, repeated
from gen_accel.lora.data.clips import CaptionedVideo, Size
from gen_accel.lora.data.finding import check_teacher_captions, find_videos
from gen_accel.lora.data.report import Report, buckets_of
from gen_accel.lora.data.scenes import Take, check_scenes
from gen_accel.pipelines.generation.loading import DTYPES
from gen_accel.pipelines.generation.progress import progress_bar, waiting

if TYPE_CHECKING:
    from gen_accel.lora.caching.inputs import ImageCoder


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
    images: "ImageCoder | None" = None,
    teacher: bool = False,
    take: Take = START,
    captions: Captions = AS_WRITTEN,
    default_caption: str | None = None,
    repeats: Sequence[str] = (),
    pictures: bool = False,
    workers: int = 0,
    condition: Literal["text", "first_frame"] | None = None,
    masks: bool = False,
    spread: "Spread | None" = None,
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
        spread: workers that read and encode; this process writes what they send. None: this
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
            run = Run(
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
                spread=spread,
            )
            run.hash_models()
        return _fill(folder, run, videos, shard_bytes)


def _fill(folder: Path, run: Run, videos: Sequence[CaptionedVideo], shard_bytes: int) -> Report:
    """Encode the tensors that the folder lacks, and write its manifest and its report."""
    with progress_bar() as bar, Shards(folder, shard_bytes, bar) as shards:
        jobs = run.read(videos, shards, bar)
        preview = Preview(jobs, len(jobs), run.frames_of)
        texts = run.encode_texts(jobs, shards, bar)
        pictures = run.encode_images(jobs, shards, bar)
        run.encode_first_frames(jobs, shards, bar)
        run.keep_masks(jobs, shards, bar)
        new = run.encode_clips(jobs, shards, bar, preview)
        held = bytearray(all(key in shards for key in job.keys) for job in jobs)
        if not any(held):
            reasons = (run.broken or run.left_out).values()
            raise ValueError(f"no clip could be encoded: {next(iter(reasons), 'none is left')}")
        done = Again(lambda: compress(jobs, held))
        entries = Again(lambda: (record.entry(job, run.encoders.pipe) for job in done))
        removed = record.removed(shards, entries)
        kept = run.keep_pictures(done, shards) | {"digests": record.digests(run, done)}
        used = chain(record.used(run, done), kept.get("pictures", ()))
        shards.finish(record.manifest(run) | kept, used, entries)
        remade = preview.write(shards, sum(held), run.encoders, bar)
        shards.memo.shrink()
    encoded = sum(job.latent_key in new for job in done)
    report = Report(
        folder=shards.folder,
        encoded=encoded,
        kept=sum(held) - encoded,
        removed=removed,
        texts=texts,
        short=tuple(run.short),
        broken=run.broken,
        damaged=shards.damaged,
        images=pictures,
        left_out=run.left_out,
        lost=record.lost(run, done),
        buckets=buckets_of((job.frames, job.size, record.seconds(run, job)) for job in done),
        videos=len(videos),
        remade=remade,
    )
    report.write()
    return report


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
