"""mergekit's methods: their parameters and defaults, and what they are in options of ours.

The conventions are those of mergekit 0.1.5; every option that decides the result is written out, so that defaults of
ours never stand in for mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .mergekit_settings import Values
from .names import UsageProblem, unknown


@dataclass(frozen=True)
class Inputs:
    """Base and experts: name -> path. `named`: the recipe says the base; `listed`: the base is one of the models."""

    base: str
    experts: Mapping[str, str]
    named: bool
    listed: bool

    def each(self, values: Values, parameter: str) -> dict[str, float]:
        """Return a parameter of every expert, by the expert's name."""
        return {name: values.models[path][parameter] for name, path in self.experts.items()}


@dataclass(frozen=True)
class Method:
    """A method of mergekit's: its parameters with their defaults (None: required), and the method of ours.

    `per_model` parameters may stand with the models or above; `shared` ones above only. `experts`: how many there may
    be. The base is the origin of task vectors ("origin"), or a model with a weight of its own, which is what the others
    leave of 1 ("weighed"), or an expert like the others, and the first ("expert"), or an expert unless the recipe says
    which model it is ("optional").
    """

    name: str
    per_model: Mapping[str, Any]
    shared: Mapping[str, Any]
    options: Callable[[Inputs, Values], dict[str, Any]]
    base: Literal["origin", "weighed", "expert", "optional"] = "origin"
    needs_base: bool = True
    experts: tuple[int, int | None] = (1, None)


def _total(weights: Iterable[float]) -> float:
    """Return the sum, rounded once, so that order does not matter; infinite if there is no such number."""
    try:
        return math.fsum(weights)
    except OverflowError:
        return math.inf


def _linear(inputs: Inputs, values: Values) -> dict[str, Any]:
    """Σ w_i θ_i / Σ w_i: where the base is one of the models, its weight is what the others leave of 1."""
    weights = {path: model["weight"] for path, model in values.models.items()}
    total = _total(weights.values())
    if not values.shared["normalize"]:
        if abs(total - 1) > 1e-9:
            raise UsageProblem(
                f"{values.where}: linear with 'normalize: false' and weights that sum to {total:g} scales the whole "
                "model; we average only. Let the weights sum to 1, or leave out 'normalize: false'."
            )
        total = 1.0
    if total == 0 or not (math.isfinite(total) and math.isfinite(1 / total)):
        raise UsageProblem(
            f"{values.where}: the weights of linear sum to {total:g}, by which it divides; give other weights."
        )
    shares = {name: weights[path] / total for name, path in inputs.experts.items()}
    if inputs.listed:
        return {"name": "average", "normalize": False, "weights": shares}
    return {"name": "average", "weights": {name: weights[path] for name, path in inputs.experts.items()}}


def _delta(name: str, *, elects: bool, **fixed: Any) -> Callable[[Inputs, Values], dict[str, Any]]:
    """θ0 + lambda · (sum of sparsified, weighted task vectors, elected or not, over the weights or not)."""

    def options(inputs: Inputs, values: Values) -> dict[str, Any]:
        weights = inputs.each(values, "weight")
        scale = values.shared["lambda"]
        chosen: dict[str, Any] = {"name": name, **fixed}
        if elects:
            chosen |= {"merge": "mean" if values.shared["normalize"] else "sum", "zero": "plus"}
        elif values.shared["normalize"]:
            # mergekit leaves out the division by a sum this small.
            total = _total(weights.values())
            scale = scale if abs(total) < 1e-8 else scale / total
        if not math.isfinite(scale):
            raise UsageProblem(f"{values.where}: lambda over the sum of the weights is not finite; give other weights.")
        chosen["scale"] = scale
        if any(weight != 1 for weight in weights.values()):
            chosen["weights"] = weights
        return chosen | _sparsity(name, inputs, values)

    return options


