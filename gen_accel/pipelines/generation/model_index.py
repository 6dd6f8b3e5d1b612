"""What the index of a model folder may name: public classes of diffusers and transformers.

To import anything else because a folder names it would be to run the folder's code. The libraries
hold to that by themselves in their newer versions; here it holds with all of them.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

# What the parts of a pipeline are, of each library.
KINDS = {
    "diffusers": ("ModelMixin", "SchedulerMixin"),
    "transformers": (
        *("PreTrainedModel", "PreTrainedTokenizer", "PreTrainedTokenizerFast"),
        *("PreTrainedTokenizerBase", "FeatureExtractionMixin", "ImageProcessingMixin"),
        "ProcessorMixin",
    ),
}


def check_index(index: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a pipeline whose index names what is no public class of the two libraries.

    Args:
        index: what `model_index.json` holds.
        source: the folder, or the name of a repository.

    Raises:
        ValueError: with the part and what it names; for code in the place of a class, too.
    """
    pipeline_class(index.get("_class_name"))
    for part, kind in index.items():
        if part.startswith("_") or not isinstance(kind, list) or kind[0] is None:
            continue
        found = part_class(kind, part)
        code = Path(source) / part / f"{kind[0]}.py"
        if code.exists():  # older diffusers would take the class from there
            raise ValueError(f"{code} is code in the place of {found.__name__}: it is not run")


def pipeline_class(name: Any) -> Any:
    """The pipeline of diffusers of that name. Raises ValueError for anything else."""
    import diffusers

    found = _public(diffusers, name)
    if found is None or not issubclass(found, diffusers.DiffusionPipeline):
        raise ValueError(f"_class_name must be a pipeline of diffusers, got {name!r}")
    return found


def part_class(kind: Any, part: str) -> Any:
    """Class of a part of a pipeline.

    Args:
        kind: library and name, as `model_index.json` has them. diffusers keeps some parts beside
            their pipeline, and names its module in the place of the library.

    Raises:
        ValueError: another library, or a name that is no public class of the kinds in `KINDS`.
    """
    library, name = kind if len(kind) == 2 else (kind, None)
    home = import_module(library) if library in KINDS else _beside_a_pipeline(library)
    if home is None:
        raise ValueError(
            f"{part} must be a class of diffusers or transformers, got {library}.{name}, which "
            "would be code that comes with the model"
        )
    found = _public(home, name)
    kinds = KINDS.get(str(library), KINDS["diffusers"])
    bases = [getattr(import_module(home.__name__.split(".")[0]), base, None) for base in kinds]
    if found is None or not issubclass(found, tuple(base for base in bases if base is not None)):
        raise ValueError(
            f"{part} must be a model, a scheduler, a tokenizer or a processor of {library}, got "
            f"{name!r}"
        )
    return found


def _beside_a_pipeline(library: Any) -> Any:
    from diffusers import pipelines

    return getattr(pipelines, library, None) if _is_public(library) else None


def _public(home: Any, name: Any) -> type | None:
    found = getattr(home, name, None) if _is_public(name) else None
    return found if isinstance(found, type) else None


def _is_public(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_")
