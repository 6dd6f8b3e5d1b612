"""AnyFlow, which is built like Wan, for a video as a whole and chunk after chunk (FAR)."""

from dataclasses import replace
from itertools import accumulate, pairwise

from gen_accel.attention_processors.families.base import (
    Generation,
    Given,
    PipelineInputs,
    PublishedModel,
)
from gen_accel.attention_processors.families.layers import CROSS, Layers
from gen_accel.attention_processors.families.sites import Model
from gen_accel.attention_processors.families.wan import PARTS, WanBlocks
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

_BLOCK = 128  # queries are padded to a multiple, and keys by as many


def _in_chunks(pipe: Model, frames: int, given: Given) -> tuple[Given, int]:
    """Chunks as long as those that the model was trained on, of which the first is shorter. Where
    a video is given, a chunk ends with it."""
    own, step = [*pipe.transformer.config.chunk_partition], pipe.vae_scale_factor_temporal
    first, each = own[0], max(own)
    latents, video = (frames - 1) // step + 1, given.get("video")
    if given.get("chunk_partition") is not None:
        return {}, frames
    if latents <= first:
        raise ValueError(
            f"{type(pipe).__name__} makes {first * step + 1} frames at least, got {frames}: ask "
            "for more"
        )
    past = first if video is None else (video.shape[1] - 1) // step + 1
    if latents == sum(own) and past in accumulate(own):
        return {}, frames
    ends = [*range(first, past, each), *range(past, latents, each), latents]
    return {"chunk_partition": [end - begin for begin, end in pairwise([0, *ends])]}, frames


class AnyFlow(WanBlocks):
    """Latents come frames first, before their channels. The timestep, (B, frames), is the one at
    which a step of the flow map begins."""

    models = "AnyFlow"
    image_prompts = replace(WanBlocks.image_prompts, guidance="batched")
    generation = Generation(axes="fchw", autoencoder="AutoencoderKLWan")
    presets = {
        "AnyFlow-Wan2.1-T2V-14B": PublishedModel(14.3),
    }
    pipelines = {"AnyFlowPipeline": PipelineInputs("anyflow", video="video", role="continued")}
    parts = PARTS

    def layers(self, transformer: Model) -> Layers:
        return CROSS.with_first({r"time|delta_embedder": "frames"})

    def context_parallel(self, transformer: Model) -> None:
        raise ValueError("its rotary embeddings are a dict, which diffusers cannot split")


class AnyFlowFAR(AnyFlow):
    """Video is made chunk after chunk. A chunk sees the keys of the last ones from a cache, whose
    frames come before its own in one grid and have no queries, and of older ones coarser patches,
    which are seen by all. Queries and keys are padded, by keys of zeros that count. What fills the
    cache is a pass over all chunks that are done, causally by a mask, and stays dense.
    """

    models = "AnyFlow FAR"
    order = "coarse history, history and video, padding"
    presets = {
        "AnyFlow-FAR-Wan2.1-1.3B": PublishedModel(
            1.43, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
        ),
        "AnyFlow-FAR-Wan2.1-14B": PublishedModel(14.3),
    }
    pipelines = {
        "AnyFlowFARPipeline": PipelineInputs(
            "anyflow far",
            image="video",
            video="video",
            role="continued",
            by="in_tensor",
            model="nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers",
            length=_in_chunks,
        )
    }

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        frames, height, width = self._grid(transformer, given["hidden_states"])
        partition, limit = given["chunk_partition"], transformer.config.full_chunk_limit
        coarse = max(0, 1 + given["kv_cache_flag"]["num_cached_chunks"] - limit)
        past = sum(partition[coarse:-1])
        *_, rows, columns = given["hidden_states"].shape
        _, *sides = transformer.config.compressed_patch_size
        each = rows // sides[0] * (columns // sides[1])
        before, padding = sum(partition[:coarse]) * each, -frames * height * width % _BLOCK
        return Tokens(VideoShape(past + frames, height, width, before + padding), before, past)

    def stays_dense(self, transformer: Model, given: Given) -> str | None:
        flag = given.get("kv_cache_flag") or {}
        if given.get("kv_cache") is None:
            return "all chunks at once, each behind those before it"
        return "fills the cache" if flag.get("is_cache_step") else None

    def layers(self, transformer: Model) -> Layers:
        blocks = range(len(transformer.blocks))
        seen = "noisy", "video + history"
        plain = super().layers(transformer)
        plain = plain.with_first(
            {"far_patch_embedding": "none"}, {r"attn2\.to_q$": ("noisy", "text")}
        )
        return plain._replace(
            beside="history",
            pairs={f"blocks.{i}": seen for i in blocks},
            default="noisy",
            uncounted="the coarse history of old chunks, and what fills the cache",
        )

    def no_frames(self, transformer: Model, given: Given) -> str:
        return "AnyFlow FAR makes a video chunk after chunk"
