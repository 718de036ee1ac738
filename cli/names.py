"""Unknown names: one message with the valid ones and the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageProblem(ValueError):
    """The user's mistake, found by the command line itself: what, where, found, expected, remedy."""


def unknown(kind: str, name: object, known: Iterable[str], *, where: str = "") -> UsageProblem:
    """The error for a name that is not among the known ones."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    place = f"{where}: " if where else ""
    return UsageProblem(f"{place}unknown {kind} '{name}'.{hint} Valid: {', '.join(known) or 'none'}.")


def choose(kind: str, name: str, known: Iterable[str], *, where: str = "") -> str:
    """Return the name if it is known. Raises UsageProblem with the valid ones and the nearest otherwise."""
    known = list(known)
    if name not in known:
        raise unknown(kind, name, known, where=where)
    return name
