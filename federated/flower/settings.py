"""What every Flower run of a federation is told by `flwr run --run-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FederationError


@dataclass(frozen=True)
class Settings:
    """Keys of the run's configuration that concern the rounds; what is merged is the matter of whoever builds it.

    folder: where the server writes, and goes on if a federation is there; empty for nowhere. sampled: clients that
    train in a round, 0 for all. patience: seconds to wait for SuperNodes. timeout: seconds to wait for the answers of a
    round.
    """

    rounds: int = 2
    folder: str = ""
    sampled: int = 0
    patience: float = 60.0
    timeout: float = 3600.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read a run_config, which may have other keys besides. Raises FederationError for values of another kind."""
        found: dict[str, Any] = {}
        for key, kind in (("rounds", int), ("folder", str), ("sampled", int), ("patience", float), ("timeout", float)):
            if key not in config:
                continue
            value = config[key]
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise FederationError(f"flower: run-config {key} must be {kind.__name__}. Got {value!r} instead.")
            if not isinstance(value, str) and value < 0:
                raise FederationError(f"flower: run-config {key} must be at least 0. Got {value!r} instead.")
            found[key] = value
        return cls(**found)
