"""One self-contained HTML page of one run or several: every chart of a solve, linked, in a file that loads nothing.

The page is a template (`assets/`) around one JSON object, which its script draws as SVG. Numbers of long runs are
thinned and the page says so: coefficients and scores to FRAMES values a page, kept as 16-bit levels between their
extremes (an error of at most 1/131068 of the range), records to RECORDS of them.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..solvers.files import plain, write_bytes
from .alignment import differences, final
from .palette import COLOURS, GREY, Palette
from .run import Run, RunError

Array = NDArray[np.float64]

FRAMES = 300_000  # coefficients that a page holds, over all of its runs
RECORDS = 1500  # records that a page holds of each run; of more than three runs, fewer of each
CHOICES = 12_000  # (vertex, share) pairs, likewise
LIMIT = 200_000  # characters of a recipe
LIGHT, DARK = "#ffffff", "#1a1d23"  # what the charts are drawn on
SERIES = ("#2F6FA8", "#B5533C", "#4C8C4A", "#7A4FA3", "#B0892B", "#2F9E8F", "#A8487F", "#5F6B7A")
LEVELS = 65534


def render(runs: Sequence[Run]) -> str:
    """The page of these runs as text. Raises RunError if there are none or one has nothing to show."""
    if not runs:
        raise RunError("a report needs a run. Name the folder of one.")
    for run in runs:
        if not run.records and not run.finished:
            raise RunError(f"run '{run.name}': it has made no iteration yet. Report it once it has.")
    names = _ranked(runs)
    content = _content(runs, names)
    assets = files(__package__) / "assets"
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "TITLE": html.escape(title),
        "VERSION": html.escape(version("mergesolve")),
        "COLOURS": _colours(names),
        "STYLE": (assets / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (assets / "report.js").read_text(encoding="utf-8"),
        "TABLE": _table(runs),
        "DATA": _embedded(content),
    }
    template = (assets / "report.html").read_text(encoding="utf-8")
    # One pass: what is put in is not searched again, whatever a run or an expert is called.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], template)


def save_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page, under a temporary name first. Raises RunError where there is no such folder."""
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder '{path.parent}'. Make it first.")
    write_bytes(path, render(runs).encode())


