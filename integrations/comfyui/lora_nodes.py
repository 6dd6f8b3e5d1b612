"""A LoRA of `gen-accel train`, with the attention that it was trained with."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .extend_nodes import extended, latent_frames, technique_of
from .host import lora_adapter, lora_files, lora_path
from .nodes import fixed
from .override import More, put_on

# ComfyUI numbers a control block like the block that it goes to.
CONTROLLED = ("WanVACETransformer3DModel",)


class LoadLoraNode:
    """A LoRA on a model, and its attention."""

    DESCRIPTION = (
        "Loads a LoRA of gen-accel train, as the training wrote it or gen-accel export did, and "
        "attaches what it was trained with: the method with its own parameters, its dense blocks "
        "and steps, and the rule of its rotary frequencies."
    )
    CATEGORY = "gen_accel"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "recipe")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "lora_name": (
                    lora_files(),
                    {
                        "tooltip": "Of models/loras. Parameters of the method lie beside the file "
                        "that a training wrote, and inside one of gen-accel export."
                    },
                ),
                "strength_model": (
                    "FLOAT",
                    {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01},
                ),
            },
            "optional": {
                "attach_attention": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Off: the weights alone, for another attention."},
                ),
                "min_tokens": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 1 << 20,
                        "step": 512,
                        "tooltip": "With fewer tokens the attention stays dense.",
                    },
                ),
            },
        }

    def load(
        self,
        model: Any,
        lora_name: str,
        strength_model: float,
        attach_attention: bool = True,
        min_tokens: int = 0,
    ) -> tuple[Any, str]:
        """A copy of `model` with the LoRA, and how it was trained."""
        from gen_accel.lora.comfyui import load

        loaded = load(lora_path(lora_name))
        patched = with_weights(model, loaded.layers, strength_model, lora_name)
        if attach_attention:
            patched = with_attention(patched, loaded, min_tokens)
        return patched, described(loaded.recipe)


def with_weights(model: Any, layers: Any, strength: float, origin: str) -> Any:
    """A copy of a ModelPatcher with a LoRA on its weights.

    Raises ValueError for layers that the model does not have, or of another size, and for a LoHa
    or LoKr.
    """
    if not all(hasattr(layer, "up") for layer in layers.values()):
        raise ValueError(
            f"{origin} is a LoHa or LoKr: export it, load the file by ComfyUI's own Load LoRA, "
            "and attach the attention by the node of gen_accel after it"
        )
    weights = model.model.state_dict()
    keys = {name: f"diffusion_model.{name}.weight" for name in layers}
    wrong = [
        name
        for name, key in keys.items()
        if key not in weights
        or (len(layers[name].up), layers[name].down.shape[1]) != tuple(weights[key].shape)
    ]
    if wrong:
        raise ValueError(
            f"{origin} does not fit this model, which lacks {len(wrong)} of its {len(layers)} "
            f"layers in these sizes, such as {wrong[0]}"
        )
    patched = model.clone()
    if strength:
        patched.add_patches({keys[name]: patch_of(one) for name, one in layers.items()}, strength)
    return patched


def patch_of(layer: Any) -> Any:
    """ComfyUI's adapter for a layer."""
    kind = lora_adapter() if layer.lengths is None else _dora_adapter()
    return kind(set(), (layer.up, layer.down, layer.alpha, None, layer.lengths, None))


@lru_cache(maxsize=1)
def _dora_adapter() -> type:
    """Class that divides by the lengths of the rows with the LoRA, as PEFT does in training.
    ComfyUI 0.19.3 divides by the lengths without it."""
    kind: Any = lora_adapter()

    class Dora(kind):
        name = "gen_accel_dora"

        def calculate_weight(
            self,
            weight: Tensor,
            key: str,
            strength: float,
            strength_model: float,
            offset: Any,
            function: Any,
            intermediate_dtype: torch.dtype = torch.float32,
            original_weight: Any = None,
        ) -> Tensor:
            up, down, alpha, _, lengths, _ = self.weights
            up, down, lengths = (
                x.to(weight.device, intermediate_dtype) for x in (up, down, lengths)
            )
            before = weight.to(intermediate_dtype)
            after = before + alpha / len(down) * (up @ down)
            after *= (lengths / after.norm(dim=1)).unsqueeze(1)
            weight += function((strength * (after - before)).to(weight.dtype))
            return weight

    return Dora


def with_attention(model: Any, loaded: Any, min_tokens: int) -> Any:
    """A copy of a ModelPatcher with the attention, and the rule, of a recipe."""
    recipe = loaded.recipe
    if loaded.branches and recipe.transformer["class"] in CONTROLLED:
        raise ValueError(
            "the attention's own parameters of a VACE cannot be told apart from those of its "
            "control blocks in ComfyUI: switch attach_attention off, or run it in diffusers"
        )
    method, schedule = recipe.build_method(), recipe.build_schedule()
    if not method.is_dense:
        more = More(schedule=schedule, branches=branches_of(method, loaded))
        model = put_on(
            model,
            choose=partial(fixed, method),
            start_percent=0.0,
            end_percent=1.0,
            dense_blocks=frozenset(),
            min_tokens=min_tokens,
            more=more,
        )
    if recipe.rope == "none" or recipe.trained_frames is None:
        return model
    trained, least = (latent_frames(model, n) for n in (recipe.trained_frames, recipe.frames))
    return extended(model, technique_of(recipe.rope), trained, least)


def branches_of(method: Any, loaded: Any) -> dict[int, nn.Module]:
    """Parameters of the method by the number of the layer.

    Raises ValueError for parameters of another shape than the method has.
    """
    sizes = loaded.recipe.transformer
    found = {}
    for layer, tensors in loaded.branches.items():
        own = method.for_layer(layer)
        made = own.branch(sizes["num_attention_heads"], sizes["attention_head_dim"])
        if made is None:
            raise ValueError(f"the LoRA has parameters of block {layer}, where {own!r} has none")
        try:
            made.load_state_dict(tensors)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"the parameters of block {layer} do not fit {own!r}: {said}"
            ) from None
        found[layer] = made.requires_grad_(False)
    return found


def described(recipe: Any) -> str:
    """A recipe in words, with what is left to the workflow."""
    lines = [
        f"{recipe.part} of {recipe.transformer['class']}, rank {recipe.rank}, alpha "
        f"{recipe.alpha:g}{', DoRA' if recipe.dora else ''}",
        f"trained at {recipe.frames} frames of {recipe.height} x {recipe.width}; the model at "
        f"{recipe.trained_frames}",
        f"attention: {recipe.build_method()!r}, {recipe.build_schedule()}",
    ]
    if recipe.rope != "none":
        lines.append(f"rotary frequencies beyond {recipe.trained_frames} frames: {recipe.rope}")
    if recipe.holds_guidance:
        lines.append(f"holds a guidance of {recipe.teacher_guidance:g}: set cfg to 1")
    if recipe.condition == "first_frame":
        lines.append("trained with first frames: give one")
    if recipe.condition == "control":
        lines.append("trained with control films: give one")
    if recipe.condition == "last_frame":
        lines.append("trained with first and last frames: give both")
    if recipe.techniques:
        lines.append(f"generated elsewhere with {', '.join(recipe.techniques)}; not done here")
    if recipe.parts:
        lines.append("of two experts: load the other one's LoRA on the other model")
    return "\n".join(lines)


NODE_CLASS_MAPPINGS = {"GenAccelLoadLora": LoadLoraNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelLoadLora": "Load LoRA (gen_accel)"}
