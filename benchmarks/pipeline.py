"""Seconds of a denoising step, dense against each method, at real sizes with random weights.

    python benchmarks/pipeline.py --write                 # one block of each kind, on the CPU
    python benchmarks/pipeline.py --device cuda --write   # published sizes, on a GPU
    python benchmarks/pipeline.py --small                 # every model tiny: runs all, times none

A step is one call of the transformer for one sample. Guidance makes it two calls, which changes no
ratio. No layer and no step stays dense, so that the ratio is that of a sparse step; beside it
stands that of a run which keeps its first quarter of the steps dense. What fails parity on the
shape of the model is not timed. See README.md for the columns.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from memory import peak_memory
from pages import write_between_marks
from parity import DTYPES, brief, check_parity, draw, planned, shrink
from torch import Tensor

from gen_accel import (
    BlockMixture,
    Dense,
    Neighborhood,
    Piecewise,
    Radial,
    SparseLinear,
    VideoShape,
    attach,
    kernels,
)
from gen_accel.attention_processors.attached.attachment import (
    Attachment,
    SilentBranch,
)
from gen_accel.attention_processors.attached.records import Summary
from gen_accel.attention_processors.families import family_of
from gen_accel.kernels.self_check import SelfCheckFailed, check_rows
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment, interleaved, other_machine

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "performance.md"

DENSE_START = 0.25  # of the steps, in the column of a whole run
GIANT = 70_000  # tokens on a GPU, from which a step takes so long that two rounds have to do
GRAPHS = 256  # of torch.compile for one piece of code: more than methods and layers need


class Problem(NamedTuple):
    """One model and size.

    Args:
        config: what differs from the defaults of the family's class, which are those of a
            published model.
        grid: frames, rows and columns in tokens.
        text: tokens of the prompt, none of them padding.
        depth: layers of the published model. On a GPU, seconds of a model with fewer are scaled.
    """

    name: str
    family: str
    config: dict[str, Any]
    grid: tuple[int, int, int]
    text: int
    depth: int


WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
COGVIDEOX_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}

WAN_BLOCK = WAN_1_3B | {"num_layers": 1}

# One block of each kind and about 8k tokens, so that all of them take minutes, and one long clip.
CPU_PROBLEMS = (
    Problem("Wan 2.1 1.3B", "wan", WAN_BLOCK, (21, 20, 20), 512, 30),
    Problem("Wan 2.1 1.3B, four times as long", "wan", WAN_BLOCK, (81, 20, 20), 512, 30),
    Problem(
        "HunyuanVideo at half its width",
        "hunyuan_video",
        {"num_attention_heads": 12, "num_layers": 1, "num_single_layers": 1},
        (21, 20, 20),
        256,
        60,
    ),
    Problem("CogVideoX 2B", "cogvideox", {"num_layers": 1}, (21, 20, 20), 226, 30),
    Problem("LTX-Video 2B", "ltx", {"num_layers": 1}, (21, 20, 20), 128, 28),
    Problem(
        "Mochi 1 at half its width",
        "mochi",
        {"num_attention_heads": 12, "pooled_projection_dim": 768, "num_layers": 1},
        (21, 20, 20),
        256,
        48,
    ),
    Problem(
        "FLUX.1 at half its width, 1024 x 1024",
        "flux",
        {
            "num_attention_heads": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "guidance_embeds": True,
        },
        (1, 64, 64),
        512,
        57,
    ),
)

# Those that take longest come last.
CUDA_PROBLEMS = (
    Problem("Wan 2.1 1.3B, 480 x 832, 81 frames", "wan", WAN_1_3B, (21, 30, 52), 512, 30),
    Problem(
        "CogVideoX 5B, 480 x 720, 49 frames", "cogvideox", COGVIDEOX_5B, (13, 30, 45), 226, 42
    ),
    Problem("LTX-Video 2B, 704 x 1216, 161 frames", "ltx", {}, (21, 22, 38), 128, 28),
    Problem("Mochi 1, 480 x 848, 163 frames", "mochi", {"num_layers": 12}, (28, 30, 53), 256, 48),
    Problem("FLUX.1, 1024 x 1024", "flux", {"guidance_embeds": True}, (1, 64, 64), 512, 57),
    Problem("Wan 2.1 1.3B, 480 x 832, 161 frames", "wan", WAN_1_3B, (41, 30, 52), 512, 30),
    Problem("Wan 2.1 14B, 720 x 1280, 81 frames", "wan", {"num_layers": 6}, (21, 45, 80), 512, 40),
    Problem(
        "HunyuanVideo, 720 x 1280, 117 frames",
        "hunyuan_video",
        {"num_layers": 2, "num_single_layers": 4},
        (30, 45, 80),
        256,
        60,
    ),
    Problem("Wan 2.1 1.3B, 480 x 832, 321 frames", "wan", WAN_1_3B, (81, 30, 52), 512, 30),
)

CLASSES = {
    "wan": "WanTransformer3DModel",
    "hunyuan_video": "HunyuanVideoTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
    "flux": "FluxTransformer2DModel",
}

# What --small makes of any model of a family.
TOY: dict[str, dict[str, Any]] = {
    "wan": {"ffn_dim": 32, "text_dim": 16, "freq_dim": 16, "num_layers": 3},
    "hunyuan_video": {
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "rope_axes_dim": (4, 6, 6),
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
    },
    "cogvideox": {
        "time_embed_dim": 16,
        "text_embed_dim": 16,
        "max_text_seq_length": 8,
        "num_layers": 3,
    },
    "ltx": {
        "in_channels": 8,
        "out_channels": 8,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "num_layers": 3,
    },
    "mochi": {
        "pooled_projection_dim": 16,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "num_layers": 3,
    },
    "flux": {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
    },
}
TOY_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TOY_TEXT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--families", nargs="+", choices=CLASSES, default=[*CLASSES])
    parser.add_argument("--models", nargs="+", help="only those with this in their names")
    methods = [*published(VideoShape(2, 2, 2), 1)]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="the blocks, dense and sparse")
    parser.add_argument("--small", action="store_true", help="every model tiny, nothing timed")
    parser.add_argument(
        "--write", action="store_true", help="results/pipeline_DEVICE.json and its table in docs/"
    )
    args = parser.parse_args()
    if args.small and args.write:
        parser.error("--small times nothing that --write could keep")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.compile:  # all methods run the code of one class, and beyond the limit it is eager
        torch._dynamo.config.recompile_limit = GRAPHS

    options = {name: getattr(args, name) for name in ("dtype", "rounds", "seed", "compile")}
    head = environment(args.device) | options
    print(f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {args.dtype}")
    problems = CUDA_PROBLEMS if args.device.type != "cpu" else CPU_PROBLEMS
    if args.small:
        args.rounds = 1
        tiny = [small(problem) for problem in (*CPU_PROBLEMS, *CUDA_PROBLEMS)]
        problems = tuple({(p.family, str(p.config)): p for p in tiny}.values())
    refused = False
    for problem in problems:
        named = args.models is None or any(word in problem.name for word in args.models)
        if problem.family not in args.families or not named:
            continue
        print(problem.name, flush=True)
        rows = []
        for row in measure(problem, args):
            rows.append(row)
            print(line(row, timed=not args.small), flush=True)
        refused |= any("refused" in row for row in rows)
        if args.write:
            path = RESULTS / f"pipeline_{args.device.type}.json"
            rows += others(path, head, problem)
            places = {other.name: place for place, other in enumerate(problems)}
            rows = sorted(
                (row for row in rows if row["model"] in places),
                key=lambda row: places[row["model"]],
            )
            write_json(path, head | {"rows": rows})
            write_page()
    if refused:
        sys.exit("some methods were refused")


def published(video: VideoShape, layers: int) -> dict[str, Any]:
    """The methods at their published settings, which for neighborhood attention are a window of
    18 x 24 x 24 in 30 x 48 x 80 tokens, and here the same shares of the grid. Piecewise attention
    keeps a tenth.

    Radial attention keeps all of an image, which is one frame, as block mixture does in one of the
    three partitions that it goes through from layer to layer. There, and in models of fewer
    layers, it has that partition alone whose cost lies between those of the others.
    """
    sides = zip(video.grid, (18, 24, 24), (30, 48, 80), strict=True)
    frames, rows, columns = (max(1, round(size * near / whole)) for size, near, whole in sides)
    image = video.frames == 1
    methods = {
        "Radial": Radial(),
        "Neighborhood": Neighborhood((frames, rows, columns)),
        "BlockMixture": BlockMixture("2d" if image or layers < 3 else "cycle"),
        "SparseLinear": SparseLinear(),
        "Piecewise": Piecewise(0.1),
    }
    if image:
        del methods["Radial"]
    return methods


def small(problem: Problem) -> Problem:
    config = problem.config | TOY_HEADS | TOY[problem.family]
    grid = (1, 12, 14) if problem.grid[0] == 1 else (5, 6, 8)
    return problem._replace(config=config, grid=grid, text=TOY_TEXT)


@torch.no_grad()
def measure(problem: Problem, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a method."""
    torch.manual_seed(args.seed)
    with default_dtype(DTYPES[args.dtype]), args.device:
        kind = getattr(diffusers, CLASSES[problem.family])
        model: Any = kind(**problem.config).eval()
        given = INPUTS[problem.family](model.config, problem)
    family = family_of(model)
    video = family.tokens(model, given).video
    sites = family.self_attentions(model)
    layers = sorted({site.layer for site in sites})
    head = {
        "model": problem.name,
        "family": problem.family,
        "video": str(video),
        "tokens": video.tokens,
        "layers": len(layers),
        "depth": problem.depth,
    }
    asked = {k: v for k, v in published(video, len(layers)).items() if k in args.methods}
    methods, refused = {}, {}
    for name, method in asked.items():
        try:
            check(name, video, layers, sites[0].dim, args)
        except (ValueError, SelfCheckFailed) as error:
            refused[name] = {**head, "method": brief(method), "refused": str(error)}
        else:
            methods[name] = method

    print(f"  parity held by {', '.join(methods) or 'none'}", flush=True)
    # Taking the time of every attention makes the host wait for a GPU, and no graph can do it.
    methods = {"Dense": Dense(), **methods}
    if args.device.type != "cpu" and video.tokens >= GIANT:
        args = argparse.Namespace(**{**vars(args), "rounds": min(2, args.rounds)})
    taken = take_turns(model, given, methods, args, timed=True)
    apart = args.compile or args.device.type != "cpu"
    whole = take_turns(model, given, methods, args, timed=False) if apart else taken
    scale = problem.depth / len(layers) if args.device.type != "cpu" else 1.0
    dense = figures(taken["Dense"], whole["Dense"], scale)
    for name, method in asked.items():
        if name in refused:
            yield refused[name]
        else:
            own = figures(taken[name], whole[name], scale)
            summary = taken[name].summary
            chosen = {r.choice.kernel for r in summary.records.values() if r.choice is not None}
            yield {
                **head,
                "method": brief(method),
                "kernel": ", ".join(sorted(chosen)),
                "density": summary.density,
                "computed_density": summary.flops_share,
                "scaled_by": scale,
                "rounds": args.rounds,
                **{f"dense_{key}": value for key, value in dense.items()},
                **own,
                **ratios(dense, own),
            }


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As diffusers loads a model: tables that name a dtype keep it, as no `.to()` would."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(
    name: str,
    video: VideoShape,
    layers: Sequence[int],
    dim: int,
    args: argparse.Namespace,
) -> None:
    """Hold the output to the reference: all of it on a smaller grid of the same kind, and some of
    its rows on this one, whose whole matrix of pairs would not fit.

    Raises:
        ValueError, SelfCheckFailed: with the figures.
    """
    size: dict[str, Any] = {"heads": 2, "dim": dim, "dtype": DTYPES[args.dtype]}
    size |= {"device": args.device, "seed": args.seed}
    few = VideoShape(*shrink(VideoShape(*video.grid), Radial()).grid, text=video.text)
    for method in in_layers(published(few, len(layers))[name], layers):
        check_parity(few, method, "auto", draw(few, method, **size), backward=False)
    for method in in_layers(published(video, len(layers))[name], layers):
        q, k, v = inputs = draw(video, method, **size)
        plan = planned(video, method, inputs)
        out = kernels.run(q, k, v, plan, scale=dim**-0.5)
        check_rows(q, k, v, plan, out, scale=dim**-0.5, name="auto")


