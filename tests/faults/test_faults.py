"""Faults injected into everything that writes: kill -9 at every operation on files, disks that are
full or read-only, folders that may not be written, two runs at once.

After each, what was there before is there still, no file looks whole and is not, and the same
command given again ends with the bytes of a run that nothing disturbed.
"""

import json
import os
import random
import shutil
import signal
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from support import fault_jobs
from support.cell import Cell, Limits, Outcome
from support.fault_jobs import JOBS
from support.operations import ENDED, Fault, Operation, faults_at
from support.products import NIGHTLY

from gen_accel.io import read_fields
from gen_accel.lora import checkpoint, trainer
from gen_accel.paths import DONE

pytestmark = pytest.mark.slow

LEAST = 120
# By day, of each job: how many faults of each kind at each kind of operation.
SAMPLE = {"train": 1, "resume": 0, "cache": 1, "gif": 1, "frames": 0, "mp4": 1, "compare": 0}
SAMPLE |= {"decode": 0, "processors": 9, "adapter": 9, "show": 0, "metrics": 0, "tune": 1}
SIZES = (0, 100, 1000, 5000)  # of the largest file on a full disk, in bytes

COUNTED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def cell(home):
    made = Cell(home)
    made.prepare(fault_jobs.prepare, home)
    yield made
    made.close()


class Undisturbed:
    """A run of a job that nothing disturbs.

    Attributes:
        before: folder with the earlier output.
        listed: the operations on files.
        end: what it came to.
        good: each file that is whole, before or after, with its hash.
    """

    def __init__(self, cell: Cell, name: str, folder: Path) -> None:
        self.before = folder / "before"
        self.before.mkdir()
        job = JOBS[name]
        for command in job.earlier:
            outcome = cell(fault_jobs.act, command, folder=self.before)
            assert outcome.code == 0, outcome.err
        after = shutil.copytree(self.before, folder / "after")
        outcome = cell(fault_jobs.disturbed, job.command, None, folder=after)
        assert outcome.code == 0, outcome.err
        self.listed = operations(after)
        self.end = fault_jobs.end(after)
        self.good = {*fault_jobs.tree(self.before).items(), *fault_jobs.tree(after).items()}


def operations(folder: Path) -> list[Operation]:
    return [Operation(*one) for one in json.loads((folder / ENDED).read_text())]


