"""Parameters of a mergekit recipe: who sets them, for which tensors, and the classes of tensors that follow.

A setting is a value, a gradient (a list of values, from the first layer to the last), or a list of {filter, value} in
which the first filter that is a part of the tensor's name decides. A model's own setting comes before that of all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .names import UsageProblem, unknown
from .schema import found

FLAGS = ("normalize", "rescale", "int8_mask", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise")
PARAMETERS = ("weight", "density", "gamma", "epsilon", "lambda", "t", "max_iter", "tol", *FLAGS)

# A tensor's layer is the first number in its name, after the container that it counts in.
LAYER = r"(?:(?!\d+\.)[^.]+\.)*?(?:layers?|h|blocks?|resblocks)\.(?:{})\."
MOST_CLASSES = 1024

Scalar = float | bool
Branch = tuple[str | None, Scalar | tuple[Scalar, ...]]
"""(filter, value): the value, or its gradient over the layers, of tensors with the filter in their names."""
Chain = tuple[Branch, ...]
"""Branches in the order in which they are tried; the last one has no filter."""


@dataclass(frozen=True)
class Values:
    """All parameters of one class of tensors: those of the merge, and those of each model, by its path."""

    shared: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    where: str


def settings_of(value: object, where: str) -> Mapping[str, Any]:
    """Return a mapping of parameters, all of which mergekit has."""
    return {} if value is None else mapping(value, where, PARAMETERS)


def chain_of(
    parameter: str, scopes: Iterable[tuple[Mapping[str, Any], str]], default: Scalar | None, where: str
) -> Chain:
    """Return the branches of a parameter over all scopes, the most particular first, up to one without a filter."""
    branches: list[Branch] = []
    for settings, place in scopes:
        if parameter in settings:
            for branch in branches_of(parameter, settings[parameter], f"{place}: '{parameter}'"):
                branches.append(branch)
                if branch[0] is None:
                    return tuple(branches)
    if default is None and branches:
        raise UsageProblem(
            f"{where}: no filter of '{parameter}' matches all tensors. Add {{value: ...}} without a filter at the end."
        )
    if default is None:
        raise UsageProblem(
            f"{where}: lacks a {parameter}, which has no default. Add 'parameters: {{{parameter}: ...}}'."
        )
    return (*branches, (None, default))


def branches_of(parameter: str, value: object, where: str) -> list[Branch]:
    """Return the branches of one setting: a value, a gradient, or those behind filters."""
    items = value if isinstance(value, list) else [value]
    conditions = [item for item in items if isinstance(item, Mapping)]
    if not conditions:
        return [(None, _value(parameter, value, where))]
    if len(conditions) != len(items):
        raise UsageProblem(f"{where}: a list is of numbers (a gradient) or of {{filter, value}}, not of both.")
    branches: list[Branch] = []
    for k, item in enumerate(conditions):
        place = f"{where}[{k}]"
        condition = mapping(item, place, ("filter", "value"))
        if condition.get("value") is None:
            raise UsageProblem(f"{place}: lacks a 'value'.")
        name = condition.get("filter")
        if name is not None and not isinstance(name, str):
            raise UsageProblem(f"{place}: 'filter' must be text, a part of tensor names; found {found(name)}.")
        everything = name in (None, "", "*")
        branches.append((None if everything else name, _value(parameter, condition["value"], place)))
    return branches


def _value(parameter: str, value: object, where: str) -> Scalar | tuple[Scalar, ...]:
    """Return a scalar, or a gradient whose values are not all the same."""
    if not isinstance(value, list):
        return _scalar(parameter, value, where)
    if not value:
        raise UsageProblem(f"{where}: a gradient needs at least one value; found [].")
    gradient = tuple(_scalar(parameter, item, f"{where}[{k}]") for k, item in enumerate(value))
    return gradient if len(set(gradient)) > 1 else gradient[0]


def _scalar(parameter: str, value: object, where: str) -> Scalar:
    """Return a flag or a finite number; text that YAML 1.1 does not read as a number may be one."""
    if parameter in FLAGS:
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
        raise UsageProblem(f"{where} must be true or false; found {found(value)}.")
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise UsageProblem(f"{where} must be a finite number; found {found(value)}.")
    return number


def classes(
    chains: Mapping[tuple[str, str | None], Chain],
    layers: int,
    options: Callable[[Values], dict[str, Any]],
    where: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (pattern, method): a tensor belongs to the first pattern that its name has; the last one fits all.

    Parameters with the same filters share a choice among them. Choices are tried in the order of the filters, so the
    first combination whose filters are all in a name is the one that each parameter would choose by itself.
    """
    keys = {key: tuple(name for name, _ in chain) for key, chain in chains.items()}
    choices = list(dict.fromkeys(filters for filters in keys.values() if len(filters) > 1))
    count = math.prod(len(filters) for filters in choices)
    if count > MOST_CLASSES:
        raise UsageProblem(
            f"{where}: the filters make {count} combinations; give the models the same filters in the same order."
        )
    for picked in itertools.product(*(range(len(filters)) for filters in choices)):
        place = dict(zip(choices, picked, strict=True))
        needed = list(dict.fromkeys(name for filters, k in place.items() if (name := filters[k]) is not None))
        if any(_earlier_matches(filters[:k], needed) for filters, k in place.items()):
            continue
        chosen = {key: chain[place.get(keys[key], 0)][1] for key, chain in chains.items()}
        outside = options(_at(chosen, 0.0, where))
        by_layer: list[tuple[dict[str, Any], list[int]]] = []
        if any(isinstance(value, tuple) for value in chosen.values()):
            for layer in range(layers):
                method = options(_at(chosen, layer / (layers - 1) if layers > 1 else 1.0, where))
                same = next((group for group in by_layer if group[0] == method), None)
                if same is None:
                    by_layer.append((method, [layer]))
                else:
                    same[1].append(layer)
        for method, group in by_layer:
            if method != outside:
                yield _pattern(needed, group), method
        yield _pattern(needed, []), outside


def _earlier_matches(filters: Sequence[str | None], needed: Sequence[str]) -> bool:
    """Whether names with all that is needed have an earlier filter, too, so that no name gets here."""
    return any(name is not None and any(name in other for other in needed) for name in filters)


def _at(chosen: Mapping[tuple[str, str | None], Any], t: float, where: str) -> Values:
    """Return the values at a depth from 0 to 1; numbers are interpolated, flags are not."""
    shared: dict[str, Any] = {}
    models: dict[str, dict[str, Any]] = {}
    for (parameter, model), value in chosen.items():
        if isinstance(value, tuple):
            position = t * (len(value) - 1)
            first = int(position)
            rest = position - first
            last = value[min(first + 1, len(value) - 1)]
            value = value[first] if parameter in FLAGS else (1 - rest) * value[first] + rest * last
        (shared if model is None else models.setdefault(model, {}))[parameter] = value
    return Values(shared, models, where)


def _pattern(needed: Sequence[str], layers: Sequence[int]) -> str:
    """Return a regular expression for names with all the filters in them, in one of the layers."""
    if not layers and len(needed) == 1:
        return re.escape(needed[0])
    ahead = "".join(f"(?=.*{re.escape(name)})" for name in needed)
    return f"^{ahead}{LAYER.format('|'.join(map(str, layers))) if layers else ''}"


def mapping(value: object, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    """Return a mapping all of whose fields are known."""
    if not isinstance(value, Mapping):
        raise UsageProblem(f"{where}: expected a mapping of {', '.join(known)}; found {found(value)}.")
    for field in value:
        if field not in known:
            raise unknown("field", field, known, where=where)
    return value