def in_layers(method: Any, layers: Sequence[int]) -> list[Any]:
    """The different ones of all layers."""
    return list(dict.fromkeys(method.for_layer(layer) for layer in layers))


class Taken(NamedTuple):
    """Of one method in each round: seconds of a step and, where timed, those in self-attention.

    Args:
        summary: of the last step.
        peak_mb: beyond what was in use before a step.
    """

    step: list[float]
    attention: list[float]
    summary: Summary
    peak_mb: float | None


def take_turns(
    model: Any,
    given: dict[str, Any],
    methods: Mapping[str, Any],
    args: argparse.Namespace,
    *,
    timed: bool,
) -> dict[str, Taken]:
    """All methods in turn, each on a model of its own with the same weights."""
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    handles, calls, attention = {}, {}, {}
    for name, method in methods.items():
        twin = deepcopy(model, dict(weights))
        handles[name] = attached(twin, method, args.seed, timed=timed)
        if args.compile and not timed:
            compile_blocks(twin)
        attention[name] = []
        calls[name] = partial(step, twin, given, handles[name], attention[name])
    seconds = interleaved(calls, rounds=args.rounds, device=args.device)
    peaks = dict.fromkeys(methods)
    if args.device.type == "cuda":
        for name, call in calls.items():
            with peak_memory(args.device) as used:
                call()
            peaks[name] = used["mb"]
    return {
        name: Taken(
            seconds[name],
            attention[name][1 : 1 + args.rounds],  # the first was before the clock started
            handles[name].summary(),
            peaks[name],
        )
        for name in methods
    }


