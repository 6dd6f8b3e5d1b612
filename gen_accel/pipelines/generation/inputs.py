"""Pictures and video fitted to a pipeline: sizes and frames of a clip, arguments of a call.

A function that `PipelineInputs.by` names makes the arguments of its classes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image

from gen_accel.attention_processors.families.base import PipelineInputs
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.attention_processors.lengths import patch_of, vae_factor
from gen_accel.io import file_sha256, folder_sha256
from gen_accel.measure.video_io import frames_of, pixels, read_stream, video_fps
from gen_accel.paths import adapter_named, expanded
from gen_accel.pipelines.generation.config import (
    Clip,
    ConditioningFiles,
    ImagePromptConfig,
    PictureFile,
    VideoFile,
)
from gen_accel.pipelines.generation.sampling import (
    AnyClip,
    CallArguments,
    default_of,
    first_transformer,
    frame_rate,
    frames_argument,
    parameters,
)
from gen_accel.pipelines.image_prompt import ImagePrompt, load_image_prompt
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.image_prompt.formats import find_adapter, read_adapter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAID = 0.01  # least share of a picture whose loss is said
OVERLAP = 17  # frames that SkyReels-V2 goes on from, as its authors advise
GREY = 128  # of the frames that VACE makes

REMADE = ("remade", "control")  # roles of a video in which each frame answers to one of its own

Pictures: TypeAlias = Sequence[Image.Image]
Size: TypeAlias = tuple[int, int]  # height and width
Source: TypeAlias = "Path | np.ndarray | tuple[Image.Image, ...]"


class Picture(NamedTuple):
    """A picture in RGB.

    Args:
        name: for messages.
    """

    name: str
    image: Image.Image

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def width(self) -> int:
        return self.image.width


@dataclass(frozen=True)
class InputVideo:
    """A video whose frames are read when they are asked for.

    Args:
        name: for messages.
        source: a file, a folder of numbered PNG frames, (F, H, W, 3) uint8 or pictures.
        fps: frames a second; None if the source does not state it.
        height, width: in pixels, of its first frame.
    """

    name: str
    source: Source
    fps: float | None
    height: int
    width: int

    def frames(self) -> Iterator[Image.Image]:
        return _frames(self.source)

    def count(self, most: int) -> int:
        """Count the frames, as far as `most`."""
        return sum(1 for _ in islice(self.frames(), most))

    def identity(self) -> str:
        """Identify files by a hash of their bytes, others by a hash of their pixels."""
        if isinstance(self.source, Path):
            if self.source.is_dir():
                return folder_sha256(sorted(f for f in self.source.iterdir() if f.is_file()))
            return file_sha256(self.source)
        held = hashlib.sha256()
        for frame in self.frames():
            held.update(pixels(frame).encode())
        return held.hexdigest()


@dataclass(frozen=True)
class OpenedFiles:
    """Pictures and video that a video is made from, opened.

    Args:
        kinds: what is given, of `registry.KINDS`.
    """

    kinds: tuple[str, ...]
    image: Picture | None
    last_image: Picture | None
    video: InputVideo | None
    strength: float | None

    def identity(self) -> dict[str, str | float | None]:
        """Identify pictures by their pixels, and the video."""
        return {
            "image": None if self.image is None else pixels(self.image.image),
            "last_image": None if self.last_image is None else pixels(self.last_image.image),
            "video": None if self.video is None else self.video.identity(),
            "strength": self.strength,
        }


def open_files(given: ConditioningFiles) -> OpenedFiles:
    """Read the pictures and the first frame of the video.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no picture, or an array of another shape or type.
        OSError: a video that cannot be read.
    """
    return OpenedFiles(
        given.kinds,
        _picture(given.image, "the first frame"),
        _picture(given.last_image, "the last frame"),
        None if given.video is None else _film(given.video),
        given.strength,
    )


@dataclass(frozen=True)
class OpenedImages:
    """An image prompt with its pictures, opened.

    Args:
        adapter: file of the adapter.
        masks: one for all pictures, or one for each.
    """

    images: tuple[Image.Image, ...]
    adapter: Path
    scale: float
    negative: Image.Image | None
    masks: tuple[Image.Image, ...]
    encoder: str | None

    def identity(self) -> dict[str, list[str | None] | str | float | None]:
        return {
            "images": [*map(pixels, self.images)],
            "masks": [*map(pixels, self.masks)],
            "negative": [None if self.negative is None else pixels(self.negative)],
            "adapter": identity(self.adapter),
            "scale": self.scale,
            "encoder": None if self.encoder is None else identity(self.encoder),
        }

    def load(self, pipe: "DiffusionPipeline") -> ImagePrompt:
        """Load the adapter onto a pipeline, and set the pictures."""
        prompt = load_image_prompt(
            pipe, self.adapter, scale=self.scale, image_encoder=self.encoder
        )
        try:
            masks = self.masks[0] if len(self.masks) == 1 else [*self.masks] or None
            prompt.set_image([*self.images], negative=self.negative, mask=masks)
        except BaseException:
            prompt.remove()
            raise
        return prompt


def open_image_prompt(given: ImagePromptConfig) -> OpenedImages:
    """Read all pictures of an image prompt, and find and check the adapter.

    Raises:
        FileNotFoundError: an image or the adapter is missing.
        ValueError: a file is no image, or no adapter.
    """
    assert given.image_adapter is not None, "checked"
    path = find_adapter(adapter_named(given.image_adapter))
    read_adapter(path)  # refused before a model is loaded
    negative: Any = given.image_negative
    return OpenedImages(
        tuple(as_rgb(image) for image in given.image_prompt),
        path,
        given.image_scale,
        None if negative is None else as_rgb(negative),
        tuple(as_rgb(mask).convert("L") for mask in given.image_mask),
        given.image_encoder,
    )


def identity(source: str | Path) -> str:
    """Identify files by a hash of names, sizes and times, a hub repository by its name. Model
    cards do not count; folders that are links are followed, each once."""
    path = expanded(source)
    if not path.exists():
        return str(source)
    files, seen = [path] if path.is_file() else [], set[str]()
    for place, inner, held in os.walk(path, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            inner.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in held]
    about = [
        (str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(files)
        if f.suffix != ".md" and f.exists()  # a link to nowhere
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _picture(source: PictureFile, name: str) -> Picture | None:
    if source is None:
        return None
    if isinstance(source, np.ndarray):
        return Picture(name, next(_frames(source[None])))
    return Picture(Path(source).name if isinstance(source, str | Path) else name, as_rgb(source))


def _film(given: VideoFile) -> InputVideo:
    name, fps, source = "the video", None, None
    if isinstance(given, str | Path):
        source = expanded(given)
        name, fps = source.name, video_fps(source)
    elif isinstance(given, np.ndarray):
        source = given
    elif isinstance(given, Sequence) and given:
        source = tuple(as_rgb(frame) for frame in given)
        sizes = {frame.size for frame in source}
        if len(sizes) > 1:
            (width, height), (other_width, other_height) = sorted(sizes)[:2]
            raise ValueError(
                "frames of a video must have one size, got "
                f"{height} x {width} and {other_height} x {other_width}"
            )
    if source is None:
        raise ValueError(
            "video must be a file, a folder, (F, H, W, 3) uint8 or a list of pictures, got "
            f"{type(given).__name__}"
        )
    first = next(_frames(source), None)
    if first is None:
        raise ValueError(f"{name} holds no frame")
    return InputVideo(name, source, fps, first.height, first.width)


def _frames(source: Source) -> Iterator[Image.Image]:
    if isinstance(source, tuple):
        yield from source
        return
    chunks = read_stream(source) if isinstance(source, Path) else iter([source])
    for frame in frames_of(chunks):
        yield Image.fromarray(frame)


@dataclass(frozen=True)
class _Fitted:
    """Frames of the size of the clip, as the functions of `PipelineInputs.by` take them."""

    image: Image.Image | None
    last_image: Image.Image | None
    video: Pictures | None
    strength: float | None
    frames: int | None
    size: Size


def fit(
    pipe: "DiffusionPipeline", clip: AnyClip, given: OpenedFiles
) -> tuple[AnyClip, CallArguments]:
    """Fit pictures and video to a pipeline, and a `Clip` to them.

    Without a height and width the picture decides the aspect ratio, at the area of the model's
    default size. With them a picture of another shape is scaled to cover and cropped from its
    centre. A video that is remade decides the frames, unless the clip gives fewer.

    Args:
        given: a result of `open_files`.

    Raises:
        ValueError: a video that is too short, or that leaves nothing to make; frames that the
            pipeline cannot make; a strength that leaves no step.
    """
    row = takes(type(pipe).__name__)
    assert row is not None, "chosen"
    source = given.image or given.last_image or given.video
    assert source is not None, "given"
    told: list[str] = []
    size = None
    if "height" in parameters(pipe):
        size = _size_of(pipe, row, clip, source)
        if not (clip.height and clip.width):
            shape = f"{source.height} x {source.width}"
            told.append(f"{source.name}, {shape}, makes a video of {size[0]} x {size[1]}")
        clip = clip.model_copy(update={"height": size[0], "width": size[1]})
    video = None
    if given.video is not None:
        frames, video = _filmed(pipe, row, clip, given.video, given.strength, size, told)
        clip = clip.model_copy(update={"frames": frames})
    elif row.frames is not None:
        if clip.frames not in (None, row.frames):
            raise ValueError(
                f"{type(pipe).__name__} makes {row.frames} frames, got {clip.frames}: leave "
                "frames out"
            )
        clip = clip.model_copy(update={"frames": row.frames})
    image, last_image = (
        None if one is None else _covering(one, size, told)
        for one in (given.image, given.last_image)
    )
    frames = clip.frames or default_of(pipe, frames_argument(pipe))
    size = size or (source.height, source.width)
    whole = _Fitted(image, last_image, video, given.strength, frames, size)
    arguments = BY[row.by](pipe, row, whole)
    return clip, CallArguments(arguments, _share(pipe, row, clip, given), tuple(told))


def check_length(
    film: InputVideo, has: int, frames: int, row: PipelineInputs, strength: float | None
) -> None:
    """Refuse, by a ValueError, a video with fewer frames than are asked, or too many to go on.

    Args:
        has: number of frames of the video, as far as it matters.
        frames: number of frames to make.
    """
    role = row.role_of(strength)
    if role == "continued" and has >= frames:
        or_remade = ", or --strength to remake it" if row.strength else ""
        raise ValueError(
            f"{film.name} has {frames} frames or more, and the video that goes on from it has "
            f"{frames}: ask for more frames, or cut it{or_remade}"
        )
    if role in REMADE and has < frames:
        raise ValueError(
            f"{film.name} has {has} frames, and {frames} are asked: ask for fewer, or leave "
            "frames out"
        )


def _size_of(
    pipe: "DiffusionPipeline", row: PipelineInputs, clip: Clip, source: Picture | InputVideo
) -> Size:
    """Height and width of a clip, by the aspect ratio of a picture if they are open."""
    if clip.height and clip.width:
        return clip.height, clip.width
    factor = vae_factor(pipe, "spatial") or getattr(pipe, "vae_scale_factor", 1)
    _, *patch = patch_of(first_transformer(pipe).config)
    rows, columns = (math.lcm(row.multiple, factor * side) for side in patch)
    ratio = source.height / source.width
    if clip.height:
        return clip.height, max(1, round(clip.height / ratio / columns)) * columns
    if clip.width:
        return max(1, round(clip.width * ratio / rows)) * rows, clip.width
    area = math.prod(_default_size(pipe, row, factor))
    height, width = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    return max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns


def _default_size(pipe: "DiffusionPipeline", row: PipelineInputs, factor: int) -> Size:
    """Height and width that the pipeline would make."""
    height, width = default_of(pipe, "height"), default_of(pipe, "width")
    if height is not None and width is not None:
        return height, width
    if row.size is not None:
        return row.size
    config = first_transformer(pipe).config
    side = config.get("sample_size")
    height, width = config.get("sample_height", side), config.get("sample_width", side)
    if height is None or width is None:
        kind = type(pipe).__name__
        raise ValueError(f"{kind} has no default size: give a height and a width")
    return height * factor, width * factor


def _filmed(
    pipe: "DiffusionPipeline",
    row: PipelineInputs,
    clip: Clip,
    film: InputVideo,
    strength: float | None,
    size: Size | None,
    told: list[str],
) -> tuple[int | None, list[Image.Image]]:
    """Return the number of frames of a clip, and the frames of a video that it needs."""
    role, frames = row.role_of(strength), clip.frames
    remade = role in REMADE
    if not remade and frames is None:
        frames = default_of(pipe, frames_argument(pipe))
    most = None if frames is None or role == "prolonged" else frames + 1
    found = [
        frame if size is None else covered(frame, *size) for frame in islice(film.frames(), most)
    ]
    has, more = len(found), "more than " if frames is not None else ""
    if remade and frames is None:
        first, step = _lengths(pipe)
        frames = first + (has - first) // step * step
        if has < first:
            raise ValueError(f"{film.name} has {has} frames, and the model makes {first} at least")
    if frames is not None:
        check_length(film, has, frames, row, strength)
        if remade and has > frames:
            known = frames if more else has
            told.append(f"{film.name} has {more}{known} frames: its first {frames} are used")
            del found[frames:]
    told += _lost(film, size)
    rate = frame_rate(pipe, clip.fps)
    if film.fps is not None and abs(film.fps - rate) > 0.01 * rate:
        told.append(
            f"{film.name} has {film.fps:g} frames a second, and the video gets {rate:g}: "
            f"--fps {film.fps:g} keeps its speed"
        )
    return frames, found


def _lengths(pipe: "DiffusionPipeline") -> tuple[int, int]:
    """Least number of frames that a pipeline makes, and the step to the next ones."""
    factor = vae_factor(pipe, "temporal") or 1
    patch = patch_of(first_transformer(pipe).config)[0]
    return (patch - 1) * factor + 1, patch * factor


def _share(
    pipe: "DiffusionPipeline", row: PipelineInputs, clip: Clip, given: OpenedFiles
) -> float:
    """Share of the steps by which a video is remade. Raises ValueError if it leaves none."""
    if row.role_of(given.strength) != "remade" or not row.strength or given.video is None:
        return 1.0
    share = default_of(pipe, row.strength) if given.strength is None else given.strength
    steps = clip.steps or default_of(pipe, "num_inference_steps")
    if steps is not None and int(steps * share) < 1:
        raise ValueError(
            f"strength {share:g} of {steps} steps leaves none: ask for {math.ceil(1 / share)} "
            "steps or more, or a higher strength"
        )
    return share


def _covering(picture: Picture, size: Size | None, told: list[str]) -> Image.Image:
    told += _lost(picture, size)
    return picture.image if size is None else covered(picture.image, *size)


def covered(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture to cover a size, and crop it from its centre."""
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    rows, columns = min(height / scale, image.height), min(width / scale, image.width)
    top, left = (image.height - rows) / 2, (image.width - columns) / 2
    box = (left, top, left + columns, top + rows)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _lost(source: Picture | InputVideo, size: Size | None) -> list[str]:
    """Say how much of a picture is cropped, if it is much."""
    if size is None:
        return []
    (height, width), rows, columns = size, source.height, source.width
    scale = max(height / rows, width / columns)
    lost = 1 - (height / scale) * (width / scale) / (rows * columns)
    if lost < SAID:
        return []
    shape = f"{rows} x {columns}"
    return [f"{source.name}, {shape}, is cropped to {height} x {width}: {lost:.0%} is lost"]


