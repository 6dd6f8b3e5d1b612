"""Generate videos with any diffusers video pipeline: load, attach, denoise, decode into a file."""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.measure import write_json
from gen_accel.measure.video_io import check_writable, write_stream
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.compare import beside, compare_with_dense, write_comparison
from gen_accel.pipelines.decode import (
    check_latents_path,
    decode_stream,
    load_latents,
    save_latents,
)
from gen_accel.pipelines.image_prompt import ImagePrompt, load_image_prompt
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.image_prompt.formats import find_adapter, read_adapter
from gen_accel.pipelines.long_video import TECHNIQUES, extend
from gen_accel.pipelines.recipe import read_recipe
from gen_accel.pipelines.sampling import (
    Clip,
    Loading,
    check_fits,
    check_model,
    counted,
    denoise,
    filled,
    find_device,
    load,
    load_decoder,
    pixel_frames,
    steps_bar,
    ticker,
    token_grid,
)
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.summary import Summary

DONE = ".done.json"  # behind the name of an output: what it was made from


@dataclass(frozen=True)
class ImageInput:
    """Images that the videos go by, beside their texts. Pictures are files or PIL images.

    Args:
        images: several act together.
        adapter: what reads them, see `load_image_prompt`: a file, a folder, a repository of the
            hub, or "demo".
        scale: 1 is as it was trained, 0 the model without.
        negative: what the negative prompt goes by; without, "no image".
        masks: white where an image acts, black where it does not: one for all, or one for each.
        encoder: folder or hub repository of a CLIP vision model, where the adapter needs one and
            neither its file nor the pipeline says which.
    """

    images: tuple[Any, ...]
    adapter: Any
    scale: float = 1.0
    negative: Any = None
    masks: tuple[Any, ...] = ()
    encoder: Any = None

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError(f"an image prompt needs an image; adapter {self.adapter} has none")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale of an image prompt must be finite, got {self.scale}")
        if len(self.masks) not in (0, 1, len(self.images)):
            raise ValueError(
                f"masks must be one, or one for each of {len(self.images)} images, got "
                f"{len(self.masks)}"
            )

    def opened(self) -> "ImageInput":
        """With all pictures read, and the adapter found and looked at.

        Raises:
            FileNotFoundError: no such image, or no adapter.
            ValueError: what is no image, or no adapter.
        """
        path = find_adapter(self.adapter)
        read_adapter(path)  # refused before a model is loaded
        return replace(
            self,
            images=tuple(as_rgb(image) for image in self.images),
            adapter=path,
            negative=None if self.negative is None else as_rgb(self.negative),
            masks=tuple(as_rgb(mask).convert("L") for mask in self.masks),
        )

    def load(self, pipe: Any) -> ImagePrompt:
        """Put it on a pipeline."""
        prompt = load_image_prompt(
            pipe, self.adapter, scale=self.scale, image_encoder=self.encoder
        )
        try:
            masks = None if not self.masks else [*self.masks]
            if masks is not None and len(masks) == 1:  # for all images
                masks = masks[0]
            prompt.set_image([*self.images], negative=self.negative, mask=masks)
        except BaseException:
            prompt.remove()
            raise
        return prompt


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
    techniques: Sequence[str] = (),
    trained_frames: int | None = None,
    latents: str | Path | None = None,
    image: ImageInput | None = None,
    resume: bool = False,
) -> list[Generated]:
    """Load a pipeline, attach `method`, and write a video for each prompt.

        generate("models/Wan2.1", ["a cat surfs"], out="cat.mp4", method=Radial())

    All that can be refused is refused before the first step. Progress goes to stderr. Frames go
    to the file as they are decoded: memory does not grow with their number, see `decode_stream`,
    but with `compare`, which holds both videos.

    Under `accelerate launch` the processes share several prompts out among them, each on a device
    of its own; a prompt's seed and files do not depend on how many there are. Beside each of
    several outputs lies a small file, `out-000.mp4.done.json`, with what it was made from.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub.
        out: .mp4, .gif, .png or no suffix, see `write_video`. Several prompts give `out-000.mp4`
            and so on.
        from_lora: a folder of `gen_accel.lora.train` instead of a method: its weights are loaded,
            and what it was trained with is attached.
        compare: also generate densely from the same seed, and write `out.dense.mp4`,
            `out.side_by_side.mp4` and `out.json` with speed-up, density, PSNR and SSIM.
        timed: also measure the seconds spent in attention; on a GPU that waits for each call.
        techniques: for video longer than the model was trained on, see `long_video.extend`.
        trained_frames: what the model was trained at, where its family does not say.
        latents: a .safetensors file for what is decoded, numbered as `out` is; written before
            decoding. `decode_latents` makes the video from it again.
        image: what every video goes by, beside its prompt.
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
    clip, loading = clip or Clip(), loading or Loading()
    if from_lora is not None:
        if method is not None or compare:
            raise ValueError(f"from_lora {from_lora} brings its own method, and has no compare")
        recipe = read_recipe(from_lora)
        if recipe.part != "transformer":
            raise ValueError(
                f"from_lora {from_lora} is for {recipe.part}: load it in Python, by "
                "pipe.load_lora_weights(folder, load_into_transformer_2=True)"
            )
        method = recipe.build_method()
        if recipe.rank:  # without, the method's own parameters are all that was trained
            loading = replace(loading, loras=(*loading.loras, str(from_lora)))
    elif method is None:
        raise ValueError("give a method, or from_lora")
    if not prompts:
        raise ValueError("no prompts: give one, or a file with one on each line")
    if compare and isinstance(method, Dense):
        raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
    if compare and (techniques or latents is not None):
        raise ValueError(
            "compare goes with neither long-video techniques nor saved latents, got "
            f"{', '.join(techniques) or latents}"
        )
    for name in techniques:
        if name not in TECHNIQUES:
            raise ValueError(f"technique must be one of {', '.join(TECHNIQUES)}, got {name!r}")
    if trained_frames is not None and not techniques:
        raise ValueError(f"trained_frames is for a technique, got {trained_frames} and none")
    kernels.check_name(kernel)
    check_model(model)
    targets = _targets(Path(out), len(prompts))
    for target in targets:
        check_writable(target, frames=clip.frames)
        if compare:
            for name in ("dense", "side_by_side"):
                check_writable(beside(target, name), frames=clip.frames)
    kept = [None] * len(prompts) if latents is None else _targets(Path(latents), len(prompts))
    for path in kept:
        if path is not None:
            check_latents_path(path)
    image = None if image is None else image.opened()
    request = _sources(model, loading, from_lora, image) | {
        "method": str(method),
        "schedule": str(schedule),
        "techniques": [*techniques],
        "trained_frames": trained_frames,
    }
    if compare:
        request["compare"] = {"kernel": kernel, "timed": timed, "device": loading.device}
    asked = []
    for i, (prompt, path) in enumerate(zip(prompts, kept, strict=True)):
        asked.append(request | {"prompt": prompt, **asdict(replace(clip, seed=clip.seed + i))})
        if path is not None:
            asked[i]["latents"] = str(path)
    records = [target.with_name(target.name + DONE) for target in targets]
    several, left = len(prompts) > 1, [*range(len(prompts))]
    if several and resume:
        left = [i for i in left if not _is_done(records[i], asked[i])]

    share, state, rank = left, None, ""
    if several:
        state = _join(loading.device)
        state.wait_for_everyone()  # all have seen what is done before one goes on
        share = left[state.process_index :: state.num_processes]
        if state.is_main_process and len(left) < len(prompts):
            print(_what_is_done(targets, left), file=sys.stderr)
        if state.num_processes > 1:
            rank = f"{state.process_index}: "
            device = str(state.device)
            if loading.device in ("auto", device.partition(":")[0]):
                loading = replace(loading, device=device)
    if not share:
        return _gathered({}, state)

    pipe = load(model, loading)
    clip = filled(pipe, clip)
    check_fits(method, token_grid(pipe, clip))
    # The pipeline is this function's own: what is put on it stays.
    seen = "" if image is None else image.load(pipe).describe()
    lengths: dict[str, Any] = {"num_frames": clip.frames, "trained_frames": trained_frames}

    made = {}
    for i in share:
        prompt, target, path = prompts[i], targets[i], kept[i]
        one = replace(clip, seed=clip.seed + i)
        records[i].unlink(missing_ok=True)
        options: dict[str, Any] = {"schedule": schedule, "kernel": kernel, "timed": timed}
        if compare:
            options["schedule"] = schedule or Schedule()
            result = compare_with_dense(pipe, prompt, one, method=method, **options)
            files = write_comparison(result, target)
            seconds, summary = result.sparse.seconds, result.summary
            report = result.to_dict()
            if seen:
                report["image_prompt"] = seen
                write_json(files["report"], report)
            made[i] = Generated(prompt, one.seed, files, seconds, summary, "", report, seen)
        else:
            start, files, extension = time.perf_counter(), {}, ""
            with steps_bar() as bar:
                with ExitStack() as stack:
                    what = {"method": method} if from_lora is None else {"from_lora": from_lora}
                    handle = stack.enter_context(attach(pipe, **what, **options))
                    longer = None
                    if techniques:
                        longer = stack.enter_context(extend(pipe, techniques, **lengths))
                        extension = longer.describe()
                    tick = ticker(bar, rank + target.name)
                    taken = denoise(pipe, prompt, one, tick=tick, run=longer)
                    summary = handle.summary()
                if path is not None:
                    about = {"model": str(model), "prompt": prompt, **asdict(one)}
                    about |= {"method": str(method), "techniques": [*techniques]}
                    about |= {"image_prompt": seen} if seen else {}
                    files["latents"] = save_latents(path, taken.latents, about)
                files["video"] = _write(pipe, taken.latents, target, one.fps, bar, rank)
            seconds = time.perf_counter() - start
            made[i] = Generated(prompt, one.seed, files, seconds, summary, extension, image=seen)
        if several:
            sizes = {os.path.relpath(f, target.parent): _bytes(f) for f in files.values()}
            write_json(records[i], {"asked": asked[i], "bytes": sizes})
    return _gathered(made, state)


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
        fps: frames a second; without, those of the file.

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
    clip = Clip(fps=about.get("fps", Clip.fps) if fps is None else fps)
    pipe = load_decoder(model, loading)
    with steps_bar() as bar:
        return _write(pipe, values, target, clip.fps, bar)


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


def _write(
    pipe: Any, latents: Tensor, target: Path, fps: float, bar: Progress, rank: str = ""
) -> Path:
    tick = ticker(bar, f"{rank}{target.name}, decoding", "frames")
    chunks = counted(decode_stream(pipe, latents), tick, pixel_frames(pipe, latents))
    return write_stream(chunks, target, fps=fps)


def _targets(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(count)]


def _join(device: str) -> PartialState:
    """This process among those of `accelerate launch`, or alone."""
    # The first to be ready wait for the others' videos.
    return PartialState(cpu=find_device(device).type == "cpu", timeout=timedelta(days=7))


def _gathered(made: Mapping[int, Generated], state: PartialState | None) -> list[Generated]:
    if state is None or state.num_processes == 1:
        return [*made.values()]
    everyones = dict(gather_object([(i, _without_tensors(one)) for i, one in made.items()]))
    return [everyones[i] for i in sorted(everyones)] if state.is_main_process else []


def _without_tensors(made: Generated) -> Generated:
    """Those of the records are on a device that may be another process's own."""
    records = {
        key: replace(record, kept=float(record.kept), computed=float(record.computed))
        for key, record in made.summary.records.items()
    }
    return replace(made, summary=replace(made.summary, records=records))


