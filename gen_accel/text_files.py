"""Text of files, as UTF-8 with or without the mark that some editors begin it with."""

from pathlib import Path

from gen_accel.paths import expanded

ENCODING = "utf-8-sig"


def read_text(path: str | Path) -> str:
    """What the file at `path` holds, with each end of a line as "\\n".

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return expanded(path).read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error


def not_text(path: str | Path, error: UnicodeDecodeError) -> ValueError:
    """The refusal of a file that is not UTF-8, with the byte that is wrong."""
    byte = error.object[error.start]
    return ValueError(
        f"{path} is not UTF-8 text, from byte {error.start} (0x{byte:02x}) on: save it as UTF-8"
    )
