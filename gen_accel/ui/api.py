"""HTTP of a server: videos in the shape of OpenAI's API, the files of jobs, and who may ask.

Fields and states of videos are those of
https://developers.openai.com/api/reference/resources/videos. Unlike there, `model` is one that the
server was started with, any size and length that it makes is taken, and `gen_accel` holds further
options by the names that `gen-accel generate --config` has. A job that was stopped is `cancelled`.
DELETE also stops a job that runs.
"""

import base64
import binascii
import json
import re
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gen_accel.registry import LOOPBACK
from gen_accel.ui.form import typed
from gen_accel.ui.queue import (
    DONE,
    FAILED,
    INTERRUPTED,
    RECORD,
    RUNNING,
    STOPPED,
    WAITING,
    Queue,
    QueuedJob,
)
from gen_accel.ui.worker import Options, Questions, Refused, line_of

STATUS = {
    WAITING: "queued",
    RUNNING: "in_progress",
    DONE: "completed",
    FAILED: "failed",
    INTERRUPTED: "failed",
    STOPPED: "cancelled",
}
PREFIX = "video_"
FPS, LENGTHS = 16.0, 8  # frames a second; one more than a multiple of it goes with each model
KNOWN = ("model", "prompt", "size", "seconds", "frames", "input_reference", "gen_accel")
# Options of `generate` that a request gives by OpenAI's names, or that are the server's own.
OWN = (
    *("model", "prompt", "height", "width", "out", "json", "prompts", "plan", "gpu"),
    *("overwrite", "save_latents", "from_latents", "compare", "timed", "metrics"),
    *("ray", "ray_workers", "settings"),
)
CONTENT = {"video": "*.mp4", "thumbnail": "*.preview.png"}
LARGEST = 64 << 20  # bytes of a picture
MOST = LARGEST * 3 // 2  # bytes of a body: a picture in base64, and the rest
CARD = "h100"  # that a request is checked for: no machine is measured
STOPPING = 90.0  # seconds that DELETE waits for a running job to end
TUNNEL = ".gradio.live"  # names of --share
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,(.*)", re.DOTALL)

Told = dict[str, Any]  # JSON of a request or an answer
Picture = tuple[str, bytes]  # suffix and content of a file


