"""The queue, with a worker that has no torch."""

import errno
import json
import os
import re
import shutil
import threading
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.fake_worker import COMMAND

from gen_accel.ui.api import add_files
from gen_accel.ui.app import Server
from gen_accel.ui.files import Places
from gen_accel.ui.queue import (
    DONE,
    FAILED,
    INTERRUPTED,
    RECORD,
    RUNNING,
    STILL,
    STOPPED,
    WAITING,
    Queue,
    film_of,
)
from gen_accel.ui.worker import LONG, WorkerProcess

SECONDS = 60.0


@pytest.fixture
def opened(tmp_path):
    """Opens queues on one folder, and closes them."""
    queues = []

    def call(*, start=True, **options) -> Queue:
        queue = Queue(tmp_path / "out", command=COMMAND, **options)
        queues.append(queue)
        if start:
            queue.start()
        return queue

    yield call
    for queue in queues:
        queue.close()


def submit(queue, prompt, **about):
    options = {"model": "demo", "prompt": [prompt], "out": "{job}/video.mp4"}
    return queue.submit("generate", options, title=prompt, **about).id


def ended(queue, name):
    job = queue.wait(name, SECONDS)
    assert not job.is_live
    return job


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def running(queue, name):
    """Wait until a job has come to its first step."""
    until(lambda: queue.job(name).progress.total is not None)


def record(queue, name):
    return json.loads((queue.place(name) / RECORD).read_text())


def test_a_job_runs_and_leaves_its_record_and_files(opened):
    queue = opened()
    name = submit(queue, "steps 3", tab="a")
    job = ended(queue, name)
    assert (job.state, job.error, job.said, job.tab) == (DONE, "", "made", "a")
    assert [file.name for file in queue.files(job)] == ["video.mp4"]
    kept = record(queue, name)
    assert kept["state"] == DONE
    assert kept["options"]["out"] == str(queue.place(name) / "video.mp4")
    assert job.started <= job.ended


def test_a_folder_may_go_while_files_are_listed(opened, monkeypatch):
    queue = opened(start=False)
    job = queue.job(submit(queue, "steps 1"))
    folders = queue.place(job) / "a", queue.place(job) / "b"
    for folder in folders:
        folder.mkdir()
        (folder / "one.txt").write_text("1")
    is_file = Path.is_file

    def gone(path):  # the folder that comes later goes at the look into the first
        for folder in folders if path.name == "one.txt" else ():
            if folder != path.parent:
                shutil.rmtree(folder, ignore_errors=True)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", gone)
    assert [file.name for file in queue.files(job)] == ["one.txt"]


def test_jobs_run_one_at_a_time_in_their_order(opened):
    queue = opened()
    names = [submit(queue, "wait"), submit(queue, "steps 1"), submit(queue, "steps 2")]
    running(queue, names[0])
    assert [queue.job(name).state for name in names] == [RUNNING, WAITING, WAITING]
    # How long those that wait will take is not known yet.
    assert [*queue.outlook().values()] == [(0, 9.0), (1, None), (2, None)]
    queue.cancel(names[0])
    assert [ended(queue, name).state for name in names] == [STOPPED, DONE, DONE]
    assert queue.job(names[1]).ended <= queue.job(names[2]).started


def test_seconds_of_a_waiting_job_are_those_of_its_size(opened):
    """Stopped jobs, other verbs and other sizes do not count."""
    queue = opened(start=False)
    names = {
        (frames, seconds, state): queue.submit("generate", {"model": "demo", "frames": frames}).id
        for frames, seconds, state in (
            *((33, 10.0, DONE), (33, 30.0, DONE), (33, 1000.0, STOPPED), (33, 1000.0, FAILED)),
            *((65, 70.0, DONE), (65, 71.0, DONE)),
        )
    }
    with queue._changed:
        for (_, seconds, state), name in names.items():
            queue._change(name, state=state, started=100.0, ended=100.0 + seconds)
    for frames, seconds in ((33, 20.0), (65, 90.5), (97, None)):  # one behind the other
        waits = queue.submit("generate", {"model": "demo", "frames": frames}).id
        assert queue.outlook()[waits].left == seconds


