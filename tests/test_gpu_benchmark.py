"""benchmarks/gpu.py: its budget, what it resumes and refuses, and all of its stages on the CPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT

from gen_accel import Piecewise, Radial, VideoShape
from gen_accel.kernels import reference
from gen_accel.kernels.triton import configs

BENCHMARKS = ROOT / "benchmarks"
CARD = {"card": "a card", "revision": "1"}


@pytest.fixture
def imported(monkeypatch):
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def ledger(imported):
    return imported("ledger")


@pytest.fixture
def new(ledger, tmp_path):
    """A ledger whose clock is `time` and whose words are in `said`."""
    world = SimpleNamespace(time=0.0, said=[], lost="", stuck=lambda: None)

    def make(seconds=100.0, card=CARD):
        made = ledger.Ledger(
            tmp_path / "a.json",
            card,
            seconds,
            recover=lambda: world.lost,
            stuck=lambda: world.stuck(),
            say=lambda *words, end="\n": world.said.append(" ".join(words)),
            clock=lambda: world.time,
        )
        return made, world

    return make


def one(ledger, name="a line", run=dict, cap=10.0, **options):
    return ledger.Line(name, cap, run, **options)


def stage(ledger, *lines, name="a stage", cap=50.0):
    return ledger.Stage(name, cap, lambda: lines)


def statuses(made):
    return {name: record["status"] for (_, name), record in made.records.items()}


def raising(error):
    def run():
        raise error

    return run


def test_a_line_is_skipped_when_the_stage_or_the_run_has_less_left_than_its_cap(ledger, new):
    made, world = new(seconds=100.0)

    def takes(seconds):
        def run():
            world.time += seconds
            return {"took": seconds}

        return run

    first = [one(ledger, "25 of 50", takes(25)), one(ledger, "30 more", cap=30.0)]
    first.append(one(ledger, "20 more", takes(20), cap=20.0))
    last = [one(ledger, "60 of 55", cap=60.0), one(ledger, "55 of 55", takes(1), cap=55.0)]
    made.run([stage(ledger, *first), stage(ledger, *last, name="another", cap=70.0)])
    assert statuses(made) == {
        "25 of 50": "done",
        "30 more": "skipped",
        "20 more": "done",
        "60 of 55": "skipped",
        "55 of 55": "done",
    }
    reasons = [record.get("reason") for record in made.records.values()]
    assert reasons[1] == "may take 30 s, 25 s of the stage are left"
    assert reasons[3] == "may take 60 s, 55 s of the run are left"


def test_a_line_that_takes_longer_is_ended_and_the_run_goes_on(ledger, new):
    made, _ = new()

    def stubborn():
        try:
            time.sleep(30)
        except Exception:
            return {}

    made.run([stage(ledger, one(ledger, "long", stubborn, cap=0.05), one(ledger, "next"))])
    assert statuses(made) == {"long": "failed", "next": "done"}
    assert made.records["a stage", "long"]["reason"] == "over its cap of 0.05 s"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_error_is_recorded_by_the_last_line_of_its_traceback(ledger, new):
    made, world = new()
    lines = [one(ledger, "wrong", raising(RuntimeError("first\nlast"))), one(ledger, "right")]
    made.run([stage(ledger, *lines), ledger.Stage("no lines", 9.0, raising(OSError("no disk")))])
    assert statuses(made) == {"wrong": "failed", "right": "done", "making its lines": "failed"}
    record = made.records["a stage", "wrong"]
    assert record["reason"] == "last"
    assert "RuntimeError: first" in record["trace"]
    table = made.table().splitlines()
    assert table[-1] == "2 lines failed"
    assert table[-2] == "no lines: making its lines: OSError: no disk"
    assert any("failed, last" in words for words in world.said)


def test_the_file_has_every_line_as_soon_as_it_is_there(ledger, new):
    made, _ = new()

    def read():
        lines = json.loads(made.path.read_text())["lines"]
        return {"seen": [(line["name"], line["status"]) for line in lines]}

    made.run([stage(ledger, one(ledger, "first"), one(ledger, "second", read))])
    (_, second) = json.loads(made.path.read_text())["lines"]
    assert second["result"]["seen"] == [["first", "done"], ["second", "running"]]


def test_figures_that_json_does_not_know_fail_their_line_alone(ledger, new):
    made, _ = new()
    lines = [one(ledger, "odd", lambda: {"figure": object()}), one(ledger, "next")]
    made.run([stage(ledger, *lines)])
    assert statuses(made) == {"odd": "failed", "next": "done"}
    assert "object" in json.loads(made.path.read_text())["lines"][0]["reason"]


def test_what_an_interrupt_leaves_is_taken_up(ledger, new):
    made, _ = new()
    lines = [
        one(ledger, "done", lambda: {"figure": 1}),
        one(ledger, "failed", raising(ValueError("no"))),
        one(ledger, "dear", cap=60.0),
        one(ledger, "interrupted", raising(KeyboardInterrupt())),
        one(ledger, "never"),
    ]
    with pytest.raises(KeyboardInterrupt):
        made.run([stage(ledger, *lines)])
    assert statuses(made) == {
        "done": "done",
        "failed": "failed",
        "dear": "skipped",
        "interrupted": "skipped",
    }
    later, _ = new()
    assert later.take_up(again=False) == "resumes after 2 lines"
    later, _ = new()
    assert later.take_up() == "resumes after 1 lines"
    ran = []
    again = [line._replace(run=lambda name=line.name: ran.append(name) or {}) for line in lines]
    later.run([stage(ledger, *again, cap=90.0)])
    assert ran == ["failed", "dear", "interrupted", "never"]
    assert later.records["a stage", "done"]["result"] == {"figure": 1}
    assert set(statuses(later)) == {line.name for line in lines}


def test_a_line_that_failed_is_tried_twice(ledger, new):
    """Also one that went over its cap on a machine that others used."""
    ran = []

    def slow():
        ran.append("slow")
        time.sleep(1)

    for tries in (1, 2, 3):
        made, _ = new()
        made.take_up()
        made.run([stage(ledger, one(ledger, "slow", slow, cap=0.05))])
        assert statuses(made) == {"slow": "failed"}
        assert len(ran) == min(tries, 2)


def test_nothing_is_taken_up_from_another_card_source_or_file(ledger, new):
    made, _ = new()
    assert made.take_up() == f"nothing to resume: {made.path} is not there"
    made.path.write_text('{"lines": [')
    assert made.take_up() == f"nothing to resume: {made.path} holds no such run"
    made.run([stage(ledger, one(ledger))])
    other, _ = new(card=CARD | {"revision": "2"})
    said = "starts afresh, as the file was made with revision 1, here 2"
    assert other.take_up() == said
    assert not other.records


def test_a_line_that_ends_the_process_is_tried_twice(ledger, new):
    made, _ = new()
    line = one(ledger)

    def killed():
        made.write()  # and no more: the record says that it runs
        raise SystemExit

    for tries in (1, 2):
        with pytest.raises(SystemExit):
            made.run([stage(ledger, line._replace(run=killed))])
        assert made.records["a stage", "a line"]["status"] == "running"
        made, _ = new()
        made.take_up()
        assert statuses(made) == {"a line": ("skipped", "failed")[tries - 1]}
    assert made.records["a stage", "a line"]["reason"] == "the process ended during it 2 times"
    made.run([stage(ledger, line, one(ledger, "next"))])
    assert statuses(made) == {"a line": "failed", "next": "done"}


def test_after_a_line_that_breaks_the_device_nothing_runs(ledger, new):
    made, world = new()
    world.lost = "an illegal memory access was encountered"
    lines = [one(ledger, "breaks", raising(RuntimeError("it"))), one(ledger, "next")]
    with pytest.raises(ledger.DeviceLost, match="illegal memory access"):
        made.run([stage(ledger, *lines)])
    assert statuses(made) == {"breaks": "failed"}
    later, _ = new()
    later.take_up(again=False)
    later.run([stage(ledger, *lines)])
    assert statuses(later) == {"breaks": "failed", "next": "done"}


def test_a_line_that_no_alarm_ends_is_given_up(ledger, new, monkeypatch):
    monkeypatch.setattr(ledger, "GRACE", 0.05)
    monkeypatch.setattr(ledger, "capped", lambda seconds: nullcontext())
    made, world = new()
    given_up = threading.Event()
    world.stuck = given_up.set

    def deaf():
        assert given_up.wait(30)
        record = json.loads(made.path.read_text())["lines"][0]
        return {"then": [record["status"], record["reason"]]}

    made.run([stage(ledger, one(ledger, run=deaf, cap=0.05))])
    assert made.records["a stage", "a line"]["result"]["then"] == [
        "failed",
        "stuck 0.05 s after its cap",
    ]


@pytest.mark.parametrize(
    ("fails", "refused"),
    [("output", {"forward", "both", "tuned"}), ("gradient", {"both", "tuned"})],
)
def test_what_fails_parity_is_not_timed_on_such_plans(ledger, new, fails, refused):
    made, _ = new()
    kind = ledger.Kind("triton", "bf16", 128, "windows", True)
    parity = one(ledger, "parity", raising(ledger.Failed("errs by 1", fails=fails)), holds=kind)
    kinds = {
        "forward": kind._replace(backward=False),
        "both": kind,
        "another rule": kind._replace(rule="none"),
        "another kernel": kind._replace(kernel="gather"),
        "another dim": kind._replace(dim=64),
        "another dtype": kind._replace(dtype="fp16"),
    }
    lines = [one(ledger, name, needs=lambda k=k: [k]) for name, k in kinds.items()]
    lines.append(one(ledger, "tuned", needs=lambda: [kinds["another rule"], kind]))
    lines.append(one(ledger, "unknown", needs=raising(LookupError("no such kernel"))))
    made.run([stage(ledger, parity, *lines)])
    found = statuses(made)
    assert [found.pop(name) for name in ("parity", "unknown")] == ["failed", "failed"]
    assert {name for name, status in found.items() if status == "refused"} == refused
    assert set(found.values()) == {"refused", "done"}
    assert made.records["a stage", "both"]["reason"] == "not timed: errs by 1"
    later, _ = new()  # where the parity is taken up, not run
    later.take_up()
    later.run([stage(ledger, parity, *lines)])
    assert statuses(later) == statuses(made)


@pytest.mark.parametrize("rule", ["none", "windows", "route", "gain"])
@pytest.mark.parametrize("text", [0, 5])
def test_plans_of_parity_have_their_rule_padding_and_text(imported, rule, text):
    plan = imported("gpu_stages.plans").plan_of_rule((3, 4, 6), text, 14, rule, 2)
    assert plan.tokens == 3 * 4 * 6 + text
    assert not plan.real.all()
    seen = reference.pairs(plan) & plan.real[:, None]
    assert 0 < plan.density < 1
    assert plan.density == pytest.approx(seen.double().sum((-1, -2)).mean() / plan.tokens**2)
    assert type(plan.partial).__name__.lower() == {"windows": rule, "route": rule}.get(
        rule, "nonetype"
    )
    assert (plan.gain is not None) == (rule == "gain")
    if rule == "windows" and text:
        words = plan.slots >= 3 * 4 * 6
        assert seen[..., words, :][..., plan.real].all()
        assert seen[..., words][..., plan.real, :].all()


def test_windows_are_also_held_on_plans_of_the_method(imported):
    plan = imported("gpu_stages.plans").plan_of_rule((3, 4, 6), 5, 0, "windows", 2)
    assert plan.tokens == 3 * 4 * 6 + 5
    assert plan.partial.seen[plan.slots == 0].item() == 2 * 2 * 3 + 5


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["output", "gradient"])
def test_parity_sees_a_kernel_that_is_wrong(imported, monkeypatch, fails):
    correct, setting = imported("gpu_stages.correct"), imported("gpu_stages.setting")
    at = setting.setting(torch.device("cpu"), dry=True)
    line = correct.parity_line(at, "gather", "bf16", 16, 14, "none")
    assert set(line.run()["shares"]) >= {"output", "gradient of v"}
    right = correct.run

    def wrong(q, k, v, plan, *, scale, kernel):
        out = right(q, k, v, plan, scale=scale, kernel=kernel)
        if kernel == "reference":
            return out
        return out * 1.1 if fails == "output" else out + 0.5 * (q - q.detach())

    monkeypatch.setattr(correct, "run", wrong)
    with pytest.raises(imported("ledger").Failed, match="gather fails parity") as caught:
        line.run()
    assert caught.value.fails == fails


@pytest.mark.slow
def test_all_of_what_parity_promises_is_held_once(imported):
    correct, setting = imported("gpu_stages.correct"), imported("gpu_stages.setting")
    kernels = ("triton", "flex")
    cpu = torch.device("cpu")
    at = setting.Setting(
        cpu, False, (8, 14, 18), (0, 30), (128, 64), (128, 64, 56), kernels, (), 1, 2
    )
    first, rest = list(correct.first_parity(at)), list(correct.other_parity(at))
    assert first[0].name == "triton bf16 D128 blocks of 128 none"
    assert sum(line.holds.kernel == "flex" for line in first) == 2
    names = [line.name for line in (*first, *rest)]
    assert len(set(names)) == len(names) == 2 * 2 * 2 * (3 * 4 + 1)


@pytest.mark.slow
def test_every_line_fits_into_its_stage_and_has_a_name_of_its_own(imported):
    gpu, setting = imported("gpu"), imported("gpu_stages.setting")
    kernels = ("triton", "flex", "gather")
    sizes = (8, 14, 18), (0, 30), (128, 64), (128, 64, 56)
    at = setting.Setting(torch.device("cpu"), False, *sizes, kernels, kernels[:2], 10, 2)
    found = gpu.stages(at, 1.0)
    for stage in found:
        lines = list(stage.lines())
        assert len({line.name for line in lines}) == len(lines) > 0
        assert max(line.cap for line in lines) <= stage.cap
    goals = next(place for place, stage in enumerate(found) if "both" in stage.name)
    assert sum(stage.cap for stage in found[: goals + 1]) == pytest.approx(
        60 * gpu.MINUTES, abs=30
    )
    assert [stage.cap for stage in gpu.stages(at, 2.0)] == [2 * stage.cap for stage in found]


def test_goals_are_of_every_method_that_there_is(imported, monkeypatch):
    kernel_speed = imported("kernel_speed")
    timed = {type(case.method) for case in kernel_speed.goals()}
    assert timed == {
        kind for name, kind in kernel_speed.METHODS.items() if name not in ("dense", "reuse")
    }
    monkeypatch.setattr(
        kernel_speed, "METHODS", {**kernel_speed.METHODS, "mine": type("Mine", (Radial,), {})}
    )
    assert [type(case.method).__name__ for case in kernel_speed.goals()][-1] == "Mine"
    long = [case.video.tokens**2 * case.heads for case in kernel_speed.LONG_CASES]
    assert long == sorted(long)


def test_a_dense_attention_that_throws_is_left_out_with_its_reason(imported):
    dense = imported("dense")
    q = torch.randn(1, 1, 8, 4)
    found = dense.baselines(q.device) | {"broken": dense.Baseline(raising_call)}
    found["FA4"] = dense.Baseline(raising_call, lambda: dense._activated("FA4"))
    runs, reasons = dense.tried(found, [q, q, q], True)
    assert list(runs) == ["SDPA"]
    assert reasons["broken"] == "KeyError: 'anything'"
    assert reasons["FA4"].split(":")[0] in ("ModuleNotFoundError", "ImportError")
    assert dense.best([q, q, q], True)[0] == "SDPA"


def raising_call(q, k, v):
    raise KeyError("anything")


def test_the_page_on_performance_has_what_was_measured_and_nothing_of_a_dry_run(
    imported, ledger, tmp_path, monkeypatch
):
    kernel_speed = imported("kernel_speed")
    monkeypatch.setattr(kernel_speed, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(kernel_speed, "RESULTS", tmp_path)
    (tmp_path / "performance.md").write_text("before\n## A whole step\nstays\n")
    case = kernel_speed.Case(VideoShape(2, 3, 4), 1, Radial())
    how = kernel_speed.How(torch.device("cpu"), "fp32", 16, "forward", 1, ("gather",))
    (row,) = kernel_speed.rows(case, how)
    row["dense_kernel"] = "SDPA CUDNN_ATTENTION"
    for dry in (False, True):
        card = {"card": f"a card, dry {dry}", "torch": "2.13", "dry_run": dry}
        path = tmp_path / f"gpu_{dry}.json"
        made = ledger.Ledger(path, card, 60.0, say=lambda *words, **options: None)
        made.run([stage(ledger, one(ledger, "a goal", lambda: dict(row)), one(ledger, "other"))])
    kernel_speed.write_page()
    page = (tmp_path / "performance.md").read_text()
    assert "## a card, dry False, gpu_False\n\ntorch 2.13, " in page
    assert page.count("| 24 | `Radial()` | fp32 | forward | gather |") == 1
    assert "dry True" not in page
    assert "Not measured" not in page
    assert page.endswith("\n## A whole step\nstays\n")


def test_short_calls_get_ten_rounds_and_giants_two(imported):
    needed = imported("clock").needed
    assert needed([0.001, 0.0005], 10) == 10
    assert needed([0.001, 0.02], 10) == 10
    assert needed([0.02, 0.03], 10) == 5
    assert needed([0.4, 0.3], 10) == 3
    assert needed([0.4, 0.3], 2) == 2
    assert needed([3.0, 0.001], 10) == 2


def test_outcomes_of_tests_are_counted_also_when_they_were_cut_off(imported):
    suite, failed = imported("gpu_stages.suite"), imported("ledger").Failed
    text = "tests/a.py::test_b[x, y] PASSED [ 10%]\ntests/a.py::test_c SKIPPED (why) [ 20%]\n"
    found = suite.summed_up(text + "tests/a.py::test_d ", True)
    assert (found["passed"], found["skipped"], found["cut_off"]) == (1, 1, True)
    with pytest.raises(failed, match=r"1 of 3 tests failed, first .*test_d") as caught:
        suite.summed_up(text + "tests/a.py::test_d FAILED [ 30%]\n", False)
    assert caught.value.result["failed_tests"] == ["tests/a.py::test_d"]
    with pytest.raises(failed, match="no test ran: no module named pytest"):
        suite.summed_up("no module named pytest\n", False)


def test_clocks_are_those_that_nvidia_smi_says(imported, tmp_path, monkeypatch):
    machine, skipped = imported("gpu_stages.machine"), imported("ledger").Skipped
    monkeypatch.setenv("PATH", str(tmp_path))
    line = machine.clocks("clocks")
    with pytest.raises(skipped, match="nvidia-smi is not there"):
        line.run()
    said = ", ".join(f"{name} said" for name in machine.QUERY)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    found = line.run()
    assert found["cards"] == [{name: f"{name} said" for name in machine.QUERY}]
    assert found["says"] == "clocks.sm said"
    tool.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    with pytest.raises(skipped, match="nvidia-smi says: no driver"):
        line.run()


def test_the_file_is_named_after_the_card(imported):
    machine = imported("gpu_stages.machine")
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_a_changed_source_is_another_revision(imported, tmp_path):
    machine = imported("gpu_stages.machine")
    file = tmp_path / "gen_accel" / "kernels" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1")
    before = machine.revision(tmp_path)
    file.write_text("x = 2")
    assert machine.revision(tmp_path) != before


def test_events_are_read_in_turn_after_a_sleep_that_lets_the_host_go_ahead(imported, monkeypatch):
    """A sleep of a million cycles takes a millisecond here, and the host a second for a call."""
    clock = imported("clock")
    done, slept = [], []

    def sleep(cycles):
        done.append("z")
        slept.append(cycles)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(done)

        def elapsed_time(self, end):
            return float(end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    properties = SimpleNamespace(L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    seconds = iter((0.0, 1.0))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    flushes = []
    zero = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda x: (flushes.append(len(done)), zero(x))[1])
    calls = {"a": lambda: done.append("a"), "b": lambda: done.extend("bb")}
    whole = {"a": [0.001] * 3, "b": [1.0] * 3}
    found = clock._by_events(calls, whole, torch.device("cpu"))
    assert found == {"a": [0.001] * 3, "b": [0.002] * 3}
    assert done == [*"zza", *["z", "a", "b", "b"] * 3]
    assert slept == [clock.CYCLES] * 2 + [1_500_000_000] * 3
    assert flushes == [3, 5, 7, 9, 11, 13]


@pytest.mark.slow
def test_a_graph_is_replayed_on_copies_of_what_it_is_given(imported, monkeypatch):
    correct, did = imported("gpu_stages.correct"), []

    class Stream:
        def wait_stream(self, other):
            did.append("wait")

    class Graph:
        def replay(self):
            did.append([x.item() for x in seen])

    seen = []

    def attend(*given):
        seen[:] = given
        did.append("call")
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    first = [torch.tensor(x) for x in (1.0, 2.0, 3.0)]
    replay = correct.captured(attend, first)
    assert did == ["wait", *["call"] * 3, "wait", "call"]
    replay(*(x + 10 for x in first))
    assert did[-1] == [11.0, 12.0, 13.0]
    assert [x.item() for x in first] == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_a_lost_device_is_known_and_another_process_goes_on(imported, monkeypatch, tmp_path):
    gpu, cuda = imported("gpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert gpu.recover(cuda) == ""
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: raising(error)())
    assert gpu.recover(cuda) == "CUDA error: an illegal memory access was encountered"
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    gpu.again(tmp_path / "a.json", 90.0)
    ((program, command),) = started
    assert program == command[0] == sys.executable
    args = gpu.parsed(command[2:])
    assert (args.resume, args.keep_failed) == (True, True)
    assert (args.minutes, args.out) == (1.5, tmp_path / "a.json")


@pytest.mark.gpu
def test_kernel_time_is_taken_beside_that_of_the_call(imported):
    x = torch.randn(1024, 1024, device="cuda")
    calls = {"product": lambda: x @ x, "sum": lambda: x + x}
    taken = imported("clock").turns(calls, rounds=10, device=x.device)
    assert [len(one.whole) for one in taken.values()] == [10, 10]
    assert all(min(one.kernel) > 0 and len(one.kernel) == 10 for one in taken.values())


def dry_run(path: Path, *options: str) -> subprocess.Popen:
    """As on the command line: a fork knows the folder of these tests as `kernels`."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *options], env=env, **pipes)


