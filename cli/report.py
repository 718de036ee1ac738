"""`mergesolve report`: one HTML page of one run or several."""

from __future__ import annotations

from pathlib import Path

import click

from .flags import json_flag
from .names import UsageProblem


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", metavar="FILE", help="Where to (default: RUN/report.html for one run, ./report.html for several)."
)
@json_flag
def command(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Write one HTML page of a run, or of several side by side, to read in a browser without a network.

    Coefficients over the iterations, the active set, layers × experts with a slider, the oracle's scores, objective
    and gap, losses by task, step sizes, chosen vertices, cost, data and recipe. Long runs are thinned, and the page
    says so. Runs that are still going, or were killed, are drawn as far as they came.

    \b
    Examples:
      mergesolve report runs/fw-hard
      mergesolve report runs/fw-hard runs/fw-soft --out comparison.html
    """
    from ..reports import read_runs, save_report
    from .console import note, print_json

    path = Path(out) if out else Path(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageProblem(f"--out '{path}': name a file that ends in .html.")
    save_report(read_runs(runs), path)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        note(str(path))
