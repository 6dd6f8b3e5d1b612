"""The HTTP interface and the rules of the server, with a worker that has no torch."""

import asyncio
import base64
import getpass
import hashlib
import io
import itertools
import json
import os
import socket
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial

import anyio
import httpx
import numpy as np
import pytest
from PIL import Image
from support.fake_worker import COMMAND
from support.paths import ROOT

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient

from gen_accel import demo
from gen_accel.measure.video_io import write_video
from gen_accel.ui import api, guard, request
from gen_accel.ui import app as ui_app
from gen_accel.ui.app import Server
from gen_accel.ui.files import clear_uploads
from gen_accel.ui.guard import Guard
from gen_accel.ui.queue import DONE, RECORD, WAITING, QueuedJob

SECONDS = 60.0
JSON = {"Content-Type": "application/json"}
NAN, SECONDS_RULE = float("nan"), "a number above 0 and at most 3600"
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    out = tmp_path_factory.mktemp("http")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "")
        with Server(out, page=False, command=COMMAND) as found:
            yield found


@pytest.fixture
def client(server):
    return TestClient(server.app, base_url="http://127.0.0.1:7860")


def made(client, server, prompt="steps 1", **fields):
    answer = client.post("/v1/videos", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    job = answer.json()["id"].removeprefix("video_")
    server.queue.wait(job, SECONDS)
    return answer.json()["id"]


def refused(answer, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    return error


def test_a_video_from_its_request_to_its_bytes(client, server):
    answer = client.post(
        "/v1/videos",
        json={
            "model": "demo",
            "prompt": "steps 2",
            "size": "96x64",
            "seconds": "2",
            "gen_accel": {"seed": 7, "dense-start": 0.25},
        },
    )
    video = answer.json()
    assert (video["object"], video["status"]) in (("video", "queued"), ("video", "in_progress"))
    assert (video["size"], video["seconds"], video["prompt"]) == ("96x64", "2", "steps 2")
    server.queue.wait(video["id"].removeprefix("video_"), SECONDS)
    video = client.get(f"/v1/videos/{video['id']}").json()
    assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
    assert video["completed_at"] >= video["created_at"]
    options = video["gen_accel"]["options"]
    assert (options["seconds"], options["width"], options["height"]) == (2, 96, 64)
    assert (options["seed"], options["dense_start"]) == (7, 0.25)
    content = client.get(f"/v1/videos/{video['id']}/content")
    assert (content.content, content.headers["content-type"]) == (b"video", "video/mp4")
    part = client.get(f"/v1/videos/{video['id']}/content", headers={"Range": "bytes=0-1"})
    assert (part.status_code, part.content) == (206, b"vi")


def test_a_form_with_a_picture(client, server):
    answer = client.post(
        "/v1/videos",
        data={"prompt": "steps 1", "frames": "9", "gen_accel": '{"steps": 4}'},
        files={"input_reference": ("cat.png", PICTURE)},
    )
    options = answer.json()["gen_accel"]["options"]
    assert (options["frames"], options["steps"]) == (9, 4)
    assert options["image"].endswith("given/image.png")
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    name = made(client, server, input_reference={"image_url": url})
    assert client.get(f"/v1/videos/{name}").json()["status"] == "completed"


def test_fields_by_the_names_of_other_servers(client):
    """Names of FastVideo's and vLLM-Omni's clients are taken, in JSON and in a form."""
    told = {"num_frames": 17, "num_inference_steps": 4, "fps": 8, "seed": 5}
    told |= {"guidance_scale": 3.5, "negative_prompt": "blur", "max_sequence_length": 64}
    given = {"prompt": "steps 1", **told, "n": 1, "user": "me", "response_format": "url"}
    block = {"video_params": {"width": 64, "height": 96}}
    form = {**given, "video_params": '{"width": 64, "height": 96}', "gen_accel[dense-start]": 0.5}
    form |= {"gen_accel[set][]": ["tile_side=4", "sink=no"]}
    for answer in (
        client.post("/v1/videos", json=given | block),
        client.post("/v1/videos", data=form, files={"image_reference": ("cat.png", PICTURE)}),
    ):
        video = answer.json()
        options = video["gen_accel"]["options"]
        assert (options["frames"], options["steps"], options["max_tokens"]) == (17, 4, 64)
        assert (options["width"], options["height"], options["seed"]) == (64, 96, 5)
        assert (options["fps"], options["guidance_scale"]) == (8, 3.5)
        assert (video["size"], video["seconds"]) == ("64x96", "2")
        assert (options["negative_prompt"], video["gen_accel"]["user"]) == ("blur", "me")
    assert (options["dense_start"], options["set"]) == (0.5, ["tile_side=4", "sink=no"])
    assert options["image"].endswith("given/image.png")


def test_a_size_that_is_not_given_is_the_models_own(client):
    video = client.post("/v1/videos", json={"prompt": "steps 1", "frames": None}).json()
    assert (video["size"], video["seconds"]) == ("832x480", "10")


def test_pictures_of_a_video(client, server, tmp_path):
    film, levels = tmp_path / "film.mp4", np.arange(20, dtype=np.uint8)[:, None, None, None]
    write_video(np.full((20, 32, 64, 3), 12, np.uint8) * levels, film, fps=8)
    name = made(client, server, f"film {film}")
    looks = {"thumbnail": ("webp", (64, 32)), "spritesheet": ("jpeg", (256, 128))}
    for variant, (kind, size) in looks.items():
        answer = client.get(f"/v1/videos/{name}/content", params={"variant": variant})
        assert answer.headers["content-type"] == f"image/{kind}"
        picture = Image.open(io.BytesIO(answer.content))
        assert (picture.format.lower(), picture.size) == (kind, size)
    sheet = np.asarray(picture)
    assert sheet[8, 8].mean() < 20 < 200 < sheet[120, 250].mean()
    error = refused(client.get(f"/v1/videos/{name}/content?variant=sound"))
    assert error["message"] == "variant must be one of video, thumbnail, spritesheet, got 'sound'"
    for path in (f"{name}/remix", "edits", "extensions", "characters"):
        error = refused(client.post(f"/v1/videos/{path}", json={"prompt": "a"}), 404)
        assert f"no '/v1/videos/{path}'" in error["message"]


def test_an_answer_with_the_video_itself(client, server, monkeypatch):
    answer = client.post("/v1/videos/sync", json={"prompt": "steps 1"})
    assert (answer.content, answer.headers["content-type"]) == (b"video", "video/mp4")
    assert float(answer.headers["x-inference-time-s"]) >= 0
    made = client.get(f"/v1/videos/{answer.headers['x-request-id']}").json()
    assert made["status"] == "completed"
    assert client.get(made["url"]).content == b"video"
    failed = client.post("/v1/videos/sync", json={"prompt": "fail no such size"})
    error = refused(failed, 422)
    assert (error["code"], error["message"][-23:]) == ("failed", "is failed: no such size")
    monkeypatch.setattr(api, "WAITS", 0.1)
    late = client.post("/v1/videos/sync", json={"prompt": "wait"})
    assert "after 0.1 s and goes on: GET /v1/videos/video_" in refused(late, 504)["message"]
    assert late.headers["x-should-retry"] == "false"
    assert client.get(late.headers["location"]).json()["status"] in ("queued", "in_progress")
    assert client.delete(late.headers["location"]).json()["deleted"]


def test_a_client_that_leaves_ends_the_waiting_alone(server):
    body = iter([{"type": "http.request", "body": b'{"prompt": "wait"}'}])

    async def receive():
        return next(body, {"type": "http.disconnect"})

    async def send(message):
        pass

    about = {"method": "POST", "path": "/v1/videos/sync", "query_string": b"", "scheme": "http"}
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    anyio.run(server.app, {"type": "http", "headers": headers, **about}, receive, send)
    job = server.queue.jobs()[-1]
    assert job.is_live
    assert job.notes == ("whoever waited for it over HTTP has left; it goes on",)
    server.queue.cancel(job.id)


def test_videos_are_listed_in_pages(client, server):
    names = [made(client, server) for _ in range(3)]
    newest = client.get("/v1/videos", params={"limit": 2}).json()
    assert [one["id"] for one in newest["data"]] == [names[2], names[1]]
    assert (newest["first_id"], newest["last_id"]) == (names[2], names[1])
    assert newest["has_more"]
    rest = client.get("/v1/videos", params={"after": names[1]}).json()
    assert rest["data"][0]["id"] == names[0]
    oldest = client.get("/v1/videos", params={"order": "asc", "after": names[1]}).json()
    assert [one["id"] for one in oldest["data"]] == [names[2]]
    assert refused(client.get("/v1/videos", params={"order": "up"}))["param"] == "order"


def test_one_that_fails_says_the_sentence(client, server):
    video = client.get(f"/v1/videos/{made(client, server, 'fail no such size')}").json()
    assert (video["status"], video["error"]["message"]) == ("failed", "no such size")
    error = refused(client.get(f"/v1/videos/{video['id']}/content"), 404)
    assert error["message"] == f"{video['id']} is failed and has no content"


def test_delete_removes_what_is_done_and_stops_what_runs(client, server):
    done = made(client, server)
    live = client.post("/v1/videos", json={"prompt": "wait"}).json()["id"]
    waiting = client.post("/v1/videos", json={"prompt": "steps 1"}).json()["id"]
    for name in (done, waiting, live):
        answer = client.delete(f"/v1/videos/{name}").json()
        assert answer == {"id": name, "object": "video.deleted", "deleted": True}
        assert refused(client.get(f"/v1/videos/{name}"), 404)["param"] == "video_id"
        assert not server.queue.place(name.removeprefix("video_")).exists()


@pytest.mark.parametrize(
    ("given", "said", "param"),
    [
        ({}, "prompt must be the text", "prompt"),
        ({"prompt": 3}, "prompt must be the text", "prompt"),
        ({"prompt": "a", "size": "big"}, "WIDTHxHEIGHT, as in 832x480, got 'big'", "size"),
        ({"prompt": "a", "seconds": "soon"}, f"seconds must be {SECONDS_RULE}, got 's", "seconds"),
        ({"prompt": "a", "seconds": -4}, f"seconds must be {SECONDS_RULE}, got -4", "seconds"),
        ({"prompt": "a", "seconds": 1e9}, f"seconds must be {SECONDS_RULE}, got 10", "seconds"),
        ({"prompt": "a", "seconds": True}, f"seconds must be {SECONDS_RULE}, got True", "seconds"),
        ({"prompt": "a", "seconds": NAN}, f"seconds must be {SECONDS_RULE}, got nan", "seconds"),
        ({"prompt": "a", "frames": []}, "frames must be int or none, got []", "frames"),
        ({"prompt": "a", "frames": 5.7}, "frames must be int or none, got 5.7", "frames"),
        ({"prompt": "a", "frames": True}, "frames must be int or none, got True", "frames"),
        ({"prompt": "a", "frames": NAN}, "frames must be int or none, got nan", "frames"),
        ({"prompt": "a", "frames": 0}, "frames must be from 1 to 1000000, got 0", "frames"),
        (
            {"prompt": "a", "frames": 10**400},
            "frames must be from 1 to 1000000, got a num",
            "frames",
        ),
        (
            {"prompt": "a", "gen_accel": {"frames": 10**400}},
            "frames must be from 1 to",
            "gen_accel",
        ),
        (
            {"prompt": "a", "gen_accel": {"steps": 10**9}},
            "steps must be from 1 to 10000",
            "gen_accel",
        ),
        ({"prompt": "a", "size": "0x0"}, "size: height must be at least 1, got 0", "size"),
        ({"prompt": "a" * 4_000_000}, "at most 10,000 characters, got 4,000,000", "prompt"),
        ({"prompt": "\ud800"}, "prompt must be the text", "prompt"),
        ({"prompt": "a", "\ud800": 1}, "there is no field '\\ud800'", "\ud800"),
        ({"prompt": "a", "n": 2}, "n must be 1, as a request makes one video, got 2", "n"),
        ({"prompt": "a", "num_outputs_per_prompt": 4}, "n must be 1", "num_outputs_per_prompt"),
        ({"prompt": "a", "user": "u" * 9000}, "user must be text of at most 256", "user"),
        ({"prompt": "a", "response_format": "b64_json"}, "must be url: /v1", "response_format"),
        ({"prompt": "a", "num_inference_steps": 0}, "steps must be from", "num_inference_steps"),
        ({"prompt": "a", "flow_shift": 5}, "there is no field 'flow_shift'", "flow_shift"),
        ({"prompt": "a", "step": 5}, "no field 'step'; did you mean 'steps'?", "step"),
        ({"prompt": "a", "video_params": {"width": 0}}, "width must be at", "video_params"),
        ({"prompt": "a", "extra_body": '{"seed": -1}'}, "seed must be from 0", "extra_body"),
        ({"prompt": "a", "num_frames": 9, "frames": 17}, "frames is given twice, as 9", "frames"),
        ({"prompt": "a", "size": "96x64", "width": 64}, "width is given twice, as 64", "size"),
        ({"prompt": "a", "dense_at": "1," * 99_999}, "dense_at has over 131072", "dense_at"),
        ({"prompt": "a", "model": "m" * 9000}, "model must be one of demo, got 'mmm", "model"),
        ({"prompt": "a", "gen_accel": "[" * 99_999}, "gen_accel must be JSON", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"dense_at": [0] * 99_999}}, "has over 131072", "gen_accel"),
        ({"prompt": "a", "gen_accel": "{"}, "gen_accel must be JSON", "gen_accel"),
        ({"prompt": "a", "gen_accel": []}, "must hold fields by name", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"step": 3}}, "did you mean 'steps'", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"k" * 99_999: 3}}, "no field 'kkk", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"steps": "few"}}, "steps must be", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"out": "/tmp/x.mp4"}}, "no field 'out'", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"settings": False}}, "no field 'settings'", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"compare": True}}, "no field 'compare'", "gen_accel"),
        ({"prompt": "a", "gen_accel": {"image": "/etc/passwd"}}, "not a file of this page", None),
        ({"prompt": "a", "gen_accel": {"method": "os:system"}}, "code to import", "gen_accel"),
        (
            {"prompt": "a", "input_reference": "http://x/a.png"},
            "fetches nothing",
            "input_reference",
        ),
    ],
)
def test_bad_input_is_a_sentence(client, server, given, said, param):
    before = len(server.queue.jobs())
    body = json.dumps(given)
    status = 404 if param == "model" else 400
    error = refused(client.post("/v1/videos", content=body, headers=JSON), status)
    assert said in error["message"]
    assert len(error["message"]) < 600
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(server.queue.jobs()) == before


