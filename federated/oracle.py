"""Federated linear minimization oracle: gradients go down, scores come up, and only what is chosen is uploaded.

    server -> client i:  G = ∇ℓ(θ_t + A Λ), the tensors that i has not uploaded            4 bytes an element
    client i -> server:  S[b,i] = ⟨G_b, τ_{i,b}⟩ for the rows b of these, τ_i = θ̂_i − θ_t      8 bytes a row
    server -> client s:  upload block b,  s = argmin_i S[b,i]            once: from then on the server scores it itself

Frank-Wolfe needs nothing of a client but its scores until it is chosen, so the iterates are those of full uploads.
Against full uploads (n·P elements up) what was never chosen is saved: one iteration of the hard oracle uploads at most
P elements, however many clients there are (with blocks of whole tensors; kind "row" uploads the tensors whole, too).
The price is the downlink: up to (iterations + 2)·n·P elements of gradients, the two for the last iterate and its
certificate. It pays where uplink is the scarce side, or where few iterations are enough; where both directions cost the
same, it costs more than it saves. Gradients in bfloat16 halve the downlink; scores are then off by at most 2⁻⁹ Σ|G τ|,
so that a vertex may change only where two are that close, and the gap is as inexact.
Source: the linear minimization oracle of FW-Merging (Chen et al. 2025), eq. 2, which separates over the experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from ..solvers import Box, Capped, Domain, Free, Problem, Result, Simplex, Sparse, solve
from ..solvers.domains import indicator
from .errors import FederationError

if TYPE_CHECKING:
    from ..solvers.problem import Objective
    from .replies import Weights

NEVER = 1e100
"""Score of a lost client: no oracle chooses it, and in slopes and gaps 0 · NEVER is 0, where infinity would be nan."""
UPLOADS = ("blocks", "model")
GRADIENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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

    full_upload_bytes: what would come up if every client sent all merged tensors; those that have not been seen are
    taken to be stored as the anchor's. down_bytes: gradients, dense, to each client asked, whether it answers or not.
    up_bytes: scores (8 bytes each) and uploads as stored. messages: requests of the server. uploads: bytes by client,
    in order of the first arrival. lost: reasons by client. Names, slices and headers are not counted.
    """

    clients: int
    full_upload_bytes: int
    down_bytes: int = 0
    up_bytes: int = 0
    messages: int = 0
    uploads: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record of a run."""
        return {
            "clients": self.clients,
            "down": self.down_bytes,
            "up": self.up_bytes,
            "full_upload": self.full_upload_bytes,
            "messages": self.messages,
            "uploads": dict(self.uploads),
            "lost": dict(self.lost),
        }


class RemotePool(Pool):
    """A pool whose experts stay with their clients until a coefficient is given to them.

    anchor: θ_t, a state dict or the path of a checkpoint. clients: sorted by name. include, exclude: as in `Pool.open`.
    uploads: "blocks", the tensors whose coefficients are not 0 (least up), or "model", all tensors of a client as soon
    as one is needed (fewer gradients down, as it is not asked again). gradient_dtype: "float32" or "bfloat16", for what
    goes down; the server's own scores stay in float32.

    `correlate` asks the clients; `combine` and `displacement` fetch what has a coefficient and is not here, once. Which
    tensors differ between the models cannot be known without uploads, so all floating-point tensors of the anchor (that
    pass the patterns) are merged; one that no client changed scores 0, and would be carried by a central pool.
    A client that raises or answers nonsense is lost: `traffic.lost` says why, and what it has not uploaded scores
    `NEVER` from then on. What needs task vectors that are not here (`gram`, transforms, coefficients for a lost client)
    raises FederationError. The fingerprint is that of the anchor and of the clients' names.
    """

    def __init__(
        self,
        anchor: Weights | str | PathLike[str],
        clients: Sequence[RemoteClient],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        uploads: str = "blocks",
        gradient_dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        _check_names([client.name for client in clients])
        _check_choice("uploads", uploads, UPLOADS)
        _check_choice("gradient_dtype", gradient_dtype, GRADIENT_DTYPES)
        self.clients = {client.name: client for client in sorted(clients, key=lambda client: client.name)}
        self.uploads = uploads
        self.gradient_dtype = gradient_dtype
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
        self.traffic = Traffic(self.n, self.n * sum(base.tensors[name].nbytes for name in candidates))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the anchor, as a pool samples it, and the clients' names: their weights are not known."""
        if self._fingerprint is None:
            base = self._models.base
            table = {name: str(base.tensors[name]) for name in sorted(self.candidates)}
            digest = hashlib.sha256(repr(("remote", self.names, table)).encode())
            digest.update(sample_digest(base, table, self._workers.scratch()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def correlate(
        self,
        gradients: Weights | Sequence[Weights],
        blocks: Blocks,
        *,
        experts: Sequence[int] | None = None,
    ) -> Matrix:
        """Return the scores S[b,i], as `Pool.correlate` does; of what is not here, the clients compute them.

        Raises FederationError if that leaves nobody.
        """
        self._check_blocks(blocks)
        one = isinstance(gradients, Mapping)
        stack: list[Weights] = [gradients] if isinstance(gradients, Mapping) else list(gradients)
        for gradient in stack:
            self._check_gradient(gradient)
        names = [name for name in self.tensors if any(name in gradient for gradient in stack)]
        scores = np.full((len(stack), blocks.count, self.n), np.nan)
        for i in range(self.n) if experts is None else [self._index(expert) for expert in experts]:
            column = np.zeros((len(stack), blocks.count))
            here = [name for name in names if self._arrived.has(i, name)]
            if here:
                column += super().correlate(_only(stack, here, torch.float32), blocks, experts=[i])[:, :, i]
            away = [name for name in names if not self._arrived.has(i, name)]
            if away:
                sent = _only(stack, away, GRADIENT_DTYPES[self.gradient_dtype])
                rows, found = self._ask(self.names[i], sent, blocks, away)
                column[:, rows] += found
            scores[:, :, i] = column
        return scores[0] if one else scores

    def combine(
        self, coefficients: Matrix, blocks: Blocks, *, since: tuple[Matrix, dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return θ_t + Σ_i Λ[b,i] τ_{i,b}, as `Pool.combine` does, after what it needs has been uploaded."""
        self._require(self._matrix(coefficients, blocks, "coefficients"), blocks)
        return super().combine(coefficients, blocks, since=since)

    def displacement(self, coefficients: Matrix, blocks: Blocks) -> dict[str, torch.Tensor]:
        """Return Σ_i D[b,i] τ_{i,b}, as `Pool.displacement` does, after what it needs has been uploaded."""
        self._require(self._matrix(coefficients, blocks, "coefficients"), blocks)
        return super().displacement(coefficients, blocks)

    def fetch(self, name: str, tensors: Sequence[str] | None = None) -> bool:
        """Have a client upload these tensors (None: all), unless they are here; False if it is lost.

        Raises FederationError if that leaves nobody.
        """
        if name not in self.clients:
            raise FederationError(f"oracle: there is no client {name!r}; the clients are {', '.join(self.names)}.")
        i = self.names.index(name)
        missing = [t for t in (self.tensors if tensors is None else tensors) if not self._arrived.has(i, t)]
        if missing and self.uploads == "model":
            missing = [t for t in self.tensors if not self._arrived.has(i, t)]
        if missing and name not in self.traffic.lost:
            self._upload(name, missing)
        return not missing or name not in self.traffic.lost

    def reach(self, coefficients: Matrix, blocks: Blocks) -> str | None:
        """Fetch what has a coefficient that is not 0 [rows, n]; return the first client of which that failed."""
        for i in np.flatnonzero(coefficients.any(axis=0)):
            needed = [name for name, part in blocks.rows.items() if coefficients[part, i].any()]
            if not self.fetch(self.names[i], needed):
                return self.names[i]
        return None

    def unreachable(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Return which blocks of lost clients have not been uploaded [rows, n]."""
        found = np.zeros((blocks.count, self.n), dtype=bool)
        for name in self.traffic.lost:
            i = self.names.index(name)
            for tensor, part in blocks.rows.items():
                found[part, i] |= not self._arrived.has(i, tensor)
        return found

    def _require(self, coefficients: Matrix, blocks: Blocks) -> None:
        failed = self.reach(coefficients, blocks)
        if failed is not None:
            raise FederationError(
                f"oracle: client {failed!r} was given a coefficient, but it is lost ({self.traffic.lost[failed]}). Use "
                "RemoteProblem, whose oracle then chooses again, ask for fewer vertices, and start from the base or "
                "from clients that are there."
            )

    def _ask(
        self, name: str, gradients: Sequence[Weights], blocks: Blocks, tensors: Sequence[str]
    ) -> tuple[NDArray[np.int64], Matrix | float]:
        """Return the rows that these tensors use, and one client's scores of them [k, rows], or NEVER if it is lost."""
        used = np.unique(np.concatenate([np.arange(blocks.rows[t].start, blocks.rows[t].stop) for t in tensors]))
        if name in self.traffic.lost:
            return used, NEVER
        rows = {}
        for tensor in tensors:
            first = int(np.searchsorted(used, blocks.rows[tensor].start))
            rows[tensor] = slice(first, first + blocks.rows[tensor].stop - blocks.rows[tensor].start)
        self.traffic.messages += 1
        self.traffic.down_bytes += sum(value.nbytes for gradient in gradients for value in gradient.values())
        try:
            answer = np.asarray(self.clients[name].scores(gradients, rows), dtype=np.float64)
        except Exception as error:  # whatever happens at a client, the others go on
            self._lose(name, "scores", f"{type(error).__name__}: {error}")
            return used, NEVER
        self.traffic.up_bytes += 8 * answer.size
        expected = (len(gradients), len(used))
        if answer.shape != expected:
            self._lose(name, "scores", f"answered the shape {list(answer.shape)}, expected {list(expected)}")
            return used, NEVER
        if not np.isfinite(answer).all():
            self._lose(name, "scores", "answered NaN or infinity")
            return used, NEVER
        return used, answer

    def _upload(self, name: str, tensors: Sequence[str]) -> None:
        """Receive tensors of one client, or lose it."""
        self.traffic.messages += 1
        try:
            weights = self.clients[name].upload(tensors)
        except Exception as error:
            self._lose(name, "upload", f"{type(error).__name__}: {error}")
            return
        size = sum(value.nbytes for value in weights.values())
        self.traffic.up_bytes += size
        for tensor in tensors:
            value, shape = weights.get(tensor), self.tensors[tensor]
            if value is None or tuple(value.shape) != shape or not value.dtype.is_floating_point:
                found = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
                self._lose(name, "upload", f"sent {found} for {tensor!r}, expected floating point {list(shape)}")
                return
            if not bool(value.isfinite().all()):
                self._lose(name, "upload", f"sent NaN or infinity in {tensor!r}")
                return
        self.traffic.uploads[name] = self.traffic.uploads.get(name, 0) + size
        self.traffic.full_upload_bytes += size - sum(self._models.base.tensors[tensor].nbytes for tensor in tensors)
        whole = self._arrived.add(self.names.index(name), {tensor: weights[tensor] for tensor in tensors})
        if whole is not None:
            self._models.experts[name] = whole

    def _lose(self, name: str, request: str, reason: str) -> None:
        self.traffic.lost[name] = f"{request}: {reason}"
        if len(self.traffic.lost) == self.n and not self.traffic.uploads:
            told = "; ".join(f"{who}: {why}" for who, why in self.traffic.lost.items())
            raise FederationError(
                f"oracle: none of the {self.n} clients is left ({told}). Repeat the round with clients that answer."
            )


def _only(gradients: Sequence[Weights], names: Sequence[str], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    return [{n: g[n].detach().to("cpu", dtype) for n in names if n in g} for g in gradients]


def _check_choice(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise FederationError(f"oracle: {option}={value!r} is unknown; it is {' or '.join(map(repr, known))}.")


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
        f"oracle: this needs the task vector of client {client!r}, which has not uploaded it. Have every client "
        "upload with pool.fetch(name), or use a solver that needs scores only, as Frank-Wolfe does."
    )


class _Unseen(Models):
    """Models of which only the base is known, so that every candidate is merged."""

    def merged(self, workers: Workers) -> dict[str, Shape]:
        """Return all candidates."""
        return dict(self.candidates)


class _Arrived:
    """Task vectors of what the clients have uploaded, tensor by tensor, each as `Stored` reads it."""

    serial = False
    frozen = 0

    def __init__(self, anchor: Checkpoint, names: Sequence[str], shapes: Mapping[str, Shape]) -> None:
        self.n = len(names)
        self.shapes = shapes
        self._names = names
        self._anchor = anchor
        self._base = Stored(anchor, [], shapes)
        self._held: list[dict[str, torch.Tensor]] = [{} for _ in names]
        self._stored: list[dict[str, Stored]] = [{} for _ in names]

    def has(self, expert: int, name: str) -> bool:
        """Whether a client has uploaded a tensor."""
        return name in self._stored[expert]

    def add(self, expert: int, weights: Mapping[str, torch.Tensor]) -> RenamedCheckpoint | None:
        """Take an upload; return the client's model if that completes it."""
        self._held[expert].update(weights)
        label = f"upload of client {self._names[expert]!r}"
        part = Stored(self._anchor, [MemoryCheckpoint(label, weights)], {name: self.shapes[name] for name in weights})
        self._stored[expert].update(dict.fromkeys(weights, part))
        if len(self._held[expert]) < len(self.shapes):
            return None
        return RenamedCheckpoint(MemoryCheckpoint(label, self._held[expert]), {})

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
            if name not in self._stored[expert]:
                raise _not_here(self._names[expert])
            for _, delta in self._stored[expert][name].deltas(name, [0], start, stop, scratch, base):
                yield slice(position, position + 1), delta


@dataclass(frozen=True)
class Reachable(Domain):
    """A domain whose oracle fetches what it chooses, and chooses again if that fails.

    Only `minimizer` and `vertices` are the oracle; the gap looks at scores alone and fetches nothing.
    """

    inner: Domain
    pool: RemotePool
    blocks: Blocks

    @property
    def has_vertices(self) -> bool:  # type: ignore[override]
        """As the domain inside."""
        return self.inner.has_vertices

    @property
    def has_base(self) -> bool:  # type: ignore[override]
        """As the domain inside."""
        return self.inner.has_base

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """As the domain inside."""
        return self.inner.convex

    @property
    def name(self) -> str:
        """As the domain inside."""
        return self.inner.name

    def describe(self) -> dict[str, Any]:
        """As the domain inside."""
        return self.inner.describe()

    def bind(
        self, experts: Sequence[str], rows: Sequence[str], layers: Mapping[str, Sequence[int] | Matrix] | None = None
    ) -> Domain:
        """The domain inside, bound, with the same oracle."""
        return replace(self, inner=self.inner.bind(experts, rows, layers))

    def cells(self, rows: int) -> Matrix:
        """As the domain inside."""
        return self.inner.cells(rows)

    def breach(self, point: Matrix, row: int) -> str:
        """As the domain inside."""
        return self.inner.breach(point, row)

    def project(self, point: Matrix) -> Matrix:
        """As the domain inside."""
        return self.inner.project(point)

    def violation(self, point: Matrix) -> Matrix:
        """As the domain inside."""
        return self.inner.violation(point)

    def minimizer(self, scores: Matrix) -> Matrix:
        """Return argmin ⟨V, scores⟩ over the vertices whose weights are here or arrive now."""
        while True:
            chosen = self.inner.minimizer(self._known(scores))
            if self._arrives(chosen):
                return chosen

    def vertices(self, scores: Matrix, k: int = 1) -> Matrix:
        """Return the k best of the same vertices; a ranking of all is no choice, and fetches nothing."""
        while True:
            chosen = self.inner.vertices(self._known(scores), k)
            wanted = np.sum([indicator(vertex, scores.shape[1]) for vertex in chosen], axis=0)
            if k >= self.pool.n + self.has_base or self._arrives(wanted):
                return chosen

    def gap(self, point: Matrix, scores: Matrix) -> float | None:
        """Return the gap over the clients that are not lost."""
        return self.inner.gap(point, self._known(scores))

    def stationarity(self, point: Matrix, scores: Matrix) -> float:
        """Return the stationarity over the clients that are not lost."""
        return self.inner.stationarity(point, self._known(scores))

    def _known(self, scores: Matrix) -> Matrix:
        """Return the scores with NEVER where a client is lost; one row of scores stands for all blocks together."""
        lost = self.pool.unreachable(self.blocks)
        if lost.any() and not self._avoids():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.pool.traffic.lost.items())
            raise FederationError(
                f"over the domain {self.name!r} a merge cannot go on without clients that were lost ({reasons}): what "
                "it says of them is part of it. Leave them out and solve again, or take 'simplex', 'capped' or 'box'."
            )
        return np.where(lost if len(scores) == len(lost) else lost.any(axis=0), NEVER, scores)

    def _avoids(self) -> bool:
        """Whether a coefficient may always be 0, and is where the score is NEVER."""
        if isinstance(self.inner, Box):
            return self.inner.lower == 0
        return isinstance(self.inner, (Simplex, Capped, Sparse))

    def _arrives(self, chosen: Matrix) -> bool:
        """Whether nobody is lost while this is fetched [rows or 1, n]."""
        before = len(self.pool.traffic.lost)
        self.pool.reach(np.broadcast_to(chosen, (self.blocks.count, self.pool.n)), self.blocks)
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
            self.domain = Reachable(self.domain, pool, self.blocks)


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
    uploads: str = "blocks",
    gradient_dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> tuple[Result, dict[str, torch.Tensor], Traffic]:
    """Merge without uploads but those that the oracle chooses: the result, the merged model, and what it cost.

    The model has all tensors of the anchor, floating-point ones in float32. Arguments are those of `RemotePool`,
    `RemoteProblem` and `solve`. Raises FederationError if no client is left.
    """
    pool = RemotePool(anchor, clients, uploads=uploads, gradient_dtype=gradient_dtype, device=device)
    problem = RemoteProblem(pool, objective, blocks, domain)
    result = solve(problem, solver, start=start, max_iter=max_iter, tol=tol)
    weights = {**pool.base_weights(), **pool.combine(result.coefficients, problem.blocks)}
    return result, weights, pool.traffic
