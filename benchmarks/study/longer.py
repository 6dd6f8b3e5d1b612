"""Tables of docs/longer_videos.md, from the result files of `longer_videos.py`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = "longer_videos_epyc_seconds"
SEEDS = "", "_seed_24"  # endings of the files of seeds 0 to 23 and 24 to 47


class Row(NamedTuple):
    """One row: how the clips were made, and where their scores are.

    Args:
        file: name of the result files without ending.
        setting: in these files.
    """

    attention: str
    lora: str
    techniques: str
    file: str
    setting: str


ROWS = (
    Row("dense", "", "", "longer_videos", "dense"),
    Row("dense", "", "`fresh_noise`", "longer_videos", "dense + fresh_noise"),
    Row("Radial", "", "", "longer_videos", "radial"),
    Row("Radial", "", "`fresh_noise`", "longer_videos", "radial + fresh_noise"),
    Row("dense", "20 minutes, Radial", "", "longer_videos_20_minutes", "dense + LoRA"),
    Row("Radial", "20 minutes, Radial", "", "longer_videos_20_minutes", "radial + LoRA"),
    Row("Piecewise", "20 minutes, Piecewise", "", "longer_videos_piecewise", "piecewise + LoRA"),
    Row("dense", "long", "", "longer_videos_long", "dense + LoRA"),
    Row("Piecewise", "long", "", "longer_videos_long", "piecewise + LoRA"),
    Row(
        *("dense", "long", "`fresh_noise:shift=22`"),
        *("longer_videos_long", "dense + LoRA + fresh_noise:shift=22"),
    ),
    Row(
        *("Piecewise", "long", "`fresh_noise:shift=22`"),
        *("longer_videos_long", "piecewise + LoRA + fresh_noise:shift=22"),
    ),
    Row("Radial", "holds guidance", "", "longer_videos", "radial + LoRA"),
    Row(
        *("Radial", "holds guidance", "`fresh_noise`"),
        *("longer_videos", "radial + LoRA + fresh_noise"),
    ),
)


TECHNIQUES = (  # as the result files call them
    *("riflex", "position_interpolation", "ultravico", "rotating_anchors", "window_noise"),
    *("continuation", "fresh_noise"),
)


def tables() -> list[str]:
    """Lines of both tables: of LoRAs, and of techniques without one."""
    lines, used = of_loras()
    files = ", ".join(
        f"[{name}](../benchmarks/results/{name}.json)" for name in dict.fromkeys(used)
    )
    return [
        *lines,
        "",
        "Techniques over `Radial` without a LoRA, 24 clips, seconds with `native`:",
        "",
        *of_techniques(),
        "",
        f"By `benchmarks/study/longer.py` from {files}.",
    ]


def of_techniques() -> list[str]:
    """Lines of the table of techniques."""
    seconds = json.loads((RESULTS / f"{SECONDS}.json").read_text(encoding="utf-8"))["techniques"]
    lines = ["| | right | at its pace | steady | loop | seconds |", "|---|---|---|---|---|---|"]
    for name in ("dense", "radial", *(f"radial + {technique}" for technique in TECHNIQUES)):
        found = _setting("longer_videos", name)
        assert found is not None
        counts = [_count([found], share) for share in ("detector_score", "with_speed", "steady")]
        counts += [f"{found['motion']['loop_score']:.2f}", f"{seconds[name]['seconds']:.1f}"]
        lines.append(f"| {name.replace('radial + ', '')} | {' | '.join(counts)} |")
    return lines


def of_loras() -> tuple[list[str], list[str]]:
    """Lines of the table of LoRAs, and names of the result files that it is of. Rows whose clips
    were not made are left out."""
    lines = [
        "| attention | LoRA | technique | right | at its pace | in every quarter | steady |",
        "|---|---|---|---|---|---|---|",
    ]
    used = []
    for row in ROWS:
        found = [_setting(row.file + ending, row.setting) for ending in SEEDS]
        if None in found:
            continue
        used += [row.file + ending for ending in SEEDS]
        counts = [
            _count([one for one in found if one is not None], share)
            for share in ("detector_score", "with_speed", "throughout", "steady")
        ]
        lines.append(f"| {row.attention} | {row.lora} | {row.techniques} | {' | '.join(counts)} |")
    return lines, [*used, SECONDS]


def score(file: str, dense: str, sparse: str, of_others: str, without: str) -> dict[str, float]:
    """Count what is right at its pace, as the demo's page tells it, with the mean PSNR of sparse
    clips to dense ones.

    Args:
        file: name of the LoRA's result files without ending.
        dense, sparse: settings in these files.
        of_others: the same of the result files that the model without the LoRA is in.
        without: its setting there.
    """
    places = {"dense": (file, dense), "sparse": (file, sparse), "without": (of_others, without)}
    counts, clips, psnr = dict.fromkeys(places, 0), 0, 0.0
    for ending in SEEDS:  # of seeds that all three were made of
        found = {name: _setting(where + ending, one) for name, (where, one) in places.items()}
        if any(one is None for one in found.values()):
            continue
        for name, one in found.items():
            counts[name] += sum(clip["right"] for clip in one["scored"]) if one else 0
        made = found["sparse"]
        assert made is not None
        clips += made["clips"]
        psnr += made["psnr"] * made["clips"]
    return {"clips": clips, **counts, "psnr_db": round(psnr / clips, 1)}


def _setting(file: str, setting: str) -> dict[str, Any] | None:
    path = RESULTS / f"{file}.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["settings"].get(setting)


def _count(found: list[dict[str, Any]], share: str) -> str:
    """Number of clips of both seeds; nothing where one of them was not scored so."""
    if any(share not in one for one in found):
        return ""
    return str(round(sum(one[share] * one["clips"] for one in found)))
