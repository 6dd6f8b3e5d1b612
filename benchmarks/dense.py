"""Dense attention by every implementation that torch reaches, and the fastest of them."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from parity import step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from gen_accel.measure.machine import interleaved

TRIALS = 3  # rounds in which the fastest is found
TRIAL_TOKENS = 32_768  # at most: of longer clips a part tells as well


class Baseline(NamedTuple):
    """One implementation.

    Args:
        run: (q, k, v) -> output, each (B, H, N, D).
        active: a context in which torch has it.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    active: Callable[[], AbstractContextManager[Any]] = nullcontext


def baselines(device: torch.device) -> dict[str, Baseline]:
    """By name, whether they are installed or not."""
    if device.type != "cuda":
        return {"SDPA": Baseline(F.scaled_dot_product_attention)}
    flash = _sdpa(SDPBackend.FLASH_ATTENTION)
    return {
        "SDPA CUDNN_ATTENTION": Baseline(_sdpa(SDPBackend.CUDNN_ATTENTION)),
        "SDPA FLASH_ATTENTION": Baseline(flash),
        "FA3": Baseline(flash, lambda: _activated("FA3")),
        "FA4": Baseline(flash, lambda: _activated("FA4")),
    }


@cache
def compiled_flex(backend: str) -> Baseline:
    """FlexAttention without a mask, by torch.compile with `backend`."""
    return Baseline(torch.compile(flex_attention, backend=backend, dynamic=False))


def tried(
    found: dict[str, Baseline], inputs: list[Tensor], backward: bool
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """The ones of `found` that run on these inputs, and why the others do not."""
    runs, reasons = {}, {}
    for name, baseline in found.items():
        try:
            with baseline.active():
                step(baseline.run, inputs, backward)()
        except Exception as error:  # whatever a build without it, or another package, throws
            said = str(error).strip().splitlines() or [""]
            reasons[name] = f"{type(error).__name__}: {said[0]}"
        else:
            runs[name] = baseline
    return runs, reasons


_fastest: dict[tuple, str] = {}  # found once for each shape, dtype, device and direction


def best(inputs: list[Tensor], backward: bool) -> tuple[str, Baseline]:
    """The fastest on these inputs, and its name."""
    some = [x[:, :, :TRIAL_TOKENS].contiguous() for x in inputs]
    q = some[0]
    found = baselines(q.device)
    key = (q.shape, q.dtype, q.device, backward)
    if key not in _fastest:
        runs, _ = tried(found, some, backward)
        seconds = {
            name: _seconds(baseline, some, backward)
            for name, baseline in (runs.items() if len(runs) > 1 else ())
        }
        _fastest[key] = (
            min(seconds, key=lambda name: seconds[name]) if seconds else next(iter(runs), "SDPA")
        )
    name = _fastest[key]
    return name, found.get(name, Baseline(F.scaled_dot_product_attention))


def _seconds(baseline: Baseline, inputs: list[Tensor], backward: bool) -> float:
    with baseline.active():
        call = {"": step(baseline.run, inputs, backward)}
        return statistics.median(interleaved(call, rounds=TRIALS, device=inputs[0].device)[""])


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


@contextmanager
def _activated(name: Any) -> Iterator[None]:
    """Another package's flash attention in the place of torch's own."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()
