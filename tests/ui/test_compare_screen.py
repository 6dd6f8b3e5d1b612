"""The screen Compare in a browser: one comparison of the demo model serves all tests."""

import json

import pytest

TINY = {"height": 48, "width": 48, "steps": 4}


@pytest.fixture(scope="module")
def compared(web_page):
    """A comparison that was made on this page."""
    options = {"model": "demo", "prompt": ["a red circle moves left"], "compare": True}
    options |= {"frames": 9, "seed": 3, "timed": True, "out": "{job}/video.mp4", **TINY}
    job = web_page.server.queue.submit(
        "generate", {**options, "dense_start": 0.25}, title="a red circle", kind="compare"
    )
    done = web_page.server.queue.wait(job.id, 120)
    assert (done.state, done.error) == ("done", "")
    return json.loads((web_page.out / job.id / "video.json").read_text())


@pytest.fixture
def shown(compared, open_tab):
    def opened(width=1280):
        tab = open_tab(width)
        tab.get_by_role("tab", name="Compare").click()
        tab.get_by_text("Earlier comparisons").click()
        tab.wait_for_function("document.querySelector('#cmp-earlier input').value")
        tab.click("#cmp-open")
        tab.wait_for_selector("#cmp-figures table")
        tab.wait_for_selector("#cmp-heat img")
        return tab

    return opened


def test_x(shown):
    tab = shown()
    tab.screenshot(path="/tmp/screens/cmp.png", full_page=True)
