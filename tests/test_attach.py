"""Methods on live diffusers pipelines: stock outside of `attach`, sparse inside, no trace after."""

import pytest
import torch
from wan import PIPELINES, generate, processors

from gen_accel import Dense, Neighborhood, Radial, attach
from gen_accel.attention_processors.seam import SparseProcessor

# On so few frames the default keeps every block.
RADIAL = Radial(decay_factor=0.2)
WINDOW = Neighborhood(window=(-1, 3, 4))
SPARSE = [RADIAL, WINDOW]

@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline(name):
    pipe = PIPELINES[name]()
    original = processors(pipe)
    steps = 4 if name == "two stages" else 2
    stock = generate(pipe, steps)
    with attach(pipe, Dense()):
        assert torch.equal(generate(pipe, steps), stock)
    for method in SPARSE:
        with attach(pipe, method) as handle:
            out = generate(pipe, steps)
            assert sum(isinstance(p, SparseProcessor) for p in processors(pipe)) == len(original) // 2
        assert torch.isfinite(out).all()
        assert not torch.allclose(out, stock, atol=1e-3)
        assert handle.summary().density < 1
    assert all(now is then for now, then in zip(processors(pipe), original, strict=True))
    assert torch.equal(generate(pipe, steps), stock)