def _is_done(record: Path, asked: Mapping[str, Any]) -> bool:
    """Whether all of the files that `record` tells of are there whole, and are what is asked."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a power cut may leave it empty
        return False
    same = all(found["asked"].get(name) == value for name, value in asked.items())
    return same and all(
        _bytes(record.parent / name) == size for name, size in found["bytes"].items()
    )


def _bytes(path: Path) -> int | None:
    """Of a file, or of all files in a folder; None where neither is."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size if path.exists() else None


def _sources(
    model: str | Path, loading: Loading, from_lora: str | Path | None, image: ImageInput | None
) -> dict[str, Any]:
    """What a video is made from: files told apart by more than their names, and images, opened, by
    their pixels."""
    seen = None
    if image is not None:
        pictures = {"images": image.images, "negative": [image.negative], "masks": image.masks}
        seen = {name: [_pixels(one) for one in some] for name, some in pictures.items()} | {
            "adapter": _identity(image.adapter),
            "scale": image.scale,
            "encoder": None if image.encoder is None else _identity(image.encoder),
        }
    return {
        "model": _identity(model),
        "dtype": loading.dtype,
        "loras": [_identity_of_lora(lora) for lora in loading.loras],
        "from_lora": None if from_lora is None else _identity(from_lora),
        "image": seen,
    }


def _identity(source: Any) -> str:
    """Of files, a hash of their names, sizes and times; of a repository on the hub, its name."""
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    about = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _identity_of_lora(lora: str) -> str:
    """Of "folder:0.5", where the colon is not a part of the name, with its weight."""
    source, colon, weight = lora.rpartition(":")
    if not colon or Path(lora).expanduser().exists():
        return _identity(lora)
    return f"{_identity(source)}:{weight}"


def _pixels(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    return f"{image.width} x {image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"


def _what_is_done(targets: Sequence[Path], left: Sequence[int]) -> str:
    spans: list[list[Path]] = []
    for i, target in enumerate(targets):
        if i in left:
            continue
        if i > 0 and i - 1 not in left:
            spans[-1] = [spans[-1][0], target]
        else:
            spans.append([target])
    names = ", ".join(" to ".join(path.name for path in span) for span in spans)
    return f"{len(targets) - len(left)} of {len(targets)} are done already: {names}"
