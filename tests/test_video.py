"""Sizes of a video's token grid: whole numbers, or symbols of a traced graph."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from gen_accel import VideoShape


@pytest.mark.parametrize(
    "size", [None, True, 2.0, "2", [2], torch.tensor(2), np.arange(2)], ids=repr
)
def test_sizes_that_are_no_whole_numbers(size):
    for name in ("frames", "height", "width", "text"):
        given = {"frames": 2, "height": 3, "width": 4, name: size}
        with pytest.raises(ValueError, match="must be whole numbers, got "):
            VideoShape(**given)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_too_small(size):
    with pytest.raises(ValueError, match="must be at least 1 and text at least 0, got "):
        VideoShape(size, 3, 4)


def test_numbers_of_numpy_and_symbols_of_a_graph():
    assert VideoShape(np.int64(2), 3, 4).tokens == 24

    def scaled(x):
        return x * VideoShape(x.shape[0], 3, 4).tokens

    graph = make_fx(scaled, tracing_mode="symbolic")(torch.ones(5))
    assert torch.equal(graph(torch.ones(7)), torch.full((7,), 84.0))
