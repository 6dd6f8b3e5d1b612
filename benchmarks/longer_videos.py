"""The demo model at four times its length: dense, radial, each technique, and the LoRA.

    python benchmarks/longer_videos.py --lora gen_accel/demo/long_lora
    python benchmarks/longer_videos.py --docs    # tables of docs/longer_videos.md

24 prompts that the LoRA was never trained on, one seed each: 0 to 23, or from `--seed` on. Clips
are kept under `--work` with their pixels, so that a run that was interrupted goes on, and a
setting that is there is not made again. Seconds are taken apart, on a few prompts, with the
settings in turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import WanPipeline
from kept import clip_file, keep_clip, kept_clip, to_make
from pages import weights_of, write_between_marks
from rich.progress import track
from study import longer

import gen_accel
from gen_accel.attention_processors.attached.recipe import WEIGHTS, read_recipe
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.demo import TRAINED_FRAMES, world
from gen_accel.demo.detector import detect
from gen_accel.demo.job import SCORE, lora_path
from gen_accel.io import file_sha256
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.measure.motion import measure_motion
from gen_accel.measure.quality import psnr

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from demo_model.scoring import keeps_pace, quarter_paces, score, strays

DOCS = Path(__file__).parents[1] / "docs" / "longer_videos.md"
FPS = 16.0
FRAMES, SIZE, STEPS, GUIDANCE_SCALE = 4 * (TRAINED_FRAMES - 1) + 1, 96, 20, 3.0
TECHNIQUES = (
    "riflex",
    "position_interpolation",
    "ultravico",
    "rotating_anchors",
    "window_noise",
    "continuation",
    "fresh_noise",
)


class Setting(NamedTuple):
    """
    Args:
        techniques: of `gen_accel.extend`, beside what the LoRA was trained with.
        guided: by `GUIDANCE_SCALE`, unless the LoRA holds its guidance; without, a step calls the
            model once and not twice.
    """

    sparse: bool = False
    techniques: tuple[str, ...] = ()
    lora: bool = False
    guided: bool = True


SHIFTED = "fresh_noise:shift=22"
INTERPOLATED = ("position_interpolation", "fresh_noise")
SETTINGS = {
    "dense": Setting(),
    "dense + fresh_noise": Setting(techniques=("fresh_noise",)),
    "radial": Setting(sparse=True),
    **{f"radial + {name}": Setting(True, (name,)) for name in TECHNIQUES},
    f"radial + {' + '.join(INTERPOLATED)}": Setting(True, INTERPOLATED),
    "radial + LoRA": Setting(sparse=True, lora=True),
    "radial + LoRA + fresh_noise": Setting(True, ("fresh_noise",), lora=True),
    "dense + LoRA": Setting(lora=True),
    f"radial + LoRA + {SHIFTED}": Setting(True, (SHIFTED,), lora=True),
    f"dense + LoRA + {SHIFTED}": Setting(techniques=(SHIFTED,), lora=True),
    "dense, unguided": Setting(guided=False),
}
METHOD = ("tile_side=12", "tile_frames=3", "block=432")  # that of the LoRA
STEADY = 0.05  # share of the pairs of frames that may be off the path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lora", type=Path, help="folder of the LoRA; without: its settings not")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument(
        "--method", default="radial", help="sparse method, in the place of radial in --settings"
    )
    parser.add_argument(
        "--set", nargs="+", default=METHOD, metavar="FIELD=VALUE", help="fields of the method"
    )
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prompts", type=int, default=24, help="how many of the 24")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the others follow")
    parser.add_argument("--batch", type=int, default=4, help="clips a call, where none is timed")
    parser.add_argument("--timed", type=int, default=0, help="prompts to take the time of")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--worker", default="0/1", help="K/N: make every N-th clip from K, no more"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/longer_videos"))
    parser.add_argument(
        "--score-only", action="store_true", help="make no clips; score those that are there"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--docs", action="store_true", help="make no clips; write the tables of docs/"
    )
    args = parser.parse_args()
    if args.docs:
        write_between_marks(DOCS, longer.tables())
        write_json(lora_path(guided=True) / SCORE, longer.demo_score())
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    names = [name for name in args.settings if args.lora or not SETTINGS[name].lora]
    if args.timed and "dense" not in names:
        parser.error("--timed compares with dense, which --settings leaves out")
    empty = [name for name in names if not any(folder_of(name, args).glob("*"))]
    if args.score_only and empty:
        parser.error(f"--score-only, and there are no clips of {', '.join(empty)}")

    for name in names:
        if not args.score_only:
            make(name, args)
    if args.worker != "0/1":
        return
    report = {
        "weights": weights_of(),
        "frames": args.frames,
        "trained_frames": TRAINED_FRAMES,
        "steps": args.steps,
        "first_seed": args.seed,
        "dtype": "bfloat16",
        "method": repr(sparse(args)),
        "environment": environment(),
        "settings": {title(name, args): figures(name, args) for name in names},
    }
    if args.timed:
        for name, timing in timings(names, args).items():
            report["settings"][title(name, args)] |= timing
    drawn = [measure_motion([video], fps=FPS) for video in world_clips(args)]
    report["world"] = {"motion": mean_motion([one.to_dict() for one in drawn])}
    if args.out is not None:
        write_json(args.out, report)
    for name in names:
        print(line(title(name, args), report["settings"][title(name, args)]))


def sparse(args: argparse.Namespace) -> Any:
    return method_from(args.method, args.set)


def title(name: str, args: argparse.Namespace) -> str:
    """Name of a setting with the method that was asked for."""
    return name.replace("radial", args.method)


def held_out() -> tuple[world.Scene, ...]:
    """12 scenes that neither model nor LoRA was trained on, and 12 that only the model was."""
    return (*world.UNSEEN, *world.scored_scenes(12))


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the clips of a setting are kept; those of another LoRA elsewhere."""
    which = ""
    if SETTINGS[name].lora:
        which = "-" + file_sha256(args.lora / WEIGHTS)[:8]
    if SETTINGS[name].sparse:
        which += "-" + "-".join(args.set)
    size = f"{args.frames}x{args.steps}" + (f"-{args.seed}" if args.seed else "")
    return args.work / size / (title(name, args).replace(" ", "") + which)


