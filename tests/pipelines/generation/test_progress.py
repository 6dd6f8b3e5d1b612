"""Progress where no terminal shows a bar: lines now and then."""

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
    assert trained.startswith("9 frames, loss 0.5000 3/5 steps")


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
