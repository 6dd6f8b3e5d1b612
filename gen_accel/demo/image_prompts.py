"""The demo with an image prompt: the image shows the object, the text describes its motion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen_accel import demo
from gen_accel.attention_processors import Radial
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.demo import job
from gen_accel.demo.clips import STILL_SIZE
from gen_accel.demo.detector import detect
from gen_accel.demo.job import FPS, GUIDANCE_SCALE, SIZE
from gen_accel.demo.page import HEADLINES
from gen_accel.demo.subject import loaded
from gen_accel.demo.words import check_known
from gen_accel.measure import (
    check_writable,
    quality,
    side_by_side,
    write_json,
    write_report,
    write_video,
)
from gen_accel.method import Method
from gen_accel.pipelines.generation.compare import Comparison, compare_with_dense
from gen_accel.pipelines.generation.config import ImagePromptConfig
from gen_accel.pipelines.generation.inputs import open_image_prompt
from gen_accel.pipelines.generation.sampling import Clip, check_clip, filled
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.tuning.preset import choose_preset

PROMPT = "something moves right slowly"
METHOD = Radial()
DENSE_START = 0.25
SHOWN_FRAMES, SCALE = 5, 2  # of the picture: frames, and pixels that one pixel becomes


def run(
    out: str | Path = "outputs/demo_image",
    *,
    image: Any,
    adapter: Any = None,
    model: str | Path | None = None,
    prompt: str = PROMPT,
    seed: int = 0,
    frames: int = demo.TRAINED_FRAMES,
    steps: int | None = None,
    method: Method | None = None,
    preset: str | Path | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Generate one clip by an image and a text, densely and with `method`; write both to `out`.

    Args:
        image: a file or a PIL image of the object to move.
        adapter: an adapter instead of the embedded one; see `load_image_prompt`.
        model: a folder like the embedded model's, which is the default.
        frames: 1 more than a multiple of 4.
        steps: None: as many as the preset was solved for, or 20.
        method: None: `Radial()`.
        preset: a file of `gen_accel.tune`, or a name, in place of a method; see `attach`.

    Returns:
        The report, and the files by what they are.

    Raises:
        FileNotFoundError: no image there, no model, or no adapter.
        ValueError: a file that is no image, or an invalid size, method, preset or prompt.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    if preset is not None and method is not None:
        raise ValueError(f"give a method or preset, got both: {method} and {preset}")
    chosen: Method = METHOD if method is None else method
    job.check(out, prompt, chosen, device, known=PROMPT)
    if model is None:
        check_known(prompt)
    if adapter is None:
        adapter = demo.image_prompt_path()
        if not adapter.is_dir():
            raise FileNotFoundError(
                f"the demo model's image prompt is not at {adapter}: install the package again, "
                "or train it with `gen-accel train configs/image_prompt/demo.yaml`"
            )
    given = open_image_prompt(ImagePromptConfig(image_prompt=(image,), image_adapter=str(adapter)))
    name = type(chosen).__name__.lower() if preset is None else "preset"
    files = _files(out, name)
    quality.check_installed()
    check_writable(files["dense"])

    pipe = loaded(model, device)
    schedule, tuned = Schedule(dense_start=DENSE_START), None
    if preset is not None:
        chosen, schedule, tuned = choose_preset(preset, pipe, None, job.asked_of(frames, steps))
    steps = job.steps_of(steps, chosen, preset)
    clip = filled(
        pipe,
        Clip(
            frames=frames,
            height=SIZE,
            width=SIZE,
            steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            seed=seed,
            fps=FPS,
        ),
    )
    check_clip(pipe, clip, chosen)
    with given.load(pipe) as handle:
        result = compare_with_dense(
            pipe,
            prompt,
            clip,
            method=chosen,
            preset=tuned,
            schedule=schedule,
            timed=pipe.device.type == "cpu",
        )
        about = handle.describe()
    report = result.to_dict() | {
        "image": str(image) if isinstance(image, str | Path) else "a picture in memory",
        "image_prompt": about,
        "detector": job.detected(result) | {"image": _seen(given.images[0])},
    }
    shown = _large(given.images[0])
    write_video(_together(result, shown), files["side by side"], fps=FPS)
    write_video(result.dense.video, files["dense"], fps=FPS)
    write_video(result.sparse.video, files["sparse"], fps=FPS)
    write_video(_picture(result, shown, name)[None], files["picture"], fps=FPS)
    write_report(
        files["page"],
        {HEADLINES.get(key, key): value for key, value in report.items()},
        title=f"{prompt}, with an image of what does",
        videos={
            f"the image, dense, {name}": files["side by side"],
            "dense": files["dense"],
            name: files["sparse"],
        },
        pictures={"The image, and frames of both clips": files["picture"]},
        notes=notes(report),
    )
    write_json(files["report"], report)
    return report, files


def notes(report: dict[str, Any]) -> Sequence[str]:
    """The report in plain words."""
    seen = report["detector"]
    found = [
        f"The text was {report['prompt']!r}, which says how something moves and not what. Beside "
        "its attention to the text, each layer of the model attends to a few tokens made of the "
        "image, and adds both. The model itself is as it was: only what reads the image was "
        "trained.",
        f"A detector reads off the pixels what a clip shows. The image: {seen['image']}. Dense: "
        f"{seen['dense']['shows']}. Sparse: {seen['sparse']['shows']}.",
    ]
    if seen["image"] == UNKNOWN:
        found.append(
            "The adapter has only ever seen single coloured shapes on a dark background. It takes "
            "any picture for one of those."
        )
    else:
        follow = [n for n in ("dense", "sparse") if seen[n]["shows"].startswith(seen["image"])]
        found.append(f"Clips that show what the image shows: {', '.join(follow) or 'none'}.")
    found.append(
        f"The clip has {report['frames']} frames and {report['tokens']:,} tokens, too few for "
        f"sparse attention to gain much: {report['speedup']:.2f} times as fast. It pays on longer "
        "ones, as in `gen-accel demo` without an image; here it shows that both go together."
    )
    return found


UNKNOWN = "none of the shapes of the demo's world"


def _files(out: Path, name: str) -> dict[str, Path]:
    return {
        "side by side": out / "side_by_side.mp4",
        "dense": out / "dense.mp4",
        "sparse": out / f"{name}.mp4",
        "picture": out / "picture.png",
        "page": out / "report.html",
        "report": out / "report.json",
    }


def _seen(image: Image.Image) -> str:
    """Describe the image by the detector."""
    small = np.asarray(image.resize((STILL_SIZE, STILL_SIZE), Image.Resampling.BICUBIC))
    found = detect(np.stack([small] * 2))
    known = found.color is not None and found.shape is not None
    return f"a {found.color} {found.shape}" if known else UNKNOWN


def _large(image: Image.Image) -> np.ndarray:
    """(1, SIZE, SIZE, 3) uint8, as the adapter sees it: squeezed to a square."""
    return np.asarray(as_rgb(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))[None]


def _together(result: Comparison, image: np.ndarray) -> np.ndarray:
    """The image left of both clips, (F, H, W, 3) uint8."""
    videos = [image.repeat(len(result.dense.video), 0), result.dense.video, result.sparse.video]
    labels = ["image prompt", *result.labels]
    return side_by_side(videos, labels, caption=result.caption(), scale=SCALE)


def _picture(result: Comparison, image: np.ndarray, name: str) -> np.ndarray:
    """The image and some frames beside it, a row for each clip, (H, W, 3) uint8."""
    rows = []
    for label, video in (("dense", result.dense.video), (name, result.sparse.video)):
        places = np.linspace(0, len(video) - 1, min(SHOWN_FRAMES, len(video))).round().astype(int)
        tiles = [image, *(video[i : i + 1] for i in places)]
        labels = ["image prompt", *(f"{label}, frame {i}" for i in places)]
        rows.append(side_by_side(tiles, labels, scale=SCALE)[0])
    return np.concatenate(rows)
