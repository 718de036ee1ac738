"""DARE, DELLA, Breadcrumbs, consensus and PCB: identities, and the laws that random masks follow."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import make_merge, merge_weights
from scipy import stats


def merged(pool, name, **options):
    return merge_weights(pool, make_merge({"name": name, **options}))


@pytest.fixture
def pool(sampled):
    return Pool.from_state_dicts(*sampled("normal", 4, "float32"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dare", {"density": 1.0}),
        ("dare", {"density": 1.0, "rescale": "l1"}),
        ("della-linear", {"density": 1.0}),
        ("breadcrumbs", {"density": 1.0, "top": 0.0}),
        ("consensus", {"agree": 1, "tall": 1e-9}),
    ],
)
def test_nothing_dropped_is_task_arithmetic(name, options, pool):
    wanted = merged(pool, "task-arithmetic")
    for key, value in merged(pool, name, **options).items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dare-ties", {}), ("della", {}), ("breadcrumbs-ties", {})],
)
def test_nothing_dropped_is_ties_without_trimming(name, options, pool):
    wanted = merged(pool, "ties", density=1.0)
    for key, value in merged(pool, name, density=1.0, **options).items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)


SIZE = 100_000


@pytest.fixture(scope="module")
def single():
    """One expert with a known long task vector, whose base is 0."""
    tau = torch.randn(100, SIZE // 100, generator=torch.manual_seed(0))
    return tau, Pool.from_state_dicts({"w": torch.zeros(tau.shape)}, {"e": {"w": tau}})


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_has_the_mean_and_the_variance_of_its_law(density, single):
    """Catalogue of properties, 10: E[τ̂] = τ and E‖τ̂ − τ‖² = (1/p − 1) ‖τ‖²; z-tests at fixed seeds, |z| < 4."""
    tau, pool = single
    tau = tau.double()
    drawn = [merged(pool, "dare", density=density, scale=1.0, seed=seed)["w"].double() for seed in range(20)]
    kept = sum(int((sample != 0).sum()) for sample in drawn)
    trials = 20 * SIZE
    assert abs(kept - trials * density) < 4 * np.sqrt(trials * density * (1 - density))
    for sample in drawn:
        nonzero = sample != 0
        torch.testing.assert_close(sample[nonzero], tau[nonzero] / density, rtol=1e-6, atol=0)
    # Σ_e (τ̂_e − τ_e) τ_e has mean 0 and variance (1/p − 1) Σ τ⁴
    spread = np.sqrt((1 / density - 1) * float((tau**4).sum()))
    scores = [float(((sample - tau) * tau).sum()) / spread for sample in drawn]
    assert stats.kstest(scores, "norm").pvalue > 1e-3
    # ‖τ̂ − τ‖² = Σ τ² (m/p − 1)², of mean (1/p − 1) ‖τ‖² and known variance
    mean = (1 / density - 1) * float((tau**2).sum())
    outcomes, chances = np.array([(1 / density - 1) ** 2, 1.0]), np.array([density, 1 - density])
    variance = (chances @ outcomes**2 - (chances @ outcomes) ** 2) * float((tau**4).sum())
    squares = [float(((sample - tau) ** 2).sum()) for sample in drawn]
    assert abs(np.mean(squares) - mean) < 4 * np.sqrt(variance / 20) + 1e-9 * mean  # at p = 1/2 it is constant


def test_dare_keeps_the_l1_norm_when_asked(single):
    tau, pool = single
    found = merged(pool, "dare", density=0.3, scale=1.0, rescale="l1")["w"]
    assert float(found.double().abs().sum()) == pytest.approx(float(tau.double().abs().sum()), rel=1e-6)


def test_masks_belong_to_experts_by_name(sampled):
    """An expert loses the same entries alone, in another order and among others; another one loses others."""
    base, experts = sampled("normal", 4, "float32")
    pool = Pool.from_state_dicts(base, experts)
    alone = merged(pool.subset(["e2"]), "dare", density=0.5, scale=1.0)
    within = merged(pool, "dare", density=0.5, scale=1.0, weights={"e0": 0.0, "e1": 0.0, "e3": 0.0})
    renamed = merged(Pool.from_state_dicts(base, {"other": experts["e2"]}), "dare", density=0.5, scale=1.0)
    for name in alone:
        assert torch.equal(alone[name], within[name])
    assert not torch.equal(alone["b.weight"], renamed["b.weight"])
    assert not torch.equal(
        alone["b.weight"], merged(pool.subset(["e2"]), "dare", density=0.5, scale=1.0, seed=1)["b.weight"]
    )


@pytest.mark.parametrize("window", ["paper", "symmetric"])
def test_della_keeps_entries_as_often_as_their_rank_says(window, single):
    """Pearson's χ² over the entries' ranks in tenths, against the probabilities of the formula."""
    tau, pool = single
    density, epsilon, m = 0.4, 0.3, tau.shape[1]
    ranks = tau.abs().argsort(1).argsort(1).numpy() + 1
    seeds = 20
    kept = sum(
        (
            merged(pool, "della-linear", density=density, epsilon=epsilon, window=window, scale=1.0, seed=seed)[
                "w"
            ].numpy()
            != 0
        ).astype(int)
        for seed in range(seeds)
    )
    if window == "paper":
        chances = density - epsilon / 2 + epsilon * ranks / m
    else:
        chances = density - epsilon + 2 * epsilon * (ranks - 1) / (m - 1)
    tenth = (ranks - 1) * 10 // m
    observed = np.array([kept[tenth == k].sum() for k in range(10)])
    expected = np.array([seeds * chances[tenth == k].sum() for k in range(10)])
    variance = np.array([seeds * (chances * (1 - chances))[tenth == k].sum() for k in range(10)])
    statistic = ((observed - expected) ** 2 / variance).sum()
    assert stats.chi2.sf(statistic, 10) > 1e-3
    assert observed[9] > 1.5 * observed[0]


def test_breadcrumbs_drops_both_tails(single):
    tau, pool = single
    found = merged(pool, "breadcrumbs", density=0.2, top=0.05, scale=1.0)["w"]
    kept = tau[found != 0].abs()
    order = tau.abs().flatten().sort(descending=True).values
    assert len(kept) == SIZE // 5
    assert float(kept.max()) == float(order[SIZE // 20])
    assert float(kept.min()) == float(order[SIZE // 20 + SIZE // 5 - 1])


def test_consensus_of_more_experts_than_there_are_is_the_base(pool):
    base = pool.base_weights()
    for name, value in merged(pool, "consensus", agree=5).items():
        assert torch.equal(value, base[name])


@pytest.mark.parametrize("frozen", [0, 3, 40])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8, 1.0])
def test_pcb_places_its_cut_among_positive_zero_and_negative_scores(density, frozen):
    """Few entries, many of them 0 or in conflict, beside tensors that are the same in all models."""
    rng = np.random.default_rng(5)
    taus = rng.integers(-3, 4, (3, 29)) * rng.integers(0, 2, (3, 29)) + 0.125 * rng.normal(size=(3, 29))
    taus[:, :9] = 0
    taus = taus.astype(np.float32)
    base = {"w": torch.zeros(29), "z": torch.ones(frozen)}
    experts = {f"e{i}": {"w": torch.from_numpy(row), "z": base["z"]} for i, row in enumerate(taus)}
    found = merged(Pool.from_state_dicts(base, experts), "pcb", density=density, scale=1.0)["w"]
    flat = np.concatenate([taus.astype(np.float64), np.zeros((3, frozen))], axis=1)
    d = flat.shape[1]
    magnitude = np.abs(flat)
    ordered = np.sort(magnitude, axis=1)
    low, high = ordered[:, int(d * 1e-4), None], ordered[:, max(0, int(d * (1 - 1e-4) - 1)), None]
    magnitude = magnitude.clip(low, high)
    score = np.exp(3 * ((magnitude - low) / (high - low)) ** 2) * np.tanh(flat * flat.sum(0))
    floor = np.sort(score, axis=1)[:, int(d * (1 - density)), None]
    weight = (score.clip(floor, None) - floor) / (score.max(1, keepdims=True) - floor)
    wanted = (weight * np.sign(flat) * magnitude).sum(0) / weight.sum(0).clip(1e-12)
    np.testing.assert_allclose(found, wanted[:29], rtol=1e-4, atol=1e-5)
