"""Compiles the C++ for this machine and loads what was compiled before. Never unasked."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

from gen_accel.files import cache_folder
from gen_accel.kernels.compiler import cpp_compiler
from gen_accel.kernels.failure import KernelFailed
from gen_accel.kernels.native.arguments import (
    Args,
    CurveArgs,
    KeptArgs,
    LinearArgs,
    PicksArgs,
    RestArgs,
    SlopeArgs,
    SpreadArgs,
    SumsArgs,
)

HERE = Path(__file__).parent
NAMES = ("attention", "curve", "int8", "linear", "rest", "selection", "slope", "spread")
SOURCES = tuple(HERE / f"{name}.cpp" for name in NAMES)
READ = (*SOURCES, HERE / "blocks.h", HERE / "common.h", HERE / "rest.h", HERE / "rest_backward.h")
FLAGS = (
    *(
        "-std=c++20",
        "-O3",
        "-march=native",
        "-mprefer-vector-width=512",
        "-fno-math-errno",
        "-fno-trapping-math",
    ),
    *("-fopenmp", "-DAT_PARALLEL_OPENMP=1", "-fPIC"),
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What the library says the size of each kind of arguments is, to be compared with.
SIZES = {
    "gen_accel_size": Args,
    "gen_accel_linear_size": LinearArgs,
    "gen_accel_rest_size": RestArgs,
    "gen_accel_curve_size": CurveArgs,
    "gen_accel_slope_size": SlopeArgs,
    "gen_accel_spread_size": SpreadArgs,
    "gen_accel_sums_size": SumsArgs,
    "gen_accel_picks_size": PicksArgs,
    "gen_accel_kept_size": KeptArgs,
}


def path() -> Path:
    """Where the library of this source, torch and processor lies, in the user's cache."""
    about = [*(file.read_text() for file in READ), *FLAGS, torch.__version__, _processor()]
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    return cache_folder() / f"native-{name}.so"


def build() -> Path:
    """Compile the library; a moment later `library` has it, in this process and in others.

    Raises:
        RuntimeError: no compiler, another system than Linux on x86_64, what the compiler says, or
            a library that does not load.
        OSError: the cache cannot be written.
    """
    where = f"{platform.system()} on {platform.machine()}"
    if where != "Linux on x86_64":
        raise RuntimeError(f"the CPU kernel is for Linux on x86_64, this is {where}")
    tool = cpp_compiler()
    if tool is None:
        raise RuntimeError("no C++ compiler: apt install g++, or name one in CXX")
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".so", ".partial-", target.parent)
    os.close(descriptor)
    partial = Path(name)
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    folders = cpp_extension.library_paths()
    links = [*(f"-L{folder}" for folder in folders), "-ltorch_cpu", "-lc10"]
    try:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
            objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
            compiling = [
                [tool, *FLAGS, *includes, "-c", str(source), "-o", made]
                for source, made in zip(SOURCES, objects, strict=True)
            ]
            list(pool.map(_call, compiling))  # raises what one of them raised
            _call([tool, *FLAGS, "-shared", *objects, "-o", str(partial), *links])
        try:
            _load(partial)
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"{target} was built and does not load: {error}") from error
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    library.cache_clear()
    return target


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """What `build` made for this machine; None where it did not, or where it does not load."""
    try:
        target = path()
        return _load(target) if target.is_file() else None
    except (OSError, RuntimeError, AttributeError):  # no home, another system's file, half a file
        return None


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether "auto" and what stands beside attention may count on `library`."""
    return library() is not None


def run(name: str, args: ctypes.Structure, *more: int, kernel: str = "native") -> None:
    """Call a function of the library. Raises KernelFailed, which names the kernel."""
    found = library()
    if found is None:
        raise KernelFailed("the CPU kernel is not built for this machine: gen-accel build")
    if found[name](ctypes.byref(args), *more):
        raise KernelFailed(f"kernel {kernel!r} failed: {found.gen_accel_error().decode()}")


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def _load(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    found.gen_accel_error.restype = found.gen_accel_int8_lacks.restype = ctypes.c_char_p
    if any(found[name]() != ctypes.sizeof(kind) for name, kind in SIZES.items()):
        raise OSError(f"{file} takes other arguments than this version passes")
    return found


def _processor() -> str:
    """What decides which instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
