"""Dry runs of every config that is shipped."""

import math

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from support.paths import ROOT
from support.runs import (
    files,
)

from gen_accel.lora import TrainConfig, dry_run, read_config

pytestmark = pytest.mark.usefixtures("one_thread")


SHIPPED = ROOT / "configs"
CONFIGS = sorted((SHIPPED / "lora").glob("*.yaml"))


LAUNCHES = sorted((SHIPPED / "accelerate").glob("*.yaml"))


class TestDryRun:
    @pytest.mark.turns(5)
    @pytest.mark.slow
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_config_that_is_shipped(self, path):
        given = read_config(path)
        done = dry_run(given)
        steps = max(2, len(given.stages)) * len(given.runs())
        assert done.steps == len(done.losses) == steps
        assert all(math.isfinite(loss) for loss in done.losses)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"height": 100}, "height must be a multiple of 16, got 100"),
            ({"stages": ("82:5",)}, "frames must be 1 more than a multiple of 4, got 82"),
            ({"targets": ("attn1.to_w",)}, "'attn1.to_w' is no linear layer"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            dry_run(TrainConfig(**fields))

    @pytest.mark.slow
    def test_windows_and_kernels_that_a_tiny_clip_has_not(self):
        """The window is larger than the smallest clips; the kernel needs a GPU."""
        window = {"method": "neighborhood", "settings": ("window=5,8,8",)}
        given = TrainConfig(kernel="triton", dense_layers=0, **window)
        assert all(math.isfinite(loss) for loss in dry_run(given).losses)

    @pytest.mark.slow
    def test_prompts_alone(self):
        given = TrainConfig(objective="distill", student_steps=2, starts="teacher")
        assert all(math.isfinite(loss) for loss in dry_run(given).losses)

    @pytest.mark.slow
    def test_it_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        dry_run(TrainConfig(ema_decay=0.9, gradient_accumulation=2, objective="distill"))
        assert files(tmp_path) == []


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_knows_every_field(path):
    """It raises ValueError for what it does not."""
    config = load_config_from_file(str(path))
    kinds = {"fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type.value == kinds.get(path.stem, "MULTI_GPU")
