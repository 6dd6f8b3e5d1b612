"""A page on a free port, and headless Chromium on it.

tests/ui/conftest.py has the fixtures. One server and one browser serve all tests of a
module; each test gets a tab of its own.
"""

import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 180.0  # that a browser waits for what a test expects
# What gradio's client says where a page is loaded again while it waits for an answer.
LEFT = (
    "AbortError: signal is aborted",
    "AbortError: BodyStreamBuffer was aborted",
    "Unexpected error Connection errored out",
)


@dataclass(frozen=True)
class WebPage:
    """A running server.

    Args:
        url: of the page.
        out: its output folder.
        server: `gen_accel.ui.app.Server`.
    """

    url: str
    out: Path
    server: Any


@contextmanager
def serving(out: Path, **options: Any) -> Iterator[WebPage]:
    """Run a server in a thread of this process, and its worker in one of its own.

    Args:
        options: of `gen_accel.ui.app.Server`.
    """
    pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')
    import uvicorn

    from gen_accel.ui.app import Server

    before = {name: os.environ.get(name) for name in os.environ | {"GRADIO_TEMP_DIR": ""}}
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    with Server(out, **options) as server:
        config = uvicorn.Config(
            server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([bound],), daemon=True)
        thread.start()
        until = time.monotonic() + SECONDS
        while not running.started:
            assert time.monotonic() < until
            assert thread.is_alive()
            time.sleep(0.02)
        try:
            yield WebPage(f"http://127.0.0.1:{bound.getsockname()[1]}", out, server)
        finally:
            running.should_exit = True
            thread.join(SECONDS)
            bound.close()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser; skip if there is none."""
    pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
    from playwright.sync_api import sync_playwright

    path = next((one for one in CHROMIUM if shutil.which(one)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*FLAGS])
        try:
            yield browser
        finally:
            browser.close()


def choose(tab: Any, name: str, among: str = "#screens") -> None:
    """Choose a screen, or a part of one, which a small window has behind the dots."""
    tabs = tab.locator(among)
    tab.wait_for_selector(f"{among} button[role=tab]")
    shown = tabs.get_by_role("tab", name=name, exact=True)
    if shown.is_visible():
        shown.click()
        return
    tabs.locator(".overflow-menu button").first.click()
    tabs.locator(".overflow-dropdown").get_by_text(name, exact=True).click()


@pytest.fixture(scope="module")
def web_page(tmp_path_factory):
    """A server with an output folder of its own."""
    with serving(tmp_path_factory.mktemp("ui")) as page:
        yield page


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def context(browser):
    """Context that all tabs share, so that scripts of the page are read once."""
    found = browser.new_context()
    yield found
    found.close()


@pytest.fixture
def open_tab(web_page, context):
    """Opens a tab on the page, of some width. An error in its console fails the test, as does a
    request to another server."""
    errors: list[tuple[Any, str]] = []
    tabs, visits = [], Counter()

    def opened(width: int = 1280, height: int = 900) -> Any:
        tab = context.new_page()
        tabs.append(tab)
        tab.set_viewport_size({"width": width, "height": height})
        tab.set_default_timeout(1000 * SECONDS)
        tab.on("console", lambda one: errors.append((tab, one.text)) if one.type == "error" else 0)
        tab.on("pageerror", lambda one: errors.append((tab, str(one))))
        tab.on("request", lambda one: elsewhere(tab, one.url))
        tab.on("framenavigated", lambda frame: visits.update([tab] * (frame == tab.main_frame)))
        tab.goto(web_page.url)
        tab.wait_for_selector("#screens button[role=tab]")
        tab.wait_for_function("document.querySelector('#tab textarea, #tab input').value != ''")
        return tab

    def elsewhere(tab: Any, url: str) -> None:
        if url.startswith("http") and not url.startswith(web_page.url):
            errors.append((tab, f"asked for {url}"))

    yield opened
    for tab in tabs:
        tab.close()
    found = [text for tab, text in errors if visits[tab] < 2 or not text.startswith(LEFT)]
    assert not found, found


@pytest.fixture
def browser_page(open_tab):
    return open_tab()
