"""C++ compiler of this machine, if there is one."""

import os
import shutil

COMPILERS = ("g++", "clang++", "c++", "cl")


def cpp_compiler() -> str | None:
    """Find a compiler for torch.compile's CPU code, from $CXX or the usual names."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
