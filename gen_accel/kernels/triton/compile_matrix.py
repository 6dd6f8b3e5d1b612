"""Compile every kernel without a GPU, and refuse configurations that spill, do not fit or compute
a matrix product twice.

    python -m gen_accel.kernels.triton.compile_matrix --arch sm_90

Registers and spills come from the cuobjdump in Triton's package, or from AMD's code object notes.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gen_accel.kernels.triton import (
    bins,
    configs,
    gathered,
    gathered_kernels,
    linear,
    listing,
    owners,
    sass,
    sparse_backward,
    sparse_forward,
    tiles,
)

# Shared memory that one program may use, in bytes.
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}

RULES = {"none": tiles.NONE, "windows": tiles.WINDOWS, "route": tiles.ROUTE}

# Types of arguments by name; those of the inputs' own type and the integers are not listed.
TYPES = {
    **dict.fromkeys(("lse", "delta", "grad_lse", "gain", "by", "weight"), "*fp32"),
    **dict.fromkeys(("slots", "index", "counts"), "*i32"),
    **dict.fromkeys(("ranges", "blocks", "members"), "*i32"),
    **dict.fromkeys(("keep", "whole", "sets", "picks"), "*u8"),
    **{"acc": "*fp32", "picked": "*i16", "keys": "*i32", "upper": "*i64", "count": "*i64"},
    **dict.fromkeys(("scale", "eps"), "fp32"),
}
INPUTS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv", "x", "y")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Case(NamedTuple):
    """One kernel as it is launched for one architecture."""

    name: str
    kernel: triton.JITFunction
    constants: dict
    num_warps: int
    num_stages: int
    needed: int = 0  # multiply-adds in each turn of its loop


class Usage(NamedTuple):
    """Registers of a thread, spilled bytes (NVIDIA) or registers (AMD) of it, shared bytes, and
    the products that the dearest turn of a loop computes in multiples of those that it needs; 0
    where they are not counted."""

    registers: int
    spilled: int
    shared: int
    products: float


def cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Every kernel, those that evaluate a rule once for each rule, with and without a gain."""
    dim = {"D": D, "BLOCK_D": configs.padded_dim(D)}
    kernels = {  # and the products of a turn
        "forward": (sparse_forward.forward_kernel, 2),
        "dq": (sparse_backward.dq_kernel, 3),
        "dkdv": (sparse_backward.dkdv_kernel, 4),
    }
    variants = product(kernels.items(), RULES.items(), (False, True))
    for (kind, (kernel, products)), (rule, number), gain in variants:
        row = configs.row(kind, rule != "none" or gain)
        config = configs.from_table(arch, row, D, dtype, block, gain)
        config = configs.cut(kind, config, block)
        constants = {
            **dim,
            "BLOCK_Q": block,
            "BLOCK_K": block,
            "TILE_M": config.tile_m,
            "TILE_N": config.tile_n,
            "RULE": number.value,
            "AXES": 3 if rule == "windows" else 0,
            "GAIN": gain,
        }
        yield Case(
            f"{kind} {rule}{' gain' if gain else ''}",
            kernel,
            constants,
            config.num_warps,
            config.num_stages,
            products * config.tile_m * config.tile_n * configs.padded_dim(D),
        )
    yield Case("delta", sparse_backward.delta_kernel, {**dim, "TILE": configs.DELTA_TILE}, 4, 1)
    yield from _linear_cases(arch, D, dtype, block)
    yield from _gathered_cases(arch, D, dtype, block)
    lists = {"ROWS": listing.ROWS, "CHUNK": listing.CHUNK}
    yield Case("lists count", listing.count_kernel, lists, 4, 3)
    yield Case("lists starts", listing.starts_kernel, {"STEP": listing.STEP}, 4, 3)
    yield Case("lists fill", listing.fill_kernel, lists, 4, 3)


def _linear_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    dim = {"D": D, "BLOCK_D": configs.padded_dim(D)}
    sums = configs.sums(arch, dtype)
    sizes = {"TILE_M": sums.tile_m, "TILE_N": sums.tile_n, "TILE_K": sums.tile_k}
    needed = math.prod(sizes.values())
    sizes |= {"SIZE": D * D + D, "PRECISION": linear.precision(dtype)}
    yield Case("sums", linear.sums_kernel, sizes, sums.num_warps, sums.num_stages, needed)
    config = configs.linear(arch, D, dtype)
    sizes = {**dim, "BLOCK": block, "TILE": config.tile, "CHUNK": config.chunk}
    for name, flag in (
        ("states", "SCALED"),
        ("apply", "NORMED"),
        ("apply_transposed", "SCALED"),
    ):
        for on in (True, False):
            kernel = getattr(linear, f"{name}_kernel")
            label = f"{name} {flag.lower() if on else 'plain'}"
            yield Case(label, kernel, {**sizes, flag: on}, config.num_warps, 1)


