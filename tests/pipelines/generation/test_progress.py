"""Progress where no terminal shows a bar: lines now and then."""

import pytest

from gen_accel.pipelines.generation import progress


def test_a_line_at_the_first_step_and_at_the_end(capsys):
    with progress.Progress() as bar:
        tick = progress.ticker(bar, "cat.mp4")
        for step in range(50):
            tick(step + 1, 50)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("cat.mp4 1/50 steps, 0:00:0")
    assert "left 0:00:0" in first
    assert last.startswith("cat.mp4 50/50 steps, 0:00:0")


def test_lines_as_seconds_pass(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress() as bar:
        assert [*bar.track(range(3), description="clips")] == [0, 1, 2]
        task = bar.add_task("training", total=5, completed=2, unit="steps")
        bar.update(task, completed=3, description="9 frames, loss 0.5000")
    *clips, trained = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in clips] == ["clips 1/3", "clips 2/3", "clips 3/3"]
    assert trained.startswith("9 frames, loss 0.5000, 3/5 steps")


def test_a_bar_on_a_terminal_starts_again_with_each_part_of_a_video(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.Progress() as bar:
        tick = progress.ticker(bar, "cat.mp4")
        for done in (1, 2, 1):
            tick(done, 2)
        bar.update(bar.add_task("training"), completed=3, total=5, left=60)
        assert bar._bars.tasks[0].completed == 1
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("cat.mp4", "1/2", "steps", "training", "0:01:00"))


def test_parts_of_a_task_are_one_bar_with_one_time(capsys, monkeypatch):
    """No part says that nothing is left while another one follows."""
    heard, now = [], [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.heard_by(heard.append), progress.Progress() as bar:
        whole = bar.parted()
        whole.expect(120.0)
        first, second = whole.parts(1, 1, labels=("clip 1 of 2", "clip 2 of 2"))
        for clip in (first, second):
            steps, frames = clip.parts(3, 1)
            steps.show("step 1 of 2")
            now[0] += 30.0
            steps.show("step 2 of 2", 0.5)
            frames.ticker("decoding")(9, 9)
    assert [round(one.done, 3) for one in heard] == [0, 0, 18.75, 37.5, 50, 50, 68.75, 87.5, 100]
    assert {(one.task, one.total, one.unit) for one in heard} == {(0, 100, "%")}
    told = ["", "step 1 of 2", "step 2 of 2", "decoding", "decoding"]
    assert [one.words for one in heard[:5]] == [f"{'clip 1 of 2, ' * bool(t)}{t}" for t in told]
    left = [one.left for one in heard]
    assert left[:4] == [None, 120.0, pytest.approx(130.0), pytest.approx(50.0)]
    assert all(one >= 1 for one in left[1:-1])
    assert left[-1] is None
    assert capsys.readouterr().err == ""


def test_a_task_with_parts_without_a_terminal(capsys):
    with progress.Progress() as bar:
        bar.say("denoising 0/2, 1,296 tokens")
        steps, frames = bar.parted().parts(3, 1)
        steps.show("step 1 of 2", 0.1)
        steps.show("step 2 of 2", 0.5, at_once=True)
        frames.ticker("decoding")(9, 9)
    first, step, last = capsys.readouterr().err.splitlines()
    assert first == "denoising 0/2, 1,296 tokens"
    assert step.startswith("step 2 of 2, 37 %, 0:00:0")
    assert "left 0:00:01" in step
    assert last.startswith("decoding, 100 %, 0:00:0")


def test_a_wait_moves_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.waiting("loading the model demo"):
        pass
    shown = capsys.readouterr().err
    assert "loading the model demo" in shown
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in shown  # the bar
    assert "left" not in shown  # nobody knows how long
