"""The embedded demo model: a real `WanPipeline`, its world, its detector and its image prompt."""

from pathlib import Path

__all__ = [
    "NAME",
    "TRAINED_FRAMES",
    "adapter_named",
    "image_prompt_path",
    "model_named",
    "path",
]

NAME = "demo"  # what the command line and configs call the model, and its image prompt
TRAINED_FRAMES = 33  # of its clips, as model/gen_accel.json says


def path() -> Path:
    """The folder that `WanPipeline.from_pretrained` loads."""
    return Path(__file__).parent / "model"


def image_prompt_path() -> Path:
    """The folder of the adapter for `gen_accel.load_image_prompt`, made by
    configs/image_prompt/demo.yaml."""
    return Path(__file__).parent / "image_prompt"


def model_named(name: str) -> str:
    """Resolve a model's name from the command line or a config. "demo" is the embedded model; a
    folder of that name is "./demo"."""
    return str(path()) if name == NAME else name


def adapter_named(name: str) -> str:
    """Resolve an image-prompt adapter's name, as `model_named` does."""
    return str(image_prompt_path()) if name == NAME else name
