"""The table of what to expect in README.md, from the result files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
LINK = "benchmarks/results"
CLIPS, ERRORS, STEPS = "methods_clips_129", "methods_errors_129", "pipeline_cpu"
# Settings of CLIPS, and the words for them.
SHOWN = {
    "Piecewise, calibrated 0.2": "`Piecewise(0.2)`, calibrated",
    "Piecewise 0.2": "`Piecewise(0.2)`",
    "Piecewise 0.1": "`Piecewise(0.1)`",
    "PISA 0.2": "[PISA](docs/methods/piecewise.md#sources-and-deviations)",
    "Sol-Attn 0.2": "[Sol-Attn](docs/methods/piecewise.md#sources-and-deviations)",
    "SparseLinear 0.2": "`SparseLinear`, fitted",
    "Radial 0.2": "`Radial`",
}
MODEL = "Wan 2.1 1.3B, four times as long"
STAGE = "a denoising step"  # of benchmarks/gpu.py
FACTS = "model", "device", "method", "density"
HEADS = (*FACTS, "attention is", "a step is", "PSNR, mean (worst)")
UNTIMED = "not measured yet"


def table() -> list[str]:
    """Markdown: the demo model, a step of Wan's widths, and every card that was measured."""
    rows = [*_clips(), *_steps(), *_cards()]
    files = ", ".join(f"[{name}]({LINK}/{name}.json)" for name in (CLIPS, ERRORS, STEPS))
    return [
        "",
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "3.0x: three times as fast as dense attention or a dense step, timed in turns. Random "
        f"weights: one of 30 layers. From {files}.",
        "",
    ]


def _clips() -> Iterator[Sequence[str]]:
    clips, errors = _result(CLIPS), _result(ERRORS)
    settings = {setting["setting"]: setting["rows"] for setting in clips["settings"]}
    timed = {f"{row['method']} {row['asked']}": row for row in errors["rows"]}
    for name, words in SHOWN.items():
        found = [row["psnr_db"] for row in settings[name]]
        yield (
            f"demo, {clips['frames']} frames",
            f"{errors['device']}, {errors['threads']} cores",
            words,
            f"{mean(row['density'] for row in settings[name]):.2f}",
            f"{timed[name]['dense_ms'] / timed[name]['ms']:.1f}x",
            "",
            f"{mean(found):.1f} dB ({min(found):.1f})",
        )


def _steps() -> Iterator[Sequence[str]]:
    report = _result(STEPS)
    device = f"{report['device']}, {report['threads']} cores"
    for row in report["rows"]:
        if row["model"] == MODEL and "refused" not in row:
            yield _step(row, device, f"Wan 2.1 1.3B, {row['tokens']:,} tokens, random weights")


def _cards() -> Iterator[Sequence[str]]:
    files = sorted(RESULTS.glob("gpu_*.json"))
    for path in files:
        report = json.loads(path.read_text(encoding="utf-8"))
        for line in report["lines"]:
            if (line["stage"], line["status"]) == (STAGE, "done"):
                row = line["result"]
                model = f"{row['model']}, {row['tokens']:,} tokens, random weights"
                yield _step(row, report["made_on"]["card"], model)
    if not files:
        yield "any", "any GPU", "any", "", UNTIMED, UNTIMED, UNTIMED


def _step(row: dict[str, Any], device: str, model: str) -> Sequence[str]:
    return (
        model,
        device,
        f"`{row['method']}`",
        f"{row['density']:.2f}",
        f"{row['attention_speedup']:.1f}x",
        f"{row['speedup']:.1f}x",
        "",  # of a clip of random weights it says nothing
    )


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
