"""mergekit's in-memory merges and ours, option by option."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed here; make parity"),
    pytest.mark.filterwarnings("default", "ignore:numpy.core is deprecated"),
]

Weights = dict[str, torch.Tensor]
WEIGHTS = {"first": 1.0, "second": 0.5, "third": -0.25, "fourth": 2.0}


@pytest.fixture
def theirs() -> Callable[..., Weights]:
    """theirs(base, experts, method, **parameters): mergekit's merge; lists are one value for each expert."""
    from mergekit.merge_methods.api import merge_state_dicts

    def merge(base: Weights | None, experts: Mapping[str, Weights], method: str, **parameters: Any) -> Weights:
        models = dict(experts) if base is None else {"base": base, **experts}
        with torch.no_grad():
            return merge_state_dicts(models, method, base=None if base is None else "base", parameters=parameters)

    return merge


def values(weights: Mapping[str, float]) -> list[float]:
    """The weights in the order of the experts."""
    return list(weights.values())


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_average(models, ours, theirs, assert_equal, normalize):
    base, experts = models
    expected = theirs(None, experts, "linear", weight=values(WEIGHTS), normalize=normalize)
    if normalize:
        assert_equal(ours(base, experts, "average", weights=WEIGHTS), expected)
    else:
        # Theirs adds raw weights, so nothing of the base is left: ours with the base at 1 − Σ w, minus that.
        found = ours(base, experts, "average", weights=WEIGHTS, normalize=False)
        rest = 1 - sum(WEIGHTS.values())
        assert_equal({name: value - rest * base[name] for name, value in found.items()}, expected, ulps=16)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic(models, ours, theirs, assert_equal, scale):
    base, experts = models
    expected = theirs(base, experts, "task_arithmetic", weight=values(WEIGHTS), **{"lambda": scale})
    assert_equal(ours(base, experts, "task-arithmetic", weights=WEIGHTS, scale=scale), expected)


def test_task_arithmetic_normalized_is_task_arithmetic_over_the_sum_of_weights(models, ours, theirs, assert_equal):
    base, experts = models
    expected = theirs(base, experts, "task_arithmetic", weight=values(WEIGHTS), normalize=True)
    assert_equal(ours(base, experts, "task-arithmetic", weights=WEIGHTS, scale=1 / sum(WEIGHTS.values())), expected)


@pytest.mark.parametrize("weights", [dict.fromkeys(WEIGHTS, 1.0), WEIGHTS])
@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.01])
def test_ties(models, ours, theirs, assert_equal, density, merge, weights):
    base, experts = models
    expected = theirs(
        base,
        experts,
        "ties",
        weight=values(weights),
        density=[density] * 4,
        normalize=merge == "mean",
        **{"lambda": 0.7},
    )
    found = ours(
        base, experts, "ties", density=density, trim="tensor", zero="plus", merge=merge, weights=weights, scale=0.7
    )
    assert_equal(found, expected)


def test_ties_where_totals_cancel_differs_from_the_default(models, ours, theirs):
    """What is 0 in total counts as positive in mergekit; our default drops it. Both are asserted, on one entry."""
    base, experts = models
    expected = theirs(base, experts, "ties", weight=[1.0] * 4, density=[1.0] * 4)
    name = "block.mlp.weight"
    cancels = sum(expert[name] - base[name] for expert in experts.values()).view(-1)[:5]
    assert torch.equal(cancels, torch.zeros(5))
    assert (expected[name].view(-1)[:5] > base[name].view(-1)[:5]).all()
    found = ours(base, experts, "ties", density=1.0, trim="tensor", scale=1.0)
    assert torch.equal(found[name].view(-1)[:5], base[name].view(-1)[:5])


@pytest.mark.parametrize("weights", [dict.fromkeys(WEIGHTS, 1.0), WEIGHTS])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.14, 0.01), (1.0, 0.2)])
def test_breadcrumbs(models, ours, theirs, assert_equal, density, gamma, weights):
    base, experts = models
    options = {"density": [density] * 4, "gamma": [gamma] * 4, "weight": values(weights), "lambda": 0.4}
    assert_equal(
        ours(base, experts, "breadcrumbs", density=density, top=gamma, scale=0.4, weights=weights),
        theirs(base, experts, "breadcrumbs", **options),
    )
    for normalize, merge in ((True, "mean"), (False, "sum")):
        assert_equal(
            ours(
                base, experts, "breadcrumbs-ties", density=density, top=gamma, scale=0.4, weights=weights, zero="plus",
                merge=merge,
            ),
            theirs(base, experts, "breadcrumbs_ties", normalize=normalize, **options),
        )  # fmt: skip


