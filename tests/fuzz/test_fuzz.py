"""Whatever goes in, the outcome is success or one line.

No traceback, no partial file, no descriptor left open, in bounded time and memory. What is found
is printed as a line for `corpus.txt`, whose lines are tried first.
"""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support import fault_jobs, hostile, hostile_values
from support.cell import Cell, Limits
from support.hostile import LIMITS, Artefact, Call, Case, Command, Config, read_corpus
from support.products import NIGHTLY

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).with_name("corpus.txt")
# How many cases are drawn by day, and by night. Of the corpus, every third line by day.
DRAWN = {"commands": (20, 2000), "configs": (15, 1000), "artefacts": (20, 1000)}
DRAWN |= {"calls": (30, 1000)}
LEAST = (200, 5000)
SEED = int(os.environ.get("FUZZ_SEED") or int.from_bytes(os.urandom(4), "big"))

TRIED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def cell(home):
    made = Cell(home)
    made.prepare(fault_jobs.prepare, home)
    made.prepare(hostile.prepare, home)
    hostile.made(made, home)
    yield made
    made.close()


@pytest.fixture
def tried(cell, home, tmp_path):
    """A case, and what is wrong with its end."""

    common = _listed(home)

    def run(case: Case, *planted: str, limits: Limits = LIMITS) -> str | None:
        TRIED["cases"] += 1
        folder = tmp_path / "here"
        folder.mkdir()
        if getattr(case, "own", False):
            hostile.furnish(folder, home)
        before = hostile.held(folder)
        call = hostile.run_planted if planted else hostile.run_apart
        outcome = cell(call, case, *planted, folder=folder, limits=limits)
        found = hostile.verdict(case, outcome, folder)
        found = hostile.harm(case, before, outcome, folder) or found
        if _listed(home) != common:
            found = "wrote to what all cases read"
        shutil.rmtree(folder)
        return found

    return run


def _listed(folder: Path) -> set[tuple[str, int, int, int]]:
    """Its files as the file system tells them."""
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {(str(p), one.st_size, one.st_mtime_ns, one.st_ino) for p, one in found}


def told(found: dict[str, list[Case]]) -> str:
    """Of each verdict the shortest case, as a line of the corpus."""
    lines = []
    for verdict, cases in found.items():
        lines += [min(map(repr, cases), key=len), f"# {len(cases)} times: {verdict}"]
    return "\n".join(lines)


SHOWN = Command(("show", "radial", "--frames", "2", "--height", "3", "--width", "4"), own=True)
READ = "gen_accel.config:Config.read"
VERIFIED = "gen_accel.lora.caching.latents:LatentCache.verify"
PLANTED = {
    "of a command": (SHOWN, "fault", READ, "code 1"),
    "of a config": (Config({}), "fault", READ, "code 1"),
    "of a file": (Artefact("cache"), "fault", VERIFIED, "code 1"),
    "of a call": (Call("Schedule", {}), "fault", "gen_accel:Schedule.why_layer", "code 1"),
    "a hang": (SHOWN, "hang", READ, "signal 9 after 0 s"),
    "a change": (SHOWN, "change", READ, ".mp4 is changed"),
    "a loss": (SHOWN, "loss", READ, "a.mp4 is gone"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(tried, name):
    """A fault, a hang, a file that changed or went."""
    case, kind, place, words = PLANTED[name]
    limits = replace(LIMITS, wall=1.0) if kind == "hang" else LIMITS
    assert words in (tried(case, kind, place, limits=limits) or "")


def test_the_corpus(tried):
    found: dict[str, list[Case]] = {}
    for case in read_corpus(CORPUS)[:: 1 if NIGHTLY else 3]:
        if verdict := tried(case):
            found.setdefault(verdict, []).append(case)
    assert not found, told(found)


@pytest.mark.parametrize("kind", DRAWN)
def test_what_is_drawn(tried, home, kind, record_property):
    """Always the same by day; by night others each time, again by FUZZ_SEED."""
    given_home = (home,) if kind == "artefacts" else ()
    strategy: st.SearchStrategy[Case] = getattr(hostile_values, kind)(*given_home)
    found: dict[str, list[Case]] = {}
    options = settings(
        max_examples=DRAWN[kind][NIGHTLY],
        derandomize=not NIGHTLY,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

    @given(case=strategy)
    def draw(case: Case) -> None:
        if verdict := tried(case):
            found.setdefault(verdict, []).append(case)

    run = options(draw)
    if NIGHTLY:
        record_property("told", f"fuzzing {kind}: FUZZ_SEED={SEED}")
        run = seed(SEED)(run)
    run()
    assert not found, told(found)


# What is refused early and what runs, of each kind of case.
REPEATED = (
    Command(("generate", "--model", "{home}/model", "--prompt", "a", "--steps", "0")),
    Command(("show", "radial", "--frames", "2", "--height", "3", "--width", "4")),
    Command(("estimate", "--model", "nope", "--frames", "5", "--height", "32", "--width", "32")),
    Config({"rank": -1}),
    Call("Schedule", {"dense_start": 2.0}),
    Call("attention", {"kernel": "nope"}),
    Call("radial", {"block": 4}),
    Call("attach", {"method": None}),
)
MOST_GROWN = 8 << 20  # bytes; a leak of one of their tensors, or of one pipeline, is more


def test_refusals_leave_nothing_in_memory(cell, tmp_path):
    outcome = cell(hostile.grown, REPEATED, 20, folder=tmp_path, limits=Limits(cpu=120))
    assert outcome.code == 0, outcome.err
    size, descriptors = outcome.result
    assert size < MOST_GROWN
    assert descriptors <= 0


def test_enough_were_tried(cell, record_property):
    """Of all tests before this one, where they ran."""
    told = f"hostile cases: {TRIED['cases']}, {cell.seconds:.0f} s of CPU"
    record_property("told", told)
    print(told)
    if TRIED["cases"] < LEAST[NIGHTLY]:
        pytest.skip("not all of the tests ran")
