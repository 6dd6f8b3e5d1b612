"""Cost of a run in one line of a page."""

import html
from collections.abc import Mapping
from typing import Any

from gen_accel.ui.page import duration


def plan_line(found: Mapping[str, Any]) -> str:
    """Say what `--plan --json` forecasts: speed-up, density, seconds and memory."""
    low, high = found["speedup_range"]
    seconds = found["seconds"]["sparse_total"]
    peak, memory = found["peak_bytes"][found["offload"]][1], found["device_bytes"]
    if not found["pays"]:
        speed = "no gain at this size"
    elif f"{low:.1f}" == f"{high:.1f}":
        speed = f"{low:.1f}x as fast"
    else:
        speed = f"{low:.1f} to {high:.1f}x as fast"
    facts = {
        "speed": speed,
        "density": f"{found['density']:.2f}",
        "time": _span(*seconds),
        "memory": f"{peak / 1e9:.1f} GB" if peak >= 1e8 else f"{peak / 1e6:.0f} MB",
    }
    wrong = ""
    if found["fits"] is False:
        mode = found["fits_with"]
        advice = f"offload {mode} fits" if mode else "ask for fewer frames or pixels"
        wrong = f'<span class="ga-why">does not fit into {memory / 1e9:.0f} GB: {advice}</span>'
    cells = "".join(
        f"<span><small>{name}</small> {html.escape(value)}</span>" for name, value in facts.items()
    )
    where = html.escape(f"expected on {found['device']}, {found['tokens']:,} tokens")
    return f'<div class="ga-plan" title="{where}">{cells}{wrong}</div>'


def _span(low: float, high: float) -> str:
    first, last = duration(low), duration(high)
    if first == last:
        return first
    number, _, unit = first.partition(" ")
    return (
        f"{number} to {last}" if last.endswith(unit) and "h" not in first else f"{first} to {last}"
    )
