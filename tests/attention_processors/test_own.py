"""Models of diffusers that are sparse by themselves, on our kernels: the real classes, tiny."""

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from diffusers import (
    AnyFlowFARTransformer3DModel,
    Kandinsky6SRTransformer3DModel,
    LTX2VideoDiffusionDecoderModel,
    QwenImage21Transformer2DModel,
    WanAnimate2Transformer3DModel,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from support.tiny import kandinsky5
from support.tiny.wan import noise
from support.wan import transformer as wan_transformer
from torch import nn

from gen_accel import Dense, Radial, attach, attach_own
from gen_accel.attention_processors.own import OWN
from gen_accel.attention_processors.seam import BoundProcessor


class Case(NamedTuple):
    """A model, the name of its processor, and a call of it that returns a tensor."""

    model: Any
    name: str
    call: Any


def steep(model):
    """Weights with which the attention has a say."""
    g = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        if weight.ndim > 1:
            fan = weight[0].numel()
            weight.data = torch.randn(weight.shape, generator=g) * fan**-0.5 * 1.5
    return model.eval()


def nabla_5():
    model = steep(kandinsky5.transformer())
    model.set_attention_backend("flex")
    given = kandinsky5.inputs(4, 16, 16)
    sta = torch.eye(16, dtype=torch.bool)[None, None]
    sparse = {"sta_mask": sta, "P": 0.4, "to_fractal": True}
    return Case(
        model, "Kandinsky5AttnProcessor", lambda: model(**given, sparse_params=sparse).sample
    )


def nabla_6():
    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=2,
        out_visual_dim=4,
        time_dim=8,
        model_dim=32,
        ff_dim=32,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        nabla_threshold=0.4,
        nabla_window=(1, 1, 1),
    )
    model, given = steep(model), noise(2, 3, 16, 24, 5)
    return Case(
        model,
        "Kandinsky6SRAttnProcessor",
        lambda: model(given, torch.tensor([700.0, 300.0])).sample,
    )


def far():
    model = AnyFlowFARTransformer3DModel(
        full_chunk_limit=2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
        chunk_partition=(1, 2, 2),
    )
    model, times = steep(model), torch.full((2, 5), 700.0)
    given = {
        "hidden_states": noise(2, 5, 4, 8, 16),
        "clean_hidden_states": noise(2, 4, 4, 8, 16, seed=1),  # of the chunks that are whole
        "timestep": times,
        "clean_timestep": torch.zeros(2, 4),
        "r_timestep": times - 300,
        "encoder_hidden_states": noise(2, 6, 8, seed=2),
        "chunk_partition": [1, 2, 2],
    }
    return Case(model, "AnyFlowCausalAttnProcessor", lambda: model(**given).sample)


def qwen():
    model = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    model = steep(model)
    for block in model.transformer_blocks:
        block.attn.set_processor(QwenImage21FlexAttnProcessor())
    slots = torch.zeros(2, 19 + 24, dtype=torch.bool)
    slots[:, 5:9] = True  # of a picture that is given, 4 x 4 latents
    slots[:, 19:] = True  # of the target, 8 x 12
    text = torch.ones(2, 19, dtype=torch.bool)
    text[1, -3:] = False
    given = {
        "hidden_states": noise(2, 16 + 96, 4),
        "encoder_hidden_states": noise(2, 19, 8, seed=1),
        "timestep": torch.tensor([0.7, 0.2]),
        "img_shapes": [[(1, 4, 4), (1, 8, 12)]] * 2,
        "img_mask": slots,
        "encoder_hidden_states_mask": text,
    }
    return Case(model, "QwenImage21FlexAttnProcessor", lambda: model(**given).sample)


def animate():
    model = WanAnimate2Transformer3DModel(
        text_len=6,
        in_dim=8,
        dim=24,
        ffn_dim=16,
        freq_dim=8,
        text_dim=8,
        out_dim=4,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )
    model = steep(model)
    frames, height, width = 3, 8, 12  # of latents: 2 of video, and one of the picture
    grid = torch.tensor([[frames, height // 2, width // 2]])
    reference = torch.tensor([[frames - 1, height // 2, width // 2]])
    text = [noise(6, 8, seed=2)]

    def run(latents, cache, mode, grid, **more):
        return model(
            [latents],
            torch.tensor([500.0]),
            text,
            [noise(4, *latents.shape[1:], seed=4)],
            cache,
            mode,
            int(grid[0].prod()),
            **more,
        ).sample[0]

    def call():
        cache = WanAnimate2KVCache(len(model.blocks))
        run(
            noise(4, frames - 1, height, width, seed=1),
            cache,
            "extract",
            reference,
            offset_grid_sizes=reference,
        )
        return run(
            noise(4, frames, height, width),
            cache,
            "cached",
            grid,
            reference_grid_sizes=reference,
            origin_len=4 * (frames - 1) - 4,
            origin_area=[height * 8, width * 8],
        )

    return Case(model, "WanAnimate2AttnProcessor", call)


def decoder():
    model = LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(32, 16, 8, 8, 8),
        decoder_stage_depths=(1, 1, 1, 1, 1),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage_kernels=((1, 3, 3), (1, 3, 3), (1, 3, 3), (2, 3, 5)),
        decoder_stage5_kernel=(3, 5, 5),
        decoder_t_emb_dim=16,
    )
    model, latents = steep(model), noise(1, 4, 2, 3, 4)
    return Case(
        model,
        "LTX2VideoVaeNeighborhoodAttnProcessor",
        lambda: model.decoder(latents, generator=torch.Generator().manual_seed(0)),
    )


CASES = (nabla_5, nabla_6, far, qwen, animate, decoder)


def by_lists(query, key, value, block_mask=None, scale=None, **options):
    """FlexAttention as compiled: the mask function counts in the blocks that are listed for it."""
    if block_mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    length, columns = block_mask.seq_lengths
    sides = block_mask.BLOCK_SIZE

    def pairs(count, index):
        listed = torch.arange(index.shape[-1]) < count[..., None]
        blocks = torch.zeros(index.shape, dtype=torch.int32)
        blocks.scatter_reduce_(-1, index.long(), listed.int(), "amax")
        wide = blocks.bool().repeat_interleave(sides[0], -2).repeat_interleave(sides[1], -1)
        return wide[:, :, :length, :columns]

    some = pairs(block_mask.kv_num_blocks, block_mask.kv_indices)
    rule = flex.create_mask(
        block_mask.mask_mod, *some.shape[:2], length, columns, device=query.device
    )
    full = block_mask.full_kv_num_blocks
    seen = some & rule
    if full is not None:
        seen = seen | pairs(full, block_mask.full_kv_indices)
    blind = ~seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, seen | blind, scale=scale)
    return out.masked_fill(blind, 0.0)


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
    for case in (nabla_6(), far(), animate()):
        with pytest.raises(ValueError, match=r"gen_accel\.attach_own"):
            attach(case.model, Radial())
    with nullcontext(attach_own(nabla_6().model)) as own:
        own.detach()
        own.detach()
    assert isinstance(own.summary(), str)
    assert not isinstance(model.visual_transformer_blocks[0].self_attention.processor, nn.Module)
