"""Typed dataclasses from what YAML gives, with one kind of message for every mistake.

A field's annotation is its specification: str, int, float, bool, None, list and dict of those, unions, and dataclasses.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .names import UsageProblem, unknown

T = TypeVar("T")

WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


def parse(cls: type[T], value: object, where: str) -> T:
    """Make a dataclass of a mapping. `where` names the place in messages ("recipe", "recipe: tasks[2]").

    Raises UsageProblem for fields that do not exist (with the nearest), are missing, or have another type.
    """
    if not isinstance(value, Mapping):
        raise UsageProblem(f"{where}: expected a mapping of fields, found {found(value)}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name in value:
        if name not in fields:
            raise unknown("field", name, fields, where=where)
    arguments = {name: convert(hints[name], value[name], f"{where}: '{name}'") for name in fields if name in value}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise UsageProblem(f"{where}: lacks the field '{name}' ({describe(hints[name])}).")
    return cls(**arguments)


def convert(hint: Any, value: object, where: str) -> Any:
    """Return the value as the annotated type, or raise UsageProblem naming the place, the type and the value."""
    if hint is Any or hint is object:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, arguments, value, where)
    if origin is tuple or hint is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageProblem(f"{where} must be {describe(hint)}; found {found(value)}.")
        return tuple(convert(arguments[0], item, f"{where}[{k}]") for k, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageProblem(f"{where} must be {describe(hint)}; found {found(value)}.")
        return {str(key): convert(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        read = getattr(hint, "read", None)
        return read(value, where) if read else parse(typing.cast(type, hint), value, where)
    accepted: tuple[type, ...] = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UsageProblem(f"{where} must be {describe(hint)}; found {found(value)}.")
    return float(typing.cast(float, value)) if hint is float else value


def _convert_union(hint: Any, arguments: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    if len(choices) == 1:
        return convert(choices[0], value, where)
    for choice in choices:
        structured = isinstance(value, (Mapping, list, tuple)) and choice not in WORDS
        try:
            return convert(choice, value, where)
        except UsageProblem:
            if structured and _shape_fits(choice, value):
                raise
    raise UsageProblem(f"{where} must be {describe(hint)}; found {found(value)}.")


def _shape_fits(hint: Any, value: object) -> bool:
    """Whether a mapping was meant for this choice, so that its own message is the useful one."""
    mapping = get_origin(hint) is dict or dataclasses.is_dataclass(hint)
    return isinstance(value, Mapping) if mapping else isinstance(value, (list, tuple))


def describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple:
        return f"a list (each {describe(arguments[0])})"
    if origin is dict:
        return f"a mapping of names (each {describe(arguments[1])})"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return WORDS.get(hint, "a value")


def found(value: object) -> str:
    """A value in words, short."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
