"""The page in a browser: its queue, its tabs, its rules. The worker has no torch."""

from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client.utils import is_valid_file
from support import fake_worker
from support.browser import choose, serving

from gen_accel.measure.video_io import write_video
from gen_accel.paths import FILM_SUFFIXES
from gen_accel.ui import app
from gen_accel.ui.request import MOST

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def web_page(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("ui"), command=fake_worker.COMMAND) as page:
        yield page


@pytest.fixture(autouse=True)
def an_empty_queue(web_page):
    yield
    queue = web_page.server.queue
    for job in reversed(queue.jobs()):
        queue.cancel(job.id)
    for job in queue.jobs():
        queue.wait(job.id, 60)
        queue.remove(job.id)


def generate(tab, prompt, button="#gen-run"):
    tab.fill("#gen-prompt textarea", prompt)
    tab.click(button)


def row(prompt):
    return f".ga-row:has-text('{prompt}')"


def test_a_job_is_followed_to_its_end(browser_page):
    generate(browser_page, "steps 3")
    browser_page.wait_for_selector("#gen-progress .ga-done")
    browser_page.wait_for_selector("#gen-result video")
    assert "--prompt 'steps 3'" in browser_page.text_content("#gen-result pre")
    assert browser_page.text_content(f"{row('steps 3')} .ga-state") == "done"
    browser_page.wait_for_selector("#gen-plan .ga-plan >> text=1.4x as fast")


@pytest.mark.slow
def test_an_error_is_the_sentence_and_no_traceback(browser_page):
    generate(browser_page, "fail height must be a multiple of 16, got 97")
    browser_page.wait_for_selector("#gen-error >> text=height must be a multiple of 16, got 97")
    assert "Traceback" not in browser_page.content()
    generate(browser_page, "steps 1")
    browser_page.wait_for_selector("#gen-progress .ga-done")
    assert browser_page.query_selector("#gen-error .ga-error") is None


@pytest.mark.nightly
def test_an_error_stays_on_each_screen(browser_page):
    for prefix, name in {"cmp": "Compare", "long": "Longer"}.items():
        choose(browser_page, name)
        browser_page.fill(f"#{prefix}-prompt textarea", f"fail no room for {prefix}")
        browser_page.click(f"#{prefix}-run")
        browser_page.wait_for_selector(f"#{prefix}-progress .ga-failed")
        browser_page.wait_for_selector(f"#{prefix}-error >> text=no room for {prefix}")


@pytest.mark.slow
def test_a_file_elsewhere_is_refused_in_the_page(browser_page):
    browser_page.click("#gen-model input")
    browser_page.fill("#gen-model input", "/etc")
    browser_page.press("#gen-model input", "Enter")
    browser_page.click("#gen-run")
    browser_page.wait_for_selector("#gen-error >> text=/etc is not a file of this page")


def made(web_page, film, kind, title):
    """A job of some kind that has made a film."""
    options = {"model": "demo", "prompt": [f"film {film}"], "out": "{job}/video.mp4"}
    queue = web_page.server.queue
    return queue.wait(queue.submit("generate", options, kind=kind, title=title).id, 60)


@pytest.mark.nightly
def test_a_click_in_the_gallery_or_the_queue_opens_the_screen(browser_page, web_page, tmp_path):
    film = write_video(np.zeros((2, 32, 48, 3), np.uint8), tmp_path / "a.mp4", fps=8)
    jobs = [
        made(web_page, film, kind, f"<b>of {kind}") for kind in ("longer", "train", "generate")
    ]
    shown = browser_page.locator(".ga-strip button")
    shown.nth(2).locator("img").wait_for()
    assert [one.get_attribute("title") for one in shown.all()] == [
        *("<b>of generate", "<b>of train", "<b>of longer")
    ]
    browser_page.wait_for_function(
        "[...document.querySelectorAll('.ga-strip img, .ga-queue img')].every("
        "(one) => one.naturalWidth === 48)"
    )
    shown.nth(2).click()
    browser_page.wait_for_selector("#long-error .ga-error, #long-figures table")
    browser_page.click(f"{row('of train')} .ga-open")
    browser_page.wait_for_selector("#train-start")
    shown.nth(0).click()
    browser_page.wait_for_selector("#gen-result video")
    generate(browser_page, "fail of another")
    browser_page.wait_for_selector("#gen-progress .ga-failed")
    shown.nth(0).click()
    browser_page.wait_for_selector(f"#gen-progress [data-job='{jobs[-1].id}']")
    browser_page.wait_for_selector("#gen-result video")


