"""Bayesian optimization: fit a Gaussian process to the values so far, try where it expects the most improvement.

    z⁺ = argmax E[max(f_best − f(z), 0)],   f ~ GP(Matérn 5/2) given the history

The fewest evaluations for one to five numbers, such as the scale of task arithmetic, or one for each of a few groups of
blocks; a fit takes longer with every value, so it is for evaluations that are expensive and few. Needs
`pip install 'mergesolve[search]'`.
Source: Mockus (1975); Jones, Schonlau and Welch (1998).
"""

from __future__ import annotations

import math
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, ClassVar

import numpy as np

from .errors import check_number
from .evolution import require_library
from .solver import State
from .value_search import SCALE, Cube, Live, ValueSearch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BayesianOptimization(ValueSearch):
    """Bayesian optimization with a Gaussian process and expected improvement, for one to a few scales.

    over: "scale", "blocks", "experts" or "coefficients"; lower, upper: interval of each number, where the domain has
    none; initial: values before the first fit, spread evenly, after the start; xi: improvement that is asked
    for, in units of f; seed: of the candidates.
    """

    over: str = SCALE
    initial: int = 5
    xi: float = 0.0
    seed: int = 0
    source: ClassVar[str] = "Mockus (1975); Jones, Schonlau and Welch (1998)"
    most_axes: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "initial", 2, math.inf, closed="left", integer=True)
        check_number(self, "xi", 0, math.inf, closed="left")
        check_number(self, "seed", 0, 2**31, closed="left", integer=True)
        require_library("BayesianOptimization", "bayes_opt")

    def propose(self, cube: Cube, state: State, candidates: Array, values: Array) -> tuple[Array | None, Live | None]:
        """A function of the history, the seed and nothing else."""
        count, size = candidates.shape
        if count < self.initial:
            return spread(count, size, self.seed), None
        from bayes_opt import BayesianOptimization as Optimizer
        from bayes_opt.acquisition import ExpectedImprovement

        axes = [f"z{axis:03d}" for axis in range(size)]
        optimizer = Optimizer(
            f=None,
            acquisition_function=ExpectedImprovement(xi=self.xi),
            pbounds=dict.fromkeys(axes, (0.0, 1.0)),
            random_state=np.random.RandomState([self.seed, count]),
            allow_duplicate_points=True,
            verbose=0,
        )
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # it prints each point that it has met before
            warnings.simplefilter("ignore")  # a length scale at its bound, and points tried twice, are no one's concern
            for z, value in zip(candidates, values, strict=True):
                optimizer.register(dict(zip(axes, z.tolist(), strict=True)), -float(value))
            found = optimizer.suggest()
        return np.array([found[axis] for axis in axes]), None


def spread(index: int, size: int, seed: int) -> Array:
    """Return point ``index`` of an additive sequence that fills [0, 1]^size evenly (Roberts 2018, R_d)."""
    ratio = 2.0
    for _ in range(50):  # the root of x^(d+1) = x + 1: the golden ratio for d = 1
        ratio = (1 + ratio) ** (1 / (size + 1))
    offset = np.random.default_rng(seed).random(size)
    return np.asarray((offset + index * ratio ** -np.arange(1.0, size + 1)) % 1.0)
