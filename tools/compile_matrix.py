"""Compile every kernel without a GPU, and refuse configurations that spill, do not fit, compute a
matrix product twice, or spend more instructions on whole blocks than MOST says, or in 8 bits more
than half of the clocks of bf16.

    python tools/compile_matrix.py --arch sm_90

Registers and spills come from the cuobjdump in Triton's package, or from AMD's code object notes.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gen_accel.kernels.triton import (
    block_facts,
    block_sparse,
    configs,
    curve,
    gathered,
    launch,
    linear,
    listing,
    packing,
    pooling,
    rest_backward,
    rest_columns,
    rest_turns,
    selection,
    slope,
    sparse_backward,
    tiles,
)

# Shared memory that one program may use, in bytes.
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
# Shared bytes and warps that NVIDIA's multiprocessors hold; a program takes SYSTEM of the bytes.
HELD = {80: (164 << 10, 64), 86: (100 << 10, 48), 89: (100 << 10, 48), 90: (228 << 10, 64)}
HELD |= {100: (228 << 10, 64), 120: (100 << 10, 48)}
REGISTERS, SYSTEM = 1 << 16, 1 << 10

COLUMNS = 512  # columns of a head: blocks of 64 of 33k tokens

# Instructions of a warp for each key of the packed forward pass, in its loop over whole blocks, by
# architecture, head dim and length of the blocks, with the compiler of Triton 3.9; Triton 3.5
# takes a tenth more. Turns that rescale are included. No instruction may be one of `sass.COPIES`.
MOST = {("sm_90", 128, 128): 4.3, ("sm_90", 128, 64): 4.8}

RULES = {
    "none": tiles.NONE,
    "windows": tiles.WINDOWS,
    "route": tiles.ROUTE,
    "bits": tiles.BITS,
}

# Types of arguments by name; arguments of the inputs' own type and integers are not listed.
TYPES = {
    **dict.fromkeys(("lse", "base2", "delta", "grad_lse", "gain", "by", "weight"), "*fp32"),
    **dict.fromkeys(("slots", "index", "counts", "turns"), "*i32"),
    **dict.fromkeys(("ranges", "blocks", "members", "before"), "*i32"),
    **{"scores": "*fp32", "added": "*fp32", "wanted": "*i64"},
    **{"ints": "*i8", "halves": "*fp16", "steps": "*fp32", "powers": "*fp32"},
    **dict.fromkeys(("keep", "whole", "sets", "picks", "kinds"), "*u8"),
    **{"acc": "*fp32", "picked": "*i16", "keys": "*i32", "upper": "*i64", "count": "*i64"},
    **dict.fromkeys(("scale", "factor", "eps"), "fp32"),
    **dict.fromkeys(("joint", "held", "bias"), "*fp32"),
    **dict.fromkeys(("dmeans", "dbias", "shifts", "spreads", "wide_means"), "*fp32"),
    **dict.fromkeys(("dk_sums", "dv_sums", "dweight_sums", "dweight_parts"), "*fp32"),
    **dict.fromkeys(("rise", "drise", "curves", "dcurves", "key_means", "squares"), "*fp32"),
    **dict.fromkeys(("counted", "totals", "sums", "dweight", "deviations"), "*fp32"),
    **dict.fromkeys(("key_squares", "key_counted"), "*fp32"),
    **dict.fromkeys(("parts", "common", "low_lse"), "*fp32"),
}
INPUTS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv", "x", "y", "dx")
INPUTS += tuple(f"packed_{name}" for name in ("x", "y", "q", "grad"))
INPUTS += ("means", "dmean_parts", *(f"pooled_{name}" for name in ("k", "v", "dk", "dv")))
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Case(NamedTuple):
    """One kernel as it is launched for one architecture.

    Args:
        needed: multiply-adds in each turn of its loop.
        keys: keys that a turn processes; queries where the kernel loops over queries.
        packed: positions of the arguments that are descriptors.
        most: instructions of a warp for each key.
        shuffles: bound on exchanges between the threads of a warp in a turn.
        turns: unrolled turns, where the compiler has made no loop of them.
        nested: whether the loop lies in another one, which then holds all turns.
        inner: turns of the loop in one turn of the loop around it, whose instructions count too.
        clocks: bound on the clocks of the products, see `Usage`.
    """

    name: str
    kernel: triton.JITFunction
    constants: dict
    num_warps: int
    num_stages: int
    needed: int = 0
    keys: int = 0
    packed: tuple[int, ...] = ()
    most: float = math.inf
    shuffles: float = math.inf
    turns: int = 1
    nested: bool = False
    inner: int = 0
    clocks: float = math.inf


class Usage(NamedTuple):
    """Resources of a kernel: registers of a thread, its spilled bytes (NVIDIA) or registers (AMD),
    and shared bytes. Counts of the turn that computes most, 0 where not counted: its products, in
    multiples of the needed ones; and over whole blocks instructions of a warp for each key, copies
    with fences, and exchanges among the threads of a warp. Programs that a multiprocessor of
    NVIDIA holds at a time. Clocks of the products on GeForce cards, as a share of what the needed
    ones take in bf16 with sums in fp32."""

    registers: int
    spilled: int
    shared: int
    products: float = 0.0
    per_key: float = 0.0
    copies: int = 0
    shuffles: int = 0
    programs: int = 0
    clocks: float = 0.0


def cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Yield every kernel; kernels that evaluate a rule once for each rule, plainly and with
    a gain; the forward pass that goes on with a rest, whose loops are those without, once."""
    for kind, rule, form in product(block_sparse.KERNELS, RULES, ("", "gain", "begun")):
        gain = form == "gain"
        if form == "begun" and not (kind.endswith("forward") and rule == "none"):
            continue
        row = configs.row(kind, rule != "none" or gain)
        facts = arch, row, D, dtype, block, block, gain
        if kind.startswith(configs.ROUNDING) and arch not in configs.ROUNDED:
            continue
        if kind not in block_sparse.PACKED or configs.packs(*facts):
            yield _sparse_case(arch, D, dtype, block, kind, rule, form)
    dim = configs.dims(D)
    yield Case("delta", sparse_backward.delta_kernel, {**dim, "TILE": configs.DELTA_TILE}, 4, 1)
    if arch in configs.PACKED and dtype != torch.float32:
        sizes = {**dim, "TILE": packing.TILE}
        yield Case("pack", packing.pack_kernel, sizes, 4, 1)
        for copy in (True, False):
            name = f"pack queries{'' if copy else ' in place'}"
            yield Case(name, packing.pack_queries_kernel, {**sizes, "COPY": copy}, 4, 1)
    yield from _linear_cases(arch, D, dtype, block)
    yield from _gathered_cases(arch, D, dtype, block)
    yield from _column_cases(arch, D, dtype, block)
    yield from _turn_cases(arch, D, dtype, block)
    yield from _pool_cases(arch, D, dtype, block)
    yield from _curve_cases(D, block)
    yield from _slope_cases(arch, D, dtype, block)
    lists = {"ROWS": listing.ROWS, "CHUNK": listing.CHUNK}
    sizes = {**dim, "BLOCK": block, "TILE": launch.TILE, "MEAN": True, "LESS": True}
    yield Case("pooled", pooling.sums_kernel, sizes, launch.WARPS, 3)
    yield Case("lists count", listing.count_kernel, lists, 4, 3)
    yield Case("lists starts", listing.starts_kernel, {"STEP": listing.STEP}, 4, 3)
    yield Case("lists fill", listing.fill_kernel, lists, 4, 3)
    for blocks in (COLUMNS, 4 * COLUMNS, selection.MOST_BLOCKS):
        flags = {"ADDED": True, "EACH": True, **selection.sizes(blocks)}
        warps = flags.pop("num_warps")
        yield Case(f"lists select {blocks}", selection.select_kernel, flags, warps, 3)


