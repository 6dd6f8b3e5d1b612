"""The C++ sources with sanitizers of addresses and of undefined behaviour, and calls of them.

Run as `python -m support.sanitized FOLDER SEED COUNT FLAGS...` in a process that preloads the
runtime of the sanitizers. A report of theirs ends it; which call that was is in FOLDER/last.
"""

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from support.native_ops import CASES, Sizes
from support.native_values import Case, cases

from gen_accel.kernels.base import cpp_compiler
from gen_accel.kernels.native import build

# Half as much is optimised, in a third of the time.
CHANGED = {"-O3": "-O1"}
CHECKED = ("-g1", "-fno-omit-frame-pointer", "-DGEN_ACCEL_WATCHED")
CHECKED += ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
OPTIONS = {
    # Python leaves much that it never frees; torch may ask for more than there is, and says so.
    # Stacks of the sanitizer's own are not aligned as GCC 12 takes for granted of 512 bits.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1"
    ":max_allocation_size_mb=4096:color=never:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
CPU_SECONDS = 600  # of a process, the building aside; a call that does not end ends it
LAST, FOUND = "last", "found.json"
# What other libraries, and Python, say in the place of name, rule and value.
FOREIGN = re.compile(
    r"std::|vector|bad_alloc|to unpack|out of range|object has no|not supported between"
    r"|division|INTERNAL ASSERT"
)


def preloaded() -> str | None:
    """The runtimes to preload, as LD_PRELOAD wants them; None if there are none."""
    tool, found = cpp_compiler(), []
    if tool is None:
        return None
    # Exceptions come from the last, which has to be there when the first looks for it.
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        command = [tool, f"-print-file-name={name}"]
        place = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(place):
            return None
        found.append(place)
    return ":".join(found)


def made(flags: list[str]) -> Path:
    """The library, in the cache of this process."""
    os.environ.pop("LD_PRELOAD", None)  # not for the compiler
    build.FLAGS = tuple(CHANGED.get(flag, flag) for flag in build.FLAGS) + CHECKED + (*flags,)
    return build.path() if build.library() else build.build()


def exported(library: Path) -> set[str]:
    """The functions of a library that take arguments by which they could go wrong."""
    command = [shutil.which("nm") or "nm", "--dynamic", "--defined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {name for line in lines if (name := line.split()[-1]).startswith("gen_accel_")}
    plain = {"gen_accel_error", "gen_accel_failure", "gen_accel_int8_lacks"}
    return names - plain - build.SIZES.keys()


class Calls:
    """Calls, and how they ended.

    Attributes:
        tried: by how they ended.
        wrong: of each verdict the shortest case.
        returned: functions of the library that have returned a result.
    """

    def __init__(self, folder: Path) -> None:
        self.tried: Counter[str] = Counter()
        self.wrong: dict[str, str] = {}
        self.returned: set[str] = set()
        self._last = (folder / LAST).open("w")
        self._run = build.run
        build.run = self._noted

    def _noted(self, name: str, args: ctypes.Structure, *more: int, **options: Any) -> None:
        self._run(name, args, *more, **options)
        self.returned.add(name)

    def __call__(self, case: Case) -> None:
        self._last.seek(0)
        self._last.truncate()
        self._last.write(f"{case!r}\n")
        self._last.flush()
        torch.set_num_threads(case.threads)
        end, verdict = outcome(case)
        self.tried[end] += 1
        if verdict is not None:
            known = self.wrong.get(verdict, f"{case!r}")
            self.wrong[verdict] = min(known, f"{case!r}", key=len)


def outcome(case: Case) -> tuple[str, str | None]:
    """How a call ended, and what is wrong with that; None: nothing."""
    try:
        case()
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if " " not in said or (isinstance(error, ValueError) and FOREIGN.search(said)):
            return "refused", f"{type(error).__name__}: {said[:200]}"
        if not isinstance(error, ValueError) and re.search(r"std::|vector|INTERNAL", said):
            return "refused", f"{type(error).__name__}: {said[:200]}"
        if not case.changes:
            return "refused", f"good arguments: {said[:200]}"
        return "refused", None
    except Exception as error:
        return "failed", f"{type(error).__name__}: {str(error)[:200]}"
    return "returned", None


def main(folder: Path, number: int, count: int, flags: list[str]) -> None:
    library = made(flags)
    names, functions = [*CASES], exported(library)
    if build.lacks_bytes():
        names = [name for name in names if "int8" not in name]
        functions.remove("gen_accel_int8")
    calls = Calls(folder)
    for name in names:
        calls(Case(name, Sizes()))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(case=cases(names))
    def draw(case: Case) -> None:
        calls(case)

    draw()
    found = {"tried": calls.tried, "wrong": calls.wrong}
    found |= {"never": sorted(functions - calls.returned)}
    (folder / FOUND).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
