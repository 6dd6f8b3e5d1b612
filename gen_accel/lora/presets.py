"""Presets of a training for a purpose: values of fields, each with its reason.

A preset gives some fields; the config file and the flags come before it. What is left keeps its
default.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gen_accel import demo
from gen_accel.hub import REPOSITORY, fetched
from gen_accel.json_files import read_fields
from gen_accel.names import nearest_to
from gen_accel.paths import expanded

STYLE_FRAMES, MOTION_FRAMES = 25, 49  # which autoencoders of 4, 6 and 8 frames a latent take
ABOUT = "gen_accel.json"  # beside a model, with the length that it was trained at


class Value(NamedTuple):
    """Value of a field, and the reason for it."""

    value: Any
    reason: str


class Preset(NamedTuple):
    """A preset without its stages, which depend on the model.

    Args:
        purpose: one line for people.
    """

    purpose: str
    values: Mapping[str, Value]


_MEASURED = Value(100, "a loss at fixed noise shows early whether it goes well")
PRESETS: dict[str, Preset] = {
    "longer": Preset(
        "twice the length that the model was made for, through sparse attention",
        {
            "method": Value("radial", "the attention of the published recipe"),
            "dense_layers": Value(2, "as published: the first blocks stay dense"),
            "dense_steps": Value(2, "as published: the first steps of a generation stay dense"),
            "rank": Value(128, "as published: length changes much in each attention"),
            "targets": Value(("attention",), "what is far and near is the attention's"),
            "timestep_sampling": Value("logit_normal", "all levels: structure and details"),
            "learning_rate": Value(1e-4, "usual for this rank"),
            "schedule": Value("constant", "more steps or a longer stage can follow by --resume"),
            "gradient_checkpointing": Value(True, "long clips need the memory"),
            "held_out": Value(4.0, "a model that repeats its clips shows here"),
            "loss_every": _MEASURED,
        },
    ),
    "style": Preset(
        "a look, from few short clips",
        {
            "method": Value("dense", "short clips leave nothing out"),
            "dense_layers": Value(0, "all attention is dense"),
            "dense_steps": Value(0, "all attention is dense"),
            "rank": Value(
                16, "a look is little to learn, and a low rank learns few clips by heart"
            ),
            "targets": Value(
                ("attention", "feed_forward"), "colours and textures lie in the layers between"
            ),
            "timestep_sampling": Value("uniform", "a look is made at all noise levels alike"),
            "learning_rate": Value(1e-4, "usual for this rank"),
            "ema_decay": Value(0.99, "the average of few clips is calmer"),
            "loss_every": _MEASURED,
        },
    ),
    "motion": Preset(
        "a movement, from clips of one length that show it",
        {
            "method": Value("radial", "as long clips are generated later"),
            "rank": Value(32, "between a look and a length"),
            "targets": Value(("attention",), "movement is what frames see of one another"),
            "timestep_sampling": Value("uniform", "with shift: mostly high noise"),
            "shift": Value(10.0, "movement is decided at high noise, looks are not touched"),
            "learning_rate": Value(1e-4, "usual for this rank"),
            "ema_decay": Value(0.99, "the average of few clips is calmer"),
            "loss_every": _MEASURED,
        },
    ),
}


def preset(
    name: str, model: str = demo.NAME, *, trained_frames: int | None = None
) -> dict[str, Any]:
    """Return the fields of a preset for a model.

        TrainConfig(**(preset("longer", MODEL) | {"model": MODEL, "data": "clips"}))

    Args:
        name: "longer", "style" or "motion".
        model: folder or hub repository of the pipeline, or "demo"; decides the stages.
        trained_frames: frames that the model was trained on; None for what is known of it.

    Raises:
        ValueError: an unknown name, or a model whose length is not known, for "longer".
        OSError: a model that is neither here nor on the hub, for "longer".
    """
    check_name(name)
    return {field: one.value for field, one in PRESETS[name].values.items()} | {
        "stages": _stages(name, model, trained_frames)
    }


def check_name(name: str) -> None:
    """Raise ValueError for a name of no preset."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(
            f"preset must be one of {known}, got {name!r}{nearest_to(name, tuple(PRESETS))}"
        )


def with_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill up the fields that are given with a preset's.

    Raises ValueError as `preset` does, and for an adapter that is no LoRA.
    """
    check_name(name)
    if given.get("adapter", "lora") != "lora":
        raise ValueError(f"preset {name} is for a LoRA, got adapter {given['adapter']!r}")
    values = {field: one.value for field, one in PRESETS[name].values.items()}
    if "stages" not in given:
        model, trained = str(given.get("model", demo.NAME)), given.get("trained_frames")
        values["stages"] = _stages(name, model, trained)
    return values | dict(given)


def _stages(name: str, model: str, trained: int | None) -> tuple[str, ...]:
    if name == "longer":
        trained = trained or _trained_frames(model)
        longer = _whole(model, 2 * trained - 1)
        return f"{trained}:200", f"{longer}:1500:position_interpolation"
    asked = {"style": STYLE_FRAMES, "motion": MOTION_FRAMES}[name]
    return (f"{_whole(model, min(asked, trained or _said_of(model) or asked))}:1500",)


def _whole(model: str, frames: int) -> int:
    """Add the frames that fill the last patch in time, of models whose patches join latents."""
    from gen_accel.attention_processors.families import family_named, served_classes

    try:
        kind, sizes = _transformer(model, fetch=False)
    except OSError:  # it is not here, and its sizes are not known without it
        return frames
    if kind not in served_classes():
        return frames
    factor = family_named(served_classes()[kind]).sizes.temporal
    joined = sizes.get("patch_size_t") or 1
    return frames if factor is None else frames + (joined - 1) * factor


def _said_of(model: str) -> int | None:
    """Frames that a folder itself says the model was trained on; None where it says nothing."""
    about = expanded(demo.model_named(model)) / ABOUT
    found = read_fields(about).get("trained_frames") if about.is_file() else None
    return found if isinstance(found, int) else None


def _trained_frames(model: str) -> int:
    """Frames that a model was trained on, by its folder, its published name or its class."""
    from gen_accel.attention_processors.families import family_named, served_classes

    said = _said_of(model)
    if said is not None:
        return said
    kind, sizes = _transformer(model)
    family: Any = family_named(served_classes()[kind]) if kind in served_classes() else None
    known = None if family is None else family.sizes_of(_Config(sizes)).frames
    if known is None:
        raise ValueError(
            f"preset longer needs the length that {model} was trained at, which is not known: "
            "give the curriculum, as --stages 81:200,161:1500"
        )
    return known


class _Config(dict[str, Any]):
    """A configuration whose missing entries are None, as defaults of the class are not at hand."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def _transformer(model: str, *, fetch: bool = True) -> tuple[str, dict[str, Any]]:
    """Return class and configuration of a model's transformer.

    Args:
        fetch: whether a small file of the hub may be fetched.

    Raises OSError for a model that is neither published nor here.
    """
    from gen_accel.attention_processors.families import families

    for family in families():
        for one in family.presets.values():
            if one.repository == model:
                return one.kind or family.classes[0], dict(one.config)
    folder = expanded(model)
    if not folder.exists() and not (fetch and REPOSITORY.fullmatch(model)):
        raise FileNotFoundError(f"no folder at {model}, and no repository is called like that")
    place = "transformer/config.json"
    config = read_fields(folder / place if folder.exists() else fetched(model, place))
    return str(config.get("_class_name")), config
