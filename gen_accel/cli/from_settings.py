"""`gen-accel generate --from-settings`: the options that a clip was made with."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel.cli.verb_fields import fields_of, take, typed_on
from gen_accel.demo import adapter_named, model_named
from gen_accel.hub import parted
from gen_accel.names import PRESETS
from gen_accel.values import shown


class OtherThanMade(UserWarning):
    """A clip is made again with other versions or files."""


def load_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options that a clip was made with, where the command line does not give them."""
    if path is None:
        return None
    from gen_accel.measure.clip_settings import read_settings

    found, typed = read_settings(path), typed_on(context)
    method = found.fields.get("method")
    if ":" in str(method) and "method" not in typed:
        raise ValueError(
            f"{path} names code of its maker, {shown(method)}, which is imported only where you "
            f"ask for it: add --method {method}"
        )
    for name, value in found.wordless.items():
        if name not in typed and not (name == "method" and "preset" in typed):
            option = name.replace("_", "-")
            raise ValueError(f"{path} was made with {value}, which no word gives: add --{option}")
    take(context, found.fields, origin=path.name)
    context.meta["settings"] = found
    return path


def check_settings(context: typer.Context) -> None:
    """Warn of versions and files that are others than a clip of --from-settings was made with."""
    found: Any = context.meta.get("settings")
    if found is None:
        return
    from gen_accel.measure.clip_settings import other_versions

    origin = context.meta["taken"]
    typer.echo(f"{origin}: model {found.fields.get('model')}", err=True)
    if others := other_versions(found.made_by):
        _warn(f"{origin} was made by {others}: pixels may differ")
    names = {field.name: name for name, field in fields_of(context).items()}
    for option, files in found.files.items():
        name = names.get(option, "")
        source = getattr(context.get_parameter_source(name), "name", "")
        if source != "DEFAULT_MAP" or not isinstance(files, dict):
            continue
        for file, earlier in files.items():
            if earlier is not None and _fingerprint(option, file) not in (None, earlier):
                _warn(f"{option} {file} is not what {origin} was made with: pixels may differ")


def _warn(told: str) -> None:
    warnings.warn(told, OtherThanMade, stacklevel=3)


def _fingerprint(option: str, name: str) -> str | None:
    """Fingerprint what an option names now; None where it is not there."""
    from gen_accel.measure.clip_settings import fingerprint

    match option:
        case "model":
            return fingerprint(model_named(name))
        case "image_adapter":
            return fingerprint(adapter_named(name))
        case "lora":
            return fingerprint(parted(name)[0])
        case "preset" if name in PRESETS:
            box = Path(__file__).parents[1] / "presets"
            return fingerprint(*sorted(box.glob(f"*-{name}.json")))
    return fingerprint(name)


FromSettings = Annotated[
    Path | None,
    typer.Option(
        "--from-settings",
        metavar="CLIP",
        is_eager=True,
        callback=load_settings,
        help="Make a clip again, by what its .mp4, .gif, .png or .json says; what is typed here "
        "wins.",
    ),
]
