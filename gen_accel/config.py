"""Configs: a field is declared once; checks, flags, YAML, schema, form and settings come from it.

    class ClipConfig(Config):
        VERB = "generate"
        frames: int | None = option(None, "Clip", "Number of frames. Default: the model's.", ge=1)
        dtype: Literal["auto", "float16"] = option("auto", "Loading", "Floating-point type.")

    ClipConfig(frames=33)                             a ValueError says name, rule and value
    ClipConfig.read({"frames": "33"}, origin="a.yaml")      values as a file or a form has them
    ClipConfig.from_yaml("a.yaml", {"frames": "9"})   a file, and the flags that win over it
    ClipConfig.options()                              an `Option` a field, for a form
    ClipConfig.json_schema()
    config.as_yaml()                                  all fields, with the help as comments
    config.given(), config.kept()        fields off their defaults; those a clip keeps
    config.replaced(frames=9), config.is_given("frames")
    config.inputs(), config.outputs()    files that are read and written, by field

`gen_accel.cli.verb` makes a verb of a config and a function. Fields that several configs share
stand in a base class of theirs, so that a config is flat. Values are read leniently: 1e-4 as text,
5.0 for 5, no for "no", one item for a list of one, "none" for None, "0.9,0.99" for numbers.

A config checks types and limits when it is made. Its method `check`, if it has one, checks what
goes together and what lies on the disk, without torch; the rest is checked where it is needed.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin

from gen_accel.io import DEEPEST, read_text, too_deep
from gen_accel.parsing import as_text, convert, example, members, shown, wrong_type
from gen_accel.paths import Named, check_places
from gen_accel.registry import nearest_to, needed_for

with needed_for("a config", extra="video"):
    from pydantic import (
        BaseModel,
        ConfigDict,
        TypeAdapter,
        ValidationError,
        ValidationInfo,
        field_validator,
    )
    from pydantic import Field as _Field

if TYPE_CHECKING:
    from typing_extensions import Self

Accept = Literal["", "image", "video"]
Reads = Callable[[str], str | Path | Iterable[Path]]
MOST_VALUES = 20_000  # of a YAML file, with those that an alias repeats
# What YAML may read as a number that is too large to be one, and takes minutes to read.
LONG_NUMBER = re.compile(r"[-+]?[.\d][-+.:\w]{308,}")


def option(
    default: Any,
    group: str,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    name: str = "",
    metavar: str = "",
    choices: Collection[str] = (),
    commas: bool = False,
    bare: str = "",
    kept: bool = True,
    accept: Accept = "",
    longest: int | None = None,
    reads: Reads | None = None,
    writes: bool = False,
    form: str = "",
) -> Any:
    """Declare a field of a `Config`.

    Args:
        default: `...` for a required field.
        group: heading in help, YAML and form.
        help: noun phrase with its unit, which reads without the name beside it.
        ge, gt, le, lt: limits of a number.
        name: name outside of Python, if the attribute cannot have it.
        metavar: placeholder of the value in the help of a flag.
        choices: words to offer; other words are taken too. A closed set is a Literal.
        commas: text is several values with commas between.
        bare: value of a flag that is typed without one.
        kept: settings of a clip hold it. False for what does not change a clip, and for each place
            to write to.
        accept: kind of file, for a form.
        longest: number of characters that a text may have.
        reads: takes a value to the files and folders that it names. Default: of a path, itself.
        writes: whether the path is one to write to.
        form: help in a form, if `help` has words of a command line.
    """
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    given = {rule: limit for rule, limit in limits.items() if limit is not None}
    required = default is ...
    about = Option(
        default=None if required else default,
        required=required,
        help=help,
        group=group,
        metavar=metavar,
        choices=tuple(choices),
        commas=commas,
        bare=bare,
        kept=kept,
        accept=accept,
        longest=longest,
        reads=reads,
        writes=writes,
        form=form or help,
        limits=given,
    )
    return _Field(
        default,
        description=help,
        json_schema_extra=about,
        alias=name or None,
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
    )


class Words:
    """Mark a field that takes an object from Python, and elsewhere the words that stand for it:
    `Annotated[object, Words(str | None)]`."""

    def __init__(self, hint: Any) -> None:
        self.hint = hint

    def __get_pydantic_json_schema__(self, core: object, handler: object) -> dict[str, object]:
        return TypeAdapter(self.hint).json_schema()


@dataclass(frozen=True)
class Option:
    """A field of a config, as a flag, a file or a form has it; see `option`.

    Args:
        default: None for a required field.
        limits: of a number, by "ge", "gt", "le" and "lt".
        name: in files; flags have hyphens.
        attribute: in Python.
        hint: type of the words.
        takes_objects: whether Python gives other values than words too.
    """

    default: Any
    required: bool
    help: str
    group: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    commas: bool = False
    bare: str = ""
    kept: bool = True
    accept: Accept = ""
    longest: int | None = None
    reads: Reads | None = None
    writes: bool = False
    form: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    attribute: str = ""
    hint: object = None
    takes_objects: bool = False

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add what pydantic does not know to the field's JSON schema."""
        if self.choices:
            schema["examples"] = [*self.choices]

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def kind(self) -> object:
        """Class of a value: `bool`, `int`, `float`, `str`, `Path`, or `tuple` for several."""
        if self.words:
            return str
        parts = [get_origin(part) or part for part in members(self.hint)]
        return tuple if tuple in parts else next(part for part in parts if part is not NoneType)

    @property
    def words(self) -> tuple[str, ...]:
        """Closed set of words; empty if any value of the type may stand here."""
        parts = [part for part in members(self.hint) if part is not NoneType]
        if any(get_origin(part) is not Literal for part in parts):
            return ()
        return tuple(word for part in parts for word in get_args(part))

    def sources(self, text: str) -> list[Path]:
        """Return the files and folders that a value names; none if the field names no files."""
        found = () if self.reads is None else self.reads(text)
        return [Path(found)] if isinstance(found, str | Path) else [*found]

    @property
    def joined(self) -> bool:
        """Whether text of several values has commas between."""
        items = [item for part in members(self.hint) for item in get_args(part)]
        return self.commas or int in items or float in items

    @property
    def rule(self) -> str:
        """The limits in words, such as "at least 1"."""
        low, high = self.limits.get("ge"), self.limits.get("le")
        if low is not None and high is not None:
            return f"from {_number(low)} to {_number(high)}"
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        told = [f"{words[k]} {_number(self.limits[k])}" for k in words if k in self.limits]
        return " and ".join(told) or "finite"

    def read(self, value: object) -> object:
        """Convert a value as YAML, a command line or Python has it.

        Raises:
            _WrongType: it is of another type.
            ValueError: text that is not UTF-8, or too long.
        """
        if self.commas and isinstance(value, str) and value.lower() != "none":
            value = [part.strip() for part in value.split(",") if part.strip()]
        try:
            found = convert(value, self.hint)
        except (TypeError, ValueError, OverflowError):
            if not self.takes_objects or (is_words(value) and value != []):
                raise _WrongType from None
            return tuple(value) if isinstance(value, list) else value
        for text in found if isinstance(found, tuple) else (found,):
            if isinstance(text, str):
                check_text(self.name, text, self.longest)
        return found


