"""Finetuning through sparse attention, on cached clips.

LoRAs for longer videos, as diffusers loads them, and image-prompt adapters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gen_accel.lora.config import Stage, TrainConfig, print_config, read_config

if TYPE_CHECKING:
    from gen_accel.lora.caching.encode import cache
    from gen_accel.lora.caching.latents import LatentCache
    from gen_accel.lora.comfyui import Exported, export
    from gen_accel.lora.data.clips import Captions
    from gen_accel.lora.data.survey import Take
    from gen_accel.lora.forecast import TrainingPlan, forecast_training
    from gen_accel.lora.publish import Push, push
    from gen_accel.lora.trainer import Trained, train
    from gen_accel.lora.trial import dry_run

__all__ = [
    "Captions",
    "Exported",
    "LatentCache",
    "Push",
    "Stage",
    "Take",
    "TrainConfig",
    "Trained",
    "TrainingPlan",
    "cache",
    "dry_run",
    "export",
    "forecast_training",
    "print_config",
    "push",
    "read_config",
    "train",
]

# Imported when first asked for: the command line reads configs without torch.
_HOMES = {
    "Captions": "data.clips",
    "Exported": "comfyui",
    "LatentCache": "caching.latents",
    "Push": "publish",
    "Take": "data.survey",
    "Trained": "trainer",
    "TrainingPlan": "forecast",
    "cache": "caching.encode",
    "dry_run": "trial",
    "export": "comfyui",
    "forecast_training": "forecast",
    "push": "publish",
    "train": "trainer",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
