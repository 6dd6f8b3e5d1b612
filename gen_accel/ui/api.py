"""HTTP of a server: videos in the shape of OpenAI's API, and files of jobs and trainings.

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
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import BoundedSemaphore
from typing import NamedTuple, TypeVar

from anyio import CapacityLimiter, fail_after, move_on_after, sleep
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field, ValidationError, field_validator
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from gen_accel.demo import NAME, path
from gen_accel.measure.report import MEDIA_TYPES
from gen_accel.parsing import shown
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.ui.files import UPLOADS
from gen_accel.ui.queue import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    WAITING,
    Outlook,
    Queue,
    QueuedJob,
)
from gen_accel.ui.worker import Questions, Values, line_of

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
# Options of `generate` that a request gives by OpenAI's names, or that are the server's own.
OWN = (
    *("model", "prompt", "height", "width", "out", "prompts", "overwrite"),
    *("save_latents", "from_latents", "compare", "timed", "metrics"),
    *("ray", "ray_workers", "settings"),
)
CONTENT = {"video": "*.mp4", "thumbnail": "*.preview.png"}
LARGEST = 64 << 20  # bytes of a picture
MOST, MOST_JSON = LARGEST * 3 // 2, 16 << 20  # bytes of a body: of a form, of JSON
MOST_HELD = 4 * MOST  # bytes of all bodies that are read or checked at one time
MOST_OPTIONS = 1 << 17  # characters of the field `gen_accel`, as JSON
MOST_SECONDS = 3600.0
SLOWEST = 300.0  # seconds that a body may take to come
CHECKS = 16  # requests that wait for their check at one time, or are checked
TRY_AGAIN = 5  # seconds that whoever finds the server busy is asked to wait
CARD = "h100"  # that a request is checked for: no machine is measured
STOPPING = 90.0  # seconds that DELETE waits for a running job to end
# Report of a training: a page without scripts, with pictures in itself and films beside it.
REPORT = "report.html"
# What a report may show, and a film that a browser opens by itself: it asks for the film again.
SHOWN_MAY = (
    "sandbox allow-same-origin; default-src 'none'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:"
)
_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,(.*)", re.DOTALL)

BAD = "invalid_request_error"
RULES = {
    "prompt": "the text of what to show",
    "model": "the name of a model",
    "size": "WIDTHxHEIGHT, as in 832x480",
    "seconds": f"a number above 0 and at most {MOST_SECONDS:g}",
}
# Fields of a request by the options that come of them.
FIELDS = {"height": ("size",), "width": ("size",), "frames": ("frames", "seconds")}

Told = Values  # JSON of a request or an answer
Answer = TypeVar("Answer")


class Picture(NamedTuple):
    """A file of a request: its name there, the suffix of its kind, and its content."""

    name: str
    suffix: str
    data: bytes


class BadRequest(Exception):
    """Error that a client is told.

    Args:
        param: the field of the request that is wrong.
        retry: seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = None if retry is None else {"Retry-After": str(retry)}


class VideoRequest(BaseModel):
    """Fields of a request, as JSON or a form has them."""

    prompt: str = Field(pattern=r"\S")
    model: str | None = None
    size: str | None = Field(None, pattern=r"^\d{1,5}x\d{1,5}$")
    seconds: float | None = Field(None, allow_inf_nan=False, gt=0, le=MOST_SECONDS)
    frames: object = None
    input_reference: object = None
    gen_accel: object = None

    @field_validator("seconds", mode="before")
    @classmethod
    def _is_number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(value)
        return value

    @classmethod
    def read(cls, given: Mapping[str, object]) -> "VideoRequest":
        if unknown := [name for name in given if name not in cls.model_fields]:
            advice = "options of gen-accel generate go into gen_accel"
            raise BadRequest(f"there is no field {shown(unknown[0])}: {advice}", unknown[0][:100])
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            fault = error.errors()[0]
        name = str(fault["loc"][0])
        came = "nothing" if fault["type"] == "missing" else shown(fault["input"])
        raise BadRequest(f"{name} must be {RULES[name]}, got {came}", name)

    def options(self, models: Sequence[str]) -> Told:
        """Return the options of `generate`.

        Args:
            models: that may be named; the first is the default.
        """
        model = self.model or models[0]
        if model not in models:
            sentence = f"model must be one of {', '.join(models)}, got {shown(model)}"
            raise BadRequest(sentence, "model", status=404, code="model_not_found")
        options = {"model": model, **_read("prompt", {"prompt": self.prompt}), **self._more()}
        if self.size is not None:
            width, height = map(int, self.size.split("x"))
            options |= _read("size", {"width": width, "height": height}, origin="size")
        options |= _read("frames", {"frames": self.frames})
        if self.frames is None and self.seconds is not None:
            parts = self.seconds * (options.get("fps") or FPS) / LENGTHS
            frames = LENGTHS * max(1, round(parts)) + 1  # that all models make
            options |= _read("seconds", {"frames": frames})
        return options

    def _more(self) -> Told:
        """Check the options in the field `gen_accel`, which a form gives as text."""
        name, held = "gen_accel", self.gen_accel
        text = held if isinstance(held, str) else json.dumps(held)
        if len(text) > MOST_OPTIONS:
            raise BadRequest(f"{name} has over {MOST_OPTIONS} characters", name)
        try:
            held = json.loads(text)
        except (ValueError, RecursionError):
            raise BadRequest(f"{name} must be JSON", name) from None
        held = {} if held is None else held
        if not isinstance(held, dict):
            raise BadRequest(f"{name} must hold options by name", name)
        if wrong := [one for one in held if one in OWN]:
            raise BadRequest(f"{name}: unknown field {wrong[0]!r}", name)
        return _read(name, held, origin=name)


