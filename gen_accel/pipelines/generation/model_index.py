"""Check of a model folder's index, which may name public classes of diffusers and transformers.

To import anything else that a folder names would be to run the folder's code. Newer versions of
the libraries check this themselves; here the check holds with all versions.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Base classes of a pipeline's parts, by library.
KINDS = {
    "diffusers": ("ModelMixin", "SchedulerMixin", "BaseGuidance"),
    "transformers": (
        *("PreTrainedModel", "PreTrainedTokenizer", "PreTrainedTokenizerFast"),
        *("PreTrainedTokenizerBase", "FeatureExtractionMixin", "ImageProcessingMixin"),
        "ProcessorMixin",
    ),
}


def check_index(index: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a pipeline whose index names anything but public classes of the two libraries.

    Args:
        index: contents of `model_index.json`.
        source: the folder, or the name of a repository.

    Raises:
        ValueError: a part is no such class, or the folder holds code in place of the class. The
            error gives the part and the name.
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
    """Return the pipeline of diffusers of that name. Raises ValueError for anything else."""
    import diffusers

    found = _public(diffusers, name)
    if found is None or not issubclass(found, diffusers.DiffusionPipeline):
        raise ValueError(f"_class_name must be a pipeline of diffusers, got {name!r}")
    return found


def part_class(kind: Any, part: str) -> Any:
    """Return the class of a part of a pipeline.

    Args:
        kind: library and name, as in `model_index.json`. diffusers keeps some parts beside their
            pipeline, and names the pipeline's module in place of the library.

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


def load_part(source: str, name: str, kind: Sequence[str], dtype: torch.dtype) -> Any:
    """Load one component of the pipeline in the folder `source`."""
    found: Any = part_class(kind, name)
    is_model = issubclass(found, nn.Module)
    options = {"torch_dtype": dtype} if is_model else {}
    with warnings.catch_warnings():
        # Newer libraries call it `dtype`; older ones do not know that.
        warnings.filterwarnings("ignore", ".*torch_dtype.*")
        return found.from_pretrained(source, subfolder=name, **options)


def _beside_a_pipeline(library: Any) -> Any:
    from diffusers import pipelines

    return getattr(pipelines, library, None) if _is_public(library) else None


def _public(home: Any, name: Any) -> type | None:
    found = getattr(home, name, None) if _is_public(name) else None
    return found if isinstance(found, type) else None


def _is_public(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_")
