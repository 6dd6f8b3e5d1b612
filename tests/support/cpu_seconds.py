"""CPU seconds of each test, its child processes included, and of each file for durations.json.

PYTHONPATH=tests PROFILE=out.jsonl python -m pytest -n 2 -p support.cpu_seconds
PYTHONPATH=tests python -m support.cpu_seconds out.jsonl
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest


def cpu() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    begun, wall = cpu(), time.time()
    yield
    line = [item.nodeid, round(cpu() - begun, 3), round(time.time() - wall, 3)]
    with open(os.environ["PROFILE"], "a") as file:
        file.write(json.dumps(line) + "\n")


def of_files(path: Path) -> dict[str, float]:
    """CPU seconds of each file, the longest first, without those that take less than one."""
    found: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        name, seconds, _ = json.loads(line)
        found[name.partition("::")[0]] += seconds
    return {name: round(total) for name, total in found.most_common() if total >= 1}


if __name__ == "__main__":
    durations = Path(__file__).parents[1] / "durations.json"
    durations.write_text(json.dumps(of_files(Path(sys.argv[1])), indent=1) + "\n")
