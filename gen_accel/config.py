"""Configs: a field is declared once; checks, flags, YAML, schema, form and settings come from it.

    class ClipConfig(Config):
        VERB = "generate"
        frames: int | None = option(None, "Clip", "Number of frames. Default: the model's.", ge=1)
        dtype: Literal["auto", "float16"] = option("auto", "Loading", "Floating-point type.")

    ClipConfig(frames=33)                             a ValueError says name, rule and value
    ClipConfig.read({"frames": "33"}, origin="a.yaml")      values as a file or a form has them
    ClipConfig.from_yaml("a.yaml", {"frames": "9"})   a file, and the flags that win over it
    ClipConfig.arguments({"frames": 33})              ["--frames=33"], the flags of a command line
    ClipConfig.options()                              an `Option` a field, for a form
    ClipConfig.json_schema()
    config.as_yaml()                                  all fields, with the help as comments
    config.given(), config.kept()        fields off their defaults; those a clip keeps
    config.replaced(frames=9), config.is_given("frames")

`gen_accel.cli.verb` makes a verb of a config and a function. Fields that several configs share
stand in a base class of theirs, so that a config is flat. Values are read leniently: 1e-4 as text,
5.0 for 5, no for "no", one item for a list of one, "none" for None, "0.9,0.99" for numbers.

A config checks types and limits when it is made. Its method `check`, if it has one, checks what
goes together and what lies on the disk, without torch; the rest is checked where it is needed.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin

from gen_accel.io import read_text
from gen_accel.parsing import as_text, convert, example, members, shown, wrong_type
from gen_accel.registry import needed_for

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
    from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from typing_extensions import Self

Accept = Literal["", "image", "video"]


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
    """
    about = _About(group, metavar, tuple(choices), commas, bare, kept, accept)
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    given = {rule: limit for rule, limit in limits.items() if limit is not None}
    more: dict[str, Any] = {"alias": name} if name else {}
    return _Field(default, description=help, json_schema_extra=about, **given, **more)


class Words:
    """Mark a field that takes an object from Python, and elsewhere the words that stand for it:
    `Annotated[object, Words(str | None)]`."""

    def __init__(self, hint: Any) -> None:
        self.hint = hint

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return TypeAdapter(self.hint).json_schema()


