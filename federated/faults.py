"""What goes wrong with clients, for rehearsals: faulty replies, and clients that come and go.

clients = [Membership(Faulty(client, "huge", rounds={2}), joins=2, leaves=9), ...]
replies = fit_all(roster(clients, round), weights, round)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import FederationError
from .replies import Client, Reply, Weights

HUGE = 1000.0

FAULTS: dict[str, str] = {
    "nonfinite": "a NaN in one tensor",
    "shape": "one tensor transposed, or with an axis too many where that would not show",
    "missing": "one tensor left out",
    "huge": f"the update times {HUGE:g}",
    "stale": "the model of its last reply as that of this round; the unchanged anchor at first",
    "late": "the reply to the round before, which says so; at first none",
    "dropout": "no weights, and a reason",
    "crash": "an exception",
}
"""Kinds of faults, and what the server gets to see."""


class Faulty:
    """A client that does something wrong in some rounds, or in all if `rounds` is None.

    kind: a name in `FAULTS`. The same fault every time: it is always the same tensor that is damaged.
    Raises FederationError for an unknown kind.
    """

    def __init__(self, client: Client, kind: str, rounds: Collection[int] | None = None) -> None:
        if kind not in FAULTS:
            raise FederationError(f"client {client.name!r}: unknown fault {kind!r}; there are {', '.join(FAULTS)}.")
        self.client = client
        self.kind = kind
        self.rounds = None if rounds is None else frozenset(rounds)
        self._kept: list[Reply] = []  # the last replies of two different rounds, the newest last

    @property
    def name(self) -> str:
        """The client's name."""
        return self.client.name

    @property
    def samples(self) -> int:
        """Size of the client's training set."""
        return self.client.samples

    def fit(self, weights: Weights, round: int) -> Reply:
        """What the client answers, or what becomes of it."""
        faulty = self.rounds is None or round in self.rounds
        if faulty and self.kind == "crash":
            raise RuntimeError(f"rehearsed crash in round {round}")
        if faulty and self.kind == "dropout":
            return self._nothing(round, "rehearsed dropout")
        before = next((reply for reply in reversed(self._kept) if reply.round < round), None)
        if faulty and self.kind == "stale":
            if before is None or before.weights is None:
                copied = {name: tensor.detach().clone() for name, tensor in weights.items()}
                return self._keep(Reply(self.name, copied, round, samples=self.samples))
            return self._keep(replace(before, round=round))
        reply = self._keep(self.client.fit(weights, round))
        if not faulty or reply.weights is None:
            return reply
        if self.kind == "late":
            return self._nothing(round, "rehearsed delay: nothing has arrived yet") if before is None else before
        if not isinstance(reply.weights, Mapping):
            raise FederationError(f"client {self.name!r}: only tensors in memory can be damaged, not a file of them.")
        return replace(reply, weights=damaged(self.kind, weights, reply.weights))

    def _keep(self, reply: Reply) -> Reply:
        self._kept = [*[kept for kept in self._kept if kept.round != reply.round][-1:], reply]
        return reply

    def _nothing(self, round: int, why: str) -> Reply:
        return Reply(self.name, None, round, samples=self.samples, steps=0, error=why)


def damaged(kind: str, anchor: Weights, weights: Weights) -> dict[str, Tensor]:
    """A copy of the weights with a fault of the kinds 'nonfinite', 'shape', 'missing' and 'huge'.

    It hits the largest floating-point tensor, the first by name of several, or, for 'huge', all of them.
    """
    found = dict(weights)
    floats = [name for name in sorted(found) if found[name].is_floating_point()]
    victim = max(floats, key=lambda name: found[name].numel())
    tensor = found[victim]
    if kind == "nonfinite":
        found[victim] = tensor.clone()
        found[victim].view(-1)[-1] = math.nan
    elif kind == "shape":
        turned = tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor
        found[victim] = turned if turned.shape != tensor.shape else tensor[None]
    elif kind == "missing":
        del found[victim]
    elif kind == "huge":
        for name in floats:
            start = anchor[name].to(found[name].device, torch.float32)
            found[name] = (start + HUGE * (found[name].float() - start)).to(found[name].dtype)
    else:
        raise FederationError(f"a fault {kind!r} is not one of the weights; there are nonfinite, shape, missing, huge.")
    return found


@dataclass(frozen=True)
class Membership:
    """A client that is not always there.

    joins: its first round. leaves: the first round without it, or None. absent: rounds in between that it misses.
    """

    client: Client
    joins: int = 1
    leaves: int | None = None
    absent: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.leaves is not None and self.leaves <= self.joins:
            raise FederationError(
                f"client {self.name!r} leaves in round {self.leaves} and joins in round {self.joins}; "
                "it has to join before it leaves."
            )

    @property
    def name(self) -> str:
        """The client's name."""
        return self.client.name

    @property
    def samples(self) -> int:
        """Size of the client's training set."""
        return self.client.samples

    def present(self, round: int) -> bool:
        """Whether it takes part in this round."""
        return self.joins <= round and (self.leaves is None or round < self.leaves) and round not in self.absent

    def fit(self, weights: Weights, round: int) -> Reply:
        """What the client answers."""
        return self.client.fit(weights, round)


def roster(clients: Sequence[Client], round: int) -> list[Client]:
    """The clients that take part in a round, in their order; one without a `Membership` always does."""
    return [client for client in clients if not isinstance(client, Membership) or client.present(round)]
