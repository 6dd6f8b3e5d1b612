"""Files of repositories on the hub, and what to do if it cannot be reached."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from gen_accel.parsing import shown
from gen_accel.paths import (
    DEMO,
    INDEX,
    INDEXES,
    OF_BLOCKS,
    WEIGHTS,
    check_input,
    check_no_pickle,
    expanded,
    model_named,
)
from gen_accel.served import check_row, is_of_blocks, nearest_model, no_model, row_of

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MOST_FILES = 10_000  # of a folder that are looked at before it is read
TIMEOUT, PATIENCE = "HF_HUB_ETAG_TIMEOUT", 5.0  # seconds for an answer, unless the user set it


def check_there(source: str | Path, what: str, hint: str = "") -> None:
    """Raise FileNotFoundError for `what`, with `hint` at its end, if `source` is neither on this
    machine nor a possible name on the hub; ValueError as `check_input`, also for files in a folder
    and its folders."""
    path = expanded(source)
    for one in islice(chain([path], path.glob("*"), path.glob("*/*")), MOST_FILES):
        check_input(one)
    if path.exists() or REPOSITORY.fullmatch(str(source)):
        return
    raise FileNotFoundError(f"no {what} at {source}, and no repository is called like that{hint}")


def check_pipeline(model: str | Path) -> None:
    """Raise FileNotFoundError for a pipeline that is neither here nor on the hub, ValueError for a
    folder without one."""
    model = model_named(model)
    folder = expanded(model)
    is_path = "/" in model or folder.exists()
    if not is_path:
        check_row(model, sizes=False)
    check_there(model, "folder", "" if is_path else nearest_model(model))
    _check_no_weights(model)
    if folder.exists() and index_in(folder) is None:
        raise ValueError(
            f"{model} holds no model_index.json: give the folder that a diffusers pipeline was "
            "saved in"
        )


def index_in(folder: Path) -> Path | None:
    """Return the index of the pipeline in a folder, None without one: that of blocks only where
    there is no other."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), None)


def index_file(source: str | Path) -> Path:
    """Return the index of a pipeline in a folder or a repository.

    Raises:
        FileNotFoundError: it has none.
        OSError: a repository that is out of reach.
    """
    folder = expanded(source)
    if folder.exists():
        return index_in(folder) or folder / INDEX
    if is_of_blocks(str(source)):
        return fetched(str(source), OF_BLOCKS)
    try:
        return fetched(str(source), INDEX)
    except FileNotFoundError:
        return fetched(str(source), OF_BLOCKS)


def cached_index(repository: str) -> Path | None:
    """Return the index of a repository's pipeline in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in INDEXES)
    return next((Path(one) for one in found if isinstance(one, str)), None)


def _check_no_weights(model: str) -> None:
    path = expanded(model)
    if not path.is_file():
        return
    check_no_pickle(path)
    if path.suffix in WEIGHTS:
        raise ValueError(
            f"{model} is a file of weights: make a model of it and of the files of its other "
            f"parts by `gen-accel assemble {path.name} ... --out DIR`, once, and give DIR"
        )


def check_subject(model: str) -> None:
    """Raise ValueError or FileNotFoundError for a model whose cost cannot be told. Any name of a
    published model is enough."""
    if model == DEMO:
        return
    row = row_of(model)
    if expanded(model).exists() or ("/" in model and not (row and row.published)):
        check_there(model, "folder")
        _check_no_weights(model)
        return
    check_row(model)
    if row is None:
        raise no_model(model)


def check_sources(what: str, *sources: str | Path | None) -> None:
    """Raise FileNotFoundError for sources that are neither here nor on the hub; "demo" is
    embedded."""
    for source in sources:
        if source is not None and str(source) != DEMO:
            check_there(source, what)


def check_repository(name: str) -> None:
    """Raise ValueError for a name that is no OWNER/NAME of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not REPOSITORY.fullmatch(name):
        raise ValueError(f"the repository must be OWNER/NAME, got {shown(name)}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"the hub takes no repository {shown(name)}: {error}") from None


def parted(text: str) -> tuple[str, float]:
    """Split "folder:0.5" into the folder and 0.5; a colon may also belong to the name."""
    source, colon, weight = text.rpartition(":")
    try:
        return (source, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def file_in(source: str) -> tuple[str, str]:
    """Split "owner/name:folder/file.safetensors" into a repository and a file of it; the file is
    "" if the name of a repository alone, or of something on this machine, is given."""
    repository, _, name = source.partition(":")
    is_file = REPOSITORY.fullmatch(repository) and name.endswith(WEIGHTS[0])
    return (repository, name) if is_file and not expanded(source).exists() else (source, "")


def fetched(repository: str, name: str) -> Path:
    """Return a file of `repository`, the hub's current version or else the cached one.

    Raises:
        FileNotFoundError: the repository has no such file.
        OSError: the file is not cached and cannot be fetched.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub import try_to_load_from_cache as cached
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with silenced("huggingface_hub"):  # which says each time that it tries again
            if not isinstance(cached(repository, name), str):
                # Without a network, downloading would try six times, for 23 seconds.
                get_hf_file_metadata(hf_hub_url(repository, name), timeout=_patience())
            return Path(hf_hub_download(repository, name, etag_timeout=_patience()))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise OSError(why_not(repository, error)) from error
        raise FileNotFoundError(f"{repository} on the hub holds no {name}") from error
    except Exception as error:
        raise OSError(why_not(repository, error)) from error


def reachable(repository: str) -> str:
    """Return `repository` where the hub answers for it, else its folder in the cache.

    Raises:
        OSError: neither; within seconds, where loading by name would try for 23.
    """
    from huggingface_hub import snapshot_download

    try:
        asked(repository)
    except OSError as error:
        try:
            return snapshot_download(repository, local_files_only=True)
        except Exception:  # nothing of it is there, or a part
            raise error from error.__cause__
    return repository


def asked(repository: str, *, files_metadata: bool = False) -> "ModelInfo":
    """Return what the hub says of a repository.

    Args:
        files_metadata: the bytes of its files too.

    Raises OSError where the hub does not answer, within seconds.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(repository, timeout=_patience(), files_metadata=files_metadata)
    except Exception as error:
        raise OSError(why_not(repository, error)) from error


def downloaded(repository: str, patterns: list[str]) -> Path:
    """Return the folder in the cache of files of `repository`, fetched where the hub answers.

    Raises OSError if the hub does not answer, and nothing of it is in the cache.
    """
    from huggingface_hub import snapshot_download

    home = reachable(repository)
    if home != repository:
        return Path(home)
    return Path(snapshot_download(repository, allow_patterns=patterns))


def _patience() -> float:
    """Seconds to wait for the hub, from the user's setting for huggingface_hub if there is one."""
    from huggingface_hub import constants

    return constants.HF_HUB_ETAG_TIMEOUT if os.environ.get(TIMEOUT) else PATIENCE


@contextmanager
def silenced(library: str) -> Iterator[None]:
    """Silence log records of `library` below errors; failures are raised anyway."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def why_not(repository: str, error: Exception) -> str:
    """Say in one line where it was looked for, what the hub said, and the command to fetch it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    where = f"{repository} is not in the hub's cache, {constants.HF_HUB_CACHE}"
    if isinstance(error, GatedRepoError):
        return f"{where}, and the hub asks who you are: accept its terms, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where}, and the hub has none of that name that you may read"
    cause = error.__cause__ or error
    said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    return (
        f"{where}, and cannot be fetched ({said}): run `hf download {repository}` where there is "
        "a network, or give a folder"
    )
