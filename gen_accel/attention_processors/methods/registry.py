"""Methods by name, of the package, registered or "module:Class", and built from text or a file."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any, get_type_hints

from gen_accel import published, registry
from gen_accel.method import Method, check_class, check_method
from gen_accel.parsing import as_text, convert, example, shown, tuples, wrong_type


class _Methods(Mapping[str, type[Method]]):
    """Classes of `registry.METHODS` by name, each imported when it is first asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        return _class_at(f"{__package__}.{registry.METHODS[name]}", imports=True)

    def __iter__(self) -> Iterator[str]:
        return iter(registry.METHODS)

    def __len__(self) -> int:
        return len(registry.METHODS)


# Read by the tests, the command line and the benchmarks. `Mixed` has no name, as its options are
# rules, which a preset holds.
METHODS: Mapping[str, type[Method]] = _Methods()

_registered: dict[str, type[Method]] = {}


def register_method(name: str, kind: type) -> None:
    """Give a class of methods a name, by which it is chosen, saved and loaded.

        gen_accel.register_method("mine", Mine)

    A class may be defined and registered again under its name, as when a notebook cell runs twice.
    ValueError for a name that is taken or is no word of letters, digits and _, or no class of
    methods.
    """
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
        raise ValueError(f"a method's name is a word of letters, digits and _, got {shown(name)}")
    check_class(kind, name)
    known = {**METHODS, **_registered}
    if name in published.METHODS:
        raise ValueError(f"the name {shown(name)} is taken, by {published.METHODS[name].about}")
    taken = known.get(name, kind)
    if _place(taken) != _place(kind):
        raise ValueError(f"the name {shown(name)} is taken, by {_place(taken).replace(':', '.')}")
    for other, one in known.items():
        if one is kind and other != name:
            raise ValueError(f"{kind.__qualname__} has the name {shown(other)}, got {shown(name)}")
    if name not in METHODS:
        _registered[name] = kind


def method_class(name: str, *, from_file: bool = False) -> type[Method]:
    """Return the class of the method called `name`, or the class at "module:Class". ValueError,
    which lists the methods and the nearest, if there is none.

    Args:
        from_file: whether a file says the name, which may come from anyone: nothing is imported
            then, so that the module of a "module:Class" must be imported already.
    """
    known = (*METHODS, *_registered)
    if name in known:
        return _registered[name] if name in _registered else METHODS[name]
    if name in published.METHODS and not from_file:
        return METHODS[published.METHODS[name].method]
    if isinstance(name, str) and ":" in name:
        return _class_at(name, imports=not from_file)
    known = known if from_file else (*known, *published.METHODS)
    hint = registry.nearest_to(name, known)
    if from_file:
        hint += (
            f"; register one of your own first: gen_accel.register_method({shown(name)}, Class)"
        )
    raise ValueError(f"method must be one of {known}, got {shown(name)}{hint}")


def method_name(method: Method) -> str:
    """Return what `method_class` finds the class of `method` by: a name, or "module:Class".
    ValueError for a class that cannot be found so."""
    kind, place = type(method), _place(type(method))
    own = {f"{__package__}.{home}": name for name, home in registry.METHODS.items()}
    given = {one: name for name, one in _registered.items()}
    if kind in given:
        return given[kind]
    if place in own and METHODS[own[place]] is kind:
        return own[place]
    if kind.__module__ == "__main__":
        why = "a class of the program itself, __main__, is not found from another"
    elif "<locals>" in kind.__qualname__:
        why = "a class that a function makes is not found by its name"
    else:
        try:
            if _class_at(place, imports=False) is kind:
                return place
            why = f"another class is there by now, at {place}"
        except ValueError as error:
            why = str(error)
    raise ValueError(
        f"{method!r} is none of the package's methods and cannot be named: {why}; register it "
        'with gen_accel.register_method("name", Class)'
    )


