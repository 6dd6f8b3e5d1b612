"""Latents and text embeddings, encoded once and read while training.

A cache is a folder of `Shards`. Each tensor's key is a hash of its inputs: for latents the clip's
bytes, the decoding and the autoencoder; for a text the caption, the text encoders and the
tokenizers; for an image its bytes and the image encoder; for a first frame the clip, its decoding
and the models that encode it; for a mask its bytes and the clip's decoding. Only changed inputs
are encoded again.
"""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gen_accel.json_files import typed
from gen_accel.lora.caching.entries import Entries
from gen_accel.lora.caching.index import Homes
from gen_accel.lora.caching.inputs import MASK, TEXT
from gen_accel.lora.caching.shards import (
    MANIFEST,
    check_bytes,
    check_shard,
    check_sizes,
    read_manifest,
    tensors_of,
)
from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.image_prompt.projectors import normalised
from gen_accel.values import shown

LATENTS = "latents"  # name of a clip's tensor after its key
IMAGE = "image"
PICTURE = "picture"
RECIPE = 1  # version of decoding and encoding; another one makes all keys new
TEXTS_AT_ONCE = 8
SHARDS_OPEN = 32  # at once; each maps its file
NONE = type(None)
KINDS = {  # types of a manifest's fields
    "shards": (dict,),
    "entries": (list, dict),
    "empty": (str,),
    "causal": (bool,),
    "fps": (float, NONE),
}


@dataclass(frozen=True)
class Entry:
    """A clip at one length, with its caption.

    Args:
        frames, height, width: size of the latents.
        pixel_frames: frames of the video that was encoded.
        latent_key, text_key, image_key, teacher_key, frame_key, mask_key: names of the clip's
            tensors in the shards; all but the first two are None in a cache without images,
            teacher captions, first frames or masks, and mask_key of a clip without a mask.
        begin: first frame in the video; None for 0.
        text_keys: of all texts of the clip, where it has more than one.
        repeats: how often it is shown while a clip of 1 is shown once; None for 1.
        is_picture: whether it is a picture; None for a video.
    """

    name: str
    caption: str
    frames: int
    height: int
    width: int
    pixel_frames: int
    latent_key: str
    text_key: str
    image_key: str | None = None
    teacher_key: str | None = None
    frame_key: str | None = None
    begin: int | None = None
    text_keys: tuple[str, ...] | None = None
    repeats: int | None = None
    is_picture: bool | None = None
    mask_key: str | None = None


