"""Generate videos with any diffusers video pipeline: load, attach, denoise, decode into a file."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gen_accel.attention_processors.attached.recipe import OtherAttention
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.summary import Summary
from gen_accel.cluster import Cluster
from gen_accel.endings import unwinding
from gen_accel.measure import write_json, write_video
from gen_accel.measure.report import comparison_files
from gen_accel.measure.video_io import check_writable, write_stream
from gen_accel.method import Method
from gen_accel.paths import expanded
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.compare import (
    compare_with_dense,
    write_comparison,
)
from gen_accel.pipelines.generation.decode import (
    decode_stream,
    is_streamed,
    load_latents,
    save_latents,
)
from gen_accel.pipelines.generation.given import Given
from gen_accel.pipelines.generation.image_input import ImageInput
from gen_accel.pipelines.generation.job import Job, Video
from gen_accel.pipelines.generation.loading import (
    Loading,
    check_latents_of,
    check_model,
    load,
    load_decoder,
)
from gen_accel.pipelines.generation.on_ray import spread
from gen_accel.pipelines.generation.preview import Preview, preview_of
from gen_accel.pipelines.generation.progress import counted, steps_bar, ticker
from gen_accel.pipelines.generation.prompt_list import Share
from gen_accel.pipelines.generation.resident import shelf
from gen_accel.pipelines.generation.sampling import (
    FPS,
    Clip,
    Sample,
    denoise,
    pixel_frames,
    sample,
)
from gen_accel.pipelines.generation.settings import Settings
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.tuning.preset import NotMeasured, OtherThanTuned, Preset
from gen_accel.text_files import read_text

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class Generated:
    """Result of one prompt.

    Args:
        files: written files, by their kind.
        seconds: time from the prompt to the file; in a comparison, to the pixels.
        extension: effect of each long-video technique, a line each.
        report: report of the comparison; None without.
        image: description of the image prompt; empty without.
    """

    prompt: str
    seed: int
    files: dict[str, Path]
    seconds: float
    summary: Summary
    extension: str = ""
    report: dict[str, Any] | None = None
    image: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return prompt, seed, files, seconds and density, and the parts that are there of the
        rest, as JSON holds them."""
        parts = {"extension": self.extension, "image_prompt": self.image, "report": self.report}
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "files": {kind: str(path) for kind, path in self.files.items()},
            "seconds": self.seconds,
            "density": self.summary.density,
            **{name: part for name, part in parts.items() if part},
        }


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    out: str | Path,
    method: Method | None = None,
    from_lora: str | Path | None = None,
    preset: str | Path | Preset | None = None,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    dense_kernel: str | None = None,
    clip: Clip | None = None,
    loading: Loading | None = None,
    compare: bool = False,
    timed: bool = False,
    metrics: Sequence[str] | None = None,
    techniques: Sequence[str] | None = None,
    trained_frames: int | None = None,
    latents: str | Path | None = None,
    image: ImageInput | None = None,
    given: Given | None = None,
    numbered: bool = False,
    resume: bool = False,
    preview: int | None = None,
    settings: bool = True,
    named: Mapping[str, str] | None = None,
    cluster: Cluster | None = None,
) -> list[Generated]:
    """Load a pipeline, attach `method`, and write a video for each prompt.

        generate("models/Wan2.1", ["a cat surfs"], out="cat.mp4", method=Radial())

    All faults that can be found early are refused before the first step. Progress goes to stderr.
    Frames go to the file as they are decoded, so that memory does not grow with their number, see
    `decode_stream`; only `compare` holds both videos in memory. Pipelines outside of
    `decode.streamed_families` check frames and sizes when they are called, and decode by
    themselves.

    Under `accelerate launch` the processes divide several prompts among them, each on a device of
    its own; a prompt's seed and files do not depend on the number of processes. Beside each of
    several outputs lies a small record of its inputs, `out-000.mp4.done.json`.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub.
        out: .mp4, .gif, .png or no suffix, see `write_video`. Several prompts give `out-000.mp4`
            and so on.
        from_lora: a folder of `gen_accel.lora.train` instead of a method: loads its weights, and
            attaches the method that it was trained with. A LoRA that holds its guidance runs
            without guidance, unless `clip` gives a scale. A LoRA that names techniques uses them
            for video longer than the model's, unless `techniques` are given.
        preset: a file that `gen_accel.tune` wrote, or a name, instead of a method; see `attach`.
            With `from_lora` the LoRA gives all but the method. Without steps in `clip` it runs at
            the number that the preset was solved for.
        dense_kernel: kernel of the dense layers and steps, see `attach`; the dense clip of a
            comparison uses the model's own attention.
        compare: also generate densely from the same seed, and write `out.dense.mp4`,
            `out.side_by_side.mp4` and `out.json` with speed-up, density, PSNR, SSIM and VMAF.
        metrics: figures of a comparison beside PSNR and SSIM: "lpips", "vmaf" and "cvvdp", see
            `measure_fidelity`. Without, LPIPS and VMAF where they can be computed.
        timed: also measure the seconds spent in attention; on a GPU that waits for each call.
        techniques: techniques for video longer than the model was trained on, see
            `long_video.extend`. None: the techniques that `from_lora` names; (): no techniques.
        trained_frames: length that the model was trained at, if its family does not know it.
        latents: a .safetensors file for the latents, numbered like `out`, and written before
            decoding. `decode_latents` makes the video from it again. Refused for a pipeline that
            decodes by itself.
        image: image prompt of every video, beside its text.
        given: frames or a video that every video is made from, beside its text.
        numbered: treat one prompt like several: its output is `out-000.mp4`, with a record beside
            it.
        resume: among several prompts, skip each whose files exist and have the same inputs: model,
            LoRAs, prompt, seed, sizes, method, schedule, dtype, images and so on. Device and
            kernel count with `compare` only.
        preview: steps between two pictures of what a video looks like so far, each of which
            replaces the last at `out.preview.png`; see `preview.Preview`. The last one stays.
        settings: keep in each file what it was made with, prompts and paths included, so that
            `gen-accel generate --from-settings` makes it again.
        named: names that the command line has for the model or the adapter, by option, to keep
            there in the place of their paths.
        cluster: let workers of Ray make the videos, on one machine or on many, which all see the
            folder of `out`. Seeds and files are as without; what Ray retries is in `cluster`.

    Returns:
        Results in the order of the prompts, without skipped ones: all in the main process, an
        empty list in the others.

    Raises:
        ValueError: no prompt, an unusable model, size, method, kernel, technique, image, adapter
            or file name, a preset of another model or number of steps, or a technique, latents or
            a preview together with `compare`.
        OSError: a missing file or repository, or a folder that cannot be written.
        Unmade: with `cluster`, some of the videos could not be made; the others are.
    """
    asked = Job(
        model=model,
        method=method,
        from_lora=from_lora,
        preset=preset,
        schedule=schedule,
        kernel=kernel,
        dense_kernel=dense_kernel,
        clip=clip or Clip(),
        loading=loading or Loading(),
        compare=compare,
        timed=timed,
        metrics=None if metrics is None else tuple(metrics),
        trained_frames=trained_frames,
        image=image,
        given=given,
        preview=preview,
    )
    job = asked.resolve(
        prompts,
        out=out,
        techniques=techniques,
        latents=latents,
        numbered=numbered,
        elsewhere=cluster is not None,
    )
    left = job.left(resume)
    apart = job.several and cluster is None
    share = Share.of(left, job.loading) if apart else Share(left)
    if share.is_main_process and len(left) < len(job.videos):
        targets = [video.target for video in job.videos]
        print(prompt_list.what_is_done(targets, left), file=sys.stderr)
    if not share.numbers:
        return share.gathered({})
    if latents is not None:
        check_latents_of(model)
    kept = asked if settings else None
    with unwinding():
        if cluster is not None:
            return spread(cluster, job, left, partial(_worker, job, kept, named or {}))
        made = _run(job, share, kept, named or {})
    return share.gathered(made)


