"""Reader of a latent cache: entries, tensors, and the clips that fit a length.

A tensor's key is a hash of its inputs: for latents the clip's bytes, the decoding and the
autoencoder; for a text the caption, the text encoders and the tokenizers; for an image its bytes
and the image encoder; for a first frame the clip, its decoding and the models that encode it; for
a mask its bytes and the clip's decoding. Only changed inputs are encoded again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gen_accel.io import file_sha256, typed
from gen_accel.lora.caching.inputs import MASK, TEXT
from gen_accel.lora.caching.store import SHARD_NAME, Database, entry_line, opened
from gen_accel.lora.config import TrainConfig
from gen_accel.parsing import shown
from gen_accel.pipelines.image_prompt.projectors import normalised

# Names of a clip's tensors, after its key.
LATENTS, IMAGE, PICTURE, LAST_PICTURE = "latents", "image", "picture", "last_picture"
SOUND = "sound"
RECIPE = 1  # version of decoding and encoding; another one makes all keys new
SHARDS_OPEN = 32  # at once; each maps its file
KINDS = {  # types of a manifest's fields
    "entries": (str,),
    "empty": (str,),
    "causal": (bool,),
    "fps": (float, type(None)),
    "digests": (dict,),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip at one length, with its caption, or a prompt.

    Args:
        frames, height, width: size of the latents.
        pixel_frames: frames of the video.
        text_key, latent_key, image_key, teacher_key, frame_key, mask_key, sound_key: names of the
            clip's tensors in the shards; all but the first are None in a cache without latents,
            images, teacher captions, first frames, masks or sound, and the last two of a clip
            without.
        begin: first frame in the video; None for 0.
        text_keys: of all texts of a clip with more than one.
        starts: frame from which each of them holds, of a caption that changes with time; None:
            each is of the whole clip.
        repeats: how often it is shown while a clip of 1 is shown once; None for 1.
        is_picture: whether it is a picture; None for a video.
    """

    name: str
    caption: str
    frames: int
    height: int
    width: int
    pixel_frames: int
    text_key: str
    latent_key: str | None = None
    image_key: str | None = None
    teacher_key: str | None = None
    frame_key: str | None = None
    begin: int | None = None
    text_keys: tuple[str, ...] | None = None
    starts: tuple[int, ...] | None = None
    repeats: int | None = None
    is_picture: bool | None = None
    mask_key: str | None = None
    sound_key: str | None = None

    def fields(self) -> dict[str, object]:
        """Fields that are set, by their names."""
        values = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: value for name, value in values if value is not None}

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all its tensors, the latents first."""
        keys = (*(self.text_keys or (self.text_key,)), self.image_key, self.teacher_key)
        keys = (self.latent_key, *keys, self.frame_key, self.mask_key, self.sound_key)
        return tuple(key for key in keys if key is not None)


class LatentCache(Database):
    """Reader of a folder that `cache` wrote, one tensor at a time.

    Args:
        folder: the folder that holds `cache.db`.

    Attributes:
        entries: clips in the order of the data; videos from `find_videos` are sorted by name.
        digest: hash over all entries, independent of how they are split into shards.
        causal: whether the first latents of an entry equal the latents of a shorter clip.
        fps: frame rate that the clips were resampled to; None if they kept their own.
        images: `ImageCoder.about` of the encoded images; None without images.
        options: what was asked of the clips and captions, by the names of a config's fields.
        condition: "first_frame" if the first frames of the clips are encoded too, "last_frame" if
            the last ones are as well, else "text".
        has_masks, has_sound: whether masks and sound of the clips were asked for.

    Raises:
        FileNotFoundError: no finished cache, or a shard is missing.
        ValueError: a cache of another version, a damaged database, or a shard of another size
            than was written.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(Path(folder))
        with self.unchanged():  # no longer than to fetch the rows: writers wait meanwhile
            manifest = self.manifest()
            if manifest is None:
                raise FileNotFoundError(f"{folder} holds no finished cache: cache again")
            shards = self._shards()
            rows = self.rows("SELECT fields FROM entries ORDER BY number")
        for name, kinds in KINDS.items():
            typed(manifest, name, *kinds, origin=self._path)
        self.entries = self._entries_of(rows, manifest["entries"])
        for path, size in shards:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: cache again")
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes instead of {size}: cache again"
                )
        self.causal: bool = manifest["causal"]
        self.fps: float | None = manifest["fps"]
        self.images: dict[str, Any] | None = manifest.get("images")
        self.options: dict[str, Any] = manifest.get("options", {})
        self.condition: str = manifest.get("condition", TEXT)
        self.has_masks = manifest.get("masks") is True
        self.has_sound = manifest.get("sound") is True
        self._pictures: list[str] = manifest.get("pictures", [])
        self._empty: str = manifest["empty"]
        self._digests: dict[str, str] = manifest["digests"]
        words = manifest["entries"], self._empty, self.causal, self.fps
        self.digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
        self._open: Callable[[Path], safe_open] = lru_cache(SHARDS_OPEN)(opened)

    def __len__(self) -> int:
        return len(self.entries)

    def _entries_of(self, rows: Sequence[tuple[str]], digest: str) -> list[Entry]:
        found, entries = hashlib.sha256(), []
        try:
            for [fields] in rows:
                found.update(entry_line(fields))
                about = json.loads(fields)
                for name in {"text_keys", "starts"} & {*about}:
                    about[name] = tuple(about[name])
                entries.append(Entry(**about))
            if found.hexdigest() == digest:
                return entries
        except (ValueError, TypeError):
            pass
        raise self.damaged("its entries are not those that were written")

    def _shards(self) -> list[tuple[Path, int]]:
        """Return the shards with their bytes."""
        found = self.rows("SELECT name, bytes FROM shards")
        for name, _ in found:
            if not (isinstance(name, str) and SHARD_NAME.fullmatch(name)):
                raise self.damaged(f"a shard is called {shown(name)}")
        return [(self.folder / name, size) for name, size in found]

    def latents(self, index: int, frames: int | None = None) -> Tensor:
        """Read a clip's latents, (C, f, h, w) float32, as the transformer takes them.

        Args:
            frames: number of latent frames to read, from the first; None reads all.

        Raises:
            ValueError: the entry has fewer, or has more and its autoencoder is not causal; or the
                cache was made without latents.
        """
        entry = self.entries[index]
        if frames is None:
            frames = entry.frames
        if not self._fits(entry, frames):
            raise ValueError(
                f"frames must be {'at most ' if self.causal else ''}{entry.frames}, as many "
                f"latents as {entry.name} has, got {frames}"
            )
        key = self._held(entry.latent_key, f"latents of {entry.name}")
        return self._slices(key)[LATENTS][:, :frames].float()

    def conditions(self, index: int, text: int = 0) -> dict[str, Tensor]:
        """Read the transformer's arguments for the caption, without a batch axis.

        Args:
            text: number of the text, of a clip that has several.
        """
        entry = self.entries[index]
        return self._text((entry.text_keys or (entry.text_key,))[text])

    def teacher(self, index: int) -> dict[str, Tensor]:
        """Read `conditions` of the teacher's caption.

        Raises:
            ValueError: the cache was made without captions for a teacher.
        """
        return self._text(self._held(self.entries[index].teacher_key, "captions for a teacher"))

    @property
    def empty(self) -> dict[str, Tensor]:
        """Transformer arguments (`conditions`) for the empty prompt."""
        return self._text(self._empty)

    def image(self, index: int) -> Tensor:
        """Read the features of the clip's image prompt, float32.

        Pixels are (3, S, S) in [-1, 1].

        Raises:
            ValueError: the cache was made without images.
        """
        return self._image(self.entries[index].image_key)

    @property
    def no_image(self) -> Tensor:
        """Features that stand for no image, in the form of `image`."""
        return self._image(None if self.images is None else self.images["nothing"])

    def first_frame(self, index: int, frames: int | None = None) -> dict[str, Tensor]:
        """Read the conditions of `predict` that the clip's first frame gives, of one sample; under
        other conditions those of its last frame too, or of its control film.

        Args:
            frames: number of latent frames that train, from the first; None: all.

        Raises:
            ValueError: the cache was made without first frames.
        """
        found = {}
        key = self._held(self.entries[index].frame_key, "first frames")
        for name, tensor in self._slices(key).items():
            cut = len(tensor.get_shape()) == 4 and frames is not None
            found[name] = (tensor[:, :frames] if cut else tensor[:]).float()
        return found

    def mask(self, index: int, frames: int) -> Tensor:
        """Read the mask of a clip's first latent frames, (1, f, h, w) float32 from 0 to 1; all 1
        for a clip without a mask."""
        entry = self.entries[index]
        if entry.mask_key is None:
            return torch.ones(1, frames, entry.height, entry.width)
        return self._slices(entry.mask_key)[MASK][:frames].float()[None]

    def sound(self, index: int, tokens: int) -> Tensor | None:
        """Read the latents of the first tokens of a clip's sound, (tokens, D) float32; None for a
        clip without sound."""
        key = self.entries[index].sound_key
        return None if key is None else self._slices(key)[SOUND][:tokens].float()

    def pictures(self, index: int) -> list[np.ndarray]:
        """Read the first frame of one of the first clips, and its last one if the cache has them,
        (H, W, 3) uint8 each.

        Raises:
            ValueError: the cache was made without first frames.
        """
        keys = self._pictures
        key = self._held(keys[index % len(keys)] if keys else None, "first frames")
        held = self._slices(key)
        return [held[name][:].numpy() for name in (PICTURE, LAST_PICTURE) if name in held]

    def verify(self) -> None:
        """Read all shards and the database.

        Raises ValueError for shards whose bytes changed since `cache`, and a damaged database.
        """
        [[said]] = self.rows("PRAGMA quick_check(1)")
        if said != "ok":
            raise self.damaged(said)
        shards = {path: SHARD_NAME.fullmatch(path.name) for path, _ in self._shards()}
        wrong = [
            path.name
            for path, digest in shards.items()
            if digest is None or not path.is_file() or file_sha256(path) != digest[1]
        ]
        if wrong:
            raise ValueError(f"damaged in {self.folder}, cache again: {', '.join(wrong)}")

    def fitting(self, frames: int) -> list[int]:
        """Numbers of the entries that give a clip of `frames` latent frames.

        An entry must have that length; with a causal autoencoder it may also be longer.
        """
        return [i for i, entry in enumerate(self.entries) if self._fits(entry, frames)]

    def digest_at(self, frames: int) -> str:
        """Hash the clips of `fitting` with their texts and images, independent of their further
        frames."""
        return str(self._digests.get(str(frames), self.digest))

    def buckets(self, frames: int) -> dict[tuple[int, int], list[int]]:
        """Group `fitting` by (height, width) of the latents."""
        found: dict[tuple[int, int], list[int]] = {}
        for i in self.fitting(frames):
            found.setdefault((self.entries[i].height, self.entries[i].width), []).append(i)
        return found

    def _fits(self, entry: Entry, frames: int) -> bool:
        return 1 <= frames <= entry.frames if self.causal else frames == entry.frames

    def _text(self, key: str) -> dict[str, Tensor]:
        names, file = self._file_of(key)
        found = {name: file.get_tensor(f"{key}.{name}") for name in names}
        return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}

    def _image(self, key: str | None) -> Tensor:
        held = self._held(key, "images", " with adapter image_prompt")
        return as_features(self._slices(held)[IMAGE][:])

    def _held(self, key: str | None, what: str, how: str = "") -> str:
        """Return a key; ValueError if the cache was made without such tensors."""
        if key is None:
            raise ValueError(f"{self.folder} holds no {what}: cache again{how}")
        return key

    def _slices(self, key: str) -> dict[str, Any]:
        """Return the tensors of a key, by their names, as slices of safetensors."""
        names, file = self._file_of(key)
        return {name: file.get_slice(f"{key}.{name}") for name in names}

    def _file_of(self, key: str) -> tuple[list[str], safe_open]:
        """Return the names of a key's tensors, and their shard, opened."""
        try:
            names, shard = self.shard_of(key)
        except KeyError:
            raise ValueError(
                f"{self.folder} was made again while it was read: begin again, or cache again"
            ) from None
        return names, self._open(shard)