def _read(param: str, given: Mapping[str, object], *, origin: str = "") -> Told:
    """Read options of `generate` from a field of a request, without those that are None."""
    try:
        read = GenerateConfig.read({"model": NAME, **given}, origin=origin)
    except ValueError as error:
        raise BadRequest(line_of(error), param) from error
    values, names = read.values(), {name.replace("-", "_") for name in given}
    return {name: values[name] for name in values if name in names and values[name] is not None}


class Intake:
    """Requests for a video while they are read and checked.

    Checks wait for each other in threads of their own, so that no other request waits for one.
    """

    def __init__(self) -> None:
        self._held, self._checks = 0, BoundedSemaphore(CHECKS)

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Request]:
        """Count the bytes of a body while they are held; refuse one that is too large or slow."""
        came, most = 0, MOST_JSON if _kind(request) == "application/json" else MOST

        def check(size: int) -> None:
            if size > most:
                raise BadRequest(f"the body has over {most >> 20} MiB", status=413)

        async def receive() -> Message:
            nonlocal came
            message = await request.receive()
            size = len(message.get("body", b""))
            came, self._held = came + size, self._held + size
            check(came)
            if self._held > MOST_HELD:
                raise self._busy()
            return message

        said = request.headers.get("content-length", "")
        check(int(said) if said.isdecimal() else 0)
        try:
            yield Request(request.scope, receive)
        finally:
            self._held -= came

    async def check(self, function: Callable[[], Answer]) -> Answer:
        """Run a check in a thread of its own, unless too many wait already."""
        if not self._checks.acquire(blocking=False):
            raise self._busy()
        try:
            return await run_sync(function, limiter=CapacityLimiter(1))
        finally:
            self._checks.release()

    def _busy(self) -> BadRequest:
        sentence = f"the server checks other requests: try again in {TRY_AGAIN} s"
        return BadRequest(sentence, status=503, code="busy", retry=TRY_AGAIN)


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _fields(request: Request) -> tuple[Told, Picture | None]:
    """Read the fields of a request, and its picture."""
    kind = _kind(request)
    if kind == "multipart/form-data":
        async with request.form(max_files=1) as form:
            held: Told = dict(form)
            if isinstance(file := held.get("input_reference"), UploadFile):
                name = Path(file.filename or "").name
                return held, _checked(name, Path(name).suffix.lower(), await file.read())
    elif kind == "application/json":
        text = await request.body()
        if sum(map(text.count, (b"[", b"{", b","))) > MOST_OPTIONS:  # seconds to parse
            raise BadRequest(f"the body has over {MOST_OPTIONS} values", status=413)
        try:
            held = json.loads(text)
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None
        if not isinstance(held, dict):
            raise BadRequest("the body must be a JSON object")
    else:
        sentence = "the body must be application/json or multipart/form-data"
        raise BadRequest(f"{sentence}, got {kind[:100] or 'neither'}", status=415)
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
        data = base64.b64decode(found[2], validate=True)
        return _checked("input_reference", f".{found[1]}", data)
    except binascii.Error:
        raise BadRequest("input_reference is no base64", "input_reference") from None


