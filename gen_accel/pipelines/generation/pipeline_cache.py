"""The weights of the pipeline that was loaded last, for a process that makes video after video."""

import copy
import gc
import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.memory import free_bytes, with_spare

HOST = torch.device("cpu")
_CACHE: ContextVar["PipelineCache | None"] = ContextVar("cache", default=None)


class PipelineCache:
    """Place for one pipeline, as its files give it: without LoRAs, on no accelerator.

    It is never run. What `taken` returns is a copy that shares the weights: modules, hooks, LoRAs,
    a device or a dtype of the copy are its own, so that a copy is what the files would give again.
    Writing into a weight in place, as `fuse_lora` does, would reach the next copy: a pipeline that
    will be fused is loaded without a cache.

    Args:
        seconds: how long a pipeline stays after its last use.
        clock: seconds now.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._key: Hashable = None
        self._pipe: Any = None
        self._bytes = 0
        self._in_use, self._until = False, 0.0

    def taken(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """Return the pipeline of `key`, for the caller alone: from memory, or loaded now.

        What is loaded now stays where as much memory is free, once it is loaded, as its weights
        take. Quantised weights never stay: their kinds of tensors have no second owner.

        Args:
            key: says all that decides what `load` returns.
        """
        self._in_use = True
        if self._pipe is None or self._key != key:
            self.clear()  # first, for two may not fit
            before = free_bytes(HOST)
            pipe = load()
            if not (self._seconds > 0 and _can_stay(pipe)):
                return pipe
            self._key, self._pipe = key, pipe
            after = free_bytes(HOST)
            if before is not None and after is not None:
                # Weights that are mapped from their files count as free already.
                self._bytes = min(_size(pipe), max(0, before - after))
        return _shared(self._pipe)

    def put_back(self) -> None:
        """Say that no copy is used any more: their memory is freed, and the time begins."""
        if self._in_use:
            self._in_use = False
            self._until = self._clock() + self._seconds
            gc.collect()  # modules with hooks are in cycles

    @property
    def left(self) -> float | None:
        """Seconds that the pipeline stays, if nobody takes it; None where there is none."""
        return None if self._pipe is None else max(0.0, self._until - self._clock())

    @property
    def spare(self) -> int:
        """Bytes of the host's memory that `clear` would free."""
        return self._bytes

    def clear(self) -> None:
        """Let go of the pipeline."""
        self._key = self._pipe = None
        self._bytes = 0
        gc.collect()


@contextmanager
def keeping(seconds: float) -> Iterator[PipelineCache]:
    """Give what is loaded inside by `generate` a cache; see `PipelineCache`."""
    cache = PipelineCache(seconds)
    before = _CACHE.set(cache)
    try:
        with with_spare(lambda: cache.spare):
            yield cache
    finally:
        _CACHE.reset(before)
        cache.clear()


def kept() -> PipelineCache | None:
    """Return the cache of this process; None if nothing is kept."""
    return _CACHE.get()


def state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files in a folder, which tell whether one was changed.

    Folders that are links are followed, each once.
    """
    found, seen = [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            inner.clear()
            continue
        seen.add(real)
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):  # a link to nowhere
                about = os.stat(path)
                found.append((path, about.st_size, about.st_mtime_ns))
    return tuple(sorted(found))


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _tensors(pipe: Any) -> list[torch.Tensor]:
    return [x for part in _modules(pipe) for x in (*part.parameters(), *part.buffers())]


def _size(pipe: Any) -> int:
    return sum(x.nbytes for x in _tensors(pipe))


def _can_stay(pipe: Any) -> bool:
    tensors = _tensors(pipe)
    plain = all(
        type(x) in (nn.Parameter, torch.Tensor) and x.device.type == "cpu" for x in tensors
    )
    if not plain or any(getattr(one, "hf_quantizer", None) for one in _modules(pipe)):
        return False
    free = free_bytes(HOST)
    return free is None or free >= _size(pipe)


def _shared(pipe: Any) -> Any:
    """Copy a pipeline, whose copy has parameters of its own in the same memory."""
    from transformers import PreTrainedTokenizerBase

    memo: dict[int, Any] = {}
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            for x in part.parameters():
                memo[id(x)] = nn.Parameter(x.detach(), requires_grad=x.requires_grad)
        elif isinstance(part, PreTrainedTokenizerBase):  # whose copy takes a second
            memo[id(part)] = part
    return copy.deepcopy(pipe, memo)
