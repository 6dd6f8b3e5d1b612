"""Guard in front of a server: who may ask it, how much, and what a browser may do with answers."""

import asyncio
import base64
import hashlib
import hmac
import os
import re
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from secrets import token_bytes, token_hex, token_urlsafe
from urllib.parse import parse_qs, urlsplit

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gen_accel.io import distrust
from gen_accel.paths import expanded
from gen_accel.registry import LOOPBACK
from gen_accel.ui.request import BadRequest

TUNNEL = ".gradio.live"  # names of --share
GRADIO, FILE, UPLOAD = "/gradio_api/", "/gradio_api/file", "/gradio_api/upload"
API = "/v1/"
# What no screen asks for: files from other servers, which gradio has at an older address too,
# links that keep what a page shows, and recordings of the browser's screen.
UNUSED = (
    *(f"{FILE}=http:", f"{FILE}=https:", f"{FILE}/"),
    *(f"{GRADIO}{one}" for one in ("proxy", "deep_link", "process_recording")),
    *(f"{GRADIO}{one}" for one in ("run-history", "vibe")),
)
# Answers that are no page. A browser that opens one as a page gives it no script, no cookie of
# this server and nothing of another.
NO_PAGES = (GRADIO, API, "/jobs/", "/trainings/")
SANDBOX = "sandbox; default-src 'none'"
LOGIN = "/login"
LOGIN_MAY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
LEAST = 8  # characters of a password
MOST_LINE = 1024  # bytes of a password; a browser may send four times that to log in
# A hash in the place of a password: its cost N, its salt, and its digits; a guess takes N KiB.
HASH = re.compile(r"scrypt:(16384|32768|65536|131072):8:1\$([!-~]+)\$([0-9a-f]{128})")
DELAY = 1.0  # seconds that a wrong guess takes, one guess at a time
MOST_GUESSES = 8  # of one address that wait
STAYS = 43200.0  # seconds that a browser or client that gave the password is known for
MOST_KNOWN = 1000  # of them, the newest


