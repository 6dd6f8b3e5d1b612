"""The node for sparse attention. Its first inputs have the names and meanings of ComfyUI's own
Model Sparse Attention, and of other nodes for it.

Saved workflows hold the values of inputs by their place: a new input goes to the end.
"""

import re
from functools import partial
from typing import Any

from gen_accel import Schedule

from .method_nodes import METHOD
from .methods import BLOCKS, METHODS, OWN, SINKS, Asked, density_at
from .override import More, put_on

CATEGORY = "gen_accel"
SHARE = {"min": 0.0, "max": 1.0, "step": 0.01}
MIN_TOKENS = {"default": 12288, "min": 0, "max": 1 << 20, "step": 512}


class SparseAttentionNode:
    """Sparse attention on a video model."""

    DESCRIPTION = (
        "Self-attention over a video's tokens sees a part of them. What it gains grows with the "
        "number of tokens. The log says after a run how many calls were sparse, and why the "
        "others were not."
    )
    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "method": (
                    [*METHODS],
                    {
                        "default": "sparse_linear",
                        "tooltip": "Which tokens are seen: chosen by their scores (sparse_linear, "
                        "piecewise, block_mixture, reuse, vsa), or near in time and space "
                        "(radial, neighborhood). sol-attn and sla are ComfyUI's names.",
                    },
                ),
                "keep_percent": (
                    "FLOAT",
                    {
                        "default": 30.0,
                        "min": 0.5,
                        "max": 100.0,
                        "step": 0.5,
                        "tooltip": "Of the key blocks, or of the token pairs of radial and "
                        "neighborhood. sol-attn has tau for it.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {**SHARE, "default": 0.2, "tooltip": "Before, the model stays dense."},
                ),
                "end_percent": (
                    "FLOAT",
                    {**SHARE, "default": 1.0, "tooltip": "After, the model is dense again."},
                ),
            },
            "optional": {
                "dense_blocks": (
                    "STRING",
                    {"default": "", "tooltip": "Blocks that stay dense, as in 0, 1, 47-49."},
                ),
                "min_tokens": ("INT", {**MIN_TOKENS, "tooltip": "Fewer stay dense."}),
                "tau": (
                    "FLOAT",
                    {
                        "default": 1.3,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "Of sol-attn: standard deviations above the mean score from "
                        "which a block is exact. More is sparser.",
                    },
                ),
                "extra_tokens": (
                    "INT",
                    {
                        "default": 4096,
                        "min": 0,
                        "max": 1 << 20,
                        "tooltip": "A call with more tokens beside the video (text, references) "
                        "stays dense. They are always seen, and see all.",
                    },
                ),
                "sink_conditioning": (
                    [*SINKS],
                    {
                        "default": OWN,
                        "tooltip": "Whether all see the first frame (exact_kv), and it sees all "
                        "(and_rows). Of sol-attn, piecewise and, but for rows, radial.",
                    },
                ),
                "verbose": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "List the calls in the log after a run."},
                ),
                "dense_timesteps": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 1000,
                        "tooltip": "So many first steps stay dense, beside start_percent.",
                    },
                ),
                "decay_factor": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.05,
                        "tooltip": "Of radial: the width of its bands; 0 is by keep_percent.",
                    },
                ),
                "block_size": (
                    [*BLOCKS],
                    {"default": BLOCKS[0], "tooltip": "Tokens in a block."},
                ),
                "settings": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Fields of the method by the library's names, as in "
                        "anchor_every=4 rest=means. The nodes under gen_accel/methods list them.",
                    },
                ),
                "custom_method": (
                    METHOD,
                    {"tooltip": "Of a node under gen_accel/methods, in the place of method."},
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
        tau: float = 1.3,
        extra_tokens: int = 4096,
        sink_conditioning: str = OWN,
        verbose: bool = True,
        dense_timesteps: int = 0,
        decay_factor: float = 0.0,
        block_size: str = BLOCKS[0],
        settings: str = "",
        custom_method: Any = None,
    ) -> tuple[Any]:
        """A copy of `model` with sparse attention; `model` stays as it is."""
        asked = Asked(
            method,
            keep_percent / 100,
            tau=tau,
            decay_factor=decay_factor,
            block_size=block_size,
            sink=sink_conditioning,
            settings=tuple(settings.split()),
        )
        if custom_method is None:
            asked.check()
        patched = put_on(
            model,
            choose=asked if custom_method is None else partial(fixed, custom_method),
            start_percent=start_percent,
            end_percent=end_percent,
            dense_blocks=block_numbers(dense_blocks),
            min_tokens=min_tokens,
            more=More(
                schedule=Schedule(dense_steps=dense_timesteps),
                extra_tokens=extra_tokens,
                verbose=verbose,
            ),
        )
        return (patched,)


def fixed(method: Any, video: Any) -> tuple[Any, float | None]:
    """The same method on any video, and its density there."""
    return method, density_at(method, video)


def block_numbers(text: str) -> frozenset[int]:
    """Read "0, 1, 47-49" as five numbers; ValueError for anything else."""
    numbers: set[int] = set()
    for part in re.split(r"[\s,]+", re.sub(r"\s*-\s*", "-", text).strip(" ,")):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found:
            numbers |= {*range(int(found[1]), int(found[2] or found[1]) + 1)}
        elif part:
            raise ValueError(f"dense_blocks takes numbers and ranges, as in 0, 1, 47-49: {text!r}")
    return frozenset(numbers)


NODE_CLASS_MAPPINGS = {"GenAccelSparseAttention": SparseAttentionNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelSparseAttention": "Sparse Attention (gen_accel)"}
