"""Sparse attention that makes video diffusion models faster, on any shape, measured."""

from typing import TYPE_CHECKING

from gen_accel.lazy import exported
from gen_accel.registry import hide_load_failures as _hide_load_failures
from gen_accel.version import __version__ as __version__

_hide_load_failures()  # before anything imports them

if TYPE_CHECKING:
    from gen_accel import demo as demo
    from gen_accel.attention_processors import METHODS as METHODS
    from gen_accel.attention_processors import VSA as VSA
    from gen_accel.attention_processors import BlockMixture as BlockMixture
    from gen_accel.attention_processors import Dense as Dense
    from gen_accel.attention_processors import Mixed as Mixed
    from gen_accel.attention_processors import Neighborhood as Neighborhood
    from gen_accel.attention_processors import Piecewise as Piecewise
    from gen_accel.attention_processors import Profiled as Profiled
    from gen_accel.attention_processors import Radial as Radial
    from gen_accel.attention_processors import Reuse as Reuse
    from gen_accel.attention_processors import Rule as Rule
    from gen_accel.attention_processors import SparseLinear as SparseLinear
    from gen_accel.attention_processors import register_method as register_method
    from gen_accel.attention_processors.own import attach_own as attach_own
    from gen_accel.block_mask import flex_attention as flex_attention
    from gen_accel.functional import attention as attention
    from gen_accel.measure.cost.estimate import estimate as estimate
    from gen_accel.method import Method as Method
    from gen_accel.pipelines import Schedule as Schedule
    from gen_accel.pipelines import calibrate as calibrate
    from gen_accel.pipelines import load_processors as load_processors
    from gen_accel.pipelines import load_trained as load_trained
    from gen_accel.pipelines import load_tuned as load_tuned
    from gen_accel.pipelines import measure_profile as measure_profile
    from gen_accel.pipelines import save_processors as save_processors
    from gen_accel.pipelines import tune as tune
    from gen_accel.pipelines.attach import attach as attach
    from gen_accel.pipelines.image_prompt import ScaleRange as ScaleRange
    from gen_accel.pipelines.image_prompt import load_image_prompt as load_image_prompt
    from gen_accel.pipelines.long_video import extend as extend
    from gen_accel.pipelines.streaming import stream as stream
    from gen_accel.plan import Plan as Plan
    from gen_accel.video import VideoShape as VideoShape
else:
    _names, __getattr__, __dir__ = exported(  # so that `gen-accel --help` does not wait for torch
        __name__,
        {
            ".attention_processors": "METHODS BlockMixture Dense Mixed Neighborhood Piecewise "
            "Profiled Radial Reuse Rule SparseLinear VSA register_method",
            ".attention_processors.own": "attach_own",
            ".block_mask": "flex_attention",
            ".functional": "attention",
            ".measure.cost.estimate": "estimate",
            ".method": "Method",
            ".pipelines": "Schedule calibrate load_processors load_trained load_tuned "
            "measure_profile save_processors tune",
            ".pipelines.attach": "attach",
            ".pipelines.image_prompt": "ScaleRange load_image_prompt",
            ".pipelines.long_video": "extend",
            ".pipelines.streaming": "stream",
            ".plan": "Plan",
            ".video": "VideoShape",
            **dict.fromkeys((".demo", ".kernels", ".lora"), ""),
        },
    )
    __all__ = sorted([*_names, "__version__", "demo"])