class Password:
    """A name and a password, and who gave them.

    A browser gives them on a page and gets a cookie. Other clients send them as HTTP Basic, or the
    password alone as `Authorization: Bearer`, where clients of OpenAI's API have their key.

    Args:
        user: name.
        secret: password, or its hash in the form of Werkzeug: `scrypt:16384:8:1$SALT$` and 128
            hexadecimal digits.

    Raises:
        ValueError: a hash of another form.
    """

    def __init__(self, user: str, secret: str) -> None:
        self.user, self.cookie = user, f"gen-accel-{token_hex(4)}"  # a name for each server
        self._key = token_bytes(16)
        self._cost, self._salt = 2**14, token_bytes(16)
        if not secret.startswith("scrypt:"):
            self._right = self._slow(secret)
        elif found := HASH.fullmatch(secret):
            self._cost, self._salt = int(found[1]), found[2].encode()
            self._right = bytes.fromhex(found[3])
        else:
            raise ValueError(
                "a line with scrypt: must be scrypt:N:8:1$SALT$HASH, with N of 16384 to 131072, a "
                "power of 2, and HASH of 128 hexadecimal digits"
            )
        self._known: dict[bytes, float] = {}  # until when, by the digest of a cookie or header
        self._turn, self._waiting = asyncio.Lock(), Counter[str]()  # by the address that asks

    @classmethod
    def read(cls, given: str) -> "Password":
        """Read USER:FILE, of which the first line of FILE is the password or its hash.

        Raises:
            OSError: the file cannot be read.
            ValueError: another form, a file that others can read or write, or a short password.
        """
        user, _, name = given.partition(":")
        if not user or not name:
            raise ValueError(f"--auth must be USER:FILE, got {given!r}")
        path = expanded(name)
        if not path.is_file():
            raise FileNotFoundError(f"--auth: there is no file at {path}")
        with path.open("rb") as file:
            about, line = os.fstat(file.fileno()), file.readline(MOST_LINE + 1)
        wrong = distrust(about, path)
        if stat.S_IMODE(about.st_mode) & (stat.S_IRWXG | stat.S_IRWXO) and wrong is None:
            wrong = f"{path} may be read by others: chmod 600 {path}"
        if wrong is not None:
            raise ValueError(f"--auth: {wrong}")
        secret = line.decode(errors="replace").strip()
        if not LEAST <= len(secret) <= MOST_LINE:
            raise ValueError(
                f"--auth: the first line of {path} must be a password of {LEAST} to "
                f"{MOST_LINE} characters, got {len(secret)}"
            )
        try:
            return cls(user, secret)
        except ValueError as error:
            raise ValueError(f"--auth: {path}: {error}") from error

    async def answer(self, asked: HTTPConnection, receive: Receive) -> Response | None:
        """Answer a request that does not hold the password; None for one that does."""
        path, is_page = asked.scope["path"], "text/html" in asked.headers.get("accept", "")
        try:
            if path == LOGIN and asked.scope.get("method") == "POST":
                return await self._login(Request(asked.scope, receive))
            if await self._is_known(asked):
                return None
        except BlockingIOError as error:
            return _refusal(path, str(error), 429, "rate_limit_exceeded", {"Retry-After": "5"})
        except ClientDisconnect:  # in the middle of the password
            return _refusal(path, "the body broke off", 400)
        if is_page:
            return _login_page("")
        said = "this server asks for a password: by HTTP Basic, or as the key of a client"
        asks = {"WWW-Authenticate": 'Basic realm="gen_accel"'}  # of which a page would make a box
        headers = asks if path.startswith(API) else None
        return BadRequest(said, status=401, code="invalid_api_key", headers=headers).answer()

    async def _login(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > 4 * MOST_LINE:
                return PlainTextResponse("too long", 413)
        given = parse_qs(body.decode(errors="replace"))
        user, secret = (given.get(name, [""])[0].strip() for name in ("user", "password"))
        if not await self._is_right(user, secret, request):
            return _login_page("The name or the password is wrong.")
        token = token_urlsafe(32)
        self._admit(f"cookie {token}")
        answer = RedirectResponse("/", 303)
        url = request.url
        is_https = url.scheme == "https" or str(url.hostname).endswith(TUNNEL)
        answer.set_cookie(self.cookie, token, httponly=True, samesite="strict", secure=is_https)
        return answer

    async def _is_known(self, asked: HTTPConnection) -> bool:
        header = asked.headers.get("authorization", "")
        given = f"cookie {asked.cookies.get(self.cookie, '')}", f"header {header}"
        now = time.monotonic()
        if any(self._known.get(self._fast(one), 0.0) > now for one in given):
            return True
        kind, _, value = header.partition(" ")
        if kind.lower() == "bearer":
            user, secret = self.user, value.strip()
        elif kind.lower() == "basic":
            try:
                user, _, secret = base64.b64decode(value, validate=True).decode().partition(":")
            except ValueError:
                return False
        else:
            return False
        if await self._is_right(user, secret, asked):
            self._admit(f"header {header}")
            return True
        return False

    async def _is_right(self, user: str, secret: str, asked: HTTPConnection) -> bool:
        """Compare a name and a password in a time that says nothing of them.

        Raises BlockingIOError if too many guesses of the address that asks wait.
        """
        address = "" if asked.client is None else asked.client.host
        if self._waiting[address] >= MOST_GUESSES:
            raise BlockingIOError("too many passwords are tried at once: try again")
        self._waiting[address] += 1
        try:
            async with self._turn:
                found = await run_in_threadpool(self._slow, secret)
                is_user = hmac.compare_digest(self._fast(user), self._fast(self.user))
                if hmac.compare_digest(found, self._right) and is_user:
                    return True
                await asyncio.sleep(DELAY)
                return False
        finally:
            self._waiting -= Counter([address])  # which drops an address without any

    def _admit(self, given: str) -> None:
        self._known[self._fast(given)] = time.monotonic() + STAYS
        while len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]

    def _fast(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(errors="replace"), "sha256")

    def _slow(self, text: str) -> bytes:
        said, most = text.encode(errors="replace"), 2048 * self._cost  # bytes; half is taken
        return hashlib.scrypt(said, salt=self._salt, n=self._cost, r=8, p=1, maxmem=most)


