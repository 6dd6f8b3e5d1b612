"""Rates of a device: by a card's data sheet, or measured here in a few seconds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gen_accel.attention_processors import Neighborhood, Radial
from gen_accel.functional import attention
from gen_accel.io import cache_folder
from gen_accel.measure.cost.figures import Card, Range, share_of_peak
from gen_accel.measure.cost.work import Work
from gen_accel.measure.machine import device_name, interleaved, kept, wait_for
from gen_accel.version import __version__
from gen_accel.video import VideoShape

KINDS = ("products", "convolutions", "attention", "moved")
SPREAD = 1.2  # to either side of a measured rate; benchmarks/estimate.py holds it to that
ROUNDS = 5  # of which the fastest counts
SHEET = "of the data sheet's "  # begins the origin of a card's rates
ENOUGH = 1.0  # seconds of one measurement, after which no further round begins


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Args:
        device: in words.
        products, convolutions, attention: FLOPs a second.
        moved: bytes a second that operators without products read and write.
        memory: bytes that a program may use; None if unknown.
        origin: source of the rates, in words.
        card: whether they are of a data sheet.
        on_cpu: whether they are of this machine's processor.
    """

    device: str
    products: Range
    convolutions: Range
    attention: Range
    moved: Range
    memory: int | None
    origin: str
    card: bool = False
    on_cpu: bool = False

    def at(
        self, side: str, work: Work, efficiency: float = 1.0, products: str = "products"
    ) -> float:
        """Seconds of a piece of work at one end of the rates.

        Args:
            side: "low" or "high".
            efficiency: of the method's kernel, which computes `work.sparse`.
            products: the rate of products; "convolutions" if they are convolutions.
        """
        attended = max(work.attention + work.sparse / efficiency, 0.0)
        return (
            work.products / getattr(getattr(self, products), side)
            + attended / getattr(self.attention, side)
            + work.moved / getattr(self.moved, side)
        )

    def seconds(
        self, work: Work, efficiency: Range | None = None, products: str = "products"
    ) -> Range:
        """Seconds of a piece of work at the best and the worst of the rates."""
        best, worst = (1.0, 1.0) if efficiency is None else (efficiency.high, efficiency.low)
        low, high = (
            self.at(side, work, reached, products)
            for side, reached in (("high", best), ("low", worst))
        )
        return Range(low, high, self.origin if efficiency is None else efficiency.source)


def rates_of_card(card: Card) -> Rates:
    peaks = dict.fromkeys(KINDS, card.flops) | {"moved": card.bandwidth}
    return Rates(
        device=card.name,
        **{kind: share_of_peak(kind, card.kind).times(peaks[kind]) for kind in KINDS},
        memory=card.memory,
        origin=f"{SHEET}{card.flops / 1e12:g} TFLOPS and "
        f"{card.bandwidth / 1e12:g} TB/s ({card.source})",
        card=True,
        on_cpu=False,
    )


def rates_here(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, again: bool = False
) -> Rates:
    """Rates of a device of this machine, from the cache folder or measured now.

    Args:
        head_dim: of the attention.
        again: measure even if the cache knows.
    """
    name, kind = device_name(device), _word(dtype)
    count = torch.get_num_threads()
    threads = "" if device.type != "cpu" else f"{count} thread{'s' * (count > 1)}"
    found, busy = kept(
        cache_folder() / "rates.json",
        f"{name} | {threads} | torch {torch.__version__} | {kind} | {head_dim} | {__version__}",
        lambda: measure_rates(device, dtype, head_dim),
        what="the rates of this machine",
        valid=_is_whole,
        again=again,
    )
    note = f"; {busy}, so they may be too low, and are not kept" if busy else ""
    where = f"{name}, {threads}" if device.type == "cpu" else name
    return Rates(
        device=where,
        **{name: Range(rate / SPREAD, rate * SPREAD, "measured") for name, rate in found.items()},
        memory=_memory(device),
        origin=f"measured on {where}, {kind}{note}",
        card=False,
        on_cpu=device.type == "cpu",
    )


