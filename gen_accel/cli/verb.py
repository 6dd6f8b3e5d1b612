"""Verbs whose flags are the fields of a config.

    @verb(app, EstimateConfig, short_help="What a run will cost.")
    def estimate(config: EstimateConfig) -> None:
        \"\"\"Text of --help.\"\"\"

Each field is a flag, `--like-this`, under the heading of its group. If the config has a `VERB`,
`--config FILE.yaml` takes fields from a file, and flags win over it; `--print-config` prints all
fields, `--print-schema` their schema.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperArgument, TyperCommand

from gen_accel.config import Config, Option, check_outputs, read_mapping
from gen_accel.parsing import as_text, members

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

PRINTS = {
    "print_config": "All fields as YAML, in place of a run.",
    "print_schema": "JSON schema of such a file, in place of a run.",
}
ABOUT_FILE = "YAML file of fields, as --print-config prints it; flags win."
METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}

Run = TypeVar("Run", bound=Callable[..., None])
Reader = Callable[[Path, Mapping[str, object]], Mapping[str, object]]


def verb(
    app: typer.Typer,
    config: type[Config],
    *,
    short_help: str,
    more: type[Config] | None = None,
    sources: Mapping[str, Reader] | None = None,
    positional: Sequence[str] = (),
    example: Mapping[str, object] | None = None,
) -> Callable[[Run], Run]:
    """Add a function of a config as a verb, named as the function.

    Args:
        more: options of the command line alone, which no file holds; the function takes them
            second.
        sources: options of `more` that name a file to take fields from, in the place of a YAML
            file. A reader takes the path and the typed fields.
        positional: names of the fields that stand without a flag, in their order; "config" is the
            YAML file.
        example: fields that --print-config prints if they are not given.
    """

    def add(run: Run) -> Run:
        known = {**config.options(), **({} if more is None else more.options())}
        readers: dict[str, Reader] = {
            "config": lambda path, typed: read_mapping(path, verb=config.VERB),
            **(sources or {}),
        }
        file = typer.Option("--config", metavar="FILE.yaml", help=ABOUT_FILE)
        if "config" in positional:
            file = typer.Argument(metavar="CONFIG.yaml", help=ABOUT_FILE)
        fields = [name for name in positional if name in known]
        labels = {name: _metavar(known[name]).rstrip(".") for name in fields}
        parameters: dict[str, tuple[object, bool | None]] = {}
        for name in fields:
            kind = list[str] if known[name].kind is tuple else str
            about = typer.Argument(metavar=_metavar(known[name]), help=known[name].help)
            parameters[name] = Annotated[kind | None, about], None
        if config.VERB:
            parameters["config"] = Annotated[Path | None, file], None
            for name, told in PRINTS.items():
                flag = typer.Option(f"--{name.replace('_', '-')}", help=told)
                parameters[name] = Annotated[bool, flag], False
        for name, one in known.items():
            parameters.setdefault(name, (_flag(one), None))

        def command(**given: Any) -> None:
            if given.get("print_schema"):
                typer.echo(config.json_schema(), nl=False)
                return
            typed = {name: given[name] for name in known if given[name] not in (None, [], ())}
            for name, value in typed.items():
                if isinstance(value, list) and known[name].joined:
                    typed[name] = ",".join(value)
            extra = {name: typed.pop(name) for name in [*typed] if name not in config.options()}
            files = {name: Path(given[name]) for name in readers if given.get(name) is not None}
            if len(files) > 1:
                one, other = (file.name for file in files.values())
                raise ValueError(
                    f"settings come from one file, got {other} and {one}: leave one out"
                )
            held: dict[Any, object] = {**(example or {})} if given.get("print_config") else {}
            for name, path in files.items():
                held |= readers[name](path, typed)
            for name in fields:
                if known[name].required and name not in {**held, **typed}:
                    raise ValueError(f"give {known[name].metavar}: {known[name].help}")
            origin = next((path.name for path in files.values()), "")
            made = config.read(held, typed, origin=origin)
            if given.get("print_config"):
                typer.echo(made.as_yaml(), nl=False)
                return
            configs = [made, *([] if more is None else [more.read({}, extra)])]
            if os.environ.get("RANK", "0") == "0":  # of a launch, one process looks for all
                file = {"--config": [files["config"]]} if "config" in files else {}
                check_outputs(*configs, files=file, labels=labels)
            run(*configs)

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

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
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

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, TyperArgument):
                name, _, _ = record[0].partition(" <")  # of a type in Python's words
                groups.setdefault("Arguments", []).append((name, record[1]))
            elif record is not None:
                group = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(group, []).append(record)
        last = {name: groups.pop(name) for name in ("Output", "Options") if name in groups}
        for group, records in {**groups, **last}.items():
            with formatter.section(group):
                formatter.write_dl(records)


def _flag(one: Option) -> object:
    """Annotation of a flag. Its text is converted by the config; None is not given."""
    default = "" if one.default in (None, ()) or one.default is False else as_text(one.default)
    if one.default is True:
        default = one.flag[2:]
    told = f"{one.help} [default: {default}]" if default else one.help
    if one.kind is bool:
        word = one.flag[2:]
        off = f"without-{word[5:]}" if word.startswith("with-") else f"no-{word}"
        both = f"--{word}" if word.startswith("no-") else f"--{word}/--{off}"
        about = typer.Option(both, help=told, rich_help_panel=one.group)
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
