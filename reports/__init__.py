"""Pictures and tables of what a solve recorded: read a run folder, draw it, print it.

Loaded on first use, so that the tables come without matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .figures import FIGURES, cosines, save_figure, save_figures
    from .palette import Palette
    from .run import Run, RunError, read_run, read_runs
    from .scans import scan_curve
    from .tables import AccuracyRow, AccuracyTable

__all__ = [
    "FIGURES",
    "AccuracyRow",
    "AccuracyTable",
    "Palette",
    "Run",
    "RunError",
    "cosines",
    "read_run",
    "read_runs",
    "save_figure",
    "save_figures",
    "scan_curve",
]

_MODULES = {
    "FIGURES": "figures",
    "AccuracyRow": "tables",
    "AccuracyTable": "tables",
    "Palette": "palette",
    "Run": "run",
    "RunError": "run",
    "cosines": "figures",
    "read_run": "run",
    "read_runs": "run",
    "scan_curve": "scans",
    "save_figure": "figures",
    "save_figures": "figures",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