class Config(BaseModel):
    """Base of all configs, see the module."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        defer_build=True,  # until the first config is made: help needs the fields alone
        protected_namespaces=(),
        validate_by_alias=True,
        validate_by_name=True,
    )

    VERB: ClassVar[str] = ""  # whose --print-config writes such a file
    # Fields that, when typed, leave others of a file out: (typed, left out).
    RIVALS: ClassVar[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = ()

    def __init__(self, **given: Any) -> None:
        self._take(given)

    @classmethod
    def read(
        cls,
        held: Mapping[Any, object],
        typed: Mapping[str, object] | None = None,
        *,
        origin: str = "",
    ) -> "Self":
        """Make a config from the fields of a file, and from the flags that win over them.

        Args:
            held: with hyphens or underscores.
            origin: name of the file, for errors.

        Raises:
            ValueError: an unknown field (the error names the nearest), a value of a wrong type, or
                one outside of its limits.
        """
        typed, found = typed or {}, dict[Any, object]()
        for key, value in held.items():
            name = key.replace("-", "_") if isinstance(key, str) else key
            if name in found:
                raise ValueError(f"{origin}: {name} is given twice")
            found[name] = value
        for names, others in cls.RIVALS:
            if typed.keys() & {*names}:
                found = {name: value for name, value in found.items() if name not in others}
        self = cls.__new__(cls)
        self._take({**found, **typed}, origin, typed)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, typed: Mapping[str, object] | None = None) -> "Self":
        """Read a YAML file of `name: value`; raises as `read_mapping` and `read` do."""
        return cls.read(read_mapping(path, verb=cls.VERB), typed, origin=Path(path).name)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return what each field is, by its name in files."""
        return _options(cls)

    @classmethod
    def json_schema(cls) -> str:
        """Write the JSON schema by which editors check a YAML file."""
        schema = cls.model_json_schema()
        schema["title"] = f"gen-accel {cls.VERB}".strip()
        return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"

    def values(self) -> dict[str, object]:
        """Return all fields, as YAML holds them."""
        return {
            name: written(getattr(self, one.attribute)) for name, one in self.options().items()
        }

    def as_yaml(self) -> str:
        """Write all fields as YAML, each with its help as a comment, by groups."""
        yaml, values, groups = _yaml(), self.values(), dict[str, list[str]]()
        for name, one in self.options().items():
            text = yaml.safe_dump(values[name], default_flow_style=True, width=float("inf"))
            line = f"{name}: {text.removesuffix('...' + chr(10)).strip()}  # {one.help}"
            groups.setdefault(one.group, [f"# {one.group}"]).append(line)
        return "\n\n".join("\n".join(lines) for lines in groups.values()) + "\n"

    def is_given(self, name: str) -> bool:
        """Whether a field differs from its default."""
        one = self.options()[name]
        value = getattr(self, one.attribute)
        if one.required or not is_words(value):  # such as an array, compared by element
            return one.required or value is not one.default
        return value != one.default

    def given(self) -> dict[str, object]:
        """Return the fields that differ from their defaults, as YAML holds them."""
        return {name: value for name, value in self.values().items() if self.is_given(name)}

    def kept(self) -> dict[str, object]:
        """Return the fields that a clip keeps, as YAML holds them: also defaults, which may change
        in a later version, but nothing that is None or empty."""
        return {
            name: value
            for name, value in self.values().items()
            if self.options()[name].kept and value is not None
            if not isinstance(value, list) or value
        }

    def inputs(self) -> dict[str, list[Path]]:
        """Return the files and folders that are read, by field."""
        found = dict[str, list[Path]]()
        for name, one in self.options().items():
            value = getattr(self, one.attribute)
            texts = value if isinstance(value, list | tuple) else [value]
            named = [one.sources(str(text)) for text in texts if isinstance(text, str | Path)]
            found[name] = [place for several in named for place in several]
        return found

    def outputs(self) -> dict[str, list[Path]]:
        """Return the files, and the folders that are replaced whole, that are written, by
        field."""
        held = {n: getattr(self, one.attribute) for n, one in self.options().items() if one.writes}
        return {name: [Path(place)] for name, place in held.items() if place is not None}

    def new_outputs(self) -> dict[str, list[Path]]:
        """Return the outputs that must not be there yet, by field: all but those that an earlier
        run may have left for this one to go on with."""
        return self.outputs()

    @property
    def writes_alone(self) -> bool:
        """Whether a run writes what these fields name and nothing else, as a plan of its cost."""
        return False

    def check_only(self, name: str, *others: str) -> None:
        """Raise ValueError for fields beside `name` and `others`, which `name` makes void."""
        known = self.options()
        if wrong := [known[one].flag for one in self.given() if one not in (name, *others)]:
            allowed = ", ".join(known[one].flag for one in others)
            raise ValueError(
                f"{known[name].flag} goes with {allowed} only, got {', '.join(wrong)}"
            )

    def replaced(self, **changed: Any) -> "Self":
        """Return a config with other values of some fields, checked."""
        held = {one.attribute: getattr(self, one.attribute) for one in self.options().values()}
        return type(self)(**(held | changed))

    def _take(
        self, given: Mapping[Any, object], origin: str = "", typed: Collection[str] = ()
    ) -> None:
        known = self.options()
        names = {*known, *(one.attribute for one in known.values())}
        if unknown := [name for name in given if name not in names]:
            raise _unknown(unknown[0], known, origin)
        try:
            self.__pydantic_validator__.validate_python({**given}, self_instance=self)
        except ValidationError as error:
            raise _sentence(error, known, given, origin, typed) from None

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> object:
        return next(o for o in cls.options().values() if o.attribute == info.field_name).read(
            value
        )


