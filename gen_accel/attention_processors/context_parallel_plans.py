"""How diffusers is to split a model over processes, for models that it has no plan for.

Plans name modules, and which of their inputs are split and outputs gathered, along which axis.
"""

from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn

from gen_accel.attention_processors.families import family_of

# (B, N, width), and the cosines and sines of rotary embeddings, (N, dim) or (1, N, 1, dim).
TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
ROTARY = ContextParallelInput(split_dim=0, expected_dims=2), ContextParallelInput(0, 2)
WAN_ROTARY = {i: ContextParallelInput(1, expected_dims=4, split_output=True) for i in range(2)}
GATHERED = ContextParallelOutput(gather_dim=1, expected_dims=3)

PLANS: dict[str, dict[str, Any]] = {
    # Its mask of the text's padding is of all tokens: the text stays whole in each process.
    "HunyuanVideoTransformer3DModel": {
        "transformer_blocks.0": {"hidden_states": TOKENS},
        "transformer_blocks.*": {"freqs_cis": ROTARY},
        "single_transformer_blocks.*": {"image_rotary_emb": ROTARY},
        "proj_out": GATHERED,
    },
    # In diffusion forcing each token has a timestep of its own, (B, 6, N, width) in the blocks.
    # What it does after `norm_out` is not in a module, so that no input can be split there.
    "SkyReelsV2Transformer3DModel": {
        "rope": WAN_ROTARY,
        "blocks.0": {"hidden_states": TOKENS},
        "blocks.*": {"temb": ContextParallelInput(split_dim=2, expected_dims=4)},
        "norm_out": GATHERED,
    },
    "WanVACETransformer3DModel": {
        "rope": WAN_ROTARY,
        "vace_blocks.0": {"hidden_states": TOKENS, "control_hidden_states": TOKENS},
        "blocks.0": {"hidden_states": TOKENS},
        "proj_out": GATHERED,
    },
}

# Why there is none, or diffusers' own does not run.
MASKED = "the mask of its text is made for all heads, while a process attends for some"
REASONS = {
    "LTXVideoTransformer3DModel": MASKED,
    "LTX2VideoTransformer3DModel": MASKED,
    "AnyFlowTransformer3DModel": "its rotary embeddings are a dict, which diffusers cannot split",
    "WanAnimateTransformer3DModel": "its face adapters need all tokens of a frame",
}


def context_parallel_plan(transformer: nn.Module) -> dict[str, Any]:
    """The model's own plan of context parallelism, or ours where diffusers has none:

        plan = context_parallel_plan(pipe.transformer)
        pipe.transformer.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=2), cp_plan=plan
        )

    HunyuanVideo's needs a method attached, be it `Dense()`: the model's own attention raises.

    Raises:
        ValueError: a model that cannot be split so, with the reason.
    """
    family: Any = family_of(transformer)
    model: Any = transformer
    name, config = type(transformer).__name__, model.config
    reason = REASONS.get(name)
    processors = [site.module.processor for site in family.self_attentions(transformer)]
    if not all(hasattr(processor, "_parallel_config") for processor in processors):
        reason = "its attention in diffusers sees the tokens of one process only"
    elif getattr(config, "image_condition_type", None) == "token_replace":
        reason = "image_condition_type='token_replace' treats the first tokens apart"
    elif getattr(config, "is_amplify_history", False):
        reason = "is_amplify_history=True scales keys by their place among all tokens"
    plan = PLANS.get(name) or model._cp_plan
    if plan is None or reason is not None:
        reason = reason or "diffusers has none, and nor do we"
        raise ValueError(f"no plan of context parallelism for {name}: {reason}")
    # diffusers' own for Helios names 40 blocks, however many there are.
    modules = dict(transformer.named_modules())
    return {path: part for path, part in plan.items() if "*" in path or path in modules}
