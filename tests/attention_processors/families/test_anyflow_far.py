"""AnyFlow FAR through its own pipeline, whose chunks see earlier ones from its cache."""

import pytest
import torch
from support.tiny import anyflow_far

from gen_accel import Dense, Neighborhood, Piecewise, attach, attach_own
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


def longer(pipe):
    """Nine chunks, and how many tokens the blocks ran on in each pass that filled the cache."""
    filled, hooks = [], []

    def note(block, args):
        filled.append(args[0].shape[1])

    def begin(model, args, kwargs):
        if kwargs["kv_cache_flag"]["is_cache_step"]:
            hooks.append(model.blocks[-1].register_forward_pre_hook(note))

    def end(model, args, output):
        while hooks:
            hooks.pop().remove()

    model = pipe.transformer
    off = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    off.append(model.register_forward_hook(end))
    more = {"num_frames": 65, "chunk_partition": [1, *[2] * 8], "num_inference_steps": 1}
    made = anyflow_far.generate(pipe, **more)
    for hook in off:
        hook.remove()
    return made, filled


WHOLE = Neighborhood((-1, -1, -1))


@pytest.mark.slow
@pytest.mark.parametrize("put", [attach_own, lambda pipe: attach(pipe, WHOLE)], ids=["own", "all"])
def test_history_is_not_run_again_for_the_cache(pipe, put):
    """A chunk has 2 x 24 tokens, 2 x 6 where it is coarse, and the first one half of it."""
    stock, filled = longer(pipe)
    assert filled == [24, 72, 6 + 96, *(6 + 12 * n + 96 for n in range(1, 6))]
    with put(pipe):
        made, fewer = longer(pipe)
    torch.testing.assert_close(made, stock, atol=1e-4, rtol=1e-4)
    assert fewer == [24, 72, 102, *[12 + 96] * 5]
    with attach(pipe, Dense()):
        again, own = longer(pipe)
    assert own == filled
    assert torch.equal(again, stock)
