"""AnyFlow FAR through its own pipeline, whose chunks see earlier ones from its cache."""

import pytest
import torch
from support.tiny import anyflow_far

from gen_accel import Neighborhood, Piecewise, attach
from gen_accel.attention_processors.families import family_of


@pytest.fixture(scope="module")
def pipe():
    return anyflow_far.pipeline()


@pytest.fixture(scope="module")
def stock(pipe):
    return anyflow_far.generate(pipe)


@pytest.mark.parametrize("kernel", ["reference", "gather"])
def test_a_method_that_keeps_all_is_the_pipeline(pipe, stock, kernel):
    with attach(pipe, Neighborhood((-1, -1, -1)), kernel=kernel) as handle, handle.gathering():
        made = anyflow_far.generate(pipe)
        summary = handle.summary()
    torch.testing.assert_close(made, stock, atol=1e-4, rtol=1e-4)
    assert summary.density == pytest.approx(1)
    whys = {step: record.why_dense for (_, step), record in summary.records.items()}
    assert whys == {0: None, 1: None, 2: "fills the cache"}
    assert torch.equal(anyflow_far.generate(pipe), stock)


@pytest.mark.parametrize("method", [Neighborhood((1, -1, -1)), Piecewise(0.3)], ids=str)
def test_the_density_is_of_the_queries_of_the_chunk(pipe, stock, method):
    """A window of its own frame leaves each query that frame, and what is beside the grid."""
    model, given = pipe.transformer, anyflow_far.inputs(9, 8, 8)
    tokens = family_of(model).tokens(model, given)
    assert (tokens.video.frames, tokens.past) == (9, 6)
    with attach(model, method) as handle, torch.no_grad():
        model(**given)
        summary = handle.summary()
    frame, beside = 64, tokens.video.text
    if isinstance(method, Neighborhood):
        assert summary.density == pytest.approx((frame + beside) / tokens.video.tokens)
    assert summary.density is not None
    assert summary.density < 0.6
    record = next(iter(summary.records.values()))
    assert record.dense_flops == 4 * 2 * 32 * 3 * frame * tokens.video.tokens
