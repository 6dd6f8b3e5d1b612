"""Sparse attention as a SPARSE_ATTN plug-in of vLLM-Omni.

The contract is that of vllm-project/vllm-omni, pull request 4493,
vllm_omni/diffusion/attention/backends/sparse_attn.py, first at ef4a8b5: a function that an entry
point of the group "vllm_omni.sparse_attn" names.
"""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gen_accel
from gen_accel import Schedule, VideoShape
from gen_accel.attention_processors.options import method_from

logger = logging.getLogger(__name__)


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
            `denoise_step_idx` and `total_denoise_steps`.

    Returns:
        (B, N, H, D).

    Raises:
        ValueError: causal attention, a mask, a method or setting that there is not, or a schedule
            of steps where vLLM-Omni does not give the step.
    """
    if is_causal or "attn_mask" in params or "full_attn_spans" in params:
        raise ValueError(
            "gen_accel attends to a whole video without a mask; choose another backend for this "
            f"role, got is_causal={is_causal} and {sorted(params)}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    video = _grid(params)
    reason = _why_step(params) or _why_tokens(q, k, video)
    if reason is not None:
        _say(f"dense: {reason}")
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    assert video is not None
    settings = params.get("settings", ())
    settings = (settings,) if isinstance(settings, str) else tuple(settings)
    method = _method(params.get("method", "radial"), settings)
    _say(f"sparse: {method} over {video} tokens")
    kernel = params.get("kernel", "auto")
    options: dict[str, Any] = {"method": method, "kernel": kernel, "scale": softmax_scale}
    return gen_accel.attention(q, k, v, video=video, **options).transpose(1, 2)


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
    return method_from(name, settings)


@lru_cache(maxsize=64)
def _say(outcome: str) -> None:
    """Once each."""
    logger.warning("gen_accel: %s", outcome)
