"""Which replies a round can be merged from: each one that cannot is left out, with a named reason.

The checks go from cheap to dear: what the reply says of itself, names and shapes, a fingerprint, and the norms of the
updates, which take one pass over the data. The largest norm allowed follows the median of the clients' own and recent
norms, so it needs no setting for a model or a learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from statistics import median_low
from typing import Any

import numpy as np
import torch

from ..pools import Pool, PoolError, model_fingerprint
from ..pools.checkpoint import Checkpoint, MemoryCheckpoint, open_checkpoint
from ..pools.sources import Scratch
from .errors import FederationError
from .replies import Reply, Weights

Array = np.ndarray[Any, Any]
PIECE = 1 << 16  # elements that are compared at once

REASONS = {
    "failed": "the client sent no model: it raised, or dropped out",
    "duplicate": "the client sent more than one reply; the first one counts",
    "late": "the reply is trained from the model of another round",
    "counts": "the numbers of samples and steps that the client reports are none",
    "unreadable": "the client's file is not a readable checkpoint",
    "names": "tensors of the model are missing, or there are others",
    "shape": "a tensor has another shape or another kind of elements",
    "unchanged": "the model is the one that was sent out",
    "repeated": "the model is the one that the client sent, or was sent, before",
    "nonfinite": "the model, or its Fisher diagonal, holds NaN or infinity",
    "norm": "the update is far larger than those of the other clients and of recent rounds",
}


@dataclass(frozen=True)
class Screening:
    """What a reply must be like.

    norm_ratio: largest norm of an update, relative to the median of this round's and recent ones; minimum: replies
    that a round needs; attempts: how often a round is tried before the federation stops.
    """

    norm_ratio: float = 10.0
    minimum: int = 1
    attempts: int = 3

    def __post_init__(self) -> None:
        for name, low in (("norm_ratio", 1.0), ("minimum", 1), ("attempts", 1)):
            value = getattr(self, name)
            whole = isinstance(low, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value >= low:
                kind = "an integer" if whole else "a number"
                raise FederationError(
                    f"The '{name}' parameter of Screening must be {kind} in [{low:g}, inf). Got {value!r} instead."
                )


@dataclass(frozen=True)
class Rejection:
    """A reply that is left out: whose, why (a name of `REASONS`), and what was found."""

    client: str
    reason: str
    detail: str

    def describe(self) -> dict[str, str]:
        """Return the entry of the round's record."""
        return {"client": self.client, "reason": self.reason, "detail": self.detail}


@dataclass(frozen=True)
class Screened:
    """The replies that remain, as a pool on the anchor in the order of their names (None if there are none).

    gram: inner products of their updates [n, n]; fingerprints: of all models of this round that could be read, those
    left out, too, since they may come again, and of the anchor; received: bytes of all models sent.
    """

    accepted: tuple[Reply, ...]
    rejected: tuple[Rejection, ...]
    pool: Pool | None
    gram: Array
    fingerprints: dict[str, str]
    received: int


def checkpoint_of(reply: Reply) -> Checkpoint:
    """Return a reply's weights as a checkpoint; reads headers only."""
    if isinstance(reply.weights, Mapping):
        return MemoryCheckpoint(f"the model of client {reply.client!r}", reply.weights)
    if reply.weights is None:
        raise FederationError(f"client {reply.client!r} sent no model: {reply.error or 'no reason was given'}")
    if not isinstance(reply.weights, (str, PathLike)):
        raise PoolError(f"client {reply.client!r} sent {type(reply.weights).__name__}, no state dict and no path.")
    return open_checkpoint(reply.weights)


