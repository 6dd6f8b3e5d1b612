"""Videos and pictures read from and written to files. A video is (F, H, W, 3) uint8, RGB.

Every file is written under a temporary name in the same folder and renamed when it is whole. Files
carry texts about themselves, such as the prompt and the settings:

- Films (.mp4 and copies by `ffmpeg -c copy`): the comment of the container, which every tool
  copies. It is JSON, behind the note on an odd size if there is one.
- GIF: a comment block of the same JSON, in ASCII as the format wants.
- PNG: a text chunk for each, iTXt if the text is beyond Latin-1. Every text chunk is read, by
  whatever program it was written.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

from gen_accel.io import check_folder, replacing
from gen_accel.measure import films
from gen_accel.measure.films import encode, opened_film
from gen_accel.paths import (
    check_replaceable,
    check_video_suffix,
    expanded,
    real,
)

FRAME_NAME = re.compile(r"\d{4,}\.png")

RATES = (0.01, 1000.0)  # frames a second allowed; ffmpeg takes some more, but fails late on others
FRAMES_AT_ONCE = 16  # frames read at once; 44 MB at 720 x 1280
GIF_RATE = 100.0  # frames a second, by the unit of its times
NAME = re.compile(r"[!-~]([ -~]{0,77}[!-~])?")  # what a PNG takes as a keyword
MARK = "gen_accel"  # the one key of our JSON
GIF_COMMENT, GIF_PART = b"\x21\xfe", 255  # the block's beginning; most bytes in a part of it
ODD_SIZE = "gen_accel size {height}x{width}"  # the comment in an mp4 with a padded edge


def write_video(
    frames: np.ndarray, path: str | Path, *, fps: float, about: Mapping[str, str] | None = None
) -> Path:
    """Write `frames` in the format that the suffix of `path` names.

    - `.mp4`: H.264, yuv420p, which only knows even sizes. An odd edge is repeated once, never
      rescaled, and `read_video` takes it off again.
    - `.gif`: one palette of 256 colours for the whole clip; time in hundredths of a second, so
      that more than 100 frames a second are shown as 100.
    - `.png`: one frame is one picture; more go to a folder, `clip.png` to `clip/0000.png` and on.
    - no suffix: a folder of PNG frames. An earlier folder of numbered frames is replaced.

    Args:
        frames: (F, H, W, 3) uint8.
        fps: frames a second; PNG frames ignore it.
        about: texts by name, such as the prompt and the settings, to store in the file;
            `read_about` reads them. A folder keeps them in its first picture.

    Returns:
        The file or folder written.

    Raises:
        ValueError: wrong frames, fps or `about`, or whatever `check_writable` refuses.
        OSError: the disk or the encoder failed. What was at `path` before is still there.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    check_rate(fps)
    about = checked_texts(about)
    check_writable(path, frames=len(frames))
    return _write(iter(frames), Path(path), len(frames), fps, about)


