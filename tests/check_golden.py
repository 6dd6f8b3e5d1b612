"""Hold our methods to what the public code of each of them answers.

    python tests/check_golden.py tests/golden

A golden is a NAME.json with a list of cases beside a NAME.npz with their arrays. Which method it
belongs to is read from the keys of its cases, never from its name: see `support.golden`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.golden import FORMATS
from support.golden.deviation import Arrays, Deviation, Format


@dataclass(frozen=True)
class Verdict:
    line: str
    ok: bool


def check_file(path: Path) -> Verdict:
    """Check the golden at `path`.json and `path`.npz."""
    try:
        cases, arrays = _read(path)
        kind = _recognise(cases, arrays)
    except Exception as error:  # whatever a damaged file makes its reader throw
        return Verdict(f"{path.name}: FAIL: {type(error).__name__}: {error}", False)
    title = f"{path.name}: {kind.method}, {len(cases)} cases"
    found: list[Deviation] = []
    failed: dict[str, str] = {}
    for case in cases:
        try:
            deviations = list(kind.check(case, arrays))
        except Exception as error:  # a case that makes no sense fails, and the next one is checked
            failed[str(case["id"])] = f"{type(error).__name__}: {error}"
            continue
        found += deviations
        wrong = [str(deviation) for deviation in deviations if not deviation.ok]
        if wrong:
            failed[str(case["id"])] = ", ".join(wrong)
    worst = f", at worst {max(found, key=_badness)}" if found else ""
    outcome = "FAIL" if failed else "ok"
    details = "".join(f"; case {case}: {why}" for case, why in failed.items())
    return Verdict(f"{title}{worst}: {outcome}{details}", not failed)


def check_directory(folder: Path) -> list[Verdict]:
    """Check every golden in `folder`; ValueError when there is none."""
    files = [path for path in folder.glob("*") if path.suffix in (".json", ".npz")]
    if not files:
        raise ValueError(f"{folder} holds no golden")
    return [check_file(stem) for stem in sorted({path.with_suffix("") for path in files})]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/check_golden.py DIR", file=sys.stderr)
        return 2
    try:
        verdicts = check_directory(Path(arguments[0]))
    except ValueError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    for verdict in verdicts:
        print(verdict.line)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _read(path: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    cases = json.loads(path.with_name(f"{path.name}.json").read_text())
    with np.load(path.with_name(f"{path.name}.npz"), allow_pickle=False) as file:
        return cases, dict(file)


def _recognise(cases: list[dict], arrays: Arrays) -> Format:
    if not isinstance(cases, list) or not cases or not all(isinstance(c, dict) for c in cases):
        raise ValueError("the json must be a list of cases")
    for kind in FORMATS:
        if all(kind.keys | {"id"} <= case.keys() for case in cases):
            names = [name for case in cases for name in kind.arrays(case)]
            if lost := [name for name in names if name not in arrays]:
                raise ValueError(f"arrays are missing from the npz: {', '.join(lost)}")
            return kind
    raise ValueError(f"no known format has cases with keys {sorted(cases[0])}")


def _badness(deviation: Deviation) -> float:
    if deviation.ok:
        return deviation.error / deviation.budget if deviation.budget else 0.0
    return float("inf")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
