"""Records that a cache keeps: its manifest, its entries and its report."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from gen_accel.lora.caching.encoders import factors_of, hash_of
from gen_accel.lora.caching.index import Packed, Table
from gen_accel.lora.caching.jobs import Job
from gen_accel.lora.caching.latents import Entry
from gen_accel.lora.caching.options import Options
from gen_accel.lora.caching.shards import Shards
from gen_accel.lora.data.report import Lost, lost_picture, unused_frames


def seconds(run: Options, job: Job) -> float | None:
    """Return how long a chunk is; None if unknown, and for a picture."""
    total, lasts = job.about["total"], job.about["seconds"]
    if job.video.is_picture:
        return None
    if run.fps is not None:
        return job.frames / run.fps
    return job.frames * lasts / total if lasts and total else None


def lost(run: Options, jobs: Iterable[Job]) -> Packed[Lost]:
    """Return what is lost of each clip."""
    found = Packed(Lost._make)
    for _, group in groupby(jobs, lambda job: job.number):
        chunks = list(group)
        video, about = chunks[0].video, chunks[0].about
        picture = lost_picture(tuple(about["size"]), chunks[0].size)
        unused = unused_frames(about["total"], ((job.begin, job.frames) for job in chunks))
        found.append((video.name, picture, unused, about["total"]))
    return found


def manifest(run: Options) -> dict[str, Any]:
    """Build the manifest's fields."""
    about = {
        "model": type(run.encoders.pipe).__name__,
        "causal": run.encoders.family.training.causal_vae,
        "fps": run.fps,
        "store": run.store,
        "max_tokens": run.max_tokens,
        "options": _asked(run),
        "empty": run.text_key(""),
    }
    if run.masks:
        about["masks"] = True
    if run.images is not None:
        about["images"] = {**run.images.about, "nothing": run.image_key("nothing")}
    return about


def _asked(run: Options) -> dict[str, Any]:
    """Return what was asked of the clips and captions, by the names of a config's fields."""
    return {
        "take": run.take.how,
        "chunks": run.take.chunks,
        "scenes": run.take.scenes,
        "trigger": run.captions.trigger,
        "prefix": run.captions.prefix,
        "shuffle_tags": run.captions.shuffle,
        "tag_orders": run.captions.orders,
        "default_caption": run.default_caption,
        "repeats": run.repeats,
    }


def digests(run: Options, done: Iterable[Job]) -> dict[str, str]:
    """Hash the clips that fill each length, by its number of latent frames.

    With a causal autoencoder the hash is the same where clips are encoded at a longer length.
    """
    time, causal = factors_of(run.encoders.pipe)[0], run.encoders.family.training.causal_vae
    hashes = {(length - 1) // time + 1: hashlib.sha256() for length in run.frames}
    for job in done:
        held = (job.frames - 1) // time + 1
        latents = job.source if causal else job.latent_key
        video = job.video
        shown = [video.name, video.repeats, video.is_picture]
        seen = [*shown, job.size, job.keys[1:], latents]
        for frames, digest in hashes.items():
            fits = held >= frames if causal else held == frames
            if fits or job.video.is_picture:  # pictures train in any stage
                digest.update(hash_of(seen).encode())
    return {str(frames): digest.hexdigest() for frames, digest in hashes.items()}


def used(run: Options, done: Iterable[Job]) -> Iterator[str]:
    """Return the keys that stay in the cache."""
    yield run.text_key("")
    if run.images is not None:
        yield run.image_key("nothing")
    for job in done:
        yield from job.keys


def entry(job: Job, pipe: Any) -> dict[str, Any]:
    """Return the fields of a chunk's `Entry` that are set.

    Leaving out None keeps the hash of caches from before these fields existed.
    """
    time, space = factors_of(pipe)
    fields = Entry(
        name=job.video.name,
        caption=job.texts[0],
        frames=(job.frames - 1) // time + 1,
        height=job.size[0] // space,
        width=job.size[1] // space,
        pixel_frames=job.frames,
        latent_key=job.latent_key,
        text_key=job.text_keys[0],
        image_key=job.image_key,
        teacher_key=job.teacher_key,
        frame_key=job.frame_key,
        begin=job.begin or None,
        text_keys=job.text_keys if len(job.text_keys) > 1 else None,
        repeats=job.video.repeats if job.video.repeats > 1 else None,
        is_picture=job.video.is_picture or None,
        mask_key=job.mask_key,
    )
    return {name: value for name, value in vars(fields).items() if value is not None}


def removed(shards: Shards, entries: Iterable[dict[str, Any]]) -> int:
    """Count the entries that the folder held before and holds no more."""
    now, gone = Table(), Table()
    for entry in entries:
        now.add(_place(entry))
    places = map(_place, shards.earlier_entries())
    return sum(gone.add(place) for place in places if place not in now)


def _place(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} {entry['pixel_frames']} {entry.get('begin')}"
