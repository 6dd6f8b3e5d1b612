"""The demo: one long clip of the embedded model, dense and sparse on one clock."""

import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel import demo
from gen_accel.attention_processors import Dense, Radial
from gen_accel.attention_processors.attached.recipe import OtherAttention, Recipe, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.demo import race
from gen_accel.demo.detector import detect
from gen_accel.demo.page import Page
from gen_accel.demo.race import Denoising, Entrant
from gen_accel.demo.words import PROMPT, SEED, check_known
from gen_accel.json_files import read_fields
from gen_accel.measure import check_writable, contact_sheet, quality, side_by_side, write_video
from gen_accel.measure.environment import environment
from gen_accel.measure.pictures import mask_picture
from gen_accel.method import Method, parts_of
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.compare import Comparison, pair
from gen_accel.pipelines.generation.decode import decode_stream
from gen_accel.pipelines.generation.loading import Loading, find_device, load
from gen_accel.pipelines.generation.progress import steps_bar, ticker
from gen_accel.pipelines.generation.sampling import (
    Clip,
    Sample,
    check_clip,
    filled,
    sample,
    token_grid,
)
from gen_accel.pipelines.long_video import extend

FRAMES, SIZE = 4 * (demo.TRAINED_FRAMES - 1) + 1, 96
STEPS, GUIDANCE_SCALE = 20, 3.0
METHOD = Radial()  # of a model without a LoRA
DENSE_START = 0.2  # of that
FPS = 16.0
SHEET_FRAMES = 9
SCORE = "score.json"  # beside a LoRA: how many of how many clips are right
CONFIGS = {"long_lora_guided": "demo.yaml", "long_lora": "demo_guided.yaml"}


def lora_path(*, guided: bool = False) -> Path:
    """Path of the demo model's LoRA that guidance is distilled into
    (configs/lora/demo_guided.yaml). With `guided`, of the LoRA that is sampled with guidance
    (configs/lora/demo.yaml)."""
    return Path(__file__).parent / ("long_lora_guided" if guided else "long_lora")


def run(
    out: str | Path = "outputs/demo",
    *,
    model: str | Path | None = None,
    prompt: str = PROMPT,
    seed: int = SEED,
    frames: int = FRAMES,
    steps: int = STEPS,
    method: Method | None = None,
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
        method: in place of the LoRA's own.
        device: a GPU gains nothing on so small a model.
        with_lora: False leaves the LoRA away; None means True for the embedded model.

    Returns:
        The report, and the files by what they are.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: an invalid size, method or prompt.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check(out, prompt, method or METHOD, device, known=PROMPT)
    if model is None:
        check_known(prompt)
        _check_there()
    if with_lora and model is not None:
        raise ValueError(f"the LoRA is the embedded model's: leave it or model {model} out")
    lora = lora_path(guided=True) if model is None and with_lora is not False else None
    recipe = None if lora is None else read_recipe(lora)
    chosen = method or (METHOD if recipe is None else recipe.build_method())
    files = _files(out, _name(chosen))
    quality.check_installed()
    check_writable(files["dense"])

    clip = Clip(frames, SIZE, SIZE, steps, GUIDANCE_SCALE, seed=seed, fps=FPS)
    pipes = [loaded(model, device, lora) for _ in range(2)]
    clip = filled(pipes[0], clip)
    check_clip(pipes[0], clip, chosen)
    name = _name(chosen)
    page = Page(files, f"{prompt}: dense and {name} attention", FPS)
    asked = {"prompt": prompt, "seed": seed, "frames": frames, "method": repr(chosen)}
    page.write(asked, next_part="the denoising")
    with ExitStack() as stack:
        dense = _entrant("dense", pipes[0], Dense(), recipe, stack)
        sparse = _entrant(name, pipes[1], chosen, recipe, stack)
        result, made = _compared([dense, sparse], prompt, clip)
    report = _report(result, made, lora)
    report["was_chosen"] = (prompt, seed) == (PROMPT, SEED)
    videos = _add_clips(page, result)
    page.add("mask", mask_picture(chosen, token_grid(pipes[0], clip), page.path("mask")))
    page.write(report, next_part="the animation")
    page.add_video("race", race.animation([dense, sparse], made, videos, fps=FPS))
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
    if parts_of(method).is_dense:
        raise ValueError("the demo sets a sparse method beside dense attention, got Dense()")
    if not prompt.strip():
        raise ValueError(f"the prompt is empty; one that the model knows: {known!r}")
    find_device(device)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} must be a folder, but it is a file")


