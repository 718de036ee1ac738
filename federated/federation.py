"""Round after round: clients train, the server merges, evaluation looks on; a killed server goes on where it was.

A run folder holds `rounds.jsonl` (a header, then a line a round, flushed at once), `state.safetensors` (global model
and state after the last whole round), `origin.safetensors` (θ_0) and at the end `model.safetensors`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..pools import model_fingerprint
from ..pools.checkpoint import MemoryCheckpoint
from ..solvers.files import dumps, write_bytes
from .clients import fit_all
from .errors import FederationError
from .faults import roster
from .replies import Client, Reply, Weights
from .rounds import merge_round
from .screening import Screening
from .state import ServerState, stored
from .step import ServerData, ServerStep
from .training import attention

SCHEMA = 1
ROUNDS, STATE, START, MODEL = "rounds.jsonl", "state.safetensors", "origin.safetensors", "model.safetensors"
STAGED = "state.next.safetensors"
FINISHED, INTERRUPTED, STOPPED = "finished", "interrupted", "stopped"


@dataclass(frozen=True)
class Accuracy:
    """Percent of test inputs classified right: by task, and on the reference set, if there is one."""

    tasks: Mapping[str, float]
    reference: float | None = None

    def describe(self) -> dict[str, Any]:
        """Return the fields of a record."""
        mean = sum(self.tasks.values()) / len(self.tasks) if self.tasks else None
        return {"accuracy": dict(self.tasks), "mean": mean, "reference": self.reference}


Evaluate = Callable[[Weights], Accuracy]


@dataclass(frozen=True)
class Federation:
    """Who takes part, what is merged and how.

    clients: with distinct names. start: θ_0, all tensors. step: the server's. data: what the server may look at.
    evaluate: weights -> accuracies, which only the record sees. protocol: what the setting is called; settings: what
    else identifies it, as JSON. backend, device: of the server's pools.
    """

    clients: Sequence[Client]
    start: Weights
    step: ServerStep
    data: ServerData = field(default_factory=ServerData)
    evaluate: Evaluate | None = None
    screening: Screening = field(default_factory=Screening)
    seed: int = 0
    protocol: str = "custom"
    settings: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [client.name for client in self.clients]
        if not names:
            raise FederationError("a federation needs clients, and there are none.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise FederationError(f"two clients are called {twice[0]!r}; give each its own name.")
        if self.screening.minimum > len(names):
            raise FederationError(
                f"a round needs {self.screening.minimum} replies (minimum), and there are {len(names)} clients. Lower "
                "the minimum, or add clients."
            )
        self.step.check(self.data)

    def merge(
        self,
        weights: Weights,
        replies: Sequence[Reply],
        state: ServerState,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[dict[str, Tensor], ServerState, dict[str, Any]]:
        """Return `merge_round` of these replies with the federation's step, data and settings."""
        return merge_round(
            weights,
            replies,
            state,
            self.step,
            data=self.data,
            screening=self.screening,
            seed=self.seed,
            backend=self.backend,
            device=self.device,
            progress=progress,
        )

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must agree with."""
        return {
            "protocol": self.protocol,
            "clients": [client.name for client in self.clients],
            "step": self.step.describe(),
            "seed": self.seed,
            "start_model": model_fingerprint(MemoryCheckpoint("the first model", self.start)),
            "settings": dict(self.settings),
        }


@dataclass
class History:
    """What a run left: the global model, a record a round, and how it ended ("finished", "interrupted", "stopped")."""

    weights: Weights
    state: ServerState
    header: dict[str, Any]
    records: list[dict[str, Any]]
    status: str
    message: str = ""


def federate(
    federation: Federation,
    rounds: int,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    workers: int = 1,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> History:
    """Run so many rounds.

    folder: where trace, state and model are written; resume: go on from the state in it, or begin if there is none.
    workers: clients that train at once. callback: called with each record; raising StopIteration ends the run, as does
    Ctrl-C. progress: called as (what, done, in all) while clients train and the server solves.
    Raises FederationError for a folder of another federation. A round that too few clients answered in all its attempts
    ends the run as "stopped": what was reached is kept, and the run can be resumed.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise FederationError(f"the number of rounds must be an integer of at least 1. Got {rounds!r} instead.")
    run = Run(federation, Path(folder)) if folder is not None else Run(federation, None)
    with ExitStack() as stack:
        if federation.data.model is not None:
            stack.enter_context(attention(federation.data.model))
        state, weights = run.open(stack, resume, rounds)
        if state.round >= rounds:
            return run.close(weights, state, FINISHED)
        try:
            while state.round < rounds:
                for attempt in range(1, federation.screening.attempts + 1):
                    replies = _train(federation, weights, state.round + 1, workers, progress)
                    tell = None if progress is None else partial(progress, "merging")
                    merged, after, record = federation.merge(weights, replies, state, tell)
                    record["attempt"] = attempt
                    if not record["repeat"]:
                        break
                    run.write(record)
                    if callback is not None:
                        callback(record)
                else:
                    reasons = ", ".join(f"{r['client']}: {r['reason']}" for r in record["rejected"]) or "no replies"
                    message = (
                        f"round {record['round']} had {len(record['accepted'])} acceptable replies in each of "
                        f"{attempt} attempts, and needs {federation.screening.minimum} ({reasons})."
                    )
                    return run.close(weights, state, STOPPED, message)
                run.finish(merged, after, record)
                state, weights = after, merged
                if callback is not None:
                    callback(record)
        except (StopIteration, KeyboardInterrupt):
            return run.close(weights, state, INTERRUPTED)
        return run.close(weights, state, FINISHED)