def test_after_a_stop_the_next_has_a_fresh_worker(opened):
    """An interrupt may have left something half imported there."""
    queue = opened()
    done, stopped, other = (submit(queue, what) for what in ("steps 1", "wait", "steps 1"))
    assert ended(queue, done).state == DONE
    running(queue, stopped)
    before = queue.worker.pid
    queue.cancel(stopped)
    assert [ended(queue, name).state for name in (stopped, other)] == [STOPPED, DONE]
    after = queue.worker.pid
    assert after != before
    assert ended(queue, submit(queue, "steps 1")).state == DONE
    assert queue.worker.pid == after  # one that ends well keeps it


def test_one_that_is_stopped_leaves_no_file(opened):
    queue = opened()
    name = submit(queue, "wait")
    running(queue, name)
    assert (queue.place(name) / "video.mp4").exists()
    queue.cancel(name)
    job = ended(queue, name)
    assert (job.state, job.error) == (STOPPED, "")
    assert [one.name for one in queue.place(name).iterdir()] == [RECORD]


def test_one_that_does_not_stop_is_killed(opened):
    queue = opened(grace=0.2)
    name, other = submit(queue, "ignore"), submit(queue, "steps 1")
    until(lambda: (queue.place(name) / "video.mp4").exists())
    queue.cancel(name)
    assert ended(queue, name).state == STOPPED
    assert ended(queue, other).state == DONE


def held_back(queue, monkeypatch):
    """Keep orders from the worker until the event is set."""
    go_on, run = threading.Event(), queue.worker.run

    def later(*order, **about):
        assert go_on.wait(SECONDS)
        return run(*order, **about)

    monkeypatch.setattr(queue.worker, "run", later)
    return go_on


def test_a_stream_that_is_stopped_keeps_its_chunks_and_goes_on(opened):
    queue = opened()
    name = submit(queue, "stream 2", kind="generate")
    running(queue, name)
    queue.cancel(name)
    job = ended(queue, name)
    assert job.state == STOPPED
    kept = {file.name for file in queue.files(job)}
    assert kept == {"stream.json", "film.mp4", "chunk-00000.safetensors"}
    film = film_of(queue.place(job))
    assert film is not None
    assert film.is_file()

    app = FastAPI()
    add_files(app, queue)
    client, address = TestClient(app), f"/jobs/{name}/{film.parent.name}"
    assert client.get(f"{address}/{film.name}").content == b"{}"

    new = queue.again(name)
    assert new.options["resume"] is True
    chunks = queue.place(new) / film.parent.name
    assert (chunks / "chunk-00000.safetensors").is_file()
    assert ended(queue, new.id).state == DONE
    film.unlink()  # as at the end of one that is whole
    answers = [client.get(f"{address}/{one}").status_code for one in (film.name, "other.mp4")]
    assert answers == [204, 404]
    other = submit(queue, "steps 1")
    assert ended(queue, other).state == DONE
    assert "resume" not in queue.again(other).options


def test_one_that_is_stopped_before_the_worker_has_it_does_not_run(opened, monkeypatch):
    queue = opened(start=False)
    go_on = held_back(queue, monkeypatch)
    name = submit(queue, "steps 1")
    queue.start()
    until(lambda: queue.job(name).state == RUNNING)
    queue.cancel(name)
    go_on.set()
    assert ended(queue, name).state == STOPPED


def test_a_training_is_stopped_once_and_has_the_time_to_save(opened, monkeypatch):
    queue, told = opened(start=False), []

    class Timer(threading.Timer):
        def __init__(self, seconds, *about):
            told.append(seconds)
            super().__init__(0.0, *about)

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(queue.worker, "stop", lambda: told.append("stop"))
    monkeypatch.setattr(queue.worker, "kill", lambda: told.append("kill"))
    go_on = held_back(queue, monkeypatch)
    name = queue.submit("train", {"resume": True}).id
    queue.start()
    until(lambda: queue.job(name).state == RUNNING)
    queue.cancel(name)
    until(lambda: "kill" in told)
    queue.cancel(name)
    assert told == ["stop", LONG["train"], "kill"]
    go_on.set()
    assert ended(queue, name).state == STOPPED


