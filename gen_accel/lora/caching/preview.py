"""`preview.png` of a cache: what is trained on, and what the autoencoder makes of it."""

import base64
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from gen_accel import demo
from gen_accel.attention_processors.families import family_of
from gen_accel.io import replacing
from gen_accel.lora.caching.chunks import ClipChunk
from gen_accel.lora.caching.encoders import Encoders, hash_of
from gen_accel.lora.caching.latents import LATENTS, LatentCache
from gen_accel.lora.caching.store import Store
from gen_accel.lora.data.report import ReconstructionPsnr
from gen_accel.measure.sheets import picture_rows
from gen_accel.pipelines.generation.decode import (
    FRAMES_AT_ONCE,
    as_uint8,
    decode_stream,
    streams,
)

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

PREVIEW = "preview.png"
MOST_ROWS = 40  # clips in the picture
MOST_REMADE = 3  # of them that are decoded
TILE = (216, 160)  # largest width and height of a frame in the picture
CAPTION = 160  # characters of a caption
FORM = 1  # of the picture; another one draws it anew
ABOUT = "gen_accel"  # key of what the picture was drawn from, in its file


class Reconstruction(NamedTuple):
    """Reconstruction of a clip by the autoencoder.

    Args:
        psnr: dB.
        tiles: frames for the picture.
    """

    psnr: float
    tiles: list[Image.Image]


class Preview:
    """Frames of evenly chosen clips, collected while all clips are read.

    Args:
        jobs: all clips in order; those that cannot be read are left out later.
        count: number of `jobs`.
        read: reads the frames of a clip, (F, H, W, 3) uint8; None where it cannot.
    """

    def __init__(
        self, jobs: Iterable[ClipChunk], count: int, read: Callable[[Any], np.ndarray | None]
    ) -> None:
        places = set(evenly(count, MOST_ROWS))
        self._jobs = [job for place, job in enumerate(jobs) if place in places]
        self._keys = {job.latent_key for job in self._jobs}
        self._tiles: dict[str, list[Image.Image]] = {}
        self._read = read

    def see(self, job: ClipChunk, frames: np.ndarray) -> None:
        """Take the frames of a clip that is being encoded."""
        if job.latent_key in self._keys:
            self._tiles[job.latent_key] = _tiles(frames)

    def write(
        self,
        store: Store,
        count: int,
        encoders: Encoders,
        bar: "Progress",
    ) -> ReconstructionPsnr | None:
        """Write the picture, unless it is there and nothing that it shows has changed.

        Args:
            store: the cache, written.
            count: number of clips in the cache.

        Returns what the autoencoder makes of some of the clips; None where it cannot be decoded.
        """
        held = [job for job in self._jobs if all(key in store for key in job.keys)]
        seen: dict[str, Reconstruction] = {}
        if is_remade(encoders):
            chosen = [held[place] for place in evenly(len(held), MOST_REMADE)]
            seen = self._remade(chosen, store, encoders, bar)
        self._draw(store.folder / PREVIEW, held, seen, count)
        if not seen:
            return None
        names = {job.latent_key: _name(job) for job in held}
        found = {names[key]: one.psnr for key, one in seen.items()}
        return ReconstructionPsnr(found, is_demo(encoders))

    def _remade(
        self, jobs: Sequence[ClipChunk], store: Store, encoders: Encoders, bar: "Progress"
    ) -> dict[str, Reconstruction]:
        """Return what the autoencoder makes of `jobs`, by key, from the store if it is there."""
        found = {}
        new = []
        for job in jobs:
            known = _known(store.fact(_fact(job)))
            if known is None:
                new.append(job)
            else:
                found[job.latent_key] = known
        if not new:
            return found
        with encoders.at_work("vae"):
            for job in bar.track(new, description="autoencoder"):
                frames = self._read(job)
                if frames is None:
                    continue
                try:
                    one = _decoded(encoders, store.read(job.latent_key)[LATENTS], frames)
                except torch.OutOfMemoryError:
                    continue
                found[job.latent_key] = one
                fact = {"psnr": one.psnr, "tiles": [_png(tile) for tile in one.tiles]}
                store.remember(_fact(job), fact)
        return {job.latent_key: found[job.latent_key] for job in jobs if job.latent_key in found}

    def _draw(
        self, path: Path, jobs: Sequence[ClipChunk], seen: dict[str, Reconstruction], count: int
    ) -> None:
        made = {key: one.psnr for key, one in seen.items()}
        shown = [[_name(job), _words(job, None), job.latent_key] for job in jobs]
        form = hash_of([FORM, MOST_ROWS, TILE, shown, made, count])
        if _drawn(path) == form:
            return
        rows = []
        for job in jobs:
            tiles = self._tiles.get(job.latent_key)
            if tiles is None:
                frames = self._read(job)
                if frames is None:
                    continue
                tiles = _tiles(frames)
            one = seen.get(job.latent_key)
            more = [] if one is None else one.tiles
            rows.append((_words(job, one), [np.asarray(tile) for tile in (*tiles, *more)]))
        left = f"and {count - len(rows):,} more clips" if count > len(rows) else ""
        head = "first, middle and last frame; beside some, what the autoencoder makes of them"
        picture = Image.fromarray(picture_rows(rows, head=head, foot=left))
        about = PngImagePlugin.PngInfo()
        about.add_text(ABOUT, form)
        with replacing(path) as partial:
            picture.save(partial, format="PNG", pnginfo=about)


