"""Generate videos with any diffusers video pipeline: load, attach, denoise, decode into a file."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress
from torch import Tensor

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.summary import Summary
from gen_accel.kernels import check_kernel
from gen_accel.measure import write_json, write_video
from gen_accel.measure.video_io import check_writable, write_stream
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.compare import (
    beside,
    compare_with_dense,
    comparison_files,
    write_comparison,
)
from gen_accel.pipelines.generation.decode import (
    check_latents_path,
    decode_stream,
    is_streamed,
    load_latents,
    save_latents,
)
from gen_accel.pipelines.generation.image_input import ImageInput
from gen_accel.pipelines.generation.loading import (
    Loading,
    check_latents_of,
    check_model,
    find_device,
    load,
    load_decoder,
)
from gen_accel.pipelines.generation.sampling import (
    FPS,
    Clip,
    Sample,
    check_clip,
    counted,
    denoise,
    filled,
    pixel_frames,
    sample,
    steps_bar,
    ticker,
)
from gen_accel.pipelines.long_video import check_names, extend


@dataclass(frozen=True)
class Generated:
    """What one prompt came to.

    Args:
        files: what was written, by what it is.
        seconds: from the prompt to the file; of a comparison, to the pixels.
        extension: what each long-video technique did, a line each.
        report: of the comparison, where one was asked for.
        image: what the image prompt is, where there is one.
    """

    prompt: str
    seed: int
    files: dict[str, Path]
    seconds: float
    summary: Summary
    extension: str = ""
    report: dict[str, Any] | None = None
    image: str = ""


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    out: str | Path,
    method: Any = None,
    from_lora: str | Path | None = None,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    clip: Clip | None = None,
    loading: Loading | None = None,
    compare: bool = False,
    timed: bool = False,
    techniques: Sequence[str] | None = None,
    trained_frames: int | None = None,
    latents: str | Path | None = None,
    image: ImageInput | None = None,
    numbered: bool = False,
    resume: bool = False,
) -> list[Generated]:
    """Load a pipeline, attach `method`, and write a video for each prompt.

        generate("models/Wan2.1", ["a cat surfs"], out="cat.mp4", method=Radial())

    All that can be refused is refused before the first step. Progress goes to stderr. Frames go
    to the file as they are decoded: memory does not grow with their number, see `decode_stream`,
    but with `compare`, which holds both videos. Pipelines of other families than those of
    `decode.STREAMED` check frames and sizes when they are called, and decode by themselves.

    Under `accelerate launch` the processes share several prompts out among them, each on a device
    of its own; a prompt's seed and files do not depend on how many there are. Beside each of
    several outputs lies a small file, `out-000.mp4.done.json`, with what it was made from.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub.
        out: .mp4, .gif, .png or no suffix, see `write_video`. Several prompts give `out-000.mp4`
            and so on.
        from_lora: a folder of `gen_accel.lora.train` instead of a method: its weights are loaded,
            and what it was trained with is attached. One that holds its guidance runs without,
            unless `clip` says otherwise, and one that names techniques runs with these where the
            video is longer than the model's, unless `techniques` are given.
        compare: also generate densely from the same seed, and write `out.dense.mp4`,
            `out.side_by_side.mp4` and `out.json` with speed-up, density, PSNR and SSIM.
        timed: also measure the seconds spent in attention; on a GPU that waits for each call.
        techniques: for video longer than the model was trained on, see `long_video.extend`. None:
            those that `from_lora` names; none at all: ().
        trained_frames: what the model was trained at, where its family does not say.
        latents: a .safetensors file for what is decoded, numbered as `out` is; written before
            decoding. `decode_latents` makes the video from it again. Of a pipeline that decodes
            by itself none are kept.
        image: what every video goes by, beside its prompt.
        numbered: treat one prompt as several are: its output is `out-000.mp4`, and what it was
            made from lies beside it.
        resume: of several prompts, leave those alone whose files are there and were made from the
            same: model, LoRAs, prompt, seed, sizes, method, schedule, dtype, images and so on.
            Where and by which kernel it is computed counts with `compare` only.

    Returns:
        What was made, in the order of the prompts: all of it in the main process, nothing in the
        others.

    Raises:
        ValueError: no prompt, a model, size, method, kernel, technique, image, adapter or file
            name that will not do, or a technique or latents together with `compare`.
        OSError: a file or repository that is not there, or a folder that cannot be written.
    """
    clip, loading, named = clip or Clip(), loading or Loading(), False
    if from_lora is not None:
        if method is not None or compare:
            raise ValueError(f"from_lora {from_lora} brings its own method, and has no compare")
        method, loading, clip = _trained(from_lora, loading, clip)
        named = techniques is None
        if named:
            techniques, trained_frames = _techniques_of(from_lora, trained_frames)
    elif method is None:
        raise ValueError("give a method, or from_lora")
    techniques = techniques or ()
    if not prompts:
        raise ValueError("no prompts: give one, or a file with one on each line")
    if compare:
        _check_comparison(method, techniques, latents)
    _check_techniques(techniques, trained_frames)
    kernels.check_name(kernel)
    check_model(model)
    if kernel != "auto":
        check_kernel(kernel, find_device(loading.device))
    several = numbered or len(prompts) > 1
    kept = None if latents is None else Path(latents)
    jobs = _jobs(prompts, clip, Path(out), kept, several=several)
    for job in jobs:
        job.check_files(compare)
    image = None if image is None else image.opened()
    request = prompt_list.sources(model, loading, from_lora) | {
        "image": None if image is None else image.identity(),
        "method": str(method),
        "schedule": str(schedule),
        "techniques": [*techniques],
        "trained_frames": trained_frames,
    }
    if compare:
        request["compare"] = {"kernel": kernel, "timed": timed, "device": loading.device}
    left = [*range(len(jobs))]
    if several and resume:
        left = [i for i in left if not jobs[i].is_done(request)]

    share, state, rank = left, None, ""
    if several:
        state = prompt_list.join(loading.device)
        state.wait_for_everyone()  # all have seen what is done before one goes on
        share = left[state.process_index :: state.num_processes]
        if state.is_main_process and len(left) < len(jobs):
            print(prompt_list.what_is_done([job.target for job in jobs], left), file=sys.stderr)
        if state.num_processes > 1:
            rank = f"{state.process_index}: "
            device = str(state.device)
            if loading.device in ("auto", device.partition(":")[0]):
                loading = replace(loading, device=device)
    if not share:
        return prompt_list.gathered({}, state)

    if latents is not None:
        check_latents_of(model)
    pipe = load(model, loading)
    clip = filled(pipe, clip)
    if named and not _is_longer(clip, trained_frames):
        techniques, trained_frames = (), None
    if techniques and clip.frames is None:
        kind = type(pipe).__name__
        raise ValueError(f"frames must be given with {techniques[0]}: {kind} has no default")
    check_clip(pipe, clip, method)
    # The pipeline is this function's own: what is put on it stays.
    seen = "" if image is None else image.load(pipe).describe()
    options: dict[str, Any] = {"schedule": schedule, "kernel": kernel, "timed": timed}
    options |= {"method": method} if from_lora is None else {"from_lora": from_lora}
    longer: dict[str, Any] = {"techniques": techniques, "trained_frames": trained_frames}
    about = {"model": str(model), "method": str(method), "techniques": [*techniques]}
    about |= {"image_prompt": seen} if seen else {}

    made = {}
    for i in share:
        job = jobs[i]._replace(clip=replace(clip, seed=jobs[i].clip.seed), rank=rank)
        prompt_list.forget_done(job.target)
        if compare:
            made[i] = _compared(pipe, job, seen, **options)
        else:
            made[i] = _made(pipe, job, options=options, about=about, **longer)
            if stale := [str(file) for file in comparison_files(job.target) if file.exists()]:
                print(f"of an earlier video: {', '.join(stale)}", file=sys.stderr)
        if several:
            files = [*made[i].files.values()]
            prompt_list.write_done(job.target, jobs[i].asked(request), asdict(job.clip), files)
    return prompt_list.gathered(made, state)


def decode_latents(
    model: str | Path,
    latents: str | Path,
    *,
    out: str | Path,
    fps: float | None = None,
    loading: Loading | None = None,
) -> Path:
    """Write the video of latents that `generate` kept. Only the autoencoder is loaded.

    Args:
        model: as of `generate`; the one that made the latents, or one with its autoencoder.
        latents: the .safetensors file.
        out: .mp4, .gif, .png or no suffix, see `write_video`.
        fps: frames a second; without, those of the file, or 16 where it states none.

    Returns:
        The file or folder written.

    Raises:
        ValueError: a model, file or file name that will not do.
        OSError: a file or repository that is not there, or a folder that cannot be written.
    """
    values, about = load_latents(latents)
    check_model(model)
    target = Path(out)
    check_writable(target, frames=1 if values.shape[2] == 1 else None)
    rate = about.get("fps") if fps is None else fps
    rate = FPS if rate is None else rate
    Clip(fps=rate)  # refused before the autoencoder is loaded
    pipe = load_decoder(model, loading)
    with steps_bar() as bar:
        return _write(pipe, values, target, rate, bar)


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


class _Job(NamedTuple):
    """One prompt.

    Args:
        clip: with its own seed.
        target: of the video.
        latents: where they are kept.
        rank: of the process, before the lines of its progress bar.
    """

    prompt: str
    clip: Clip
    target: Path
    latents: Path | None
    rank: str = ""

    def asked(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the video depends on: `request`, which all have in common, and what is its own."""
        return request | {"prompt": self.prompt, **asdict(self.clip)}

    def is_done(self, request: dict[str, Any]) -> bool:
        return prompt_list.is_done(self.target, self.asked(request), self.latents)

    def check_files(self, compare: bool) -> None:
        """Raises now what writing them would raise after the work."""
        check_writable(self.target, frames=self.clip.frames)
        if compare:
            for name in ("dense", "side_by_side"):
                check_writable(beside(self.target, name), frames=self.clip.frames)
        if self.latents is not None:
            check_latents_path(self.latents)