def _sparsity(name: str, inputs: Inputs, values: Values) -> dict[str, Any]:
    """Densities, and what belongs to one way of dropping: rescaling, gamma, epsilon."""
    if name == "task-arithmetic":
        return {}
    densities = inputs.each(values, "density")
    for expert, density in densities.items():
        if not 0 < density <= 1:
            raise UsageProblem(
                f"{values.where}: the density of {expert!r} must be a number in (0, 1]; found {density:g}. "
                "To drop a model whole, leave it out."
            )
    same = len(set(densities.values())) == 1
    chosen: dict[str, Any] = {"density": next(iter(densities.values()))} if same else {"density": 1.0}
    if not same:
        chosen["densities"] = densities
    sparse = [expert for expert, density in densities.items() if density < 1]
    rescale = values.shared["rescale"]
    if name in ("dare", "dare-ties", "della", "della-linear"):
        chosen["rescale"] = "l1" if rescale else "none"
    elif rescale and sparse:
        raise UsageProblem(
            f"{values.where}: 'rescale: true' with {name} is not here: we keep the entries as they are. Leave it out, "
            "or scale the result with 'lambda'; dare and della rescale."
        )
    if name.startswith("breadcrumbs"):
        top = _common("gamma", inputs.each(values, "gamma"), sparse, values.where)
        if not 0 <= top <= 1:
            raise UsageProblem(f"{values.where}: 'gamma' must be a number in [0, 1]; found {top:g}.")
        chosen["top"] = top
    if name.startswith("della"):
        epsilon = _common("epsilon", inputs.each(values, "epsilon"), sparse, values.where)
        for density in {densities[expert] for expert in sparse}:
            if epsilon < 0 or not 0 < density - epsilon <= density + epsilon < 1:
                raise UsageProblem(
                    f"{values.where}: 'epsilon' must leave density ± epsilon within (0, 1); found density "
                    f"{density:g} and epsilon {epsilon:g}. Take a smaller epsilon."
                )
        chosen |= {"epsilon": epsilon if sparse else 0.0, "window": "symmetric"}
    return chosen


def _common(parameter: str, each: Mapping[str, float], sparse: Sequence[str], where: str) -> float:
    """Return the value that all experts share of which something is dropped."""
    if not sparse:
        return next(iter(each.values()))
    chosen = {expert: each[expert] for expert in sparse}
    if len(set(chosen.values())) > 1:
        listing = ", ".join(f"{value:g} for {expert!r}" for expert, value in chosen.items())
        raise UsageProblem(
            f"{where}: '{parameter}' is one number for all models here; found {listing}. "
            "Give all models the same one; weights and densities may differ."
        )
    return chosen[sparse[0]]


def _slerp(inputs: Inputs, values: Values) -> dict[str, Any]:
    """From the base at t = 0 to the other model at t = 1, on the weights themselves."""
    return {"name": "slerp", "t": _fraction(values.shared["t"], "t", values.where), "of": "weights", "parallel": 0.9995}


def _nuslerp(inputs: Inputs, values: Values) -> dict[str, Any]:
    """SLERP of two models, or of their task vectors, down to the smallest angle, with t from weights."""
    if not values.shared["nuslerp_flatten"]:
        raise UsageProblem(
            f"{values.where}: 'nuslerp_flatten: false' interpolates single rows; we interpolate whole tensors. "
            "Leave it out."
        )
    first, second = inputs.each(values, "weight").values()
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    of = "task-vectors" if inputs.named else "weights"
    return {"name": "slerp", "t": _fraction(t, "the share of the second weight", values.where), "of": of} | {
        "parallel": math.nextafter(1.0, 0.0)
    }


def _fraction(value: float, what: str, where: str) -> float:
    if not 0 <= value <= 1:
        raise UsageProblem(f"{where}: {what} must be between 0 and 1, on the arc between the models; found {value:g}.")
    return value