def scale_of(name: str, args: argparse.Namespace) -> float:
    """Of the guidance."""
    setting = SETTINGS[name]
    held = setting.lora and read_recipe(args.lora).holds_guidance
    return GUIDANCE_SCALE if setting.guided and not held else 1.0


def make(name: str, args: argparse.Namespace) -> None:
    """Generate what is not there yet of one setting."""
    folder = folder_of(name, args)
    scenes = held_out()[: args.prompts]
    parts = to_make(folder, len(scenes), args.worker, args.batch)
    if not parts:
        return
    with ExitStack() as stack:
        call = prepare(SETTINGS[name], args, stack)
        for part in track(parts, description=title(name, args)):
            made = clips(call, scenes, part, args, scale_of(name, args))
            for i, video in zip(part, made, strict=True):
                keep_clip(folder, i, video)
                motion_of(folder, i)


def prepare(setting: Setting, args: argparse.Namespace, stack: ExitStack) -> Callable:
    """What to call for a clip."""
    pipe: Any = WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.bfloat16)
    pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    techniques = [*setting.techniques]
    if setting.lora:
        pipe.load_lora_weights(args.lora)
        pipe.fuse_lora()  # beside the weights it would cost a tenth of a step
        rope = read_recipe(args.lora).rope
        techniques = ([] if rope == "none" else [rope]) + techniques
    if setting.sparse:
        stack.enter_context(gen_accel.attach(pipe, sparse(args)))
    if not techniques:
        return pipe
    return stack.enter_context(gen_accel.extend(pipe, techniques, num_frames=args.frames))


def clips(
    call: Callable,
    scenes: tuple[world.Scene, ...],
    part: list[int],
    args: argparse.Namespace,
    guidance_scale: float,
) -> np.ndarray:
    """(B, F, H, W, 3) uint8, the i-th from seed `args.seed` + i."""
    videos = call(
        prompt=[scenes[i].caption for i in part],
        height=SIZE,
        width=SIZE,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=guidance_scale,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in part],
        output_type="np",
    ).frames
    return (np.asarray(videos) * 255).round().astype(np.uint8)


