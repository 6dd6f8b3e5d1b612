"""`preview.png` of a cache: frames of its clips, and their reconstruction by the autoencoder."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from gen_accel import demo
from gen_accel.attention_processors.families import family_of
from gen_accel.io import read_fields, replacing
from gen_accel.lora.caching.chunks import ClipChunk
from gen_accel.lora.caching.encoders import Encoders, hash_of
from gen_accel.lora.caching.latents import LATENTS, LatentCache
from gen_accel.lora.caching.store import Store
from gen_accel.lora.data.report import REPORT, ReconstructionPsnr
from gen_accel.measure.pictures import picture_rows
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
FORM = 1  # version of the picture; another one draws it again
ABOUT = "gen_accel"  # key of what the picture was drawn from, in its file


class Reconstruction(NamedTuple):
    """Reconstruction of a clip by the autoencoder.

    Args:
        psnr: dB.
        tiles: frames for the picture.
    """

    psnr: float
    tiles: list[Image.Image]


class ContactSheet:
    """Frames of evenly chosen chunks, collected while all clips are read.

    Args:
        chunks: all chunks in order, of which those with latents are shown; unreadable chunks are
            left out later.
        read: reads the frames of a chunk, (F, H, W, 3) uint8; None if it cannot.
    """

    def __init__(
        self, chunks: Sequence[ClipChunk], read: Callable[[ClipChunk], np.ndarray | None]
    ) -> None:
        chunks = _with_latents(chunks)
        self._chunks = [chunks[place] for place in evenly(len(chunks), MOST_ROWS)]
        self._keys = {chunk.latents for chunk in self._chunks}
        self._tiles: dict[str, list[Image.Image]] = {}
        self._read = read

    def see(self, chunk: ClipChunk, frames: np.ndarray) -> None:
        """Take the frames of a chunk that is being encoded."""
        if chunk.latents in self._keys:
            self._tiles[chunk.latents] = _tiles(frames)

    def write(
        self, store: Store, done: Sequence[ClipChunk], encoders: Encoders, bar: "Progress"
    ) -> ReconstructionPsnr | None:
        """Write the picture, unless it is there and nothing that it shows has changed.

        With nothing to show, it is removed.

        Args:
            store: the cache, written.
            done: all chunks in the cache.

        Returns what the autoencoder makes of some of the chunks; None if it cannot be decoded.
        """
        done = _with_latents(done)
        held = {chunk.latents for chunk in done}
        shown = [chunk for chunk in self._chunks if chunk.latents in held]
        if not shown:
            (store.folder / PREVIEW).unlink(missing_ok=True)
            return None
        seen: dict[str, Reconstruction] = {}
        if is_remade(encoders):
            chosen = [shown[place] for place in evenly(len(shown), MOST_REMADE)]
            seen = self._remade(chosen, store, encoders, bar)
        psnr = {key: one.psnr for key, one in seen.items()}
        words = [[_name(one), _words(one, None), one.latents] for one in shown]
        form = hash_of([FORM, MOST_ROWS, TILE, words, psnr, len(done)])
        if _drawn(store.folder / PREVIEW) != form:
            self._draw(store.folder / PREVIEW, form, shown, seen, len(done))
        names = {chunk.latents: _name(chunk) for chunk in shown}
        found = {names[key]: one for key, one in psnr.items()}
        return ReconstructionPsnr(found, is_demo(encoders)) if found else None

    def _remade(
        self, chunks: Sequence[ClipChunk], store: Store, encoders: Encoders, bar: "Progress"
    ) -> dict[str, Reconstruction]:
        """Return what the autoencoder makes of `chunks`, by key, as the store remembers it."""
        keys = [chunk.latents for chunk in chunks]
        found = {key: _known(store.fact(f"remade {key}")) for key in keys}
        new = [chunk for chunk in chunks if found[chunk.latents] is None]
        with encoders.at_work(*(["vae"] if new else [])):
            for chunk in bar.track(new, description="autoencoder") if new else ():
                key, frames = chunk.latents, self._read(chunk)
                if frames is None:
                    continue
                with suppress(torch.OutOfMemoryError):
                    one = found[key] = _decoded(encoders, store.read(key)[LATENTS], frames)
                    tiles = [_png(tile) for tile in one.tiles]
                    store.remember(f"remade {key}", {"psnr": one.psnr, "tiles": tiles})
        return {key: one for key, one in found.items() if one is not None}

    def _draw(
        self,
        path: Path,
        form: str,
        chunks: Sequence[ClipChunk],
        seen: dict[str, Reconstruction],
        count: int,
    ) -> None:
        rows = []
        for chunk in chunks:
            tiles, one = self._tiles.get(chunk.latents), seen.get(chunk.latents)
            if tiles is None:
                frames = self._read(chunk)
                if frames is None:
                    continue
                tiles = _tiles(frames)
            tiles = [*tiles, *(() if one is None else one.tiles)]
            rows.append((_words(chunk, one), [np.asarray(tile) for tile in tiles]))
        left = f"and {count - len(rows):,} more clips" if count > len(rows) else ""
        head = "first, middle and last frame; beside some, what the autoencoder makes of them"
        picture = Image.fromarray(picture_rows(rows, head=head, foot=left))
        about = PngImagePlugin.PngInfo()
        about.add_text(ABOUT, form)
        with replacing(path) as partial:
            picture.save(partial, format="PNG", pnginfo=about)


def _with_latents(chunks: Sequence[ClipChunk]) -> list[ClipChunk]:
    return [chunk for chunk in chunks if chunk.entry.latent_key is not None]


def evenly(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` places, from the first to the last."""
    return sorted({*np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()})


