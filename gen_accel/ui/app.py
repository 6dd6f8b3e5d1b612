"""The page as a whole, and the server that it comes from."""

import errno
import os
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_urlsafe

from gen_accel import demo
from gen_accel.demo import NAME
from gen_accel.process import unwinding
from gen_accel.registry import KEEP_MINUTES, needed_for
from gen_accel.ui.files import UPLOADS, Places, clear_uploads
from gen_accel.ui.worker import COMMAND, LONG, Values, command_keeping

UPLOADS_LOOK, UPLOADS_STAY = 3600.0, 86400.0  # seconds: how often they are looked through
UPLOADS_MOST = 4 << 30  # bytes of all
# gradio's own parts in our colours, with the fonts of the system.
LOOKS: Values = {
    "primary_hue": "indigo",
    "secondary_hue": "indigo",
    "neutral_hue": "slate",
    "font": ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"),
    "font_mono": ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"),
    "radius_size": "md",
    "spacing_size": "sm",
}
COLOURS = {
    "body_background_fill": "*neutral_50",
    "block_shadow": "none",
    # Readable: at least 4.5 times as bright as what is behind, or the other way round.
    "body_text_color_subdued": "*neutral_500",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_cancel_background_fill": "#dc2626",
    "button_cancel_background_fill_hover": "#b91c1c",
    "link_text_color_dark": "*primary_300",
    "block_title_text_weight": "600",
    "block_info_text_size": "*text_xs",
    "button_large_text_weight": "600",
    "checkbox_border_color": "*neutral_400",
    "checkbox_border_color_dark": "*neutral_400",
}
STYLE = Path(__file__).with_name("style.css")
# A browser's name for each of its tabs, kept while the tab is open.
NAME_OF_TAB = """() => {
  let name = sessionStorage.getItem('gen-accel-tab');
  if (!name) {
    name = crypto.getRandomValues(new Uint32Array(2)).join('-');
    sessionStorage.setItem('gen-accel-tab', name);
  }
  return name;
}"""


# Looks at the queue each second, and tells the screens where a job has changed. What the screens
# then show takes a browser a third of a second, so that the next look waits longer.
PULSE = """
let before = null;
const look = async () => {
  let told = false;
  try {
    const answer = await fetch('pulse');
    const now = await answer.text();
    if (answer.status === 401) location.reload();
    told = answer.ok && now !== before;
    if (told) { before = now; trigger('click'); }
    element.textContent = '';
  } catch {
    element.textContent = 'The server does not answer. What it made is in its folder.';
  } finally {
    setTimeout(look, told ? 2000 : 1000);
  }
};
look();
"""