def decode_latents(
    model: str | Path,
    latents: str | Path,
    *,
    out: str | Path,
    fps: float | None = None,
    loading: Loading | None = None,
) -> Path:
    """Decode latents that `generate` kept to a video. Only the autoencoder is loaded.

    Args:
        model: the model that made the latents, or a model with the same autoencoder; see
            `generate`.
        latents: the .safetensors file.
        out: .mp4, .gif, .png or no suffix, see `write_video`.
        fps: frames a second; by default the frame rate in the file, or 16 if it states none.

    Returns:
        The file or folder written.

    Raises:
        ValueError: an unusable model, file or file name.
        OSError: a missing file or repository, or a folder that cannot be written.
    """
    values, about = load_latents(latents)
    check_model(model)
    target = expanded(out)
    check_writable(target, frames=1 if values.shape[2] == 1 else None)
    rate = about.get("fps") if fps is None else fps
    rate = FPS if rate is None else rate
    Clip(fps=rate)  # refused before the autoencoder is loaded
    pipe = load_decoder(model, loading)
    with steps_bar() as bar:
        return _write(pipe, values, target, rate, bar)


def read_prompts(path: str | Path) -> list[str]:
    """Read the lines of a text file that are not blank.

    Raises ValueError for a file without such lines, or that is not UTF-8.
    """
    # Not by `splitlines`, which splits at characters that a prompt may hold, such as U+2028.
    lines = read_text(path).split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one on each line")
    return prompts