def _train(
    federation: Federation,
    weights: Weights,
    number: int,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> list[Reply]:
    def tell(reply: Reply, done: int, total: int) -> None:
        if progress is not None:
            progress(f"round {number}: {reply.client}", done, total)

    present = roster(federation.clients, number)
    return fit_all(present, weights, number, workers, tell)


class Run:
    """The files of one run, or none of them."""

    def __init__(self, federation: Federation, folder: Path | None) -> None:
        self.federation = federation
        self.folder = folder
        self.identity = federation.identity()
        self.header: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self._stream: IO[str] | None = None

    def open(self, stack: ExitStack, resume: bool, rounds: int) -> tuple[ServerState, Weights]:
        """Return where to begin: the state in the folder, or θ_0."""
        state, weights = ServerState(self.federation.start), self.federation.start
        folder = self.folder
        if folder is not None and (folder / STATE).exists() and not resume:
            raise FederationError(
                f"{folder} holds a federation already. Go on with it (resume), or choose another folder."
            )
        if folder is not None and resume and (folder / STATE).exists():
            state, weights = ServerState.load(folder / STATE, self._origin(folder / START), self.identity)
            # A file has an order of its own, and sums over tensors (a norm of gradients) depend on it.
            start = self.federation.start
            weights = {name: weights[name].to(tensor.device) for name, tensor in start.items()}
            state = replace(state, origin={name: state.origin[name].to(t.device) for name, t in start.items()})
            self.header, kept = read_rounds(folder / ROUNDS)
            self.records = [record for record in kept if record["round"] <= state.round or record["repeat"]]
        if not self.header:
            found = {}
            if self.federation.evaluate is not None:
                found = self.federation.evaluate(self.federation.start).describe()
            tasks = list(found.get("accuracy", {}))
            self.header = {"schema": SCHEMA, **self.identity, "tasks": tasks, "start": found}
        self.header["rounds"] = rounds
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if state.round == 0:
                write_bytes(folder / START, save(stored(self.federation.start)))
                state.save(folder / STATE, weights, self.identity)
            lines = [dumps(line) + "\n" for line in (self.header, *self.records)]
            write_bytes(folder / ROUNDS, "".join(lines).encode())
            self._stream = stack.enter_context((folder / ROUNDS).open("a", encoding="utf-8"))
        return state, weights

    @staticmethod
    def _origin(path: Path) -> Weights:
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise FederationError(
                f"{path}, the model that the federation began with, cannot be read ({error}). Put it back, or begin "
                "anew in another folder."
            ) from None

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.records.append(record)
        if self._stream is not None:
            self._stream.write(dumps(record) + "\n")
            self._stream.flush()

    def finish(self, weights: Weights, state: ServerState, record: dict[str, Any]) -> None:
        """Measure a round that was merged, and write its record and the state.

        The state is written under another name and takes its place after the record: a kill in between repeats the
        round, and drops its record.
        """
        began = time.perf_counter()
        if self.federation.evaluate is not None:
            record |= self.federation.evaluate(weights).describe()
        record["seconds"]["evaluate"] = time.perf_counter() - began
        began = time.perf_counter()
        if self.folder is not None:
            state.save(self.folder / STAGED, weights, self.identity)
        record["seconds"]["write"] = time.perf_counter() - began
        self.write(record)
        if self.folder is not None:
            (self.folder / STAGED).replace(self.folder / STATE)

    def close(self, weights: Weights, state: ServerState, status: str, message: str = "") -> History:
        """Write the model and return the history."""
        if self.folder is not None:
            metadata = {"rounds": str(state.round), "step": dumps(self.federation.step.describe()), "status": status}
            write_bytes(self.folder / MODEL, save(stored(weights), metadata=metadata))
        return History(weights, state, self.header, self.records, status, message)


def read_rounds(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return header and records of a trace; a last line that a kill cut short is left out."""
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: U+2028 is no end of a line in JSON
    except FileNotFoundError:
        return {}, []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            content = json.loads(line.decode())
        except ValueError:
            break
        if not isinstance(content, dict):
            break
        found.append(content)
    return (found[0], found[1:]) if found else ({}, [])
