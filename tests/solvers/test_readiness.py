import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError, Problem
from mergesolve.solvers.diversity import bound_terms
from mergesolve.solvers.readiness import THRESHOLDS, check_pool, worst

SIZE = 400


def state(values):
    return {"layer.weight": torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(20, 20))}


def make_pool(**extra):
    """Five sound experts with nearly orthogonal task vectors of norm 2 around a base of norm 20, and others."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=SIZE)
    experts = {f"e{i}": base + 0.1 * rng.normal(size=SIZE) for i in range(5)}
    for name, make in extra.items():
        experts[name] = make(base, experts, rng)
    return Pool.from_state_dicts(state(base), {name: state(value) for name, value in experts.items()})


class Loss:
    """A loss of one task over the weights, given as a function of their flat float64 values."""

    tasks = ("only",)
    task_weights = np.ones(1)
    stochastic = False

    def __init__(self, function):
        self.function = function

    def value(self, weights):
        return float(self.function(weights["layer.weight"].double().numpy().ravel()))

    def task_losses(self, weights):
        return {"only": self.value(weights)}


def check(pool, function=None, **options):
    problem = Problem(pool, Loss(function), "model", "free") if function is not None else None
    return check_pool(pool, problem, **options)


def of(checked, name):
    return next(one for one in checked.experts if one.name == name)


def sound(pool):
    """½‖θ − c‖² with c near the average: no barrier anywhere."""
    centre = pool.combine(np.full((1, pool.n), 0.2), pool.blocks("model"))["layer.weight"].double().numpy().ravel()
    return lambda values: 1 + 0.5 * np.sum((values - centre) ** 2)


def test_sound_pool_goes():
    pool = make_pool()
    checked = check(pool, sound(pool))
    assert (checked.verdict, checked.kept_verdict) == ("go", "go")
    assert checked.kept == pool.names
    assert [one.reasons for one in checked.experts] == [[]] * 5
    assert checked.gain.gain == pytest.approx(checked.gain.spread, rel=1e-4)


def test_broken_experts_are_named_and_the_rest_goes():
    pool = make_pool(
        copy=lambda base, experts, rng: experts["e1"],
        stranger=lambda base, experts, rng: rng.normal(size=SIZE),
        noisy=lambda base, experts, rng: experts["e2"] + 0.6 * rng.normal(size=SIZE),
        nan=lambda base, experts, rng: np.where(np.arange(SIZE) == 3, np.nan, experts["e3"]),
    )
    checked = check(pool)
    verdicts = {one.name: one.verdict for one in checked.experts}
    assert verdicts == {
        **{f"e{i}": "go" for i in range(5)}, "copy": "caution", "stranger": "no-go", "noisy": "no-go", "nan": "no-go",
    }  # fmt: skip
    assert checked.kept == ("e0", "e1", "e2", "e3", "e4")
    assert (checked.verdict, checked.kept_verdict) == ("no-go", "go")
    assert "leave out stranger, noisy, nan" in checked.reasons[0]


def test_lengths_and_near_copies_ask_for_caution():
    pool = make_pool(
        long=lambda base, experts, rng: base + 3 * (experts["e0"] - base) * rng.choice([-1, 1], SIZE),
        near=lambda base, experts, rng: experts["e1"] + 0.02 * rng.normal(size=SIZE),
    )
    checked = check(pool, thresholds={"norm_ratio": 2.0})
    assert of(checked, "near").verdict == "caution"
    assert "nearly the same as 'e1'" in of(checked, "near").reasons[0]
    relaxed = check(pool, thresholds={"similar": 0.999})
    assert of(relaxed, "near").verdict == "go"
    assert relaxed.thresholds["similar"] == 0.999
    half = make_pool(short=lambda base, experts, rng: base + 0.3 * (experts["e0"] - base) * rng.choice([-1, 1], SIZE))
    assert "0.3 times as long" in of(check(half), "short").reasons[0]


def test_expert_behind_a_barrier_is_no_go():
    """A ridge across the way of one expert: its loss is the others', so only the segment tells."""
    pool = make_pool()
    away = one_expert(pool, 0) - one_expert(pool, 1)
    away /= np.linalg.norm(away)
    low, high = one_expert(pool, 1) @ away, one_expert(pool, 0) @ away

    def ridge(values):
        t = (values @ away - low) / (high - low)
        return 1 + 4 * np.exp(-((t - 0.7) ** 2) / 0.005)

    checked = check(pool, ridge)
    assert of(checked, "e0").verdict == "no-go"
    assert "different basins" in of(checked, "e0").reasons[0]
    assert of(checked, "e0").relative_barrier > 1
    assert checked.kept == ("e1", "e2", "e3", "e4")