def test_a_server_that_ends_begins_no_job(opened, monkeypatch):
    queue = opened(start=False)
    close, go_on = queue.worker.close, held_back(queue, monkeypatch)

    def closed(seconds):
        close(0.0)
        go_on.set()
        assert seconds == LONG["train"]

    monkeypatch.setattr(queue.worker, "close", closed)
    name = queue.submit("train", {"resume": True}).id
    queue.start()
    until(lambda: queue.job(name).state == RUNNING)
    queue.close()
    monkeypatch.undo()
    assert (queue.job(name).state, record(queue, name)["state"]) == (WAITING, WAITING)
    with pytest.raises(OSError, match="the server ends"):
        queue.worker.start()


def test_one_that_waits_is_removed_with_its_folder(opened):
    queue = opened()
    first, second = submit(queue, "wait"), submit(queue, "steps 1")
    running(queue, first)
    queue.cancel(second)
    assert [job.id for job in queue.jobs()] == [first]
    assert not queue.place(second).exists()


def test_an_error_is_the_sentence_and_the_next_goes_on(opened):
    queue = opened()
    bad, good = submit(queue, "fail width must be even, got 3"), submit(queue, "steps 1")
    job = ended(queue, bad)
    assert (job.state, job.error) == (FAILED, "width must be even, got 3")
    assert queue.files(job) == []
    assert ended(queue, good).state == DONE


def test_a_worker_that_is_killed_is_said_and_the_next_goes_on(opened):
    queue = opened()
    bad, good = submit(queue, "die"), submit(queue, "steps 1")
    job = ended(queue, bad)
    assert job.state == FAILED
    assert "from outside, by SIGKILL" in job.error
    assert ended(queue, good).state == DONE


def test_after_a_restart_jobs_are_there_and_waiting_ones_run(opened):
    queue = opened()
    names = [submit(queue, "steps 1"), submit(queue, "wait"), submit(queue, "steps 2")]
    joined = {"model": "demo", "prompt": ["steps 1"], "extend": "riflex", "dense_layers": "0,5"}
    names.append(queue.submit("generate", {**joined, "out": "{job}/video.mp4"}).id)
    running(queue, names[1])
    queue.close()
    again = opened()
    assert [job.id for job in again.jobs()] == names
    assert again.job(names[0]).state == DONE
    broken = again.job(names[1])
    assert (broken.state, "queue it again" in broken.error) == (INTERRUPTED, True)
    assert ended(again, names[2]).state == DONE


def test_a_server_that_was_killed_leaves_an_interrupted_job(opened):
    queue = opened(start=False)
    name = submit(queue, "steps 1")
    place = queue.place(name)
    kept = record(queue, name) | {"state": RUNNING}
    queue.close()
    (place / RECORD).write_text(json.dumps(kept))
    (place / "half.mp4").write_bytes(b"")
    again = opened()
    assert again.job(name).state == INTERRUPTED
    assert [one.name for one in place.iterdir()] == [RECORD]
    new = again.again(name).id
    job = ended(again, new)
    assert job.state == DONE
    assert job.options["out"] == str(again.place(new) / "video.mp4")


def test_seconds_of_a_job_that_was_killed_with_its_server(opened, tmp_path, monkeypatch):
    """The time of its record says how long it ran."""
    monkeypatch.setattr("gen_accel.ui.queue.BEAT", 0.02)
    queue = opened()
    name = submit(queue, "wait")
    running(queue, name)
    ran = queue.job(name).seconds + 0.2
    until(lambda: queue.job(name).seconds > ran + 0.1)
    shutil.copytree(queue.folder, tmp_path / "copy")  # with the times of its files
    with closing(Queue(tmp_path / "copy", command=COMMAND)) as again:
        job = again.job(name)
    assert (job.state, job.seconds >= ran) == (INTERRUPTED, True)


