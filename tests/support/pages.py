"""Code and command lines of README and docs."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.S | re.M,
)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], match["text"], match["reason"]))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(block: Block) -> list[list[str]]:
    """The arguments of each gen-accel line, however it is started."""
    found = []
    lines = block.text.replace("\\\n", " ").splitlines()
    for line in lines:
        line = line.removeprefix("$ ")
        started = re.match(r"\s*(?:.*-m gen_accel|gen-accel) (.*)", line)
        if started:
            found.append(shlex.split(started[1], comments=True))
    return found


def spans(page: Path) -> list[str]:
    """What stands behind gen-accel in code within the text, as `gen-accel tune --quality 30`."""
    text = FENCE.sub("", page.read_text())
    return [" ".join(one.split()) for one in re.findall(r"`gen-accel ([^`]+)`", text)]
