"""ZeRO-2 of DeepSpeed in two processes on the CPU: the losses of one process."""

from importlib.util import find_spec

import pytest
from support.families_to_train import trained
from support.runs import launch, losses, state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

FIELDS = {
    "method": "radial",
    "settings": ["block=4"],
    "stages": ["9:4"],
    "learning_rate": 1e-3,
    "checkpoint_every": 2,
}
CASES = {
    "plain": {},
    "linear": {"method": "sparse_linear", "settings": ["critical=0.2", "block_q=4", "block_k=4"]},
    "dora": {"dora": True, "gradient_checkpointing": "on"},
    "nf4": {"base": "nf4", "gradient_checkpointing": "offload"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "prodigy": {"optimizer": "prodigyopt.Prodigy"},
    "accumulated": {"gradient_accumulation": 2},
}
SHARED = {"context_parallel": 2, "gradient_checkpointing": "on"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    jobs = [
        {"out": str(folder / name), "family": "wan", "fields": FIELDS | more, "zero2": True}
        for name, more in (CASES | {"shared": SHARED}).items()
    ]
    again = {"out": str(folder / "again"), "resume": True, "half": [jobs[0]["out"], 4]}
    launch(*jobs, jobs[0] | again, launcher=False, DS_ACCELERATOR="cpu")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_a_batch_of_two(made, tmp_path, name):
    assert state(made / name).state["optimizer"] == "DEEPSPEED"
    trained(tmp_path, **(FIELDS | CASES[name] | {"batch_size": 2}))
    assert losses(made / name) == pytest.approx(losses(tmp_path), rel=1e-4)


def test_two_processes_share_a_clip(made, tmp_path):
    trained(tmp_path, **(FIELDS | SHARED | {"context_parallel": 1}))
    assert losses(made / "shared") == pytest.approx(losses(tmp_path), rel=1e-4)


def test_a_continuation_begins_with_the_same_parameters(made):
    first, again = losses(made / "plain"), losses(made / "again")
    assert again[:3] == first[:3]
    assert again[3] == pytest.approx(first[3], rel=1e-2)  # the optimizer has begun again
