"""Lines and tables about presets and tunings, which several verbs print."""

from statistics import fmean
from typing import Any

MOST_ROWS = 12  # of a curve
TITLES = {"tuning": "tuning prompts", "held_out": "held-out prompts"}


def preset_lines(preset: Any) -> list[str]:
    """Say what a preset was made for, what it costs, and what was measured of it."""
    grid = " x ".join(map(str, preset.made_for.grid))
    bound = preset.bound
    asked = [f"{name} {bound[name]:g}" for name in ("mean", "worst") if name in bound]
    lines = [
        f"{preset.method.steps} steps on {grid} tokens of {preset.made_for.transformer['class']}",
        f"density {preset.density:.3f}, attention {preset.cost:.2f} of dense, predicted error "
        f"{preset.predicted:.3g}",
        f"asked for {bound.get('objective', 'psnr')}, {' and '.join(asked)} at least: "
        + ("verified" if preset.verified else "not verified, predicted from the profile"),
    ]
    if preset.made_for.loras:
        lines.append(f"with LoRAs {', '.join(preset.made_for.loras)}")
    for name, title in TITLES.items():
        scores = [run["score"] for run in preset.measured.get(name, [])]
        if scores:
            lines.append(
                f"measured on {len(scores)} {title}: mean {fmean(scores):.3g}, "
                f"worst {min(scores):.3g}"
            )
    return lines


def print_curve(found: Any) -> None:
    """Print the choices of a tuning, from sparse to dense, those that were measured and
    its own among them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("attention", "density", "predicted error", "mean", "worst", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for one in _shown(found):
        own = one["cost"] == found.preset.cost
        scores = [f"{one[name]:.3g}" if name in one else "" for name in ("mean", "worst")]
        table.add_row(
            f"{one['cost']:.3f}",
            f"{one['density']:.3f}",
            f"{one['predicted']:.3g}",
            *scores,
            "taken" if own else "",
        )
    Console(highlight=False, markup=False).print(table)


def _shown(found: Any) -> list[dict[str, float]]:
    """Rows of the curve by rising cost: what was measured, the choice, and some of the others."""
    preset = found.preset
    own = {"cost": preset.cost, "density": preset.density, "predicted": preset.predicted}
    rows = {run["predicted"]: run for run in preset.measured.get("runs", [])}
    rows = {own["predicted"]: own} | rows
    others = [point for point in found.points if point.predicted not in rows]
    room = max(MOST_ROWS - len(rows), 2)
    count = min(room, len(others))
    for i in range(count):
        point = others[i * (len(others) - 1) // max(count - 1, 1)]
        row = {"cost": point.cost, "density": point.density, "predicted": point.predicted}
        rows[point.predicted] = row
    return sorted(rows.values(), key=lambda row: -row["predicted"])