@pytest.mark.nightly
@pytest.mark.parametrize("width", WIDTHS)
def test_what_runs_is_on_top_of_every_screen(open_tab, web_page, width):
    tab = open_tab(width)
    generate(tab, "wait")
    tab.wait_for_selector("#status >> text=0 of 2 steps")
    for name in ("Train", "Generate"):
        choose(tab, name)
        tab.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        tab.wait_for_timeout(100)
        box = tab.locator("#status .ga-status").bounding_box()
        scrolled = tab.evaluate("window.scrollY")  # none of a screen that is short
        assert 0 <= box["y"] < max(40, 100 - scrolled)
        assert box["x"] + box["width"] <= width
    assert tab.inner_text("#status .ga-open") == "wait"
    tab.click("#status .ga-stop")
    tab.wait_for_selector("#gen-progress .ga-stopped")
    tab.wait_for_selector("#status .ga-status", state="detached")


def test_stop_leaves_no_file(browser_page, web_page):
    generate(browser_page, "wait")
    browser_page.wait_for_selector("#gen-progress >> text=0 of 2 steps")
    browser_page.click("#gen-stop")
    browser_page.wait_for_selector("#gen-progress .ga-stopped")
    [job] = web_page.server.queue.jobs()
    assert web_page.server.queue.files(job) == []
    assert not browser_page.is_visible("#gen-stop")


@pytest.mark.nightly
def test_the_queue_is_cancelled_done_again_and_removed(browser_page):
    generate(browser_page, "wait")
    browser_page.locator(f"{row('wait')} .ga-running").wait_for()
    generate(browser_page, "steps 1", "#gen-add")
    waiting = browser_page.locator(row("steps 1"))
    waiting.locator("text=waiting, 1 before").wait_for()
    waiting.get_by_text("Cancel").click()
    waiting.wait_for(state="detached")
    running = browser_page.locator(row("wait"))
    running.get_by_text("Stop").click()
    running.locator(".ga-stopped").wait_for()
    running.get_by_text("Again").click()
    browser_page.locator(f"{row('wait')} .ga-running").wait_for()
    browser_page.locator(f"{row('wait')}[data-state=stopped]").get_by_text("Remove").click()
    browser_page.locator(f"{row('wait')}[data-state=stopped]").wait_for(state="detached")


@pytest.mark.slow
def test_a_reload_keeps_the_queue_and_what_the_tab_shows(browser_page):
    generate(browser_page, "steps 2")
    browser_page.wait_for_selector("#gen-progress .ga-done")
    browser_page.reload()
    browser_page.wait_for_selector(row("steps 2"))
    browser_page.wait_for_selector("#gen-progress .ga-done")
    browser_page.wait_for_selector("#gen-result video")
    browser_page.wait_for_function(
        "document.querySelector('#gen-prompt textarea').value === 'steps 2'"
    )


AT_ONCE = """async () => {
  const put = (one, text) => {
    const value = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(one), 'value');
    value.set.call(one, text);
    one.dispatchEvent(new Event('input', {bubbles: true}));
  };
  const labels = [...document.querySelectorAll('#gen-fields label')];
  const field = (name) => labels.find((one) => one.innerText.startsWith(name));
  put(field('Tau').querySelector('input, textarea'), '0.5');
  field('Sink queries').querySelector('input').click();
  await new Promise((done) => setTimeout(done));
  document.querySelector('#gen-add').click();
}"""


@pytest.mark.nightly
def test_a_quick_press_takes_what_the_controls_show(browser_page, web_page):
    browser_page.fill("#gen-prompt textarea", "steps 1")
    browser_page.locator("#gen-quality label", has_text="Own settings").click()
    browser_page.locator("#gen-fields").get_by_label("Tau").wait_for()
    browser_page.evaluate(AT_ONCE)
    browser_page.wait_for_selector(row("steps 1"))
    [job] = web_page.server.queue.jobs()
    assert job.options["set"] == ["sink_queries=true", "tau=0.5"]


