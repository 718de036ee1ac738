"""What the pool says when it is given something it cannot use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PoolError(ValueError):
    """A mistake in what was asked of a pool; the message says what, where, found, expected and the remedy."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the valid name closest to `name`, or an empty string if none is close."""
    found = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def listing(items: Iterable[object], limit: int = 8) -> str:
    """Items separated by commas; beyond `limit`, how many were left out."""
    everything = [str(item) for item in items]
    shown = ", ".join(everything[:limit])
    return shown if len(everything) <= limit else f"{shown} and {len(everything) - limit} more"