def _run(
    job: Job, share: Share, asked: Job | None, named: Mapping[str, str]
) -> dict[int, Generated]:
    """Make the videos of this process. Returns the results by their numbers.

    Args:
        asked: the job before it was resolved, for the settings in the files; None keeps none.
        named: see `generate`.
    """
    maker = _Maker(job, share.loading(job.loading), asked, named)
    for line in maker.told if share.is_main_process else ():
        print(line, file=sys.stderr)
    return {i: maker(i, share.rank) for i in share.numbers}


class _Maker:
    """A loaded pipeline, which makes the videos of a job by their numbers."""

    def __init__(
        self, job: Job, loading: Loading, asked: Job | None, named: Mapping[str, str]
    ) -> None:
        self.job = job
        self.pipe = load(job.model, loading, job.given or Given(), shelf=shelf())
        self.fitted = job.fitted(self.pipe)
        # The pipeline belongs to this object, so the image prompt is never taken off.
        self.seen = "" if job.image is None else job.image.load(self.pipe).describe()
        self.settings = None
        if asked is not None:
            self.settings = Settings(self.pipe, asked, self.fitted, named)
        self._told: list[type[Warning]] = [NotMeasured]  # `fitted` told

    @property
    def told(self) -> Sequence[str]:
        """Return, in lines, what was done to the pictures and the video that are given."""
        return () if self.fitted.inputs is None else self.fitted.inputs.told

    def __call__(self, number: int, rank: str = "") -> Generated:
        """Make a video and its record.

        Args:
            rank: prefix of the lines of the process's progress bar.
        """
        job, video = self.job, self.job.videos[number]
        make = _compared if job.compare else _made
        with warnings.catch_warnings():
            for kind in self._told:
                warnings.simplefilter("ignore", kind)
            prompt_list.forget_done(video.target)
            made = make(self.pipe, self.fitted, video, self.settings, seen=self.seen, rank=rank)
            if job.several:
                clip, files = asdict(self.fitted.clip_of(video)), dict(made.files)
                files.pop("preview", None)
                prompt_list.write_done(video.target, job.asked(video), clip, [*files.values()])
        self._told += [OtherThanTuned, OtherAttention]  # once is enough
        return made


def _worker(job: Job, asked: Job | None, named: Mapping[str, str]) -> Callable[[int], Generated]:
    """Load the pipeline in a worker of Ray. Returns what makes a video there by its number."""
    job.check_kernels()
    maker = _Maker(job, job.loading, asked, named)
    for line in maker.told:
        warnings.warn(line, stacklevel=2)  # which the worker sends

    def make(number: int) -> Generated:
        return prompt_list.without_tensors(maker(number))

    return make


