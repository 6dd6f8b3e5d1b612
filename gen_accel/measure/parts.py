"""Parts of a pipeline and their numbers of parameters, from config files and headers alone."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.extras import needed_for
from gen_accel.hub import fetched
from gen_accel.json_files import read_fields
from gen_accel.measure.subject import Subject, presets
from gen_accel.paths import expanded

PUBLISHED = Path(__file__).with_name("published.json")
ENCODERS = ("text_encoder", "image_encoder")  # how their names begin


@dataclass(frozen=True)
class Part:
    """A part of a pipeline that has weights.

    Args:
        name: such as transformer, transformer_2, text_encoder, vae.
        kind: its class.
        parameters: how many.
        size: bytes of all weights.
        largest: bytes of the largest layer's own weights.
        embedding: parameters that are looked up and take no part in products.
        model: on the meta device; None where it is not needed.
    """

    name: str
    kind: str
    parameters: int
    size: int
    largest: int
    embedding: int = 0
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def is_encoder(self) -> bool:
        return self.name.startswith(ENCODERS)


def parts_of_pipeline(
    source: Any, subject: Subject, dtype: torch.dtype
) -> tuple[list[Part], list[str]]:
    """List the parts of a pipeline, and in words the parts whose size is not known.

    Args:
        source: what `subject_of` took.
        subject: what it returned.
        dtype: that the weights are loaded in; classes of diffusers keep some in float32.
    """
    transformer = _counted("transformer", subject.model, dtype)
    if isinstance(source, str | Path):
        folder = expanded(str(source))
        if (folder / "model_index.json").is_file():
            return _in_folder(transformer, lambda path: folder / path, folder, dtype)
        if not folder.exists():
            name, own = _published(str(source), subject)
            if own is not None:
                return _by_name(transformer, name, own, dtype)
            if "/" in str(source):
                with suppress(OSError):
                    fetch = lambda path: fetched(str(source), path)  # noqa: E731
                    return _in_folder(transformer, fetch, None, dtype)
    elif not isinstance(source, nn.Module | Mapping):
        return _of_pipe(source, dtype), []
    return [transformer], ["text encoder and autoencoder, which are not known by a transformer"]


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model on the meta device as loading would, which leaves some weights in float32."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    if type(model).__module__.startswith("transformers") and dtype != torch.float16:
        kept = ()  # which transformers keeps beside float16 alone
    for name, value in model.named_parameters():
        if value.is_floating_point() and not any(part in name.split(".") for part in kept):
            value.data = value.data.to(dtype)
    return model


def _counted(name: str, model: nn.Module, dtype: torch.dtype, keep: bool = True) -> Part:
    cast(model, dtype)
    sizes = [
        sum(value.numel() * value.itemsize for value in layer.parameters(recurse=False))
        for layer in model.modules()
    ]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return Part(
        name=name,
        kind=type(model).__name__,
        parameters=sum(value.numel() for value in model.parameters()),
        size=sum(value.numel() * value.itemsize for value in model.parameters()),
        largest=max(sizes),
        embedding=sum(table.weight.numel() for table in tables),
        model=model if keep else None,
    )


def _of_pipe(pipe: Any, dtype: torch.dtype) -> list[Part]:
    found = []
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            kind: Any = type(module)
            with torch.device("meta"):
                if hasattr(kind, "from_config"):
                    found.append(_counted(name, kind.from_config(module.config), dtype))
                else:
                    found.append(_counted(name, kind(module.config), dtype))
    return found


def _in_folder(
    transformer: Part, file: Callable[[str], Path], folder: Path | None, dtype: torch.dtype
) -> tuple[list[Part], list[str]]:
    """Read the parts that an index names.

    Args:
        file: from a path within the pipeline to a file on disk.
        folder: of the pipeline; None on the hub.
    """
    from gen_accel.attention_processors.attached.transformers import TRANSFORMERS

    found, unknown = [], []
    for name, kind in read_fields(file("model_index.json")).items():
        known = isinstance(kind, list) and len(kind) == 2 and all(isinstance(k, str) for k in kind)
        if name.startswith("_") or not known:
            continue
        try:
            config = read_fields(file(f"{name}/config.json"))
        except OSError:
            continue  # a scheduler or tokenizer
        if name == TRANSFORMERS[0]:
            found.append(transformer)
            continue
        model = _without_values(kind[1], config)
        if model is not None:
            found.append(_counted(name, model, dtype))
            continue
        size = _in_headers(folder, name, dtype)
        if size is None:
            unknown.append(f"{name}, a {kind[1]} that cannot be made of its config")
        else:
            found.append(Part(name, kind[1], size // dtype.itemsize, size, size))
    return found, unknown


def _without_values(kind: str, config: Mapping[str, Any]) -> nn.Module | None:
    """Make a model of a class of diffusers or transformers on the meta device; None where that
    fails, or the class makes none."""
    import diffusers

    try:
        made = _module(diffusers, kind)
        if made is not None:
            known = {key: value for key, value in config.items() if not key.startswith("_")}
            with torch.device("meta"):
                return made.from_config(known)
        with needed_for("the size of a text encoder", extra="video"):
            import transformers
        made = _module(transformers, kind)
        if made is None:
            return None
        with torch.device("meta"):
            return made(made.config_class.from_dict(dict(config)))
    except ImportError:
        raise
    except Exception:  # each class fails in its own way at a config that is not its own
        return None


def _module(home: Any, name: str) -> Any:
    """A public class of models in a library; None where there is none of that name."""
    found = None if name.startswith("_") else getattr(home, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _in_headers(folder: Path | None, name: str, dtype: torch.dtype) -> int | None:
    """Add up the elements in the headers of a part's files, as bytes of `dtype`."""
    from safetensors import SafetensorError, safe_open

    files = [] if folder is None else [*(folder / name).glob("*.safetensors")]
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                shapes = [held.get_slice(key).get_shape() for key in held.keys()]  # noqa: SIM118
        except SafetensorError:
            return None
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count * dtype.itemsize if files else None


def _published(source: str, subject: Subject) -> tuple[str, dict[str, Any] | None]:
    """Return the name of a published model, and its parts besides the transformer."""
    known = presets()
    named = subject.name if subject.name in known else source
    if named not in known:
        return named, None
    return named, _table()["families"].get(known[named][0].name, {})


def _by_name(
    transformer: Part, name: str, own: Mapping[str, str], dtype: torch.dtype
) -> tuple[list[Part], list[str]]:
    import diffusers

    special = _table()["models"].get(name, {})
    found = [transformer]
    for number in range(1, special.get("transformers", 1)):
        again = {**vars(transformer), "name": f"transformer_{number + 1}", "model": None}
        found.append(Part(**again))
    unknown = []
    for part, key in own.items():
        if part == "vae":
            with torch.device("meta"):
                vae = getattr(diffusers, key).from_config(special.get("vae_config", {}))
            found.append(_counted("vae", vae, dtype))
        else:
            encoder, size = _table()["encoders"][key], dtype.itemsize
            found.append(
                Part(
                    part,
                    encoder["class"],
                    encoder["parameters"],
                    encoder["parameters"] * size,
                    encoder["largest"] * size,
                    encoder["embedding"],
                )
            )
    if not own:
        unknown.append(f"text encoder and autoencoder of {name}: give the folder of its pipeline")
    return found, unknown


@cache
def _table() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))
