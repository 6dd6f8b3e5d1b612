"""A pipeline of its configs alone: for questions about classes and sizes, before any weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.hub import fetched
from gen_accel.io import read_fields
from gen_accel.measure.cost.model import components_of, subject_of
from gen_accel.pipelines.generation.loading import folder_of, index_of
from gen_accel.pipelines.generation.model_index import part_class, pipeline_class


def skeleton(model: str | Path) -> Any:
    """Make a pipeline without values: its models lie on the meta device, its scheduler is as
    configured, and tokenizers and what else only a run needs are None.

    `gen_accel.extend` and `attach` refuse it what they refuse the model itself. It generates
    nothing.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub, of which only config
            files are read.

    Raises:
        ValueError: a model that `loading.load` refuses by its index, or a pipeline that cannot be
            made so.
        OSError: a missing file or repository.
    """
    index = index_of(model)
    folder = folder_of(model)
    subject = subject_of(model)
    models = {
        part.name: part.model
        for part in components_of(model, subject, torch.float32)[0]
        if part.model is not None
    }
    given: dict[str, Any] = {}
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list | tuple) or kind[0] is None:
            continue
        given[name] = models.get(name)
        found: Any = part_class(kind, name)
        if not issubclass(found, nn.Module) and hasattr(found, "from_config"):
            file = f"{name}/{found.config_name}"
            given[name] = found.from_config(read_fields(_file(model, folder, file)))
    for name in TRANSFORMERS:
        if given.get(name) is not None:  # beside which `gen_accel.json` may lie
            given[name].register_to_config(_name_or_path=str(folder / name))
    made: Any = pipeline_class(index["_class_name"])
    try:
        return made(**given)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{model} cannot be looked at without its weights: {made.__name__} needs more than "
            f"configs ({error})"
        ) from error


def _file(model: str | Path, folder: Path, path: str) -> Path:
    return folder / path if folder.exists() else Path(fetched(str(model), path))