@pytest.mark.nightly
def test_two_tabs_do_not_mix(open_tab):
    one, other = open_tab(), open_tab()
    generate(one, "fail of the first tab")
    one.wait_for_selector("#gen-error .ga-error")
    generate(other, "steps 1")
    other.wait_for_selector("#gen-progress .ga-done")
    other.wait_for_selector(row("fail of the first tab"))  # the queue is of all
    assert other.query_selector("#gen-error .ga-error") is None
    assert "of the first tab" in one.text_content("#gen-error")
    assert one.query_selector("#gen-result video") is None
    assert one.input_value("#gen-prompt textarea") == "fail of the first tab"
    one.click(f"{row('steps 1')} .ga-open")  # what another tab made is shown where it is asked for
    one.wait_for_selector("#gen-result video")


@pytest.mark.nightly
@pytest.mark.parametrize("width", WIDTHS)
def test_each_screen_fits_the_window(open_tab, width):
    tab = open_tab(width)
    for name in ("Generate", "Compare", "Longer", "Train", "Measure & doctor"):
        choose(tab, name)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    choose(tab, "Generate")
    tab.click("#gen-advanced > button")
    for button in ("#gen-run", "#gen-add"):
        tab.locator(button).scroll_into_view_if_needed()
        box = tab.locator(button).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_files_of_the_machine_are_refused(browser_page, web_page):
    """They are also at gradio's own addresses. An upload lies in the output folder."""
    get = browser_page.request.get
    for path in ("/etc/passwd", str(web_page.out.parent), f"{web_page.out}/../x", __file__):
        assert get(f"{web_page.url}/gradio_api/file={path}").status in (403, 404)
    answer = browser_page.request.post(
        f"{web_page.url}/gradio_api/upload",
        multipart={"files": {"name": "../../a.png", "mimeType": "image/png", "buffer": b"a"}},
    )
    assert answer.json()[0].startswith(str(web_page.out / "uploads"))
    assert not list(web_page.out.parent.glob("*.png"))


SCRIPT = b"<script>document.title = 'ran'</script>"
PAGES = {
    "a.html": SCRIPT,
    "a.xhtml": b'<html xmlns="http://www.w3.org/1999/xhtml">' + SCRIPT + b"</html>",
    "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg">' + SCRIPT + b"</svg>",
    "a.xml": b"<a>" + SCRIPT + b"</a>",
    **{"a.pdf": SCRIPT, "a.png": SCRIPT, "a.txt": SCRIPT, "a": SCRIPT},
}


def sent(web_page, files):
    parts = [("files", one) for one in files.items()]
    return httpx.post(f"{web_page.url}/gradio_api/upload", files=parts, timeout=60)


def test_an_upload_is_an_attachment_and_logs_are_not_served(web_page):
    for file in sent(web_page, PAGES).json():
        for way in ({}, {"Range": "bytes=0-3"}):
            got = httpx.get(f"{web_page.url}/gradio_api/file={file}", headers=way)
            assert got.status_code in (200, 206)
            assert got.headers["Content-Disposition"] == "attachment"
            assert got.headers["X-Content-Type-Options"] == "nosniff"
            assert got.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    (web_page.out / "settings.json").write_text("{}")
    for name in ("worker.log", "worker.lock", ".lock", "questions.log", "settings.json"):
        got = httpx.get(f"{web_page.url}/gradio_api/file={web_page.out / name}")
        assert got.status_code == 403, name
    there = "http://127.0.0.1/a"
    for name in (f"file={there}", f"file/{there}", f"proxy={there}", "deep_link?session_hash=a"):
        assert httpx.get(f"{web_page.url}/gradio_api/{name}").status_code == 404


@pytest.mark.slow
def test_a_browser_runs_no_upload(context, web_page):
    from playwright.sync_api import Error

    tab = context.new_page()
    for file in sent(web_page, PAGES).json():
        with tab.expect_download(), suppress(Error):  # the latter: "Download is starting"
            tab.goto(f"{web_page.url}/gradio_api/file={file}")
        assert (tab.title(), tab.url) == ("", "about:blank")
    tab.close()


def test_every_film_can_be_sent(web_page):
    parts = httpx.get(f"{web_page.url}/config").json()["components"]
    kinds = {part["props"].get("elem_id"): part["props"].get("file_types") for part in parts}
    for name in ("train-send", "meas-videos"):
        assert all(is_valid_file(f"clip{suffix}", kinds[name]) for suffix in FILM_SUFFIXES)


