"""Errors for a missing package that only a part of gen_accel needs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_for(what: str, *, extra: str) -> Iterator[None]:
    """Name the command that installs a package where an import inside does not find it.

    >>> with needed_for("writing a video", extra="video"):
    ...     import av

    Args:
        what: begins the sentence, as in "writing a video needs av".
        extra: of pyproject.toml, which brings the package.

    Raises:
        ModuleNotFoundError: one line, with the package and the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == __package__:  # a fault of ours, which no package mends
            raise
        raise ModuleNotFoundError(
            f'{what} needs {package}: pip install "gen_accel[{extra}]"', name=error.name
        ) from None
