"""Pictures and video fitted to a pipeline: sizes and frames of a clip, arguments of a call.

A function that `PipelineInputs.by` names makes the arguments of its classes.
"""

import hashlib
import inspect
import json
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, get_origin

import numpy as np
import torch
from PIL import Image, ImageOps

from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.families.base import PipelineInputs
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.attention_processors.families.wan import OVERLAP
from gen_accel.io import contents_sha256, parse_json
from gen_accel.measure.video_io import (
    frames_of,
    opened_film,
    pixels,
    read_stream,
    video_fps,
)
from gen_accel.parsing import fits, members, shown, written_type
from gen_accel.paths import adapter_named, expanded
from gen_accel.pipelines.generation.config import (
    Clip,
    ConditioningFiles,
    ImagePromptConfig,
    PictureFile,
    VideoFile,
)
from gen_accel.pipelines.generation.decode import on_its_device
from gen_accel.pipelines.generation.sampling import (
    ARGUMENTS,
    AnyClip,
    CallArguments,
    default_of,
    frame_rate,
    parameters,
)
from gen_accel.pipelines.image_prompt import ImagePrompt, load_image_prompt
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.image_prompt.formats import find_adapter, read_adapter
from gen_accel.registry import nearest_to
from gen_accel.video import patch_of, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAID = 0.01  # least share of a picture whose loss is said
GREY = 128  # of the frames that VACE makes

REMADE = ("remade", "control")  # roles of a video in which each frame answers to one of its own

Size: TypeAlias = tuple[int, int]  # height and width
Source: TypeAlias = "Path | np.ndarray | tuple[Image.Image, ...]"


@dataclass(frozen=True)
class OpenedVideo:
    """A video whose frames are read when they are asked for, or a picture as one frame of it.

    Args:
        name: for messages.
        source: a file, a folder of numbered PNG frames, (F, H, W, 3) uint8 or pictures.
        image: its first frame, in RGB.
        fps: frames a second; None if the source does not state it.
    """

    name: str
    source: Source
    image: Image.Image
    fps: float | None = None

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def width(self) -> int:
        return self.image.width

    def frames(self, most: int | None = None) -> Iterator[Image.Image]:
        return islice(_frames(self.source), most)

    def identity(self) -> str:
        """Identify files by a hash of their bytes, others by a hash of their pixels."""
        if isinstance(self.source, Path):
            return contents_sha256(self.source)
        return hashlib.sha256("".join(map(pixels, self.frames())).encode()).hexdigest()


