"""Objects from what a user writes: an instance, a name, or a mapping {"name": ..., option: value}."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from .errors import OptionError, unknown

T = TypeVar("T")


def construct(kind: str, table: Mapping[str, type[T]], spec: object) -> T:
    """Return the object that ``spec`` describes, taking its class from ``table``.

    Raises OptionError for unknown names (with the nearest known one), unknown options and values out of range.
    """
    if isinstance(spec, tuple(table.values())):
        return cast(T, spec)
    options: dict[str, Any] = {}
    name: object = spec
    if isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise OptionError(
                f"A {kind} given as a mapping needs a 'name'; found {', '.join(map(str, options)) or '{}'}."
            )
        name = options.pop("name")
    if not isinstance(name, str) or name not in table:
        raise unknown(kind, name, table)
    cls = table[name]
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise unknown(f"option of the {kind} {name!r}:", option, known or ["(it has none)"])
    return cls(**options)


def describe(obj: object, table: Mapping[str, type]) -> dict[str, Any]:
    """Return the mapping from which :func:`construct` makes ``obj`` again: its name and every option."""
    name = next(name for name, cls in table.items() if type(obj) is cls)
    options = {}
    for f in dataclasses.fields(obj):  # type: ignore[arg-type]
        value = getattr(obj, f.name)
        options[f.name] = value.describe() if hasattr(value, "describe") else value
    return {"name": name, **options}
