"""Cost of a stream, before it: that of a chunk, which all have once the cache is full."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gen_accel.attention_processors import Dense
from gen_accel.measure.cost.figures import WIDTH, Range, duration, gigabytes, span, wrapped
from gen_accel.measure.cost.forecast import Forecast, forecast
from gen_accel.measure.cost.model import Source, subject_of
from gen_accel.measure.cost.work import Work
from gen_accel.pipelines.zones import STEPS, Zones


@dataclass(frozen=True, kw_only=True)
class StreamForecast:
    """Seconds and bytes to expect of a stream. `to_dict()` for a report, `lines()` for people.

    Args:
        chunk: of a clip as long as a chunk, in one step, without a cache.
        zones: what a chunk sees of earlier ones.
        frames: of a chunk.
        total: frames of the stream; None for one without end.
        steps: of a chunk, without the pass into the cache.
        keys: number that a token of the chunk sees.
        seconds: of a chunk.
        cache: bytes of all caches.
        fps: frames a second at which it plays.
    """

    chunk: Forecast
    zones: Zones
    frames: int
    total: int | None
    steps: int
    keys: int
    seconds: Range
    cache: int
    fps: float

    @property
    def frame(self) -> Range:
        """Seconds of a frame."""
        return self.seconds.times(1 / self.frames)

    @property
    def peak(self) -> Range:
        """Bytes on the device at most, in the mode that was asked for."""
        own = self.chunk.peaks[self.chunk.offload]
        return replace(own, low=own.low + self.cache, high=own.high + self.cache)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the device; None if that is unknown."""
        memory = self.chunk.rates.memory
        return None if memory is None else self.peak.high <= memory

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.chunk.estimate.to_dict().get("model"),
            "device": self.chunk.rates.device,
            "zones": self.zones.to_dict(),
            "frames_per_chunk": self.frames,
            "frames": self.total,
            "steps": self.steps,
            "keys": self.keys,
            "seconds": {"chunk": self.seconds.pair(), "frame": self.frame.pair()},
            "cache_bytes": self.cache,
            "peak_bytes": self.peak.pair(),
            "fits": self.fits,
            "fps": self.fps,
            "frames_per_second": [1 / self.frame.high, 1 / self.frame.low],
        }

    def lines(self, width: int = WIDTH) -> list[str]:
        """Lines for a terminal, of at most `width` characters."""
        return wrapped(self._lines(), width)

    def _lines(self) -> Iterator[str]:
        low, high = 1 / self.frame.high, 1 / self.frame.low
        yield (
            f"a stream, {self.zones}: each of {self.frames} frames, {self.steps} steps and a pass "
            f"into the cache, {self.keys:,} keys"
        )
        yield f"{self.chunk.rates.device}: {duration(self.seconds, 0.01)} a chunk, constant"
        speed = span(Range(low, high, ""), "")
        keeps = "it keeps up" if low >= self.fps else "it may keep up"
        if high < self.fps:
            keeps = f"it falls behind, above {high:.2g} a second"
        yield f"{speed} frames a second, and it plays at {self.fps:g}: {keeps}"
        if self.total is not None:
            whole = self.frame.times(self.total)
            yield f"{self.total:,} frames: {duration(whole)}"
        memory, peak = self.chunk.rates.memory, self.peak
        told = f"{gigabytes(peak.high)}, of which {gigabytes(self.cache)} are the cache, constant"
        if memory is None:
            yield f"peak: {told}"
        else:
            verb = "fits" if self.fits else "does not fit"
            yield f"{verb} into {gigabytes(memory)}: {told}"
        yield f"rates: {self.chunk.rates.origin}"


def forecast_stream(
    source: Source,
    *,
    zones: Zones,
    height: int,
    width: int,
    fps: float,
    frames: int | None = None,
    steps: int | None = None,
    **options: Any,
) -> StreamForecast:
    """Forecast a stream, without loading the model.

    Args:
        source, options: see `measure.cost.forecast.forecast`.
        frames: of the whole stream; None for one without end.

    Raises as `forecast`.
    """
    steps = steps or STEPS
    subject = subject_of(source, options.get("text"))
    latents = zones.frames * subject.patch[0]
    clip = 1 + (latents - 1) * subject.temporal
    chunk = forecast(
        source, Dense(), height=height, width=width, num_frames=clip, steps=1, **options
    )
    grid = subject.whole(subject.grid(height, width, clip))
    samples = chunk.calls * chunk.batch
    wide = sum(site.heads * site.dim for site in subject.sites)
    more = Work(0, 4.0 * samples * grid.tokens * zones.kept(grid) * wide, 0)
    step, seen = chunk.dense, chunk.rates.seconds(more)
    whole = latents * subject.temporal
    decoding = Range(0, 0, "") if chunk.decoding is None else chunk.decoding.times(whole / clip)
    low, high = (
        (steps + 1) * (getattr(step, side) + getattr(seen, side)) + getattr(decoding, side)
        for side in ("low", "high")
    )
    return StreamForecast(
        chunk=chunk,
        zones=zones,
        frames=whole,
        total=frames,
        steps=steps,
        keys=zones.tokens(grid),
        seconds=Range(low, high, chunk.rates.origin),
        cache=2 * samples * zones.kept(grid) * wide * chunk.dtype.itemsize,
        fps=fps,
    )
