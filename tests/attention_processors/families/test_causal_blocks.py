"""SkyReels-V2 in causal blocks, whose mask hides later frames, through its own pipeline too."""

from typing import Any

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from support import wan
from support.tiny import skyreels
from support.tiny.wan import inputs as wan_inputs

from gen_accel import (
    BlockMixture,
    Dense,
    Neighborhood,
    Piecewise,
    Radial,
    Reuse,
    attach,
    extend,
)
from gen_accel.attention_processors.families import family_of

ALL = Neighborhood((-1, -1, -1))
OWN_FRAME = Neighborhood((1, -1, -1))


@pytest.fixture
def model():
    return skyreels.transformer(num_frame_per_block=2)


def given(frames: int = 6) -> dict[str, Any]:
    return skyreels.forced_inputs(frames, 3, 5)


@torch.no_grad()
def output(model: Any, given: Any) -> torch.Tensor:
    return model(**given).sample


@pytest.mark.parametrize("kernel", ["reference", "gather"])
def test_a_method_that_keeps_all_is_the_model(model, kernel):
    stock = output(model, given())
    with attach(model, ALL, kernel=kernel):
        torch.testing.assert_close(output(model, given()), stock, atol=2e-5, rtol=2e-5)
    with attach(model, Dense()):
        assert torch.equal(output(model, given()), stock)
    assert torch.equal(output(model, given()), stock)


@pytest.mark.parametrize("method", [OWN_FRAME, Radial(), Piecewise(0.3), BlockMixture()], ids=str)
def test_later_blocks_change_nothing_in_earlier_ones(model, method):
    first, other = given(), given()
    skyreels.poke(other, 4, 1, 1)
    with attach(model, method):
        plain, poked = output(model, first), output(model, other)
    assert torch.equal(plain[:, :, :4], poked[:, :, :4])
    assert not torch.equal(plain[:, :, 4:], poked[:, :, 4:])


def test_a_graph_of_the_whole_model_runs_the_same_blocks(model):
    with attach(model, OWN_FRAME, kernel="gather"):
        plain = output(model, given())
        torch._dynamo.reset()
        assert torch.equal(output(torch.compile(model, backend="eager"), given()), plain)


def test_a_window_is_the_model_under_both_masks(model):
    """A window of the own frame hides all that causal blocks hide, so that it is that of a model
    without them."""
    free = skyreels.transformer()
    free.load_state_dict(model.state_dict())
    with attach(model, OWN_FRAME), attach(free, OWN_FRAME):
        torch.testing.assert_close(output(model, given()), output(free, given()))


def test_the_density_is_of_what_a_query_may_see(model):
    with attach(model, OWN_FRAME) as handle:
        output(model, given())
        summary = handle.summary()
    frame, heads, batch = 15, wan.HEADS, 2
    seen = [2, 2, 4, 4, 6, 6]  # frames, of the queries of each
    record = next(iter(summary.records.values()))
    assert record.dense_flops == 4 * batch * heads * wan.HEAD_DIM * frame**2 * sum(seen)
    assert summary.density == pytest.approx((1 / 2 + 1 / 4 + 1 / 6) / 3)


def test_one_block_of_all_frames_is_no_mask(model):
    family: Any = family_of(model)
    assert family.tokens(model, given(2)).causal == 0
    assert family.tokens(model, given(4)).causal == 2


def test_its_pipeline_is_the_same_with_a_method_that_keeps_all():
    """Blocks that wait for earlier ones, which its call asks for."""
    pipe = wan.pipeline(SkyReelsV2DiffusionForcingPipeline, transformer=skyreels.transformer())
    more = {"ar_step": 1, "causal_block_size": 2, "num_frames": 13, "num_inference_steps": 3}

    def made(**options: Any) -> torch.Tensor:
        return wan.generate(pipe, **more, **options)

    stock = made()
    with attach(pipe, ALL, kernel="reference") as handle:
        kept = made()
        summary = handle.summary()
    torch.testing.assert_close(kept, stock, atol=1e-4, rtol=1e-4)
    assert summary.density == pytest.approx(1)
    with attach(pipe, OWN_FRAME):
        assert not torch.allclose(made(), stock, atol=1e-3)


def test_gradients_are_those_of_the_model(model):
    def gradient(kernel: str | None) -> torch.Tensor:
        x = given()
        x["hidden_states"].requires_grad_()
        if kernel is None:
            model(**x).sample.square().sum().backward()
        else:
            with attach(model, ALL, kernel=kernel):
                model(**x).sample.square().sum().backward()
        return x["hidden_states"].grad

    torch.testing.assert_close(gradient("reference"), gradient(None), atol=1e-4, rtol=1e-4)


def test_a_method_with_a_memory_is_refused(model):
    with (
        attach(model, Reuse(Piecewise(0.3))),
        pytest.raises(ValueError, match="a mask that hides more than padding"),
    ):
        output(model, given())


def test_a_technique_over_all_frames_is_refused(model):
    with (
        attach(model, OWN_FRAME),
        extend(model, "ultravico", num_frames=21, trained_frames=9),
        pytest.raises(
            ValueError, match=r"goes over all frames, and transformer.blocks.0 hides those"
        ),
    ):
        output(model, wan_inputs(6, 3, 5))
