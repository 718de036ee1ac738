"""The accelerator's operator, run on the CPU: the same arithmetic without the hardware."""

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.pools.device import DeviceStack

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
        (stack.combine(point, blocks, since=pool.combine(0 * point, blocks)), pool.combine(point, blocks)),
    ):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
            assert found[name].is_contiguous()
    gradients = [
        {k: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for k, s in pool.tensors.items()} for _ in range(2)
    ]
    del gradients[1]["layers.0.bias"]  # a tensor that a gradient lacks counts as 0
    np.testing.assert_allclose(stack.correlate(gradients, blocks), pool.correlate(gradients, blocks), atol=1e-5)
    np.testing.assert_allclose(stack.gram(blocks), pool.gram(blocks), atol=1e-5)


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
    assert len(stack._runs(pool.blocks("layer"))) == 3
