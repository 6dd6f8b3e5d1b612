"""A stream in a file: it grows while it is made, plays if it is cut off, and goes on later.

clip.mp4                        at the end, the whole film
clip.stream/film.mp4            meanwhile, in parts, each of which plays once it is written
clip.stream/chunk-00000.safetensors     latents of each chunk
clip.stream/stream.json         what decides them
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gen_accel.io import read_fields, replacing, save_tensors, write_json
from gen_accel.measure.video_io import count_frames, encode, finish
from gen_accel.outputs import ABOUT, FILM
from gen_accel.parsing import shown
from gen_accel.pipelines.generation.decode import load_latents
from gen_accel.pipelines.generation.progress import Progress
from gen_accel.pipelines.generation.stream import Streamer
from gen_accel.process import locked

if TYPE_CHECKING:
    from collections.abc import Mapping


class StreamFolder:
    """The chunks of a stream, and the film of them that grows.

    Args:
        path: of the folder.
        asked: what decides the chunks, as JSON holds it. Prompts are compared by chunk.
        resume: go on with the chunks that are there; else they are removed.

    Raises:
        ValueError: nothing to go on with, or a stream of other settings.
    """

    def __init__(self, path: Path, asked: "Mapping[str, Any]", *, resume: bool) -> None:
        self.path, self.asked = path, json.loads(json.dumps(asked))
        if not resume:
            for file in (*path.glob("chunk-*.safetensors"), path / FILM, path / ABOUT):
                file.unlink(missing_ok=True)
            return
        if not (path / ABOUT).is_file():
            raise ValueError(
                f"nothing to resume: {path} holds no stream; leave --resume out to begin one"
            )
        self._check(read_fields(path / ABOUT))

    def _check(self, held: "Mapping[str, Any]") -> None:
        for name, value in self.asked.items():
            if name != "prompts" and held.get(name) != value:
                told = f"{name} {shown(held.get(name))}, this one {shown(value)}"
                raise ValueError(
                    f"{self.path} holds a stream of {told}: give the same again, or another --out"
                )
        made = len(self.chunks())
        before, now = (one.get("prompts", [])[:made] for one in (held, self.asked))
        for chunk, (old, new) in enumerate(zip(before, now, strict=False)):
            if old != new:
                raise ValueError(
                    f"{self.path} holds chunk {chunk} of the prompt {shown(old)}, this stream has "
                    f"{shown(new)} there: change prompts after chunk {made - 1} alone"
                )

    def chunks(self) -> list[Path]:
        """Files of the first chunks without a gap."""
        found: list[Path] = []
        while (path := self._chunk(len(found))).is_file():
            found.append(path)
        return found

    def earlier(self) -> list[Tensor]:
        """Latents of the chunks that are there."""
        return [load_latents(path)[0] for path in self.chunks()]

    def keep(self, chunk: int, latents: Tensor) -> None:
        path = self._chunk(chunk)
        with replacing(path) as partial:
            save_tensors({"latents": latents.cpu().contiguous()}, partial, {})

    def write(self, frames: Iterator[np.ndarray], *, fps: float, every: int) -> None:
        """Write the film, which plays up to each `every` frames."""
        write_json(self.path / ABOUT, self.asked)
        encode(frames, self.path / FILM, fps=fps, growing=every)

    def finish(self, target: Path, about: "Mapping[str, str]") -> Path:
        """Write the whole film to its place."""
        made = finish(self.path / FILM, target, about)
        (self.path / FILM).unlink()
        return made

    def _chunk(self, number: int) -> Path:
        return self.path / f"chunk-{number:05d}.safetensors"


def write_streamed(
    streamer: Streamer,
    target: Path,
    folder: Path,
    asked: "Mapping[str, Any]",
    about: Callable[[], "Mapping[str, str]"],
    *,
    fps: float,
    resume: bool = False,
) -> Path:
    """Make a stream in its folder, and then its film at `target`. A stopped one can be resumed.

    Args:
        asked: see `StreamFolder`.
        about: returns the texts that the film keeps, at the end.

    Raises as `StreamFolder`; ValueError for fewer frames than the film has; OSError if the disk
    or the encoder failed.
    """
    lengths = streamer.lengths
    if resume and target.exists() and (has := count_frames(target)) > lengths.frames:
        raise ValueError(
            f"{target} has {has} frames, and a stream only goes on: give --frames {has} or more, "
            f"got {lengths.frames}"
        )
    chunks = [lengths.prompt(streamer.prompts, i) for i in range(lengths.chunks)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder), Progress() as bar:
        place = StreamFolder(folder, {**asked, "prompts": chunks}, resume=resume)
        earlier = place.earlier()[: lengths.chunks]
        bar.say(
            f"streaming {lengths.frames} frames, {lengths.chunks} chunks of "
            f"{lengths.latents * lengths.factor}; each plays in {folder / FILM} once it is made"
        )
        if earlier:
            bar.say(f"{len(earlier)} chunks are there and pass through the cache once more")
        task = bar.add_task(target.name, lengths.frames, unit="frames")

        def frames() -> Iterator[np.ndarray]:
            done, began, start = 0, 0.0, 0
            opened = time.perf_counter()
            for pixels in streamer.frames(earlier, place.keep):
                yield from pixels
                done += len(pixels)
                if not began and done > lengths.first(len(earlier)):
                    began, start = time.perf_counter(), done
                words = f"{target.name}, cache {streamer.cached / 1e6:,.1f} MB"
                left = None
                if began and done > start:
                    speed = (done - start) / (time.perf_counter() - began)
                    words += f", {speed:.1f} a second"
                    left = (lengths.frames - done) / speed
                elif not earlier:  # all of the first chunk is made before its first frame is here
                    left = (lengths.chunks - 1) * (time.perf_counter() - opened)
                bar.update(task, completed=done, description=words, left=left)

        place.write(frames(), fps=fps, every=lengths.latents * lengths.factor)
        return place.finish(target, about())