def _karcher(inputs: Inputs, values: Values) -> dict[str, Any]:
    """The mean on the sphere of all models' weights."""
    if (values.shared["max_iter"], values.shared["tol"]) != (10, 1e-5):
        raise UsageProblem(
            f"{values.where}: 'max_iter' and 'tol' of karcher are not here: we iterate to convergence. Leave them out."
        )
    return {"name": "spherical-mean", "of": "weights"}


def _model_stock(inputs: Inputs, values: Values) -> dict[str, Any]:
    if values.shared["filter_wise"]:
        raise UsageProblem(
            f"{values.where}: 'filter_wise: true' takes angles of single filters; we take those of whole tensors. "
            "Leave it out."
        )
    return {"name": "model-stock", "average": "cosine"}


_DELTA = {"normalize": False, "lambda": 1.0}
_SPARSE = {"weight": None, "density": 1.0}

METHODS: dict[str, Method] = {
    "linear": Method("linear", {"weight": None}, {"normalize": True}, _linear, base="weighed", needs_base=False),
    "task_arithmetic": Method("task_arithmetic", {"weight": None}, _DELTA, _delta("task-arithmetic", elects=False)),
    "ties": Method(
        "ties",
        _SPARSE,
        _DELTA | {"normalize": True, "rescale": False},
        _delta("ties", elects=True, trim="tensor"),
    ),
    "dare_linear": Method("dare_linear", _SPARSE, _DELTA | {"rescale": True}, _delta("dare", elects=False)),
    "dare_ties": Method("dare_ties", _SPARSE, _DELTA | {"rescale": True}, _delta("dare-ties", elects=True)),
    "della": Method(
        "della",
        _SPARSE | {"epsilon": 0.15},
        _DELTA | {"normalize": True, "rescale": True},
        _delta("della", elects=True),
    ),
    "della_linear": Method(
        "della_linear", _SPARSE | {"epsilon": 0.15}, _DELTA | {"rescale": True}, _delta("della-linear", elects=False)
    ),
    "breadcrumbs": Method(
        "breadcrumbs", _SPARSE | {"gamma": 0.01}, _DELTA | {"rescale": False}, _delta("breadcrumbs", elects=False)
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties",
        _SPARSE | {"gamma": 0.01},
        _DELTA | {"rescale": False},
        _delta("breadcrumbs-ties", elects=True),
    ),
    "model_stock": Method("model_stock", {}, {"filter_wise": False}, _model_stock, experts=(2, None)),
    "slerp": Method("slerp", {}, {"t": None}, _slerp, base="expert", experts=(2, 2)),
    "nuslerp": Method(
        "nuslerp",
        {"weight": None},
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        _nuslerp,
        base="optional",
        needs_base=False,
        experts=(2, 2),
    ),
    "karcher": Method(
        "karcher", {}, {"max_iter": 10.0, "tol": 1e-5}, _karcher, base="expert", needs_base=False, experts=(2, None)
    ),
}

LACKING = {
    "passthrough": "it stacks layers into another architecture, and we merge models of one; 'linear' averages them",
    "multislerp": "the nearest is 'karcher', the mean on the sphere, or 'nuslerp' for two models",
    "nearswap": "the nearest is 'slerp' with a small t, or 'breadcrumbs'",
    "arcee_fusion": "the nearest is 'ties' with a low density",
    "sce": "the nearest is 'ties'",
    "ram": "the nearest is 'ties'",
    "ramplus_tl": "the nearest is 'ties'",
}


def mergekit_method(name: object, where: str) -> Method:
    """Return the method of this name in mergekit; UsageProblem for those that we lack, with the nearest."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if isinstance(name, str) and name in LACKING:
        raise UsageProblem(f"{where}: we lack mergekit's method '{name}': {LACKING[name]}.")
    if name is None:
        raise UsageProblem(f"{where}: lacks 'merge_method'. Valid: {', '.join(METHODS)}.")
    raise unknown("merge_method", name, METHODS, where=where)