def known_reconstruction(cache: LatentCache, is_demo: bool) -> ReconstructionPsnr | None:
    """Return the PSNR that the report of a cache holds; None for none.

    Args:
        is_demo: whether the autoencoder is the demo model's.
    """
    found: dict[str, float] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):  # missing or damaged
        held = read_fields(cache.folder / REPORT).get("psnr") or {}
        found = {name: float(psnr) for name, psnr in held.items()}
    return ReconstructionPsnr(found, is_demo) if found else None


def _decoded(encoders: Encoders, latents: Tensor, frames: np.ndarray) -> Reconstruction:
    """Decode latents, and compare the film with the one that was encoded, (F, H, W, 3) uint8."""
    places, tiles, begin, squares = _places(len(frames)), [], 0, 0.0
    for part in remake(encoders, latents):
        end = begin + len(part)
        off = part.astype(np.float32) - frames[begin:end]
        squares += float(np.square(off).sum(dtype=np.float64))
        tiles += [_tile(part[i - begin]) for i in places if begin <= i < end]
        begin = end
    psnr = 10 * log10(255**2 * frames.size / squares) if squares else inf
    return Reconstruction(round(psnr, 3), tiles)


def _places(frames: int) -> list[int]:
    """Places of the first, the middle and the last frame, each once."""
    return sorted({0, frames // 2, frames - 1})


def _tiles(frames: np.ndarray) -> list[Image.Image]:
    return [_tile(frames[i]) for i in _places(len(frames))]


def _tile(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    scale = min(1.0, TILE[0] / image.width, TILE[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _name(chunk: ClipChunk) -> str:
    name, begin = chunk.video.name, chunk.begin
    return f"{name}, from frame {begin}" if begin else name


def _words(chunk: ClipChunk, seen: Reconstruction | None) -> str:
    height, width = chunk.size
    length = "a picture" if chunk.frames == 1 else f"{chunk.frames} frames"
    parts = [_name(chunk), f"{height} x {width}, {length}", *_cut(chunk.texts)]
    return "\n".join(parts if seen is None else [*parts, f"autoencoder: {seen.psnr:.1f} dB PSNR"])


def _cut(texts: Sequence[str]) -> Iterator[str]:
    """Cut the first caption at a word, and count the others."""
    first = " ".join(texts[0].split())
    end = first.rfind(" ", CAPTION // 2, CAPTION - 4)
    if end < 0:  # not all languages have spaces
        end = CAPTION - 4
    yield first if len(first) <= CAPTION else f"{first[:end]} ..."
    if len(texts) > 1:
        yield f"and {len(texts) - 1} more captions"


def _known(fact: object) -> Reconstruction | None:
    """Read a fact of the store; None for anything else."""
    try:
        match fact:
            case {"psnr": psnr, "tiles": [*tiles]}:
                images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in tiles]
                return Reconstruction(float(psnr), [image.convert("RGB") for image in images])
    except (TypeError, ValueError, OSError):  # written by another version
        return None
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
    a time if the autoencoder can, else all at once."""
    pipe, latents = encoders.pipe, latents[None].float().to(encoders.device)
    if _is_streamed(encoders):
        yield from decode_stream(pipe, latents, device=encoders.device)
        return
    decode = family_of(encoders.transformer).decode_video
    for pixels in decode(pipe, latents).split(FRAMES_AT_ONCE, dim=2):
        video = (pixels[0].float() * 0.5 + 0.5).clamp(0, 1).movedim(0, -1)
        yield as_uint8(video.cpu().numpy(), pipe.vae)


def _is_streamed(encoders: Encoders) -> bool:
    autoencoder = type(encoders.pipe.vae).__name__
    kinds = type(encoders.transformer).__mro__
    return any(streams(kind.__name__, autoencoder) for kind in kinds)


def is_demo(encoders: Encoders) -> bool:
    source = encoders.pipe.vae.config.get("_name_or_path") or "."
    return Path(source).resolve().is_relative_to(demo.path().resolve())
