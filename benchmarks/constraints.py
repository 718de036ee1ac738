"""Seconds that the projection and the oracle of constraints take: python benchmarks/constraints.py BLOCKS."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from mergesolve.solvers import constrain

EXPERTS = 24
CASES = {
    "floors and caps": ["e0 <= 0.2", "each(*) <= 0.5", "e1 >= 0.05"],
    "two group budgets": ["sum(e0, e1, e2) <= 0.3", "2*e3 + e4 <= 0.5"],
    "a mean over blocks": ["mean(e0) >= 0.1", "sum(e0, e1) <= 0.4"],
    "an expert tied over blocks": ["e0 == same", "e1 <= 0.2"],
}
COUPLED = ("a mean over blocks", "an expert tied over blocks")
LARGEST_COUPLED = 2000


def best(function: Callable[[np.ndarray], np.ndarray], inputs: list[np.ndarray]) -> float:
    """The fastest call after the first."""
    function(inputs[0])
    seconds = []
    for matrix in inputs[1:]:
        began = time.perf_counter()
        function(matrix)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    """Print one line a kind of constraint; those that couple blocks up to 2000 blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("blocks", type=int, metavar="BLOCKS")
    blocks = parser.parse_args().blocks
    names = [f"e{i}" for i in range(EXPERTS)]
    rng = np.random.default_rng(0)
    points = [1 / EXPERTS + 0.1 * rng.normal(size=(blocks, EXPERTS)) for _ in range(3)]
    print(f"{blocks} blocks, {EXPERTS} experts, within the simplex; seconds a call")
    for case, texts in CASES.items():
        if case in COUPLED and blocks > LARGEST_COUPLED:
            continue
        domain = constrain("simplex", texts).bind(names, [f"b{row}" for row in range(blocks)])
        print(
            f"{case:28} projection {best(domain.project, points):8.4f}   oracle {best(domain.minimizer, points):8.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