def _sparse_case(
    arch: str, D: int, dtype: torch.dtype, block: int, kind: str, rule: str, form: str
) -> Case:
    gain = form == "gain"
    row = configs.row(kind, rule != "none" or gain)
    config = configs.cut(row, configs.from_table(arch, row, D, dtype, block, gain), block)
    sizes = configs.sizes(kind, config, block, block)
    depth = configs.depth(kind, D)
    if kind.endswith("forward"):
        sizes["WIDTH"] = configs.width(arch, config, depth, packed=kind in block_sparse.PACKED)
        sizes["BEGUN"] = form == "begun"
    own, loop = (sizes["TILE_N"], sizes["TILE_M"])[:: 1 if configs.of_keys(kind) else -1]
    keys = loop * sizes.get("LOADS", 1)
    products = {"forward": 2, "dq": 3, "dkdv": 4}[kind.split()[-1]]
    limited = kind == "packed forward" and not gain and _release() >= (3, 9)
    return Case(
        f"{kind} {rule} {form}".strip(),
        block_sparse.KERNELS[kind],
        {
            **{"D": D, "BLOCK_D": configs.padded_dim(depth)},
            **sizes,
            "RULE": RULES[rule].value,
            "AXES": 3 if rule == "windows" else 0,
            "GAIN": gain,
        },
        config.num_warps,
        config.num_stages,
        products * own * keys * configs.padded_dim(depth),
        keys,
        block_sparse.PACKED.get(kind, ()),
        MOST.get((arch, D, block), math.inf) if limited else math.inf,
        _exchanges(arch, kind, config, dtype),
        clocks=0.5 if kind.startswith(configs.ROUNDING) else math.inf,
    )


