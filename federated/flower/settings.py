"""What a Flower run is told by `flwr run --run-config`, and the federation that it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import FederationError
from ..federation import Accuracy, Federation
from ..replies import Client
from ..screening import Screening


@dataclass(frozen=True)
class Settings:
    """The keys of the run's configuration.

    folder: where the server writes, and goes on if a federation is there; empty for nowhere. sampled: clients that
    train in a round, 0 for all. minimum: replies that a round needs. patience: seconds to wait for SuperNodes.
    timeout: seconds to wait for the answers of a round.
    """

    step: str = "fedavg"
    rounds: int = 2
    clients: int = 2
    seed: int = 0
    folder: str = ""
    images: int = 64
    sampled: int = 0
    minimum: int = 1
    patience: float = 60.0
    timeout: float = 3600.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read a run_config. Raises FederationError for unknown keys and values of another type."""
        known = {field.name: type(field.default) for field in fields(cls)}
        for key, value in config.items():
            if key not in known:
                raise FederationError(
                    f"flower: unknown run-config key {key!r}; the keys are {', '.join(sorted(known))}."
                )
            wanted = (int, float) if known[key] is float else known[key]
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise FederationError(f"flower: run-config {key} must be {known[key].__name__}. Got {value!r} instead.")
        return cls(**config)


def client_of(settings: Settings, index: int) -> Client:
    from ... import zoo as z
    from ..clients import TaskClient
    from ..training import Training

    zoo = z.load()
    return TaskClient(
        zoo.tasks[index],
        zoo.model(),
        zoo.task(zoo.tasks[index], limit=settings.images),
        Training(epochs=1, batch=32, lr=1e-4, seed=settings.seed),
    )


def federation_of(settings: Settings) -> Federation:
    from ... import zoo as z
    from ...objectives import evaluate
    from ...zoo.storage import read
    from ..registry import make_step

    zoo = z.load()
    model = zoo.model()
    tests = [zoo.task(n, "test", limit=100) for n in zoo.tasks[: settings.clients]]

    def ev(w):
        s = evaluate(model, w, tests)
        return Accuracy({k: float(v) for k, v in s.items()} if hasattr(s, "items") else {})

    return Federation(
        [client_of(settings, i) for i in range(settings.clients)],
        read(zoo.base),
        make_step(settings.step),
        evaluate=ev,
        screening=Screening(minimum=settings.minimum),
        seed=settings.seed,
        protocol="stand-in",
    )
