"""The node. Its inputs have the names and meanings of ComfyUI's own Model Sparse Attention."""

import re
from functools import partial
from typing import Any

from .methods import METHODS, method_for
from .override import put_on


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
        patched = put_on(
            model,
            choose=partial(method_for, method, keep_percent / 100),
            start_percent=start_percent,
            end_percent=end_percent,
            dense_blocks=block_numbers(dense_blocks),
            min_tokens=min_tokens,
        )
        return (patched,)


NODE_CLASS_MAPPINGS = {"GenAccelSparseAttention": SparseAttentionNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelSparseAttention": "Sparse Attention (gen_accel)"}


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
