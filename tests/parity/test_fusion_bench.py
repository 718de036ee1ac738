"""fusion_bench's algorithms on pools of modules and ours on the same weights."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("fusion_bench") is None, reason="fusion_bench is not installed here; make parity"),
    pytest.mark.filterwarnings("default", "ignore:numpy.core is deprecated"),
]

Weights = dict[str, torch.Tensor]


def module_of(weights: Weights) -> torch.nn.Module:
    """A tree of modules with copies of these parameters under these names."""
    root = torch.nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(value.clone()))
    return root


@pytest.fixture
def theirs() -> Callable[..., Weights]:
    """theirs(base, experts, algorithm): what it makes of the pool, as a state dict."""
    from fusion_bench import BaseModelPool

    def merge(base: Weights, experts: Mapping[str, Weights], algorithm: Any) -> Weights:
        modules = {name: module_of(weights) for name, weights in experts.items()}
        merged = algorithm.run(BaseModelPool({"_pretrained_": module_of(base), **modules}))
        return {name: value.detach() for name, value in merged.state_dict().items()}

    return merge


def test_average(models, ours, theirs, assert_equal):
    from fusion_bench.method import SimpleAverageAlgorithm

    assert_equal(ours(*models, "average"), theirs(*models, SimpleAverageAlgorithm()))


@pytest.mark.parametrize("normalize", [True, False])
def test_weighted_average(models, ours, theirs, assert_equal, normalize):
    from fusion_bench.method import WeightedAverageAlgorithm

    weights = [0.5, 0.25, 0.125, 0.125] if not normalize else [0.5, 1.0, 2.0, 0.25]
    expected = theirs(*models, WeightedAverageAlgorithm(normalize=normalize, weights=weights, verbose=False))
    named = dict(zip(models[1], weights, strict=True))
    assert_equal(ours(*models, "average", weights=named, normalize=normalize), expected)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_task_arithmetic(models, ours, theirs, assert_equal, scale):
    from fusion_bench.method import TaskArithmeticAlgorithm

    assert_equal(
        ours(*models, "task-arithmetic", scale=scale), theirs(*models, TaskArithmeticAlgorithm(scaling_factor=scale))
    )


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("threshold", [20, 0.05, 73])
def test_ties(models, ours, theirs, assert_equal, threshold, merge):
    """Global trim, ties in magnitude kept, totals of 0 to the majority of signs."""
    from fusion_bench.method import TiesMergingAlgorithm

    expected = theirs(
        *models, TiesMergingAlgorithm(scaling_factor=0.3, threshold=threshold, remove_keys=[], merge_func=merge)
    )
    density = threshold / 100 if threshold > 1 else threshold
    found = ours(*models, "ties", density=density, trim="model", zero="majority", merge=merge, scale=0.3)
    assert_equal(found, expected)


def test_ties_counts_frozen_tensors(models, ours, theirs, assert_equal):
    """The density is of all parameters, those that no expert has changed among them."""
    from fusion_bench.method import TiesMergingAlgorithm

    base, experts = models
    frozen = torch.randn(50, 50, generator=torch.Generator().manual_seed(3))
    base = {**base, "frozen.weight": frozen}
    experts = {name: {**weights, "frozen.weight": frozen.clone()} for name, weights in experts.items()}
    expected = theirs(
        base, experts, TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="mean")
    )
    found = ours(base, experts, "ties", density=0.2, trim="model", zero="majority", merge="mean", scale=0.3)
    assert_equal(found, expected)


def test_dare_with_the_same_masks(models, ours, theirs, record, use_masks, assert_equal):
    from fusion_bench.method.dare import DareSimpleAverage, DareTaskArithmetic, DareTiesMerging

    base, experts = models
    drop = 0.4
    places = [(expert, name) for expert in experts for name in module_of(base).state_dict()]
    common = {"sparsity_ratio": drop, "only_on_linear_weights": False, "rescale": True}
    ties = {"scaling_factor": 0.5, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    cases = {
        DareTaskArithmetic(scaling_factor=0.3, **common): ("dare", {"scale": 0.3}),
        DareSimpleAverage(**common): ("dare", {"scale": 0.25}),
        DareTiesMerging(**common, **ties): None,
    }
    for algorithm, ours_is in cases.items():
        torch.manual_seed(29)
        with record("rand_like") as drawn:
            expected = theirs(base, experts, algorithm)
        masks = {place: drawn[i] > drop for i, place in enumerate(places)}
        assert len(drawn) == len(places)
        use_masks("dare", masks)
        if ours_is is not None:
            method, options = ours_is
            assert_equal(ours(base, experts, method, density=1 - drop, **options), expected)
        else:
            dropped = {
                expert: {name: base[name] + masks[expert, name] * (state[name] - base[name]) for name in base}
                for expert, state in experts.items()
            }
            # Their TIES trims after the drop: ours, on models that have been dropped, with the rescaling in the scale.
            found = ours(
                base, dropped, "ties", density=0.2, trim="model", zero="majority", merge="sum", scale=0.5 / (1 - drop)
            )
            assert_equal(found, expected)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_magmax(models, ours, theirs, assert_equal, scale):
    """Equal magnitudes of opposite sign aside, where theirs takes the last expert and ours the first."""
    from fusion_bench.method import MagMaxAlgorithm

    base, experts = without_ties_in_magnitude(models)
    assert_equal(
        ours(base, experts, "magmax", scale=scale), theirs(base, experts, MagMaxAlgorithm(scaling_factor=scale))
    )


def without_ties_in_magnitude(models: tuple[Weights, dict[str, Weights]]) -> tuple[Weights, dict[str, Weights]]:
    """The models with a small amount, different for each expert, added to every entry that cancels with another's."""
    base, experts = models
    amounts = {name: 2.0**-10 * (i + 1) for i, name in enumerate(experts)}
    return base, {name: {k: v + amounts[name] for k, v in weights.items()} for name, weights in experts.items()}


def test_emr_unified_vector(models, ours, theirs, assert_equal):
    from fusion_bench.method.emr_merging.utils import emr_merge

    base, experts = without_ties_in_magnitude(models)
    taus = [{name: weights[name] - base[name] for name in base} for weights in experts.values()]
    unified, _, _ = emr_merge(taus)
    assert_equal(ours(base, experts, "emr"), {name: base[name] + unified[name] for name in base})


@pytest.mark.parametrize("agree", [1, 2, 3])
@pytest.mark.parametrize("tall", [0.4, 1.0])
def test_consensus_of_tall_masks(models, ours, assert_equal, tall, agree):
    """Theirs keeps the masks in files between its steps, so the masks are theirs and the rest is spelled out."""
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    base, experts = models
    flat = {name: torch.cat([weights[key].reshape(-1) for key in base]) for name, weights in experts.items()}
    origin = torch.cat([base[key].reshape(-1) for key in base])
    theta = torch.stack(list(flat.values()))
    masks = generate_task_masks(theta - origin, theta, origin, tall_mask_lambda=tall)
    merged = origin + 0.3 * (masks.sum(0) >= agree) * (theta - origin).sum(0)
    expected, start = {}, 0
    for key, value in base.items():
        expected[key] = merged[start : start + value.numel()].view(value.shape)
        start += value.numel()
    assert_equal(ours(base, experts, "consensus", tall=tall, agree=agree, scale=0.3), expected)
