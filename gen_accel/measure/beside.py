"""Files of a comparison, named after its video."""

from pathlib import Path


def comparison_files(target: Path) -> tuple[Path, Path, Path]:
    """Paths of the dense video, both side by side, and the report, beside `target`."""
    return beside(target, "dense"), beside(target, "side_by_side"), report_of(target)


def report_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}.json")


def beside(target: Path, name: str) -> Path:
    """Insert a name, `clip.mp4` to `clip.name.mp4`; a folder of frames gets an .mp4 beside it."""
    suffix = target.suffix if target.suffix.lower() in (".mp4", ".gif") else ".mp4"
    return target.with_name(f"{target.stem}.{name}{suffix}")
