"""Generate videos with any diffusers video pipeline: load, attach, sample, write."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.measure.video_io import check_writable, write_video
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.compare import beside, compare_with_dense, write_comparison
from gen_accel.pipelines.sampling import (
    Clip,
    Loading,
    check_fits,
    check_model,
    filled,
    load,
    sample,
    steps_bar,
    ticker,
    token_grid,
)
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.summary import Summary


@dataclass(frozen=True)
class Generated:
    """What one prompt came to. report: of the comparison, where one was asked for."""

    prompt: str
    seed: int
    files: dict[str, Path]
    seconds: float
    summary: Summary
    report: dict[str, Any] | None = None


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    out: str | Path,
    method: Any,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    clip: Clip | None = None,
    loading: Loading | None = None,
    compare: bool = False,
    timed: bool = False,
) -> list[Generated]:
    """Load a pipeline, attach `method`, and write a video for each prompt.

        generate("models/Wan2.1", ["a cat surfs"], out="cat.mp4", method=Radial())

    All that can be refused is refused before the first step. Progress goes to stderr.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub.
        out: .mp4, .gif, .png or no suffix, see `write_video`. Several prompts give `out-000.mp4`
            and so on.
        compare: also generate densely from the same seed, and write `out.dense.mp4`,
            `out.side_by_side.mp4` and `out.json` with speed-up, density, PSNR and SSIM.
        timed: also measure the seconds spent in attention; on a GPU that waits for each call.

    Raises:
        ValueError: no prompt, a model, size, method, kernel or file name that will not do.
        OSError: a file or repository that is not there, or a folder that cannot be written.
    """
    clip, loading, schedule = clip or Clip(), loading or Loading(), schedule or Schedule()
    if not prompts:
        raise ValueError("no prompts: give one, or a file with one on each line")
    if compare and isinstance(method, Dense):
        raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
    kernels.check_name(kernel)
    check_model(model)
    targets = _targets(Path(out), len(prompts))
    for target in targets:
        check_writable(target, frames=clip.frames)
        if compare:
            for name in ("dense", "side_by_side"):
                check_writable(beside(target, name), frames=clip.frames)
    pipe = load(model, loading)
    clip = filled(pipe, clip)
    check_fits(method, token_grid(pipe, clip))

    made = []
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        one = replace(clip, seed=clip.seed + i)
        options: dict[str, Any] = {"schedule": schedule, "kernel": kernel, "timed": timed}
        if compare:
            result = compare_with_dense(pipe, prompt, one, method=method, **options)
            files = write_comparison(result, target)
            seconds, summary, report = result.sparse.seconds, result.summary, result.to_dict()
        else:
            with attach(pipe, method, **options) as handle, steps_bar() as bar:
                taken = sample(pipe, prompt, one, tick=ticker(bar, target.name))
                summary = handle.summary()
            files = {"video": write_video(taken.video, target, fps=clip.fps)}
            seconds, report = taken.seconds, None
        made.append(Generated(prompt, one.seed, files, seconds, summary, report))
    return made


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises ValueError for a file without any, or that is not UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one on each line")
    return prompts


def _targets(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(count)]