def _exchanges(arch: str, kind: str, config: configs.LaunchConfig, dtype: torch.dtype) -> float:
    """Number of exchanges that a turn needs where warps multiply for themselves: two for the
    maximum and two for the sum of each row that a thread holds, which is two of 16 rows of a warp.
    More of them move the weights from warp to warp, which happens to a product laid out along its
    columns."""
    if arch not in configs.HALVED or dtype == torch.float32:
        return math.inf
    return 8 * max(1, config.tile_m // (16 * config.num_warps)) if kind.endswith("forward") else 0


def _release() -> tuple[int, ...]:
    """Version of Triton, major and minor."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _linear_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    dim = configs.dims(D)
    sums = configs.sums(arch, dtype)
    sizes = {"TILE_M": sums.tile_m, "TILE_N": sums.tile_n, "TILE_K": sums.tile_k}
    needed = math.prod(sizes.values())
    sizes |= {"SIZE": D * D + D, "PRECISION": linear.precision(dtype)}
    yield Case("sums", linear.sums_kernel, sizes, sums.num_warps, sums.num_stages, needed)
    config = configs.linear(arch, D, dtype)
    sizes = {**dim, "BLOCK": block, "TILE": config.tile, "CHUNK": config.chunk}
    needed = config.tile * configs.padded_dim(D) * config.chunk
    for name, flag in (
        ("states", "SCALED"),
        ("apply", "NORMED"),
        ("apply_transposed", "SCALED"),
    ):
        for on in (True, False):
            kernel = getattr(linear, f"{name}_kernel")
            label = f"{name} {flag.lower() if on else 'plain'}"
            constants = {**sizes, flag: on}
            if (
                name != "apply_transposed"
            ):  # softmax, of the features the dearest, while generating
                constants["FEATURE"] = int(on == (name == "apply"))
            case = Case(label, kernel, constants, config.num_warps, 1, needed)
            yield case._replace(turns=math.ceil(block / config.tile))


def _gathered_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Yield the kernels whose programs own queries, and the kernel for keys over lists of single
    queries."""
    owned = {"OWNED": gathered.OWNED}
    sizes = {**configs.dims(D), "BLOCK_K": block}
    for kind, kernel, products in (
        ("forward", gathered.gathered_forward_kernel, 2),
        ("dq", gathered.gathered_dq_kernel, 3),
    ):
        config = gathered.from_table(arch, kind, D, dtype, block)
        tiles_of = {"TILE_M": config.tile_m, "TILE_N": config.tile_n}
        needed = products * config.tile_m * config.tile_n * configs.padded_dim(D)
        constants = {**sizes, **owned, **tiles_of}
        if kind == "forward":
            constants["WIDTH"] = configs.width(arch, config, D)
        stages = config.num_warps, config.num_stages
        yield Case(f"gathered {kind}", kernel, constants, *stages, needed)
    config = gathered.from_table(arch, "dkdv", D, dtype, block)
    constants = {**sizes, "BLOCK_Q": 1, "TILE_M": config.tile_m, "TILE_N": config.tile_n}
    constants |= {"RULE": tiles.NONE.value, "AXES": 0, "GAIN": False, "PACKED": False}
    needed = 4 * config.tile_m * config.tile_n * configs.padded_dim(D)
    stages = config.num_warps, config.num_stages
    yield Case("gathered dkdv", sparse_backward.dkdv_kernel, constants, *stages, needed)
    steps = {"ROWS": listing.ROWS, "CHUNK": listing.CHUNK}
    yield Case("gathered owners", listing.owners_kernel, {**owned, **steps}, 4, 3)
    for weighted in (True, False):
        for lower in (True, False):
            flags = {"WEIGHTED": weighted, "LOWER": lower, "BLOCK": listing.BLOCK}
            yield Case("bins", listing.bins_kernel, flags, 4, 3)


def _column_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Yield kernels of the rest, over as many columns as tiles are long, and more."""
    dim = configs.dims(D)
    yield Case("rest common", rest_columns.common_kernel, {**dim, "SOME": configs.SOME}, 4, 3)
    around_keys = (("forward", "dq", "dkdv"), (False,), (False,))
    around_queries = (("dq", "dpooled"), (True,), (False, True))
    for kind, centred, curved in (*product(*around_keys), *product(*around_queries)):
        config = configs.columns(arch, kind, D, dtype, block, COLUMNS, curved)
        constants = {**dim, "TILE_M": config.tile_m, "TILE_N": config.tile_n, "BLOCK_Q": block}
        keys, shuffles, products = config.tile_m, math.inf, 4
        module = rest_columns if kind == "forward" else rest_backward
        if kind == "dkdv":
            constants["BLOCK_K"] = block
        elif kind != "forward":
            constants["CURVED"] = curved
            constants["GROUP"] = (
                configs.pool(arch, "pool", D, dtype, block, curved).tile_m if centred else 1
            )
        if kind == "dq":
            constants["CENTRED"] = centred
            keys, products = config.tile_n, 3
        if kind == "forward":
            constants["WIDTH"], constants["SLOPED"] = configs.width(arch, config, D), True
            keys, products = config.tile_n, 2
            shuffles = _exchanges(arch, kind, config, dtype) + config.tile_n // 4  # for biases
        yield Case(
            f"rest {kind} {'queries' if centred else 'keys'}{' curved' if curved else ''}",
            getattr(module, f"columns_{kind}_kernel"),
            constants,
            config.num_warps,
            config.num_stages,
            products * config.tile_m * config.tile_n * dim["BLOCK_D"],
            keys,
            shuffles=shuffles,
        )


def _turn_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Yield the forward pass of a rest around mean queries; its longer loop is counted."""
    of_pool, config = configs.turns(arch, D, dtype, block, block)
    constants = {**configs.dims(D), "BLOCK_Q": block, "BLOCK_K": block, "GROUP": of_pool.tile_m}
    constants |= {"LOAD": of_pool.tile_n, "BLOCKS": configs.POOL_BLOCKS, "SLOPED": True}
    constants |= {"TILE_M": config.tile_m, "TILE_N": config.tile_n, "STAGES": of_pool.num_stages}
    constants["WIDTH"] = configs.width(arch, config, D)
    products = 3 * of_pool.tile_m * of_pool.tile_n, 2 * config.tile_m * config.tile_n
    keys = of_pool.tile_n if products[0] > products[1] else config.tile_n
    for curved in (False, True):
        yield Case(
            f"rest turns{' curved' if curved else ''}",
            rest_turns.rest_turns_kernel,
            {**constants, "CURVED": curved},
            config.num_warps,
            config.num_stages,
            max(products) * constants["BLOCK_D"],
            keys,
        )


def _pool_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Yield kernels of the rest that pool around mean queries."""
    dim = configs.dims(D)
    parts = 1 if dtype == torch.float32 else 2  # of the mean queries
    needed = dict(zip(configs.POOLS, (3, 7, parts), strict=True))
    for kind, curved in product(configs.POOLS, (False, True)):
        if kind == "spread" and curved:
            continue  # it pools no keys
        config = configs.pool(arch, kind, D, dtype, block, curved)
        constants = {**dim, "BLOCK_K": block, "GROUP": config.tile_m, "TILE_N": config.tile_n}
        keys = config.tile_n
        if kind == "pool backward":
            group = configs.pool(arch, "pool", D, dtype, block, curved).tile_m
            constants |= {"GROUP": group, "TILE_M": config.tile_m}
            keys = config.tile_m
        else:
            constants["BLOCKS"] = configs.POOL_BLOCKS
        if kind != "spread":
            constants["CURVED"] = curved
        if kind == "pool":
            constants["STAGES"] = config.num_stages
        yield Case(
            f"rest {kind}{' curved' if curved else ''}",
            getattr(pooling, f"{kind.replace(' ', '_')}_kernel"),
            constants,
            config.num_warps,
            config.num_stages,
            needed[kind] * config.tile_m * config.tile_n * dim["BLOCK_D"],
            keys,
            inner=0 if kind == "pool backward" else math.ceil(block / config.tile_n),
        )


def _curve_cases(D: int, block: int) -> Iterator[Case]:
    dim = {**configs.dims(D), "TILE": launch.TILE}
    sums = {"D": D, "TILE": launch.TILE, "COLUMNS": block_facts.COLUMNS}
    yield Case("facts of heads", block_facts.head_facts_kernel, sums, launch.WARPS, 3)
    sizes = {**dim, "BLOCK_Q": block, "BLOCK_K": block}
    yield Case("facts weighed", block_facts.weighed_squares_kernel, sizes, launch.WARPS, 3)
    sizes = {**dim, "BLOCK": block}
    for name in ("PLAIN", "WEIGHED", "DEVIATION"):
        flag = {"KIND": getattr(pooling, name).value}
        kernel = pooling.block_squares_kernel
        yield Case(f"squares {name.lower()}", kernel, {**sizes, **flag}, launch.WARPS, 3)
    for on in (False, True):
        name, kernel = f"curve backward{' queries' if on else ''}", curve.off_means_backward_kernel
        yield Case(name, kernel, {**sizes, "QUERIES": on}, launch.WARPS, 3)


def _slope_cases(arch: str, D: int, dtype: torch.dtype, block: int) -> Iterator[Case]:
    """Yield the slope kernels around queries; around keys they take no mean of the queries."""
    own = configs.slope(arch, D, dtype)
    own = own._replace(tile=configs.tile(block, own.tile))
    plain = own._replace(tile=configs.part_tile(arch, dtype, block))
    beside, ahead = configs.facts(arch, D, dtype, block)
    part = {"BLOCKS": configs.part_blocks(D, block), "CENTRED": True}
    for kind, config, stages, flags in (
        ("parts", plain, 1, {**part, "FACTS": False}),
        ("parts", beside, ahead, {**part, "FACTS": True}),
        ("add", own, 1, {"CENTRED": True}),
        ("queries_backward", own, 1, {"CENTRED": True}),
        ("keys_backward", own, 1, {"TRANSPOSED": False}),
        ("keys_backward", own, 1, {"TRANSPOSED": True}),
    ):
        flag, on = next(reversed(flags.items()))
        name = f"slope {kind.replace('_', ' ')}{f' {flag.lower()}' if on else ''}"
        kernel = getattr(slope, f"slope_{kind}_kernel")
        constants = {**configs.dims(D), "BLOCK": block, "CHUNK": config.chunk}
        constants |= {"TILE": config.tile, **flags}
        needed = config.tile * configs.padded_dim(D) * config.chunk
        case = Case(name, kernel, constants, config.num_warps, stages, needed, config.tile)
        yield case._replace(turns=math.ceil(block / config.tile), nested=kind == "parts")


def build(case: Case, arch: str, dtype: torch.dtype) -> Any:
    types: dict[str, str | tuple[str, ...]] = {
        **TYPES,
        **dict.fromkeys(INPUTS, f"*{DTYPES[dtype]}"),
    }
    kernel: Any = case.kernel
    state = DTYPES[torch.float32 if "OWNED" in case.constants else configs.state_dtype(dtype)]
    types |= dict.fromkeys(("state", "total"), f"*{state}")
    rule = case.constants.get("RULE")
    types["rule"] = "*i8" if rule == tiles.ROUTE.value else "*i32"
    types["more"] = "*i8" if rule == tiles.WINDOWS.value else "*i32"
    names = kernel.arg_names
    for place in case.packed:
        load = case.constants["TILE_M" if "dk" in names else "TILE_N"]
        shape = f"1, 1, {load}, {case.constants['BLOCK_D']}"
        types[names[place]] = f"tensordesc<{DTYPES[dtype]}[{shape}]>"
    # Rows are a pointer and three strides; of packed ones a descriptor.
    bodies = (pooling.pool_blocks, rest_columns.attend_columns)  # their arguments have these names
    code = kernel.src + "".join(x.src for x in bodies if f"{x.__name__}(" in kernel.src)
    read = set(re.findall(r"\b(?:of_head|_block)\((\w+), ", code))
    for name in read - {names[place] for place in case.packed}:
        types[name] = (str(types[name]), *("i32",) * 3)
    signature = {
        name: "constexpr" if name in case.constants else types.get(name, "i32") for name in names
    }
    # As the launcher does: pointers and the strides of whole rows are multiples of 16.
    aligned = {}
    for place, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(4)}
        elif kind.startswith("*"):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, case.constants, aligned)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options["enable_fp_fusion"] = launch.fuses(kernel, case.constants)
    return triton.compile(source, target=target, options=options)


def usage(case: Case, compiled: Any) -> Usage:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        notes = compiled.asm["amdgcn"]
        registers, *spills = (
            int(re.findall(rf"\.{name}:\s*(\d+)", notes)[-1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Usage(registers, max(spills), shared)
    text = sass.cuobjdump(compiled, "--dump-resource-usage")
    found = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL"))
    registers, stack, local = (int(match[1]) for match in found if match)
    used = Usage(registers, stack + local, shared)
    used = used._replace(programs=programs(case, used, compiled.metadata.target.arch))
    return counted(case, used, sass.cuobjdump(compiled, "--dump-sass")) if case.needed else used


def programs(case: Case, used: Usage, arch: int) -> int:
    """Number of programs that a multiprocessor holds by its registers, which a warp takes by the
    256, its shared memory and its warps."""
    shared, warps = HELD[arch]
    registers = 32 * case.num_warps * 8 * math.ceil(used.registers / 8)
    return min(REGISTERS // registers, shared // (used.shared + SYSTEM), warps // case.num_warps)


def counted(case: Case, used: Usage, code: str) -> Usage:
    """Return `used` with the counts of a turn, from a listing of `cuobjdump -sass`."""
    found, turns = sass.inner_loops(code), 1
    loops = [loop.code for loop in found]
    held = [loop.held for loop in found if sass.multiply_adds(loop.code, case.num_warps)]
    if not loops or (case.turns > 1 and not held):
        loops, turns = [sass.instructions(code)], case.turns
    elif case.nested and not any(held):
        turns = case.turns
    products = [sass.multiply_adds(loop, case.num_warps) for loop in loops]
    issued = max(products, default=0)
    used = used._replace(products=issued / (case.needed * turns))
    if not held or not case.keys:
        return used
    # A loop over masked blocks computes no more than a loop over whole blocks, and takes longer.
    most = (place for place, count in enumerate(products) if count == issued)
    place = min(most, key=lambda place: len(loops[place]))
    whole, around = loops[place], found[place].around if turns == 1 and found else 0
    per_key = len(whole) / (case.keys * turns)
    if case.inner and around:
        per_key += (around - len(whole)) / (case.keys * case.inner)
    used = used._replace(per_key=per_key, copies=sass.copies(whole))
    in_bf16 = 16 * sass.CLOCKS["HMMA", "F32"] * case.needed * turns
    per_warp = in_bf16 / (16 * 8 * 16 * case.num_warps)
    return used._replace(shuffles=sass.shuffles(whole), clocks=sass.clocks(whole) / per_warp)


def fits(case: Case, used: Usage, arch: str) -> bool:
    if used.spilled or used.shared > SHARED[arch] or used.products > 1:
        return False
    if used.per_key > case.most or used.shuffles > case.shuffles or used.clocks > case.clocks:
        return False
    return not (used.copies and case.most < math.inf)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each kernel; return 1 if one is refused."""
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
    print(f"{'arch':8}{'D':>5} {'block':>5} {'dtype':6}{'kernel':28}{titles}")
    for arch, D, block, short in product(options.arch, options.dim, options.block, options.dtype):
        dtype = next(dtype for dtype, name in DTYPES.items() if name == short)
        for case in cases(arch, D, dtype, block):
            if not case.name.startswith(tuple(options.kernel)):
                continue
            used = usage(case, build(case, arch, dtype))
            good = fits(case, used, arch)
            bad += not good
            count += 1
            numbers = "".join(f"{number:10}" for number in used[:3])
            numbers += "".join(f"{x:10.2f}" if x else f"{'-':>10}" for x in used[3:5])
            for number in used[5:7]:
                numbers += f"{number if used.per_key else '-':>10}"
            numbers += f"{used.programs or '-':>10}"
            numbers += f"{used.clocks:10.2f}" if used.clocks else f"{'-':>10}"
            about = f"{arch:8}{D:5} {block:5} {short:6}{case.name:28}"
            print(f"{about}{numbers}{'' if good else '  !'}", flush=True)
    print(f"{bad} of {count} kernels spill, do not fit, compute products twice or take too long")
    return int(bad > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main())
