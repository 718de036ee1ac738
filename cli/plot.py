"""`mergesolve plot`: figures of runs, side by side."""

from __future__ import annotations

from pathlib import Path

import click

from .flags import json_flag
from .names import choose

FORMATS = ("png", "svg", "pdf")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", metavar="FOLDER", help="Where to (default: RUN/figures for one run, ./figures for several).")
@click.option("--format", "formats", multiple=True, metavar="FORMAT", help="png, svg or pdf; repeatable (png and svg).")
@json_flag
def command(runs: tuple[str, ...], out: str | None, formats: tuple[str, ...], as_json: bool) -> None:
    """Draw runs: coefficients over the iterations (stacked and as lines), layers × experts at the end, objective and
    gap, step sizes, chosen vertices. Several runs stand side by side; an expert has one colour in all figures.

    Runs that are still going, or were killed, are drawn as far as they came.

    \b
    Examples:
      mergesolve plot runs/fw-soft
      mergesolve plot runs/demo/fw-hard runs/demo/fw-soft --out figures --format svg
    """
    from ..reports import read_runs, save_figures
    from .console import note, print_json

    for name in formats:
        choose("format", name, FORMATS)
    read = read_runs(runs)
    folder = Path(out) if out else Path(runs[0]) / "figures" if len(runs) == 1 else Path("figures")
    written = save_figures(read, folder, tuple(formats) or ("png", "svg"))
    if as_json:
        print_json({"figures": [str(path) for path in written]})
    else:
        for path in written:
            note(str(path))
