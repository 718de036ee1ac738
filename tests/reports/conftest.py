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
