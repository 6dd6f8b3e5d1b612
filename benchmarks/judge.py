"""The judge of the world of several objects, on clips that are drawn: right ones, noisy ones, and
ones with a fault of each kind.

    python benchmarks/judge.py           # 15 minutes on one core
    python benchmarks/judge.py --docs    # the table of examples/demo_model/README.md
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, machine, read_result, write_table
from rich.progress import track
from torch import Tensor

from gen_accel.measure import write_json
from gen_accel.measure.machine import environment

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_model.faults import KINDS, planted
from demo_model.judge import judge
from demo_model.scenes import draw, scene_of

DOCS = Path(__file__).parents[1] / "examples" / "demo_model" / "README.md"
NOISE = 10.0  # grey levels
SEED = 700_000_000
CLIPS = {33: 400, 129: 60}  # by frames
FAULTY = 150  # scenes of 33 frames that each fault is planted in


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--docs", action="store_true", help="write the table alone")
    args = parser.parse_args()
    if not args.docs:
        torch.set_num_threads(1)
        write_json(RESULTS / "judge.json", measured())
    write_table(DOCS, "judge", "\n".join(table(read_result("judge"))))


def measured() -> dict[str, Any]:
    """Counts of right clips by kind and frames, and of faults that were found."""
    report: dict[str, Any] = environment() | {"drawn": [], "faults": {}}
    for frames, clips in CLIPS.items():
        found = {"clean": [0, 0], "blurred, with noise": [0, 0]}
        for seed in track(range(SEED, SEED + clips), f"{frames} frames"):
            scene = scene_of(seed)
            video = draw(scene, frames=frames, seed=seed).video
            for name, pixels in (("clean", video), ("blurred, with noise", spoilt(video, seed))):
                verdict = judge(pixels.numpy(), scene)
                found[name][0] += verdict.right
                found[name][1] += verdict.strict
        for name, (right, strict) in found.items():
            row = {"frames": frames, "clips": clips, "kind": name}
            report["drawn"].append(row | {"right": right, "strict": strict})
    for kind in KINDS:
        clips = seen = 0
        for seed in track(range(SEED, SEED + FAULTY), f"fault: {kind}"):
            video = planted(kind, scene_of(seed), frames=33, seed=seed)
            if video is not None:
                clips += 1
                seen += not judge(video.numpy(), scene_of(seed)).strict
        report["faults"][kind] = {"clips": clips, "found": seen}
    return report


def spoilt(video: Tensor, seed: int) -> Tensor:
    """Blur a clip, (F, H, W, 3) uint8, by three pixels each way, and add noise."""
    blurred = video.float()
    for axis in (1, 2):
        blurred = (blurred.roll(1, axis) + 2 * blurred + blurred.roll(-1, axis)) / 4
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return (blurred + NOISE * noise).clamp(0, 255).to(torch.uint8)


def table(report: dict[str, Any]) -> list[str]:
    lines = [f"{machine(report)}.", "", "| drawn clips | right | strictly |", "|---|---|---|"]
    lines += [
        f"| {row['frames']} frames, {row['kind']} | {row['right']} of {row['clips']} | "
        f"{row['strict']} of {row['clips']} |"
        for row in report["drawn"]
    ]
    lines += ["", "| fault | found |", "|---|---|"]
    lines += [
        f"| {kind} | {row['found']} of {row['clips']} |" for kind, row in report["faults"].items()
    ]
    return lines


if __name__ == "__main__":
    main()
