"""Published weights that were trained sparse, for few steps, or to make a video chunk by chunk:
known by their names, and run as published."""

import re
from typing import NamedTuple


class TrainedMethod(NamedTuple):
    """A method as published weights were trained with it, chosen by name like a method.

    Args:
        method: of `registry.METHODS`.
        settings: its options, "field=value" each.
        about: the weights, and how they were trained.
        pattern: of the name of their file or repository, or of the model in their metadata, in
            lower case.
    """

    method: str
    settings: tuple[str, ...]
    about: str
    pattern: str


PIPELINES = {  # of FastVideo, in the index of weights, and those of diffusers with the same parts
    "WanDMDPipeline": "WanPipeline",
    "WanCausalDMDPipeline": "WanPipeline",
    "WanImageToVideoDmdPipeline": "WanImageToVideoPipeline",
    "TurboDiffusionPipeline": "WanPipeline",
    "TurboDiffusionI2VPipeline": "WanImageToVideoPipeline",
}
PARTS = {  # likewise, with the same weights or settings
    "CausalWanTransformer3DModel": "WanTransformer3DModel",
    "SelfForcingFlowMatchScheduler": "FlowMatchEulerDiscreteScheduler",
}
_BLOCKS = ("rest=none", "score=mean", "tile=raster", "block_q=128")
METHODS = {  # the first that matches a name counts
    "fasth3_dense": TrainedMethod(
        "dense", (), "FastH3 of FastVideo for MiniMax-H3, trained dense", r"fast-?h3.*dense"
    ),
    "fasth3": TrainedMethod(
        "vsa",
        ("critical=0.1",),
        "FastH3 of FastVideo for MiniMax-H3, trained by VSA at a sparsity of 0.9",
        r"fast-?h3",
    ),
    "turbo_sla": TrainedMethod(
        "piecewise",
        ("critical=0.15", *_BLOCKS),
        "Turbo-SLA of LightX2V for MiniMax-H3: a plain LoRA for the best 15 % of the blocks, "
        "without a linear branch",
        r"h3.*(turbo.*sla|sla.*turbo)|turbo[^/]*[-_]sla",
    ),
    "fastwan": TrainedMethod(
        "vsa",
        ("critical=0.2",),
        "FastWan of FastVideo, trained by VSA at a sparsity of 0.8",
        r"fast-?wan(?!.*full-?attn)",
    ),
    "turbowan": TrainedMethod(
        "sparse_linear",
        ("critical=0.1", "linear_over=all", "tile=raster"),
        "TurboWan of TurboDiffusion, trained by SLA and rCM",
        r"turbo-?wan|turbo-?diffusion",
    ),
}


class FewSteps(NamedTuple):
    """How published weights that were distilled to a few steps are sampled.

    Args:
        about: the weights.
        pattern: as of a `TrainedMethod`.
        source: where their publisher says it.
        steps: how many.
        sampler: of `registry.SAMPLERS`.
        shift: of equal steps; None: the pipeline's own, or `levels`.
        levels: noise at which each step begins, if the steps are not equal ones.
        guidance_scale: None: the pipeline's own.
        zones: what a chunk sees of earlier ones, as `generate --zones` takes it, of weights that
            make a video chunk by chunk; empty: they make whole clips.
    """

    about: str
    pattern: str
    source: str
    steps: int
    sampler: str = "euler"
    shift: float | None = None
    levels: tuple[float, ...] = ()
    guidance_scale: float | None = 1.0
    zones: tuple[str, ...] = ()

    @property
    def as_stream(self) -> str:
        """The same for a stream; "" if they make whole clips."""
        return f"--stream --zones {','.join(self.zones)} {self.words}" if self.zones else ""

    @property
    def words(self) -> str:
        """Flags of `generate` that sample so."""
        words = [f"--sampler {self.sampler}"]
        if self.levels:
            words.append(f"--levels {','.join(f'{level:g}' for level in self.levels)}")
        else:
            words.append(f"--steps {self.steps}")
            words += [f"--shift {self.shift:g}"] if self.shift is not None else []
        if self.guidance_scale is not None:
            words.append(f"--guidance-scale {self.guidance_scale:g}")
        return " ".join(words)


