"""Weights of a model's blocks that may be held in fewer bits than they compute in."""

from torch import nn

from gen_accel.attention_processors.families import family_of

# Bytes of a weight, with its share of the scales: in nf4 a byte for 64 weights.
BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}
NF4_BLOCK = 64  # weights with a scale of their own
# Parts of names whose layers steer others: they stay as they are, as in diffusers' own casting.
KEPT = ("norm", "pos_embed", "patch_embed", "lora_", ".processor.", "image_adapter")


def block_names(transformer: nn.Module) -> list[str]:
    """Names of the blocks with video attention, in their order."""
    return list(
        dict.fromkeys(site.name for site in family_of(transformer).self_attentions(transformer))
    )


def linear_names(transformer: nn.Module) -> list[str]:
    """Names of the linear layers that are held in fewer bits."""
    blocks = tuple(f"{name}." for name in block_names(transformer))
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(blocks)
        and not any(part in name for part in KEPT)
    ]


def held_names(transformer: nn.Module, kind: str | None) -> list[str]:
    """Names of the linear layers that `kind` of `BYTES` applies to.

    NF4 leaves out layers whose width is no multiple of its blocks: bitsandbytes' kernel for CPUs
    (0.50) takes the scales of other blocks there.
    """
    names = linear_names(transformer)
    if kind != "nf4":
        return names
    layers = {name: transformer.get_submodule(name) for name in names}
    return [name for name, layer in layers.items() if layer.in_features % NF4_BLOCK == 0]  # pyright: ignore
