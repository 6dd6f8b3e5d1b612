"""Dense attention, with nothing left out: which kernel runs it faster than torch's own."""

from gen_accel.kernels import native
from gen_accel.kernels.base import Facts
from gen_accel.kernels.lists import has_tiles
from gen_accel.kernels.native import build


def faster(facts: Facts) -> str | None:
    """Name a kernel that is as exact as torch's own attention and faster at whole blocks of all
    pairs; None where none is known.

    `native` is, on processors that multiply bf16 without tiles (AVX512_BF16): on two cores of an
    AMD EPYC 2.1 to 2.6 times as fast in bf16 and 1.1 to 1.3 in fp32, at 2,160 to 5,070 tokens and
    6 heads of 64. Torch's own is faster with tiles (AMX), see docs/performance.md, and on GPUs,
    where it runs what their makers tuned.
    """
    there = build.is_built() and native.multiplies_bf16() and not has_tiles(facts.device)
    return "native" if there and not native.kernel.unsupported(facts) else None