def _login_page(sentence: str) -> Response:
    from gen_accel.ui.page import html

    headers = {"Content-Security-Policy": LOGIN_MAY, "Cache-Control": "no-store"}
    return HTMLResponse(html("login", sentence), 401, headers)


class Guard:
    """Middleware in front of all that a server answers.

    It refuses what pages of other sites ask for. A request names this server by what no site can
    lead here: on this machine alone a name of `LOOPBACK`, else also an address in numbers, this
    machine's own name or `host`. If a browser says which page asks, it must be one of this server.

    Nothing that was uploaded or made runs as a page: answers under `NO_PAGES` are sandboxed, and
    files that gradio serves are attachments. No page of another site can show a page of this one.

    Args:
        host: that the server binds to.
        shared: whether the page is reached by a name of gradio.live too.
        most: bytes of a request to the page; the API bounds its own.
        room: called before each upload.
        password: that all but the page that asks for it is behind; None for none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        shared: bool,
        most: int,
        room: Callable[[], None] = lambda: None,
        password: Password | None = None,
    ) -> None:
        own = socket.gethostname().lower()
        self.app, self.local, self.shared = app, host in LOOPBACK, shared
        self.names = LOOPBACK if self.local else (*LOOPBACK, host.lower(), own, f"{own}.local")
        self.most, self.room, self.password = most, room, password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        asked, path = HTTPConnection(scope), scope["path"]
        size = asked.headers.get("content-length", "")
        refused = None
        if not self._is_own(asked.headers.get("host", ""), asked.headers.get("origin")):
            refused = _refusal(path, "not from this server's own pages", 403)
        elif self.password and (asks := await self.password.answer(asked, receive)):
            refused = asks
        elif path.startswith(UNUSED):
            refused = _refusal(path, "this page does not do that", 404)
        elif not path.startswith(API):  # which bounds its own
            if size.isdecimal() and (len(size) > 20 or int(size) > self.most):
                refused = _refusal(path, self._too_large(), 413)
            elif path.startswith(UPLOAD) and scope.get("method") == "POST":
                await run_in_threadpool(self.room)
            receive = self._counted(receive)
        if refused is not None:
            await refused(scope, receive, send)
        else:
            await self.app(scope, receive, _sandboxed(path, send))

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

    def _too_large(self) -> str:
        return f"a request must have the maximum allowed size of {self.most >> 20} MiB at most"

    def _counted(self, receive: Receive) -> Receive:
        """Bound a body that does not say its size, or says a wrong one."""
        came = 0

        async def call() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:  # as gradio's own parser says it, which then removes its files
                raise MultiPartException(self._too_large())
            return message

        return call


def _refusal(
    path: str,
    sentence: str,
    status: int,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Answer in the shape of the API's errors under `API`, elsewhere as plain text."""
    if path.startswith(API):
        return BadRequest(sentence, status=status, code=code, headers=headers).answer()
    return PlainTextResponse(sentence, status, headers)


def _sandboxed(path: str, send: Send) -> Send:
    """Add to an answer what keeps a browser from running it, where it is no page, and from showing
    it in a page of another site; a policy of its own stays."""

    async def call(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Frame-Options"] = "SAMEORIGIN"  # else that site leads clicks to this page
            if path.startswith(NO_PAGES):
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Content-Security-Policy", SANDBOX)
            if path.startswith(FILE):
                headers["Content-Disposition"] = "attachment"
        await send(message)

    return call
