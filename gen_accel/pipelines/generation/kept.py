"""The pipeline that stays in memory for a process that makes video after video."""

import copy
import gc
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import nn

from gen_accel.memory import free_bytes, with_spare

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HOST = torch.device("cpu")


class PipelineCache:
    """Place for one pipeline, as its files give it: without LoRAs, on no accelerator.

    It is never run. `taken` returns a copy that shares the weights: modules, hooks, LoRAs, a
    device or a dtype of the copy are its own. Writing into a weight in place, as `fuse_lora`
    does, would reach the next copy: load a pipeline that will be fused without a cache.

    Args:
        seconds: how long a pipeline stays after its last use.

    Attributes:
        spare: bytes of the host's memory that `clear` would free.
    """

    def __init__(self, seconds: float) -> None:
        self.spare = 0
        self._seconds, self._until = seconds, 0.0
        self._kept: tuple[Hashable, DiffusionPipeline] | None = None
        self._in_use = False

    def taken(self, key: Hashable, load: "Callable[[], DiffusionPipeline]") -> "DiffusionPipeline":
        """Return the pipeline of `key`, for the caller alone: from memory, or loaded now.

        A pipeline stays if as much memory is free, once it is loaded, as its weights take.
        Quantised weights never stay: their kinds of tensors have no second owner.

        Args:
            key: all that decides what `load` returns.
        """
        self._in_use = True
        if self._kept is None or self._kept[0] != key:
            self.clear()  # first, for two may not fit
            before = free_bytes(HOST)
            pipe = load()
            after, size = free_bytes(HOST), _plain_bytes(pipe)
            if self._seconds <= 0 or size is None or (after is not None and after < size):
                return pipe
            self._kept = key, pipe
            if before is not None and after is not None:
                # Weights that are mapped from their files count as free already.
                self.spare = min(size, max(0, before - after))
        return _shared(self._kept[1])

    def put_back(self) -> None:
        """Say that no copy is used any more: their memory is freed, and the time begins."""
        if self._in_use:
            self._in_use, self._until = False, time.monotonic() + self._seconds
            gc.collect()  # modules with hooks are in cycles

    @property
    def left(self) -> float | None:
        """Seconds that the pipeline stays, if nobody takes it; None without a pipeline."""
        return None if self._kept is None else max(0.0, self._until - time.monotonic())

    def clear(self) -> None:
        """Let go of the pipeline."""
        self._kept, self.spare = None, 0
        gc.collect()


_CACHE: ContextVar[PipelineCache | None] = ContextVar("cache", default=None)


@contextmanager
def keeping(seconds: float) -> Iterator[PipelineCache]:
    """Give the pipelines that `generate` loads inside a cache."""
    cache = PipelineCache(seconds)
    before = _CACHE.set(cache)
    try:
        with with_spare(lambda: cache.spare):
            yield cache
    finally:
        _CACHE.reset(before)
        cache.clear()


def kept() -> PipelineCache | None:
    """Return the cache of `keeping`; None outside."""
    return _CACHE.get()


def _modules(pipe: "DiffusionPipeline") -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _plain_bytes(pipe: "DiffusionPipeline") -> int | None:
    """Bytes of the weights; None if some are quantised or not in the host's memory."""
    modules = _modules(pipe)
    tensors = [x for part in modules for x in (*part.parameters(), *part.buffers())]
    plain = all(type(x) in (nn.Parameter, torch.Tensor) and x.device == HOST for x in tensors)
    if not plain or any(getattr(one, "hf_quantizer", None) for one in modules):
        return None
    return sum(x.nbytes for x in tensors)


def _shared(pipe: "DiffusionPipeline") -> "DiffusionPipeline":
    """Copy a pipeline, whose copy has parameters of its own in the same memory."""
    from transformers import PreTrainedTokenizerBase

    memo: dict[int, object] = {
        id(x): nn.Parameter(x.detach(), requires_grad=x.requires_grad)
        for part in _modules(pipe)
        for x in part.parameters()
    }
    for part in pipe.components.values():
        if isinstance(part, PreTrainedTokenizerBase):  # whose copy takes a second
            memo[id(part)] = part
    return copy.deepcopy(pipe, memo)
