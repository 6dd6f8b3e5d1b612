"""The backend for vLLM-Omni: its options here, the rest inside vLLM-Omni in another process."""

import importlib.util
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

from gen_accel import BlockMixture, Piecewise, Radial, Schedule

FOLDER = ROOT / "integrations" / "vllm_omni"
CASES = ROOT / "tests" / "integrations" / "vllm_omni_cases.py"
WHEELS = "VLLM_OMNI_DIR"  # folders of unpacked wheels, for a machine that cannot run vLLM
GET = (
    "pip install vllm-omni, or unpack it: mkdir v && cd v && pip download --no-deps "
    "vllm-omni==0.30.0 vllm==0.30.0 && for w in *.whl; do unzip -qo $w '*.py' '*.json'; done && "
    f"export {WHEELS}=$PWD, with what their imports ask for in a folder behind a colon"
)


@pytest.fixture(scope="module")
def options():
    """The module of options, which needs gen_accel alone."""
    sys.path.insert(0, str(FOLDER))
    try:
        from gen_accel_vllm_omni import options
    finally:
        sys.path.remove(str(FOLDER))
    assert "vllm_omni" not in sys.modules
    return options


def test_options_are_as_json_holds_them(options):
    assert options.Options.of(None) == options.Options(Piecewise(critical=0.2))
    given = {
        "method": "radial",
        "settings": "decay_factor=0.5",
        "kernel": "gather",
        "dense_layers": [0, 7],
        "dense_noise": [1, 0.9],
    }
    schedule = Schedule(dense_layers=(0, 7), dense_noise=(1, 0.9))
    made = options.Options(Radial(decay_factor=0.5), "gather", schedule)
    assert options.Options.of(given) == made
    assert options.Options.of({"method": "block_mixture"}).method == BlockMixture()


WRONG = {
    "no mapping": ([1], r"must hold options, got \[1\]"),
    "misspelt": ({"dense_step": 2}, "no option 'dense_step'; did you mean 'dense_steps'"),
    "unknown": ({"x": 2}, "no option 'x'; there are method, settings, kernel, dense_layers"),
    "method": ({"method": "radail"}, "did you mean 'radial'"),
    "no name": ({"method": 3}, "method must be a name, got 3"),
    "settings": ({"settings": [1]}, "settings must be a list"),
    "kernel": ({"kernel": "fast"}, "kernel must be"),
    "type": ({"dense_steps": "two"}, "dense_steps"),
    "range": ({"dense_start": 2.0}, "share of the steps"),
    "memory": ({"method": "reuse"}, "remembers a dense step of the same clip.* that it wraps"),
}


@pytest.mark.parametrize(("given", "reason"), WRONG.values(), ids=WRONG)
def test_options_that_cannot_be_are_refused_in_a_line(options, given, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        options.Options.of(given)
    assert "\n" not in str(refused.value)


def test_their_own_controls_are_refused_where_they_are_set(options):
    theirs = {"sparsity": 0.8, "start_step": 0, "end_step": 0, "precision": "bf16"}
    options.check_theirs(None)
    options.check_theirs(theirs)
    for changed, ours in (
        ({"sparsity": 0.5}, "in settings"),
        ({"start_step": 3}, "give dense_steps"),
        ({"end_step": 1}, r"dense, such as \[-1, -2\]"),
        ({"precision": "fp8"}, "kernel"),
        ({"skip_layers": [0]}, "dense_layers"),
        ({"topk": 3}, "an option of gen_accel"),
    ):
        with pytest.raises(ValueError, match=ours):
            options.check_theirs(theirs | changed)


def test_the_entry_point_names_a_function(options):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["vllm_omni.general_plugins"]["gen_accel"]
    module, _, name = entry.partition(":")
    assert callable(getattr(sys.modules[module], name))


@pytest.mark.slow
def test_inside_vllm_omni(tmp_path):
    """All of vllm_omni_cases.py, in a process of its own."""
    wheels = os.environ.get(WHEELS, "")
    if not wheels and importlib.util.find_spec("vllm_omni") is None:
        pytest.skip(f"vLLM-Omni is not here: {GET}")
    about = tmp_path / "gen_accel_vllm_omni-0.2.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gen_accel_vllm_omni\n")
    (about / "entry_points.txt").write_text(
        "[vllm_omni.general_plugins]\ngen_accel = gen_accel_vllm_omni:register\n"
    )
    ours = [tmp_path, FOLDER, ROOT, ROOT / "tests", ROOT / "examples"]
    # Packages of this environment go before those that come with the wheels.
    code = (
        f"import sys, pytest; sys.path += {[one for one in wheels.split(os.pathsep) if one]!r}; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, ours))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
