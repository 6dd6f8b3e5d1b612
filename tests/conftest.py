"""Fixtures of all tests, which of them run, and in which order."""

import gc
import os
import signal
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from support.interpreter import remember_builtins
from support.paths import ROOT
from support.products import NIGHTLY, TURN, out_of_turn
from support.videos import VIDEOS
from typer.testing import CliRunner

# Inductor would start processes of its own, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Triton decides how a kernel runs when it is defined: set before anything imports Triton. Torch's
# own Triton kernels, which this concerns too, need a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from gen_accel.cli import app
from gen_accel.kernels.native import build as native_build

pytest_plugins = ["support.cpu_seconds"]

# A run in the background of a script, or under nohup, ignores what tests send.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

gc.disable()  # until all tests are collected: imports leave nothing to collect


@pytest.fixture(params=VIDEOS, ids=str)
def video(request):
    return request.param


@pytest.fixture
def from_benchmarks(monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def qkv(device):
    def make(tokens, dtype=torch.float32, batch=2, heads=2, dim=16, grad=False):
        g = torch.Generator().manual_seed(0)
        return [
            torch.randn((batch, heads, tokens, dim), generator=g)
            .to(device, dtype)
            .requires_grad_(grad)
            for _ in range(3)
        ]

    return make


@pytest.fixture(autouse=True)
def folder_that_is_no_module():
    """Forget tests/kernels as a module: transformers looks for a package `kernels` and finds that
    folder, a namespace without a file, at which torch.compile stops."""
    found = sys.modules.get("kernels")
    if found is not None and getattr(found, "__file__", None) is None:
        del sys.modules["kernels"]


IS_BUILT = native_build.is_built


@pytest.fixture(scope="session", autouse=True)
def without_native():
    """What "auto" takes does not depend on what was built on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "is_built", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def linear_layers_as_they_are():
    """Take PyTorch's linear layers for "auto", however busy this machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gen_accel.pipelines.linear_layers.onednn_gain", lambda *sizes: 1.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreted_faster():
    if "TRITON_INTERPRET" not in os.environ or not find_spec("triton"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        remember_builtins(patch)
        yield


@pytest.fixture
def built(native_kernel, monkeypatch):
    """The CPU kernel, and "auto" takes it."""
    monkeypatch.setattr(native_build, "is_built", IS_BUILT)


@pytest.fixture(autouse=True)
def native_where_it_is_asked_for(request):
    call = getattr(request.node, "callspec", None)
    kernel = None if call is None else call.params.get("kernel")
    if kernel in ("native", "int8"):
        request.getfixturevalue(f"{kernel}_kernel")


@pytest.fixture(scope="session")
def native_kernel():
    """Skip where it cannot be built."""
    if native_build.library() is None:
        try:
            native_build.build()
        except RuntimeError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def int8_kernel(native_kernel):
    """Skip where the processor cannot run it."""
    if missing := native_build.lacks_bytes():
        pytest.skip(f"this processor lacks {missing}")


@pytest.fixture
def run():
    """A command line, which has to end with `code`."""

    def call(*args, code=0):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if code == 0 and not isinstance(result.exception, SystemExit | None):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture
def refused(run):
    """The one line that a bad input comes to."""

    def call(*args):
        result = run(*args, code=2)
        said = result.stderr.strip().splitlines()
        lines = [line for line in said if not line.startswith(("loading ", "compiling"))]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        assert "Traceback" not in result.output
        return lines[0]

    return call


@pytest.fixture
def no_loading(monkeypatch):
    """Refusals come before the weights are read."""
    from diffusers import DiffusionPipeline

    def fail(*args, **kwargs):
        pytest.fail("loaded a pipeline")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


@pytest.fixture(scope="module", autouse=True)
def graphs_of_its_own():
    """What the tests of other files compiled counts towards the graphs that torch allows."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    yield
    gc.collect()
    gc.freeze()  # what stays, such as modules, is looked through by no later collection


@pytest.fixture(scope="module")
def one_thread():
    """More only get into each other's way at small sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison():
    """Fill fresh memory with NaN, so that an output nobody wrote cannot pass by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def attention_backend():
    """`set_attention_backend` of one model is that of all in this process that have none."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before


@pytest.fixture(scope="session")
def compiler():
    """Skip where torch cannot compile for the CPU."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(3))
    except Exception as error:  # whatever a missing or broken compiler makes torch throw
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}")


def pytest_collection_finish():
    """What all tests share is never garbage: collections need not look through it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_report_header():
    return f"TEST_TURN={TURN} runs the same cases of tests that take turns"


def pytest_terminal_summary(terminalreporter):
    """Print the lines that tests record by `record_property("told", ...)`."""
    reports = [
        one
        for kind in ("passed", "failed", "skipped")
        for one in terminalreporter.stats.get(kind, ())
    ]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "told":
                terminalreporter.write_line(text)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What this machine cannot run, or was not asked to, is skipped with the reason. Files whose
    tests take longest come first, so that no worker begins one when the others are done."""
    asked = config.option.markexpr
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("model") and "model" not in asked:
            item.add_marker(pytest.mark.skip(reason="downloads a checkpoint; ask with -m model"))
    if not NIGHTLY and "nightly" not in asked:
        late = {item for item in items if item.get_closest_marker("nightly")}
        late |= out_of_turn(item for item in items if item not in late)
        config.hook.pytest_deselected(items=[*late])
        items[:] = [item for item in items if item not in late]
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        from support.cpu_seconds import budgets  # pytest loads the module as a plugin

        seconds = budgets()
        items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0))


@pytest.fixture
def untuned(tmp_path, monkeypatch):
    """What was tuned on this machine decides nothing here."""
    from gen_accel.kernels.triton import tuned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.read.cache_clear()
    yield
    tuned.read.cache_clear()