def _jobs(
    prompts: Sequence[str], clip: Clip, out: Path, latents: Path | None, *, several: bool
) -> list[_Job]:
    def names(path: Path) -> list[Path]:
        return prompt_list.numbered(path, len(prompts)) if several else [path]

    kept = [None] * len(prompts) if latents is None else names(latents)
    each = zip(prompts, names(out), kept, strict=True)
    return [
        _Job(prompt, replace(clip, seed=clip.seed + i), target, path)
        for i, (prompt, target, path) in enumerate(each)
    ]


def _trained(from_lora: str | Path, loading: Loading, clip: Clip) -> tuple[Any, Loading, Clip]:
    """The method of a LoRA, what is to be loaded for it, and the clip with its guidance."""
    recipe = read_recipe(from_lora)
    if recipe.part != "transformer":
        raise ValueError(
            f"from_lora {from_lora} is for {recipe.part}: load it in Python, by "
            "pipe.load_lora_weights(folder, load_into_transformer_2=True)"
        )
    if recipe.rank:  # without, the method's own parameters are all that was trained
        loading = replace(loading, loras=(*loading.loras, str(from_lora)))
    if recipe.holds_guidance and clip.guidance_scale is None:
        if clip.negative_prompt is not None:
            raise ValueError(
                f"negative_prompt {clip.negative_prompt!r} needs guidance, and from_lora "
                f"{from_lora} holds it: leave it out, or give a guidance_scale above 1"
            )
        clip = replace(clip, guidance_scale=1.0)
    return recipe.build_method(), loading, clip