def _embedded(content: Any) -> str:
    """JSON that can stand inside of <script>: no character of it opens or closes anything in HTML."""
    text = json.dumps(plain(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _ranked(runs: Sequence[Run]) -> list[str]:
    """Names of all experts: those that the figures colour first, in their order, then by the order of the pools."""
    first = list(Palette.of(runs).colours)
    weight: dict[str, float] = {}
    for run in runs:
        for expert, value in zip(run.experts, np.abs(np.nan_to_num(run.final)).mean(axis=0), strict=True):
            weight[expert] = weight.get(expert, 0.0) + float(value)
    rest = sorted((name for name in weight if name not in first), key=lambda name: -weight[name])
    return [*first, *rest]


def _content(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    part = min(1.0, 3 / len(runs))
    return {
        "names": list(names),
        "series": len(SERIES),
        "differences": differences(runs) if len(runs) > 1 else [],
        "runs": [_run(run, names, FRAMES // len(runs), part) for run in runs],
    }


def _run(run: Run, names: Sequence[str], budget: int, part: float) -> dict[str, Any]:
    """Everything that the page says of one run, in `budget` coefficients and a part of RECORDS and CHOICES."""
    end = final(run)
    result, last = run.result or {}, run.records[-1] if run.records else {}
    counts, data = result.get("counts") or {}, result.get("data") or {}
    trace, choices, note = _trace(run, names, part)
    frames = _frames(run, budget)
    return {
        "name": run.name,
        "status": run.status,
        "message": result.get("message", "") if run.status != "optimal" else "",
        "sentence": _sentence(run, end),
        "warnings": _warnings(run, data),
        "solver": end["solver"],
        "domain": end["domain"],
        "has_base": end["domain"] == "capped",
        "free": run.free,
        "estimate": run.gap_is_estimate,
        "objective": _digits(end["objective"]),
        "gap": _digits(end["gap"]),
        "stationarity": _digits(end["stationarity"]),
        "best_iteration": result.get("best_iteration"),
        "records": len(run.records),
        "trace": trace,
        "choices": choices,
        "choices_note": note,
        "chosen": _chosen(run),
        "frames": frames,
        "cost": {
            **{
                key: end[key]
                for key in ("iterations", "gradients", "evaluations", "samples", "bytes_read", "peak_memory")
            },
            **{key: counts.get(key, data.get(key)) for key in ("gradient_samples", "combines", "correlates")},
            "seconds": _digits(end["seconds"]),
            "parts": last.get("parts") or {},
        },
        "data": {key: data.get(key) for key in ("labelled", "unlabelled", "test_inputs")} | {"known": bool(data)},
        "task_data": _task_data(run),
        "about": _about(run),
        "recipe": _recipe(run),
    }


def _sentence(run: Run, end: Mapping[str, Any]) -> str:
    """What was solved, in one sentence."""
    plural = {True: "", False: "s"}
    experts, layers = len(run.experts), len(run.layers)
    what = f"{experts} expert{plural[experts == 1]} × {layers} layer{plural[layers == 1]}"
    tasks = run.header.get("tasks") or list(end["tasks"])
    where = f", {len(tasks)} task{plural[len(tasks) == 1]}" if tasks else ""
    solver, domain = end["solver"] or "unknown solver", f" on the domain {end['domain']}" if end["domain"] else ""
    return f"Solved by {solver}{domain}: {what}{where}."


def _warnings(run: Run, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must not overlook, as (head, text)."""
    found = []
    if not run.finished:
        found.append(("Not finished.", "The run is going or was killed: it is drawn as far as it came."))
    if data.get("test_inputs"):
        found.append(
            (
                "Test inputs were seen.",
                "The solve is transductive: its accuracy on that test split is not one on unseen data.",
            )
        )
    if run.gap_is_estimate:
        found.append(
            (
                "Estimates.",
                "Objective, gap and scores of the iterations come from minibatches; "
                "only the result is computed on all the data.",
            )
        )
    if run.status == "nonfinite":
        found.append(
            ("Not finite.", "The objective or its scores became NaN or infinite; the best iterate before it is kept.")
        )
    return found


def _thinned(count: int, limit: int) -> list[int]:
    """At most `limit` positions of `count`, evenly spaced, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(k) for k in np.linspace(0, count - 1, max(2, limit))})


def _trace(
    run: Run, names: Sequence[str], part: float
) -> tuple[dict[str, Any], list[list[tuple[int, float]]], str | None]:
    """Numbers of the records, column by column; vertices chosen in each; a note if not all of these are there."""
    kept = _thinned(len(run.records), int(part * RECORDS))
    iterations = run.iterations
    records = [run.records[k] for k in kept]
    extra = [record.get("extra") or {} for record in records]
    trace: dict[str, Any] = {"iteration": [int(iterations[k]) for k in kept]}
    for key in ("value", "gap", "stationarity", "step", "evaluations", "gradients", "samples", "seconds"):
        trace[key] = [_digits(record.get(key)) for record in records]
    trace["tasks"] = {name: [_digits(value[k]) for k in kept] for name, value in run.task_losses().items()}
    for key in ("active", "kind"):
        trace[key] = [about.get(key) for about in extra] if any(key in about for about in extra) else None
    if any("strong_gap" in about for about in extra):
        trace["strong_gap"] = [_digits(about.get("strong_gap")) for about in extra]
    weighed = dict.fromkeys(task for about in extra for task in about.get("task_weights") or {})
    trace["task_weights"] = {
        task: [_digits((about.get("task_weights") or {}).get(task)) for about in extra] for task in weighed
    }
    place = {"base": -1, "start": -2, **{name: k for k, name in enumerate(names)}}
    choices = [[(place[name], round(share, 3)) for name, share in run.choices(record).items()] for record in records]
    pairs = sum(map(len, choices))
    limit = int(part * CHOICES)
    if pairs <= limit:
        return trace, choices, None
    every = math.ceil(pairs / limit)
    note = f"Dots of one record in {every}."
    return trace, [line if k % every == 0 else [] for k, line in enumerate(choices)], note


def _chosen(run: Run) -> list[dict[str, Any]]:
    """How often each vertex was chosen, over all records: share of all choices, iterations, first and last of them."""
    found: dict[str, dict[str, Any]] = {}
    steps = 0
    for iteration, record in zip(run.iterations, run.records, strict=True):
        choices = run.choices(record)
        steps += bool(choices)
        for name, share in choices.items():
            entry = found.setdefault(name, {"name": name, "share": 0.0, "iterations": 0, "first": int(iteration)})
            entry["share"] += share
            entry["iterations"] += 1
            entry["last"] = int(iteration)
    for entry in found.values():
        entry["share"] = round(entry["share"] / steps, 4)
    return sorted(found.values(), key=lambda entry: -float(entry["share"]))


def _frames(run: Run, budget: int) -> dict[str, Any]:
    """Coefficients and scores of some iterations, layers × experts each: all of them if the budget allows.

    Where it does not, the means over the layers come apart, of more iterations.
    """
    iterations, path = run.trajectory()
    limit = max(2, budget // max(1, 2 * path[0].size)) if len(path) else 0
    kept = _thinned(len(path), limit)
    scores = run.scores()
    dense = _thinned(len(path), min(RECORDS, budget // max(1, 2 * len(run.experts))))
    finer = len(dense) > len(kept)  # means over the layers are small enough to keep more of them
    return {
        "mean_iterations": [int(iterations[k]) for k in dense] if finer else None,
        "means": _packed(path[dense].mean(axis=1)) if finer else None,
        "experts": list(run.experts),
        "layers": list(run.layers),
        "iterations": [int(iterations[k]) for k in kept],
        "coefficients": _packed(path[kept]),
        "scores": _packed(scores[kept]) if len(scores) and np.isfinite(scores[kept]).any() else None,
    }


def _packed(values: Array) -> dict[str, Any]:
    """Numbers as 16-bit levels between their least and largest, in base64; 65535 stands for nan."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    low = min(low, 0.0)  # so that the zeros of a simplex are zeros
    scale = (high - low) / LEVELS or 1.0
    levels = np.where(np.isfinite(values), np.round((np.nan_to_num(values) - low) / scale), LEVELS + 1)
    data = base64.b64encode(levels.astype("<u2").tobytes()).decode()
    return {"low": low, "high": low + scale * LEVELS if high > low else low, "data": data}


def _task_data(run: Run) -> list[dict[str, Any]]:
    described = run.header.get("objective") or (run.result or {}).get("described_objective") or {}
    tasks = described.get("tasks") or [] if isinstance(described, Mapping) else []
    return [
        {"name": str(task.get("name")), **{key: task.get(key) for key in ("split", "samples", "labels_used")}}
        for task in tasks
        if isinstance(task, Mapping)
    ]


def _about(run: Run) -> list[tuple[str, str]]:
    """What was solved, as (name, text)."""
    header, result = run.header, run.result or {}
    described = header.get("objective") or result.get("described_objective")
    objective = (described.get("objective") or described.get("name")) if isinstance(described, Mapping) else described
    rows = [
        ("solver", _options(result.get("solver") or header.get("solver"))),
        ("domain", _options(result.get("domain") or header.get("domain"))),
        ("objective", str(objective or "")),
        ("constraint", _constraint(result)),
        ("blocks", _blocks(header.get("blocks") or result.get("blocks"), header.get("rows"))),
        ("backend", str(header.get("backend") or "")),
        ("seed", str(header["seed"]) if header.get("seed") is not None else ""),
        ("pool", str(header.get("fingerprint") or result.get("fingerprint") or "")[:16]),
    ]
    return [(name, text) for name, text in rows if text]


def _constraint(result: Mapping[str, Any]) -> str:
    """What a constrained solve says of its bound: `0.021, at most 0.02 (violation 0.001, price 1.5)`."""
    if result.get("bound") is None:
        return ""
    value, bound, violation, price = (
        "–" if (digits := _digits(result.get(key))) is None else str(digits)
        for key in ("constraint", "bound", "violation", "multiplier")
    )
    return f"{value}, at most {bound} (violation {violation}, price {price})"


def _options(described: Any) -> str:
    """`name (option value, ...)`."""
    if not isinstance(described, Mapping):
        return str(described or "")
    options = [
        f"{key.replace('_', ' ')} {_options(value) if isinstance(value, Mapping) else value}"
        for key, value in described.items()
        if key != "name" and value is not None
    ]
    return str(described.get("name", "")) + (f" ({', '.join(options)})" if options else "")


def _blocks(blocks: Any, rows: Any) -> str:
    text = ", ".join(map(str, blocks)) if isinstance(blocks, (list, tuple)) else str(blocks or "")
    return f"{text} ({rows} rows)" if text and rows else text


def _recipe(run: Run) -> str:
    path = run.folder / "recipe.yaml" if run.folder else None
    if path is None or not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= LIMIT else text[:LIMIT] + f"\n… ({len(text) - LIMIT} characters more in the file)\n"


def _digits(value: Any) -> float | int | None:
    """A number at six significant digits; None for what is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _table(runs: Sequence[Run]) -> str:
    """How the runs ended, for a browser that runs no script."""
    keys = ("run", "status", "solver", "domain", "objective", "gap", "iterations", "seconds")
    head = "".join(f"<th>{key}</th>" for key in keys)
    rows = []
    for run in runs:
        end = final(run)
        cells = [
            f"{end[key]:.6g}" if isinstance(end[key], float) else str(end[key] if end[key] is not None else "–")
            for key in keys
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


# --- colours ---------------------------------------------------------------------------------------------------------


def _colours(names: Sequence[str]) -> str:
    """Custom properties --e0, --e1, ... of the experts and --s0, ... of runs and tasks, for light and dark pages.

    The nine experts of the figures have their colours there; two more rounds are paler and greyer ones, the rest grey.
    On a dark page each is lightened until it stands out from it.
    """
    rounds = [
        list(COLOURS),
        [_mix(colour, LIGHT, 0.5) for colour in COLOURS],
        [_mix(colour, "#8a8f98", 0.6) for colour in COLOURS],
    ]
    ring = [colour for colours in rounds for colour in colours]
    light = [ring[k] if k < len(ring) else GREY for k in range(len(names))]
    dark = [_lightened(colour, 4.5 if k < len(COLOURS) else 3.0) for k, colour in enumerate(light)]
    series = list(SERIES)
    return (
        f":root {{ {_properties('e', light)} {_properties('s', series)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_properties('e', dark)} "
        f"{_properties('s', [_lightened(colour, 4.5) for colour in series])} }} }}"
    )


def _properties(prefix: str, colours: Sequence[str]) -> str:
    return " ".join(f"--{prefix}{k}: {colour};" for k, colour in enumerate(colours))


def _mix(colour: str, other: str, share: float) -> str:
    """`share` of the other colour in the first."""
    parts = zip(_channels(colour), _channels(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)


def _channels(colour: str) -> list[int]:
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]


def _lightened(colour: str, contrast: float) -> str:
    """The colour mixed with as little white as it takes to reach this contrast (WCAG 2.2) on a dark page."""
    ground = _luminance(DARK) + 0.05
    return next(
        mixed
        for mixed in (_mix(colour, "#ffffff", share / 20) for share in range(21))
        if (_luminance(mixed) + 0.05) / ground >= contrast
    )


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
