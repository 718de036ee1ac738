"""The ServerApp: a federation built from the run's configuration, its rounds over Flower, its files as without Flower.

    app = server_app(build)    # build(run_config) -> Federation

A run folder is written by the same code as in one process: `rounds.jsonl`, `state.safetensors`, `origin.safetensors`,
and `model.safetensors` at the end. `flwr run` with a folder that holds a federation goes on with its next round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from logging import INFO
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from ..errors import FederationError
from ..faults import roster
from ..federation import FINISHED, STOPPED, Federation, History, Run
from ..oracle_step import FederatedFrankWolfe
from ..replies import Weights
from ..state import ServerState
from ..training import attention
from .arrays import from_arrays, to_arrays
from .settings import Settings
from .strategy import MergeStrategy, Record


def serve(federation: Federation, grid: Grid, settings: Settings) -> History:
    """Run a federation over Flower up to `settings.rounds` rounds, from where its folder stands.

    Raises FederationError for a folder of another federation, for too few SuperNodes, and for a round that too few
    clients answered in all its attempts; what was reached before is in the folder.
    """
    if isinstance(federation.step, FederatedFrankWolfe):
        raise FederationError(
            "flower: the server step 'fw-federated' asks the clients several times a round, and here each sends its "
            "whole model once. Take 'fw-hard', which solves the same problem from whole models."
        )
    run = Run(federation, Path(settings.folder) if settings.folder else None)
    with ExitStack() as stack:
        if federation.data.model is not None:
            stack.enter_context(attention(federation.data.model))
        state, loaded = run.open(stack, True, settings.rounds)
        weights: Weights = {name: loaded[name] for name in federation.start}
        strategy = MergeStrategy(
            federation.merge,
            state,
            [client.name for client in federation.clients],
            after=partial(_finish, run),
            present=lambda number: [client.name for client in roster(federation.clients, number)],
            sampled=settings.sampled or None,
            seed=federation.seed,
            minimum=federation.screening.minimum,
            patience=settings.patience,
            attempts=federation.screening.attempts,
        )
        try:
            result = strategy.start(grid, to_arrays(weights), settings.rounds, settings.timeout)
        except FederationError as error:
            run.close(strategy.anchor or weights, strategy.state, STOPPED, str(error))
            raise
        return run.close(from_arrays(result.arrays), strategy.state, FINISHED)


def _finish(run: Run, weights: Weights, state: ServerState, record: Record) -> None:
    """Measure and write a round as the loop in one process does."""
    line: dict[str, Any] = {**record, "seconds": dict(record["seconds"])}
    if line["repeat"]:
        run.write(line)
        return
    run.finish(weights, state, line)
    log(INFO, "%s", row(line))


def row(line: Mapping[str, Any]) -> str:
    """One line of a table: the start (round 0, from the header) or a round."""
    cells = [f"round {line.get('round', 0):>3}"]
    cells += [f"{key} {line[key]:6.2f}%" for key in ("mean", "reference") if line.get(key) is not None]
    if "step_length" in line:
        cells += [f"step {line['step_length']:.4f}", f"accepted {len(line['accepted'])}"]
    cells += [f"rejected {left['client']} ({left['reason']})" for left in line.get("rejected", ())]
    return "  ".join(cells)


def table(history: History) -> str:
    """The rounds of a run, those before it was resumed included."""
    lines = [row(history.header["start"]), *(row(line) for line in history.records if not line["repeat"])]
    return "\n".join(lines)


def server_app(build: Callable[[Mapping[str, Any]], Federation]) -> ServerApp:
    """Return the ServerApp of the federation that `build` makes from the run's configuration."""

    def main(grid: Grid, context: Context) -> None:
        settings = Settings.of(context.run_config)
        history = serve(build(context.run_config), grid, settings)
        log(INFO, "%s after %d rounds", history.status, history.state.round)
        for line in table(history).splitlines():
            log(INFO, "%s", line)

    app = ServerApp()
    app.main()(main)
    return app
