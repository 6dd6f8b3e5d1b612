"""Memory of the demo model's streams: what they know of an object that was hidden.

    gen-accel train configs/lora/demo_recall.yaml    # first, after the commands that it names
    python benchmarks/recall.py              # losses, then clips: an hour on one core
    python benchmarks/recall.py --losses     # five minutes
    python benchmarks/recall.py --docs       # the table of docs/streaming.md

An object is shown, hidden for four chunks, and returns under a caption of its motion alone. The
loss of the chunk in which it returns is of drawn clips, with this object or with another one in
the cache. A clip is right if the chunk of its return shows the colour and the shape that were
asked for five chunks earlier; by chance one in twelve is. No LoRA was trained on these objects
with these motions. A clip that is there is not made again.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kept import clip_file, keep_clip, kept_clip
from pages import RESULTS, begun, machine, write_table
from rich.progress import track
from streaming import DOCS, SCENES, SETTINGS, SIZE, Seen, streamed
from torch import Tensor

from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.attention_processors.families import family_of
from gen_accel.demo import COLORS, SHAPES
from gen_accel.demo.detector import detect
from gen_accel.demo.world import Scene
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.stream import StreamSettings
from gen_accel.pipelines.long_video.chunks import ChunkedAttention
from gen_accel.pipelines.zones import Zones

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from demo_model.recall import LENGTHS, Recall

RESULT = RESULTS / "recall.json"
SEED, CLIPS, LOSSES = 9000, 48, 24  # first seed; clips and losses of a setting
LEVELS = 0.95, 0.8  # noise of the returning chunk
SEEN: dict[str, Seen] = {
    **SETTINGS,
    "window 1, grid": {"window": 1, "middle": "grid"},
    "window 1, all": {"window": 1, "middle": "all"},
}
MEASURED = ("window 1", "window 2", "window 1, grid", "window 1, salient", "window 1, all")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lora", type=Path, default=Path("outputs/demo_recall/lora"))
    parser.add_argument("--work", type=Path, default=Path("outputs/recall"))
    parser.add_argument("--clips", type=int, default=CLIPS, help="of each setting")
    parser.add_argument("--settings", nargs="+", default=[*MEASURED], choices=[*SEEN])
    parser.add_argument("--losses", action="store_true", help="measure these alone")
    parser.add_argument("--docs", action="store_true", help="write the table alone")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    report = begun(args.out, {"losses": {}, "clips": {}})
    if not args.docs:
        torch.set_num_threads(1)
        recipe = read_recipe(args.lora)
        kept = {name: getattr(recipe, name) for name in ("rank", "steps", "frames", "stream")}
        report |= environment() | {"lora": kept}
        pipe = load("demo", Loading(device="cpu", loras=(str(args.lora),)))
        for name, rows in losses(pipe, args):
            report["losses"][name] = rows
            write_json(args.out, report)
        for name in args.settings if not args.losses else ():
            report["clips"][name] = clips(pipe, name, args)
            write_json(args.out, report)
    if args.out == RESULT:
        write_table(DOCS, "recall", "\n".join(table(report)))


def recalls(count: int) -> list[Recall]:
    """Plan clips: nothing, an object, nothing for four chunks, and the object."""
    return [Recall((SCENES[i % len(SCENES)],), lead=1) for i in range(count)]


def other_than(scene: Scene) -> Scene:
    """Return an object of another colour and another shape with the same motion."""
    colors, shapes = [*COLORS], [*SHAPES]
    color = colors[(colors.index(scene.color) + 1) % len(colors)]
    shape = shapes[(shapes.index(scene.shape) + 1) % len(shapes)]
    return Scene(color, shape, scene.direction, scene.speed)


@torch.no_grad()
def losses(pipe: Any, args: argparse.Namespace) -> Iterator[tuple[str, list[Row]]]:
    """Yield each setting and a row a clip: the loss of the chunk that returns, at each of
    `LEVELS`, after the object itself and after another one."""
    family, transformer = family_of(pipe.transformer), pipe.transformer
    own = StreamSettings.of(read_recipe(args.lora))
    assert own is not None, "a LoRA that streams"
    said: dict[str, dict[str, Tensor]] = {}

    def conditions(text: str) -> dict[str, Tensor]:
        if text not in said:
            said[text] = family.encode_prompt(pipe, [text], 16)
        return said[text]

    films = []
    for i, recall in enumerate(track(recalls(LOSSES), "clips for the losses")):
        shown = recall, replace(recall, scenes=(other_than(recall.scene),))
        films.append([(each.captions(), chunks_of(pipe, each, SEED + i)) for each in shown])
    for name in args.settings:
        attention = ChunkedAttention(transformer, Zones(**{**own.zones.to_dict(), **SEEN[name]}))
        rows = []
        for i, recall in enumerate(track(recalls(LOSSES), f"losses, {name}")):
            row: Row = {"prompt": recall.scene.caption, "seed": SEED + i}
            clean = films[i][0][1][recall.returns]
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(i))
            for which, (texts, film) in zip(("own", "other"), films[i], strict=True):
                attention.forget()
                for chunk in range(recall.returns):
                    text = LENGTHS.prompt(texts, chunk)
                    with attention.chunk("cond", keeps=True):
                        family.predict(transformer, film[chunk], torch.zeros(1), conditions(text))
                last = conditions(LENGTHS.prompt(texts, recall.returns))
                for level in LEVELS:
                    mixed = (1 - level) * clean + level * noise
                    with attention.chunk("cond"):
                        found = family.predict(transformer, mixed, torch.tensor([level]), last)
                    error = (found - (noise - clean)).square().mean().item()
                    row[f"{which}_{level:g}"] = error
            rows.append(row)
        attention.remove()
        yield name, rows


def chunks_of(pipe: Any, recall: Recall, seed: int) -> list[Tensor]:
    """Draw a clip up to the return and encode it, by chunks."""
    generator = torch.Generator().manual_seed(seed)
    frames = LENGTHS.first(recall.returns + 1)
    video = recall.draw(frames=frames, size=SIZE, generator=generator)
    latents = family_of(pipe.transformer).encode_video(pipe, video[None])
    return [*latents.split(LENGTHS.latents, dim=2)]


def clips(pipe: Any, name: str, args: argparse.Namespace) -> list[Row]:
    """Rows of a setting, one a clip, of which the first half show objects of `SCENES`, each once,
    and the second half the same with other seeds."""
    place, rows = args.work / name.replace(", ", "_").replace(" ", "_"), []
    for i, recall in enumerate(track(recalls(args.clips), f"clips, {name}")):
        begin, end = map(LENGTHS.first, (recall.returns, recall.returns + 1))
        if not clip_file(place, i).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                told = recall.captions(), SEED + i, SEEN[name], args.lora, end
                video, _ = streamed(pipe, *told)
            keep_clip(place, i, video)
        seen, scene = detect(kept_clip(place, i)[begin:end]), recall.scene
        row: Row = {"prompt": scene.caption, "seed": SEED + i, "shows": seen.caption}
        row |= {"color": seen.color == scene.color, "shape": seen.shape == scene.shape}
        row |= {"direction": seen.direction == scene.direction}
        rows.append(row | {"right": row["color"] and row["shape"]})
    return rows


def table(report: dict[str, Any]) -> list[str]:
    """Rows of the table: losses and clips of each setting."""
    lora, least = report["lora"], f"{LEVELS[0]:g}"
    lines = [
        f"The demo model with a LoRA that goes on from its own for streams ({lora['steps']} steps "
        f"on clips of {lora['frames']} frames); {machine(report)}. Loss: of the chunk of the "
        f"return at noise {LEVELS[0]:g} and {LEVELS[1]:g}, mean of {LOSSES} clips; with another: "
        f"at {LEVELS[0]:g}, after an object of another colour and shape. Right: generated clips "
        "whose object returns in its colour and shape.",
        "",
        "| chunks seen | loss | with another | colour | shape | right | of |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in report["losses"].items():
        own = [statistics.fmean(row[f"own_{level:g}"] for row in rows) for level in LEVELS]
        other = statistics.fmean(row[f"other_{least}"] for row in rows)
        made = report["clips"].get(name, [])
        counts = [sum(row[what] for row in made) for what in ("color", "shape", "right")]
        told = [*counts, len(made)] if made else [""] * 4
        lines.append(
            f"| {name} | {own[0]:.3f}, {own[1]:.3f} | {other:.3f} | {' | '.join(map(str, told))} |"
        )
    return lines


if __name__ == "__main__":
    main()
