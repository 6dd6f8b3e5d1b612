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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Message

from gen_accel.config import written
from gen_accel.demo import NAME
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.ui.files import UPLOADS
from gen_accel.ui.queue import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    WAITING,
    Queue,
    QueuedJob,
)
from gen_accel.ui.worker import Questions, Refused, Values, line_of

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
MOST = LARGEST * 3 // 2  # bytes of a body: a picture in base64, and the rest
CARD = "h100"  # that a request is checked for: no machine is measured
STOPPING = 90.0  # seconds that DELETE waits for a running job to end
# Files that a browser plays or shows; all others are attachments.
SHOWN = {
    **{".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".webp": "image/webp"},
    **{".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"},
}
# Report of a training: a page without scripts, with pictures in itself and films beside it.
REPORT = "report.html"
REPORTS_MAY = (
    "sandbox allow-same-origin; default-src 'none'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:"
)
_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,(.*)", re.DOTALL)

BAD = "invalid_request_error"
RULES = {
    "prompt": "the text of what to show",
    "model": "the name of a model",
    "size": "WIDTHxHEIGHT, as in 832x480",
    "seconds": "a number",
    "frames": "a number",
}

Told = Values  # JSON of a request or an answer
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


class VideoRequest(BaseModel):
    """Fields of a request, as JSON or a form has them."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(pattern=r"\S")
    model: str | None = None
    size: str | None = Field(None, pattern=r"^\d{1,5}x\d{1,5}$")
    seconds: float | None = Field(None, allow_inf_nan=False, le=1e6)
    frames: float | None = Field(None, allow_inf_nan=False)
    input_reference: object = None
    gen_accel: object = None

    @classmethod
    def read(cls, given: Told) -> "VideoRequest":
        try:
            return cls(**given)
        except ValidationError as error:
            fault = error.errors()[0]
        name = str(fault["loc"][0])
        if fault["type"] == "extra_forbidden":
            advice = "options of gen-accel generate go into gen_accel"
            raise BadRequest(f"there is no field {name!r}: {advice}", name)
        came = "nothing" if fault["type"] == "missing" else repr(fault["input"])
        raise BadRequest(f"{name} must be {RULES[name]}, got {came}", name)

    def options(self, models: Sequence[str]) -> Told:
        """Return the options of `generate`.

        Args:
            models: that may be named; the first is the default.
        """
        model = self.model or models[0]
        if model not in models:
            sentence = f"model must be one of {', '.join(models)}, got {model!r}"
            raise BadRequest(sentence, "model", status=404, code="model_not_found")
        options: Told = {"model": model, "prompt": [self.prompt], **self._more()}
        if self.size is not None:
            width, height = map(int, self.size.split("x"))
            options |= {"width": width, "height": height}
        if self.frames is not None:
            options["frames"] = int(self.frames)
        elif self.seconds is not None:  # the nearest number that all models make
            parts = self.seconds * (options.get("fps") or FPS) / LENGTHS
            options["frames"] = LENGTHS * max(1, round(parts)) + 1
        return options

    def _more(self) -> Told:
        """Check the options in the field `gen_accel`, which a form gives as text."""
        held, known = self.gen_accel, GenerateConfig.options()
        try:
            held = json.loads(held) if isinstance(held, str) else held
        except ValueError:
            raise BadRequest("gen_accel must be JSON", "gen_accel") from None
        held = {} if held is None else held
        if not isinstance(held, dict):
            raise BadRequest("gen_accel must hold options by name", "gen_accel")
        try:
            if wrong := [name for name in held if name in OWN]:
                raise ValueError(f"gen_accel: unknown field {wrong[0]!r}")
            read = GenerateConfig.read({"model": NAME, **held}, origin="gen_accel")
        except ValueError as error:
            raise BadRequest(str(error), "gen_accel") from error
        values = {x: written(getattr(read, known[x].attribute)) for x in held}
        return {name: value for name, value in values.items() if value is not None}


async def _fields(request: Request) -> tuple[Told, Picture | None]:
    """Read the fields of a request, and its picture; refuse a body that is too large."""
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
    counted = Request(request.scope, receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        form = await counted.form()
        file = form.get("input_reference")
        given: Told = {k: v for k, v in form.items() if k != "input_reference"}
        if file is None or isinstance(file, str):
            return given, None
        return given, _checked(Path(file.filename or "").suffix.lower(), await file.read())
    if kind != "application/json":
        sentence = "the body must be application/json or multipart/form-data"
        raise BadRequest(f"{sentence}, got {kind or 'neither'}", status=415)
    try:
        held = await counted.json()
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


def find(queue: Queue, name: str) -> QueuedJob:
    """Find the job of a video; raises BadRequest for an unknown one."""
    with suppress(KeyError):
        job = queue.job(name.removeprefix(PREFIX))
        if job.verb == "generate":
            return job
    raise BadRequest(f"there is no video {name!r}", "video_id", status=404)


def told(queue: Queue, job: QueuedJob) -> Told:
    """Write a job as an object `video`."""
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
        "error": {"code": job.state, "message": job.error} if job.error else None,
        "gen_accel": {
            "position": queue.position(job.id),
            "seconds_left": queue.left(job.id),
            "seconds_run": job.seconds,
            "notes": [*job.notes],
            "options": {k: v for k, v in options.items() if k not in ("out", "json")},
        },
    }


def add_videos(app: FastAPI, queue: Queue, questions: Questions, models: Sequence[str]) -> None:
    """Serve `/v1/videos` and `/v1/models`.

    Args:
        models: that a request may name; the first is the default.
    """

    @app.exception_handler(BadRequest)
    @app.exception_handler(Refused)
    @app.exception_handler(OSError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        is_ours = isinstance(error, OSError)
        held = {"message": str(error), "type": "server_error" if is_ours else BAD}
        held |= {name: getattr(error, name, None) for name in ("param", "code")}
        return JSONResponse({"error": held}, getattr(error, "status", 507 if is_ours else 400))

    def submit(given: Told, picture: Picture | None) -> QueuedJob:
        options = VideoRequest.read(given).options(models)
        with TemporaryDirectory(dir=queue.folder) as folder:
            files: dict[str, str] = {}
            if picture is not None:
                first = Path(folder, f"first{picture[0]}")
                first.write_bytes(picture[1])
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
                raise BadRequest(line_of(error)) from error

    @app.post("/v1/videos")
    async def create(request: Request) -> Told:
        given, picture = await _fields(request)
        return told(queue, await run_in_threadpool(submit, given, picture))

    @app.get("/v1/videos")
    def listed(after: str | None = None, limit: int = 20, order: str = "desc") -> Told:
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {order!r}", "order")
        if not 0 <= limit <= 100:
            raise BadRequest(f"limit must be 0 to 100, got {limit}", "limit")
        jobs = [job for job in queue.jobs() if job.verb == "generate"]
        jobs = jobs[::-1] if order == "desc" else jobs
        if after is not None:
            jobs = jobs[[job.id for job in jobs].index(find(queue, after).id) + 1 :]
        some = [told(queue, job) for job in jobs[:limit]]
        first, last = (some[0]["id"], some[-1]["id"]) if some else (None, None)
        ends = {"first_id": first, "last_id": last}
        return {"object": "list", "data": some, **ends, "has_more": len(jobs) > limit}

    @app.get("/v1/videos/{name}")
    def one(name: str) -> Told:
        return told(queue, find(queue, name))

    @app.delete("/v1/videos/{name}")
    def delete(name: str) -> Told:
        job = find(queue, name)
        if job.state == RUNNING:
            queue.cancel(job.id)
            with suppress(KeyError):  # another client removed it, which `find` says
                queue.wait(job.id, STOPPING)
            job = find(queue, name)
        queue.remove(job.id)
        gone = job.id not in {one.id for one in queue.jobs()}
        return {"id": PREFIX + job.id, "object": "video.deleted", "deleted": gone}

    @app.get("/v1/videos/{name}/content")
    def content(name: str, variant: str = "video") -> FileResponse:
        job = find(queue, name)
        if variant not in CONTENT:
            raise BadRequest(f"variant must be {' or '.join(CONTENT)}, got {variant!r}", "variant")
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
            if (path.name == REPORT or path.suffix in SHOWN) and not hidden and path.is_file():
                return answer(path)
        raise HTTPException(404, "there is no such file")

    def answer(path: Path, download: bool = False) -> FileResponse:
        kind = SHOWN.get(path.suffix)
        if path.name == REPORT and not download:
            policy = {"Content-Security-Policy": REPORTS_MAY}
            return FileResponse(path, media_type="text/html", headers=policy)
        named = None if kind and not download else path.name
        return FileResponse(path, media_type=kind or "application/octet-stream", filename=named)