@dataclass(frozen=True)
class Option:
    """A field of a config, as a flag, a file or a form has it.

    Args:
        name: in files; flags have hyphens.
        attribute: in Python.
        hint: type of the words.
        default: None for a required field.
        limits: of a number, by "ge", "gt", "le" and "lt".
    """

    name: str
    attribute: str
    hint: Any
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
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def kind(self) -> Any:
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

    def read(self, value: object) -> Any:
        """Convert a value as YAML, a command line or Python has it.

        Raises:
            _WrongType: it is of another type.
            ValueError: text that is not UTF-8.
        """
        if self.commas and isinstance(value, str) and value.lower() != "none":
            value = [part.strip() for part in value.split(",") if part.strip()]
        try:
            found = convert(value, self.hint)
        except (TypeError, ValueError, OverflowError):
            raise _WrongType from None
        for text in found if isinstance(found, tuple) else (found,):
            if isinstance(text, str):
                check_text(self.name, text)
        return found

    def written(self, value: object) -> Any:
        """Return a value as YAML and JSON hold it."""
        if isinstance(value, list | tuple):
            return [self.written(item) for item in value]
        return str(value) if isinstance(value, Path) else value


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
        held: Mapping[Any, Any],
        typed: Mapping[str, Any] | None = None,
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
        self = cls.__new__(cls)
        self._take(cls.merged(held, typed or {}, origin=origin), origin, typed or ())
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, typed: Mapping[str, Any] | None = None) -> "Self":
        """Read a YAML file of `name: value`; raises as `read_mapping` and `read` do."""
        return cls.read(read_mapping(path, verb=cls.VERB), typed, origin=Path(path).name)

    @classmethod
    def merged(
        cls, held: Mapping[Any, Any], typed: Mapping[str, Any], *, origin: str = ""
    ) -> dict[Any, Any]:
        """Return the fields of a file that the typed ones leave, and the typed ones."""
        found: dict[Any, Any] = {}
        for key, value in held.items():
            name = key.replace("-", "_") if isinstance(key, str) else key
            if name in found:
                raise ValueError(f"{origin}: {name} is given twice")
            found[name] = value
        for names, others in cls.RIVALS:
            if typed.keys() & {*names}:
                found = {name: value for name, value in found.items() if name not in others}
        return found | {**typed}

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

    def as_yaml(self) -> str:
        """Write all fields as YAML, each with its help as a comment, by groups."""
        yaml, lines = _yaml(), []
        by_group: dict[str, list[Option]] = {}
        for one in self.options().values():
            by_group.setdefault(one.group, []).append(one)
        for group, some in by_group.items():
            lines += ["", f"# {group}"] if lines else [f"# {group}"]
            for one in some:
                value = one.written(getattr(self, one.attribute))
                text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
                lines.append(
                    f"{one.name}: {text.removesuffix('...' + chr(10)).strip()}  # {one.help}"
                )
        return "\n".join(lines) + "\n"

    def is_given(self, name: str) -> bool:
        """Whether a field differs from its default."""
        one = self.options()[name]
        value = getattr(self, one.attribute)
        if one.required or not is_words(value):  # such as an array, compared by element
            return one.required or value is not one.default
        return value != one.default

    def given(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as YAML holds them."""
        return {
            name: one.written(getattr(self, one.attribute))
            for name, one in self.options().items()
            if self.is_given(name)
        }

    def kept(self) -> dict[str, Any]:
        """Return the fields that a clip keeps, as YAML holds them: also defaults, which may change
        in a later version, but nothing that is None or empty."""
        found = {
            name: one.written(getattr(self, one.attribute))
            for name, one in self.options().items()
            if one.kept
        }
        return {
            name: value
            for name, value in found.items()
            if value is not None and not (isinstance(value, list) and not value)
        }

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

    @classmethod
    def arguments(cls, values: Mapping[str, Any]) -> list[str]:
        """Write values as flags, except None and defaults.

        Raises:
            ValueError: an unknown field; the error names the nearest.
        """
        known = cls.options()
        if unknown := [name for name in values if name not in known]:
            raise _unknown(unknown[0], known)
        found = []
        for name, one in known.items():
            value = one.written(values.get(name))
            if value is None or value == one.written(one.default):
                continue
            if one.kind is bool:
                found.append(one.flag if value else f"--no-{one.flag[2:]}")
            elif isinstance(value, list) and one.joined:
                found.append(f"{one.flag}={','.join(map(str, value)) or 'none'}")
            else:
                items = value if isinstance(value, list) else [value]
                found += [f"{one.flag}={item}" for item in items]
        return found

    def _take(
        self, given: Mapping[Any, Any], origin: str = "", typed: Collection[str] = ()
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
        one = next(o for o in cls.options().values() if o.attribute == info.field_name)
        try:
            return one.read(value)
        except _WrongType:
            takes_objects = _takes_objects(cls.model_fields[one.attribute])
            if not takes_objects or (is_words(value) and value != []):
                raise
        return tuple(value) if isinstance(value, list) else value


def read_mapping(path: str | Path, *, verb: str) -> dict[Any, Any]:
    """Read a YAML file that holds fields as `name: value`.

    Args:
        verb: prints such a file by --print-config, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping.
    """
    yaml = _yaml()
    try:
        loaded = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        command = f"gen-accel {verb} --print-config > {Path(path).name}"
        raise FileNotFoundError(f"no config at {path}; `{command}` writes one") from None
    except RecursionError:
        raise ValueError(f"{path} is no config: it is nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold fields as `name: value`, got {loaded!r}")
    return dict(loaded)


def check_text(name: str, text: str) -> None:
    """Raise ValueError for text that is not UTF-8, which a terminal may pass on and no tokenizer
    takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {text!r}") from None


@dataclass(frozen=True)
class _About:
    """Facts of a field that pydantic does not hold; called with the field's JSON schema."""

    group: str
    metavar: str
    choices: tuple[str, ...]
    commas: bool
    bare: str
    kept: bool
    accept: Accept

    def __call__(self, schema: dict[str, Any]) -> None:
        if self.choices:
            schema["examples"] = [*self.choices]


class _WrongType(ValueError):
    """A value is of another type than its field."""


@cache
def _options(config: type[Config]) -> dict[str, Option]:
    found = {}
    for attribute, info in config.model_fields.items():
        about = info.json_schema_extra
        assert isinstance(about, _About), f"{attribute} is declared by `option`"
        limits = {
            rule: getattr(one, rule)
            for one in info.metadata
            for rule in ("ge", "gt", "le", "lt")
            if getattr(one, rule, None) is not None
        }
        name = info.alias or attribute
        found[name] = Option(
            name,
            attribute,
            _hint(info),
            None if info.is_required() else info.default,
            info.is_required(),
            info.description or "",
            about.group,
            about.metavar,
            about.choices,
            about.commas,
            about.bare,
            about.kept,
            about.accept,
            limits,
        )
    return found


def _hint(info: FieldInfo) -> Any:
    return next((one.hint for one in info.metadata if isinstance(one, Words)), info.annotation)


def _takes_objects(info: FieldInfo) -> bool:
    return any(isinstance(one, Words) for one in info.metadata)


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
    given: Mapping[Any, Any],
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
        return ValueError(
            f"{one.name} is not given: {one.flag} {one.metavar or 'VALUE'}, the {told}"
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
    text = json.dumps(one.written(good))
    right = f"{one.flag} {as_text(good)}" if is_typed else f"{one.name}: {text}"
    return wrong_type(what, _listed(one.hint), value, right)


def _listed(hint: Any) -> Any:
    """Write `tuple[X, ...]` as `list[X]`, which it is in a file."""
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return list[get_args(hint)[0]]
    parts = members(hint)
    if len(parts) == 1:
        return hint
    return Union[tuple(map(_listed, parts))]  # noqa: UP007


def _unknown(name: object, known: Collection[str], origin: str = "") -> ValueError:
    near = get_close_matches(str(name), known, n=1)
    if origin:
        hint = f", did you mean {near[0]!r}?" if near else ""
        return ValueError(f"{origin}: unknown field {name!r}{hint}")
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"there is no field {name!r}{hint}")


def _number(value: float) -> str:
    power = int(value) + 1
    if power > 2**31 and power & (power - 1) == 0:
        return f"2^{power.bit_length() - 1} - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yaml() -> Any:
    with needed_for("a config file", extra="cli"):
        import yaml
    return yaml
