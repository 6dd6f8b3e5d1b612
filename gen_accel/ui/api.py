"""HTTP of a server: videos in the shape of OpenAI's API, and files of jobs and trainings.

Fields and states of videos are those of
https://developers.openai.com/api/reference/resources/videos. Unlike there, `model` is one that the
server was started with, any size and length that it makes is taken, and `gen_accel` has what else
is known of a job. A job that was stopped is `cancelled`. DELETE also stops a job that runs.
`/v1/videos/sync` is vLLM-Omni's: it answers with the video.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from anyio import CapacityLimiter, move_on_after, sleep
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from gen_accel.demo import NAME, path
from gen_accel.measure.report import MEDIA_TYPES
from gen_accel.parsing import fits, shown
from gen_accel.paths import preview_of
from gen_accel.served import RUNS, row_of
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
    film_of,
)
from gen_accel.ui.request import BadRequest, Intake, VideoRequest
from gen_accel.ui.thumbnails import sheet, still
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
FPS = 16.0  # frames a second where nobody says them
SIZES = ("height", "width", "frames", "fps")
# Variants of a video, as OpenAI has them: what draws one, and its suffix.
PICTURES = {"thumbnail": (still, ".webp"), "spritesheet": (sheet, ".jpg")}
VARIANTS = ("video", *PICTURES)
CARD = "h100"  # that a request is checked for: no machine is measured
STOPPING = 90.0  # seconds that DELETE waits for a running job to end
WAITS = 3600.0  # seconds that `/v1/videos/sync` waits for a video
LOOK = 0.2  # seconds between two looks at a job that somebody waits for
# Report of a training: a page without scripts, with pictures in itself and films beside it.
REPORT = "report.html"
# What a report may show, and a film that a browser opens by itself: it asks for the film again.
SHOWN_MAY = (
    "sandbox allow-same-origin; default-src 'none'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:"
)

Told = Values  # JSON of a request or an answer


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
    size = _run_of(job) | {name: options[name] for name in SIZES if options.get(name)}
    height, width, frames, fps = map(size.get, SIZES)
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
        "seconds": f"{(frames - 1) / (fps or FPS):g}" if frames else None,
        "remixed_from_video_id": None,
        "error": {"code": job.state, "message": within(job.error)} if job.error else None,
        "url": f"/v1/videos/{PREFIX}{job.id}/content" if job.state == DONE else None,
        "gen_accel": {
            "user": job.about.get("user"),
            "position": ahead.before,
            "seconds_left": ahead.left,
            "seconds_run": job.seconds,
            "notes": within(job.notes),
            "options": {k: within(v) for k, v in options.items() if k not in ("out", "json")},
        },
    }


def _run_of(job: QueuedJob) -> dict[str, float]:
    """Sizes of a job by the plan that it was checked by, or else by its model's name."""
    run = job.about.get("run")
    if isinstance(run, dict) and all(fits(run.get(name), float) for name in SIZES):
        return run
    name = str(job.options.get("model"))
    row = row_of(name)
    known = RUNS.get(name if row is None else row.published)
    return {} if known is None else known._asdict()


