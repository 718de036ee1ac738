"""One colour an expert, the same in every figure of a set of runs.

Colours that stay apart under the common colour vision deficiencies: Paul Tol's "muted" scheme (SRON/EPS/TN/09-002,
issue 3.2), darkened where white paper needs it. Nine can be told apart; every other expert is grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .run import Run

COLOURS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#4BA6D4", "#882255", "#2F9E8F", "#8A8A2B", "#AA4499")
GREY = "#B4B4B4"
INK = "#222222"


@dataclass(frozen=True)
class Palette:
    """`colours`: expert -> colour for the experts that stand out, in order of weight; the rest is grey."""

    colours: Mapping[str, str]

    @classmethod
    def of(cls, runs: Sequence[Run], *, limit: int = len(COLOURS)) -> Palette:
        """Colour the experts with the largest mean |λ| over the given runs; ties keep the order of the pool."""
        weight: dict[str, float] = {}
        for run in runs:
            _, path = run.trajectory()
            final = run.final if len(path) == 0 else np.abs(path).mean(axis=0) + np.abs(np.nan_to_num(run.final))
            for expert, value in zip(run.experts, np.nan_to_num(np.abs(final)).mean(axis=0), strict=True):
                weight[expert] = weight.get(expert, 0.0) + float(value)
        ranked = sorted(weight, key=lambda expert: -weight[expert])[: min(limit, len(COLOURS))]
        chosen = [expert for expert in ranked if weight[expert] > 0]
        return cls(dict(zip(chosen, COLOURS, strict=False)))

    def __getitem__(self, expert: str) -> str:
        """Colour of an expert (grey if it does not stand out)."""
        return INK if expert == "base" else self.colours.get(expert, GREY)

    def __contains__(self, expert: str) -> bool:
        return expert in self.colours
