"""Whether there is a C++ compiler here."""

import os
import shutil

COMPILERS = ("g++", "clang++", "c++", "cl")


def cpp_compiler() -> str | None:
    """What torch.compile can build CPU code with, from $CXX or the usual names."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
