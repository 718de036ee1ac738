"""Solvers: minimize an objective over the coefficients of a merge, with a certificate.

result = solve(Problem(pool, objective, blocks="layer", domain="capped"), FrankWolfe())
"""

from .adaptive import AdaptiveGradient
from .bayesian import BayesianOptimization
from .concrete import Concrete, ConcreteMerge, concrete_merge
from .constrained import ConstrainedResult, solve_constrained
from .domains import DOMAINS, Box, Capped, Domain, Free, Simplex, make_domain
from .driver import solve
from .errors import OptionError
from .evolution import CMAES
from .frank_wolfe import FrankWolfe
from .l1_ball import L1Ball
from .loop import STATUSES
from .mirror import MirrorDescent
from .nelder_mead import NelderMead
from .points import Point, Scan, start_point
from .polytope import Polytope, constrain
from .presets import PRESETS
from .problem import Counts, Evaluation, FunctionProblem, MatrixProblem, Problem, Restriction
from .projected_gradient import ProjectedGradient
from .registry import SOLVERS, make_solver
from .released import ReleasedFrankWolfe, ReleasedSoftFrankWolfe
from .result import Result
from .soft_frank_wolfe import SoftFrankWolfe
from .softmax import SoftmaxGradient
from .solver import Certificate, Clock, Solver, State, Step
from .sparse import Sparse
from .step_rules import (
    STEP_RULES,
    Backtracking,
    Fixed,
    LineSearch,
    OpenLoop,
    Search,
    ShortStep,
    StepRule,
    make_step_rule,
)
from .trace import read_trace

__all__ = [
    "CMAES",
    "DOMAINS",
    "PRESETS",
    "SOLVERS",
    "STATUSES",
    "STEP_RULES",
    "AdaptiveGradient",
    "Backtracking",
    "BayesianOptimization",
    "Box",
    "Capped",
    "Certificate",
    "Clock",
    "Concrete",
    "ConcreteMerge",
    "ConstrainedResult",
    "Counts",
    "Domain",
    "Evaluation",
    "Fixed",
    "FrankWolfe",
    "Free",
    "FunctionProblem",
    "L1Ball",
    "LineSearch",
    "MatrixProblem",
    "MirrorDescent",
    "NelderMead",
    "OpenLoop",
    "OptionError",
    "Point",
    "Polytope",
    "Problem",
    "ProjectedGradient",
    "ReleasedFrankWolfe",
    "ReleasedSoftFrankWolfe",
    "Restriction",
    "Result",
    "Scan",
    "Search",
    "ShortStep",
    "Simplex",
    "SoftFrankWolfe",
    "SoftmaxGradient",
    "Solver",
    "Sparse",
    "State",
    "Step",
    "StepRule",
    "concrete_merge",
    "constrain",
    "make_domain",
    "make_solver",
    "make_step_rule",
    "read_trace",
    "solve",
    "solve_constrained",
    "start_point",
]
