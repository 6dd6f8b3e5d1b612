"""Speed and memory of the cache of clips: threads that read, and as many as 100,000 clips.

    python benchmarks/cache.py --clips              # the demo model on mp4 files, by workers
    python benchmarks/cache.py --reading            # reading alone, by threads and by processes
    python benchmarks/cache.py --many 10000 50000 100000   # a stand-in for decoder and encoders
    python benchmarks/cache.py --docs               # tables of docs/cache.md

Each measurement is a process of its own, and Linux tells its memory. With `--many` the files, the
search for them, hashes, captions, shards, entries and the reader are real; the frames are made of
the file's bytes, and latents and texts of a few numbers take the place of the encoders' work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "cache.md"
MIB = 2**20
STEPS = 1000  # of training that --many plans and reads
WORDS = "a red circle moves slowly to the right over a dark ground, seen from the side, number"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", action="store_true", help="encode mp4 files")
    parser.add_argument("--reading", action="store_true", help="read mp4 files, and no more")
    parser.add_argument("--many", type=int, nargs="+", metavar="CLIPS")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=240, help="mp4 files of 96 x 96")
    parser.add_argument("--large", type=int, default=24, help="mp4 files of 720 x 1280")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--name", default="epyc", help="of the machine, in the results' names")
    parser.add_argument("--docs", action="store_true", help=f"write the tables of {PAGE.name}")
    parser.add_argument("--work", type=Path, help="folder for files, kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        given = json.loads(args.one)
        print(json.dumps(ONE[given.pop("kind")](**given)))
        return
    if args.docs:
        write_page()
        return
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        if args.clips:
            rows = [row for stored in stores(args, work) for row in by_workers(stored, args)]
            write(f"cache_clips_{args.name}", rows)
        if args.reading:
            rows = [row for stored in stores(args, work) for row in by_pools(stored)]
            write(f"cache_reading_{args.name}", rows)
        if args.many:
            rows = [alone("many", count=count, work=str(work)) for count in args.many]
            write(f"cache_many_{args.name}", rows)


def stores(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Folders of mp4 files, made where they are not there."""
    found = []
    for count, side in ((args.count, 96), (args.large, 720)):
        folder = work / f"clips_{count}_{side}_{args.frames}"
        make_clips(folder, count, side, args.frames)
        found.append({"folder": str(folder), "count": count, "frames": args.frames})
        found[-1]["stored"] = "96 x 96" if side == 96 else "720 x 1280"
    return found


def make_clips(folder: Path, count: int, side: int, frames: int) -> None:
    """Clips of the demo's world; large ones are enlarged to 16:9."""
    from gen_accel.demo.world import write_clips
    from gen_accel.measure.video_io import read_video, write_video

    if side == 96:
        write_clips(folder, frames=frames, count=count)
        return
    write_clips(folder / ".small", frames=frames, count=count)
    for path in sorted((folder / ".small").glob("*.mp4")):
        if not (folder / path.name).exists():
            video = read_video(path).repeat(8, 1).repeat(14, 2)[:, :720, :1280]
            write_video(video, folder / path.name, fps=16)
            caption = path.with_suffix(".txt").read_text()
            (folder / path.name).with_suffix(".txt").write_text(caption)