def one_expert(pool, i):
    point = np.zeros((1, pool.n))
    point[0, i] = 1.0
    return pool.combine(point, pool.blocks("model"))["layer.weight"].double().numpy().ravel()


def test_average_that_loses_is_no_go_and_one_worse_than_the_base_asks_for_caution():
    pool = make_pool()
    centre = np.mean([one_expert(pool, i) for i in range(5)], axis=0)
    concave = check(pool, lambda values: 100 - 0.1 * np.sum((values - centre) ** 2))
    assert concave.gain.gain < 0
    assert concave.kept_verdict == "no-go"
    base = pool.base_weights()["layer.weight"].double().numpy().ravel()
    worse = check(pool, lambda values: 1 + np.sum((values - base) ** 2))
    assert worse.kept_verdict == "caution"
    assert "worse than the base" in worse.kept_reasons[0]


def test_numbers_are_those_of_the_weights():
    pool = make_pool()
    loss = sound(pool)
    checked = check(pool, loss)
    experts = [one_expert(pool, i) for i in range(5)]
    average = np.mean(experts, axis=0)
    assert checked.delta_squared["all"] == pytest.approx(max(np.sum((e - average) ** 2) for e in experts), rel=1e-4)
    pairs = [np.linalg.norm(a - b) for a in experts for b in experts]
    assert checked.max_distance == pytest.approx(max(pairs), rel=1e-4)
    others = np.mean(experts[1:], axis=0)
    first = checked.experts[0]
    assert first.to_average == pytest.approx(np.linalg.norm(experts[0] - others), rel=1e-4)
    assert first.influence == pytest.approx(loss(average) - loss(others), abs=1e-4)
    assert first.best_gain[0] == "only"


def test_check_does_not_depend_on_the_order_of_the_pool():
    pool = make_pool(stranger=lambda base, experts, rng: rng.normal(size=SIZE))
    turned = pool.subset(pool.names[::-1])
    one, other = check(pool, sound(pool)), check(turned, sound(pool))
    for name in pool.names:
        first, second = of(one, name), of(other, name)
        assert first.verdict == second.verdict
        assert first.to_average == pytest.approx(second.to_average, rel=1e-5)
        assert first.influence == pytest.approx(second.influence, abs=1e-4)


def test_terms_of_the_bound_are_those_of_the_subsets():
    pool = make_pool(stranger=lambda base, experts, rng: rng.normal(size=SIZE))
    rng = np.random.default_rng(1)
    predictions = rng.dirichlet(np.ones(3), size=(6, 10))
    asked = []

    def bound(experts):
        asked.append(list(experts))
        return bound_terms(predictions[list(experts)], np.zeros(10, dtype=int))

    checked = check(pool, sound(pool), bound=bound)
    assert asked == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]
    kept = checked.bound["kept"]
    assert kept["averaging_error"] == pytest.approx(kept["average_risk"] - kept["ensemble_risk"])
    assert kept["average_risk"] == pytest.approx(checked.average_loss)


def test_pool_with_one_sound_expert_is_nothing_to_merge():
    base = np.random.default_rng(0).normal(size=SIZE)
    pool = Pool.from_state_dicts(state(base), {"only": state(base + 0.1)})
    checked = check(pool)
    assert checked.verdict == "no-go"
    assert "nothing to merge" in checked.reasons[0]


def test_strangers_alone_are_measured_all_the_same():
    rng = np.random.default_rng(0)
    base = state(rng.normal(size=SIZE))
    pool = Pool.from_state_dicts(base, {f"s{i}": state(rng.normal(size=SIZE)) for i in range(3)})
    checked = check(pool, lambda values: 1 + np.sum(values**2))
    assert (checked.kept, checked.averaged) == ((), ("s0", "s1", "s2"))
    assert checked.gain.gain > 0
    assert all(one.barrier == 0 for one in checked.experts)
    assert checked.verdict == "no-go"


def test_unknown_thresholds_are_refused_and_verdicts_are_ordered():
    with pytest.raises(OptionError, match="no threshold 'barier'"):
        check(make_pool(), thresholds={"barier": 1})
    for limit in (float("nan"), float("inf"), -0.1):
        with pytest.raises(OptionError, match="'similar' must be a number of at least 0"):
            check(make_pool(), thresholds={"similar": limit})
    assert worst(["go", "no-go", "caution"]) == "no-go"
    assert worst([]) == "go"
    assert set(THRESHOLDS) == {"norm_ratio", "similar", "barrier_caution", "barrier_no_go"}
