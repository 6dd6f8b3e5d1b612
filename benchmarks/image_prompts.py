"""The demo model's image prompt: does what moves follow the image, and how it moves the text?

    python benchmarks/image_prompts.py --adapter gen_accel/demo/image_prompt

24 pairs of an object and a motion that no clip with an image showed, one image and seed each: 0 to
23, or from `--seed` on. The caption tells of the motion alone, so that colour and shape can come
from nowhere but the image. Clips are kept under `--work` with their pixels, so that a run that was
interrupted goes on, and a setting that is there is not made again. Seconds a step are taken apart,
with the settings in turns.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import WanPipeline
from kept import keep_clip, kept_clip, to_make
from pages import machine, weights_of, write_between_marks
from PIL import Image
from rich.progress import track

import gen_accel
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.demo import TRAINED_FRAMES, world
from gen_accel.demo.detector import detect
from gen_accel.io import file_sha256
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.pipelines.image_prompt import load_image_prompt
from gen_accel.pipelines.image_prompt.formats import find_adapter
from gen_accel.video import VideoShape

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from demo_model.clips import NOT_SHOWN, anonymous_caption, picture
from demo_model.scoring import score

DOCS = Path(__file__).parents[1] / "docs" / "image_prompts.md"
SIZE, STEPS, GUIDANCE_SCALE = 96, 20, 3.0
STILLS = 1 << 41  # from here on, seeds are those of the images; no clip to train on has these
RADIAL, SCHEDULE = gen_accel.Radial(), Schedule(dense_steps=5)

# The 24 are as many of each object and of each motion: what does not look at the image, or at the
# text, is right as often as this, whatever it shows.
CHANCE = {"colour": 1 / 4, "shape": 1 / 3, "object": 1 / 12, "motion": 1 / 8, "all": 1 / 96}


class Setting(NamedTuple):
    """
    Args:
        scale: of the image prompt.
        told: the caption names the object.
    """

    scale: float
    sparse: bool = False
    told: bool = False


SETTINGS = {
    "scale 1": Setting(1.0),
    "scale 0.5": Setting(0.5),
    "scale 0": Setting(0.0),
    "scale 1, Radial": Setting(1.0, sparse=True),
    "words, no image": Setting(0.0, told=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--adapter",
        default=gen_accel.demo.image_prompt_path(),
        help="what load_image_prompt takes",
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--frames", type=int, default=TRAINED_FRAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pairs", type=int, default=24, help="how many of the 24")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the others follow")
    parser.add_argument("--batch", type=int, default=4, help="clips a call, where none is timed")
    parser.add_argument(
        "--timed", type=int, default=0, help="clips to take the time of; nothing else is made"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--worker", default="0/1", help="K/N: make every N-th clip from K, no more"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/image_prompts"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/image_prompts.json"))
    parser.add_argument("--docs", action="store_true", help="write the table of docs/")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    times = args.work / "timed.json"
    if args.timed:
        about = {"adapter": digest(args), "environment": environment()}
        write_json(times, about | timings(args))
        print(times.read_text(encoding="utf-8"))
        return
    for name in args.settings:
        make(name, args)
    if args.worker != "0/1":
        return
    report = {
        "weights": weights_of(),
        "adapter": digest(args),
        "frames": args.frames,
        "steps": args.steps,
        "first_seed": args.seed,
        "guidance_scale": GUIDANCE_SCALE,
        "dtype": "float32",
        "method": f"{RADIAL!r}, {SCHEDULE!r}",
        "density": RADIAL.density(VideoShape((args.frames - 1) // 4 + 1, SIZE // 8, SIZE // 8)),
        "chance": CHANCE,
        "environment": environment(),
        "settings": {name: figures(name, args) for name in args.settings},
    }
    timed = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    if timed.get("adapter") == report["adapter"]:
        report["timed"] = timed
    write_json(args.out, report)
    for row in table(report):
        print(row)
    if args.docs:
        write_between_marks(DOCS, table(report))


def digest(args: argparse.Namespace) -> str:
    path = find_adapter(args.adapter)
    return file_sha256(path)[:12]


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the clips of a setting are kept; those of another adapter elsewhere."""
    sizes = f"{args.frames}x{args.steps}-{digest(args)[:8]}"
    sizes += f"-{args.seed}" if args.seed else ""
    return args.work / sizes / name.replace(" ", "").replace(",", "-")


def image_of(i: int, args: argparse.Namespace) -> Image.Image:
    return picture(NOT_SHOWN[i], STILLS + args.seed + i)


def make(name: str, args: argparse.Namespace) -> None:
    """Generate what is not there yet of one setting."""
    folder = folder_of(name, args)
    parts = to_make(folder, args.pairs, args.worker, args.batch)
    if not parts:
        return
    with ExitStack() as stack:
        pipe, prompt = prepare(SETTINGS[name], args, stack)
        for part in track(parts, description=name):
            prompt.set_image([image_of(i, args) for i in part], each=True)
            videos = clips(pipe, part, args, told=SETTINGS[name].told)
            for i, video in zip(part, videos, strict=True):
                keep_clip(folder, i, video)


