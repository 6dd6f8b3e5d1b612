"""Choice of the clips that are held out of a training."""

import hashlib
import os

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.latents import LatentCache


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
