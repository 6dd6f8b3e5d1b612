"""Cost of a training step, dense against sparse, taking turns in one run.

    python benchmarks/training.py --out benchmarks/results/training_cpu.json
    python benchmarks/training.py --method piecewise --beside sparse_linear:critical=0.1 --times 4
    python benchmarks/training.py --device cuda --model 1.3b --out results.json
    python benchmarks/training.py --model 1.3b --layers 1 --picture 24 40 --times 4 --rounds 2

A step is the trainer's own: forward and backward of the loss, with a LoRA of rank 16 on every
attention. First the loss and the gradients through the kernel are held to those of the reference,
on a short clip; what fails is not timed.

The share of the ideal is taken of attention alone: `attention speed-up x density`.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from memory import peak_memory

import gen_accel
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.demo import TRAINED_FRAMES
from gen_accel.functional import attention
from gen_accel.lora.artefact import target_modules
from gen_accel.lora.objective import Objective
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment, interleaved
from gen_accel.video import VideoShape

SIZES: dict[str, dict[str, Any]] = {
    "demo": {"height": 12, "width": 12, "trained": (TRAINED_FRAMES - 1) // 4 + 1, "text": 16},
    "1.3b": {"height": 60, "width": 104, "trained": 21, "text": 512},
}
METHOD = ("tile_side=12", "tile_frames=3", "block=432")  # that of the demo's LoRA
WAN_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
PARITY_PICTURE = (24, 40)  # the largest height and width of latents there
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="demo")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--layers", type=int, help="of the 1.3b; without: its 30")
    parser.add_argument(
        "--picture", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the latents"
    )
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4], help="of the length")
    parser.add_argument("--method", default="radial", help="its name on the command line")
    parser.add_argument(
        "--set", nargs="+", metavar="FIELD=VALUE", help="its fields; of radial by default METHOD"
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="METHOD[:FIELD=VALUE]",
        help="methods whose step is timed in the same turns",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.layers is not None and (args.model == "demo" or args.layers < 1):
        parser.error(f"--layers takes 1 or more, of --model 1.3b, got {args.layers}")
    settings = args.set or (METHOD if args.method == "radial" else ())
    method = method_from(args.method, settings)
    beside = {one: method_from(*split_method(one)) for one in args.beside}
    dtype = getattr(torch, args.dtype)

    transformer = build(args, dtype)
    if args.checkpointing:
        transformer.enable_gradient_checkpointing()
    errors = [parity(transformer, one, args, dtype) for one in (method, *beside.values())]
    error = max(errors)
    print(f"parity: worst gradient off by {error:.1e} of the largest")
    if error > TOLERANCE[dtype]:
        raise SystemExit(f"not timed: {error:.1e} is over {TOLERANCE[dtype]:.0e}")

    rows = []
    for times in args.times:
        frames = times * (SIZES[args.model]["trained"] - 1) + 1
        row = measure(transformer, method, beside, frames, args, dtype)
        rows.append(row)
        print(
            f"{frames} latent frames, {row['tokens']} tokens: dense {row['dense_ms']:.0f} ms, "
            f"{args.method} {row['sparse_ms']:.0f} ms, {row['speedup']:.2f}x; density "
            f"{row['density']:.3f}, attention {row['attention_speedup']:.2f}x, "
            f"{row['share_of_ideal']:.2f} of the ideal",
            flush=True,
        )
        for name, ms in row["beside_ms"].items():
            print(f"    {name} {ms:.0f} ms, {row['sparse_ms'] / ms:.2f} of it", flush=True)
    if args.out is not None:
        report = {
            "model": args.model,
            "layers": transformer.config.num_layers,
            "picture": picture(args),
            "dtype": args.dtype,
            "method": repr(method),
            "rounds": args.rounds,
            "gradient_checkpointing": args.checkpointing,
            "worst_gradient_error": error,
            "environment": environment(args.device),
            "rows": rows,
        }
        write_json(args.out, report)


def split_method(text: str) -> tuple[str, list[str]]:
    """Name and settings of what `--beside` takes: NAME, or NAME:FIELD=VALUE with several divided
    by colons."""
    name, *settings = text.split(":")
    return name, settings


def picture(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the latents."""
    size = SIZES[args.model]
    return tuple(args.picture) if args.picture else (size["height"], size["width"])


def smaller(size: tuple[int, int]) -> tuple[int, int]:
    height, width = (min(side, most) for side, most in zip(size, PARITY_PICTURE, strict=True))
    return height, width


