"""The screens Compare, Longer and Measure in a browser: one comparison and one longer video of
the demo model, made by what a person does, serve all tests."""

import json
import re

import pytest
from support.browser import choose

pytestmark = pytest.mark.nightly

SECONDS = 240.0  # that a run on a busy machine may take
WIDTHS = (390, 1280)
NARROW = "[document.documentElement.scrollWidth, window.innerWidth]"


def go_to(tab, name):
    tab.set_default_timeout(1000 * SECONDS)
    choose(tab, name)


def fill(tab, **values):
    for name, value in values.items():
        tab.locator(f"#{name.replace('_', '-')}").locator("input, textarea").first.fill(str(value))
        tab.keyboard.press("Tab")


def rows(tab, place):
    """Cells of a table by the first of each row."""
    found = tab.locator(f"{place} tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in found]
    return {first: rest for first, *rest in cells}


def downloaded(tab, place, words):
    with tab.expect_download() as found:
        tab.locator(f"{place} a", has_text=words).click()
    return found.value


@pytest.fixture(scope="module")
def visit(web_page, browser):
    """Opens a tab that outlives a test."""
    contexts = []

    def opened():
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        contexts[-1].set_default_timeout(1000 * SECONDS)
        tab = contexts[-1].new_page()
        tab.goto(web_page.url)
        tab.wait_for_selector("#screens button[role=tab]")
        return tab

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def compared(web_page, visit):
    """The report of a comparison, and what the page shows of it when it is done."""
    tab = visit()
    go_to(tab, "Compare")
    tab.fill("#cmp-prompt textarea", "a red circle moves left slowly")
    tab.locator("#cmp-quality label", has_text="Own settings").click()
    tab.click("#cmp-method input")
    tab.get_by_role("option", name="radial").click()
    decay = tab.locator("#cmp-fields").get_by_label("Decay factor")  # as the method declares it
    decay.fill("0.5")
    fill(tab, cmp_height=48, cmp_width=48, cmp_steps=4, cmp_seed=3, cmp_frames=9)
    tab.click("#cmp-run")
    tab.wait_for_selector("#cmp-figures table, #cmp-error .ga-error")
    [path] = web_page.out.glob("*/video.json")
    return json.loads(path.read_text()), rows(tab, "#cmp-figures")


@pytest.fixture
def comparison(compared, open_tab):
    """Opens the comparison again, from the list of earlier ones."""

    def opened(width):
        tab = open_tab(width)
        go_to(tab, "Compare")
        tab.locator("button:visible", has_text="Earlier comparisons").click()
        tab.wait_for_function("document.querySelector('#cmp-earlier input').value")
        tab.click("#cmp-open")
        tab.wait_for_selector("#cmp-frame-parts")
        tab.locator("#cmp-heat").scroll_into_view_if_needed()  # pictures out of sight wait
        tab.wait_for_selector("#cmp-heat img")
        return tab

    return opened


def test_figures_of_a_comparison_equal_its_report(compared):
    report, shown = compared
    assert (report["seed"], report["frames"], report["steps"]) == (3, 9, 4)
    assert shown["PSNR"][0] == f"{report['psnr_db']:.1f} dB"
    assert shown["SSIM"][0] == f"{report['ssim']:.3f}"
    assert shown["Density, sparse steps"][0] == f"{100 * report['density']:.3g} %"
    assert shown["Tokens"][0] == f"{report['tokens']:,}"
    assert "decay_factor=0.5" in shown["Method"][1]
    spent = report["attention_seconds"]
    assert f"{spent['dense']:.2f} s dense" in shown["Attention speed-up"][1]
    told = "not shown" if report["busy"] else f"{report['speedup']:.3g}\N{MULTIPLICATION SIGN}"
    assert shown.get("Speed-up", shown.get("Slower"))[0] == told


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_is_looked_at(comparison, compared, width):
    report, shown = compared
    tab = comparison(width)
    assert rows(tab, "#cmp-figures") == shown
    across, window = tab.evaluate(NARROW)
    assert across <= window
    tab.locator("#cmp-chart").scroll_into_view_if_needed()
    curve = tab.locator("#cmp-chart .mark-line path").first
    curve.wait_for()
    assert curve.bounding_box()["width"] > width / 3
    if width == min(WIDTHS):
        return
    assert tab.locator("#cmp-slider img").count() >= 2
    heat = tab.locator("#cmp-heat img").get_attribute("src")
    number = tab.locator("#cmp-frame input[type=number]")
    assert tab.locator("#cmp-apart").inner_text().startswith(f"Frame {number.input_value()}")
    other = "1" if number.input_value() != "1" else "2"
    number.fill(other)
    tab.keyboard.press("Tab")
    tab.wait_for_function(
        "before => document.querySelector('#cmp-heat img').src !== before", arg=heat
    )
    assert tab.locator("#cmp-apart").inner_text().startswith(f"Frame {other}")
    tab.wait_for_function("document.querySelector('#cmp-mask img').naturalWidth > 500")
    saved = downloaded(tab, "#cmp-figures", "Report (JSON)")
    assert json.loads(saved.path().read_text()) == report
    page = downloaded(tab, "#cmp-figures", "Report (HTML)").path().read_text()
    assert page.count("data:video/mp4") == 3


def test_both_players_do_the_same(comparison):
    tab = comparison(1280)
    both = "[...document.querySelectorAll('#cmp-players video')]"
    tab.wait_for_function(f"{both}.length === 2 && {both}.every((v) => v.readyState >= 2)")
    tab.click("#cmp-players .ga-controls button")
    tab.wait_for_function(f"{both}.every((v) => !v.paused)")
    tab.evaluate(f"{both}[1].pause()")
    tab.wait_for_function(f"{both}.every((v) => v.paused)")
    assert tab.locator("#cmp-players .ga-controls button").inner_text() == "Play both"
    tab.evaluate(f"{both}[1].currentTime = 0.25")
    tab.wait_for_function(f"Math.abs({both}[0].currentTime - 0.25) < 0.02")
    tab.evaluate(f"{both}[0].currentTime = 0")
    tab.wait_for_function(f"{both}[1].currentTime < 0.02")


def test_a_run_that_cannot_be_compared_is_one_sentence(browser_page):
    tab = browser_page
    go_to(tab, "Compare")
    tab.fill("#cmp-prompt textarea", "an elephant")
    tab.click("#cmp-run")
    tab.wait_for_selector("#cmp-error .ga-error")
    assert "the demo model does not know" in tab.locator("#cmp-error").inner_text()
    assert "Traceback" not in tab.content()


@pytest.fixture(scope="module")
def longer(web_page, visit):
    """A tab with a longer video: techniques chosen, made, and measured."""
    tab = visit()
    go_to(tab, "Longer")
    tab.wait_for_selector("#long-techniques table")
    tab.click("#long-extend input")
    tab.get_by_role("option", name="riflex").click()
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#long-techniques >> text=no: riflex does not go with")
    return tab


def test_refused_techniques_say_the_reason(longer):
    told = rows(longer, "#long-techniques")
    for name, reason in {
        "position_interpolation": "both set the temporal frequencies",
        "continuation": "its chunks are no longer than what the model was trained at",
    }.items():
        assert f"no: riflex does not go with {name}: {reason}" in told[name][0]
    for name in ("ultravico", "window_noise", "fresh_noise"):
        assert not told[name][0].startswith("no: ")
    assert "trained at 9" in told["riflex"][0]


def test_a_longer_video_is_made_and_measured(web_page, longer):
    sizes = {"long_height": 48, "long_width": 48, "long_steps": 2, "long_frames": 41}
    fill(longer, **sizes)
    longer.wait_for_selector("#long-plan .ga-plan")
    longer.click("#long-run")
    longer.wait_for_selector("#long-figures table, #long-error .ga-error")
    [job] = [one for one in web_page.server.queue.jobs() if one.kind == "longer"]
    assert (job.options["extend"], job.options["trained_frames"]) == ("riflex", 33)
    shown = rows(longer, "#long-figures")
    assert shown["frames"][0].startswith("41 at ")
    found = json.loads(downloaded(longer, "#long-figures", "JSON").path().read_text())
    assert found["frames"] == 41
    assert shown["loop score"][0].startswith(f"{found['loop_score']:.3f}")
    assert shown["similarity"][0].startswith(f"{found['similarity']:.3f}")
    longer.wait_for_function("document.querySelector('#long-result video').duration > 1")
    longer.wait_for_selector("#long-sheet img")
    for chart in ("loop", "drift"):
        longer.wait_for_selector(f"#long-{chart} canvas, #long-{chart} svg")
    longer.reload()
    go_to(longer, "Longer")
    for name, value in sizes.items():
        control = f"#{name.replace('_', '-')} :is(input, textarea)"
        longer.wait_for_function(f"document.querySelector('{control}').value == '{value}'")
    assert "riflex" in longer.locator("#long-extend").inner_text()


def test_a_lora_brings_its_techniques(longer):
    longer.click("#long-from-lora input")
    longer.get_by_role("option", name="long_lora_guided").click()
    longer.wait_for_selector("#long-plan .ga-plan:not(.ga-why)")


def go_to_part(tab, name):
    go_to(tab, "Measure & doctor")
    choose(tab, name, "#meas-parts")


def give(tab, name, file):
    tab.set_input_files(f"#meas-{name} input[type=file]", file)
    tab.wait_for_selector(f"#meas-{name} .file-preview")


def test_videos_are_measured(browser_page, compared, web_page):
    [report] = web_page.out.glob("*/video.json")
    tab = browser_page
    go_to_part(tab, "Videos")
    give(tab, "videos", report.with_name("video.mp4"))
    tab.click("#meas-run")
    tab.wait_for_selector("#meas-told table")
    alone = json.loads(downloaded(tab, "#meas-told", "JSON").path().read_text())
    assert rows(tab, "#meas-told")["flicker"][0] == f"{alone['flicker']:.4f}, 1 is still"
    tab.set_input_files("#meas-reference input[type=file]", report.with_name("video.dense.mp4"))
    tab.wait_for_selector("#meas-reference video")
    tab.click("#meas-run")
    tab.wait_for_function("document.querySelector('#meas-told').innerText.includes('PSNR')")
    found = json.loads(downloaded(tab, "#meas-told", "JSON").path().read_text())
    assert rows(tab, "#meas-told")["PSNR"][0] == f"{found['psnr_db']:.2f} dB"


def test_what_is_no_video_is_said_in_the_words_of_the_library(browser_page, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    go_to_part(browser_page, "Videos")
    give(browser_page, "videos", tmp_path / "notes.mp4")
    browser_page.click("#meas-run")
    browser_page.wait_for_selector("#meas-error .ga-error")
    said = browser_page.locator("#meas-error").inner_text()
    assert (
        said
        == "notes.mp4 cannot be read: it is no video that ffmpeg knows, or was cut off "
        + ("before its index")
    )


def test_a_run_is_estimated_over_its_length(browser_page):
    tab = browser_page
    go_to_part(tab, "What a run costs")
    tab.click("#meas-estimate")
    tab.wait_for_selector("#meas-cost .ga-pre")
    found = json.loads(downloaded(tab, "#meas-cost", "JSON").path().read_text())
    shown = tab.inner_text("#meas-cost")
    assert found["num_frames"] == 81
    assert f"density {found['density']:.3f}" in shown
    assert str(found["pays_from_frames"]) in shown
    assert len(found["curve"]) > 5
    tab.wait_for_selector("#meas-speed canvas, #meas-speed svg")
    fill(tab, meas_frames=80)
    tab.click("#meas-estimate")
    tab.wait_for_selector("#meas-estimate-error .ga-error")
    said = tab.locator("#meas-estimate-error").inner_text()
    assert said == "Frames must be 1 more than a multiple of 4, got 80; nearest: 77 or 81"


def test_a_preset_and_its_frontier_are_shown(browser_page):
    tab = browser_page
    go_to_part(tab, "Presets")
    tab.click("#meas-show")
    tab.wait_for_selector("#meas-frontier img")
    assert "verified" in tab.locator("#meas-rules").inner_text()
    taken = [cells for cells in rows(tab, "#meas-curve").values() if cells[-1] == "taken"]
    assert len(taken) == 1
    tab.fill("#meas-show-preset input", "/etc/passwd")
    tab.keyboard.press("Enter")
    tab.click("#meas-show")
    tab.wait_for_selector("#meas-preset-error .ga-error")
    assert "/etc/passwd is not a file of this page" in tab.inner_text("#meas-preset-error")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_doctor_is_copied_as_the_text_of_an_issue(open_tab, web_page, width):
    tab = open_tab(width)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=web_page.url)
    go_to_part(tab, "This machine")
    tab.click("#meas-doctor")
    tab.wait_for_selector("#meas-checks table")
    found = json.loads(downloaded(tab, "#meas-doctor-json", "JSON").path().read_text())
    shown = rows(tab, "#meas-checks")
    for one in found["checks"]:
        found_there, adds_it = shown[one["name"]]
        assert found_there == (one["found"] or "missing")
        assert adds_it.split() == ([] if one["found"] else one["fix"].split())
    reasons = {x for one in found["kernels"] for some in one["refused"].values() for x in some}
    assert all(reason in tab.locator("#meas-kernels").inner_text() for reason in reasons)
    tab.click("#meas-copy")
    text = tab.evaluate("navigator.clipboard.readText()")
    assert re.match(r"```text\ngen_accel +\S+\n", text)
    assert "Kernels:\n" in text
    across, window = tab.evaluate(NARROW)
    assert across <= window