class BadRequest(Exception):
    """Error that a client is told.

    Args:
        param: the field of the request that is wrong.
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Videos:
    """Videos of a queue.

    Args:
        models: that a request may name; the first is the default.
    """

    def __init__(self, queue: Queue, questions: Questions, models: tuple[str, ...]) -> None:
        self.queue, self.questions, self.models = queue, questions, models

    def create(self, given: Options, picture: Picture | None) -> QueuedJob:
        """Queue a video; raises BadRequest.

        Args:
            given: fields of the request.
            picture: the first frame.
        """
        options = self._options(given)
        with TemporaryDirectory(dir=self.queue.folder) as folder:
            files: dict[str, str] = {}
            if picture is not None:
                first = Path(folder, f"first{picture[0]}")
                first.write_bytes(picture[1])
                files["image"] = str(first)
            try:
                self.questions.ask("generate", {**options, **files, "plan": True, "gpu": CARD})
                return self.queue.submit(
                    "generate",
                    {**options, "out": "{job}/video.mp4", "json": "{job}/result.json"},
                    title=options["prompt"][0],
                    kind="generate",
                    about={"by": "http"},
                    given=files,
                )
            except ValueError as error:
                raise BadRequest(line_of(error)) from error

    def find(self, name: str) -> QueuedJob:
        """Find a job by its id; raises BadRequest for an unknown one."""
        with suppress(KeyError):
            job = self.queue.job(name.removeprefix(PREFIX))
            if job.verb == "generate":
                return job
        raise BadRequest(f"there is no video {name!r}", "video_id", status=404)

    def list(self, after: str | None, limit: int, order: str) -> Told:
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {order!r}", "order")
        if not 0 <= limit <= 100:
            raise BadRequest(f"limit must be 0 to 100, got {limit}", "limit")
        jobs = [job for job in self.queue.jobs() if job.verb == "generate"]
        if order == "desc":
            jobs.reverse()
        if after is not None:
            last = self.find(after).id
            jobs = jobs[[job.id for job in jobs].index(last) + 1 :]
        some = [self.told(job) for job in jobs[:limit]]
        first, last = (some[0]["id"], some[-1]["id"]) if some else (None, None)
        ends = {"first_id": first, "last_id": last}
        return {"object": "list", "data": some, **ends, "has_more": len(jobs) > limit}

    def delete(self, name: str) -> Told:
        """Stop a job if it runs, and remove it with its files."""
        job = self.find(name)
        if job.state == RUNNING:
            self.queue.cancel(job.id)
            with suppress(KeyError):  # another client removed it, which `find` says
                self.queue.wait(job.id, STOPPING)
            job = self.find(name)
        self.queue.remove(job.id)
        gone = job.id not in {one.id for one in self.queue.jobs()}
        return {"id": PREFIX + job.id, "object": "video.deleted", "deleted": gone}

    def content(self, name: str, variant: str) -> Path:
        """Path of the video, or of its last preview as `thumbnail`."""
        job = self.find(name)
        if variant not in CONTENT:
            raise BadRequest(f"variant must be {' or '.join(CONTENT)}, got {variant!r}", "variant")
        if job.state != DONE:
            raise BadRequest(f"{name} is {STATUS[job.state]} and has no content", status=404)
        for file in self.queue.files(job):
            if file.match(CONTENT[variant]):
                return file
        raise BadRequest(f"{name} has no {variant}", status=404)

    def told(self, job: QueuedJob) -> Told:
        """Write a job as an object `video`."""
        options, share = job.options, job.share or 0.0
        height, width, frames = (options.get(name) for name in ("height", "width", "frames"))
        fps = options.get("fps") or FPS
        return {
            "id": PREFIX + job.id,
            "object": "video",
            "model": options.get("model"),
            "status": STATUS[job.state],
            "progress": 100 if job.state == DONE else int(100 * share),
            "created_at": int(job.made),
            "completed_at": int(job.ended) if job.state == DONE and job.ended else None,
            "expires_at": None,
            "prompt": (options.get("prompt") or [None])[0],
            "size": f"{width}x{height}" if width and height else None,
            "seconds": f"{(frames - 1) / fps:g}" if frames else None,
            "remixed_from_video_id": None,
            "error": {"code": job.state, "message": job.error} if job.error else None,
            "gen_accel": {
                "position": self.queue.position(job.id),
                "seconds_left": self.queue.left(job.id),
                "seconds_run": job.seconds,
                "notes": [*job.notes],
                "options": {k: v for k, v in options.items() if k not in ("out", "json")},
            },
        }

    def _options(self, given: Options) -> Told:
        """Return the fields of a request as options of `generate`."""
        if unknown := [name for name in given if name not in KNOWN]:
            advice = "options of gen-accel generate go into gen_accel"
            raise BadRequest(f"there is no field {unknown[0]!r}: {advice}", unknown[0])
        model = given.get("model") or self.models[0]
        if model not in self.models:
            sentence = f"model must be one of {', '.join(self.models)}, got {model!r}"
            raise BadRequest(sentence, "model", status=404, code="model_not_found")
        prompt = given.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadRequest("prompt must be the text of what to show", "prompt")
        options: Told = {"model": model, "prompt": [prompt], **_more(given.get("gen_accel"))}
        if (size := given.get("size")) is not None:
            found = _SIZE.fullmatch(str(size))
            if found is None:
                sentence = f"size must be WIDTHxHEIGHT, as in 832x480, got {size!r}"
                raise BadRequest(sentence, "size")
            options |= {"width": int(found[1]), "height": int(found[2])}
        frames = _frames(given, options.get("fps") or FPS)
        return options if frames is None else {**options, "frames": frames}


def _more(held: object) -> Told:
    """Check the options in the field `gen_accel`, which a form gives as text."""
    if isinstance(held, str):
        try:
            held = json.loads(held)
        except ValueError:
            raise BadRequest("gen_accel must be JSON", "gen_accel") from None
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise BadRequest("gen_accel must hold options by name", "gen_accel")
    try:
        found = typed("generate", held, origin="gen_accel", without=OWN)
    except ValueError as error:
        raise BadRequest(str(error), "gen_accel") from error
    return {name: value for name, value in found.items() if value is not None}


def _frames(given: Options, fps: float) -> int | None:
    """Number of frames of a request; of seconds, the nearest that all models make."""
    name = "seconds" if given.get("frames") is None else "frames"
    value = given.get(name)
    if value is None:
        return None
    try:
        if name == "frames":
            return int(value)
        return LENGTHS * max(1, round(float(value) * fps / LENGTHS)) + 1
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"{name} must be a number, got {value!r}", name) from None


def _limited(request: Request) -> Request:
    """Refuse a body that is too large by its header, else count what comes and refuse it then."""
    came = 0

    def check(size: int) -> None:
        if size > MOST:
            raise BadRequest(f"the body has over {MOST >> 20} MiB", status=413)

    async def receive() -> Message:
        nonlocal came
        message = await request.receive()
        came += len(message.get("body", b""))
        check(came)
        return message

    said = request.headers.get("content-length", "")
    check(int(said) if said.isdecimal() else 0)
    return Request(request.scope, receive)


async def _fields(request: Request) -> tuple[Told, Picture | None]:
    """Read the fields of a request, and its picture."""
    request = _limited(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        form = await request.form()
        file = form.get("input_reference")
        given: Told = {k: v for k, v in form.items() if k != "input_reference"}
        if file is None or isinstance(file, str):
            return given, None
        return given, _checked(Path(file.filename or "").suffix.lower(), await file.read())
    if kind != "application/json":
        sentence = "the body must be application/json or multipart/form-data"
        raise BadRequest(f"{sentence}, got {kind or 'neither'}", status=415)
    try:
        held = await request.json()
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(held, dict):
        raise BadRequest("the body must be a JSON object")
    reference = held.get("input_reference")
    return held, None if reference is None else _picture(reference)


def _picture(reference: object) -> Picture:
    """Decode a picture that a request holds as a data URL."""
    url = reference.get("image_url") if isinstance(reference, dict) else reference
    found = _PICTURE.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise BadRequest(
            "input_reference must be a file of a form, or a data URL of a PNG, JPEG or WebP: this "
            "server fetches nothing",
            "input_reference",
        )
    try:
        return _checked(f".{found[1]}", base64.b64decode(found[2], validate=True))
    except binascii.Error:
        raise BadRequest("input_reference is no base64", "input_reference") from None


def _checked(suffix: str, data: bytes) -> Picture:
    what = "input_reference"
    if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BadRequest(f"{what} must be a PNG, JPEG or WebP, got {suffix or 'no suffix'}", what)
    if len(data) > LARGEST:
        sentence = f"{what} has {len(data) >> 20} MiB, at most {LARGEST >> 20} are taken"
        raise BadRequest(sentence, what, status=413)
    return suffix, data


def add_videos(app: FastAPI, videos: Videos) -> None:
    """Serve `/v1/videos` and `/v1/models`."""

    def refusal(error: Exception, status: int, kind: str, **about: str | None) -> JSONResponse:
        held = {"message": str(error), "type": kind, "param": None, "code": None, **about}
        return JSONResponse({"error": held}, status)

    @app.exception_handler(BadRequest)
    async def refused(request: Request, error: BadRequest) -> JSONResponse:
        about = {"param": error.param, "code": error.code}
        return refusal(error, error.status, "invalid_request_error", **about)

    @app.exception_handler(Refused)
    async def sentence(request: Request, error: Refused) -> JSONResponse:
        return refusal(error, 400, "invalid_request_error")

    @app.exception_handler(OSError)
    async def no_room(request: Request, error: OSError) -> JSONResponse:
        return refusal(error, 507, "server_error")

    @app.post("/v1/videos")
    async def create(request: Request) -> Told:
        given, picture = await _fields(request)
        job = await run_in_threadpool(videos.create, given, picture)
        return videos.told(job)

    @app.get("/v1/videos")
    def listed(after: str | None = None, limit: int = 20, order: str = "desc") -> Told:
        return videos.list(after, limit, order)

    @app.get("/v1/videos/{name}")
    def one(name: str) -> Told:
        return videos.told(videos.find(name))

    @app.delete("/v1/videos/{name}")
    def delete(name: str) -> Told:
        return videos.delete(name)

    @app.get("/v1/videos/{name}/content")
    def content(name: str, variant: str = "video") -> FileResponse:
        path = videos.content(name, variant)
        return FileResponse(path, filename=f"{name}{path.suffix}")

    @app.get("/v1/models")
    def models() -> Told:
        about = {"object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [{"id": one, **about} for one in videos.models]}


def add_files(app: FastAPI, queue: Queue) -> None:
    """Serve the files in a job's folder at `/jobs/ID/NAME`, and no others.

    A link in it that leads elsewhere is not followed.
    """

    @app.get("/jobs/{job}/{name:path}", include_in_schema=False)
    def file(job: str, name: str, download: bool = False) -> FileResponse:
        with suppress(KeyError, OSError, ValueError, RuntimeError):
            place = queue.place(queue.job(job)).resolve()
            path = (place / name).resolve()
            if path.is_relative_to(place) and path.name != RECORD and path.is_file():
                return FileResponse(path, filename=path.name if download else None)
        raise HTTPException(404, "there is no such file")


class OwnPages:
    """Middleware that refuses what pages of other sites ask for.

    A request names this server by what no site can lead here: on this machine alone a name of
    `LOOPBACK`, else also an address in numbers, this machine's own name or `host`. If a browser
    says which page asks, it must be one of this server.

    Args:
        host: that the server binds to.
        shared: whether the page is reached by a name of gradio.live too.
    """

    def __init__(self, app: ASGIApp, *, host: str, shared: bool) -> None:
        own = socket.gethostname().lower()
        self.app, self.local, self.shared = app, host in LOOPBACK, shared
        self.names = LOOPBACK if self.local else (*LOOPBACK, host.lower(), own, f"{own}.local")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            request = Request({**scope, "type": "http"})
            host, origin = request.headers.get("host", ""), request.headers.get("origin")
            if not self._is_own(host, origin):
                answer = PlainTextResponse("not from this server's own pages", 403)
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_own(self, host: str, origin: str | None) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            foreign = origin is not None and urlsplit(origin).netloc != host
        except ValueError:  # a bracket without its other
            return False
        if foreign:
            return False
        if name in self.names or (self.shared and name.endswith(TUNNEL)):
            return True
        with suppress(ValueError):  # a name in numbers, for which no name server is asked
            return not self.local and bool(ip_address(name))
        return False