def read_mapping(path: str | Path, *, verb: str) -> dict[Any, object]:
    """Read a YAML file that holds fields as `name: value`.

    Args:
        verb: prints such a file by --print-config, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping of plain values, or one of too many, or a folder.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        command = f"gen-accel {verb} --print-config > {Path(path).name}"
        raise FileNotFoundError(f"no config at {path}; `{command}` writes one") from None
    except IsADirectoryError:
        data = f"; a folder of clips is --data {path}" if verb in ("train", "cache") else ""
        raise ValueError(f"{path} is a folder, and a config is a YAML file{data}") from None
    return mapping_in(text, path)


def mapping_in(text: str, origin: str | Path) -> dict[Any, object]:
    """Read text of YAML that holds fields as `name: value`, which came from `origin`.

    Raises ValueError as `read_mapping` does.
    """
    yaml = _yaml()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is 10 times as fast
    try:
        _check_yaml(yaml, yaml.parse(text, loader), origin)
        try:
            loaded = yaml.load(text, loader)
        except ValueError as error:  # a date without such a day
            raise ValueError(f"{origin} holds no value of YAML: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{origin} must hold fields as `name: value`, got {shown(loaded)}")
    return dict(loaded)


def _check_yaml(yaml: ModuleType, events: Iterable[Any], path: str | Path) -> None:
    """Refuse YAML of which a short file makes large, deep or endless values, before it does."""
    total, sizes = 0, dict[str | None, int]()
    within: list[tuple[str | None, int]] = []  # anchor of each open list, and values before it
    for event in events:
        where = f"{path}, line {event.start_mark.line + 1},"
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in within):
                raise ValueError(f"{where} has *{event.anchor} within itself: write the values")
            total += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            sizes[anchor] = total - before
        elif isinstance(event, yaml.NodeEvent):
            if event.tag not in (None, "!"):
                raise ValueError(f"{where} has the tag {shown(event.tag)}: leave it out")
            if isinstance(event, yaml.CollectionStartEvent):
                within.append((event.anchor, total))
            elif event.implicit[0] and LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"{where} has a number of {len(event.value):,} digits")
            else:
                sizes[event.anchor] = 1
            total += 1
        if len(within) > DEEPEST:
            raise too_deep(path)
        if total > MOST_VALUES:
            raise ValueError(f"{where} is beyond {MOST_VALUES:,} values, the most that are read")


def check_text(name: str, text: str, longest: int | None = None) -> None:
    """Raise ValueError for text of over `longest` characters, or that is not UTF-8, which a
    terminal may pass on and no tokenizer takes."""
    if longest is not None and len(text) > longest:
        most, came = f"{longest:,} characters", f"{len(text):,}: {shown(text[:longest])}"
        raise ValueError(f"{name} must have at most {most}, got {came}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {shown(text)}") from None


def written(value: object) -> object:
    """Return a value as YAML and JSON hold it."""
    if isinstance(value, list | tuple):
        return [written(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class Outputs(Config):
    """Options for outputs that are there already; see `outputs.check_places`."""

    overwrite: bool = option(
        False, "Output", "Replacement of outputs that are there already.", kept=False
    )


def check_outputs(
    *configs: Config, files: Named | None = None, labels: Mapping[str, str] | None = None
) -> None:
    """Refuse outputs that would replace what the same configs read, one another, or what is there
    already; see `outputs.check_places`.

    Args:
        files: files that are read beside the fields, by what they are called.
        labels: what fields are called. Default: their flags.
    """
    labels, overwrite = labels or {}, any(c.overwrite for c in configs if isinstance(c, Outputs))
    writing = [config for config in configs if config.writes_alone] or configs
    known = {name: one.flag for config in configs for name, one in config.options().items()}

    def called(places: Iterable[Named]) -> Named:
        return {
            labels.get(name, known[name]): where for one in places for name, where in one.items()
        }

    check_places(
        called(config.outputs() for config in writing),
        called(config.new_outputs() for config in writing),
        {**called(config.inputs() for config in configs), **(files or {})},
        overwrite=overwrite,
    )


class _WrongType(ValueError):
    """A value is of another type than its field."""


@cache
def _options(config: type[Config]) -> dict[str, Option]:
    found = {}
    for attribute, info in config.model_fields.items():
        about, name = info.json_schema_extra, info.alias or attribute
        assert isinstance(about, Option), f"{attribute} is declared by `option`"
        words = [one.hint for one in info.metadata if isinstance(one, Words)]
        hint = words[0] if words else info.annotation
        more = {"name": name, "attribute": attribute, "hint": hint, "takes_objects": bool(words)}
        if about.reads is None and not about.writes and Path in _within(hint):
            more["reads"] = Path
        found[name] = replace(about, **more)
    return found


def _within(hint: object) -> set[object]:
    """Return a type, and all types that it is made of."""
    return {hint}.union(*map(_within, get_args(hint)))


def is_words(value: object, within: tuple[object, ...] = ()) -> bool:
    """Whether a value is one that YAML can hold.

    Args:
        within: the lists around it, one of which may be the value itself.
    """
    if isinstance(value, list | tuple):
        known = any(value is one for one in within)
        return known or all(is_words(item, (*within, value)) for item in value)
    return value is None or isinstance(value, str | int | float | bool | Path | dict)


def _sentence(
    error: ValidationError,
    known: Mapping[str, Option],
    given: Mapping[Any, object],
    origin: str,
    typed: Collection[str],
) -> Exception:
    """Say the first fault in one sentence: name, rule, value, and how it is right."""
    faults = error.errors(include_url=False)
    first = next((fault for fault in faults if fault["type"] != "missing"), faults[0])
    raised = first.get("ctx", {}).get("error")
    one = next(
        (o for o in known.values() if first["loc"][:1] in ((o.name,), (o.attribute,))), None
    )
    if one is None or (isinstance(raised, Exception) and not isinstance(raised, _WrongType)):
        return raised if isinstance(raised, Exception) else ValueError(str(error))
    if first["type"] == "missing":
        told = one.help[:1].lower() + one.help[1:].rstrip(".")
        where = f"{origin}: " if origin else ""
        return ValueError(
            f"{where}{one.name} is not given: {one.flag} {one.metavar or 'VALUE'}, the {told}"
        )
    value = given.get(one.name, given.get(one.attribute))
    is_typed = one.name in typed
    what = f"{origin}: {one.name}" if origin and not is_typed else one.name
    if not isinstance(raised, _WrongType):
        rule = one.rule
        if first["type"] == "finite_number" and not {"le", "lt"} & one.limits.keys():
            rule = rule if rule == "finite" else f"{rule} and finite"
        return ValueError(f"{what} must be {rule}, got {shown(first['input'])}")
    good = example(one.hint, one.default)
    text = json.dumps(written(good))
    right = f"{one.flag} {as_text(good)}" if is_typed else f"{one.name}: {text}"
    return wrong_type(what, _listed(one.hint), value, right)


def _listed(hint: object) -> object:
    """Write `tuple[X, ...]` as `list[X]`, which it is in a file."""
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return list[get_args(hint)[0]]
    parts = members(hint)
    if len(parts) == 1:
        return hint
    return Union[tuple(map(_listed, parts))]  # noqa: UP007


def _unknown(name: object, known: Collection[str], origin: str = "") -> ValueError:
    hint = nearest_to(name, [*known])
    if origin:
        return ValueError(f"{origin}: unknown field {shown(name)}{hint.replace(';', ',', 1)}")
    return ValueError(f"there is no field {shown(name)}{hint}")


def _number(value: float) -> str:
    power = int(value) + 1
    if power > 2**31 and power & (power - 1) == 0:
        return f"2^{power.bit_length() - 1} - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yaml() -> ModuleType:
    with needed_for("a config file", extra="cli"):
        import yaml
    return yaml