def build(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The demo's transformer, or one of Wan 1.3B's shapes with random weights, with a LoRA."""
    from peft import LoraConfig

    torch.manual_seed(0)
    if args.model == "demo":
        transformer: Any = WanTransformer3DModel.from_pretrained(
            gen_accel.demo.path(), subfolder="transformer", dtype=dtype
        )
    else:
        layers = {"num_layers": args.layers} if args.layers else {}
        with args.device:
            transformer = WanTransformer3DModel(**(WAN_1_3B | layers)).to(dtype)
    transformer.requires_grad_(False).to(args.device)
    targets = target_modules(transformer, ("attention",))
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:  # zero at the start, which would hide half of the gradients
                torch.nn.init.normal_(parameter, std=0.02)
    return transformer


def batch(frames: int, args: argparse.Namespace, transformer: Any) -> tuple:
    size, config = SIZES[args.model], transformer.config
    shape = (1, config.in_channels, frames, *picture(args))
    drawn = {"generator": torch.Generator(args.device).manual_seed(frames), "device": args.device}
    latents, noise = (torch.randn(shape, **drawn) for _ in range(2))
    text = torch.randn(1, size["text"], config.text_dim, **drawn)
    sigma = torch.tensor([0.7], device=args.device)
    return latents, noise, sigma, {"encoder_hidden_states": text}


def step(transformer: Any, given: tuple, dtype: torch.dtype) -> float:
    """Forward and backward; the gradients stay on the parameters."""
    alone: Any = SimpleNamespace(modules={}, showing=nullcontext)
    objective = Objective(transformer, family_of(transformer), "flow", alone)
    transformer.zero_grad()
    with torch.autocast(given[0].device.type, dtype, enabled=dtype != torch.float32):
        loss = objective(*given)
    loss.backward()
    return loss.item()


def parity(transformer: Any, method: Any, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """The worst gradient's distance between the kernel and the reference, over the largest.

    On a picture of which the reference can hold all pairs of tokens in every layer."""
    few = argparse.Namespace(**{**vars(args), "picture": smaller(picture(args))})
    given, gradients = batch(5, few, transformer), []
    for kernel in ("reference", "auto"):
        with gen_accel.attach(transformer, method, kernel=kernel):
            step(transformer, given, dtype)
        found = [p.grad.clone() for p in transformer.parameters() if p.grad is not None]
        gradients.append(torch.cat([x.flatten() for x in found]))
    exact, ours = gradients
    return float((ours - exact).abs().max() / exact.abs().max())


def measure(
    transformer: Any,
    method: Any,
    beside: dict[str, Any],
    frames: int,
    args: argparse.Namespace,
    dtype: torch.dtype,
) -> dict[str, Any]:
    given = batch(frames, args, transformer)
    patch = transformer.config.patch_size
    height, width = picture(args)
    video = VideoShape(frames, height // patch[1], width // patch[2])

    def whole(chosen: Any) -> Callable[[], None]:
        def run() -> None:
            with gen_accel.attach(transformer, chosen):
                step(transformer, given, dtype)

        return run

    config = transformer.config
    shape = (1, config.num_attention_heads, video.tokens, config.attention_head_dim)
    q, k, v, out = (torch.randn(shape, device=args.device, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()

    def alone(chosen: Any) -> Callable[[], None]:
        def run() -> None:
            if chosen.is_dense:
                made = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                made = attention(q, k, v, video=video, method=chosen)
            torch.autograd.grad(made, (q, k, v), out)

        return run

    dense = gen_accel.Dense()
    calls = {
        "dense": whole(dense),
        "sparse": whole(method),
        "attention_dense": alone(dense),
        "attention_sparse": alone(method),
    }
    calls |= {f"beside {name}": whole(other) for name, other in beside.items()}
    seconds = interleaved(calls, rounds=args.rounds, device=args.device)
    taken = {name: statistics.median(values) for name, values in seconds.items()}
    peak: dict[str, float | None] = {}
    for name, chosen in (("dense", dense), ("sparse", method)):
        with gen_accel.attach(transformer, chosen) as handle, peak_memory(args.device) as used:
            step(transformer, given, dtype)
        peak[f"{name}_peak_mb"] = used.get("mb")
        kernels = handle.summary().to_dict()["kernels"]
    density = method.density(video)
    attention_speedup = taken["attention_dense"] / taken["attention_sparse"]
    return {
        "latent_frames": frames,
        "tokens": video.tokens,
        "density": density,
        "kernels": kernels,
        **peak,
        **{f"{x}_ms": 1000 * taken[x] for x in taken if not x.startswith("beside ")},
        "beside_ms": {name: 1000 * taken[f"beside {name}"] for name in beside},
        "speedup": taken["dense"] / taken["sparse"],
        "attention_speedup": attention_speedup,
        "share_of_ideal": attention_speedup * density,
    }


if __name__ == "__main__":
    main()
