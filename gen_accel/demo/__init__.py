"""The embedded demo model: a real `WanPipeline`, its world, its detector and its image prompt."""

from pathlib import Path

from gen_accel.paths import DEMO as NAME
from gen_accel.paths import adapter_named, model_named

__all__ = [
    "NAME",
    "TRAINED_FRAMES",
    "adapter_named",
    "image_prompt_path",
    "model_named",
    "path",
    "stream_lora_path",
]

TRAINED_FRAMES = 33  # of its clips, as model/gen_accel.json says


def path() -> Path:
    """The folder that `WanPipeline.from_pretrained` loads."""
    return Path(__file__).parent / "model"


def image_prompt_path() -> Path:
    """The folder of the adapter for `gen_accel.load_image_prompt`, made by
    configs/image_prompt/demo.yaml."""
    return Path(__file__).parent / "image_prompt"


def stream_lora_path() -> Path:
    """The folder of the LoRA for `gen_accel.stream`, made by configs/lora/demo_causal.yaml."""
    return Path(__file__).parent / "stream_lora"
