"""Checkpoints on disk as a linear operator with an adjoint.

combine(Λ) = θ0 + Σ_i Λ[b,i] τ_{i,b},    correlate(G)[b,i] = ⟨G_b, τ_{i,b}⟩,    τ_i = θ_i − θ0
"""

from .blocks import KINDS, Blocks
from .errors import PoolError
from .fingerprint import model_fingerprint
from .inspection import Flag, Report, inspect
from .operator import Weights
from .pool import BACKENDS, Pool
from .statistics import STATISTICS, Statistics, statistics_name, statistics_path, write_statistics

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
