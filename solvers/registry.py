"""The table of solvers that the command line, the docs and the common tests read. Adding one is one line here."""

from __future__ import annotations

from .adaptive import AdaptiveGradient
from .away_frank_wolfe import AwayFrankWolfe
from .bayesian import BayesianOptimization
from .blended_frank_wolfe import BlendedPairwiseFrankWolfe
from .block_frank_wolfe import BlockFrankWolfe
from .construct import construct
from .corrective_frank_wolfe import CorrectiveFrankWolfe
from .evolution import CMAES
from .frank_wolfe import FrankWolfe
from .lazy_frank_wolfe import LazyFrankWolfe
from .mgda import MGDA, PCGrad
from .minimax import Minimax
from .mirror import MirrorDescent
from .nelder_mead import NelderMead
from .pairwise_frank_wolfe import PairwiseFrankWolfe
from .points import Point, Scan
from .projected_gradient import ProjectedGradient
from .released import ReleasedFrankWolfe, ReleasedSoftFrankWolfe
from .soft_frank_wolfe import SoftFrankWolfe
from .softmax import SoftmaxGradient
from .solver import Solver
from .stochastic_frank_wolfe import StochasticFrankWolfe

SOLVERS: dict[str, type[Solver]] = {
    "frank-wolfe": FrankWolfe,
    "away-frank-wolfe": AwayFrankWolfe,
    "pairwise-frank-wolfe": PairwiseFrankWolfe,
    "blended-pairwise-frank-wolfe": BlendedPairwiseFrankWolfe,
    "corrective-frank-wolfe": CorrectiveFrankWolfe,
    "block-frank-wolfe": BlockFrankWolfe,
    "stochastic-frank-wolfe": StochasticFrankWolfe,
    "lazy-frank-wolfe": LazyFrankWolfe,
    "soft-frank-wolfe": SoftFrankWolfe,
    "projected-gradient": ProjectedGradient,
    "mirror-descent": MirrorDescent,
    "adaptive": AdaptiveGradient,
    "softmax-gradient": SoftmaxGradient,
    "cma-es": CMAES,
    "nelder-mead": NelderMead,
    "bayesian": BayesianOptimization,
    "point": Point,
    "scan": Scan,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "minimax": Minimax,
    "released-frank-wolfe": ReleasedFrankWolfe,
    "released-soft-frank-wolfe": ReleasedSoftFrankWolfe,
}


def make_solver(spec: object) -> Solver:
    """Return a solver from an instance, a name, or a mapping with a name and options."""
    return construct("solver", SOLVERS, spec)
