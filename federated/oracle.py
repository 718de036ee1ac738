"""Federated linear minimization oracle: gradients go down, scores come up, and only chosen clients upload weights.

    server -> client i:  G = ∇ℓ(θ_t + A Λ)                    4 P bytes
    client i -> server:  S[b,i] = ⟨G_b, τ_{i,b}⟩ for every b      8 bytes a row,      τ_i = θ̂_i − θ_t
    server -> client s:  upload,  s = argmin_i S[b,i]             once; from then on the server scores s itself

Frank-Wolfe needs of a client nothing but its scores until it is chosen, so the iterates are those of full uploads.
Against full uploads, n·P up, this saves (n − chosen)·P up and spends at most (iterations + 2)·n·P down, without what
was uploaded earlier. It pays where uplink is the scarce side, or where one iteration is enough to choose; where both
directions cost the same, it costs more than it saves.
Source: the linear minimization oracle of FW-Merging (Chen et al. 2025), eq. 2, which separates over the experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..pools import Blocks, Pool
from ..pools import operator as pool_operator
from ..pools.checkpoint import Buffer, Checkpoint, MemoryCheckpoint, Read, TensorInfo, open_checkpoint
from ..pools.compatibility import RenamedCheckpoint, mergeable
from ..pools.fingerprint import sample_digest
from ..pools.operator import Matrix
from ..pools.pool import Models
from ..pools.sources import Scratch, Shape, Stored
from ..pools.workers import Workers
from ..solvers import Domain, Free, Problem, Result, solve
from .errors import FederationError

if TYPE_CHECKING:
    from ..solvers.problem import Objective
    from .replies import Weights

NEVER = 1e100
"""Score of a lost client: no oracle chooses it, and in slopes and gaps 0 · NEVER is 0, where infinity would be nan."""


class RemoteClient(Protocol):
    """A client that has trained from the anchor, as the oracle sees it. What it raises makes it a lost client."""

    @property
    def name(self) -> str:
        """Its name, unique in the federation."""

    def scores(self, gradients: Sequence[Weights], rows: Mapping[str, slice]) -> Matrix:
        """Return ⟨G_b, τ_b⟩ for k gradients, float64 [k, rows]; `rows` are those of Λ that each tensor uses."""

    def upload(self, names: Sequence[str]) -> Weights:
        """Return these tensors of its model, as it stores them."""


class LocalScorer:
    """The client's side: holds its model θ̂ and the anchor θ_t that it was trained from.

    weights, anchor: state dicts or paths of checkpoints. Task vectors are formed and dotted by the pool's operator,
    piece by piece in the same order, so that scores are bit for bit the column of a central pool with the streaming
    backend; a resident one multiplies all experts at once and differs by the rounding of float32 sums.
    """

    def __init__(
        self, name: str, weights: Weights | str | PathLike[str], anchor: Weights | str | PathLike[str]
    ) -> None:
        self.name = name
        self._model = _checkpoint(f"model of client {name!r}", weights)
        self._anchor = _checkpoint(f"anchor of client {name!r}", anchor)
        self._workers = Workers(pool_operator.PIECE)

    def scores(self, gradients: Sequence[Weights], rows: Mapping[str, slice]) -> Matrix:
        """Return ⟨G_b, τ_b⟩ [k, rows], float64; pieces are added up in the order of `rows`."""
        source = Stored(self._anchor, [self._model], {name: self._anchor.tensors[name].shape for name in rows})
        count = max(part.stop for part in rows.values())
        blocks = Blocks("rows", dict(rows), count, {}, ())
        return pool_operator.correlate(source, self._workers, gradients, blocks, [0])[:, :, 0]

    def upload(self, names: Sequence[str]) -> Weights:
        """Return these tensors in their stored element types."""
        found = {}
        for name in names:
            info = self._model.tensors[name]
            values = self._model.reader(name)(0, info.numel, Buffer(info.nbytes))
            found[name] = values.view(info.shape)
        return found


def _checkpoint(label: str, model: Weights | str | PathLike[str]) -> Checkpoint:
    return open_checkpoint(model) if isinstance(model, (str, PathLike)) else MemoryCheckpoint(label, model)


@dataclass
class Traffic:
    """What the oracle sent and received, beside the anchor, which the clients have from their training.

    clients: how many there are. model_bytes: the merged tensors in the anchor's element types. down_bytes: gradients,
    dense float32, one for each client asked, whether it answered or not. up_bytes: scores (8 bytes each) and uploads as
    stored. messages: requests of the server. uploads: bytes by client, in order of arrival. lost: reasons by client.
    Names, slices and headers are not counted.
    """

    clients: int
    model_bytes: int
    down_bytes: int = 0
    up_bytes: int = 0
    messages: int = 0
    uploads: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def full_upload_bytes(self) -> int:
        """Bytes up if every client uploaded; those that did not are taken to store what the anchor stores."""
        return sum(self.uploads.values()) + (self.clients - len(self.uploads)) * self.model_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the record of a run."""
        return {
            "clients": self.clients,
            "down": self.down_bytes,
            "up": self.up_bytes,
            "full_upload": self.full_upload_bytes(),
            "messages": self.messages,
            "uploads": list(self.uploads),
            "lost": dict(self.lost),
        }


