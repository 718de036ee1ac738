"""Closed-form merges: functions of one tensor's base and experts, streamed by one driver.

weights = merge_weights(pool, make_merge({"name": "ties", "density": 0.2, "scale": 0.3}))

Names are imported when they are first used, so that the table of methods costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registry import MERGES, Entry, describe_merge, make_merge

if TYPE_CHECKING:
    from .driver import Plan, merge_weights, plan, write_merge
    from .merge import Linear, Merge, Part, Rule

_MODULES = {
    "Linear": "merge",
    "Merge": "merge",
    "Part": "merge",
    "Plan": "driver",
    "Rule": "merge",
    "merge_weights": "driver",
    "plan": "driver",
    "write_merge": "driver",
}

__all__ = [
    "MERGES",
    "Entry",
    "Linear",
    "Merge",
    "Part",
    "Plan",
    "Rule",
    "describe_merge",
    "make_merge",
    "merge_weights",
    "plan",
    "write_merge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
