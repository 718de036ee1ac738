"""What inspect reports, against direct formulas, and what it flags."""

import json

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, inspect

SHAPES = {"a.weight": (60, 50), "a.bias": (60,), "b.weight": (40, 60)}


def draw(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def plus(model, tau):
    return {name: value + tau[name] for name, value in model.items()}


def flat(model):
    return torch.cat([model[name].double().flatten() for name in SHAPES]).numpy()


BASE = draw(0)
EXPERTS = {f"e{i}": plus(BASE, draw(1 + i, 0.05)) for i in range(4)}


def kinds(report):
    return [(flag.kind, flag.model) for flag in report.flags]


@pytest.fixture(params=["streaming", "resident"])
def backend(request):
    return request.param


def test_geometry_equals_direct_formulas(backend):
    report = inspect(Pool.from_state_dicts(BASE, EXPERTS, backend=backend))
    tau = np.stack([flat(expert) - flat(BASE) for expert in EXPERTS.values()])
    norms = np.linalg.norm(tau, axis=1)
    np.testing.assert_allclose(report.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(report.cosines, tau @ tau.T / np.outer(norms, norms), atol=1e-6)
    assert report.base_norm == pytest.approx(np.linalg.norm(flat(BASE)), rel=1e-6)
    theta = flat(BASE) + tau
    expected = theta @ flat(BASE) / np.linalg.norm(theta, axis=1) / np.linalg.norm(flat(BASE))
    np.testing.assert_allclose(report.base_cosines, expected, atol=1e-6)
    opposite = np.mean(np.sign(tau)[:, None] * np.sign(tau)[None] < 0, axis=2)
    np.testing.assert_allclose(report.sign_conflicts, opposite, atol=1e-12)
    assert report.conflicted == pytest.approx(np.mean((tau > 0).any(0) & (tau < 0).any(0)), abs=1e-12)
    assert report.parameters == tau.shape[1]
    assert report.blocks == {"model": 1, "layer": 2, "tensor": 3, "row": 160}


def test_threads_do_not_change_the_report():
    """Pieces of a thousand elements, with NaN in some, added up by one thread and by three."""
    generator = torch.Generator().manual_seed(9)
    base = {"w": torch.randn(300_000, generator=generator), "v": torch.randn(70, 900, generator=generator)}
    experts = {
        f"e{i}": {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for i in range(5)
    }
    experts["e1"]["v"][3, 4:9] = float("nan")
    reports = []
    for threads in (1, 3, 3):
        pool = Pool.from_state_dicts(base, experts, backend="streaming")
        pool._workers._threads, pool._workers.limit = threads, 2048
        reports.append(json.dumps(inspect(pool).as_dict()))
    assert reports[0] == reports[1] == reports[2]
    assert "'v' (5)" in reports[0]


def test_healthy_pools_raise_no_flag(backend):
    assert inspect(Pool.from_state_dicts(BASE, EXPERTS, backend=backend)).flags == ()


def test_report_becomes_json():
    report = inspect(Pool.from_state_dicts(BASE, {**EXPERTS, "copy": EXPERTS["e0"]}))
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["names"] == [*EXPERTS, "copy"]
    assert plain["flags"][0]["kind"] == "duplicate"


def test_duplicates_are_flagged_once():
    report = inspect(Pool.from_state_dicts(BASE, {**EXPERTS, "copy": EXPERTS["e2"]}))
    assert kinds(report) == [("duplicate", "copy")]
    assert "'e2'" in report.flags[0].message


def test_an_expert_that_equals_the_base_is_flagged():
    assert kinds(inspect(Pool.from_state_dicts(BASE, {**EXPERTS, "same": BASE}))) == [("unchanged", "same")]


def test_an_expert_of_another_initialization_is_a_stranger():
    assert kinds(inspect(Pool.from_state_dicts(BASE, {**EXPERTS, "other": draw(99)}))) == [("stranger", "other")]


def test_a_noisy_expert_far_outside_the_rest_is_a_stranger():
    noisy = plus(EXPERTS["e1"], draw(98, 0.4))
    assert kinds(inspect(Pool.from_state_dicts(BASE, {**EXPERTS, "noisy": noisy}))) == [("stranger", "noisy")]


def test_a_base_that_is_not_the_base_is_flagged():
    assert kinds(inspect(Pool.from_state_dicts(draw(97), EXPERTS))) == [("base", "base")]


def test_nonfinite_values_are_counted_by_tensor_and_left_out(backend):
    broken = {name: value.clone() for name, value in EXPERTS["e0"].items()}
    broken["a.bias"][3] = float("nan")
    broken["b.weight"][0, :2] = float("inf")
    pool = Pool.from_state_dicts(BASE, {**EXPERTS, "broken": broken}, backend=backend)
    report = inspect(pool)
    (flag,) = [flag for flag in report.flags if flag.kind == "nonfinite"]
    assert (flag.model, set(flag.tensors)) == ("broken", {"a.bias", "b.weight"})
    assert "'a.bias' (1)" in flag.message
    assert "'b.weight' (2)" in flag.message
    assert np.isfinite(report.norms).all()


def test_a_nonfinite_base_is_named_as_the_base():
    base = {name: value.clone() for name, value in BASE.items()}
    base["a.bias"][0] = float("nan")
    flags = [flag for flag in inspect(Pool.from_state_dicts(base, EXPERTS)).flags if flag.kind == "nonfinite"]
    assert [flag.model for flag in flags] == ["base"]


@pytest.mark.parametrize(
    ("dtype", "scale", "flagged"),
    [
        (torch.bfloat16, 0.05, False),
        (torch.bfloat16, 0.004, True),
        (torch.float16, 0.004, False),
        (torch.float16, 0.0005, True),
    ],
)
def test_rounding_of_the_order_of_the_task_vectors_is_flagged(dtype, scale, flagged):
    experts = {f"e{i}": plus(BASE, draw(1 + i, scale)) for i in range(3)}
    stored = {name: {k: v.to(dtype) for k, v in expert.items()} for name, expert in experts.items()}
    report = inspect(Pool.from_state_dicts({k: v.to(dtype) for k, v in BASE.items()}, stored))
    assert kinds(report) == ([("rounding", name) for name in experts] if flagged else [])


def test_the_rounding_estimate_is_the_measured_rounding():
    """The share in the message is ‖rounding‖/‖τ‖, which is known here because the unrounded models are."""
    experts = {f"e{i}": plus(BASE, draw(1 + i, 0.004)) for i in range(2)}
    half = {name: {k: v.bfloat16() for k, v in expert.items()} for name, expert in experts.items()}
    rounded_base = {k: v.bfloat16() for k, v in BASE.items()}
    report = inspect(Pool.from_state_dicts(rounded_base, half))
    stored = flat(half["e0"]) - flat(rounded_base)
    true = flat(experts["e0"]) - flat(BASE)
    measured = np.linalg.norm(stored - true) / np.linalg.norm(stored)
    said = float(report.flags[0].message.split("about ")[1].split("%")[0]) / 100
    assert said == pytest.approx(measured, rel=0.05)


def test_one_expert_can_be_inspected():
    report = inspect(Pool.from_state_dicts(BASE, {"only": EXPERTS["e0"]}))
    assert report.cosines.shape == (1, 1)
    assert report.flags == ()


def test_transformed_pools_are_inspected_as_transformed():
    pool = Pool.from_state_dicts(BASE, EXPERTS)
    doubled = pool.transform(lambda name, base, tau: 2 * tau, "double")
    np.testing.assert_allclose(inspect(doubled).norms, 2 * inspect(pool).norms, rtol=1e-6)
