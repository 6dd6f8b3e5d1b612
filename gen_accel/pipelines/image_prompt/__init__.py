"""Image prompts on live diffusers pipelines: load an adapter, set images, take it off again."""

from gen_accel.pipelines.image_prompt.handle import ImagePrompt
from gen_accel.pipelines.image_prompt.load import load_image_prompt
from gen_accel.pipelines.image_prompt.strength import ScaleRange

__all__ = ["ImagePrompt", "ScaleRange", "load_image_prompt"]
