"""The backend: which calls of vLLM-Omni's attention are sparse, and over which grid.

Written for and tested with vLLM-Omni 0.30. A model says by
`AttentionMetadata.video_layout` where its grid of tokens lies in a sequence. Text, references and
audio beside the grid see all and are seen by all. Calls without a grid run the backend that the
platform takes by default.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import (  # pyright: ignore[reportMissingImports]
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
)
from vllm_omni.diffusion.config import (  # pyright: ignore[reportMissingImports]
    get_current_diffusion_config_or_none,
)
from vllm_omni.diffusion.forward_context import (  # pyright: ignore[reportMissingImports]
    get_forward_context,
    is_forward_context_available,
)

import gen_accel
from gen_accel import VideoShape
from gen_accel.attention_processors.tokens import Tokens, by_text
from gen_accel.method import Step

from .options import NAME, Options, check_theirs

logger = logging.getLogger(__name__)

UNKNOWN_DIM = -1  # as vLLM-Omni asks for a backend before it knows the dim of a head


class Place(NamedTuple):
    """Place of the grid in a sequence.

    Args:
        tokens: the grid, with all other tokens that count as its text.
        used: tokens of the sequence, from its first, that are not padding.
    """

    tokens: Tokens
    used: int


class GenAccelBackend(AttentionBackend):
    """Sparse attention over the grid of a video, in the place that `register` gives it."""

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Tell whether dense calls can take a mask; sparse ones need none, as a grid tells what is
        padding."""
        return dense_backend(UNKNOWN_DIM).supports_attention_mask(None)

    @staticmethod
    def get_name() -> str:
        return "GEN_ACCEL"

    @staticmethod
    def get_impl_cls() -> type["GenAccelImpl"]:
        return GenAccelImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # all


class GenAccelImpl(AttentionImpl):
    """The attention of one layer.

    Args:
        prefix: name of the layer; the one number in it is its block's.
        backend_kwargs: what vLLM-Omni makes of `block_sparse`; refused where it is set.

    Raises:
        ValueError: causal attention; a parallelism that leaves a process some of the keys, or
            some of the heads where the method gives each head its own; an option that there is
            not; a layer without a number, or in another model, where the method needs it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        config = get_current_diffusion_config_or_none()
        given = None if config is None else config.additional_config.get(NAME)
        check_theirs(backend_kwargs)
        self.options = Options.of(given)
        if causal:
            raise ValueError(
                "gen_accel attends to a whole video; choose another backend for causal roles"
            )
        if qkv_layout not in (None, "BSND"):
            raise ValueError(f"gen_accel takes q, k and v as BSND, got {qkv_layout}")
        self.scale = softmax_scale
        self.layer = _number(prefix)
        model = None if config is None else config.tf_model_config.get("_class_name")
        self.method = _of_layer(self.options.method, self.layer, model, num_heads)
        if config is not None:
            _check_parallel(config.parallel_config, self.method)
        self.dense = dense_backend(head_size).get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=False,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
        )

    def forward_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None
    ) -> Tensor:
        return self.attend(query, key, value, attn_metadata, self.dense.forward_cuda)

    def forward_hip(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None
    ) -> Tensor:
        return self.attend(query, key, value, attn_metadata, self.dense.forward_hip)

    def forward_xpu(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None
    ) -> Tensor:
        return self.attend(query, key, value, attn_metadata, self.dense.forward_xpu)

    def forward_musa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None
    ) -> Tensor:
        return self.attend(query, key, value, attn_metadata, self.dense.forward_musa)

    # The grid and the step are read outside of graphs.
    @torch.compiler.disable(recursive=True)
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        about: AttentionMetadata | None,
        dense: Callable[..., Tensor],
    ) -> Tensor:
        """Compute attention, sparse where the grid is known and nothing keeps it dense.

        Args:
            query, key, value: (B, N, H, D); key and value may have fewer heads.
            dense: runs this call by the platform's own backend.

        Returns:
            (B, N, H, D), zero for padding in sparse calls.

        Raises:
            ValueError: a schedule of steps in a pipeline that does not tell them, or attention
                that is causal in some spans.
        """
        if about is not None and about.full_attn_spans is not None:
            raise ValueError(
                "gen_accel cannot attend causally in some spans; choose another backend"
            )
        place = self._why_dense(query, key, about)
        if isinstance(place, str):
            _say(f"dense: {place}")
            return dense(query, key, value, about)
        tokens, used = place
        if key.shape[2] != query.shape[2]:
            share = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(share, 2) for x in (key, value))
        [all_samples] = by_text(tokens, len(query), None, query.device)
        q, k, v = (all_samples.of(x[:, :used]) for x in (query, key, value))
        method = self._method_now().for_device(query.device)
        unfitted = ", without its linear branch" if method.defines("branch") else ""
        _say(f"sparse: {method} over {tokens.video} tokens{unfitted}")
        out = gen_accel.attention(
            q,
            k,
            v,
            video=tokens.video,
            method=method,
            kernel=self.options.kernel,
            scale=self.scale,
        )
        out = all_samples.back(out, used)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, query.shape[1] - used))

    def _why_dense(
        self, query: Tensor, key: Tensor, about: AttentionMetadata | None
    ) -> "Place | str":
        """The place of the grid in a call, or the reason why it is dense."""
        if self.method.is_dense:
            return "method is dense"
        if query.shape[1] != key.shape[1]:
            return "cross-attention"
        place = _place(query, about)
        if isinstance(place, str):
            return place
        if is_forward_context_available() and get_forward_context().in_diffusion_kv_memory_profile:
            return "memory is measured"
        why = self._why_layer() or self._why_step()
        return place if why is None else why

    def _why_layer(self) -> str | None:
        schedule = self.options.schedule
        if not schedule.dense_layers:
            return None
        if self.layer is None:
            raise ValueError(
                f"dense_layers={schedule.dense_layers} cannot be kept: this model does not number "
                "its layers"
            )
        return schedule.why_layer(self.layer)

    def _why_step(self) -> str | None:
        schedule = self.options.schedule
        noise, counted = schedule.dense_noise, replace(schedule, dense_noise=None)
        step, steps, level = _step()
        if noise is not None:
            if level is None:
                raise _untold("the noise of its steps", "dense_noise", schedule)
            if noise[1] < level <= noise[0]:
                return "noise of the step"
        if not counted.needs_step:
            return None
        if step is None:
            raise _untold("its steps", "all but dense_layers", schedule)
        if steps is None and counted.needs_total:
            left = "dense_start, dense_end and steps counted from the end"
            raise _untold("how many steps there are", left, schedule, "; dense_steps is kept")
        return counted.why_step(step, steps)

    def _method_now(self) -> Any:
        step, steps, _ = _step()
        if step is None:
            return self.method
        counted = replace(self.options.schedule, dense_noise=None)
        return self.method.at(Step(step, steps, counted.progress(step, steps)))


@lru_cache(maxsize=16)
def dense_backend(head_size: int) -> Any:
    """Backend that the platform takes by default; torch's own attention if there is none."""
    from vllm_omni.diffusion.attention.backends.sdpa import (  # pyright: ignore[reportMissingImports]
        SDPABackend,
    )
    from vllm_omni.diffusion.attention.selector import (  # pyright: ignore[reportMissingImports]
        get_attn_backend_for_role,
    )

    try:
        return get_attn_backend_for_role("self", head_size, allow_trtllm_default=False)[0]
    except NotImplementedError:  # a machine without an accelerator
        return SDPABackend


