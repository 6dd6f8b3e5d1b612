"""The screen Generate in a browser, on the demo model."""

import pytest

from gen_accel.measure.video_io import count_frames

pytestmark = pytest.mark.nightly

PROMPT = "a blue circle moves left"


def small(tab, **sizes):
    """Give the form the least sizes."""
    for name, value in {"frames": 9, "height": 48, "width": 48, "steps": 2, **sizes}.items():
        control = tab.locator(f"#gen-{name}").locator("textarea, input").first
        control.fill(str(value))
        control.press("Tab")


@pytest.fixture(scope="module")
def clip(web_page):
    """A clip of another seed, made through the queue."""
    options = {"model": "demo", "prompt": [PROMPT], "out": "{job}/video.mp4", "seed": 7}
    options |= {"frames": 9, "height": 48, "width": 48, "steps": 2, "json": "{job}/result.json"}
    options |= {"method": "radial", "set": ["decay_factor=0.5"], "dense_start": 0.5}
    queue = web_page.server.queue
    job = queue.wait(queue.submit("generate", options, title=PROMPT, kind="generate").id, 180)
    assert job.state == "done", job
    return queue.place(job) / "video.mp4"


def test_a_clip_is_made_and_plays(browser_page, web_page):
    small(browser_page)
    browser_page.click("#gen-run")
    browser_page.wait_for_selector("#gen-result video")
    browser_page.wait_for_function("document.querySelector('#gen-result video').duration > 0")
    job = web_page.server.queue.jobs()[-1]
    assert {file.name for file in web_page.server.queue.files(job)} == {
        "result.json",
        "thumbnail.jpg",
        "video.mp4",
        "video.preview.png",
    }
    facts = browser_page.text_content("#gen-result dl")
    assert "density" in facts
    assert job.title in facts
    browser_page.click("#gen-result .ga-badge")  # rule, not tuned
    browser_page.wait_for_selector("#tune-run:visible")


def test_a_bad_size_is_the_sentence_of_the_library(browser_page):
    small(browser_page, width=50)
    browser_page.click("#gen-run")
    browser_page.wait_for_selector(
        "#gen-error >> text=width must be a multiple of 16, got 50; nearest: 48 or 64"
    )
    assert "Traceback" not in browser_page.content()


def test_the_settings_in_a_clip_fill_the_form(browser_page, clip):
    browser_page.click("#gen-advanced > button")
    browser_page.get_by_text("Settings of an earlier clip").click()
    browser_page.set_input_files("#gen-settings input[type=file]", str(clip))
    browser_page.wait_for_function("document.querySelector('#gen-seed input').value == '7'")
    assert browser_page.input_value("#gen-prompt textarea") == PROMPT
    assert browser_page.is_checked("#gen-quality input[value=own]")
    assert browser_page.input_value("#gen-dense-start input") == "0.5"
    decay = browser_page.locator("#gen-fields").get_by_label("Decay factor")
    decay.wait_for()
    assert decay.input_value() == "0.5"


def test_stop_ends_it_and_leaves_no_file(browser_page, web_page):
    asked = []  # for the preview, of which some come when it is gone
    browser_page.route("**/*.preview.png*", lambda one: asked.append(one))
    small(browser_page, steps=500)
    browser_page.click("#gen-run")
    browser_page.wait_for_selector("#gen-so-far img", state="attached")
    browser_page.wait_for_selector("#gen-progress >> text=of 500")
    queue = web_page.server.queue
    job = queue.jobs()[-1].id
    before = queue.job(job).progress.done
    browser_page.click("#gen-stop")
    assert queue.wait(job, 180).state == "stopped"
    assert asked
    for one in asked:
        one.continue_()
    browser_page.wait_for_selector("#gen-progress .ga-stopped")
    assert [one.name for one in queue.place(job).iterdir()] == ["job.json"]
    assert before < 500


def test_a_stream_plays_while_it_grows_and_goes_on(browser_page, web_page):
    """Past what was there when the browser asked for it first; stopped, it stays."""
    browser_page.click("#gen-advanced > button")
    browser_page.click("#gen-longer-fold > button")
    browser_page.locator("#gen-stream input").check()
    small(browser_page, frames=261, width=96, height=96)
    browser_page.wait_for_selector("#gen-plan >> text=frames a second")
    browser_page.click("#gen-run")
    film = "document.querySelector('#gen-so-far video[data-growing]')"
    browser_page.wait_for_selector("#gen-so-far video[data-growing]", state="attached")
    browser_page.wait_for_function(f"{film}.currentTime > 0")
    browser_page.wait_for_function(f"{film}.src.includes('?')")  # asked for once more
    browser_page.wait_for_function(f"{film}.currentTime > 2")
    queue = web_page.server.queue
    job = queue.jobs()[-1].id
    browser_page.click("#gen-stop")
    assert queue.wait(job, 180).state == "stopped"
    browser_page.wait_for_selector("#gen-so-far video:not([data-growing])")
    left = count_frames(queue.place(job) / "video.stream" / "film.mp4")
    assert 12 < left < 261
    browser_page.wait_for_function("document.querySelector('#gen-so-far video').duration > 0.5")

    again = queue.again(job)
    assert again.options["resume"] is True
    made = len([*(queue.place(again) / "video.stream").glob("chunk-*")])
    assert made >= left // 12
    done = queue.wait(again.id, 180)
    assert done.state == "done", done
    assert count_frames(queue.place(again) / "video.mp4") == 261
    assert len([*(queue.place(again) / "video.stream").glob("chunk-*")]) == 22