def attached(model: Any, method: Any, seed: int, *, timed: bool) -> Attachment:
    """With parameters of the method as if trained, since their start could be left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SilentBranch)
        handle = attach(model, method, timed=timed)
    torch.manual_seed(seed)
    for branch in handle.branches.values():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return handle


def compile_blocks(model: Any) -> None:
    """The whole model where diffusers does not name the blocks that repeat."""
    if model._repeated_blocks:
        model.compile_repeated_blocks()
    else:
        model.compile()


def step(model: Any, given: dict[str, Any], handle: Attachment, attention: list[float]) -> None:
    handle.records.clear()
    model(**given)
    attention.append(handle.summary().seconds or 0.0)


def figures(taken: Taken, whole: Taken, scale: float) -> dict[str, Any]:
    return {
        "s": scale * statistics.median(whole.step),
        "seconds": [scale * value for value in whole.step],
        "attention_s": scale * statistics.median(taken.attention),
        "attention_share": statistics.median(
            part / all for part, all in zip(taken.attention, taken.step, strict=True)
        ),
        "peak_mb": whole.peak_mb,
    }


def ratios(dense: dict[str, Any], own: dict[str, Any]) -> dict[str, float]:
    """Dense over ours; the least and the largest of single rounds beside that of the medians."""
    speedup = dense["s"] / own["s"]
    rounds = [a / b for a, b in zip(dense["seconds"], own["seconds"], strict=True)]
    return {
        "speedup": speedup,
        "least_speedup": min(rounds),
        "most_speedup": max(rounds),
        "attention_speedup": dense["attention_s"] / own["attention_s"],
        "run_speedup": 1 / (DENSE_START + (1 - DENSE_START) / speedup),
    }


def wan_inputs(config: Any, problem: Problem) -> dict[str, Any]:
    return {
        "hidden_states": latents(config.in_channels, problem.grid, config.patch_size[1]),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, problem.text, config.text_dim),
    }


def hunyuan_video_inputs(config: Any, problem: Problem) -> dict[str, Any]:
    return {
        "hidden_states": latents(config.in_channels, problem.grid, config.patch_size),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, problem.text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, problem.text, dtype=torch.int64),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0),
    }


def cogvideox_inputs(config: Any, problem: Problem) -> dict[str, Any]:
    frames, rows, columns = problem.grid
    given: dict[str, Any] = {
        "hidden_states": latents(config.in_channels, problem.grid, config.patch_size).transpose(
            1, 2
        ),
        "encoder_hidden_states": torch.randn(1, problem.text, config.text_embed_dim),
        "timestep": torch.full((1,), 500),
    }
    if config.use_rotary_positional_embeddings:
        given["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), (rows, columns)), (rows, columns), frames
        )
    return given


def ltx_inputs(config: Any, problem: Problem) -> dict[str, Any]:
    frames, rows, columns = problem.grid
    return {
        "hidden_states": torch.randn(1, frames * rows * columns, config.in_channels),
        "encoder_hidden_states": torch.randn(1, problem.text, config.caption_channels),
        "timestep": torch.full((1,), 500),
        "encoder_attention_mask": torch.ones(1, problem.text),
        **{"num_frames": frames, "height": rows, "width": columns},
    }


def mochi_inputs(config: Any, problem: Problem) -> dict[str, Any]:
    return {
        "hidden_states": latents(config.in_channels, problem.grid, config.patch_size),
        "encoder_hidden_states": torch.randn(1, problem.text, config.text_embed_dim),
        "timestep": torch.full((1,), 500),
        "encoder_attention_mask": torch.ones(1, problem.text, dtype=torch.bool),
    }


def flux_inputs(config: Any, problem: Problem) -> dict[str, Any]:
    _, rows, columns = problem.grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels),
        "encoder_hidden_states": torch.randn(1, problem.text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.nn.functional.pad(places, (1, 0)).float(),
        "txt_ids": torch.zeros(problem.text, 3),
        "guidance": torch.full((1,), 3.5),
    }


# Arguments of a forward pass, on the default device and in the default dtype.
INPUTS: dict[str, Callable[[Any, Problem], dict[str, Any]]] = {
    "wan": wan_inputs,
    "hunyuan_video": hunyuan_video_inputs,
    "cogvideox": cogvideox_inputs,
    "ltx": ltx_inputs,
    "mochi": mochi_inputs,
    "flux": flux_inputs,
}


def latents(channels: int, grid: Sequence[int], patch: int) -> Tensor:
    """(1, channels, frames, height, width), of a grid in patches of one frame."""
    frames, rows, columns = grid
    return torch.randn(1, channels, frames, patch * rows, patch * columns)


def others(path: Path, head: dict[str, Any], problem: Problem) -> list[dict[str, Any]]:
    """Rows of other models that are in the file, from here and with the same options."""
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    alike = all(report.get(key) == one for key, one in head.items() if key != "processor")
    if not alike or other_machine(report, head):
        return []
    return [row for row in report["rows"] if row["model"] != problem.name]


def line(row: dict[str, Any], *, timed: bool) -> str:
    head = f"  {row['method']:<40}"
    if "refused" in row:
        return f"{head}  refused: {row['refused']}"
    head += (
        f"density {row['density']:.3f}, computed {row['computed_density']:.3f}, {row['kernel']}"
    )
    if not timed:
        return head
    return (
        f"{head}; step {row['dense_s']:.2f} s dense, {row['s']:.2f} s, {row['speedup']:.2f}x "
        f"({row['least_speedup']:.2f} to {row['most_speedup']:.2f}); attention "
        f"{row['dense_attention_share']:.0%}, {row['attention_speedup']:.2f}x"
    )


def write_page() -> None:
    """All result files that this benchmark wrote, as tables."""
    parts: list[str] = []
    for path in sorted(RESULTS.glob("pipeline_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        compiled = ", compiled blocks" if report["compile"] else ""
        link = f"[results/{path.name}](../benchmarks/results/{path.name})"
        parts += [
            "",
            f"### {report['device']}, {report['dtype']}",
            "",
            f"{report['threads']} threads, torch {report['torch']}{compiled}, medians of "
            f"{report['rounds']} rounds, {link}.",
            "",
            *table(report["rows"]),
        ]
    write_between_marks(PAGE, parts)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    titles = (
        "model | layers | tokens | attention share | method | density | computed | dense, s | "
        "sparse, s | step | attention | run, a quarter dense | peak, MB"
    )
    lines = [f"| {titles} |", "|" + "---|" * (titles.count("|") + 1)]
    for row in rows:
        layers = f"{row['layers']} of {row['depth']}"
        model = (row["model"], layers, f"{row['tokens']:,}")
        if "refused" in row:
            cells = (*model, "", f"`{row['method']}`", f"refused: {row['refused']}", *[""] * 7)
            lines.append(f"| {' | '.join(cells)} |")
            continue
        peak = ""
        if row["peak_mb"] is not None:
            peak = f"{row['dense_peak_mb']:,.0f}, {row['peak_mb']:,.0f}"
        cells = (
            *model,
            f"{row['dense_attention_share']:.0%}",
            f"`{row['method']}`",
            f"{row['density']:.3f}",
            f"{row['computed_density']:.3f}",
            f"{row['dense_s']:.2f}",
            f"{row['s']:.2f}",
            f"{row['speedup']:.2f} ({row['least_speedup']:.2f} to {row['most_speedup']:.2f})",
            f"{row['attention_speedup']:.2f}",
            f"{row['run_speedup']:.2f}",
            peak,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
