"""Generate videos with any diffusers video pipeline: load, attach, denoise, decode into a file."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
    load,
    load_decoder,
    pixel_frames,
    steps_bar,
    ticker,
    token_grid,
)
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.summary import Summary


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
) -> list[Generated]:
    """Load a pipeline, attach `method`, and write a video for each prompt.

        generate("models/Wan2.1", ["a cat surfs"], out="cat.mp4", method=Radial())

    All that can be refused is refused before the first step. Progress goes to stderr. Frames go
    to the file as they are decoded: memory does not grow with their number, see `decode_stream`,
    but with `compare`, which holds both videos.

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
    pipe = load(model, loading)
    clip = filled(pipe, clip)
    check_fits(method, token_grid(pipe, clip))
    # The pipeline is this function's own: what is put on it stays.
    seen = "" if image is None else image.load(pipe).describe()
    lengths: dict[str, Any] = {"num_frames": clip.frames, "trained_frames": trained_frames}

    made = []
    for i, (prompt, target, path) in enumerate(zip(prompts, targets, kept, strict=True)):
        one = replace(clip, seed=clip.seed + i)
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
            made.append(Generated(prompt, one.seed, files, seconds, summary, "", report, seen))
            continue
        start, files, extension = time.perf_counter(), {}, ""
        with steps_bar() as bar:
            with ExitStack() as stack:
                what = {"method": method} if from_lora is None else {"from_lora": from_lora}
                handle = stack.enter_context(attach(pipe, **what, **options))
                longer = None
                if techniques:
                    longer = stack.enter_context(extend(pipe, techniques, **lengths))
                    extension = longer.describe()
                taken = denoise(pipe, prompt, one, tick=ticker(bar, target.name), run=longer)
                summary = handle.summary()
            if path is not None:
                about = {"model": str(model), "prompt": prompt, **asdict(one)}
                about |= {"method": str(method), "techniques": [*techniques]}
                about |= {"image_prompt": seen} if seen else {}
                files["latents"] = save_latents(path, taken.latents, about)
            files["video"] = _write(pipe, taken.latents, target, one.fps, bar)
        seconds = time.perf_counter() - start
        made.append(Generated(prompt, one.seed, files, seconds, summary, extension, image=seen))
    return made


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


def _write(pipe: Any, latents: Tensor, target: Path, fps: float, bar: Progress) -> Path:
    tick = ticker(bar, f"{target.name}, decoding", "frames")
    chunks = counted(decode_stream(pipe, latents), tick, pixel_frames(pipe, latents))
    return write_stream(chunks, target, fps=fps)


def _targets(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(count)]
