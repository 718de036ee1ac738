"""Checks that every server step passes by being listed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError, Reply
from mergesolve.federated.registry import STEPS, make_step, names
from mergesolve.federated.rounds import merge_round
from mergesolve.federated.state import ServerState
from mergesolve.federated.step import ServerData
from mergesolve.solvers import PRESETS, OptionError
from mergesolve.solvers.closed_form import MERGES, Linear, make_merge
from torch import Tensor

COUNTS = {"analogy": 3, "wise-ft": 1, "expo": 1, "tall-mask": 1, "slerp": 2, "ewc": 2, "krum": 3}
"""Clients that a step is tried with, where it is not three."""

WITHOUT = {"regmean": "clients send no Grams", "mats": "clients send no Grams"}
"""Steps that no round can run, and why."""

SMALL: dict[str, dict[str, Any]] = {
    **{name: {"max_iter": 3} for name in PRESETS if PRESETS[name]["max_iter"] > 0},
    "fw-soft": {"max_iter": 1, "solver": {**PRESETS["fw-soft"]["solver"], "inner_iterations": 4}},
    "paper": {"max_iter": 1, "solver": {**PRESETS["paper"]["solver"], "inner_iterations": 4}},
    "released": {"max_iter": 1, "solver": {**PRESETS["released"]["solver"], "inner_iterations": 4}},
    **{name: {"max_iter": 4} for name in ("solve", "rows", "rows-penalty", "rows-bound", "fw-bound", "anchored")},
    "fw-federated": {"max_iter": 2},
    "krum": {"byzantine": 0},
}
"""Options that let a step end soon."""

RECORD = {
    "round",
    "repeat",
    "accepted",
    "rejected",
    "cosines",
    "norms",
    "conflict",
    "step_length",
    "distance",
    "coefficients",
    "method",
    "data",
    "seconds",
    "bytes",
    "metrics",
    "peak_memory",
}

RUNNABLE = [name for name in names() if name not in WITHOUT]


@pytest.fixture(params=RUNNABLE)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def spec_of(name: str) -> dict[str, Any]:
    known = SMALL.get(name, {}) if name not in MERGES or name == "krum" else {}
    return {"name": name, **known}


class Case:
    """A round of trained models for one step."""

    def __init__(self, name: str, federation: Any, trained: Any, data: ServerData) -> None:
        self.anchor: dict[str, Tensor] = dict(federation.anchor)
        self.replies: list[Reply] = trained[: COUNTS.get(name, 3)]
        self.data = data
        self.step = make_step(spec_of(name))

    def merge(
        self, replies: Any = None, anchor: Any = None, step: Any = None
    ) -> tuple[dict[str, Tensor], ServerState, Any]:
        anchor = self.anchor if anchor is None else anchor
        replies = self.replies if replies is None else replies
        return merge_round(anchor, replies, ServerState(anchor), step or self.step, data=self.data, seed=3)


@pytest.fixture
def case(name: str, federation: Any, trained: Any, server_data: ServerData) -> Case:
    return Case(name, federation, trained, server_data)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def copied(weights: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def retyped(weights: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def test_a_round_is_whole_deterministic_and_changes_nothing_that_it_was_given(case: Case) -> None:
    """The model is finite, moved, of the anchor's names and types, with its integers; the record is JSON of the schema;
    any order of the replies gives the same bits; anchor and replies are what they were."""
    anchor, models = copied(case.anchor), [copied(reply.weights) for reply in case.replies]
    weights, state, record = case.merge()
    again, other, reversed_record = case.merge(case.replies[::-1])
    assert same(weights, again)
    assert same(anchor, case.anchor)
    assert all(same(model, reply.weights) for model, reply in zip(models, case.replies, strict=True))  # type: ignore[arg-type]

    assert {n: (t.dtype, t.shape) for n, t in weights.items()} == {n: (t.dtype, t.shape) for n, t in anchor.items()}
    assert list(weights) == list(anchor)
    assert all(bool(t.isfinite().all()) for t in weights.values())
    assert torch.equal(weights["counter"], anchor["counter"])
    assert not any(t.requires_grad for t in weights.values())
    assert record["step_length"] > 0

    assert set(record) == RECORD
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text)["accepted"] == sorted(reply.client for reply in case.replies)
    assert {"labelled", "unlabelled", "test_inputs", "samples_seen"} <= set(record["data"])
    assert record["data"]["test_inputs"] is False
    assert {"screen", "server", "clients"} <= set(record["seconds"])
    for key in ("method", "coefficients", "bytes", "data"):
        assert reversed_record[key] == record[key] or key == "method", key
    assert state.round == 1
    assert all(np.array_equal(other.memory[key], value) for key, value in state.memory.items())


def test_a_model_of_half_precision_stays_one(case: Case) -> None:
    anchor = retyped(case.anchor, torch.bfloat16)
    replies = [dataclasses.replace(r, weights=retyped(r.weights, torch.bfloat16)) for r in case.replies]
    weights, _, record = case.merge(replies, anchor)
    assert {n: t.dtype for n, t in weights.items()} == {n: t.dtype for n, t in anchor.items()}
    assert all(bool(t.isfinite().all()) for t in weights.values())
    assert len(record["accepted"]) == len(replies)


def test_described_steps_are_made_again(name: str, case: Case) -> None:
    described = case.step.describe()
    told = json.loads(json.dumps(described, allow_nan=False))
    made = make_step(told)
    assert json.loads(json.dumps(made.describe())) == told
    assert type(made) is type(case.step)
    assert same(case.merge(step=made)[0], case.merge()[0])
    assert json.loads(json.dumps(make_step(name).describe()))["name"] in {name, "optimizer"}


def test_coefficients_of_one_row_say_what_the_model_is(name: str, case: Case) -> None:
    """θ = θ_t + Σ_i λ_i τ_i (τ of the origin is 0 here, where θ_0 is θ_t), to float32."""
    weights, _, record = case.merge()
    coefficients = record["coefficients"]
    one_row = name in ("fedavg", "fednova", "anchored") or (
        name in MERGES and name != "model-stock" and isinstance(make_merge(name), Linear)
    )
    if not one_row or coefficients is None:
        # Everything else says nothing of coefficients, or means over rows, which the model must not be held to.
        assert coefficients is None or set(coefficients) <= {*(r.client for r in case.replies), "origin"}
        return
    sent = {reply.client: reply.weights for reply in case.replies}
    for tensor in ("first.weight", "last.bias"):
        start = case.anchor[tensor].double()
        wanted = start + sum(
            value * (sent[client][tensor].double() - start)  # type: ignore[index]
            for client, value in coefficients.items()
            if client != "origin"
        )
        torch.testing.assert_close(weights[tensor].double(), wanted, rtol=1e-6, atol=2e-6)


def test_two_rounds_follow_from_state_and_anchor_alone(case: Case) -> None:
    """The second round is the same when step, data and state are made anew: nothing hides in the objects."""
    weights, state, _ = case.merge()
    shift = {n: (weights[n] - case.anchor[n]) if t.is_floating_point() else 0 for n, t in weights.items()}
    later = [
        dataclasses.replace(r, round=2, weights={n: t + shift[n] for n, t in r.weights.items()})  # type: ignore[union-attr]
        for r in case.replies
    ]
    one = merge_round(weights, later, state, case.step, data=case.data, seed=3)
    renewed = ServerState(state.origin, state.round, copied_memory(state), dict(state.fingerprints), state.norms)
    two = merge_round(copied(weights), later, renewed, make_step(case.step.describe()), data=case.data, seed=3)
    assert same(one[0], two[0])
    assert one[2]["round"] == 2


def copied_memory(state: ServerState) -> dict[str, Any]:
    return {name: np.array(value) for name, value in state.memory.items()}


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_steps_that_cannot_run_say_why(name: str, federation: Any, trained: Any, server_data: ServerData) -> None:
    with pytest.raises(FederationError, match="clients send no gram statistics"):
        Case(name, federation, trained, server_data).merge()


def test_steps_that_need_data_say_so_before_the_first_round() -> None:
    needy = []
    for name in RUNNABLE:
        try:
            make_step(name).check(ServerData())
        except FederationError:
            needy.append(name)
    free = {"anchored", "fedavg", "fednova", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "optimizer", "by-phase"}
    assert set(needy) == {*STEPS, *PRESETS} - free - set(MERGES)
    with pytest.raises(FederationError, match="needs labelled samples at the server, and there are none"):
        make_step("fw-hard").check(ServerData())
    with pytest.raises(FederationError, match="needs inputs"):
        make_step({"name": "optimizer", "step": "rows"}).check(ServerData())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fedavgg", "Unknown server step 'fedavgg'. Did you mean 'fedavg'. Known: .*adamerging.*fedavg.*wise-ft"),
        (5, "Unknown server step 5"),
        ({"lr": 1}, "Unknown server step None"),
        (
            {"name": "fedavg", "bye": "samples"},
            r"option of the server step FedAvg: 'bye'. Did you mean 'by'. Known: by\.",
        ),
        ({"name": "ties", "densitty": 0.1}, "'densitty'. Did you mean 'density'"),
        ({"name": "fedadam", "step": "fedavvg"}, "Unknown server step 'fedavvg'"),
        ({"name": "solve", "objective": "perplexity"}, "objective of a server step 'perplexity'.*Known: accuracy"),
        ({"name": "solve", "mixed": 0}, "'mixed' parameter of SolveStep"),
        ({"name": "few-shot", "objective": "entropy"}, "'mixed' inputs have no labels.*'distillation', or leave"),
        ({"name": "solve", "objective": {"name": "entropy", "bach_size": 3}}, "'bach_size'. Did you mean 'batch_size'"),
        ({"name": "solve", "objective": {"name": "proximity", "batch_size": 3}}, "objective 'proximity'.*it has none"),
        ({"name": "solve", "blocks": "layr"}, "kind of blocks 'layr'. Did you mean 'layer'"),
        ({"name": "solve", "solver": "newton"}, "'newton'"),
        ({"name": "solve", "domain": "ball"}, "'ball'"),
        ({"name": "solve", "max_iter": 1.5}, "'max_iter' parameter of SolveStep"),
        ({"name": "solve", "tol": -1}, "'tol' parameter of SolveStep"),
        ({"name": "rows-bound", "retention": {"bond": 1}}, "option of the retention.*'bond'. Did you mean 'bound'"),
        ({"name": "rows", "select": "bestt"}, "selector"),
        ({"name": "rows", "transforms": ["trimm"]}, "trimm"),
    ],
)
def test_specs_that_cannot_be_are_refused_with_the_nearest_that_can(spec: Any, message: str) -> None:
    with pytest.raises((OptionError, ValueError), match=message):
        make_step(spec)


@pytest.mark.parametrize(
    ("retention", "message"),
    [
        ({}, "either a penalty .* or a constraint"),
        ({"weight": 1.0, "bound": 1.0}, "either a penalty"),
        ({"bound": -1.0}, "'bound'"),
        ({"weight": float("inf")}, "'weight'"),
        ({"bound": 1.0, "by": "angle"}, "'by'"),
        ({"bound": 1.0, "outer": 0}, "'outer'"),
        ({"bound": 1.0, "batch_size": 0}, "'batch_size'"),
    ],
)
def test_retention_is_one_of_penalty_and_bound(retention: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_step({"name": "solve", "retention": retention})
    with pytest.raises(FederationError, match="begins anew in every round"):
        make_step({"name": "solve", "start": "run:folder"})


def test_a_step_stays_itself_and_every_name_is_told_about() -> None:
    step = make_step("fedavg")
    assert make_step(step) is step
    assert names() == sorted(set(names()))
    assert set(STEPS) & set(MERGES) == set()
    assert all(entry.summary and entry.data for entry in STEPS.values())


def test_the_table_costs_no_torch() -> None:
    code = "import sys, mergesolve.federated.registry as r; r.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
