"""Trainings on one 24 GB card, as `gen_accel.lora.forecast_training` plans them.

    python benchmarks/train_plans.py

Nothing is run: each cell is the plan of a config, with a LoRA through Radial at 480 x 832 pixels,
as `gen-accel train --plan` prints it. Its rank is 128, and 64 in the table of `checkpoint_parts`.
"""

import argparse
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from pages import write_table

from gen_accel.io import write_json
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.forecast import forecast_training

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train_plans.json"
PAGE = HERE.parent / "docs" / "memory.md"
MARK, PARTS_MARK = "train plans", "parts"
CARD = "4090"
MODELS = {
    "Wan2.1-T2V-1.3B": (81, 161, 321),
    "Wan2.1-T2V-14B": (81, 117, 161),
    "HunyuanVideo": (129, 253),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": "on"},
    "offload": {"gradient_checkpointing": "offload"},
    "offload, fp8": {"gradient_checkpointing": "offload", "base": "fp8"},
    "offload, swap 20": {"gradient_checkpointing": "offload", "blocks_to_swap": 20},
    "offload, nf4, swap 30, adamw8bit": {
        **{"gradient_checkpointing": "offload", "base": "nf4", "blocks_to_swap": 30},
        "optimizer": "adamw8bit",
    },
}
PARTS_MODEL, PARTS_FRAMES, PARTS_RANK = "Wan2.1-T2V-14B", 161, 64
PARTS: dict[str, dict[str, Any]] = {
    "nf4, swap 30": {"base": "nf4", "blocks_to_swap": 30},
    "nf4, swap 30, parts": {"base": "nf4", "blocks_to_swap": 30, "checkpoint_parts": True},
    "swap 40, parts": {"blocks_to_swap": 40, "checkpoint_parts": True},
}


def plans(model: str) -> list[dict[str, Any]]:
    """GB of each length with each set of options, and what is advised without any."""
    found: dict[int, dict[str, float]] = {frames: {} for frames in MODELS[model]}
    for name, options in OPTIONS.items():
        config = TrainConfig(model=model, stages=stages(MODELS[model]), **options)
        for stage in forecast_training(config, gpus=(), here=False).stages:
            found[stage.frames][name] = round(stage.memory.total / 1e9, 1)
    return [
        {"model": model, "frames": frames, "gb": gb, "advice": advice(model, frames)}
        for frames, gb in found.items()
    ]


def parts() -> list[dict[str, Any]]:
    """GB with and without `checkpoint_parts`: of one block at work, on the card, on the host."""
    found = []
    for name, options in PARTS.items():
        config = TrainConfig(
            model=PARTS_MODEL,
            stages=stages((PARTS_FRAMES,)),
            gradient_checkpointing="offload",
            rank=PARTS_RANK,
            **options,
        )
        [stage] = forecast_training(config, gpus=(), here=False).stages
        memory = stage.memory
        sizes = {"block": memory.block, "card": memory.total, "host": memory.host}
        gb = {where: round(size / 1e9, 1) for where, size in sizes.items()}
        found.append({"options": name, "tokens": stage.tokens, "gb": gb})
    return found


def parts_table(results: dict[str, Any]) -> str:
    """Results of `parts` as Markdown."""
    head = ("offload and", "one block at work", "card", "CPU memory")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in results["parts"]:
        gb = row["gb"]
        card = _cell(gb["card"], results["card_gb"])
        lines.append((row["options"], f"{gb['block']:.1f}", card, f"{gb['host']:.1f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stages(lengths: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"{frames}:1" for frames in lengths)


def advice(model: str, frames: int) -> dict[str, Any] | None:
    """Return the options that the plan turns on for the card, beside checkpointing."""
    config = TrainConfig(model=model, stages=stages((frames,)), gradient_checkpointing="on")
    [verdict] = forecast_training(config, gpus=[CARD], here=False).verdicts
    if verdict.advice is None:
        return None
    options = verdict.advice.changes
    saved = accumulate(change.saves for change in options)
    return {
        "changes": [change.option for change in options],
        "totals": [verdict.peak - size for size in saved],
        "fits": verdict.advice.fits,
        "frames": verdict.advice.frames,
    }


def table(results: dict[str, Any]) -> str:
    """Results as Markdown."""
    head = ("model", "frames", *OPTIONS, "the plan says")
    lines = [head, ("---", *["---:"] * (len(head) - 2), "---")]
    lines += [
        (
            row["model"],
            str(row["frames"]),
            *(_cell(row["gb"][name], results["card_gb"]) for name in OPTIONS),
            _said(row["advice"]),
        )
        for row in results["rows"]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(size: float, room: float) -> str:
    return f"**{size:.1f}**" if size <= room else f"{size:.1f}"


def _said(found: dict[str, Any] | None) -> str:
    if found is None:
        return "fits"
    listed = [
        f"`{change}`: {total / 1e9:.1f}"
        for change, total in zip(found["changes"], found["totals"], strict=True)
    ]
    said = ", ".join(listed)
    if found["fits"]:
        return f"{said}, fits"
    return f"{said}; then {found['frames']} frames fit"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [row for model in MODELS for row in plans(model)]
    results = {"card": CARD, "card_gb": 24.0, "rows": rows, "parts": parts()}
    write_json(args.out, results)
    results = json.loads(args.out.read_text())
    print(args.out, table(results), parts_table(results), sep="\n\n")
    if args.out == RESULTS:
        write_page(results)


def write_page(results: dict[str, Any]) -> None:
    """Put both tables into the page."""
    write_table(PAGE, MARK, table(results))
    write_table(PAGE, PARTS_MARK, parts_table(results))


if __name__ == "__main__":
    main()