class RemotePool(Pool):
    """A pool whose experts stay with their clients until a coefficient is given to them.

    anchor: θ_t, a state dict or the path of a checkpoint. clients: sorted by name. include, exclude: as in `Pool.open`.

    `correlate` asks the clients; `combine` and `displacement` fetch those whose column is not 0, once. Which tensors
    differ between the models cannot be known without uploads, so all floating-point tensors of the anchor are merged
    (that pass the patterns); a tensor that no client changed scores 0 and would be carried by a central pool.
    A client that raises or answers nonsense is lost: it scores `NEVER` from then on, unless it has uploaded before, and
    `traffic.lost` says why. What needs task vectors that are not here (`gram`, transforms, a combine with a lost
    client) raises FederationError. The fingerprint is that of the anchor and of the clients' names.
    """

    def __init__(
        self,
        anchor: Weights | str | PathLike[str],
        clients: Sequence[RemoteClient],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        self.clients = {client.name: client for client in sorted(clients, key=lambda client: client.name)}
        _check_names([client.name for client in clients])
        base = RenamedCheckpoint(_checkpoint("anchor", anchor), {})
        candidates = mergeable(base, {}, include, exclude)
        absent = {name: _Absent(name, base) for name in self.clients}
        self._arrived = _Arrived(base, list(self.clients), candidates)
        super().__init__(
            _Unseen(base, absent, candidates, None),
            list(self.clients),
            dtype=None,
            backend="streaming",
            device=device,
            source=lambda workers: self._arrived,
        )
        self.traffic = Traffic(len(self.clients), sum(base.tensors[name].nbytes for name in candidates))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the anchor, as a pool samples it, and the clients' names: their weights are not known."""
        if self._fingerprint is None:
            base = self._models.base
            table = {name: str(base.tensors[name]) for name in sorted(self.candidates)}
            digest = hashlib.sha256(repr(("remote", self.names, table)).encode())
            digest.update(sample_digest(base, table, Scratch(pool_operator.SEGMENT)))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def correlate(
        self,
        gradients: Weights | Sequence[Weights],
        blocks: Blocks,
        *,
        experts: Sequence[int] | None = None,
    ) -> Matrix:
        """Return the scores S[b,i], as `Pool.correlate` does; those that have not uploaded compute their own.

        Raises FederationError if that leaves nobody.
        """
        self._check_blocks(blocks)
        one = isinstance(gradients, Mapping)
        stack: list[Weights] = [gradients] if isinstance(gradients, Mapping) else list(gradients)
        for gradient in stack:
            self._check_gradient(gradient)
        asked = list(range(self.n)) if experts is None else [self._index(expert) for expert in experts]
        here = [i for i in asked if self._arrived.has(i)]
        if here:
            scores = super().correlate(stack, blocks, experts=here)
        else:
            scores = np.full((len(stack), blocks.count, self.n), np.nan)
        sent = [{name: g[name].detach().to("cpu", torch.float32) for name in self.tensors if name in g} for g in stack]
        for i in asked:
            if not self._arrived.has(i):
                scores[:, :, i] = self._ask(self.names[i], sent, blocks)
        return scores[0] if one else scores

    def combine(
        self, coefficients: Matrix, blocks: Blocks, *, since: tuple[Matrix, dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return θ_t + Σ_i Λ[b,i] τ_{i,b}, as `Pool.combine` does, after the clients in it have uploaded."""
        self._require(self._matrix(coefficients, blocks, "coefficients"))
        return super().combine(coefficients, blocks, since=since)

    def displacement(self, coefficients: Matrix, blocks: Blocks) -> dict[str, torch.Tensor]:
        """Return Σ_i D[b,i] τ_{i,b}, as `Pool.displacement` does, after the clients in it have uploaded."""
        self._require(self._matrix(coefficients, blocks, "coefficients"))
        return super().displacement(coefficients, blocks)

    def fetch(self, names: Sequence[str]) -> tuple[str, ...]:
        """Have these clients upload, unless they have, and return those that are here now; the others are lost.

        Raises FederationError if that leaves nobody.
        """
        for name in names:
            if not self._arrived.has(self.names.index(name)) and name not in self.traffic.lost:
                self._upload(name)
        return tuple(name for name in names if self._arrived.has(self.names.index(name)))

    def _require(self, coefficients: Matrix) -> None:
        wanted = [self.names[i] for i in np.flatnonzero(coefficients.any(axis=0))]
        missing = [name for name in wanted if name not in self.fetch(wanted)]
        if missing:
            raise FederationError(
                f"oracle: client {missing[0]!r} was given a coefficient, but it is lost "
                f"({self.traffic.lost[missing[0]]}). Use RemoteProblem, whose oracle then chooses again, ask for fewer "
                "vertices, and start from the base or from clients that are there."
            )

    def _ask(self, name: str, gradients: Sequence[Weights], blocks: Blocks) -> Matrix | float:
        """Return one client's scores [k, rows], or NEVER if it is lost."""
        if name in self.traffic.lost:
            return NEVER
        self.traffic.messages += 1
        self.traffic.down_bytes += sum(4 * value.numel() for gradient in gradients for value in gradient.values())
        try:
            answer = np.asarray(self.clients[name].scores(gradients, dict(blocks.rows)), dtype=np.float64)
        except Exception as error:  # whatever happens at a client, the others go on
            self._lose(name, "scores", f"{type(error).__name__}: {error}")
            return NEVER
        self.traffic.up_bytes += 8 * answer.size
        expected = (len(gradients), blocks.count)
        if answer.shape != expected:
            self._lose(name, "scores", f"answered the shape {list(answer.shape)}, expected {list(expected)}")
            return NEVER
        if not np.isfinite(answer).all():
            self._lose(name, "scores", "answered NaN or infinity")
            return NEVER
        return answer

    def _upload(self, name: str) -> None:
        """Receive one client's weights, or lose it."""
        self.traffic.messages += 1
        try:
            weights = self.clients[name].upload(list(self.tensors))
        except Exception as error:
            self._lose(name, "upload", f"{type(error).__name__}: {error}")
            return
        size = sum(value.nbytes for value in weights.values())
        self.traffic.up_bytes += size
        for tensor, shape in self.tensors.items():
            value = weights.get(tensor)
            if value is None or tuple(value.shape) != shape or not value.dtype.is_floating_point:
                found = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
                self._lose(name, "upload", f"sent {found} for {tensor!r}, expected floating point {list(shape)}")
                return
            if not bool(value.isfinite().all()):
                self._lose(name, "upload", f"sent NaN or infinity in {tensor!r}")
                return
        self.traffic.uploads[name] = size
        model = RenamedCheckpoint(MemoryCheckpoint(f"upload of client {name!r}", weights), {})
        self._models.experts[name] = model
        self._arrived.add(self.names.index(name), model)

    def _lose(self, name: str, request: str, reason: str) -> None:
        self.traffic.lost[name] = f"{request}: {reason}"
        if len(self.traffic.lost) == self.n:
            told = "; ".join(f"{who}: {why}" for who, why in self.traffic.lost.items())
            raise FederationError(
                f"oracle: none of the {self.n} clients is left ({told}). Repeat the round with clients that answer."
            )


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise FederationError("oracle: there are no clients; a federation needs at least one.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FederationError(f"oracle: two clients are called {twice[0]!r}; give each its own name.")
    if "base" in names:
        raise FederationError("oracle: a client cannot be called 'base', which means the anchor; give it another name.")


class _Absent:
    """The checkpoint of a client that has not uploaded: assumed to look like the anchor, and not to be read."""

    def __init__(self, client: str, anchor: Checkpoint) -> None:
        self.label = f"client {client!r}"
        self.tensors: Mapping[str, TensorInfo] = anchor.tensors
        self._client = client

    def reader(self, name: str) -> Read:
        """Refuse."""
        raise _not_here(self._client)

    def location(self, name: str) -> str:
        """Return the client."""
        return self.label


def _not_here(client: str) -> FederationError:
    return FederationError(
        f"oracle: this needs the task vector of client {client!r}, which has not uploaded its weights. Fetch them with "
        "pool.fetch(pool.names), or use a solver that needs scores only, as Frank-Wolfe does."
    )


class _Unseen(Models):
    """Models of which only the base is known, so that every candidate is merged."""

    def merged(self, workers: Workers) -> dict[str, Shape]:
        """Return all candidates."""
        return dict(self.candidates)


class _Arrived:
    """Task vectors of the clients that have uploaded, each as `Stored` reads it."""

    serial = False
    frozen = 0

    def __init__(self, anchor: Checkpoint, names: Sequence[str], shapes: Mapping[str, Shape]) -> None:
        self.n = len(names)
        self.shapes = shapes
        self._names = names
        self._anchor = anchor
        self._base = Stored(anchor, [], shapes)
        self._stored: dict[int, Stored] = {}

    def has(self, expert: int) -> bool:
        """Whether a client has uploaded."""
        return expert in self._stored

    def add(self, expert: int, model: Checkpoint) -> None:
        """Take an upload."""
        self._stored[expert] = Stored(self._anchor, [model], self.shapes)

    def base(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Read the anchor."""
        return self._base.base(name, start, stop, scratch)

    def deltas(
        self,
        name: str,
        experts: Sequence[int],
        start: int,
        stop: int,
        scratch: Scratch,
        base: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield one task vector after the other; raise FederationError for one that is not here."""
        if base is None:
            base = self.base(name, start, stop, scratch)
        for position, expert in enumerate(experts):
            if expert not in self._stored:
                raise _not_here(self._names[expert])
            for _, delta in self._stored[expert].deltas(name, [0], start, stop, scratch, base):
                yield slice(position, position + 1), delta


@dataclass(frozen=True)
class Reachable(Domain):
    """A domain whose oracle fetches what it chooses, and chooses again if that fails.

    Only `minimizer` and `vertices` are the oracle; the gap looks at scores alone and fetches nothing.
    """

    inner: Domain
    pool: RemotePool

    @property
    def has_vertices(self) -> bool:  # type: ignore[override]
        """As the domain inside."""
        return self.inner.has_vertices

    @property
    def has_base(self) -> bool:  # type: ignore[override]
        """As the domain inside."""
        return self.inner.has_base

    @property
    def name(self) -> str:
        """As the domain inside."""
        return self.inner.name

    def describe(self) -> dict[str, Any]:
        """As the domain inside."""
        return self.inner.describe()

    def project(self, point: Matrix) -> Matrix:
        """As the domain inside."""
        return self.inner.project(point)

    def violation(self, point: Matrix) -> Matrix:
        """As the domain inside."""
        return self.inner.violation(point)

    def minimizer(self, scores: Matrix) -> Matrix:
        """Return argmin ⟨V, scores⟩ over the vertices of clients whose weights are here or arrive now."""
        while True:
            chosen = self.inner.minimizer(self._known(scores))
            if self._fetch(np.flatnonzero(chosen.any(axis=0))):
                return chosen

    def vertices(self, scores: Matrix, k: int = 1) -> Matrix:
        """Return the k best of the same vertices; a ranking of all is no choice, and fetches nothing."""
        while True:
            chosen = self.inner.vertices(self._known(scores), k)
            if k >= self.pool.n + self.has_base or self._fetch(np.unique(chosen[chosen >= 0])):
                return chosen

    def gap(self, point: Matrix, scores: Matrix) -> float | None:
        """Return the gap over the clients that are not lost."""
        return self.inner.gap(point, self._known(scores))

    def stationarity(self, point: Matrix, scores: Matrix) -> float:
        """Return the stationarity over the clients that are not lost."""
        return self.inner.stationarity(point, self._known(scores))

    def _known(self, scores: Matrix) -> Matrix:
        lost = [self.pool.names.index(name) for name in self.pool.traffic.lost]
        if not lost:
            return scores
        known = scores.copy()
        known[:, lost] = NEVER
        return known

    def _fetch(self, experts: NDArray[np.intp]) -> bool:
        """Whether nobody was lost while these uploaded."""
        before = len(self.pool.traffic.lost)
        self.pool.fetch([self.pool.names[int(i)] for i in experts])
        return len(self.pool.traffic.lost) == before


class RemoteProblem(Problem):
    """The problem over a remote pool: clients that fail to upload what the oracle chose are not chosen again."""

    def __init__(
        self,
        pool: RemotePool,
        objective: Objective,
        blocks: str | Sequence[str] | Blocks = "layer",
        domain: str | Domain = "capped",
    ) -> None:
        super().__init__(pool, objective, blocks, domain)
        if not isinstance(self.domain, Free):  # which has no oracle
            self.domain = Reachable(self.domain, pool)


def federated_frank_wolfe(
    anchor: Weights | str | PathLike[str],
    clients: Sequence[RemoteClient],
    objective: Objective,
    *,
    solver: Any = "frank-wolfe",
    blocks: str | Sequence[str] = "layer",
    domain: str | Domain = "capped",
    start: str | Matrix = "base",
    max_iter: int = 10,
    tol: float = 1e-6,
    device: str | torch.device = "cpu",
) -> tuple[Result, dict[str, torch.Tensor], Traffic]:
    """Merge without uploads but those that the oracle chooses: the result, the merged model, and what it cost.

    The model has all tensors of the anchor, floating-point ones in float32. Arguments are those of `RemotePool`,
    `RemoteProblem` and `solve`. Raises FederationError if no client is left.
    """
    pool = RemotePool(anchor, clients, device=device)
    problem = RemoteProblem(pool, objective, blocks, domain)
    result = solve(problem, solver, start=start, max_iter=max_iter, tol=tol)
    weights = {**pool.base_weights(), **pool.combine(result.coefficients, problem.blocks)}
    return result, weights, pool.traffic
