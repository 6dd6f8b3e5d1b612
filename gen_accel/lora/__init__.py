"""Finetuning through sparse attention, on cached clips.

LoRAs for longer videos, as diffusers loads them, and image-prompt adapters.
"""

from typing import TYPE_CHECKING

from gen_accel.lazy import exported

if TYPE_CHECKING:
    from gen_accel.lora.caching.encode import cache as cache
    from gen_accel.lora.caching.latents import LatentCache as LatentCache
    from gen_accel.lora.comfyui import Exported as Exported
    from gen_accel.lora.comfyui import export as export
    from gen_accel.lora.config import Stage as Stage
    from gen_accel.lora.config import TrainConfig as TrainConfig
    from gen_accel.lora.config import print_config as print_config
    from gen_accel.lora.config import read_config as read_config
    from gen_accel.lora.data.clips import Captions as Captions
    from gen_accel.lora.data.clips import Dataset as Dataset
    from gen_accel.lora.data.clips import Take as Take
    from gen_accel.lora.forecast import TrainingPlan as TrainingPlan
    from gen_accel.lora.forecast import forecast_training as forecast_training
    from gen_accel.lora.publish import Push as Push
    from gen_accel.lora.publish import push as push
    from gen_accel.lora.trainer import Trained as Trained
    from gen_accel.lora.trainer import train as train
    from gen_accel.lora.trial import dry_run as dry_run
    from gen_accel.pipelines.generation.loading import add_loras as add_loras
else:
    # The command line reads configs without torch.
    __all__, __getattr__, __dir__ = exported(
        __name__,
        {
            ".caching.encode": "cache",
            ".caching.latents": "LatentCache",
            ".comfyui": "Exported export",
            ".config": "Stage TrainConfig print_config read_config",
            ".data.clips": "Captions Dataset Take",
            ".forecast": "TrainingPlan forecast_training",
            ".publish": "Push push",
            ".trainer": "Trained train",
            ".trial": "dry_run",
            "gen_accel.pipelines.generation.loading": "add_loras",
        },
    )
