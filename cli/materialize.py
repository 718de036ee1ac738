"""`mergesolve materialize`: the merged checkpoint of a run, at any later time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .flags import json_flag
from .names import choose

DTYPES = ("float32", "float16", "bfloat16")


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--out", required=True, metavar="PATH", help="A .safetensors file, or a folder (sharded, with configuration files)."
)
@click.option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16 (default: the base's).")
@json_flag
def command(run: str, out: str, dtype: str | None, as_json: bool) -> None:
    """Write the merged checkpoint of RUN from its coefficients and the pool in its recipe.

    The file is written under a temporary name and renamed; its metadata say where it comes from.

    \b
    Examples:
      mergesolve materialize runs/fw-soft --out merged.safetensors
      mergesolve materialize runs/fw-soft --out merged_folder/ --dtype bfloat16
    """
    from .console import note, print_json
    from .running import Outcome, check_pool, load_outcome, materialize

    if dtype is not None:
        choose("dtype", dtype, DTYPES)
    outcome: Outcome = load_outcome(Path(run))
    check_pool(outcome)
    written: list[Any] = materialize(outcome, Path(out), dtype)
    if as_json:
        print_json({"run": run, "written": [str(path) for path in written]})
    else:
        note(f"wrote {', '.join(str(path) for path in written)}")