def _techniques_of(
    from_lora: str | Path, trained_frames: int | None
) -> tuple[Sequence[str], int | None]:
    """What a LoRA is sampled with, and what its model was trained at."""
    recipe = read_recipe(from_lora)
    if not recipe.techniques:
        return (), trained_frames
    return recipe.techniques, trained_frames or recipe.trained_frames


def _is_longer(clip: Clip, trained_frames: int | None) -> bool:
    frames = clip.frames
    return frames is not None and trained_frames is not None and frames > trained_frames


def _check_comparison(method: Any, techniques: Sequence[str], latents: str | Path | None) -> None:
    if isinstance(method, Dense):
        raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
    if techniques or latents is not None:
        raise ValueError(
            "compare goes with neither long-video techniques nor saved latents, got "
            f"{', '.join(techniques) or latents}"
        )


def _check_techniques(techniques: Sequence[str], trained_frames: int | None) -> None:
    check_names(techniques)
    if trained_frames is not None and not techniques:
        raise ValueError(f"trained_frames is for a technique, got {trained_frames} and none")


def _compared(
    pipe: Any, job: _Job, seen: str, *, schedule: Schedule | None, **options: Any
) -> Generated:
    """
    Args:
        seen: what the image prompt is.
    """
    options |= {"schedule": schedule or Schedule(), "label": f"{job.rank}{job.target.name}, "}
    result = compare_with_dense(pipe, job.prompt, job.clip, **options)
    files = write_comparison(result, job.target)
    seconds, summary, report = result.sparse.seconds, result.summary, result.to_dict()
    if seen:
        report["image_prompt"] = seen
        write_json(files["report"], report)
    return Generated(job.prompt, job.clip.seed, files, seconds, summary, "", report, seen)