class LatentCache:
    """Reader of a folder that `cache` wrote, one tensor at a time.

    Args:
        folder: the folder that holds `manifest.json`.

    Attributes:
        entries: clips in the order of the data; videos from `find_videos` are sorted by name.
        digest: hash over all entries, independent of how they are split into shards.
        causal: whether the first latents of an entry equal the latents of a shorter clip.
        fps: frame rate that the clips were resampled to; None if they kept their own.
        images: `ImageCoder.about` of the encoded images; None without images.
        options: what was asked of the clips and captions, by the names of a config's fields.
        condition: "first_frame" where the first frames of the clips are encoded too, else "text".
        has_masks: whether masks of the clips were asked for.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: another version, or a shard of another size than was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder / MANIFEST)
        for name, kinds in KINDS.items():
            typed(manifest, name, *kinds, origin=self.folder / MANIFEST)
        for about in manifest["shards"].values():
            check_shard(about, self.folder / MANIFEST, manifest["version"])
        check_sizes(self.folder, manifest["shards"])
        self._files: dict[str, dict[str, Any]] = manifest["shards"]
        self._homes = Homes()
        for shard, about in self._files.items():
            listed = about["tensors"] if manifest["version"] == 1 else None
            self._homes.add(shard, listed or tensors_of(self.folder / shard))
        self.entries = Entries(self.folder, manifest, self._homes, Entry)
        self.digest = self.entries.digest
        self.causal: bool = manifest["causal"]
        self.fps: float | None = manifest["fps"]
        self.images: dict[str, Any] | None = manifest.get("images")
        self.options: dict[str, Any] = manifest.get("options", {})
        self.condition: str = manifest.get("condition", TEXT)
        self.has_masks = manifest.get("masks") is True
        self._pictures: list[str] = manifest.get("pictures", [])
        if lost := self._homes.missing(self._pictures):
            key = shown(self._pictures[lost[0]])
            raise ValueError(
                f"{self.folder / MANIFEST} names a picture {key}, which no shard has: cache again "
                "into an empty folder"
            )
        self._empty: str = manifest["empty"]
        digests = typed(manifest, "digests", dict, origin=self.folder / MANIFEST, default={})
        self._digests: dict[str, Any] = digests
        if isinstance(manifest["entries"], dict):
            self._lines = {manifest["entries"]["file"]: manifest["entries"]}
        else:
            self._lines = {}
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def latents(self, index: int, frames: int | None = None) -> Tensor:
        """Read a clip's latents, (C, f, h, w) float32, as the transformer takes them.

        Args:
            frames: number of latent frames to read, from the first; None reads all.

        Raises:
            ValueError: the entry has fewer, or has more and its autoencoder is not causal.
        """
        entry = self.entries[index]
        if frames is None:
            frames = entry.frames
        if not self._fits(entry, frames):
            raise ValueError(
                f"frames must be {'at most ' if self.causal else ''}{entry.frames}, as many "
                f"latents as {entry.name} has, got {frames}"
            )
        key = entry.latent_key
        shard = self._shard(self._homes[key][LATENTS])
        return shard.get_slice(f"{key}.{LATENTS}")[:, :frames].float()

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
        key = self.entries[index].teacher_key
        if key is None:
            raise ValueError(f"{self.folder} holds no captions for a teacher: cache again")
        return self._text(key)

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
        """Read the conditions of `predict` that the clip's first frame gives, of one sample.

        Args:
            frames: number of latent frames that train, from the first; None: all.

        Raises:
            ValueError: the cache was made without first frames.
        """
        key = self.entries[index].frame_key
        if key is None:
            raise ValueError(f"{self.folder} holds no first frames: cache again")
        found = {}
        for name, home in self._homes[key].items():
            tensor = self._shard(home).get_slice(f"{key}.{name}")
            cut = len(tensor.get_shape()) == 4 and frames is not None
            found[name] = (tensor[:, :frames] if cut else tensor[:]).float()
        return found

    def mask(self, index: int, frames: int) -> Tensor:
        """Read the mask of a clip's first latent frames, (1, f, h, w) float32 from 0 to 1; all 1
        for a clip without a mask."""
        entry = self.entries[index]
        if entry.mask_key is None:
            return torch.ones(1, frames, entry.height, entry.width)
        shard = self._shard(self._homes[entry.mask_key][MASK])
        return shard.get_slice(f"{entry.mask_key}.{MASK}")[:frames].float()[None]

    def picture(self, index: int) -> np.ndarray:
        """Read the first frame of one of the first clips, (H, W, 3) uint8.

        Raises:
            ValueError: the cache was made without first frames.
        """
        if not self._pictures:
            raise ValueError(f"{self.folder} holds no first frames: cache again")
        key = self._pictures[index % len(self._pictures)]
        return self._shard(self._homes[key][PICTURE]).get_tensor(f"{key}.{PICTURE}").numpy()

    def verify(self) -> None:
        """Read all shards. Raises ValueError for shards whose bytes changed since `cache`."""
        check_bytes(self.folder, self._files | self._lines)

    def fitting(self, frames: int) -> list[int]:
        """Numbers of the entries that give a clip of `frames` latent frames.

        An entry must have that length; with a causal autoencoder it may also be longer.
        """
        held = self.entries.sizes[:, 0]
        fits = (held >= frames) & (frames >= 1) if self.causal else held == frames
        return np.flatnonzero(fits).tolist()

    def digest_at(self, frames: int) -> str:
        """Hash the clips of `fitting` with their texts and images, independent of their further
        frames; as `digest` where the cache was made by an earlier version."""
        return str(self._digests.get(str(frames), self.digest))

    def buckets(self, frames: int) -> dict[tuple[int, int], list[int]]:
        """Group `fitting` by (height, width) of the latents."""
        found: dict[tuple[int, int], list[int]] = {}
        numbers = self.fitting(frames)
        for i, (height, width) in zip(
            numbers, self.entries.sizes[numbers, 1:3].tolist(), strict=True
        ):
            found.setdefault((height, width), []).append(i)
        return found

    def _fits(self, entry: Entry, frames: int) -> bool:
        return 1 <= frames <= entry.frames if self.causal else frames == entry.frames

    def _text(self, key: str) -> dict[str, Tensor]:
        found = {
            name: self._shard(shard).get_tensor(f"{key}.{name}")
            for name, shard in self._homes[key].items()
        }
        return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}

    def _image(self, key: str | None) -> Tensor:
        if key is None:
            raise ValueError(
                f"{self.folder} holds no images: cache again with adapter image_prompt"
            )
        return as_features(self._shard(self._homes[key][IMAGE]).get_tensor(f"{key}.{IMAGE}"))

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) == SHARDS_OPEN:
                self._open.popitem(last=False)
            self._open[name] = safe_open(self.folder / name, framework="pt")
        self._open.move_to_end(name)
        return self._open[name]


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
    latents = {entry.latent_key for entry in cache.entries if entry.name in chosen}
    return frozenset(
        i
        for i, entry in enumerate(cache.entries)
        if entry.name in chosen or entry.latent_key in latents
    )


def hash_of_name(name: str) -> int:
    """Hash a clip's name to a number below 2^64."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