def as_features(stored: Tensor) -> Tensor:
    """Convert a stored image to features: float32, pixels in [-1, 1]."""
    return normalised(stored) if stored.dtype == torch.uint8 else stored.float()


def held_out(config: TrainConfig, cache: LatentCache) -> frozenset[int]:
    """Choose the clips that never train, by number.

    A hash of each name decides, so that clips which are added later change little: a share stays
    exactly as it was, a number changes by the new clips among the lowest hashes. All lengths of a
    clip are held out together, and so are its chunks and its copies of another name. Pictures
    among videos are not held out.
    """
    if not config.held_out:
        return frozenset()
    videos = {entry.name for entry in cache.entries if not entry.is_picture}
    names = sorted(videos or {entry.name for entry in cache.entries}, key=hash_of_name)
    if config.held_out >= 1:
        chosen = set(names[: int(config.held_out)])
    else:
        chosen = {name for name in names if hash_of_name(name) < config.held_out * 2**64}
        chosen = chosen or set(names[:1])
    latents = {entry.latent_key for entry in cache.entries if entry.name in chosen} - {None}
    return frozenset(
        i
        for i, entry in enumerate(cache.entries)
        if entry.name in chosen or entry.latent_key in latents
    )


def hash_of_name(name: str) -> int:
    """Hash a clip's name to a number below 2^64."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
