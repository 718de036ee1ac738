"""The `mergesolve` command: one module a command, loaded when it is called; no maths."""

from .app import main

__all__ = ["main"]
