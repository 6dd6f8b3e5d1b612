"""A run that goes on with more steps or further stages than it was begun with."""

import json
import shutil
from functools import partial

import pytest
import torch
from support import finetuning as ft
from support.runs import assert_same_run, losses, state

import gen_accel
from gen_accel.lora import checkpoint, trainer
from gen_accel.lora.batches import order
from gen_accel.lora.report import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

# Two sizes, so that a step's size is drawn too.
CLIPS = partial(ft.Clips, ((4, 8), (6, 4), (4, 8), (6, 4), (4, 8)))
PLAIN = ft.FULL | {"schedule": "constant", "warmup_steps": 2, "checkpoint_every": 3}


def trained(out, stages, *, resume=False, **fields):
    given = ft.config(out, **(PLAIN | {"stages": stages} | fields))
    return ft.train(given, CLIPS(), resume=resume)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("four") / "run"
    trained(out, ("9:4",))
    return out


@pytest.fixture
def begun(four_steps, tmp_path):
    """A run of four steps, to go on with."""
    return shutil.copytree(four_steps, tmp_path / "run")


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "more"),
    [
        (("9:4",), ("9:7",)),
        (("9:4",), ("9:4", "17:3:position_interpolation")),
        (("9:2", "17:2:riflex"), ("9:2", "17:4:riflex", "9:1")),
        (("9:6",), ("9:6",)),
    ],
    ids=["more steps", "a stage", "both", "nothing"],
)
def test_it_equals_the_run_with_all_steps(tmp_path, first, more):
    trained(tmp_path / "run", first)
    trained(tmp_path / "run", more, resume=True)
    trained(tmp_path / "whole", more)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_fewer_steps_than_planned(tmp_path):
    trained(tmp_path / "run", ("9:4",), checkpoint_every=2)
    shutil.rmtree(tmp_path / "run" / trainer.CHECKPOINTS / "step-000004")
    trained(tmp_path / "run", ("9:3",), resume=True)
    trained(tmp_path / "whole", ("9:3",))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_knows_its_end(tmp_path, schedule):
    """It goes on within its warm-up alone, and then as if nothing had been."""
    about = {"schedule": schedule, "warmup_steps": 4, "checkpoint_every": 4}
    trained(tmp_path / "run", ("9:4",), **about)
    trained(tmp_path / "run", ("9:7",), **about, resume=True)
    trained(tmp_path / "whole", ("9:7",), **about)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ValueError, match=f"the learning rate of schedule {schedule}") as caught:
        trained(tmp_path / "run", ("9:9",), **about, resume=True)
    for part in (
        f"stages (the learning rate of schedule {schedule} in the 7 done steps",
        "('9:7',), now ('9:9',)",
        "a new run with another --out",
        f"--init-lora {tmp_path / 'run' / trainer.CHECKPOINTS / 'step-000007' / 'lora'}",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("9:3",), "stages (4 steps are done): ('9:4',), now ('9:3',)"),
        (("17:8",), "stages (the 4 done steps differ): ('9:4',), now ('17:8',)"),
        (("9:8:riflex",), "stages (the 4 done steps differ)"),
        (("9:2", "17:4"), "stages (the 4 done steps differ)"),
    ],
    ids=str,
)
def test_done_steps_that_differ(begun, stages, message):
    with pytest.raises(ValueError, match="is of another run") as caught:
        trained(begun, stages, resume=True)
    assert message in str(caught.value)
    assert "--init-lora" in str(caught.value)


def test_other_clips_in_the_done_stage(begun):
    given = ft.config(begun, **(PLAIN | {"stages": ("9:6",)}))
    with pytest.raises(ValueError, match=r"differs in data \(clips and captions\)"):
        ft.train(given, ft.Clips((ft.LATENTS,) * 4), resume=True)


def test_a_shift_that_follows_the_longest_stage(begun):
    given = ft.config(begun, **(PLAIN | {"stages": ("9:4", "17:1")}))
    with pytest.raises(ValueError, match=r"shift \(by the longest stage\): 3.0, now 4.0"):
        ft.train(given, CLIPS(), resume=True, shift=4.0)


@pytest.mark.slow
def test_it_is_measured_anew(tmp_path):
    """A longer stage has other figures, which begin where it was appended."""
    trained(tmp_path / "run", ("9:4",), loss_every=3)
    done = trained(tmp_path / "run", ("9:4", "17:3"), loss_every=3, resume=True)
    fixed = read_metrics(tmp_path / "run" / trainer.METRICS)[1]
    told = [(one["after"], one["frames"]) for one in fixed]
    assert told == [(0, 9), (3, 9), (4, 9), (4, 17), (6, 17), (7, 17)]
    assert done.steps == 7


@pytest.mark.slow
def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    trained(tmp_path / "run", ("9:3",))
    newest = checkpoint.found(tmp_path / "run" / trainer.CHECKPOINTS)[-1]
    told = json.loads((newest / checkpoint.STATE).read_text())
    del told["version"]
    (newest / checkpoint.STATE).write_text(json.dumps(told))
    match = f"another version of gen_accel.*--init-lora {newest / 'lora'}"
    with pytest.raises(ValueError, match=match):
        trained(tmp_path / "run", ("9:4",), resume=True)


def test_more_steps_begin_with_the_clips_of_fewer():
    buckets = [[0, 1, 2], [3, 4, 5, 6], [7]]
    plan = order(buckets, 40, 2, seed=3)
    assert all(order(buckets, steps, 2, seed=3) == plan[:steps] for steps in range(1, 40))


@pytest.mark.slow
def test_a_cache_that_is_encoded_anew_for_a_longer_stage(on_disk, tmp_path):
    """The clips of the done steps are the beginnings of the longer ones."""
    about = {"warmup_steps": 0, "checkpoint_every": 10}
    gen_accel.lora.train(on_disk(stages=("9:2",), **about))
    longer = on_disk(stages=("9:2", "17:2"), **about)
    done = gen_accel.lora.train(longer, resume=True)
    assert done.steps == 4
    whole = gen_accel.lora.train(longer.replaced(out=str(tmp_path / "whole"), cache=None))
    assert losses(tmp_path / "run") == whole.losses
    a, b = state(tmp_path / "run"), state(tmp_path / "whole")
    assert all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())
    assert a.state["stage_data"] == b.state["stage_data"]
