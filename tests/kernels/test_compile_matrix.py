"""Compiling the Triton kernels without a GPU, and what is counted in their machine code."""

import compile_matrix
import pytest
import sass
import torch
from support.interpreter import run_python
from support.paths import ROOT

MATRIX = str(ROOT / "tools" / "compile_matrix.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where processes of this file keep what they compiled, so that it is done once."""
    return str(tmp_path_factory.mktemp("triton"))


SOME_KERNELS = ["--dim", "128", "--block", "64", "--kernel"]
SOME_KERNELS += ["forward bits gain", "delta", "sums"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "count"),
    [
        pytest.param(SOME_KERNELS, 3, id="some"),
        pytest.param([], 416, id="every", marks=pytest.mark.nightly),
    ],
)
def test_kernels_compile_for_hopper_and_spill_nothing(compiled, options, count):
    done = run_python(MATRIX, "--arch", "sm_90", *options, TRITON_CACHE_DIR=compiled)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90 ") == count


@pytest.mark.nightly
def test_packed_keys_take_few_instructions_and_no_fences(compiled):
    """By which compile_matrix refuses the loop over whole blocks."""
    options = ["--arch", "sm_90", "--dim", "128", "--block", "128"]
    options += ["--kernel", "packed forward none"]
    done = run_python(MATRIX, *options, TRITON_CACHE_DIR=compiled)
    assert done.returncode == 0, done.stdout + done.stderr
    plain = next(
        line for line in done.stdout.splitlines() if "gain" not in line and "sm_90" in line
    )
    products, per_key, copies, _ = map(float, plain.split()[-6:-2])
    assert products == 1
    assert 3 < per_key <= compile_matrix.MOST["sm_90", 128, 128] == 4.3
    assert copies == 0


def test_weights_that_move_from_warp_to_warp_are_refused():
    """As they do with 64 queries and all columns of 128 at once on cards without wgmma."""
    [case] = [
        case
        for case in compile_matrix.cases("sm_80", 128, torch.bfloat16, 64)
        if case.name == "forward none"
    ]
    assert case.constants["WIDTH"] == 64
    assert case.shuffles == 8
    used = compile_matrix.Usage(205, 0, 80 << 10, 1.0, 12.0, 8, 8)
    assert compile_matrix.fits(case, used, "sm_80")
    assert not compile_matrix.fits(case, used._replace(shuffles=64), "sm_80")


