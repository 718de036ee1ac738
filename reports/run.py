"""A run folder read back: what one solve recorded, also while it is still going or after it was killed.

    recipe.yaml   result.json   coefficients.safetensors   trace.jsonl   merged.safetensors   figures/

The trace is one JSON line an iteration after a header line; record k describes Λ_k and the step taken from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Array = NDArray[np.float64]


class RunError(ValueError):
    """The folder is not a run, or its files contradict one another: says which file and what to do."""


@dataclass(frozen=True)
class Run:
    """One solve: its names, its trace and, when it has ended, its result.

    `records` are the complete lines of the trace; `final` is layers × experts, the mean of the returned coefficients
    over the rows of each layer (of the last iterate where the run has not ended).
    """

    name: str
    folder: Path | None
    experts: tuple[str, ...]
    layers: tuple[str, ...]
    records: tuple[dict[str, Any], ...] = ()
    header: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    coefficients: Array | None = None  # Λ as returned, rows × experts

    @property
    def finished(self) -> bool:
        """Whether the run wrote its result."""
        return self.result is not None

    @property
    def status(self) -> str:
        """The result's status, or "running" for a run that is going or was killed."""
        return str(self.result.get("status", "unknown")) if self.result else "running"

    @property
    def free(self) -> bool:
        """Whether the domain is all of space, or constraints that leave it unbounded: there is no Frank-Wolfe gap."""
        domain = self.header.get("domain") or (self.result or {}).get("domain") or {}
        if isinstance(domain, dict) and isinstance(domain.get("domain"), dict):  # constraints within another domain
            known = any(record.get("gap") is not None for record in self.records)
            return domain["domain"].get("name") == "free" and not known
        return (domain.get("name") if isinstance(domain, dict) else domain) == "free"

    @property
    def iterations(self) -> Array:
        """Iteration numbers of the records, shape [T]; positions where rounds of an outer loop count anew."""
        if any("outer" in record for record in self.records):
            return np.arange(len(self.records), dtype=np.float64)
        return np.asarray([record.get("iteration", k) for k, record in enumerate(self.records)], dtype=np.float64)

    def series(self, key: str) -> Array:
        """One number a record, shape [T]; null and missing become nan."""
        values = [record.get(key) for record in self.records]
        return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)

    @staticmethod
    def choices(record: dict[str, Any]) -> dict[str, float]:
        """Vertices that the oracle chose in this iteration and the share of the blocks or tasks that chose each."""
        names = list(record.get("vertices") or ())
        shares = record.get("vertex_share")
        if shares is None:
            return {name: names.count(name) / len(names) for name in names}
        return dict(zip(names, shares, strict=True))

    def task_losses(self) -> dict[str, Array]:
        """Loss of each task over the records, shape [T] each."""
        names = {name: None for record in self.records for name in record.get("tasks") or {}}
        return {
            name: np.asarray([(record.get("tasks") or {}).get(name, np.nan) for record in self.records], np.float64)
            for name in names
        }

    def trajectory(self) -> tuple[Array, Array]:
        """Iterations [T'] and coefficients [T', layers, experts] of the records that hold them."""
        shape = (len(self.layers), len(self.experts))
        kept = [
            (k, r["coefficients"]) for k, r in zip(self.iterations, self.records, strict=True) if "coefficients" in r
        ]
        if not kept:
            return np.zeros(0), np.zeros((0, *shape))
        values = np.asarray([value for _, value in kept], dtype=np.float64)
        if values.shape[1:] != shape:
            raise RunError(
                f"run '{self.name}': trace.jsonl holds coefficients of shape {list(values.shape[1:])}, but its header "
                f"names {shape[0]} layers and {shape[1]} experts. The trace was mixed from two runs; solve again."
            )
        return np.asarray([k for k, _ in kept], dtype=np.float64), values

    def scores(self) -> Array:
        """Scores [T', layers, experts] of the records that hold coefficients, nan where none were recorded."""
        shape = (len(self.layers), len(self.experts))
        kept = [record.get("scores") for record in self.records if "coefficients" in record]
        if not any(kept):
            return np.zeros((0, *shape))
        found = np.full((len(kept), *shape), np.nan)
        for k, matrix in enumerate(kept):
            if matrix is not None:
                found[k] = np.asarray(matrix, dtype=np.float64)  # null becomes nan
        return found

    @property
    def final(self) -> Array:
        """Coefficients to report, shape [layers, experts]."""
        rows = self._rows_of_layers()
        if self.coefficients is not None and rows is not None:
            return np.stack([self.coefficients[index].mean(axis=0) for index in rows])
        if self.coefficients is not None and len(self.coefficients) == len(self.layers):
            return self.coefficients
        _, values = self.trajectory()
        return values[-1] if len(values) else np.full((len(self.layers), len(self.experts)), np.nan)

    def _rows_of_layers(self) -> list[NDArray[np.int64]] | None:
        layers = (self.result or {}).get("layers")
        if not isinstance(layers, dict):
            return None
        return [np.asarray(layers[name], dtype=np.int64) for name in self.layers]

    @property
    def gap_is_estimate(self) -> bool:
        """Whether the recorded gaps come from minibatches."""
        return any(record.get("estimate") for record in self.records)


