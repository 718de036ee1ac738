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
    from .federation import Accuracy, Federation, History, federate
    from .oracle import LocalScorer, RemoteClient, RemotePool, RemoteProblem, Traffic, federated_frank_wolfe
    from .partition import dirichlet, iid
    from .registry import STEPS, make_step
    from .replies import Client, Reply
    from .rounds import merge_round
    from .screening import Screening
    from .state import ServerState
    from .step import Proposal, Round, ServerData, ServerStep
    from .training import Training, train

_MODULES = {
    "FAULTS": "faults",
    "STEPS": "registry",
    "Accuracy": "federation",
    "Client": "replies",
    "Faulty": "faults",
    "Federation": "federation",
    "History": "federation",
    "LocalScorer": "oracle",
    "Membership": "faults",
    "Proposal": "step",
    "RemoteClient": "oracle",
    "RemotePool": "oracle",
    "RemoteProblem": "oracle",
    "Reply": "replies",
    "Round": "step",
    "Screening": "screening",
    "ServerData": "step",
    "ServerState": "state",
    "ServerStep": "step",
    "TaskClient": "clients",
    "Traffic": "oracle",
    "Training": "training",
    "UpdateCache": "clients",
    "dirichlet": "partition",
    "federate": "federation",
    "federated_frank_wolfe": "oracle",
    "fit_all": "clients",
    "iid": "partition",
    "make_step": "registry",
    "merge_round": "rounds",
    "roster": "faults",
    "train": "training",
}

__all__ = [
    "FAULTS",
    "STEPS",
    "Accuracy",
    "Client",
    "Faulty",
    "Federation",
    "FederationError",
    "History",
    "LocalScorer",
    "Membership",
    "Proposal",
    "RemoteClient",
    "RemotePool",
    "RemoteProblem",
    "Reply",
    "Round",
    "Screening",
    "ServerData",
    "ServerState",
    "ServerStep",
    "TaskClient",
    "Traffic",
    "Training",
    "UpdateCache",
    "dirichlet",
    "federate",
    "federated_frank_wolfe",
    "fit_all",
    "iid",
    "make_step",
    "merge_round",
    "roster",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
