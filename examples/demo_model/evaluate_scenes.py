"""Generate the scored scenes with a model of `train_scenes` and judge the clips by their pixels:
`PYTHONPATH=examples python -m demo_model.evaluate_scenes`.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from demo_model.judge import judge, judge_picture, scored_scenes
from demo_model.scenes import Scene
from demo_model.train_scenes import OUT
from diffusers import WanPipeline

from gen_accel.io import replacing

PART = 10  # scenes a call of the pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", type=Path, default=OUT, help="pipeline folder")
    parser.add_argument(
        "--frames",
        type=int,
        default=33,
        help="1 judges first frames, without motion and depth (default: 33)",
    )
    parser.add_argument("--count", type=int, default=100, help="scenes, half of them held out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="JSON file; clips that it holds are not made again"
    )
    args = parser.parse_args()
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)

    asked = {
        "model": str(args.model),
        "frames": args.frames,
        "steps": args.steps,
        "guidance": args.guidance,
    }
    clips: list[dict] = []
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text("utf-8"))
        if {name: before[name] for name in asked} != asked:
            parser.error(f"{args.out} is of another model or other settings")
        clips = before["clips"]
    scenes = scored_scenes(args.count)
    while len(clips) < len(scenes):
        first = len(clips)
        part = scenes[first : first + PART]
        clips += judged(pipe, part, args.frames, args.steps, args.guidance, first)
        print(summary(clips), flush=True)
        if args.out is not None:
            with replacing(args.out) as partial:
                partial.write_text(json.dumps(asked | score(clips) | {"clips": clips}, indent=1))


def judged(
    pipe: WanPipeline,
    scenes: tuple[Scene, ...],
    frames: int,
    steps: int,
    guidance: float,
    first: int,
) -> list[dict]:
    """Generate a clip of each scene, the i-th from seed `first` + i, and judge it.

    Args:
        frames: of a clip; 1 for pictures.

    Returns:
        A dictionary a scene, fit for JSON.
    """
    videos = pipe(
        prompt=[scene.caption for scene in scenes],
        height=96,
        width=96,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(first + i) for i in range(len(scenes))],
        output_type="pt",
        return_dict=False,
    )[0]
    clips = []
    for i, (scene, video) in enumerate(zip(scenes, videos, strict=True)):
        pixels = (video.movedim(1, -1) * 255).round().to("cpu", torch.uint8)
        if frames == 1:
            whole = judge_picture(pixels[0], scene)
            right = strict = not whole.faults
        else:
            verdict = judge(pixels, scene)
            whole, right, strict = verdict.whole, verdict.right, verdict.strict
        said = {"caption": scene.caption, "held_out": scene.is_held_out, "seed": first + i}
        found = {"judgement": asdict(whole), "faults": whole.faults}
        clips.append(said | found | {"right": right, "strict": strict})
    return clips


def score(clips: list[dict]) -> dict:
    """Sums over clips, and the faults of the whole clips."""
    return {
        "count": len(clips),
        "right": sum(clip["right"] for clip in clips),
        "strict": sum(clip["strict"] for clip in clips),
        "strict_held_out": sum(clip["strict"] and clip["held_out"] for clip in clips),
        "faults": dict(Counter(fault for clip in clips for fault in clip["faults"])),
    }


def summary(clips: list[dict]) -> str:
    total = score(clips)
    faults = ", ".join(f"{name} {number}" for name, number in total["faults"].items())
    return (
        f"{total['count']} clips: {total['right']} right, {total['strict']} strictly; "
        f"wrong: {faults or 'nothing'}"
    )


if __name__ == "__main__":
    main()
