"""Estimate of the nodes before it, before anything is sampled.

    share     =  FLOPs of self-attention over those of the whole model, dense
    density   =  mean over blocks and steps, dense ones counted as 1
    speed-up  =  1 / (1 - share (1 - density / efficiency)), over the sparse blocks and steps

As `gen_accel.estimate`, but for ComfyUI's models: the FLOPs beside self-attention are taken to be
two for each token and each weight of the linear layers in the blocks that run over the video. How
many steps lie between start_percent and end_percent depends on the sampler; here they are taken as
shares of the steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gen_accel import VideoShape
from gen_accel.measure.cost.rates import known_efficiency

from .layouts import class_name, layout_of
from .moments import Moment
from .override import KEY, SparseAttention

# Class of the diffusion model -> its width, and its stacks of blocks with self-attention.
SIZES = {
    "WanModel": ("dim", ("blocks",)),
    "HunyuanVideo": ("hidden_size", ("double_blocks", "single_blocks")),
    "Flux": ("hidden_size", ("double_blocks", "single_blocks")),
    "Kandinsky5": ("model_dim", ("visual_transformer_blocks",)),
    "LTXBaseModel": ("inner_dim", ("transformer_blocks",)),
    "MiniTrainDIT": ("model_channels", ("blocks",)),
    "AsymmDiTJoint": ("hidden_size_x", ("blocks",)),
}
ONCE = ("mod", "adaln", "norm", "time")  # in the names of layers that run once for a pass
TEXT = (".cross_attn.k", ".cross_attn.v", ".attn2.to_k", ".attn2.to_v", "txt_", "_y")


class EstimateNode:
    """Density and expected speed-up."""

    DESCRIPTION = (
        "Density and expected speed-up of the nodes before it, at the latent's size. Nothing is "
        "sampled. The first time it measures this device's kernels, which takes seconds."
    )
    CATEGORY = "gen_accel"
    FUNCTION = "estimate"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("estimate",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "latent": ("LATENT",),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
            },
            "optional": {
                "efficiency": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 4.0,
                        "step": 0.05,
                        "tooltip": "Of the kernels, as a share of the ideal 1 / density; 0: "
                        "measured on this device.",
                    },
                ),
                "sigmas": (
                    "SIGMAS",
                    {"tooltip": "Of the sampler, in place of a number of equal steps."},
                ),
            },
        }

    def estimate(
        self,
        model: Any,
        latent: dict[str, Any],
        steps: int,
        efficiency: float = 0.0,
        sigmas: Tensor | None = None,
    ) -> dict[str, Any]:
        """The estimate as text, shown and returned."""
        levels = levels_of(steps)
        if sigmas is not None:
            levels = tuple((sigmas / sigmas.max()).tolist())
        said = estimated(model, tuple(latent["samples"].shape), levels, efficiency)
        return {"ui": {"text": [said]}, "result": (said,)}


def estimated(
    model: Any, shape: tuple[int, ...], levels: tuple[float, ...], efficiency: float = 0.0
) -> str:
    """The estimate in words.

    Args:
        shape: of the latents.
        levels: noise at the beginning of each step, and at the end.
        efficiency: 0 to measure it.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    layout = layout_of(diffusion_model)
    grid = None if layout is None else layout.grid(shape)
    size = size_of(diffusion_model)
    if grid is None or size is None:
        return f"the order of tokens in {class_name(diffusion_model)} is not known: it stays dense"
    (width, blocks), steps = size, len(levels) - 1
    video = VideoShape(*grid)
    attached = model.get_attachment(KEY) or ()
    if not attached:
        return f"{video} = {video.tokens} tokens, all dense: no node of gen_accel is on the model"
    kept = [
        density_of(attached, video, Moment(step, steps, levels, layer), layer)
        for step in range(steps)
        for layer in range(len(blocks))
    ]
    sparse = [one for one, _ in kept if one is not None]
    whys = sorted({why for one, why in kept if one is None})
    lines = [f"{video} = {video.tokens} tokens, {len(blocks)} blocks, {steps} steps"]
    if not sparse:
        return "\n".join([*lines, f"all dense: {', '.join(whys)}"])
    mean = sum(sparse) / len(sparse)
    attention = 4.0 * video.tokens**2 * width * len(blocks)
    rest = 2.0 * video.tokens * sum(map(weights_of, blocks))
    share = attention / (attention + rest)
    source = "given"
    if not efficiency:
        efficiency, source = known_efficiency(*_where(model, width, diffusion_model), False)
    gain = share * len(sparse) / len(kept) * (1 - mean / efficiency)
    lines += [
        f"density {mean:.3f} in {len(sparse) / len(kept):.0%} of the blocks and steps"
        + (f"; dense otherwise: {', '.join(whys)}" if whys else ""),
        f"self-attention is {share:.0%} of a dense step",
        f"expected speed-up of the sampling: {1 / max(1 - gain, 1e-9):.2f}x, at a kernel "
        f"efficiency of {efficiency:.2f} ({source}); free attention would give "
        f"{1 / max(1 - share * len(sparse) / len(kept), 1e-9):.2f}x",
    ]
    return "\n".join(lines)


def density_of(
    attached: tuple[SparseAttention, ...], video: VideoShape, moment: Moment, layer: int
) -> tuple[float | None, str]:
    """Return the density of one block at one step, or None and why it is dense. The later node is
    asked first."""
    why = ""
    for sparse in reversed(attached):
        density, why = sparse.expected(video, moment)
        if density is not None:
            return density, ""
    return None, why


def levels_of(steps: int) -> tuple[float, ...]:
    return tuple(1 - step / steps for step in range(steps + 1))


def size_of(diffusion_model: Any) -> tuple[int, list[nn.Module]] | None:
    """Width of a token, and the blocks; None for a model that is not known."""
    for kind in type(diffusion_model).__mro__:
        if kind.__name__ in SIZES:
            width, stacks = SIZES[kind.__name__]
            blocks = [one for stack in stacks for one in getattr(diffusion_model, stack)]
            return getattr(diffusion_model, width), blocks
    return None


def weights_of(block: nn.Module) -> int:
    """Weights of the linear layers of a block that run over the video's tokens."""
    return sum(
        x.numel()
        for name, x in block.named_parameters()
        if x.ndim == 2
        and not any(word in name.lower() for word in ONCE)
        and not any(word in f".{name}" for word in TEXT)
    )


def _where(
    model: Any, width: int, diffusion_model: Any
) -> tuple[torch.device, torch.dtype, int, bool]:
    counts = (getattr(diffusion_model, name, 0) for name in ("num_heads", "num_attention_heads"))
    heads = next((count for count in counts if count), width // 128)
    # Weights may be stored in float8; older versions do not tell the two apart.
    computed = getattr(model.model, "get_dtype_inference", model.model_dtype)
    return torch.device(model.load_device), computed(), width // heads, False


NODE_CLASS_MAPPINGS = {"GenAccelEstimate": EstimateNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelEstimate": "Estimate (gen_accel)"}
