"""VBench's prompts, its names for their videos, and the dimension that needs no network.

    python examples/vbench/vbench.py prompts --dimension color --samples 5 --out prompts.txt
    gen-accel generate --model models/wan --prompts prompts.txt --out clips/clip.mp4
    python examples/vbench/vbench.py place clips/clip.mp4 --prompts prompts.txt --out for_vbench
    python examples/vbench/vbench.py score for_vbench

Huang et al., 2024, https://arxiv.org/abs/2311.17982. `vbench.json` holds the 946 prompts, of which
944 differ, the dimensions and the networks of VBench 0.1.5, under its licence, Apache-2.0. Fifteen
of the sixteen dimensions need networks: the package `vbench` computes them, in an environment of
its own.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gen_accel.io import replacing
from gen_accel.measure.motion import measure_file
from gen_accel.paths import FILM_SUFFIXES, numbered
from gen_accel.pipelines.generation.config import read_prompts
from gen_accel.registry import nearest_to

FILE = Path(__file__).with_name("vbench.json")
OWN = "temporal_flickering"


@cache
def table() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def dimensions() -> list[str]:
    """VBench's dimensions, in its order."""
    return [*table()["networks"]]


def prompts(chosen: Iterable[str] = (), *, count: int | None = None) -> list[str]:
    """VBench's prompts, each once, in its order.

    Args:
        chosen: dimensions; none: all.
        count: so many of them, spread evenly over the list.

    Raises:
        ValueError: an unknown dimension, or a count that is not 1 to the number of prompts.
    """
    wanted = {*chosen} or {*dimensions()}
    for name in wanted - {*dimensions()}:
        raise ValueError(
            f"dimension must be one of {', '.join(dimensions())}, got {name!r}"
            f"{nearest_to(name, dimensions())}"
        )
    texts = [
        text
        for part in table()["parts"]
        if wanted & {*part["dimensions"]}
        for text in part["prompts"]
    ]
    found = [*dict.fromkeys(texts)]
    if count is None:
        return found
    if not 1 <= count <= len(found):
        raise ValueError(f"count must be 1 to {len(found)}, the number of prompts, got {count}")
    return [found[i * len(found) // count] for i in range(count)]


def dimensions_of(video: str | Path) -> list[str]:
    """Dimensions that VBench asks of a video by its name, "PROMPT-0.mp4"; [] for other names."""
    prompt = re.sub(r"-\d+$", "", Path(video).stem)
    asked = {
        name
        for part in table()["parts"]
        if prompt in part["prompts"]
        for name in part["dimensions"]
    }
    return [name for name in dimensions() if name in asked]


def names_of(texts: Iterable[str]) -> list[str]:
    """Names without suffix that VBench expects: "PROMPT-0" for the first video of a prompt,
    "PROMPT-1" for the next of the same."""
    seen: dict[str, int] = {}
    names = []
    for text in texts:
        seen[text] = seen.get(text, -1) + 1
        names.append(f"{text}-{seen[text]}")
    return names


def place(texts: Sequence[str], videos: Sequence[Path], folder: Path) -> list[Path]:
    """Put the videos of prompts into a folder under VBench's names, as hard links if the file
    system has them, else as copies. Videos that are not made yet are left out.

    Raises:
        FileNotFoundError: none of the videos exists.
        ValueError: a video that is a folder of frames, or a prompt that cannot be a file's name.
    """
    there = [
        (video, name)
        for video, name in zip(videos, names_of(texts), strict=True)
        if video.exists()
    ]
    if not there:
        raise FileNotFoundError(f"none of the {len(videos)} videos is there, such as {videos[0]}")
    for video, name in there:
        if video.is_dir():
            raise ValueError(f"{video} must be a file, which VBench reads, but it is a folder")
        if Path(name).name != name:
            raise ValueError(f"a prompt of VBench is the name of a file, got {name[:-2]!r}")
    placed = []
    for video, name in there:
        target = folder / f"{name}{video.suffix}"
        with replacing(target) as partial:
            try:
                os.link(video, partial)
            except OSError:
                shutil.copyfile(video, partial)
        placed.append(target)
    return placed


def flickering(videos: Sequence[Path]) -> tuple[float | None, list[Path]]:
    """Temporal flickering, 0 to 1, and the videos that count: by their names those of this
    dimension's prompts; all, if no name is a prompt of VBench.

    1 less the mean absolute difference of consecutive frames over all pixels and colours, as a
    share of the range; the mean over videos, which VBench asks to be of still scenes.
    """
    asked = {video: dimensions_of(video) for video in videos}
    counted = [video for video in videos if OWN in asked[video] or not any(asked.values())]
    values = [measure_file(video).flicker for video in counted]
    return (sum(values) / len(values) if values else None), counted


def weights_folder() -> Path:
    """Folder with VBench's weights: VBENCH_CACHE_DIR, or ~/.cache/vbench."""
    named = os.environ.get("VBENCH_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "vbench"


def score(folder: Path) -> dict[str, Any]:
    """The score of `flickering`, and the files that the other dimensions need."""
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in FILM_SUFFIXES)
    value, counted = flickering(videos)
    return {
        OWN: {"score": value, "videos": [*map(str, counted)]},
        **{
            name: [{**one, "there": (weights_folder() / one["file"]).is_file()} for one in needs]
            for name, needs in table()["networks"].items()
            if needs
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prompts", help="Write or print the prompts.")
    verb.add_argument("--dimension", action="append", default=[], help="May be repeated.")
    verb.add_argument("--count", type=int, help="Number of prompts, spread evenly.")
    verb.add_argument("--samples", type=int, default=1, help="Lines of each prompt.")
    verb.add_argument("--out", type=Path)
    verb = verbs.add_parser("place", help="Give numbered videos the names that VBench expects.")
    verb.add_argument("video", type=Path, help="The --out of `gen-accel generate --prompts`.")
    verb.add_argument("--prompts", type=Path, required=True)
    verb.add_argument("--out", type=Path, required=True)
    verb = verbs.add_parser("score", help="Compute temporal flickering; list what others need.")
    verb.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    if args.verb == "score":
        print(json.dumps(score(args.folder), indent=2))
    elif args.verb == "place":
        texts = read_prompts(args.prompts)
        placed = place(texts, numbered(args.video, len(texts)), args.out)
        print(f"{args.out}  ({len(placed)} of {len(texts)} videos)")
    else:
        texts = [
            text for text in prompts(args.dimension, count=args.count) for _ in range(args.samples)
        ]
        if args.out is None:
            print("\n".join(texts))
        else:
            args.out.write_text("\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
