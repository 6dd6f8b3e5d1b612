"""Models of diffusers that are sparse by themselves: the real classes, tiny or of many tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Case(NamedTuple):
    """A model, the name of its processor, and a call of it that returns a tensor.

    Args:
        call: with the model's weights as they are then, of one dtype.
    """

    model: Any
    name: str
    call: Callable[[], torch.Tensor]


def steep(model):
    """Weights with which the attention has a say."""
    g = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        if weight.ndim > 1:
            fan = weight[0].numel()
            weight.data = torch.randn(weight.shape, generator=g) * fan**-0.5 * 1.5
    return model.eval()


def nabla_5(frames: int = 4, side: int = 16) -> Case:
    model = steep(kandinsky5.transformer())
    model.set_attention_backend("flex")
    given = kandinsky5.inputs(frames, side, side)
    sta = torch.eye(frames * side**2 // 64, dtype=torch.bool)[None, None]
    sparse = {"sta_mask": sta, "P": 0.4, "to_fractal": True}
    return Case(
        model, "Kandinsky5AttnProcessor", lambda: model(**given, sparse_params=sparse).sample
    )


def nabla_6(frames: int = 3, height: int = 16, width: int = 24) -> Case:
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
    model, given = steep(model), noise(2, frames, height, width, 5)
    return Case(
        model,
        "Kandinsky6SRAttnProcessor",
        lambda: model(given, torch.tensor([700.0, 300.0])).sample,
    )


def far(height: int = 8, width: int = 16) -> Case:
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
        rope_max_seq_len=max(32, height, width),
        chunk_partition=(1, 2, 2),
    )
    model, times = steep(model), torch.full((2, 5), 700.0)
    given = {
        "hidden_states": noise(2, 5, 4, height, width),
        "clean_hidden_states": noise(
            2, 4, 4, height, width, seed=1
        ),  # of the chunks that are whole
        "timestep": times,
        "clean_timestep": torch.zeros(2, 4),
        "r_timestep": times - 300,
        "encoder_hidden_states": noise(2, 6, 8, seed=2),
        "chunk_partition": [1, 2, 2],
    }
    return Case(model, "AnyFlowCausalAttnProcessor", lambda: model(**given).sample)


def qwen(height: int = 8, width: int = 12) -> Case:
    model: Any = QwenImage21Transformer2DModel(
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
    slots = torch.zeros(2, 19 + height * width // 4, dtype=torch.bool)
    slots[:, 5:9] = True  # of a picture that is given, 4 x 4 latents
    slots[:, 19:] = True  # of the target
    text = torch.ones(2, 19, dtype=torch.bool)
    text[1, -3:] = False
    given = {
        "hidden_states": noise(2, 16 + height * width, 4),
        "encoder_hidden_states": noise(2, 19, 8, seed=1),
        "timestep": torch.tensor([0.7, 0.2]),
        "img_shapes": [[(1, 4, 4), (1, height, width)]] * 2,
        "img_mask": slots,
        "encoder_hidden_states_mask": text,
    }
    return Case(model, "QwenImage21FlexAttnProcessor", lambda: model(**given).sample)


def animate(height: int = 8, width: int = 12) -> Case:
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
    frames = 3  # of latents: 2 of video, and one of the picture
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


def decoder(frames: int = 2, height: int = 3, width: int = 4) -> Case:
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
    model, latents = steep(model), noise(1, 4, frames, height, width)
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
    B, H = some.shape[:2]
    rule = flex.create_mask(block_mask.mask_mod, B, H, length, columns, device=query.device)
    full = block_mask.full_kv_num_blocks
    seen = some & rule
    if full is not None:
        seen = seen | pairs(full, block_mask.full_kv_indices)
    blind = ~seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, seen | blind, scale=scale)
    return out.masked_fill(blind, 0.0)