def deep(levels):
    return "1" if levels == 0 else '{"a": ' + deep(levels - 1) + "}"


ODD = {  # what a record holds beside the rest, and the rule that it breaks
    '"started": 1e308, "ended": -1e308': "less than 253402300800",
    '"made": NaN': "made: ",
    '"made": Infinity': "made: ",
    '"made": -1': "greater than or equal to 0",
    '"ended": "soon"': "ended: Input should be a valid number",
    f'"options": {deep(150)}': "20 levels deep",
    f'"options": {deep(500)}': "recursion limit",
    '"about": {"a": [1e999]}': "must be finite",
    '"options": {"seed": 1' + "0" * 400 + "}": "below 2\\*\\*63",
    '"options": {"frames": "many"}': "frames must be",
    '"options": {"prompt": 5}': "prompt must be",
    '"id": "x\\" onmouseover=\\"y"': "id: String should match pattern",
    '"id": "20261130-010203-abcdee"': "id must be the name of its folder",
    '"state": "odd"': "state: ",
    '"verb": "draw"': "no verb 'draw'",
    '"said": "' + "x" * (9 << 20) + '"': "8 MiB at most",
    '"progress": [0, "", -1e308, 1e-300, "", null]': "",
}


@pytest.mark.parametrize(("held", "rule"), ODD.items(), ids=[*map(str, range(len(ODD)))])
def test_an_odd_record_is_left_out_and_said(tmp_path, held, rule):
    name = "20261130-010203-abcdef"
    folder = tmp_path / "out" / name
    folder.mkdir(parents=True)
    usual = {"id": name, "verb": "generate", "options": {"model": "demo", "prompt": ["a"]}}
    text = json.dumps({**usual, "state": "done", "made": 1.7e9})[:-1]
    (folder / RECORD).write_text(f"{text}, {held}}}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        server = Server(tmp_path / "out", page=False, command=COMMAND)
    try:
        client = TestClient(server.app, base_url="http://localhost:7860")
        listed = client.get("/v1/videos")
    finally:
        server.queue.close()
    assert listed.status_code == 200
    lines = [str(one.message) for one in told if RECORD in str(one.message)]
    assert [len(lines), len(listed.json()["data"])] == ([1, 0] if rule else [0, 1])
    for line in lines:
        assert line.startswith(f"{folder / RECORD} is left out: ")
        assert re.search(rule, line)
        assert len(line) < 500


def test_a_record_that_cannot_be_read_is_left_out(opened, tmp_path):
    for name, text in (("half", "{"), ("other", '{"id": 3}'), ("list", "[]")):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / RECORD).write_text(text)
    (tmp_path / "out" / "pipe").mkdir()
    os.mkfifo(tmp_path / "out" / "pipe" / RECORD)
    with pytest.warns(UserWarning, match="is left out: a record must be a file"):
        assert opened(start=False).jobs() == []


def test_a_full_disk_refuses_a_job_and_leaves_nothing(opened, monkeypatch):
    queue = opened(start=False)

    def full(job):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(queue, "write", full)
    with pytest.raises(OSError, match="No space left"):
        submit(queue, "steps 1")
    assert queue.jobs() == []
    assert [one.name for one in queue.folder.iterdir() if one.is_dir()] == []


def test_a_disk_that_fills_up_later_is_said_and_jobs_go_on(opened, monkeypatch):
    queue = opened(start=False)
    names = [submit(queue, "steps 1"), submit(queue, "steps 2")]
    write = queue.write

    def full(job):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(queue, "write", full)
    queue.start()
    assert [ended(queue, name).state for name in names] == [DONE, DONE]
    assert "the queue is not saved" in queue.trouble
    monkeypatch.setattr(queue, "write", write)
    assert ended(queue, submit(queue, "steps 1")).state == DONE
    assert queue.trouble == ""


