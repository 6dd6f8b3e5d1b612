"""Fields of a training's config on its page, and the YAML file that they stand for."""

import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from gen_accel.config_files import Field, as_yaml, checked, read_mapping
from gen_accel.demo import NAME, TRAINED_FRAMES
from gen_accel.lora.config import TrainConfig, config_fields, print_config, read_values
from gen_accel.lora.presets import PRESETS, with_preset
from gen_accel.ui.files import no_code

EXTRA = "ui"
FILE = "config.yaml"  # what errors call the YAML on the page
WITHOUT = "none"  # the choice of no value, and of no preset
# Of the embedded model's clips, which knows no others.
DEMO: dict[str, Any] = {"height": 96, "width": 96, "stages": [f"{TRAINED_FRAMES}:200"]}
WHERE = ("model", "data", "out")  # fields that say what is trained on what
# Fields that matter first, in this order; all others are folded, by their groups.
MATTER = (
    *("stages", "height", "width", "fps", "rank", "learning_rate", "batch_size"),
    *("base", "blocks_to_swap", "gradient_checkpointing"),
    *("held_out", "loss_every", "validate_every", "validation_prompts", "checkpoint_every"),
)

Check = Callable[[Mapping[str, Any]], None]  # raises ValueError for values that are refused
Kind = Literal["choice", "switch", "number", "text", "lines"]


class Control(NamedTuple):
    """Control that a field is entered by.

    Args:
        kind: "lines" has one item a line.
        is_open: whether it may have no value.
        choices: of "choice".
        whole: of "number".
    """

    field: Field
    kind: Kind
    is_open: bool = False
    choices: tuple[str, ...] = ()
    whole: bool = False


def controls() -> dict[str, Control]:
    """Map the names of all fields to how they are entered."""
    return {one.name: control_of(one) for one in config_fields()}


def control_of(field: Field) -> Control:
    hint, origin, inner = field.hint, get_origin(field.hint), get_args(field.hint)
    is_open = origin in (Union, types.UnionType) and types.NoneType in inner
    if is_open:
        rest = [part for part in inner if part is not types.NoneType]
        hint, origin, inner = rest[0], get_origin(rest[0]), get_args(rest[0])
    if origin is Literal:
        choices = (*((WITHOUT,) if is_open else ()), *map(str, inner))
        return Control(field, "choice", is_open, choices)
    if hint is bool:
        return Control(field, "switch")
    if origin is tuple:
        return Control(field, "lines")
    if hint in (int, float) and not is_open:
        return Control(field, "number", whole=hint is int)
    return Control(field, "text", is_open)


def to_page(control: Control, value: Any) -> Any:
    """Return a field's value as its control holds it."""
    match control.kind:
        case "choice":
            return WITHOUT if value is None else str(value)
        case "lines":
            return "\n".join(map(str, value))
        case "text":
            return "" if value is None else str(value)
    return value


def from_page(control: Control, entered: Any) -> Any:
    """Return what was entered as a YAML file would give it; the schema checks it."""
    match control.kind:
        case "lines":
            return [line.strip() for line in str(entered or "").splitlines() if line.strip()]
        case "text":
            text = str(entered or "")
            return None if control.is_open and not text.strip() else text
        case "choice":
            return None if control.is_open and entered == WITHOUT else entered
    return entered


class Written(NamedTuple):
    """A config as YAML.

    Args:
        text: what `gen-accel train --print-config` prints; where the config is refused, the
            fields as they were entered.
        objection: the library's sentence; None for a config that is not refused.
        config: None where it is refused.
    """

    text: str
    objection: str | None
    config: TrainConfig | None


def write_yaml(values: Mapping[str, Any], check: Check = no_code) -> Written:
    """Write the YAML file of values, as YAML or a page gives them.

    Args:
        check: sees the values before the library, which may import what they name.
    """
    found: Mapping[str, Any] = values
    try:
        check(values)
        found = checked(config_fields(), values, extra=EXTRA)
        config = TrainConfig(**found)
    except (ValueError, OSError, ImportError) as error:
        return _refused(found, str(error))
    except Exception as error:  # else the form would stay as it was, without a word
        return _refused(found, f"this cannot be checked: {type(error).__name__}: {error}")
    return Written(print_config(config), None, config)


