"""Pictures and tables of what a solve recorded: read a run folder, draw it, print it.

Loaded on first use, so that the tables come without matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .federation import save_federation
    from .figures import FIGURES, cosines, save_figure, save_figures
    from .html_report import save_report
    from .palette import Palette
    from .rounds import FederatedRun, Study, read_federated_run, read_study
    from .run import Run, RunError, read_run, read_runs
    from .scans import scan_curve
    from .standings import accuracy_table, cost_table, dominance, dominance_table
    from .tables import AccuracyRow, AccuracyTable

__all__ = [
    "FIGURES",
    "AccuracyRow",
    "AccuracyTable",
    "FederatedRun",
    "Palette",
    "Run",
    "RunError",
    "Study",
    "accuracy_table",
    "cosines",
    "cost_table",
    "dominance",
    "dominance_table",
    "read_federated_run",
    "read_run",
    "read_runs",
    "read_study",
    "save_federation",
    "save_figure",
    "save_figures",
    "save_report",
    "scan_curve",
]

_MODULES = {
    "FederatedRun": "rounds",
    "Study": "rounds",
    "read_federated_run": "rounds",
    "read_study": "rounds",
    "accuracy_table": "standings",
    "cost_table": "standings",
    "dominance_table": "standings",
    "dominance": "standings",
    "save_federation": "federation",
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
    "save_report": "html_report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
