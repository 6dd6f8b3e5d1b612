"""ComfyUI's own modules, which are there when it imports this folder."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

# Folders under models.
LORAS, MODELS, PRESETS = "loras", "diffusion_models", "gen_accel_presets"


def lora_files() -> list[str]:
    """Names below models/loras, as `lora_path` takes them."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    return folder_paths.get_filename_list(LORAS)


def lora_path(name: str) -> str:
    """Path of a LoRA; FileNotFoundError without one."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    return folder_paths.get_full_path_or_raise(LORAS, name)


def weight_files() -> list[str]:
    """Names below models/loras and models/diffusion_models, each after its folder."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    names = {folder: folder_paths.get_filename_list(folder) for folder in (LORAS, MODELS)}
    return [f"{folder}/{name}" for folder, found in names.items() for name in found]


def weight_path(name: str) -> str:
    """Path of a file of `weight_files`; FileNotFoundError without one."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    folder, _, rest = name.partition("/")
    return folder_paths.get_full_path_or_raise(folder, rest)


def preset_folders() -> list[Path]:
    """Folders of presets: models/gen_accel_presets, and what extra_model_paths.yaml adds."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    own = Path(folder_paths.models_dir) / PRESETS
    folder_paths.add_model_folder_path(PRESETS, str(own))
    return [Path(one) for one in folder_paths.get_folder_paths(PRESETS)]


def lora_adapter() -> type:
    """The class that adds alpha / rank up down to a weight."""
    from comfy.weight_adapter import LoRAAdapter  # pyright: ignore[reportMissingImports]

    return LoRAAdapter


def outside_graphs() -> AbstractContextManager[Any]:
    """Allocate beside ComfyUI's record of what a block allocates and frees, which newer versions
    replay: plans outlive their block."""
    pause = _pause()
    return nullcontext() if pause is None else pause()


@cache
def _pause() -> Any:
    try:
        from comfy import model_prefetch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return getattr(model_prefetch, "pause_malloc_graph", None)
