"""What cannot fit is refused with the figure, before it is asked for."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gen_accel import Radial, VideoShape, memory
from gen_accel.attention_processors.methods.block_mixture import BlockMixture
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.memory import check_adapter, check_batch
from gen_accel.lora.prepare import check_components
from gen_accel.measure.cost.bounds import tile_bound
from gen_accel.pipelines.generation.sampling import Clip

GB = 10**9


@pytest.fixture(autouse=True)
def sixteen_gigabytes(monkeypatch):
    monkeypatch.setattr(memory, "_free_of_host", lambda: 16 * GB)


def test_the_figure_is_what_is_asked_for_and_what_there_is():
    memory.check_room("this", 16 * GB, "take less")
    with pytest.raises(ValueError, match=r"^this cannot fit: at least 16\.1 GB of memory, and "):
        memory.check_room("this", 16 * GB + GB // 10, "take less")
    with pytest.raises(ValueError, match=r"16\.0 GB are free; take less$"):
        memory.check_room("this", 10**400, "take less")


def test_a_device_that_does_not_tell_refuses_nothing():
    memory.check_room("this", 10**15, "take less", torch.device("meta"))


@pytest.mark.parametrize(
    ("method", "video"),
    [
        (Radial(), VideoShape(100_000, 1000, 1000)),
        (BlockMixture(), VideoShape(2000, 100, 100)),
        (Radial(), VideoShape(5, 12, 12, text=100_000_000)),
    ],
    ids=str,
)
def test_plans(method, video):
    with pytest.raises(ValueError, match=r"^a plan of .* tokens cannot fit: at least "):
        method.planned(video)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 100_000_000},
        {"stages": ("81:1000000000000",)},
        {"height": 160_000_000},
        {"batch_size": 10**12},
        {"dense_layers": 10**9},
        {"learning_rate": 1e38},
        {"adapter": "image_prompt", "image_size": 10**6},
    ],
    ids=str,
)
def test_configs(fields):
    with pytest.raises(ValueError, match=r"cannot fit|at most|be from \d to"):
        check_components(TrainConfig(**fields))


@pytest.mark.parametrize("fields", [{"steps": 10**12}, {"max_tokens": 10**8}], ids=str)
def test_clips(fields):
    with pytest.raises(ValueError, match=r"cannot fit|steps must be from 1 to 10000"):
        Clip(**fields)


def test_batches_and_ranks(monkeypatch):
    class Site:
        heads, dim = 2, 32

    class Model(nn.Module):
        device = torch.device("cpu")

    class Family:
        training = SimpleNamespace(one_text_length=False)

        @staticmethod
        def self_attentions(model):
            return [Site] * 4

    monkeypatch.setattr("gen_accel.lora.memory.family_of", lambda model: Family)
    check_batch(TrainConfig(), Model(), 1000)
    with pytest.raises(ValueError, match=r"^batch_size 1000000 of 1000 tokens each cannot fit"):
        check_batch(TrainConfig(batch_size=1_000_000), Model(), 1000)
    check_adapter(TrainConfig(), Model())
    with pytest.raises(ValueError, match=r"^a LoRA of rank 1000000000 on 4 attentions cannot fit"):
        check_adapter(TrainConfig(rank=10**9), Model())


def test_axes_of_a_simulation():
    from gen_accel import Neighborhood

    with pytest.raises(ValueError, match=r"^an axis of 1000000000 tokens cannot fit"):
        tile_bound(
            VideoShape(10**9, 4, 4), Neighborhood((3, 3, 3)), tile_q=(1, 4, 4), tile_k=(1, 4, 4)
        )
