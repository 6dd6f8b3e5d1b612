"""Tables of docs/longer_videos.md, from the result files of `longer_videos.py`."""

from statistics import mean
from typing import Any, NamedTuple

from pages import RESULTS, machine, read_result

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


# Of the demo's LoRA, and of the model without it: name of the result files, and the settings.
LONG = "longer_videos_long"
DENSE, SPARSE = (f"{name} + LoRA + fresh_noise:shift=22" for name in ("dense", "piecewise"))
PLACES = {"dense": (LONG, DENSE), "sparse": (LONG, SPARSE), "without": ("longer_videos", "dense")}

TECHNIQUES = (  # as the result files call them
    *("riflex", "position_interpolation", "ultravico", "rotating_anchors", "window_noise"),
    *("continuation", "fresh_noise"),
)


def tables() -> list[str]:
    """Lines of both tables: of LoRAs, and of techniques without one."""
    lines, used = of_loras()
    score, made_on = demo_score(), read_result(SECONDS)["environment"]
    files = ", ".join(
        f"[{name}](../benchmarks/results/{name}.json)" for name in dict.fromkeys(used)
    )
    return [
        *lines,
        "",
        "Techniques over `Radial` without a LoRA, 24 clips; seconds with `native` on "
        f"{machine(made_on)}:",
        "",
        *of_techniques(),
        "",
        "Nearness to dense is not quality: sparse clips of `Piecewise` with the long LoRA and "
        f"`fresh_noise:shift=22` have a PSNR of {score['psnr_worst_db']} to "
        f"{score['psnr_best_db']} dB to the dense ones of their seeds, {score['psnr_db']} in the "
        f"mean, and {score['both']} of {score['clips']} are right both times.",
        "",
        f"By `benchmarks/study/longer.py` from {files}.",
    ]


def of_techniques() -> list[str]:
    """Lines of the table of techniques."""
    seconds = read_result(SECONDS)["techniques"]
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


def demo_score() -> dict[str, float]:
    """Count the demo's clips that are right at their pace, as its page tells it: dense, sparse,
    both, and without the LoRA. Beside them the PSNR of sparse clips to the dense ones of their
    seeds."""
    clips = demo_clips()
    rights = {name: [one["right"] for one in made] for name, made in clips.items()}
    psnr = [one["psnr"] for one in clips["sparse"]]
    return {
        "clips": len(psnr),
        **{name: sum(made) for name, made in rights.items()},
        "both": sum(map(all, zip(rights["dense"], rights["sparse"], strict=True))),
        "psnr_db": round(mean(psnr), 1),
        "psnr_worst_db": round(min(psnr), 1),
        "psnr_best_db": round(max(psnr), 1),
    }


def demo_clips() -> dict[str, list[dict[str, Any]]]:
    """Return the scores of each clip of `PLACES`, of both seeds."""
    clips: dict[str, list[dict[str, Any]]] = {name: [] for name in PLACES}
    for ending in SEEDS:
        for name, (file, setting) in PLACES.items():
            found = _setting(file + ending, setting)
            assert found is not None
            clips[name] += found["scored"]
    return clips


def _setting(file: str, setting: str) -> dict[str, Any] | None:
    if not (RESULTS / f"{file}.json").exists():
        return None
    return read_result(file)["settings"].get(setting)


def _count(found: list[dict[str, Any]], share: str) -> str:
    """Number of clips of both seeds; nothing where one of them was not scored so."""
    if any(share not in one for one in found):
        return ""
    return str(round(sum(one[share] * one["clips"] for one in found)))
