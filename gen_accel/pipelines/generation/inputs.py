"""Pictures and video fitted to a pipeline: sizes and frames of a clip, arguments of a call.

A function that `PipelineInputs.by` names makes the arguments of its classes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from gen_accel.attention_processors.families.base import PipelineInputs
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.attention_processors.lengths import patch_of, vae_factor
from gen_accel.io import file_sha256, folder_sha256
from gen_accel.measure.video_io import frames_of, pixels, read_stream, video_fps
from gen_accel.paths import adapter_named, expanded
from gen_accel.pipelines.generation.config import ConditioningFiles, ImagePromptConfig
from gen_accel.pipelines.generation.sampling import (
    AnyClip,
    CallArguments,
    first_transformer,
    frames_argument,
    parameters,
    served_family,
)
from gen_accel.pipelines.image_prompt import ImagePrompt, load_image_prompt
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.image_prompt.formats import find_adapter, read_adapter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAID = 0.01  # least share of a picture that is said to be lost
OVERLAP = 17  # frames that SkyReels-V2 goes on from, as its authors advise
GREY = 128  # of the frames that VACE makes

ANEW = ("remade", "control")  # roles of a video in which each frame answers to one of its own

Pictures = Sequence[Image.Image]


class Picture(NamedTuple):
    """A picture in RGB.

    Args:
        name: for messages.
    """

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Film:
    """A video whose frames are read when they are asked for.

    Args:
        name: for messages.
        source: a file, a folder of numbered PNG frames, (F, H, W, 3) uint8 or a list of pictures.
        fps: frames a second; None where the source does not state it.
        height, width: in pixels, of its first frame.
    """

    name: str
    source: Any
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
class _Fitted:
    """Frames of the size of the clip, as the functions of `PipelineInputs.by` take them."""

    image: Image.Image | None
    last_image: Image.Image | None
    video: Pictures | None
    strength: float | None
    frames: int | None
    size: tuple[int, int]


@dataclass(frozen=True)
class OpenedFiles:
    """Pictures and video that a video is made from, opened.

    Args:
        kinds: what is given, of `names.KINDS`.
    """

    kinds: tuple[str, ...]
    image: Picture | None
    last_image: Picture | None
    video: Film | None
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

    def identity(self) -> dict[str, Any]:
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


def identity(source: Any) -> str:
    """Identify files by a hash of names, sizes and times, a hub repository by its name. Model
    cards do not count."""
    path = expanded(source)
    if not path.exists():
        return str(source)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    about = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.suffix != ".md"]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _picture(source: Any, name: str) -> Picture | None:
    if source is None:
        return None
    if isinstance(source, np.ndarray):
        return Picture(name, next(_frames(source[None])))
    path = isinstance(source, str | Path)
    return Picture(Path(source).name if path else name, as_rgb(source))


def _film(source: Any) -> Film:
    name, fps = "the video", None
    if isinstance(source, str | Path):
        path = expanded(source)
        name, fps, source = path.name, video_fps(path), path
    elif isinstance(source, np.ndarray):
        pass
    elif isinstance(source, Sequence) and source:
        source = tuple(as_rgb(frame) for frame in source)
        sizes = {frame.size for frame in source}
        if len(sizes) > 1:
            (width, height), (other_width, other_height) = sorted(sizes)[:2]
            raise ValueError(
                "frames of a video must have one size, got "
                f"{height} x {width} and {other_height} x {other_width}"
            )
    else:
        raise ValueError(
            "video must be a file, a folder, (F, H, W, 3) uint8 or a list of pictures, got "
            f"{type(source).__name__}"
        )
    first = next(_frames(source), None)
    if first is None:
        raise ValueError(f"{name} holds no frame")
    return Film(name, source, fps, first.height, first.width)


def _frames(source: Any) -> Iterator[Image.Image]:
    if isinstance(source, tuple):
        yield from source
        return
    chunks = read_stream(source) if isinstance(source, Path) else iter([source])
    for frame in frames_of(chunks):
        yield Image.fromarray(frame)


def fit(pipe: Any, clip: AnyClip, given: OpenedFiles) -> tuple[AnyClip, CallArguments]:
    """Fit pictures and video to a pipeline, and a `Clip` to them.

    Without a height and width the picture decides the aspect ratio, at the area of the model's
    default size. With them a picture of another shape is scaled to cover and cropped from its
    centre. A video that is made anew decides the frames, unless the clip gives fewer.

    Args:
        given: a result of `open_files`.

    Raises:
        ValueError: a video that is too short, or that leaves nothing to make; frames that the
            pipeline cannot make; a strength that leaves no step.
    """
    row = takes(type(pipe).__name__)
    assert row is not None, "chosen"
    source: Any = given.image or given.last_image or given.video
    if isinstance(source, Picture):
        name, height, width = source.name, source.image.height, source.image.width
    else:
        name, height, width = source.name, source.height, source.width
    told: list[str] = []
    clip = _sized(pipe, row, clip, (name, height, width), told)
    size: Any = (clip.height, clip.width) if "height" in parameters(pipe) else None
    role = row.role_of(given.strength)
    video: list[Image.Image] | None = None
    if given.video is not None:
        clip, video = _filmed(pipe, row, clip, given.video, role, size, told)
    elif row.frames is not None:
        clip = _only(pipe, row.frames, clip)
    image = _covering(given.image, size, told)
    last_image = _covering(given.last_image, size, told)
    frames = clip.frames or parameters(pipe).get(frames_argument(pipe), _NONE).default
    whole = _Fitted(image, last_image, video, given.strength, frames, size or (height, width))
    arguments = BY[row.by](pipe, row, whole)
    shortened = _share(pipe, row, clip, given, role)
    return clip, CallArguments(arguments, shortened, tuple(told))


def check_length(row: PipelineInputs, given: OpenedFiles, frames: int | None) -> None:
    """Refuse, by a ValueError, a video with fewer frames than are asked, or too many to go on."""
    if given.video is None or frames is None:
        return
    role = row.role_of(given.strength)
    has = given.video.count(frames)
    if role == "continued" and has >= frames:
        raise _nothing_left(given.video, frames, row)
    if role in ANEW and has < frames:
        raise _too_short(given.video, has, frames)


class _None:
    default = None


_NONE = _None()


def _sized(
    pipe: Any, row: PipelineInputs, clip: Any, source: tuple[str, int, int], told: list[str]
) -> Any:
    """Fill height and width of a clip by the aspect ratio of a picture (name, height, width)."""
    name, rows, columns = source
    if "height" not in parameters(pipe) or (clip.height and clip.width):
        return clip
    step = [math.lcm(row.multiple, side) for side in _steps(pipe)]
    if clip.height or clip.width:
        scale = clip.height / rows if clip.height else clip.width / columns
        height, width = rows * scale, columns * scale
    else:
        area = math.prod(_default_size(pipe, row))
        height, width = (area * rows / columns) ** 0.5, (area * columns / rows) ** 0.5
    height = clip.height or max(1, round(height / step[0])) * step[0]
    width = clip.width or max(1, round(width / step[1])) * step[1]
    told.append(f"{name}, {rows} x {columns}, makes a video of {height} x {width}")
    return clip.model_copy(update={"height": height, "width": width})


def _steps(pipe: Any) -> tuple[int, int]:
    """Pixels a side of one token, in rows and in columns."""
    factor = vae_factor(pipe, "spatial") or getattr(pipe, "vae_scale_factor", 1)
    _, rows, columns = patch_of(first_transformer(pipe).config)
    return factor * rows, factor * columns


def _default_size(pipe: Any, row: PipelineInputs) -> tuple[int, int]:
    """Height and width that the pipeline would make."""
    known = parameters(pipe)
    own = known["height"].default, known["width"].default
    if None not in own:
        return own
    if row.size is not None:
        return row.size
    config = first_transformer(pipe).config
    factor = vae_factor(pipe, "spatial") or getattr(pipe, "vae_scale_factor", 1)
    side = config.get("sample_size")
    height, width = config.get("sample_height", side), config.get("sample_width", side)
    if height is None or width is None:
        kind = type(pipe).__name__
        raise ValueError(f"{kind} has no default size: give a height and a width")
    return height * factor, width * factor


def _filmed(
    pipe: Any,
    row: PipelineInputs,
    clip: Any,
    film: Film,
    role: str,
    size: tuple[int, int] | None,
    told: list[str],
) -> tuple[Any, list[Image.Image]]:
    """Read the frames of a video that a clip needs, and give the clip their number."""
    frames = clip.frames
    if role not in ANEW and frames is None:
        frames = parameters(pipe)[frames_argument(pipe)].default
    most = None if frames is None or role == "prolonged" else frames + 1
    pictures = _covered(film, size, most)
    has = len(pictures)
    if role not in ANEW:
        if role == "continued" and frames is not None and has >= frames:
            raise _nothing_left(film, frames, row)
    elif frames is None:
        first, step = _lengths(pipe)
        frames = first + (has - first) // step * step
        if has < first:
            raise ValueError(f"{film.name} has {has} frames, and the model makes {first} at least")
        if frames < has:
            told.append(f"{film.name} has {has} frames: its first {frames} are used")
    elif has < frames:
        raise _too_short(film, has, frames)
    elif has > frames:
        told.append(f"{film.name} has more than {frames} frames: its first {frames} are used")
    told += _lost(film.name, film.height, film.width, size)
    rate = _rate(pipe, clip)
    if film.fps is not None and abs(film.fps - rate) > 0.01 * rate:
        told.append(
            f"{film.name} has {film.fps:g} frames a second, and the video gets {rate:g}: "
            f"--fps {film.fps:g} keeps its speed"
        )
    return clip.model_copy(update={"frames": frames}), pictures[
        :frames
    ] if role in ANEW else pictures


def _too_short(film: Film, has: int, frames: int) -> ValueError:
    return ValueError(
        f"{film.name} has {has} frames, and {frames} are asked: ask for fewer, or leave frames out"
    )


def _nothing_left(film: Film, frames: int, row: PipelineInputs) -> ValueError:
    or_anew = ", or --strength to make it anew" if row.strength else ""
    return ValueError(
        f"{film.name} has {frames} frames or more, and the video that goes on from it has "
        f"{frames}: ask for more frames, or cut it{or_anew}"
    )


def _lengths(pipe: Any) -> tuple[int, int]:
    """Least number of frames that a pipeline makes, and the step to the next ones."""
    factor = vae_factor(pipe, "temporal") or 1
    patch = patch_of(first_transformer(pipe).config)[0]
    return (patch - 1) * factor + 1, patch * factor


def _rate(pipe: Any, clip: Any) -> float:
    if clip.fps is not None:
        return clip.fps
    known = parameters(pipe)
    own = next((known[name].default for name in ("frame_rate", "fps") if name in known), None)
    return served_family(pipe).sizes_of(first_transformer(pipe).config).fps if own is None else own


def _only(pipe: Any, frames: int, clip: Any) -> Any:
    if clip.frames not in (None, frames):
        kind = type(pipe).__name__
        raise ValueError(f"{kind} makes {frames} frames, got {clip.frames}: leave frames out")
    return clip.model_copy(update={"frames": frames})


def _share(pipe: Any, row: PipelineInputs, clip: Any, given: OpenedFiles, role: str) -> float:
    """Share of the steps that a video is made anew by. Raises ValueError where none is left."""
    if role != "remade" or not row.strength or given.video is None:
        return 1.0
    known = parameters(pipe)
    share = known[row.strength].default if given.strength is None else given.strength
    steps = clip.steps or known["num_inference_steps"].default
    if steps is not None and int(steps * share) < 1:
        raise ValueError(
            f"strength {share:g} of {steps} steps leaves none: ask for {math.ceil(1 / share)} "
            "steps or more, or a higher strength"
        )
    return share


def _covering(
    picture: Picture | None, size: tuple[int, int] | None, told: list[str]
) -> Image.Image | None:
    """Scale a picture to cover (height, width), and crop it from its centre."""
    if picture is None:
        return None
    image = picture.image
    told += _lost(picture.name, image.height, image.width, size)
    return image if size is None else covered(image, *size)


def covered(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture to cover a size, and crop it from its centre."""
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    rows, columns = min(height / scale, image.height), min(width / scale, image.width)
    top, left = (image.height - rows) / 2, (image.width - columns) / 2
    box = (left, top, left + columns, top + rows)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _covered(film: Film, size: tuple[int, int] | None, most: int | None) -> list[Image.Image]:
    frames = islice(film.frames(), most)
    return [*frames] if size is None else [covered(frame, *size) for frame in frames]


