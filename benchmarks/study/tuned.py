"""Tables of the result files of `tune.py`."""

import json
from pathlib import Path
from typing import Any

from pages import UNSCORED, machine

RESULTS = Path(__file__).parents[1] / "results"
FILES = (
    "tune_65_old",
    "tune_65_all",
    "tune_65_all_2_prompts",
    "tune_65_all_8_prompts",
    "tune_65_all_worst",
    "tune_129_all_2_prompts",
    "tune_257_all_2_prompts",
)
PROMPTS = "tune_prompts"


def lines() -> list[str]:
    """Lines of all tables, of the result files that are there."""
    made: list[str] = []
    used = []
    for name in FILES:
        path = RESULTS / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            made += [*of_file(report), ""]
            used.append(f"[{name}](../benchmarks/results/{name}.json)")
    path = RESULTS / f"{PROMPTS}.json"
    if path.exists():
        made += [*of_prompts(json.loads(path.read_text(encoding="utf-8"))), ""]
        used.append(f"[{PROMPTS}](../benchmarks/results/{PROMPTS}.json)")
    command = "`benchmarks/tune.py` and `tune_prompts.py`"
    return [*made, f"By {command}, from {', '.join(used)}."]


def of_prompts(report: dict[str, Any]) -> list[str]:
    """A table of what more tuning prompts and another weighting buy."""
    clips = len(report["rows"][0]["each"])
    made = [
        f"More tuning prompts, and other weightings (`scale`), {report['frames']} frames, "
        f"{report['steps']} steps, all with an attention time of {report['cost']:g} of dense in "
        f"the profile's table; PSNR over {clips} prompts that were not tuned on, "
        f"{machine(report['environment'])}; {UNSCORED}:",
        "",
        "| tuned on | scale | density | PSNR mean | worst | best |",
        "|---|---|---|---|---|---|",
    ]
    for one in report["rows"]:
        cells = [
            f"{one['prompts']} prompts",
            one["scale"],
            f"{one['density']:.3f}",
            f"{one['psnr']:.1f}",
            f"{one['worst']:.1f}",
            f"{max(one['each']):.1f}",
        ]
        made.append(f"| {' | '.join(cells)} |")
    return made


def of_file(report: dict[str, Any]) -> list[str]:
    """A table of one run: hand settings, then points of the frontier."""
    clips = next(len(one["each"]) for one in report["settings"].values() if "each" in one)
    among = "the four older methods" if report["families"] == "old" else "all methods"
    weighed = {"mean": "", "even": ", no prompt decides alone", "worst": ", by the worst prompt"}
    made = [
        f"{report['frames']} frames, {report['steps']} steps, candidates of {among}, tuned on "
        f"{report['tuning_prompts']} prompts{_elsewhere(report)}{weighed[report['scale']]}; PSNR "
        f"over {clips} prompts that were not tuned on, {machine(report['environment'])}; "
        f"{UNSCORED}:",
        "",
        "| setting | density | attention / dense | denoising / dense | PSNR mean | worst | best "
        "| fewer pairs | less time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    equal = report["at_equal_quality"]["old_hand_settings"]
    for name, one in report["settings"].items():
        if "psnr" not in one:
            continue
        gain = equal.get(name, {})
        cells = [
            name,
            f"{one['density']:.3f}",
            _number(one.get("attention_share", {}).get("attention"), "{:.2f}"),
            _number(one.get("attention_share", {}).get("denoising"), "{:.2f}"),
            f"{one['psnr']:.1f}",
            f"{one['worst']:.1f}",
            _number(max(one.get("each", ()), default=None), "{:.1f}"),
            _number(gain.get("density"), "{:.0%}"),
            _number(gain.get("attention"), "{:.0%}"),
        ]
        made.append(f"| {' | '.join(cells)} |")
    return made


def _elsewhere(report: dict[str, Any]) -> str:
    at = report.get("tuned_at", report["frames"])
    return "" if at == report["frames"] else f" at {at} frames"


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else shape.format(value)