def write_stream(
    chunks: Iterable[np.ndarray],
    path: str | Path,
    *,
    fps: float,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write the frames of all chunks as `write_video` does, one chunk in memory at a time.

    An exception of `chunks` or an interrupt leaves no file. A GIF has one palette for all frames,
    which are held, 4 bytes a pixel, until the last one is known.

    Args:
        chunks: (f, H, W, 3) uint8 each, all of one height and width; f may differ.
        fps: frames a second; PNG frames ignore it.
        about: as of `write_video`.

    Returns:
        The file or folder written.

    Raises:
        ValueError: no frame, wrong chunks, fps or `about`, or whatever `check_writable` refuses.
        OSError: the disk or the encoder failed. What was at `path` before is still there.
    """
    check_rate(fps)
    about = checked_texts(about)
    path = Path(path)
    if path.suffix.lower() != ".png":  # a file or a folder, by how many frames there are
        check_writable(path)
    frames = frames_of(chunks)
    first = [*islice(frames, 2)]
    if not first:
        raise ValueError("chunks must hold a frame, got none")
    check_writable(path, frames=len(first))
    return _write(chain(first, frames), path, len(first), fps, about)


def check_rate(fps: float) -> None:
    """Raise ValueError for frames a second that no file can state."""
    least, most = RATES
    if not least <= fps <= most:
        raise ValueError(
            f"fps must be from {least:g} to {most:g}, got {fps:g}: no player shows other rates"
        )


def check_writable(path: str | Path, *, frames: int | None = None) -> None:
    """Raise the errors of `write_video` now, before the work. Makes the folder of `path`.

    A link is followed: its target is written.

    Args:
        frames: how many there will be, when known: with 1 a `.png` is a file, else a folder.

    Raises:
        ValueError: unknown suffix; `path` is a folder but should be a file, or the reverse; the
            folder to replace holds more than numbered frames; a name that is too long.
        OSError: the folder of `path` cannot be made or written to, a file there is read-only, or
            the encoder is missing.
        ModuleNotFoundError: av (PyAV) is not installed, and the suffix needs it.
    """
    path = Path(path)
    check_video_suffix(path)
    if coding := {".mp4": films.H264, ".gif": films.GIF}.get(path.suffix.lower()):
        films.check_encoder(coding)
    target = _target(path, frames)
    check_replaceable(target)
    if not _is_folder(path, frames):
        if target.is_dir():
            raise ValueError(f"{target} must be a file, but it is a folder")
    elif target.exists():
        if not target.is_dir():
            raise ValueError(f"{target} must be a folder of frames, but it is a file")
        others = [p.name for p in target.iterdir() if not FRAME_NAME.fullmatch(p.name)]
        if others:
            raise ValueError(
                f"{target} must be new or hold numbered PNG frames only, it holds {min(others)}"
            )
    check_folder(real(target).parent)


def read_video(path: str | Path) -> np.ndarray:
    """Read every stored frame of `path`, once, as (F, H, W, 3) uint8.

    Args:
        path: a film that ffmpeg decodes, turned as a player shows it, a PNG picture, or a folder
            of numbered PNG frames.

    Raises:
        FileNotFoundError: nothing is there, or the folder holds no numbered PNG frame.
        OSError: no film, one without a video stream, or a damaged one.
    """
    return np.concatenate([*read_stream(path)])


def read_stream(path: str | Path, *, frames: int = FRAMES_AT_ONCE) -> Iterator[np.ndarray]:
    """Read as `read_video` does, in chunks of at most `frames` frames, (f, H, W, 3) uint8 each.

    Raises:
        ValueError: frames < 1.
        FileNotFoundError, OSError: as `read_video`.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    path = _there(path)
    return (
        _read_pictures(_pictures(path), frames) if _is_pictures(path) else _read_film(path, frames)
    )


def frames_of(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames of chunks, (H, W, 3) uint8 each.

    Raises ValueError for a chunk that is not (f, H, W, 3) uint8, or not as large as the first one.
    """
    size = None
    for chunk in chunks:
        if chunk.ndim != 4 or chunk.shape[-1] != 3 or 0 in chunk.shape[1:]:
            raise ValueError(f"chunks must be (f, H, W, 3), got {chunk.shape}")
        if chunk.dtype != np.uint8:
            raise ValueError(f"chunks must be uint8, got {chunk.dtype}")
        size = size or chunk.shape[1:3]
        if chunk.shape[1:3] != size:
            raise ValueError(f"chunks must have one size, got {size} and {chunk.shape[1:3]}")
        yield from chunk


def video_fps(path: str | Path) -> float | None:
    """Frames a second that the file at `path` states; None for pictures, which state none.

    Raises:
        FileNotFoundError, OSError: as `read_video`.
    """
    path = _there(path)
    if _is_pictures(path):
        return None
    with opened_film(path, path) as film:
        return film.fps


def read_about(path: str | Path) -> dict[str, str]:
    """Texts that `write_video(about=)` stored in the file at `path`, {} where there are none.

    A film that was copied stream by stream (`ffmpeg -c copy`) has them too. A PNG gives whatever
    texts any program stored.

    Raises:
        FileNotFoundError, OSError: as `read_video`.
    """
    path = _there(path)
    if _is_pictures(path):
        return picture_texts(_pictures(path)[0])
    if path.suffix.lower() == ".gif":
        return picture_texts(path)
    with opened_film(path, path) as film:
        return texts_of(film.comment)


def _there(path: str | Path) -> Path:
    path = expanded(path)
    if not path.exists():
        raise FileNotFoundError(f"no video at {path}")
    return path


def _target(path: Path, frames: int | None) -> Path:
    """Path that the frames are written to: `path`, or the folder of a PNG sequence."""
    return path.with_suffix("") if path.suffix and _is_folder(path, frames) else path


def _is_folder(path: Path, frames: int | None) -> bool:
    """Whether the frames go to a folder."""
    return not path.suffix or (path.suffix.lower() == ".png" and frames != 1)


def _is_pictures(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".png"


def _pictures(path: Path) -> list[Path]:
    """Pictures in order: `path`, or the frames in a folder, at least one."""
    if not path.is_dir():
        return [path]
    found = (p for p in path.iterdir() if FRAME_NAME.fullmatch(p.name))
    files = sorted(found, key=lambda p: int(p.stem))
    if not files:
        raise FileNotFoundError(f"{path} holds no frames named like 0000.png")
    return files


def _read_pictures(files: Sequence[Path], frames: int) -> Iterator[np.ndarray]:
    for start in range(0, len(files), frames):
        part = files[start : start + frames]
        yield np.stack([_picture(file) for file in part])


def _picture(file: Path) -> np.ndarray:
    return np.asarray(read_picture(file, file).convert("RGB"))


def _read_film(path: Path, frames: int) -> Iterator[np.ndarray]:
    with opened_film(path, path) as film:
        pictures, size = film.pictures(), None
        while part := [*islice(pictures, frames)]:
            size = size or part[0].shape
            if any(picture.shape != size for picture in part):
                raise OSError(f"{path} cannot be read: its frames change their size")
            rows, columns, _ = size
            if path.suffix.lower() == ".mp4":
                rows, columns = _stored_size(film.comment, rows, columns)
            yield np.stack(part)[:, :rows, :columns]


def _write(
    frames: Iterator[np.ndarray], path: Path, count: int, fps: float, about: Mapping[str, str]
) -> Path:
    target = _target(path, count)
    with replacing(target) as partial:
        match "" if _is_folder(path, count) else path.suffix.lower():
            case ".mp4":
                _write_mp4(frames, partial, fps, about)
            case ".gif":
                encode(frames, partial, films.GIF, fps=min(fps, GIF_RATE))
                add_gif_comment(partial, about)
            case ".png":
                Image.fromarray(next(frames)).save(partial, pnginfo=png_chunks(about))
            case _:
                _write_folder(frames, partial, about)
    return target


def _write_mp4(
    frames: Iterator[np.ndarray], path: Path, fps: float, about: Mapping[str, str]
) -> None:
    first = next(frames)
    height, width = first.shape[:2]
    odd = height % 2 or width % 2
    notes = [ODD_SIZE.format(height=height, width=width) if odd else "", comment_of(about)]
    comment = "\n".join(filter(None, notes))
    even = ((0, height % 2), (0, width % 2), (0, 0))
    padded = (np.pad(frame, even, mode="edge") for frame in chain([first], frames))
    encode(padded, path, films.H264, fps=fps, comment=comment)


def _write_folder(frames: Iterator[np.ndarray], folder: Path, about: Mapping[str, str]) -> None:
    folder.mkdir()
    for i, frame in enumerate(frames):
        chunks = png_chunks({} if i else about)
        Image.fromarray(frame).save(folder / f"{i:04d}.png", pnginfo=chunks)


def _stored_size(comment: str, height: int, width: int) -> tuple[int, int]:
    """Height and width before `_write_mp4` repeated an odd edge; as given for any other film."""
    found = re.match(ODD_SIZE.format(height=r"(\d+)", width=r"(\d+)"), comment)
    if found is None:
        return height, width
    stored = (int(found[1]), int(found[2]))
    # An editor that rescales a film may keep its comment.
    padded = tuple(n + n % 2 for n in stored) == (height, width)
    return stored if padded else (height, width)


def checked_texts(about: Mapping[str, str] | None) -> dict[str, str]:
    """Copy the texts, their lone surrogates (of file names that are not UTF-8) escaped.

    Raises ValueError for a name that is not 1 to 79 characters of ASCII, or a value that is no
    text.
    """
    texts = {}
    for name, text in (about or {}).items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"a name in about must be 1 to 79 characters of ASCII, got {name!r}")
        if not isinstance(text, str):
            raise ValueError(f"about[{name!r}] must be text, got {text!r}")
        texts[name] = text.encode(errors="backslashreplace").decode()
    return texts


def comment_of(texts: Mapping[str, str], *, ascii_only: bool = False) -> str:
    """Write the texts as a comment, "" for none."""
    return json.dumps({MARK: dict(texts)}, ensure_ascii=ascii_only) if texts else ""


def texts_of(comment: str) -> dict[str, str]:
    """Texts in a comment that `comment_of` wrote, also behind other words; {} in any other."""
    start = comment.find(f'{{"{MARK}"')
    try:
        told = json.loads(comment[start:])[MARK] if start >= 0 else {}
        return checked_texts(told)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}


def png_chunks(texts: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """Chunks for Pillow's `save(pnginfo=)`."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    return chunks


def picture_texts(path: Path) -> dict[str, str]:
    """Texts in a PNG or GIF. Raises OSError as `read_picture`."""
    image = read_picture(path, path)
    if isinstance(image, PngImagePlugin.PngImageFile):
        return {str(name): str(text) for name, text in image.text.items()}
    comment = image.info.get("comment", b"")
    return texts_of(comment.decode(errors="replace") if isinstance(comment, bytes) else comment)


def add_gif_comment(path: Path, texts: Mapping[str, str]) -> None:
    """Put the texts into a GIF file, before its first frame."""
    if not texts:
        return
    data, comment = path.read_bytes(), comment_of(texts, ascii_only=True).encode()
    colours = data[10]  # the flag and the size of the global palette
    start = 13 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
    parts = (comment[i : i + GIF_PART] for i in range(0, len(comment), GIF_PART))
    block = GIF_COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    path.write_bytes(data[:start] + block + data[start:])


def read_picture(source: Path | IO[bytes], name: object) -> Image.Image:
    """Read and decode the picture in a file.

    Above Pillow's limit on pixels (`Image.MAX_IMAGE_PIXELS`) a warning says how large the picture
    is. Pictures of twice as many pixels are refused.

    Args:
        name: of the file, for messages.

    Raises:
        OSError: no such file, no picture, a broken one, or one that is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise OSError(_too_large(name, error)) from error
    except OSError as error:
        if error.errno is not None:  # of the file system
            raise
        raise OSError(f"{name} is a broken image: {error}") from error
    except (SyntaxError, ValueError) as error:
        raise OSError(f"{name} is a broken image: {error}") from error
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
        warnings.warn(f"{name} is large, {size}: a smaller one is read faster", stacklevel=2)
    return image


def pixels(image: Image.Image) -> str:
    """Identify a picture by its size and a hash of its pixels."""
    return f"{image.width} x {image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"


def _too_large(name: object, error: Exception) -> str:
    """Write the error; Pillow gives the number of pixels only in its message."""
    found = re.search(r"\d+", str(error))
    has = f"has {int(found[0]):,} pixels" if found else "has too many pixels"
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"{name} {has}, and at most {most:,} are read: scale it down"