def read_run(folder: str | Path, *, name: str | None = None) -> Run:
    """Read a run folder; a run that is still going has no result, and a last half line of its trace is ignored.

    Raises `RunError` if the folder is not a run or a complete line of the trace cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"run '{folder}': there is no such folder. Give a folder that `mergesolve solve --run` wrote.")
    header, records = _read_trace(folder / "trace.jsonl")
    result = read_object(folder / "result.json")
    if result is None and not header:
        raise RunError(
            f"run '{folder}': holds neither result.json nor trace.jsonl, so it is not a run (or it died before its "
            "first iteration). Give a folder that `mergesolve solve --run` wrote."
        )
    source = header or result or {}
    experts = tuple(str(expert) for expert in source.get("experts", ()))
    layers = tuple(str(layer) for layer in source.get("layers", ()))
    coefficients = _read_coefficients(folder / "coefficients.safetensors", len(experts))
    return Run(name or folder.resolve().name, folder, experts, layers, records, header, result, coefficients)


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read several runs, each under a name of its own: that of its folder, with as many parents as it takes to tell
    the runs apart; one that is given again counts on, as in 'run (2)'.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) == len(runs):
        return runs
    places = [run.folder.resolve().parts for run in runs if run.folder]
    depth = 1
    while len({place[-depth:] for place in places}) < len(set(places)):
        depth += 1
    again = [places[:k].count(place) + 1 for k, place in enumerate(places)]
    names = ["/".join(place[-depth:]) for place in places]
    names = [name + (f" ({count})" if count > 1 else "") for name, count in zip(names, again, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}). The file was damaged after it was written.") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Objects of the lines of a trace with their numbers, without a last line that does not end."""
    parsed: list[tuple[int, dict[str, Any]]] = []
    lines = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):  # the run was killed while it wrote this line
                break
            raise RunError(f"{path}, line {number}: cannot be read ({error}). The trace was damaged.") from None
        parsed.append((number, value))
    return parsed


def check_schema(path: Path, header: Mapping[str, Any]) -> None:
    """Raise RunError unless this is the header of a trace that this version reads."""
    if "schema" not in header:
        raise RunError(f"{path}: its first line is not a header with 'schema'. Not a trace of mergesolve.")
    if header["schema"] != 1:
        raise RunError(f"{path}: schema {header['schema']}, this version reads 1. Update mergesolve.")


def _read_trace(path: Path) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    if not path.exists():
        return {}, ()
    parsed = [value for _, value in read_lines(path)]
    if not parsed:
        return {}, ()
    check_schema(path, parsed[0])
    # A resumed run writes the records after its checkpoint again: the last record of an iteration counts.
    latest = {(record.get("outer", 0), record.get("iteration", k)): record for k, record in enumerate(parsed[1:])}
    return parsed[0], tuple(latest[k] for k in sorted(latest))


def _read_coefficients(path: Path, experts: int) -> Array | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            name = "coefficients" if "coefficients" in names else names[0]
            value = np.asarray(file.get_tensor(name), dtype=np.float64)
    except (SafetensorError, IndexError) as error:
        raise RunError(f"{path}: cannot be read ({error}). Solve again, or resume the run.") from None
    if value.ndim != 2 or value.shape[1] != experts:
        raise RunError(f"{path}: coefficients of shape {list(value.shape)}, expected [rows, {experts}].")
    return value
