"""The error of this floor."""

from __future__ import annotations


class FederationError(ValueError):
    """A federation was asked for something that it cannot do; the message says what was found and what to do."""
