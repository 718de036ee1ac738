"""Continual federated merging: clients fine-tune one model, the server merges what comes back, round after round.

θ_{t+1} = Merge(θ_t; θ̂_1 .. θ̂_N), where every solver and every closed-form merge of the package is a Merge.

Names are imported when they are first used, so that the table of server steps costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import FederationError

if TYPE_CHECKING:
    from .clients import TaskClient, UpdateCache, fit_all
    from .faults import FAULTS, Faulty, Membership, roster
    from .oracle import LocalScorer, RemoteClient, RemotePool, RemoteProblem, Traffic, federated_frank_wolfe
    from .partition import dirichlet, iid
    from .replies import Client, Reply
    from .training import Training, train

_MODULES = {
    "Client": "replies",
    "FAULTS": "faults",
    "Faulty": "faults",
    "LocalScorer": "oracle",
    "Membership": "faults",
    "RemoteClient": "oracle",
    "RemotePool": "oracle",
    "RemoteProblem": "oracle",
    "Reply": "replies",
    "TaskClient": "clients",
    "Traffic": "oracle",
    "Training": "training",
    "UpdateCache": "clients",
    "dirichlet": "partition",
    "federated_frank_wolfe": "oracle",
    "fit_all": "clients",
    "iid": "partition",
    "roster": "faults",
    "train": "training",
}

__all__ = [
    "FAULTS",
    "Client",
    "Faulty",
    "FederationError",
    "LocalScorer",
    "Membership",
    "RemoteClient",
    "RemotePool",
    "RemoteProblem",
    "Reply",
    "TaskClient",
    "Traffic",
    "Training",
    "UpdateCache",
    "dirichlet",
    "federated_frank_wolfe",
    "fit_all",
    "iid",
    "roster",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
