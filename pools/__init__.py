"""Checkpoints on disk as a linear operator with an adjoint.

combine(Λ) = θ0 + Σ_i Λ[b,i] τ_{i,b},    correlate(G)[b,i] = ⟨G_b, τ_{i,b}⟩,    τ_i = θ_i − θ0

Names are imported when they are first used, so that `mergesolve.pools.transforms` costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import PoolError

if TYPE_CHECKING:
    from .blocks import KINDS, Blocks
    from .fingerprint import model_fingerprint
    from .inspection import Flag, Report, inspect
    from .operator import Weights
    from .pool import BACKENDS, Pool
    from .statistics import STATISTICS, Statistics, statistics_name, statistics_path, write_statistics

_MODULES = {
    "BACKENDS": "pool",
    "Blocks": "blocks",
    "Flag": "inspection",
    "KINDS": "blocks",
    "Pool": "pool",
    "Report": "inspection",
    "STATISTICS": "statistics",
    "Statistics": "statistics",
    "Weights": "operator",
    "inspect": "inspection",
    "model_fingerprint": "fingerprint",
    "statistics_name": "statistics",
    "statistics_path": "statistics",
    "write_statistics": "statistics",
}

__all__ = [
    "BACKENDS",
    "KINDS",
    "STATISTICS",
    "Blocks",
    "Flag",
    "Pool",
    "PoolError",
    "Report",
    "Statistics",
    "Weights",
    "inspect",
    "model_fingerprint",
    "statistics_name",
    "statistics_path",
    "write_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
