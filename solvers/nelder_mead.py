"""Nelder-Mead: a simplex of d + 1 merges that crawls downhill by reflecting its worst one. Values only, no randomness.

    x_r = x̄ + (x̄ − x_worst),   else expanded by χ = 1 + 2/d, contracted by ψ = 3/4 − 1/2d, or all shrunk by 1 − 1/d

Choose it for up to five or ten numbers and smooth values. On accuracy, which is constant in small steps, the first
simplex must be larger than the steps; when it has shrunk, a new one is laid around the best point, which is also what
helps where the method stalls short of a minimum. There is no convergence guarantee (McKinnon 1998).
Source: Nelder and Mead (1965); coefficients by dimension: Gao and Han (2012); restart: Kelley (1999), simplified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .errors import check_number
from .value_search import Candidates, StrategySearch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class NelderMead(StrategySearch):
    """Nelder-Mead's simplex search, on values alone.

    over: "scale", "blocks", "experts" or "coefficients"; lower, upper: interval of each number, where the domain has
    none; edge: of the first simplex, as a share of the interval; xtol: edge at which a simplex has shrunk, in the same
    unit; restarts: how many new ones are laid around the best point then.
    """

    edge: float = 0.25
    xtol: float = 1e-4
    restarts: int = 1
    source: ClassVar[str] = "Nelder and Mead (1965); Gao and Han (2012)"
    most_axes: ClassVar[int] = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "edge", 0, 0.5, closed="right")
        check_number(self, "xtol", 0, self.edge, closed="neither")
        check_number(self, "restarts", 0, math.inf, closed="left", integer=True)

    def strategy(self, start: Array, inside: Callable[[Array], bool]) -> Candidates:
        """Nelder-Mead with candidates clipped to the cube, as scipy's with bounds.

        The first simplex lies inside the domain if it can: outside, where candidates are projected, f is flat along the
        normals of the boundary, and a simplex that begins there would collapse onto it.
        """
        d = len(start)
        expand, contract, shrink = (1 + 2 / d, 0.75 - 0.5 / d, 1 - 1 / d) if d > 1 else (2.0, 0.5, 0.5)
        best, best_value = start, (yield start)
        for _ in range(self.restarts + 1):
            simplex, values = [best], [best_value]
            for axis in range(d):
                edge = self.edge * np.eye(d)[axis]
                corner = best + edge if inside(best + edge) or not inside(best - edge) else best - edge
                corner = corner if ((corner >= 0) & (corner <= 1)).all() else best - edge
                simplex.append(corner)
                values.append((yield corner))
            points, heights = np.array(simplex), np.array(values)
            while True:
                order = np.argsort(heights, kind="stable")
                points, heights = points[order], heights[order]
                if np.abs(points[1:] - points[0]).max() <= self.xtol:
                    break
                middle = points[:-1].sum(axis=0) / d
                away = middle - points[-1]
                reflected = np.clip(middle + away, 0, 1)
                value = yield reflected
                if value < heights[0]:
                    further = np.clip(middle + expand * away, 0, 1)
                    height = yield further
                    points[-1], heights[-1] = (further, height) if height < value else (reflected, value)
                    continue
                if value < heights[-2]:
                    points[-1], heights[-1] = reflected, value
                    continue
                outside = value < heights[-1]
                nearer = np.clip(middle + (contract if outside else -contract) * away, 0, 1)
                height = yield nearer
                if height <= value if outside else height < heights[-1]:
                    points[-1], heights[-1] = nearer, height
                    continue
                for corner_index in range(1, d + 1):
                    points[corner_index] = points[0] + shrink * (points[corner_index] - points[0])
                    heights[corner_index] = yield points[corner_index].copy()
            best, best_value = points[0], float(heights[0])