def test_a_folder_that_vanished_is_said(opened, tmp_path):
    """Its place may be taken by another, so each job is checked before it runs too."""
    model = tmp_path / "model"
    model.mkdir()
    places = Places(tmp_path / "out", [model])
    queue = opened(start=False, check=places.check)
    name = queue.submit("generate", {"model": str(model), "out": "{job}/video.mp4"}).id
    model.rmdir()
    model.symlink_to(tmp_path)
    queue.start()
    assert "is not a file of this page" in ended(queue, name).error


def test_a_worker_of_a_killed_server_is_waited_for(opened, tmp_path):
    """Its process holds the lock that it got from that server."""
    queue = opened(start=False)
    name = submit(queue, "steps 1")
    place = queue.place(name)
    kept = record(queue, name) | {"state": RUNNING}
    earlier = WorkerProcess(tmp_path / "earlier.log", COMMAND)
    earlier.lock, queue.worker.lock = queue.worker.lock, None  # as if nobody had closed it
    earlier.start()
    earlier.lock.close()
    queue.close()
    (place / RECORD).write_text(json.dumps(kept))
    (place / "half.mp4").write_bytes(b"")
    again = opened()
    new = submit(again, "steps 1")
    assert again.trouble == STILL
    assert (place / "half.mp4").exists()
    assert again.job(new).state == WAITING
    earlier.close()
    assert ended(again, new).state == DONE
    assert again.trouble == ""
    assert not (place / "half.mp4").exists()


def test_what_requests_of_a_killed_server_left_is_swept(opened, tmp_path):
    for name in ("tmpab12", ".asked-cd34", "uploads"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "tmp_of_mine").symlink_to(tmp_path / "elsewhere")
    queue = opened(start=False)
    left = sorted(one.name for one in queue.folder.iterdir() if one.is_dir())
    assert left == ["tmp_of_mine", "uploads"]


def test_two_servers_do_not_share_a_folder(opened):
    opened(start=False)
    with pytest.raises(BlockingIOError, match="is in use by process"):
        opened(start=False)


def test_given_files_are_copied_and_go_along_when_it_is_done_again(opened, tmp_path):
    queue = opened(start=False)
    picture = tmp_path / "cat.PNG"
    picture.write_bytes(b"a cat")
    options = {"model": "demo", "out": "{job}/video.mp4"}
    given = {"image": picture, "image_prompt": [picture, picture]}
    job = queue.submit("generate", options, given=given)
    picture.unlink()
    new = queue.again(job.id)
    for one in (job, new):
        place = queue.place(one) / "given"
        assert one.options["image"] == str(place / "image.png")
        assert (place / "image.png").read_bytes() == b"a cat"
        assert len(one.options["image_prompt"]) == 2
        assert all(str(place) in file for file in one.options["image_prompt"])


def test_only_what_is_written_goes_into_the_folder(opened):
    queue = opened(start=False)
    job = queue.job(submit(queue, "a {job}"))
    assert job.options["prompt"] == ["a {job}"]
    assert job.options["out"] == str(queue.place(job) / "video.mp4")


@pytest.mark.parametrize("saved", [True, False])
def test_a_training_goes_on_when_it_is_done_again(opened, tmp_path, saved):
    out = tmp_path / "out" / "trainings" / "a"
    if saved:
        (out / "checkpoints" / "step-000002").mkdir(parents=True)
    queue = opened(start=False)
    job = queue.submit("train", {"resume": not saved}, about={"out": str(out)})
    assert queue.again(job.id).options["resume"] == saved


def test_one_that_is_removed_is_waited_for_no_more(opened):
    queue = opened(start=False)
    name = submit(queue, "steps 1")
    threading.Timer(0.05, queue.remove, [name]).start()
    with pytest.raises(KeyError):
        queue.wait(name, SECONDS)


def test_unknown_options_are_refused_with_the_nearest(opened):
    queue = opened(start=False)
    with pytest.raises(ValueError, match="did you mean 'frames'"):
        queue.submit("generate", {"frame": 3})
    with pytest.raises(ValueError, match=r"no verb 'generat'.*did you mean 'generate'"):
        queue.submit("generat", {})
    assert queue.jobs() == []
