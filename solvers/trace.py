"""The trace: one JSON line an iteration, flushed at once, so that a killed run leaves everything up to its last step.

The first line is a header {"schema": 1, "experts": [...], "layers": [...], "rows", "solver", "domain", "tasks", ...}.
Each further line describes Λ_k and the step taken from it:

    iteration, value, gap (null on the free domain), stationarity, estimate (true on minibatches),
    step (null on the last), vertices (names chosen, most chosen first) with vertex_share, tasks {name: loss},
    coefficients and scores [layers][experts] (means over the rows of each layer), evaluations, gradients, bytes_read,
    samples (null where the objective counts none), seconds, parts {part: seconds},
    and where the solver says more about its step, extra {"active": vertices it holds, "kind": "drop", ...}

docs/traces.md has every key with its type and unit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from .domains import BASE, START
from .files import dumps, plain, write_bytes
from .loop import Visit
from .problem import MatrixProblem, layer_means

SCHEMA = 1


def header(problem: MatrixProblem, solver: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first line of a trace."""
    return {
        "schema": SCHEMA,
        "experts": list(problem.experts),
        "layers": list(problem.layers),
        "rows": problem.rows,
        "solver": dict(solver),
        "domain": problem.domain.describe(),
        "tasks": list(problem.tasks),
    }


def record(problem: MatrixProblem, visit: Visit, seconds: float, samples: int | None = None) -> dict[str, Any]:
    """Return the record of one visit; samples: how many went through the model since the start, if that is known."""
    names: list[str] | None = None
    shares: list[float] | None = None
    if visit.step is not None and visit.step.vertices is not None:
        indices = visit.step.vertices.ravel()
        counted = Counter(indices.tolist()).most_common()
        special = {BASE: "base", START: "start"}
        names = [special[index] if index < 0 else problem.experts[index] for index, _ in counted]
        shares = [count / indices.size for _, count in counted]
    counts, scores = problem.counts, visit.evaluation.scores
    content = {
        "iteration": visit.iteration,
        "value": visit.evaluation.value,
        "gap": visit.certificate.gap,
        "stationarity": visit.certificate.stationarity,
        "estimate": problem.stochastic,
        "step": visit.step.size if visit.step is not None else None,
        "vertices": names,
        "vertex_share": shares,
        "tasks": visit.evaluation.task_values,
        "coefficients": np.round(layer_means(problem.layers, visit.state.coefficients), 12),
        "scores": None if scores is None else _digits(layer_means(problem.layers, scores)),
        "evaluations": counts.evaluations,
        "gradients": counts.gradients,
        "bytes_read": counts.bytes_read,
        "samples": samples,
        "seconds": round(seconds, 6),
        "parts": {part: round(spent, 6) for part, spent in problem.seconds.items()},
    }
    if visit.step is not None and visit.step.extra is not None:
        content["extra"] = visit.step.extra
    return dict(plain(content))


def _digits(matrix: np.ndarray) -> list[list[float]]:
    """Return a matrix at seven significant digits: scores come from float32, and more would double the file."""
    return [[float(f"{value:.7g}") for value in row] for row in matrix]


class TraceFile:
    """``trace.jsonl``, begun with a header and the records to keep, then appended to."""

    def __init__(self, path: Path, header: Mapping[str, Any], kept: Sequence[Mapping[str, Any]] = ()) -> None:
        lines = [dumps(header), *map(dumps, kept)]
        write_bytes(path, ("\n".join(lines) + "\n").encode())
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def write(self, content: Mapping[str, Any]) -> None:
        """Append one record and flush it."""
        self._stream.write(dumps(content) + "\n")
        self._stream.flush()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_trace(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return header and records of a trace; a last line cut short by a kill is ignored."""
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    lines = [json.loads(line) for line in complete]
    return (lines[0], lines[1:]) if lines else ({}, [])
