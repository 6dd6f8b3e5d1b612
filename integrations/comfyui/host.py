"""ComfyUI's own modules, which are there when it imports this folder."""

from pathlib import Path

LORAS, PRESETS = "loras", "gen_accel_presets"  # folders under models


def lora_files() -> list[str]:
    """Names below models/loras, as `lora_path` takes them."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    return folder_paths.get_filename_list(LORAS)


def lora_path(name: str) -> str:
    """Path of a LoRA; FileNotFoundError without one."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    return folder_paths.get_full_path_or_raise(LORAS, name)


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
