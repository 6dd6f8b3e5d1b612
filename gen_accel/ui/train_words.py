"""HTML of the Train screen: clips that were found, a plan, samples, a result."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:  # they import torch, which a page that trains nothing can do without
    from gen_accel.ui.train_clips import Found
    from gen_accel.ui.train_run import State

MOST_NAMES = 8  # of clips that are left out; the table has all
MOST_SAMPLES = 12
BOX = "border:1px solid var(--border-color-primary);border-radius:8px;padding:.5rem .7rem"
GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:.7rem"


def found_html(found: "Found") -> str:
    """Say what is trained on, and what is lost and left out of the clips."""
    report = found.report
    lasts = "" if report.seconds is None else f", {report.seconds:,.1f} s"
    unused, frames = report.unused_frames
    lost = f"{report.lost_picture:.0%} of the picture is cropped on average"
    if frames:
        lost += f", and {unused:,} of {frames:,} frames are unused"
    parts = [
        f"<p><b>{report.clips:,} to train on{lasts}, of {report.videos:,} found.</b> {lost}.</p>",
        _listed([str(bucket) for bucket in report.buckets]),
    ]
    if report.left_out:
        names = [f"{name}: {reason}" for name, reason in report.left_out.items()]
        more = len(names) - MOST_NAMES
        parts.append(f"<p>Left out, {len(names)}:</p>")
        parts.append(_listed([*names[:MOST_NAMES], *([f"and {more} more"] if more > 0 else [])]))
    parts += [f'<p class="ga-error">{_text(one)}</p>' for one in found.objections]
    return "".join(parts)


def plan_html(plan: Mapping[str, Any]) -> str:
    """Show whether a training fits each device, what to turn on, and the memory of each stage.

    Args:
        plan: as `gen-accel train --plan --json -` prints it.
    """
    devices = "".join(_device(one) for one in plan["devices"])
    notes = _listed([f"not counted: {note}" for note in plan["not_counted"]])
    return f'<div style="{GRID}">{devices}</div>{_stages(plan)}{notes}'


def changes_of(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that the plan advises for the first device that it does not fit."""
    for one in plan["devices"]:
        if one["fits"] is False and one["advice"]:
            words = (change["option"].split(" ", 1) for change in one["advice"]["changes"])
            return dict(words)
    return {}


def samples_html(state: "State") -> str:
    """Show the newest validation videos."""
    if not state.samples:
        return ""
    shown = "".join(
        f'<figure style="margin:0"><video controls loop muted autoplay playsinline '
        f'style="width:100%;border-radius:6px" src="{address(one.video)}"></video>'
        f'<figcaption class="ga-empty">{_text(one.caption)}</figcaption></figure>'
        for one in state.samples[:MOST_SAMPLES]
    )
    more = len(state.samples) - MOST_SAMPLES
    told = f'<p class="ga-empty">and {more} older ones, in the report</p>' if more > 0 else ""
    return f'<div style="{GRID}">{shown}</div>{told}'


def result_html(state: "State", command: str) -> str:
    """Link to the report, and show the command that uses the result."""
    parts = []
    if state.report is not None:
        link = address(state.report)
        parts.append(
            f'<a id="train-report" href="{link}" target="_blank" rel="noopener">Report: curves, '
            f'losses by noise level, samples</a> (<a href="{link}" download>download</a>)'
        )
    if command:
        shown = f"<pre style='white-space:pre-wrap;overflow-wrap:anywhere'>{_text(command)}</pre>"
        parts.append(f"Use it on a command line:{shown}")
    return "".join(f'<div style="{BOX};margin-bottom:.5rem">{part}</div>' for part in parts)


def address(path: Path) -> str:
    """Address of a file of a training, from the page; it changes with the file."""
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return f"gradio_api/file={quote(str(path))}?{stamp}"


def _device(one: Mapping[str, Any]) -> str:
    from gen_accel.measure.cost.words import gigabytes

    room = "" if one["device_bytes"] is None else f" of {gigabytes(one['device_bytes'])}"
    told = {True: "fits", False: "does not fit", None: "its memory is not known"}[one["fits"]]
    colour = {True: "#16a34a", False: "#dc2626", None: "var(--neutral-500)"}[one["fits"]]
    low, high = one["hours"]
    lines = [
        f"<b>{_text(one['device'])}</b>",
        f'<span style="color:{colour};font-weight:600">{told}</span>: '
        f"{gigabytes(one['peak_bytes'])}{room}, {_text(one['at'])}",
    ]
    lines += _advice(one["advice"])
    if one["fits"] is not False or (one["advice"] or {}).get("fits"):
        lines.append(f"{_hours(low)} to {_hours(high)} in all")
    return f'<div style="{BOX}">{"<br>".join(lines)}</div>'


def _advice(advice: Mapping[str, Any] | None) -> list[str]:
    if advice is None:
        return []
    from gen_accel.measure.cost.words import gigabytes

    steps = [
        f"{_text(change['option'])} saves {gigabytes(change['saves'])}"
        for change in advice["changes"]
    ]
    lines = ["Turn on, in this order:" + _listed(steps, ordered=True)] if steps else []
    if advice["fits"]:
        return [*lines, "With all of them it fits."]
    least = "a lower height and width"
    if advice["frames"]:
        least = f"stages of at most {advice['frames']} frames"
    return [*lines, f"Then it fits with {least}."]


def _stages(plan: Mapping[str, Any]) -> str:
    from gen_accel.lora.training_plan import PARTS
    from gen_accel.measure.cost.words import gigabytes

    stages = plan["stages"]
    sized = len({(one["height"], one["width"]) for one in stages}) > 1
    heads = [
        f"{one['frames']} frames" + (f", {one['height']} x {one['width']}" if sized else "")
        for one in stages
    ]
    rows = [("tokens of a clip", [f"{one['tokens']:,}" for one in stages])]
    for name, words in PARTS.items():
        rows.append((words, [gigabytes(one["bytes"][name]) for one in stages]))
    rows.append(("at most", [gigabytes(one["bytes"]["total"]) for one in stages]))
    if any(one["bytes"]["host"] for one in stages):
        waits = [gigabytes(one["bytes"]["host"]) for one in stages]
        rows.append(("waits in CPU memory", waits))
    for device in stages[0]["seconds_a_step"]:
        times = ["{:.3g} to {:.3g} s".format(*one["seconds_a_step"][device]) for one in stages]
        rows.append((f"a step, {device}", times))
    head = "".join(f"<th>{_text(one)}</th>" for one in heads)
    body = "".join(
        f"<tr><td>{_text(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        '<div style="overflow-x:auto"><table class="ga-queue"><thead><tr>'
        f"<th>memory of a stage</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _listed(items: Sequence[str], *, ordered: bool = False) -> str:
    if not items:
        return ""
    kind = "ol" if ordered else "ul"
    rows = "".join(f"<li>{one if ordered else _text(one)}</li>" for one in items)
    return f'<{kind} style="margin:.2rem 0 .2rem 1.2rem">{rows}</{kind}>'


def _hours(hours: float) -> str:
    return f"{60 * hours:.2g} min" if hours < 2 else f"{hours:.2g} h"


def _text(words: object) -> str:
    return html.escape(str(words))
