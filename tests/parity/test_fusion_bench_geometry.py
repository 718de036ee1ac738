"""fusion_bench's merges by angles and singular vectors, and ours on the same weights."""

from collections.abc import Mapping
from importlib.util import find_spec

import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form.masks import write_masks
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.skipif(find_spec("fusion_bench") is None, reason="fusion_bench is not installed here; make parity"),
    pytest.mark.filterwarnings("default", "ignore:numpy.core is deprecated"),
]

Weights = dict[str, torch.Tensor]
Models = tuple[Weights, dict[str, Weights]]


def task_vectors(models: Models) -> list[Weights]:
    base, experts = models
    return [{name: weights[name] - base[name] for name in base} for weights in experts.values()]


def plus(base: Weights, merged: Mapping[str, torch.Tensor], scale: float = 1.0) -> Weights:
    return {name: value + scale * merged[name] for name, value in base.items()}


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(models, ours, assert_equal, t):
    """Of raw weights, each tensor as one vector; those of one element are parallel or opposite."""
    from fusion_bench.method.slerp.slerp import slerp_on_state_dicts

    base, experts = models
    first, second = experts["first"], experts["second"]
    expected = slerp_on_state_dicts(t, first, second)
    assert_equal(ours(base, {"first": first, "second": second}, "slerp", t=t, of="weights"), expected)


@pytest.mark.parametrize("far", [False, True])
def test_slerp_of_models_that_have_little_in_common(models, ours, assert_equal, far):
    from fusion_bench.method.slerp.slerp_utils import slerp

    base, experts = models
    generator = torch.Generator().manual_seed(11)
    other = {k: torch.randn(v.shape, generator=generator) if far else v for k, v in experts["second"].items()}
    expected = {name: slerp(0.4, experts["first"][name], other[name]) for name in base}
    assert_equal(ours(base, {"first": experts["first"], "second": other}, "slerp", t=0.4), expected, ulps=16)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_model_stock(models, ours, assert_equal, count):
    """Theirs averages angles in degrees; scalars and cancelled tensors aside, where both are degenerate."""
    from fusion_bench import BaseModelPool
    from fusion_bench.method import ModelStock

    base, experts = models
    names = [name for name, value in base.items() if value.numel() > 1]
    base = {name: base[name] for name in names}
    chosen = {expert: {name: experts[expert][name] for name in names} for expert in list(experts)[:count]}
    modules = {name: as_module(weights) for name, weights in chosen.items()}
    with torch.no_grad():
        merged = ModelStock().run(BaseModelPool({"_pretrained_": as_module(base), **modules}))
    expected = {place.replace("/", "."): value.detach() for place, value in merged.state_dict().items()}
    assert_equal(ours(base, chosen, "model-stock", average="angle"), expected, ulps=32)


def as_module(weights: Weights) -> torch.nn.ParameterDict:
    """Parameters by name; dots, which separate modules, become slashes."""
    return torch.nn.ParameterDict({name.replace(".", "/"): value.clone() for name, value in weights.items()})


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_task_singular_vectors(models, ours, assert_equal, scale):
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    expected = compute_and_sum_svd_mem_reduction(task_vectors(models), accelerator="cpu")
    assert_equal(ours(*models, "tsv-m", scale=scale), plus(models[0], expected, scale), ulps=64)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_isotropic_in_the_common_subspace(models, ours, assert_equal, scale):
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    expected = iso_c(task_vectors(models), accelerator="cpu")
    assert_equal(ours(*models, "iso-c", scale=scale), plus(models[0], expected, scale), ulps=64)


@pytest.mark.parametrize("common", [0.8, 0.5, 1.0])
def test_isotropic_in_common_and_task_subspaces(models, ours, assert_equal, common):
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    expected = iso_cts(task_vectors(models), common_space_fraction=common, accelerator="cpu")
    assert_equal(ours(*models, "iso-cts", common=common), plus(models[0], expected), ulps=256)


def test_knots(models, ours, assert_equal):
    """Their basis, their election and disjoint mean on what it makes of the task vectors; nothing is trimmed."""
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.ties_merging.ties_merging_utils import disjoint_merge, resolve_sign

    base, taus = models[0], task_vectors(models)
    merged = {}
    for name, value in base.items():
        if value.dim() != 2:
            merged[name] = sum(tau[name] for tau in taus) / len(taus)
            continue
        basis, singular, turned = subspace_alignment([tau[name] for tau in taus], eps=1e-5)
        stack = torch.stack([singular[:, None] * piece for piece in turned])
        merged[name] = basis @ disjoint_merge(stack, "mean", resolve_sign(stack))
    assert_equal(ours(*models, "knots", density=1.0), plus(base, merged), ulps=64)


@pytest.mark.parametrize("tall", [0.4, 1.0])
def test_tall_masks_on_disk(models, tmp_path, tall):
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    base, experts = models
    write_masks(Pool.from_state_dicts(base, experts), tmp_path / "masks.safetensors", tall=tall)
    found = load_file(tmp_path / "masks.safetensors")
    for name, origin in base.items():
        theta = torch.stack([weights[name].reshape(-1) for weights in experts.values()])
        tau = theta - origin.reshape(-1)
        expected = generate_task_masks(tau, theta, origin.reshape(-1), tall_mask_lambda=tall).view(len(experts), -1)
        for expert, mask, delta in zip(experts, expected, tau, strict=True):
            bits = unpacked(found[f"{expert}/{name}"], origin.numel())
            decided = delta.abs() != tall * (tau.sum(0) - delta).abs()  # at equality theirs says no, the paper yes
            assert torch.equal(bits[decided], mask[decided])


def unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Bits, the first of each byte in its highest place."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (packed[:, None] >> shifts & 1).view(-1)[:count].bool()
