"""Text files in UTF-8, with or without the byte order mark that some editors write."""

from pathlib import Path

from gen_accel.paths import expanded

ENCODING = "utf-8-sig"


def read_text(path: str | Path) -> str:
    """Read the text of the file at `path`, with each line ending as "\\n".

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is not UTF-8.
    """
    try:
        return expanded(path).read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error


def not_text(path: str | Path, error: UnicodeDecodeError) -> ValueError:
    """Make the error for a file that is not UTF-8, with the byte that is wrong."""
    byte = error.object[error.start]
    return ValueError(
        f"{path} is not UTF-8 text, from byte {error.start} (0x{byte:02x}) on: save it as UTF-8"
    )
