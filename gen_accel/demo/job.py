"""The demo: one clip of the embedded model, dense and sparse, side by side."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gen_accel import demo
from gen_accel.attention_processors import Radial
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.demo import longer
from gen_accel.demo.detector import detect
from gen_accel.demo.evaluate import TRAINED_FRAMES
from gen_accel.demo.words import check_known
from gen_accel.measure import (
    check_writable,
    contact_sheet,
    quality,
    write_json,
    write_report,
    write_video,
)
from gen_accel.measure.pictures import mask_picture
from gen_accel.method import Method, parts_of
from gen_accel.pipelines.generation.compare import Comparison, compare_with_dense, pair
from gen_accel.pipelines.generation.loading import Loading, find_device, load
from gen_accel.pipelines.generation.sampling import Clip, check_clip, filled, token_grid

PROMPT = "a yellow triangle moves left slowly"
FRAMES, SIZE = 257, 96  # 9,360 tokens: attention is most of a step
STEPS, GUIDANCE_SCALE = 20, 3.0
METHOD = Radial()
DENSE_START = 0.2
FPS = 16.0
SHEET_FRAMES = 9
HEADLINES = {"psnr_db": "psnr"}  # what `write_report` calls it


def run(
    out: str | Path = "outputs/demo",
    *,
    model: str | Path | None = None,
    prompt: str = PROMPT,
    seed: int = 0,
    frames: int = FRAMES,
    steps: int = STEPS,
    method: Method = METHOD,
    device: str = "cpu",
    with_lora: bool | None = None,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Generate one clip densely and with `method`, and write clips and their comparison to `out`.

    Args:
        model: a folder like the embedded model's, which is the default.
        frames: 1 more than a multiple of 4.
        device: a GPU gains nothing on so small a model.
        with_lora: also generate four times the trained length, without and with each of the
            model's long-video LoRAs; None does so for the embedded model.

    Returns:
        The report, and the files by what they are.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: an invalid size, method or prompt.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check(out, prompt, method, device, known=PROMPT)
    if model is None:
        check_known(prompt)
    if model is None and not (demo.path() / "model_index.json").exists():
        raise FileNotFoundError(
            f"the demo model is not at {demo.path()}: install the package again, or train it "
            "with `make train-demo`"
        )
    clip = Clip(frames, SIZE, SIZE, steps, GUIDANCE_SCALE, seed=seed, fps=FPS)
    files = _files(out, type(method).__name__.lower())
    if with_lora and model is not None:
        raise ValueError(f"the LoRA is the embedded model's: leave it or model {model} out")
    if with_lora is None:
        with_lora = model is None
    if not with_lora:
        del files["with LoRA"]
    quality.check_installed()
    check_writable(files["dense"])

    pipe, clip = loaded(model, clip, method, device)
    result = compare_with_dense(
        pipe,
        prompt,
        clip,
        method=method,
        schedule=Schedule(dense_start=DENSE_START),
        timed=pipe.device.type == "cpu",  # on other devices, timing would slow the attention
    )
    report = result.to_dict() | {"detector": detected(result)}
    if with_lora:
        made = longer.compare(prompt, clip)
        report["longer"] = made.to_dict()
        write_video(made.side_by_side(), files["with LoRA"], fps=FPS)

    clips = {"dense": result.dense.video, "sparse": result.sparse.video}
    for name, pixels in {**clips, "side by side": pair(result)}.items():
        write_video(pixels, files[name], fps=FPS)
    mask_picture(method, token_grid(pipe, clip), files["mask"])
    sheet = contact_sheet([*clips.values()], result.labels, count=SHEET_FRAMES)
    write_video(sheet[None], files["contact sheet"], fps=FPS)
    _write_page(report, result, files)
    write_json(files["report"], report)
    return report, files


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


def loaded(model: str | Path | None, clip: Clip, method: Method, device: str) -> tuple[Any, Clip]:
    """Load the pipeline, and return it with the clip as it will be made; ValueError where the
    method does not fit."""
    pipe = load(demo.path() if model is None else model, Loading("float32", device))
    clip = filled(pipe, clip)
    check_clip(pipe, clip, method)
    return pipe, clip


def _files(out: Path, name: str) -> dict[str, Path]:
    return {
        "side by side": out / "side_by_side.mp4",
        "dense": out / "dense.mp4",
        "sparse": out / f"{name}.mp4",
        "with LoRA": out / "with_lora.mp4",
        "mask": out / "mask.png",
        "contact sheet": out / "contact_sheet.png",
        "page": out / "report.html",
        "report": out / "report.json",
    }


def detected(result: Comparison) -> dict[str, Any]:
    """Detect the content of both clips, and whether sparse attention changed it."""
    seen = {"dense": detect(result.dense.video), "sparse": detect(result.sparse.video)}
    return {
        "asked": result.prompt,
        **{name: {"shows": found.caption, **asdict(found)} for name, found in seen.items()},
        "unchanged": seen["dense"].caption == seen["sparse"].caption,
    }


def _write_page(report: dict[str, Any], result: Comparison, files: dict[str, Path]) -> None:
    kind = type(result.summary.method).__name__.lower()
    shown = {}
    if "longer" in report:
        made = report["longer"]
        labels = [clip["label"] for clip in (made["dense"], *made["trained"].values())]
        caption = f"{made['frames']} frames: {'; '.join(labels)}"
        shown[caption] = files["with LoRA"]
    write_report(
        files["page"],
        {HEADLINES.get(key, key): value for key, value in report.items()},
        title=f"{result.prompt}: dense and {kind} attention",
        videos={
            f"dense left, {kind} right": files["side by side"],
            "dense": files["dense"],
            kind: files["sparse"],
            **shown,
        },
        pictures={
            "Which key blocks each query block sees, and what one token sees": files["mask"],
            "The same moments of both clips": files["contact sheet"],
        },
        notes=notes(report),
    )


def notes(report: dict[str, Any]) -> Sequence[str]:
    """The report in plain words."""
    dense, sparse = report["dense_seconds"], report["sparse_seconds"]
    found = [
        "A video model compares every token, a small patch of a few frames, with every other. "
        f"Here that is {report['tokens']:,} tokens, and so {report['tokens'] ** 2:,} pairs in "
        f"each layer at each step. {report['method'].split('(')[0]} attention leaves many of them "
        "out. The same model made the same prompt from the same noise twice, dense and sparse.",
        f"The {report['steps']} steps took {dense:.1f} s dense and {sparse:.1f} s sparse, "
        f"{report['speedup']:.2f} times as fast. Decoding the result to pixels took another "
        f"{report['decode_seconds']:.1f} s each time, so that the whole was "
        f"{report['total_speedup']:.2f} times as fast. Each ran once on a short clip before the "
        "clocks started"
        + (
            f"; {report['compile_seconds']:.1f} s of compilation are not counted."
            if report["compile_seconds"]
            else ", and nothing had to be compiled."
        ),
    ]
    if report["density"] is None:
        found.append("The schedule kept every step dense, so that both clips are the same.")
    else:
        found.append(
            f"Density {report['density']:.3f} is the share of pairs that were computed where "
            f"attention was sparse (sparsity {report['sparsity']:.3f} says the same the other way "
            f"round). The first steps, which decide what a video shows, stayed dense: over all "
            f"steps {report['attention_flops_share']:.0%} of the attention's work was done."
        )
    if report["attention_seconds"] is not None:
        spent = report["attention_seconds"]
        found.append(
            f"Attention alone took {spent['dense']:.1f} s of the dense run and "
            f"{spent['sparse']:.1f} s of the sparse one. What else a step does sets the limit."
        )
    found.append(
        "PSNR and SSIM compare the sparse clip with the dense one, pixel by pixel. They say how "
        "close the two are, not how good either is. Above 30 dB, differences are hard to see."
    )
    seen = report["detector"]
    verdict = "the same" if seen["unchanged"] else "not the same"
    found.append(
        f"A detector reads off the pixels what a clip shows. Dense: {seen['dense']['shows']}. "
        f"Sparse: {seen['sparse']['shows']}. That is {verdict}; asked for was: {seen['asked']}."
    )
    stuck = any(seen[clip]["motion"] in ("still", "wanders") for clip in ("dense", "sparse"))
    if stuck and report["frames"] > TRAINED_FRAMES:
        found.append(
            f"The demo model was trained on clips of {TRAINED_FRAMES} frames. Far beyond that it "
            "freezes or loses its way, dense or sparse, and that is what finetuning for longer "
            "videos repairs."
        )
    if "longer" in report:
        found += longer.notes(report["longer"])
    return found
