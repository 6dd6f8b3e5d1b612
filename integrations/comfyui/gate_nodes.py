"""Gates of VSA that come with published weights, as FastWan's, and the attention with them."""

from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from torch import nn

from gen_accel import VSA

from .host import lora_adapter, weight_files, weight_path
from .layouts import class_name, layout_of
from .nodes import fixed
from .override import More, put_on


class LoadGatesNode:
    """Gates of VSA on a model, and VSA."""

    DESCRIPTION = (
        "Loads weights that were trained by VSA with gates, as FastWan and FastH3: from a model "
        "its gates, which ComfyUI leaves out, or has loaded; from an adapter its LoRA and its "
        "differences too. "
        "The attention is then VSA with these gates. What has no place is refused."
    )
    CATEGORY = "gen_accel"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "weights": (
                    weight_files(),
                    {
                        "tooltip": "Of models/loras or models/diffusion_models: the adapter, or "
                        "the file that the model was loaded from."
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -100.0,
                        "max": 100.0,
                        "step": 0.01,
                        "tooltip": "Of an adapter, its gates with it.",
                    },
                ),
            },
            "optional": {
                "keep_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.5,
                        "tooltip": "Of the tiles, as in the training: 20 of FastWan, 10 of "
                        "FastH3. 0: by the name of the file.",
                    },
                ),
            },
        }

    def load(
        self, model: Any, weights: str, strength: float, keep_percent: float = 0.0
    ) -> tuple[Any]:
        """A copy of `model` with the weights and the attention."""
        from gen_accel.lora.comfyui import load_published

        inner = model.get_model_object("diffusion_model")
        layout = layout_of(inner)
        if layout is None or layout.projection is None:
            raise ValueError(
                f"the gates of {weights} have no place in {class_name(inner)}, only in Wan and "
                "MiniMax-H3: put the node on the model that they are for"
            )
        keys = _shapes(model, inner)
        found = load_published(weight_path(weights), keys)
        share = keep_percent / 100 or found.critical
        if share is None:
            raise ValueError(
                f"the name of {weights} does not tell how sparse it was trained: set "
                "keep_percent, to 100 x (1 - sparsity)"
            )
        key = f"diffusion_model.{layout.projection}.weight"
        for number, gate in found.gates.items():
            shape = tuple(gate.to_gate_compress.weight.shape)
            rows, *width = keys.get(key.format(number), (0,))
            if shape != (rows // layout.projected, *width):
                raise ValueError(
                    f"the gate of block {number} of {weights} is {shape}, this model has "
                    f"{(rows // layout.projected, *width) if rows else 'no such block'}"
                )
            for x in gate.parameters():
                x.mul_(strength)
        blocks = [*takewhile(lambda number: key.format(number) in keys, count())]
        gates = found.gates or dict.fromkeys(blocks, strength)
        if lacking := sorted({*blocks} - gates.keys()):
            raise ValueError(
                f"{weights} lacks the gates of {len(lacking)} of the {len(blocks)} blocks of "
                f"{class_name(inner)}, of block {lacking[0]} first: take a whole file"
            )
        patched = model.clone()
        kind = lora_adapter()
        adapter = {
            key: kind(set(), (one.up, one.down, one.alpha, None, None, None))
            for key, one in found.layers.items()
        }
        adapter |= {key: ("diff", (x,)) for key, x in found.differences.items()}
        if adapter and strength:
            patched.add_patches(adapter, strength)
        patched = put_on(
            patched,
            choose=partial(fixed, VSA(share)),
            start_percent=0.0,
            end_percent=1.0,
            dense_blocks=frozenset(),
            min_tokens=0,
            more=More(gates=gates),
        )
        return (patched,)


def _shapes(model: Any, inner: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a model's weights by their keys; where one is quantised, as its layer is."""
    state = model.model.state_dict()
    found = {key: x.shape for key, x in state.items()}
    for name, layer in inner.named_modules():
        key, sides = f"diffusion_model.{name}.weight", ("out_features", "in_features")
        if key in state and state[key].dtype.itemsize == 1 and hasattr(layer, sides[1]):
            found[key] = torch.Size(getattr(layer, side) for side in sides)
    return found


NODE_CLASS_MAPPINGS = {"GenAccelLoadGates": LoadGatesNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelLoadGates": "Load Gates (gen_accel)"}
