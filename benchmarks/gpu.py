"""Combine and correlate with the pool resident on a GPU, as a share of the rate of a device-to-device copy.

The copy reads and writes each byte once, so its rate is 2 · bytes / seconds. Correlate reads the task vectors and the
gradient; combine reads the task vectors and the base and writes the weights. Both are bound by that traffic.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import torch
from measure import Row, Towers, arguments, random_coefficients, random_gradient, say, show, towers
from mergesolve.pools import Pool

TITLE = "On the GPU against a device-to-device copy"


def why_not() -> str | None:
    """The reason for which there is nothing to measure, if there is one."""
    return None if torch.cuda.is_available() else "no CUDA device"


def device_seconds(function: Callable[..., Any], *args: Any, repeats: int) -> float:
    """The median time between two events on the device: what the host makes it wait for counts."""
    for _ in range(3):
        function(*args)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        function(*args)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def copy_rate(numbers: int, repeats: int) -> float:
    """Bytes read and written a second by a copy of so many float32 numbers."""
    source = torch.randn(numbers, device="cuda")
    return 2 * source.nbytes / device_seconds(torch.empty_like(source).copy_, source, repeats=repeats)


def run(made: Towers, n: int = 8, repeats: int = 20, target: float = 0.7) -> list[Row]:
    """Times both operators by layer and by row."""
    pool = Pool.open(base=made.base, experts=made.experts(n), backend="resident", device="cuda")
    parameters = sum(prod(shape) for shape in pool.tensors.values())
    rate = copy_rate(n * parameters, repeats)
    gradient = random_gradient(dict(pool.tensors), device="cuda")
    rows = []
    for operator, kind in product(("correlate", "combine"), ("layer", "row")):
        say(f"gpu: {operator} by {kind}")
        blocks = pool.blocks(kind)
        if operator == "correlate":
            traffic = (n + 1) * parameters * 4
            taken = device_seconds(pool.correlate, gradient, blocks, repeats=repeats)
        else:
            traffic = (n + 2) * parameters * 4
            taken = device_seconds(pool.combine, random_coefficients(blocks.count, n), blocks, repeats=repeats)
        share = traffic / taken / rate
        figures = {
            "n": str(n),
            "ms": f"{taken * 1000:.2f}",
            "GB/s": f"{traffic / taken / 1e9:.0f}",
            "copy GB/s": f"{rate / 1e9:.0f}",
            "share": f"{share:.2f}",
        }
        rows.append(Row(f"{operator}, resident, by {kind}", figures, share, f"{target}", share >= target))
    say("")
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="timings that a median is taken of")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"{TITLE}: skipped, {reason}")
    else:
        with towers(options.folder, options.architecture) as made:
            print(show(TITLE, run(made, repeats=options.repeats)))
