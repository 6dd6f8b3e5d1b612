"""The screen Train in a browser, by what a person does: real trainings of the demo model."""

import json
import shutil

import pytest
import yaml
from support.browser import choose
from typer.testing import CliRunner

from gen_accel.cli import app
from gen_accel.demo.world import write_clips
from gen_accel.lora.data.finding import find_videos

pytestmark = pytest.mark.nightly

SMALL = {
    "rank": "2",
    "stages": "9:500",
    "loss_every": "2",
    "held_out": "1",
    "validate_every": "100",
    "validation_prompts": "a red square moves right",
}
FOLDED = {"Keeping": {"validation_steps": "1"}, "Attention": {"dense_layers": "0"}}
STAYS = 120_000  # milliseconds for what a busy machine takes


@pytest.fixture(scope="module")
def data(web_page):
    """Two clips of nine frames, in a folder that the page may read."""
    folder = web_page.out / "clips" / "few"
    write_clips(folder, frames=9, count=2, size=48)
    return folder


@pytest.fixture
def train(open_tab):
    """Opens a tab on the screen."""

    def opened(width=1280, *, folded=False):
        tab = open_tab(width)
        tab.set_default_timeout(STAYS)
        show_screen(tab, folded=folded)
        return tab

    return opened


def show_screen(tab, *, folded=False):
    """Show the screen, with what it folds or without."""
    choose(tab, "Train")
    tab.wait_for_selector("#train-start")
    for fold, inside in (("all", "rank"), ("file", "yaml"))[: 0 if folded else 2]:
        tab.click(f"#train-{fold} > button")
        tab.wait_for_selector(f"#train-{inside}")


def field(tab, name):
    return tab.locator(f"#train-{name.replace('_', '-')}").locator("textarea, input").first


def enter(tab, **values):
    for name, value in values.items():
        field(tab, name).fill(value)
        field(tab, name).blur()


def shown_yaml(tab):
    """The YAML of the page, which shows a part of it at a time."""
    return tab.evaluate(
        "document.querySelector('#train-yaml .cm-content').cmTile?.view?.state.doc.toString() ?? "
        "document.querySelector('#train-yaml .cm-content').cmView.view.state.doc.toString()"
    )


def wait_for_yaml(tab, **fields):
    """Wait until the YAML says so; what it is then."""
    for _ in range(STAYS // 200):
        text = shown_yaml(tab)
        try:
            held = yaml.safe_load(text)
        except yaml.YAMLError:
            held = {}
        if all(held.get(name) == value for name, value in fields.items()):
            return text
        tab.wait_for_timeout(200)
    raise AssertionError(f"{fields} is not in {text}")


def steps_of(out):
    lines = (out / "metrics.jsonl").read_text().splitlines() if out.is_dir() else []
    return [told["step"] for told in map(json.loads, lines) if "step" in told]


def wait_for_steps(tab, out, count):
    for _ in range(STAYS // 100):
        if (out / "metrics.jsonl").is_file() and len(steps_of(out)) >= count:
            return
        tab.wait_for_timeout(100)
    raise AssertionError(tab.inner_text("#train-progress") + tab.inner_text("#train-error"))


def fill_small(tab, data, out):
    enter(tab, data=str(data), out=str(out), height="48", width="48", **SMALL)
    for group, values in FOLDED.items():
        tab.locator("button.label-wrap", has_text=group).click()
        enter(tab, **values)
    return wait_for_yaml(tab, out=str(out), rank=2, dense_layers=0, validation_steps=1)


def test_a_caption_is_edited_into_its_file(train, data):
    tab = train()
    tab.click("#train-example")
    tab.wait_for_selector("#train-found >> text=6 clips made")
    tab.wait_for_selector("#train-clips img:visible")
    enter(tab, data=str(data), stages="9:2")
    tab.click("#train-look")
    tab.wait_for_selector("#train-found >> text=2 clips, 2 captions")
    assert "made" not in tab.inner_text("#train-found")
    tab.locator('#train-clips [data-testid="cell-1-1"]:visible').dblclick()
    tab.keyboard.press("Control+a")
    tab.keyboard.insert_text("a caption of my own")
    tab.keyboard.press("Enter")
    tab.click("#train-save")
    tab.wait_for_selector("#train-found >> text=saved: 0001.txt")
    assert (data / "0001.txt").read_text() == "a caption of my own\n"
    assert [video.caption for video in find_videos(data)][1] == "a caption of my own"


def test_yaml_equals_print_config_both_ways(train, data, web_page, tmp_path):
    tab = train()
    field(tab, "runs").focus()
    tab.keyboard.press("Tab")  # left without a choice
    enter(tab, data=str(data), rank="4", learning_rate="0.0005")
    text = wait_for_yaml(tab, rank=4, learning_rate=0.0005, data=str(data))
    out = str(web_page.out.resolve() / "trainings" / "lora")
    flags = {"model": "demo", "data": data, "out": out, "rank": 4}
    flags |= {"height": 96, "width": 96, "learning-rate": 5e-4, "stages": "33:200"}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    printed = CliRunner().invoke(app, ["train", "--print-config", *given])
    assert f"{text.strip()}\n" == printed.stdout
    assert not tab.query_selector(".toast-body.error")
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("rank: 4 ", "rank: 5 "))
    with tab.expect_file_chooser() as chosen:
        tab.click("#train-load")
    chosen.value.set_files(file)
    assert wait_for_yaml(tab, rank=5) == text.replace("rank: 4 ", "rank: 5 ")
    assert field(tab, "rank").input_value() == "5"
    tab.locator("#train-yaml .cm-content").click()
    tab.keyboard.press("Control+a")
    tab.keyboard.insert_text("rank: 6\nmodel: demo\n")
    field(tab, "out").focus()
    tab.wait_for_function("document.querySelector('#train-rank input').value == '6'")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": "-1"}, "rank must be at least 0, got -1"),
        ({"stages": "many"}, "a stage is written frames:steps"),
    ],
    ids=["range", "type"],
)
def test_a_bad_value_is_a_sentence(train, fields, sentence):
    tab = train()
    enter(tab, **fields)
    tab.wait_for_selector(f"#train-config-error >> text={sentence}")
    tab.click("#train-start")
    tab.wait_for_selector(f"#train-error >> text={sentence}")
    assert tab.query_selector("#train-progress [data-job]") is None


