"""Time that a training takes, with the work beside its steps, and what its bar says."""

import pytest
from support import finetuning as ft

from gen_accel.lora.progress import Bar, RemainingTime
from gen_accel.pipelines.generation import progress

EVERY = {"loss": 4, "validation": 5}
CALLS = {"loss": 6, "validation": 30}


@pytest.fixture
def clock(tmp_path):
    given = ft.config(tmp_path, stages=("9:6", "17:4"), gradient_accumulation=2)
    return RemainingTime(given, EVERY, CALLS)


def test_when_it_is_due(clock):
    assert [done for done in range(11) if clock.is_due("loss", done)] == [0, 4, 8, 10]
    assert [done for done in range(11) if clock.is_due("validation", done)] == [0, 5, 10]
    never = RemainingTime(clock.config, {"loss": 0}, CALLS)
    assert not any(never.is_due("loss", done) for done in range(11))
    epochs = RemainingTime(clock.config.replaced(every="epochs"), {"loss": 2}, CALLS, (3, 1))
    assert epochs.due == {"loss": [0, 6, 8, 10]}  # they end after 3, 6, 7, 8, 9 and 10 steps
    assert [epochs.epoch(done) for done in (0, 3, 4)] == [f"epoch {i} of 2" for i in (1, 1, 2)]
    assert epochs.epoch(9) == "epoch 3 of 4"


def test_what_is_left(clock):
    assert clock.left(0, over={}) is None
    clock.note_step(0, 9.0)
    clock.note_beside("loss", 100.0)
    clock.note_beside("validation", 1000.0)
    # Five steps of 9 s, four of 17 s; losses after 4, 8 and 10, videos after 5 and 10.
    over = {"loss": 0, "validation": 0}
    assert clock.left(1, over=over) == pytest.approx(5 * 9 + 4 * 17 + 300 + 2000)
    clock.note_step(6, 20.0)
    assert clock.left(7, over=over) == pytest.approx(3 * 20 + 200 + 1000)
    assert clock.left(10, over=over) == pytest.approx(100 + 1000)
    assert clock.left(10, over=over | {"loss": 10}) == pytest.approx(1000)
    assert clock.left(10, over={"loss": 10, "validation": 10}) == 0


def test_a_guess_before_the_first(clock):
    """By forward passes: a step of 17 frames has two clips, and as many passes count as three."""
    clock.note_step(0, 9.0)
    assert clock.seconds("validation") == pytest.approx(30 / 3 * 17 / 2)


def test_what_is_said(clock, capsys, monkeypatch):
    """Without a terminal, as soon as it begins and then now and then."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    bar = Bar(clock, 0, shown=True)
    with bar.open():
        with bar.beside("validation") as part:
            for step in range(3):
                part(f"validation 1/1, step {step}/3", step / 3)
        bar.step(0, 2.5, 9.0)
        bar.fixed("held-out loss 0.4 -> 0.3")
        bar.step(1, 2.5, 9.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "validation 1/1, step 0/3, 0/10 steps, 0:00:00"
    assert lines[2].startswith("validation 1/1, step 2/3, 0/10 steps")
    assert "9 frames, loss 2.5000, 1/10 steps, 0:00:00, left 0:0" in lines[-2]
    assert lines[-1].startswith("9 frames, loss 2.5000, held-out loss 0.4 -> 0.3, 2/10 steps")


def test_it_says_at_once_what_begins(clock, capsys):
    bar = Bar(clock, 0, shown=True)
    with bar.open():
        bar.step(0, 2.5, 9.0)
        with bar.beside("loss") as part:
            for i in range(100):
                part(f"held-out loss, {i}/100", i / 100)
    said = [line.split(", 1/10")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["9 frames, loss 2.5000", "held-out loss, 0/100", "9 frames, loss 2.5000"]


def test_other_processes_say_nothing(clock, capsys):
    bar = Bar(clock, 0, shown=False)
    with bar.open(), bar.beside("loss") as part:
        part("held-out loss", 0.5)
        bar.step(0, 2.5, 9.0)
    assert capsys.readouterr().err == ""


def test_a_wait_without_a_terminal(capsys):
    with progress.waiting("loading the model demo"):
        assert capsys.readouterr().err == "loading the model demo\n"
