"""The accelerator's operator, run on the CPU: the same arithmetic without the hardware."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.pools.device import DeviceStack
from mergesolve.pools.operator import SEGMENT

KINDS = ["model", "layer", "tensor", "row", [r"\.weight$", r"."]]


@pytest.fixture
def pool():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.weight": (5, 7),
        "layers.0.bias": (5,),
        "layers.1.weight": (3, 5, 2),
        "layers.1.bias": (1,),
        "scale": (),
        "empty": (0, 4),
        "long": (2, 3 * SEGMENT + 5),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        f"e{i}": {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for i in range(4)
    }
    return Pool.from_state_dicts(base, experts, backend="streaming")


@pytest.fixture
def stack(pool):
    return DeviceStack(pool._source, pool._workers, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_streaming_operator(kind, pool, stack):
    blocks = pool.blocks(kind)
    rng = np.random.default_rng(0)
    point = rng.normal(size=(blocks.count, pool.n))
    for found, expected in (
        (stack.combine(point, blocks), pool.combine(point, blocks)),
        (stack.combine(point, blocks, with_base=False), pool.displacement(point, blocks)),
        (stack.combine(point, blocks, since=(0 * point, pool.combine(0 * point, blocks))), pool.combine(point, blocks)),
        (
            stack.combine(point, blocks, since=(0 * point, stack.combine(0 * point, blocks))),
            pool.combine(point, blocks),
        ),
    ):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
            assert found[name].is_contiguous()
    gradients = [
        {k: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for k, s in pool.tensors.items()} for _ in range(2)
    ]
    del gradients[1]["layers.0.bias"]  # a tensor that a gradient lacks counts as 0
    np.testing.assert_allclose(stack.correlate(gradients, blocks), pool.correlate(gradients, blocks), atol=2e-4)
    np.testing.assert_allclose(stack.gram(blocks), pool.gram(blocks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_is_adjoint(kind, pool, stack):
    blocks = pool.blocks(kind)
    rng = np.random.default_rng(1)
    point = rng.normal(size=(blocks.count, pool.n))
    gradient = {k: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for k, s in pool.tensors.items()}
    moved = stack.combine(point, blocks, with_base=False)
    left = sum(float((moved[k].double() * gradient[k].double()).sum()) for k in gradient)
    assert left == pytest.approx(float(np.sum(point * stack.correlate([gradient], blocks)[0])), abs=1e-4)


def test_zero_coefficients_give_the_base_bit_for_bit(pool, stack):
    blocks = pool.blocks("layer")
    base = pool.base_weights()
    for name, tensor in stack.combine(np.zeros((blocks.count, pool.n)), blocks).items():
        assert torch.equal(tensor, base[name])


def test_tensors_of_one_block_are_one_product(pool, stack):
    assert len(stack._runs(pool.blocks("model"))) == 1
    assert len(stack._runs(pool.blocks("layer"))) == 4


def test_since_writes_only_what_changed_into_the_same_memory(pool, stack):
    blocks = pool.blocks("tensor")
    old = np.random.default_rng(2).normal(size=(blocks.count, pool.n))
    new = old.copy()
    new[blocks.rows["long"]] = 0.5
    weights = stack.combine(old, blocks)
    marked = weights["layers.0.bias"].fill_(7.0)  # was not to be written to
    updated = stack.combine(new, blocks, since=(old, weights))
    assert all(updated[name] is weights[name] for name in pool.tensors)
    assert stack._shared(updated) is not None
    torch.testing.assert_close(updated["long"], pool.combine(new, blocks)["long"])
    assert bool((marked == 7.0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_with_nan_and_no_weight_does_no_harm(kind, pool):
    base = pool.combine(np.zeros((1, pool.n)), pool.blocks("model"))
    good = pool.combine(np.eye(pool.n)[:1], pool.blocks("model"))
    bad = {name: torch.full_like(value, float("nan")) for name, value in good.items()}
    pool = Pool.from_state_dicts(base, {"good": good, "bad": bad}, backend="streaming")
    stack = DeviceStack(pool._source, pool._workers, torch.device("cpu"))
    blocks = pool.blocks(kind)
    point = np.zeros((blocks.count, 2))
    point[:, 0] = 0.5
    for name, value in stack.combine(point, blocks).items():
        torch.testing.assert_close(value, pool.combine(point, blocks)[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["streaming", "resident"])
@pytest.mark.parametrize("kind", KINDS)
def test_pools_on_cuda_equal_pools_on_the_host(kind, backend, pool):
    experts = {name: pool.combine(np.eye(pool.n)[i : i + 1], pool.blocks("model")) for i, name in enumerate(pool.names)}
    base = pool.combine(np.zeros((1, pool.n)), pool.blocks("model"))
    there = Pool.from_state_dicts(base, experts, backend=backend, device="cuda")
    blocks = there.blocks(kind)
    point = np.random.default_rng(3).normal(size=(blocks.count, pool.n))
    weights = there.combine(point, blocks)
    gradient = {name: torch.randn(shape) for name, shape in there.tensors.items()}
    scores = there.correlate({name: value.cuda() for name, value in gradient.items()}, blocks)
    np.testing.assert_allclose(scores, pool.correlate(gradient, pool.blocks(kind)), rtol=1e-4, atol=1e-4)
    again = there.combine(point + 1, blocks, since=(point, weights))
    for name, value in pool.combine(point + 1, pool.blocks(kind)).items():
        assert again[name].is_cuda
        torch.testing.assert_close(again[name].cpu(), value, rtol=0, atol=1e-5)
