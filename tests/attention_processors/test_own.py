"""Models of diffusers that are sparse by themselves, on our kernels: the real classes, tiny."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from support.own_sparse import CASES, animate, by_lists, far, nabla_5, nabla_6
from support.tiny import kandinsky5
from support.tiny.wan import noise
from support.wan import transformer as wan_transformer
from torch import nn

from gen_accel import Dense, Radial, attach, attach_own
from gen_accel.attention_processors.own import OWN
from gen_accel.attention_processors.seam import BoundProcessor


def with_gradients(case):
    case.model.zero_grad()
    out = case.call()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: x.grad for name, x in case.model.named_parameters() if x.grad is not None} | {
        "output": out.detach()
    }


@pytest.fixture
def stock(monkeypatch):
    """FlexAttention by its lists, and masks of WanAnimate2 without the compiler."""
    made = flex.create_block_mask
    monkeypatch.setattr(flex, "flex_attention", by_lists)
    monkeypatch.setattr(
        "diffusers.models.transformers.transformer_wan_animate_2.create_block_mask",
        lambda *a, _compile, **options: made(*a, **options),
    )


@pytest.mark.turns(3)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_outputs_and_gradients_are_the_models_own(make, stock):
    case = make()
    low = with_gradients(case)
    if hasattr(case.model, "block_masks"):
        case.model.block_masks.clear()
    before = [type(m.processor) for m in case.model.modules() if hasattr(m, "processor")]
    with attach_own(case.model) as own:
        ours = with_gradients(case)
        assert own.is_attached
        calls = own.summary()
    assert calls.startswith(f"{case.name}: ")
    assert " by " in calls
    assert not own.is_attached
    assert before == [type(m.processor) for m in case.model.modules() if hasattr(m, "processor")]
    again = with_gradients(case)
    assert ours.keys() == low.keys()
    for name, right in low.items():
        assert torch.equal(again[name], right), name
        size = right.abs().max()
        assert (ours[name] - right).abs().max() <= 2e-4 * size + 1e-6, name


def test_every_case_is_of_a_class_of_its_own():
    assert {make().name for make in CASES} == {*OWN}


def test_the_sparse_attention_leaves_something_out(stock):
    """Else the test above would hold dense attention to itself."""
    for make in (nabla_5, nabla_6):
        case = make()
        sparse = case.call()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                flex,
                "flex_attention",
                lambda query, key, value, scale=None, **_: F.scaled_dot_product_attention(
                    query, key, value, scale=scale
                ),
            )
            full = case.call()
        assert (sparse - full).abs().max() > 1e-2 * full.abs().max()


def test_the_cached_step_of_a_causal_model_makes_no_scores(monkeypatch):
    """AnyFlow attends to its cache by FlexAttention without a mask."""
    case = far()
    cache = [
        {
            "compressed_cache": torch.zeros(2, 2, 2, 0, 12),
            "full_cache": noise(2, 2, 2, 32, 12, seed=7),
        }
        for _ in case.model.blocks
    ]
    times = torch.full((2, 2), 700.0)
    given = {
        "hidden_states": noise(2, 2, 4, 8, 16),
        "timestep": times,
        "r_timestep": times - 300,
        "encoder_hidden_states": noise(2, 6, 8, seed=2),
        "chunk_partition": [1, 2],
        "kv_cache": cache,
        "kv_cache_flag": {
            "is_cache_step": False,
            "num_cached_chunks": 1,
        },
        "return_dict": False,
    }
    with torch.no_grad():
        right = case.model(**given)[0]
        monkeypatch.setattr(flex, "flex_attention", None)
        with attach_own(case.model):
            assert torch.allclose(case.model(**given)[0], right, atol=1e-4)


def test_a_model_is_copied_with_what_is_attached(stock):
    case = nabla_6()
    right = case.call()
    own = attach_own(case.model)
    twin = copy.deepcopy(case.model)
    own.detach()
    assert any(
        isinstance(x.processor, BoundProcessor) for x in twin.modules() if hasattr(x, "processor")
    )
    out = twin(noise(2, 3, 16, 24, 5), torch.tensor([700.0, 300.0])).sample
    assert torch.allclose(out, right, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="no attention of WanTransformer3DModel is sparse by its"):
        attach_own(wan_transformer())
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of"):
        attach_own(nabla_6().model, kernel="quick")
    model = kandinsky5.transformer()
    with attach(model, Dense()), pytest.raises(ValueError, match="a method is attached to"):
        attach_own(model)
    for case in (nabla_6(), animate()):
        with pytest.raises(ValueError, match=r"gen_accel\.attach_own"):
            attach(case.model, Radial())
    with nullcontext(attach_own(nabla_6().model)) as own:
        own.detach()
        own.detach()
    assert isinstance(own.summary(), str)
    assert not isinstance(model.visual_transformer_blocks[0].self_attention.processor, nn.Module)
