"""Presets: settings by name, and files that `gen-accel tune` wrote for a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gen_accel import Mixed, Schedule, VideoShape
from gen_accel.method import Method, RunPlan
from gen_accel.registry import PRESETS

from .estimate_nodes import size_of
from .host import preset_folders
from .layouts import class_name
from .nodes import MIN_TOKENS, fixed
from .override import More, put_on

# Class of diffusers that a preset was tuned on -> ComfyUI's.
CLASSES = {
    "WanTransformer3DModel": "WanModel",
    "SkyReelsV2Transformer3DModel": "WanModel",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo",
    "LTXVideoTransformer3DModel": "LTXVModel",
    "CosmosTransformer3DModel": "MiniTrainDIT",
    "MochiTransformer3DModel": "AsymmDiTJoint",
    "Kandinsky5Transformer3DModel": "Kandinsky5",
}


class PresetNode:
    """A preset on a model."""

    DESCRIPTION = (
        "quality, balanced and fast are rules from the settings that published methods were "
        "measured at. A file of gen-accel tune, in models/gen_accel_presets, has a setting for "
        "each head, block and step."
    )
    CATEGORY = "gen_accel"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "preset")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (
                    [*PRESETS, *(path.name for path in files())],
                    {"default": "balanced", "tooltip": "A file is for one number of steps."},
                ),
            },
            "optional": {
                "min_tokens": ("INT", {**MIN_TOKENS, "tooltip": "Fewer stay dense."}),
            },
        }

    def patch(self, model: Any, preset: str, min_tokens: int = 12288) -> tuple[Any, str]:
        """A copy of `model` with the preset, and what it is."""
        schedule = Schedule()
        if preset in PRESETS:
            method, schedule, said = by_name(preset)
            choose = partial(fixed, method)
        else:
            rules, density, said = of_file(preset, model.get_model_object("diffusion_model"))
            choose = partial(chosen, rules, density)
        patched = put_on(
            model,
            choose=choose,
            start_percent=0.0,
            end_percent=1.0,
            dense_blocks=frozenset(),
            min_tokens=min_tokens,
            more=More(schedule=schedule),
        )
        return patched, said


def by_name(name: str) -> tuple[Any, Schedule, str]:
    """Method and schedule of a rule, and it in words."""
    from gen_accel.pipelines.tuning.preset import by_rule

    method, schedule, _ = by_rule(name, quiet=True)
    return method, schedule, f"{name}, a rule that was not measured here: {method}, {schedule}"


@dataclass(frozen=True, eq=False)
class Rules(Method):
    """The rules of a preset, which are many: each layer's are made once."""

    mixed: Mixed
    layers: dict[int, Any] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        return self.mixed(q, k, v, video=video, kernel=kernel)

    def for_layer(self, layer: int) -> Any:
        if layer not in self.layers:
            self.layers[layer] = self.mixed.for_layer(layer)
        return self.layers[layer]


def chosen(rules: Rules, density: float, video: VideoShape) -> tuple[Any, float]:
    return rules, density


def of_file(name: str, diffusion_model: Any) -> tuple[Rules, float, str]:
    """Rules of a tuned preset, the density that they had, and both in words.

    Raises ValueError for a preset of another model.
    """
    from gen_accel.pipelines.tuning.preset import read_preset

    path = next((path for path in files() if path.name == name), None)
    if path is None:
        raise FileNotFoundError(f"no preset {name} in {', '.join(map(str, preset_folders()))}")
    preset = read_preset(path)
    kind = preset.made_for.transformer["class"]
    names = [one.__name__ for one in type(diffusion_model).__mro__]
    if CLASSES.get(kind) not in names:
        raise ValueError(
            f"{name} was tuned on {kind}, got {class_name(diffusion_model)}: gen-accel tune makes "
            "one for a model"
        )
    check_size(name, preset.made_for.transformer, diffusion_model)
    frames, rows, columns = preset.made_for.grid
    said = (
        f"{name}: {preset.method}, density {preset.density:.3f}, tuned at {frames} x {rows} x "
        f"{columns} tokens, {preset.method.steps} steps and {preset.made_for.dtype}"
    )
    return Rules(preset.method), preset.density, said


def check_size(name: str, tuned: Mapping[str, Any], diffusion_model: Any) -> None:
    """Refuse, by a ValueError, a preset of a larger or smaller model of the class."""
    size = size_of(diffusion_model)
    if size is None:
        return
    width, blocks = size
    count = tuned.get("num_layers", 0) + tuned.get("num_single_layers", 0)
    wide = tuned.get("num_attention_heads", 0) * tuned.get("attention_head_dim", 0)
    if (count and count != len(blocks)) or (wide and wide != width):
        raise ValueError(
            f"{name} was tuned on {count} blocks of width {wide}, got {len(blocks)} of {width}: "
            "gen-accel tune makes one for this model"
        )


def files() -> list[Path]:
    return [path for folder in preset_folders() for path in sorted(folder.glob("*.json"))]


NODE_CLASS_MAPPINGS = {"GenAccelPreset": PresetNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelPreset": "Preset (gen_accel)"}
