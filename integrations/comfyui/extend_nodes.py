"""Techniques for longer video, where they can work on a model alone.

Those that change rotary frequencies or attention do. Two run a pipeline by themselves
(`continuation`, `fresh_noise`) and one changes its noise (`window_noise`): a node for a model has
no say in that. ComfyUI's context windows are of that kind.
"""

from dataclasses import replace
from typing import Any

from gen_accel.attention_processors.methods.dense import Full
from gen_accel.attention_processors.methods.registry import values_of

from . import rotary
from .layouts import class_name, layout_of
from .override import More, put_on

KEY = "gen_accel_techniques"
TECHNIQUES = ("riflex", "position_interpolation", "rotating_anchors", "ultravico")
FACTORS = {"LTXBaseModel": 8, "AsymmDiTJoint": 6}  # pixel frames in a latent one; others: 4


class ExtendNode:
    """A technique for video longer than a model was trained on."""

    DESCRIPTION = (
        "For video longer than the model was trained at, and on no other. riflex and "
        "position_interpolation change its rotary frequencies of time, rotating_anchors and "
        "ultravico what its attention sees."
    )
    CATEGORY = "gen_accel"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "technique": ([*TECHNIQUES], {"tooltip": "Several nodes may follow one another."}),
                "trained_frames": (
                    "INT",
                    {
                        "default": 81,
                        "min": 1,
                        "max": 10000,
                        "tooltip": "Frames of the videos that the model was trained on: Wan 81, "
                        "HunyuanVideo 129, Kandinsky 5 121.",
                    },
                ),
            },
            "optional": {
                "settings": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Options by the library's names: k=6 of riflex; window=4 "
                        "first=1 interval=3 of rotating_anchors; alpha=0.9 of ultravico.",
                    },
                ),
            },
        }

    def patch(
        self, model: Any, technique: str, trained_frames: int, settings: str = ""
    ) -> tuple[Any]:
        """A copy of `model` with the technique; `model` stays as it is."""
        made = technique_of(technique, tuple(settings.split()))
        return (extended(model, made, latent_frames(model, trained_frames)),)


def technique_of(name: str, settings: tuple[str, ...] = ()) -> Any:
    """A technique of the library; ValueError for options that it does not have."""
    from gen_accel.pipelines.long_video import PositionInterpolation, Riflex
    from gen_accel.pipelines.long_video.rotating_anchors import RotatingAnchors
    from gen_accel.pipelines.long_video.ultravico import UltraViCo

    kinds = {
        kind.name: kind for kind in (Riflex, PositionInterpolation, RotatingAnchors, UltraViCo)
    }
    return replace(kinds[name](), **values_of(kinds[name], name, settings))


def extended(model: Any, technique: Any, trained: int, least: int = 1) -> Any:
    """A copy of a ModelPatcher with one technique more.

    Args:
        trained: length that the model was trained at, in latent frames.
        least: see `rotary.put_on`.

    Raises ValueError for techniques that do not go together, or a model that cannot have it.
    """
    others = model.get_attachment(KEY) or ()
    for other in others:
        why = technique.excludes.get(other.name) or other.excludes.get(technique.name)
        if why or other.name == technique.name:
            raise ValueError(
                f"{technique.name} does not go with {other.name}: {why or 'it is on already'}"
            )
    if technique.name in ("riflex", "position_interpolation"):
        patched = rotary.put_on(model, technique.frequencies, trained, least)
    else:
        diffusion_model = model.get_model_object("diffusion_model")
        if layout_of(diffusion_model) is None:
            raise ValueError(
                f"the order of tokens in {class_name(diffusion_model)} is not known, which "
                f"{technique.name} needs"
            )
        patched = put_on(
            model,
            choose=lambda video: (Full(), 1.0),
            start_percent=0.0,
            end_percent=1.0,
            dense_blocks=frozenset(),
            min_tokens=0,
            more=More(extensions=(technique.extension(trained),)),
        )
    patched.set_attachments(KEY, (*others, technique))
    return patched


def latent_frames(model: Any, frames: int) -> int:
    """Latent frames after patchify of so many pixel frames."""
    diffusion_model = model.get_model_object("diffusion_model")
    names = [kind.__name__ for kind in type(diffusion_model).__mro__]
    factor = next((FACTORS[name] for name in names if name in FACTORS), 4)
    layout = layout_of(diffusion_model)
    patch = 1 if layout is None else layout.patch[0]
    return -(-((frames - 1) // factor + 1) // patch)


NODE_CLASS_MAPPINGS = {"GenAccelExtend": ExtendNode}
NODE_DISPLAY_NAME_MAPPINGS = {"GenAccelExtend": "Longer Video (gen_accel)"}
