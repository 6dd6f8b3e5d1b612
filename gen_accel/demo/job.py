"""The demo: one long clip of the embedded model, dense and sparse on one clock."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel import demo, registry
from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.methods.mixed import Mixed
from gen_accel.demo import race
from gen_accel.demo.detector import detect
from gen_accel.demo.page import Page
from gen_accel.demo.race import Denoising, Entrant
from gen_accel.demo.subject import METHOD, Subject, loaded, lora_path
from gen_accel.demo.words import PROMPT, SEED, check_known
from gen_accel.io import read_fields, typed
from gen_accel.measure import check_writable, contact_sheet, quality, side_by_side, write_video
from gen_accel.measure.machine import ExternalLoad, environment
from gen_accel.measure.pictures import mask_picture
from gen_accel.method import Method
from gen_accel.pipelines.generation.compare import Comparison, pair
from gen_accel.pipelines.generation.decode import decode_stream, is_streamed
from gen_accel.pipelines.generation.loading import find_device
from gen_accel.pipelines.generation.progress import Progress, ticker
from gen_accel.pipelines.generation.sampling import (
    Clip,
    Sample,
    check_clip,
    filled,
    sample,
    token_grid,
)

FRAMES, SIZE = 4 * (demo.TRAINED_FRAMES - 1) + 1, 96
STEPS, GUIDANCE_SCALE = 20, 3.0
FPS = 16.0
SHEET_FRAMES = 9
CLIP = Clip(
    frames=FRAMES,
    height=SIZE,
    width=SIZE,
    steps=STEPS,
    guidance_scale=GUIDANCE_SCALE,
    seed=SEED,
    fps=FPS,
)
SCORE = "score.json"  # beside a LoRA, by benchmarks/longer_videos.py --docs
SCORES = ("clips", "dense", "sparse", "without")
CONFIGS = {"long_lora_guided": "demo_long.yaml", "long_lora": "demo_guided.yaml"}


def run(
    out: str | Path = "outputs/demo",
    *,
    model: str | Path | None = None,
    prompt: str = PROMPT,
    seed: int = SEED,
    frames: int = FRAMES,
    steps: int | None = None,
    method: Method | None = None,
    preset: str | Path | None = None,
    device: str = "cpu",
    with_lora: bool | None = None,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Generate one clip densely and with sparse attention, a step of each in turn, and write both
    with their comparison to `out`.

    The model is the embedded one with its long-video LoRA, through whose attention the sparse
    clip is made. What it makes without the LoRA is shown beside them.

    Args:
        model: a folder like the embedded model's, without a LoRA.
        frames: 1 more than a multiple of 4.
        steps: None: as many as the preset was solved for, or 20.
        method: in place of the LoRA's own.
        preset: a file of `gen_accel.tune`, or a name, in place of a method; see `attach`.
        device: a GPU gains nothing on so small a model.
        with_lora: False leaves the LoRA away; None means True for the embedded model.

    Returns:
        The report, and the files by what they are.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: an invalid size, method, preset or prompt.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    if preset is not None and method is not None:
        raise ValueError(f"give a method or preset, got both: {method} and {preset}")
    check(out, prompt, METHOD if method is None else method, device, known=PROMPT)
    if model is None:
        check_known(prompt)
        _check_there()
    if with_lora and model is not None:
        raise ValueError(f"the LoRA is the embedded model's: leave it or model {model} out")
    lora = lora_path(guided=True) if model is None and with_lora is not False else None
    subject = Subject.of(model, lora, method, device)
    files = _files(out, subject.name if preset is None else "preset")
    quality.check_installed()
    check_writable(files["dense"])

    pipes = [subject.loaded() for _ in range(2)]
    if preset is not None:
        subject = subject.by_preset(preset, pipes[1], asked_of(frames, steps))
    steps = steps_of(steps, subject.method, preset)
    asked = Clip(
        frames=frames,
        height=SIZE,
        width=SIZE,
        steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        seed=seed,
        fps=FPS,
    )
    clip = filled(pipes[0], asked)
    if not is_streamed(pipes[0]):
        kind = type(pipes[0]).__name__
        raise ValueError(f"the demo is for pipelines whose latents it can decode, got {kind}")
    check_clip(pipes[0], clip, subject.method)
    page = Page(files, f"{prompt}: dense and {subject.name} attention", FPS)
    head = {"prompt": prompt, "seed": seed, "frames": frames, "method": repr(subject.method)}
    page.write(head, next_part="the denoising")
    with ExitStack() as stack:
        entrants = [
            subject.entrant("dense", pipes[0], Dense(), stack),
            subject.entrant(subject.name, pipes[1], subject.method, stack),
        ]
        load = ExternalLoad()
        made = race.race(entrants, prompt, clip)
        busy = load.busy() if pipes[0].device.type == "cpu" else None
        result = _decoded(entrants, made, prompt, clip)
    videos = _add_clips(page, result, with_times=busy is None)
    page.add("mask", mask_picture(subject.method, token_grid(pipes[0], clip), page.path("mask")))
    report = _report(result, made) | {"busy": busy}
    if lora is not None:
        default = subject.is_own and asked == CLIP
        report["lora"] = about_lora(lora, subject.is_own, default and prompt == PROMPT)
    page.write(report, next_part="the animation")
    page.add_video("race", race.animation(entrants, made, videos, fps=FPS))
    if lora is not None:
        page.write(report, next_part="the clip without the LoRA")
        report["without_lora"] = _add_without(page, result, device)
    page.write(report)
    return report, page.made


def check(out: Path, prompt: str, method: Method, device: str, *, known: str) -> None:
    """Raise ValueError for arguments that the demo cannot use, before anything is loaded.

    Args:
        known: a valid prompt, for the error.
    """
    if method.is_dense:
        raise ValueError("the demo sets a sparse method beside dense attention, got Dense()")
    if not prompt.strip():
        raise ValueError(f"the prompt is empty; one that the model knows: {known!r}")
    find_device(device)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} must be a folder, but it is a file")


def detected(result: Comparison) -> dict[str, Any]:
    """Detect the content of both clips, and whether sparse attention changed it."""
    seen = {"dense": _seen(result.dense.video), "sparse": _seen(result.sparse.video)}
    return {
        "asked": result.prompt,
        **seen,
        "unchanged": seen["dense"]["shows"] == seen["sparse"]["shows"],
    }


def _seen(video: np.ndarray) -> dict[str, Any]:
    found = detect(video)
    return {"shows": found.caption, **asdict(found)}


def asked_of(frames: int, steps: int | None) -> dict[str, Any]:
    """Describe the clip of a demo, by the pipeline's names."""
    return {
        "num_frames": frames,
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": steps,
    }


