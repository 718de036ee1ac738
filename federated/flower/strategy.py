"""A Strategy whose aggregation is `merge_round`: Flower carries the messages, and decides nothing.

    strategy = MergeStrategy(merge, state, clients=["pets", "cars"])
    strategy.start(grid, to_arrays(weights), num_rounds=10)

What the server computes from a round depends on which clients answered and what, not on their node ids, the order of
their answers, or a global random generator; so it equals the loop in one process, bit for bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ..errors import FederationError
from ..replies import Reply, Weights
from ..state import ServerState
from .arrays import REPLY, WEIGHTS, from_arrays, to_arrays, to_reply

Record = Mapping[str, Any]
Merge = Callable[[Weights, Sequence[Reply], ServerState], tuple[Weights, ServerState, Record]]
"""merge(θ_t, replies, state) -> θ_{t+1}, state, record: `merge_round` with its step and data filled in."""
After = Callable[[Weights, ServerState, Record], None]
"""after(θ_{t+1}, state, record), once a round: writes state and trace."""

ROUND = "round"


class MergeStrategy(Strategy):  # type: ignore[misc]
    """Federated merging over Flower.

    state: where the federation stands; `start` goes on with round state.round + 1. clients: names of all that take
    part. after: called at the end of each round, and of each attempt that has to be repeated.
    present: names of the clients that take part in a round; all unless given.
    sampled: how many clients train in a round, drawn by (seed, round, attempt) alone; None for all.
    minimum: SuperNodes without which no round begins. patience: seconds to wait for them, and at the start for all.
    attempts: how often a round with too few usable replies is tried before the run fails.
    """

    def __init__(
        self,
        merge: Merge,
        state: ServerState,
        clients: Sequence[str],
        *,
        after: After | None = None,
        present: Callable[[int], Collection[str]] | None = None,
        sampled: int | None = None,
        seed: int = 0,
        minimum: int = 1,
        patience: float = 120.0,
        attempts: int = 3,
    ) -> None:
        if not clients:
            raise FederationError("flower: the federation has no clients; name one at least.")
        if not 1 <= minimum <= len(clients):
            raise FederationError(
                f"flower: a round needs at least {minimum} SuperNodes, and the federation has {len(clients)} clients. "
                f"Give a minimum from 1 to {len(clients)}."
            )
        if sampled is not None and not minimum <= sampled <= len(clients):
            raise FederationError(
                f"flower: {sampled} clients a round cannot be drawn; the number must be from {minimum} (the minimum) "
                f"to {len(clients)} (all clients)."
            )
        self.merge, self.state, self.clients, self.after = merge, state, tuple(clients), after
        self.present = present or (lambda _: self.clients)
        self.sampled, self.seed, self.minimum = sampled, seed, minimum
        self.patience, self.attempts = patience, attempts
        self.attempt = 1
        self.timeout = 3600.0
        self.anchor: dict[str, Any] = {}
        self.names: dict[int, str] = {}
        self._asked: list[Message] = []

    def summary(self) -> None:
        """Log what the strategy does."""
        log(INFO, "\t├── Clients: %s", ", ".join(self.clients))
        log(INFO, "\t├── A round: %s, at least %d", self.sampled or "all", self.minimum)
        log(INFO, "\t└── Rounds done before: %d", self.state.round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send θ_t, which is kept for the aggregation, to the clients of this round."""
        nodes = self._connected(grid, self.minimum)
        present = set(self.present(server_round))
        if self.sampled is not None or not present.issuperset(self.clients):
            nodes = self._choose(nodes, present, server_round, grid)
        self.anchor = from_arrays(arrays)
        content = RecordDict({WEIGHTS: arrays, REPLY: ConfigRecord({**config, ROUND: server_round})})
        self._asked = [
            Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(server_round))
            for node in nodes
        ]
        log(INFO, "round %d: %d of %d clients train", server_round, len(nodes), len(self.clients))
        return self._asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what came back. No arrays: the round is to be repeated from the same θ_t."""
        received = self._replies(server_round, replies)
        for reply in received:
            if reply.error is not None:
                log(WARNING, "round %d: client %s: %s", server_round, reply.client, reply.error)
        weights, self.state, found = self.merge(self.anchor, received, self.state)
        record = {**found, "attempt": self.attempt}
        if self.after is not None:
            self.after(weights, self.state, record)
        metrics = MetricRecord({"accepted": len(record["accepted"]), "rejected": len(record["rejected"])})
        return None if record["repeat"] else to_arrays(weights), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server measures what it has."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds from state.round + 1 to num_rounds; initial_arrays is θ of the state.

        timeout: seconds to wait for the answers of a round; who has not answered by then has dropped out of it.
        Raises FederationError when too few SuperNodes connect, or a round fails in all its attempts.
        """
        self.timeout = timeout
        self.summary()
        result = Result()
        result.arrays = arrays = initial_arrays
        if self.state.round < num_rounds:
            self._connected(grid, len(self.clients))
        while self.state.round < num_rounds:
            number = self.state.round + 1
            log(INFO, "[ROUND %d/%d]%s", number, num_rounds, f" attempt {self.attempt}" * (self.attempt > 1))
            questions = self.configure_train(number, arrays, train_config or ConfigRecord(), grid)
            merged, metrics = self.aggregate_train(number, grid.send_and_receive(questions, timeout=timeout))
            if metrics is not None:
                result.train_metrics_clientapp[number] = metrics
            if merged is None:
                if self.attempt >= self.attempts:
                    raise FederationError(
                        f"flower: round {number} had too few usable replies in each of {self.attempts} attempts; the "
                        "log names the clients and what each answered. The rounds before it are saved: run again with "
                        "the same folder to go on."
                    )
                self.attempt += 1
                continue
            self.attempt, arrays = 1, merged
            result.arrays = arrays
            if evaluate_fn is not None and (found := evaluate_fn(number, arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = found
        return result

    def _connected(self, grid: Grid, wanted: int) -> list[int]:
        """Wait for so many SuperNodes; go on with fewer when patience ends, if they are the minimum at least."""
        until = time.monotonic() + self.patience
        while True:
            nodes = sorted(grid.get_node_ids())
            if len(nodes) >= wanted:
                return nodes
            if time.monotonic() >= until:
                break
            time.sleep(min(1.0, self.patience))
        if len(nodes) < self.minimum:
            raise FederationError(
                f"flower: {len(nodes)} SuperNodes are connected after {self.patience:g} s; {self.minimum} are needed. "
                "Start them, and read their logs; mergesolve.federated.flower.certificates tells whether TLS is why."
            )
        log(WARNING, "%d of %d SuperNodes are connected after %g s; going on", len(nodes), wanted, self.patience)
        return nodes

    def _choose(self, nodes: Sequence[int], present: Collection[str], server_round: int, grid: Grid) -> list[int]:
        """Choose clients by name: node ids are random, and a node that is seen first is asked whose it is."""
        unknown = [node for node in nodes if node not in self.names]
        if unknown:
            questions = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in unknown]
            for message in grid.send_and_receive(questions, timeout=self.timeout):
                if not message.has_error():
                    name = str(message.content.config_records[REPLY]["client"])
                    self.names[message.metadata.src_node_id] = name
        by_name = {self.names[node]: node for node in nodes if self.names.get(node) in present}
        chosen = sorted(by_name)
        if self.sampled is not None and self.sampled < len(chosen):
            generator = random.Random(f"{self.seed} {server_round} {self.attempt}")
            chosen = sorted(generator.sample(chosen, self.sampled))
        return [by_name[name] for name in chosen]

    def _replies(self, server_round: int, messages: Iterable[Message]) -> list[Reply]:
        """One reply for each client that was asked, by name."""
        asked = {message.metadata.dst_node_id: message for message in self._asked}
        # The SuperLink sends an error in place of a node that is gone; what the error answers tells which node.
        nodes = {message.metadata.message_id: node for node, message in asked.items() if message.metadata.message_id}
        found: list[Reply] = []
        for message in messages:
            node = nodes.pop(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            if asked.pop(node, None) is None:
                log(WARNING, "round %d: an answer of node %d, which was not asked, is left out", server_round, node)
                continue
            reply = to_reply(message, client=self._name(node), round=server_round)
            self.names[node] = reply.client
            found.append(reply)
        for node in asked:
            found.append(Reply(self._name(node), None, server_round, error=f"no answer within {self.timeout:g} s"))
        # A client whose SuperNode was started again may answer as the new node and fail as the old one.
        answered = {reply.client for reply in found if reply.error is None}
        kept = [reply for reply in found if reply.error is None or reply.client not in answered]
        return sorted(kept, key=lambda reply: reply.client)

    def _name(self, node: int) -> str:
        return self.names.get(node, f"node-{node}")
