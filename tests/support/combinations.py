"""What people combine with sparse attention: the cases of test_combine.py, and the table of
docs/combine.md. `python tests/support/combinations.py --write` writes the table.
"""

import sys
from pathlib import Path
from typing import NamedTuple

FAMILIES = ("Wan", "HunyuanVideo")

PAGE = Path(__file__).parents[2] / "docs/combine.md"
BEGIN, END = "<!-- combinations -->\n", "<!-- /combinations -->\n"


class Combination(NamedTuple):
    """One row, tested with each method on each family.

    Args:
        kind: of thing, which is how it is tested.
        call: what users call, in Markdown.
        verdict: "yes", "refused" or "not run".
        reason: unless it is "yes": why, or what it needs.
        families: served, where diffusers or the thing itself does not do without.
    """

    kind: str
    name: str
    call: str
    verdict: str = "yes"
    reason: str = ""
    families: tuple[str, ...] = FAMILIES

    @property
    def cell(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


COMBINATIONS = (
    Combination("model", "LoRA", "`pipe.load_lora_weights(...)`, before or after"),
    Combination("model", "LoRA, fused", "`pipe.fuse_lora()`, before or after"),
    Combination("model", "LoRA, unfused again", "`pipe.unfuse_lora()`, before or after"),
    Combination("cache", "FirstBlockCache", "`enable_cache(FirstBlockCacheConfig(...))`"),
    Combination(
        "cache",
        "Pyramid Attention Broadcast",
        "`enable_cache(PyramidAttentionBroadcastConfig(...))`",
    ),
    Combination(
        "cache",
        "FasterCache",
        "`enable_cache(FasterCacheConfig(is_guidance_distilled=True, ...))`",
    ),
    Combination(
        "batched cache",
        "FasterCache, both prompts in one call",
        "`enable_cache(FasterCacheConfig(...))`; the pipelines here make two calls",
        families=("Wan",),
    ),
    Combination(
        "cache",
        "TaylorSeer",
        "`enable_cache(TaylorSeerCacheConfig(...))`; on Wan with `cache_identifiers`",
    ),
    Combination(
        "cache", "TaylorSeer, lite", "`enable_cache(TaylorSeerCacheConfig(use_lite_mode=True))`"
    ),
    Combination("cache", "MagCache", "`enable_cache(MagCacheConfig(...))`"),
    Combination(
        "cache",
        "SeaCache",
        "`enable_cache(SeaCacheConfig(...))`; skips nothing on HunyuanVideo",
    ),
    Combination(
        "cache",
        "TextKVCache",
        "`enable_cache(TextKVCacheConfig())`; does nothing on these models",
    ),
    Combination(
        "cache",
        "cache-dit",
        "`cache_dit.enable_cache(pipe, ...)`; ran with 1.5.3",
    ),
    Combination(
        "model",
        "LayerSkip, whole blocks",
        "`apply_layer_skip(transformer, LayerSkipConfig([1]))`",
    ),
    Combination(
        "refused",
        "LayerSkip, attention alone",
        "`LayerSkipConfig([1], skip_ff=False)`, or `skip_attention_scores`",
        "refused",
        "by diffusers, with and without us",
    ),
    Combination("model", "fp8 storage", "`enable_layerwise_casting(...)`, before or after"),
    Combination(
        "loaded",
        "torchao int8, weights only",
        "`from_pretrained(...)` with a `TorchAoConfig`; ran with 0.18.0",
    ),
    Combination(
        "loaded",
        "GGUF",
        "`from_single_file(...)` with a `GGUFQuantizationConfig`; ran with 0.19.0",
    ),
    Combination(
        "loaded on a GPU",
        "bitsandbytes int8",
        "`from_pretrained(...)` with a `BitsAndBytesConfig`",
        "not run",
        "needs a GPU",
    ),
    Combination(
        "model",
        "group offload, blocks",
        '`enable_group_offload(cpu, cpu, offload_type="block_level", ...)`',
    ),
    Combination(
        "model",
        "group offload, leaves",
        '`enable_group_offload(cpu, cpu, offload_type="leaf_level")`',
    ),
    Combination(
        "model",
        "group offload, to disk",
        "`enable_group_offload(cpu, cpu, offload_to_disk_path=...)`",
    ),
    Combination(
        "model on a GPU",
        "group offload to a GPU",
        "`enable_group_offload(cuda, cpu, use_stream=True)`",
        "not run",
        "needs a GPU",
    ),
    Combination(
        "model",
        "sequential offload, the CPU for the device",
        '`accelerate.cpu_offload(transformer, "cpu")`',
    ),
    Combination(
        "model on a GPU",
        "sequential offload",
        "`pipe.enable_sequential_cpu_offload()`",
        "not run",
        "needs a GPU",
    ),
    Combination(
        "model",
        "model offload, the CPU for the device",
        '`accelerate.cpu_offload_with_hook(transformer, "cpu")`',
    ),
    Combination(
        "model on a GPU",
        "model offload",
        "`pipe.enable_model_cpu_offload()`",
        "not run",
        "needs a GPU",
    ),
    Combination("compiled", "compiled blocks", "`compile_repeated_blocks(fullgraph=True)`, after"),
    Combination(
        "compiled",
        "compiled model, one graph",
        "`transformer.compile(fullgraph=True)`, after",
        families=("Wan",),
    ),
    Combination(
        "refused",
        "compiled model, one graph",
        "`transformer.compile(fullgraph=True)`, after",
        "refused",
        "lengths of texts",
        families=("HunyuanVideo",),
    ),
    Combination(
        "compiled",
        "compiled model",
        "`transformer.compile()`, after",
        families=("HunyuanVideo",),
    ),
    Combination(
        "refused",
        "compiled before",
        "`transformer.compile()`, or of its blocks, and then `attach`",
        "refused",
        "attach first",
    ),
    Combination("guidance", "guidance in one call", "both prompts as one batch"),
    Combination(
        "guidance", "guidance in two calls", '`with transformer.cache_context("uncond")`, or bare'
    ),
    Combination(
        "model",
        "attention backend",
        "`set_attention_backend(...)`; dense layers and cross-attention obey",
    ),
    Combination("model", "fused projections", "`fuse_qkv_projections()`, before or after"),
)


def title(combination: Combination) -> str:
    """Of its row, with the family where it is about one alone."""
    if combination.families == FAMILIES:
        return combination.name
    return f"{combination.name} ({', '.join(combination.families)})"


def table() -> str:
    """In Markdown: a row for each combination, which is the same with every method."""
    rows = [("", "call", "with every method"), ("---",) * 3]
    rows += [(title(c), c.call, c.cell) for c in COMBINATIONS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(page: str) -> str:
    """The page with its table as it is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/support/combinations.py --write")
    PAGE.write_text(written(PAGE.read_text()))
