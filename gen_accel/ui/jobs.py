"""Jobs of the page, each in a folder of its own with its record, `job.json`."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from gen_accel.files import write_json
from gen_accel.json_files import read_fields, typed

RECORD, GIVEN = "job.json", "given"  # a file and a folder in the folder of each job
PASSING = ("tmp*", ".asked-*")  # folders of requests, which go with them
HERE = "{job}"  # in options, the folder of the job

WAITING, RUNNING, DONE = "waiting", "running", "done"
FAILED, STOPPED, INTERRUPTED = "failed", "stopped", "interrupted"
STATES = (WAITING, RUNNING, DONE, FAILED, STOPPED, INTERRUPTED)
LIVE = (WAITING, RUNNING)
ENDED = "the server ended while this ran: queue it again"


@dataclass(frozen=True)
class Progress:
    """Progress of a running job.

    Args:
        words: what is done now.
        done, total: steps, frames or whatever `unit` says; a total of None is not known.
        left: seconds that remain of the task; None where not known.
    """

    words: str = ""
    done: float = 0
    total: float | None = None
    unit: str = ""
    left: float | None = None

    @property
    def share(self) -> float | None:
        """Share that is done, 0 to 1; None where not known."""
        return min(self.done / self.total, 1.0) if self.total else None


@dataclass(frozen=True)
class Job:
    """A verb with its options, and what became of it.

    Args:
        verb, options: as on the command line, by the names that a file of --config has.
        title: what a person knows it by, such as the prompt.
        tab: the tab of a browser that it came from; "" for none.
        kind: the screen or interface that it came from.
        about: whatever who submitted it wants to find again.
        made, started, ended: in seconds since the epoch; None: not yet.
        error: one sentence; "" where there is none.
        said: what the verb printed.
        notes: lines that it said beside, such as warnings.
        progress: of a running job; not kept on disk.
    """

    id: str
    verb: str
    options: dict[str, Any]
    title: str = ""
    tab: str = ""
    kind: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    state: str = WAITING
    made: float = 0.0
    started: float | None = None
    ended: float | None = None
    error: str = ""
    said: str = ""
    notes: tuple[str, ...] = ()
    progress: Progress = Progress()

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def seconds(self) -> float | None:
        """Seconds that it has run for; None where it has not begun."""
        if self.started is None:
            return None
        return (time.time() if self.ended is None else self.ended) - self.started


class Store:
    """The folders of jobs, in one folder.

    Args:
        folder: made where missing.

    Raises:
        OSError: `folder` cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()

    def place(self, job: Job | str) -> Path:
        """Folder of a job."""
        return self.folder / (job if isinstance(job, str) else job.id)

    def new(self, verb: str, options: Mapping[str, Any], **about: Any) -> Job:
        """Make a job and its folder, without a record yet."""
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        name = f"{stamp}-{token_hex(3)}"
        self.place(name).mkdir(parents=True)
        return Job(name, verb, dict(options), made=now, **about)

    def write(self, job: Job) -> None:
        """Write the record of a job; raises OSError, as on a full disk."""
        write_json(self.place(job) / RECORD, {n: v for n, v in asdict(job).items() if n in KEPT})

    def read(self) -> list[Job]:
        """Read the jobs by age, without those whose record cannot be read. A job that was running
        is one that was interrupted."""
        found = []
        for record in self.folder.glob(f"*/{RECORD}"):
            try:
                job = _job(read_fields(record), record)
            except (OSError, ValueError):
                continue
            if job.state == RUNNING:
                job = replace(job, state=INTERRUPTED, error=ENDED, ended=record.stat().st_mtime)
            found.append(job)
        return sorted(found, key=lambda job: (job.made, job.id))

    def sweep(self) -> None:
        """Remove the folders that requests of a killed server left. No other server may have the
        folder."""
        for pattern in PASSING:
            for left in self.folder.glob(pattern):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)

    def clear(self, job: Job) -> None:
        """Remove what a job that did not end well left in its folder: all but its record and what
        it was given."""
        for left in self.place(job).iterdir():
            if left.name in (RECORD, GIVEN):
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def remove(self, job: Job) -> None:
        shutil.rmtree(self.place(job), ignore_errors=True)

    def files(self, job: Job) -> list[Path]:
        """Files that a job made, by name, without its record and half-written ones."""
        place = self.place(job)
        if not place.is_dir():
            return []
        return sorted(
            file
            for file in place.rglob("*")
            if file.is_file() and file.name != RECORD and not file.name.startswith(".")
            if file.relative_to(place).parts[0] != GIVEN
        )


KEPT = tuple(one.name for one in fields(Job) if one.name != "progress")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "verb", "title", "tab", "kind", "state", "error", "said"), (str,)),
    **dict.fromkeys(("options", "about"), (dict,)),
    **dict.fromkeys(("started", "ended"), (float, type(None))),
    "made": (float,),
    "notes": (list,),
}


def _job(data: dict[str, Any], origin: Path) -> Job:
    held = {name: typed(data, name, *_KINDS[name], origin=origin) for name in KEPT}
    if held["state"] not in STATES or held["id"] != origin.parent.name:
        raise ValueError(f"{origin} is no record of a job")
    held["notes"] = tuple(map(str, held["notes"]))
    return Job(**held)