def write_unchecked(values: Mapping[str, Any]) -> str:
    """Write the YAML file of values that are right, without the seconds that a check takes."""
    return as_yaml(config_fields(), values, extra=EXTRA)


def read_yaml(text: str, check: Check = no_code) -> dict[str, Any]:
    """Read the fields that a YAML text gives, as `gen-accel train FILE` does.

    Raises ValueError as `read_values` and `check` do.
    """
    with tempfile.TemporaryDirectory(prefix="gen-accel-") as folder:
        path = Path(folder) / FILE
        path.write_text(text, encoding="utf-8")
        try:
            check(read_mapping(path, verb="train", extra=EXTRA))
            values = read_values(path)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(str(error).replace(str(path), FILE)) from None
    check(values)
    return values


def config_of(text: str, check: Check = no_code) -> TrainConfig:
    """Make the config of a YAML text. Raises ValueError, OSError or ImportError for what the
    library or `check` refuses."""
    return TrainConfig(**read_yaml(text, check))


def all_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill up values with the defaults of the fields."""
    return {one.name: given.get(one.name, one.default) for one in config_fields()}


def starting_values(
    model: str, preset: str | None, places: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the values of a page on which nothing was entered yet.

    They are `gen-accel train --model MODEL --preset PRESET --print-config`, and for the embedded
    model also the size of its clips, with their length where no preset says more.

    Args:
        places: values of fields that name folders, of this page.

    Raises ValueError and OSError as `presets.preset` does.
    """
    given: dict[str, Any] = {"model": model, **(places or {})}
    if model == NAME:
        given |= DEMO
        if preset is not None:
            del given["stages"]
    found = given if preset is None else with_preset(preset, given)
    return all_values(checked(config_fields(), found, extra=EXTRA))


def with_purpose(
    values: Mapping[str, Any], before: Mapping[str, Any], preset: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Change model or preset, and keep what the person entered.

    Args:
        values: of all fields, as they are now, the new model among them.
        before: values that model and preset gave until now; what differs was entered.

    Returns:
        All values, and those that model and preset give.

    Raises ValueError for a value of a wrong type, and as `presets.preset` does, OSError too.
    """
    values = checked(config_fields(), values, extra=EXTRA)
    entered = {
        name: value
        for name, value in values.items()
        if name != "model" and _plain(value) != _plain(before.get(name))
    }
    places = {"out": str(before["out"])}
    start = starting_values(str(values["model"]), preset, places)
    return {**start, **entered}, start


def purposes() -> list[tuple[str, str]]:
    """Choices of a preset, in words and by name."""
    named = [(f"{name}: {one.purpose}", name) for name, one in PRESETS.items()]
    return [("none: all fields as they are", WITHOUT), *named]


def folded() -> dict[str, list[str]]:
    """Map the groups to the names of their fields that do not matter first."""
    found: dict[str, list[str]] = {}
    for one in config_fields():
        if one.name not in (*WHERE, *MATTER):
            found.setdefault(one.group, []).append(one.name)
    return found


def in_words(config: TrainConfig) -> str:
    """Say in a line what a config trains."""
    stages = ", then ".join(
        f"{one.steps:,} steps at {one.frames} frames" for one in config.curriculum
    )
    sizes = " and ".join(f"{height} x {width}" for height, width in config.clip_sizes)
    what = f"a LoRA of rank {config.rank}" if config.adapter == "lora" else "an image prompt"
    clips = config.batch_size * config.gradient_accumulation
    each = f"{clips} clip{'s' if clips > 1 else ''} a step"
    return f"{what} for {config.model}: {stages}, of {sizes} pixels, {each}"


def _refused(values: Mapping[str, Any], sentence: str) -> Written:
    return Written(as_yaml(config_fields(), values, extra=EXTRA), sentence, None)


def _plain(value: Any) -> Any:
    """Return a list for what is a tuple by default, to compare them."""
    return [*value] if isinstance(value, list | tuple) else value