def test_models(client):
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["demo"]
    error = refused(client.post("/v1/videos", json={"model": "sora-2", "prompt": "a"}), 404)
    assert error["code"] == "model_not_found"
    assert error["message"] == "model must be one of demo, got 'sora-2'"


def test_a_body_that_is_no_json(client):
    plain = {"Content-Type": "text/plain"}
    assert "not JSON" in refused(client.post("/v1/videos", content=b"{", headers=JSON))["message"]
    assert refused(client.post("/v1/videos", content=b"{}", headers=plain), 415)
    assert "object" in refused(client.post("/v1/videos", content=b"[]", headers=JSON))["message"]
    many = b"[" + b"[]," * 140_000 + b"1]"
    said = refused(client.post("/v1/videos", content=many, headers=JSON), 413)["message"]
    assert said == "the body has over 131072 values"


def test_files_of_a_job_and_no_others(client, server, tmp_path):
    job = made(client, server).removeprefix("video_")
    assert client.get(f"/jobs/{job}/video.mp4").content == b"video"
    place = server.queue.place(job)
    (tmp_path / "secret.txt").write_text("secret")
    (place / "link.txt").symlink_to(tmp_path / "secret.txt")
    (place / "given").mkdir()
    for name in ("given/image.html", ".lock", ".partial-1.mp4"):
        (place / name).write_text("<script>1</script>")
    for name in (
        *("given/image.html", ".lock", ".partial-1.mp4"),
        "link.txt",
        "job.json",
        "..%2f..%2fworker.log",
        "%2Fetc%2Fpasswd",
        "none.mp4",
        "",
    ):
        assert client.get(f"/jobs/{job}/{name}").status_code == 404
    assert client.get("/jobs/none/video.mp4").status_code == 404
    gone = client.get(f"/jobs/{job}/video.preview.png")
    assert (gone.status_code, gone.content) == (204, b"")
    for name in ("other.preview.png", "given/video.preview.png", "..%2fvideo.preview.png"):
        assert client.get(f"/jobs/{job}/{name}").status_code == 404


