"""Latents and text embeddings, encoded once and read while training.

A cache is a folder of `Shards`. Each tensor's key is a hash of its inputs: for latents the clip's
bytes, the decoding and the autoencoder; for a text the caption, the text encoders and the
tokenizers; for an image its bytes and the image encoder. Only changed inputs are encoded again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from gen_accel.json_files import fields_of, typed
from gen_accel.lora.fingerprint import hash_of
from gen_accel.lora.shards import (
    MANIFEST,
    check_bytes,
    check_shard,
    check_sizes,
    read_manifest,
)
from gen_accel.moved import signpost
from gen_accel.pipelines.image_prompt.projectors import normalised
from gen_accel.values import check_fields, check_names, shown

if not TYPE_CHECKING:
    __getattr__ = signpost("lora.latents")

LATENTS = "latents"  # name of a clip's tensor after its key
IMAGE = "image"
RECIPE = 1  # version of decoding and encoding; another one makes all keys new
TEXTS_AT_ONCE = 8
NONE = type(None)
KINDS = {  # types of a manifest's fields
    "shards": (dict,),
    "entries": (list,),
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
        latent_key, text_key, image_key, teacher_key: names of the clip's tensors in the shards;
            image_key or teacher_key is None in a cache without images or teacher captions.
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
            check_shard(about, self.folder / MANIFEST)
        check_sizes(self.folder, manifest["shards"])
        self._files: dict[str, dict[str, Any]] = manifest["shards"]
        self.entries = tuple(_entry(one, self.folder / MANIFEST) for one in manifest["entries"])
        self.causal: bool = manifest["causal"]
        self.fps: float | None = manifest["fps"]
        self.digest = hash_of([manifest["entries"], manifest["empty"], self.causal, self.fps])
        self.images: dict[str, Any] | None = manifest.get("images")
        self._empty: str = manifest["empty"]
        origin = self.folder / MANIFEST
        self._sources: dict[str, str] = typed(manifest, "sources", dict, origin=origin, default={})
        # Maps a tensor's key, then its own name, to the shard.
        self._homes: dict[str, dict[str, str]] = {}
        for shard, about in self._files.items():
            for tensor in about["tensors"]:
                key, name = tensor.split(".", 1)
                self._homes.setdefault(key, {})[name] = shard
        self._check_keys()
        self._open: dict[str, Any] = {}

    def _check_keys(self) -> None:
        """Raise ValueError where no shard has what an entry names."""
        for entry in self.entries:
            parts = (entry.latent_key, entry.text_key, entry.image_key, entry.teacher_key)
            for key in parts:
                if key is not None and key not in self._homes:
                    raise ValueError(
                        f"{self.folder / MANIFEST} names tensors {shown(key)} of {entry.name}, "
                        "which no shard has: cache again into an empty folder"
                    )

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

    def conditions(self, index: int) -> dict[str, Tensor]:
        """Read the transformer's arguments for the caption, without a batch axis."""
        return self._text(self.entries[index].text_key)

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

    def verify(self) -> None:
        """Read all shards. Raises ValueError for shards whose bytes changed since `cache`."""
        check_bytes(self.folder, self._files)

    def fitting(self, frames: int) -> list[int]:
        """Numbers of the entries that give a clip of `frames` latent frames.

        An entry must have that length; with a causal autoencoder it may also be longer.
        """
        return [i for i, entry in enumerate(self.entries) if self._fits(entry, frames)]

    def digest_at(self, frames: int) -> str:
        """Hash `fitting` with captions and images, independent of the clips' further frames."""
        seen = []
        for entry in (self.entries[i] for i in self.fitting(frames)):
            latents = entry.latent_key
            if self.causal:
                latents = self._sources.get(latents, latents)
            texts = entry.text_key, entry.teacher_key, entry.image_key
            seen.append([entry.name, entry.height, entry.width, latents, *texts])
        return hash_of([seen, frames, self._empty, self.causal, self.fps])

    def buckets(self, frames: int) -> dict[tuple[int, int], list[int]]:
        """Group `fitting` by (height, width) of the latents."""
        found: dict[tuple[int, int], list[int]] = {}
        for i in self.fitting(frames):
            found.setdefault((self.entries[i].height, self.entries[i].width), []).append(i)
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
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def _entry(data: Any, origin: Path) -> Entry:
    """Read an entry of a manifest; ValueError for anything else."""
    what = f"an entry of {origin}"
    check_names(fields_of(data, what), Entry, what)
    check_fields(data, Entry, what)
    return Entry(**data)


def as_features(stored: Tensor) -> Tensor:
    """Convert a stored image to features: float32, pixels in [-1, 1]."""
    return normalised(stored) if stored.dtype == torch.uint8 else stored.float()
