"""The screen Generate in a browser, on the demo model."""


def test_a_clip_is_made_and_plays(browser_page):
    browser_page.click("#gen-run")
    browser_page.wait_for_selector("#gen-video video")
    browser_page.wait_for_function("document.querySelector('#gen-video video').duration > 0")
