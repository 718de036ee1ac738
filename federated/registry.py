"""Server steps by name: the table that the command line, the docs and the common tests read.

A name is looked up in `STEPS`, then among the closed-form merges (`MERGES`), then among the presets of the solvers
(`PRESETS`): what merges a pool also merges a round. Imports no torch until a step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..solvers import PRESETS
from ..solvers.closed_form import MERGES, make_merge
from ..solvers.errors import unknown

if TYPE_CHECKING:
    from .step import ServerStep

PREPARED = ("select", "transforms")
ROW_DISTILLATION: dict[str, Any] = {
    "objective": {"name": "distillation", "batch_size": 16},
    "blocks": "row",
    "domain": "free",
    "solver": {"name": "adaptive", "lr": 0.02, "schedule": "cosine"},
    "start": "average",
    "max_iter": 30,
    "origin": True,
}
"""Fit the rows of the merge to what each client's model says of the server's inputs."""


@dataclass(frozen=True)
class Entry:
    """A server step: what it does, where it is from, what data it needs, and the function that makes it."""

    summary: str
    source: str
    data: str
    make: Callable[[dict[str, Any]], Any]


def _simple(name: str) -> Callable[[dict[str, Any]], Any]:
    def make(options: dict[str, Any]) -> Any:
        from . import merging

        return _built(getattr(merging, name), options)

    return make


def _optimizer(method: str, **defaults: Any) -> Callable[[dict[str, Any]], Any]:
    def make(options: dict[str, Any]) -> Any:
        from .optimizers import ServerOptimizer

        given = {"step": "fedavg", "method": method, **defaults, **options}
        return _built(ServerOptimizer, {**given, "step": make_step(given["step"])})

    return make


def _phases(options: dict[str, Any]) -> Any:
    from .phases import ByPhase

    return _built(ByPhase, options)


def _federated(options: dict[str, Any]) -> Any:
    from .oracle_step import FederatedFrankWolfe

    return _built(FederatedFrankWolfe, options)


def _solving(name: str, defaults: Mapping[str, Any]) -> Callable[[dict[str, Any]], Any]:
    def make(options: dict[str, Any]) -> Any:
        from .merging import Preparation
        from .solving import SolveStep

        given = {**_over(defaults, options), "name": name}
        prepare = {key: given.pop(key) for key in PREPARED if key in given}
        return _built(SolveStep, {**given, "prepare": Preparation(**prepare)})

    return make


STEPS: dict[str, Entry] = {
    "fedavg": Entry(
        "The clients' average, uniform or by the size of their data.",
        "McMahan et al. (2017), Communication-Efficient Learning of Deep Networks",
        "none",
        _simple("FedAvg"),
    ),
    "fednova": Entry(
        "The average of updates divided by the clients' numbers of steps.",
        "Wang et al. (2020), Tackling the Objective Inconsistency Problem",
        "none",
        _simple("FedNova"),
    ),
    "fedavgm": Entry(
        "FedAvg with server momentum.",
        "Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution",
        "none",
        _optimizer("momentum"),
    ),
    "fedadagrad": Entry(
        "Adagrad on the average update.",
        "Reddi et al. (2021), Adaptive Federated Optimization",
        "none",
        _optimizer("adagrad", lr=1e-2, momentum=0.0),
    ),
    "fedadam": Entry(
        "Adam on the average update.",
        "Reddi et al. (2021), Adaptive Federated Optimization",
        "none",
        _optimizer("adam", lr=1e-3),
    ),
    "fedyogi": Entry(
        "Yogi on the average update.",
        "Reddi et al. (2021), Adaptive Federated Optimization",
        "none",
        _optimizer("yogi", lr=1e-3),
    ),
    "optimizer": Entry(
        "A server optimizer over the updates that any other step proposes.",
        "Reddi et al. (2021), Adaptive Federated Optimization",
        "as the inner step",
        _optimizer("momentum"),
    ),
    "by-phase": Entry(
        "A sparsifying merge that fades to none as the clients' interference falls.",
        "Kubota et al. (2025), section 5",
        "none",
        _phases,
    ),
    "fw-federated": Entry(
        "Frank-Wolfe whose oracle the clients answer; only the chosen ones send weights.",
        "FW-Merging (Chen et al. 2025), with the oracle distributed",
        "samples for each client",
        _federated,
    ),
    "solve": Entry(
        "Any solver, objective, blocks and domain.",
        "",
        "as the objective",
        _solving("solve", {}),
    ),
    "rows": Entry(
        "Row-wise coefficients fitted to the clients' predictions.",
        "distillation (Hinton, Vinyals and Dean 2015) over the pool",
        "inputs for each client",
        _solving("rows", ROW_DISTILLATION),
    ),
    "rows-penalty": Entry(
        "The same, plus the price of forgetting on reference inputs.",
        "the same, and learning without forgetting (Li and Hoiem 2016)",
        "inputs for each client, reference inputs",
        _solving("rows-penalty", {**ROW_DISTILLATION, "retention": {"weight": 3.0, "batch_size": 64}}),
    ),
    "rows-bound": Entry(
        "The same, with forgetting bounded: the reference loss stays below ε.",
        "augmented Lagrangian (Bertsekas 1982)",
        "inputs for each client, reference inputs",
        _solving("rows-bound", {**ROW_DISTILLATION, "retention": {"bound": 0.02, "batch_size": 64, "outer": 3}}),
    ),
    "fw-bound": Entry(
        "Frank-Wolfe on distillation with the reference loss below ε, inside the hull.",
        "FW-Merging (Chen et al. 2025), augmented Lagrangian (Bertsekas 1982)",
        "inputs for each client, reference inputs",
        _solving(
            "fw-bound",
            {
                "objective": {"name": "distillation", "batch_size": 16},
                "blocks": "layer",
                "domain": "capped",
                "solver": {"name": "frank-wolfe", "step_rule": "line-search"},
                "max_iter": 4,
                "origin": True,
                "retention": {"bound": 0.05, "batch_size": 64, "outer": 2},
            },
        ),
    ),
    "anchored": Entry(
        "Nearest to all clients, within a bounded distance of the first model; no data.",
        "elastic weight consolidation (Kirkpatrick et al. 2017) as a constraint",
        "none (a Fisher diagonal at the first model, by 'fisher')",
        _solving(
            "anchored",
            {
                "objective": {"name": "proximity"},
                "blocks": "model",
                "domain": "capped",
                "solver": "projected-gradient",
                "max_iter": 80,
                "origin": True,
                "retention": {"by": "euclidean", "bound": 1.0},
            },
        ),
    ),
}


def names() -> list[str]:
    """Return every name that `make_step` takes."""
    return sorted({*STEPS, *MERGES, *PRESETS})


def make_step(spec: object) -> ServerStep:
    """Return a server step from an instance, a name, or a mapping {"name": ..., option: value}.

    Closed-form merges take `select`, `transforms` and `origin` besides their own options, presets every field of
    `SolveStep`. Raises OptionError for unknown names and options, with the nearest known one, and values out of range.
    """
    from .step import ServerStep

    if isinstance(spec, ServerStep):
        return spec
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if isinstance(name, str) and name in STEPS:
        made: ServerStep = STEPS[name].make(options)
        return made
    if isinstance(name, str) and name in MERGES:
        from .merging import MergeStep, Preparation

        given: dict[str, Any] = {key: options.pop(key) for key in PREPARED if key in options}
        prepare = Preparation(**given)
        origin = bool(options.pop("origin", False))
        return MergeStep(make_merge({"name": name, **options}), prepare, origin)
    if isinstance(name, str) and name in PRESETS:
        preset = {key: value for key, value in PRESETS[name].items() if key not in ("summary", "pool")}
        transforms = PRESETS[name].get("pool", {}).get("transforms")
        made = _solving(name, preset if transforms is None else {**preset, "transforms": transforms})(options)
        return made
    raise unknown("server step", name, names())


def _over(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options on top of defaults; mappings merge where they name the same thing, and a penalty replaces a bound."""
    found = {**defaults, **options}
    for key, value in options.items():
        default = defaults.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(default, Mapping)
            and value.get("name") in (None, default.get("name"))
        ):
            found[key] = {**default, **value}
            for one, other in (("weight", "bound"), ("bound", "weight")):
                if key == "retention" and value.get(one) is not None and value.get(other) is None:
                    found[key].pop(other, None)
    return found


def _built(cls: Any, options: dict[str, Any]) -> Any:
    known = [field.name for field in fields(cls)]
    listed = [*known, *PREPARED] if "prepare" in known else known
    for option in options:
        if option not in known:
            raise unknown(f"option of the server step {cls.__name__}:", option, listed)
    return cls(**options)