@pytest.mark.parametrize(
    ("changed", "good"),
    [
        ({}, True),
        ({"per_key": 4.4}, False),
        ({"copies": 1}, False),
        ({"spilled": 8}, False),
        ({"products": 1.5}, False),
        ({"shared": 228 << 10}, False),
    ],
    ids=str,
)
def test_what_is_refused(changed, good):
    [case] = [
        case
        for case in compile_matrix.cases("sm_90", 128, torch.bfloat16, 128)
        if case.name == "packed forward none"
    ]
    assert case.keys == 128
    used = compile_matrix.Usage(205, 0, 160 << 10, 1.0, 4.2, 0)._replace(**changed)
    assert compile_matrix.fits(case, used, "sm_90") == good


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   LDGSTS.E.128 [R3], [R4.64] ;
        /*0028*/                   SHFL.BFLY PT, R9, R8, 0x2, 0x1f ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R56, R8, gdesc[UR12], R56, gsb0 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/              @!P1 BRA `(.L_x_0) 0x0 ;
        /*0070*/                   EXIT ;
"""


def test_products_of_the_inner_loop_are_counted():
    [(loop, around)] = sass.inner_loops(LISTING)
    assert around == len(sass.instructions(LISTING)) - 1  # all but EXIT
    assert [text.split(".")[0] for text in loop[:2]] == ["HGMMA", "LDGSTS"]
    four = 64 * 64 * 16 + 64 * 128 * 16
    assert sass.multiply_adds(loop, 8) == 2 * four + 8 * 16 * 8 * 16
    assert sass.multiply_adds([], 8) == 0
    assert sass.shuffles(loop) == 1
    assert sass.instructions(LISTING)[1:-2] == loop
    assert sass.copies(loop) == 1


def listed(*lines):
    """Of lines, a number for a branch to that one."""
    texts = (f"@P0 BRA {16 * x:#x}" if isinstance(x, int) else x for x in lines)
    return "\n".join(f"/*{16 * i:04x}*/  {text} ;" for i, text in enumerate(texts))


PRODUCT = "HMMA.16816.F32 R4, R8, R12, R4"


@pytest.mark.parametrize(
    ("lines", "products"),
    [
        pytest.param(["MOV", PRODUCT, 1, 0], 1.0, id="a loop within a loop"),
        pytest.param(["MOV", PRODUCT, PRODUCT, 1, 0], 2.0, id="the same, twice"),
        pytest.param(["MOV", *[PRODUCT] * 4, 0], 1.0, id="four turns in the outer loop"),
        pytest.param(["MOV", *[PRODUCT] * 8, 0], 2.0, id="the same, twice each"),
        pytest.param(["MOV", 0, *[PRODUCT] * 4], 1.0, id="four turns in no loop"),
    ],
)
def test_turns_that_stand_in_the_outer_loop_are_no_duplicates(lines, products):
    needed = 16 * 8 * 16 * 4
    case = compile_matrix.Case("", sass, {}, 4, 1, needed, keys=16, turns=4, nested=True)
    used = compile_matrix.counted(case, compile_matrix.Usage(1, 0, 0), listed(*lines))
    assert used.products == products


def test_instructions_of_the_loop_around_are_shared_among_its_keys():
    """Twice a loop of 3 over 16 keys each, in a loop of 7 in all."""
    lines = ["MOV", "MOV", PRODUCT, "FADD", 2, "MUFU", 0]
    case = compile_matrix.Case("", sass, {}, 4, 1, 16 * 8 * 16 * 4, keys=16, inner=2)
    used = compile_matrix.counted(case, compile_matrix.Usage(1, 0, 0), listed(*lines))
    assert used.per_key == (2 * 3 + 4) / 32
    alone = compile_matrix.counted(case._replace(inner=0), used, listed(*lines))
    assert alone.per_key == 3 / 16


def test_programs_are_as_many_as_registers_memory_and_warps_allow():
    case = compile_matrix.Case("", sass, {}, 4, 1)
    used = compile_matrix.Usage(152, 0, 82_976)
    assert compile_matrix.programs(case, used, 90) == 2  # by memory
    assert compile_matrix.programs(case, used._replace(shared=1024), 90) == 3  # by registers
    few = compile_matrix.Usage(16, 0, 0)
    assert compile_matrix.programs(case, few, 89) == 12  # by warps
    assert compile_matrix.programs(case, few, 90) == 16


def flagged(compiled, row, **changed):
    """Lines of kernels that compile_matrix refuses once the first configuration of a row differs.

    Args:
        row: of `configs`, as Python.
    """
    code = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r})\n"
        "import compile_matrix\nfrom gen_accel.kernels.triton import configs\n"
        f"forward, *rest = configs.{row}\n"
        f"configs.{row} = forward._replace(**{changed}), *rest\n"
        "raise SystemExit(compile_matrix.main(sys.argv[1:]))\n"
    )
    options = ["--arch", "sm_90", "--dim", "64", "--kernel", "forward none", "delta"]
    done = run_python("-c", code, *options, TRITON_CACHE_DIR=compiled)
    assert done.returncode == 1, done.stderr
    return [line for line in done.stdout.splitlines() if line.endswith("!")]


@pytest.mark.nightly
def test_a_configuration_that_computes_twice_is_found(compiled):
    """As eight warps do with the 64 rows that four of them could work off."""
    bad = [line.split() for line in flagged(compiled, "SHORT['sm_90', 64]", num_warps=8)]
    assert {line[2] for line in bad} == {"64"}
    assert all(float(line[-7]) == 1.5 for line in bad)


@pytest.mark.nightly
def test_a_configuration_that_spills_is_found(compiled):
    bad = flagged(compiled, "TABLE['sm_90'][64]", num_warps=2)
    assert any("forward none" in line for line in bad)
    assert all("forward" in line for line in bad)


# Rows of the page: kernels of one tile, and what a turn works off.
COUNTED = {
    "columns, forward, around keys": ("rest forward keys",),
    "rest in turns, around queries": ("rest turns",),
    "columns, gradient of queries": ("rest dq keys", "rest dq queries"),
    "columns, gradient of mean keys": ("rest dkdv keys",),
    "columns, gradient of pooled keys": ("rest dpooled queries",),
    "pooling": ("rest pool",),
    "pooling, backward": ("rest pool backward",),
    "spread": ("rest spread",),
    "first order: parts of the slope": ("slope parts",),
    "second order: parts of the slope, and facts of blocks": ("slope parts facts",),
    "first order: adding, in training": ("slope add centred",),
    "first order: gradient of queries": ("slope queries backward centred",),
    "first order: gradients of keys and of values": ("slope keys backward",),
    "second order: rest in turns": ("rest turns curved",),
    "second order: columns, gradient of queries": ("rest dq queries curved",),
    "second order: columns, gradient of pooled keys": ("rest dpooled queries curved",),
    "second order: pooling": ("rest pool curved",),
    "second order: pooling, backward": ("rest pool backward curved",),
}
UNITS = {
    "rest forward": "a column",
    "rest turns": "a column",
    "rest dq": "a column",
    "rest dkdv": "a query",
    "rest dpooled": "a query",
    "rest pool": "a key",
    "rest pool backward": "a mean query",
    "rest spread": "a key",
    "slope parts": "a key",
    "slope add": "a query",
    "slope queries": "a query",
    "slope keys": "a key",
}


def tile_of(case):
    """Rows, which a program owns, and columns that a turn works off, or holds of a slope."""
    sizes = case.constants
    if case.name.startswith("slope"):
        return sizes["TILE"], sizes["CHUNK"]
    rows, columns = sizes.get("TILE_M") or sizes["GROUP"], sizes["TILE_N"]
    keys = ("rest dkdv", "rest dpooled", "rest pool backward")
    return (columns, rows) if case.name.startswith(keys) else (rows, columns)


@pytest.mark.nightly
@pytest.mark.skipif(compile_matrix._release() < (3, 9), reason="the page is of Triton 3.9")
def test_the_page_has_the_instructions_that_are_counted(compiled):
    options = ["--arch", "sm_90", "--dim", "128", "--block", "128", "--kernel", "rest", "slope"]
    done = run_python(MATRIX, *options, TRITON_CACHE_DIR=compiled)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines()[1:-1]:
        *about, registers, _, _, _, per_key, _, _, _, _ = line.split()
        found[" ".join(about[4:])] = per_key, registers
    cases = compile_matrix.cases("sm_90", 128, torch.bfloat16, 128)
    own = {case.name: case for case in cases}
    page = (ROOT / "docs/gpu.md").read_text()
    for name, kernels in COUNTED.items():
        rows, columns = tile_of(own[kernels[0]])
        unit = UNITS[max((x for x in UNITS if kernels[0].startswith(x)), key=len)]
        per_key, registers = zip(*(found[kernel] for kernel in kernels), strict=True)
        counted = " / ".join(f"{float(x):.1f}" for x in per_key)
        sizes = f"{rows} x {columns}, {own[kernels[0]].num_warps}"
        row = f"| {name} | {sizes} | {counted} {unit} | {' / '.join(registers)} |"
        assert row in page, row