@dataclass(frozen=True)
class OpenedFiles:
    """Pictures and video that a video is made from, opened."""

    image: OpenedVideo | None
    last_image: OpenedVideo | None
    video: OpenedVideo | None
    strength: float | None

    @property
    def source(self) -> OpenedVideo:
        """The first of them, whose size counts."""
        found = self.image or self.last_image or self.video
        assert found is not None, "given"
        return found

    def identity(self) -> dict[str, str | float | None]:
        """Identify pictures by their pixels, and the video."""
        return {
            "image": self.image and pixels(self.image.image),
            "last_image": self.last_image and pixels(self.last_image.image),
            "video": self.video and self.video.identity(),
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
            "negative": [self.negative and pixels(self.negative)],
            "adapter": identity(self.adapter),
            "scale": self.scale,
            "encoder": self.encoder and identity(self.encoder),
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
    negative = _picture(given.image_negative, "the negative image")
    return OpenedImages(
        tuple(as_rgb(image) for image in given.image_prompt),
        path,
        given.image_scale,
        negative and negative.image,
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


def _picture(source: PictureFile, name: str) -> OpenedVideo | None:
    if source is None:
        return None
    if isinstance(source, np.ndarray):
        image = next(_frames(source[None]))
    else:
        image = as_rgb(source)
        name = Path(source).name if isinstance(source, str | Path) else name
    return OpenedVideo(name, (image,), image)


def _film(given: VideoFile) -> OpenedVideo:
    name, fps = "the video", None
    if isinstance(given, str | Path):
        source = expanded(given)
        name, fps = source.name, video_fps(source)
    elif isinstance(given, np.ndarray):
        source = given
    elif isinstance(given, Sequence) and given:
        source = tuple(as_rgb(frame) for frame in given)
        sizes = sorted({frame.size for frame in source})
        if len(sizes) > 1:
            told = " and ".join(f"{height} x {width}" for width, height in sizes[:2])
            raise ValueError(f"frames of a video must have one size, got {told}")
    else:
        raise ValueError(
            "video must be a file, a folder, (F, H, W, 3) uint8 or a list of pictures, got "
            f"{type(given).__name__}"
        )
    first = next(_frames(source), None)
    if first is None:
        raise ValueError(f"{name} holds no frame")
    return OpenedVideo(name, source, first, fps)


def _frames(source: Source) -> Iterator[Image.Image]:
    if isinstance(source, tuple):
        return iter(source)
    return map(
        Image.fromarray, frames_of(read_stream(source) if isinstance(source, Path) else [source])
    )


def fit(
    pipe: "DiffusionPipeline", clip: AnyClip, given: OpenedFiles
) -> tuple[AnyClip, CallArguments]:
    """Fit pictures and video to a pipeline, and a `Clip` to them.

    Without a height and width the picture decides the aspect ratio, at the area of the model's
    default size. With them a picture of another shape is scaled to cover and cropped from its
    centre. A video that is remade decides the frames, unless the clip gives fewer.

    Raises:
        ValueError: a video that is too short, or that leaves nothing to make; frames that the
            pipeline cannot make; a strength that leaves no step.
    """
    fitted = _Fitted(pipe, clip, given)
    arguments = BY[fitted.row.by](fitted)
    clip = clip.model_copy(update=fitted.changed)
    return clip, CallArguments(arguments, fitted.share, tuple(fitted.told))


# Set by other options, or by `denoise`.
_SET = {*ARGUMENTS.values(), "prompt", "strength", "fps", "frame_rate", "video_length"}
_SET |= {"output_type", "return_dict", "num_videos_per_prompt"}
_SET |= {"callback_on_step_end_tensor_inputs"}
_PLAIN = (bool, int, float, str, list, types.NoneType)


def own_arguments(kind: type, words: Sequence[str]) -> dict[str, object]:
    """Read "name=value" each, of arguments of a pipeline's call that no other option sets. Values
    are words, or JSON.

    Args:
        kind: class of the pipeline.

    Raises:
        ValueError: an argument that it has not, or that is no number, word or list; a value of
            another type.
    """
    known, found = dict[str, tuple[object, object]](), dict[str, object]()

    def is_plain(hint: object) -> bool:
        return hint in _PLAIN or (isinstance(hint, type) and issubclass(hint, Enum))

    for name, one in inspect.signature(kind.__call__).parameters.items():
        hint = type(one.default) if isinstance(one.annotation, str) else one.annotation
        plain = (get_origin(each) or each for each in members(hint))
        if name not in _SET and all(map(is_plain, plain)):
            known[name] = hint, one.default
    for word in words:
        name, _, text = (part.strip() for part in word.partition("="))
        if name not in known:
            hint = nearest_to(name, [*known])
            raise ValueError(
                f"call is NAME=VALUE of what {kind.__name__} takes beside all that other options "
                f"set: {', '.join(known) or 'nothing'}; got {shown(word)}{hint}"
            )
        hint, default = known[name]
        value: object = text
        if isinstance(default, Enum):
            options = {str(each.value): each for each in type(default)}
            right, value = " or ".join(options), options.get(text)
        else:
            right = written_type(hint)
            with suppress(ValueError):
                value = text if str in members(hint) else parse_json(text, name)
        is_list = isinstance(value, list) or not isinstance(default, list)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if value is None or not (is_list and is_finite and fits(value, hint)):
            raise ValueError(f"{name} of {kind.__name__} must be {right}, got {shown(text)}")
        found[name] = value
    return found


def in_length(
    pipe: "DiffusionPipeline",
    frames: int | None,
    given: CallArguments | None,
    own: Mapping[str, object],
) -> CallArguments | None:
    """Add a pipeline's own arguments, and those that the number of frames asks for, to the
    arguments of its call. ValueError for a number that it cannot make."""
    row, values = takes(type(pipe).__name__), {} if given is None else given.values
    told = () if given is None else given.told
    values = {**values, **own}
    if row is not None and frames is not None:
        added, made = row.length(pipe, frames, values)
        values |= added
        if made != frames:
            told = (*told, f"{type(pipe).__name__} makes {made} frames where {frames} are asked")
    if not values and not told:
        return given
    return CallArguments(values, 1.0 if given is None else given.shortened, told)


class _Fitted:
    """Frames of the size of a clip, as the functions of `PipelineInputs.by` take them.

    Attributes:
        row: names of the arguments.
        pictures: the first and the last frame, as far as they are given, by their place: 0, -1.
        film: the video as it is given.
        video: its frames, as far as they are needed; None for a reference.
        changed: sizes of the clip.
        share: of the steps, by which a video is remade.
    """

    def __init__(self, pipe: "DiffusionPipeline", clip: Clip, given: OpenedFiles) -> None:
        row, kind, source = takes(type(pipe).__name__), type(pipe).__name__, given.source
        assert row is not None, "chosen"
        self.pipe, self.row, self.strength, self.told = pipe, row, given.strength, list[str]()
        self.changed: dict[str, int | None] = {}
        self.share, self.video, self.film, cut = 1.0, None, given.video, None
        is_reference = given.video is not None and row.role_of(given.strength) == "reference"
        if "height" in parameters(pipe) and not is_reference:
            height, width = cut = self._size(clip, source)
            if not (clip.height and clip.width):
                shape = f"{source.height} x {source.width}"
                self.told.append(f"{source.name}, {shape}, makes a video of {height} x {width}")
            self.changed |= {"height": height, "width": width}
        if given.video is not None and not is_reference:
            self.changed["frames"], self.video = self._film(clip, given.video, cut)
            self.share = self._remade(clip)
        elif row.frames is not None:
            self.changed["frames"] = row.frames
            if clip.frames not in (None, row.frames):
                raise ValueError(
                    f"{kind} makes {row.frames} frames, got {clip.frames}: leave frames out"
                )
        self.pictures: dict[int, Image.Image] = {}
        for place, picture in ((0, given.image), (-1, given.last_image)):
            if picture is not None:
                self.told += _lost(picture, cut)
                self.pictures[place] = covered(picture.image, cut)
        frames = self.changed.get("frames") or clip.frames
        self.frames: int = frames or default_of(pipe, "frames")
        self.size: Size = cut or (source.height, source.width)

    def _size(self, clip: Clip, source: OpenedVideo) -> Size:
        """Height and width of the clip, by the aspect ratio of a picture if they are open."""
        pipe, row, kind = self.pipe, self.row, type(self.pipe).__name__
        if clip.height and clip.width:
            return clip.height, clip.width
        factor = vae_factor(pipe, "spatial") or getattr(pipe, "vae_scale_factor", 1)
        config = first_transformer(pipe).config
        _, *patch = patch_of(config)
        rows, columns = (math.lcm(row.multiple, factor * side) for side in patch)
        ratio = source.height / source.width
        if clip.height:
            return clip.height, max(1, round(clip.height / ratio / columns)) * columns
        if clip.width:
            return max(1, round(clip.width * ratio / rows)) * rows, clip.width
        sides = [default_of(pipe, "height"), default_of(pipe, "width")]
        size = row.size
        if None in sides and callable(size):
            return size(pipe, source.height, source.width)
        if None in sides and size is not None and not callable(size):
            sides = [*size]
        elif None in sides:
            square = config.get("sample_size")
            sides = [config.get("sample_height", square), config.get("sample_width", square)]
            if None in sides:
                raise ValueError(f"{kind} has no default size: give a height and a width")
            sides = [side * factor for side in sides]
        area = math.prod(sides)
        height, width = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        return max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns

    def _film(
        self, clip: Clip, film: OpenedVideo, cut: Size | None
    ) -> tuple[int | None, list[Image.Image]]:
        """Return the number of frames of the clip, and the frames of a video that it needs."""
        role, frames, name = self.row.role_of(self.strength), clip.frames, film.name
        remade = role in REMADE
        if not remade and frames is None:
            frames = default_of(self.pipe, "frames")
        most = None if frames is None or role == "prolonged" else frames + 1
        found = [covered(frame, cut) for frame in film.frames(most)]
        has, more = len(found), "more than " if frames is not None else ""
        if remade and frames is None:
            first, step = _lengths(self.pipe)
            frames = first + (has - first) // step * step
            if has < first:
                raise ValueError(f"{name} has {has} frames, and the model makes {first} at least")
        if frames is not None:
            check_length(film, has, frames, self.row, self.strength)
            if remade and has > frames:
                known = frames if more else has
                self.told.append(f"{name} has {more}{known} frames: its first {frames} are used")
                del found[frames:]
        self.told += _lost(film, cut)
        rate = frame_rate(self.pipe, clip.fps)
        if film.fps is not None and abs(film.fps - rate) > 0.01 * rate:
            self.told.append(
                f"{name} has {film.fps:g} frames a second, and the video gets {rate:g}: "
                f"--fps {film.fps:g} keeps its speed"
            )
        return frames, found

    def _remade(self, clip: Clip) -> float:
        """Share of the steps by which the video is remade; ValueError if it leaves none."""
        if self.row.role_of(self.strength) != "remade" or not self.row.strength:
            return 1.0
        share = self.strength
        share = default_of(self.pipe, self.row.strength) if share is None else share
        steps = clip.steps or default_of(self.pipe, "steps")
        if steps is not None and int(steps * share) < 1:
            raise ValueError(
                f"strength {share:g} of {steps} steps leaves none: ask for "
                f"{math.ceil(1 / share)} steps or more, or a higher strength"
            )
        return share


def check_length(
    film: OpenedVideo, has: int, frames: int, row: PipelineInputs, strength: float | None
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


def _lengths(pipe: "DiffusionPipeline") -> tuple[int, int]:
    """Least number of frames that a pipeline makes, and the step to the next ones."""
    factor = vae_factor(pipe, "temporal") or 1
    patch = patch_of(first_transformer(pipe).config)[0]
    return (patch - 1) * factor + 1, patch * factor


def covered(image: Image.Image, size: Size | None) -> Image.Image:
    """Scale a picture to cover a size, and crop it from its centre; None keeps it."""
    if size is None or image.size == size[::-1]:
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


def _lost(source: OpenedVideo, size: Size | None) -> list[str]:
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


def plain(given: _Fitted) -> dict[str, object]:
    """Pictures and frames under the names of the signature."""
    held = (
        (given.row.image, given.pictures.get(0)),
        (given.row.last_image, given.pictures.get(-1)),
        (given.row.video, given.video),
        (given.row.strength, given.strength),
    )
    return {name: value for name, value in held if name and value is not None}


def overlapping(given: _Fitted) -> dict[str, object]:
    """A video to continue, by SkyReels-V2's diffusion forcing."""
    assert given.video is not None
    first, step = _lengths(given.pipe)
    has = len(given.video)
    if has < first:
        raise ValueError(f"the video has {has} frames, and {first} are needed")
    most = first + (has - first) // step * step
    return {"video": given.video, "overlap_history": min(OVERLAP, most)}


def in_tensor(given: _Fitted) -> dict[str, object]:
    """A picture, or a video as far as whole latents hold its frames, (1, F, 3, H, W) in [0, 1]."""
    first, step = _lengths(given.pipe)
    frames = given.video or [*given.pictures.values()]
    if spare := (len(frames) - first) % step:
        given.told.append(f"the video has {len(frames)} frames: all but the last {spare} are used")
    held = frames[: len(frames) - spare]
    return {given.row.video: torch.stack([*map(_floats, held)])[None]}


def vace(given: _Fitted) -> dict[str, object]:
    """Frames with a mask: black frames of the mask are kept, white ones are made by what they
    show, grey where they show nothing."""
    if given.video is None and not given.pictures:
        return {}
    height, width = given.size
    white, black = (Image.new("L", (width, height), shade) for shade in (255, 0))
    grey = Image.new("RGB", (width, height), (GREY, GREY, GREY))
    video = given.video or [grey] * given.frames
    mask = [white] * given.frames
    for place, picture in given.pictures.items():
        video[place], mask[place] = picture, black
    return {"video": video, "mask": mask}


def inpainted(given: _Fitted) -> dict[str, object]:
    """Frames with a mask as tensors (1, C, F, H, W): EasyAnimate keeps frames of mask 0."""
    pixels = torch.zeros(1, 3, given.frames, *given.size)
    mask = torch.full((1, 1, given.frames, *given.size), 255.0)
    if given.video is not None:
        pixels[0] = torch.stack([_floats(frame) for frame in given.video], 1)
    for place, picture in given.pictures.items():
        pixels[0, :, place], mask[0, :, place] = _floats(picture), 0
    made: dict[str, object] = {"video": pixels, "mask_video": mask}
    return made if given.strength is None else made | {"strength": given.strength}


def _floats(image: Image.Image) -> torch.Tensor:
    """Convert a picture to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def ltx(given: _Fitted) -> dict[str, object]:
    """Conditions at the first and at the last frame; a video to remake, as latents."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    made: dict[str, object] = {}
    conditions = []
    if given.video is not None and given.strength is not None:
        made = {"latents": _encoded(given), "denoise_strength": given.strength}
    elif given.video is not None:
        conditions.append(LTXVideoCondition(video=given.video, frame_index=0))
    for place, picture in given.pictures.items():
        conditions.append(LTXVideoCondition(image=picture, frame_index=place % given.frames))
    return made | ({"conditions": conditions} if conditions else {})


@torch.no_grad()
def _encoded(given: _Fitted) -> torch.Tensor:
    """Latents (1, C, f, h, w) of a video in LTX's own scale."""
    pipe, vae = given.pipe, given.pipe.vae
    pixels = pipe.video_processor.preprocess_video(given.video)
    on_its_device(vae)
    latents = vae.encode(pixels.to(pipe._execution_device, vae.dtype)).latent_dist.mode()
    scale = vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    return pipe._normalize_latents(latents.float(), *scale)


def ltx2(given: _Fitted) -> dict[str, object]:
    """Conditions at the first and at the last frame."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    found = [] if given.video is None else [LTX2VideoCondition(frames=given.video, index=0)]
    for place, picture in given.pictures.items():
        found.append(LTX2VideoCondition(frames=picture, index=place))
    return {"conditions": found} if found else {}


def minimax_h3(given: _Fitted) -> dict[str, object]:
    """Key frames; or a video for a reference, with the sound of its file, as far as it lasts as
    long as the clip."""
    film = given.film
    if film is None:
        return plain(given)
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3VideoReference

    own = frame_rate(given.pipe, None)
    fps, seconds = film.fps or own, given.frames / own
    frames = [np.asarray(frame) for frame in film.frames(math.ceil(seconds * fps))]
    rate, sound = given.pipe.audio_sampling_rate, None
    if isinstance(film.source, Path) and film.source.is_file():
        with opened_film(film.source, film.name) as opened:
            sound = opened.sound(0.0, min(seconds, len(frames) / fps), rate)
    heard = {} if sound is None else {"audio": torch.from_numpy(sound), "sample_rate": rate}
    return {"references": [MiniMaxH3VideoReference(np.stack(frames), fps, **heard)]}


BY: dict[str, Callable[[_Fitted], dict[str, object]]] = {
    one.__name__: one
    for one in (plain, overlapping, in_tensor, vace, inpainted, ltx, ltx2, minimax_h3)
}
