"""The card, its clocks, the versions and the source, on which figures depend."""

import gc
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ledger import Line, Skipped

from gen_accel.kernels.triton import tuned
from gen_accel.measure.machine import checks, device_name, environment, version

from .setting import Setting

ROOT = Path(__file__).parents[2]
SOURCE = ("gen_accel/**/*.py", "gen_accel/**/*.cpp", "gen_accel/**/*.h", "benchmarks/**/*.py")
OTHERS = ("triton", "flash-attn-4", "flash-attn", "natten", "xformers")
QUERY = (
    *("name", "driver_version", "pstate", "temperature.gpu", "power.draw", "power.limit"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)


def made_on(device: torch.device, *, dry: bool) -> dict[str, Any]:
    """Card, versions and source, which have to be equal for figures to go together."""
    versions = {name: version(name) for name in ("torch", "diffusers", *OTHERS)}
    return {
        "card": device_name(device),
        "dry_run": dry,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **versions,
        "revision": revision(ROOT),
    }


def revision(root: Path) -> str:
    """Of the source as it lies there, committed or not: 12 digits of the hash of its files."""
    digest = hashlib.sha256()
    for pattern in SOURCE:
        for path in sorted(root.glob(pattern)):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def slug(card: str) -> str:
    """As a part of a file's name."""
    words = "".join(x if x.isalnum() else " " for x in card.lower()).split()
    return "_".join(words)


def lines(at: Setting) -> Iterator[Line]:
    yield Line("versions", 10.0, partial(_versions, at))
    yield clocks("clocks at rest")
    yield Line("doctor", 15.0, _doctor)


def cleared(device: torch.device) -> None:
    """Give back what the line before held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def clocks(name: str) -> Line:
    return Line(name, 10.0, _clocks)


def _versions(at: Setting) -> dict[str, Any]:
    found = environment(at.device) | {"kernels": at.held, "timed": at.timed}
    if at.device.type == "cuda":
        properties = torch.cuda.get_device_properties(at.device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gib"] = properties.total_memory / 2**30
    found["tuned_before"] = dict(tuned.read())
    return found | {"says": f"{found['device']}; kernels {', '.join(at.held) or 'none'}"}


def _clocks() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        raise Skipped("nvidia-smi is not there")
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=8, check=False)
    if said.returncode:
        raise Skipped(f"nvidia-smi says: {(said.stderr or said.stdout).strip()}")
    cards = [
        dict(zip(QUERY, map(str.strip, row.split(",")), strict=True))
        for row in said.stdout.strip().splitlines()
    ]
    return {"cards": cards, "says": ", ".join(card["clocks.sm"] for card in cards)}


def _doctor() -> dict[str, Any]:
    found = checks()
    missing = [f"{check.name}: {check.fix}" for check in found if check.found is None]
    return {
        "found": {check.name: check.found for check in found if check.found is not None},
        "missing": missing,
        "says": f"missing: {', '.join(line.split(':')[0] for line in missing) or 'nothing'}",
    }