def steps_of(given: int | None, method: Method, preset: Any) -> int:
    """Number of steps; ValueError for another than a preset was solved for."""
    solved = method.steps if isinstance(method, Mixed) else None
    if given is None:
        return STEPS if solved is None else solved
    if solved is not None and given != solved:
        raise registry.other_steps(preset, solved, given)
    return given


def _check_there() -> None:
    if not (demo.path() / "model_index.json").exists():
        raise FileNotFoundError(
            f"the demo model is not at {demo.path()}: install the package again, or train it "
            "with `make train-demo`"
        )


def _files(out: Path, name: str) -> dict[str, Path]:
    return {
        "side by side": out / "side_by_side.mp4",
        "race": out / "race.mp4",
        "dense": out / "dense.mp4",
        "sparse": out / f"{name}.mp4",
        "without LoRA": out / "without_lora.mp4",
        "mask": out / "mask.png",
        "contact sheet": out / "contact_sheet.png",
        "page": out / "report.html",
        "report": out / "report.json",
    }


def _decoded(
    entrants: Sequence[Entrant], made: Sequence[Denoising], prompt: str, clip: Clip
) -> Comparison:
    """Decode each clip by itself."""
    samples = []
    for entrant, one in zip(entrants, made, strict=True):
        start = time.perf_counter()
        video = np.concatenate([*decode_stream(entrant.pipe, one.latents)])
        samples.append(Sample(video, one.total, time.perf_counter() - start))
    dense, sparse = (entrant.handle.summary() for entrant in entrants)
    return Comparison(
        prompt,
        clip,
        dense=samples[0],
        sparse=samples[1],
        dense_summary=dense,
        summary=sparse,
        compile_seconds=0.0,  # a step of each, of the same size, ran before
        environment=environment(entrants[0].pipe.device),
    )


def _report(result: Comparison, made: Sequence[Denoising]) -> dict[str, Any]:
    ratios = race.ratios(*made)
    spent = result.dense_summary.seconds, result.summary.seconds
    return result.to_dict() | {
        "steps_seconds": {"dense": made[0].seconds, "sparse": made[1].seconds},
        "speedup_of_steps": {
            "least": min(ratios),
            "median": statistics.median(ratios),
            "most": max(ratios),
        },
        "attention_speedup": spent[0] / spent[1] if spent[0] and spent[1] else None,
        "detector": detected(result),
    }


def about_lora(lora: Path, is_own: bool, was_chosen: bool) -> dict[str, Any]:
    """Describe an embedded LoRA, for the report.

    Args:
        is_own: whether the sparse clip is made by the attention that it was trained through.
        was_chosen: whether the prompt is the demo's own, with all else as it is by default. The
            score of the LoRA then goes with it.
    """
    path = lora / SCORE
    score = read_fields(path)
    return {
        "name": lora.name,
        "config": f"configs/lora/{CONFIGS[lora.name]}",
        "trained_frames": read_recipe(lora).trained_frames,
        "trained_through_the_same": is_own,
        "prompt_was_chosen": was_chosen,
        "score": {name: typed(score, name, int, origin=path) for name in SCORES}
        | {"psnr_db": typed(score, "psnr_db", float, origin=path)},
    }


def _add_clips(page: Page, result: Comparison, *, with_times: bool) -> list[np.ndarray]:
    """Add both clips, alone and together. Returns the two."""
    clips = {"dense": result.dense.video, "sparse": result.sparse.video}
    for name, pixels in {**clips, "side by side": pair(result, with_times=with_times)}.items():
        page.add_video(name, pixels)
    sheet = contact_sheet([*clips.values()], result.labels, count=SHEET_FRAMES)
    page.add("contact sheet", write_video(sheet[None], page.path("contact sheet"), fps=FPS))
    return [*clips.values()]


def _add_without(page: Page, result: Comparison, device: str) -> dict[str, Any]:
    """Make the clip by the model as it was trained, and show it beside the sparse one."""
    pipe = loaded(None, device)
    with Progress() as bar:
        made = sample(pipe, result.prompt, result.clip, tick=ticker(bar, "without the LoRA"))
    labels = ["without the LoRA", f"with it, {type(result.summary.method).__name__.lower()}"]
    videos = [made.video, result.sparse.video]
    page.add_video("without LoRA", side_by_side(videos, labels, scale=3))
    return _seen(made.video)