def screen(
    anchor: Weights,
    replies: Sequence[Reply],
    *,
    number: int,
    options: Screening,
    last: Mapping[str, str] | None = None,
    norms: Sequence[float] = (),
    device: str = "cpu",
) -> Screened:
    """Sort replies by client and leave out those that cannot be merged.

    Of several acceptable replies of one client the first one counts. number: of the round. last: fingerprint of what
    each client sent before. norms: of earlier updates.
    """
    rejected: list[Rejection] = []
    candidates: dict[str, Reply] = {}
    fingerprints: dict[str, str] = {}
    sent = MemoryCheckpoint("the model that was sent", anchor)
    fingerprints[SENT] = model_fingerprint(sent)
    received = 0
    for reply in sorted(replies, key=lambda reply: reply.client):
        problem = _claims(reply, number, candidates)
        if reply.weights is not None:
            try:
                found = checkpoint_of(reply)
                received += sum(info.nbytes for info in found.tensors.values())
                problem = problem or _fits(sent, found) or _statistics(sent, reply.fisher)
                if problem is None:
                    mark = fingerprints[reply.client] = model_fingerprint(found)
                    if not _moved(sent, found):
                        problem = "unchanged", f"all floating-point tensors are those that round {number} began with"
                    elif mark == (last or {}).get(reply.client):
                        problem = "repeated", "all tensors are those that this client sent before"
                    elif mark == (last or {}).get(SENT):
                        problem = "repeated", "all tensors are those that the round before began with"
            except (PoolError, OSError) as error:
                problem = problem or ("unreadable", str(error))
        if problem is None:
            candidates[reply.client] = reply
        else:
            rejected.append(Rejection(reply.client, *problem))
    if not candidates:
        return Screened((), tuple(rejected), None, np.zeros((0, 0)), fingerprints, received)
    pool = pool_of(anchor, candidates.values(), "streaming", device)
    gram = pool.gram(pool.blocks("model"))[0]
    lengths = {name: float(np.sqrt(gram[i, i])) for i, name in enumerate(pool.names)}
    measured = [length for length in lengths.values() if 0 < length < math.inf]
    usual = median_low(sorted([*measured, *norms])) if measured else math.inf
    bad = set()
    for name, length in lengths.items():
        problem = None
        if length == 0:
            problem = "unchanged", "the update is too small for its norm to be a number above 0"
        elif not math.isfinite(length):
            where = _nonfinite(checkpoint_of(candidates[name]))
            problem = "nonfinite", f"{where!r} holds NaN or infinity"
            if where is None:
                problem = "norm", "the update's norm is too large for a number"
        elif length > options.norm_ratio * usual:
            detail = f"the update's norm is {length:.3g}, {length / usual:.0f} times the median {usual:.3g}"
            problem = "norm", f"{detail}; at most {options.norm_ratio:g} times are taken"
        if problem is not None:
            bad.add(name)
            rejected.append(Rejection(name, *problem))
    kept = [name for name in pool.names if name not in bad]
    accepted = tuple(candidates[name] for name in kept)
    rejected.sort(key=lambda rejection: rejection.client)
    if len(kept) < pool.n:
        if not kept:
            return Screened((), tuple(rejected), None, np.zeros((0, 0)), fingerprints, received)
        # Anew, so that not even the rounding of its sums tells that there was anybody else.
        pool = pool_of(anchor, accepted, "streaming", device)
        gram = pool.gram(pool.blocks("model"))[0]
    return Screened(accepted, tuple(rejected), pool, gram, fingerprints, received)


def pool_of(
    anchor: Weights, replies: Sequence[Reply] | Any, backend: str, device: str, origin: Weights | None = None
) -> Pool:
    """Return the pool of some replies on the anchor, with the origin as one more expert if it is given."""
    models = {reply.client: reply.weights for reply in replies}
    if origin is not None:
        models[ORIGIN] = origin
    return Pool.from_state_dicts(anchor, models, backend=backend, device=device)  # type: ignore[arg-type]


ORIGIN = "origin"
"""The expert θ_0, the model that the federation began with, where it is a vertex."""
SENT = "(sent)"
"""Among the fingerprints of clients' models, that of the model that they were sent."""


def _claims(reply: Reply, number: int, taken: Mapping[str, Reply]) -> tuple[str, str] | None:
    if reply.client in taken:
        return "duplicate", "an earlier reply of this client was taken"
    if reply.weights is None:
        return "failed", reply.error or "no reason was given"
    if reply.round != number:
        return "late", f"trained from the model of round {reply.round}; this is round {number}"
    for name in ("samples", "steps"):
        count = getattr(reply, name)
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            return "counts", f"{name} is {count!r}, expected an integer of at least 1"
    return None


def _fits(sent: Checkpoint, found: Checkpoint) -> tuple[str, str] | None:
    missing = [name for name in sent.tensors if name not in found.tensors]
    if missing:
        return "names", f"{missing[0]!r} is missing, {len(missing)} of {len(sent.tensors)} tensors in all"
    other = [name for name in found.tensors if name not in sent.tensors]
    if other:
        return "names", f"{other[0]!r} is no tensor of the model that was sent"
    for name, info in sent.tensors.items():
        reply = found.tensors[name]
        if reply.shape != info.shape:
            return "shape", f"{name!r} has shape {list(reply.shape)}, expected {list(info.shape)}"
        rounded = info.is_float and reply.dtype.itemsize < info.dtype.itemsize  # rounding is as large as the update
        if reply.is_float != info.is_float or rounded:
            return "shape", f"{name!r} has elements {reply.dtype}, expected {info.dtype}"
    return None


def _statistics(sent: Checkpoint, fisher: Weights | None) -> tuple[str, str] | None:
    for name, tensor in (fisher or {}).items():
        if name in sent.tensors and tensor.shape != sent.tensors[name].shape:
            expected = list(sent.tensors[name].shape)
            return "shape", f"the Fisher diagonal of {name!r} has shape {list(tensor.shape)}, expected {expected}"
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            return "nonfinite", f"the Fisher diagonal of {name!r} holds NaN, infinity or a number below 0"
    return None


def _moved(sent: Checkpoint, found: Checkpoint) -> bool:
    """Whether some floating-point value differs; reads up to the first one that does."""
    return any(
        not torch.equal(ours.double(), theirs.double())
        for name, info in sent.tensors.items()
        if info.is_float
        for ours, theirs in zip(_pieces(sent, name), _pieces(found, name), strict=True)
    )


def _nonfinite(found: Checkpoint) -> str | None:
    """Return the first tensor that holds NaN or infinity."""
    floats = (name for name, info in found.tensors.items() if info.is_float)
    return next((n for n in floats if not all(bool(torch.isfinite(p).all()) for p in _pieces(found, n))), None)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    scratch, read, size = Scratch(PIECE), checkpoint.reader(name), checkpoint.tensors[name].numel
    for start in range(0, size, PIECE):
        yield read(start, min(start + PIECE, size), scratch.raw)
