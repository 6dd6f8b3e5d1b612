"""CPU seconds of each test file, its child processes included, in a unit that no machine shifts.

A fixed piece of work is timed beside the tests. Seconds are told as on the machine on which that
work takes `PROBE`.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

PROBE = 0.64  # CPU seconds of `probe` on the machine that the budgets are told for
BUDGETS = Path(__file__).parents[1] / "budget.json"
MEASURED = "CPU_SECONDS"  # variable with the file that takes what a run measured

spent: Counter[str] = Counter()


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def budgets() -> dict[str, float]:
    """CPU seconds that each test file may take, for those that take one or more."""
    return json.loads(BUDGETS.read_text(encoding="utf-8"))["files"]


def probe() -> float:
    """CPU seconds of the fixed piece of work: products of matrices, and plain Python."""
    x = np.ones((512, 512), np.float32)
    begun = time.process_time()
    for _ in range(300):
        x @ x
    total = 0
    for i in range(12_000_000):
        total += i & 7
    return time.process_time() - begun


def slowness() -> float:
    """How many times the seconds of the table this machine takes, with two processes at work."""
    command = [sys.executable, "-m", "support.cpu_seconds"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, cwd=BUDGETS.parent, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    return sum(float(one.communicate()[0]) for one in both) / len(both) / PROBE


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    begun = cpu()
    yield
    spent[item.nodeid.partition("::")[0]] += cpu() - begun


def pytest_sessionfinish(session):
    """Send what a worker spent to the process that started it, which writes the sum."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["spent"] = dict(spent)
    elif path := os.environ.get(MEASURED):
        Path(path).write_text(json.dumps(dict(spent)), encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    spent.update(getattr(node, "workeroutput", {}).get("spent", {}))


if __name__ == "__main__":
    print(probe())
