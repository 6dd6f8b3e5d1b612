"""Compile the C++ for this machine, and load what was compiled before. Never unasked."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

from gen_accel.io import cache_folder, distrust, make_cache_folder, replacing
from gen_accel.kernels.base import KernelFailed, cpp_compiler

HERE = Path(__file__).parent
SOURCES = tuple(sorted(HERE.glob("*.cpp")))
HEADERS = ("blocks", "bytes", "common", "rest", "rest_backward", "watched")
READ = (*SOURCES, *(HERE / f"{name}.h" for name in HEADERS))
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
REFUSED = 2  # return value of a function that refuses its arguments
NOT_BUILT = "it is not built for this machine: gen-accel build"


def _structure(**kinds: str) -> type[ctypes.Structure]:
    """Structure of fields in order: names by kind. Its first letter counts: p a pointer,
    s the strides of three axes, i int64, f float, d double."""
    of = {
        "p": ctypes.c_void_p,
        "s": ctypes.c_int64 * 3,
        "i": ctypes.c_int64,
        "f": ctypes.c_float,
        "d": ctypes.c_double,
    }
    fields = [
        (f"{name}_strides" if kind[0] == "s" else name, of[kind[0]])
        for kind, names in kinds.items()
        for name in names.split()
    ]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


# Arguments of the functions of the library, field by field as the C++ declares them.
KINDS = {
    "attention": _structure(  # and int8
        p="q k v out grad o dq dk dv stats lse of_lse",
        s="q k v grad",
        p2="slots index counts slack center half place picks group gain",
        i="B H N D S block_q block_k PB PH most axes RB RH C GB GH wide",
        f="scale",
    ),
    "linear": _structure(
        p="q k v grad o dq dk dv",
        s="q k v grad",
        p2="slots sets weight bias",
        i="B H N D S block_q block_k map",
        f="eps",
    ),
    "rest": _structure(
        p="q k v grad out lse of_total o total dq dk dv dout dlse rise weight drise dweight",
        s="q k v grad",
        p2="slots keep",
        i="B H N D S block_q block_k PB PH around_queries",
        f="scale most",
        p3="slope shares gained",
        f2="factor",
    ),
    "one_pass": _structure(
        p="q k v o total",
        s="q k v",
        p2="slots keep chosen shares always ranked counts of_q of_k",
        i="B H N D S block_q block_k PB PH order score bytes",
        f="scale most curvature",
    ),
    "curve": _structure(
        p="q k",
        s="q k",
        p2="slots of_q of_k rise weight by of_rise of_weight dq dk",
        i="B H N D S block_q block_k",
        f="factor",
    ),
    "slope": _structure(
        p="q k v grad",
        s="q k v grad",
        p2="slots shares slope dlse more dq dk dv",
        i="B H N D S block_q block_k around_queries",
        f="factor",
    ),
    "spread": _structure(p="means k", s="k", p2="slots out", i="B H N D S Kq block", f="scale"),
    "sums": _structure(p="x", s="x", p2="slots out", i="B H N D S block"),
    "picks": _structure(
        p="rows",
        s="rows",
        p2="slots home means picks touched",
        d="threshold",
        i="B H N D R C block scope topk",
    ),
    "kept": _structure(p="keep whole index counts", i="rows K most"),
}
# Functions of the library that return the size of each of them, for comparison.
SIZES = {
    "gen_accel_size" if name == "attention" else f"gen_accel_{name}_size": kind
    for name, kind in KINDS.items()
}


def path() -> Path:
    """Path of the library of this source, torch and processor, in the user's cache."""
    about = [*(file.read_text() for file in READ), *FLAGS, torch.__version__, _processor()]
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    return cache_folder() / f"native-{name}.so"


