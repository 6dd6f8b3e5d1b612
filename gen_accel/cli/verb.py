"""Verbs whose flags are the fields of a config.

    @verb(app, EstimateConfig, short_help="What a run will cost.")
    def estimate(config: EstimateConfig) -> None:
        \"\"\"Text of --help.\"\"\"

Each field is a flag, `--like-this`, under the heading of its group. If the config has a `VERB`,
`--config FILE.yaml` takes fields from a file, and flags win over it; `--print-config` prints all
fields, `--print-schema` their schema.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperCommand

from gen_accel.config import Config, Option, read_mapping
from gen_accel.parsing import as_text, members

PRINTS = {
    "print_config": "Print all fields as YAML, and end.",
    "print_schema": "Print the JSON schema of such a file, and end.",
}
METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}

Run = TypeVar("Run", bound=Callable[..., None])
Reader = Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """A further flag that fields come from, in the place of a YAML file.

    Args:
        read: takes the path and the typed fields, and returns the fields in the file.
    """

    flag: str
    metavar: str
    help: str
    read: Reader


def verb(
    app: typer.Typer,
    config: type[Config],
    *,
    short_help: str,
    more: type[Config] | None = None,
    source: Source | None = None,
    positional: Sequence[str] = (),
    file_is_argument: bool = False,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Run], Run]:
    """Add a function of a config as a verb, named as the function.

    Args:
        more: options of the command line alone, which no file holds; the function takes them
            second.
        source: the function takes its path last, or None.
        positional: names of the fields that stand without a flag, in their order.
        file_is_argument: the YAML file stands without a flag, instead of after --config.
        example: fields that --print-config prints if they are not given.
    """

    def add(run: Run) -> Run:
        known = {**config.options(), **({} if more is None else more.options())}
        parameters: dict[str, tuple[Any, Any]] = {
            name: (_argument(known[name]), None) for name in positional
        }
        if config.VERB:
            parameters["config_file"] = _file(file_is_argument, config.VERB)
        if source is not None:
            about = typer.Option(source.flag, metavar=source.metavar, help=source.help)
            parameters["source_file"] = (Annotated[Path | None, about], None)
        for name, told in PRINTS.items() if config.VERB else ():
            flag = typer.Option(f"--{name.replace('_', '-')}", help=told)
            parameters[name] = (Annotated[bool, flag], False)
        for name, one in known.items():
            parameters.setdefault(name, (_flag(one), None))

        def command(**given: Any) -> None:
            fields = {name: given[name] for name in known}
            typed = {name: value for name, value in fields.items() if value not in (None, [], ())}
            for name, value in typed.items():
                if isinstance(value, list) and known[name].joined:
                    typed[name] = ",".join(value)
            extra = {name: typed.pop(name) for name in [*typed] if name not in config.options()}
            if given.get("print_schema"):
                typer.echo(config.json_schema(), nl=False)
                return
            held, origin = _held(config, typed, given, source)
            if given.get("print_config"):
                held = {**(example or {}), **held}
            for name in positional:
                if known[name].required and name not in {**held, **typed}:
                    raise ValueError(f"give {known[name].metavar}: {known[name].help}")
            made = config.read(held, typed, origin=origin)
            if given.get("print_config"):
                typer.echo(made.as_yaml(), nl=False)
            else:
                parts = [] if more is None else [more.read({}, extra)]
                run(made, *parts, *([] if source is None else [given["source_file"]]))

        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
            [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=value
                )
                for name, (kind, value) in parameters.items()
            ]
        )
        kind = type("Verb", (VerbCommand,), {"known": known})
        app.command(name=run.__name__.rstrip("_"), short_help=short_help, cls=kind)(command)
        return run

    return add


class VerbCommand(TyperCommand):
    """A command whose help has headings, and whose flags may stand bare, see `option`."""

    known: Mapping[str, Option] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        bare = {one.flag: one for one in self.known.values() if one.bare}
        found = []
        for arg, after in zip(args, [*args[1:], "-"], strict=False):
            off = bare.get(f"--{arg[5:]}") if arg.startswith("--no-") else None
            if arg in bare and (after.startswith("-") or after.endswith((".yaml", ".yml"))):
                found += [arg, bare[arg].bare]
            elif off is not None and "off" in off.words:
                found += [off.flag, "off"]
            else:
                found.append(arg)
        return super().parse_args(ctx, found)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(group, []).append(record)
        options = groups.pop("Options", [])
        for group, records in [*groups.items(), ("Options", options)]:
            with formatter.section(group):
                formatter.write_dl(records)


def _file(is_argument: bool, name: str) -> tuple[Any, None]:
    if is_argument:
        return Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml")], None
    told = f"YAML file of fields, as `gen-accel {name} --print-config` prints it; flags win."
    return Annotated[Path | None, typer.Option("--config", metavar="FILE.yaml", help=told)], None


def _held(
    config: type[Config], typed: Mapping[str, Any], given: Mapping[str, Any], source: Source | None
) -> tuple[Mapping[Any, Any], str]:
    """Return the fields of the one file that is given, and the file's name."""
    file, other = given.get("config_file"), given.get("source_file")
    if file is not None and other is not None:
        raise ValueError(
            f"settings come from one file, got {other.name} and {file.name}: leave one out"
        )
    if file is not None:
        return read_mapping(file, verb=config.VERB), file.name
    if other is not None and source is not None:
        return source.read(other, typed), other.name
    return {}, ""


def _argument(one: Option) -> Any:
    kind = list[str] if one.kind is tuple else str
    return Annotated[kind | None, typer.Argument(metavar=_metavar(one), help=one.help)]


def _flag(one: Option) -> Any:
    """Annotation of a flag. Its text is converted by the config; None is not given."""
    default = "" if one.default in (None, ()) or one.default is False else as_text(one.default)
    if one.default is True:
        default = one.flag[2:]
    told = f"{one.help} [default: {default}]" if default else one.help
    if one.kind is bool:
        word = one.flag[2:]
        off = f"without-{word[5:]}" if word.startswith("with-") else f"no-{word}"
        about = typer.Option(f"--{word}/--{off}", help=told, rich_help_panel=one.group)
        return Annotated[bool | None, about]
    about = typer.Option(one.flag, metavar=_metavar(one), help=told, rich_help_panel=one.group)
    return Annotated[(list[str] if one.kind is tuple else str) | None, about]


def _metavar(one: Option) -> str:
    if one.metavar:
        return one.metavar
    if one.words:
        return "|".join(map(str, one.words))
    if one.kind is not tuple:
        return METAVARS.get(one.kind, "TEXT")
    items = next(get_args(part) for part in members(one.hint) if get_args(part))
    word = METAVARS.get(items[0], "TEXT")
    return f"{word},..." if one.joined else word
