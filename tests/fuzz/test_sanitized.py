"""The operators in C++ under sanitizers: whatever they are called with, the outcome is a result or
one sentence, never a read or write elsewhere, and never what the language leaves undefined.

All are built again for it, in a process of their own, where products are written out in C++ and
memory that a thread keeps has gaps that nobody may touch: see watched.h. Only the code of oneDNN
is not looked into.
"""

import json
import os
import subprocess
import sys

import pytest
from support import sanitized
from support.paths import environment

from gen_accel.kernels.base import cpp_compiler

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

COUNT = int(os.environ.get("FUZZ_COUNT", "4000"))
SEED = int(os.environ.get("FUZZ_SEED") or int.from_bytes(os.urandom(4), "big"))
# The code for this processor, and that for one without instructions of 512 bits.
BUILDS = {"here": [], "of 256 bits": ["-march=x86-64-v3", "-DGEN_ACCEL_NARROW"]}


@pytest.fixture(scope="module")
def runtime():
    if cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    if (found := sanitized.preloaded()) is None:
        pytest.skip(f"no libasan and libubsan beside {cpp_compiler()}")
    return found


@pytest.mark.parametrize("build", BUILDS)
def test_no_call_reads_or_writes_elsewhere(build, runtime, tmp_path, record_property):
    command = [sys.executable, "-m", "support.sanitized", str(tmp_path), str(SEED), str(COUNT)]
    env = environment(LD_PRELOAD=runtime, XDG_CACHE_HOME=str(tmp_path), **sanitized.OPTIONS)
    done = subprocess.run([*command, *BUILDS[build]], env=env, capture_output=True, text=True)
    last = tmp_path / sanitized.LAST
    assert done.returncode == 0, told(last.read_text() if last.exists() else "", done.stderr)
    found = json.loads((tmp_path / sanitized.FOUND).read_text())
    tried = ", ".join(f"{count} {end}" for end, count in found["tried"].items())
    record_property("told", f"calls of C++ under sanitizers, {build}: {tried}; FUZZ_SEED={SEED}")
    assert not found["never"], "never returned a result"
    assert not found["wrong"], "\n".join(
        f"{case}\n# {said}" for said, case in found["wrong"].items()
    )


def told(last: str, errors: str) -> str:
    """The call that ended the process, and the report of the sanitizer without what follows it."""
    lines = errors.splitlines()
    at = next((n for n, x in enumerate(lines) if "runtime error:" in x or "ERROR: " in x), -30)
    return "\n".join([last, f"FUZZ_SEED={SEED}", *lines[at:][:30]])
