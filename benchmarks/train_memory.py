"""Memory and seconds of training steps, planned against measured, on a CPU.

    python benchmarks/train_memory.py
    python benchmarks/train_memory.py --model tiny --tokens 1248
    python benchmarks/train_memory.py --tokens 2080 --only fp8 "swap 2" --out outputs/memory.json
    python benchmarks/train_memory.py --layers 1 --tokens 8320 33280 --rounds 1 --precision no

A CPU without AVX-512 multiplies bfloat16 seven to eighteen times slower than float32: seconds
there are taken with --precision no.

Each row is one set of options, in a process of its own: two steps of the trainer itself on a model
of half the published width with random weights. Measured is the most that torch's allocator held
at a time, the model included, as its profiler records each allocation; and, as a cross-check, the
highest mark of resident memory less the mark before the model was made. Planned is
`gen_accel.lora.forecast_training`, which knows the config alone.

Seconds are processor time of a step. The default (`gradient_checkpointing: on`, nothing else) and
each option take turns in one process, and the least of the rounds counts. With `--rounds 0` they
are those of the steps whose allocations are recorded, one process an option.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from memory import peak_memory
from pages import write_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gen_accel.attention_processors.families import family_of
from gen_accel.io import write_json
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.forecast import forecast_training
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.processes import accelerator_for
from gen_accel.lora.trainer import Trainer
from gen_accel.lora.trial import RandomClips
from gen_accel.measure.cost.figures import Range
from gen_accel.measure.cost.model import cast
from gen_accel.measure.cost.rates import KINDS, Rates, measure_rates
from gen_accel.measure.machine import check_same_machine, environment
from gen_accel.pipelines.generation.quantising import load_quantised

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train_memory.json"
PAGE = HERE.parent / "docs" / "memory.md"
MARK = "train memory"
# glibc gives back what is freed of blocks above this size.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
HEAD_DIM = 128
CONFIG = {"patch_size": (1, 2, 2), "attention_head_dim": HEAD_DIM}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 32},
        **{"ffn_dim": 512, "num_layers": 4, "text_dim": 64, "freq_dim": 64},
    },
    "wan_1_3b": CONFIG | {"num_attention_heads": 6, "ffn_dim": 4480, "num_layers": 4},
    "wan_14b": CONFIG | {"num_attention_heads": 20, "ffn_dim": 6912, "num_layers": 3},
}
CLASS = "WanTransformer3DModel"
ROWS, COLUMNS = 16, 26  # of tokens, so that 5 frames are 2,080
DEFAULT: dict[str, Any] = {"gradient_checkpointing": "on"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpointing": {"gradient_checkpointing": "off"},
    "offload": {"gradient_checkpointing": "offload"},
    "fp8": {"base": "fp8"},
    "int8": {"base": "int8"},
    "nf4": {"base": "nf4"},
    "swap 3": {"blocks_to_swap": 3},
    "parts": {"checkpoint_parts": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "SGD": {"optimizer": "torch.optim.SGD"},
    "Adafactor": {"optimizer": "torch.optim.Adafactor"},
    "Prodigy": {"optimizer": "prodigyopt.Prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "schedulefree.AdamWScheduleFree"},
    "rank 16": {"rank": 16},
    "EMA": {"ema_decay": 0.9},
    "float32": {"mixed_precision": "no"},
    "dense": {"method": "dense"},
    "piecewise": {"method": "piecewise"},
    "2 clips": {"batch_size": 2},
    "2 micro-steps": {"gradient_accumulation": 2},
    "two stages": {"stages": ("half", "whole")},
    "offload, nf4, swap 3": {
        "gradient_checkpointing": "offload",
        "base": "nf4",
        "blocks_to_swap": 3,
    },
}
# Accelerate has one count of micro-steps for all trainings of a process.
UNTIMED = ("2 micro-steps",)


def measure(
    kind: str, option: str, tokens: int, folder: Path, layers: int, precision: str = "bf16"
) -> dict[str, Any]:
    """Plan and measure one set of options, in this process."""
    chosen, config = _config(kind, option, tokens, folder, layers, precision)
    planned = _planned(config)
    size, others = planned.in_one, _alive()
    with peak_memory(torch.device("cpu")) as used, _recorded() as recorded:
        run = _run(config, _model(config, chosen))
        recorded["before"] = _alive() - others
        begun = time.process_time()
        with torch.profiler.record_function(STEPS):
            trained = run.train(False)
        spent = time.process_time() - begun
    peak = recorded["peak"]
    return {
        "option": option,
        "tokens": tokens,
        "planned_mb": size / 1e6,
        "measured_mb": peak / 1e6,
        "error": size / peak - 1,
        "resident_mb": used["mb"],
        "planned": {**vars(planned), "total": planned.total},
        "steps": len(trained.losses),
        "recorded_seconds": spent / len(trained.losses),
    }


def seconds(kind: str, option: str, tokens: int, folder: Path, args: Any) -> dict[str, Any]:
    """Processor seconds of a step by default and with one set of options, which take turns."""
    runs: dict[str, Trainer] = {}
    config = TrainConfig()
    for name in dict.fromkeys(("default", option)):
        place = folder / name
        chosen, config = _config(kind, name, tokens, place, args.layers, args.precision)
        runs[name] = _run(config.replaced(stages=config.stages[-1:]), _model(config, chosen))
    measured = [_rates(config)]
    least: dict[str, float] = {}
    for turn in range(args.rounds + 1):  # the first does not count
        for name, run in runs.items():
            start = time.process_time()
            run.forward_backward(0, run.plans[0][0], run.config.curriculum[0].frames)
            taken = time.process_time() - start
            if turn:
                least[name] = min(taken, least.get(name, taken))
    measured.append(_rates(config))
    best = {name: max(one[name] for one in measured) for name in KINDS}
    ranges: dict[str, Any] = {name: Range(rate, rate, "measured") for name, rate in best.items()}
    rates = Rates("here", **ranges, memory=None, origin="measured", on_cpu=True)
    [planned] = forecast_training(config, gpus=(), rates=rates).stages[-1].seconds.values()
    return {
        "default_seconds": least["default"],
        "seconds": least[option],
        "planned_seconds": planned.low,
        "rates": best,
    }


def _rates(config: TrainConfig) -> dict[str, float]:
    dtype = getattr(torch, config.precision)
    return measure_rates(torch.device("cpu"), dtype, HEAD_DIM, time.process_time)


STEPS = "steps of the training"


@contextmanager
def _recorded() -> Iterator[dict[str, int]]:
    """Bytes that tensors held at most during the steps, with those "before" them, which the caller
    counts. What loading allocates in threads of its own, the profiler does not see in whole."""
    found: dict[str, int] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        yield found
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    [steps] = [event for event in events if event.name() == STEPS]
    start, end = steps.start_ns(), steps.start_ns() + steps.duration_ns()
    held = found["before"]
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for at, size in sorted(sizes, key=lambda one: one[0]):
        if start <= at <= end:
            held += size
            found["peak"] = max(found.get("peak", 0), held)


def _alive() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated objects that are only looked at
        every = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        tensors = [x for x in every if not isinstance(x, FakeTensor)]
    inner = [part for x in tensors for part in _parts(x)]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in inner}
    return sum(sizes.values())


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of."""
    if not is_traceable_wrapper_subclass(x):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(x, name))]


