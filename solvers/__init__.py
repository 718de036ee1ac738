"""Solvers: minimize an objective over the coefficients of a merge, with a certificate.

result = solve(Problem(pool, objective, blocks="layer", domain="capped"), FrankWolfe())
"""

from .adaptive import AdaptiveGradient
from .away_frank_wolfe import AwayFrankWolfe
from .bayesian import BayesianOptimization
from .blended_frank_wolfe import BlendedPairwiseFrankWolfe
from .block_frank_wolfe import BlockFrankWolfe
from .concrete import Concrete, ConcreteMerge, concrete_merge
from .constrained import ConstrainedResult, solve_constrained
from .corrective_frank_wolfe import CorrectiveFrankWolfe
from .domains import DOMAINS, Box, Capped, Domain, Free, Simplex, make_domain
from .driver import solve
from .errors import OptionError
from .evolution import CMAES
from .frank_wolfe import FrankWolfe
from .l1_ball import L1Ball
from .lazy_frank_wolfe import LazyFrankWolfe
from .loop import STATUSES
from .mgda import MGDA, PCGrad
from .minimax import Minimax
from .mirror import MirrorDescent
from .nelder_mead import NelderMead
from .pairwise_frank_wolfe import PairwiseFrankWolfe
from .pareto import Front, Plan, hypervolume, pareto_front, surrogate_front
from .points import Point, Scan, start_point
from .polytope import Polytope, constrain
from .presets import PRESETS
from .problem import Counts, Evaluation, FunctionProblem, MatrixProblem, Problem, Restriction
from .projected_gradient import ProjectedGradient
from .registry import SOLVERS, make_solver
from .released import ReleasedFrankWolfe, ReleasedSoftFrankWolfe
from .result import Result
from .scalarization import SCALARIZATIONS, Chebyshev, Scalarized, WeightedSum, Worst, make_scalarization, worst_gap
from .soft_frank_wolfe import SoftFrankWolfe
from .softmax import SoftmaxGradient
from .solver import Certificate, Clock, Solver, State, Step
from .sparse import Sparse
from .step_rules import (
    STEP_RULES,
    Armijo,
    Backtracking,
    Brent,
    Exact,
    Fixed,
    LineSearch,
    Logarithmic,
    Monotone,
    OpenLoop,
    Search,
    Secant,
    ShortStep,
    SquareRoot,
    StepRule,
    make_step_rule,
)
from .stochastic_frank_wolfe import StochasticFrankWolfe
from .surrogate import Surrogate, fit_surrogate
from .trace import read_trace

__all__ = [
    "CMAES",
    "DOMAINS",
    "MGDA",
    "PRESETS",
    "SCALARIZATIONS",
    "SOLVERS",
    "STATUSES",
    "STEP_RULES",
    "AdaptiveGradient",
    "Armijo",
    "AwayFrankWolfe",
    "Backtracking",
    "BayesianOptimization",
    "BlendedPairwiseFrankWolfe",
    "BlockFrankWolfe",
    "Box",
    "Brent",
    "Capped",
    "Certificate",
    "Chebyshev",
    "Clock",
    "Concrete",
    "ConcreteMerge",
    "ConstrainedResult",
    "CorrectiveFrankWolfe",
    "Counts",
    "Domain",
    "Evaluation",
    "Exact",
    "Fixed",
    "FrankWolfe",
    "Free",
    "Front",
    "FunctionProblem",
    "L1Ball",
    "LazyFrankWolfe",
    "LineSearch",
    "Logarithmic",
    "MatrixProblem",
    "Minimax",
    "MirrorDescent",
    "Monotone",
    "NelderMead",
    "OpenLoop",
    "OptionError",
    "PCGrad",
    "PairwiseFrankWolfe",
    "Plan",
    "Point",
    "Polytope",
    "Problem",
    "ProjectedGradient",
    "ReleasedFrankWolfe",
    "ReleasedSoftFrankWolfe",
    "Restriction",
    "Result",
    "Scalarized",
    "Scan",
    "Search",
    "Secant",
    "ShortStep",
    "Simplex",
    "SoftFrankWolfe",
    "SoftmaxGradient",
    "Solver",
    "Sparse",
    "SquareRoot",
    "State",
    "Step",
    "StepRule",
    "StochasticFrankWolfe",
    "Surrogate",
    "WeightedSum",
    "Worst",
    "concrete_merge",
    "constrain",
    "fit_surrogate",
    "hypervolume",
    "make_domain",
    "make_scalarization",
    "make_solver",
    "make_step_rule",
    "pareto_front",
    "read_trace",
    "solve",
    "solve_constrained",
    "start_point",
    "surrogate_front",
    "worst_gap",
]
