"""How Flower runs ended, as an exit status: `flwr run` exits with 0 also when the run failed.

    python -m mergesolve.federated.flower.status [SUPERLINK] [--run-id ID]

exits with 0 if the run (the latest one, unless an id is given) is complete, with 1 and a line that says why if it
failed, was stopped or still runs, and with 2 if Flower cannot be asked.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import FederationError


def verdict(runs: Sequence[Mapping[str, Any]], run_id: str | None = None) -> tuple[bool, str]:
    """Return whether a run of `flwr ls --format json` is complete, and one line about it.

    Raises FederationError if there is no such run.
    """
    if not runs:
        raise FederationError("flower: the SuperLink knows no run; start one with flwr run.")
    known = {str(run["run-id"]): run for run in runs}
    if run_id is not None and run_id not in known:
        raise FederationError(f"flower: the SuperLink knows no run {run_id}; it knows {', '.join(sorted(known))}.")
    run = max(runs, key=lambda run: str(run["pending-at"])) if run_id is None else known[run_id]
    complete = run["status"] == "finished:completed"
    why = "" if complete else f" ({run.get('status-details') or 'no details'})"
    return complete, f"run {run['run-id']}: {run['status']} after {float(run['elapsed']):.0f} s{why}"


def ask(superlink: str | None) -> list[dict[str, Any]]:
    """Return the runs that a SuperLink knows. Raises FederationError if it does not answer."""
    beside = Path(sys.executable).with_name("flwr")
    command = [str(beside) if beside.exists() else shutil.which("flwr") or "flwr", "ls"]
    found = subprocess.run(
        [*command, *([superlink] if superlink else []), "--format", "json"], capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(found.stdout)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        said = answer.get("error-message") or found.stderr.strip() or found.stdout.strip() or "no answer"
        raise FederationError(f"flower: flwr ls failed: {said}")
    return list(answer["runs"])


@click.command()
@click.argument("superlink", required=False)
@click.option("--run-id", help="The run that is meant; the latest one by default.")
def main(superlink: str | None, run_id: str | None) -> None:
    """Say how a Flower run ended, and exit with 0 only if it is complete."""
    try:
        complete, line = verdict(ask(superlink), run_id)
    except (FederationError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(line, err=not complete)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
