"""Reading of clips by threads, ahead of the encoder and in order.

Threads serve here as processes would: ffmpeg's decoders, its filters and Pillow's resizing release
the interpreter, and frames need no copy from one process to another.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

PATIENCE = 0.1  # seconds between two looks at whether the reader was stopped

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(
    work: Callable[[Item], Iterable[Made]], items: Iterable[Item], workers: int
) -> Generator[Made, None, None]:
    """Chain `work(item)` over all items, in order, worked ahead by threads.

    Close the iterator where it is not gone through to its end: this stops the threads, each after
    what it is at.

    Args:
        work: must not depend on the order in which it is called. What it raises is raised here, at
            the item's place.
        items: taken a few ahead.
        workers: number of threads. At most two results of each wait. 0: no thread; `work` is
            called when its result is asked for.
    """
    if not workers:
        for item in items:
            yield from work(item)
        return
    stopped = threading.Event()
    waiting: deque[tuple[_Shelf[Made], Future[None]]] = deque()
    with ThreadPoolExecutor(workers, "reading") as pool:
        try:
            for item in items:
                shelf = _Shelf[Made](stopped)
                waiting.append((shelf, pool.submit(shelf.fill, work, item)))
                if len(waiting) > workers:
                    yield from waiting[0][0]
                    waiting.popleft()
            while waiting:
                yield from waiting[0][0]
                waiting.popleft()
        finally:
            stopped.set()
            for _, future in waiting:
                future.cancel()


class _Shelf(Generic[Made]):
    """Results of one item, from its thread to the reader."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._results: queue.Queue[tuple[str, Any]] = queue.Queue(1)

    def fill(self, work: Callable[[Any], Iterable[Made]], item: Any) -> None:
        try:
            for made in work(item):
                if not self._put("made", made):
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def __iter__(self) -> Iterator[Made]:
        while True:
            kind, result = self._results.get()
            if kind == "end":
                return
            if kind == "error":
                raise result
            yield result

    def _put(self, kind: str, result: Any) -> bool:
        """Wait for a free place. Returns whether there was one before the reader was stopped."""
        while not self._stopped.is_set():
            try:
                self._results.put((kind, result), timeout=PATIENCE)
            except queue.Full:
                continue
            return True
        return False