def sample(listed: list[Operation], most: int) -> list[Fault]:
    """Of the faults of each kind at each kind of operation the first `most`, spread evenly."""
    groups: dict[tuple, list[Fault]] = defaultdict(list)
    for fault in faults_at(listed):
        groups[listed[fault.at].kind, fault.kind].append(fault)
    taken = []
    for group in groups.values():
        count = len(group) if NIGHTLY else min(most, len(group))
        taken += [group[(2 * i + 1) * len(group) // (2 * count)] for i in range(count)]
    return taken


def refusal(outcome: Outcome) -> str | None:
    """What is wrong with how an error was said; None: nothing."""
    said = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    if "Traceback" in outcome.err or outcome.code not in (0, 2) or len(said) > 1:
        return f"code {outcome.code}: {last(outcome)}"
    if any(".partial-" in line for line in said):
        return f"names a file that nobody gave: {last(outcome)}"
    if outcome.code == 2 and not said:
        return f"code 2 without a word: {last(outcome)}"
    return None


def last(outcome: Outcome) -> str:
    """What was said last."""
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    return (lines or ["nothing"])[-1][:200]


@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_lost(cell, name, tmp_path):
    if not (SAMPLE[name] or NIGHTLY):
        pytest.skip("by night")
    run = Undisturbed(cell, name, tmp_path)
    found = []
    for number, fault in enumerate(sample(run.listed, SAMPLE[name])):
        folder = shutil.copytree(run.before, tmp_path / f"{number}")
        wrong = after_fault(cell, name, run, fault, folder)
        found += [f"{fault} ({run.listed[fault.at]}): {text}" for text in wrong]
        shutil.rmtree(folder)
    for size in SIZES:
        folder = shutil.copytree(run.before, tmp_path / f"full{size}")
        wrong = after_full_disk(cell, name, run, size, folder)
        found += [f"files of at most {size} bytes: {text}" for text in wrong]
    COUNTED["lost"] += len(found)
    assert not found, "\n".join(found)


def after_fault(cell: Cell, name: str, run: Undisturbed, fault: Fault, folder: Path) -> list[str]:
    """What is wrong after it."""
    COUNTED["injected"] += 1
    outcome = cell(fault_jobs.disturbed, JOBS[name].command, fault, folder=folder)
    wrong = []
    if fault.kind in ("killed", "torn"):
        if outcome.code != -signal.SIGKILL:
            wrong.append(f"was to be killed: {outcome.code} {last(outcome)}")
    else:
        wrong += filter(None, [refusal(outcome)])
        if not fault.goes_on and (left := fault_jobs.partials(folder)):
            wrong.append(f"left {left}")
    return wrong + left_whole(cell, name, run, folder) + rerun(cell, name, run, folder)


def after_full_disk(cell: Cell, name: str, run: Undisturbed, size: int, folder: Path) -> list[str]:
    """What is wrong after a run where no file may grow beyond `size` bytes."""
    COUNTED["injected"] += 1
    limits = Limits(file=size)
    outcome = cell(fault_jobs.act, JOBS[name].command, folder=folder, limits=limits)
    wrong = [*filter(None, [refusal(outcome)])]
    if left := fault_jobs.partials(folder):
        wrong.append(f"left {left}")
    return wrong + left_whole(cell, name, run, folder) + rerun(cell, name, run, folder)


def left_whole(cell: Cell, name: str, run: Undisturbed, folder: Path) -> list[str]:
    """What is wrong with the files as the fault left them."""
    wrong = [f"{path} is gone" for path in JOBS[name].keeps if not (folder / path).exists()]
    if name in ("train", "resume"):
        return wrong + torn_checkpoints(folder)
    if name == "cache":
        return [*wrong, *filter(None, [fault_jobs.unusable_cache(folder)])]
    known, whole = {path for path, _ in run.good}, {digest for _, digest in run.good}
    for path, digest in fault_jobs.tree(folder).items():
        is_begun = path.endswith(DONE) and not read_fields(folder / path)["sha256"]
        if is_begun or (path, digest) in run.good:
            continue
        if path in known or digest not in whole:
            wrong.append(f"{path} is neither as before nor as after")
    if name == "processors":
        read = cell(fault_jobs.read_saved, folder=folder)
        if read.result not in ([1.0], [2.0]):
            wrong.append(f"cannot be loaded: {read.result} {last(read)}")
    return wrong


def torn_checkpoints(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checkpoint.load_newest(folder / "run" / trainer.CHECKPOINTS)
    return [str(one.message) for one in said]


def rerun(cell: Cell, name: str, run: Undisturbed, folder: Path) -> list[str]:
    """What is wrong after the command was given again."""
    outcome = None
    for command in JOBS[name].reruns:
        outcome = cell(fault_jobs.act, command, folder=folder)
        if outcome.code == 0:
            break
    assert outcome is not None
    if outcome.code != 0:
        return [f"again: code {outcome.code}: {last(outcome)}"]
    wrong = [f"again, left {left}"] if (left := fault_jobs.partials(folder)) else []
    end = fault_jobs.end(folder)
    if end != run.end:
        keys = [k for k in end.keys() | run.end.keys() if end.get(k) != run.end.get(k)]
        wrong.append(f"again, other than undisturbed: {keys}")
    return wrong


TWO = ("train", "cache", "gif", "mp4", "processors", "adapter")
MEETINGS = 2  # by day, of each


@pytest.mark.parametrize("name", TWO)
def test_two_at_once(cell, name, tmp_path):
    """The first stops at an operation, the second runs to its end, then the first goes on: either
    is refused, or both leave what one would have."""
    run = Undisturbed(cell, name, tmp_path)
    count = len(run.listed) if NIGHTLY else MEETINGS
    found = []
    for i in range(count):
        at = (2 * i + 1) * len(run.listed) // (2 * count)
        folder = shutil.copytree(run.before, tmp_path / f"{i}")
        wrong = met(cell, name, run, at, folder)
        found += [f"second while the first is at {at} ({run.listed[at]}): {w}" for w in wrong]
    COUNTED["lost"] += len(found)
    assert not found, "\n".join(found)


def met(cell: Cell, name: str, run: Undisturbed, at: int, folder: Path) -> list[str]:
    COUNTED["injected"] += 1
    command = JOBS[name].command
    first = cell.start(fault_jobs.disturbed, command, Fault("stopped", at), folder=folder)
    stopped(first)
    second = cell.start(fault_jobs.act, command, folder=folder)
    other = cell.wait(second, 5.0)  # one that waits for the first comes back later
    os.kill(first, signal.SIGCONT)
    outcomes = [cell.wait(first), other or cell.wait(second)]
    wrong = []
    for outcome in outcomes:
        assert outcome is not None
        wrong += filter(None, [refusal(outcome)])
    if all(outcome is not None and outcome.code == 2 for outcome in outcomes):
        wrong.append("both were refused")
    return wrong + left_whole(cell, name, run, folder) + rerun(cell, name, run, folder)


def stopped(process: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "TtZ":
            return
        time.sleep(0.01)
    raise AssertionError("the first never came to that operation")


RESUMED = (*fault_jobs.FULL, "--resume")
KILLS = 20 if NIGHTLY else 2
SEED = int(os.environ.get("FUZZ_SEED") or time.time_ns()) if NIGHTLY else 0


def test_a_training_that_was_killed_leaves_what_any_other_does(cell, tmp_path, record_property):
    """Killed at random points, whatever it does there, and resumed: all files are equal byte by
    byte, but for times and memory in two of them.

    Left out: the curves of TensorBoard, whose names and records hold the time.
    """
    (tmp_path / "whole").mkdir()
    whole = cell(fault_jobs.act, fault_jobs.FULL, folder=tmp_path / "whole")
    assert whole.code == 0, whole.err
    expected = fault_jobs.tree(tmp_path / "whole")
    record_property("told", f"killed trainings: FUZZ_SEED={SEED}")
    points, found = random.Random(SEED), []
    for number in range(KILLS):
        COUNTED["injected"] += 1
        seconds, folder = points.uniform(0.01, 1) * whole.seconds, tmp_path / f"{number}"
        folder.mkdir()
        first = cell(fault_jobs.killed, fault_jobs.FULL, seconds, folder=folder)
        goes_on = checkpoint.found(folder / "run" / trainer.CHECKPOINTS)
        command = RESUMED if goes_on else fault_jobs.FULL
        outcome = first if first.code == 0 else cell(fault_jobs.act, command, folder=folder)
        wrong = [last(outcome)] if outcome.code else []
        if first.code not in (0, -signal.SIGPROF):
            wrong.append(f"was to be killed: {first.code} {last(first)}")
        tree = fault_jobs.tree(folder)
        wrong += [k for k in expected.keys() | tree if expected.get(k) != tree.get(k)]
        found += [f"after {seconds:.2f} s: {w}" for w in wrong + fault_jobs.partials(folder)]
    COUNTED["lost"] += len(found)
    assert not found, "\n".join(found)


def test_enough_were_injected(cell, record_property):
    """Of all tests before this one, where they ran."""
    told = f"faults injected: {COUNTED['injected']}, lost: {COUNTED['lost']}"
    record_property("told", f"{told}; {cell.seconds:.0f} s of CPU")
    print(told)
    if COUNTED["injected"] < LEAST:
        pytest.skip("not all of the tests ran")
    assert COUNTED["lost"] == 0, told
