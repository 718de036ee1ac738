"""`mergesolve list`: what the registries hold. Imports no torch."""

from __future__ import annotations

from typing import Any

import click

from .flags import json_flag
from .names import choose

KINDS = (
    "solvers",
    "rules",
    "domains",
    "scalarizations",
    "objectives",
    "presets",
    "methods",
    "transforms",
    "selectors",
    "steps",
    "protocols",
)


def entries(kind: str) -> list[dict[str, str]]:
    """Name, one line and source of each entry of a registry."""
    if kind == "objectives":
        from ..objectives.registry import OBJECTIVES

        return [_entry(name, entry) for name, entry in OBJECTIVES.items()]
    if kind == "methods":
        from ..solvers.closed_form.registry import MERGES

        return [_entry(name, entry) for name, entry in MERGES.items()]
    if kind == "selectors":
        from ..solvers.selection import SELECTORS

        return [_entry(name, entry) for name, entry in SELECTORS.items()]
    if kind == "transforms":
        from ..pools.transforms import TRANSFORMS

        return [_entry(name, entry) for name, entry in TRANSFORMS.items()]
    if kind == "steps":
        from ..federated.registry import STEPS

        return [_entry(name, entry) for name, entry in STEPS.items()]
    if kind == "scalarizations":
        from ..solvers import SCALARIZATIONS

        return [_entry(name, entry) for name, entry in SCALARIZATIONS.items()]
    if kind == "protocols":
        from .protocol import PROTOCOLS

        return [{"name": name, "summary": about, "source": ""} for name, (about, _) in PROTOCOLS.items()]
    from ..solvers import DOMAINS, PRESETS, SOLVERS, STEP_RULES

    if kind == "presets":
        return [
            {"name": name, "summary": str(fields.get("summary", "")), "source": str(fields.get("source", ""))}
            for name, fields in PRESETS.items()
        ]
    tables: dict[str, dict[str, Any]] = {"solvers": {**SOLVERS}, "rules": {**STEP_RULES}, "domains": {**DOMAINS}}
    table = tables[kind]
    return [_entry(name, entry) for name, entry in table.items()]


def _entry(name: str, entry: Any) -> dict[str, str]:
    text = getattr(entry, "summary", None) or (entry.__doc__ or "")
    return {
        "name": name,
        "summary": str(text).strip().split("\n")[0].rstrip(".").replace("``", ""),
        "source": str(getattr(entry, "source", "") or ""),
    }


@click.command()
@click.argument("kinds", nargs=-1, metavar="[KIND]...")
@json_flag
def command(kinds: tuple[str, ...], as_json: bool) -> None:
    """List what can be named: solvers, rules (step rules), domains, scalarizations, objectives, presets;
    methods of `merge`; transforms of a pool; selectors of experts; steps and protocols of `federate`. All of them
    without KIND.

    Every method and every preset is a server step, too.

    \b
    Examples:
      mergesolve list
      mergesolve list presets
      mergesolve list solvers rules domains objectives
      mergesolve list solvers --json
    """
    from .console import print_json, show

    chosen = tuple(choose("kind", kind, KINDS) for kind in kinds) or KINDS
    found = {kind: entries(kind) for kind in chosen}
    if as_json:
        print_json(found)
        return
    from ..reports.tables import listing

    for kind, rows in found.items():
        sourced = any(row["source"] for row in rows)
        header = ("name", "what", "source") if sourced else ("name", "what")
        cells = [(row["name"], row["summary"], *([row["source"]] if sourced else [])) for row in rows]
        show(listing(header, cells, title=kind))
        show("")