def plain(pipe: "DiffusionPipeline", row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Pictures and frames under the names of the signature."""
    held = {
        row.image: given.image,
        row.last_image: given.last_image,
        row.video: None if given.video is None else [*given.video],
        row.strength: given.strength,
    }
    return {name: value for name, value in held.items() if name and value is not None}


def overlapping(pipe: "DiffusionPipeline", row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """A video to continue, by SkyReels-V2's diffusion forcing."""
    assert given.video is not None
    first, step = _lengths(pipe)
    if len(given.video) < first:
        raise ValueError(f"the video has {len(given.video)} frames, and {first} are needed")
    most = first + (len(given.video) - first) // step * step
    return {"video": [*given.video], "overlap_history": min(OVERLAP, most)}


def vace(pipe: "DiffusionPipeline", row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Frames with a mask: black frames of the mask are kept, white ones are made by what they
    show, grey where they show nothing."""
    if given.video is None and given.image is None and given.last_image is None:
        return {}
    assert given.frames is not None
    height, width = given.size
    grey = Image.new("RGB", (width, height), (GREY, GREY, GREY))
    white, black = (Image.new("L", (width, height), shade) for shade in (255, 0))
    video = [grey] * given.frames if given.video is None else [*given.video]
    mask = [white] * given.frames
    for place, picture in ((0, given.image), (-1, given.last_image)):
        if picture is not None:
            video[place], mask[place] = picture, black
    return {"video": video, "mask": mask}


def inpainted(pipe: "DiffusionPipeline", row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Frames with a mask as tensors (1, C, F, H, W): EasyAnimate keeps frames of mask 0."""
    assert given.frames is not None
    height, width = given.size
    pixels = torch.zeros(1, 3, given.frames, height, width)
    mask = torch.full((1, 1, given.frames, height, width), 255.0)
    if given.video is not None:
        pixels[0] = torch.stack([_floats(frame) for frame in given.video], 1)
    for place, picture in ((0, given.image), (-1, given.last_image)):
        if picture is not None:
            pixels[0, :, place], mask[0, :, place] = _floats(picture), 0
    made = {"video": pixels, "mask_video": mask}
    return made if given.strength is None else made | {"strength": given.strength}


def _floats(image: Image.Image) -> torch.Tensor:
    """Convert a picture to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def ltx(pipe: "DiffusionPipeline", row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Conditions at the first and at the last frame; a video to remake, as latents."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    assert given.frames is not None
    made: dict[str, Any] = {}
    conditions = []
    if given.video is not None and given.strength is not None:
        made = {"latents": _encoded(pipe, given.video), "denoise_strength": given.strength}
    elif given.video is not None:
        conditions.append(LTXVideoCondition(video=[*given.video], frame_index=0))
    for picture, place in ((given.image, 0), (given.last_image, given.frames - 1)):
        if picture is not None:
            conditions.append(LTXVideoCondition(image=picture, frame_index=place))
    return made | ({"conditions": conditions} if conditions else {})


@torch.no_grad()
def _encoded(pipe: "DiffusionPipeline", video: Pictures) -> torch.Tensor:
    """Latents (1, C, f, h, w) of a video in LTX's own scale."""
    device = pipe._execution_device
    pixels = pipe.video_processor.preprocess_video([*video]).to(device, pipe.vae.dtype)
    hook = getattr(pipe.vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):  # moves the weights of an offloaded one
        hook.pre_forward(pipe.vae)
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    vae = pipe.vae
    return pipe._normalize_latents(
        latents.float(), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )


def ltx2(pipe: "DiffusionPipeline", row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Conditions at the first and at the last frame."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    found = [] if given.video is None else [LTX2VideoCondition(frames=[*given.video], index=0)]
    for picture, place in ((given.image, 0), (given.last_image, -1)):
        if picture is not None:
            found.append(LTX2VideoCondition(frames=picture, index=place))
    return {"conditions": found} if found else {}


BY: dict[str, Callable[[Any, PipelineInputs, _Fitted], dict[str, Any]]] = {
    one.__name__: one for one in (plain, overlapping, vace, inpainted, ltx, ltx2)
}
