"""What stands in front of a server: who may ask it, how much, and what answers may do."""

import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from starlette.datastructures import MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gen_accel.registry import LOOPBACK

TUNNEL = ".gradio.live"  # names of --share
GRADIO, FILE, UPLOAD = "/gradio_api/", "/gradio_api/file", "/gradio_api/upload"
API = "/v1/"
# What no screen asks for: files from other servers, and recordings of the browser's screen.
UNUSED = (
    *(f"{FILE}=http:", f"{FILE}=https:"),
    *(f"{GRADIO}{one}" for one in ("proxy", "process_recording", "run-history", "vibe")),
)
# Answers that are no page. A browser that opens one as a page gives it no script, no cookie of
# this server and nothing of another.
NO_PAGES = (GRADIO, API, "/jobs/", "/trainings/")
SANDBOX = "sandbox; default-src 'none'"


class Guard:
    """Middleware in front of all that a server answers.

    It refuses what pages of other sites ask for. A request names this server by what no site can
    lead here: on this machine alone a name of `LOOPBACK`, else also an address in numbers, this
    machine's own name or `host`. If a browser says which page asks, it must be one of this server.

    Nothing that was uploaded or made runs as a page: answers under `NO_PAGES` are sandboxed, and
    files that gradio serves are attachments.

    Args:
        host: that the server binds to.
        shared: whether the page is reached by a name of gradio.live too.
        most: bytes of a request to the page; the API bounds its own.
        room: called before each upload.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        shared: bool,
        most: int,
        room: Callable[[], None] = lambda: None,
    ) -> None:
        own = socket.gethostname().lower()
        self.app, self.local, self.shared = app, host in LOOPBACK, shared
        self.names = LOOPBACK if self.local else (*LOOPBACK, host.lower(), own, f"{own}.local")
        self.most, self.room = most, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        asked, path = HTTPConnection(scope), scope["path"]
        size = asked.headers.get("content-length", "")
        refused = None
        if not self._is_own(asked.headers.get("host", ""), asked.headers.get("origin")):
            refused = PlainTextResponse("not from this server's own pages", 403)
        elif path.startswith(UNUSED):
            refused = PlainTextResponse("this page does not do that", 404)
        elif path.startswith(API):
            pass
        elif size.isdecimal() and (len(size) > 20 or int(size) > self.most):
            refused = PlainTextResponse(self._too_large(), 413)
        else:
            receive = self._counted(receive)
            if path.startswith(UPLOAD) and scope.get("method") == "POST":
                await run_in_threadpool(self.room)
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


def _sandboxed(path: str, send: Send) -> Send:
    """Add to an answer what keeps a browser from running it; a policy of its own stays."""
    if not path.startswith(NO_PAGES):
        return send

    async def call(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            headers.setdefault("Content-Security-Policy", SANDBOX)
            if path.startswith(FILE):
                headers["Content-Disposition"] = "attachment"
        await send(message)

    return call