def _checked(name: str, suffix: str, data: bytes) -> Picture:
    what = "input_reference"
    if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BadRequest(f"{what} must be a PNG, JPEG or WebP, got {shown(name)}", what)
    if len(data) > LARGEST:
        sentence = f"{what} has {len(data) >> 20} MiB, at most {LARGEST >> 20} are taken"
        raise BadRequest(sentence, what, status=413)
    return Picture(name, suffix, data)


def find(queue: Queue, name: str, param: str = "video_id") -> QueuedJob:
    """Find the job of a video; raises BadRequest for an unknown one."""
    with suppress(KeyError):
        job = queue.job(name.removeprefix(PREFIX))
        if job.verb == "generate":
            return job
    raise BadRequest(f"there is no video {shown(name)}", param, status=404)


def told(queue: Queue, *jobs: QueuedJob) -> list[Told]:
    """Write jobs as objects `video`. Paths in a job's folder are relative to it."""
    ahead = queue.outlook() if any(job.is_live for job in jobs) else {}
    return [_told(job, ahead.get(job.id, Outlook()), queue.place(job)) for job in jobs]


def _told(job: QueuedJob, ahead: Outlook, place: Path) -> Told:
    def within(value: object) -> object:
        if isinstance(value, list | tuple):
            return [*map(within, value)]
        return value.replace(f"{place}/", "") if isinstance(value, str) else value

    options = job.options
    height, width, frames = (options.get(name) for name in ("height", "width", "frames"))
    fps = options.get("fps") or FPS
    return {
        "id": PREFIX + job.id,
        "object": "video",
        "model": options.get("model"),
        "status": STATUS[job.state],
        "progress": 100 if job.state == DONE else int(100 * (job.share or 0.0)),
        "created_at": int(job.made),
        "completed_at": int(job.ended) if job.state == DONE and job.ended else None,
        "expires_at": None,
        "prompt": (options.get("prompt") or [None])[0],
        "size": f"{width}x{height}" if width and height else None,
        "seconds": f"{(frames - 1) / fps:g}" if frames else None,
        "remixed_from_video_id": None,
        "error": {"code": job.state, "message": within(job.error)} if job.error else None,
        "gen_accel": {
            "position": ahead.before,
            "seconds_left": ahead.left,
            "seconds_run": job.seconds,
            "notes": within(job.notes),
            "options": {k: within(v) for k, v in options.items() if k not in ("out", "json")},
        },
    }


