"""Refuse a tag that the repository is not ready for: `python .ci/check_release.py v0.2.0`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check(tag: str, root: Path = ROOT) -> list[str]:
    """Say what speaks against a release of `tag`, each with the fix; nothing where it is ready."""
    version = _found(r'^__version__ = "(.+)"$', root / "gen_accel" / "version.py")
    wrong = []
    if tag != f"v{version}":
        wrong.append(f"the tag is {tag}, gen_accel/version.py says {version}: they must agree")
    if re.search(r"dev|\+", version):
        wrong.append(f"{version} is a version in between: write the release's own")
    if "github.com/OWNER/" in (root / "pyproject.toml").read_text(encoding="utf-8"):
        wrong.append("the address is a placeholder: see CONTRIBUTING.md")
    if f"## {version}\n" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        wrong.append(f'CHANGELOG.md has no "## {version}", without "not released yet"')
    return wrong


def _found(pattern: str, file: Path) -> str:
    match = re.search(pattern, file.read_text(encoding="utf-8"), re.M)
    assert match is not None, file
    return match[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python .ci/check_release.py TAG")
    if wrong := check(sys.argv[1]):
        raise SystemExit("\n".join(wrong))