def add_videos(app: FastAPI, queue: Queue, questions: Questions, models: Sequence[str]) -> None:
    """Serve `/v1/videos` and `/v1/models`.

    Args:
        models: that a request may name; the first is the default.
    """

    intake, drawing = Intake(), CapacityLimiter(1)

    @app.exception_handler(BadRequest)
    async def refused(request: Request, error: BadRequest) -> Response:
        return error.answer()

    @app.exception_handler(OSError)
    async def failed(request: Request, error: OSError) -> Response:
        return await refused(request, BadRequest(error.strerror or str(error), status=507))

    @app.exception_handler(AnyHTTPException)
    async def no_such(request: Request, error: AnyHTTPException) -> Response:
        sentence = error.detail
        if error.status_code == 404 and sentence == "Not Found":  # no route
            there = "videos are at /v1/videos, models at /v1/models"
            sentence = f"this server has no {shown(request.url.path)}: {there}"
        answer = await refused(request, BadRequest(sentence, status=error.status_code))
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

    def submit(asked: VideoRequest) -> QueuedJob:
        picture = asked.picture
        files = {} if picture is None else {"image": str(picture.file)}
        try:
            options = asked.options(models)
            [plan] = questions.ask("generate", {**options, **files, "plan": True, "gpu": CARD})
            run = {name: plan["num_frames" if name == "frames" else name] for name in SIZES}
            return queue.submit(
                "generate",
                {**options, "out": "{job}/video.mp4", "json": "{job}/result.json"},
                title=options["prompt"][0],
                kind="generate",
                about={"by": "http", "user": asked.user, "run": run},
                given=files,
            )
        except ValueError as error:
            sentence = line_of(error).replace(str(path()), NAME)
            if picture is not None:
                sentence = sentence.replace(files["image"], picture.name)
            raise BadRequest(sentence, asked.param_of(sentence)) from error

    async def queued(request: Request) -> QueuedJob:
        with TemporaryDirectory(dir=queue.folder) as folder:
            async with intake.read(request, Path(folder)) as asked:
                return await intake.check(lambda: submit(asked))

    def film(job: QueuedJob) -> Path:
        name = PREFIX + job.id
        if job.state != DONE:
            raise BadRequest(f"{name} is {STATUS[job.state]} and has no content", status=404)
        for file in queue.files(job):
            if file.suffix == ".mp4":
                return file
        raise BadRequest(f"{name} has no video any more", status=404)

    @app.post("/v1/videos")
    async def create(request: Request) -> Told:
        return told(queue, await queued(request))[0]

    @app.post("/v1/videos/sync")
    async def at_once(request: Request) -> Response:
        """Answer with a video when it is done. A client that leaves ends the waiting alone."""
        job, is_here = await queued(request), True
        name = PREFIX + job.id
        about = {"X-Request-Id": name, "Location": f"/v1/videos/{name}"}
        with move_on_after(WAITS):
            while job.is_live and is_here:
                await sleep(LOOK)
                is_here = not await request.is_disconnected()
                job = find(queue, name)
        if job.state == DONE:
            about["X-Inference-Time-S"] = f"{job.seconds:.3f}"
            file = await run_in_threadpool(film, job)
            return FileResponse(file, filename=f"{name}.mp4", headers=about)
        about["X-Should-Retry"] = "false"  # which OpenAI's client would do, by a job more
        if not job.is_live:
            sentence = f"{name} is {STATUS[job.state]}: {job.error}".removesuffix(": ")
            raise BadRequest(sentence, status=422, code=job.state, headers=about)
        if not is_here:
            queue.note(job.id, "whoever waited for it over HTTP has left; it goes on")
        sentence = f"{name} is {STATUS[job.state]} after {WAITS:g} s and goes on"
        where = f"GET /v1/videos/{name} says how far it is"
        raise BadRequest(f"{sentence}: {where}", status=504, headers=about)

    @app.post("/v1/videos/{name:path}")
    def others(name: str) -> None:
        """Refuse what OpenAI makes from a video: remix, edits, extensions, characters."""
        sentence = (
            f"this server has no {shown(f'/v1/videos/{name}')}: it makes no video of another"
        )
        raise BadRequest(f"{sentence}; ask /v1/videos by the options of that one", status=404)

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
    async def content(name: str, variant: str = "video") -> Response:
        file = await run_in_threadpool(film, find(queue, name))
        if variant not in VARIANTS:
            sentence = f"variant must be one of {', '.join(VARIANTS)}, got {shown(variant)}"
            raise BadRequest(sentence, "variant")
        if variant not in PICTURES:
            return FileResponse(file, filename=f"{name}{file.suffix}")
        draw, suffix = PICTURES[variant]
        picture = await run_sync(draw, file, limiter=drawing)
        return Response(picture, media_type=MEDIA_TYPES[suffix])

    @app.get("/v1/models")
    def listed_models() -> Told:
        about = {"object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [{"id": one, **about} for one in models]}


def add_files(app: FastAPI, queue: Queue) -> None:
    """Serve the files that a job made at `/jobs/ID/NAME`, reports and films of trainings at
    `/trainings/PATH`, and no others.

    The preview of a job whose end removed it is empty, not an error: a page may ask meanwhile; so
    is the film of a stream that is whole. A link that leads elsewhere is not followed. `Guard`
    adds what keeps them from running.
    """

    @app.get("/jobs/{job}/{name:path}", include_in_schema=False)
    def file(job: str, name: str, download: bool = False) -> Response:
        with suppress(KeyError, OSError, ValueError, RuntimeError):
            found = queue.job(job)
            path = (queue.place(found) / name).resolve()
            if path in queue.files(found):
                return answer(path, download)
            gone = preview_of(Path(str(found.options.get("out"))))
            if path == gone or path == film_of(queue.place(found)):
                return Response(status_code=204)  # a page has not heard of the end yet
        raise HTTPException(404, "there is no such file")

    @app.get("/trainings/{name:path}", include_in_schema=False)
    def of_training(name: str) -> Response:
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

    def answer(path: Path, download: bool = False) -> Response:
        kind = "text/html" if path.name == REPORT else MEDIA_TYPES.get(path.suffix)
        if kind is None or download:
            kind = kind or "application/octet-stream"
            return FileResponse(path, media_type=kind, filename=path.name)
        policy = {"Content-Security-Policy": SHOWN_MAY}
        if not kind.startswith("video/"):  # may be replaced by a longer one meanwhile
            return Response(path.read_bytes(), media_type=kind, headers=policy)
        return FileResponse(path, media_type=kind, headers=policy)