def prepare(setting: Setting, args: argparse.Namespace, stack: ExitStack) -> tuple[Any, Any]:
    """The pipeline, and the handle of its image prompt."""
    pipe: Any = WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if setting.sparse:
        stack.enter_context(gen_accel.attach(pipe, RADIAL, schedule=SCHEDULE))
    prompt = stack.enter_context(load_image_prompt(pipe, args.adapter, scale=setting.scale))
    return pipe, prompt


def clips(
    pipe: Any,
    part: list[int],
    args: argparse.Namespace,
    on_step: Callable | None = None,
    *,
    told: bool = False,
) -> np.ndarray:
    """(B, F, H, W, 3) uint8, the i-th from seed `args.seed` + i."""
    scenes = [NOT_SHOWN[i] for i in part]
    videos = pipe(
        prompt=[scene.caption if told else anonymous_caption(scene) for scene in scenes],
        height=SIZE,
        width=SIZE,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=GUIDANCE_SCALE,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in part],
        output_type="np",
        callback_on_step_end=on_step,
    ).frames
    return (np.asarray(videos) * 255).round().astype(np.uint8)


def figures(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The scores of one setting."""
    folder, scored = folder_of(name, args), []
    for i, scene in enumerate(NOT_SHOWN[: args.pairs]):
        found = detect(kept_clip(folder, i))
        result = score(found, scene)
        scored.append(
            {
                "image": f"{scene.color} {scene.shape}",
                "caption": scene.caption if SETTINGS[name].told else anonymous_caption(scene),
                "seed": args.seed + i,
                "shows": found.caption,
                "score": asdict(result),
                "colour": result.color,
                "shape": result.shape,
                "object": result.color and result.shape,
                "motion": result.direction and result.speed,
                "all": result.right,
                "pace_ratio": found.pace / world.SPEEDS[scene.speed],
            }
        )
    counts = {part: sum(clip[part] for clip in scored) for part in CHANCE}
    return {
        "clips": len(scored),
        "right": counts,
        "by_chance": {part: tail(n, len(scored), CHANCE[part]) for part, n in counts.items()},
        "scored": scored,
    }


def tail(least: int, count: int, share: float) -> float:
    """The probability that chance is right at least so often."""
    return sum(
        math.comb(count, n) * share**n * (1 - share) ** (count - n)
        for n in range(least, count + 1)
    )


def timings(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step of one clip, all settings in turns: without an image prompt, with
    one, and with one whose keys and values are forgotten after each step."""
    seconds: dict[str, list[float]] = {"without": [], "cached": [], "anew": []}
    with ExitStack() as stack:
        plain: Any = WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.float32)
        plain.set_progress_bar_config(disable=True)
        pipe, prompt = prepare(Setting(1.0), args, stack)
        for i in range(args.timed):
            for name, steps in seconds.items():
                given = image_of(i, args)
                prompt.set_image(given)
                marks = [time.perf_counter()]

                def on_step(
                    pipe: Any,
                    step: int,
                    timestep: Any,
                    tensors: dict,
                    *,
                    forget: bool = name == "anew",
                    given: Image.Image = given,
                    marks: list[float] = marks,
                ) -> dict:
                    if forget:
                        prompt.set_image(given)
                    marks.append(time.perf_counter())
                    return tensors

                clips(plain if name == "without" else pipe, [i], args, on_step)
                # The first step has the text encoder in it.
                steps += [b - a for a, b in pairwise(marks[1:])]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "clips": args.timed,
        "seconds_a_step": medians,
        "of_without": {name: taken / medians["without"] for name, taken in medians.items()},
    }


def table(report: dict[str, Any]) -> list[str]:
    count = max(found["clips"] for found in report["settings"].values())
    rows = [
        f"| of {count} | colour | shape | both | motion | all |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in report["settings"].items():
        counts = " | ".join(str(found["right"][part]) for part in CHANCE)
        rows.append(f"| {name} | {counts} |")
    chance = " | ".join(f"{count * share:g}" for share in CHANCE.values())
    rows.append(f"| *by chance* | {chance} |")
    if "timed" in report:
        step, share = report["timed"]["seconds_a_step"], report["timed"]["of_without"]
        rows += [
            "",
            f"On {machine(report['environment'])}: a step took {step['without']:.3f} s without an "
            f"image prompt, and {step['cached']:.3f} s ({share['cached']:.3f}x) with one. Encoded "
            f"again each step, {step['anew']:.3f} s ({share['anew']:.3f}x).",
        ]
    return rows


if __name__ == "__main__":
    main()
