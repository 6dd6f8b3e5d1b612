"""The worker process and its protocol, on verbs that need no model; progress as it is heard."""

import select
import sys
from contextlib import suppress
from functools import partial

import pytest
from support.fake_worker import COMMAND as FAKE

from gen_accel.pipelines.generation.progress import Progress, Update, heard_by, ticker, waiting
from gen_accel.ui.worker import COLUMNS, Questions, Refused, WorkerDied, WorkerProcess

REAL = (sys.executable, "-m", "gen_accel.ui.worker")


def test_progress_is_heard_in_the_place_of_stderr(capsys):
    heard = []
    with heard_by(heard.append), waiting("loading"), Progress() as bar:
        tick = ticker(bar, "a.mp4")
        for done in (1, 2, 1):  # a second part begins
            tick(done, 2)
        assert [*bar.track([7, 8, 9], description="clips")] == [7, 8, 9]
    assert heard[0] == Update(-1, "loading")
    steps = [(one.done, one.total, one.unit) for one in heard if one.words == "a.mp4"]
    assert steps == [(0, None, "steps"), (1, 2, "steps"), (2, 2, "steps"), (1, 2, "steps")]
    assert [one.done for one in heard if one.words == "clips"] == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """One that imports torch only where a verb needs it."""
    found = WorkerProcess(tmp_path_factory.mktemp("worker") / "worker.log", REAL)
    yield found
    found.close()


def test_a_verb_says_what_it_prints_and_how_it_ended(worker):
    events = []
    ended = worker.run(["list"], events.append)
    assert (ended.code, ended.error) == (0, None)
    lines = ended.said.splitlines()
    assert len(lines) >= 2
    assert COLUMNS - 15 < len(lines[2]) <= COLUMNS  # wrapped at the width of a box of the page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "demo", "--prompt", "a cat"], "does not know 'cat'"),
        (["generate", "--model", "/no/such", "--prompt", "a"], "/no/such"),
        (["generate", "--nope"], "No such option: --nope"),
        (["nope"], "No such command 'nope'"),
        (["metrics", "none.mp4"], "no video at none.mp4"),
    ],
)
def test_a_refusal_is_one_sentence(worker, arguments, said):
    heard = []
    ended = worker.run(arguments, heard.append)
    assert ended.code == 2
    assert said in ended.error
    assert "\n" not in ended.error
    assert "Traceback" not in str(heard)


@pytest.mark.parametrize(
    ("before", "after", "what", "said"),
    [
        ("oom_kill 3", "oom_kill 4", "die", "was killed, most likely as memory ran out"),
        (
            "oom_kill 3",
            "oom_kill 3",
            "die",
            "from outside, by SIGKILL, and the system",
        ),
        ("oom_kill 3", "oom_kill 3", "end", "ended from outside, by SIGTERM"),
        ("", "", "die", "was killed, perhaps as memory ran out"),
    ],
)
def test_what_is_killed_is_said_as_far_as_it_is_known(
    tmp_path, monkeypatch, before, after, what, said
):
    monkeypatch.setattr("gen_accel.memory.COUNTS", [tmp_path / "memory.events"])
    (tmp_path / "memory.events").write_text(before)
    worker = WorkerProcess(tmp_path / "worker.log", FAKE)
    order = ["generate", "--prompt", what, "--out", str(tmp_path / "a.mp4")]
    heard = []

    def listen(told):
        (tmp_path / "memory.events").write_text(after)
        heard.append(told)

    with pytest.raises(WorkerDied, match=said):
        worker.run(order, listen)
    assert heard
    worker.close()


def test_after_one_that_is_killed_the_next_finds_a_fresh_process(tmp_path):
    worker = WorkerProcess(tmp_path / "worker.log", FAKE)
    out = str(tmp_path / "a.mp4")
    with pytest.raises(WorkerDied, match=r"by SIGKILL|memory ran out"):
        worker.run(["generate", "--prompt", "die", "--out", out], print)
    assert worker.run(["generate", "--prompt", "steps 1", "--out", out], print).code == 0
    worker.close()
    with pytest.raises(WorkerDied, match="the server ends"):
        worker.run(["list"], print)


def test_what_it_started_is_killed_with_it(tmp_path):
    """Its standard output ends when no process has it any more."""
    worker = WorkerProcess(tmp_path / "worker.log", ["sh", "-c", "sleep 100 & echo; wait"])
    worker.start()
    output = worker._process.stdout
    output.readline()
    worker.kill()
    assert select.select([output], [], [], 30)[0]
    assert output.read() == ""
    worker.close()


def test_a_process_that_cannot_be_started_is_said(tmp_path):
    worker = WorkerProcess(tmp_path / "worker.log", ["/no/such/program"])
    with pytest.raises(WorkerDied, match="cannot be started"):
        worker.run(["list"], print)


def test_questions_are_answered_and_remembered(tmp_path):
    questions = Questions(tmp_path / "questions.log", FAKE)
    ask = partial(questions.known, "generate", {"model": "demo", "plan": True})
    [found] = ask()
    assert found["density"] == 0.2
    assert ask() == [found]
    assert [*questions.ask("list")] == ["methods"]
    questions.close()


def test_a_question_that_takes_too_long_is_ended_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("gen_accel.ui.worker.ANSWER", 0.5)
    questions = Questions(tmp_path / "questions.log", FAKE)
    with pytest.raises(Refused, match=r"^generate took longer than 0\.5 s and was ended"):
        questions.said("generate", {"prompt": ["ignore"], "out": str(tmp_path / "a.mp4")})
    questions.close()


def test_a_question_is_checked_as_a_job_is(tmp_path):
    def check(verb, options):
        raise ValueError("not here")

    questions = Questions(tmp_path / "a", FAKE, check)
    with pytest.raises(Refused, match="not here"):
        questions.ask("list")
    with pytest.raises(Refused, match="no verb"):
        Questions(tmp_path / "a", FAKE).said("lists")


@pytest.mark.slow
def test_it_is_stopped_while_it_starts_and_ends_with_the_server(tmp_path):
    """Standard input ends where the server was killed."""
    worker = WorkerProcess(tmp_path / "worker.log", REAL)
    worker.start()
    worker.stop()
    with suppress(WorkerDied):  # whichever comes first
        assert worker.run(["list"]).code == 130
    worker.retire()
    assert worker.run(["list"]).code == 0
    process = worker._process
    process.stdin.close()
    assert process.wait(60) == 0
