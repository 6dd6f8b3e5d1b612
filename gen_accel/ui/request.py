"""A request for a video: its body, bounded in bytes and time, and its fields.

Fields are those of https://developers.openai.com/api/reference/resources/videos and all options of
`generate`, also by the names that FastVideo and vLLM-Omni have for them. They stand at the top, or
in a field of `BLOCKS`: in JSON as an object, in a form as its text or as `gen_accel[steps]`, which
is what OpenAI's client makes of `extra_body`.
"""

import base64
import binascii
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from threading import BoundedSemaphore
from typing import Literal, NamedTuple, TypeVar

from anyio import CapacityLimiter, fail_after
from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message

from gen_accel.demo import NAME
from gen_accel.parsing import shown
from gen_accel.paths import model_named
from gen_accel.pipelines.generation.config import LONGEST, GenerateConfig
from gen_accel.registry import nearest_to
from gen_accel.ui.worker import Values, line_of

# Fields that hold others: our own, FastVideo's, and that of both.
BLOCKS = ("gen_accel", "extra_body", "video_params")
# What FastVideo and vLLM-Omni call a field or an option.
ALIASES = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "max_sequence_length": "max_tokens",
    "num_outputs_per_prompt": "n",
    "image_reference": "input_reference",
}
# Options of `generate` that are fields of a request, or the server's own.
OWN = (
    *("model", "prompt", "out", "json", "prompts", "overwrite"),
    *("save_latents", "from_latents", "compare", "timed", "metrics"),
    *("ray", "ray_workers", "settings", "seconds", "stream", "resume", "zones"),
)
OPTIONS = tuple(name for name in GenerateConfig.options() if name not in OWN)
LARGEST = 64 << 20  # bytes of a picture
MOST, MOST_JSON = LARGEST * 3 // 2, 16 << 20  # bytes of a body: of a form, of JSON
MOST_HELD = 1 << 30  # bytes of all bodies at one time, on the disk
IN_MEMORY, PART = 1 << 16, 1 << 20  # bytes of a body that are in memory: while it comes, is read
SLOWEST = 300.0  # seconds that a body may take to come
MOST_OPTIONS = 1 << 17  # characters of a field of `BLOCKS`, as JSON, or of an option
MOST_USER = 256  # characters
CHECKS = 16  # requests that wait for their check at one time, or are checked
TRY_AGAIN = 5  # seconds that whoever finds the server busy is asked to wait
JSON, FORM = KINDS = ("application/json", "multipart/form-data")
PICTURE = "input_reference"
_URL = re.compile(r"data:image/(png|jpeg|webp);base64,(.*)", re.DOTALL)
_INNER = re.compile(r"([^][]+)\[([^][]+)\]")

RULES = {
    "prompt": "the text of what to show",
    "model": "the name of a model",
    "size": "WIDTHxHEIGHT, as in 832x480",
    "seconds": f"a number above 0 and at most {LONGEST:g}",
    "n": "1, as a request makes one video",
    "user": f"text of at most {MOST_USER} characters",
    "response_format": "url: /v1/videos/ID/content has the video, /v1/videos/sync answers with it",
}
Answer = TypeVar("Answer")
Fields = list[tuple[str, object]]  # of a request, by name


class Picture(NamedTuple):
    """A file of a request: its name there, and where it lies."""

    name: str
    file: Path


class BadRequest(Exception):
    """Error that a client is told.

    Args:
        param: the field of the request that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def answer(self) -> Response:
        """Answer in the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        held = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        told = json.dumps({"error": held})  # in ASCII: a client may send half a character
        return Response(told, self.status, self.headers, "application/json")


