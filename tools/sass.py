"""Machine code of compiled kernels for NVIDIA's cards: instructions in one turn of a loop.

Matrix products are instructions of a warp (HMMA, mma.sync) or of four warps together (HGMMA,
wgmma). Those of tensor memory (UTCHMMA, tcgen05) are issued once for a whole program, whatever its
warps, and carry their shape in a register: they are not counted.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
WGMMA = re.compile(r"\bHGMMA\.64x(\d+)x(\d+)")
MMA = re.compile(r"\b[HI]MMA\.16(8\d+)")  # 16 rows, 8 columns and the depth
# Asynchronous copies by threads, and the fences after them that products wait for.
COPIES = re.compile(r"\b(LDGSTS|FENCE\.VIEW\.ASYNC|MEMBAR)\b")


# Products of a warp, 16 rows by 8 columns, with the dtype of the sums or of the factors.
PRODUCT = re.compile(r"\b(HMMA|IMMA)\.168(\d+)\.(F32|F16|S8)")
# Clocks of a unit of depth on sm_86, sm_89 and sm_120 of GeForce cards, by their data sheets.
CLOCKS = {("HMMA", "F32"): 2.0, ("HMMA", "F16"): 1.0, ("IMMA", "S8"): 0.5}


class Loop(NamedTuple):
    """Instructions of a loop; their number in the smallest loop around it, 0 if there is none."""

    code: list[str]
    around: int

    @property
    def held(self) -> bool:
        return self.around > 0


def cuobjdump(compiled: Any, *options: str) -> str:
    """Run cuobjdump from Triton's package on a compiled kernel and return its output."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> list[str]:
    """List all instructions in a listing of `cuobjdump -sass`."""
    return [text for _, text in INSTRUCTION.findall(code)]


def inner_loops(code: str) -> list[Loop]:
    """Find loops that hold no other loop, in a listing of `cuobjdump -sass`."""
    listed = [(int(place, 16), text) for place, text in INSTRUCTION.findall(code)]
    spans = [
        (int(found[1], 16), place)
        for place, text in listed
        if (found := BRANCH.search(text)) and int(found[1], 16) < place
    ]
    loops = []
    for first, last in spans:
        others = [span for span in spans if span != (first, last)]
        if any(first <= a and b <= last for a, b in others):
            continue
        inside = [text for place, text in listed if first <= place <= last]
        holding = [(b - a, a, b) for a, b in others if a <= first and last <= b]
        _, a, b = min(holding, default=(0, 1, 0))
        loops.append(Loop(inside, sum(a <= place <= b for place, _ in listed)))
    return loops


def multiply_adds(loop: list[str], num_warps: int) -> int:
    """Count the multiply-adds of matrix products in one turn, over all warps of a program."""
    total = 0
    for text in loop:
        if found := WGMMA.search(text):
            total += 64 * int(found[1]) * int(found[2]) * (num_warps // 4)
        elif found := MMA.search(text):
            total += 16 * 8 * int(found[1][1:]) * num_warps
    return total


def clocks(loop: list[str]) -> float:
    """Count the clocks that the products of one warp take in one turn by CLOCKS."""
    found = filter(None, map(PRODUCT.search, loop))
    return sum(int(one[2]) * CLOCKS[one[1], one[3]] for one in found)


def shuffles(loop: list[str]) -> int:
    """Count the exchanges among the threads of a warp in one turn."""
    return sum("SHFL." in text for text in loop)


def copies(loop: list[str]) -> int:
    """Count the COPIES in one turn."""
    return sum(bool(COPIES.search(text)) for text in loop)