def _place(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def method_from(name: str, settings: Sequence[str] = ()) -> Method:
    """Build the method called `name`, or at "module:Class", with some fields set. Of a name in
    `published.METHODS` the settings win over its own.

        method_from("neighborhood", ["window=3,8,8", "is_causal=true,false,false"])
        method_from("reuse", ["method=radial", "method.decay_factor=0.5", "every=5"])

    Args:
        settings: "field=value" each; a tuple is written "3,8,8". A field that holds a method is
            set by the method's name, and the fields of the inner method as
            "field.of_method=value".

    Raises:
        ValueError: no such method or field, a value of the wrong type, or one that the method
            refuses; the message lists the valid names, and the nearest.
    """
    kind = method_class(name)
    values = values_of(kind, name, settings)
    if name in published.METHODS and name not in _registered:
        values = values_of(kind, name, published.METHODS[name].settings) | values
    return _made(kind, name, values)


def values_of(kind: type, name: str, settings: Sequence[str]) -> dict[str, object]:
    """Parse "field=value" settings into values of the fields of a dataclass, which errors call
    `name`; errors as in `method_from`."""
    defaults = {one.name: one.default for one in options_of(kind)}
    try:
        hints = get_type_hints(kind) if settings else {}
    except (NameError, TypeError) as error:
        raise ValueError(f"the types of the fields of {name} cannot be read: {error}") from error
    values: dict[str, object] = {}
    inner: dict[str, list[str]] = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        key, dot, of_inner = field.strip().partition(".")
        text = text.strip()
        if not equals:
            raise ValueError(f"a setting is written field=value, got {shown(setting)}")
        if key not in defaults:
            raise _no_field(name, key, [*defaults])
        if dot:
            if hints[key] is not Method:
                raise ValueError(f"{key} of {name} holds no method, got {shown(setting)}")
            inner.setdefault(key, []).append(f"{of_inner}={text}")
        elif key in values:
            raise ValueError(f"{key} is set twice")
        elif hints[key] is Method:
            values[key] = method_from(text)
        else:
            try:
                values[key] = convert(text, hints[key], is_text=True)
            except (TypeError, ValueError, OverflowError):
                right = f"{key}={as_text(example(hints[key], defaults[key]))}"
                raise wrong_type(f"{key} of {name}", hints[key], text, right) from None
    for key, some in inner.items():
        method: Any = values.get(key, defaults[key])
        if method is MISSING:
            raise ValueError(f"{name} needs a value for {key}, before {key}.{some[0]}")
        values[key] = replace(method, **values_of(type(method), method_name(method), some))
    return values


def method_of_file(name: str, options: Mapping[str, object]) -> Method:
    """Build the method that a file names, with its options as JSON holds them. Imports nothing;
    ValueError for no such method or option, or a "module:Class" whose module is not imported."""
    kind = method_class(name, from_file=True)
    known = [field.name for field in options_of(kind)]
    if unknown := [key for key in options if key not in known]:
        raise _no_field(name, unknown[0], known)
    values = with_tuples(options)
    for key in _holding_methods(kind) & values.keys():
        held = values[key]
        if not isinstance(held, Mapping) or {*held} != {"name", "options"}:
            raise ValueError(f"{key} of {name} must hold a name and options, got {shown(held)}")
        values[key] = method_of_file(held["name"], held["options"])
    return _made(kind, name, values)


def options_of(kind: type) -> tuple[Field[object], ...]:
    """Return the fields that a method of this class is made with; none if it is no dataclass."""
    return tuple(one for one in fields(kind) if one.init) if is_dataclass(kind) else ()


def saved_options(method: Method) -> dict[str, object]:
    """Return a method's options, as JSON holds them. ValueError for an option that JSON cannot
    hold, or a method that is no dataclass and has state, which would be lost."""
    kind = type(method)
    if not is_dataclass(kind):
        try:
            same = bool(vars(kind()) == vars(method))
        except Exception:  # it cannot be made so, or its state cannot be compared
            same = False
        if same:
            return {}
        held = ", ".join(f"{name}={value!r}" for name, value in vars(method).items())
        raise ValueError(
            f"{kind.__name__} is not a dataclass, so that its values would be lost, {held}: make "
            "the class a frozen dataclass, whose fields are saved"
        )
    values = {one.name: getattr(method, one.name) for one in options_of(kind)}
    inner = _holding_methods(kind)
    for name, value in values.items():
        if name in inner:
            values[name] = {"name": method_name(value), "options": saved_options(value)}
            continue
        try:
            values[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            values[name] = None
        if tuples(values[name]) != value:
            raise ValueError(
                f"{name} of {kind.__name__} is not the same after JSON, got "
                f"{shown(value)}: options are numbers, words, booleans, None and tuples"
            )
    return values


def _holding_methods(kind: type) -> set[str]:
    """Return the names of a class's options that hold a method."""
    try:
        hints = get_type_hints(kind)
    except (NameError, TypeError):  # of a class of one's own, whose options are saved as they are
        return set()
    return {one.name for one in options_of(kind) if hints[one.name] is Method}


def with_tuples(options: Mapping[str, object]) -> dict[str, Any]:
    """Return fields as JSON holds them, with tuples instead of lists."""
    return {name: tuples(value) for name, value in options.items()}


def _no_field(name: str, key: str, known: Sequence[str]) -> ValueError:
    hint = registry.nearest_to(key, known, cutoff=0.4)
    have = ", ".join(known) or "none"
    return ValueError(f"{name} has no field {shown(key)}; its fields: {have}{hint}")


def _made(kind: type, name: str, values: Mapping[str, object]) -> Method:
    lacking = [
        one.name
        for one in options_of(kind)
        if one.default is one.default_factory is MISSING and one.name not in values
    ]
    if lacking:
        raise ValueError(f"{name} needs a value for {', '.join(lacking)}")
    try:
        method = kind(**values)
    except TypeError as error:
        if is_dataclass(kind):
            raise
        raise ValueError(
            f"{name} cannot be made without arguments: {error}; the options of a method are the "
            "fields of a dataclass"
        ) from error
    check_method(method)
    return method


def _class_at(place: str, *, imports: bool) -> type:
    """Return the class of methods at `place`, "module:Class".

    Args:
        imports: whether the module is imported, also from the current folder. Without, it must be
            imported already, and none of its code runs.
    """
    home, _, name = place.partition(":")
    parts = [*home.split("."), *name.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"a method of one's own is written module:Class, got {shown(place)}")
    module = _imported(home) if imports else sys.modules.get(home)
    if module is None:
        raise ValueError(
            f"method {shown(place)} is named by a file, and modules that a file names are not "
            f"imported: import {home} first, if you trust it, or register its class with "
            f"gen_accel.register_method; on a command line, --method {place}"
        )
    found: Any = module
    for part in name.split("."):
        # For a file not by getattr, which may run code of the module that imports others.
        if not (hasattr(found, part) if imports else part in vars(found)):
            hint = registry.nearest_to(part, [*vars(found)])
            raise ValueError(f"method {shown(place)}: there is no {shown(part)} in {home}{hint}")
        found = getattr(found, part) if imports else vars(found)[part]
        if not isinstance(found, type):
            break
    check_class(found, place)
    return found


def _imported(home: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{home}.".startswith(f"{error.name}."):
            raise ValueError(f"{home} cannot be imported: {error}") from error
        raise ValueError(
            f"there is no module {shown(error.name)}, neither installed nor in {here}"
        ) from None
    except Exception as error:
        raise ValueError(f"{home} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
