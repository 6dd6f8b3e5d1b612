"""Videos over HTTP, in the shape of OpenAI's API for videos, on the same queue as the page.

Fields and states are those of https://developers.openai.com/api/reference/resources/videos. Unlike
there, `model` is one that the server was started with, any size and length that it makes is
taken, and `gen_accel` holds further options by the names that `gen-accel generate --config` has. A
job that was stopped is `cancelled`. DELETE also stops a job that runs.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import Message

from gen_accel.config_files import checked
from gen_accel.ui.jobs import DONE, FAILED, INTERRUPTED, RUNNING, STOPPED, WAITING, Job
from gen_accel.ui.questions import Questions, Refused, line_of
from gen_accel.ui.queue import Queue
from gen_accel.ui.verbs import fields

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
    *("model", "prompt", "height", "width", "out", "json", "prompts", "plan", "gpu"),
    *("overwrite", "save_latents", "from_latents", "compare", "timed", "metrics"),
    *("ray", "ray_workers", "settings"),
)
LARGEST = 64 << 20  # bytes of a picture
MOST = LARGEST * 3 // 2  # bytes of a body: a picture in base64, and the rest
CARD = "h100"  # that a request is checked for: no machine is measured
STOPPING = 90.0  # seconds that DELETE waits for a running job to end
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,(.*)", re.DOTALL)


class BadRequest(Exception):
    """Error that a client is told.

    Args:
        param: the field of the request that is wrong.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Videos:
    """The interface.

    Args:
        models: that a request may name; the first is taken where it names none.
    """

    def __init__(self, queue: Queue, questions: Questions, models: tuple[str, ...]) -> None:
        self.queue, self.questions, self.models = queue, questions, models

    def create(self, given: Mapping[str, Any], picture: tuple[str, bytes] | None) -> Job:
        """Queue a video; raises BadRequest.

        Args:
            given: fields of the request.
            picture: suffix and bytes of a first frame.
        """
        options = self._options(given)
        with TemporaryDirectory(dir=self.queue.store.folder) as folder:
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

    def find(self, name: str) -> Job:
        """Find a job by its id; raises BadRequest where there is none."""
        try:
            job = self.queue.job(name.removeprefix(PREFIX))
        except KeyError:
            job = None
        if job is None or job.verb != "generate":
            raise BadRequest(f"there is no video {name!r}", status=404, param="video_id")
        return job

    def list(self, after: str | None, limit: int, order: str) -> dict[str, Any]:
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {order!r}", param="order")
        if not 0 <= limit <= 100:
            raise BadRequest(f"limit must be 0 to 100, got {limit}", param="limit")
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

    def delete(self, name: str) -> dict[str, Any]:
        """Stop a job where it runs, and remove it with its files."""
        job = self.find(name)
        if job.state == RUNNING:
            self.queue.cancel(job.id)
            with suppress(KeyError):  # another client removed it, which `find` says
                self.queue.wait(job.id, STOPPING)
            job = self.find(name)
        self.queue.remove(job.id)
        return {
            "id": PREFIX + job.id,
            "object": "video.deleted",
            "deleted": job.id not in {one.id for one in self.queue.jobs()},
        }

    def content(self, name: str, variant: str) -> Path:
        """Path of the video, or of its last preview as `thumbnail`."""
        job = self.find(name)
        patterns = {"video": "*.mp4", "thumbnail": "*.preview.png"}
        if variant not in patterns:
            known = " or ".join(patterns)
            raise BadRequest(f"variant must be {known}, got {variant!r}", param="variant")
        if job.state != DONE:
            raise BadRequest(f"{name} is {STATUS[job.state]} and has no content", status=404)
        files = self.queue.store.files(job)
        found = next((file for file in files if file.match(patterns[variant])), None)
        if found is None:
            raise BadRequest(f"{name} has no {variant}", status=404)
        return found

    def told(self, job: Job) -> dict[str, Any]:
        """Write a job as an object `video`."""
        options, share = job.options, job.progress.share or 0.0
        height, width, frames = (options.get(name) for name in ("height", "width", "frames"))
        fps = options.get("fps") or FPS
        failed = {"code": job.state, "message": job.error} if job.error else None
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
            "error": failed,
            "gen_accel": {
                "position": self.queue.position(job.id),
                "seconds_left": self.queue.left(job.id),
                "seconds_run": job.seconds,
                "notes": [*job.notes],
                "options": {k: v for k, v in options.items() if k not in ("out", "json")},
            },
        }

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a request as options of `generate`."""
        known = ("model", "prompt", "size", "seconds", "frames", "input_reference", "gen_accel")
        if unknown := [name for name in given if name not in known]:
            raise BadRequest(
                f"there is no field {unknown[0]!r}: options of gen-accel generate go into "
                "gen_accel",
                param=unknown[0],
            )
        model = given.get("model") or self.models[0]
        if model not in self.models:
            raise BadRequest(
                f"model must be one of {', '.join(self.models)}, got {model!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        prompt = given.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadRequest("prompt must be the text of what to show", param="prompt")
        more = _more(given.get("gen_accel"))
        options: dict[str, Any] = {"model": model, "prompt": [prompt], **more}
        if (size := given.get("size")) is not None:
            found = _SIZE.fullmatch(str(size))
            if found is None:
                raise BadRequest(
                    f"size must be WIDTHxHEIGHT, as in 832x480, got {size!r}", param="size"
                )
            options |= {"width": int(found[1]), "height": int(found[2])}
        frames = _frames(given, options)
        return options if frames is None else {**options, "frames": frames}


def _more(held: Any) -> dict[str, Any]:
    """Check the options in the field `gen_accel`, which a form gives as text."""
    if isinstance(held, str):
        try:
            held = json.loads(held)
        except ValueError:
            raise BadRequest("gen_accel must be JSON", param="gen_accel") from None
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise BadRequest("gen_accel must hold options by name", param="gen_accel")
    allowed = {name: field for name, field in fields("generate").items() if name not in OWN}
    try:
        found = checked([*allowed.values()], held, extra="cli", origin="gen_accel")
    except ValueError as error:
        raise BadRequest(str(error), param="gen_accel") from error
    return {name: value for name, value in found.items() if value is not None}


def _frames(given: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    """Number of frames of a request; of seconds, the nearest that all models make."""
    frames, seconds = given.get("frames"), given.get("seconds")
    try:
        if frames is not None:
            return int(frames)
        if seconds is None:
            return None
        exact = float(seconds) * (options.get("fps") or FPS)
        return LENGTHS * max(1, round(exact / LENGTHS)) + 1
    except (TypeError, ValueError, OverflowError):
        name = "seconds" if frames is None else "frames"
        raise BadRequest(f"{name} must be a number, got {given[name]!r}", param=name) from None


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


async def _fields(request: Request) -> tuple[dict[str, Any], tuple[str, bytes] | None]:
    """Read the fields of a request, and its picture."""
    request = _limited(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        form = await request.form()
        file = form.get("input_reference")
        given: dict[str, Any] = {k: v for k, v in form.items() if k != "input_reference"}
        if file is None or isinstance(file, str):
            return given, None
        return given, _checked(Path(file.filename or "").suffix.lower(), await file.read())
    if kind != "application/json":
        raise BadRequest(
            f"the body must be application/json or multipart/form-data, got {kind or 'neither'}",
            status=415,
        )
    try:
        held = await request.json()
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(held, dict):
        raise BadRequest("the body must be a JSON object")
    reference = held.get("input_reference")
    return held, None if reference is None else _picture(reference)


def _picture(reference: Any) -> tuple[str, bytes]:
    """Decode a picture that a request holds as a data URL."""
    url = reference.get("image_url") if isinstance(reference, dict) else reference
    found = _PICTURE.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise BadRequest(
            "input_reference must be a file of a form, or a data URL of a PNG, JPEG or WebP: this "
            "server fetches nothing",
            param="input_reference",
        )
    try:
        return _checked(f".{found[1]}", base64.b64decode(found[2], validate=True))
    except binascii.Error:
        raise BadRequest("input_reference is no base64", param="input_reference") from None


def _checked(suffix: str, data: bytes) -> tuple[str, bytes]:
    if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BadRequest(
            f"input_reference must be a PNG, JPEG or WebP, got {suffix or 'no suffix'}",
            param="input_reference",
        )
    if len(data) > LARGEST:
        raise BadRequest(
            f"input_reference has {len(data) >> 20} MiB, at most {LARGEST >> 20} are taken",
            status=413,
            param="input_reference",
        )
    return suffix, data


def add_videos(app: FastAPI, videos: Videos) -> None:
    """Serve `/v1/videos` and `/v1/models`."""

    @app.exception_handler(BadRequest)
    async def refused(request: Request, error: BadRequest) -> JSONResponse:
        return _error(str(error), error.status, param=error.param, code=error.code)

    @app.exception_handler(Refused)
    async def sentence(request: Request, error: Refused) -> JSONResponse:
        return _error(str(error), 400)

    @app.exception_handler(OSError)
    async def no_room(request: Request, error: OSError) -> JSONResponse:
        return _error(str(error), 507, kind="server_error")

    @app.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        given, picture = await _fields(request)
        job = await run_in_threadpool(videos.create, given, picture)
        return videos.told(job)

    @app.get("/v1/videos")
    def listed(after: str | None = None, limit: int = 20, order: str = "desc") -> dict[str, Any]:
        return videos.list(after, limit, order)

    @app.get("/v1/videos/{name}")
    def one(name: str) -> dict[str, Any]:
        return videos.told(videos.find(name))

    @app.delete("/v1/videos/{name}")
    def delete(name: str) -> dict[str, Any]:
        return videos.delete(name)

    @app.get("/v1/videos/{name}/content")
    def content(name: str, variant: str = "video") -> FileResponse:
        path = videos.content(name, variant)
        return FileResponse(path, filename=f"{name}{path.suffix}")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        data = [
            {"id": model, "object": "model", "created": 0, "owned_by": "local"}
            for model in videos.models
        ]
        return {"object": "list", "data": data}


def _error(
    message: str,
    status: int,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    held = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": held}, status)