def _compared(
    pipe: Any, job: Job, video: Video, settings: Settings | None, *, seen: str, rank: str
) -> Generated:
    """Make a video densely and by the method, with a comparison.

    Args:
        settings: what the files keep; None for nothing.
        seen: description of the image prompt.
        rank: prefix of the lines of the process's progress bar.
    """
    assert job.method is not None, "resolved"
    result = compare_with_dense(
        pipe,
        video.prompt,
        job.clip_of(video),
        method=job.method,
        preset=job.preset if isinstance(job.preset, Preset) else None,
        schedule=job.schedule or Schedule(),
        kernel=job.kernel,
        dense_kernel=job.dense_kernel,
        timed=job.timed,
        metrics=job.metrics,
        label=f"{rank}{video.target.name}, ",
        inputs=job.inputs,
    )
    seconds, summary, report = result.sparse.seconds, result.summary, result.to_dict()
    more: dict[str, Any] = {"image_prompt": seen} if seen else {}
    about = dense = None
    if settings is not None:
        kept = settings.of(video, summary)
        more["settings"], about = kept.to_dict(), kept.about()
        dense = settings.of(video, result.dense_summary, dense=True).about()
    files = write_comparison(result, video.target, about=about, dense_about=dense)
    if more:
        report |= more
        write_json(files["report"], report)
    return Generated(video.prompt, video.seed, files, seconds, summary, "", report, seen)


def _made(
    pipe: Any, job: Job, video: Video, settings: Settings | None, *, seen: str, rank: str
) -> Generated:
    """Make a video by the method alone; arguments as in `_compared`."""
    start, files, extension = time.perf_counter(), {}, ""
    clip, target = job.clip_of(video), video.target
    assert clip.fps is not None
    options: dict[str, Any] = {"schedule": job.schedule, "kernel": job.kernel, "timed": job.timed}
    options["dense_kernel"] = job.dense_kernel
    if job.preset is not None:
        options |= {"preset": job.preset, "from_lora": job.from_lora}
    elif job.from_lora is not None:
        options["from_lora"] = job.from_lora
    else:
        options["method"] = job.method
    with steps_bar() as bar:
        with ExitStack() as stack:
            handle = stack.enter_context(attach(pipe, **options))
            longer = None
            if job.techniques:
                assert clip.frames is not None
                lengths = {"num_frames": clip.frames, "trained_frames": job.trained_frames}
                longer = stack.enter_context(extend(pipe, job.techniques, **lengths))
                extension = longer.describe()
            make = denoise if is_streamed(pipe) else sample
            seen_by: dict[str, Any] = {"tick": ticker(bar, rank + target.name)}
            if job.preview is not None:
                preview = Preview(pipe, clip, preview_of(target), job.preview)
                seen_by = stack.enter_context(preview.seeing(seen_by["tick"]))
            with handle.gathering():
                taken = make(pipe, video.prompt, clip, run=longer, inputs=job.inputs, **seen_by)
            summary = handle.summary()
        about = None if settings is None else settings.of(video, summary).about()
        if isinstance(taken, Sample):
            files["video"] = write_video(taken.video, target, fps=clip.fps, about=about)
        else:
            if video.latents is not None:
                files["latents"] = save_latents(
                    video.latents, taken.latents, _about(job, video, seen)
                )
            files["video"] = _write(pipe, taken.latents, target, clip.fps, bar, rank, about)
    seconds = time.perf_counter() - start
    if job.preview is not None and os.path.exists(preview_of(target)):
        files["preview"] = preview_of(target)
    others = [*comparison_files(target), preview_of(target)]
    if stale := [str(f) for f in others if os.path.exists(f) and f not in files.values()]:
        print(f"of an earlier video: {', '.join(stale)}", file=sys.stderr)
    return Generated(video.prompt, video.seed, files, seconds, summary, extension, image=seen)


def _about(job: Job, video: Video, seen: str) -> dict[str, Any]:
    """Collect the metadata of a file of latents."""
    return {
        "prompt": video.prompt,
        **asdict(job.clip_of(video)),
        "model": str(job.model),
        "method": str(job.method),
        **job.attention(),
        "techniques": [*job.techniques],
        **({"image_prompt": seen} if seen else {}),
    }


def _write(
    pipe: Any,
    latents: Tensor,
    target: Path,
    fps: float,
    bar: "Progress",
    rank: str = "",
    about: Mapping[str, str] | None = None,
) -> Path:
    tick = ticker(bar, f"{rank}{target.name}, decoding", "frames")
    chunks = counted(decode_stream(pipe, latents), tick, pixel_frames(pipe, latents))
    return write_stream(chunks, target, fps=fps, about=about)
