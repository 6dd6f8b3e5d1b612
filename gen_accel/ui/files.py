"""Files of jobs over HTTP, and the requests that a server takes."""

import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse

from gen_accel.names import LOOPBACK
from gen_accel.ui.jobs import RECORD
from gen_accel.ui.queue import Queue

TUNNEL = ".gradio.live"  # names of --share


def add_files(app: FastAPI, queue: Queue) -> None:
    """Serve the files in a job's folder at `/jobs/ID/NAME`, and no others."""

    @app.get("/jobs/{job}/{name:path}", include_in_schema=False)
    def file(job: str, name: str, download: bool = False) -> FileResponse:
        path = file_of(queue, job, name)
        if path is None:
            raise HTTPException(404, "there is no such file")
        shown = path.name if download else None
        return FileResponse(path, filename=shown)


def add_pulse(app: FastAPI, mark: Callable[[], str]) -> None:
    """Serve at `/pulse` a text that changes with any job."""

    @app.get("/pulse", include_in_schema=False)
    def pulse() -> PlainTextResponse:
        return PlainTextResponse(mark(), headers={"Cache-Control": "no-store"})


def file_of(queue: Queue, job: str, name: str) -> Path | None:
    """Path of a file in a job's folder, with no link in it that leads elsewhere; None where there
    is none."""
    try:
        place = queue.store.place(queue.job(job)).resolve()
        path = (place / name).resolve()
    except (KeyError, OSError, ValueError, RuntimeError):
        return None
    inside = path.is_relative_to(place) and path.name != RECORD and path.is_file()
    return path if inside else None


class OwnPages:
    """Middleware that refuses what pages of other sites ask for.

    A request names this server by what no site can lead here: on this machine alone a name of
    `LOOPBACK`, else also an address in numbers, this machine's own name or `host`. Where a browser
    says which page asks, it must be one of this server.

    Args:
        host: that the server binds to.
        shared: whether the page is reached by a name of gradio.live too.
    """

    def __init__(self, app: Any, *, host: str, shared: bool) -> None:
        own = socket.gethostname().lower()
        self.app, self.local, self.shared = app, host in LOOPBACK, shared
        self.names = LOOPBACK if self.local else (*LOOPBACK, host.lower(), own, f"{own}.local")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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
        tunnel = self.shared and name.endswith(TUNNEL)
        return name in self.names or tunnel or (not self.local and _is_address(name))


def _is_address(name: str) -> bool:
    """Whether a host is named by numbers, for which no name server is asked."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
