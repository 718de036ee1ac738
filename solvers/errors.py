"""The one error of this floor, and the one way options are validated.

A message names the owner, the parameter, the accepted range and the value, as scikit-learn's do:
"The 'lr' parameter of AdaptiveGradient must be a number in (0, inf). Got -1 instead."
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class OptionError(ValueError):
    """A solver, domain, step rule or problem was asked for something that it cannot be."""


def check_number(
    owner: object, name: str, low: float, high: float, *, closed: str = "both", integer: bool = False
) -> None:
    """Raise OptionError unless ``owner.name`` is a number between ``low`` and ``high``.

    ``closed`` says which ends belong to the range: "both", "left", "right" or "neither".
    """
    value = getattr(owner, name)
    kind = "an integer" if integer else "a number"
    number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    inside = number and not math.isnan(value)
    if inside:
        above = value >= low if closed in ("both", "left") else value > low
        below = value <= high if closed in ("both", "right") else value < high
        inside = above and below
    if not inside:
        left = "[" if closed in ("both", "left") and low > -math.inf else "("
        right = "]" if closed in ("both", "right") and high < math.inf else ")"
        raise OptionError(
            f"The '{name}' parameter of {type(owner).__name__} must be {kind} in {left}{low:g}, {high:g}{right}. "
            f"Got {value!r} instead."
        )


def check_choice(owner: object, name: str, choices: Iterable[object]) -> None:
    """Raise OptionError unless ``owner.name`` is one of ``choices``."""
    value, choices = getattr(owner, name), list(choices)
    if value not in choices:
        raise OptionError(
            f"The '{name}' parameter of {type(owner).__name__} must be one of {', '.join(map(repr, choices))}. "
            f"Got {value!r} instead."
        )


def unknown(kind: str, name: object, known: Iterable[str]) -> OptionError:
    """Return the error for a name that no table has, with the nearest one that exists."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
