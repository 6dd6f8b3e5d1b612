"""Streams of the demo model, by what a chunk sees of earlier ones: what each quarter of a clip
shows, seconds a frame, the size of the cache.

    python benchmarks/streaming.py                          # all of it, hours on one core
    python benchmarks/streaming.py --frames 257 --clips 8 --settings "window 2"
    python benchmarks/streaming.py --memory                 # of the command, four minutes
    python benchmarks/streaming.py --docs                   # the table of docs/streaming.md

The prompts are those that no LoRA was trained on, twice, each time with another seed. A clip that
is there is not made again. Of a stream of several thousand frames, the speed at its beginning and
its end tells whether a frame costs more as a video grows.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import clip_file, keep_clip, kept_clip
from pages import RESULTS, begun, machine, write_table
from rich.progress import track

import gen_accel
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.demo import world
from gen_accel.demo.detector import detect
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.paths import model_named
from gen_accel.pipelines.generation.config import Clip
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.stream import (
    Prompts,
    Streamer,
    StreamSettings,
    stream_clip,
)
from gen_accel.pipelines.zones import Zones

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from demo_model.scoring import QUARTERS, keeps_pace, quarter_paces, score

DOCS = Path(__file__).parents[1] / "docs" / "streaming.md"
RESULT = RESULTS / "streaming.json"
LORA = Path(model_named("demo")).with_name("stream_lora")
SCENES = (*world.scored_scenes(world.HELD_OUT), *world.UNSEEN)
CLIPS = 2 * len(SCENES)
SEED, SIZE, STEPS, GUIDANCE, FRAMES = 6000, 96, 6, 3.0, 257
MEMORY = 257, 2049  # frames, of which memory is compared, in one step a chunk
Seen = dict[str, Any]  # fields of Zones
SETTINGS: dict[str, Seen] = {
    "window 1": {"window": 1, "middle": "none"},
    "window 2": {"window": 2, "middle": "none"},
    "window 1, salient": {"window": 1, "middle": "salient"},
    "window 2, salient": {"window": 2, "middle": "salient"},
    "window 2, grid": {"window": 2, "middle": "grid"},
    "window 2, sink": {"window": 2, "middle": "none", "sink": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lora", type=Path, default=LORA, help="default: the embedded one")
    parser.add_argument("--work", type=Path, default=Path("outputs/streaming"))
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--clips", type=int, default=CLIPS, help="the first of them")
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--memory", action="store_true", help="measure the command's memory alone")
    parser.add_argument("--docs", action="store_true", help="write the table alone")
    args = parser.parse_args()
    report = begun(RESULT, {"runs": {}})
    if args.memory:
        report["peak_mb"] = {str(frames): peak_of_command(frames) for frames in MEMORY}
        write_json(RESULT, report)
    elif not args.docs:
        torch.set_num_threads(1)
        recipe = read_recipe(args.lora)
        kept = {name: getattr(recipe, name) for name in ("rank", "steps", "frames", "stream")}
        report["lora"] = kept
        for name in args.settings:
            rows = clips(name, args)
            report["runs"].setdefault(str(args.frames), {})[name] = rows
            report.setdefault("machines", {})[str(args.frames)] = environment()
            write_json(RESULT, report)
    write_table(DOCS, "results", "\n".join(table(report)))


def clips(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a setting, one a prompt."""
    place = args.work / str(args.frames) / name.replace(", ", "_").replace(" ", "_")
    pipe, rows = load("demo", Loading(device="cpu", loras=(str(args.lora),))), []
    for i in track(range(args.clips), f"{args.frames}, {name}"):
        scene = SCENES[i % len(SCENES)]
        row_file = place / f"{i:02d}.json"
        if not (row_file.exists() and clip_file(place, i).exists()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen = SETTINGS[name]
                video, row = streamed(pipe, scene.caption, SEED + i, seen, args.lora, args.frames)
            keep_clip(place, i, video)
            write_json(row_file, row)
        row, video = json.loads(row_file.read_text("utf-8")), kept_clip(place, i)
        quarters = [
            (seen.color, seen.shape, seen.direction) == (scene.color, scene.shape, scene.direction)
            for seen in map(detect, np.array_split(video, QUARTERS))
        ]
        seen = detect(video)
        row |= {"quarters": quarters, "right": score(seen, scene).right}
        row["strict"] = row["right"] and all(quarters) and keeps_pace(quarter_paces(video, scene))
        rows.append({"prompt": scene.caption, "seed": SEED + i} | row)
    return rows


def streamed(
    pipe: Any, prompts: Prompts, seed: int, seen: Seen, lora: Path, frames: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Make a clip; also returns the CPU seconds of each chunk and the bytes of the cache.

    Args:
        seen: fields of the zones that are not the LoRA's own.
        lora: its folder.
    """
    own = StreamSettings.of(read_recipe(lora))
    assert own is not None, "a LoRA that streams"
    zones = Zones(**{**own.zones.to_dict(), **seen})
    clip = Clip(
        frames=frames,
        height=SIZE,
        width=SIZE,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        max_tokens=16,
        seed=seed,
    )
    settings = StreamSettings(zones, own.noise, own.shift)
    with gen_accel.attach(pipe, gen_accel.Dense()):
        streamer = Streamer(pipe, stream_clip(pipe, clip), settings, prompts)
        times, made, cached = [time.process_time()], [], 0
        for pixels in streamer.frames(kept=lambda *_: times.append(time.process_time())):
            made.append(pixels)
            cached = streamer.cached
    video = np.concatenate(made)
    seconds = [round(b - a, 4) for a, b in itertools.pairwise(times)]
    per_chunk = streamer.lengths.latents * streamer.lengths.factor
    return video, {
        "chunk_seconds": seconds,
        "frames_a_chunk": per_chunk,
        "cache_bytes": cached,
        "keys": zones.tokens(streamer.grid),
    }


def peak_of_command(frames: int) -> float:
    """Most memory of `gen-accel generate --stream` in MB; `MEMORY` is in rising order, as children
    are measured together."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--frames", str(frames), "--steps", "1", "--out", f"{folder}/film.mp4"]
        words += ["--model", "demo", "--stream", "--prompt", SCENES[0].caption]
        subprocess.run([sys.executable, "-m", "gen_accel", "generate", *words], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def speed(row: dict[str, Any], share: slice) -> float:
    """CPU seconds a frame over some of the chunks, the median."""
    return statistics.median(row["chunk_seconds"][share]) / row["frames_a_chunk"]


def table(report: dict[str, Any]) -> list[str]:
    """Rows of a table of all runs."""
    lora, machines = report["lora"], report["machines"]
    by_machine = itertools.groupby(sorted(machines, key=int), lambda one: machine(machines[one]))
    where = "; ".join(
        f"{' and '.join(f'{int(one):,}' for one in frames)} frames on {name}"
        for name, frames in by_machine
    )
    lines = [
        f"The demo model with its LoRA for streams (rank {lora['rank']}, {lora['steps']} steps on "
        f"clips of {lora['frames']} frames), {STEPS} steps a chunk, guidance {GUIDANCE:g}. "
        f"Made: {where}. Right: clips whose colour, shape and direction are as asked, in each "
        "quarter of the video. Strict: right, at its pace, and so in every quarter. Seconds: of "
        "the processor, for a frame after the first chunks and at the end.",
        "",
        "| frames | chunks seen | right by quarter | of | right | strict | keys | cache, MB | "
        "seconds a frame |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for frames, runs in sorted(report["runs"].items(), key=lambda one: int(one[0])):
        for name, rows in runs.items():
            by = " ".join(str(sum(row["quarters"][q] for row in rows)) for q in range(QUARTERS))
            ends = [
                statistics.fmean(speed(row, part) for row in rows)
                for part in (slice(4, 12), slice(-8, None))
            ]
            lines.append(
                f"| {int(frames):,} | {name} | {by} | {len(rows)} | "
                f"{sum(row['right'] for row in rows)} | {sum(row['strict'] for row in rows)} | "
                f"{rows[0]['keys']:,} | {rows[0]['cache_bytes'] / 1e6:.1f} | "
                f"{ends[0]:.3f}, {ends[1]:.3f} |"
            )
    if peaks := report.get("peak_mb"):
        told = ", ".join(
            f"{peak:,.0f} MB at {int(frames):,} frames" for frames, peak in peaks.items()
        )
        lines += ["", f"Most memory of `gen-accel generate --stream`, all of its process: {told}."]
    return lines


if __name__ == "__main__":
    main()
