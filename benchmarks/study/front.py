"""The tables of what to expect in README.md, from the result files."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

from pages import RESULTS, machine, read_result, right, spread

from gen_accel.demo import TRAINED_FRAMES
from study import longer

LINK = "benchmarks/results"
CLIPS, ERRORS, STEPS = "methods_shown", "methods_errors_129", "pipeline_cpu"
SOURCES = "docs/methods/piecewise.md#sources-and-deviations"
# Settings of CLIPS, and the words for them: what was calibrated is beside its like.
SHOWN = {
    "Piecewise, calibrated 0.2": "`Piecewise(0.2)`, calibrated",
    "PISA, calibrated 0.2": f"[PISA]({SOURCES}), calibrated",
    "Sol-Attn, calibrated 0.2": f"[Sol-Attn]({SOURCES}), calibrated",
    "Piecewise 0.2": "`Piecewise(0.2)`",
}
CLIP_HEADS = "method", "density", "attention is", "PSNR in dB, mean (worst to best)", "right clips"
MODEL = "Wan 2.1 1.3B, four times as long"
STAGE = "a denoising step"  # of benchmarks/gpu.py
STEP_HEADS = "device", "method", "density", "attention is", "a dense step takes", "a step is"
UNTIMED = "not measured yet"


def table() -> list[str]:
    """Markdown: clips of the demo model, steps of Wan's widths on every machine that was measured,
    and how far the demo's clips are from dense ones."""
    clips, errors = read_result(CLIPS), read_result(ERRORS)
    files = ", ".join(f"[{name}]({LINK}/{name}.json)" for name in (CLIPS, ERRORS, STEPS))
    score = longer.demo_score()
    return [
        "",
        f"The demo model without its LoRA, {clips['frames']} frames where it was trained at "
        f"{TRAINED_FRAMES}, {len(clips['prompts'])} prompts, the first fifth of the steps dense. "
        f"Dense attention itself gets {right(clips['dense'])} right. Clips by {machine(clips)}; "
        f"attention timed on {machine(errors)}:",
        "",
        *_lines(CLIP_HEADS, _clips(clips, errors)),
        "",
        "One layer of Wan 2.1 1.3B with random weights, 32,400 tokens:",
        "",
        *_lines(STEP_HEADS, [*_steps(), *_cards()]),
        "",
        "3.0x: three times as fast as dense attention or a dense step, timed in turns; an empty "
        f"cell was not timed. From {files}.",
        "",
        "**Nearness to dense is not quality.** The demo [with its "
        f"LoRA](docs/longer_videos.md#on-the-demo-model) made {score['clips']} clips of fresh "
        f"prompts and {clips['frames']} frames. Dense {score['dense']} are right, through "
        f"`Piecewise(0.2)` {score['sparse']}, and {score['both']} both times. Their PSNR to one "
        f"another is {score['psnr_worst_db']} to {score['psnr_best_db']} dB.",
        "",
    ]


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _clips(clips: dict[str, Any], errors: dict[str, Any]) -> Iterator[Sequence[str]]:
    settings = {setting["setting"]: setting["rows"] for setting in clips["settings"]}
    timed = {f"{row['method']} {row['asked']}": row for row in errors["rows"]}
    yield "dense", "1", "1x", "", right(clips["dense"])
    for name, words in SHOWN.items():
        rows, time = settings[name], timed.get(name)
        found = [row["psnr_db"] for row in rows]
        yield (
            words,
            f"{mean(row['density'] for row in rows):.2f}",
            "" if time is None else f"{time['dense_ms'] / time['ms']:.1f}x",
            spread(found),
            right(rows),
        )


def _steps() -> Iterator[Sequence[str]]:
    report = read_result(STEPS)
    for row in report["rows"]:
        if row["model"] == MODEL and "refused" not in row:
            yield _step(row, machine(report))


def _cards() -> Iterator[Sequence[str]]:
    files = sorted(RESULTS.glob("gpu_*.json"))
    for path in files:
        report = read_result(path.stem)
        for line in report["lines"]:
            if (line["stage"], line["status"]) == (STAGE, "done"):
                row = line["result"]
                card = report["made_on"]["card"]
                yield _step(row, f"{card}, {row['model']}, {row['tokens']:,} tokens")
    if not files:
        yield "any GPU", "any", "", UNTIMED, UNTIMED, UNTIMED


def _step(row: dict[str, Any], device: str) -> Sequence[str]:
    return (
        device,
        f"`{row['method']}`",
        f"{row['density']:.2f}",
        f"{row['attention_speedup']:.1f}x",
        f"{row['dense_s']:.3g} s",
        f"{row['speedup']:.1f}x",
    )
