"""Frank-Wolfe variants with each step rule on one test problem: iterations and calls to a gap of 1e-8.

python benchmarks/variants.py                    the table of docs/solvers.md (on "100 experts"), about a minute
python benchmarks/variants.py --problem face     on another problem of docs/test-problems.md
"""

from __future__ import annotations

import argparse
import sys

from mergesolve.solvers import STEP_RULES, FunctionProblem, OptionError, make_solver, solve
from mergesolve.solvers.instances import INSTANCES

VARIANTS = (
    "frank-wolfe",
    "lazy-frank-wolfe",
    "block-frank-wolfe",
    "away-frank-wolfe",
    "pairwise-frank-wolfe",
    "blended-pairwise-frank-wolfe",
)
MAX_ITER = 1000
TOLERANCE = 1e-8


def cell(name: str, variant: dict[str, object]) -> str:
    """Iterations, and in brackets gradients and evaluations; where the tolerance is missed, the gap that is left."""
    instance = INSTANCES[name]
    problem = FunctionProblem(
        instance.function, *instance.shape, instance.domain, quadratic=instance.function.link == "square"
    )
    try:
        result = solve(problem, make_solver(variant), start=instance.start, max_iter=MAX_ITER, tol=TOLERANCE)
    except OptionError:
        return "refused"
    calls = f"({result.counts['gradients']} + {result.counts['evaluations']})"
    if result.success:
        return f"{result.nit} {calls}"
    lowest = min(line["gap"] for line in result.trace)
    return f"*{lowest:.0e}*"


def main() -> int:
    """Print one row a rule, one column a variant, and the corrective variant below."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="100 experts", choices=INSTANCES)
    name = parser.parse_args().problem
    write = sys.stdout.write
    write(f"| step rule | {' | '.join(VARIANTS)} |\n|{'---|' * (len(VARIANTS) + 1)}\n")
    for rule in STEP_RULES:
        options = {"smoothness": INSTANCES[name].smoothness} if rule == "short-step" else {}
        step_rule = {"name": rule, **options}
        cells = [cell(name, {"name": variant, "step_rule": step_rule}) for variant in VARIANTS]
        write(f"| {rule} | {' | '.join(cells)} |\n")
        sys.stdout.flush()
    for inner in ("quadratic", "projected-gradient"):
        found = cell(name, {"name": "corrective-frank-wolfe", "inner": inner})
        write(f"\ncorrective-frank-wolfe, inner {inner}: {found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
