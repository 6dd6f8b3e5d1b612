"""Rates of a device: from a card's data sheet, or measured here in a few seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.files import cache_folder
from gen_accel.measure.cards import Card, Range, share_of_peak
from gen_accel.measure.kept import kept
from gen_accel.measure.timing import device_name
from gen_accel.version import __version__

KINDS = ("products", "convolutions", "attention", "moved")
SPREAD = 1.2  # to either side of what was measured; benchmarks/estimate.py holds it to that
ROUNDS = 5  # of which the fastest counts
ENOUGH = 1.0  # seconds of one measurement, after which no further round begins


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Args:
        device: in words.
        products, convolutions, attention: FLOPs a second.
        moved: bytes a second that operators without products read and write.
        memory: bytes that a program may use; None where unknown.
        origin: of the rates, in words.
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


def rates_of_card(card: Card) -> Rates:
    shares = {kind: share_of_peak(kind, card.kind) for kind in KINDS}
    peaks = dict.fromkeys(KINDS, card.flops) | {"moved": card.bandwidth}
    ranges: dict[str, Any] = {
        kind: Range(share.low * peaks[kind], share.high * peaks[kind], share.source)
        for kind, share in shares.items()
    }
    return Rates(
        device=card.name,
        **ranges,
        memory=card.memory,
        origin=f"of the data sheet's {card.flops / 1e12:g} TFLOPS and "
        f"{card.bandwidth / 1e12:g} TB/s ({card.source})",
        card=True,
    )


def rates_here(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, again: bool = False
) -> Rates:
    """Rates of a device of this machine, from the cache folder or measured now.

    Args:
        head_dim: of the attention.
        again: measure even if the cache knows.
    """
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    count = torch.get_num_threads()
    threads = "" if device.type != "cpu" else f"{count} thread{'s' * (count > 1)}"
    key = f"{name} | {threads} | torch {torch.__version__} | {kind} | {head_dim} | {__version__}"
    found, busy = kept(
        rates_file(),
        key,
        lambda: measure_rates(device, dtype, head_dim),
        what="the rates of this machine",
        valid=_is_whole,
        again=again,
    )
    note = f"; {busy}, so they may be too low, and are not kept" if busy else ""
    where = f"{name}, {threads}" if device.type == "cpu" else name
    ranges: dict[str, Any] = {
        kind: Range(rate / SPREAD, rate * SPREAD, "measured") for kind, rate in found.items()
    }
    return Rates(
        device=where,
        **ranges,
        memory=_memory(device),
        origin=f"measured on {where}, {kind}{note}",
        on_cpu=device.type == "cpu",
    )


def rates_file() -> Path:
    """Path of the file with measured rates."""
    return cache_folder() / "rates.json"


@torch.no_grad()
def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Measure one product, one convolution, one attention and one product element by element, as
    large as in a model. The fastest of a few rounds counts; of a slow machine there are fewer.

    Args:
        clock: `time.process_time` counts the processor time of this process alone.
    """
    large = device.type != "cpu"
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    tokens, width = (16384, 4096) if large else (2048, 2560)
    x, linear = torch.randn(tokens, width, **like), nn.Linear(width, width, **like)
    heads = 24 if large else 4
    q = torch.randn(1, heads, tokens, head_dim, **like)
    side, channels = (128, 128) if large else (24, 64)
    video = torch.randn(1, channels, 4, side, side, **like)
    conv = nn.Conv3d(channels, channels, 3, padding=1, **like)
    wide = torch.randn(tokens, 4 * width, **like)
    attend = nn.functional.scaled_dot_product_attention
    work = {
        "products": (lambda: linear(x), 2.0 * tokens * width**2),
        "convolutions": (lambda: conv(video), 54.0 * channels * video.numel()),
        "attention": (lambda: attend(q, q, q), 4.0 * heads * tokens**2 * head_dim),
        "moved": (lambda: wide * wide[:1], 2.0 * wide.numel() * wide.itemsize),
    }
    return {kind: amount / _fastest(call, device, clock) for kind, (call, amount) in work.items()}


def _fastest(call: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def timed() -> float:
        wait()
        start = clock()
        call()
        wait()
        return clock() - start

    first = timed()  # which warms up, and counts only where a further one would take too long
    seconds = [first] if first > ENOUGH else [timed()]
    while len(seconds) < ROUNDS and sum(seconds) < ENOUGH:
        seconds.append(timed())
    return max(min(seconds), 1e-9)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory / 2**30 * 1e9)
    if device.type == "cpu":
        from gen_accel.room import free_bytes

        return free_bytes(device)
    return None


def _is_whole(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(KINDS)
        and all(isinstance(rate, float) and rate > 0 for rate in value.values())
    )
