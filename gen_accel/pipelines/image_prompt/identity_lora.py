"""LoRA of the FaceID adapters, on every attention of the UNet.

A FaceID file holds the LoRA beside the layers that read the image. PEFT runs the LoRA as an
adapter of its own name.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gen_accel.extras import needed_for
from gen_accel.pipelines.image_prompt.formats import AdapterFile, listed


def load_identity_lora(pipe: Any, file: AdapterFile, name: str) -> Callable[[], None]:
    """Put the LoRA of a FaceID adapter on the UNet, beside any active adapters.

    Other adapters stay as active, as strong and as trainable as they were.

    Args:
        pipe: a pipeline with a `unet`, or the UNet.
        name: name of the adapter in PEFT; must be free.

    Returns:
        A function that takes the LoRA off. If it was the only adapter, the UNet has its stock
        layers again.

    Raises:
        ValueError: no LoRA in the file, a LoRA for another model, a name that is taken, or
            adapters that are merged or switched off.
    """
    with needed_for("an adapter of FaceID", extra="video"):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    unet = getattr(pipe, "unet", pipe)
    matrices = _lora_of(file, unet)
    if name in (getattr(unet, "peft_config", None) or {}):
        raise ValueError(f"an adapter called {name!r} is there already; give another name")
    tuned = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    if any(m.merged or m.disable_adapters for m in tuned):
        raise ValueError(
            "the UNet's adapters are merged or switched off; call unfuse_lora or enable_lora first"
        )
    (rank,) = {down.shape[0] for down, _ in matrices.values()}
    with _undisturbed(unet) as active:
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(matrices)), name
        )
        active.append(name)
    with torch.no_grad():
        for target, (down, up) in matrices.items():
            layer = unet.get_submodule(target)
            layer.lora_A[name].weight.copy_(down)
            layer.lora_B[name].weight.copy_(up)

    def remove() -> None:
        known = getattr(unet, "peft_config", None) or {}
        if name not in known:
            return
        if len(known) == 1:
            unet.unload_lora()
            return
        with _undisturbed(unet) as active:
            unet.delete_adapters(name)
            if name in active:
                active.remove(name)

    return remove


def _lora_of(file: AdapterFile, unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Map the name of each linear layer to its two matrices, (rank, in) and (out, rank)."""
    if not file.lora:
        raise ValueError(f"{file.origin} has no LoRA of its own")
    if not hasattr(unet, "down_blocks"):
        raise ValueError(f"a FaceID adapter is for a UNet, got {type(unet).__name__}")
    # Without AnimateDiff's temporal attentions.
    spatial = [name for name in unet.attn_processors if "motion_modules" not in name]
    names = [name.removesuffix(".processor") for name in spatial]
    expected = {
        f"{n}.to_{part}_lora.{side}.weight": (n, part, side)
        for n in range(len(names))
        for part in ("q", "k", "v", "out")
        for side in ("down", "up")
    }
    missing = [key for key in expected if key not in file.lora]
    unexpected = [key for key in file.lora if key not in expected]
    if missing or unexpected:
        parts = [f"missing {listed(missing)}"] if missing else []
        parts += [f"unexpected {listed(unexpected)}"] if unexpected else []
        raise ValueError(
            f"the LoRA in {file.origin} is for another model than {type(unet).__name__} with its "
            f"{len(names)} attentions: {'; '.join(parts)}"
        )
    ranks = {file.lora[f"{n}.to_q_lora.down.weight"].shape[0] for n in range(len(names))}
    if len(ranks) > 1:
        raise ValueError(f"the LoRA in {file.origin} has several ranks, {sorted(ranks)}")
    (rank,) = ranks
    found = {}
    for n, name in enumerate(names):
        for part in ("q", "k", "v", "out"):
            target = f"{name}.to_{part}" + (".0" if part == "out" else "")
            weight = unet.get_submodule(target).weight
            down, up = (file.lora[f"{n}.to_{part}_lora.{s}.weight"] for s in ("down", "up"))
            if (up.shape[0], down.shape[1]) != weight.shape or {down.shape[0], up.shape[1]} != {
                rank
            }:
                raise ValueError(
                    f"the LoRA in {file.origin} is for another model: at {target} it is "
                    f"{tuple(up.shape)} by {tuple(down.shape)}, the layer {tuple(weight.shape)}"
                )
            found[target] = (down, up)
    return found


@contextmanager
def _undisturbed(unet: Any) -> Iterator[list[str]]:
    """Restore active adapters and `requires_grad` after PEFT adds or deletes an adapter.

    PEFT would activate the added adapter, or any other after a deletion, and reset
    `requires_grad`. At the end of the context the adapters in the yielded list are active.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def tuned() -> list[Any]:
        return [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]

    layers = tuned()
    active = list(layers[0].active_adapters) if layers else []
    trains = {p: p.requires_grad for p in unet.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield active
    for layer in tuned():
        layer.set_adapter(active)
    for parameter in unet.parameters():
        parameter.requires_grad_(trains.get(parameter, False))
