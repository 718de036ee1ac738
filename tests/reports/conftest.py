"""Run folders written through the documented schema, without any solve."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """write_run(name, experts=.., layers=.., iterations=.., domain=.., finished=.., vertices=..) -> folder."""

    def write(
        name: str = "run",
        *,
        experts: Sequence[str] = ("a", "b", "c"),
        layers: Sequence[str] = ("first", "second"),
        iterations: int = 6,
        domain: str = "capped",
        finished: bool = True,
        vertices: bool = True,
        estimate: bool = False,
        tail: str = "",
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        header = {
            "schema": 1,
            "experts": list(experts),
            "layers": list(layers),
            "solver": {"name": "frank-wolfe"},
            "domain": {"name": domain},
            "objective": {"objective": "CrossEntropy"},
        }
        lines: list[dict[str, Any]] = [header]
        matrix = np.zeros((len(layers), len(experts)))
        for k in range(iterations):
            step = rng.random(matrix.shape) / len(experts)
            matrix = matrix + 0.1 * (step - matrix) if domain != "free" else matrix + 0.3 * (step - 0.4 / len(experts))
            chosen = {"a": 0.75, "base": 0.25} if "a" in experts else {experts[k % len(experts)]: 1.0}
            lines.append(
                {
                    "iteration": k,
                    "value": 2.0 / (k + 1),
                    "gap": None if domain == "free" else 1.0 / (k + 1) ** 2,
                    "stationarity": 0.5 / (k + 1),
                    "estimate": estimate,
                    "step": None if k == iterations - 1 else 2 / (k + 2),
                    "vertices": list(chosen) if vertices and k < iterations - 1 else None,
                    "vertex_share": list(chosen.values()) if vertices and k < iterations - 1 else None,
                    "tasks": {"one": 1.0 / (k + 1), "two": 3.0 / (k + 1)},
                    "coefficients": matrix.tolist(),
                    "seconds": float(k),
                }
            )
        (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        if finished:
            rows = {layer: [2 * k, 2 * k + 1] for k, layer in enumerate(layers)}  # two rows a layer
            spread = np.repeat(matrix, 2, axis=0) + np.tile([[0.01], [-0.01]], (len(layers), 1))
            save_file({"coefficients": spread}, folder / "coefficients.safetensors")
            result = {"experts": list(experts), "layers": rows, "status": "max_iter", "domain": {"name": domain}}
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


NAMES = ("dots", "gratings", "digits", "letters", "shapes", "glyphs", "textures", "flags", "waves")
STEPS: tuple[dict[str, Any], ...] = (
    {"name": "average"},
    {"name": "paint", "alpha": 0.05},
    *({"name": "task-arithmetic", "scale": scale} for scale in (0.05, 0.1, 0.2, 0.3, 0.5)),
    {"name": "ties", "scale": 0.3},
    {"name": "magmax", "scale": 0.5},
    {"name": "fw-hard"},
    {"name": "adamerging"},
    *({"name": "retention", "retention": {"bound": bound}} for bound in (0.02, 0.05, 0.1, 0.3)),
)


def label_of(step: dict[str, Any]) -> str:
    values = [next(iter(value.values())) if isinstance(value, dict) else value for value in step.values()]
    return "-".join(map(str, values))


@pytest.fixture
def write_federated() -> Callable[..., Path]:
    """write_federated(folder, step=.., seed=.., rounds=.., clients=.., reference=.., rejected=..) -> folder."""
    return _write_federated


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """write_study(name, steps=.., seeds=.., **options of write_federated) -> folder of a study."""

    def write(
        name: str = "study",
        *,
        steps: Sequence[dict[str, Any]] = STEPS,
        seeds: Sequence[int] = (0, 1, 2),
        **options: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        plan = {"steps": [label_of(step) for step in steps], "seeds": list(seeds), "protocol": {"name": "synthetic"}}
        (folder / "study.json").write_text(json.dumps(plan))
        for step in steps:
            for seed in seeds:
                _write_federated(folder / label_of(step) / f"seed-{seed}", step=step, seed=seed, **options)
        return folder

    return write


def _write_federated(
    folder: Path,
    *,
    step: dict[str, Any] | None = None,
    seed: int = 0,
    rounds: int = 10,
    planned: int | None = None,
    clients: Sequence[str] = NAMES,
    reference: bool = True,
    rejected: dict[int, Sequence[str]] | None = None,
    tail: str = "",
) -> Path:
    """A trace as a server writes it, with numbers that look like those of a study: some steps learn and forget."""
    step = step or {"name": "average"}
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *label_of(step).encode()])
    n = len(clients)
    strength = float(step.get("scale", step.get("alpha", 0.11)))
    solver = step["name"] in ("fw-hard", "adamerging", "retention")
    epsilon = step.get("retention", {}).get("bound")
    first = {name: 40.0 + 2 * k for k, name in enumerate(clients)}
    start = {"accuracy": first, "mean": float(np.mean(list(first.values()))), "reference": 90.0 if reference else None}
    header = {
        "schema": 1, "protocol": "synthetic", "clients": list(clients), "tasks": list(clients), "step": step,
        "rounds": planned or rounds, "seed": seed, "start": start,
    }  # fmt: skip
    lines: list[dict[str, Any]] = [header]
    for t in range(1, rounds + 1):
        out = [name for name in (rejected or {}).get(t, ()) if name in clients]
        accepted = [name for name in clients if name not in out]
        rise = 1 - np.exp(-t / 3)
        fall = max(0.0, strength - 0.15) * 7 * t if not solver else 0.0
        gain = (14 + 20 * (epsilon or 0.1)) * rise if solver else 12 * min(strength, 0.2) / 0.2 * rise - fall
        accuracy = {name: first[name] + gain + rng.normal(0, 0.8) for name in clients}
        lost = (60 * epsilon if epsilon else 9.0) * rise if solver else (6 + 60 * strength) * rise + fall
        vectors = rng.normal(size=(len(accepted), 60)) + 0.5 / t
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        weights = rng.dirichlet(np.ones(len(accepted) + 1)) if solver else [strength] * len(accepted)
        coefficients = dict(zip([*accepted, "origin"] if solver else accepted, map(float, weights), strict=True))
        part = 3.0 if solver else 0.05
        method: dict[str, Any] = {"status": "optimal"}
        if epsilon:
            method |= {"bound": epsilon, "reference_loss": epsilon * (1 + 0.2 * np.exp(-t) * rng.normal()),
                       "multiplier": 2 * rise / epsilon}  # fmt: skip
        seconds = {
            "clients": 20.0, "screen": 0.02, "read": 0.1, "combine": 0.3 * part, "objective": 2 * part * solver,
            "correlate": 0.5 * part * solver, "write": 0.05, "evaluate": 4.0, "server": 0.2 + 2.8 * part,
        }  # fmt: skip
        lines.append(
            {
                "round": t,
                "attempt": 1,
                "repeat": False,
                "accepted": accepted,
                "rejected": [{"client": name, "reason": "nonfinite", "detail": ""} for name in out],
                "accuracy": accuracy,
                "mean": float(np.mean(list(accuracy.values()))),
                "reference": 90.0 - lost + rng.normal(0, 0.4) if reference else None,
                "cosines": (vectors @ vectors.T).tolist(),
                "norms": {name: 1.0 + rng.random() for name in accepted},
                "conflict": 0.5,
                "step_length": 0.3 / t,
                "distance": 0.1 * t,
                "coefficients": coefficients,
                "method": method,
                "data": {"labelled": 0, "unlabelled": 200 * n * solver},
                "seconds": seconds,
                "bytes": {"down": 1.9e6 * n, "up": 1.9e6 * len(accepted)},
                "peak_memory": 4e8 + 1e8 * solver,
            }
        )
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder
