"""Run all that `make test` or `make quick` stands for, within its budget of CPU seconds.

    python tests/run.py            lint, types, the site, and the tests, also of golden outputs
    python tests/run.py --quick    the tests that are not slow
    python tests/run.py --write    as the first, and the table of budgets is written from it

The checks run beside the tests and speak after them. Budgets are in tests/budget.json, in CPU
seconds of a machine whose speed `support.cpu_seconds.slowness` measures; the sum decides.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
STAMP = ROOT / ".pytest_cache" / "types"  # hash of the sources that pyright last passed
TYPED = ("gen_accel", "integrations", "examples", "tools")
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-n",
    "2",
    "--dist",
    "loadfile",
    "--no-loadscope-reorder",
]
SHOWN = 10  # files that grew most, in the report
LOOSE = 1.1  # factor on the budget, as two runs are never alike
NIGHTLY = os.environ.get("NIGHTLY", "") not in ("", "0")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="Leave slow tests and checks out.")
    parser.add_argument("--write", action="store_true", help="Write tests/budget.json.")
    asked = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT / "tests"))
    from support import cpu_seconds

    speed = cpu_seconds.slowness()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        measured = Path(folder, "spent.json")
        checks = None if asked.quick else beside.submit(checked)
        tests = subprocess.run(
            [*PYTEST, *(["-q", "-m", "not slow"] if asked.quick else [])],
            cwd=ROOT,
            env=environment
            | {cpu_seconds.MEASURED: str(measured)}
            | ({"QUICK": "1"} if asked.quick else {}),
        ).returncode
        failed = ["the tests"] if tests else []
        for name, code, said in [] if checks is None else checks.result():
            print(said, end="")
            failed += [name] if code else []
        spent = json.loads(measured.read_text()) if measured.exists() else {}
    spent = {name: seconds / speed for name, seconds in spent.items()}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = (usage.ru_utime + usage.ru_stime) / speed
    if asked.write:
        write(spent, cpu_seconds.BUDGETS)
    known = json.loads(cpu_seconds.BUDGETS.read_text())
    most = known["quick" if asked.quick else "test"]
    print(
        f"{total:.0f} of {most} CPU seconds, {sum(spent.values()):.0f} of them in tests; this "
        f"machine takes {speed:.2f} times those of the table"
    )
    if total > LOOSE * most and not NIGHTLY:
        grown = {name: spent[name] - known["files"].get(name, 0) for name in spent}
        for name in sorted(grown, key=lambda name: -grown[name])[:SHOWN]:
            print(f"{name}: {spent[name]:.0f} s, {grown[name]:+.0f} beside its budget")
        failed.append("the budget of CPU seconds")
    for name in failed:
        print(f"{name} failed")
    return bool(failed)


def checked() -> list[tuple[str, int, str]]:
    """Run each check; return its name, its exit status and what it printed."""
    files = [path for folder in TYPED for path in sorted((ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in [*files, ROOT / "pyproject.toml"]:
        digest.update(path.read_bytes())
    commands = {
        "ruff check": [BIN / "ruff", "check", "."],
        "ruff format": [BIN / "ruff", "format", "--check", "."],
        "the site": [BIN / "mkdocs", "build", "--strict", "--quiet"],
    }
    if NIGHTLY or not STAMP.exists() or STAMP.read_text() != digest.hexdigest():
        commands["types"] = [BIN / "pyright"]
    found = []
    for name, command in commands.items():
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found.append((name, done.returncode, done.stdout))
        if name == "types" and done.returncode == 0:
            STAMP.parent.mkdir(exist_ok=True)
            STAMP.write_text(digest.hexdigest())
    return found


def write(spent: dict[str, float], path: Path) -> None:
    """Write the budgets of files from what they took, the longest first."""
    table = json.loads(path.read_text())
    rows = sorted(spent.items(), key=lambda row: -row[1])
    table["files"] = {name: round(seconds) for name, seconds in rows if seconds >= 1}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