@torch.no_grad()
def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Measure one product, one convolution, one attention and one product element by element, as
    large as in a model. The fastest of a few rounds counts; a slow machine runs fewer.

    Args:
        clock: `time.process_time` counts the processor time of this process alone.
    """
    large = device.type != "cpu"
    tokens, width = (16384, 4096) if large else (2048, 2560)
    heads = 24 if large else 4
    side, channels = (128, 128) if large else (24, 64)
    made = torch.randn(tokens, width, device=device, dtype=dtype)
    linear = nn.Linear(width, width, device=device, dtype=dtype)
    q = torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype)
    video = torch.randn(1, channels, 4, side, side, device=device, dtype=dtype)
    conv = nn.Conv3d(channels, channels, 3, padding=1, device=device, dtype=dtype)
    wide = torch.randn(tokens, 4 * width, device=device, dtype=dtype)
    attend = nn.functional.scaled_dot_product_attention
    work: dict[str, tuple[Callable[[], object], float]] = {
        "products": (lambda: linear(made), 2.0 * tokens * width**2),
        "convolutions": (lambda: conv(video), 54.0 * channels * video.numel()),
        "attention": (lambda: attend(q, q, q), 4.0 * heads * tokens**2 * head_dim),
        "moved": (lambda: wide * wide[:1], 2.0 * wide.numel() * wide.itemsize),
    }
    return {kind: amount / fastest(call, device, clock) for kind, (call, amount) in work.items()}


def fastest(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few rounds of a call."""

    def timed() -> float:
        wait_for(device)
        start = clock()
        call()
        wait_for(device)
        return clock() - start

    first = timed()  # a warm-up, which counts only if a further round would take too long
    seconds = [first] if first > ENOUGH else [timed()]
    while len(seconds) < ROUNDS and sum(seconds) < ENOUGH:
        seconds.append(timed())
    return max(min(seconds), 1e-9)


def known_efficiency(
    device: torch.device, dtype: torch.dtype, head_dim: int, windows: bool, again: bool = False
) -> tuple[float, str]:
    """Kernel efficiency, the share of the ideal speed-up 1 / computed density that the kernels of
    a device reach, from the cache folder or measured now; with its origin in words.

    Args:
        windows: see `measure_efficiency`.
        again: measure even if the cache knows.
    """
    name, kind = device_name(device), _word(dtype)
    parts = [name, f"torch {torch.__version__}", kind, f"head dim {head_dim}"]
    parts += ["windows" if windows else "blocks", f"gen_accel {__version__}"]
    found, busy = kept(
        efficiency_file(),
        " | ".join(parts),
        lambda: measure_efficiency(device, dtype, head_dim, windows),
        what="the kernel efficiency",
        valid=lambda value: isinstance(value, float) and value > 0,
        again=again,
    )
    note = f"; {busy}, so it is not kept" if busy else ""
    return found, f"measured on {name}, {kind}{note}"


def efficiency_file() -> Path:
    """Path of the file with measured efficiencies."""
    return cache_folder() / "efficiency.json"


@torch.no_grad()
def measure_efficiency(
    device: torch.device, dtype: torch.dtype, head_dim: int, windows: bool
) -> float:
    """Measure the speed-up over dense SDPA times computed density, of the kernel that "auto"
    picks.

    One small case at a density of about 0.1, whose frames the tiles divide: about 8k tokens on the
    CPU, which takes a few seconds, and about 33k on a GPU, which fewer would not fill.

    Args:
        windows: for methods with a rule on token pairs inside their blocks, which costs more.
    """
    on_cpu = device.type == "cpu"
    video, heads = (VideoShape(57, 12, 12), 2) if on_cpu else (VideoShape(228, 12, 12), 12)
    method = Radial(decay_factor=0.15 if on_cpu else 1.5)
    if windows:
        method = Neighborhood((-1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, video.tokens, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    seconds = interleaved(
        {
            "dense": lambda: nn.functional.scaled_dot_product_attention(q, k, v),
            "sparse": lambda: attention(q, k, v, video=video, method=method),
        },
        rounds=3 if on_cpu else 10,
        device=device,
    )
    speedup = statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"])
    return speedup * method.plan(video).computed_density


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory / 2**30 * 1e9)
    if device.type == "cpu":
        from gen_accel.memory import free_bytes

        return free_bytes(device)
    return None


def _is_whole(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(KINDS)
        and all(isinstance(rate, float) and rate > 0 for rate in value.values())
    )