@pytest.fixture
def with_their_masks(theirs, record, use_masks) -> Callable[..., Weights]:
    """Merge as mergekit does with a seed, and hand its masks, drawn tensor by tensor, expert by expert, to ours."""

    def merge(module: str, base: Weights, experts: Mapping[str, Weights], method: str, **parameters: Any) -> Weights:
        torch.manual_seed(17)
        with record("bernoulli") as drawn:
            expected = theirs(base, experts, method, **parameters)
        places = [(expert, name) for name in base for expert in experts]
        assert len(drawn) == len(places)
        use_masks(module, dict(zip(places, drawn, strict=True)))
        return expected

    return merge


@pytest.mark.parametrize("rescale", ["l1", "none"])
@pytest.mark.parametrize("density", [0.9, 0.3])
def test_dare_with_the_same_masks(models, ours, with_their_masks, assert_equal, density, rescale):
    base, experts = models
    options = {"weight": values(WEIGHTS), "density": [density] * 4, "rescale": rescale == "l1", "lambda": 0.6}
    expected = with_their_masks("dare", base, experts, "dare_linear", **options)
    same = {"density": density, "rescale": rescale, "weights": WEIGHTS, "scale": 0.6}
    assert_equal(ours(base, experts, "dare", **same), expected)
    for normalize, merge in ((True, "mean"), (False, "sum")):
        expected = with_their_masks("dare", base, experts, "dare_ties", normalize=normalize, **options)
        assert_equal(ours(base, experts, "dare-ties", zero="plus", merge=merge, **same), expected)


@pytest.mark.parametrize("rescale", ["l1", "none"])
def test_della_with_the_same_masks(models, ours, with_their_masks, assert_equal, rescale):
    """On matrices and vectors: mergekit ranks convolutions along their second dimension, and fails on one element."""
    base, experts = models
    names = [name for name, value in base.items() if value.dim() in (1, 2) and value.numel() > 1]
    base = {name: base[name] for name in names}
    experts = {expert: {name: state[name] for name in names} for expert, state in experts.items()}
    options = {
        "weight": values(WEIGHTS), "density": [0.5] * 4, "epsilon": [0.2] * 4, "rescale": rescale == "l1", "lambda": 0.6
    }  # fmt: skip
    same = {"density": 0.5, "epsilon": 0.2, "window": "symmetric", "rescale": rescale, "weights": WEIGHTS, "scale": 0.6}
    expected = with_their_masks("della", base, experts, "della_linear", **options)
    assert_equal(ours(base, experts, "della-linear", **same), expected)
    for normalize, merge in ((True, "mean"), (False, "sum")):
        expected = with_their_masks("della", base, experts, "della", normalize=normalize, **options)
        assert_equal(ours(base, experts, "della", zero="plus", merge=merge, **same), expected)


def test_della_keeps_with_the_same_probabilities(models, record):
    """The probabilities that mergekit hands to its generator are ours, for rows of matrices and whole vectors."""
    from mergekit.sparsify import della_magprune
    from mergesolve.pools.transforms.della import Della

    base, experts = models
    handed: list[torch.Tensor] = []
    original = torch.bernoulli
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda p: (handed.append(p.clone()), original(p))[1])
        for name in ("block.mlp.weight", "block.attention.bias"):
            tau = experts["first"][name] - base[name]
            della_magprune(tau, density=0.6, epsilon=0.15)
            rows = tau.abs().view(-1, tau.shape[-1])
            distinct = torch.tensor([len(row.unique()) == len(row) for row in rows])
            found = Della(density=0.6, epsilon=0.15, window="symmetric").probabilities(rows, 0.6)
            torch.testing.assert_close(found[distinct], handed[-1][distinct], rtol=0, atol=1e-6)