def _config(
    kind: str, option: str, tokens: int, folder: Path, layers: int, precision: str
) -> tuple[dict[str, Any], TrainConfig]:
    """Config of the model, and of the training."""
    latents = tokens // (ROWS * COLUMNS)
    frames = 4 * (latents - 1) + 1
    half = 4 * (latents // 2) + 1
    fields = DEFAULT | OPTIONS[option]
    if "stages" in fields:
        fields["stages"] = (f"{half}:1", f"{frames}:1")
    model = MODELS[kind] | ({"num_layers": layers} if layers else {})
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    write_json(folder / "transformer" / "config.json", {"_class_name": CLASS, **model})
    config = TrainConfig(
        **{
            **{"model": str(folder), "out": str(folder / "out"), "device": "cpu"},
            **{"height": 16 * ROWS, "width": 16 * COLUMNS, "stages": (f"{frames}:2",)},
            **{
                "rank": 64,
                "mixed_precision": precision,
                "log_with": "none",
                "dense_layers": int(model["num_layers"] > 1),
            },
            **fields,
        }
    )
    return model, config


def _planned(config: TrainConfig) -> Any:
    plan = forecast_training(config, gpus=())
    return max((stage.memory for stage in plan.stages), key=lambda memory: memory.in_one)


def _run(config: TrainConfig, transformer: Any) -> Trainer:
    """A training on clips of noise."""
    lengths = sorted({stage.frames for stage in config.curriculum})
    model = ModelToTrain(transformer, None, lambda n: (n - 1) // 4 + 1, None, 5.0)
    size = (2 * ROWS, 2 * COLUMNS)
    clips: Any = _Clips(transformer, lengths, size, (), config.condition)
    return Trainer(config, accelerator_for(config), model, clips)


def _model(config: TrainConfig, chosen: dict[str, Any]) -> Any:
    """A transformer with random weights, as the trainer would load it."""
    import diffusers

    kind: Any = getattr(diffusers, CLASS)
    dtype = getattr(torch, config.precision)
    torch.manual_seed(0)
    model = kind.from_config(chosen)
    if config.base in ("int8", "nf4"):
        model.save_pretrained(Path(config.model) / "transformer")
        del model
        gc.collect()
        held = config.part, str(config.base)
        model = load_quantised(kind, config.model, *held, dtype, torch.device("cpu"))
        gc.collect()  # what it was loaded from
        return model
    return cast(model, dtype)


class _Clips(RandomClips):
    """Clips of noise, with a text as long as the pipeline's."""

    @property
    def empty(self) -> dict[str, torch.Tensor]:
        family: Any = family_of(self.transformer)
        return family.tiny_conditions(self.transformer.config, family.sizes.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="wan_1_3b")
    parser.add_argument("--layers", type=int, default=0, help="blocks; 0: as listed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1248])
    parser.add_argument("--only", nargs="+", choices=OPTIONS, help="some of the options")
    parser.add_argument("--rounds", type=int, default=2, help="of the seconds; 0: memory alone")
    parser.add_argument(
        "--precision", choices=("bf16", "no"), default="bf16", help="mixed_precision; no: float32"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        torch.set_num_threads(args.threads)
        option, tokens = args.cell
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            row = measure(args.model, option, int(tokens), place, args.layers, args.precision)
            if args.rounds and option not in UNTIMED:
                row |= seconds(args.model, option, int(tokens), place, args)
        write_json(args.out, row)
        return
    for tokens in args.tokens:
        for option in args.only or OPTIONS:
            row = _in_a_process(args, option, tokens)
            blocks = args.layers or MODELS[args.model]["num_layers"]
            about = {"model": args.model, "blocks": blocks, "precision": args.precision}
            keep(about | row, args)
            print(
                f"{tokens} tokens, {option}: planned {row['planned_mb']:.0f} MB, measured "
                f"{row['measured_mb']:.0f} MB ({row['error']:+.1%}), resident "
                f"{row['resident_mb']:.0f} MB",
                flush=True,
            )
    if args.out == RESULTS:
        write_table(PAGE, MARK, table(json.loads(args.out.read_text())))


def keep(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Write a row into the file of results, in the place of an older one."""
    here, rows = environment() | {"threads": args.threads}, []
    if args.out.exists():
        held = json.loads(args.out.read_text())
        check_same_machine(held["environment"], here, str(args.out))
        rows = held["rows"]
    kept = [one for one in rows if _key(one) != _key(row)]
    order = [*MODELS], [*OPTIONS]
    rows = sorted(
        [*kept, row],
        key=lambda one: (
            order[0].index(one["model"]),
            one.get("precision", "bf16"),
            -_blocks(one),
            one["tokens"],
            order[1].index(one["option"]),
        ),
    )
    results = {"environment": here, "rows": rows}
    write_json(args.out, results)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    precision = row.get("precision", "bf16")
    return row["model"], precision, _blocks(row), row["tokens"], row["option"]


def _blocks(row: dict[str, Any]) -> int:
    """Number of the model's blocks; older rows have the model's own."""
    return row.get("blocks", MODELS[row["model"]]["num_layers"])


def table(results: dict[str, Any]) -> str:
    """Results as Markdown."""
    head = (
        "model",
        "precision",
        "blocks",
        "tokens",
        "options",
        "planned, MB",
        "measured, MB",
        "error",
    )
    rows: list[tuple[str, ...]] = [(*head, "resident, MB", "planned, s", "step, s", "of default")]
    rows.append(("---", "---", "---:", "---:", "---", *["---:"] * 7))
    alone = {
        _key(row): row["recorded_seconds"]
        for row in results["rows"]
        if "recorded_seconds" in row and "seconds" not in row
    }
    for row in results["rows"]:
        timed = "seconds" in row
        own, usual = (alone.get(_key({**row, "option": n})) for n in (row["option"], "default"))
        cells = (
            f"{row['planned_mb']:.0f}",
            f"{row['measured_mb']:.0f}",
            f"{row['error']:+.1%}",
            f"{row['resident_mb']:.0f}",
            f"{row['planned_seconds']:.1f}" if timed else "",
            f"{row['seconds']:.1f}" if timed else f"{own:.0f}" if own else "",
            _ratio(row["seconds"], row["default_seconds"]) if timed else _ratio(own, usual),
        )
        precision = "float32" if row.get("precision") == "no" else "bfloat16"
        model = row["model"], precision, str(_blocks(row))
        what = *model, f"{row['tokens']:,}", row["option"]
        rows.append((*what, *cells))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    known = results["environment"]
    machine = f"{known['device']}, {known['threads']} thread, torch {known['torch']}"
    return "\n".join([*lines, "", f"{machine}."])


def _ratio(own: float | None, usual: float | None) -> str:
    return f"{own / usual:.2f}" if own and usual else ""


def _in_a_process(args: argparse.Namespace, option: str, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        cell = ["--cell", option, str(tokens), "--out", str(out), "--model", args.model]
        cell += [
            "--rounds",
            str(args.rounds),
            "--layers",
            str(args.layers),
            "--threads",
            str(args.threads),
            "--precision",
            args.precision,
        ]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
        env = os.environ | ENVIRONMENT | threads
        subprocess.run([sys.executable, __file__, *cell], env=env, check=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
