"""Take the pictures of the web page that docs/web_page.md shows: `python docs/.site/pictures.py`.

It runs the demo model on a page of its own, for some minutes, in headless Chromium. Names of
screens, such as `train presets`, take theirs alone; `dark` and `small` show what the others made.
"""

import io
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Page, sync_playwright

Theme = Literal["light", "dark"]
IMAGES = Path(__file__).parents[1] / "images"
WIDTH, MOST = 1400, 2300  # pixels: of the window, and height of a picture
SMALL, TALL = 390, 1700  # pixels: a telephone's window, and height of its pictures
BYTES = 60_000  # of a picture at most
SCALES, QUALITIES = (1, 0.8, 0.64), (60, 45, 30)  # of pictures; the first pair that fits
# What a picture of telephones shows: by the kind of a job, what it made and the part at the top.
PHONES = {
    "generate": ("#gen-result video", "#gallery"),
    "compare": ("#cmp-mask img", "#cmp-players"),
    "train": ("#train-report iframe", "#screens"),
}
STAYS = 600_000  # milliseconds that a run may take


@contextmanager
def served() -> Iterator[str]:
    """Address of a page with a temporary output folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "gen_accel", "ui", "--port", str(port), "--out", out]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            while "is ready" not in (line := process.stderr.readline()):
                assert line, "the page did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def seen(tab: Page, height: int) -> Image.Image:
    """Picture of the page from its top."""
    time.sleep(2)  # until charts are drawn
    tab.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
    picture = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
    return picture.crop((0, 0, picture.width, min(height, picture.height)))


def write(picture: Image.Image, name: str) -> None:
    held = io.BytesIO()
    for scale, quality in itertools.product(SCALES, QUALITIES):
        size = round(scale * picture.width), round(scale * picture.height)
        held = io.BytesIO()
        picture.resize(size).save(held, "webp", quality=quality, method=6)
        if held.tell() <= BYTES:
            break
    (IMAGES / f"web_page_{name}.webp").write_bytes(held.getvalue())


def take(tab: Page, name: str, height: int = MOST) -> None:
    """Write a picture of the page."""
    write(seen(tab, height), name)


def screen(tab: Page, name: str, among: str = "#screens") -> None:
    tab.locator(among).get_by_role("tab", name=name, exact=True).click()


def options(tab: Page) -> None:
    tab.wait_for_selector("#gen-plan .ga-plan")
    tab.locator("#gen-quality label", has_text="Own settings").click()
    tab.wait_for_selector("#gen-fields input")
    take(tab, "options", 1500)
    tab.locator("#gen-quality label", has_text="Balanced").click()


def generate(tab: Page) -> None:
    tab.wait_for_selector("#gen-plan .ga-plan")
    tab.click("#gen-run")
    tab.wait_for_selector("#gen-so-far img")
    take(tab, "running", 1100)
    tab.wait_for_selector("#gen-result video")
    take(tab, "done", 1200)


def compare(tab: Page) -> None:
    screen(tab, "Compare")
    tab.locator("#cmp-steps").locator("input, textarea").first.fill("10")
    tab.keyboard.press("Tab")
    tab.click("#cmp-run")
    tab.wait_for_selector("#status .ga-status")
    address = tab.url
    tab.goto("about:blank")  # a browser that draws takes time from what is measured
    time.sleep(100)
    tab.goto(address)
    last(tab, "compare", "#cmp-mask img")
    take(tab, "compare", 2120)


def longer(tab: Page) -> None:
    screen(tab, "Longer")
    tab.wait_for_selector("#long-techniques table")
    tab.click("#long-extend input")
    tab.get_by_role("option", name="riflex").click()
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#long-techniques >> text=no: riflex does not go with")
    tab.click("#long-run")
    tab.wait_for_selector("#long-sheet img")
    take(tab, "longer")


def train(tab: Page) -> None:
    screen(tab, "Train")
    tab.click("#train-example")
    tab.wait_for_selector("#train-clips img:visible")
    tab.click("#train-plan")
    tab.wait_for_selector("#train-plan-told .ga-pre")
    take(tab, "train", 1300)
    tab.click("#train-all > button")
    prompts = {"validation-prompts": "a red square moves right"}
    for name, value in ({"stages": "9:60"} | prompts | {"validate-every": "30"}).items():
        field = tab.locator(f"#train-{name}").locator("textarea, input").first
        field.fill(value)
        field.blur()
    time.sleep(2)
    tab.click("#train-all > button")
    tab.click("#train-start")
    tab.wait_for_selector("#train-loss canvas, #train-loss svg")
    tab.wait_for_selector("#train-report iframe")
    take(tab, "training", 2000)


def presets(tab: Page) -> None:
    screen(tab, "Measure & doctor")
    screen(tab, "Presets", "#meas-parts")
    tab.click("#meas-show")
    tab.wait_for_selector("#meas-frontier img")
    take(tab, "presets", 900)


def costs(tab: Page) -> None:
    screen(tab, "Measure & doctor")
    screen(tab, "What a run costs", "#meas-parts")
    tab.click("#meas-estimate")
    tab.wait_for_selector("#meas-cost .ga-pre")
    take(tab, "costs", 1300)


def dark(tab: Page) -> None:
    """The last comparison, in the dark."""
    with another(tab, WIDTH, "dark") as window:
        last(window, "compare", "#cmp-mask img")
        take(window, "dark", 1300)


def small(tab: Page) -> None:
    """Three screens in a telephone's window, dark, side by side, when nothing runs that would lie
    on top of them."""
    sides = []
    tab.wait_for_selector("#status .ga-status", state="detached")
    with another(tab, SMALL, "dark") as phone:
        for kind, (made, part) in PHONES.items():
            last(phone, kind, made)
            phone.set_viewport_size({"width": SMALL, "height": TALL})
            phone.locator(part).evaluate("one => one.scrollIntoView()")
            time.sleep(2)
            sides.append(Image.open(io.BytesIO(phone.screenshot())).convert("RGB"))
    whole = Image.new("RGB", (SMALL * len(sides), TALL))
    for i, one in enumerate(sides):
        whole.paste(one, (SMALL * i, 0))
    write(whole, "small")


@contextmanager
def another(tab: Page, width: int, theme: Theme) -> Iterator[Page]:
    """Open another window on the page of a tab, whose browser asks for light or dark."""
    assert tab.context.browser is not None
    size = {"width": width, "height": 900}
    found = tab.context.browser.new_page(viewport=size, color_scheme=theme)
    found.set_default_timeout(STAYS)
    found.goto(tab.url)
    found.wait_for_selector("#gen-plan .ga-plan")
    yield found
    found.close()


def last(tab: Page, kind: str, made: str) -> None:
    """Show the last job of a kind, which has made a part of the page."""
    tab.locator("#gallery [data-act=show]", has_text=kind).first.click()
    tab.wait_for_selector(made)


def main(*names: str) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    takers = (options, generate, compare, longer, train, presets, costs, dark, small)
    named = {one.__name__: one for one in takers}
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
        tab.set_default_timeout(STAYS)
        tab.goto(url)
        for name in names or named:
            named[name](tab)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