@pytest.mark.nightly
def test_all_stages_run_dry_after_a_run_that_was_cut_off(tmp_path):
    path = tmp_path / "gpu.json"
    cut_off = dry_run(path)
    while cut_off.poll() is None:
        if path.exists() and len(json.loads(path.read_text())["lines"]) > 6:
            cut_off.terminate()
            break
        time.sleep(0.02)
    said, errors = cut_off.communicate(timeout=60)
    assert cut_off.returncode == 0, errors
    assert said.splitlines()[0] == "9 minutes from now; loading torch and the kernels"
    assert "stopped; --resume goes on from here" in said
    before = {(x["stage"], x["name"]): x for x in json.loads(path.read_text())["lines"]}
    done = {key: line for key, line in before.items() if line["status"] == "done"}
    assert len(done) > 2

    whole = dry_run(path, "--resume")
    said, errors = whole.communicate(timeout=400)
    assert whole.returncode == 0, errors
    assert f"resumes after {len(done)} lines" in said
    assert said.splitlines()[-2] == "0 lines failed"
    after = {(x["stage"], x["name"]): x for x in json.loads(path.read_text())["lines"]}
    assert {key: after[key] for key in done} == done
    assert {line["status"] for line in after.values()} == {"done", "skipped"}
    allowed = {"nvidia-smi is not there", "there is one GPU, or none"}
    assert {x["reason"] for x in after.values() if x["status"] == "skipped"} <= allowed
    assert list(dict.fromkeys(stage for stage, _ in after)) == [
        "environment",
        "parity",
        "autocast, devices, graphs",
        "dense",
        "where the time goes",
        "goals, forward",
        "goals, both directions",
        "clocks",
        "tuning",
        "goals, tuned, forward",
        "goals, tuned, both directions",
        "the pooled rest",
        "a denoising step",
        "a training step",
        "parity, continued",
        "tests",
        "long clips",
    ]


