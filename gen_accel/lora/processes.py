"""Work of the main process that the other processes of a training wait for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gen_accel.endings import unwinding
from gen_accel.extras import needed_for
from gen_accel.files import clear_partial
from gen_accel.locks import locked

with needed_for("training", extra="train"):
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list


def by_main(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Let the main process `work`, and the others wait for its end.

    Raises:
        Exception: whatever `work` raises, in the main process. The others then raise a ValueError
            of the same text, so that none of them waits forever.
    """
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:
            failed = error
    [told] = broadcast_object_list([None if failed is None else str(failed)])
    if failed is not None:
        raise failed
    if told is not None:
        raise ValueError(told)


@contextmanager
def alone_in(folder: Path, accelerator: Accelerator, *, own: Sequence[Path]) -> Iterator[None]:
    """Lock `folder` against other runs, by the main process for all processes.

    Half-written files that killed runs left in the folder are removed.

    Args:
        own: subfolders that no other program writes to.

    Raises:
        BlockingIOError: another run holds the folder; a ValueError in the other processes.
        OSError: the folder cannot be made or written to.
    """
    with unwinding(), ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder))
            for one in (folder, *own):
                clear_partial(one)

        by_main(accelerator, take)
        yield