class VideoRequest(BaseModel):
    """Fields of a request that are no options of `generate`.

    Args:
        n, response_format: may be said, and have one value.
        user: whatever the client knows its user by, which answers repeat.
    """

    prompt: str = Field(pattern=r"\S")
    model: str | None = None
    size: str | None = Field(None, pattern=r"^\d{1,5}x\d{1,5}$")
    seconds: float | None = Field(None, allow_inf_nan=False, gt=0, le=LONGEST)
    n: int = Field(1, ge=1, le=1)
    user: str | None = Field(None, max_length=MOST_USER)
    response_format: Literal["url"] | None = None
    input_reference: object = None
    _options: Values = PrivateAttr(default_factory=dict)
    _params: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("seconds", "n", mode="before")
    @classmethod
    def _is_number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(value)
        return value

    @classmethod
    def read(cls, given: Fields, folder: Path) -> "VideoRequest":
        """Read fields by name, of which some may come twice.

        Args:
            folder: a picture that is a data URL is written there.
        """
        fields, options, params = Values(), Values(), dict[str, str]()
        for param, told, value in _spread(given):
            name = ALIASES.get(told, told.replace("-", "_"))
            if name in cls.model_fields:
                read = {name: value}
            elif name in OPTIONS:
                _check_length(param, value)
                read = _read(param, {name: value})
            else:
                known = (*cls.model_fields, *OPTIONS, *BLOCKS, *ALIASES)
                hint = nearest_to(told, known)
                raise BadRequest(f"there is no field {shown(told)}{hint}", param[:100])
            _put(fields if name in cls.model_fields else options, read, param)
            params[name] = param
        try:
            found = cls.model_validate(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            name = str(fault["loc"][0])
            came = "nothing" if fault["type"] == "missing" else shown(fault["input"])
            sentence = f"{name} must be {RULES[name]}, got {came}"
            raise BadRequest(sentence, params.get(name, name)) from None
        found._options, found._params = options, params
        found.input_reference = _picture(found.input_reference, folder)
        return found

    def options(self, models: Sequence[str]) -> Values:
        """Return the options of `generate`.

        Args:
            models: that may be named; the first is the default.
        """
        model = self.model or models[0]
        known = {model_named(one): one for one in reversed(models)}
        model = known.get(model_named(model), model)
        if model not in models:
            sentence = f"model must be one of {', '.join(models)}, got {shown(model)}"
            raise BadRequest(sentence, "model", status=404, code="model_not_found")
        options = {"model": model, **_read("prompt", {"prompt": self.prompt}), **self._options}
        if self.size is not None:
            width, height = map(int, self.size.split("x"))
            _put(options, _read("size", {"width": width, "height": height}, origin="size"), "size")
            self._params |= {"width": "size", "height": "size"}
        if self.seconds is not None and "frames" not in options:
            options["seconds"] = self.seconds
        return options

    @property
    def picture(self) -> Picture | None:
        """First frame of the video."""
        return self.input_reference if isinstance(self.input_reference, Picture) else None

    def param_of(self, sentence: str) -> str | None:
        """Name the field that gave the option which a sentence begins with; None for none."""
        found = re.match(r"-*(\w+)", sentence)
        return None if found is None else self._params.get(found[1].replace("-", "_"))


def _spread(given: Fields) -> Iterator[tuple[str, str, object]]:
    """Yield the fields of a request that are not None: where each stands, its name and its value.

    Those in `BLOCKS` stand in one of these.
    """
    for name, value in given:
        if inner := _INNER.fullmatch(name):
            name, value = inner[1], {inner[2]: value}
            found = value if name in BLOCKS else {name: value}
        else:
            found = _block(name, value) if name in BLOCKS else {name: value}
        for told, one in found.items():
            if one is not None:
                yield name, told, one


def _block(name: str, held: object) -> Mapping[str, object]:
    """Read fields from one of `BLOCKS`, which a form gives as text."""
    text = held if isinstance(held, str) else json.dumps(held)
    _check_length(name, text)
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest(f"{name} must be JSON", name) from None
    held = {} if held is None else held
    if not isinstance(held, dict):
        raise BadRequest(f"{name} must hold fields by name", name)
    return held


def _check_length(name: str, value: object) -> None:
    if isinstance(value, str) and len(value) > MOST_OPTIONS:
        raise BadRequest(f"{name} has over {MOST_OPTIONS} characters", name)


def _put(held: Values, read: Mapping[str, object], param: str) -> None:
    """Add values by name, none of which may be there already with another value."""
    for name, value in read.items():
        if name in held and held[name] != value:
            sentence = f"{name} is given twice, as {shown(held[name])} and {shown(value)}"
            raise BadRequest(f"{sentence}: leave one out", param)
        held[name] = value


def _read(param: str, given: Mapping[str, object], *, origin: str = "") -> Values:
    """Read options of `generate` from a field of a request, without those that are None."""
    try:
        read = GenerateConfig.read({"model": NAME, **given}, origin=origin)
    except ValueError as error:
        raise BadRequest(line_of(error), param) from error
    values = read.values()
    return {name: values[name] for name in given if values[name] is not None}


class Intake:
    """Requests for a video while they are read and checked.

    A body lies on the disk until all of it has come, however slowly; then one after the other is
    read. Checks wait for each other in threads of their own, so that no other request waits for
    one.
    """

    def __init__(self) -> None:
        self._held, self._checks = 0, BoundedSemaphore(CHECKS)
        self._turn = CapacityLimiter(1)

    @asynccontextmanager
    async def read(self, request: Request, folder: Path) -> AsyncIterator[VideoRequest]:
        """Read a request, whose bytes count until the context ends.

        Args:
            folder: for the body, and for a picture.

        Raises:
            BadRequest: a body that is too large, too slow or of another kind, and what
                `VideoRequest.read` refuses.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in KINDS:
            sentence = f"the body must be {' or '.join(KINDS)}"
            raise BadRequest(f"{sentence}, got {kind[:100] or 'neither'}", status=415)
        came, most = 0, MOST_JSON if kind == JSON else MOST

        def check(size: int) -> None:
            if size > most:
                raise BadRequest(f"the body has over {most >> 20} MiB", status=413)

        said = request.headers.get("content-length", "")
        check(int(said) if said.isdecimal() else 0)
        try:
            with SpooledTemporaryFile(IN_MEMORY, dir=str(folder)) as file:
                whole = UploadFile(file)  # pyright: ignore
                try:
                    with fail_after(SLOWEST):
                        async for part in request.stream():
                            came, self._held = came + len(part), self._held + len(part)
                            check(came)
                            if self._held > MOST_HELD:
                                raise self._busy()
                            await whole.write(part)
                except TimeoutError:
                    sentence = f"the body took longer than {SLOWEST:g} s"
                    raise BadRequest(sentence, status=408) from None
                await whole.seek(0)
                async with self._turn:
                    asked = await _read_whole(request, kind, whole, folder)
            yield asked
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
        again = {"Retry-After": str(TRY_AGAIN)}
        return BadRequest(sentence, status=503, code="busy", headers=again)


async def _read_whole(
    request: Request, kind: str, whole: UploadFile, folder: Path
) -> VideoRequest:
    """Read a body, of the media type `kind`, that has come."""

    async def receive() -> Message:
        part = await whole.read(PART)
        return {"type": "http.request", "body": part, "more_body": bool(part)}

    if kind == JSON:
        given = await run_sync(_of_json, await whole.read())
    else:
        again = Request(request.scope, receive)
        async with again.form(max_files=1, max_part_size=MOST_JSON) as form:
            given = await run_sync(_of_form, form, folder)
    return await run_sync(VideoRequest.read, given, folder)


def _of_form(form: FormData, folder: Path) -> Fields:
    """Read the fields of a form. A list is what it has twice, or by a name that ends with []."""
    found = list[tuple[str, object]]()
    for name in dict.fromkeys(form):
        values = [
            value if isinstance(value, str) else _stored(value, folder)
            for value in form.getlist(name)
        ]
        is_one = len(values) == 1 and not name.endswith("[]")
        found.append((name.removesuffix("[]"), values[0] if is_one else values))
    return found


def _of_json(text: bytes) -> Fields:
    if sum(map(text.count, (b"[", b"{", b","))) > MOST_OPTIONS:  # seconds to parse
        raise BadRequest(f"the body has over {MOST_OPTIONS} values", status=413)
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(held, dict):
        raise BadRequest("the body must be a JSON object")
    return [*held.items()]


def _stored(value: UploadFile, folder: Path) -> Picture:
    """Write a file of a form into a folder."""
    name = Path(value.filename or "").name
    place = _place(name, Path(name).suffix.lower(), value.size or 0, folder)
    with place.open("wb") as file:
        shutil.copyfileobj(value.file, file)
    return Picture(name, place)


def _picture(reference: object, folder: Path) -> Picture | None:
    """Write a picture that may be a data URL into a folder; None for none."""
    if reference is None or isinstance(reference, Picture):
        return reference
    url = reference.get("image_url") if isinstance(reference, dict) else reference
    found = _URL.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise BadRequest(
            f"{PICTURE} must be a file of a form, or a data URL of a PNG, JPEG or WebP: this "
            "server fetches nothing",
            PICTURE,
        )
    try:
        data = base64.b64decode(found[2], validate=True)
    except binascii.Error:
        raise BadRequest(f"{PICTURE} is no base64", PICTURE) from None
    place = _place(PICTURE, f".{found[1]}", len(data), folder)
    place.write_bytes(data)
    return Picture(PICTURE, place)


def _place(name: str, suffix: str, size: int, folder: Path) -> Path:
    """Return where a picture goes, if it is one to take."""
    if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BadRequest(f"{PICTURE} must be a PNG, JPEG or WebP, got {shown(name)}", PICTURE)
    if size > LARGEST:
        sentence = f"{PICTURE} has {size >> 20} MiB, at most {LARGEST >> 20} are taken"
        raise BadRequest(sentence, PICTURE, status=413)
    return folder / f"first{suffix}"