def test_time_is_shared_among_kernels_and_what_lies_between(imported):
    """Two calls, in which a kernel runs beside another for a while."""
    where = imported("gpu_stages.where")
    once = [("a", 0, 2000), ("b", 1000, 4000), ("b", 5000, 6000)]
    spans = [where.Span(name, x + at, y + at) for at in (0, 10_000) for name, x, y in once]
    found = where.shares(spans, 2)
    assert found["kernels"] == [
        {"kernel": "b", "ms": 4.0, "launches": 2.0},
        {"kernel": "a", "ms": 2.0, "launches": 1.0},
    ]
    assert (found["ms"], found["gaps_ms"], found["launches"]) == (8.0, 3.0, 3.0)


def test_the_call_of_readme_comes_first(imported):
    case = imported("kernel_speed").goals()[0]
    assert f"{case.method!r}" == f"{Piecewise(0.2)!r}"
    assert "Piecewise(0.2)" in (ROOT / "README.md").read_text()


def test_only_tests_of_a_gpu_are_collected(imported):
    found = imported("gpu_stages.suite").marked()
    assert "tests/kernels/test_triton.py" in found
    assert "tests/test_config.py" not in found


def test_rows_of_what_was_tuned_stand_by_their_table(imported):
    """Of packed kinds too, which are tuned where packing pays."""
    speed = imported("gpu_stages.speed")
    q, fast = torch.empty(1, 2, 64, 128, dtype=torch.bfloat16), configs.LaunchConfig(64, 128, 4, 5)
    (row,) = speed.table_rows({"dq": fast}, "sm_90", q, 128)
    assert row.startswith('TABLE "sm_90" 128: (_C(128, 64, 8, 3), _C(64, 128, 4, 5), ')
    rows = speed.table_rows({"packed forward": fast, "dq": fast}, "sm_90", q, 128)
    assert [one.split()[0] for one in rows] == ["TABLE", "PACKED"]
    assert "128: (_C(64, 128, 4, 5), _C(128, 128, 8, 2), " in rows[1]
    assert rows[1].endswith("of blocks of 128")
