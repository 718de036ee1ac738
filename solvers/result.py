"""What a solve returns, and how it is kept on disk: result.json, coefficients.safetensors, trace.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .errors import OptionError
from .files import read_arrays, write_arrays, write_json
from .loop import OPTIMAL
from .trace import read_trace

COEFFICIENTS = "coefficients.safetensors"
RESULT = "result.json"
TRACE = "trace.jsonl"


@dataclass
class Result:
    """The outcome of a solve.

    coefficients: Λ [rows, n], float64; experts: names of its columns; blocks: kind of its rows, layers: rows by layer;
    objective, gap (None on the free domain) and stationarity: recomputed from scratch at ``coefficients`` on all the
    objective's data; of an objective without gradient, gap is None and stationarity nan; status: see
    :mod:`.loop`; nit: iterations; best_iteration: the one that is returned; counts: evaluations, gradients, combines,
    correlates, bytes_read; data: what the objective consumed; trace: records; seconds; peak_memory: bytes of this
    process.
    """

    coefficients: np.ndarray
    experts: tuple[str, ...]
    blocks: Any
    layers: dict[str, list[int]]
    objective: float
    tasks: dict[str, float]
    gap: float | None
    stationarity: float
    status: str
    message: str
    nit: int
    best_iteration: int
    counts: dict[str, int]
    data: dict[str, Any]
    seed: int | None
    solver: dict[str, Any]
    domain: dict[str, Any]
    described_objective: dict[str, Any]
    fingerprint: str
    seconds: float = 0.0
    peak_memory: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def success(self) -> bool:
        """Whether the certificate reached the tolerance."""
        return self.status == OPTIMAL

    def save(self, folder: str | Path) -> None:
        """Write result.json and coefficients.safetensors into ``folder`` (the driver writes the trace as it goes)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"experts": self.experts, "blocks": self.blocks, "fingerprint": self.fingerprint}
        write_arrays(folder / COEFFICIENTS, {"coefficients": self.coefficients}, metadata)
        content = {name: value for name, value in vars(self).items() if name not in ("coefficients", "trace")}
        write_json(folder / RESULT, content)

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Read a saved result. Raises OptionError if the folder holds none."""
        folder = Path(folder)
        try:
            content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise OptionError(
                f"{folder} holds no finished run: {RESULT} is missing. Resume it, or name the folder of a finished one."
            ) from None
        except json.JSONDecodeError as error:
            raise OptionError(f"{folder / RESULT} is not valid JSON ({error}). Solve again, or restore it.") from None
        arrays, _ = read_arrays(folder / COEFFICIENTS)
        trace = read_trace(folder / TRACE)[1] if (folder / TRACE).exists() else []
        content["experts"] = tuple(content["experts"])
        if content["stationarity"] is None:  # what JSON makes of nan
            content["stationarity"] = math.nan
        known = {f.name for f in fields(cls)}  # a constrained solve saves more than a plain result holds
        content = {name: value for name, value in content.items() if name in known}
        return cls(coefficients=arrays["coefficients"], trace=trace, **content)