def _place(query: Tensor, about: AttentionMetadata | None) -> "Place | str":
    """The grid of a call, from what its model publishes; else why it is not known."""
    layout = None if about is None else about.video_layout
    if about is None or layout is None:
        return "this attention has no video_layout"
    mask, packed = about.attn_mask, about.extra.get("cu_seqlens_q")
    if mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool):
        return "a mask of pairs"
    if layout.video_spans:
        targets = [span for span in layout.video_spans if span.role == "target"]
        if len(targets) != 1 or layout.used_len is None:
            return f"{len(targets)} target videos in one sequence"
        before, grid, used = targets[0].start, targets[0].latent_grid, layout.used_len
    elif layout.latent_grid is None or layout.prefix_len is None:
        return "a video_layout without a grid"
    else:
        before, grid = layout.prefix_len, layout.latent_grid
        used = before + prod(grid) if layout.used_len is None else layout.used_len
    most = about.extra.get("max_seqlen_q", used)
    if packed is not None and (packed.numel() > 3 or most != used):
        return f"{packed.numel() - 1} packed sequences, the longest of {most} tokens"
    if used > query.shape[1] or before + prod(grid) > used:
        return f"{query.shape[1]} tokens, the layout has {used} with {before} + {grid}"
    frames, height, width = grid
    return Place(Tokens(VideoShape(frames, height, width, used - prod(grid)), before), used)


def _step() -> tuple[int | None, int | None, float | None]:
    """The denoising step, how many there are, and the noise from 1 to 0; None for what the
    pipeline does not tell."""
    if not is_forward_context_available():
        return None, None, None
    now = get_forward_context()
    return now.denoise_step_idx, now.total_denoise_steps, now.denoise_timestep


def _untold(what: str, leave: str, schedule: Any, instead: str = "") -> ValueError:
    return ValueError(
        f"this pipeline does not tell {what}: leave out {leave}, got {schedule}{instead}"
    )


def _number(prefix: str) -> int | None:
    """The one number in the name of a layer; None if there is none, or several."""
    numbers = [int(part) for part in prefix.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def _of_layer(method: Any, layer: int | None, model: str | None, heads: int) -> Any:
    if layer is None:
        if method.for_layer(0) != method:
            raise ValueError(
                f"{method} differs from layer to layer, and this model does not number its layers"
            )
        return method
    if why := method.unfit(model or "a model of another kind", layer, heads):
        raise ValueError(why)
    return method.for_layer(layer)


def _check_parallel(parallel: Any, method: Any) -> None:
    """Refuse what gives the backend some of the keys, or some of the heads that differ."""
    if parallel.ring_degree > 1 or parallel.allgather_degree > 1:
        raise ValueError(
            "gen_accel needs all tokens in each process: use ulysses_degree in the place of "
            f"ring_degree={parallel.ring_degree} and allgather_degree={parallel.allgather_degree}"
        )
    split = max(parallel.tensor_parallel_size, parallel.ulysses_degree)
    if split > 1 and (method.defines("for_heads") or method.needs_all_heads):
        why = method.needs_all_heads or "each head has its own blocks"
        raise ValueError(f"{method} cannot run where processes hold some of the heads: {why}")


@lru_cache(maxsize=64)
def _say(outcome: str) -> None:
    """Log a line, once."""
    logger.warning("gen_accel: %s", outcome)
