"""Federated runs read back: one run (`rounds.jsonl`), or a study of many (server steps × seeds), finished or not.

    RUN/rounds.jsonl              a header line, then one JSON line a round
    STUDY/study.json              {"steps": [...], "seeds": [...], "protocol": {...}}
    STUDY/STEP/seed-S/rounds.jsonl

Accuracies are in percent. Of a round that a resumed server ran again, the last line counts; an attempt with too few
replies changed nothing, and is counted only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .run import RunError, check_schema, read_lines, read_object

Array = NDArray[np.float64]

FIXED = frozenset(
    {"average", "fedavg", "paint", "task-arithmetic", "ties", "dare", "breadcrumbs", "magmax"}  # and relatives:
    | {"dare-ties", "breadcrumbs-ties", "della", "della-linear", "consensus", "emr"}
)
"""Server steps whose scaling factor is a constant set by hand (Kubota et al. 2025, Table 1, and their relatives)."""


@dataclass(frozen=True)
class FederatedRun:
    """One server step with one seed: `records` holds one record a round, in order.

    repeats: attempts at a round that too few clients answered, so that it was repeated.
    """

    step: str
    seed: int
    header: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...] = ()
    folder: Path | None = None
    repeats: int = 0

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients, also those that never sent anything usable."""
        return tuple(self.header["clients"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose accuracies make up the client mean."""
        return tuple(self.header["tasks"])

    @property
    def method(self) -> str:
        """Name of the server step without its options."""
        return str(self.header["step"].get("name", self.step))

    @property
    def options(self) -> dict[str, Any]:
        """Options of the server step; those inside others have names such as "retention.bound"."""
        return {name: value for name, value in _leaves(self.header["step"]) if name != "name"}

    @property
    def fixed(self) -> bool:
        """Whether the scaling factor was set by hand."""
        return self.method in FIXED

    @property
    def start(self) -> Mapping[str, Any]:
        """Accuracies before the first round: {"accuracy": {task: percent}, "mean", "reference"}."""
        return self.header.get("start") or {}

    @property
    def planned(self) -> int:
        """Rounds that the run was to have."""
        return int(self.header.get("rounds") or len(self.records))

    @property
    def finished(self) -> bool:
        """Whether the last planned round is recorded."""
        return bool(self.records) and int(self.records[-1]["round"]) >= self.planned

    @property
    def rounds(self) -> Array:
        """Numbers of the recorded rounds, shape [T]."""
        return np.asarray([record["round"] for record in self.records], dtype=np.float64)

    def series(self, *keys: str) -> Array:
        """The number under nested keys, one a round, shape [T]; null, missing and what is no number become nan."""
        return np.asarray([number(record, *keys) for record in self.records], dtype=np.float64)

    def cosines(self, index: int) -> tuple[tuple[str, ...], Array]:
        """Names of the accepted clients of a record and their cosine matrix [n, n] (null becomes nan)."""
        record = self.records[index]
        names = tuple(str(name) for name in record.get("accepted") or ())
        rows = record.get("cosines") or []
        if len(rows) != len(names) or any(len(row) != len(names) for row in rows):
            raise RunError(
                f"run '{self.folder or self.step}', round {record['round']}: cosines of {len(rows)} rows for "
                f"{len(names)} accepted clients. The trace was mixed from two runs; run it again."
            )
        values = [[np.nan if value is None else value for value in row] for row in rows]
        return names, np.asarray(values, dtype=np.float64).reshape(len(names), len(names))


def number(record: Mapping[str, Any], *keys: str) -> float:
    """Return the number under nested keys; nan if there is none."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def known_mean(values: Array) -> float:
    """Return the mean of the finite values; nan if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


@dataclass(frozen=True)
class Study:
    """Server steps × seeds under one protocol; `runs` is in the order in which the steps are to be shown.

    missing: (step, seed) that study.json names and that have no trace yet.
    """

    name: str
    runs: Mapping[str, tuple[FederatedRun, ...]]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[tuple[str, int], ...] = ()
    folder: Path | None = None

    @classmethod
    def of(cls, runs: Sequence[FederatedRun], name: str = "study") -> Study:
        """Study of runs at hand, steps in the order of their first run."""
        grouped: dict[str, list[FederatedRun]] = {}
        for run in runs:
            grouped.setdefault(run.step, []).append(run)
        return cls(name, {step: tuple(sorted(some, key=lambda run: run.seed)) for step, some in grouped.items()})

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps that have a run with a round."""
        return tuple(step for step, runs in self.runs.items() if any(run.records for run in runs))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of all runs, in the order of the first."""
        return tuple(dict.fromkeys(task for runs in self.runs.values() for run in runs for task in run.tasks))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of any run."""
        return tuple(sorted({run.seed for runs in self.runs.values() for run in runs}))

    def fixed(self, step: str) -> bool:
        """Whether the step's scaling factor was set by hand."""
        return self.runs[step][0].fixed

    def start(self, *keys: str) -> Array:
        """The number under these keys before the first round, shape [seeds]: ("mean",), ("accuracy", task), ..."""
        found = {run.seed: number(run.start, *keys) for runs in self.runs.values() for run in runs}
        return np.asarray([found[seed] for seed in sorted(found)], dtype=np.float64)

    def last(self, step: str, *keys: str) -> Array:
        """The number under these keys in the last recorded round of each seed that has one, shape [seeds]."""
        runs = [run for run in self.runs[step] if run.records]
        return np.asarray([number(run.records[-1], *keys) for run in runs], dtype=np.float64)

    def series(self, step: str, *keys: str) -> tuple[Array, Array]:
        """Rounds [T] and the number under these keys, shape [seeds, T]; nan where a seed lacks the round."""
        runs = [run for run in self.runs[step] if run.records]
        rounds = np.asarray(sorted({int(record["round"]) for run in runs for record in run.records}), dtype=np.float64)
        values = np.full((len(runs), len(rounds)), np.nan)
        for row, run in zip(values, runs, strict=True):
            row[np.searchsorted(rounds, run.rounds)] = run.series(*keys)
        return rounds, values

    def sweeps(self) -> list[Sweep]:
        """Steps of one method that differ in one numeric option, longest sweep first."""
        members: dict[tuple[str, str, str], dict[float, str]] = {}
        for step in self.steps:
            run = self.runs[step][0]
            for option in run.options:
                value = number(run.options, option)
                if np.isfinite(value) and option.split(".")[-1] != "seed":
                    rest = json.dumps(
                        {k: v for k, v in run.options.items() if k != option}, sort_keys=True, default=str
                    )
                    # The first of equal steps: others differ in what the server had, not in the option.
                    members.setdefault((run.method, option, rest), {}).setdefault(value, step)
        found = [
            Sweep(method, option, tuple(sorted(steps)), tuple(steps[value] for value in sorted(steps)))
            for (method, option, _), steps in members.items()
            if len(steps) > 1
        ]
        return sorted(found, key=lambda sweep: -len(sweep.values))


@dataclass(frozen=True)
class Sweep:
    """Steps of one method over ascending values of one option; `option` is named as in `FederatedRun.options`."""

    method: str
    option: str
    values: tuple[float, ...]
    steps: tuple[str, ...]


def read_federated_run(folder: str | Path, *, step: str | None = None, seed: int | None = None) -> FederatedRun:
    """Read RUN/rounds.jsonl; a last line that was cut when the server was killed is ignored.

    `step` is the label to show (the name in the header unless given). Raises `RunError` if there is no trace, or one
    of its complete lines cannot be read.
    """
    folder = Path(folder)
    path = folder / "rounds.jsonl"
    if not path.is_file():
        raise RunError(
            f"run '{folder}': holds no rounds.jsonl, so it is not a federated run (or it died before its start). "
            "Give a folder that `mergesolve federate` wrote."
        )
    lines = read_lines(path)
    if not lines:
        raise RunError(f"{path}: is empty, the run died before its start. Start it again.")
    header = lines[0][1]
    _check_header(path, header)
    latest: dict[int, dict[str, Any]] = {}
    repeats = 0
    for line, record in lines[1:]:
        if not isinstance(record.get("round"), int):
            raise RunError(
                f"{path}, line {line}: a record without 'round', found {sorted(record)[:6]}. The trace was damaged."
            )
        if record.get("repeat"):
            repeats += 1
        else:
            latest[record["round"]] = record
    label = step or str(header["step"].get("name", folder.name))
    number_of_seed = seed if seed is not None else int(header.get("seed") or 0)
    return FederatedRun(label, number_of_seed, header, tuple(latest[k] for k in sorted(latest)), folder, repeats)


def read_study(folder: str | Path) -> Study:
    """Read STUDY/STEP/seed-S; a folder of one run is a study of that run.

    Steps keep the order of study.json, others follow by name. A run that has not started is in `missing`; raises
    `RunError` where no run has.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"study '{folder}': there is no such folder. Give one that `mergesolve federate` wrote.")
    if (folder / "rounds.jsonl").is_file():
        run = read_federated_run(folder)
        return Study(folder.resolve().name, {run.step: (run,)}, folder=folder)
    plan = read_object(folder / "study.json") or {}
    steps = [str(entry.get("label", entry.get("name"))) if isinstance(entry, Mapping) else str(entry)
             for entry in plan.get("steps") or ()]  # fmt: skip
    found = {path.parent.parent.name for path in folder.glob("*/seed-*/rounds.jsonl")}
    runs: dict[str, tuple[FederatedRun, ...]] = {}
    missing: list[tuple[str, int]] = []
    for step in dict.fromkeys([*steps, *sorted(found)]):
        seeds = {_seed(path) for path in (folder / step).glob("seed-*")}
        planned = {int(seed) for seed in plan.get("seeds") or ()} if step in steps else set()
        here: list[FederatedRun] = []
        for seed in sorted(seeds | planned):
            place = folder / step / f"seed-{seed}"
            if (place / "rounds.jsonl").is_file() and (place / "rounds.jsonl").stat().st_size:
                here.append(read_federated_run(place, step=step, seed=seed))
            else:
                missing.append((step, seed))
        if here:
            runs[step] = tuple(here)
    if not runs:
        raise RunError(
            f"study '{folder}': no run has started; expected STEP/seed-S/rounds.jsonl in it. "
            "Give a folder that `mergesolve federate` wrote."
        )
    return Study(folder.resolve().name, runs, plan.get("protocol") or {}, tuple(missing), folder)


def _seed(path: Path) -> int:
    text = path.name.removeprefix("seed-")
    if not text.isdecimal():
        raise RunError(f"{path}: expected a folder name such as seed-0. Rename it, or move it out of the study.")
    return int(text)


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    check_schema(path, header)
    for key, kind, word in (("clients", list, "a list"), ("tasks", list, "a list"), ("step", dict, "an object")):
        if not isinstance(header.get(key), kind):
            raise RunError(
                f"{path}: its header lacks '{key}' ({word}), found {header.get(key)!r}. It is a trace of something "
                "else than a federated run."
            )
