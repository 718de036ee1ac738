"""CMA-ES: draw candidates from a normal distribution, move it toward the better half, learn its covariance.

    z ~ N(m, σ² C),   m ← Σ_best w_k z_k,   C and σ from the paths that m takes

It compares values only, so that accuracy, which has no gradient and is constant in small steps, is as good an
objective as any; and it is not stopped by the local minima of a rugged one. It needs some hundred evaluations for ten
numbers, each of them a pass over the data. Needs `pip install 'mergesolve[search]'`.
Source: Hansen and Ostermeier (2001); Hansen (2016), The CMA evolution strategy: a tutorial; for merging: Akiba et al.
(2025), Evolutionary optimization of model merging recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from .errors import OptionError, check_number
from .value_search import Candidates, StrategySearch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CMAES(StrategySearch):
    """CMA-ES, an evolution strategy that learns its covariance, on values alone.

    over: "scale", "blocks", "experts" or "coefficients"; lower, upper: interval of each number, where the domain has
    none; sigma: first standard deviation, as a share of the interval; population: candidates a generation, None for
    4 + 3 ln d; seed: of the candidates.
    """

    sigma: float = 0.2
    population: int | None = None
    seed: int = 0
    source: ClassVar[str] = "Hansen and Ostermeier (2001); Akiba et al. (2025) for merging"
    most_axes: ClassVar[int] = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "sigma", 0, 1, closed="right")
        if self.population is not None:
            check_number(self, "population", 2, math.inf, closed="left", integer=True)
        check_number(self, "seed", 0, math.inf, closed="left", integer=True)
        require_library("CMAES", "cma")

    def strategy(self, start: Array, inside: Callable[[Array], bool]) -> Candidates:
        """The package's own strategy, with random numbers that nobody else draws from."""
        from cma import CMAEvolutionStrategy

        rng = np.random.default_rng(self.seed)
        yield start
        options = {
            "bounds": [0, 1],
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan,  # leave NumPy's global generator alone
            "verbose": -9,
            "verb_log": 0,
            **({} if self.population is None else {"popsize": self.population}),
        }
        first = start if len(start) > 1 else np.append(start, 0.5)  # the package fails on one axis; this one is idle
        evolution = CMAEvolutionStrategy(first, self.sigma, options)
        while not evolution.stop():
            candidates = evolution.ask()
            values = []
            for candidate in candidates:
                values.append((yield np.array(candidate[: len(start)])))
            evolution.tell(candidates, values)


def require_library(owner: str, module: str) -> None:
    """Raise OptionError with the line that installs it unless the module can be imported."""
    if find_spec(module) is None:
        raise OptionError(f"{owner} needs the package {module!r}. Install it with: pip install 'mergesolve[search]'.")
