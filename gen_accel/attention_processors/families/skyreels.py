"""SkyReels-V2, text to video and image to video, with and without diffusion forcing.

Tokens are those of Wan. Diffusion forcing gives each frame a timestep of its own, (B, frames); in
causal blocks (`num_frame_per_block` above 1) it also hides later frames by a mask, and sparse
attention refuses the call.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gen_accel.attention_processors.families.base import (
    Arguments,
    Given,
    PipelineInputs,
    PublishedModel,
    Sizes,
)
from gen_accel.attention_processors.families.sites import Model, SplitPlan, split_tokens
from gen_accel.attention_processors.families.wan import Wan, WanTrained, one_or_two, split_rotary
from gen_accel.video import VideoShape

_SLOW = 16  # frames a second that `fps_embedding` tells from all others, which count as 24
_FORCING = "Skywork/SkyReels-V2-DF-14B-540P-Diffusers"


class SkyReels(WanTrained):
    models = "SkyReels-V2"
    # Frames of the 540P models, and of the pipelines. The 720P models, whose configs are the same,
    # were trained on 121.
    sizes = Sizes(temporal=4, spatial=8, frames=97, fps=24, text=512)
    training = replace(WanTrained.training, takes_fps=True)
    presets = {
        "SkyReels-V2-T2V-14B": PublishedModel(
            "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
            14.3,
            {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        ),
        "SkyReels-V2-DF-1.3B": PublishedModel(
            "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
            1.44,
            {
                "num_attention_heads": 12,
                "num_layers": 30,
                "ffn_dim": 8960,
                "inject_sample_info": True,
            },
        ),
    }
    pipelines = {
        "SkyReelsV2Pipeline": PipelineInputs(
            "skyreels t2v", model="Skywork/SkyReels-V2-T2V-14B-720P-Diffusers"
        ),
        "SkyReelsV2ImageToVideoPipeline": PipelineInputs(
            "skyreels i2v",
            text=False,
            image="image",
            last_image="last_image",
            fits=one_or_two,
            model="Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        ),
        "SkyReelsV2DiffusionForcingPipeline": PipelineInputs("skyreels df", model=_FORCING),
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": PipelineInputs(
            "skyreels df",
            text=False,
            image="image",
            last_image="last_image",
            joins=True,
            model=_FORCING,
        ),
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": PipelineInputs(
            "skyreels df",
            text=False,
            video="video",
            role="prolonged",
            by="overlapping",
            joins=True,
            model=_FORCING,
        ),
    }
    comfyui = {"blocks": Wan.comfyui["blocks"]}

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        given = super().inputs(transformer, video, text, batch)
        return given | {"fps": [1] * batch} if transformer.config.inject_sample_info else given

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Predict with one noise level for all frames.

        For models of diffusion forcing this is their synchronous mode (`ar_step=0`), in which the
        pipelines run unless told otherwise; the forward pass with the level written out for each
        frame gives the same up to rounding. Models with `inject_sample_info` are told whether
        `fps` (B,) is 16.
        """
        told = dict(conditions)
        fps = told.pop("fps", torch.full_like(sigma, self.sizes.fps))
        if transformer.config.inject_sample_info:
            told["fps"] = (fps != _SLOW).long().tolist()
        return super().predict(transformer, noisy, sigma, told)

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        if not given.get("enable_diffusion_forcing", False):
            return None
        return "SkyReels-V2 makes a long video in parts where it runs with diffusion forcing"

    def context_parallel(self, transformer: Model) -> SplitPlan:
        """Plan for diffusion forcing, in which each token has a timestep of its own, (B, 6, N,
        width) in the blocks. The code after `norm_out` is not in a module, so that no input can be
        split there."""
        from diffusers.models._modeling_parallel import ContextParallelInput

        split = split_tokens()
        return {
            "rope": split_rotary(),
            "blocks.0": {"hidden_states": split["tokens"]},
            "blocks.*": {"temb": ContextParallelInput(split_dim=2, expected_dims=4)},
            "norm_out": split["gathered"],
        }
