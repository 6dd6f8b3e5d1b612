"""Import paths of 0.1, which lead to the new ones and warn. To be removed in the next release."""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ATTACHED = "attention_processors.attached"
_METHODS = "attention_processors.methods"
_GENERATION = "pipelines.generation"

_OF_ATTACHMENT = ("Attachment", "Displaced", "NothingSaved", "Options", "SilentBranch")
_OF_LOADING = (
    *("DTYPES", "Loading", "OFFLOADS", "check_latents_of", "check_model", "find_device"),
    *("folder_of", "load", "load_decoder"),
)

# Former modules, and where all of their names are now.
MODULES = {
    **{
        f"attention_processors.{name}": f"{_METHODS}.{name}"
        for name in (
            *("block_mixture", "dense", "full", "neighborhood", "options", "radial"),
            *("sparse_linear", "stand_in"),
        )
    },
    **{
        f"pipelines.{name}": f"{_ATTACHED}.{name}"
        for name in (
            *("calibrate", "clock", "extension", "recipe", "schedule", "storage", "summary"),
        )
    },
    **{
        f"pipelines.{name}": f"{_GENERATION}.{name}"
        for name in (*("compare", "decode", "generate", "prompt_list", "sampling"),)
    },
    "inventory": "cli.inventory",
    "lora.commands": "cli.train",
    "pipelines.context_parallel": "attention_processors.context_parallel_plans",
    "pipelines.trained": "pipelines.attach",
}

# Names of old and present modules that moved elsewhere.
NAMES: dict[str, dict[str, str]] = {
    "attention_processors.block_mixture": dict.fromkeys(
        ("AT_ONCE", "SORTED"), "attention_processors.methods.picking"
    ),
    "attention_processors.options": {
        "method_name": "attention_processors",
        "written_type": "values",
    },
    "inventory": {"check_kernel": "kernels"},
    "pipelines.compare": dict.fromkeys(("comparison_files", "beside"), "measure.beside"),
    "lora.latents": {"cache": "lora.encode", "Report": "lora.encode"},
    "measure.estimate": dict.fromkeys(("cache_file", "measure_efficiency"), "measure.efficiency"),
    "measure.environment": {"cpp_compiler": "kernels.compiler"},
    "measure.report": {"file_sha256": "files", "write_json": "files"},
    "measure.video_io": {
        **dict.fromkeys(("check_folder", "replacing"), "files"),
        **dict.fromkeys(("contact_sheet", "side_by_side"), "measure.sheets"),
    },
    "pipelines.attach": {
        **dict.fromkeys(("TRANSFORMERS", "served_transformers"), f"{_ATTACHED}.transformers"),
        **dict.fromkeys(_OF_ATTACHMENT, f"{_ATTACHED}.attachment"),
        **dict.fromkeys(("extend_attention", "one_generation"), f"{_ATTACHED}.extend"),
        **dict.fromkeys(("Layer", "Observer", "is_offloaded", "on_device"), f"{_ATTACHED}.layer"),
        "layer_method": "method",
    },
    "pipelines.calibrate": {"attachment_of": f"{_ATTACHED}.attachment"},
    "pipelines.generate": {"ImageInput": f"{_GENERATION}.image_input"},
    "pipelines.image_prompt.handle": {"load_image_prompt": "pipelines.image_prompt.load"},
    "pipelines.long_video.technique": dict.fromkeys(
        ("latent_frames", "temporal_patch"), "attention_processors.lengths"
    ),
    "pipelines.sampling": {
        **dict.fromkeys(_OF_LOADING, f"{_GENERATION}.loading"),
        **dict.fromkeys(("Tick", "counted", "steps_bar", "ticker"), f"{_GENERATION}.progress"),
    },
}


def signpost(module: str) -> Callable[[str], Any]:
    """Make the `__getattr__` of `gen_accel.<module>`, which resolves moved names with a
    DeprecationWarning that says where they are. Raises AttributeError for any other name."""

    def found(name: str) -> Any:
        home = NAMES.get(module, {}).get(name) or MODULES.get(module)
        old, new = f"gen_accel.{module}", f"gen_accel.{home}"
        gone = AttributeError(f"module {old!r} has no attribute {name!r}")
        if home is None or name.startswith("__"):
            raise gone
        try:
            value = getattr(import_module(new), name)
        except AttributeError:
            raise gone from None
        message = f"{old}.{name} is now {new}.{name}; the old path goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return value

    return found


class _Finder(MetaPathFinder, Loader):
    """Find the modules of `MODULES`, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "gen_accel" and module in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        vars(module)["__getattr__"] = signpost(spec.name.removeprefix("gen_accel."))
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Make the old paths importable; called once, by the package."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
