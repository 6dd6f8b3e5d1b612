"""Sparse attention that makes video diffusion models faster, on any shape, measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gen_accel.version import __version__

if TYPE_CHECKING:
    from gen_accel import demo
    from gen_accel.attention_processors import (
        METHODS,
        BlockMixture,
        Dense,
        Mixed,
        Neighborhood,
        Piecewise,
        Profiled,
        Radial,
        Reuse,
        Rule,
        SparseLinear,
        register_method,
    )
    from gen_accel.functional import attention
    from gen_accel.measure.cost.estimate import estimate
    from gen_accel.method import Method
    from gen_accel.pipelines import (
        Schedule,
        calibrate,
        load_processors,
        load_tuned,
        measure_profile,
        save_processors,
        tune,
    )
    from gen_accel.pipelines.attach import attach
    from gen_accel.pipelines.image_prompt import ScaleRange, load_image_prompt
    from gen_accel.pipelines.long_video import extend
    from gen_accel.plan import Plan
    from gen_accel.video import VideoShape

__all__ = [
    "METHODS",
    "BlockMixture",
    "Dense",
    "Method",
    "Mixed",
    "Neighborhood",
    "Piecewise",
    "Plan",
    "Profiled",
    "Radial",
    "Reuse",
    "Rule",
    "ScaleRange",
    "Schedule",
    "SparseLinear",
    "VideoShape",
    "__version__",
    "attach",
    "attention",
    "calibrate",
    "demo",
    "estimate",
    "extend",
    "load_image_prompt",
    "load_processors",
    "load_tuned",
    "measure_profile",
    "register_method",
    "save_processors",
    "tune",
]

# Imported on first access, so that `gen-accel --help` does not wait for torch.
_HOMES = {
    "METHODS": "attention_processors",
    "BlockMixture": "attention_processors",
    "Dense": "attention_processors",
    "Method": "method",
    "Mixed": "attention_processors",
    "Neighborhood": "attention_processors",
    "Piecewise": "attention_processors",
    "Plan": "plan",
    "Profiled": "attention_processors",
    "Radial": "attention_processors",
    "Reuse": "attention_processors",
    "Rule": "attention_processors",
    "ScaleRange": "pipelines.image_prompt",
    "Schedule": "pipelines",
    "SparseLinear": "attention_processors",
    "VideoShape": "video",
    "attach": "pipelines.attach",
    "attention": "functional",
    "calibrate": "pipelines",
    "estimate": "measure.cost.estimate",
    "extend": "pipelines.long_video",
    "load_image_prompt": "pipelines.image_prompt",
    "load_processors": "pipelines",
    "load_tuned": "pipelines",
    "measure_profile": "pipelines",
    "register_method": "attention_processors",
    "save_processors": "pipelines",
    "tune": "pipelines",
}
_SUBMODULES = (
    "attention_processors",
    "demo",
    "functional",
    "kernels",
    "lora",
    "measure",
    "method",
    "pipelines",
    "plan",
    "video",
)

if not TYPE_CHECKING:  # a checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBMODULES})