def test_uploads_are_bounded(web_page):
    url = f"{web_page.url}/gradio_api/upload"
    before = {*web_page.out.rglob("*")}
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    asked = HTTPConnection(web_page.url.removeprefix("http://"), timeout=60)
    asked.putrequest("POST", "/gradio_api/upload")
    for name, value in {**head, "Content-Length": "9" * 12}.items():
        asked.putheader(name, value)
    asked.endheaders()
    assert asked.getresponse().status == 413
    asked.close()
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.png"\r\n\r\n'
    for files in (1, 8):  # one that is too large, and several that are together
        size = MOST // files + 2**20

        def body(files=files, size=size):
            for number in range(files):
                yield part % number
                for _ in range(size >> 20):
                    yield b"a" * 2**20
                yield b"\r\n"
            yield b"--x--\r\n"

        got = httpx.post(url, content=body(), headers=head, timeout=60)
        assert got.status_code == 413
        assert "at most" in got.text or "maximum" in got.text
    assert {*web_page.out.rglob("*")} == before


def test_uploads_make_room_oldest_first(web_page, monkeypatch):
    queue = web_page.server.queue
    queue.submit("generate", {"model": "demo", "prompt": ["wait"], "out": "{job}/a.mp4"})
    used, old, new = (Path(sent(web_page, {f"{n}.png": n.encode()}).json()[0]) for n in "abc")
    more = {"image": str(used), "prompt": ["steps 1"], "out": "{job}/a.mp4"}
    queue.submit("generate", {"model": "demo", **more})
    monkeypatch.setattr(app, "UPLOADS_MOST", MOST + 2)
    last = Path(sent(web_page, {"d.png": b"d"}).json()[0])
    assert [one.exists() for one in (used, old, new, last)] == [True, False, True, True]
    monkeypatch.setattr(app, "UPLOADS_STAY", 0.0)
    sent(web_page, {"e.png": b"e"})
    assert [one.exists() for one in (used, new, last)] == [True, False, False]


def test_an_event_takes_no_file_but_uploads(web_page, tmp_path):
    """A request may name any path or address as the file of an event."""
    config = httpx.get(f"{web_page.url}/config").json()
    sending = {one["props"].get("elem_id"): one["id"] for one in config["components"]}[
        "train-send"
    ]
    event = next(one["id"] for one in config["dependencies"] if one["inputs"] == [sending])
    (tmp_path / "of_mine.txt").write_text("secret")
    upload = sent(web_page, {"a.txt": b"a"}).json()[0]
    out = web_page.out
    others = tmp_path / "of_mine.txt", "http://127.0.0.1:1/a.txt", f"{out}/uploads/../worker.log"
    for number, path in enumerate((*others, upload)):
        for more in ({"meta": {"_type": "gradio.FileData"}}, {}):
            session = f"{number}-{len(more)}"
            asked = {"data": [[{"path": str(path), **more}]], "fn_index": event}
            url = f"{web_page.url}/gradio_api/queue"
            httpx.post(f"{url}/join", json={**asked, "session_hash": session})
            told = httpx.get(f"{url}/data", params={"session_hash": session}, timeout=60).text
            assert ("must be uploaded" in told) is (path != upload), told
    assert not [*out.rglob("of_mine.txt")]
    assert [*out.glob("clips/sent*/a.txt")]


def test_no_button_sends_a_picture_to_another_server(web_page):
    found = httpx.get(f"{web_page.url}/config").json()["components"]
    pictures = [one["props"] for one in found if one["type"] == "image"]
    assert pictures
    assert all(set(one["buttons"]) <= {"download", "fullscreen"} for one in pictures)


@pytest.mark.slow
def test_the_page_works_behind_a_password(tmp_path, context):
    file = tmp_path / "password.txt"
    file.write_text("correct horse")
    file.chmod(0o600)
    own = {"command": fake_worker.COMMAND, "auth": f"me:{file}"}
    with serving(tmp_path / "out", **own) as page:
        tab = context.new_page()
        tab.goto(page.url)
        for password, then in (("wrong", ".ga-error"), ("correct horse", "#gen-prompt textarea")):
            tab.fill("[name=user]", "me")
            tab.fill("[name=password]", password)
            tab.click("button")
            tab.wait_for_selector(then)
        generate(tab, "steps 2")
        tab.wait_for_selector("#gen-result video")
        context.clear_cookies()
        tab.wait_for_selector("[name=password]")  # the page asks again by itself
        tab.close()