def test_a_picture_that_is_replaced_meanwhile_comes_whole(client, server, monkeypatch):
    job = made(client, server).removeprefix("video_")
    picture = server.queue.place(job) / "video.preview.png"
    picture.write_bytes(b"short")
    stat = os.stat

    def before_it_grows(path, *rest, **named):
        found = stat(path, *rest, **named)
        if str(path) == str(picture):
            picture.write_bytes(picture.read_bytes() + b", and longer")
        return found

    monkeypatch.setattr(os, "stat", before_it_grows)
    found = client.get(f"/jobs/{job}/{picture.name}")
    assert int(found.headers["Content-Length"]) == len(found.content)


PLAIN = "sandbox; default-src 'none'"


def test_no_file_of_a_job_or_training_runs_as_a_page(client, server):
    job = made(client, server).removeprefix("video_")
    page, training = server.queue.place(job), server.places.folder / "trainings" / "one"
    training.mkdir(parents=True)
    for name in ("a.html", "a.svg", "a.pdf", "a.json", "a.png", "report.html", "job.json"):
        (page / name).write_text("<script>1</script>")
        (training / name).write_text("<script>1</script>")
    for name in ("a.html", "a.svg", "a.pdf", "a.json", "a.png", "video.mp4", "report.html"):
        got = client.get(f"/jobs/{job}/{name}").headers
        shown = name in ("a.png", "video.mp4", "report.html")
        assert ("attachment" in got.get("Content-Disposition", "")) is not shown, name
        assert got["X-Content-Type-Options"] == "nosniff"
        policy = got["Content-Security-Policy"]
        plays = "media-src 'self'" in policy  # a film that is opened by itself
        assert (policy == PLAIN, plays) == (not shown, shown), name
        assert policy.startswith("sandbox")
        assert "allow-scripts" not in policy
    for name in ("one/a.png", "one/report.html"):
        assert client.get(f"/trainings/trainings/{name}").status_code == 200
    (server.places.folder / "uploads" / "report.html").write_text("page")
    (training / ".lock").write_text("{}")
    for name in ("a.html", "a.svg", "job.json", ".lock", "../../worker.log"):
        assert client.get(f"/trainings/trainings/one/{name}").status_code == 404
    for name in ("uploads/report.html", "worker.log", f"{job}/job.json", "", "%2Fetc%2Fhosts"):
        assert client.get(f"/trainings/{name}").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9000"}, 200),
        ({"Origin": "http://127.0.0.1:7860"}, 200),
        ({"Host": "example.com"}, 403),  # a name that was led to this machine
        ({"Origin": "http://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "192.168.0.7"}, 403),
        ({"Host": "a.gradio.live"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(client, headers, status):
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert refused(answer, 403)["message"] == "not from this server's own pages"
        assert client.get("/jobs/a/b", headers=headers).text == "not from this server's own pages"
    if status == 200:  # which they cannot show and lead clicks to either
        assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"


@pytest.mark.parametrize(
    ("options", "host", "origin", "taken"),
    [
        ({"host": "0.0.0.0"}, "192.168.0.7:7860", "http://192.168.0.7:7860", True),
        ({"host": "0.0.0.0"}, "[fe80::1]:7860", None, True),
        ({"host": "0.0.0.0"}, socket.gethostname(), None, True),
        ({"host": "0.0.0.0"}, "example.com", "http://example.com", False),
        ({"host": "gpu.example.com"}, "gpu.example.com", None, True),
        ({"shared": True}, "a1.gradio.live", "https://a1.gradio.live", True),
        ({"shared": True}, "localhost:7860", None, True),
        ({"shared": True}, "a1.gradio.live", "https://b2.gradio.live", False),
        ({"shared": True}, "gradio.live.example.com", None, False),
    ],
)
def test_names_that_a_server_is_reached_by(options, host, origin, taken):
    async def app(scope, receive, send):
        await PlainTextResponse("here")(scope, receive, send)

    client = TestClient(Guard(app, **{"host": "127.0.0.1", "shared": False, "most": 0, **options}))
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    assert client.get("/", headers=headers).status_code == (200 if taken else 403)


SECRET = "correct horse"


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "password.txt"
    file.write_text(f"{SECRET}\nnot this\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def asking(secret, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "DELAY", 0.01)
    with Server(tmp_path / "out", page=False, auth=f"me:{secret}", command=COMMAND) as found:
        yield TestClient(found.app, base_url="http://127.0.0.1:7860", follow_redirects=False)


PATHS = (
    "/",
    "/v1/models",
    "/jobs/a/b",
    "/trainings/a",
    "/pulse",
    "/gradio_api/info",
    "/openapi.json",
)


def test_all_is_behind_the_password(asking):
    for path in PATHS:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic ???"}):
            error = refused(asking.get(path, headers=header), 401)
            assert error["code"] == "invalid_api_key"
        assert "password" in asking.get(path, headers={"Accept": "text/html"}).text
    for auth in (("me", "wrong"), ("you", SECRET), ("me", "not this"), ("", "")):
        assert asking.get("/v1/models", auth=auth).status_code == 401
    for _ in range(2):
        assert asking.get("/v1/models", auth=("me", SECRET)).status_code == 200
        key = {"Authorization": f"Bearer {SECRET}"}  # as OpenAI's clients send it
        assert asking.get("/v1/models", headers=key).status_code == 200
    assert asking.get("/v1/models").headers["WWW-Authenticate"].startswith("Basic")


@pytest.mark.slow
def test_the_file_may_hold_a_hash(secret, tmp_path, monkeypatch):
    """As the command of docs/web_page.md and Werkzeug write it."""
    monkeypatch.setattr(guard, "DELAY", 0.01)
    text = (ROOT / "docs/web_page.md").read_text()
    code = text.partition("python -c '")[2].partition("' > password.txt")[0]
    said = io.StringIO()
    monkeypatch.setattr(getpass, "getpass", lambda: SECRET)
    with redirect_stdout(said):
        exec(code)
    salt, cost = "saltSALTsalt", 2**15
    made = hashlib.scrypt(SECRET.encode(), salt=salt.encode(), n=cost, r=8, p=1, maxmem=1 << 26)
    for line in (said.getvalue(), f"scrypt:{cost}:8:1${salt}${made.hex()}"):
        assert SECRET not in line
        secret.write_text(line)
        auth = f"me:{secret}"
        with Server(tmp_path / "out", page=False, auth=auth, command=COMMAND) as server:
            client = TestClient(server.app, base_url="http://127.0.0.1:7860")
            assert client.get("/v1/models", auth=("me", SECRET)).status_code == 200
            for wrong in (("me", line.strip()), ("me", "wrong"), ("you", SECRET)):
                refused(client.get("/v1/models", auth=wrong), 401)
            key = {"Authorization": f"Bearer {SECRET}"}
            assert client.get("/v1/models", headers=key).status_code == 200


def test_a_browser_logs_in_and_has_a_cookie(asking):
    page = asking.get("/", headers={"Accept": "text/html"})
    assert (page.status_code, "form-action 'self'" in page.headers["Content-Security-Policy"]) == (
        401,
        True,
    )
    wrong = asking.post("/login", data={"user": "me", "password": "<b>"})
    assert (wrong.status_code, "is wrong" in wrong.text) == (401, True)
    assert "Set-Cookie" not in wrong.headers
    foreign = {"Origin": "http://example.com"}
    given = {"user": "me", "password": SECRET}
    assert asking.post("/login", data=given, headers=foreign).status_code == 403
    assert asking.post("/login", data={"user": "x" * 9999}).status_code == 413
    right = asking.post("/login", data=given)
    assert (right.status_code, right.headers["Location"]) == (303, "/")
    said = right.headers["Set-Cookie"]
    assert "HttpOnly" in said
    assert "SameSite=strict" in said
    assert "Secure" not in said
    assert asking.get("/v1/models").status_code == 200  # by the cookie
    asking.cookies = {name: f"{value}x" for name, value in asking.cookies.items()}
    assert asking.get("/v1/models").status_code == 401


def test_a_cookie_of_a_public_address_is_for_https_alone(secret, tmp_path):
    auth = f"me:{secret}"
    with Server(tmp_path / "out", page=False, share=True, auth=auth, command=COMMAND) as server:
        client = TestClient(server.app, base_url="http://a1.gradio.live", follow_redirects=False)
        right = client.post("/login", data={"user": "me", "password": SECRET})
    assert "Secure" in right.headers["Set-Cookie"]


def test_guesses_are_few_and_keep_out_nobody_else(asking, monkeypatch):
    monkeypatch.setattr(guard, "MOST_GUESSES", 2)

    async def ask(address, secret):
        here = httpx.ASGITransport(asking.app, client=(address, 1))
        async with httpx.AsyncClient(transport=here, base_url="http://127.0.0.1") as client:
            return await client.get("/v1/models", auth=("me", secret))

    async def talk():
        guesses = [ask("10.0.0.1", "wrong") for _ in range(4)]
        return await asyncio.gather(*guesses, ask("10.0.0.2", SECRET))

    answers = asyncio.run(talk())
    assert [one.status_code for one in answers] == [401, 401, 429, 429, 200]
    assert answers[2].headers["Retry-After"] == "5"
    assert refused(answers[2], 429)["code"] == "rate_limit_exceeded"


def test_a_login_that_breaks_off_is_no_fault(asking):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    about = {"method": "POST", "path": "/login", "query_string": b"", "scheme": "http"}
    scope = {"type": "http", "headers": [(b"host", b"127.0.0.1")], **about}
    anyio.run(asking.app, scope, receive, send)
    assert sent[0]["status"] == 400


def test_uploads_are_cleared_by_several_at_once(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.png").write_bytes(PICTURE)
    with ThreadPoolExecutor(4) as threads:
        clear = partial(clear_uploads, tmp_path, [], seconds=0.0, most=0)
        for done in [threads.submit(clear) for _ in range(4)]:
            done.result()
    assert [*tmp_path.iterdir()] == []


def test_uploads_of_an_earlier_server_go_at_its_start(tmp_path, monkeypatch):
    old = tmp_path / "uploads" / "a" / "old.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(PICTURE)
    monkeypatch.setattr(ui_app, "UPLOADS_STAY", 0.0)
    with Server(tmp_path, page=False, command=COMMAND):
        until = time.monotonic() + SECONDS
        while old.parent.exists():
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 lets others in: give --auth USER:FILE"),
        (("--auth", "me"), "--auth must be USER:FILE, got 'me'"),
        (("--auth", ":x"), "--auth must be USER:FILE"),
        (("--auth", "me:none.txt"), "--auth: there is no file at none.txt"),
        (("--auth", "me:open.txt"), "open.txt may be read by others: chmod 600"),
        (("--auth", "me:short.txt"), "a password of 8 to 1024 characters, got 3"),
        (("--auth", "me:short.txt", "--no-auth"), "leave one out"),
        (("--auth", "me:hash.txt"), "hash.txt: a line with scrypt: must be scrypt:N:8:1$SALT$"),
    ],
)
def test_others_need_a_password(run, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    files = ("open.txt", SECRET, 0o644), ("short.txt", "abc", 0o600)
    for name, text, mode in (*files, ("hash.txt", "scrypt:1:8:1$salt$00", 0o600)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    for verb in ("serve", "ui"):
        assert said in run(verb, "--port", "0", "--out", "out", *given, code=2).stderr
    assert "--share lets others in" in run("ui", "--port", "0", "--share", code=2).stderr


def test_a_server_without_a_password_is_asked_for_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ui_app, "Server", lambda out, **about: None)
    monkeypatch.setattr(ui_app, "run", lambda server, bound: bound.close())
    told = run("serve", "--port", "0", "--out", tmp_path, "--host", "0.0.0.0", "--no-auth").stderr
    assert "warning: there is no password" in told


def test_a_folder_and_a_repository_may_be_allowed(run, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(ui_app, "Server", lambda out, **about: told.append([*about["allow"]]))
    monkeypatch.setattr(ui_app, "run", lambda server, bound: bound.close())
    given = ("serve", "--port", "0", "--out", tmp_path / "out", "--allow")
    run(*given, tmp_path, "--allow", "owner/name")
    assert told == [[str(tmp_path), "owner/name"]]
    assert "no folder to allow at" in run(*given, tmp_path / "none", code=2).stderr


def test_a_body_without_end_is_refused(client, monkeypatch):
    monkeypatch.setattr(request, "MOST", 1000)
    monkeypatch.setattr(request, "MOST_JSON", 1000)

    def parts():
        yield b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"'
        yield b"\r\n\r\n"
        while True:
            yield b"a" * 100

    said = "the body has over"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for body, headers in (
        (b"[" * 1001, JSON),
        (itertools.islice(parts(), 20), JSON),
        (itertools.islice(parts(), 20), form),
    ):
        error = refused(client.post("/v1/videos", content=body, headers=headers), 413)
        assert said in error["message"]


@pytest.mark.slow
def test_bodies_that_come_slowly_are_in_no_memory(server):
    """Nor do they keep others out."""
    many, parts = 8, 12
    here, go_on = threading.Semaphore(0), threading.Event()

    async def body():
        yield b'{"prompt": "steps 1", "gen_accel": {"negative_prompt": "'
        for _ in range(parts):
            yield b"a" * (1 << 20)
        here.release()
        while not go_on.is_set():
            await anyio.sleep(0.01)
        yield b'"}}'

    async def talk():
        transport = httpx.ASGITransport(server.app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
            anyio.create_task_group() as group,
        ):

            async def post():
                answers.append(await client.post("/v1/videos", content=body(), headers=JSON))

            tracemalloc.start()
            for _ in range(many):
                group.start_soon(post)
            with anyio.fail_after(SECONDS):
                while here._value < many:
                    await anyio.sleep(0.01)
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            answers.append(await client.post("/v1/videos", json={"prompt": "steps 1"}))
            go_on.set()
        return held

    answers = []
    assert anyio.run(talk) < many << 21  # of which the test holds half
    assert [answer.status_code for answer in answers] == [200] + [400] * many


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", "/v1/none", 404, None),
        ("GET", "/v1/videos/video_none", 404, "video_id"),
        ("GET", "/v1/videos/%3Cscript%3E%22" + "x" * 3000, 404, "video_id"),
        ("GET", "/v1/videos?after=none", 404, "after"),
        ("GET", "/v1/videos?limit=many", 400, "limit"),
        ("GET", "/jobs/none/video.mp4", 404, None),
        ("PUT", "/v1/videos", 405, None),
        ("DELETE", "/v1/models", 405, None),
    ],
)
def test_errors_of_the_framework_have_the_same_shape(client, method, path, status, param):
    answer = client.request(method, path)
    error = refused(answer, status)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(error["message"]) < 600
    assert answer.headers["content-type"] == "application/json"
    assert ("allow" in answer.headers) == (status == 405)
    if path == "/v1/none":
        there = "videos are at /v1/videos, models at /v1/models"
        assert error["message"] == f"this server has no '/v1/none': {there}"


def test_no_answer_names_a_folder_of_the_server(client, server, monkeypatch):
    def ask(verb, options):
        raise ValueError(f"image {options['image']} is no picture for {demo.path()}")

    monkeypatch.setattr(server.questions, "ask", ask)
    files = {"input_reference": ("cat.png", b"none")}
    error = refused(client.post("/v1/videos", data={"prompt": "a"}, files=files))
    assert error["message"] == "image cat.png is no picture for demo"
    monkeypatch.undo()
    files = {"input_reference": ("cat.png", PICTURE)}
    for form in ({"data": {"prompt": "steps 1"}, "files": files}, {"json": {"prompt": "a"} | OUT}):
        assert str(server.queue.folder) not in client.post("/v1/videos", **form).text


OUT = {"gen_accel": {"image": "/etc/passwd"}}


def test_a_text_in_the_place_of_a_file_is_a_data_url(client):
    given = {"prompt": "a", "input_reference": "/etc/passwd"}
    answer = client.post("/v1/videos", data=given, files={"other": ("a.png", b"")})
    assert refused(answer)["param"] in ("input_reference", "other")


def filled(folder, done, waiting):
    """Write records of jobs as a server does."""
    for i in range(done + waiting):
        name = f"20261101-000000-{i:06x}"
        options = {"model": "demo", "prompt": ["a"], "frames": 33, "seed": i}
        times = {"started": 100.0, "ended": 110.0} if i < done else {}
        job = {"id": name, "verb": "generate", "options": options, "made": float(i), **times}
        (folder / name).mkdir(parents=True)
        job["state"] = DONE if i < done else WAITING
        (folder / name / RECORD).write_text(json.dumps(job))


def test_each_record_is_looked_at_once_for_all_that_are_listed(tmp_path, monkeypatch):
    filled(tmp_path / "out", 100, 100)
    for i, about in enumerate(({"run": 5}, {"run": {"fps": 0, "height": "a"}}, {"run": [1]})):
        record = tmp_path / "out" / f"20261101-000000-{i:06x}" / RECORD
        record.write_text(json.dumps(json.loads(record.read_text()) | {"about": about}))
    server = Server(tmp_path / "out", page=False, command=COMMAND)
    looked, seconds = [], QueuedJob.seconds.fget
    counted = property(lambda job: looked.append(job.id) or seconds(job))
    monkeypatch.setattr(QueuedJob, "seconds", counted)
    with TestClient(server.app, base_url="http://127.0.0.1") as client:
        jobs = client.get("/v1/videos?limit=100").json()["data"]
        assert [job["gen_accel"]["position"] for job in jobs] == [*range(99, -1, -1)]
        assert [job["gen_accel"]["seconds_left"] for job in jobs[::99]] == [1000.0, 10.0]
        assert len(looked) <= 4 * 200
        looked.clear()
        ended = client.get("/v1/videos?order=asc&limit=1").json()["data"]
        assert ended[0]["gen_accel"]["seconds_left"] is None
        odd = client.get("/v1/videos?order=asc&limit=3").json()["data"]  # as the demo is run
        assert {(job["size"], job["seconds"]) for job in odd} == {("96x96", "2")}
        assert len(looked) == 4
    server.queue.close()


@pytest.mark.parametrize("slow", ["check", "body"])
def test_many_posts_leave_the_rest_of_the_server_free(server, monkeypatch, slow):
    """One that waits for its check takes no thread of the others, nor does a slow body."""
    go_on, many = threading.Event(), 60
    ask = server.questions.ask
    slowly = lambda verb, options: go_on.wait(SECONDS) and ask(verb, options)  # noqa: E731
    answers = []

    async def body():
        yield b'{"prompt":'
        while slow == "body" and not go_on.is_set():
            await anyio.sleep(0.01)
        yield b' "steps 1"}'

    async def post(client):
        answers.append(await client.post("/v1/videos", content=body(), headers=JSON))

    async def talk():
        here = httpx.ASGITransport(server.app)
        async with (
            httpx.AsyncClient(transport=here, base_url="http://127.0.0.1") as client,
            anyio.create_task_group() as group,
        ):
            for _ in range(many):
                group.start_soon(post, client)
            with anyio.fail_after(SECONDS):
                while slow == "check" and len(answers) < many - request.CHECKS:
                    await anyio.sleep(0.01)
                assert (await client.get("/v1/models")).status_code == 200
            go_on.set()

    if slow == "check":
        monkeypatch.setattr(server.questions, "ask", slowly)
    anyio.run(talk)
    busy = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert len(busy) >= (many - request.CHECKS if slow == "check" else 0)
    for answer in busy:
        assert refused(answer, 503)["type"] == "server_error"
        assert answer.headers["retry-after"] == str(request.TRY_AGAIN)
    for job in server.queue.jobs():
        server.queue.remove(job.id)