_OMNI = "https://github.com/vllm-project/vllm-omni/pull/7062"
_FASTVIDEO = "hao-ai-lab/FastVideo at 2f3d407, docs/distillation/dmd.md"
# All chunks of a clip of 81 frames, which have 21 latent ones; they see no noise.
_WHOLE_CLIP = ("frames=3", "window=6", "noise=0")
FEW_STEPS = (  # the first that matches a name counts
    FewSteps(
        "FastH3, 4 steps",
        r"fast-?h3",
        "FastVideo, the name of its weights",
        4,
        guidance_scale=None,  # MiniMax-H3 is called once a step
    ),
    *(
        FewSteps(f"MiniMax-H3 Turbo, {about}", pattern, _OMNI, steps, "euler", shift, (), None)
        for about, pattern, steps, shift in (
            ("8 steps at 768p", r"h3.*turbo.*8-?step.*768p", 8, 6.0),
            ("8 steps", r"h3.*turbo.*8-?step", 8, 12.0),
            ("4 steps", r"h3.*turbo|turbo[^/]*[-_]sla", 4, 6.0),
        )
    ),
    FewSteps(
        "TurboWan and rCM, 4 steps",
        r"turbo-?wan|turbo-?diffusion|[-_/]rcm",
        "thu-ml/TurboDiffusion at aaecff5, inference/wan2.1_t2v_infer.py",
        4,
        "lcm",
        levels=(0.9877, 0.9338, 0.8529, 0.609),
    ),
    FewSteps(
        "FastWan, 3 steps",
        r"fast-?wan|wan(imagetovideo)?dmdpipeline",
        _FASTVIDEO,
        3,
        "lcm",
        levels=(1.0, 0.757, 0.522),
    ),
    FewSteps(
        "LongLive of Wan 2.1 1.3B, 4 steps a chunk",
        r"longlive(?!.*(2\.0|5b))",
        "NVlabs/LongLive at v1.0, configs/longlive_inference_infinity.yaml",
        4,
        "lcm",
        shift=5.0,
        zones=("frames=3", "window=2", "sink=1", "noise=0"),
    ),
    FewSteps(
        "Self-Forcing of Wan 2.1, 4 steps a chunk",
        r"^(?!.*(wan-?2[._]?2|lightx2v)).*(self[-_]?forcing|sf-?wan|wancausaldmdpipeline)",
        "guandeh17/Self-Forcing at 33593df, configs/self_forcing_dmd.yaml",
        4,
        "lcm",
        shift=5.0,
        zones=_WHOLE_CLIP,
    ),
    FewSteps(
        "Causal Forcing of Wan 2.1 1.3B, chunk-wise, 4 steps a chunk",
        r"^(?!.*(frame-?wise|\+\+|long-?video)).*causal[-_]?forcing",
        "thu-ml/Causal-Forcing at 1fc7bbc, configs/causal_forcing_dmd_chunkwise.yaml",
        4,
        "lcm",
        shift=5.0,
        zones=_WHOLE_CLIP,
    ),
    FewSteps(
        "CausVid of Wan 2.1 1.3B, bidirectional, 3 steps",
        r"causvid.*bidirect",
        "tianweiy/CausVid at ca21150, configs/wan_bidirectional_dmd_from_scratch.yaml",
        3,
        "lcm",
        levels=(1.0, 0.757, 0.522),
    ),
    FewSteps(
        "CausVid of Wan 2.1 1.3B, 4 steps a chunk",
        r"causvid.*warp",
        "tianweiy/CausVid at ca21150, configs/wan_causal_dmd_warp_4step_cfg2.yaml",
        4,
        "lcm",
        shift=8.0,
        zones=_WHOLE_CLIP,
    ),
    FewSteps(
        "CausVid of Wan 2.1 1.3B, 3 steps a chunk",
        r"causvid.*(autoregressive|1[._]?3b)|1[._]?3b.*causvid",
        "tianweiy/CausVid at ca21150, configs/wan_causal_dmd.yaml",
        3,
        "lcm",
        levels=(1.0, 0.757, 0.522),
        zones=_WHOLE_CLIP,
    ),
    FewSteps(
        "CausVid of Wan 2.1, 9 steps",
        r"causvid",
        "ModelTC/LightX2V at 29c8504, configs/causvid/wan_t2v_causvid.json",
        9,
        "lcm",
        levels=(0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074),
        zones=("frames=3", "window=6", "noise=0.074"),  # the cache is of the last step
    ),
    FewSteps(
        "AccVideo of Wan 2.1, 10 steps",
        r"wan.*accvid|accvid.*wan",
        "aejion/AccVideo at 5172700, README.md and sample_wanx_t2v.py",
        10,
        "unipc",
        shift=5.0,
    ),
    FewSteps(
        "Wan 2.2 of LightX2V, 4 steps",
        r"wan-?2\.?2.*(lightning|distill|lightx2v|4-?steps?-lora)|wan22-lightning",
        "https://github.com/ModelTC/LightX2V-Wan2.2-Lightning/issues/3",
        4,
        shift=5.0,
    ),
    FewSteps(
        "Wan 2.1 of LightX2V, 4 steps",
        r"lightx2v.*(wan|i2v|t2v|distill|\dstep)|wan-?2\.?1.*(step-?_?distill|distill-loras)",
        "ModelTC/LightX2V, lightx2v/models/schedulers/wan/step_distill/scheduler.py",
        4,
        "lcm",
        shift=5.0,
    ),
    FewSteps(
        "LTX-2 distilled, 8 steps",
        r"ltx-?2.*distill",
        "huggingface/diffusers 0.42.1, pipelines/ltx2/utils.py",
        8,
        levels=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),
    ),
    FewSteps(
        "HunyuanVideo 1.5 step-distilled, 8 steps",
        r"hunyuan-?_?video-?_?1\.?5.*step-?_?distill|480p_i2v_step_distill",
        "the model card of tencent/HunyuanVideo-1.5; a shift of 7 by diffusers' pull 12802",
        8,
        shift=7.0,
        guidance_scale=None,  # a part of the pipeline
    ),
    FewSteps(
        "FastHunyuan, 6 steps",
        r"fast-?hunyuan",
        "the model card of FastVideo/FastHunyuan",
        6,
        shift=17.0,
        guidance_scale=6.0,
    ),
)


def trained_method(*names: str) -> str | None:
    """Return the name in `METHODS` of the method that weights were trained with; None if that is
    not known.

    Args:
        names: of a file, a repository or the model that a file was made from.
    """
    said = " ".join(names).lower()
    return next((name for name, one in METHODS.items() if re.search(one.pattern, said)), None)


def few_steps(*names: str) -> FewSteps | None:
    """Return how weights with one of some names are sampled in few steps, of `FEW_STEPS`; None if
    that is not known."""
    said = " ".join(names).lower()
    return next((one for one in FEW_STEPS if re.search(one.pattern, said)), None)