def by_workers(stored: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as out:
            yield alone("clips", out=out, workers=workers, **stored)


def by_pools(stored: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for pool, workers in (("none", 0), *((p, n) for n in (1, 2) for p in ("thread", "process"))):
        yield alone("reading", pool=pool, workers=workers, **stored)


def alone(kind: str, **given: Any) -> dict[str, Any]:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--one", json.dumps({"kind": kind, **given})]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(child.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def clips(folder: str, count: int, frames: int, stored: str, out: str, workers: int) -> dict:
    """Cache mp4 files by the demo model, whose encoder runs on one thread."""
    import torch

    from gen_accel import demo
    from gen_accel.lora.caching.encode import cache

    torch.set_num_threads(1)
    options: dict[str, Any] = {"frames": [frames], "sizes": [(96, 96)], "device": "cpu"}
    with measured() as told:
        cache(demo.path(), folder, out, **options, max_tokens=16, workers=workers)
    return {"stored": stored, "clips": count, "frames": frames, "workers": workers, **told}


def reading(folder: str, count: int, frames: int, stored: str, pool: str, workers: int) -> dict:
    """Read mp4 files at 480 x 832, and throw the frames away."""
    paths = sorted(map(str, Path(folder).glob("*.mp4")))
    given = [(path, frames) for path in paths]
    make = {"thread": ThreadPoolExecutor, "process": ProcessPoolExecutor}
    read_one(given[0])
    if pool == "none":
        with measured() as told:
            for one in given:
                read_one(one)
    else:
        more = {"mp_context": get_context("spawn")} if pool == "process" else {}
        with make[pool](workers, **more) as started:
            list(started.map(read_one, given[: 2 * workers]))  # processes import what they need
            with measured(children=pool == "process") as told:
                deque(started.map(read_one, given), maxlen=0)
    about = {"stored": stored, "clips": count, "frames": frames}
    return {**about, "pool": pool, "workers": workers, **told}


def read_one(given: tuple[str, int]) -> Any:
    from gen_accel.lora.data.clips import CaptionedVideo

    path, frames = given
    video = CaptionedVideo(path, "", Path(path))
    return video.read(frames=frames, size=(480, 832), fps=16.0)


def many(count: int, work: str) -> dict[str, Any]:
    """Find, cache, cache again, open and read so many clips."""
    import torch

    from gen_accel import demo
    from gen_accel.attention_processors.families import family_named
    from gen_accel.lora.batches import order
    from gen_accel.lora.caching.encode import cache
    from gen_accel.lora.caching.encoders import load_encoders
    from gen_accel.lora.caching.latents import LatentCache
    from gen_accel.lora.data.finding import find_videos

    torch.set_num_threads(1)
    data = make_files(Path(work) / f"many_{count}", count)
    wan: Any = family_named("wan")
    wan.encode_video = _latents
    wan.encode_prompt = _texts
    pipe = load_encoders(demo.path(), "cpu", "auto").pipe
    transformer = load_encoders(demo.path(), "cpu", "auto").transformer
    pipe.transformer = transformer
    _warm_up(pipe)
    row: dict[str, Any] = {"clips": count, "start_mib": held("VmRSS") / MIB}
    options: dict[str, Any] = {"frames": [5], "sizes": [(16, 16)], "device": "cpu", "workers": 2}
    with tempfile.TemporaryDirectory(dir=work) as out:
        for name in ("first", "second"):
            with measured() as told:
                videos = StandIns(find_videos(data))
                report = cache(pipe, videos, out, **options, max_tokens=16, shard_bytes=2**24)
                del videos
            row[name] = told | {"encoded": report.encoded, "kept": report.kept}
            del report
        row["written_mib"] = sum(p.stat().st_size for p in Path(out).iterdir()) / MIB
        with measured() as told:
            latents = LatentCache(out)
            buckets = latents.buckets(2)
            plan = order(list(buckets.values()), STEPS, 1, 0)
            for [clip] in plan:
                latents.latents(clip)
                latents.conditions(clip)
        row["training"] = told
        row["digest"] = latents.digest
    return row


def make_files(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i // 1000:03d}" / f"clip_{i:06d}.mp4"
        if not i % 1000:
            path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.with_suffix(".txt").write_text(f"{WORDS} {i}")
            path.write_text(f"{i}")
    return folder


class StandIns(Sequence):
    """Clips with frames of their bytes in the place of a film's."""

    def __init__(self, videos: Sequence[Any]) -> None:
        self._videos, self._kind = videos, _stand_in()

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: Any) -> Any:
        video = self._videos[index]
        return self._kind(video.name, video.caption, video.source)


def _stand_in() -> Any:
    import numpy as np

    from gen_accel.lora.data.clips import CaptionedVideo

    class StandIn(CaptionedVideo):
        @contextmanager
        def playing(
            self, fps: float | None, tell: Callable[[str], object] = str
        ) -> Iterator[Iterator[np.ndarray]]:
            assert isinstance(self.source, Path)
            number = int(self.source.read_text())
            level = number % 256, number // 256 % 256, number // 65536
            yield iter([np.full((16, 16, 3), level, np.uint8) for _ in range(5)])

        def extent(self) -> tuple[int, float | None]:
            return 5, 0.3125

    return StandIn


def _latents(pipe: Any, video: Any, generator: Any = None) -> Any:
    """(B, 16, 2, 2, 2) of the clip's colour."""
    import torch

    level = video.mean((2, 3, 4)).repeat(1, 6)[:, :16]
    return level[..., None, None, None] + torch.linspace(0, 1, 8).view(2, 2, 2)


def _texts(pipe: Any, prompts: list[str], max_tokens: int | None = None) -> Any:
    """(B, 4, 8) of the last characters."""
    import torch

    ends = torch.tensor([[ord(c) for c in prompt[-8:].rjust(8)] for prompt in prompts]) / 128
    return {"encoder_hidden_states": ends[:, None].expand(-1, 4, -1)}


def _warm_up(pipe: Any) -> None:
    """Import and allocate once what does not depend on the number of clips."""
    import numpy as np

    from gen_accel.lora.caching.encode import cache
    from gen_accel.lora.data.clips import CaptionedVideo

    frames = np.zeros((5, 16, 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as out:
        options: dict[str, Any] = {"frames": [5], "sizes": [(16, 16)], "device": "cpu"}
        cache(pipe, [CaptionedVideo("a", "a", frames)], out, **options, max_tokens=16)


ONE = {"clips": clips, "reading": reading, "many": many}


@contextmanager
def measured(*, children: bool = False) -> Iterator[dict[str, Any]]:
    """Seconds on the clock and of the processor, and the most memory, of what runs inside."""
    import os

    from gen_accel.measure.machine import ExternalLoad

    def spent() -> float:
        times = os.times()
        return times.user + times.system

    def of_children() -> float:
        import psutil

        found = (child.cpu_times() for child in psutil.Process().children(recursive=True))
        return sum(one.user + one.system for one in found)

    told: dict[str, Any] = {}
    forget_the_peak()
    load = ExternalLoad()
    others = of_children() if children else 0.0
    before, clock = spent(), time.perf_counter()
    yield told
    told["seconds"] = time.perf_counter() - clock
    told["cpu_seconds"] = spent() - before + (of_children() - others if children else 0.0)
    told["peak_mib"] = held("VmHWM") / MIB
    told["busy"] = None if children else load.busy()


def held(name: str) -> int:
    """Bytes: VmRSS is what this process holds now, VmHWM the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no memory: this benchmark needs Linux")


def forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def write(name: str, rows: list[dict[str, Any]]) -> None:
    from gen_accel.measure import write_json
    from gen_accel.measure.machine import environment

    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment("cpu"), "rows": rows})
    print(f"written to {path}")


def write_page() -> None:
    """All result files of this benchmark, as tables."""
    from pages import write_between_marks

    parts: list[str] = []
    for kind, table in TABLES.items():
        for path in sorted(RESULTS.glob(f"cache_{kind}_*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            link = f"[results/{path.name}](../benchmarks/results/{path.name})"
            device = report["environment"]["device"]
            busy = sum(any_busy(row) for row in report["rows"])
            beside = f"; others were busy during {busy} of {len(report['rows'])} rows"
            parts += ["", f"### {TITLES[kind]}", "", f"{device}, {link}{beside}.", ""]
            parts += table(report["rows"])
    write_between_marks(PAGE, parts)


def any_busy(row: dict[str, Any]) -> bool:
    told = [row, *(part for part in row.values() if isinstance(part, dict))]
    return any(one.get("busy") for one in told)


def clips_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| clips | stored | workers | clips a second | processor, s a clip | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['clips']} of {row['frames']} frames | {row['stored']} | {row['workers']} | "
            f"{row['clips'] / row['seconds']:.2f} | {row['cpu_seconds'] / row['clips']:.3f} | "
            f"{row['peak_mib']:,.0f} |"
        )
    return lines


def reading_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| stored | read by | clips a second | processor, s a clip |",
        "|---|---|---|---|",
    ]
    several = {"thread": "threads", "process": "processes"}
    for row in rows:
        by = "the main thread"
        if row["workers"]:
            kind = row["pool"] if row["workers"] == 1 else several[row["pool"]]
            by = f"{row['workers']} {kind}"
        lines.append(
            f"| {row['stored']} | {by} | {row['clips'] / row['seconds']:.1f} | "
            f"{row['cpu_seconds'] / row['clips']:.3f} |"
        )
    return lines


def many_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| clips | first run, processor s | peak, MiB | second run, processor s | peak, MiB | "
        f"open and {STEPS:,} steps, processor s | peak, MiB | bytes of memory a clip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for before, row in zip([None, *rows], rows, strict=False):
        cells = [f"{row['clips']:,}"]
        for name in ("first", "second", "training"):
            cells += [f"{row[name]['cpu_seconds']:.1f}", f"{row[name]['peak_mib']:,.0f}"]
        cells.append("" if before is None else f"{growth(before, row):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def growth(before: dict[str, Any], row: dict[str, Any]) -> float:
    """Bytes by which the peak of a first run grows with each clip."""
    most = row["first"]["peak_mib"] - before["first"]["peak_mib"]
    return most * MIB / (row["clips"] - before["clips"])


TABLES = {"clips": clips_table, "reading": reading_table, "many": many_table}
TITLES = {
    "clips": "Encoding by the demo model",
    "reading": "Reading alone, at 480 x 832",
    "many": "Many clips",
}

if __name__ == "__main__":
    main()
