"""Generate clips of the demo model's world and score them:
`PYTHONPATH=examples python -m demo_model.evaluate`.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from demo_model.scoring import score
from diffusers import WanPipeline
from rich.progress import track

from gen_accel import demo
from gen_accel.demo import SPEEDS, TRAINED_FRAMES, world
from gen_accel.demo.detector import detect
from gen_accel.demo.world import Scene


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", type=Path, help="pipeline folder (default: the demo model)")
    parser.add_argument("--frames", type=int, nargs="+", default=[33, 65, 129, 257])
    parser.add_argument("--prompts", type=int, default=24, help="at most, of each set of scenes")
    parser.add_argument(
        "--long-prompts", type=int, default=4, help=f"at more than {TRAINED_FRAMES} frames"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    args = parser.parse_args()

    if args.model is None:
        args.model = demo.path()
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    runs = []
    for frames in args.frames:
        sets = {"seen": world.scored_scenes(args.prompts), "unseen": world.UNSEEN[: args.prompts]}
        if frames > TRAINED_FRAMES:
            sets = {"seen": world.scored_scenes(args.long_prompts)}
        totals = []
        for name, scenes in sets.items():
            clips = evaluate(pipe, scenes, frames=frames, steps=args.steps)
            right = sum(clip["right"] for clip in clips)
            totals.append(f"{right} of {len(clips)} {name}")
            runs.append({"frames": frames, "scenes": name, "right": right, "clips": clips})
            for clip in clips:
                print(_line(clip))
            if args.out is not None:
                _save({"model": str(args.model), "steps": args.steps, "runs": runs}, args.out)
        print(f"{frames} frames: strict {', '.join(totals)}", flush=True)


def evaluate(
    pipe: WanPipeline,
    scenes: Sequence[Scene],
    *,
    frames: int,
    steps: int = 20,
    size: int = 96,
    guidance_scale: float = 3.0,
    batch: int = 4,
) -> list[dict]:
    """Generate a clip of each scene, the i-th from seed i, and score it by its pixels.

    Args:
        frames: in pixels, not latents: 1 more than a multiple of the autoencoder's factor in time.
        size: height and width in pixels.
        batch: scenes a call of the pipeline. Changes speed and memory; the clips only by rounding.

    Returns:
        A dictionary a scene, fit for JSON: what was asked, what is shown, which parts are right.
    """
    factor = pipe.vae_scale_factor_temporal
    if frames % factor != 1:
        raise ValueError(f"frames must be 1 more than a multiple of {factor}, got {frames}")
    clips = []
    starts = range(0, len(scenes), batch)
    for start in track(starts, description=f"{len(scenes)} clips of {frames} frames"):
        part = scenes[start : start + batch]
        begin = time.perf_counter()
        videos = pipe(
            prompt=[scene.caption for scene in part],
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
            output_type="np",
            return_dict=False,
        )[0]
        seconds = (time.perf_counter() - begin) / len(part)
        for i, (scene, video) in enumerate(zip(part, videos, strict=True)):
            detection = detect((np.asarray(video) * 255).round().astype(np.uint8))
            result = score(detection, scene)
            clips.append(
                {
                    "caption": scene.caption,
                    "seed": start + i,
                    "frames": frames,
                    "seconds": seconds,
                    "shows": detection.caption,
                    "pace_ratio": detection.pace / SPEEDS[scene.speed],
                    "detection": asdict(detection),
                    "score": asdict(result),
                    "right": result.right,
                }
            )
    return clips


def _line(clip: dict) -> str:
    wrong = [part for part, good in clip["score"].items() if not good]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "right"
    measures = f"colour {clip['detection']['color_share']:4.0%}  pace x{clip['pace_ratio']:.2f}"
    return f"{clip['caption']:<38}  {clip['shows']:<38}  {measures}  {verdict}"


def _save(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
