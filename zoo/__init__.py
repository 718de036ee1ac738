"""The embedded benchmark: a small CLIP, the tasks that it is asked to solve, and one expert a task.

    zoo = load()
    model, test = zoo.model(), zoo.task("digits", "test")
    Pool.open(base=zoo.base, experts=zoo.task_experts)

Names are imported when they are first used, so that importing the package costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import build
    from .loader import Zoo, load

_MODULES = {"Zoo": "loader", "build": "builder", "load": "loader"}

__all__ = ["Zoo", "build", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