def evenly(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` places, from the first to the last."""
    return sorted({*np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()})


def known_reconstruction(cache: LatentCache, is_demo: bool) -> ReconstructionPsnr | None:
    """Return what the run that made a cache found out about its autoencoder; None for nothing.

    Args:
        is_demo: whether the autoencoder is the demo model's.
    """
    rows = evenly(len(cache), MOST_ROWS)
    held = [cache.entries[rows[place]] for place in evenly(len(rows), MOST_REMADE)]
    found: dict[str, float] = {}
    for entry in held:
        one = _known(cache.fact(f"remade {entry.latent_key}"))
        if one is not None:
            found[f"{entry.name}, frame {entry.begin}" if entry.begin else entry.name] = one.psnr
    return ReconstructionPsnr(found, is_demo) if found else None


def _decoded(encoders: Encoders, latents: Tensor, frames: np.ndarray) -> Reconstruction:
    """Decode latents, and compare the film with the one that was encoded, (F, H, W, 3) uint8."""
    places = _places(len(frames))
    psnr, tiles, begin = Psnr(), [], 0
    for chunk in remake(encoders, latents):
        psnr.add(chunk, frames[begin : begin + len(chunk)])
        tiles += [_tile(chunk[i - begin]) for i in places if begin <= i < begin + len(chunk)]
        begin += len(chunk)
    return Reconstruction(round(psnr.decibels, 3), tiles)


def _places(frames: int) -> list[int]:
    """Return the places of the first, the middle and the last frame, each once."""
    return sorted({0, frames // 2, frames - 1})


def _tiles(frames: np.ndarray) -> list[Image.Image]:
    return [_tile(frames[i]) for i in _places(len(frames))]


def _tile(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    scale = min(1.0, TILE[0] / image.width, TILE[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _name(job: ClipChunk) -> str:
    return f"{job.video.name}, from frame {job.begin}" if job.begin else job.video.name


def _words(job: ClipChunk, seen: Reconstruction | None) -> str:
    height, width = job.size
    length = "a picture" if job.frames == 1 else f"{job.frames} frames"
    parts = [_name(job), f"{height} x {width}, {length}", *_cut(job.texts)]
    return "\n".join(parts if seen is None else [*parts, f"autoencoder: {seen.psnr:.1f} dB PSNR"])


def _cut(texts: Sequence[str]) -> Iterator[str]:
    """Cut the first caption at a word, and count the others."""
    first = " ".join(texts[0].split())
    if len(first) > CAPTION:
        first = textwrap.shorten(first, CAPTION, placeholder=" ...")
        if len(first) < CAPTION // 2:  # one word of the length of a caption
            first = f"{' '.join(texts[0].split())[:CAPTION]} ..."
    yield first
    if len(texts) > 1:
        yield f"and {len(texts) - 1} more captions"


def _fact(job: ClipChunk) -> str:
    return f"remade {job.latent_key}"


def _known(fact: Any) -> Reconstruction | None:
    """Read a fact of the store; None for anything else."""
    try:
        tiles = [Image.open(io.BytesIO(base64.b64decode(data))) for data in fact["tiles"]]
        return Reconstruction(float(fact["psnr"]), [tile.convert("RGB") for tile in tiles])
    except (TypeError, KeyError, ValueError, OSError):
        return None


def _png(image: Image.Image) -> str:
    held = io.BytesIO()
    image.save(held, format="PNG")
    return base64.b64encode(held.getvalue()).decode()


def _drawn(path: Path) -> str | None:
    """Return what a picture was drawn from; None for a missing or another one."""
    try:
        with Image.open(path) as image:
            return image.info.get(ABOUT)
    except (OSError, ValueError):
        return None


def is_remade(encoders: Encoders) -> bool:
    """Whether `remake` serves the model."""
    return _is_streamed(encoders) or family_of(encoders.transformer).serves("training")


def remake(encoders: Encoders, latents: Tensor) -> Iterator[np.ndarray]:
    """Decode latents of the cache, (C, f, h, w), in chunks of (F, H, W, 3) uint8: a few frames at
    a time where the autoencoder can, and otherwise all at once."""
    pipe, latents = encoders.pipe, latents[None].float().to(encoders.device)
    if _is_streamed(encoders):
        yield from decode_stream(pipe, latents, device=encoders.device)
        return
    decode = family_of(encoders.transformer).decode_video
    for pixels in decode(pipe, latents).split(FRAMES_AT_ONCE, dim=2):
        [video] = pipe.video_processor.postprocess_video(pixels, output_type="np")
        yield as_uint8(video, pipe.vae)


def _is_streamed(encoders: Encoders) -> bool:
    autoencoder = type(encoders.pipe.vae).__name__
    kinds = type(encoders.transformer).__mro__
    return any(streams(kind.__name__, autoencoder) for kind in kinds)


def is_demo(encoders: Encoders) -> bool:
    source = encoders.pipe.vae.config.get("_name_or_path") or "."
    return Path(source).resolve().is_relative_to(demo.path().resolve())


class Psnr:
    """PSNR of a clip that comes in chunks, as `measure.psnr` of the whole."""

    def __init__(self) -> None:
        self._squares, self._count = 0.0, 0

    def add(self, video: np.ndarray, reference: np.ndarray) -> None:
        """Take the next frames of both, (F, H, W, 3) uint8."""
        off = video.astype(np.float32) - reference
        self._squares += float(np.square(off).sum(dtype=np.float64))
        self._count += off.size

    @property
    def decibels(self) -> float:
        return 10 * log10(255**2 * self._count / self._squares) if self._squares else inf