def _gathered_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Those whose programs own queries, and that for keys over lists of single queries."""
    owned = {"OWNED": gathered.OWNED}
    sizes = {"D": D, "BLOCK_D": configs.padded_dim(D), "BLOCK_K": block}
    for kind, kernel, products in (
        ("forward", gathered_kernels.gathered_forward_kernel, 2),
        ("dq", gathered_kernels.gathered_dq_kernel, 3),
    ):
        config = gathered.from_table(arch, kind, D, dtype, block)
        tiles_of = {"TILE_M": config.tile_m, "TILE_N": config.tile_n}
        needed = products * config.tile_m * config.tile_n * configs.padded_dim(D)
        constants = {**sizes, **owned, **tiles_of}
        stages = config.num_warps, config.num_stages
        yield Case(f"gathered {kind}", kernel, constants, *stages, needed)
    config = gathered.from_table(arch, "dkdv", D, dtype, block)
    constants = {**sizes, "BLOCK_Q": 1, "TILE_M": config.tile_m, "TILE_N": config.tile_n}
    constants |= {"RULE": tiles.NONE.value, "AXES": 0, "GAIN": False}
    needed = 4 * config.tile_m * config.tile_n * configs.padded_dim(D)
    stages = config.num_warps, config.num_stages
    yield Case("gathered dkdv", sparse_backward.dkdv_kernel, constants, *stages, needed)
    steps = {"ROWS": owners.ROWS, "CHUNK": owners.CHUNK}
    yield Case("gathered owners", owners.owners_kernel, {**owned, **steps}, 4, 3)
    for weighted in (True, False):
        for lower in (True, False):
            flags = {"WEIGHTED": weighted, "LOWER": lower, "BLOCK": bins.BLOCK}
            yield Case("bins", bins.bins_kernel, flags, 4, 3)


def build(case: Case, arch: str, dtype: torch.dtype) -> Any:
    types = {**TYPES, **dict.fromkeys(INPUTS, f"*{DTYPES[dtype]}")}
    state = DTYPES[torch.float32 if "OWNED" in case.constants else linear.state_dtype(dtype)]
    types |= dict.fromkeys(("state", "total"), f"*{state}")
    rule = case.constants.get("RULE")
    types["rule"] = "*i8" if rule == tiles.ROUTE.value else "*i32"
    types["more"] = "*i8" if rule == tiles.WINDOWS.value else "*i32"
    names = case.kernel.arg_names  # pyright: ignore[reportFunctionMemberAccess]
    signature = {
        name: "constexpr" if name in case.constants else types.get(name, "i32") for name in names
    }
    # As the launcher finds it: pointers and the strides of whole rows are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = ASTSource(case.kernel, signature, case.constants, aligned)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


def usage(case: Case, compiled: Any) -> Usage:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        notes = compiled.asm["amdgcn"]
        registers, *spills = (
            int(re.findall(rf"\.{name}:\s*(\d+)", notes)[-1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Usage(registers, max(spills), shared, 0)
    text = sass.cuobjdump(compiled, "--dump-resource-usage")
    found = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL"))
    registers, stack, local = (int(match[1]) for match in found if match)
    issued = 0
    if case.needed:
        loops = sass.inner_loops(sass.cuobjdump(compiled, "--dump-sass"))
        issued = max((sass.multiply_adds(loop, case.num_warps) for loop in loops), default=0)
    return Usage(registers, stack + local, shared, issued / max(case.needed, 1))


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each kernel; 1 if one of them spills, does not fit or computes twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES.values(), default=["bf16"])
    parser.add_argument(
        "--block", nargs="+", type=int, default=[64, 128], help="slots in a block of the plan"
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[""], help='only those that begin so, such as "dq windows"'
    )
    options = parser.parse_args(arguments)
    bad = count = 0
    titles = "".join(f"{name:>10}" for name in Usage._fields)
    print(f"{'arch':8}{'D':>5} {'block':>5} {'dtype':6}{'kernel':26}{titles}")
    for arch, D, block, short in product(options.arch, options.dim, options.block, options.dtype):
        dtype = next(dtype for dtype, name in DTYPES.items() if name == short)
        for case in cases(arch, D, dtype, block):
            if not case.name.startswith(tuple(options.kernel)):
                continue
            used = usage(case, build(case, arch, dtype))
            fits = used.spilled == 0 and used.shared <= SHARED[arch] and used.products <= 1
            bad += not fits
            count += 1
            *whole, products = used
            numbers = "".join(f"{number:10}" for number in whole)
            numbers += f"{products:10.2f}" if products else f"{'-':>10}"
            about = f"{arch:8}{D:5} {block:5} {short:6}{case.name:26}"
            print(f"{about}{numbers}{'' if fits else '  !'}", flush=True)
    print(f"{bad} of {count} kernels spill, do not fit or compute products twice")
    return int(bad > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main())