def test_a_folder_that_is_gone_is_a_sentence(train, web_page, data):
    gone = shutil.copytree(data, web_page.out / "clips" / "gone")
    tab = train()
    enter(tab, data=str(gone), stages="9:2")
    tab.click("#train-look")
    tab.wait_for_selector("#train-clips img:visible")
    shutil.rmtree(gone)
    for button, place in (("look", "clips-error"), ("save", "clips-error"), ("start", "error")):
        tab.click(f"#train-{button}")
        tab.wait_for_selector(f"#train-{place} >> text=nothing")
    enter(tab, data="/etc")
    tab.click("#train-look")
    tab.wait_for_selector("#train-clips-error >> text=is not a file of this page")


def test_plan_and_dry_run(train, data):
    tab = train()
    enter(tab, data=str(data), stages="9:2")
    tab.click("#train-plan")
    tab.wait_for_selector("#train-plan-told .ga-pre")
    told = tab.inner_text("#train-plan-told")
    assert "RTX 4090" in told
    assert "fits" in told
    tab.click("#train-dry-run")
    tab.wait_for_selector("#train-plan-told >> text=2 steps on a tiny model, losses")


def test_start_stop_resume(train, web_page, data):
    out = web_page.out.resolve() / "trainings" / "small"
    tab = train()
    fill_small(tab, data, out)
    tab.click("#train-start")
    wait_for_steps(tab, out, 2)
    tab.click("#train-start")  # a second run of the folder is refused while this one holds it
    tab.wait_for_selector("#train-error >> text=is in use by process")
    tab.wait_for_selector("#train-loss canvas, #train-loss svg")
    tab.reload()
    tab.click("#status .ga-stop")
    show_screen(tab)
    tab.wait_for_selector("#train-progress [data-state=stopped]")
    done = len(steps_of(out))
    assert f"step-{done:06d}" in [path.name for path in (out / "checkpoints").iterdir()]
    report = tab.frame_locator("#train-report iframe")
    report.get_by_text("stopped, --resume goes on").wait_for()
    assert field(tab, "stages").input_value() == "9:500"  # the settings came back

    enter(tab, stages=f"9:{done + 2}")
    wait_for_yaml(tab, stages=[f"9:{done + 2}"])
    tab.click("#train-resume")
    tab.wait_for_selector("#train-progress [data-state=done]")
    assert steps_of(out) == list(range(done + 2))
    tab.wait_for_selector("#train-use")
    for name in ("loss", "fixed-loss", "rate"):
        tab.wait_for_selector(f"#train-{name} canvas, #train-{name} svg")
    report.get_by_text("complete", exact=True).wait_for()
    assert report.get_by_role("heading", name="Training of small").is_visible()
    assert f"step {done + 2}" in report.locator("figcaption").first.inner_text()
    assert f"--from-lora {out / 'lora'}" in report.locator("pre").first.inner_text()
    length = "one => new Promise(done => one.duration ? done(1) : one.onloadedmetadata = done)"
    report.locator("video").first.evaluate(length)
    link = tab.get_attribute("#train-report a", "href")
    answer = tab.request.get(f"{web_page.url}/{link}")
    assert answer.ok
    assert answer.headers["content-type"].startswith("text/html")
    assert "content-disposition" not in answer.headers
    assert "allow-scripts" not in answer.headers["content-security-policy"]

    tab.click("#train-use")
    tab.wait_for_function(
        f"document.querySelector('#gen-from-lora :is(input, textarea)')?.value == '{out / 'lora'}'"
    )
    other = train(folded=True)  # opens what another tab trained
    other.click("#train-runs input")
    other.get_by_role("option", name="small").click()
    other.frame_locator("#train-report iframe").get_by_text("complete", exact=True).wait_for()
    assert field(other, "stages").input_value() == f"9:{done + 2}"


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(train, width):
    tab = train(width)
    sizes = "one => [one.scrollHeight, one.clientHeight]"
    for fold in tab.locator("#train-all button.label-wrap").all():  # whole, and on one line
        high, inside = fold.evaluate(sizes)
        assert high == inside < 40
    for name in ("look", "start", "resume", "plan", "load"):
        tab.locator(f"#train-{name}").first.scroll_into_view_if_needed()
        box = tab.locator(f"#train-{name}").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
