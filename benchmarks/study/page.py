"""Tables and pictures in docs/methods from the results of `methods.py`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pages import RESULTS, UNSCORED, machine, read_result, right, write_between_marks

from study import front
from study.settings import DEFAULT

BENCHMARKS = Path(__file__).parent.parent
DOCS = BENCHMARKS.parent / "docs" / "methods"
README = BENCHMARKS.parent / "README.md"
LINK = "../../benchmarks/results"
SLICE = {
    "choice": "loss",
    "rest": "second order",
    "tile": [4, 4, 4],
    "block_q": 64,
    "asked": 0.2,
}
CLIP_HEADS = "PSNR, mean", "worst prompt", "best prompt", "worst frame"
CHOICES = {
    "choices": "Rivals of the choice and of the rest",
    "choices_lora": "The closest of them, with the demo's LoRA",
    "choices_33": "The closest of them, at the length that the model was trained at",
}
# First words of settings that are cells of an ablation.
PARTS = ("choice", "rest", "tile", "query")


def write() -> None:
    """All pages, README and pictures that have results."""
    for path, lines in tables().items():
        write_between_marks(path, lines)
    clips = reports("clips")
    for report in reports("errors"):
        picture(report, DOCS / f"error_{report['frames']}.png")
        for made in clips:
            if made["frames"] == report["frames"] and _densities(made) > 1:
                clip_picture(made, report, DOCS / f"clips_{report['frames']}.png")


def tables() -> dict[Path, list[str]]:
    """Lines of each page between its marks, of the results that are there."""
    clips = reports("clips")
    choose = [line for report in clips for line in clip_table(report)]
    choose += clip_table(found) if (found := result("shown")) is not None else []
    choose += [line for report in reports("errors") for line in error_table(report)]
    parts = [] if (found := result("ablation")) is None else ablation_tables(found, "ablation")
    parts += part_clips(clips[0]) if clips else []
    if (found := result("ablation_whole")) is not None:
        parts += whole_tables(found)
    parts += score_table(found) if (found := result("scores")) is not None else []
    for name, title in CHOICES.items():
        parts += choice_tables(found, name, title) if (found := result(name)) is not None else []
    parts += cost_table(read_result("rest"))
    if (found := result("random")) is not None:
        parts += ["### A Wan with random weights", "", *ablation_tables(found, "random")]
    pages = {DOCS / "choose.md": ["", *choose], DOCS / "piecewise.md": ["", *parts]}
    pages[README] = front.table()
    pages[DOCS / "sparse_linear.md"] = calibration_table(read_result("calibration"))
    if (found := result("others")) is not None:
        pages[DOCS / "index.md"] = ["", *other_table(found)]
    return pages


def _densities(clips: dict[str, Any]) -> int:
    """How many were asked for."""
    return len({setting["setting"].rpartition(" ")[2] for setting in clips["settings"]})


def reports(kind: str) -> list[dict[str, Any]]:
    """Results of one mode, by length of clip."""
    paths = RESULTS.glob(f"methods_{kind}_*.json")
    return sorted(
        map(read_result, (path.stem for path in paths)), key=lambda report: report["frames"]
    )


def result(mode: str) -> dict[str, Any] | None:
    """Results of a mode that has one file; None where it has not run."""
    name = f"methods_{mode}"
    return read_result(name) if (RESULTS / f"{name}.json").exists() else None


def calibration_table(report: dict[str, Any]) -> list[str]:
    """Error of attention and fidelity of clips by each form of the linear branch."""
    lines = [
        "",
        f"Clips of {report['frames']} frames and {report['steps']} steps, fitted on "
        f"{len(report['fit'])} prompts and measured on {len(report['test'])} others, "
        f"{machine(report)}, [result file]({LINK}/calibration.json). Figures are means over the "
        f"prompts; {UNSCORED}.",
        "",
        "| | density | relative L2 error of attention | PSNR to dense | SSIM |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        name = row["variant"]
        name = f"`{name.replace(', ', '`, `')}`" if "," in name else name
        density, error, ssim = (row[key] for key in ("density", "relative_l2", "ssim"))
        figures = f"{density:.3f} | {error:.4f} | {row['psnr_db']:.2f} dB | {ssim:.4f}"
        lines.append(f"| {name} | {figures} |")
    return [*lines, ""]


def cost_table(report: dict[str, Any]) -> list[str]:
    """How many times as long a call takes with the rest as without."""
    facts = ("tokens", "dim", "block", "dtype")
    heads = (*facts, "density", "around keys", "around queries", "second order")
    lines = [
        f"Time of one call over the time of the kept blocks alone, {report['seconds']}, "
        f"{report['device']}, kernel native, [result file]({LINK}/rest.json).",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in report["rows"]:
        ratios = (f"{row[name]:.2f}" for name in ("key", "query", "second"))
        cells = [*(row[name] for name in facts), f"{row['density']:.2f}", *ratios]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def clip_table(report: dict[str, Any]) -> list[str]:
    """PSNR of clips, and how many show what was asked for, setting by setting of a method."""
    prompts, frames, dense = len(report["prompts"]), report["frames"], report.get("dense")
    name = "shown" if dense else f"clips_{frames}"
    heads = ["method", "density", *CLIP_HEADS, *(["right clips"] if dense else [])]
    lines = [
        f"### Clips of {frames} frames{', and what they show' if dense else ''}",
        "",
        f"PSNR in dB to the dense clip, {prompts} prompts, the first fifth of the steps dense, "
        f"{machine(report)}, [result file]({LINK}/methods_{name}.json)"
        f"{'' if dense else f'; {UNSCORED}'}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *([f"| dense | 1 |{' |' * len(CLIP_HEADS)} {right(dense)} |"] if dense else []),
    ]
    for setting in report["settings"]:
        name, rows = setting["setting"], setting["rows"]
        if name.split()[0] not in PARTS:
            shown = f" {right(rows)} |" if dense else ""
            lines.append(f"| {name.rsplit(' ', 1)[0]} | {_of_clips(rows)} |{shown}")
    return [*lines, ""]


def error_table(report: dict[str, Any]) -> list[str]:
    """Error of attention by method and density."""
    asked = sorted({row["asked"] for row in report["rows"]})
    names = list(dict.fromkeys(row["method"] for row in report["rows"]))
    heads = " | ".join(f"{density}" for density in asked)
    lines = [
        f"### Error of attention, {report['frames']} frames",
        "",
        "Relative L2 error to dense attention on captured q, k and v; in brackets the density "
        f"that came out and the speed against dense attention. {machine(report)}, "
        f"[result file]({LINK}/methods_errors_{report['frames']}.json).",
        "",
        f"| method, at density | {heads} |",
        "|---|" + "---|" * len(asked),
    ]
    for name in names:
        cells = []
        for density in asked:
            rows = [r for r in report["rows"] if (r["method"], r["asked"]) == (name, density)]
            cells.append(_error_cell(rows[0]) if rows else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _error_cell(row: dict[str, Any]) -> str:
    speed = f", {row['dense_ms'] / row['ms']:.1f}x" if "ms" in row else ""
    return f"{row['error']:.3f} ({row['density']:.2f}{speed})"


def ablation_tables(report: dict[str, Any], mode: str) -> list[str]:
    """Tables, one for each part: its values in rows, rests in columns, all else as in `SLICE`.

    Args:
        mode: of methods.py, which names the result file.
    """
    lines = [
        f"Relative L2 error of attention, {report['frames']} frames, {report['device']}, "
        f"[result file]({LINK}/methods_{mode}.json). All else is choice by loss, boxes of "
        "4 x 4 x 4, query blocks of 64, density 0.2.",
        "",
    ]
    names = {"choice": "choice", "tile": "tile", "block_q": "query block", "asked": "density"}
    rests = list(dict.fromkeys(row["rest"] for row in report["rows"]))
    for part, title in names.items():
        fixed = {key: x for key, x in SLICE.items() if key not in (part, "rest")}
        rows = [row for row in report["rows"] if all(row[key] == x for key, x in fixed.items())]
        values = list(dict.fromkeys(str(row[part]) for row in rows))
        lines += [f"| {title} | {' | '.join(f'rest {rest}' for rest in rests)} |"]
        lines += ["|---|" + "---|" * len(rests)]
        for value in values:
            own = {row["rest"]: row["error"] for row in rows if str(row[part]) == value}
            cells = " | ".join(f"{own[rest]:.3f}" for rest in rests)
            lines.append(f"| {value.strip('[]').replace(', ', ' x ')} | {cells} |")
        lines.append("")
    return lines


def whole_tables(report: dict[str, Any]) -> list[str]:
    """Tables of all combinations: tiles and choices, then tiles, query blocks and densities, with
    rests in columns."""
    rests = list(dict.fromkeys(row["rest"] for row in report["rows"]))
    lines = [
        f"All combinations, on {len(report['prompts'])} prompt and layers "
        f"{' and '.join(map(str, report['layers']))}, [result file]"
        f"({LINK}/methods_ablation_whole.json). Choices at density 0.2 and query blocks of 64:",
        "",
    ]
    near = [row for row in report["rows"] if (row["asked"], row["block_q"]) == (0.2, 64)]
    lines += _combined(near, ("tile", "choice"), rests)
    lines += [
        "",
        "Choice by loss, by query block and density. A larger query block is several boxes in a "
        "row along time. Boxes of 33 frames have no neighbour there, and are the same at each.",
        "",
    ]
    own = [
        row
        for row in report["rows"]
        if row["choice"] == SLICE["choice"] and (row["tile"][0] != 33 or row["block_q"] == 64)
    ]
    return [*lines, *_combined(own, ("tile", "block_q", "asked"), rests), ""]


def _combined(rows: list[dict[str, Any]], parts: Sequence[str], rests: list[str]) -> list[str]:
    """A row for each combination of `parts`, the error by rests in columns, the least in bold."""
    names = [{"block_q": "query block", "asked": "density"}.get(part, part) for part in parts]
    lines = [f"| {' | '.join([*names, *(f'rest {rest}' for rest in rests)])} |"]
    lines.append("|---" * (len(parts) + len(rests)) + "|")
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(str(row[part]).strip("[]").replace(", ", " x ") for part in parts)
        found.setdefault(key, {})[row["rest"]] = row["error"]
    for key, errors in found.items():
        least = min(errors.values())
        cells = [f"**{x:.3f}**" if x == least else f"{x:.3f}" for x in map(errors.get, rests)]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return lines


def other_table(report: dict[str, Any]) -> list[str]:
    """Error of attention by ways that were not built, beside ours."""
    lines = [
        f"Relative L2 error of attention on the demo model, {report['frames']} frames, density "
        f"{report['density']}, [result file]({LINK}/methods_others.json).",
        "",
        "| | rest dropped | rest around mean queries |",
        "|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [f"{row[key]:.3f}" if key in row else "" for key in ("dropped", "query")]
        if "whole" in row:
            cells[0] = f"{row['whole']:.3f}"
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    return [*lines, ""]


def part_clips(report: dict[str, Any]) -> list[str]:
    """PSNR of clips of each part at density 0.2, beside the method as it is, on one set of
    prompts."""
    own = [one for one in report["settings"] if one["setting"].split()[0] in PARTS]
    if not own:
        return []
    prompts = {row["prompt"] for one in own for row in one["rows"]}
    lines = [
        f"PSNR in dB to the dense clip, {machine(report)}; {UNSCORED}.",
        "",
        f"| clips, density 0.2, {len(prompts)} prompts | density | {' | '.join(CLIP_HEADS)} |",
        "|---|---" + "|---" * len(CLIP_HEADS) + "|",
    ]
    whole = [one for one in report["settings"] if one["setting"] == "Piecewise 0.2"]
    for setting in (*whole, *own):
        rows = [row for row in setting["rows"] if row["prompt"] in prompts]
        lines.append(f"| {setting['setting']} | {_of_clips(rows)} |")
    return [*lines, ""]


def score_table(report: dict[str, Any]) -> list[str]:
    """PSNR of clips by score, and the gain of the pooled one, prompt by prompt."""
    prompts = len(report["prompts"])
    lines = [
        f"PSNR in dB to the dense clip, {machine(report)}; {UNSCORED}.",
        "",
        f"| score, {prompts} prompts, {report['frames']} frames, {report['steps']} steps "
        f"| density | {' | '.join(CLIP_HEADS[:3])} | gain, mean | t | prompts that gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for asked in sorted({row["asked"] for row in report["rows"]}, reverse=True):
        some = [row for row in report["rows"] if row["asked"] == asked]
        found = {x: [row for row in some if row["score"] == x] for x in ("loss", "pooled")}
        psnrs = {x: [row["psnr_db"] for row in rows] for x, rows in found.items()}
        gains = [b - a for a, b in zip(psnrs["loss"], psnrs["pooled"], strict=True)]
        t = mean(gains) * len(gains) ** 0.5 / stdev(gains)
        paired = f"{mean(gains):.1f} | {t:.1f} | {sum(x > 0 for x in gains)}"
        for score, rows in found.items():
            own = psnrs[score]
            told = f"{mean(own):.1f} | {min(own):.1f} | {max(own):.1f}"
            density = mean(row["density"] for row in rows)
            more = paired if score == "pooled" else " | | "
            lines.append(f"| {score} | {density:.3f} | {told} | {more} |")
    return [*lines, ""]


def choice_tables(report: dict[str, Any], name: str, title: str) -> list[str]:
    """Tables, one for each density: rivals of the default's choice and rest, prompt by prompt.

    Args:
        name: of the mode, which names the result file.
    """
    prompts = len({row["prompt"] for row in report["rows"]})
    lines = [
        f"### {title}",
        "",
        f"Relative L2 error of attention, {report['frames']} frames, {prompts} prompts, steps "
        f"{' and '.join(map(str, report['steps']))}, {len(report['layers'])} layers, "
        f"{report['device']}, [result file]({LINK}/methods_{name}.json). The default is "
        "`Piecewise` as it is on a CPU. A way has as many exact pairs of tokens, or, where it is "
        "as costly, as many products. Products of the choice, the kept blocks and the rest are "
        "counted, as a share of dense attention's. Changes are means over the prompts, and so is "
        "t.",
        "",
    ]
    heads = "exact pairs", "products", "error", "change", "t", "prompts that err less"
    for asked in sorted({row["asked"] for row in report["rows"]}):
        lines += [f"| density {asked} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        some = [row for row in report["rows"] if row["asked"] == asked]
        own = {row["prompt"]: row["error"] for row in some if row["way"] == DEFAULT}
        for way in dict.fromkeys(row["way"] for row in some):
            rows = [row for row in some if row["way"] == way]
            density, products, error = (
                mean(row[key] for row in rows) for key in ("density", "products", "error")
            )
            told = f"{density:.3f} | {products:.3f} | {error:.4f}"
            changes = [row["error"] / own[row["prompt"]] - 1 for row in rows]
            lines.append(f"| {way} | {told} | {_change(way, changes)} |")
        lines.append("")
    if "single_tokens" not in report:
        return lines
    lines += [
        "Milliseconds of processor time beside the products of `half in extra tokens`, by torch, "
        f"{machine(report)}:",
        "",
        "| density | a call of the default | sorting the keys | copying those found |",
        "|---|---|---|---|",
    ]
    for row in report["single_tokens"]:
        told = (f"{row[key]:.1f}" for key in ("call_ms", "sort_ms", "copy_ms"))
        lines.append(f"| {row['asked']} | {' | '.join(told)} |")
    return [*lines, ""]


def _change(way: str, changes: list[float]) -> str:
    if way == DEFAULT:
        return " | | "
    t = mean(changes) * len(changes) ** 0.5 / stdev(changes)
    return f"{mean(changes):+.1%} | {t:+.1f} | {sum(x < 0 for x in changes)}"


def _of_clips(rows: list[dict[str, Any]]) -> str:
    """Mean density, mean PSNR, and PSNR of the worst and the best prompt and the worst frame."""
    found = [row["psnr_db"] for row in rows]
    density = mean(row["density"] for row in rows)
    told = "" if density == 1 else f"{density:.3f}"  # of whole matrices no density is counted
    return (
        f"{told} | {mean(found):.1f} | {min(found):.1f} | {max(found):.1f} | "
        f"{min(row['worst_frame_db'] for row in rows):.1f}"
    )


def clip_picture(clips: dict[str, Any], errors: dict[str, Any], path: Path) -> None:
    """PSNR of clips against time of one attention call, as a share of dense attention's: settings
    whose calls were timed."""
    share = {
        (row["method"], str(row["asked"])): row["ms"] / row["dense_ms"]
        for row in errors["rows"]
        if "ms" in row
    }
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting in clips["settings"]:
        name, _, density = setting["setting"].rpartition(" ")
        name, _, same = name.partition(", as slow as ")
        time = share.get((same or name, density))
        if time is not None:
            found = mean(row["psnr_db"] for row in setting["rows"])
            lines.setdefault(name, []).append((time, found))
    figure, axes = _axes("PSNR to the dense clip, dB")
    for name, points in lines.items():
        wide = 2.4 if name.startswith("Piecewise") else 1.2
        axes.plot(*zip(*sorted(points), strict=True), marker="o", linewidth=wide, label=name)
    _finish(
        figure, axes, f"{clips['frames']} frames, means over {len(clips['prompts'])} prompts", path
    )


def picture(report: dict[str, Any], path: Path) -> None:
    """Error against time of one attention call, as a share of dense attention's."""
    figure, axes = _axes("relative L2 error of attention")
    for name in dict.fromkeys(row["method"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["method"] == name and "ms" in row]
        if not rows:
            continue
        share = [row["ms"] / row["dense_ms"] for row in rows]
        wide = 2.4 if name.startswith("Piecewise") else 1.2
        axes.plot(share, [row["error"] for row in rows], marker="o", linewidth=wide, label=name)
    axes.set_yscale("log")
    _finish(figure, axes, f"{report['frames']} frames, density 0.05 to 0.3", path)


def _axes(what: str) -> tuple[Any, Any]:
    """Figure and axes of what is drawn against the time of a call."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("time of one attention call, dense = 1")
    axes.set_ylabel(what)
    return figure, axes


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.savefig(path)
