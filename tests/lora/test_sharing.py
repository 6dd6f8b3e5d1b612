"""Two processes that share their clips train as one does: losses, gradients, checkpoints."""

import numpy as np
import pytest
from support import finetuning as ft
from support import hunyuan, wan
from support.families_to_train import trained
from support.products import asked
from support.runs import assert_same_run, launch, losses, metrics, state
from support.tiny import cases

import gen_accel
from gen_accel.lora import prepare, processes
from gen_accel.measure.video_io import read_video, write_video

TINY = {case.name: case for case in cases()}

pytestmark = pytest.mark.usefixtures("one_thread")

# Adam would divide rounding errors by themselves where a gradient is next to nothing.
SHARED = {
    "context_parallel": 2,
    "stages": ["9:2"],
    "optimizer": "torch.optim.SGD",
    "optimizer_settings": ["momentum=0.9"],
    "learning_rate": 1.0,
}
RADIAL = {"method": "radial", "settings": ["block=4"]}
LINEAR = {"method": "sparse_linear", "settings": [*ft.SPARSE, "combine=alpha"]}
PIECEWISE = {"method": "piecewise", "settings": ["critical=0.2", "block_q=4", "block_k=4"]}
LONG = {
    "stages": ["9:2", "17:2:position_interpolation"],
    "gradient_accumulation": 2,
    "batch_size": 2,
    "ema_decay": 0.9,
    "checkpoint_every": 2,
    "gradient_checkpointing": "on",
}
# Sampled videos, and losses at fixed noise of two clips.
SEEN = RADIAL | {
    "validate_every": 2,
    "validation_prompts": ["a red square moves right"],
    "validation_frames": 5,
    "validation_steps": 1,
    "guidance_scale": 1.0,
    "max_tokens": 16,
    "loss_every": 2,
}
FIRST, IN_PARTS = "wan linear", "weights in parts"
# By name the family and the fields of a training.
CASES = {
    FIRST: ("wan", LINEAR | LONG),
    "wan radial": ("wan", RADIAL | {"dense_layers": 1}),
    "wan piecewise": ("wan", PIECEWISE | {"gradient_checkpointing": "offload"}),
    "wan teacher": ("wan", LINEAR | {"objective": "distill", "dense_layers": 1}),
    "hunyuan linear": ("hunyuan", LINEAR | {"gradient_checkpointing": "on"}),
    "hunyuan radial": (
        "hunyuan",
        RADIAL | {"dense_layers": 1, "targets": ["attention", "feed_forward"]},
    ),
    "hunyuan piecewise": ("hunyuan", PIECEWISE | {"gradient_checkpointing": "offload"}),
    "hunyuan teacher": ("hunyuan", LINEAR | {"objective": "distill", "dense_layers": 1}),
    "low memory": (
        "wan",
        RADIAL | {"base": "fp8", "blocks_to_swap": 2, "gradient_checkpointing": "offload"},
    ),
    IN_PARTS: ("wan", RADIAL | {"dora": True, "gradient_checkpointing": "on"}),
}