def figures(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The scores of one setting."""
    folder = folder_of(name, args)
    scored, motions = [], []
    twin = name.replace("radial", "dense")
    dense = folder_of(twin, args) if twin != name and twin in SETTINGS else None
    for i, scene in enumerate(held_out()[: args.prompts]):
        if args.score_only and not clip_file(folder, i).exists():
            continue
        video = kept_clip(folder, i)
        found = detect(video)
        result, paces = score(found, scene), quarter_paces(video, scene)
        motions.append(motion_of(folder, i))
        scored.append(
            {
                "caption": scene.caption,
                "seed": args.seed + i,
                "shows": found.caption,
                "score": asdict(result),
                "right": result.right,
                "whole": result.color and result.shape and result.direction,
                "pace_ratio": found.pace / world.SPEEDS[scene.speed],
                "quarter_paces": paces,
                "throughout": result.right and keeps_pace(paces),
                "strays": strays(video, scene),
            }
        )
        if dense is not None and clip_file(dense, i).exists():
            scored[-1]["psnr"] = float(psnr(video, kept_clip(dense, i)))
    count = len(scored)
    return {
        "clips": count,
        "guidance_scale": scale_of(name, args),
        "motion": mean_motion(motions),
        "detector_score": sum(clip["whole"] for clip in scored) / count,
        "with_speed": sum(clip["right"] for clip in scored) / count,
        "throughout": sum(clip["throughout"] for clip in scored) / count,
        "steady": sum(clip["whole"] and clip["strays"] <= STEADY for clip in scored) / count,
        "colour": sum(clip["score"]["color"] for clip in scored) / count,
        "shape": sum(clip["score"]["shape"] for clip in scored) / count,
        "direction": sum(clip["score"]["direction"] for clip in scored) / count,
        "scored": scored,
    } | mean_psnr(scored)


def mean_psnr(scored: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean PSNR to the dense clips of the same seeds, where all of them were made."""
    values = [clip["psnr"] for clip in scored if "psnr" in clip]
    return {"psnr": statistics.fmean(values)} if len(values) == len(scored) else {}


def world_clips(args: argparse.Namespace) -> Iterator[np.ndarray]:
    """What the prompts ask for, drawn: the measure of what motion ought to be."""
    for i, scene in enumerate(held_out()[: args.prompts]):
        g = torch.Generator().manual_seed(i)
        video = world.render([scene], frames=args.frames, size=SIZE, generator=g)[0]
        yield ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def motion_of(folder: Path, i: int) -> dict[str, Any]:
    """Measured once for a clip."""
    path = folder / f"{i:02d}.json"
    if not path.exists():
        video = kept_clip(folder, i)
        write_json(path, measure_motion([video], fps=FPS).to_dict())
    return json.loads(path.read_text(encoding="utf-8"))


def mean_motion(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the clips; of drifts, of their sizes."""
    return {
        "loop_score": statistics.fmean(one["loop_score"] for one in found),
        "color_drift": statistics.fmean(max(map(abs, one["color_drift"])) for one in found),
        "contrast_drift": statistics.fmean(abs(one["contrast_drift"]) for one in found),
        "flow": statistics.fmean(one["flow"] for one in found),
        "dynamic_degree": statistics.fmean(one["dynamic_degree"] for one in found),
        "flicker": statistics.fmean(one["flicker"] for one in found),
    }


def timings(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a clip by itself, all settings in turns."""
    scenes, seconds = held_out(), {name: [] for name in names}
    with ExitStack() as stack:
        calls = {name: prepare(SETTINGS[name], args, stack) for name in names}
        for i in range(args.timed):
            for name, call in calls.items():
                start = time.perf_counter()
                clips(call, scenes, [i], args, scale_of(name, args))
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        name: {"seconds": median, "speedup": medians["dense"] / median}
        for name, median in medians.items()
    }


def line(name: str, figures: dict[str, Any]) -> str:
    seconds = f"  {figures['seconds']:6.1f} s" if "seconds" in figures else ""
    return (
        f"{name:<34} {figures['detector_score']:4.0%}  with speed {figures['with_speed']:4.0%}  "
        f"every quarter {figures['throughout']:4.0%}  "
        f"steady {figures['steady']:4.0%}  colour {figures['colour']:4.0%}  "
        f"shape {figures['shape']:4.0%}  direction {figures['direction']:4.0%}{seconds}"
    )


if __name__ == "__main__":
    main()