def build() -> Path:
    """Compile the library; `library` returns it a moment later, in this process and in others.

    Raises:
        RuntimeError: no compiler, another system than Linux on x86_64, an error of the compiler, a
            library that does not load, or a cache that others may write.
        OSError: the cache cannot be written.
    """
    where = f"{platform.system()} on {platform.machine()}"
    if where != "Linux on x86_64":
        raise RuntimeError(f"the CPU kernel is for Linux on x86_64, this is {where}")
    tool = cpp_compiler()
    if tool is None:
        raise RuntimeError("no C++ compiler: apt install g++, or name one in CXX")
    target = path()
    if reason := distrust(make_cache_folder().stat(), target.parent):
        raise RuntimeError(f"no library is kept where others could change it: {reason}")
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    folders = cpp_extension.library_paths()
    links = [*(f"-L{folder}" for folder in folders), "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        compiling = [
            [tool, *FLAGS, *includes, "-c", str(source), "-o", made]
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        list(pool.map(_call, compiling))  # raises the first error of a compiler
        linked = Path(folder) / target.name
        _call([tool, *FLAGS, "-shared", *objects, "-o", str(linked), *links])
        with replacing(target) as partial:
            _publish(linked, partial)
            try:
                _load(partial)
            except (OSError, AttributeError) as error:
                raise RuntimeError(f"{target} was built and does not load: {error}") from error
    _found.cache_clear()
    return target


def _publish(linked: Path, target: Path) -> None:
    """Copy the library to a new file that others may read, for a shared cache, and only the
    owner may write, whatever mode the linker gave."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755)
    with linked.open("rb") as source, open(descriptor, "wb") as file:
        shutil.copyfileobj(source, file)


class _Found(NamedTuple):
    """Library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


def library() -> ctypes.CDLL | None:
    """Load the library that `build` made for this machine; None where `why_not` says why."""
    return _found().library


def why_not() -> str:
    """Reason why `library` is None: not built, not loadable, or not trusted; else empty."""
    return _found().reason


@lru_cache(maxsize=1)
def _found() -> _Found:
    try:
        target = path()
        return _Found(_load(target))
    except (FileNotFoundError, NotADirectoryError):
        return _Found(None, NOT_BUILT)
    except PermissionError as error:  # not ours, or unreadable: warn once
        warnings.warn(f"the CPU kernel is not loaded: {error}", stacklevel=2)
        return _Found(None, f"it is not loaded: {error}")
    except (
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
    ):  # no home, another system's file, half a file
        return _Found(None, NOT_BUILT)


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether "auto" and the code beside attention may count on `library`."""
    return library() is not None


def lacks_bytes() -> str | None:
    """Name the instructions for products of 8 bits that this processor lacks; None where it has
    them, or where the library that tells is not built."""
    found = library()
    missing = None if found is None else found.gen_accel_int8_lacks()
    return None if missing is None else missing.decode()


def run(name: str, args: ctypes.Structure, *more: int, kernel: str = "native") -> None:
    """Call a function of the library.

    Raises:
        KernelFailed: the library is missing or fails; names the kernel.
        ValueError: numbers in tensors point out of other tensors.
    """
    found = library()
    if found is None:
        raise KernelFailed(f"the CPU kernel cannot run: {why_not()}")
    if code := found[name](ctypes.byref(args), *more):
        said = found.gen_accel_error().decode()
        if code == REFUSED:
            raise ValueError(f"kernel {kernel!r}: {said}")
        raise KernelFailed(f"kernel {kernel!r} failed: {said}")


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def _load(file: Path) -> ctypes.CDLL:
    """Load a library that only this user or root can have written.

    The file that is checked is the file that is loaded, held open so that no other can take its
    place in between. It stays open: dlopen knows libraries by name, and this name must not come
    again.

    Raises:
        PermissionError: file or folder belong to another user, or others may write there.
        OSError: there is no file, or dlopen fails.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise PermissionError(f"{file} is no regular file")
        for what, known in ((file, about), (file.parent, file.parent.stat())):
            if reason := distrust(known, what):
                raise PermissionError(reason)
        found = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except BaseException:
        os.close(descriptor)
        raise
    found.gen_accel_error.restype = found.gen_accel_int8_lacks.restype = ctypes.c_char_p
    if any(found[name]() != ctypes.sizeof(kind) for name, kind in SIZES.items()):
        raise OSError(f"{file} takes other arguments than this version passes")
    return found


def _processor() -> str:
    """Features of the processor that decide which instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
