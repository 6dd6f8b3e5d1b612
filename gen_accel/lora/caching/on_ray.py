"""Reading and encoding of clips by workers of Ray, for a cache that one process writes."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch

from gen_accel.cluster import Done, Machines
from gen_accel.lora.caching.encoders import Encoders
from gen_accel.lora.caching.jobs import CLIPS, READING
from gen_accel.lora.caching.work import Run

OWN = ("encoders", "spread", "broken", "short", "left_out")  # fields that stay in a process


class Workers:
    """Workers of a cluster, each with encoders of its own.

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

    def over(self, run: Run, title: str, items: Sequence[Any]) -> Generator[Any, None, None]:
        """Yield what `run` makes of each item by the work `title`, in order.

        An item at which a worker died each time gives an OSError.

        Raises ValueError for an item that failed in another way, as it would here, and for a
        machine that does not see a folder of the clips.
        """
        self._check_folders(title, items)
        options = {one.name: getattr(run, one.name) for one in fields(run) if one.init}
        options = {name: value for name, value in options.items() if name not in OWN}
        load = None if title == READING else self._load
        work = partial(_Encoder, load, options, title)
        with closing(self._machines.map(work, items, ordered=True)) as found:
            for done in found:
                yield _result(done)

    def _check_folders(self, title: str, items: Sequence[Any]) -> None:
        """Look for the folders of clips, which a manifest may name anywhere: a machine without
        them would find each clip broken."""
        videos = items if title == READING else []
        if title == CLIPS:
            videos = [job.video for jobs in items for job in jobs]
        files = [video.source for video in videos if isinstance(video.source, Path)]
        if files:
            self._machines.check(writes=(), reads=[*dict.fromkeys(file.parent for file in files)])


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
        self._run, self._held = Run(encoders=encoders, **options), ExitStack()
        self._make = self._held.enter_context(self._run.work(title))

    def __call__(self, item: Any) -> Any:
        return _packed(self._make(item), self._run)


def _packed(made: Any, run: Run) -> Any:
    """Turn tensors, which go by no process of another device, into bytes."""
    if isinstance(made, dict):
        return safetensors.torch.save({name: run.stored(x) for name, x in made.items()})
    if isinstance(made, list):
        return [_packed(one, run) for one in made]
    if type(made) is tuple:
        return made[0], _packed(made[1], run)
    return made


def _unpacked(made: Any) -> Any:
    if isinstance(made, bytes):
        return safetensors.torch.load(made)
    if isinstance(made, list):
        return [_unpacked(one) for one in made]
    if type(made) is tuple:
        return made[0], _unpacked(made[1])
    return made