def _lost(name: str, rows: int, columns: int, size: tuple[int, int] | None) -> list[str]:
    """Say how much of a picture is cropped, where it is much."""
    if size is None:
        return []
    height, width = size
    scale = max(height / rows, width / columns)
    lost = 1 - (height / scale) * (width / scale) / (rows * columns)
    if lost < SAID:
        return []
    return [f"{name}, {rows} x {columns}, is cropped to {height} x {width}: {lost:.0%} is lost"]


def plain(pipe: Any, row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Pictures and frames under the names of the signature."""
    held = {
        row.image: given.image,
        row.last_image: given.last_image,
        row.video: None if given.video is None else [*given.video],
        row.strength: given.strength,
    }
    return {name: value for name, value in held.items() if name and value is not None}


def overlapping(pipe: Any, row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """A video that is gone on from, by SkyReels-V2's diffusion forcing."""
    assert given.video is not None
    first, step = _lengths(pipe)
    if len(given.video) < first:
        raise ValueError(f"the video has {len(given.video)} frames, and {first} are needed")
    most = first + (len(given.video) - first) // step * step
    return {"video": [*given.video], "overlap_history": min(OVERLAP, most)}


def vace(pipe: Any, row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
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


def inpainted(pipe: Any, row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Frames with a mask as tensors (1, C, F, H, W): EasyAnimate keeps frames where it is 0."""
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


def ltx(pipe: Any, row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
    """Conditions at the first and at the last frame; a video that is made anew as latents."""
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
def _encoded(pipe: Any, video: Pictures) -> torch.Tensor:
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


def ltx2(pipe: Any, row: PipelineInputs, given: _Fitted) -> dict[str, Any]:
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
