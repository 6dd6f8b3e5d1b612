"""The tables of docs/comfyui.md, of what tests/integrations/test_comfyui_real.py measured.

    COMFYUI_DIR=... COMFYUI_RESULTS=benchmarks/results/comfyui.json \
        pytest tests/integrations/test_comfyui_real.py
    python benchmarks/comfyui.py

A test puts the figures of its case in the place of older ones.
"""

import json
from pathlib import Path
from typing import Any

from pages import with_table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "comfyui.json"
PAGE = HERE.parent / "docs" / "comfyui.md"
HIDDEN, REFERENCE = "the same, with text that a mask hides", "the same, with a reference image"
MODELS = {  # by case: its name, class in ComfyUI, tokens in self-attention
    "wan_t2v": ("Wan 2.1, 2.2", "`WanModel`", "video"),
    "wan_t2v phantom": ("with reference frames, as Phantom", "`WanModel`", "video, references"),
    "wan_i2v": ("Wan, image to video", "`WanModel`", "video"),
    "wan_fun reference": ("Wan Fun control", "`WanModel` with `ref_conv`", "reference, video"),
    "wan_vace": ("Wan VACE", "`VaceWanModel`", "video"),
    "wan_animate": ("Wan Animate", "`AnimateWanModel`", "video"),
    "wan_scail reference": ("Wan SCAIL", "`SCAILWanModel`", "reference, video, poses"),
    "wan_s2v reference": ("Wan S2V", "`WanModel_S2V`", "video, reference, motion"),
    "wan_humo reference": ("HuMo", "`HumoWanModel`", "video, reference"),
    "hunyuan_video": ("HunyuanVideo", "`HunyuanVideo`", "text, video"),
    "hunyuan_video hidden text": (HIDDEN, "", "text, video"),
    "hunyuan_video_15": ("HunyuanVideo 1.5", "`HunyuanVideo`", "text, video"),
    "ltx_video": ("LTX-Video", "`LTXVModel`", "video"),
    "ltx_2": ("LTX-2", "`LTXAVModel`", "video"),
    "cosmos_predict2": ("Cosmos-Predict2", "`MiniTrainDIT`", "video"),
    "mochi": ("Mochi 1", "`AsymmDiTJoint`", "video, text"),
    "kandinsky_5": ("Kandinsky 5", "`Kandinsky5`", "video"),
    "qwen_image": (
        "Qwen-Image, three layers",
        "`QwenImageTransformer2DModel`",
        "text, layers",
    ),
    "qwen_image reference": (REFERENCE, "", "text, layers, reference"),
    "qwen_image hidden text": (HIDDEN, "", "text, layers"),
    "flux": ("Flux", "`Flux`", "text, image"),
    "flux reference": (REFERENCE, "", "text, image, reference"),
}
NODES = {  # by case: it, and what is said of its sparse calls
    "compiled, all": (
        "TorchCompileModel's wrapper with the backend `eager`, before or after ours, against "
        "uncompiled",
        "",
    ),
    "compiled, but a block": ("the same with `dense_blocks` 0", ""),
    "compiled, but the first step": ("the same with `start_percent` 0.2", ""),
    "compiled, inductor": ("TorchCompileModel with `inductor` and `dense_blocks` 0", ""),
    "another override": (
        "another node's attention override, before or after ours, against none, with "
        "`dense_blocks` 1",
        "it gets the other calls",
    ),
    "shift": (
        "ModelSamplingSD3 of shift 12 before ours, against after, with `start_percent` 0.45",
        "in the same steps",
    ),
    "two nodes": ("two of ours, each for half of the sampling", "each at its own density"),
    "windows": ("WanContextWindowsManual, 17 latent frames in windows of 9", ""),
    "radial": ("`radial` with all kept, against none", ""),
    "dense_blocks, ltx_video": (
        "`dense_blocks` 1 and 2 on LTX-Video, which numbers no blocks",
        "",
    ),
    "dense_blocks, cosmos_predict2": ("the same on Cosmos-Predict2", ""),
}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return both tables by the names of their marks."""
    models = [
        "| model | class in ComfyUI | tokens in self-attention | sparse calls | all kept | "
        "30 % kept |",
        "|---|---|---|---|---|---|",
    ]
    for case, words in MODELS.items():
        row = results["models"][case]
        off = (figure(row[name]) for name in ("all_kept", "part_kept"))
        models.append(f"| {' | '.join((*words, calls(row), *off))} |")
    nodes = ["| case | difference | sparse calls |", "|---|---|---|"]
    for case, (words, told) in NODES.items():
        row = results["nodes"][case]
        sparse = f"{calls(row)}, {told}" if told else calls(row)
        nodes.append(f"| {words} | {figure(row['difference'])} | {sparse} |")
    known = results["environment"]
    run = f"ComfyUI {known['comfyui']}, torch {known['pytorch']}."
    return {"models": "\n".join([*models, "", run]), "other nodes": "\n".join(nodes)}


def calls(row: dict[str, Any]) -> str:
    return f"{row['sparse']} of {row['calls']}"


def figure(value: float | None) -> str:
    """Two digits of a rounding error, three decimals of a larger difference."""
    if not value:
        return "" if value is None else "0"
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def page_with(text: str, results: dict[str, Any]) -> str:
    """Put the tables between their marks on the page."""
    for name, table in tables(results).items():
        text = with_table(text, name, table)
    return text


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
