"""Import paths of 0.1: each leads to where the name is now, and warns."""

import json
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
from support.paths import ROOT

from gen_accel import moved

# Public names of modules of 0.1.0 that moved, or that lost some.
NAMES = json.loads((ROOT / "tests" / "support" / "names_0_1.json").read_text(encoding="utf-8"))


def test_every_module_that_moved_is_asked_for():
    assert {*moved.MODULES, *moved.NAMES} - {"attention_processors.methods"} <= NAMES.keys()


@pytest.mark.parametrize("module", NAMES)
def test_old_names_are_there(module):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        old = import_module(f"gen_accel.{module}")
        for name in NAMES[module]:
            assert getattr(old, name) is not None
    ours = [str(one.message) for one in told if one.category is DeprecationWarning]
    gone = [name for name in NAMES[module] if name not in vars(old)]
    for name in gone:
        start = f"gen_accel.{module}.{name} is now gen_accel."
        assert any(message.startswith(start) for message in ours), name
    if module in moved.MODULES:
        assert gone == NAMES[module]


def test_a_name_that_never_was_is_refused():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from gen_accel.pipelines.sampling import nothing")
    with pytest.raises(ModuleNotFoundError, match=r"gen_accel\.pipelines\.nothing"):
        import_module("gen_accel.pipelines.nothing")


@pytest.mark.slow
def test_the_warning_points_at_the_import():
    code = "import warnings; warnings.simplefilter('always')\n"
    code += "from gen_accel.attention_processors.radial import Radial\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "<string>:2: DeprecationWarning: gen_accel.attention_processors.radial.Radial" in (
        done.stderr
    )