class Server:
    """Server of `gen-accel ui` and `gen-accel serve`: a queue, and the application around it.

    Args:
        out: output folder; all is written there.
        models: to choose from, the first by default; "demo" is the last.
        allow: further folders that may be read, and repositories on the hub.
        hub: whether any repository on the hub may be named, and is fetched.
        page: whether it has a page, or the HTTP interface alone.
        host: that it will be bound to.
        share: whether it will be reached by another name too.
        auth: USER:FILE, of which the first line of FILE is the password that it asks for.
        keep: minutes that the last model stays in memory; 0 keeps none.
        command: starts a worker process in the place of ours.

    Raises:
        ModuleNotFoundError: the extra is not installed.
        OSError: `out` cannot be used, another server has it, or `auth` names no file.
        ValueError: a model that is neither a folder nor a name on the hub, or what
            `Password.read` refuses.
    """

    def __init__(
        self,
        out: Path,
        *,
        models: Sequence[str] = (),
        allow: Sequence[str | Path] = (),
        hub: bool = False,
        page: bool = True,
        host: str = "127.0.0.1",
        share: bool = False,
        auth: str | None = None,
        keep: float = KEEP_MINUTES,
        command: Sequence[str] | None = None,
    ) -> None:
        with needed_for("the web page", extra="ui"):
            import gradio  # noqa: F401
            from fastapi import FastAPI
        from gen_accel.ui.guard import Guard, Password

        password = None if auth is None else Password.read(auth)
        out.mkdir(parents=True, exist_ok=True)
        folder = out.resolve()
        (folder / UPLOADS).mkdir(exist_ok=True)
        # Read by gradio alone, which says nothing to anybody and keeps uploads with the rest.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(folder / UPLOADS)
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from gen_accel.ui.api import add_files, add_videos
        from gen_accel.ui.queue import Queue
        from gen_accel.ui.request import MOST
        from gen_accel.ui.worker import Questions

        may: Values = {"allowed": allow, "models": models, "any_on_hub": hub}
        self.places = Places(folder, [demo.path().parent], **may)
        self.models = (*dict.fromkeys(model for model in models if model != NAME), NAME)
        self.queue = Queue(
            folder, command=command or command_keeping(keep), check=self.places.check
        )
        self.questions = Questions(folder / "questions.log", command or COMMAND, self.places.check)
        self.app = FastAPI(title="gen_accel", docs_url=None, redoc_url=None)
        room = partial(self._clear_uploads, MOST)
        asks: Values = {"host": host, "shared": share, "password": password}
        self.app.add_middleware(Guard, most=MOST, room=room, **asks)
        add_files(self.app, self.queue)
        add_videos(self.app, self.queue, self.questions, self.models)
        if page:
            self._add_page()
        self._ended = threading.Event()
        self._clearing = threading.Thread(target=self._keep_clear, name="uploads", daemon=True)

    def _add_page(self) -> None:
        import gradio as gr
        from fastapi.responses import PlainTextResponse

        from gen_accel.ui.page import Overview, Page, Screens
        from gen_accel.ui.request import MOST
        from gen_accel.ui.screens import compare, generate, longer, measure, train

        screens = {  # by the kind of their jobs
            "generate": ("Generate", generate.build),
            "compare": ("Compare", compare.build),
            "longer": ("Longer", longer.build),
            "train": ("Train", train.build),
            "tune": ("Measure & doctor", measure.build),
        }

        with Screens(title="gen_accel", analytics_enabled=False, fill_width=True) as blocks:
            tab = gr.Textbox(visible="hidden", elem_id="tab")
            pulse = gr.HTML(elem_id="pulse", js_on_load=PULSE)
            shown = gr.Textbox(visible="hidden", elem_id="shown")
            page = Page(self.queue, self.questions, self.places, self.models, tab, pulse, shown)

            @self.app.get("/pulse", include_in_schema=False)
            def now() -> PlainTextResponse:  # a text that changes with any job
                return PlainTextResponse(page.mark(), headers={"Cache-Control": "no-store"})

            overview = Overview(page)
            with gr.Tabs(elem_id="screens") as tabs:
                for kind, (name, build) in screens.items():
                    with gr.Tab(name, id=kind):
                        build(page)
            overview.build_queue(tabs)
            page.listen()
            blocks.load(None, None, [tab], js=NAME_OF_TAB, api_visibility="private")
        gr.mount_gradio_app(
            self.app,
            blocks,
            path="/",
            theme=gr.themes.Default(**LOOKS).set(**COLOURS),
            css_paths=STYLE,
            max_file_size=MOST,
            footer_links=[],
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )

    def _clear_uploads(self, room: int = 0, *, all_of_them: bool = False) -> None:
        """Remove old uploads, and as many more as leave room for some bytes."""
        used = [job.options for job in self.queue.jobs() if job.is_live]
        seconds, most = (0.0, 0) if all_of_them else (UPLOADS_STAY, UPLOADS_MOST - room)
        clear_uploads(self.places.folder / UPLOADS, used, seconds=seconds, most=most)

    def _keep_clear(self) -> None:
        while True:
            self._clear_uploads()
            if self._ended.wait(UPLOADS_LOOK):
                return

    def __enter__(self) -> "Server":
        self.queue.start()
        self._clearing.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.queue.running in LONG:
            said = "a training ends its step and writes a checkpoint; Ctrl-C once more: at once"
            print(said, file=sys.stderr)
        try:
            self.queue.close()
        finally:
            self.questions.close()
            self._ended.set()
            self._clear_uploads(all_of_them=True)


def listening(host: str, port: int) -> socket.socket:
    """Open the socket of a server.

    Raises OSError, in one sentence with the fix, for a port that is taken or an address that is
    not this machine's.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
        return found
    except OSError as error:
        found.close()
        said = (
            f"port {port} of {host} is taken, perhaps by another page: give --port {port + 1}, or "
            "end what has it"
        )
        if isinstance(error, PermissionError):
            said = f"port {port} is for administrators: give --port 7860 or another"
        elif isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            said = f"{host} is no address of this machine: give --host 127.0.0.1"
        raise OSError(said) from None


def address(host: str, port: int) -> str:
    """Address of a page for a browser on this machine."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def shared(port: int) -> str:
    """Open a tunnel from a public address of gradio.live, and return the address.

    Raises OSError where that cannot be had.
    """
    from gradio.networking import setup_tunnel

    from gen_accel.ui.worker import line_of

    try:
        return setup_tunnel("127.0.0.1", port, token_urlsafe(32), None, None)
    except Exception as error:  # of a download, of a program that it starts
        said = f"no public address can be had: {line_of(error)}; leave --share out"
        raise OSError(said) from error


def run(server: Server, bound: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM. A job that runs then is interrupted."""
    import uvicorn

    config = uvicorn.Config(
        server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=2
    )
    with suppress(KeyboardInterrupt), unwinding(), bound, server:
        uvicorn.Server(config).run(sockets=[bound])
