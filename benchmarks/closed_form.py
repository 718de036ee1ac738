"""Closed-form merges of 8 towers beside mergekit and fusion_bench on the same files, and our peak memory for 72 towers.

Each merge runs in a process of its own, on one thread, from files to merged weights in memory. CPU seconds are user and
system time after the imports; memory is the peak above what the process held once the libraries were loaded. The peers
are those in .venv-peers, which `make parity` makes; without it their rows say so. The 72 towers are 72 different files
(25 GB), made when the disk has room.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measure import Row, Towers, arguments, say, show, towers

TITLE = "Closed-form merges, from files to weights in memory"
ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
METHODS = ("average", "task arithmetic", "TIES, per tensor", "TIES, whole model", "DARE")
SHARES = {"average": 1.0, "task arithmetic": 1.0, "TIES, per tensor": 1 / 8, "TIES, whole model": 1 / 8, "DARE": 1 / 4}
BY_PEER = {
    "mergekit": ("average", "task arithmetic", "TIES, per tensor", "DARE"),
    "fusion_bench": ("average", "task arithmetic", "TIES, whole model", "DARE"),
}
RIVALS = {"TIES, whole model": "TIES, per tensor"}  # mergekit has only the latter
COPIES = {("fusion_bench", "TIES, whole model"): 65}  # models in memory at the peak, as far as that is too many
Found = dict[str, float] | str  # what a process measured about itself, or why there is nothing


def obstacle(made: Towers, tool: str, method: str) -> str | None:
    """Why a tool's merge cannot be measured here, if it cannot."""
    if tool != "mergesolve" and not PEERS.exists():
        return "no .venv-peers: make parity"
    information = Path("/proc/meminfo")
    if (tool, method) in COPIES and information.exists():
        line = next(line for line in information.read_text().splitlines() if line.startswith("MemAvailable:"))
        free, needed = int(line.split()[1]) * 1024, COPIES[tool, method] * made.bytes
        if needed > free:
            return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    return None


def measure(made: Towers, tool: str, method: str, count: int, write: bool = False) -> Found:
    """What one_merge.py says, the median of up to five quick runs by CPU time; or why there is nothing to say."""
    reason = obstacle(made, tool, method)
    if reason:
        return reason
    say(f"closed_form: {method} of {count} by {tool}")
    python = sys.executable if tool == "mergesolve" else str(PEERS)
    script = str(Path(__file__).with_name("one_merge.py"))
    command = [python, script, tool, method, str(made.folder), str(count), *(["--write"] if write else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    runs: list[dict[str, float]] = []
    while len(runs) < 5 and sum(run["seconds"] for run in runs) < 10:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            return "ended by the kernel: out of memory" if done.returncode == -9 else lines[-1] if lines else "failed"
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    middle = statistics.median_low([run["cpu"] for run in runs])
    return next(run for run in runs if run["cpu"] == middle)


def row(made: Towers, what: str, tool: str, n: int, found: Found, share: float | None = None, of: Found = "") -> Row:
    """One line; ours has targets: the memory that it may take, and with `share` its CPU time as a share of a peer's."""
    if isinstance(found, str):
        return Row(what, {"n": str(n), "by": tool, "CPU s": f"skipped: {found}"}, float("nan"))
    own = found["peak"] - found["libraries"]
    figures = {
        "n": str(n),
        "by": tool,
        "CPU s": f"{found['cpu']:.2f}",
        "peak MB": f"{own / 1e6:.0f}",
        "in model copies": f"{own / made.bytes:.1f}",
    }
    if tool != "mergesolve":
        return Row(what, figures, found["cpu"])
    target, met = "2 copies + 500 MB", own <= 2 * made.bytes + 500e6
    if share is not None and not isinstance(of, str):
        figures["of mergekit's CPU"] = f"{found['cpu'] / of['cpu']:.3f}"
        target, met = f"{share:.3g} of mergekit's CPU, {target}", met and found["cpu"] <= share * of["cpu"]
    return Row(what, figures, found["cpu"], target, met)


def run(made: Towers, counts: tuple[int, int] = (8, 72), methods: tuple[str, ...] = METHODS) -> list[Row]:
    """For each method our row, ours into a file, and the peers'; then ours for the larger pool."""
    few, many = counts
    warm([made.base, *made.experts(few).values()])
    rivals = {
        (tool, method): measure(made, tool, method, few)
        for tool, theirs in BY_PEER.items()
        for method in theirs
        if method in methods or method in [RIVALS.get(ours) for ours in methods]
    }
    rows = []
    for method in methods:
        rival = rivals["mergekit", RIVALS.get(method, method)]
        found = measure(made, "mergesolve", method, few)
        rows.append(row(made, method, "mergesolve", few, found, SHARES[method], rival))
        written = measure(made, "mergesolve", method, few, write=True)
        rows.append(row(made, f"{method}, into a file", "mergesolve", few, written))
        rows += [row(made, method, tool, few, rivals[tool, method]) for tool in BY_PEER if (tool, method) in rivals]
    try:
        made.experts(many)
    except OSError as error:
        return [*rows, row(made, "a larger pool", "mergesolve", many, str(error))]
    rows += [row(made, method, "mergesolve", many, measure(made, "mergesolve", method, many)) for method in methods]
    say("")
    return rows


def warm(paths: list[Path]) -> None:
    """Read the files once, so that no tool pays for the disk."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--many", type=int, default=72, help="towers of the larger pool")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this method (may be repeated)")
    options = parser.parse_args()
    with towers(options.folder, options.architecture) as made:
        print(show(TITLE, run(made, (8, options.many), tuple(options.method or METHODS))))
