"""Sparse attention as a SPARSE_ATTN plug-in of vLLM-Omni.

The contract is that of vllm-project/vllm-omni, pull request 4493,
vllm_omni/diffusion/attention/backends/sparse_attn.py, first at ef4a8b5: a function that an entry
point of the group "vllm_omni.sparse_attn" names.
"""

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gen_accel
from gen_accel import BlockMixture, Schedule, VideoShape
from gen_accel.attention_processors.methods.options import method_from
from gen_accel.method import layers_differ, memory_of, parts_of

logger = logging.getLogger(__name__)

OURS = ("method", "settings", "kernel", "dense_steps", "dense_start", "dense_end")
# They shut some of the tokens out, as attn_mask does.
MASKS = (
    *("attn_mask", "full_attn_spans", "valid_kv_length"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
)
THEIRS = (
    *("latent_shape", "patch_size", "total_latent_frames", "patches_per_frame"),
    *("denoise_step_idx", "total_denoise_steps", "kv_cache_dtype", "preserve_vsa_all_blocks"),
    *MASKS,
)
# All that a server's configuration can hold.
JSON = (str, int, float, list, dict, type(None))


# It reads shapes and steps from tensors, which no graph can.
@torch.compiler.disable(recursive=True)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> Tensor:
    """Self-attention over the tokens that a method keeps; dense, saying so, where the grid of the
    tokens is not known.

    Args:
        query, key, value: (B, N, H, D).
        params: from the server's configuration `method`, with `settings` such as
            ["decay_factor=0.5"], `kernel`, `dense_steps`, `dense_start` and `dense_end`; from
            vLLM-Omni `latent_shape` (T, H, W) and `patch_size`, with a row for each sample, and
            `denoise_step_idx` and `total_denoise_steps`. A mask that is None is no mask.

    Returns:
        (B, N, H, D).

    Raises:
        ValueError: causal attention, a mask or packed samples, a parameter, method or setting
            that there is not, what needs to know the layer, or a schedule of steps where
            vLLM-Omni does not give the step.
    """
    _check_names(params)
    masks = [name for name in MASKS if params.get(name) is not None]
    if is_causal or masks:
        raise ValueError(
            "gen_accel attends to a whole video without a mask; choose another backend for this "
            f"role, got is_causal={is_causal} and {masks}"
        )
    settings = params.get("settings") or ()
    settings = (settings,) if isinstance(settings, str) else tuple(settings)
    method = _method(params.get("method", "radial"), settings)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    video = _grid(params)
    reason = _why_step(params) or _why_tokens(q, k, video)
    if parts_of(method).is_dense:
        reason = "method is dense"
    if reason is not None:
        _say(f"dense: {reason}")
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    assert video is not None
    silent = ", without its linear branch" if parts_of(method).branch else ""
    _say(f"sparse: {method} over {video} tokens{silent}")
    kernel = params.get("kernel", "auto")
    options: dict[str, Any] = {"method": method, "kernel": kernel, "scale": softmax_scale}
    return gen_accel.attention(q, k, v, video=video, **options).transpose(1, 2)


def _check_names(params: Mapping[str, Any]) -> None:
    """Models may add inputs of their own to what the server gives, under any name. Those that no
    configuration can hold, such as tensors, are theirs and are not refused."""
    if "dense_layers" in params:
        raise ValueError(
            "dense_layers cannot be kept: vLLM-Omni does not tell the layer of a call"
        )
    for name in sorted(params.keys() - {*OURS, *THEIRS}):
        if isinstance(params[name], JSON):
            near = get_close_matches(name, OURS, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OURS)}"
            raise ValueError(f"there is no parameter {name!r}; {hint}")
        _say(f"what the model gives as {name!r} is not used")


def _why_tokens(q: Tensor, k: Tensor, video: VideoShape | None) -> str | None:
    if q.shape != k.shape:
        return "cross-attention, or fewer heads of keys"
    if video is None:
        return "no latent_shape and patch_size that all samples share"
    if q.shape[2] != video.tokens:
        return f"{q.shape[2]} tokens, the grid has {video}; the place of others is not known"
    return None


def _why_step(params: Mapping[str, Any]) -> str | None:
    schedule = Schedule(
        dense_steps=int(params.get("dense_steps", 0)),
        dense_start=float(params.get("dense_start", 0)),
        dense_end=float(params.get("dense_end", 0)),
    )
    if not schedule.needs_step:
        return None
    step = _shared(params.get("denoise_step_idx"), 1)
    steps = _shared(params.get("total_denoise_steps"), 1)
    if step is None or (steps is None and schedule.needs_total):
        raise ValueError(
            "this pipeline does not say its denoising step, or samples are at several: leave "
            f"dense_steps, dense_start and dense_end out, got {schedule}"
        )
    return schedule.why_step(step[0], None if steps is None else steps[0])


def _grid(params: Mapping[str, Any]) -> VideoShape | None:
    sizes, patch = _shared(params.get("latent_shape"), 3), _shared(params.get("patch_size"), 3)
    if sizes is None or patch is None:
        return None
    return VideoShape(*(n // p for n, p in zip(sizes, patch, strict=True)))


def _shared(values: Any, size: int) -> list[int] | None:
    """The `size` numbers that are the same for all samples; None where they differ or are not
    given. Waits for the device that they are on."""
    if values is None:
        return None
    rows = torch.as_tensor(values).reshape(-1, size)
    return rows[0].tolist() if bool((rows == rows[0]).all()) else None


@lru_cache(maxsize=16)
def _method(name: str, settings: tuple[str, ...]) -> Any:
    method = method_from(name, settings)
    if memory_of(method) is not None:
        raise ValueError(
            f"{name} learns from dense steps, and vLLM-Omni tells neither the step nor the layer "
            "of a call: give the method that it wraps"
        )
    if layers_differ(method):
        cycles = isinstance(method, BlockMixture)
        what = "partition='cycle'" if cycles else repr(method)
        instead = ': give "partition=1d", "partition=2d" or "partition=3d" in settings'
        raise ValueError(
            f"{what} changes from layer to layer, and vLLM-Omni does not tell the layer of a call"
            f"{instead if cycles else ''}"
        )
    return method


@lru_cache(maxsize=64)
def _say(outcome: str) -> None:
    """Once each."""
    logger.warning("gen_accel: %s", outcome)
