"""Reading and encoding of clips by workers of Ray, for a cache that one process writes."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch

from gen_accel.cluster import Done, Machines
from gen_accel.lora.caching.chunks import CLIPS, READING
from gen_accel.lora.caching.encoders import Encoders
from gen_accel.lora.caching.work import Encoding

OWN = ("encoders", "executor", "broken", "short", "left_out")  # fields that stay in a process


class Workers:
    """Executor of a cache: workers of a cluster, each with encoders of its own.

    Args:
        load: loads the encoders in a worker, with the weights and dtypes that `cache` gets here.
        reads: files and folders that all machines must see.

    Raises:
        ValueError: a machine does not see what it needs.
    """

    def __init__(
        self, machines: Machines, load: Callable[[], Encoders], reads: Sequence[Path]
    ) -> None:
        machines.check(writes=(), reads=reads)
        self._machines, self._load = machines, load

    def map(
        self, encoding: Encoding, title: str, items: Sequence[Any]
    ) -> Generator[Any, None, None]:
        """Yield what `encoding` makes of each item by the work `title`, in order.

        An item at which a worker died each time gives an OSError.

        Raises ValueError for an item that failed in another way, as it would here, and for a
        machine that does not see a folder of the clips: it would find each clip broken.
        """
        videos = items if title == READING else []
        if title == CLIPS:
            videos = [chunk.video for chunks in items for chunk in chunks]
        sources = (video.source for video in videos)
        if folders := {path.parent: None for path in sources if isinstance(path, Path)}:
            self._machines.check(writes=(), reads=[*folders])
        given = [one.name for one in fields(encoding) if one.init and one.name not in OWN]
        options = {name: getattr(encoding, name) for name in given}
        load = None if title == READING else self._load
        work = partial(_Encoder, load, options, title)
        with closing(self._machines.map(work, items, ordered=True)) as found:
            for done in found:
                yield _result(done)


def _result(done: Done) -> Any:
    if done.failed is None:
        return _unpacked(done.result)
    if done.is_given_up:
        return OSError(done.failed)
    raise ValueError(f"machine {done.host}: {done.failed}")


class _Encoder:
    """Work of one kind on each item, in a worker. Its models stay on their device."""

    def __init__(
        self, load: Callable[[], Encoders] | None, options: dict[str, Any], title: str
    ) -> None:
        encoders: Any = None if load is None else load()
        self._run, self._held = Encoding(encoders=encoders, **options), ExitStack()
        self._make = self._held.enter_context(self._run.work(title))

    def __call__(self, item: Any) -> Any:
        return _packed(self._make(item), self._run)


def _packed(made: Any, run: Encoding) -> Any:
    """Turn tensors, which go by no process of another device, into bytes."""
    if isinstance(made, dict):
        return safetensors.torch.save({name: run.stored(x) for name, x in made.items()})
    if isinstance(made, list):
        return [_packed(one, run) for one in made]
    return (made[0], _packed(made[1], run)) if type(made) is tuple else made


def _unpacked(made: Any) -> Any:
    if isinstance(made, bytes):
        return safetensors.torch.load(made)
    if isinstance(made, list):
        return [_unpacked(one) for one in made]
    return (made[0], _unpacked(made[1])) if type(made) is tuple else made
