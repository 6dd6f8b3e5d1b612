"""A node that puts sparse attention on a model, by ComfyUI's own hooks.

ComfyUI's models are not those of diffusers, so that nothing of `gen_accel.attach` serves here:

- `transformer_options["optimized_attention_override"]` gets every attention call of the model, and
  the function that would have answered it.
- A wrapper of kind "diffusion_model" sees the latents of each forward pass: the grid comes from
  the live call.

Written for Comfy-Org/ComfyUI at 01dafad (comfy_extras/nodes_sparse_attention.py, whose inputs have
the same names and meanings here) and at 05080f6 (comfy/ldm/modules/attention.py).
"""

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import gen_accel
from gen_accel import Radial, SparseLinear, VideoShape

KEY = "gen_accel_sparse_attention"
OVERRIDE = "optimized_attention_override"
METHODS = ("sparse_linear", "radial")
Patch = tuple[int, int, int]  # frames, rows and columns of latents in one token


class SparseAttention:
    """Takes self-attention over the grid of the latents, and leaves all other calls alone.

    Args:
        method: of METHODS.
        keep: share of the pairs, or for "sparse_linear" of the key blocks, that are kept.
        sigmas: between which it is sparse, the larger first.
        dense_blocks: numbers of transformer blocks that stay dense.
        min_tokens: below which it stays dense.
        patch: None where the model does not say it.
        previous: another node's override, which answers what stays dense.
    """

    def __init__(
        self,
        *,
        method: str,
        keep: float,
        sigmas: tuple[float, float],
        dense_blocks: frozenset[int],
        min_tokens: int,
        patch: Patch | None,
        previous: Callable[..., Tensor] | None,
    ) -> None:
        self.method, self.keep, self.sigmas = method, keep, sigmas
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
        method, density = method_for(self.method, self.keep, video)
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


@lru_cache(maxsize=8)
def method_for(name: str, keep: float, video: VideoShape) -> tuple[Any, float]:
    """A method and the density that it has on `video`.

    "sparse_linear" keeps that share of the key blocks for each query block. Of "radial" it is the
    widest at most as dense as `keep`, or the sparsest there is: every token sees its own frame and
    the first one.
    """
    if name == "sparse_linear":
        return SparseLinear(critical=keep), keep
    low, high = -10.0, 10.0  # of log2 decay_factor: beyond, nothing changes on any video
    for _ in range(16):
        middle = (low + high) / 2
        wide = Radial(decay_factor=2**middle).density(video) > keep
        low, high = (low, middle) if wide else (middle, high)
    method = Radial(decay_factor=2**low)
    return method, method.density(video)


def block_numbers(text: str) -> frozenset[int]:
    """ "0, 1, 47-49" to five numbers.

    Raises ValueError for anything else.
    """
    numbers: set[int] = set()
    for part in re.split(r"[\s,]+", re.sub(r"\s*-\s*", "-", text).strip(" ,")):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found:
            numbers |= {*range(int(found[1]), int(found[2] or found[1]) + 1)}
        elif part:
            raise ValueError(f"dense_blocks takes numbers and ranges, as in 0, 1, 47-49: {text!r}")
    return frozenset(numbers)


def patch_of(model: Any) -> Patch | None:
    """Of a diffusion model; None where it does not say. A wrong one makes another number of tokens
    than the model has, which stays dense."""
    size = getattr(model, "patch_size", None)
    if isinstance(size, int):
        return 1, size, size
    return tuple(size) if isinstance(size, tuple | list) and len(size) == 3 else None


def _behind(previous: Callable[..., Tensor], func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return previous(func, *args, **kwargs)

    return call


class SparseAttentionNode:
    """Sparse attention on a video model."""

    DESCRIPTION = (
        "Self-attention over a video's tokens sees a part of them. What it gains grows with the "
        "number of tokens. The log says after a run how many calls were sparse, and why the "
        "others were not."
    )
    CATEGORY = "model/patch"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (
                    [*METHODS],
                    {"tooltip": "Which tokens are seen: chosen by their scores, or near in time."},
                ),
                "keep_percent": (
                    "FLOAT",
                    {
                        "default": 30.0,
                        "min": 0.5,
                        "max": 100.0,
                        "step": 0.5,
                        "tooltip": "Of the key blocks, or of the token pairs of radial.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {**share, "default": 0.2, "tooltip": "Before, the model stays dense."},
                ),
                "end_percent": (
                    "FLOAT",
                    {**share, "default": 1.0, "tooltip": "After, the model is dense again."},
                ),
            },
            "optional": {
                "dense_blocks": (
                    "STRING",
                    {"default": "", "tooltip": "Blocks that stay dense, as in 0, 1, 47-49."},
                ),
                "min_tokens": (
                    "INT",
                    {
                        "default": 12288,
                        "min": 0,
                        "max": 1 << 20,
                        "step": 512,
                        "tooltip": "Fewer stay dense.",
                    },
                ),
            },
        }

    def patch(
        self,
        model: Any,
        method: str,
        keep_percent: float,
        start_percent: float,
        end_percent: float,
        dense_blocks: str = "",
        min_tokens: int = 12288,
    ) -> tuple[Any]:
        """A copy of `model` with sparse attention; `model` stays as it is."""
        sampling = model.get_model_object("model_sampling")
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        sparse = SparseAttention(
            method=method,
            keep=keep_percent / 100,
            sigmas=(
                float(sampling.percent_to_sigma(start_percent)),
                float(sampling.percent_to_sigma(end_percent)),
            ),
            dense_blocks=block_numbers(dense_blocks),
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
        return (patched,)


NODE_CLASS_MAPPINGS = {"GenAccelSparseAttention": SparseAttentionNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelSparseAttention": "Sparse Attention (gen_accel)"}