def assert_same_training(out, alone):
    """Losses, and the sums of gradients that the optimizer keeps, each to its own scale."""
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    for a, b in zip(metrics(out), metrics(alone), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    a, b = state(out).tensors, state(alone).tensors
    assert a.keys() == b.keys()
    moved = [name for name in a if name.endswith("momentum_buffer")]
    assert any(b[name].abs().max() > 0 for name in moved)
    for name in moved:
        scale = b[name].abs().max()
        assert (a[name] - b[name]).abs().max() <= 1e-4 * scale, name


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """Folder of what two processes make of the cases of today, and of the first from its half."""
    folder = tmp_path_factory.mktemp("shared")
    jobs = [
        {"out": str(folder / name), "family": family, "fields": SHARED | fields}
        | ({"sharded": True} if name == IN_PARTS else {})
        for name, (family, fields) in CASES.items()
        if name in {FIRST, *asked(request)}
    ]
    again = {"out": str(folder / "again"), "resume": True, "half": [jobs[0]["out"], 4]}
    seen = {"out": str(folder / "seen"), "fields": SHARED | SEEN}
    jobs[1:1] = [jobs[0] | again, seen]
    launch(*jobs, launcher=False)
    return folder


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(made, tmp_path, name):
    family, fields = CASES[name]
    trained(tmp_path, family, **(SHARED | fields | {"context_parallel": 1}))
    assert_same_training(made / name, tmp_path)
    assert state(made / name).state["processes"] == 1


@pytest.mark.nightly
@pytest.mark.slow
def test_two_groups_of_two(tmp_path):
    """Four processes take two clips a step, as one process does with a batch of two."""
    fields = SHARED | {**LINEAR, **LONG, "batch_size": 1}
    launch({"out": str(tmp_path / "four"), "fields": fields}, launcher=False, count=4)
    ft.train(ft.config(tmp_path / "one", **(fields | {"context_parallel": 1, "batch_size": 2})))
    assert state(tmp_path / "four").state["processes"] == 2
    assert_same_training(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_what_they_sample_and_measure(made, tmp_path):
    given = ft.config(tmp_path, **(SHARED | SEEN | {"context_parallel": 1}))
    ft.train(given, pipe=wan.pipeline())
    outs = made / "seen", tmp_path
    for step in ("step-000000", "step-000002"):
        a, b = (read_video(out / "validation" / step / "00.mp4") for out in outs)
        assert a.shape == b.shape
        assert abs(a.astype(float) - b).max() <= 1
    a, b = ([line["fixed_loss"] for line in metrics(out) if "fixed_loss" in line] for out in outs)
    assert len(a) == 2
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_they_resume_to_the_bit(made):
    assert_same_run(made / "again", made / "wan linear")


@pytest.mark.slow
def test_one_process_goes_on_from_two(made, tmp_path):
    family, fields = CASES["wan linear"]
    ft.half(str(tmp_path / "one"), str(made / "wan linear"), 4)
    trained(tmp_path / "one", family, resume=True, **(SHARED | fields | {"context_parallel": 1}))
    assert_same_training(tmp_path / "one", made / "wan linear")


class TestRefusals:
    def test_fields(self):
        with pytest.raises(ValueError, match="context_parallel must be at least 1, got 0"):
            ft.config("unused", context_parallel=0)
        with pytest.raises(ValueError, match="context_parallel 2 is for adapter lora"):
            ft.config("unused", context_parallel=2, **ft.IMAGES)

    def test_a_number_of_processes_before_anything_is_loaded(self, tmp_path):
        given = ft.config(tmp_path, context_parallel=2, model=str(tmp_path), data=str(tmp_path))
        with pytest.raises(ValueError, match=r"a multiple of 2 processes, got 1: .*\.yaml"):
            gen_accel.lora.train(given)

    @pytest.mark.parametrize(
        ("fields", "build", "message"),
        [
            ({"context_parallel": 3}, wan.transformer, "3 does not divide the 2 heads of Wan"),
            (
                {"method": "block_mixture", "settings": ("scope=overall",)},
                wan.transformer,
                "context_parallel does not take scope='overall'",
            ),
            (
                {},
                lambda: hunyuan.transformer(image_condition_type="token_replace"),
                "no plan of context parallelism for Hunyuan.*token_replace",
            ),
            ({}, TINY["ltx"].build, "no plan of context parallelism for LTX"),
        ],
    )
    def test_models_and_methods(self, fields, build, message):
        given = ft.config("unused", **({"context_parallel": 2, "settings": ()} | fields))
        with pytest.raises(ValueError, match=message):
            processes.check_shareable(given, build())

    def test_a_model_before_its_weights_are_loaded(self, tmp_path, monkeypatch):
        wan.pipeline().save_pretrained(tmp_path / "model")
        monkeypatch.setattr(prepare, "load_pipe", None)
        monkeypatch.setattr(processes, "check_groups", lambda *_: None)
        (tmp_path / "clips").mkdir()
        write_video(np.zeros((9, 16, 16, 3), np.uint8), tmp_path / "clips" / "a.mp4", fps=16)
        (tmp_path / "clips" / "a.txt").write_text("a red circle\n")
        data = str(tmp_path / "clips")
        fields = {"model": str(tmp_path / "model"), "data": data, "context_parallel": 3}
        with pytest.raises(ValueError, match="3 does not divide the 2 heads"):
            gen_accel.lora.train(ft.config(tmp_path / "out", **fields))

    def test_tokens(self):
        given = ft.config("unused", context_parallel=2)
        processes.check_tokens(given, 9, (48, 80), 44)
        said = "2 does not divide the 45 tokens of 9 frames of 48 x 80"
        with pytest.raises(ValueError, match=said):
            processes.check_tokens(given, 9, (48, 80), 45)
