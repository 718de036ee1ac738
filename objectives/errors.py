"""The one error of this package for what the user can put right."""

from collections.abc import Iterable
from difflib import get_close_matches


class DataError(ValueError):
    """Data, model or weights do not fit together: what, where, found, expected, and what to do about it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`known`, listed, with the name closest to a mistyped one first: " (did you mean 'a'?); known: 'a', 'b'"."""
    known = [str(k) for k in known]
    close = get_close_matches(name, known, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"{guess} Known: {', '.join(map(repr, known)) or 'none'}."


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of many names, quoted, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + rest