def add_videos(app: FastAPI, queue: Queue, questions: Questions, models: Sequence[str]) -> None:
    """Serve `/v1/videos` and `/v1/models`.

    Args:
        models: that a request may name; the first is the default.
    """

    intake = Intake()

    @app.exception_handler(BadRequest)
    async def refused(request: Request, error: BadRequest) -> Response:
        kind = BAD if error.status < 500 else "server_error"
        held = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
        told = json.dumps({"error": held})  # in ASCII: a client may send half a character
        return Response(told, error.status, error.headers, "application/json")

    @app.exception_handler(OSError)
    async def failed(request: Request, error: OSError) -> Response:
        return await refused(request, BadRequest(error.strerror or str(error), status=507))

    @app.exception_handler(AnyHTTPException)
    async def no_such(request: Request, error: AnyHTTPException) -> Response:
        answer = await refused(request, BadRequest(error.detail, status=error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def unread(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        name, rule = str(fault["loc"][-1]), fault["msg"].partition(",")[0]
        sentence = f"{name}: {rule}, got {shown(fault['input'])}"
        return await refused(request, BadRequest(sentence, name))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return await refused(request, BadRequest("the body broke off"))  # which nobody reads

    def submit(given: Told, picture: Picture | None) -> QueuedJob:
        options = VideoRequest.read(given).options(models)
        with TemporaryDirectory(dir=queue.folder) as folder:
            files: dict[str, str] = {}
            if picture is not None:
                first = Path(folder, f"first{picture.suffix}")
                first.write_bytes(picture.data)
                files["image"] = str(first)
            try:
                questions.ask("generate", {**options, **files, "plan": True, "gpu": CARD})
                return queue.submit(
                    "generate",
                    {**options, "out": "{job}/video.mp4", "json": "{job}/result.json"},
                    title=options["prompt"][0],
                    kind="generate",
                    about={"by": "http"},
                    given=files,
                )
            except ValueError as error:
                sentence = line_of(error).replace(str(path()), NAME)
                if picture is not None:
                    sentence = sentence.replace(files["image"], picture.name)
                raise BadRequest(sentence, _field_of(sentence, given, options)) from error

    @app.post("/v1/videos")
    async def create(request: Request) -> Told:
        async with intake.body(request) as counted:
            try:
                with fail_after(SLOWEST):
                    given, picture = await _fields(counted)
            except TimeoutError:
                sentence = f"the body took longer than {SLOWEST:g} s"
                raise BadRequest(sentence, status=408) from None
            job = await intake.check(lambda: submit(given, picture))
        return told(queue, job)[0]

    @app.get("/v1/videos")
    def listed(after: str | None = None, limit: int = 20, order: str = "desc") -> Told:
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {shown(order)}", "order")
        if not 0 <= limit <= 100:
            raise BadRequest(f"limit must be 0 to 100, got {limit}", "limit")
        jobs = [job for job in queue.jobs() if job.verb == "generate"]
        jobs = jobs[::-1] if order == "desc" else jobs
        if after is not None:
            last = find(queue, after, "after").id
            jobs = jobs[[job.id for job in jobs].index(last) + 1 :]
        some = told(queue, *jobs[:limit])
        first, last = (some[0]["id"], some[-1]["id"]) if some else (None, None)
        ends = {"first_id": first, "last_id": last}
        return {"object": "list", "data": some, **ends, "has_more": len(jobs) > limit}

    @app.get("/v1/videos/{name}")
    def one(name: str) -> Told:
        return told(queue, find(queue, name))[0]

    @app.delete("/v1/videos/{name}")
    async def delete(name: str) -> Told:
        job = find(queue, name)
        if job.state == RUNNING:
            await run_in_threadpool(queue.cancel, job.id)
            with move_on_after(STOPPING):  # in no thread: other requests need them
                while find(queue, name).state == RUNNING:
                    await sleep(0.05)
        await run_in_threadpool(queue.remove, job.id)
        gone = job.id not in {one.id for one in queue.jobs()}
        return {"id": PREFIX + job.id, "object": "video.deleted", "deleted": gone}

    @app.get("/v1/videos/{name}/content")
    def content(name: str, variant: str = "video") -> FileResponse:
        job = find(queue, name)
        if variant not in CONTENT:
            sentence = f"variant must be {' or '.join(CONTENT)}, got {shown(variant)}"
            raise BadRequest(sentence, "variant")
        if job.state != DONE:
            raise BadRequest(f"{name} is {STATUS[job.state]} and has no content", status=404)
        for file in queue.files(job):
            if file.match(CONTENT[variant]):
                return FileResponse(file, filename=f"{name}{file.suffix}")
        raise BadRequest(f"{name} has no {variant}", status=404)

    @app.get("/v1/models")
    def listed_models() -> Told:
        about = {"object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [{"id": one, **about} for one in models]}


def _field_of(sentence: str, given: Told, options: Told) -> str | None:
    """Name the field of a request by an option that a sentence begins with; None for none."""
    found = re.match(r"-*(\w+)", sentence)
    option = found[1] if found else ""
    fields = (name for name in FIELDS.get(option, (option,)) if name in given)
    return next(fields, "gen_accel" if option in options else None)


def add_files(app: FastAPI, queue: Queue) -> None:
    """Serve the files that a job made at `/jobs/ID/NAME`, reports and films of trainings at
    `/trainings/PATH`, and no others.

    A link that leads elsewhere is not followed. `Guard` adds what keeps them from running.
    """

    @app.get("/jobs/{job}/{name:path}", include_in_schema=False)
    def file(job: str, name: str, download: bool = False) -> FileResponse:
        with suppress(KeyError, OSError, ValueError, RuntimeError):
            found = queue.job(job)
            path = (queue.place(found) / name).resolve()
            if path in queue.files(found):
                return answer(path, download)
        raise HTTPException(404, "there is no such file")

    @app.get("/trainings/{name:path}", include_in_schema=False)
    def of_training(name: str) -> FileResponse:
        with suppress(OSError, ValueError, RuntimeError):
            path = (queue.folder / name).resolve()
            inside = path.relative_to(queue.folder).parts
            hidden = UPLOADS in inside[:1] or any(part.startswith(".") for part in inside)
            if (
                (path.name == REPORT or path.suffix in MEDIA_TYPES)
                and not hidden
                and path.is_file()
            ):
                return answer(path)
        raise HTTPException(404, "there is no such file")

    def answer(path: Path, download: bool = False) -> FileResponse:
        kind = "text/html" if path.name == REPORT else MEDIA_TYPES.get(path.suffix)
        if kind is None or download:
            kind = kind or "application/octet-stream"
            return FileResponse(path, media_type=kind, filename=path.name)
        policy = {"Content-Security-Policy": SHOWN_MAY}
        return FileResponse(path, media_type=kind, headers=policy)
