"""Combine and correlate, as a share of one plain pass over the same bytes on the same machine.

The plain pass is the least that anybody could do with the numbers already in memory: for correlate one
``torch.dot(gradient, model)`` a model, for combine one ``buffer.copy_(model)`` a model. "The same bytes" are those that
the backend reads: n experts and the base when streaming from files in the page cache, n task vectors when they are
resident. A share of 1 is the speed of the plain pass.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Literal

import torch
from measure import Row, Towers, arguments, random_coefficients, random_gradient, say, seconds, show, towers
from mergesolve.pools import Pool

TITLE = "Operators against a plain pass over the same bytes"
TARGETS: dict[Literal["streaming", "resident"], float] = {"streaming": 0.5, "resident": 0.8}


def run(made: Towers, n: int = 8, repeats: int = 15) -> list[Row]:
    """Times both operators on both backends, by layer and by row."""
    return [row for backend in TARGETS for row in run_backend(made, backend, n, repeats)]


def run_backend(made: Towers, backend: Literal["streaming", "resident"], n: int, repeats: int) -> list[Row]:
    """The four rows of one backend. Its task vectors and the plain copies are in memory only while this runs."""
    pool = Pool.open(base=made.base, experts=made.experts(n), backend=backend)
    parameters = sum(prod(shape) for shape in pool.tensors.values())
    plain = torch.randn(n + 1 if backend == "streaming" else n, parameters)
    read = plain.nbytes
    flat, buffer = torch.randn(parameters), torch.empty(parameters)
    gradient = random_gradient(dict(pool.tensors))
    blocks = {kind: pool.blocks(kind) for kind in ("layer", "row")}
    coefficients = {kind: random_coefficients(rows.count, n) for kind, rows in blocks.items()}

    def correlate(kind: str) -> None:
        pool.correlate(gradient, blocks[kind])

    def combine(kind: str) -> None:
        pool.combine(coefficients[kind], blocks[kind])

    def dots() -> None:
        for model in plain:
            torch.dot(flat, model)

    def copies() -> None:
        for model in plain:
            buffer.copy_(model)

    rows = []
    for (operator, least), kind in product(((correlate, dots), (combine, copies)), blocks):
        what = f"{operator.__name__}, {backend}, by {kind}"
        say(f"operators: {what}")
        ours, plainly = seconds((operator, kind), (least,), repeats=repeats)
        share = plainly / ours
        figures = {
            "n": str(n),
            "seconds": f"{ours:.2f}",
            "GB/s": f"{read / ours / 1e9:.1f}",
            "plain pass GB/s": f"{read / plainly / 1e9:.1f}",
            "share": f"{share:.2f}",
        }
        rows.append(Row(what, figures, share, f"{TARGETS[backend]}", share >= TARGETS[backend]))
    say("")
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timings that a median is taken of")
    options = parser.parse_args()
    with towers(options.folder, options.architecture) as made:
        print(show(TITLE, run(made, repeats=options.repeats)))
