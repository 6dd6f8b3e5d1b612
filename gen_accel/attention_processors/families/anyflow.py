"""AnyFlow, which is built like Wan, for a video as a whole and chunk after chunk (FAR)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families.base import (
    Config,
    Generation,
    Given,
    Pass,
    PipelineInputs,
    PublishedModel,
    argument_names,
    by_name,
)
from gen_accel.attention_processors.families.layers import CROSS, Layers
from gen_accel.attention_processors.families.sites import Model, Removable
from gen_accel.attention_processors.families.wan import PARTS, WanBlocks
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.block_mask import create_block_mask
from gen_accel.video import VideoShape

_BLOCK = 128  # queries are padded to a multiple, and keys by as many


def _in_chunks(pipe: Model, frames: int, given: Given) -> tuple[Given, int]:
    """Chunks as long as those that the model was trained on, of which the first is shorter. Where
    a video is given, a chunk ends with it."""
    own, step = [*pipe.transformer.config.chunk_partition], pipe.vae_scale_factor_temporal
    first = own[0]
    latents, video = (frames - 1) // step + 1, given.get("video")
    if given.get("chunk_partition") is not None:
        return {}, frames
    if latents <= first:
        raise ValueError(
            f"{type(pipe).__name__} makes {first * step + 1} frames at least, got {frames}: ask "
            "for more"
        )
    past = first if video is None else (video.shape[1] - 1) // step + 1
    chunks = _chunks(own, latents, past)
    return {} if chunks == own else {"chunk_partition": chunks}, frames


def _chunks(own: list[int], latents: int, past: int) -> list[int]:
    """Frames of the chunks of a clip of which so many latents are given, one chunk at least."""
    first, each = own[0], max(own)
    if latents == sum(own) and past in accumulate(own):
        return own
    ends = [*range(first, past, each), *range(past, latents, each), latents]
    return [end - begin for begin, end in pairwise([0, *ends])]


def _passes(config: Config, clip: VideoShape, steps: int) -> list[Pass]:
    """Steps of each chunk, and one pass into the cache over all chunks that are done. As a query
    sees its own chunk and those before it there, `history` brings the keys to their mean."""
    own, limit, sides = [*config.chunk_partition], config.full_chunk_limit, clip.grid[1:]
    chunks, frame = _chunks(own, clip.frames, own[0]), clip.height * clip.width
    coarse = prod(
        n * fine // wide
        for n, fine, wide in zip(
            sides, config.patch_size[1:], config.compressed_patch_size[1:], strict=True
        )
    )
    longest = max(chunks)
    cached = longest * (limit * frame + max(0, len(chunks) - limit + 1) * coarse)
    found = []
    for done, chunk in enumerate(chunks):
        old = max(0, 1 + done - limit)
        past, noisy = sum(chunks[old:done]), chunk * frame
        lengths = {"noisy": noisy, "history": sum(chunks[:old]) * coarse + -noisy % _BLOCK}
        found.append(Pass(steps, VideoShape(past + chunk, *sides), lengths, past, cached))
    for done in range(1, len(chunks)):
        old = max(0, done + 1 - limit)
        runs = [n * (coarse if i < old else frame) for i, n in enumerate(chunks[:done])]
        pairs = sum(n * seen for n, seen in zip(runs, accumulate(runs), strict=True))
        video = VideoShape(sum(chunks[:done]), *sides)
        lengths = {"noisy": sum(runs), "history": pairs / sum(runs) - video.tokens}
        found.append(Pass(1, video, lengths, cached=cached, is_dense=True))
    return found


class AnyFlow(WanBlocks):
    """Latents come frames first, before their channels. The timestep, (B, frames), is the one at
    which a step of the flow map begins."""

    models = "AnyFlow"
    image_prompts = replace(WanBlocks.image_prompts, guidance="batched")
    generation = Generation(axes="fchw", autoencoder="AutoencoderKLWan", distilled=True)
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
    cache is a pass over all chunks that are done, causally by a mask, and stays dense; with a
    method it leaves out coarse chunks that are there.
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
            passes=_passes,
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

    def lighten(self, transformer: Model, is_on: Callable[[], bool]) -> Sequence[Removable]:
        return [_FromCache(transformer, is_on)]

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
            uncounted="what fills up a chunk's queries to a multiple of 128",
        )

    def no_frames(self, transformer: Model, given: Given) -> str:
        return "AnyFlow FAR makes a video chunk after chunk"


class _FromCache:
    """Passes that put a chunk into the cache, without the coarse chunks that are there.

    diffusers runs all chunks that are done through the model, coarse but for the last ones. As
    each sees those before it alone, the keys of coarse chunks come out as they were. Here the
    blocks run on the chunk that becomes coarse and on those that stay whole, whose keys change by
    that. They read the cache as a step of a chunk does, and hooks write into it.

    Args:
        is_on: otherwise diffusers' own pass runs.
    """

    def __init__(self, transformer: Model, is_on: Callable[[], bool]) -> None:
        self._model, self._is_on = transformer, is_on
        self._old = self._new = 0  # tokens in the cache that stay, and tokens that run
        self._coarse = 0  # the first of the latter
        self._cache: Mapping[str, Tensor] = {}  # of the block under way
        self._hooks = [transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._hooks.append(transformer.register_forward_hook(self._end, always_call=True))
        for block in transformer.blocks:
            self._hooks.append(block.register_forward_pre_hook(self._narrowed))
            for place, part in enumerate((block.attn1.norm_k, block.attn1.to_v)):
                self._hooks.append(part.register_forward_hook(partial(self._write, place)))
        transformer.build_attention_mask = self._mask

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        vars(self._model).pop("build_attention_mask", None)

    def _mask(self, *, mode: str = "train", **given: Any) -> Any:
        """The mask of a pass, which one that fills the cache gets later."""
        if mode == "cache" and self._is_on():
            return None
        return type(self._model).build_attention_mask(self._model, mode=mode, **given)

    def _begin(self, model: Model, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._new = 0
        given = by_name(argument_names(type(model)), args, kwargs)
        flag, partition = given.get("kv_cache_flag") or {}, [*given["chunk_partition"]]
        whole = model.config.full_chunk_limit - 1
        fills = self._is_on() and flag.get("is_cache_step", False)
        done = len(partition)
        if not fills or flag["num_cached_chunks"] + 1 != done or done < whole + 2:
            return None  # nothing coarse is in the cache
        latents = given["hidden_states"]

        def tokens(chunks: Sequence[int], patch: Sequence[int]) -> list[int]:
            each = latents.shape[3] // patch[1] * (latents.shape[4] // patch[2])
            return [frames * each for frames in chunks]

        *kept, last = tokens(partition[:-whole], model.config.compressed_patch_size)
        runs = [last, *tokens(partition[-whole:], model.config.patch_size)]
        self._old, self._new, self._coarse = sum(kept), sum(runs), last
        queries = -(-self._new // _BLOCK) * _BLOCK  # as many as the processor pads to
        lengths = torch.tensor([*runs, queries - self._new])
        column = torch.arange(len(lengths)).repeat_interleave(lengths).to(latents.device)
        row = column.where(column < len(runs), -1)  # padding sees nothing, and is not seen
        column = F.pad(column, (self._old, 0))
        mask = create_block_mask(
            lambda b, h, q, k: row[q] >= column[k],
            None,
            None,
            queries,
            len(column),
            latents.device,
        )
        return args, {**kwargs, "attention_mask": mask}

    def _end(self, model: Model, args: tuple, output: object) -> None:
        self._new, self._cache = 0, {}

    def _narrowed(self, block: nn.Module, args: tuple) -> tuple | None:
        if not self._new:
            return None
        x, text, time, rotary, mask, self._cache, flag = args
        own = slice(-self._new, None)
        rotary = {"query": rotary["query"][:, :, own], "key": rotary["key"]}
        seen = {"num_cached_compressed_tokens": self._old, "num_cached_full_tokens": 0}
        flag = {**flag, **seen, "is_cache_step": False}
        return x[:, own], text, time[:, own], rotary, mask, self._cache, flag

    def _write(self, place: int, part: nn.Module, args: tuple, output: Tensor) -> None:
        """Write the keys (place 0) or the values (place 1) of a block."""
        if not self._new:
            return
        coarse, whole = self._cache["compressed_cache"][place], self._cache["full_cache"][place]
        x = output.unflatten(2, (coarse.shape[1], -1)).transpose(1, 2)
        coarse[:, :, self._old : self._old + self._coarse] = x[:, :, : self._coarse]
        whole[:, :, : self._new - self._coarse] = x[:, :, self._coarse :]