def loaded(model: str | Path | None, device: str, lora: Path | None = None) -> Any:
    """Load the pipeline, with a LoRA fused into its weights."""
    pipe = load(demo.path() if model is None else model, Loading("float32", device))
    if lora is not None:
        pipe.load_lora_weights(str(lora))
        pipe.fuse_lora()  # a LoRA beside the weights would cost a tenth of a step
    return pipe


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


def _check_there() -> None:
    if not (demo.path() / "model_index.json").exists():
        raise FileNotFoundError(
            f"the demo model is not at {demo.path()}: install the package again, or train it "
            "with `make train-demo`"
        )


def _name(method: Method) -> str:
    return type(method).__name__.lower()


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


def _entrant(
    name: str, pipe: Any, method: Method, recipe: Recipe | None, stack: ExitStack
) -> Entrant:
    """Attach `method` until `stack` is closed, and the rule on positions that the LoRA was trained
    with."""
    schedule = Schedule(dense_start=DENSE_START) if recipe is None else recipe.build_schedule()
    options: dict[str, Any] = {} if parts_of(method).is_dense else {"schedule": schedule}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OtherAttention)
        handle = attach(pipe, method, timed=pipe.device.type == "cpu", **options)
    stack.enter_context(handle)
    if recipe is None:
        return Entrant(name, pipe, handle)
    techniques = [*([] if recipe.rope == "none" else [recipe.rope]), *recipe.techniques]
    longer = stack.enter_context(extend(pipe, techniques, num_frames=FRAMES))
    return Entrant(name, pipe, handle, longer)


def _compared(
    entrants: Sequence[Entrant], prompt: str, clip: Clip
) -> tuple[Comparison, list[Denoising]]:
    """Denoise in turn, and decode each by itself."""
    made = race.race(entrants, prompt, clip)
    samples = []
    for entrant, one in zip(entrants, made, strict=True):
        start = time.perf_counter()
        video = np.concatenate([*decode_stream(entrant.pipe, one.latents)])
        samples.append(Sample(video, one.total, time.perf_counter() - start))
    summaries = [entrant.handle.summary() for entrant in entrants]
    device = entrants[0].pipe.device
    found = Comparison(
        prompt,
        clip,
        dense=samples[0],
        sparse=samples[1],
        dense_summary=summaries[0],
        summary=summaries[1],
        compile_seconds=0.0,
        environment=environment(device),
    )
    return found, made


def _report(result: Comparison, made: Sequence[Denoising], lora: Path | None) -> dict[str, Any]:
    ratios = race.ratios(*made)
    spent = result.dense_summary.seconds, result.summary.seconds
    report = result.to_dict() | {
        "steps_seconds": {"dense": made[0].seconds, "sparse": made[1].seconds},
        "speedup_of_steps": {
            "least": min(ratios),
            "median": statistics.median(ratios),
            "most": max(ratios),
        },
        "attention_speedup": spent[0] / spent[1] if spent[0] and spent[1] else None,
        "busy": race.busy(),
        "detector": detected(result),
    }
    if lora is not None:
        report["lora"] = about_lora(lora)
    return report


def about_lora(lora: Path) -> dict[str, Any]:
    """Describe an embedded LoRA: what made it, and of how many clips it gets how many right."""
    score = lora / SCORE
    return {
        "name": lora.name,
        "config": f"configs/lora/{CONFIGS[lora.name]}",
        "trained_frames": read_recipe(lora).trained_frames,
        "score": read_fields(score) if score.exists() else None,
    }


def _add_clips(page: Page, result: Comparison) -> list[np.ndarray]:
    """Add both clips, alone and together. Returns the two."""
    clips = {"dense": result.dense.video, "sparse": result.sparse.video}
    for name, pixels in {**clips, "side by side": pair(result)}.items():
        page.add_video(name, pixels)
    sheet = contact_sheet([*clips.values()], result.labels, count=SHEET_FRAMES)
    page.add("contact sheet", write_video(sheet[None], page.path("contact sheet"), fps=FPS))
    return [*clips.values()]


def _add_without(page: Page, result: Comparison, device: str) -> dict[str, Any]:
    """Make the clip by the model as it was trained, and show it beside the sparse one."""
    pipe = loaded(None, device)
    with steps_bar() as bar:
        made = sample(pipe, result.prompt, result.clip, tick=ticker(bar, "without the LoRA"))
    labels = ["without the LoRA", f"with it, {_name(result.summary.method)}"]
    videos = [made.video, result.sparse.video]
    page.add_video("without LoRA", side_by_side(videos, labels, scale=3))
    return _seen(made.video)
