"""Sparse attention on a model of ComfyUI's, by ComfyUI's own hooks.

ComfyUI's models are not those of diffusers, so that nothing of `gen_accel.attach` serves here:

- `transformer_options["optimized_attention_override"]` gets every attention call of the model, and
  the function that would have answered it.
- A wrapper of kind "diffusion_model" sees the latents of each forward pass: the grid comes from
  the live call.

Written for Comfy-Org/ComfyUI at 01dafad (comfy_extras/nodes_sparse_attention.py) and at 05080f6
(comfy/ldm/modules/attention.py).
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gen_accel
from gen_accel import VideoShape

from .layouts import Patch, patch_of

KEY = "gen_accel_sparse_attention"
OVERRIDE = "optimized_attention_override"


def put_on(
    model: Any,
    *,
    choose: Callable[[VideoShape], tuple[Any, float]],
    start_percent: float,
    end_percent: float,
    dense_blocks: frozenset[int],
    min_tokens: int,
) -> Any:
    """A copy of a ModelPatcher with sparse attention; `model` stays as it is.

    Args:
        choose: the method for a video and the density that it has there.
        start_percent, end_percent: shares of the sampling, between which it is sparse.
        dense_blocks: numbers of transformer blocks that stay dense.
        min_tokens: below which it stays dense.
    """
    sampling = model.get_model_object("model_sampling")
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    sparse = SparseAttention(
        choose=choose,
        sigmas=(
            float(sampling.percent_to_sigma(start_percent)),
            float(sampling.percent_to_sigma(end_percent)),
        ),
        dense_blocks=dense_blocks,
        min_tokens=min_tokens,
        patch=patch_of(model.get_model_object("diffusion_model")),
        previous=options.get(OVERRIDE),
    )
    # Plain functions: a deep copy of the options would copy the object behind a bound method.
    options[OVERRIDE] = lambda *args, **kwargs: sparse.attend(*args, **kwargs)
    patched.add_wrapper_with_key(
        "diffusion_model", KEY, lambda *args, **kwargs: sparse.watch(*args, **kwargs)
    )
    patched.add_callback_with_key("on_cleanup", KEY, lambda *args: sparse.report(*args))
    return patched


class SparseAttention:
    """Takes self-attention over the grid of the latents, and leaves all other calls alone.

    Args:
        choose: the method for a video and the density that it has there.
        sigmas: between which it is sparse, the larger first.
        dense_blocks: numbers of transformer blocks that stay dense.
        min_tokens: below which it stays dense.
        patch: None where the model does not say it.
        previous: another node's override, which answers what stays dense.
    """

    def __init__(
        self,
        *,
        choose: Callable[[VideoShape], tuple[Any, float]],
        sigmas: tuple[float, float],
        dense_blocks: frozenset[int],
        min_tokens: int,
        patch: Patch | None,
        previous: Callable[..., Tensor] | None,
    ) -> None:
        self.choose, self.sigmas = choose, sigmas
        self.dense_blocks, self.min_tokens = dense_blocks, min_tokens
        self.patch, self.previous = patch, previous
        self.now = _Now()
        self.counts: Counter[str] = Counter()

    def watch(self, forward: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a forward pass. x: latents, (B, C, T, H, W) of a video."""
        if self.patch is not None and isinstance(x, Tensor) and x.ndim == 5:
            # The models pad the latents to whole patches.
            sides = (-(-n // p) for n, p in zip(x.shape[2:], self.patch, strict=True))
            self.now.video = VideoShape(*sides)
        try:
            return forward(x, *args, **kwargs)
        finally:
            self.now.video = self.now.sigmas = None

    def attend(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Instead of `func`. No kernel computes scores in less than `attn_precision` asks for.

        Args:
            q, k, v: (B, N, H D), or with `skip_reshape` (B, H, N, D).

        Returns:
            (B, N, H D), or with `skip_output_reshape` (B, H, N, D).
        """
        options = kwargs.get("transformer_options") or {}
        tokens = q.shape[2 if skip_reshape else 1]
        reason = self._why_dense(tokens, q.shape == k.shape == v.shape, mask is None, options)
        if reason is not None:
            self.counts[f"dense: {reason}"] += 1
            call = func if self.previous is None else _behind(self.previous, func)
            return call(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )
        if not skip_reshape:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        video = self.now.video
        method, density = self.choose(video)
        scale = kwargs.get("scale")
        out = gen_accel.attention(q, k, v, video=video, method=method, scale=scale)
        self.counts[f"sparse: {video} tokens, density {density:.3f}"] += 1
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def report(self, *patcher: Any) -> None:
        """After a run: what the attention calls came to."""
        for outcome, calls in self.counts.most_common():
            logging.info("Sparse Attention (gen_accel): %d attention calls %s", calls, outcome)
        if not self.counts:
            logging.warning(
                "Sparse Attention (gen_accel): no attention call came by; a node after this one "
                "replaced it, or the model does not call ComfyUI's attention"
            )
        self.counts.clear()

    def _why_dense(
        self, tokens: int, is_self: bool, is_whole: bool, options: dict[str, Any]
    ) -> str | None:
        video = self.now.video
        if not is_self:
            return "cross-attention, or fewer heads of keys"
        if video is None:
            return "the model shows no latents (B, C, T, H, W), or no patch size"
        if tokens != video.tokens:
            return f"{tokens} tokens, the grid has {video}; the place of others is not known"
        if not is_whole:
            return "a mask"
        if tokens < self.min_tokens:
            return f"{tokens} tokens, fewer than min_tokens"
        if self.dense_blocks and "block_index" not in options:
            return "the model does not number its blocks, which dense_blocks needs"
        if options.get("block_index") in self.dense_blocks:
            return "dense_blocks"
        sigmas = options.get("sigmas")
        if sigmas is not None and not self.sigmas[1] <= self._sigma(sigmas) <= self.sigmas[0]:
            return "outside of start_percent and end_percent"
        return None

    def _sigma(self, sigmas: Tensor) -> float:
        """Read once in a forward pass, as it waits for the device."""
        if self.now.sigmas is not sigmas:
            self.now.sigmas, self.now.sigma = sigmas, float(sigmas[0])
        return self.now.sigma


class _Now(threading.local):
    """The forward pass that runs; ComfyUI runs one in a thread of its own on each of several
    GPUs."""

    video: Any = None
    sigmas: Tensor | None = None
    sigma: float = 0.0


def _behind(previous: Callable[..., Tensor], func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return previous(func, *args, **kwargs)

    return call
