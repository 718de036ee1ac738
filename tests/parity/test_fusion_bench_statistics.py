"""fusion_bench's Fisher merging and RegMean, and ours, on the same weights and statistics."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

import pytest
import torch
from mergesolve.pools import Pool, Statistics
from mergesolve.solvers.closed_form import make_merge, merge_weights

pytestmark = [
    pytest.mark.skipif(find_spec("fusion_bench") is None, reason="fusion_bench is not installed here; make parity"),
    pytest.mark.filterwarnings("default", "ignore:numpy.core is deprecated"),
]

Weights = dict[str, torch.Tensor]
Models = tuple[Weights, dict[str, Weights]]
LINEAR = ("block.attention.weight", "block.mlp.weight")


@pytest.fixture
def without_scalars(models: Models) -> Models:
    """The models without their tensor of no dimensions, whose norm theirs does not take."""
    base, experts = models
    return (
        {name: value for name, value in base.items() if value.dim()},
        {
            expert: {name: value for name, value in weights.items() if value.dim()}
            for expert, weights in experts.items()
        },
    )


@pytest.fixture
def fishers(without_scalars: Models) -> dict[str, Weights]:
    """Fisher diagonals of different scales, a third of them 0."""
    generator = torch.Generator().manual_seed(5)
    base, experts = without_scalars

    def draw(value: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(value.shape, generator=generator).add(0.5).clamp_min(0) ** 2

    return {
        expert: {name: draw(value, 10.0**i) for name, value in base.items()}
        for i, expert in enumerate(experts, start=1)
    }


@pytest.fixture
def grams(models: Models) -> dict[str, Weights]:
    """Grams of the inputs of the linear layers, of few samples."""
    generator = torch.Generator().manual_seed(6)
    base, experts = models

    def draw(value: torch.Tensor) -> torch.Tensor:
        inputs = torch.randn(20, value.shape[1], generator=generator)
        return inputs.T @ inputs / len(inputs)

    return {expert: {name: draw(base[name]) for name in LINEAR} for expert in experts}


def merged(models: Models, kind: str, tensors: Mapping[str, Weights], **spec: object) -> Weights:
    """Our merge of models and statistics in memory."""
    pool = Pool.from_state_dicts(*models)
    return merge_weights(pool, make_merge(spec), Statistics.from_tensors(pool, kind, tensors))


def stacked(experts: Mapping[str, Weights]) -> dict[str, list[torch.Tensor]]:
    return {name: [weights[name] for weights in experts.values()] for name in next(iter(experts.values()))}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_fisher(
    without_scalars: Models,
    fishers: dict[str, Weights],
    assert_equal: Callable[..., None],
    normalize: bool,
    ridge: float,
) -> None:
    """Theirs adds the ridge to the norms, too: weights by hand say so, and ours without do not for large norms."""
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    experts = without_scalars[1]
    expected = merging_with_fisher_weights(
        stacked(experts), list(fishers.values()), torch.full((len(experts),), 1 / len(experts)), normalize, ridge
    )
    weights = None
    if normalize:
        norms = {expert: torch.cat([f.reshape(-1) for f in table.values()]).norm() for expert, table in fishers.items()}
        weights = {expert: float(1 / (norm + ridge)) for expert, norm in norms.items()}
    found = merged(without_scalars, "fisher", fishers, name="fisher", ridge=ridge, weights=weights)
    assert_equal(found, expected, ulps=16)
    if normalize and ridge < 1e-5:
        found = merged(without_scalars, "fisher", fishers, name="fisher", ridge=ridge, normalize=True)
        assert_equal(found, expected, ulps=16)


@pytest.mark.parametrize("shrink", [0.95, 0.9, 0.5])
def test_regmean(models: Models, grams: dict[str, Weights], assert_equal: Callable[..., None], shrink: float) -> None:
    """Up to their inverse in float32."""
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    theirs = [{name.removesuffix(".weight"): gram for name, gram in table.items()} for table in grams.values()]
    expected = merging_with_regmean_weights(stacked(models[1]), theirs, reduce_non_diagonal_ratio=shrink)
    assert_equal(merged(models, "gram", grams, name="regmean", shrink=shrink), expected, ulps=64)
