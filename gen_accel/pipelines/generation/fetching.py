"""A pipeline's files that the hub's cache lacks: how large they are, and their fetching."""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import PurePosixPath

from gen_accel.hub import asked, fetched, index_file
from gen_accel.io import read_index
from gen_accel.pipelines.generation.progress import Progress, ticker

READ = (".safetensors", ".json", ".txt", ".model", ".jinja")  # files of a part that are loaded
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)\b")  # weights that load by that word alone


def missing_files(repository: str, needed: Collection[str] | None = None) -> dict[str, int]:
    """Return the files of a pipeline that loading reads and the cache lacks, with their bytes.

    Args:
        needed: the parts that are loaded; None for all in the index.

    Raises OSError where the hub does not answer.
    """
    from huggingface_hub import try_to_load_from_cache

    index = read_index(index_file(repository))
    parts = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    parts &= parts if needed is None else {*needed}
    found = asked(repository, files_metadata=True)
    missing = {}
    for one in found.siblings or ():
        place = PurePosixPath(one.rfilename)
        is_read = str(place.parent) in parts and place.suffix in READ
        if not is_read or VARIANT.search(place.name):
            continue
        if not isinstance(
            try_to_load_from_cache(repository, one.rfilename, revision=found.sha), str
        ):
            missing[one.rfilename] = one.size or 0
    return missing


def bytes_to_fetch(model: str, needed: Collection[str] | None = None) -> int | None:
    """Return the bytes that a run of a model on the hub fetches first; None if that is unknown,
    as without a network."""
    with suppress(OSError):
        return sum(missing_files(model, needed).values())
    return None


def fetch(repository: str, needed: Collection[str] | None = None) -> None:
    """Fetch what the cache lacks of a pipeline, under a bar of megabytes that moves with each
    file. Without a network nothing is fetched: loading says what is not there.

    Raises OSError for a file that cannot be fetched.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    missing: dict[str, int] = {}
    with suppress(OSError):
        missing = missing_files(repository, needed)
    if not missing:
        return
    done, total, shown = 0, sum(missing.values()), not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()  # one for each file
    try:
        with Progress() as bar:
            tick = ticker(bar, f"fetching {repository}", "MB")
            tick(0, round(total / 1e6))
            for name, size in missing.items():
                fetched(repository, name)
                done += size
                tick(round(done / 1e6), round(total / 1e6))
    finally:
        if shown:
            enable_progress_bars()