def _made(
    pipe: Any,
    job: _Job,
    *,
    options: dict[str, Any],
    techniques: Sequence[str],
    trained_frames: int | None,
    about: dict[str, Any],
) -> Generated:
    """
    Args:
        options: of `attach`.
        about: what is kept with the latents beside prompt and clip.
    """
    start, files, extension = time.perf_counter(), {}, ""
    prompt, clip, target = job.prompt, job.clip, job.target
    assert clip.fps is not None
    with steps_bar() as bar:
        with ExitStack() as stack:
            handle = stack.enter_context(attach(pipe, **options))
            longer = None
            if techniques:
                assert clip.frames is not None
                lengths = {"num_frames": clip.frames, "trained_frames": trained_frames}
                longer = stack.enter_context(extend(pipe, techniques, **lengths))
                extension = longer.describe()
            make = denoise if is_streamed(pipe) else sample
            tick = ticker(bar, job.rank + target.name)
            with handle.gathering():
                taken = make(pipe, prompt, clip, tick=tick, run=longer)
            summary = handle.summary()
        if isinstance(taken, Sample):
            files["video"] = write_video(taken.video, target, fps=clip.fps)
        else:
            if job.latents is not None:
                about = {"prompt": prompt, **asdict(clip)} | about
                files["latents"] = save_latents(job.latents, taken.latents, about)
            files["video"] = _write(pipe, taken.latents, target, clip.fps, bar, job.rank)
    seconds, seen = time.perf_counter() - start, about.get("image_prompt", "")
    return Generated(prompt, clip.seed, files, seconds, summary, extension, image=seen)


def _write(
    pipe: Any, latents: Tensor, target: Path, fps: float, bar: Progress, rank: str = ""
) -> Path:
    tick = ticker(bar, f"{rank}{target.name}, decoding", "frames")
    chunks = counted(decode_stream(pipe, latents), tick, pixel_frames(pipe, latents))
    return write_stream(chunks, target, fps=fps)
